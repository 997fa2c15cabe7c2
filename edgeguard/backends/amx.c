/* MatMulIntegerToFloat for weights that come from memory, on x86 processors with AMX: an operator library for ONNX Runtime.

ONNX Runtime multiplies 32 tokens by a block of weights, then the next 32 by the same block. While it does the latter, nothing
is read from memory; so reading and multiplying take one after the other, at 8B more than half of a pass. Here weights are read
from memory once for up to 256 tokens, multiplied by 80 of them at a time, and the next ones are asked for meanwhile.
The sums are the same whole numbers and are scaled in the same order, so the results are the same bits.

Tiles: see Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX). Linux only, where AMX is to be
asked for; elsewhere this file is empty.
*/
#if defined(__x86_64__) && defined(__linux__)

#define _GNU_SOURCE
#include <immintrin.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "product.h"

/* ---- weights: tiles of 64 rows and 16 columns, 1 KiB; a strip is all tiles of 16 columns, one behind the other ---- */

enum { LANES = 16, DEPTH = 64, LINE = 64, TILE = LANES * LINE, SUMS = LANES * LANES, HUGE_PAGE = 2 << 20 };
typedef struct { int64_t depth, columns, tiles /* of a strip */, strips; size_t bytes; int8_t *values; } Weights;

/* Four rows of 16 columns, four bytes of a column side by side, as the processor wants a right factor. */
static void interleave(int8_t *out, const int8_t *rows, int64_t stride) {
    const __m128i a = _mm_loadu_si128((const void *)rows), b = _mm_loadu_si128((const void *)(rows + stride));
    const __m128i c = _mm_loadu_si128((const void *)(rows + 2 * stride)), d = _mm_loadu_si128((const void *)(rows + 3 * stride));
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d), AB = _mm_unpackhi_epi8(a, b), CD = _mm_unpackhi_epi8(c, d);
    _mm_store_si128((void *)out, _mm_unpacklo_epi16(ab, cd));
    _mm_store_si128((void *)(out + 16), _mm_unpackhi_epi16(ab, cd));
    _mm_store_si128((void *)(out + 32), _mm_unpacklo_epi16(AB, CD));
    _mm_store_si128((void *)(out + 48), _mm_unpackhi_epi16(AB, CD));
}

/* The same at the edges, where rows or columns are missing; `out` is zero already. */
static void interleave_edge(int8_t *out, const Weights *w, const int8_t *from, int64_t row, int64_t column) {
    for (int64_t i = 0; i < LANES && column + i < w->columns; i++)
        for (int64_t j = 0; j < 4 && row + j < w->depth; j++) out[4 * i + j] = from[(row + j) * w->columns + column + i];
}

static void pack(Weights *w, const int8_t *from) {
    for (int64_t row = 0; row < w->depth; row += 4)
        for (int64_t strip = 0; strip < w->strips; strip++) {
            int8_t *out = w->values + (strip * w->tiles + row / DEPTH) * TILE + row % DEPTH / 4 * LINE;
            const int64_t column = strip * LANES;
            if (row + 4 <= w->depth && column + LANES <= w->columns) interleave(out, from + row * w->columns + column, w->columns);
            else interleave_edge(out, w, from, row, column);
        }
}

static Status *create(const void *operator, const Function *unused, const void *info, void **out) {
    (void)operator, (void)unused;
    Tensor given;
    TRY(weights_of_bytes(info, &given));
    Weights *w = malloc(sizeof *w);
    if (!w) return failed("edgeguard: out of memory");
    *w = (Weights){ given.sizes[0], given.sizes[1], parts(given.sizes[0], DEPTH), parts(given.sizes[1], LANES), 0, NULL };
    w->bytes = (size_t)(w->tiles * w->strips) * TILE;
    w->values = mmap(NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->values == MAP_FAILED) {
        free(w);
        return failed("edgeguard: out of memory");
    }
    if (w->bytes >= HUGE_PAGE) madvise(w->values, w->bytes, MADV_HUGEPAGE); /* refused, it is slower only */
    pack(w, given.data);
    *out = w;
    return NULL;
}

static void destroy(void *weights) {
    Weights *w = weights;
    munmap(w->values, w->bytes);
    free(w);
}

/* ---- the product: of a pass of tokens, in tiles of 16, blocks of them, with strips that threads take in shares ---- */

enum { BLOCK = 5 };          /* tiles of tokens that are summed up at a time: with 2 of activations and 1 of weights all 8 of a processor */
enum { PASS = 16 * LANES };  /* tokens for which weights are read once; of each stretch 1 MiB, so that they stay in the second cache */
enum { STRETCH = 64 };       /* tiles of a strip; of deeper weights sums are kept between stretches */
enum { SHARES = 128, DEEP_SHARES = 32, WORKERS = 64 }; /* shares are larger where activations are read again for each */
#define AMX __attribute__((target("amx-int8,amx-tile,avx512f,avx512bw")))

typedef struct {
    const Weights *w;
    const uint8_t *activations;
    float *out;
    const float *scales;
    float step;
    int64_t tokens, token_tiles, strips_a_share;
    atomic_llong next; /* strip that nobody has taken */
    atomic_int failed;
} Product;

/* Activations less their zero point, 16 tokens by 64 a tile; of a block, the tiles that are read together lie together. */
AMX static void tile_activations(const Product *p, int8_t *out) {
    const Weights *w = p->w;
    const __m512i zero_point = _mm512_set1_epi8((char)128);
    for (int64_t token = 0; token < p->token_tiles * LANES; token++) {
        const int64_t place = token / LANES, block = place / BLOCK * BLOCK, high = least(p->token_tiles - block, BLOCK);
        for (int64_t tile = 0; tile < w->tiles; tile++) {
            const int64_t left = token < p->tokens ? w->depth - tile * DEPTH : 0;
            const __mmask64 there = left >= DEPTH ? ~0ULL : (1ULL << left) - 1;
            const __m512i values = _mm512_maskz_loadu_epi8(there, p->activations + token * w->depth + tile * DEPTH);
            _mm512_store_si512(out + (block * w->tiles + tile * high + place - block) * TILE + token % LANES * LINE,
                               _mm512_maskz_sub_epi8(there, values, zero_point));
        }
    }
}

/* What a block reads and adds to: `deep` tiles of a strip, and `high` tiles of tokens beside each of them. */
typedef struct {
    const int8_t *activations, *weights, *ahead; /* of `ahead`, lines `from` to `to` of each tile are asked for meanwhile */
    int64_t deep;
    int from, to, fresh; /* fresh: sums begin at 0 */
    int32_t *sums;
} Block;

AMX static inline __attribute__((always_inline)) void add_up(const Block *k, const int high) {
#define EACH(step) step(0, 5) if (high > 1) step(1, 6) if (high > 2) step(2, 5) if (high > 3) step(3, 6) if (high > 4) step(4, 5)
#define CLEAR(sum, _) _tile_zero(sum);
#define LOAD(sum, _) _tile_loadd(sum, k->sums + sum * SUMS, LINE);
#define STORE(sum, _) _tile_stored(sum, k->sums + sum * SUMS, LINE);
#define ADD(sum, tile) { _tile_loadd(tile, k->activations + (t * high + sum) * TILE, LINE); _tile_dpbssd(sum, tile, 7); }
    if (k->fresh) { EACH(CLEAR) } else { EACH(LOAD) }
    for (int64_t t = 0; t < k->deep; t++) {
        _tile_loadd(7, k->weights + t * TILE, LINE);
        for (int line = k->from; line < k->to; line++) _mm_prefetch((const char *)k->ahead + t * TILE + line * LINE, _MM_HINT_T1);
        EACH(ADD)
    }
    EACH(STORE)
}

AMX static void add_up_block(const Block *k, int64_t high) {
    switch (high) { /* tiles are named in the instructions */
        case 1: add_up(k, 1); break;
        case 2: add_up(k, 2); break;
        case 3: add_up(k, 3); break;
        case 4: add_up(k, 4); break;
        default: add_up(k, BLOCK);
    }
}

AMX static void scale(const Product *p, int64_t strip, const int32_t *sums) {
    const int64_t column = strip * LANES, left = p->w->columns - column;
    const __mmask16 there = (__mmask16)(left >= LANES ? 0xffff : (1 << left) - 1);
    const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(p->step), _mm512_maskz_loadu_ps(there, p->scales + column));
    for (int64_t token = 0; token < p->tokens; token++)
        _mm512_mask_storeu_ps(p->out + token * p->w->columns + column, there,
                              _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + token * LANES)), scales));
}

/* One stretch of a strip, for all tokens of the pass. */
AMX static void add_up_stretch(const Product *p, const int8_t *activations, int64_t strip, int64_t start, int64_t deep,
                               const int8_t *ahead, int32_t *sums) {
    const int64_t blocks = parts(p->token_tiles, BLOCK);
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * BLOCK, high = least(p->token_tiles - first, BLOCK);
        const int from = (int)(LANES * block / blocks), to = (int)(LANES * (block + 1) / blocks);
        const Block k = { activations + (first * p->w->tiles + start * high) * TILE, p->w->values + (strip * p->w->tiles + start) * TILE,
                          ahead, deep, from, to, start == 0, sums + first * SUMS };
        add_up_block(&k, high);
    }
}

/* The strips `first` to `last`; behind them comes `next`. */
AMX static void multiply(const Product *p, const int8_t *activations, int32_t *sums, int64_t first, int64_t last, int64_t next) {
    const int64_t tiles = p->w->tiles, kept = tiles > STRETCH ? p->token_tiles * SUMS : 0; /* sums of each strip, or one place for all */
    for (int64_t start = 0; start < tiles; start += STRETCH) {
        const int64_t deep = least(tiles - start, STRETCH), end = start + deep;
        for (int64_t strip = first; strip < last; strip++) {
            const int64_t after = strip + 1 < last ? (strip + 1) * tiles + start : end < tiles ? first * tiles + end : next * tiles;
            int32_t *of_strip = sums + (strip - first) * kept;
            add_up_stretch(p, activations, strip, start, deep, p->w->values + after * TILE, of_strip);
            if (end == tiles) scale(p, strip, of_strip);
        }
    }
}

/* Takes shares until there are none; one of these runs on each thread, with activations of its own in its own cache. */
AMX static void work(void *product, size_t index) {
    (void)index;
    Product *p = product;
    const Weights *w = p->w;
    int64_t first = atomic_fetch_add(&p->next, p->strips_a_share);
    if (first >= w->strips) return;
    const int64_t strips = w->tiles > STRETCH ? p->strips_a_share : 1;
    int8_t *activations = aligned_alloc(LINE, (size_t)(p->token_tiles * (w->tiles + strips)) * TILE);
    if (!activations) {
        atomic_store(&p->failed, 1);
        return;
    }
    tile_activations(p, activations);
    typedef struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } Tiles;
    Tiles others, ours = { .palette = 1 };
    for (int tile = 0; tile < 8; tile++) ours.bytes[tile] = LINE, ours.rows[tile] = LANES;
    /* llama.cpp takes it that nobody changes the tiles of a thread. In assembly, since GCC 12's intrinsics do not say that memory is read;
       its tile loads do not either: all that they read is written above. */
    __asm__ volatile("sttilecfg %0" : "=m"(others)::"memory");
    __asm__ volatile("ldtilecfg %0" ::"m"(ours) : "memory");
    while (first < w->strips) {
        const int64_t next = atomic_fetch_add(&p->next, p->strips_a_share);
        multiply(p, activations, (int32_t *)(activations + p->token_tiles * w->tiles * TILE), first,
                 least(first + p->strips_a_share, w->strips), next < w->strips ? next : 0);
        first = next;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(others) : "memory");
    free(activations);
}

static Status *compute(void *weights, void *context) {
    const Weights *w = weights;
    Tensor input[INPUTS];
    float *out;
    TRY(inputs_of_bytes(context, w->depth, input));
    if (input[SCALES].count != (size_t)w->columns) return failed("edgeguard: scales of another shape");
    TRY(output_of(context, &input[ACTIVATIONS], w->columns, &out));
    const int64_t tokens = (int64_t)input[ACTIVATIONS].count / w->depth;
    for (int64_t token = 0; token < tokens; token += PASS) {
        Product p = { .w = w, .activations = (const uint8_t *)input[ACTIVATIONS].data + token * w->depth,
                      .out = out + token * w->columns, .scales = input[SCALES].data, .step = *(const float *)input[STEP].data,
                      .tokens = least(tokens - token, PASS) };
        p.token_tiles = parts(p.tokens, LANES);
        p.strips_a_share = parts(w->strips, w->tiles > STRETCH ? DEEP_SHARES : SHARES);
        TRY(in_parallel(context, work, WORKERS, &p));
        if (p.failed) return failed("edgeguard: out of memory");
    }
    return NULL;
}

/* ---- the operator ---- */

static const Described product = BYTES(create, compute, destroy);

/* Called by ONNX Runtime for a session that the library is registered with; an error unless the system grants AMX. */
Status *RegisterCustomOps(void *options, const Base *base) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2), as in the kernel's documentation of AMX */
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) {
        api = base->api(1);
        return failed("edgeguard: the system does not grant AMX");
    }
    return add_operators(options, base, DOMAIN, &product, 1);
}

#endif
