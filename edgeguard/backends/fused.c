/* What lies between the products of a guard graph, on x86 processors with AVX2 and FMA: an operator library for ONNX Runtime.

Guard graphs hold these operators as functions (convert/functions.py), in a domain of edgeguard's own. ONNX Runtime takes a function
apart into its nodes, unless there is a kernel of its name: with this library each is one pass over memory instead of up to thirty.
Quantise, QuantiseParts and QuantiseFinely give the bits that their functions give; the others add up in another order.
In all of them a token's result depends on no other token of the pass, but what is not finite may spread. A NaN is never lost.
*/
#if defined(__x86_64__)
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "a compiler that takes no number for NaN would lose it"
#endif

#include "fused.h"

/* ---- operators that work row by row ---- */

enum { ALONE = 1 << 14 /* numbers that one thread is done with before another one is awake */ };
enum { EXPONENTIAL = 8 /* numbers that take as long as one */ };

/* Calls `work(what, 0)` to `work(what, rows - 1)`, on several threads where that pays. */
static Status *for_rows(const void *context, void (*work)(void *, size_t), int64_t rows, int64_t width, void *what) {
    if (rows * width >= ALONE) return in_parallel(context, work, rows, what);
    for (int64_t row = 0; row < rows; row++) work(what, (size_t)row);
    return NULL;
}

typedef struct { const float *x; uint8_t *out[PARTS]; float *steps; int64_t width, parts; } Quantised;

static void quantise_row(void *what, size_t row) {
    const Quantised *q = what;
    const int64_t width = q->width / q->parts;
    for (int64_t part = 0; part < q->parts; part++)
        q->steps[(int64_t)row * q->parts + part] =
            loops->quantise(q->x + (int64_t)row * q->width + part * width, width, q->out[part] + (int64_t)row * width);
}

static void quantise_row_finely(void *what, size_t row) {
    const Quantised *q = what;
    const float *x = q->x + (int64_t)row * q->width;
    uint8_t *out = q->out[0] + (int64_t)row * TERMS * q->width;
    float *steps = q->steps + row * TERMS;
    steps[0] = loops->quantise(x, q->width, out);
    steps[1] = steps[0] * FINER;
    loops->quantise_rest(x, q->width, steps[0], out, out + q->width);
}

/* Quantise: rows (T, width) to bytes (T, width) and steps (T, 1).
   QuantiseParts: to PARTS of bytes (T, 1, width / PARTS), and steps (T, PARTS, 1).
   QuantiseFinely: to bytes (T, TERMS, width) and steps (T, TERMS, 1). */
static Status *quantise(void *context, int64_t parts_of, int64_t terms) {
    Tensor x, zeros;
    TRY(input_of(context, 0, &x));
    TRY(input_of(context, 1, &zeros));
    if (x.rank != 2 || x.sizes[1] % parts_of) return failed("edgeguard: rows of another shape");
    for (size_t i = 0; i < zeros.count; i++)
        if (((const uint8_t *)zeros.data)[i] != 128) return failed("edgeguard: a zero point other than 128");
    const int64_t tokens = x.sizes[0], middle = parts_of * terms;
    const size_t rank = middle > 1 ? 3 : 2;
    Quantised q = { .x = x.data, .width = x.sizes[1], .parts = parts_of };
    const int64_t sizes[] = { tokens, terms, q.width / parts_of }, flat[] = { tokens, q.width };
    for (int64_t part = 0; part < parts_of; part++)
        TRY(output(context, (size_t)part, rank == 3 ? sizes : flat, rank, (void **)&q.out[part]));
    TRY(output(context, (size_t)parts_of, (const int64_t[]){ tokens, middle, 1 }, rank, (void **)&q.steps));
    return for_rows(context, terms > 1 ? quantise_row_finely : quantise_row, tokens, q.width, &q);
}

static Status *quantise_plainly(void *kernel, void *context) { return (void)kernel, quantise(context, 1, 1); }
static Status *quantise_parts(void *kernel, void *context) { return (void)kernel, quantise(context, PARTS, 1); }
static Status *quantise_finely(void *kernel, void *context) { return (void)kernel, quantise(context, 1, TERMS); }

typedef struct { const float *products[PARTS], *steps; float *out; int64_t terms, width, stride; } Combined;

static void combine_row(void *what, size_t row) {
    const Combined *c = what;
    const float *products[PARTS];
    for (int64_t term = 0; term < c->terms; term++) products[term] = c->products[term] + (int64_t)row * c->stride;
    loops->combine(products, c->steps + (int64_t)row * c->terms, c->terms, c->width, c->out + (int64_t)row * c->width);
}

/* The sum (T, width) of products, each times its step (T, terms, 1): in parts as many of (T, 1, width), finely one of (T, 2, width). */
static Status *combine(void *context, int64_t inputs, int64_t terms) {
    Tensor steps, product;
    TRY(input_of(context, 0, &steps));
    Combined c = { .steps = steps.data, .terms = terms };
    for (int64_t i = 0; i < inputs; i++) {
        TRY(input_of(context, (size_t)i + 1, &product));
        const int fits = product.rank == 3 && product.sizes[1] * inputs == terms && (!i || product.sizes[2] == c.width);
        if (!fits || (int64_t)steps.count != product.sizes[0] * terms) return failed("edgeguard: products of another shape");
        c.products[i] = product.data, c.width = product.sizes[2], c.stride = product.sizes[1] * c.width;
    }
    for (int64_t term = inputs; term < terms; term++) c.products[term] = c.products[0] + term * c.width;
    TRY(output(context, 0, (const int64_t[]){ product.sizes[0], c.width }, 2, (void **)&c.out));
    return for_rows(context, combine_row, product.sizes[0], c.width * terms, &c);
}

static Status *combine_parts(void *kernel, void *context) { return (void)kernel, combine(context, PARTS, PARTS); }
static Status *combine_finely(void *kernel, void *context) { return (void)kernel, combine(context, 1, TERMS); }

/* Rows of the same number and width. */
static int are_alike(const Tensor *a, const Tensor *b) {
    return a->rank == 2 && b->rank == 2 && a->sizes[0] == b->sizes[0] && a->sizes[1] == b->sizes[1];
}

/* Steps, if there are some, one for each row. */
static int are_for(const Tensor *steps, int64_t rows) { return !steps->rank || (int64_t)steps->count == rows; }

typedef struct { const float *x, *up, *steps; float *out; int64_t width; } Gated;

static void gate_row(void *what, size_t row) {
    const Gated *g = what;
    const int64_t at = (int64_t)row * g->width;
    loops->gate(g->x + at, g->up + at, g->steps ? g->steps[row] : 1, g->width, g->out + at);
}

static Status *gate(void *kernel, void *context) {
    (void)kernel;
    Tensor x, up, steps;
    TRY(input_of(context, 0, &x));
    TRY(input_of(context, 1, &up));
    TRY(optional_input_of(context, 2, &steps));
    if (!are_alike(&x, &up) || !are_for(&steps, x.sizes[0])) return failed("edgeguard: rows of another shape");
    Gated g = { .x = x.data, .up = up.data, .steps = steps.data, .width = x.sizes[1] };
    TRY(output(context, 0, x.sizes, 2, (void **)&g.out));
    return for_rows(context, gate_row, x.sizes[0], EXPONENTIAL * g.width, &g);
}

typedef struct { const float *x, *change, *steps, *weights; float epsilon, *sum, *out; int64_t width; } Normed;

static void norm_row(void *what, size_t row) {
    const Normed *n = what;
    const int64_t at = (int64_t)row * n->width;
    loops->norm(n->x + at, n->change + at, n->steps ? n->steps[row] : 1, n->weights, n->epsilon, n->width, n->sum + at, n->out + at);
}

static Status *norm(void *epsilon, void *context) {
    Tensor x, change, weights, steps;
    TRY(input_of(context, 0, &x));
    TRY(input_of(context, 1, &change));
    TRY(input_of(context, 2, &weights));
    TRY(optional_input_of(context, 3, &steps));
    if (!are_alike(&x, &change) || (int64_t)weights.count != x.sizes[1] || !are_for(&steps, x.sizes[0]))
        return failed("edgeguard: rows of another shape");
    Normed n = { .x = x.data, .change = change.data, .steps = steps.data, .weights = weights.data, .epsilon = *(float *)epsilon,
                 .width = x.sizes[1] };
    TRY(output(context, 0, x.sizes, 2, (void **)&n.out));
    TRY(output(context, 1, x.sizes, 2, (void **)&n.sum));
    return for_rows(context, norm_row, x.sizes[0], n.width, &n);
}

/* ---- attention ---- */

/* What a token's queries, or its keys and values, are still to be multiplied by. */
static float multiplier(const Attention *a, int input, size_t token) {
    return a->in[input].data ? ((const float *)a->in[input].data)[token] : 1;
}

/* A token's query heads, or its key heads and values. */
static void rotate_query(void *what, size_t token) {
    const Attention *a = what;
    const int64_t half = a->head_dim / 2, place = integers(a, ASKED_AT)[token] * half;
    const float *cosines = (const float *)a->in[ASKED_COSINES].data + place, *sines = (const float *)a->in[ASKED_SINES].data + place;
    const float scale = multiplier(a, QUERY_STEPS, token) / sqrtf((float)a->head_dim);
    for (int64_t head = (int64_t)token * a->heads; head < ((int64_t)token + 1) * a->heads; head++) {
        float *out = a->rotated + head * a->padded;
        loops->rotate((const float *)a->in[QUERY].data + head * a->head_dim, cosines, sines, half, scale, out);
        memset(out + a->head_dim, 0, (size_t)(a->padded - a->head_dim) * sizeof *out);
    }
}

static void rotate_key(void *what, size_t token) {
    const Attention *a = what;
    const int64_t half = a->head_dim / 2, place = integers(a, AT)[token] * half, first = (int64_t)token * a->kv_heads * a->head_dim;
    const float *cosines = (const float *)a->in[COSINES].data + place, *sines = (const float *)a->in[SINES].data + place;
    const float *values = (const float *)a->in[VALUE].data + first, step = multiplier(a, STEPS, token);
    for (int64_t at = first; at < first + a->kv_heads * a->head_dim; at += a->head_dim)
        loops->rotate((const float *)a->in[KEY].data + at, cosines, sines, half, step, a->new_keys + at);
    loops->combine(&values, &step, 1, a->kv_heads * a->head_dim, a->new_values + first);
}

/* The keys that a token sees: the first ones, whose mask is 0; -1 for a mask that is not minus infinity behind them. */
static int64_t seen_by(const Attention *a, int64_t token) {
    const int64_t place = integers(a, PLACES)[token], lane = place / a->depth;
    const float *mask = (const float *)a->in[MASK].data + (lane * a->group * a->depth + place % a->depth) * a->columns;
    int64_t seen = 0;
    while (seen < a->columns && mask[seen] == 0) seen++;
    for (int64_t key = seen; key < a->columns; key++) if (mask[key] != -INFINITY) return -1;
    return seen;
}

/* Cuts the tokens into stretches; gives their number, -1 for a mask of another kind. */
static int64_t cut(Attention *a) {
    enum { SHARES = 16 };
    const int64_t rows = least(MOST_ROWS, MOST_SCORES / a->columns) / a->group, even = parts(a->asked * a->kv_heads, SHARES);
    const int64_t longest = rows > 1 ? least(rows, even) : 1;
    int64_t count = 0;
    for (int64_t token = 0; token < a->asked; token++) {
        const int64_t lane = integers(a, PLACES)[token] / a->depth, seen = seen_by(a, token);
        if (seen < 0) return -1;
        if (!count || a->stretches[count - 1].lane != lane || a->stretches[count - 1].count == longest)
            a->stretches[count++] = (Stretch){ lane, token, 0, 0 };
        Stretch *last = a->stretches + count - 1;
        last->count++;
        last->seen = seen > last->seen ? seen : last->seen;
        a->seen[token] = seen;
    }
    return count;
}

static void attend(void *what, size_t share) {
    Attention *a = what;
    const int64_t head = (int64_t)share % a->kv_heads, width = a->heads * a->head_dim;
    const Stretch *of = a->stretches + (int64_t)share / a->kv_heads;
    const int64_t rows = of->count * a->group, stride = parts(of->seen, KEYS) * KEYS;
    Room room = { .stride = stride, .queries = malloc((size_t)rows * sizeof(float *)),
                  .scores = malloc((size_t)(rows * (stride + a->padded + 1) + KEYS * a->padded) * sizeof(float)) };
    if (!room.queries || !room.scores) {
        a->failed = 1;
    } else {
        room.out = room.scores + rows * stride, room.sums = room.out + rows * a->padded, room.together = room.sums + rows;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t query = integers(a, QUERIES)[integers(a, PLACES)[of->first + row / a->group]];
            room.queries[row] = a->rotated + (query * a->heads + head * a->group + row % a->group) * a->padded;
        }
        loops->attend(a, of, head, &room);
        for (int64_t row = 0; row < rows; row++) {
            float *out = a->out + (of->first + row / a->group) * width + (head * a->group + row % a->group) * a->head_dim;
            for (int64_t i = 0; i < a->head_dim; i++) out[i] = room.out[row * a->padded + i] / room.sums[row];
        }
    }
    free(room.scores);
    free((void *)room.queries);
}

static int has(const Tensor *t, size_t rank, int64_t first, int64_t second, int64_t third) {
    const int64_t sizes[] = { first, second, third };
    int fits = t->rank == rank;
    for (size_t i = 0; fits && i < rank; i++) fits = t->sizes[i] == sizes[i];
    return fits;
}

static int below(const Tensor *t, int64_t limit) {
    const int64_t *values = t->data;
    int fits = 1;
    for (size_t i = 0; i < t->count; i++) fits &= values[i] >= 0 && values[i] < limit;
    return fits;
}

/* Reads the inputs and their sizes; what would be read outside of them is an error. */
static Status *inputs_of_attention(const void *context, Attention *a) {
    Tensor *in = a->in;
    for (size_t i = 0; i < QUERY_STEPS; i++) TRY(input_of(context, i, &in[i]));
    for (size_t i = QUERY_STEPS; i < ATTENTION_INPUTS; i++) TRY(optional_input_of(context, i, &in[i]));
    if (in[QUERY].rank != 2 || in[PAST_KEYS].rank != 3 || in[KEYS_SEEN].rank != 2 || in[QUERIES].rank != 2)
        return failed("edgeguard: attention over another number of sizes");
    const int64_t *past = in[PAST_KEYS].sizes;
    a->past = past[0], a->kv_heads = past[1], a->head_dim = past[2], a->asked = in[QUERY].sizes[0], a->tokens = in[KEY].sizes[0];
    a->lanes = in[QUERIES].sizes[0], a->depth = in[QUERIES].sizes[1], a->columns = in[KEYS_SEEN].sizes[1];
    a->heads = a->head_dim ? in[QUERY].sizes[1] / a->head_dim : 0, a->group = a->kv_heads ? a->heads / a->kv_heads : 0;
    a->padded = parts(a->head_dim, 64) * 64; /* four vectors of either width */
    const int64_t keys = a->kv_heads * a->head_dim, half = a->head_dim / 2;
    const int fits = a->group > 0 && a->columns > 0 && a->depth > 0 && a->head_dim % 2 == 0 && a->heads == a->group * a->kv_heads &&
        has(&in[QUERY], 2, a->asked, a->heads * a->head_dim, 0) &&
        has(&in[KEY], 2, a->tokens, keys, 0) && has(&in[VALUE], 2, a->tokens, keys, 0) &&
        has(&in[PAST_VALUES], 3, a->past, a->kv_heads, a->head_dim) && has(&in[KEYS_SEEN], 2, a->lanes, a->columns, 0) &&
        has(&in[MASK], 3, a->lanes, a->group * a->depth, a->columns) && (int64_t)in[PLACES].count == a->asked &&
        (int64_t)in[ASKED_AT].count == a->asked && (int64_t)in[AT].count == a->tokens &&
        in[COSINES].rank == 2 && in[ASKED_COSINES].rank == 2 &&
        has(&in[SINES], 2, in[COSINES].sizes[0], half, 0) && has(&in[ASKED_SINES], 2, in[ASKED_COSINES].sizes[0], half, 0) &&
        in[COSINES].sizes[1] == half && in[ASKED_COSINES].sizes[1] == half &&
        are_for(&in[QUERY_STEPS], a->asked) && are_for(&in[STEPS], a->tokens);
    if (!fits) return failed("edgeguard: attention over other sizes");
    const int inside = below(&in[ASKED_AT], in[ASKED_COSINES].sizes[0]) && below(&in[AT], in[COSINES].sizes[0]) &&
        below(&in[QUERIES], a->asked) && below(&in[PLACES], a->lanes * a->depth) && below(&in[KEYS_SEEN], a->past + a->tokens);
    return inside ? NULL : failed("edgeguard: attention to a token that is not there");
}

static Status *attention(void *kernel, void *context) {
    (void)kernel;
    Attention a = { .failed = 0 };
    TRY(inputs_of_attention(context, &a));
    const int64_t keys[] = { a.tokens, a.kv_heads, a.head_dim };
    TRY(output(context, 0, (const int64_t[]){ a.asked, a.heads * a.head_dim }, 2, (void **)&a.out));
    TRY(output(context, 1, keys, 3, (void **)&a.new_keys));
    TRY(output(context, 2, keys, 3, (void **)&a.new_values));
    a.rotated = malloc((size_t)(a.asked * a.heads * a.padded + 1) * sizeof *a.rotated);
    a.stretches = malloc((size_t)(a.asked + 1) * sizeof *a.stretches);
    a.seen = malloc((size_t)(a.asked + 1) * sizeof *a.seen);
    Status *status = a.rotated && a.stretches && a.seen ? NULL : failed("edgeguard: out of memory");
    if (!status) status = for_rows(context, rotate_key, a.tokens, 2 * a.kv_heads * a.head_dim, &a);
    if (!status) status = for_rows(context, rotate_query, a.asked, a.heads * a.head_dim, &a);
    const int64_t stretches = status ? 0 : cut(&a);
    if (stretches < 0) status = failed("edgeguard: a mask of another kind");
    if (!status) status = in_parallel(context, attend, stretches * a.kv_heads, &a);
    if (!status && a.failed) status = failed("edgeguard: out of memory");
    free(a.rotated);
    free(a.stretches);
    free(a.seen);
    return status;
}

/* ---- the operators ---- */

static Status *nothing_to_keep(const void *operator, const Function *unused, const void *info, void **kernel) {
    (void)unused, (void)info;
    return *kernel = (void *)operator, NULL;
}
static void nothing_to_free(void *kernel) { (void)kernel; }
static Status *its_epsilon(const void *operator, const Function *unused, const void *info, void **kernel) {
    (void)operator, (void)unused;
    *kernel = malloc(sizeof(float));
    if (!*kernel) return failed("edgeguard: out of memory");
    Status *status = CALL(FLOAT_ATTRIBUTE, Status *, (const void *, const char *, float *), info, "epsilon", *kernel);
    if (status) free(*kernel);
    return status;
}
#define FUSED(compute) OPERATOR(nothing_to_keep, compute, nothing_to_free)
#define ATTENTION_TYPES \
    FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT64, FLOAT, FLOAT, INT64, FLOAT, FLOAT, INT64, INT64, INT64, FLOAT /* up to the mask */
static const Described fused[] = {
    { FUSED(quantise_plainly), "Quantise", 2, 2, 0, { FLOAT, UINT8 }, { UINT8, FLOAT } },
    { FUSED(quantise_parts), "QuantiseParts", 2, PARTS + 1, 0, { FLOAT, UINT8 }, { UINT8, UINT8, UINT8, UINT8, FLOAT } },
    { FUSED(quantise_finely), "QuantiseFinely", 2, 2, 0, { FLOAT, UINT8 }, { UINT8, FLOAT } },
    { FUSED(combine_parts), "CombineParts", PARTS + 1, 1, 0, { FLOAT, FLOAT, FLOAT, FLOAT, FLOAT }, { FLOAT } },
    { FUSED(combine_finely), "CombineFinely", 2, 1, 0, { FLOAT, FLOAT }, { FLOAT } },
    { FUSED(gate), "Gate", 2, 1, 0, { FLOAT, FLOAT }, { FLOAT } },
    { FUSED(gate), "GateInSteps", 3, 1, 0, { FLOAT, FLOAT, FLOAT }, { FLOAT } },
    { OPERATOR(its_epsilon, norm, free), "Norm", 3, 2, 0, { FLOAT, FLOAT, FLOAT }, { FLOAT, FLOAT } },
    { OPERATOR(its_epsilon, norm, free), "NormInSteps", 4, 2, 0, { FLOAT, FLOAT, FLOAT, FLOAT }, { FLOAT, FLOAT } },
    { FUSED(attention), "Attention", QUERY_STEPS, 3, 0, { ATTENTION_TYPES }, { FLOAT, FLOAT, FLOAT } },
    { FUSED(attention), "AttentionInSteps", ATTENTION_INPUTS, 3, 0, { ATTENTION_TYPES, FLOAT, FLOAT }, { FLOAT, FLOAT, FLOAT } },
};

/* Called by ONNX Runtime for a session that the library is registered with. */
Status *RegisterCustomOps(void *options, const Base *base) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) loops = &loops_16;
    return add_operators(options, base, "edgeguard", fused, sizeof fused / sizeof *fused);
}

#endif
