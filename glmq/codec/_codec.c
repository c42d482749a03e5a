/* The compiled half of codec.py: class choice, counting, encoding and decoding of tiles, without the interpreter lock.
 *
 * Everything that a caller passes is checked against its buffer before a kernel runs, and the kernels check the rest as they
 * read: no stream, however it was altered, makes them touch memory outside the buffers.
 */
#include "../_native.h"

#include "_count.h"
#include "_rans.h"
#include "_rans_neon.h"
#include "_tables.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the coder stores its words as they lie in memory: only little-endian machines; the numpy coder serves the others"
#endif

#if GLMQ_X86
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }
#endif

typedef struct {
    KernelId id;
    void (*encode)(EncodeTile *, const TileShape *);
    void (*encode_pair)(EncodeTile *, const TileShape *); /* or NULL */
    int (*decode)(DecodeTile *, const TileShape *);
    int (*decode_pair)(DecodeTile *, const TileShape *); /* or NULL */
} Kernel;

/* Fastest first, but see prefer_gathers. */
static Kernel kernels[] = {
#if GLMQ_X86
    {{"avx512", has_avx512}, encode_one_avx512, encode_pair_avx512, decode_one_avx512, decode_pair_avx512},
    {{"avx512-gather", has_avx512}, encode_one_avx512_gather, encode_pair_avx512_gather, decode_one_avx512_gather,
     decode_pair_avx512_gather},
    {{"avx2", has_avx2}, encode_one_avx2, encode_pair_avx2, decode_one_avx2, decode_pair_avx2},
#endif
#if GLMQ_NEON
    {{"neon", runs_anywhere}, encode_neon, NULL, decode_neon, NULL},
#endif
    {{"scalar", runs_anywhere}, encode_scalar, NULL, decode_scalar, NULL},
};

/* Intel's processors have one shuffle port, which 16 single loads keep busier than a gather does. */
static void prefer_gathers(void) {
#if GLMQ_X86
    if (__builtin_cpu_is("intel") && !strcmp(kernels[0].id.name, "avx512")) { /* not yet, by an earlier import */
        Kernel loads = kernels[0];
        kernels[0] = kernels[1];
        kernels[1] = loads;
    }
#endif
}

PyDoc_STRVAR(list_kernels_doc, "list_kernels() -> tuple of the kernels that run on this machine, fastest first");

static PyObject *py_list_kernels(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return LIST_KERNELS(kernels);
}

PyDoc_STRVAR(choose_tables_doc,
             "choose_tables(matrix, rows, cols) -> (class of each column, uint16 frequencies [classes, 256], the encoder's\n"
             "table of them, uint32 [classes + 1, 256])\n\n"
             "matrix is int8 [rows, cols].");

static PyObject *py_choose_tables(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer matrix;
    long long rows, cols;
    if (!PyArg_ParseTuple(args, "y*LL", &matrix, &rows, &cols)) return NULL;
    PyObject *result = NULL, *ids = NULL;
    if (rows < 1 || cols < 1) {
        PyErr_SetString(PyExc_ValueError, "rows and cols must be positive");
        goto done;
    }
    if (!buffer_fits(&matrix, "matrix", product(rows, cols), 1)) goto done;
    ids = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)cols);
    if (!ids) goto done;
    uint16_t frequencies[MAX_CLASSES][256];
    uint32_t table[MAX_CLASSES + 1][256];
    uint8_t *class_of_column = (uint8_t *)PyBytes_AS_STRING(ids);
    int classes;
    Py_BEGIN_ALLOW_THREADS
    classes = choose_tables(matrix.buf, rows, cols, class_of_column, frequencies);
    fill_encoder_table(frequencies, classes, table);
    Py_END_ALLOW_THREADS
    if (classes)
        result = Py_BuildValue("(Oy#y#)", ids, (char *)frequencies, (Py_ssize_t)(classes * sizeof frequencies[0]), (char *)table,
                               (Py_ssize_t)((classes + 1) * sizeof table[0]));
    else
        PyErr_NoMemory();
done:
    Py_XDECREF(ids);
    PyBuffer_Release(&matrix);
    return result;
}

PyDoc_STRVAR(count_values_doc, "count_values(matrix) -> int64 [256] as bytes: how often each byte occurs");

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

/* Whether `ids` covers `cols` columns in whole rounds and every id has its `entries` entries of `table`; else a ValueError. */
static int columns_fit(const Py_buffer *ids, const Py_buffer *table, int64_t cols, int64_t entries) {
    if (cols < 1 || cols > MAX_COLS) {
        PyErr_Format(PyExc_ValueError, "cols must be from 1 to %lld", (long long)MAX_COLS);
        return 0;
    }
    const int64_t tables = table->len / (4 * entries);
    if (!buffer_fits(ids, "ids", (cols + LANES - 1) / LANES * LANES, 1) || !buffer_fits(table, "table", tables * 4 * entries, 4))
        return 0;
    const uint8_t *id = ids->buf;
    for (Py_ssize_t i = 0; i < ids->len; i++)
        if (id[i] >= tables) {
            PyErr_SetString(PyExc_ValueError, "a column of a class without a table");
            return 0;
        }
    return 1;
}

/* Whether every entry of an encoder's table has a frequency that can be divided by; else a ValueError. */
static int frequencies_valid(const Py_buffer *table) {
    const uint32_t *e = table->buf;
    for (Py_ssize_t i = 0; i < table->len / 4; i++)
        if (e[i] >> 12 < 1 || e[i] >> 12 > SLOTS) {
            PyErr_SetString(PyExc_ValueError, "a table entry with an impossible frequency");
            return 0;
        }
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

PyDoc_STRVAR(encode_tiles_doc,
             "encode_tiles(kernel, tiles, height, cols, ids, table) -> list of (payload, how many escapes)\n\n"
             "tiles is int8 [tiles, height, cols]; ids the class of each column, padded to whole rounds; table from choose_tables.");

/* `count` tiles of n bytes each, two at a time where the kernel can; `scratch` has room for as many as go together. */
static PyObject *encode_all(const Kernel *kernel, const uint8_t *src, int64_t count, const TileShape *shape, uint8_t *scratch,
                            int most) {
    const int64_t n = shape->rows * shape->cols;
    uint8_t *const room[2] = {scratch, scratch + (most - 1) * encoded_room(n)};
    PyObject *result = PyList_New((Py_ssize_t)count);
    for (int64_t i = 0; result && i < count;) {
        const int together = i + most <= count ? most : 1;
        EncodeTile t[2];
        int64_t escapes[2];
        Py_BEGIN_ALLOW_THREADS
        for (int k = 0; k < together; k++) begin_tile(&t[k], src + (i + k) * n, room[k], n);
        (together == 2 ? kernel->encode_pair : kernel->encode)(t, shape);
        for (int k = 0; k < together; k++) escapes[k] = end_tile(&t[k], room[k], n);
        Py_END_ALLOW_THREADS
        for (int k = 0; result && k < together; k++, i++) {
            const uint8_t *start = t[k].words - STATE_BYTES, *end = room[k] + STATE_BYTES + 2 * n + escapes[k];
            PyObject *of_tile =
                Py_BuildValue("(y#L)", (const char *)start, (Py_ssize_t)(end - start), (long long)escapes[k]);
            if (of_tile)
                PyList_SET_ITEM(result, (Py_ssize_t)i, of_tile);
            else
                Py_CLEAR(result);
        }
    }
    return result;
}

static PyObject *py_encode_tiles(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer tiles, ids, table;
    long long height, cols;
    if (!PyArg_ParseTuple(args, "sy*LLy*y*", &name, &tiles, &height, &cols, &ids, &table)) return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = FIND_KERNEL(kernels, name);
    if (!kernel || !columns_fit(&ids, &table, cols, 256) || !frequencies_valid(&table)) goto done;
    const int64_t n = product(height, cols);
    if (n < 1 || n > tiles.len || tiles.len % n) {
        PyErr_SetString(PyExc_ValueError, "tiles must be whole ones of height x cols");
        goto done;
    }
    const int64_t count = tiles.len / n;
    const int most = kernel->encode_pair && count > 1 ? 2 : 1;
    uint8_t *scratch = PyMem_Malloc((size_t)(most * encoded_room(n)));
    if (!scratch) {
        PyErr_NoMemory();
        goto done;
    }
    const TileShape shape = {height, cols, ids.buf, table.buf};
    result = encode_all(kernel, tiles.buf, count, &shape, scratch, most);
    PyMem_Free(scratch);
done:
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

PyDoc_STRVAR(decode_tiles_doc,
             "decode_tiles(kernel, blob, jobs, cols, ids, table, out) -> index of the first tile that is damaged, or -1\n\n"
             "jobs is int64 [tiles, 5]: where the tile starts in blob, its bytes, its escapes, its rows, where it goes in out;\n"
             "ids the class of each column, padded to whole rounds; table uint32 [classes + 1, 2048].");

static PyObject *py_decode_tiles(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    Py_buffer blob, jobs, ids, table, out;
    long long cols;
    if (!PyArg_ParseTuple(args, "sy*y*Ly*y*w*", &name, &blob, &jobs, &cols, &ids, &table, &out)) return NULL;
    PyObject *result = NULL;
    const Kernel *kernel = FIND_KERNEL(kernels, name);
    if (!kernel || !columns_fit(&ids, &table, cols, SLOTS)) goto done;
    const DecodeJob *job = jobs.buf;
    const int64_t n = jobs.len / (Py_ssize_t)sizeof *job;
    if (!buffer_fits(&jobs, "jobs", n * (int64_t)sizeof *job, sizeof job->start)) goto done;
    for (int64_t i = 0; i < n; i++)
        if (!job_valid(&job[i], cols, blob.len, out.len)) {
            PyErr_Format(PyExc_ValueError, "job %lld reaches beyond blob or out", (long long)i);
            goto done;
        }
    const TileShape shape = {0, cols, ids.buf, table.buf};
    int64_t damaged;
    Py_BEGIN_ALLOW_THREADS
    damaged = decode_jobs(kernel, job, n, blob.buf, out.buf, shape);
    Py_END_ALLOW_THREADS
    result = PyLong_FromLongLong(damaged);
done:
    PyBuffer_Release(&blob);
    PyBuffer_Release(&jobs);
    PyBuffer_Release(&ids);
    PyBuffer_Release(&table);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"list_kernels", py_list_kernels, METH_NOARGS, list_kernels_doc},
    {"choose_tables", py_choose_tables, METH_VARARGS, choose_tables_doc},
    {"count_values", py_count_values, METH_VARARGS, count_values_doc},
    {"encode_tiles", py_encode_tiles, METH_VARARGS, encode_tiles_doc},
    {"decode_tiles", py_decode_tiles, METH_VARARGS, decode_tiles_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_codec", .m_doc = "The compiled half of codec.py.", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__codec(void) {
    fill_tables();
    fill_reciprocals();
#if GLMQ_X86 || GLMQ_NEON
    fill_shuffles();
#endif
    prefer_gathers();
    return PyModule_Create(&module);
}
