/* The interface of ONNX Runtime for operator libraries (onnxruntime_c_api.h), as much of it as edgeguard's own kernels use. */
#include <stddef.h>
#include <stdint.h>

enum { API_VERSION = 17 };
enum { FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7 }; /* ONNXTensorElementDataType */
enum { FAIL = 1 };                       /* OrtErrorCode */
enum { /* places in OrtApi, which functions keep for ever */
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,       /* CreateCustomOpDomain */
    ADD_OPERATOR = 27,        /* CustomOpDomain_Add */
    ADD_DOMAIN = 28,          /* AddCustomOpDomain */
    DATA = 51,                /* GetTensorMutableData */
    RANK = 61,                /* GetDimensionsCount */
    SIZES = 62,               /* GetDimensions */
    COUNT = 64,               /* GetTensorShapeElementCount */
    TYPE_AND_SHAPE = 65,      /* GetTensorTypeAndShape */
    FLOAT_ATTRIBUTE = 85,     /* KernelInfoGetAttribute_float */
    INT_ATTRIBUTE = 86,       /* KernelInfoGetAttribute_int64 */
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

enum { MOST_SIZES = 4 };
typedef struct { int64_t sizes[MOST_SIZES]; size_t rank, count; void *data; } Tensor;

static Status *tensor(const void *value, Tensor *out) {
    void *shape;
    TRY(CALL(TYPE_AND_SHAPE, Status *, (const void *, void **), value, &shape));
    Status *status = CALL(COUNT, Status *, (const void *, size_t *), shape, &out->count);
    if (!status) status = CALL(RANK, Status *, (const void *, size_t *), shape, &out->rank);
    if (!status && out->rank > MOST_SIZES) status = failed("edgeguard: a tensor with more than four sizes");
    if (!status) status = CALL(SIZES, Status *, (const void *, int64_t *, size_t), shape, out->sizes, out->rank);
    CALL(RELEASE_SHAPE, void, (void *), shape);
    return status ? status : CALL(DATA, Status *, (const void *, void **), value, &out->data);
}

static Status *input_of(const void *context, size_t place, Tensor *out) {
    const void *value;
    TRY(CALL(INPUT, Status *, (const void *, size_t, const void **), context, place, &value));
    return tensor(value, out);
}

/* One that may be missing: its data are NULL then. */
static Status *optional_input_of(const void *context, size_t place, Tensor *out) {
    const void *value = NULL;
    *out = (Tensor){ .data = NULL };
    TRY(CALL(INPUT, Status *, (const void *, size_t, const void **), context, place, &value));
    return value ? tensor(value, out) : NULL;
}

/* Room for a result. */
static Status *output(void *context, size_t place, const int64_t *sizes, size_t rank, void **out) {
    void *value;
    TRY(CALL(OUTPUT, Status *, (void *, size_t, const int64_t *, size_t, void **), context, place, sizes, rank, &value));
    return CALL(DATA, Status *, (const void *, void **), value, out);
}

/* Calls `work(what, 0)` to `work(what, count - 1)` on the session's threads. */
static Status *in_parallel(const void *context, void (*work)(void *, size_t), int64_t count, void *what) {
    return CALL(PARALLEL_FOR, Status *, (const void *, void (*)(void *, size_t), size_t, size_t, void *),
                context, work, (size_t)count, 0, what);
}

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- operators on the CPU ---- */

typedef struct { /* OrtCustomOp */
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
} Operator;

enum { MOST_INPUTS = 17, MOST_OUTPUTS = 5 };
typedef struct {
    Operator operator;
    const char *name;
    size_t inputs, outputs, optional; /* of the inputs how many of the last may be missing */
    int input_types[MOST_INPUTS], output_types[MOST_OUTPUTS];
} Described;

static const char *name_of(const void *operator) { return ((const Described *)operator)->name; }
static const char *no_provider(const void *operator) { return (void)operator, NULL; /* the CPU */ }
static size_t inputs_of_it(const void *operator) { return ((const Described *)operator)->inputs; }
static size_t outputs_of_it(const void *operator) { return ((const Described *)operator)->outputs; }
static int input_type(const void *operator, size_t i) { return ((const Described *)operator)->input_types[i]; }
static int output_type(const void *operator, size_t i) { return ((const Described *)operator)->output_types[i]; }
static int input_kind(const void *operator, size_t i) { /* OrtCustomOpInputOutputCharacteristic */
    return i + ((const Described *)operator)->optional >= ((const Described *)operator)->inputs;
}
static int zero(const void *operator, size_t i) { return (void)operator, (void)i, 0; }
static int one(const void *operator) { return (void)operator, 1; }
static int most(const void *operator) { return (void)operator, INT32_MAX; }
#define OPERATOR(create, compute, destroy) \
    { API_VERSION, NULL, name_of, no_provider, input_type, inputs_of_it, output_type, outputs_of_it, NULL, destroy, \
      input_kind, zero, zero /* outputs are required, and all is in ordinary memory */, { one, one, one, one } /* not asked for */, \
      create, compute, NULL, one, most }

/* For a session that a library is registered with. */
static Status *add_operators(void *options, const Base *base, const char *name, const Described *operators, size_t count) {
    const Function *offered = base->api(API_VERSION);
    void *domain; /* never freed: sessions use it, and nothing tells when the last one ends */
    api = offered ? offered : base->api(1);
    if (!offered) return failed("edgeguard: an ONNX Runtime that is too old");
    TRY(CALL(CREATE_DOMAIN, Status *, (const char *, void **), name, &domain));
    for (size_t i = 0; i < count; i++)
        TRY(CALL(ADD_OPERATOR, Status *, (void *, const void *), domain, &operators[i].operator));
    return CALL(ADD_DOMAIN, Status *, (void *, void *), options, domain);
}
