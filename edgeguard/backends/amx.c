/* MatMulIntegerToFloat for weights that come from memory, on x86 processors with AMX: an operator library for ONNX Runtime.

ONNX Runtime multiplies 32 tokens by a block of weights, then the next 32 by the same block. While it does the latter, nothing
is read from memory; so reading and multiplying take one after the other, at 8B more than half of a pass. Here a strip of
weights (16 columns) is read once, for up to 80 tokens at a time, while the next strip is asked for: a third faster at 77 tokens.
The sums are the same whole numbers and are scaled in the same order, so the results are the same bits.

Tiles: see Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX). The operator interface of
ONNX Runtime is that of onnxruntime_c_api.h, version 17; functions keep their places in it for ever. Linux only, since the
kernel must be asked for AMX there and Windows and macOS offer no such processor to test with.
*/
#if defined(__x86_64__) && defined(__linux__)

#define _GNU_SOURCE
#include <immintrin.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- the interface of ONNX Runtime, as much of it as is used ---- */

enum { VERSION = 17, FLOAT = 1, UINT8 = 2, INT8 = 3, FAILED = 1 };
enum { /* places in OrtApi */
    CREATE_STATUS = 0, CREATE_DOMAIN = 26, ADD_OPERATOR = 27, ADD_DOMAIN = 28, DATA = 51, COUNT_SIZES = 61, SIZES = 62,
    TYPE_AND_SHAPE = 65, INPUT = 90, OUTPUT = 91, RELEASE_SHAPE = 99, CONSTANT_INPUT = 249, PARALLEL_FOR = 274
};
typedef void (*Function)(void);
typedef void Status; /* NULL: all is well */
typedef struct { const Function *(*api)(uint32_t version); const char *(*version)(void); } Base;
static const Function *api;
#define CALL(place, result, types, ...) (((result(*) types)api[place])(__VA_ARGS__))
#define TRY(call) do { Status *status_ = (call); if (status_) return status_; } while (0)

static Status *failed(const char *message) { return CALL(CREATE_STATUS, Status *, (int, const char *), FAILED, message); }

static Status *data_of(const void *value, void *out) { return CALL(DATA, Status *, (const void *, void *), value, out); }

enum { MOST_SIZES = 4 };
static Status *sizes_of(const void *value, int64_t *sizes, size_t *count) {
    void *shape;
    TRY(CALL(TYPE_AND_SHAPE, Status *, (const void *, void **), value, &shape));
    Status *status = CALL(COUNT_SIZES, Status *, (const void *, size_t *), shape, count);
    if (!status && (*count < 1 || *count > MOST_SIZES)) status = failed("edgeguard: a product of another rank");
    if (!status) status = CALL(SIZES, Status *, (const void *, int64_t *, size_t), shape, sizes, *count);
    CALL(RELEASE_SHAPE, void, (void *), shape);
    return status;
}

/* ---- weights, in tiles of 64 rows and 16 columns, 1 KiB; a strip is all tiles of 16 columns, one behind the other ---- */

enum { TILE = 1024, DEPTH = 64, LANES = 16, LINE = 64, LONGEST = 1 << 16, HUGE_PAGE = 2 << 20 };
typedef struct { int64_t depth, columns, tiles, strips; size_t bytes; int8_t *values; } Weights;

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

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

/* The same at the edges, where rows or columns are missing; `values` is zero already. */
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
    int constant = 0;
    const void *value;
    int64_t sizes[MOST_SIZES];
    size_t count;
    const int8_t *from;
    TRY(CALL(CONSTANT_INPUT, Status *, (const void *, size_t, int *, const void **), info, 1, &constant, &value));
    if (!constant) return failed("edgeguard: a product of weights that are not constant");
    TRY(sizes_of(value, sizes, &count));
    TRY(data_of(value, &from));
    if (count != 2 || sizes[0] < 1 || sizes[1] < 1 || sizes[0] > LONGEST) return failed("edgeguard: weights of another shape");
    Weights *w = malloc(sizeof *w);
    if (!w) return failed("edgeguard: out of memory");
    *w = (Weights){ sizes[0], sizes[1], parts(sizes[0], DEPTH), parts(sizes[1], LANES), 0, NULL };
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

/* ---- the product ---- */

enum { BLOCK = 5 }; /* tiles of 16 tokens that are summed up at a time: 5 sums, 2 of activations, 1 of weights are all 8 tiles */
enum { STRETCH = 64 }; /* tiles along the depth for which the activations of a pass stay in the second cache, 1 MiB at most */
enum { PASS = 16 * LANES, SHARES = 128, LONG_SHARES = 32, WORKERS = 64 };
#define AMX __attribute__((target("amx-int8,amx-tile,avx512f,avx512bw")))

typedef struct { /* of up to PASS tokens */
    const Weights *w;
    const uint8_t *activations;
    float *out;
    const float *scales;
    float step;
    int64_t tokens, share;
    atomic_llong next; /* strip that nobody has taken */
    atomic_int failed;
} Product;

/* Activations less their zero point, 16 tokens by 64 a tile; of a block, the tiles that are read together lie together. */
AMX static void tile_activations(const Product *p, int8_t *out) {
    const Weights *w = p->w;
    const __m512i zero_point = _mm512_set1_epi8((char)128);
    const int64_t rows = parts(p->tokens, LANES);
    for (int64_t token = 0; token < rows * LANES; token++) {
        const int64_t row = token / LANES, first = row / BLOCK * BLOCK, high = rows - first < BLOCK ? rows - first : BLOCK;
        for (int64_t tile = 0; tile < w->tiles; tile++) {
            const int64_t left = token < p->tokens ? w->depth - tile * DEPTH : 0;
            const __mmask64 there = left >= DEPTH ? ~0ULL : (1ULL << left) - 1;
            const __m512i values = _mm512_maskz_loadu_epi8(there, p->activations + token * w->depth + tile * DEPTH);
            _mm512_store_si512(out + (first * w->tiles + tile * high + row - first) * TILE + token % LANES * LINE,
                               _mm512_maskz_sub_epi8(there, values, zero_point));
        }
    }
}

/* Sums of `high` tiles of tokens by one strip, over `deep` tiles; lines `from` to `to` of each tile `ahead` are fetched meanwhile. */
AMX static inline __attribute__((always_inline)) void add_up(
    const int high, const int8_t *a, const int8_t *b, int64_t deep, const int8_t *ahead, int from, int to, int32_t *sums, int fresh) {
#define EACH(do) do(0, 5) if (high > 1) do(1, 6) if (high > 2) do(2, 5) if (high > 3) do(3, 6) if (high > 4) do(4, 5)
#define CLEAR(i, _) _tile_zero(i);
#define LOAD(i, _) _tile_loadd(i, sums + i * 256, 64);
#define STORE(i, _) _tile_stored(i, sums + i * 256, 64);
#define ADD(i, tile) { _tile_loadd(tile, a + (t * high + i) * TILE, LINE); _tile_dpbssd(i, tile, 7); }
    if (fresh) { EACH(CLEAR) } else { EACH(LOAD) }
    for (int64_t t = 0; t < deep; t++) {
        _tile_loadd(7, b + t * TILE, LINE);
        for (int line = from; line < to; line++) _mm_prefetch((const char *)ahead + t * TILE + line * LINE, _MM_HINT_T1);
        EACH(ADD)
    }
    EACH(STORE)
}

AMX static void add_up_block(
    int64_t high, const int8_t *a, const int8_t *b, int64_t deep, const int8_t *ahead, int from, int to, int32_t *sums, int fresh) {
    switch (high) { /* tiles are named in the instructions */
        case 1: add_up(1, a, b, deep, ahead, from, to, sums, fresh); break;
        case 2: add_up(2, a, b, deep, ahead, from, to, sums, fresh); break;
        case 3: add_up(3, a, b, deep, ahead, from, to, sums, fresh); break;
        case 4: add_up(4, a, b, deep, ahead, from, to, sums, fresh); break;
        default: add_up(5, a, b, deep, ahead, from, to, sums, fresh);
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

/* The strips `first` to `last`; those that are asked for last are the first of `then`. */
AMX static void multiply(const Product *p, const int8_t *a, int32_t *sums, int64_t first, int64_t last, int64_t then) {
    const Weights *w = p->w;
    const int64_t rows = parts(p->tokens, LANES), blocks = parts(rows, BLOCK), whole = w->tiles <= STRETCH;
    for (int64_t start = 0; start < w->tiles; start += STRETCH) {
        const int64_t deep = w->tiles - start < STRETCH ? w->tiles - start : STRETCH, end = start + deep == w->tiles;
        for (int64_t strip = first; strip < last; strip++) {
            const int8_t *b = w->values + (strip * w->tiles + start) * TILE;
            const int8_t *ahead = strip + 1 < last ? b + w->tiles * TILE
                : end ? w->values + then * w->tiles * TILE : w->values + (first * w->tiles + start + deep) * TILE;
            int32_t *of_strip = sums + (whole ? 0 : strip - first) * rows * 256;
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t row = block * BLOCK, high = rows - row < BLOCK ? rows - row : BLOCK;
                add_up_block(high, a + (row * w->tiles + start * high) * TILE, b, deep, ahead, (int)(16 * block / blocks),
                             (int)(16 * (block + 1) / blocks), of_strip + row * 256, start == 0);
            }
            if (end) scale(p, strip, of_strip);
        }
    }
}

/* Takes strips until there are none; one of these runs on each thread. */
AMX static void work(void *product, size_t index) {
    (void)index;
    Product *p = product;
    const Weights *w = p->w;
    int64_t first = atomic_fetch_add(&p->next, p->share);
    if (first >= w->strips) return;
    const int64_t rows = parts(p->tokens, LANES), kept = w->tiles <= STRETCH ? 1 : p->share;
    int8_t *a = aligned_alloc(LINE, (size_t)(rows * (w->tiles + kept)) * TILE);
    if (!a) {
        atomic_store(&p->failed, 1);
        return;
    }
    tile_activations(p, a);
    struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = { .palette = 1 };
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = LINE, shape.rows[tile] = LANES;
    __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory"); /* its intrinsic loses stores with GCC 12.2 and older */
    while (first < w->strips) {
        const int64_t next = atomic_fetch_add(&p->next, p->share), last = first + p->share;
        multiply(p, a, (int32_t *)(a + rows * w->tiles * TILE), first, last < w->strips ? last : w->strips, next < w->strips ? next : 0);
        first = next;
    }
    _tile_release();
    free(a);
}

static Status *compute(void *weights, void *context) {
    const Weights *w = weights;
    const void *input[5];
    void *output, *factor[5], *out;
    int64_t sizes[MOST_SIZES], tokens = 1;
    size_t count;
    for (size_t i = 0; i < 5; i++) {
        TRY(CALL(INPUT, Status *, (const void *, size_t, const void **), context, i, &input[i]));
        TRY(data_of(input[i], &factor[i]));
    }
    TRY(sizes_of(input[0], sizes, &count));
    for (size_t i = 0; i + 1 < count; i++) tokens *= sizes[i];
    if (sizes[count - 1] != w->depth) return failed("edgeguard: activations of another width than the weights");
    if (*(const uint8_t *)factor[4] != 128) return failed("edgeguard: a zero point other than 128");
    sizes[count - 1] = w->columns;
    TRY(CALL(OUTPUT, Status *, (void *, size_t, const int64_t *, size_t, void **), context, 0, sizes, count, &output));
    TRY(data_of(output, &out));
    for (int64_t token = 0; token < tokens; token += PASS) {
        Product p = { w, (const uint8_t *)factor[0] + token * w->depth, (float *)out + token * w->columns, factor[3],
                      *(const float *)factor[2], tokens - token < PASS ? tokens - token : PASS, parts(w->strips, w->tiles <= STRETCH ? SHARES : LONG_SHARES), 0, 0 };
        TRY(CALL(PARALLEL_FOR, Status *, (const void *, void (*)(void *, size_t), size_t, size_t, void *), context, work, WORKERS, 0, &p));
        if (p.failed) return failed("edgeguard: out of memory");
    }
    return NULL;
}

/* ---- the operator ---- */

static const char *name(const void *operator) { return (void)operator, "MatMulIntegerToFloat"; }
static const char *provider(const void *operator) { return (void)operator, NULL; /* the CPU */ }
static int input_type(const void *operator, size_t i) { return (void)operator, (const int[]){ UINT8, INT8, FLOAT, FLOAT, UINT8 }[i]; }
static int output_type(const void *operator, size_t i) { return (void)operator, (void)i, FLOAT; }
static size_t inputs(const void *operator) { return (void)operator, 5; }
static size_t outputs(const void *operator) { return (void)operator, 1; }
static int plain(const void *operator, size_t i) { return (void)operator, (void)i, 0; /* required; in ordinary memory */ }
static int first_version(const void *operator) { return (void)operator, 1; }
static int last_version(const void *operator) { return (void)operator, INT32_MAX; }

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
    void *infer;
    int (*first_version)(const void *), (*last_version)(const void *);
} product = {
    VERSION, NULL, name, provider, input_type, inputs, output_type, outputs, NULL, destroy, plain, plain, plain,
    { first_version, first_version, first_version, first_version }, create, compute, NULL, first_version, last_version
};

/* Called by ONNX Runtime for a session that the library is registered with; an error unless the system grants AMX. */
Status *RegisterCustomOps(void *options, const Base *base) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* arch_prctl(2), as in the kernel's documentation of AMX */
    void *domain;
    api = base->api(VERSION);
    if (!api) return NULL; /* then there is no operator of ours */
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return failed("edgeguard: the system does not grant AMX");
    TRY(CALL(CREATE_DOMAIN, Status *, (const char *, void **), "com.microsoft", &domain));
    TRY(CALL(ADD_OPERATOR, Status *, (void *, const void *), domain, &product));
    return CALL(ADD_DOMAIN, Status *, (void *, void *), options, domain);
}

#endif
