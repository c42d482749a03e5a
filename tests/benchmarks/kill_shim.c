/* Kills its process at a chosen change of the disk: to be preloaded, see kill_syscalls.py.
 *
 * Stands before those functions of the C library that create, write, sync, rename, link or remove, or that set a mode. Once
 * kill_shim_arm() is called, each of their calls that concerns a place below given folders is counted and written down as a
 * line "name path". At the wanted one the process kills itself (SIGKILL): before the call, after it, or with only half of the
 * bytes written. A library that makes a system call without the C library is not seen; strace shows that glmq has none.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum moment { BEFORE, AFTER, HALFWAY };

static char folders[2][PATH_MAX];
static long wanted, count;
static int moment, record = -1;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

/* Begin to count calls below the two folders. `number` 0 kills never; the lines go to the descriptor `lines`. */
void kill_shim_arm(const char *folder, const char *other_folder, long number, int when, int lines)
{
    snprintf(folders[0], PATH_MAX, "%s", folder);
    snprintf(folders[1], PATH_MAX, "%s", other_folder);
    wanted = number;
    moment = when;
    record = lines;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static int is_below(const char *path)
{
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(folders[i]);
        if (strncmp(path, folders[i], length) == 0 && (path[length] == '/' || path[length] == 0))
            return 1;
    }
    return 0;
}

/* The absolute path that an open descriptor has, or had when it was removed. */
static const char *path_of(int handle, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *absolute(int base, const char *path, char *whole)
{
    if (!path || path[0] == '/')
        return path ? path : "";
    char start[PATH_MAX];
    if (base == AT_FDCWD) {
        if (!getcwd(start, sizeof start))
            return "";
    } else {
        path_of(base, start);
    }
    if (snprintf(whole, 2 * PATH_MAX, "%s/%s", start, path) < 0)
        return "";
    return whole;
}

/* One call more, on a path that was resolved. Returns whether to die now that the caller knows; before it: at once. */
static int arrive(const char *name, const char *path)
{
    if (record < 0 || !is_below(path))
        return 0;
    pthread_mutex_lock(&counting); /* after the wanted call no other thread of this process changes anything */
    int is_wanted = ++count == wanted;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, path);
    syscall(SYS_write, record, line, (size_t)length);
    if (is_wanted && moment == BEFORE)
        die();
    if (!is_wanted)
        pthread_mutex_unlock(&counting);
    return is_wanted;
}

static int arrive_at(const char *name, int base, const char *path)
{
    if (record < 0)
        return 0;
    char whole[2 * PATH_MAX];
    return arrive(name, absolute(base, path, whole));
}

static int arrive_open(const char *name, int handle)
{
    if (record < 0 || handle == record)
        return 0;
    char path[PATH_MAX];
    return arrive(name, path_of(handle, path));
}

/* A call that names two paths counts once, by the first that lies below. */
static int arrive_pair(const char *name, int base, const char *path, int other_base, const char *other)
{
    if (record < 0)
        return 0;
    char whole[2 * PATH_MAX];
    const char *first = absolute(base, path, whole);
    return is_below(first) ? arrive(name, first) : arrive_at(name, other_base, other);
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

#define STAND_BEFORE(type, name, parameters, arrival, arguments) \
    type name parameters                                         \
    {                                                            \
        int is_wanted = arrival;                                 \
        type result = REAL(name) arguments;                      \
        if (is_wanted)                                           \
            die();                                               \
        return result;                                           \
    }

/* Half of it counts where bytes are written from one buffer. */
#define STAND_BEFORE_BYTES(name, parameters, whole, half)   \
    ssize_t name parameters                                 \
    {                                                       \
        int is_wanted = arrive_open(#name, handle);         \
        if (is_wanted && moment == HALFWAY) {               \
            (void)!REAL(name) half;                         \
            die();                                          \
        }                                                   \
        ssize_t result = REAL(name) whole;                  \
        if (is_wanted)                                      \
            die();                                          \
        return result;                                      \
    }

STAND_BEFORE_BYTES(write, (int handle, const void *bytes, size_t size), (handle, bytes, size), (handle, bytes, size / 2))
STAND_BEFORE_BYTES(pwrite, (int handle, const void *bytes, size_t size, off_t at), (handle, bytes, size, at),
                   (handle, bytes, size / 2, at))
STAND_BEFORE_BYTES(pwrite64, (int handle, const void *bytes, size_t size, off64_t at), (handle, bytes, size, at),
                   (handle, bytes, size / 2, at))

#define ON_OPEN(type, name, parameters, arguments) STAND_BEFORE(type, name, parameters, arrive_open(#name, handle), arguments)

ON_OPEN(ssize_t, writev, (int handle, const struct iovec *parts, int number), (handle, parts, number))
ON_OPEN(ssize_t, pwritev, (int handle, const struct iovec *parts, int number, off_t at), (handle, parts, number, at))
ON_OPEN(ssize_t, pwritev64, (int handle, const struct iovec *parts, int number, off64_t at), (handle, parts, number, at))
ON_OPEN(ssize_t, sendfile, (int handle, int from, off_t *at, size_t size), (handle, from, at, size))
ON_OPEN(ssize_t, sendfile64, (int handle, int from, off64_t *at, size_t size), (handle, from, at, size))
STAND_BEFORE(ssize_t, copy_file_range,
             (int from, off64_t *from_at, int handle, off64_t *at, size_t size, unsigned int flags),
             arrive_open("copy_file_range", handle), (from, from_at, handle, at, size, flags))
ON_OPEN(int, ftruncate, (int handle, off_t size), (handle, size))
ON_OPEN(int, ftruncate64, (int handle, off64_t size), (handle, size))
ON_OPEN(int, fallocate, (int handle, int mode, off_t at, off_t size), (handle, mode, at, size))
ON_OPEN(int, fallocate64, (int handle, int mode, off64_t at, off64_t size), (handle, mode, at, size))
ON_OPEN(int, posix_fallocate, (int handle, off_t at, off_t size), (handle, at, size))
ON_OPEN(int, posix_fallocate64, (int handle, off64_t at, off64_t size), (handle, at, size))
ON_OPEN(int, fsync, (int handle), (handle))
ON_OPEN(int, fdatasync, (int handle), (handle))
ON_OPEN(int, fchmod, (int handle, mode_t mode), (handle, mode))

#define ON_PATH(name, parameters, base, arguments) \
    STAND_BEFORE(int, name, parameters, arrive_at(#name, base, path), arguments)

ON_PATH(truncate, (const char *path, off_t size), AT_FDCWD, (path, size))
ON_PATH(truncate64, (const char *path, off64_t size), AT_FDCWD, (path, size))
ON_PATH(chmod, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(fchmodat, (int base, const char *path, mode_t mode, int flags), base, (base, path, mode, flags))
ON_PATH(mkdir, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(mkdirat, (int base, const char *path, mode_t mode), base, (base, path, mode))
ON_PATH(rmdir, (const char *path), AT_FDCWD, (path))
ON_PATH(unlink, (const char *path), AT_FDCWD, (path))
ON_PATH(unlinkat, (int base, const char *path, int flags), base, (base, path, flags))
ON_PATH(symlink, (const char *to, const char *path), AT_FDCWD, (to, path))
ON_PATH(symlinkat, (const char *to, int base, const char *path), base, (to, base, path))

#define ON_PAIR(name, parameters, base, other_base, arguments) \
    STAND_BEFORE(int, name, parameters, arrive_pair(#name, base, path, other_base, other), arguments)

ON_PAIR(rename, (const char *path, const char *other), AT_FDCWD, AT_FDCWD, (path, other))
ON_PAIR(renameat, (int base, const char *path, int other_base, const char *other), base, other_base,
        (base, path, other_base, other))
ON_PAIR(renameat2, (int base, const char *path, int other_base, const char *other, unsigned int flags), base, other_base,
        (base, path, other_base, other, flags))
ON_PAIR(link, (const char *path, const char *other), AT_FDCWD, AT_FDCWD, (path, other))
ON_PAIR(linkat, (int base, const char *path, int other_base, const char *other, int flags), base, other_base,
        (base, path, other_base, other, flags))

/* Opening counts where it may create or empty a file. */
#define ON_CREATION(name, parameters, base, arguments)                                \
    int name parameters                                                               \
    {                                                                                 \
        mode_t mode = 0;                                                              \
        if (flags & O_CREAT) {                                                        \
            va_list rest;                                                             \
            va_start(rest, flags);                                                    \
            mode = va_arg(rest, mode_t);                                              \
            va_end(rest);                                                             \
        }                                                                             \
        int is_wanted = flags & (O_CREAT | O_TRUNC) && arrive_at(#name, base, path);  \
        int result = REAL(name) arguments;                                            \
        if (is_wanted)                                                                \
            die();                                                                    \
        return result;                                                                \
    }

ON_CREATION(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
ON_CREATION(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
ON_CREATION(openat, (int base, const char *path, int flags, ...), base, (base, path, flags, mode))
ON_CREATION(openat64, (int base, const char *path, int flags, ...), base, (base, path, flags, mode))
