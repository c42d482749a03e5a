/* The compiled half of gptq.py: rounds one block of columns for all rows, without the interpreter lock.
 *
 * Matrices are [columns, rows] with the rows contiguous, so that a vector register holds one column of many rows. A strip of
 * STRIP rows is finished before the next: the errors of its columns stay in a small buffer, and each column gathers what all
 * columns before it ask for in registers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

enum { LANES = 8, VECTORS = 8, STRIP = LANES * VECTORS };

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef signed char Bytes __attribute__((vector_size(LANES)));
typedef int Words __attribute__((vector_size(LANES * sizeof(int))));

/* Pointers to float32 [columns, rows] but for feedback [columns, columns], where row k holds what each column asks of column k. */
typedef struct {
    const float *weight, *target, *feedback, *steps;
    const int *group; /* row of `steps` that each column uses */
    float *error;
    signed char *q;
    long columns, rows;
    float qmin, qmax;
} Block;

/* Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, half to even. */
static const float ROUNDER = 1.5f * 8388608.0f;

/* `yes` where the mask is set, else `no`. */
#define CHOOSE(mask, yes, no) ((Vector)(((mask) & (Words)(yes)) | (~(mask) & (Words)(no))))

#define ROUND_STRIP                                                                                                         \
    const Vector low = b->qmin - (Vector){0}, high = b->qmax - (Vector){0};                                                 \
    for (long column = 0; column < b->columns; column++) {                                                                  \
        Vector sum[VECTORS];                                                                                                \
        memcpy(sum, b->target + column * b->rows + first, sizeof sum);                                                      \
        const float *factor = b->feedback + column * b->columns;                                                            \
        for (long i = 0; i < column; i++)                                                                                   \
            for (int v = 0; v < VECTORS; v++) sum[v] += factor[i] * errors[i * VECTORS + v];                                \
        const float *step_at = b->steps + b->group[column] * b->rows + first;                                               \
        const float *weight_at = b->weight + column * b->rows + first;                                                      \
        for (int v = 0; v < VECTORS; v++) {                                                                                 \
            Vector step, weight, x;                                                                                         \
            memcpy(&step, step_at + v * LANES, sizeof step);                                                                \
            memcpy(&weight, weight_at + v * LANES, sizeof weight);                                                          \
            x = sum[v] / step;                                                                                              \
            x = CHOOSE(x < low, low, x);                                                                                    \
            x = CHOOSE(x > high, high, x);                                                                                  \
            x = (x + ROUNDER) - ROUNDER;                                                                                    \
            errors[column * VECTORS + v] = weight - x * step;                                                               \
            Bytes q = __builtin_convertvector(__builtin_convertvector(x, Words), Bytes);                                    \
            memcpy(b->q + column * b->rows + first + v * LANES, &q, sizeof q);                                              \
        }                                                                                                                   \
        memcpy(b->error + column * b->rows + first, errors + column * VECTORS, STRIP * sizeof(float));                      \
    }

static void round_strip_plain(const Block *b, long first, Vector *errors) { ROUND_STRIP }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void round_strip_avx2(const Block *b, long first, Vector *errors) { ROUND_STRIP }
#endif

static int has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static void round_strips(const Block *b, long first, long end, Vector *errors) {
    for (; first < end; first += STRIP) {
#if defined(__x86_64__)
        if (has_avx2()) {
            round_strip_avx2(b, first, errors);
            continue;
        }
#endif
        round_strip_plain(b, first, errors);
    }
}

static int fits(const Py_buffer *buffer, const char *name, Py_ssize_t bytes) {
    if (buffer->len == bytes) return 1;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %zd are needed", name, buffer->len, bytes);
    return 0;
}

PyDoc_STRVAR(round_block_doc,
             "round_block(weight, target, feedback, steps, group, error, q, columns, rows, qmin, qmax, first, end)\n\n"
             "Round rows first to end of a block. float32 [columns, rows] weight, target and error; feedback [columns, columns],\n"
             "row k what each column asks of column k; steps [G, rows]; int32 [columns] group; int8 [columns, rows] q. rows, first and end are multiples of 64.");

static PyObject *py_round_block(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer weight, target, feedback, steps, group, error, q;
    long columns, rows, first, end;
    float qmin, qmax;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*w*w*llffll", &weight, &target, &feedback, &steps, &group, &error, &q, &columns, &rows,
                          &qmin, &qmax, &first, &end))
        return NULL;
    PyObject *result = NULL;
    Vector *errors = NULL;
    const Py_ssize_t block = (Py_ssize_t)columns * rows;
    if (columns < 1 || rows < 1 || rows % STRIP || first % STRIP || end % STRIP || first < 0 || end > rows) {
        PyErr_SetString(PyExc_ValueError, "rows, first and end must be multiples of 64, within the block");
        goto done;
    }
    if (!fits(&weight, "weight", 4 * block) || !fits(&target, "target", 4 * block) || !fits(&error, "error", 4 * block) ||
        !fits(&q, "q", block) || !fits(&feedback, "feedback", 4 * (Py_ssize_t)columns * columns) ||
        !fits(&group, "group", 4 * (Py_ssize_t)columns))
        goto done;
    const int *groups = group.buf;
    for (long i = 0; i < columns; i++)
        if (groups[i] < 0 || groups[i] >= steps.len / (4 * rows)) {
            PyErr_SetString(PyExc_ValueError, "a group without a step");
            goto done;
        }
    /* aligned_alloc wants a size that is a multiple of the alignment, which columns * STRIP floats are */
    errors = aligned_alloc(sizeof(Vector), (size_t)columns * STRIP * sizeof(float));
    if (!errors) {
        PyErr_NoMemory();
        goto done;
    }
    const Block b = {weight.buf, target.buf, feedback.buf, steps.buf, groups, error.buf, q.buf, columns, rows, qmin, qmax};
    Py_BEGIN_ALLOW_THREADS;
    round_strips(&b, first, end, errors);
    Py_END_ALLOW_THREADS;
    result = Py_NewRef(Py_None);
done:
    free(errors);
    PyBuffer_Release(&weight);
    PyBuffer_Release(&target);
    PyBuffer_Release(&feedback);
    PyBuffer_Release(&steps);
    PyBuffer_Release(&group);
    PyBuffer_Release(&error);
    PyBuffer_Release(&q);
    return result;
}

static PyMethodDef methods[] = {{"round_block", py_round_block, METH_VARARGS, round_block_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_rounding", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__rounding(void) { return PyModule_Create(&module); }
