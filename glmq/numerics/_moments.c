/* The compiled half of moments.py: counts every channel's values into bins and sums them, without the interpreter lock.
 *
 * All tokens go over some channels at a time, whose counters and sums then stay in the cache; few enough for that, and enough
 * to make up for the wait at each token, whose row lies far from the one before. Counts are exact, and so is the square of a
 * float32 as a double; each channel's sums add its tokens one after the other. So all kernels give the same bits.
 */
#include "../_native.h"

enum {
    LANES = REGISTER_FLOATS,
    BINS = 256,
    CHANNELS = 128,
    STRIDE = BINS + 32, /* of a channel's own counters: a power of two would map the middle bins of all channels to a few cache lines */
    TOKENS = 32768,     /* that own counters take before they could overflow */
    AHEAD = 2,          /* tokens */
    CACHE_LINE = 16     /* floats */
};

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Words __attribute__((vector_size(LANES * sizeof(int32_t))));

typedef struct {
    const float *x;      /* [tokens, channels] */
    const float *scales; /* [channels]: bins in a unit */
    int32_t *counts;     /* [channels, BINS] */
    double *sums;        /* [2, channels]: of x and of x^2 */
    int64_t tokens, channels;
} Values;

/* Bins of LANES values: floor(x * scale) + BINS / 2, the first or the last one beyond them, the first for NaN. A negative product so
 * small that it became zero belongs below zero. */
INLINE void find_bins(const float *x, const float *scales, int32_t *bins) {
    const Vector low = (float)(-BINS / 2) - (Vector){0}, high = (float)(BINS / 2 - 1) - (Vector){0};
    Vector values, scale;
    memcpy(&values, x, sizeof values);
    memcpy(&scale, scales, sizeof scale);
    Vector product = values * scale;
    const Words within = product >= low, beyond = product > high;
    product = (Vector)((within & (Words)product) | (~within & (Words)low));
    product = (Vector)((beyond & (Words)high) | (~beyond & (Words)product));
    const Words towards_zero = __builtin_convertvector(product, Words);
    const Words below = product < __builtin_convertvector(towards_zero, Vector); /* true is -1 */
    const Words bin = towards_zero + below + ((values < 0) & (product == 0)) + BINS / 2;
    memcpy(bins, &bin, sizeof bin);
}

/* Tokens begin to end of channels first to first + count. */
INLINE void observe_tokens(const Values *v, int64_t first, int64_t count, int64_t begin, int64_t end, double *sum, double *square) {
    uint16_t own[CHANNELS * STRIDE] = {0};
    int32_t bins[CHANNELS];
    float tail[LANES] = {0}, tail_scales[LANES] = {0};
    const int64_t whole = count / LANES * LANES, rest = count - whole;
    memcpy(tail_scales, v->scales + first + whole, (size_t)rest * sizeof(float));
    for (int64_t token = begin; token < end; token++) {
        const float *x = v->x + token * v->channels + first;
        if (token + AHEAD < end)
            for (int64_t i = 0; i < count; i += CACHE_LINE) __builtin_prefetch(x + AHEAD * v->channels + i);
        for (int64_t i = 0; i < whole; i += LANES) find_bins(x + i, v->scales + first + i, bins + i);
        if (rest) {
            memcpy(tail, x + whole, (size_t)rest * sizeof(float));
            find_bins(tail, tail_scales, bins + whole);
        }
        for (int64_t i = 0; i < count; i++) {
            const double value = x[i];
            sum[i] += value;
            square[i] += value * value;
        }
        for (int64_t i = 0; i < count; i++) own[i * STRIDE + bins[i]]++;
    }
    int32_t *counts = v->counts + first * BINS;
    for (int64_t i = 0; i < count; i++)
        for (int64_t bin = 0; bin < BINS; bin++) counts[i * BINS + bin] += own[i * STRIDE + bin];
}

/* Channels first to first + count. */
INLINE void observe_few(const Values *v, int64_t first, int64_t count) {
    double sum[CHANNELS] = {0}, square[CHANNELS] = {0};
    for (int64_t begin = 0; begin < v->tokens; begin += TOKENS)
        observe_tokens(v, first, count, begin, v->tokens - begin < TOKENS ? v->tokens : begin + TOKENS, sum, square);
    memcpy(v->sums + first, sum, (size_t)count * sizeof(double));
    memcpy(v->sums + v->channels + first, square, (size_t)count * sizeof(double));
}

INLINE void observe_channels(const Values *v, int64_t first, int64_t end) {
    for (; first < end; first += CHANNELS) observe_few(v, first, end - first < CHANNELS ? end - first : CHANNELS);
}

static void observe_baseline(const Values *v, int64_t first, int64_t end) { observe_channels(v, first, end); }

#if GLMQ_X86
__attribute__((target("avx2"))) static void observe_avx2(const Values *v, int64_t first, int64_t end) { observe_channels(v, first, end); }

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#endif

typedef struct {
    KernelId id;
    void (*observe)(const Values *, int64_t, int64_t);
} Kernel;

static const Kernel kernels[] = {
#if GLMQ_X86
    {{"avx2", has_avx2}, observe_avx2},
#endif
    {{GLMQ_NEON ? "neon" : "baseline", runs_anywhere}, observe_baseline},
};

PyDoc_STRVAR(list_kernels_doc, "list_kernels() -> tuple of the kernels that run on this machine, fastest first");

static PyObject *py_list_kernels(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return LIST_KERNELS(kernels);
}

PyDoc_STRVAR(observe_doc,
             "observe(kernel, x, scales, counts, sums, tokens, channels, first, end)\n\n"
             "For channels first to end of float32 x [tokens, channels]: add to int32 counts [channels, 256] how many values lie in\n"
             "bin floor(x * scales) + 128, float32 scales [channels], and set float64 sums [2, channels] to those of x and of x^2.");

static PyObject *py_observe(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer x, scales, counts, sums;
    long long tokens, channels, first, end;
    if (!PyArg_ParseTuple(args, "sy*y*w*w*LLLL", &name, &x, &scales, &counts, &sums, &tokens, &channels, &first, &end)) return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = FIND_KERNEL(kernels, name);
    if (!kernel) goto done;
    if (tokens < 0 || channels < 1 || first < 0 || end > channels) {
        PyErr_SetString(PyExc_ValueError, "first and end must lie within the channels");
        goto done;
    }
    if (!buffer_fits(&x, "x", product(product(tokens, channels), 4), 4) ||
        !buffer_fits(&scales, "scales", product(channels, 4), 4) ||
        !buffer_fits(&counts, "counts", product(channels, BINS * 4), 4) ||
        !buffer_fits(&sums, "sums", product(channels, 16), 8))
        goto done;
    const Values v = {x.buf, scales.buf, counts.buf, sums.buf, tokens, channels};
    Py_BEGIN_ALLOW_THREADS
    kernel->observe(&v, first, end);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&x);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&counts);
    PyBuffer_Release(&sums);
    return result;
}

static PyMethodDef methods[] = {
    {"list_kernels", py_list_kernels, METH_NOARGS, list_kernels_doc},
    {"observe", py_observe, METH_VARARGS, observe_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_moments", .m_doc = "The compiled half of moments.py.", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__moments(void) { return PyModule_Create(&module); }
