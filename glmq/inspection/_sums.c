/* The compiled half of sums.py: two pieces of a weight, each as it is stored, in one pass and without the interpreter lock.
 *
 * A run of columns is widened to float32 on the stack, where the sums find it in the first-level cache. Sums are float32 over a
 * run, in eight lanes (of one or two vectors), and double between runs.
 */
#include "../_native.h"

#include "../codec/_count.h"

enum { LANES = 8, WIDTH = REGISTER_FLOATS, PARTS = LANES / WIDTH, RUN = 512, BYTES = 4 * WIDTH };
enum { INT8, BFLOAT16, FLOAT16, FLOAT32, KINDS };
static const int64_t KIND_BYTES[KINDS] = {1, 2, 2, 4};

typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef signed char Bytes __attribute__((vector_size(BYTES)));
typedef int32_t Words __attribute__((vector_size(WIDTH * sizeof(int32_t))));

typedef struct {
    const void *data; /* [rows, columns] */
    const float *steps; /* [rows, groups] of integers, else NULL */
    int64_t kind, groups;
} Side;

typedef struct {
    Side a, b;
    const float *column_scales, *row_scales; /* divisors of b, or NULL */
    int64_t rows, columns;
} Pair;

typedef struct {
    double a, b, noise;
    float largest;
    int64_t changed;
} Sums;

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Columns first to first + count of a row, which lie in one group, as float32. */
INLINE void widen(const Side *side, int64_t row, int64_t columns, int64_t first, int64_t count, float *out) {
    const int64_t at = row * columns + first;
    if (side->kind == INT8) {
        const signed char *q = (const signed char *)side->data + at;
        const float step = side->steps[row * side->groups + first / (columns / side->groups)];
        for (int64_t i = 0; i < count; i++) out[i] = (float)q[i] * step;
    } else if (side->kind == BFLOAT16) {
        const uint16_t *half = (const uint16_t *)side->data + at;
        for (int64_t i = 0; i < count; i++) out[i] = float_of((uint32_t)half[i] << 16);
    } else if (side->kind == FLOAT16) {
        const uint16_t *half = (const uint16_t *)side->data + at;
        for (int64_t i = 0; i < count; i++) {
            /* As a float32 the shifted bits are 2^112 too small, subnormals too; infinity and NaN lack three exponent bits. */
            const float value = float_of((uint32_t)(half[i] & 0x7fff) << 13) * 0x1p112f;
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            bits |= (uint32_t)(half[i] & 0x8000) << 16 | ((half[i] & 0x7fff) >= 0x7c00 ? 0x7f800000u : 0);
            out[i] = float_of(bits);
        }
    } else {
        memcpy(out, (const float *)side->data + at, (size_t)count * sizeof(float));
    }
}

INLINE void add_lanes(double *sum, const Vector *values) {
    for (int lane = 0; lane < LANES; lane++) *sum += values[lane / WIDTH][lane % WIDTH];
}

/* Adds a run, zeros behind it up to whole vectors. */
INLINE void sum_run(const float *x, const float *y, int64_t count, Sums *sums) {
    Vector a[PARTS] = {{0}}, b[PARTS] = {{0}}, noise[PARTS] = {{0}}, largest[PARTS] = {{0}};
    for (int64_t i = 0; i < count; i += LANES)
        for (int part = 0; part < PARTS; part++) {
            Vector p, q;
            memcpy(&p, x + i + part * WIDTH, sizeof p);
            memcpy(&q, y + i + part * WIDTH, sizeof q);
            const Vector d = q - p, size = (Vector)((Words)d & 0x7fffffff);
            a[part] += p * p;
            b[part] += q * q;
            noise[part] += d * d;
            const Words more = size > largest[part];
            largest[part] = (Vector)((more & (Words)size) | (~more & (Words)largest[part]));
        }
    add_lanes(&sums->a, a);
    add_lanes(&sums->b, b);
    add_lanes(&sums->noise, noise);
    for (int lane = 0; lane < LANES; lane++)
        if (largest[lane / WIDTH][lane % WIDTH] > sums->largest) sums->largest = largest[lane / WIDTH][lane % WIDTH];
}

INLINE int64_t count_changed(const char *one, const char *other, int64_t count) {
    Bytes equal = {0}; /* at most RUN / BYTES in each, below 128 */
    int64_t i = 0, same = 0;
    for (; i + BYTES <= count; i += BYTES) {
        Bytes p, q;
        memcpy(&p, one + i, sizeof p);
        memcpy(&q, other + i, sizeof q);
        equal -= p == q;
    }
    for (int lane = 0; lane < BYTES; lane++) same += equal[lane];
    for (; i < count; i++) same += one[i] == other[i];
    return count - same;
}

INLINE void sum_pair(const Pair *p, Sums *sums) {
    float x[RUN], y[RUN];
    const int64_t groups = p->a.groups > p->b.groups ? p->a.groups : p->b.groups, width = p->columns / groups;
    for (int64_t row = 0; row < p->rows; row++)
        for (int64_t first = 0; first < p->columns;) {
            const int64_t left = width - first % width, count = left < RUN ? left : RUN;
            const int64_t padded = (count + LANES - 1) / LANES * LANES;
            widen(&p->a, row, p->columns, first, count, x);
            widen(&p->b, row, p->columns, first, count, y);
            if (p->column_scales)
                for (int64_t i = 0; i < count; i++) y[i] /= p->column_scales[first + i];
            if (p->row_scales)
                for (int64_t i = 0; i < count; i++) y[i] /= p->row_scales[row];
            for (int64_t i = count; i < padded; i++) x[i] = y[i] = 0;
            sum_run(x, y, padded, sums);
            if (p->a.kind == p->b.kind) {
                const int64_t width_bytes = KIND_BYTES[p->a.kind], at = (row * p->columns + first) * width_bytes;
                const char *one = (const char *)p->a.data + at, *other = (const char *)p->b.data + at;
                sums->changed += p->a.kind == INT8 ? count_changed(one, other, count)
                                                   : memcmp(one, other, (size_t)(count * width_bytes)) != 0;
            }
            first += count;
        }
}

static void sum_pair_baseline(const Pair *p, Sums *sums) { sum_pair(p, sums); }

#if GLMQ_X86
__attribute__((target("avx2,fma"))) static void sum_pair_avx2(const Pair *p, Sums *sums) { sum_pair(p, sums); }

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

typedef struct {
    KernelId id;
    void (*sum_pair)(const Pair *, Sums *);
} Kernel;

static const Kernel kernels[] = {
#if GLMQ_X86
    {{"avx2-fma", has_avx2}, sum_pair_avx2},
#endif
#if GLMQ_NEON
    {{"neon-fma", runs_anywhere}, sum_pair_baseline},
#elif defined(__FP_FAST_FMAF)
    {{"baseline-fma", runs_anywhere}, sum_pair_baseline},
#else
    {{"baseline", runs_anywhere}, sum_pair_baseline},
#endif
};

PyDoc_STRVAR(list_kernels_doc, "list_kernels() -> tuple of the kernels that run on this machine, fastest first");

static PyObject *py_list_kernels(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return LIST_KERNELS(kernels);
}

static int is_side(const Py_buffer *data, const Py_buffer *steps, const Side *side, int64_t rows, int64_t columns) {
    if (side->kind < 0 || side->kind >= KINDS || side->groups < 1 || columns % side->groups) {
        PyErr_SetString(PyExc_ValueError, "no such kind, or groups that do not divide the columns");
        return 0;
    }
    const int64_t width = KIND_BYTES[side->kind];
    if (!buffer_fits(data, "data", product(product(rows, columns), width), (size_t)width)) return 0;
    return (!steps->buf && side->kind != INT8) || buffer_fits(steps, "steps", product(product(rows, side->groups), 4), 4);
}

/* Whether scales that may be left out are there in that number. */
static int are_scales(const Py_buffer *scales, const char *name, int64_t count) {
    return !scales->buf || buffer_fits(scales, name, product(count, 4), 4);
}

PyDoc_STRVAR(sum_pair_doc,
             "sum_pair(kernel, a, kind_a, steps_a, groups_a, b, kind_b, steps_b, groups_b, column_scales, row_scales, counts,\n"
             "         rows, columns)\n\n"
             "Returns (a . a, b . b, |b - a|^2, max |b - a|, changed): changed integers, or runs of floats of one kind; b divided by\n"
             "the scales. Adds to counts, int64 [2, 256], how often each int8 value occurs. Kinds: 0 int8, 1 bfloat16, 2 float16,\n"
             "3 float32. One of groups_a and groups_b must be 1, or both equal.");

static PyObject *py_sum_pair(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer a, b, steps_a, steps_b, column_scales, row_scales, counts;
    long long kind_a, groups_a, kind_b, groups_b, rows, columns;
    if (!PyArg_ParseTuple(args, "sy*Lz*Ly*Lz*Lz*z*w*LL", &name, &a, &kind_a, &steps_a, &groups_a, &b, &kind_b, &steps_b,
                          &groups_b, &column_scales, &row_scales, &counts, &rows, &columns))
        return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = FIND_KERNEL(kernels, name);
    if (!kernel) goto done;
    const Pair p = {{a.buf, steps_a.buf, kind_a, groups_a}, {b.buf, steps_b.buf, kind_b, groups_b}, column_scales.buf,
                    row_scales.buf, rows, columns};
    if (rows < 1 || columns < 1 || rows > UINT32_MAX / columns) {
        PyErr_SetString(PyExc_ValueError, "rows and columns must be positive, and fewer than 2^32 together");
        goto done;
    }
    if (!is_side(&a, &steps_a, &p.a, rows, columns) || !is_side(&b, &steps_b, &p.b, rows, columns) ||
        !are_scales(&column_scales, "column_scales", columns) || !are_scales(&row_scales, "row_scales", rows) ||
        !buffer_fits(&counts, "counts", 2 * BYTE_VALUES * (int64_t)sizeof(int64_t), sizeof(int64_t)))
        goto done;
    if (groups_a != groups_b && groups_a != 1 && groups_b != 1) {
        PyErr_SetString(PyExc_ValueError, "the groups of both sides differ");
        goto done;
    }
    Sums sums = {0};
    Py_BEGIN_ALLOW_THREADS
    kernel->sum_pair(&p, &sums);
    /* From two's complement order to numeric order. */
    if (kind_a == INT8) count_bytes(a.buf, rows * columns, counts.buf, 0x80);
    if (kind_b == INT8) count_bytes(b.buf, rows * columns, (int64_t *)counts.buf + BYTE_VALUES, 0x80);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("dddfL", sums.a, sums.b, sums.noise, sums.largest, (long long)sums.changed);
done:
    PyBuffer_Release(&a);
    PyBuffer_Release(&b);
    PyBuffer_Release(&steps_a);
    PyBuffer_Release(&steps_b);
    PyBuffer_Release(&column_scales);
    PyBuffer_Release(&row_scales);
    PyBuffer_Release(&counts);
    return result;
}

static PyMethodDef methods[] = {
    {"list_kernels", py_list_kernels, METH_NOARGS, list_kernels_doc},
    {"sum_pair", py_sum_pair, METH_VARARGS, sum_pair_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_sums", .m_doc = "The compiled half of sums.py.", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__sums(void) { return PyModule_Create(&module); }
