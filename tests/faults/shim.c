/* A disk that fails on demand: preloaded, it counts the file operations under one directory and lets the n-th of them
 * fail, be cut short, be lost, or be the last thing that the process does. Without `fault_arm` it changes nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL, SHORT, LOST, KILL_BEFORE, KILL_AFTER };
#define FILES 4096

static char watched[PATH_MAX];
static size_t watched_length;
static long victim;
static int action, error_number;
static atomic_long seen;
static char last[64];
static atomic_bool ours[FILES];

/* The n-th operation under `directory` (from 1; 0: only count) meets `what`; FAIL gives `error`. */
void fault_arm(const char *directory, long n, int what, int error) {
    strncpy(watched, directory, sizeof watched - 1);
    victim = n, action = what, error_number = error;
    watched_length = strlen(watched);
}

long fault_count(void) { return seen; }
const char *fault_last(void) { return last; } /* the operation that met the fault, "" where none did */

static int under(const char *path) {
    return watched_length && path && !strncmp(path, watched, watched_length)
        && (path[watched_length] == '/' || path[watched_length] == 0);
}

static int is_ours(int file) { return file >= 0 && file < FILES && ours[file]; }

/* What the operation meets: NOTHING but for the victim. */
static int meets(const char *name) {
    if (++seen != victim) return NOTHING;
    strncpy(last, name, sizeof last - 1);
    if (action == KILL_BEFORE) raise(SIGKILL);
    return action;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* An operation that is done or fails: SHORT and LOST, which are for writes, count as failures. */
#define DONE_OR_FAILED(name, call) do { \
    int fate = meets(#name); \
    if (fate == FAIL || fate == SHORT || fate == LOST) return errno = error_number, -1; \
    long result = call; \
    if (fate == KILL_AFTER) raise(SIGKILL); \
    return result; \
} while (0)

#define ON_PATH(name, parameters, types, path, arguments) \
    int name parameters { \
        REAL(int, name, types); \
        if (!under(path)) return real arguments; \
        DONE_OR_FAILED(name, real arguments); \
    }
#define TYPES(...) __VA_ARGS__

ON_PATH(rename, (const char *from, const char *to), TYPES(const char *, const char *), to, (from, to))
ON_PATH(link, (const char *from, const char *to), TYPES(const char *, const char *), to, (from, to))
ON_PATH(unlink, (const char *path), TYPES(const char *), path, (path))
ON_PATH(rmdir, (const char *path), TYPES(const char *), path, (path))
ON_PATH(mkdir, (const char *path, mode_t mode), TYPES(const char *, mode_t), path, (path, mode))
ON_PATH(linkat, (int a, const char *from, int b, const char *to, int how), TYPES(int, const char *, int, const char *, int), to, (a, from, b, to, how))
ON_PATH(renameat, (int a, const char *from, int b, const char *to), TYPES(int, const char *, int, const char *), to, (a, from, b, to))
ON_PATH(unlinkat, (int a, const char *path, int how), TYPES(int, const char *, int), path, (a, path, how))

#define ON_FILE(name, parameters, types, arguments) \
    int name parameters { \
        REAL(int, name, types); \
        if (!is_ours(file)) return real arguments; \
        DONE_OR_FAILED(name, real arguments); \
    }

ON_FILE(fsync, (int file), TYPES(int), (file))
ON_FILE(fdatasync, (int file), TYPES(int), (file))
ON_FILE(ftruncate, (int file, off_t size), TYPES(int, off_t), (file, size))
ON_FILE(ftruncate64, (int file, off_t size), TYPES(int, off_t), (file, size))
ON_FILE(flock, (int file, int how), TYPES(int, int), (file, how))

int close(int file) {
    REAL(int, close, int);
    if (file >= 0 && file < FILES) ours[file] = 0;
    return real(file);
}

static int opened(const char *name, int file, int fate) {
    if (file >= 0 && file < FILES) ours[file] = 1;
    if (fate == KILL_AFTER) raise(SIGKILL);
    return file;
}

#define OPENS(name, before, path, call) do { \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
    if (!under(path)) return call; \
    int fate = meets(#name); \
    if (fate == FAIL || fate == SHORT || fate == LOST) return errno = error_number, -1; \
    return opened(#name, call, fate); \
} while (0)

int open(const char *path, int flags, ...) { REAL(int, open, const char *, int, mode_t); OPENS(open, , path, real(path, flags, mode)); }
int open64(const char *path, int flags, ...) { REAL(int, open64, const char *, int, mode_t); OPENS(open64, , path, real(path, flags, mode)); }
int openat(int at, const char *path, int flags, ...) { REAL(int, openat, int, const char *, int, mode_t); OPENS(openat, , path, real(at, path, flags, mode)); }
int openat64(int at, const char *path, int flags, ...) { REAL(int, openat64, int, const char *, int, mode_t); OPENS(openat64, , path, real(at, path, flags, mode)); }

/* A write that may also be cut short (half of it is written, and said so) or lost (all is said to be written). */
#define WRITES(name, size, whole, half) do { \
    if (!is_ours(file)) return whole; \
    int fate = meets(#name); \
    if (fate == FAIL) return errno = error_number, -1; \
    if (fate == SHORT) return (size) > 1 ? half : whole; \
    if (fate == LOST) return size; \
    ssize_t result = whole; \
    if (fate == KILL_AFTER) raise(SIGKILL); \
    return result; \
} while (0)

ssize_t write(int file, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    WRITES(write, (ssize_t)size, real(file, data, size), real(file, data, size / 2));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    WRITES(pwrite, (ssize_t)size, real(file, data, size, at), real(file, data, size / 2, at));
}
ssize_t pwrite64(int file, const void *data, size_t size, off_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off_t);
    WRITES(pwrite64, (ssize_t)size, real(file, data, size, at), real(file, data, size / 2, at));
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    ssize_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    WRITES(writev, size, real(file, parts, count), write(file, parts[0].iov_base, parts[0].iov_len));
}

/* A read fails, or is cut short, which is allowed: whoever reads must go on. A lost one is one that fails. */
#define READS(name, whole, half) do { \
    if (!is_ours(file)) return whole; \
    int fate = meets(#name); \
    if (fate == FAIL || fate == LOST) return errno = EIO, -1; \
    if (fate == SHORT) return size > 1 ? half : whole; \
    ssize_t result = whole; \
    if (fate == KILL_AFTER) raise(SIGKILL); \
    return result; \
} while (0)

ssize_t read(int file, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    READS(read, real(file, data, size), real(file, data, size / 2));
}
ssize_t pread(int file, void *data, size_t size, off_t at) {
    REAL(ssize_t, pread, int, void *, size_t, off_t);
    READS(pread, real(file, data, size, at), real(file, data, size / 2, at));
}
ssize_t pread64(int file, void *data, size_t size, off_t at) {
    REAL(ssize_t, pread64, int, void *, size_t, off_t);
    READS(pread64, real(file, data, size, at), real(file, data, size / 2, at));
}
