/* The compiled half of codec.py: class choice, counting, encoding and decoding of tiles, without the interpreter lock.
 *
 * Everything that a caller passes is checked against its buffer before a kernel runs, and the kernels check the rest as they
 * read: no stream, however it was altered, makes them touch memory outside the buffers.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_count.h"
#include "_rans.h"
#include "_tables.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the coder stores its words as they lie in memory: only little-endian machines; the numpy coder serves the others"
#endif

typedef struct {
    const char *name;
    void (*encode)(EncodeTile *, const TileShape *);
    void (*encode_pair)(EncodeTile *, const TileShape *); /* or NULL */
    int (*decode)(DecodeTile *, const TileShape *);
    int (*decode_pair)(DecodeTile *, const TileShape *); /* or NULL */
} Kernel;

/* Fastest first, but see prefer_gathers. */
static Kernel kernels[] = {
#if GQSC_X86
    {"avx512", encode_one_avx512, encode_pair_avx512, decode_one_avx512, decode_pair_avx512},
    {"avx512-gather", encode_one_avx512_gather, encode_pair_avx512_gather, decode_one_avx512_gather, decode_pair_avx512_gather},
    {"avx2", encode_one_avx2, encode_pair_avx2, decode_one_avx2, decode_pair_avx2},
#endif
    {"scalar", encode_scalar, NULL, decode_scalar, NULL},
};
enum { KERNELS = sizeof kernels / sizeof kernels[0] };

/* Intel's processors have one shuffle port, which 16 single loads keep busier than a gather does. */
static void prefer_gathers(void) {
#if GQSC_X86
    if (__builtin_cpu_is("intel") && !strcmp(kernels[0].name, "avx512")) { /* not yet, by an earlier import */
        Kernel loads = kernels[0];
        kernels[0] = kernels[1];
        kernels[1] = loads;
    }
#endif
}

static int runs_here(const Kernel *kernel) {
#if GQSC_X86
    if (kernel->encode == encode_one_avx512 || kernel->encode == encode_one_avx512_gather)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
    if (kernel->encode == encode_one_avx2) return __builtin_cpu_supports("avx2") != 0;
#endif
    (void)kernel;
    return 1;
}

static const Kernel *find_kernel(const char *name) {
    for (int i = 0; i < KERNELS; i++)
        if (!strcmp(kernels[i].name, name) && runs_here(&kernels[i])) return &kernels[i];
    PyErr_Format(PyExc_ValueError, "no kernel %s on this machine", name);
    return NULL;
}

PyDoc_STRVAR(kernels_doc, "list_kernels() -> tuple of the kernels that run on this machine, fastest first");

static PyObject *py_list_kernels(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < KERNELS; i++) {
        if (!runs_here(&kernels[i])) continue;
        PyObject *name = PyUnicode_FromString(kernels[i].name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    if (!names) return NULL;
    PyObject *result = PyList_AsTuple(names);
    Py_DECREF(names);
    return result;
}

PyDoc_STRVAR(choose_doc, "choose_tables(matrix, rows, cols) -> (class of each column, uint16 frequencies [classes, 256], "
                         "the encoder's table of them, uint32 [classes + 1, 256])");

static PyObject *py_choose_tables(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer matrix;
    long long rows, cols;
    if (!PyArg_ParseTuple(args, "y*LL", &matrix, &rows, &cols)) return NULL;
    PyObject *result = NULL, *ids = NULL;
    uint16_t frequencies[MAX_CLASSES][256];
    uint32_t table[MAX_CLASSES + 1][256];
    if (rows < 1 || cols < 1 || matrix.len / cols < rows) {
        PyErr_SetString(PyExc_ValueError, "choose_tables: the matrix is smaller than rows x cols");
    } else if ((ids = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)cols)) != NULL) {
        uint8_t *klass = (uint8_t *)PyBytes_AS_STRING(ids);
        int classes;
        Py_BEGIN_ALLOW_THREADS
        classes = choose_tables(matrix.buf, rows, cols, klass, frequencies);
        fill_encoder_table(frequencies, classes, table);
        Py_END_ALLOW_THREADS
        if (classes)
            result = Py_BuildValue("(Oy#y#)", ids, (char *)frequencies, (Py_ssize_t)(classes * sizeof frequencies[0]),
                                   (char *)table, (Py_ssize_t)((classes + 1) * sizeof table[0]));
        else
            PyErr_NoMemory();
    }
    Py_XDECREF(ids);
    PyBuffer_Release(&matrix);
    return result;
}

PyDoc_STRVAR(count_doc, "count_values(matrix) -> int64 [256] as bytes: how often each byte occurs");

static PyObject *py_count_values(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer matrix;
    if (!PyArg_ParseTuple(args, "y*", &matrix)) return NULL;
    int64_t counts[BYTE_VALUES] = {0};
    Py_BEGIN_ALLOW_THREADS
    count_bytes(matrix.buf, matrix.len, counts, 0);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&matrix);
    return PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
}

/* Whether `ids` covers `cols` columns in whole rounds and every id has its `entries` entries of `table`. */
static int fits(const Py_buffer *ids, const Py_buffer *table, int64_t cols, int entries) {
    int64_t tables = table->len / (4 * (int64_t)entries);
    if (cols < 1 || ids->len != (cols + LANES - 1) / LANES * LANES) return 0;
    const uint8_t *id = ids->buf;
    int64_t highest = 0;
    for (Py_ssize_t i = 0; i < ids->len; i++)
        if (id[i] > highest) highest = id[i];
    return highest < tables && (uintptr_t)table->buf % 4 == 0;
}

static int frequencies_valid(const Py_buffer *table) {
    const uint32_t *e = table->buf;
    for (Py_ssize_t i = 0; i < table->len / 4; i++)
        if (e[i] >> 12 < 1 || e[i] >> 12 > SLOTS) return 0;
    return 1;
}

/* Room for one encoded tile of n bytes: states, words, escapes. */
static int64_t encoded_room(int64_t n) { return STATE_BYTES + 3 * n; }

static void begin_tile(EncodeTile *t, const uint8_t *src, uint8_t *room, int64_t n) {
    t->src = src;
    t->words = room + STATE_BYTES + 2 * n; /* each symbol gives at most one word */
    t->escapes = room + encoded_room(n);
    for (int i = 0; i < LANES; i++) t->state[i] = STATE_LOW;
}

/* Bring the parts of an encoded tile together; its payload begins STATE_BYTES below the words. Returns how many escapes. */
static int64_t end_tile(EncodeTile *t, uint8_t *room, int64_t n) {
    const int64_t escapes = room + encoded_room(n) - t->escapes;
    memmove(room + STATE_BYTES + 2 * n, t->escapes, (size_t)escapes);
    memcpy(t->words - STATE_BYTES, t->state, STATE_BYTES);
    return escapes;
}

PyDoc_STRVAR(encode_doc, "encode_tiles(kernel, tiles, height, cols, ids, table) -> list of (payload, how many escapes)\n\n"
                         "tiles is uint8 [tiles, height, cols].");

static PyObject *py_encode_tiles(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer tiles, ids, table;
    long long rows, cols;
    if (!PyArg_ParseTuple(args, "sy*LLy*y*", &name, &tiles, &rows, &cols, &ids, &table)) return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = find_kernel(name);
    if (kernel) {
        if (!fits(&ids, &table, cols, 256) || !frequencies_valid(&table) || rows < 1 || tiles.len / cols < rows ||
            tiles.len % (rows * cols)) {
            PyErr_SetString(PyExc_ValueError, "encode_tiles: a buffer does not fit height x cols");
        } else {
            const int64_t n = rows * cols, count = tiles.len / n;
            const TileShape shape = {rows, cols, ids.buf, table.buf};
            const uint8_t *src = tiles.buf;
            const int most = kernel->encode_pair && count > 1 ? 2 : 1;
            uint8_t *const scratch = PyMem_Malloc((size_t)(most * encoded_room(n)));
            uint8_t *const room[2] = {scratch, scratch + (most - 1) * encoded_room(n)};
            result = scratch ? PyList_New((Py_ssize_t)count) : PyErr_NoMemory();
            for (int64_t i = 0; result && i < count;) {
                const int together = i + most <= count ? most : 1;
                EncodeTile t[2];
                int64_t escapes[2];
                Py_BEGIN_ALLOW_THREADS
                for (int k = 0; k < together; k++) begin_tile(&t[k], src + (i + k) * n, room[k], n);
                (together == 2 ? kernel->encode_pair : kernel->encode)(t, &shape);
                for (int k = 0; k < together; k++) escapes[k] = end_tile(&t[k], room[k], n);
                Py_END_ALLOW_THREADS
                for (int k = 0; result && k < together; k++, i++) {
                    const uint8_t *start = t[k].words - STATE_BYTES, *end = room[k] + STATE_BYTES + 2 * n + escapes[k];
                    PyObject *of_tile = Py_BuildValue("(y#L)", (const char *)start, (Py_ssize_t)(end - start),
                                                      (long long)escapes[k]);
                    if (of_tile)
                        PyList_SET_ITEM(result, (Py_ssize_t)i, of_tile);
                    else
                        Py_CLEAR(result);
                }
            }
            PyMem_Free(scratch);
        }
    }
    PyBuffer_Release(&tiles);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&table);
    return result;
}

typedef struct {
    int64_t start, size, escapes, rows, at;
} DecodeJob;

static int job_valid(const DecodeJob *j, int64_t cols, int64_t blob, int64_t out) {
    return j->rows >= 1 && j->rows <= out / cols && j->at >= 0 && j->at <= out - j->rows * cols && j->start >= 0 &&
           j->size >= 0 && j->size <= blob - SLACK && j->start <= blob - SLACK - j->size;
}

/* 1 if the tile's payload can be decoded at all: enough bytes, states in range. */
static int open_tile(DecodeTile *t, const DecodeJob *j, const uint8_t *blob, uint8_t *out) {
    if (j->escapes < 0 || j->escapes > j->size - STATE_BYTES || (j->size - j->escapes) % 2) return 0;
    t->dst = out + j->at;
    t->words = blob + j->start + STATE_BYTES;
    t->end = blob + j->start + j->size - j->escapes;
    memcpy(t->state, blob + j->start, STATE_BYTES);
    for (int i = 0; i < LANES; i++)
        if (t->state[i] < STATE_LOW || t->state[i] >= STATE_TOP) return 0;
    return 1;
}

/* Put the escaped bytes in place; 1 if the tile ended as its encoder began. */
static int close_tile(DecodeTile *t, const DecodeJob *j, int64_t cols) {
    if (t->words != t->end) return 0;
    for (int i = 0; i < LANES; i++)
        if (t->state[i] != STATE_LOW) return 0;
    const uint8_t *escape = t->end;
    uint8_t *p = t->dst, *const end = p + j->rows * cols;
    int64_t left = j->escapes;
    while ((p = memchr(p, ESCAPE, (size_t)(end - p))) != NULL) {
        if (left-- == 0) return 0;
        *p++ = *escape++;
    }
    return left == 0;
}

/* The first tile that is not what an encoder wrote, or -1. */
static int64_t decode_jobs(const Kernel *kernel, const DecodeJob *jobs, int64_t n, const uint8_t *blob, uint8_t *out,
                           TileShape shape) {
    DecodeTile t[2];
    for (int64_t i = 0; i < n;) {
        shape.rows = jobs[i].rows;
        if (!open_tile(&t[0], &jobs[i], blob, out)) return i;
        if (kernel->decode_pair && i + 1 < n && jobs[i + 1].rows == jobs[i].rows && open_tile(&t[1], &jobs[i + 1], blob, out) &&
            kernel->decode_pair(t, &shape)) {
            for (int k = 0; k < 2; k++)
                if (!close_tile(&t[k], &jobs[i + k], shape.cols)) return i + k;
            i += 2;
        } else {
            open_tile(&t[0], &jobs[i], blob, out);
            if (!kernel->decode(&t[0], &shape) || !close_tile(&t[0], &jobs[i], shape.cols)) return i;
            i += 1;
        }
    }
    return -1;
}

PyDoc_STRVAR(decode_doc,
             "decode_tiles(kernel, blob, jobs, cols, ids, table, out) -> index of the first tile that is damaged, or -1\n\n"
             "jobs is int64 [tiles, 5]: where the tile starts in blob, its bytes, its escapes, its rows, where it goes in out.");

static PyObject *py_decode_tiles(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer blob, jobs, ids, table, out;
    long long cols;
    if (!PyArg_ParseTuple(args, "sy*y*Ly*y*w*", &name, &blob, &jobs, &cols, &ids, &table, &out)) return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = find_kernel(name);
    if (kernel) {
        const DecodeJob *job = jobs.buf;
        const int64_t n = jobs.len / (Py_ssize_t)sizeof *job;
        int valid = fits(&ids, &table, cols, SLOTS) && (uintptr_t)jobs.buf % sizeof job->start == 0;
        for (int64_t i = 0; valid && i < n; i++) valid = job_valid(&job[i], cols, blob.len, out.len);
        if (!valid) {
            PyErr_SetString(PyExc_ValueError, "decode_tiles: a buffer does not fit its job");
        } else {
            TileShape shape = {0, cols, ids.buf, table.buf};
            int64_t damaged;
            Py_BEGIN_ALLOW_THREADS
            damaged = decode_jobs(kernel, job, n, blob.buf, out.buf, shape);
            Py_END_ALLOW_THREADS
            result = PyLong_FromLongLong(damaged);
        }
    }
    PyBuffer_Release(&blob);
    PyBuffer_Release(&jobs);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&table);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"list_kernels", py_list_kernels, METH_NOARGS, kernels_doc},
    {"choose_tables", py_choose_tables, METH_VARARGS, choose_doc},
    {"count_values", py_count_values, METH_VARARGS, count_doc},
    {"encode_tiles", py_encode_tiles, METH_VARARGS, encode_doc},
    {"decode_tiles", py_decode_tiles, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_codec", "The compiled half of codec.py.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__codec(void) {
    fill_tables();
    fill_reciprocals();
#if GQSC_X86
    fill_shuffles();
#endif
    prefer_gathers();
    return PyModule_Create(&module);
}
