/* What the libraries of products by weights have in common: operators of ONNX Runtime's own domain, with one result. */
#include "custom_op.h"

#define DOMAIN "com.microsoft"

/* An input that is known at load. */
static Status *constant(const void *info, size_t place, Tensor *out) {
    int found = 0;
    const void *value = NULL;
    TRY(CALL(CONSTANT_INPUT, Status *, (const void *, size_t, int *, const void **), info, place, &found, &value));
    return found ? tensor(value, out) : failed("edgeguard: weights, scales or a zero point that are not constant");
}

/* The inputs of a product; the first one's rows are activations of a width of `depth`. */
static Status *inputs_of(const void *context, size_t count, int64_t depth, Tensor *out) {
    for (size_t i = 0; i < count; i++) TRY(input_of(context, i, &out[i]));
    const int fits = out->rank && out->sizes[out->rank - 1] == depth;
    return fits ? NULL : failed("edgeguard: activations of another width than the weights");
}

/* Room for the result: the sizes of `given` with `columns` as the last one. */
static Status *output_of(void *context, const Tensor *given, int64_t columns, float **out) {
    int64_t sizes[MOST_SIZES];
    for (size_t i = 0; i < given->rank; i++) sizes[i] = given->sizes[i];
    sizes[given->rank - 1] = columns;
    return output(context, 0, sizes, given->rank, (void **)out);
}

/* ---- MatMulIntegerToFloat: bytes by weights of 8 bits (depth, columns), times a step and a scale for each column ---- */

enum { ACTIVATIONS, WEIGHTS, STEP, SCALES, ZERO_POINT, INPUTS, WEIGHTS_ZERO_POINT = INPUTS };
enum { DEEPEST = 1 << 16 }; /* so that no sum of 32 bits overflows */
#define BYTES(create, compute, destroy) \
    { OPERATOR(create, compute, destroy), "MatMulIntegerToFloat", INPUTS + 1, 1, 1, { UINT8, INT8, FLOAT, FLOAT, UINT8, INT8 }, { FLOAT } }

/* The weights of a product whose activations have a zero point of 128. */
static Status *weights_of_bytes(const void *info, Tensor *weights) {
    Tensor point;
    TRY(constant(info, WEIGHTS, weights));
    TRY(constant(info, ZERO_POINT, &point));
    if (weights->rank != 2 || !weights->count || weights->sizes[0] > DEEPEST) return failed("edgeguard: weights of another shape");
    if (point.count != 1 || *(const uint8_t *)point.data != 128) return failed("edgeguard: a zero point other than 128");
    return NULL;
}

/* The inputs of a product by bytes; weights have no zero point, or one of 0. */
static Status *inputs_of_bytes(const void *context, int64_t depth, Tensor *input) {
    Tensor point;
    TRY(inputs_of(context, INPUTS, depth, input));
    TRY(optional_input_of(context, WEIGHTS_ZERO_POINT, &point));
    for (size_t i = 0; i < point.count; i++)
        if (((const int8_t *)point.data)[i]) return failed("edgeguard: weights with a zero point other than 0");
    return input[STEP].count == 1 ? NULL : failed("edgeguard: scales of another shape");
}
