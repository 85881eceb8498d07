// A library for LD_PRELOAD: counts the calls that change a folder, logs them, and lets one of them fail.
//
// Armed by fault_arm(), or when the process starts by the environment: FAULT_FOLDER, FAULT_AT, FAULT_KIND, FAULT_ERRNO,
// FAULT_LOG (a file outside of the folder). Calls on other paths pass. Calls within the folder have the numbers 1, 2,
// ...
//
// fsync and fdatasync do nothing within the folder: a process that is killed loses nothing that it has written, so they
// only cost time. What a power failure would lose is computed from the log: a line per call, "name ok|failed path
// path". Linux, 64 bits.
//
// FAULT_NO_LOCKS and FAULT_NO_EXCHANGE in the environment: no file can be locked, no names exchanged, as on some file
// systems.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum Kind { kNone, kFail, kFailFromHere, kShort, kKillBefore, kKillAfter };

static char folder[PATH_MAX];
static long fault_at;
static int fault_kind;
static int fault_errno;
static int without_exchange;
static int log_fd = -1;
static atomic_long calls;
static atomic_int delay_us;

// path: an absolute path without links; NULL or "" disarms. at: the number of the call to which `kind` happens.
void fault_arm(const char* path, long at, int kind, int error, int no_exchange, const char* log) {
    if (log_fd >= 0) close(log_fd);
    log_fd =
        log && *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    snprintf(folder, sizeof folder, "%s", path ? path : "");
    fault_at = at;
    fault_kind = kind;
    fault_errno = error;
    without_exchange = no_exchange;
    atomic_store(&calls, 0);
}

// From now on every write at an offset within the folder takes so long, and more.
void fault_delay(int microseconds) { atomic_store(&delay_us, microseconds); }

long fault_calls(void) { return atomic_load(&calls); }

__attribute__((constructor)) static void arm_by_environment(void) {
    const char* path = getenv("FAULT_FOLDER");
    const char* at = getenv("FAULT_AT");
    const char* kind = getenv("FAULT_KIND");
    const char* error = getenv("FAULT_ERRNO");
    if (path)
        fault_arm(path, at ? atol(at) : 0, kind ? atoi(kind) : kNone, error ? atoi(error) : EIO,
                  getenv("FAULT_NO_EXCHANGE") != NULL, getenv("FAULT_LOG"));
}

// -- which paths

static void join(int dir, const char* path, char* out) {
    char base[PATH_MAX] = "";
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length > 0 ? length : 0] = 0;
    }
    snprintf(out, PATH_MAX, *path ? "%.2000s/%.2000s" : "%.2000s", base, path);
}

static int within(const char* path) {
    size_t length = strlen(folder);
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

// -- one call

struct Call {
    const char* name;
    char path[PATH_MAX];
    char other[PATH_MAX];
    long number;  // 0: not in the folder
};

static void note(const struct Call* call, int ok) {
    char line[2 * PATH_MAX + 64];
    if (log_fd < 0) return;
    int length =
        snprintf(line, sizeof line, "%s\t%s\t%s\t%s\n", call->name, ok ? "ok" : "failed", call->path, call->other);
    syscall(SYS_write, log_fd, line, (size_t)length);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// Returns the error that the call must end with, or 0.
static int enter(struct Call* call, const char* name, int dir, const char* path, int other_dir, const char* other) {
    int saved = errno;
    call->name = name;
    call->number = 0;
    call->other[0] = 0;
    if (!folder[0] || !path) return 0;
    join(dir, path, call->path);
    if (other) join(other_dir, other, call->other);
    errno = saved;
    if (!within(call->path) && !(other && within(call->other))) return 0;
    call->number = atomic_fetch_add(&calls, 1) + 1;
    int here = call->number == fault_at;
    if (here && fault_kind == kKillBefore) die();
    if ((here && fault_kind == kFail) || (fault_kind == kFailFromHere && call->number >= fault_at)) {
        note(call, 0);
        return fault_errno;
    }
    return 0;
}

static void leave(struct Call* call, int ok) {
    int saved = errno;
    if (!call->number) return;
    note(call, ok);
    if (call->number == fault_at && fault_kind == kKillAfter) die();
    errno = saved;
}

static int is_short(const struct Call* call) {
    return call->number && call->number == fault_at && fault_kind == kShort;
}

// The rest of a function: fails as told, or makes the real call.
#define FINISH(TYPE, REAL)      \
    if (error) {                \
        errno = error;          \
        return -1;              \
    }                           \
    TYPE result = (TYPE)(REAL); \
    leave(&call, result >= 0);  \
    return result

// -- the calls

static int open_at(int dir, const char* path, int flags, mode_t mode) {
    struct Call call = {.number = 0};
    int error = flags & O_CREAT ? enter(&call, "create", dir, path, 0, NULL) : 0;
    FINISH(int, syscall(SYS_openat, dir, path, flags, mode));
}

static mode_t mode_of(int flags, va_list* arguments) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(*arguments, mode_t) : 0;
}

#define OPEN(NAME)                                   \
    int NAME(const char* path, int flags, ...) {     \
        va_list arguments;                           \
        va_start(arguments, flags);                  \
        mode_t mode = mode_of(flags, &arguments);    \
        va_end(arguments);                           \
        return open_at(AT_FDCWD, path, flags, mode); \
    }
#define OPEN_AT(NAME)                                     \
    int NAME(int dir, const char* path, int flags, ...) { \
        va_list arguments;                                \
        va_start(arguments, flags);                       \
        mode_t mode = mode_of(flags, &arguments);         \
        va_end(arguments);                                \
        return open_at(dir, path, flags, mode);           \
    }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

ssize_t write(int fd, const void* data, size_t size) {
    struct Call call = {.number = 0};
    int error = enter(&call, "write", fd, "", 0, NULL);
    if (is_short(&call) && size > 1) size /= 2;
    FINISH(ssize_t, syscall(SYS_write, fd, data, size));
}

static ssize_t write_at(int fd, const void* data, size_t size, off64_t offset) {
    struct Call call = {.number = 0};
    int error = enter(&call, "write", fd, "", 0, NULL);
    if (is_short(&call) && size > 1) size /= 2;
    if (call.number && atomic_load(&delay_us)) usleep((useconds_t)atomic_load(&delay_us));
    FINISH(ssize_t, syscall(SYS_pwrite64, fd, data, size, offset));
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) { return write_at(fd, data, size, offset); }

static int sync_file(int fd, long real) {
    struct Call call = {.number = 0};
    int error = enter(&call, "fsync", fd, "", 0, NULL);
    FINISH(int, call.number ? 0 : syscall(real, fd));
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

int renameat2(int old_dir, const char* old_path, int new_dir, const char* new_path, unsigned flags) {
    struct Call call = {.number = 0};
    if (flags && without_exchange) {
        errno = EINVAL;
        return -1;
    }
    int error = enter(&call, flags ? "exchange" : "rename", old_dir, old_path, new_dir, new_path);
    FINISH(int, syscall(SYS_renameat2, old_dir, old_path, new_dir, new_path, flags));
}

int renameat(int old_dir, const char* old_path, int new_dir, const char* new_path) {
    return renameat2(old_dir, old_path, new_dir, new_path, 0);
}

int rename(const char* old_path, const char* new_path) { return renameat2(AT_FDCWD, old_path, AT_FDCWD, new_path, 0); }

int mkdirat(int dir, const char* path, mode_t mode) {
    struct Call call = {.number = 0};
    int error = enter(&call, "mkdir", dir, path, 0, NULL);
    FINISH(int, syscall(SYS_mkdirat, dir, path, mode));
}

int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dir, const char* path, int flags) {
    struct Call call = {.number = 0};
    int error = enter(&call, flags & AT_REMOVEDIR ? "rmdir" : "unlink", dir, path, 0, NULL);
    FINISH(int, syscall(SYS_unlinkat, dir, path, flags));
}

int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int flock(int fd, int operation) {
    if (getenv("FAULT_NO_LOCKS")) {
        errno = ENOLCK;
        return -1;
    }
    return (int)syscall(SYS_flock, fd, operation);
}

int linkat(int old_dir, const char* old_path, int new_dir, const char* new_path, int flags) {
    struct Call call = {.number = 0};
    int error = enter(&call, "link", old_dir, old_path, new_dir, new_path);
    FINISH(int, syscall(SYS_linkat, old_dir, old_path, new_dir, new_path, flags));
}

int link(const char* old_path, const char* new_path) { return linkat(AT_FDCWD, old_path, AT_FDCWD, new_path, 0); }

int ftruncate64(int fd, off64_t size) {
    struct Call call = {.number = 0};
    int error = enter(&call, "truncate", fd, "", 0, NULL);
    FINISH(int, syscall(SYS_ftruncate, fd, size));
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

// Returns its error, and leaves errno alone.
static int allocate(const char* real, int fd, off64_t offset, off64_t size) {
    struct Call call = {.number = 0};
    int error = enter(&call, "allocate", fd, "", 0, NULL);
    if (error) return error;
    int (*next)(int, off64_t, off64_t) = (int (*)(int, off64_t, off64_t))dlsym(RTLD_NEXT, real);
    int result = next(fd, offset, size);
    leave(&call, result == 0);
    return result;
}

int posix_fallocate(int fd, off_t offset, off_t size) { return allocate("posix_fallocate", fd, offset, size); }
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return allocate("posix_fallocate64", fd, offset, size); }
