/* The compiled half of sums.py: two pieces of a weight, each as it is stored, in one pass and without the interpreter lock.
 *
 * A run of columns is widened to float32 on the stack, where the sums find it in the first-level cache. Sums are float32 over a
 * run, in eight lanes, and double between runs.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../codec/_count.h"

enum { LANES = 8, RUN = 512, BYTES = 32 };
enum { INT8, BFLOAT16, FLOAT16, FLOAT32, KINDS };
static const int WIDTH[KINDS] = {1, 2, 2, 4};

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef signed char Bytes __attribute__((vector_size(BYTES)));
typedef int32_t Words __attribute__((vector_size(LANES * sizeof(int32_t))));

typedef struct {
    const void *data; /* [rows, columns] */
    const float *steps; /* [rows, groups] of integers, else NULL */
    long kind, groups;
} Side;

typedef struct {
    Side a, b;
    const float *column_scales, *row_scales; /* divisors of b, or NULL */
    long rows, columns;
} Pair;

typedef struct {
    double a, b, noise;
    float largest;
    long changed;
} Sums;

static inline __attribute__((always_inline)) float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Columns first to first + count of a row, which lie in one group, as float32. */
static inline __attribute__((always_inline)) void widen(const Side *side, long row, long columns, long first, long count, float *out) {
    const long at = row * columns + first;
    if (side->kind == INT8) {
        const signed char *q = (const signed char *)side->data + at;
        const float step = side->steps[row * side->groups + first / (columns / side->groups)];
        for (long i = 0; i < count; i++) out[i] = (float)q[i] * step;
    } else if (side->kind == BFLOAT16) {
        const uint16_t *half = (const uint16_t *)side->data + at;
        for (long i = 0; i < count; i++) out[i] = float_of((uint32_t)half[i] << 16);
    } else if (side->kind == FLOAT16) {
        const uint16_t *half = (const uint16_t *)side->data + at;
        for (long i = 0; i < count; i++) {
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

#define TOTAL(vector, lanes, sum) \
    for (int lane = 0; lane < (lanes); lane++) (sum) += (vector)[lane]

static inline __attribute__((always_inline)) void sum_run(const float *x, const float *y, long count, Sums *sums) {
    Vector a = {0}, b = {0}, noise = {0}, largest = {0};
    for (long i = 0; i < count; i += LANES) {
        Vector p, q;
        memcpy(&p, x + i, sizeof p);
        memcpy(&q, y + i, sizeof q);
        const Vector d = q - p, size = (Vector)((Words)d & 0x7fffffff);
        a += p * p;
        b += q * q;
        noise += d * d;
        const Words more = size > largest;
        largest = (Vector)((more & (Words)size) | (~more & (Words)largest));
    }
    TOTAL(a, LANES, sums->a);
    TOTAL(b, LANES, sums->b);
    TOTAL(noise, LANES, sums->noise);
    for (int i = 0; i < LANES; i++)
        if (largest[i] > sums->largest) sums->largest = largest[i];
}

static inline __attribute__((always_inline)) long count_changed(const char *one, const char *other, long count) {
    Bytes equal = {0}; /* at most RUN / BYTES in each, below 128 */
    long i = 0, same = 0;
    for (; i + BYTES <= count; i += BYTES) {
        Bytes p, q;
        memcpy(&p, one + i, sizeof p);
        memcpy(&q, other + i, sizeof q);
        equal -= p == q;
    }
    TOTAL(equal, BYTES, same);
    for (; i < count; i++) same += one[i] == other[i];
    return count - same;
}

#define SUM_PAIR                                                                                                           \
    float x[RUN], y[RUN];                                                                                                  \
    const long groups = p->a.groups > p->b.groups ? p->a.groups : p->b.groups, width = p->columns / groups;                \
    for (long row = 0; row < p->rows; row++)                                                                               \
        for (long first = 0; first < p->columns;) {                                                                        \
            const long left = width - first % width, count = left < RUN ? left : RUN;                                      \
            const long padded = (count + LANES - 1) / LANES * LANES;                                                       \
            widen(&p->a, row, p->columns, first, count, x);                                                                \
            widen(&p->b, row, p->columns, first, count, y);                                                                \
            if (p->column_scales)                                                                                          \
                for (long i = 0; i < count; i++) y[i] /= p->column_scales[first + i];                                      \
            if (p->row_scales)                                                                                             \
                for (long i = 0; i < count; i++) y[i] /= p->row_scales[row];                                               \
            for (long i = count; i < padded; i++) x[i] = y[i] = 0;                                                         \
            sum_run(x, y, padded, sums);                                                                                   \
            if (p->a.kind == p->b.kind) {                                                                                  \
                const long at = (row * p->columns + first) * WIDTH[p->a.kind];                                             \
                const char *one = (const char *)p->a.data + at, *other = (const char *)p->b.data + at;                     \
                sums->changed += p->a.kind == INT8 ? count_changed(one, other, count)                                      \
                                                   : memcmp(one, other, (size_t)count * WIDTH[p->a.kind]) != 0;            \
            }                                                                                                              \
            first += count;                                                                                                \
        }

static void sum_pair_plain(const Pair *p, Sums *sums) { SUM_PAIR }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void sum_pair_avx2(const Pair *p, Sums *sums) { SUM_PAIR }
#endif

static void sum_pair(const Pair *p, Sums *sums) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        sum_pair_avx2(p, sums);
        return;
    }
#endif
    sum_pair_plain(p, sums);
}

static int fits(const Py_buffer *buffer, const char *name, Py_ssize_t bytes, int needed) {
    if (buffer->buf == NULL ? !needed : buffer->len == bytes) return 1;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %zd are needed", name, buffer->buf == NULL ? (Py_ssize_t)0 : buffer->len, bytes);
    return 0;
}

static int is_side(const Py_buffer *data, const Py_buffer *steps, const Side *side, long rows, long columns) {
    if (side->kind < 0 || side->kind >= KINDS || side->groups < 1 || columns % side->groups) {
        PyErr_SetString(PyExc_ValueError, "no such kind, or groups that do not divide the columns");
        return 0;
    }
    return fits(data, "data", (Py_ssize_t)rows * columns * WIDTH[side->kind], 1) &&
           fits(steps, "steps", 4 * (Py_ssize_t)rows * side->groups, side->kind == INT8);
}

PyDoc_STRVAR(sum_pair_doc,
             "sum_pair(a, kind_a, steps_a, groups_a, b, kind_b, steps_b, groups_b, column_scales, row_scales, counts, rows, columns)\n\n"
             "Returns (a . a, b . b, |b - a|^2, max |b - a|, changed): changed integers, or runs of floats of one kind; b divided by\n"
             "the scales. Adds to counts, int64 [2, 256], how often each int8 value occurs. Kinds: 0 int8, 1 bfloat16, 2 float16,\n"
             "3 float32. One of groups_a and groups_b must be 1, or both equal.");

static PyObject *py_sum_pair(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer a, b, steps_a, steps_b, column_scales, row_scales, counts;
    Pair p;
    if (!PyArg_ParseTuple(args, "y*lz*ly*lz*lz*z*w*ll", &a, &p.a.kind, &steps_a, &p.a.groups, &b, &p.b.kind, &steps_b,
                          &p.b.groups, &column_scales, &row_scales, &counts, &p.rows, &p.columns))
        return NULL;
    PyObject *result = NULL;
    if (p.rows < 1 || p.columns < 1 || p.rows > UINT32_MAX / p.columns) {
        PyErr_SetString(PyExc_ValueError, "rows and columns must be positive, and fewer than 2^32 together");
        goto done;
    }
    if (!is_side(&a, &steps_a, &p.a, p.rows, p.columns) || !is_side(&b, &steps_b, &p.b, p.rows, p.columns) ||
        !fits(&column_scales, "column_scales", 4 * (Py_ssize_t)p.columns, 0) ||
        !fits(&row_scales, "row_scales", 4 * (Py_ssize_t)p.rows, 0) ||
        !fits(&counts, "counts", 2 * BYTE_VALUES * (Py_ssize_t)sizeof(int64_t), 1))
        goto done;
    if (p.a.groups != p.b.groups && p.a.groups != 1 && p.b.groups != 1) {
        PyErr_SetString(PyExc_ValueError, "the groups of both sides differ");
        goto done;
    }
    p.a.data = a.buf, p.a.steps = steps_a.buf, p.b.data = b.buf, p.b.steps = steps_b.buf;
    p.column_scales = column_scales.buf, p.row_scales = row_scales.buf;
    Sums sums = {0};
    Py_BEGIN_ALLOW_THREADS;
    sum_pair(&p, &sums);
    /* From two's complement order to numeric order. */
    if (p.a.kind == INT8) count_bytes(p.a.data, p.rows * p.columns, counts.buf, 0x80);
    if (p.b.kind == INT8) count_bytes(p.b.data, p.rows * p.columns, (int64_t *)counts.buf + BYTE_VALUES, 0x80);
    Py_END_ALLOW_THREADS;
    result = Py_BuildValue("dddfl", sums.a, sums.b, sums.noise, sums.largest, sums.changed);
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

static PyMethodDef methods[] = {{"sum_pair", py_sum_pair, METH_VARARGS, sum_pair_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_sums", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__sums(void) { return PyModule_Create(&module); }
