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
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- the interface of ONNX Runtime (onnxruntime_c_api.h), as much of it as is used; functions keep their places in it for ever ---- */

enum { API_VERSION = 17 };
enum { FLOAT = 1, UINT8 = 2, INT8 = 3 }; /* ONNXTensorElementDataType */
enum { FAIL = 1 };                       /* OrtErrorCode */
enum { /* places in OrtApi */
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,       /* CreateCustomOpDomain */
    ADD_OPERATOR = 27,        /* CustomOpDomain_Add */
    ADD_DOMAIN = 28,          /* AddCustomOpDomain */
    DATA = 51,                /* GetTensorMutableData */
    RANK = 61,                /* GetDimensionsCount */
    SIZES = 62,               /* GetDimensions */
    COUNT = 64,               /* GetTensorShapeElementCount */
    TYPE_AND_SHAPE = 65,      /* GetTensorTypeAndShape */
    INPUT = 90,               /* KernelContext_GetInput */
    OUTPUT = 91,              /* KernelContext_GetOutput */
    RELEASE_SHAPE = 99,       /* ReleaseTensorTypeAndShapeInfo */
    CONSTANT_INPUT = 249,     /* KernelInfoGetConstantInput_tensor */
    PARALLEL_FOR = 274        /* KernelContext_ParallelFor */
};
typedef void (*Function)(void);
typedef void Status; /* NULL: all is well */
typedef struct { const Function *(*api)(uint32_t version); const char *(*version)(void); } Base;
static const Function *api; /* the same for all sessions of a runtime */
#define CALL(place, result, types, ...) (((result(*) types)api[place])(__VA_ARGS__))
#define TRY(call) do { Status *status_ = (call); if (status_) return status_; } while (0)

static Status *failed(const char *message) { return CALL(CREATE_STATUS, Status *, (int, const char *), FAIL, message); }

static Status *data_of(const void *value, void *out) { return CALL(DATA, Status *, (const void *, void *), value, out); }

enum { MOST_SIZES = 4 };
typedef struct { int64_t sizes[MOST_SIZES]; size_t rank, count; } Shape;

static Status *shape_of(const void *value, Shape *out) {
    void *found;
    TRY(CALL(TYPE_AND_SHAPE, Status *, (const void *, void **), value, &found));
    Status *status = CALL(COUNT, Status *, (const void *, size_t *), found, &out->count);
    if (!status) status = CALL(RANK, Status *, (const void *, size_t *), found, &out->rank);
    if (!status && out->rank > MOST_SIZES) status = failed("edgeguard: a tensor with more than four sizes");
    if (!status) status = CALL(SIZES, Status *, (const void *, int64_t *, size_t), found, out->sizes, out->rank);
    CALL(RELEASE_SHAPE, void, (void *), found);
    return status;
}

/* ---- weights: tiles of 64 rows and 16 columns, 1 KiB; a strip is all tiles of 16 columns, one behind the other ---- */

enum { LANES = 16, DEPTH = 64, LINE = 64, TILE = LANES * LINE, SUMS = LANES * LANES, HUGE_PAGE = 2 << 20 };
enum { DEEPEST = 1 << 16 }; /* so that no sum of 32 bits overflows */
typedef struct { int64_t depth, columns, tiles /* of a strip */, strips; size_t bytes; int8_t *values; } Weights;

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

/* An input that is known at load. */
static Status *constant(const void *info, size_t input, Shape *shape, void *data) {
    int found = 0;
    const void *value = NULL;
    TRY(CALL(CONSTANT_INPUT, Status *, (const void *, size_t, int *, const void **), info, input, &found, &value));
    if (!found) return failed("edgeguard: weights or a zero point that are not constant");
    TRY(shape_of(value, shape));
    return data_of(value, data);
}

static Status *create(const void *operator, const Function *unused, const void *info, void **out) {
    (void)operator, (void)unused;
    Shape shape, point_shape;
    const int8_t *from;
    const uint8_t *point;
    TRY(constant(info, 1, &shape, &from));
    TRY(constant(info, 4, &point_shape, &point));
    if (shape.rank != 2 || !shape.count || shape.sizes[0] > DEEPEST) return failed("edgeguard: weights of another shape");
    if (point_shape.count != 1 || *point != 128) return failed("edgeguard: a zero point other than 128");
    Weights *w = malloc(sizeof *w);
    if (!w) return failed("edgeguard: out of memory");
    *w = (Weights){ shape.sizes[0], shape.sizes[1], parts(shape.sizes[0], DEPTH), parts(shape.sizes[1], LANES), 0, NULL };
    w->bytes = (size_t)(w->tiles * w->strips) * TILE;
    w->values = mmap(NULL, w->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->values == MAP_FAILED) {
        free(w);
        return failed("edgeguard: out of memory");
    }
    if (w->bytes >= HUGE_PAGE) madvise(w->values, w->bytes, MADV_HUGEPAGE); /* refused, it is slower only */
    pack(w, from);
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

enum { ACTIVATIONS, WEIGHTS, STEP, SCALES, ZERO_POINT, INPUTS };

static Status *compute(void *weights, void *context) {
    const Weights *w = weights;
    const void *input[INPUTS];
    void *output, *data[INPUTS], *out;
    Shape shape[INPUTS], *given = &shape[ACTIVATIONS];
    for (size_t i = 0; i < INPUTS; i++) {
        TRY(CALL(INPUT, Status *, (const void *, size_t, const void **), context, i, &input[i]));
        TRY(shape_of(input[i], &shape[i]));
        TRY(data_of(input[i], &data[i]));
    }
    if (!given->rank || given->sizes[given->rank - 1] != w->depth)
        return failed("edgeguard: activations of another width than the weights");
    if (shape[STEP].count != 1 || shape[SCALES].count != (size_t)w->columns) return failed("edgeguard: scales of another shape");
    const int64_t tokens = (int64_t)given->count / w->depth;
    given->sizes[given->rank - 1] = w->columns;
    TRY(CALL(OUTPUT, Status *, (void *, size_t, const int64_t *, size_t, void **), context, 0, given->sizes, given->rank, &output));
    TRY(data_of(output, &out));
    for (int64_t token = 0; token < tokens; token += PASS) {
        Product p = { .w = w, .activations = (const uint8_t *)data[ACTIVATIONS] + token * w->depth,
                      .out = (float *)out + token * w->columns, .scales = data[SCALES], .step = *(const float *)data[STEP],
                      .tokens = least(tokens - token, PASS) };
        p.token_tiles = parts(p.tokens, LANES);
        p.strips_a_share = parts(w->strips, w->tiles > STRETCH ? DEEP_SHARES : SHARES);
        TRY(CALL(PARALLEL_FOR, Status *, (const void *, void (*)(void *, size_t), size_t, size_t, void *),
                 context, work, WORKERS, 0, &p));
        if (p.failed) return failed("edgeguard: out of memory");
    }
    return NULL;
}

/* ---- the operator ---- */

static const char *name(const void *operator) { return (void)operator, "MatMulIntegerToFloat"; }
static const char *provider(const void *operator) { return (void)operator, NULL; /* the CPU */ }
static int input_type(const void *operator, size_t i) {
    return (void)operator, (const int[INPUTS]){ UINT8, INT8, FLOAT, FLOAT, UINT8 }[i];
}
static int output_type(const void *operator, size_t i) { return (void)operator, (void)i, FLOAT; }
static size_t inputs(const void *operator) { return (void)operator, INPUTS; }
static size_t outputs(const void *operator) { return (void)operator, 1; }
static int zero(const void *operator, size_t i) { return (void)operator, (void)i, 0; }
static int one(const void *operator) { return (void)operator, 1; }
static int most(const void *operator) { return (void)operator, INT32_MAX; }

static const struct { /* OrtCustomOp */
    uint32_t version;
    void *create_1;
    const char *(*name)(const void *), *(*provider)(const void *);
    int (*input_type)(const void *, size_t);
    size_t (*inputs)(const void *);
    int (*output_type)(const void *, size_t);
    size_t (*outputs)(const void *);
    void *compute_1;
    void (*destroy)(void *);
    int (*input_kind)(const void *, size_t), (*output_kind)(const void *, size_t), (*input_memory)(const void *, size_t);
    int (*variadic[4])(const void *);
    Status *(*create)(const void *, const Function *, const void *, void **), *(*compute)(void *, void *);
    void *infer_shape;
    int (*first_version)(const void *), (*last_version)(const void *);
} product = { API_VERSION, NULL, name, provider, input_type, inputs, output_type, outputs, NULL, destroy,
              zero, zero, zero /* required, and in ordinary memory */, { one, one, one, one } /* not asked for */, create, compute, NULL,
              one, most };

/* Called by ONNX Runtime for a session that the library is registered with; an error unless the system grants AMX. */
Status *RegisterCustomOps(void *options, const Base *base) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2), as in the kernel's documentation of AMX */
    const Function *offered = base->api(API_VERSION);
    void *domain; /* never freed: sessions use it, and nothing tells when the last one ends */
    api = offered ? offered : base->api(1);
    if (!offered) return failed("edgeguard: an ONNX Runtime that is too old");
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return failed("edgeguard: the system does not grant AMX");
    TRY(CALL(CREATE_DOMAIN, Status *, (const char *, void **), "com.microsoft", &domain));
    TRY(CALL(ADD_OPERATOR, Status *, (void *, const void *), domain, &product));
    return CALL(ADD_DOMAIN, Status *, (void *, void *), options, domain);
}

#endif
