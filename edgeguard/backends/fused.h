/* What the operators of fused.c share, and the loops (fused_loops.h) for the widest vectors that the processor has. */
#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "custom_op.h"

#define MAGIC 12582912.0f /* 1.5 * 2^23: what is added to it is rounded to a whole number, in its lowest bits */
#define TINY 1e-30f       /* smaller magnitudes are taken for it */
#define STEP ((float)(1.0 / 127))
#define FINER ((float)(1.0 / 254))
enum { PARTS = 4, TERMS = 2 /* of a row in parts, of one read finely */ };

enum { QUERY, KEY, VALUE, PAST_KEYS, PAST_VALUES, ASKED_AT, ASKED_COSINES, ASKED_SINES, AT, COSINES, SINES, QUERIES, PLACES, KEYS_SEEN,
       MASK, QUERY_STEPS, STEPS, ATTENTION_INPUTS };
enum { KEYS = 32 /* read at a time */, ROWS = 3 /* queries whose sums are in registers */,
       FEW = 8 /* queries for which keys are not copied together */, MOST_ROWS = 96, MOST_SCORES = 3 << 17 /* of a stretch */ };

typedef struct {
    Tensor in[ATTENTION_INPUTS];
    int64_t heads, kv_heads, group, head_dim, padded /* up to whole vectors */, tokens, asked, past, lanes, depth, columns;
    float *rotated; /* queries (asked, heads, padded), after RoPE, scaled */
    float *new_keys, *new_values, *out;
    struct Stretch *stretches;
    int64_t *seen; /* keys, by each token */
    atomic_int failed;
} Attention;

typedef struct Stretch { /* tokens of one lane that a thread takes together */
    int64_t lane, first, count, seen; /* keys up to the last one that is seen by any of them */
} Stretch;

typedef struct { /* of one stretch and key head */
    const float **queries, *at[KEYS];
    int64_t stride;
    float *scores, *out, *sums, *together;
} Room;

static const int64_t *integers(const Attention *a, int input) { return a->in[input].data; }

/* Points `at` to some keys or values of a lane, to the last of them again up to a multiple of four; gives how many there are. */
static int64_t rows_of(const Attention *a, const Stretch *of, int64_t head, int64_t first, int past, Room *room) {
    const int64_t count = least(of->seen - first, KEYS), *rows = integers(a, KEYS_SEEN) + of->lane * a->columns + first;
    const float *old = a->in[past].data, *new = past == PAST_KEYS ? a->new_keys : a->new_values;
    const int64_t stride = a->kv_heads * a->head_dim;
    for (int64_t i = 0; i < count; i++) {
        room->at[i] = (rows[i] < a->past ? old + rows[i] * stride : new + (rows[i] - a->past) * stride) + head * a->head_dim;
        if (of->count * a->group <= FEW && a->head_dim == a->padded) continue;
        float *copy = room->together + i * a->padded; /* elsewhere rows lie so far apart that they fall on the same lines of a cache */
        memcpy(copy, room->at[i], (size_t)a->head_dim * sizeof *copy);
        memset(copy + a->head_dim, 0, (size_t)(a->padded - a->head_dim) * sizeof *copy);
        room->at[i] = copy;
    }
    for (int64_t i = count; i < parts(count, 4) * 4; i++) room->at[i] = room->at[count - 1];
    return count;
}

/* ---- the loops, for two widths of vectors ---- */

typedef struct {
    float (*quantise)(const float *x, int64_t count, uint8_t *out);
    void (*quantise_rest)(const float *x, int64_t count, float step, const uint8_t *coarse, uint8_t *out);
    void (*combine)(const float *const *products, const float *steps, int64_t terms, int64_t count, float *out);
    void (*gate)(const float *x, const float *up, float step, int64_t count, float *out);
    void (*norm)(const float *x, const float *change, float step, const float *weights, float epsilon, int64_t count, float *sum,
                 float *out);
    void (*rotate)(const float *x, const float *cosines, const float *sines, int64_t half, float scale, float *out);
    void (*attend)(const Attention *a, const Stretch *of, int64_t head, Room *room);
} Loops;

/* Calls the variant of a function for as many rows. */
#define BY_ROWS(count, function, ...) \
    switch (least(count, ROWS)) { \
        case 1: function(__VA_ARGS__, 1); break; \
        case 2: function(__VA_ARGS__, 2); break; \
        default: function(__VA_ARGS__, ROWS); \
    }
#define LOOP TARGET static
#define INLINE TARGET static inline __attribute__((always_inline))
#define LOAD INTRINSIC(loadu_ps)
#define STORE INTRINSIC(storeu_ps)
#define SET INTRINSIC(set1_ps)
#define FMA INTRINSIC(fmadd_ps)
#define SMALLER INTRINSIC(min_ps) /* of two the second where one is NaN */
#define LARGER INTRINSIC(max_ps)
#define WIDE 8
#include "fused_loops.h"
#define WIDE 16
#include "fused_loops.h"
static const Loops *loops = &loops_8; /* the widest that the processor has */
