/* What the compiled modules share: how a kernel is chosen at run time, and how a caller's buffers are checked.
 *
 * Every kernel is compiled for the least processor of its architecture, except where a function says by its target attribute
 * that it needs more; which one runs is asked of the processor. Options that let the compiler use newer instructions everywhere
 * would make all kernels alike: a result that changes from machine to machine under one name, or an illegal instruction.
 */
#ifndef GLMQ_NATIVE_H
#define GLMQ_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "needs GCC or Clang, for vector types and target attributes; without them glmq does the same in numpy and torch"
#endif
#if defined(__x86_64__) && (defined(__SSE3__) || defined(__AVX__) || defined(__FMA__))
#error "the kernels are chosen at run time: compile without -march=native, -mavx2 and the like (setup.py says -march=x86-64)"
#endif
#if defined(__x86_64__)
#define GLMQ_X86 1
#else
#define GLMQ_X86 0
#endif
/* Every 64-bit ARM processor has its 128-bit vectors (Advanced SIMD, "NEON"), so their kernels need no question. */
#if defined(__aarch64__) && defined(__ARM_NEON)
#define GLMQ_NEON 1
#else
#define GLMQ_NEON 0
#endif

/* Floats in one vector of the generic kernels: no more than a register has, since compilers keep wider vectors in memory (on
 * aarch64 six loads and stores beside each multiplication). */
enum { REGISTER_FLOATS = GLMQ_X86 ? 8 : 4 };

#define INLINE static inline __attribute__((always_inline))

/* How every table of kernels begins, fastest first. */
typedef struct {
    const char *name;
    int (*runs_here)(void);
} KernelId;

INLINE int runs_anywhere(void) { return 1; }

#define FIND_KERNEL(kernels, name) \
    (find_kernel((kernels), sizeof(kernels)[0], sizeof(kernels) / sizeof(kernels)[0], (name)))
#define LIST_KERNELS(kernels) (list_kernels((kernels), sizeof(kernels)[0], sizeof(kernels) / sizeof(kernels)[0]))

/* The kernel `name` of a table of `count` entries of `size` bytes; NULL with a ValueError if it is not there or not for this
 * processor. */
static inline const void *find_kernel(const void *kernels, size_t size, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++) {
        const KernelId *kernel = (const KernelId *)((const char *)kernels + i * size);
        if (!strcmp(kernel->name, name) && kernel->runs_here()) return kernel;
    }
    PyErr_Format(PyExc_ValueError, "no kernel %s on this machine", name);
    return NULL;
}

/* The names of the kernels that this processor runs, as a tuple. */
static inline PyObject *list_kernels(const void *kernels, size_t size, size_t count) {
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < count; i++) {
        const KernelId *kernel = (const KernelId *)((const char *)kernels + i * size);
        if (!kernel->runs_here()) continue;
        PyObject *name = PyUnicode_FromString(kernel->name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    PyObject *result = names ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return result;
}

/* a * b of sizes; -1, which no buffer has, if one is negative or the product is too large. */
INLINE int64_t product(int64_t a, int64_t b) {
    int64_t result;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result) ? -1 : result;
}

/* Whether a buffer has that many bytes and begins where values of `align` bytes may; else a ValueError. */
static inline int buffer_fits(const Py_buffer *buffer, const char *name, int64_t bytes, size_t align) {
    if (bytes >= 0 && buffer->len == bytes && (uintptr_t)buffer->buf % align == 0) return 1;
    if (buffer->len == bytes)
        PyErr_Format(PyExc_ValueError, "%s does not begin at a multiple of %zu bytes", name, align);
    else
        PyErr_Format(PyExc_ValueError, "%s has %zd bytes, %lld are needed", name, buffer->len, (long long)bytes);
    return 0;
}
#endif
