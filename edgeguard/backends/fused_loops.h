/* The loops of fused.c, included once for each width of vectors, WIDE: V is a vector of as many floats, NAME(x) what x is called. */

#if WIDE == 8
#define V __m256
#define NAME(name) name##_8
#define INTRINSIC(name) _mm256_##name
#define TARGET __attribute__((target("avx2,fma")))
#define UNLESS_LESS(x, limit, value) _mm256_and_ps(value, _mm256_cmp_ps(x, limit, _CMP_NLT_US))
#define UNLESS_NAN(x, value) _mm256_blendv_ps(value, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q))
#define TIMES_POWER_OF_2(x, shifted) \
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)))
#define FOLDED(x) x
#else
#define V __m512
#define NAME(name) name##_16
#define INTRINSIC(name) _mm512_##name
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl")))
#define UNLESS_LESS(x, limit, value) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_US), value)
#define UNLESS_NAN(x, value) _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x)
#define TIMES_POWER_OF_2(x, shifted) \
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)))
#define FOLDED(x) _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)))
#endif

/* Cephes' expf, 0 below -87; a NaN stays one. */
INLINE V NAME(exponential)(V x) {
    const V inside = SMALLER(SET(88), LARGER(SET(-87), x));
    const V shifted = FMA(inside, SET(1.44269504f), SET(MAGIC)), whole = shifted - SET(MAGIC);
    const V rest = FMA(whole, SET(2.12194440e-4f), FMA(whole, SET(-0.693359375f), inside));
    V found = FMA(SET(1.9875691500e-4f), rest, SET(1.3981999507e-3f));
    found = FMA(found, rest, SET(8.3334519073e-3f));
    found = FMA(found, rest, SET(4.1665795894e-2f));
    found = FMA(found, rest, SET(1.6666665459e-1f));
    found = FMA(found, rest, SET(5.0000001201e-1f));
    found = FMA(rest * rest, found, rest);
    return UNLESS_NAN(x, UNLESS_LESS(x, SET(-87), TIMES_POWER_OF_2(found + SET(1), shifted)));
}

/* The step in which a row is quantised, a 127th of its largest magnitude. Magnitudes are compared as whole numbers, of which NaN is the
   largest: it makes the step, and so all results of the token, not finite. */
LOOP float NAME(step_of)(const float *x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float found;
    memcpy(&found, &most, sizeof found);
    return (found < TINY ? TINY : found) * STEP;
}

INLINE uint8_t NAME(byte_of)(float steps) { /* rounded to the nearest, and 128 */
    const float shifted = steps + MAGIC;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return (uint8_t)(bits + 128);
}

LOOP float NAME(quantise)(const float *x, int64_t count, uint8_t *out) {
    const float step = NAME(step_of)(x, count);
    for (int64_t i = 0; i < count; i++) out[i] = NAME(byte_of)(x[i] / step);
    return step;
}

/* What quantising left, in a finer step. */
LOOP void NAME(quantise_rest)(const float *x, int64_t count, float step, const uint8_t *coarse, uint8_t *out) {
    const float fine = step * FINER;
    for (int64_t i = 0; i < count; i++) out[i] = NAME(byte_of)((x[i] - (float)((int)coarse[i] - 128) * step) / fine);
}

LOOP void NAME(combine)(const float *const *products, const float *steps, int64_t terms, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = steps[0] * products[0][i];
    for (int64_t term = 1; term < terms; term++)
        for (int64_t i = 0; i < count; i++) out[i] = __builtin_fmaf(steps[term], products[term][i], out[i]);
}

/* x * sigmoid(x) * up, both in steps. */
LOOP void NAME(gate)(const float *x, const float *up, float step, int64_t count, float *out) {
    float rest[3][WIDE] = { { 0 } };
    for (int64_t i = 0; i < count; i += WIDE) {
        const int64_t left = count - i;
        if (left < WIDE) memcpy(rest[0], x + i, (size_t)left * sizeof *x), memcpy(rest[1], up + i, (size_t)left * sizeof *up);
        const V value = LOAD(left < WIDE ? rest[0] : x + i) * SET(step), other = LOAD(left < WIDE ? rest[1] : up + i) * SET(step);
        const V below = SET(1) + NAME(exponential)(SET(0) - value);
        STORE(left < WIDE ? rest[2] : out + i, value / below * other);
        if (left < WIDE) memcpy(out + i, rest[2], (size_t)left * sizeof *out);
    }
}

/* A row and another one in steps, added up, and the RMSNorm of the sum. */
LOOP void NAME(norm)(const float *x, const float *change, float step, const float *weights, float epsilon, int64_t count, float *sum,
                     float *out) {
    V squares = SET(0);
    float each[WIDE], total = 0;
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) {
        const V value = FMA(LOAD(change + i), SET(step), LOAD(x + i));
        STORE(sum + i, value);
        squares = FMA(value, value, squares);
    }
    for (; i < count; i++) {
        sum[i] = __builtin_fmaf(change[i], step, x[i]);
        total += sum[i] * sum[i];
    }
    STORE(each, squares);
    for (int lane = 0; lane < WIDE; lane++) total += each[lane];
    const float scale = 1 / sqrtf(total / (float)count + epsilon) + 0 * total; /* squares that overflow are NaN, not 0 */
    for (i = 0; i < count; i++) out[i] = sum[i] * scale * weights[i];
}

/* RoPE, times a scale. */
LOOP void NAME(rotate)(const float *x, const float *cosines, const float *sines, int64_t half, float scale, float *out) {
    for (int64_t i = 0; i < half; i++) {
        const float low = x[i], high = x[i + half];
        out[i] = (low * cosines[i] - high * sines[i]) * scale;
        out[i + half] = (high * cosines[i] + low * sines[i]) * scale;
    }
}

/* ---- attention: some tokens of a lane, the queries of one key head ---- */

/* The sums of four vectors. */
INLINE __m128 NAME(sums_of)(const V *each) {
    const __m256 two = _mm256_hadd_ps(FOLDED(each[0]), FOLDED(each[1])), others = _mm256_hadd_ps(FOLDED(each[2]), FOLDED(each[3]));
    const __m256 four = _mm256_hadd_ps(two, others);
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

/* Scores of a few queries, one for each row, with four keys. */
INLINE void NAME(score)(const float *const *queries, const float *const *keys, int64_t width, float *scores, int64_t stride,
                        const int rows) {
    V sums[ROWS][4];
    for (int row = 0; row < rows; row++) for (int key = 0; key < 4; key++) sums[row][key] = SET(0);
    for (int64_t i = 0; i < width; i += WIDE) {
        V of_key[4];
        for (int key = 0; key < 4; key++) of_key[key] = LOAD(keys[key] + i);
        for (int row = 0; row < rows; row++) {
            const V query = LOAD(queries[row] + i);
            for (int key = 0; key < 4; key++) sums[row][key] = FMA(query, of_key[key], sums[row][key]);
        }
    }
    for (int row = 0; row < rows; row++) _mm_storeu_ps(scores + row * stride, NAME(sums_of)(sums[row]));
}

/* Adds the values of some keys, in their shares, to four vectors of each row, from a column on. */
INLINE void NAME(add_values)(const float *shares, int64_t stride, const float *const *values, int64_t column, int64_t count, float *out,
                             int64_t width, const int rows) {
    V sums[ROWS][4];
    for (int row = 0; row < rows; row++) for (int i = 0; i < 4; i++) sums[row][i] = LOAD(out + row * width + column + i * WIDE);
    for (int64_t key = 0; key < count; key++) {
        V value[4];
        for (int i = 0; i < 4; i++) value[i] = LOAD(values[key] + column + i * WIDE);
        for (int row = 0; row < rows; row++) {
            const V share = SET(shares[row * stride + key]);
            for (int i = 0; i < 4; i++) sums[row][i] = FMA(share, value[i], sums[row][i]);
        }
    }
    for (int row = 0; row < rows; row++) for (int i = 0; i < 4; i++) STORE(out + row * width + column + i * WIDE, sums[row][i]);
}

/* Scores to shares, which are still to be divided by their sum; 0 behind the keys that are seen. */
LOOP float NAME(softmax)(float *scores, int64_t seen, int64_t stride) {
    for (int64_t i = seen; i < stride; i++) scores[i] = -INFINITY;
    float each[WIDE], found = -INFINITY;
    V most = SET(-INFINITY), sums = SET(0);
    for (int64_t i = 0; i < stride; i += WIDE) most = LARGER(LOAD(scores + i), most);
    STORE(each, most);
    for (int i = 0; i < WIDE; i++) found = each[i] > found ? each[i] : found;
    for (int64_t i = 0; i < stride; i += WIDE) {
        const V share = NAME(exponential)(LOAD(scores + i) - SET(found));
        STORE(scores + i, share);
        sums = sums + share;
    }
    STORE(each, sums);
    found = 0;
    for (int i = 0; i < WIDE; i++) found += each[i];
    return found;
}

/* The tokens of a stretch, one key head. */
LOOP void NAME(attend)(const Attention *a, const Stretch *of, int64_t head, Room *room) {
    const int64_t rows = of->count * a->group, stride = room->stride, width = a->padded;
    for (int64_t key = 0; key < of->seen; key += KEYS) {
        const int64_t count = rows_of(a, of, head, key, PAST_KEYS, room);
        for (int64_t row = 0; row < rows; row += ROWS)
            for (int64_t four = 0; four < count; four += 4)
                BY_ROWS(rows - row, NAME(score), room->queries + row, room->at + four, width,
                        room->scores + row * stride + key + four, stride)
    }
    for (int64_t row = 0; row < rows; row++)
        room->sums[row] = NAME(softmax)(room->scores + row * stride, a->seen[of->first + row / a->group], stride);
    memset(room->out, 0, (size_t)(rows * width) * sizeof *room->out);
    for (int64_t key = 0; key < of->seen; key += KEYS) {
        const int64_t count = rows_of(a, of, head, key, PAST_VALUES, room);
        for (int64_t row = 0; row < rows; row += ROWS)
            for (int64_t column = 0; column < width; column += 4 * WIDE)
                BY_ROWS(rows - row, NAME(add_values), room->scores + row * stride + key, stride, room->at, column, count,
                        room->out + row * width, width)
    }
}

static const Loops NAME(loops) = { NAME(quantise), NAME(quantise_rest), NAME(combine), NAME(gate), NAME(norm), NAME(rotate), NAME(attend) };

#undef V
#undef NAME
#undef INTRINSIC
#undef TARGET
#undef UNLESS_LESS
#undef UNLESS_NAN
#undef TIMES_POWER_OF_2
#undef FOLDED
#undef WIDE
