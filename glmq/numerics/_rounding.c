/* The compiled half of gptq.py: rounds one block of columns for all rows, and reorders columns, without the interpreter lock.
 *
 * Matrices are [columns, rows] with the rows contiguous, so that a vector register holds one column of many rows. A strip of
 * STRIP rows is finished before the next: the errors of its columns stay in a buffer that the nearest cache holds, and COLUMNS at
 * a time gather what all columns before them ask for in registers. Where a kernel fuses multiplication and addition its sums are rounded once instead of
 * twice, so kernels may differ in integers that are near a tie.
 */
#include "../_native.h"

enum { LANES = REGISTER_FLOATS, STRIP = 32, VECTORS = STRIP / LANES, COLUMNS = 3, CACHE_LINE = 64 };

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef signed char Bytes __attribute__((vector_size(LANES)));
typedef int32_t Words __attribute__((vector_size(LANES * sizeof(int32_t))));

typedef struct {
    const float *weight, *target; /* [columns, rows] */
    const float *feedback;        /* [columns, columns]: row k holds what each column asks of column k */
    const float *steps;           /* [groups, rows] */
    const int32_t *group;         /* [columns]: row of `steps` that each column uses */
    float *error;                 /* [columns, rows] */
    int8_t *q;                    /* [columns, rows] */
    int64_t columns, rows;
    float qmin, qmax;
} Block;

/* Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, half to even. */
static const float ROUNDER = 1.5f * 8388608.0f;

/* The smaller (sign 1) or the larger (sign -1) of `x` and `limit`, lane by lane; vectors by address, so that no call passes one
 * in a register that the least processor lacks. */
INLINE void limit_to(Vector *x, const Vector *limit, const int sign) {
    const Words beyond = sign > 0 ? *x > *limit : *x < *limit;
    *x = (Vector)((beyond & (Words)*limit) | (~beyond & (Words)*x));
}

/* Columns column to column + count of a strip: each gathers what all columns before it ask for in registers, those of the other
 * columns here at last. `errors` has room for [columns, STRIP]. */
INLINE void round_columns(const Block *b, int64_t first, Vector *errors, int64_t column, const int count) {
    const Vector low = b->qmin - (Vector){0}, high = b->qmax - (Vector){0};
    Vector sum[COLUMNS][VECTORS];
    const float *factor[COLUMNS];
    for (int c = 0; c < count; c++) {
        memcpy(sum[c], b->target + (column + c) * b->rows + first, sizeof sum[c]);
        factor[c] = b->feedback + (column + c) * b->columns;
    }
    for (int64_t i = 0; i < column; i++)
        for (int c = 0; c < count; c++)
            for (int v = 0; v < VECTORS; v++) sum[c][v] += factor[c][i] * errors[i * VECTORS + v];
    for (int c = 0; c < count; c++) {
        const int64_t at = column + c, place = at * b->rows + first;
        for (int64_t i = column; i < at; i++)
            for (int v = 0; v < VECTORS; v++) sum[c][v] += factor[c][i] * errors[i * VECTORS + v];
        const float *step_at = b->steps + b->group[at] * b->rows + first, *weight_at = b->weight + place;
        for (int v = 0; v < VECTORS; v++) {
            Vector step, weight, x;
            memcpy(&step, step_at + v * LANES, sizeof step);
            memcpy(&weight, weight_at + v * LANES, sizeof weight);
            x = sum[c][v] / step;
            limit_to(&x, &low, -1);
            limit_to(&x, &high, 1);
            x = (x + ROUNDER) - ROUNDER;
            errors[at * VECTORS + v] = weight - x * step;
            Bytes q = __builtin_convertvector(__builtin_convertvector(x, Words), Bytes);
            memcpy(b->q + place + v * LANES, &q, sizeof q);
        }
        memcpy(b->error + place, errors + at * VECTORS, STRIP * sizeof(float));
    }
}

/* Rows first to first + STRIP of a block. */
INLINE void round_strip(const Block *b, int64_t first, Vector *errors) {
    int64_t column = 0;
    for (; column + COLUMNS <= b->columns; column += COLUMNS) round_columns(b, first, errors, column, COLUMNS);
    for (; column < b->columns; column++) round_columns(b, first, errors, column, 1);
}

static void round_strip_baseline(const Block *b, int64_t first, Vector *errors) { round_strip(b, first, errors); }

#if GLMQ_X86
__attribute__((target("avx2,fma"))) static void round_strip_avx2(const Block *b, int64_t first, Vector *errors) {
    round_strip(b, first, errors);
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

typedef struct {
    KernelId id;
    void (*round_strip)(const Block *, int64_t, Vector *);
} Kernel;

static const Kernel kernels[] = {
#if GLMQ_X86
    {{"avx2-fma", has_avx2}, round_strip_avx2},
#endif
#if GLMQ_NEON
    {{"neon-fma", runs_anywhere}, round_strip_baseline},
#elif defined(__FP_FAST_FMAF)
    {{"baseline-fma", runs_anywhere}, round_strip_baseline},
#else
    {{"baseline", runs_anywhere}, round_strip_baseline},
#endif
};

PyDoc_STRVAR(list_kernels_doc, "list_kernels() -> tuple of the kernels that run on this machine, fastest first");

static PyObject *py_list_kernels(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return LIST_KERNELS(kernels);
}

PyDoc_STRVAR(round_block_doc,
             "round_block(kernel, weight, target, feedback, steps, group, error, q, columns, rows, qmin, qmax)\n\n"
             "Round the rows of a block of columns. float32 [columns, rows] weight, target and error; feedback [columns, columns],\n"
             "row k what each column asks of column k; steps [groups, rows]; int32 [columns] group; int8 [columns, rows] q.\n"
             "rows is a multiple of 32.");

static PyObject *py_round_block(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer weight, target, feedback, steps, group, error, q;
    long long columns, rows;
    float qmin, qmax;
    if (!PyArg_ParseTuple(args, "sy*y*y*y*y*w*w*LLff", &name, &weight, &target, &feedback, &steps, &group, &error, &q,
                          &columns, &rows, &qmin, &qmax))
        return NULL;
    PyObject *result = NULL;
    Vector *errors = NULL;
    const Kernel *kernel = FIND_KERNEL(kernels, name);
    if (!kernel) goto done;
    if (columns < 1 || rows < 1 || rows % STRIP) {
        PyErr_SetString(PyExc_ValueError, "there must be columns, and a multiple of 32 rows");
        goto done;
    }
    const int64_t block = product(columns, rows), square = product(columns, columns);
    const int64_t buffer = product(columns, STRIP * sizeof(float));
    if (!buffer_fits(&weight, "weight", product(block, 4), 4) || !buffer_fits(&target, "target", product(block, 4), 4) ||
        !buffer_fits(&error, "error", product(block, 4), 4) || !buffer_fits(&q, "q", block, 1) ||
        !buffer_fits(&feedback, "feedback", product(square, 4), 4) ||
        !buffer_fits(&group, "group", product(columns, 4), 4) ||
        !buffer_fits(&steps, "steps", steps.len / 4 / rows * rows * 4, 4))
        goto done;
    const int32_t *groups = group.buf;
    for (int64_t i = 0; i < columns; i++)
        if (groups[i] < 0 || groups[i] >= steps.len / 4 / rows) {
            PyErr_SetString(PyExc_ValueError, "a group without a step");
            goto done;
        }
    /* aligned_alloc wants a size that is a multiple of the alignment, which columns * STRIP floats are */
    errors = buffer < 0 ? NULL : aligned_alloc(sizeof(Vector), (size_t)buffer);
    if (!errors) {
        PyErr_NoMemory();
        goto done;
    }
    const Block b = {weight.buf, target.buf, feedback.buf, steps.buf, groups, error.buf, q.buf, columns, rows, qmin, qmax};
    Py_BEGIN_ALLOW_THREADS
    for (int64_t first = 0; first < rows; first += STRIP) kernel->round_strip(&b, first, errors);
    Py_END_ALLOW_THREADS
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

/* A matrix with its rows one after the other, and the same with its columns in another order one after the other. */
typedef struct {
    Py_buffer plain, place, ordered; /* [rows, columns]; int64 [columns]; [columns, padded], padded >= rows */
    int64_t rows, columns, padded;
} Reordering;

/* Read the arguments of arrange and restore; 0 with an exception if they do not fit each other. */
static int parse_reordering(PyObject *args, const char *format, Reordering *r, int64_t size) {
    long long rows, columns, padded;
    if (!PyArg_ParseTuple(args, format, &r->plain, &r->place, &r->ordered, &rows, &columns, &padded)) return 0;
    r->rows = rows, r->columns = columns, r->padded = padded;
    if (rows < 0 || padded < rows) {
        PyErr_SetString(PyExc_ValueError, "the rows must lie within the padded ones");
        return 0;
    }
    if (!buffer_fits(&r->plain, "plain", product(product(rows, columns), size), (size_t)size) ||
        !buffer_fits(&r->ordered, "ordered", product(product(columns, padded), size), (size_t)size) ||
        !buffer_fits(&r->place, "place", product(columns, 8), 8))
        return 0;
    const int64_t *place = r->place.buf;
    for (int64_t k = 0; k < columns; k++)
        if (place[k] < 0 || place[k] >= columns) {
            PyErr_SetString(PyExc_ValueError, "a column's place is none");
            return 0;
        }
    return 1;
}

static void release_reordering(Reordering *r) {
    PyBuffer_Release(&r->plain);
    PyBuffer_Release(&r->place);
    PyBuffer_Release(&r->ordered);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

PyDoc_STRVAR(arrange_doc,
             "arrange(plain, place, ordered, rows, columns, padded)\n\n"
             "ordered[place[k], row] = plain[row, k] of each row. float32 plain [rows, columns] and ordered\n"
             "[columns, padded]; int64 place [columns].");

static PyObject *py_arrange(PyObject *self, PyObject *args) {
    (void)self;
    Reordering r = {0};
    PyObject *result = NULL;
    if (!parse_reordering(args, "y*y*w*LLL", &r, sizeof(float))) goto done;
    enum { TILE = CACHE_LINE / sizeof(float) };
    const float *plain = r.plain.buf;
    float *ordered = r.ordered.buf, tile[TILE][TILE];
    const int64_t *place = r.place.buf;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t column = 0; column < r.columns; column += TILE)
        for (int64_t row = 0; row < r.rows; row += TILE) { /* inside: few pages of memory at a time */
            const int64_t height = least(TILE, r.rows - row), width = least(TILE, r.columns - column);
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < width; j++) tile[j][i] = plain[(row + i) * r.columns + column + j];
            for (int64_t j = 0; j < width; j++)
                memcpy(ordered + place[column + j] * r.padded + row, tile[j], (size_t)height * sizeof(float));
        }
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    release_reordering(&r);
    return result;
}

PyDoc_STRVAR(restore_doc,
             "restore(plain, place, ordered, rows, columns, padded)\n\n"
             "plain[row, k] = ordered[place[k], row] of each row. int8 plain [rows, columns] and ordered\n"
             "[columns, padded]; int64 place [columns].");

static PyObject *py_restore(PyObject *self, PyObject *args) {
    (void)self;
    Reordering r = {0};
    PyObject *result = NULL;
    if (!parse_reordering(args, "w*y*y*LLL", &r, 1)) goto done;
    enum { TILE = CACHE_LINE };
    int8_t *plain = r.plain.buf, tile[TILE][TILE];
    const int8_t *ordered = r.ordered.buf;
    const int64_t *place = r.place.buf;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t column = 0; column < r.columns; column += TILE)
        for (int64_t row = 0; row < r.rows; row += TILE) { /* inside: few pages of memory at a time */
            const int64_t height = least(TILE, r.rows - row), width = least(TILE, r.columns - column);
            for (int64_t j = 0; j < width; j++) {
                const int8_t *from = ordered + place[column + j] * r.padded + row;
                for (int64_t i = 0; i < height; i++) tile[i][j] = from[i];
            }
            for (int64_t i = 0; i < height; i++)
                memcpy(plain + (row + i) * r.columns + column, tile[i], (size_t)width);
        }
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    release_reordering(&r);
    return result;
}

static PyMethodDef methods[] = {
    {"list_kernels", py_list_kernels, METH_NOARGS, list_kernels_doc},
    {"arrange", py_arrange, METH_VARARGS, arrange_doc},
    {"restore", py_restore, METH_VARARGS, restore_doc},
    {"round_block", py_round_block, METH_VARARGS, round_block_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_rounding", .m_doc = "The compiled half of gptq.py.", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__rounding(void) { return PyModule_Create(&module); }
