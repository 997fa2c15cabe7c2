/* Products by weights of 4 and 8 bits, on x86 processors with AVX2 and without VNNI: an operator library for ONNX Runtime.

Such processors multiply bytes to sums of 16 bits only, in pairs. ONNX Runtime widens weights and activations anew for every few
tokens. Here a panel of weights is brought into the form in which it is multiplied once for up to 256 tokens, and stays in the first
cache meanwhile. Weights are read as they lie in the file: nothing is packed at load, nothing is copied.

MatMulNBits (blocks of 32 weights of 4 bits): weights 0 to 15 by activations of 8 bits; the sums of eight products fit into 16 bits
and are added up there. Activations get a step for each block, as ONNX Runtime's accuracy level 4 has it.
MatMulIntegerToFloat: weights and activations widened to 16 bits, exact; sums are scaled in ONNX Runtime's order, to the same bits.
In both a token's result depends on no other token.
*/
#if defined(__x86_64__)

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "product.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline))
/* sum = start + a * b and sum += a * b, in place and in this order: compilers copy and spill sums otherwise, which halves the speed. */
#define BEGIN(multiply, add, sum, start, a, b) \
    __asm__(multiply " %2, %1, %0\n\t" add " %3, %0, %0" : "=&x"(sum) : "x"(a), "x"(b), "x"(start))
#define ADD(multiply, add, sum, a, b) do { \
        __m256i product; \
        __asm__(multiply " %3, %2, %1\n\t" add " %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b)); \
    } while (0)
enum { ROWS = 6 }; /* tokens whose sums are in registers, each by its name */
#define EACH(step) step(0) if (rows > 1) step(1) if (rows > 2) step(2) if (rows > 3) step(3) if (rows > 4) step(4) if (rows > 5) step(5)
/* Calls the variant of a function for as many rows. */
#define BY_ROWS(count, function, ...) \
    switch (least(count, ROWS)) { \
        case 1: function(__VA_ARGS__, 1); break; \
        case 2: function(__VA_ARGS__, 2); break; \
        case 3: function(__VA_ARGS__, 3); break; \
        case 4: function(__VA_ARGS__, 4); break; \
        case 5: function(__VA_ARGS__, 5); break; \
        default: function(__VA_ARGS__, ROWS); \
    }
enum { LANES = 8, WIDE = 2 * LANES /* columns of a panel */, LINE = 64 };
#define TINY 1e-30f /* smaller magnitudes are taken for 0 */
AVX2 INLINE __m256i load(const void *from) { return _mm256_load_si256(from); }

enum { PASS = 256 }; /* tokens for which weights are brought into their form once */

typedef struct { int64_t depth, columns; } Weights;

typedef struct {
    Weights w;
    const void *weights, *activations; /* as they are given */
    const float *scales;
    float step, *out;
    int64_t tokens;
    uint8_t *values; /* activations as they are multiplied */
    float *steps;    /* of their blocks */
    int32_t (*sums)[WIDE];
    int64_t strips; /* of a share */
} Product;

static void *kept(int64_t depth, int64_t columns) {
    Weights *w = malloc(sizeof *w);
    if (w) *w = (Weights){ depth, columns };
    return w;
}

/* Calls `of_pass` for all tokens, `PASS` of them at a time; `each` bytes of room for a token's activations. */
static Status *in_passes(const Product *whole, int64_t width, int64_t each, void *context, Status *(*of_pass)(const void *, Product *)) {
    uint8_t *room = malloc((size_t)((least(whole->tokens, PASS) + ROWS) * each));
    if (!room) return failed("edgeguard: out of memory");
    Status *status = NULL;
    for (int64_t token = 0; token < whole->tokens && !status; token += PASS) {
        Product p = *whole;
        p.tokens = least(whole->tokens - token, PASS);
        p.activations = (const int8_t *)whole->activations + token * width;
        p.out += token * p.w.columns;
        p.values = room;
        status = of_pass(context, &p);
    }
    free(room);
    return status;
}

/* ---- 4 bits: weights (columns, blocks, 16) of bytes, the first of two weights in the low half; scales (columns, blocks) ---- */

enum { BLOCK = 32, GROUPS = 8 /* of four weights in a block */ };
enum { DEEP_4 = 16 /* blocks of a panel: 8 KiB */, STRIPS_4 = 4 /* panels side by side that a thread takes */ };

AVX2 INLINE float largest_of(__m256i magnitudes) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
}

/* A token's block: 128 and as many 127ths of its largest magnitude, of each eight the even places before the odd ones, as weights are
   unpacked. A magnitude that is not finite makes the step, and so all results of the token, not finite. */
AVX2 static void quantise_block(const float *from, uint8_t *out, float *step) {
    const __m256i bits = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256(), q[4];
    for (int i = 0; i < 4; i++) /* compared as whole numbers, of which NaN is the largest */
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_loadu_si256((const void *)(from + LANES * i)), bits));
    const float found = largest_of(largest);
    const __m256 times = _mm256_set1_ps(found < TINY ? 0 : 127 / found);
    *step = found < TINY ? 0 : found / 127;
    for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + LANES * i), times));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3])); /* fours 0, 2, 4, 6, 1, ... */
    const __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
                                           0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i turned = _mm256_xor_si256(_mm256_shuffle_epi8(bytes, order), _mm256_set1_epi8((char)128));
    const __m128i low = _mm256_castsi256_si128(turned), high = _mm256_extracti128_si256(turned, 1);
    _mm_storeu_si128((void *)out, _mm_unpacklo_epi16(low, high));
    _mm_storeu_si128((void *)(out + 16), _mm_unpackhi_epi16(low, high));
}

/* Activations (group of tokens, block, token of the group, 32) and their steps without the 32. */
AVX2 static void quantise_group(void *product, size_t group) {
    const Product *p = product;
    const int64_t blocks = p->w.depth / BLOCK, first = (int64_t)group * ROWS;
    for (int64_t token = first; token < least(first + ROWS, p->tokens); token++)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = first * blocks + block * ROWS + token - first;
            quantise_block((const float *)p->activations + token * p->w.depth + block * BLOCK, p->values + at * BLOCK, p->steps + at);
        }
}

typedef struct {
    int8_t values[DEEP_4][GROUPS][WIDE][4];
    int16_t starts[DEEP_4][WIDE][2]; /* of sums: what the 128 in activations adds to them, negated */
    float scales[DEEP_4][WIDE];
} Panel4;

/* Four columns' numbers of 32 bits, and four further ones', to the four places they have in a column. */
AVX2 INLINE void transpose(__m256i *v) {
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
}

/* A block of eight columns that lie `from[0]` to `from[7]`. */
AVX2 INLINE void unpack_block(const uint8_t *const *from, int64_t offset, int8_t (*out)[WIDE][4], int16_t (*starts)[2]) {
    const __m256i half = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8), middle = _mm256_set1_epi8((char)128);
    __m256i v[4], start = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        const __m128i a = _mm_loadu_si128((const void *)(from[i] + offset)), b = _mm_loadu_si128((const void *)(from[i + 4] + offset));
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    }
    transpose(v);
    for (int g = 0; g < GROUPS; g++) {
        const __m256i four = g % 2 ? _mm256_srli_epi16(v[g / 2], 4) : v[g / 2];
        const __m256i weights = _mm256_sub_epi8(_mm256_and_si256(four, half), eight);
        _mm256_store_si256((void *)out[g], weights);
        start = _mm256_sub_epi16(start, _mm256_maddubs_epi16(middle, weights));
    }
    _mm256_store_si256((void *)starts, start);
}

/* `deep` blocks from `block` on, of the columns from `column` on; what is past the last column repeats it. */
AVX2 static void unpack_4(const Product *p, int64_t column, int64_t block, int64_t deep, Panel4 *out) {
    const int64_t blocks = p->w.depth / BLOCK;
    const uint8_t *from[WIDE];
    for (int i = 0; i < WIDE; i++) {
        const int64_t at = least(column + i, p->w.columns - 1) * blocks + block;
        from[i] = (const uint8_t *)p->weights + at * (BLOCK / 2);
        for (int64_t b = 0; b < deep; b++) out->scales[b][i] = p->scales[at + b];
    }
    for (int64_t b = 0; b < deep; b++)
        for (int side = 0; side < WIDE; side += LANES)
            unpack_block(from + side, b * (BLOCK / 2), (void *)out->values[b][0][side], out->starts[b] + side);
}

/* Adds `rows` tokens by a panel to their sums (token, WIDE). In 16 bits the products of a block have room: 16 x 8 x 127 at most. */
AVX2 INLINE void add_up_4(const uint8_t *values, const float *steps, const Panel4 *panel, int64_t deep, float (*sums)[WIDE],
                          const int rows) {
#define FOUR(r, g) int32_t four; memcpy(&four, values + r * BLOCK + g * 4, 4); const __m256i x = _mm256_set1_epi32(four);
#define BEGIN_4(r) { \
        FOUR(r, 0) \
        BEGIN("vpmaddubsw", "vpaddw", s[r][0], start_low, x, low); \
        BEGIN("vpmaddubsw", "vpaddw", s[r][1], start_high, x, high); \
    }
#define ADD_4(r) { \
        FOUR(r, g) \
        ADD("vpmaddubsw", "vpaddw", s[r][0], x, low); \
        ADD("vpmaddubsw", "vpaddw", s[r][1], x, high); \
    }
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t b = 0; b < deep; b++, values += ROWS * BLOCK, steps += ROWS) {
        const __m256i start_low = load(panel->starts[b]), start_high = load(panel->starts[b][LANES]);
        __m256i s[ROWS][2], low = load(panel->values[b][0]), high = load(panel->values[b][0][LANES]);
        EACH(BEGIN_4)
        for (int g = 1; g < GROUPS; g++) {
            low = load(panel->values[b][g]), high = load(panel->values[b][g][LANES]);
            EACH(ADD_4)
        }
        for (int r = 0; r < rows; r++)
            for (int side = 0; side < 2; side++) {
                float *sum = sums[r] + side * LANES;
                const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(steps[r]), _mm256_load_ps(panel->scales[b] + side * LANES));
                const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(s[r][side], ones));
                _mm256_store_ps(sum, _mm256_fmadd_ps(whole, scales, _mm256_load_ps(sum)));
            }
    }
}

AVX2 static void add_up_rows_4(const Product *p, int64_t token, int64_t block, int64_t deep, const Panel4 *panel, float (*sums)[WIDE]) {
    const int64_t at = token * (p->w.depth / BLOCK) + block * ROWS;
    const uint8_t *values = p->values + at * BLOCK;
    const float *steps = p->steps + at;
    BY_ROWS(p->tokens - token, add_up_4, values, steps, panel, deep, sums)
}

/* Asks for what the next panel is made of. */
static void ask_for_4(const Product *p, int64_t column, int64_t block) {
    const int64_t blocks = p->w.depth / BLOCK;
    for (int64_t i = column; i < least(column + WIDE, p->w.columns); i++) {
        for (int line = 0; line < DEEP_4 * BLOCK / 2; line += LINE)
            __builtin_prefetch((const uint8_t *)p->weights + (i * blocks + block) * (BLOCK / 2) + line, 0, 2);
        __builtin_prefetch(p->scales + i * blocks + block, 0, 2);
    }
}

AVX2 static void multiply_4(void *product, size_t share) {
    const Product *p = product;
    const int64_t blocks = p->w.depth / BLOCK, end = least((int64_t)(share + 1) * STRIPS_4 * WIDE, p->w.columns);
    _Alignas(LINE) Panel4 panel;
    _Alignas(LINE) float sums[PASS][WIDE];
    for (int64_t column = (int64_t)share * STRIPS_4 * WIDE; column < end; column += WIDE) {
        memset(sums, 0, (size_t)p->tokens * sizeof *sums);
        for (int64_t block = 0; block < blocks; block += DEEP_4) {
            const int64_t deep = least(blocks - block, DEEP_4);
            unpack_4(p, column, block, deep, &panel);
            if (block + deep < blocks) ask_for_4(p, column, block + deep);
            else ask_for_4(p, column + WIDE, 0);
            for (int64_t token = 0; token < p->tokens; token += ROWS) add_up_rows_4(p, token, block, deep, &panel, sums + token);
        }
        const size_t wide = (size_t)least(p->w.columns - column, WIDE) * sizeof(float);
        for (int64_t token = 0; token < p->tokens; token++) memcpy(p->out + token * p->w.columns + column, sums[token], wide);
    }
}

static Status *pass_4(const void *context, Product *p) {
    const int64_t groups = parts(p->tokens, ROWS), entries = groups * ROWS * (p->w.depth / BLOCK);
    p->steps = (float *)(p->values + entries * BLOCK);
    TRY(in_parallel(context, quantise_group, groups, p));
    return in_parallel(context, multiply_4, parts(p->w.columns, STRIPS_4 * WIDE), p);
}

enum { SCALES_4 = WEIGHTS + 1, INPUTS_4 };

static Status *create_4(const void *operator, const Function *unused, const void *info, void **out) {
    (void)operator, (void)unused;
    static const char *names[] = { "bits", "block_size", "accuracy_level", "K", "N" };
    int64_t found[5];
    for (size_t i = 0; i < 5; i++) TRY(CALL(INT_ATTRIBUTE, Status *, (const void *, const char *, int64_t *), info, names[i], &found[i]));
    if (found[0] != 4 || found[1] != BLOCK) return failed("edgeguard: weights of other than 4 bits in blocks of 32");
    if (found[2] != 4) return failed("edgeguard: activations of other than 8 bits");
    Tensor weights, scales;
    TRY(constant(info, WEIGHTS, &weights));
    TRY(constant(info, SCALES_4, &scales));
    const int64_t depth = found[3], columns = found[4], blocks = depth / BLOCK;
    if (columns < 1 || blocks < 1 || blocks * BLOCK != depth || (int64_t)weights.count != columns * depth / 2)
        return failed("edgeguard: weights of another shape");
    if ((int64_t)scales.count != columns * blocks) return failed("edgeguard: scales of another shape");
    *out = kept(depth, columns);
    return *out ? NULL : failed("edgeguard: out of memory");
}

static Status *compute_4(void *weights, void *context) {
    Product p = { .w = *(const Weights *)weights };
    Tensor input[INPUTS_4];
    TRY(inputs_of(context, INPUTS_4, p.w.depth, input));
    TRY(output_of(context, &input[ACTIVATIONS], p.w.columns, &p.out));
    p.activations = input[ACTIVATIONS].data, p.weights = input[WEIGHTS].data, p.scales = input[SCALES_4].data;
    p.tokens = (int64_t)input[ACTIVATIONS].count / p.w.depth;
    return in_passes(&p, p.w.depth * (int64_t)sizeof(float), p.w.depth + p.w.depth / BLOCK * 4, context, pass_4);
}

/* ---- 8 bits: weights (depth, columns), scales (columns), a zero point of 128 for activations ---- */

enum { PAIRS = 32 /* of a panel: 2 KiB */ };
enum { STRIPS_8 = 32 /* panels side by side that a thread takes: some lines of each row, or looking up pages takes longer than reading */ };
enum { LEAST_SHARES = 8 };

/* Activations less their zero point (group of tokens, pair, token of the group, 2) of 16 bits; without a partner a 0. */
AVX2 static void widen_group(void *product, size_t group) {
    const Product *p = product;
    const int64_t depth = p->w.depth, pairs = parts(depth, 2), first = (int64_t)group * ROWS;
    for (int64_t token = first; token < least(first + ROWS, p->tokens); token++) {
        const uint8_t *from = (const uint8_t *)p->activations + token * depth;
        int16_t *out = (int16_t *)p->values + first * pairs * 2 + (token - first) * 2;
        for (int64_t i = 0; i < depth; i++) out[i / 2 * ROWS * 2 + i % 2] = (int16_t)(from[i] - 128);
        if (depth % 2) out[depth / 2 * ROWS * 2 + 1] = 0;
    }
}

typedef int16_t Panel8[PAIRS][WIDE][2];
/* of 16 columns the first half gets 0 to 3 and 8 to 11, as unpacking leaves them */

AVX2 static void widen_pair(const int8_t *first, const int8_t *second, int16_t (*out)[2]) {
    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)first));
    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)second));
    _mm256_store_si256((void *)out, _mm256_unpacklo_epi16(a, b));
    _mm256_store_si256((void *)(out + LANES), _mm256_unpackhi_epi16(a, b));
}

/* A pair of rows, of the columns from `column` on; what is missing at the edges is 0. */
AVX2 static void widen_pairs(const Product *p, int64_t column, int64_t pair, int64_t strips, Panel8 *out, int64_t place) {
    const int64_t columns = p->w.columns;
    for (int64_t strip = 0; strip < strips; strip++, column += WIDE) {
        const int8_t *first = (const int8_t *)p->weights + 2 * pair * columns + column;
        const int64_t wide = least(columns - column, WIDE), both = 2 * pair + 1 < p->w.depth;
        int8_t edge[2][WIDE] = { 0 };
        if (wide == WIDE && both) {
            widen_pair(first, first + columns, out[strip][place]);
            continue;
        }
        memcpy(edge[0], first, (size_t)wide);
        if (both) memcpy(edge[1], first + columns, (size_t)wide);
        widen_pair(edge[0], edge[1], out[strip][place]);
    }
}

AVX2 INLINE void add_up_8(const uint8_t *values, int16_t (*panel)[WIDE][2], int64_t deep, int32_t (*sums)[WIDE], const int rows) {
#define LOAD(r) { s[r][0] = _mm256_loadu_si256((const void *)sums[r]), s[r][1] = _mm256_loadu_si256((const void *)(sums[r] + LANES)); }
#define STORE(r) { _mm256_storeu_si256((void *)sums[r], s[r][0]), _mm256_storeu_si256((void *)(sums[r] + LANES), s[r][1]); }
#define ADD_8(r) { \
        int32_t pair; \
        memcpy(&pair, values + (i * ROWS + r) * 4, 4); \
        const __m256i x = _mm256_set1_epi32(pair); \
        ADD("vpmaddwd", "vpaddd", s[r][0], x, low); \
        ADD("vpmaddwd", "vpaddd", s[r][1], x, high); \
    }
    __m256i s[ROWS][2];
    EACH(LOAD)
    for (int64_t i = 0; i < deep; i++) {
        const __m256i low = load(panel[i]), high = load(panel[i][LANES]);
        EACH(ADD_8)
    }
    EACH(STORE)
}

AVX2 static void add_up_rows_8(const Product *p, int64_t token, int64_t pair, int64_t deep, int16_t (*panel)[WIDE][2],
                               int32_t (*sums)[WIDE]) {
    const uint8_t *values = p->values + (token * parts(p->w.depth, 2) + pair * ROWS) * 4;
    BY_ROWS(p->tokens - token, add_up_8, values, panel, deep, sums)
}

AVX2 static void scale_8(const Product *p, int64_t column, int32_t (*sums)[WIDE]) {
    _Alignas(LINE) float scales[WIDE] = { 0 }, out[WIDE];
    const int64_t wide = least(p->w.columns - column, WIDE);
    for (int64_t i = 0; i < wide; i++) scales[i] = p->step * p->scales[column + i];
    for (int64_t token = 0; token < p->tokens; token++) {
        const __m256i a = _mm256_loadu_si256((const void *)sums[token]), b = _mm256_loadu_si256((const void *)(sums[token] + LANES));
        const __m256 low = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a, b, 0x20));
        const __m256 high = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(a, b, 0x31));
        _mm256_store_ps(out, _mm256_mul_ps(low, _mm256_load_ps(scales)));
        _mm256_store_ps(out + LANES, _mm256_mul_ps(high, _mm256_load_ps(scales + LANES)));
        memcpy(p->out + token * p->w.columns + column, out, (size_t)wide * sizeof(float));
    }
}

/* Asks for a strip's share of the rows that come next. */
static void ask_for_8(const Product *p, int64_t first, int64_t pair, int64_t strip, int64_t strips) {
    const int64_t columns = p->w.columns, row = 2 * pair + 2 * PAIRS * strip / strips, last = 2 * pair + 2 * PAIRS * (strip + 1) / strips;
    for (int64_t i = row; i < least(last, p->w.depth); i++)
        for (int64_t at = first; at < least(first + strips * WIDE, columns); at += LINE)
            __builtin_prefetch((const int8_t *)p->weights + i * columns + at, 0, 2);
}

AVX2 static void multiply_8(void *product, size_t share) {
    const Product *p = product;
    const int64_t pairs = parts(p->w.depth, 2), columns = p->w.columns, first = (int64_t)share * p->strips * WIDE;
    const int64_t strips = parts(least(columns - first, p->strips * WIDE), WIDE);
    _Alignas(LINE) Panel8 panels[STRIPS_8];
    int32_t (*sums)[WIDE] = p->sums + first / WIDE * p->tokens; /* of a strip all tokens, then those of the next */
    memset(sums, 0, (size_t)(strips * p->tokens) * sizeof *sums);
    for (int64_t pair = 0; pair < pairs; pair += PAIRS) {
        const int64_t deep = least(pairs - pair, PAIRS);
        for (int64_t i = 0; i < deep; i++) widen_pairs(p, first, pair + i, strips, panels, i);
        for (int64_t strip = 0; strip < strips; strip++) {
            ask_for_8(p, first, pair + PAIRS, strip, strips);
            for (int64_t token = 0; token < p->tokens; token += ROWS)
                add_up_rows_8(p, token, pair, deep, panels[strip], sums + strip * p->tokens + token);
        }
    }
    for (int64_t strip = 0; strip < strips; strip++) scale_8(p, first + strip * WIDE, sums + strip * p->tokens);
}

static Status *pass_8(const void *context, Product *p) {
    const int64_t strips = parts(p->w.columns, WIDE), groups = parts(p->tokens, ROWS);
    p->sums = (void *)(p->values + groups * ROWS * parts(p->w.depth, 2) * 4);
    p->strips = least(STRIPS_8, parts(strips, LEAST_SHARES));
    TRY(in_parallel(context, widen_group, groups, p));
    return in_parallel(context, multiply_8, parts(strips, p->strips), p);
}

static Status *create_8(const void *operator, const Function *unused, const void *info, void **out) {
    (void)operator, (void)unused;
    Tensor weights, scales;
    TRY(weights_of_bytes(info, &weights));
    TRY(constant(info, SCALES, &scales));
    if ((int64_t)scales.count != weights.sizes[1]) return failed("edgeguard: scales of another shape");
    *out = kept(weights.sizes[0], weights.sizes[1]);
    return *out ? NULL : failed("edgeguard: out of memory");
}

static Status *compute_8(void *weights, void *context) {
    Product p = { .w = *(const Weights *)weights };
    Tensor input[INPUTS];
    TRY(inputs_of_bytes(context, p.w.depth, input));
    TRY(output_of(context, &input[ACTIVATIONS], p.w.columns, &p.out));
    p.activations = input[ACTIVATIONS].data, p.weights = input[WEIGHTS].data;
    p.scales = input[SCALES].data, p.step = *(const float *)input[STEP].data;
    p.tokens = (int64_t)input[ACTIVATIONS].count / p.w.depth;
    return in_passes(&p, p.w.depth, parts(p.w.depth, 2) * 4 + parts(p.w.columns, WIDE) * WIDE * 4, context, pass_8);
}

/* ---- the operators ---- */

static const Described products[] = {
    { OPERATOR(create_4, compute_4, free), "MatMulNBits", INPUTS_4, 1, 0, { FLOAT, UINT8, FLOAT }, { FLOAT } },
    BYTES(create_8, compute_8, free),
};

/* Called by ONNX Runtime for a session that the library is registered with. */
Status *RegisterCustomOps(void *options, const Base *base) { return add_operators(options, base, DOMAIN, products, 2); }

#endif
