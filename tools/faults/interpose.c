/* Makes the Nth call of one kind on files under a folder fail, tear, wait or kill: gcc -shared -fPIC -O2 -o interpose.so interpose.c -ldl
 *
 * Preloaded (LD_PRELOAD), it does nothing until a process attaches to a plan: `interpose_attach(path)`, or INTERPOSE_PLAN=path when it starts.
 * The plan is a file shared by the driver and every attached process (shim.py writes it): what to do at which call, and what has been counted.
 * It is mapped, so that the counts outlive a SIGKILL. Calls that glibc makes inside itself (fopen's reads) are not seen; fopen is.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum call { OPEN, READ, PREAD, WRITE, PWRITE, FSYNC, RENAME, LINK, UNLINK, RMDIR, MKDIR, STAT, STATVFS, OPENDIR, READDIR, CLOSE, TRUNCATE, MMAP,
            UTIME, FLOCK, SENDFILE, READLINK, CALLS };
enum mode { COUNT, ERROR_ONCE, ERROR_FOR_GOOD, FULL, SHORT, TORN, KILL_BEFORE, KILL_AFTER, DELAY };
#define PATH 256
#define TRACED 8192
#define FILES 4096

struct plan {                 /* shim.py has the same */
    char prefix[2][PATH];     /* folders whose files count; the second may be empty */
    int32_t call, mode, error, milliseconds;
    int64_t nth;              /* from 1 */
    int64_t counts[CALLS];
    int64_t fired;            /* calls that a fault was given to */
    int64_t traced;
    struct { int32_t call; char path[PATH]; } trace[TRACED];
};

static struct plan *plan;
static char files[FILES][PATH]; /* what lies behind an open descriptor, where it is under a prefix */

/* the C library's own function of the name */
#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })

int interpose_attach(const char *path) {
    int fd = REAL(open)(path, O_RDWR);
    if (fd < 0) return -1;
    void *at = REAL(mmap)(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REAL(close)(fd);
    if (at == MAP_FAILED) return -1;
    plan = at;
    return 0;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("INTERPOSE_PLAN");
    if (path && *path) interpose_attach(path);
}

/* The whole path under a prefix, or NULL: nothing of ours. */
static const char *place(int at, const char *path, char *whole) {
    if (!plan || !path) return NULL;
    if (path[0] == '/') snprintf(whole, PATH, "%s", path);
    else if (at >= 0 && at < FILES && files[at][0]) snprintf(whole, PATH, "%.200s/%s", files[at], path);
    else if (at == AT_FDCWD) {
        char here[PATH];
        if (!getcwd(here, sizeof here)) return NULL;
        snprintf(whole, PATH, "%.200s/%s", here, path);
    } else return NULL;
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(plan->prefix[i]);
        if (length && !strncmp(whole, plan->prefix[i], length) && (whole[length] == '/' || !whole[length])) return whole;
    }
    return NULL;
}

static const char *behind(int fd) { return plan && fd >= 0 && fd < FILES && files[fd][0] ? files[fd] : NULL; }

static int allocates(enum call call, int writes) {
    switch (call) {
    case OPEN: return writes;
    case WRITE: case PWRITE: case FSYNC: case RENAME: case LINK: case MKDIR: case TRUNCATE: case SENDFILE: return 1;
    default: return 0;
    }
}

/* Counts a call on `path` and says what is to become of it: COUNT is nothing. */
static enum mode fate(enum call call, const char *path, int writes) {
    if (!path) return COUNT;
    int64_t number = __atomic_add_fetch(&plan->counts[call], 1, __ATOMIC_SEQ_CST);
    if (plan->mode == COUNT) {
        int64_t row = __atomic_fetch_add(&plan->traced, 1, __ATOMIC_SEQ_CST);
        if (row < TRACED) {
            plan->trace[row].call = call;
            snprintf(plan->trace[row].path, PATH, "%s", path);
        }
        return COUNT;
    }
    int begun = plan->fired > 0, hit = call == plan->call && number == plan->nth;
    if (plan->mode == ERROR_FOR_GOOD) hit |= begun && call == plan->call;
    if (plan->mode == FULL) hit |= begun && allocates(call, writes);
    if (!hit) return COUNT;
    if (__atomic_fetch_add(&plan->fired, 1, __ATOMIC_SEQ_CST) == 0) snprintf(plan->trace[0].path, PATH, "%s", path);
    if (plan->mode == KILL_BEFORE) kill(getpid(), SIGKILL);
    if (plan->mode == DELAY) {
        struct timespec rest = {plan->milliseconds / 1000, plan->milliseconds % 1000 * 1000000L};
        nanosleep(&rest, NULL);
        return COUNT;
    }
    return plan->mode;
}

static int is_error(enum mode mode) { return mode == ERROR_ONCE || mode == ERROR_FOR_GOOD || mode == FULL; }

/* `result = ...` of the real call, with what was decided around it */
#define AROUND(type, failed, call, path, writes, real_call)                                   \
    enum mode decided = fate(call, path, writes);                                              \
    if (is_error(decided)) { errno = plan->error; return failed; }                             \
    type result = real_call;                                                                   \
    if (decided == KILL_AFTER) kill(getpid(), SIGKILL);

/* The same for calls that move bytes: they may move half of them, and die then. */
#define MOVES(call, path, count, real_call)                                                    \
    enum mode decided = fate(call, path, 1);                                                   \
    if (is_error(decided)) { errno = plan->error; return -1; }                                 \
    if ((decided == SHORT || decided == TORN) && count > 1) count /= 2;                        \
    ssize_t result = real_call;                                                                \
    if (decided == KILL_AFTER || decided == TORN) kill(getpid(), SIGKILL);                     \
    return result;

static void remember(int fd, const char *path) {
    if (fd >= 0 && fd < FILES) snprintf(files[fd], PATH, "%s", path ? path : "");
}

static int is_writing(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define MODE_ARGUMENT va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; va_end(rest)
#define OPENS(at, real_call)                                                                   \
    char whole[PATH]; const char *where = place(at, path, whole);                              \
    AROUND(int, -1, OPEN, where, is_writing(flags), real_call)                                 \
    remember(result, where);                                                                   \
    return result;
int open(const char *path, int flags, ...) { MODE_ARGUMENT; OPENS(AT_FDCWD, REAL(open)(path, flags, mode)) }
int open64(const char *path, int flags, ...) { MODE_ARGUMENT; OPENS(AT_FDCWD, REAL(open64)(path, flags, mode)) }
int openat(int at, const char *path, int flags, ...) { MODE_ARGUMENT; OPENS(at, REAL(openat)(at, path, flags, mode)) }
int openat64(int at, const char *path, int flags, ...) { MODE_ARGUMENT; OPENS(at, REAL(openat64)(at, path, flags, mode)) }

#define STREAM(name)                                                                           \
    FILE *name(const char *path, const char *how) {                                            \
        char whole[PATH]; const char *where = place(AT_FDCWD, path, whole);                    \
        AROUND(FILE *, NULL, OPEN, where, how[0] != 'r' || strchr(how, '+'), REAL(name)(path, how)) \
        if (result) remember(fileno(result), where);                                           \
        return result;                                                                         \
    }
STREAM(fopen)
STREAM(fopen64)

int fclose(FILE *stream) {
    if (stream) remember(fileno(stream), NULL);
    return REAL(fclose)(stream);
}

/* The descriptor is gone whatever close says. */
int close(int fd) {
    char where[PATH];
    const char *known = behind(fd);
    if (!known) return REAL(close)(fd);
    snprintf(where, PATH, "%s", known);
    remember(fd, NULL);
    enum mode decided = fate(CLOSE, where, 0);
    int result = REAL(close)(fd);
    if (is_error(decided)) { errno = plan->error; return -1; }
    if (decided == KILL_AFTER) kill(getpid(), SIGKILL);
    return result;
}

int dup(int fd) { int other = REAL(dup)(fd); remember(other, behind(fd)); return other; }
int dup2(int fd, int other) { int result = REAL(dup2)(fd, other); if (result >= 0 && fd != other) remember(result, behind(fd)); return result; }
int dup3(int fd, int other, int flags) { int result = REAL(dup3)(fd, other, flags); remember(result, behind(fd)); return result; }
#define CONTROL(name)                                                                          \
    int name(int fd, int command, ...) {                                                       \
        va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest); \
        int result = REAL(name)(fd, command, argument);                                        \
        if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) remember(result, behind(fd));    \
        return result;                                                                         \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

ssize_t read(int fd, void *to, size_t count) { MOVES(READ, behind(fd), count, REAL(read)(fd, to, count)) }
ssize_t write(int fd, const void *from, size_t count) { MOVES(WRITE, behind(fd), count, REAL(write)(fd, from, count)) }
ssize_t pread(int fd, void *to, size_t count, off_t at) { MOVES(PREAD, behind(fd), count, REAL(pread)(fd, to, count, at)) }
ssize_t pread64(int fd, void *to, size_t count, off64_t at) { MOVES(PREAD, behind(fd), count, REAL(pread64)(fd, to, count, at)) }
ssize_t pwrite(int fd, const void *from, size_t count, off_t at) { MOVES(PWRITE, behind(fd), count, REAL(pwrite)(fd, from, count, at)) }
ssize_t pwrite64(int fd, const void *from, size_t count, off64_t at) { MOVES(PWRITE, behind(fd), count, REAL(pwrite64)(fd, from, count, at)) }
ssize_t sendfile(int out, int in, off_t *at, size_t count) { MOVES(SENDFILE, behind(out), count, REAL(sendfile)(out, in, at, count)) }
ssize_t sendfile64(int out, int in, off64_t *at, size_t count) { MOVES(SENDFILE, behind(out), count, REAL(sendfile64)(out, in, at, count)) }

#define ON_FILE(type, failed, call, fd, real_call) { AROUND(type, failed, call, behind(fd), 1, real_call) return result; }
int fsync(int fd) ON_FILE(int, -1, FSYNC, fd, REAL(fsync)(fd))
int fdatasync(int fd) ON_FILE(int, -1, FSYNC, fd, REAL(fdatasync)(fd))
int ftruncate(int fd, off_t length) ON_FILE(int, -1, TRUNCATE, fd, REAL(ftruncate)(fd, length))
int ftruncate64(int fd, off64_t length) ON_FILE(int, -1, TRUNCATE, fd, REAL(ftruncate64)(fd, length))
int flock(int fd, int what) ON_FILE(int, -1, FLOCK, fd, REAL(flock)(fd, what))
int fstat(int fd, struct stat *to) ON_FILE(int, -1, STAT, fd, REAL(fstat)(fd, to))
int fstat64(int fd, struct stat64 *to) ON_FILE(int, -1, STAT, fd, REAL(fstat64)(fd, to))
int fstatvfs(int fd, struct statvfs *to) ON_FILE(int, -1, STATVFS, fd, REAL(fstatvfs)(fd, to))
int fstatvfs64(int fd, struct statvfs64 *to) ON_FILE(int, -1, STATVFS, fd, REAL(fstatvfs64)(fd, to))
int futimens(int fd, const struct timespec times[2]) ON_FILE(int, -1, UTIME, fd, REAL(futimens)(fd, times))
void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
    ON_FILE(void *, MAP_FAILED, MMAP, fd, REAL(mmap)(at, length, protection, flags, fd, offset))
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off64_t offset)
    ON_FILE(void *, MAP_FAILED, MMAP, fd, REAL(mmap64)(at, length, protection, flags, fd, offset))

#define ON_PATH(type, failed, call, at, path, real_call)                                       \
    { char whole[PATH]; const char *where = place(at, path, whole); AROUND(type, failed, call, where, 1, real_call) return result; }
int stat(const char *path, struct stat *to) ON_PATH(int, -1, STAT, AT_FDCWD, path, REAL(stat)(path, to))
int stat64(const char *path, struct stat64 *to) ON_PATH(int, -1, STAT, AT_FDCWD, path, REAL(stat64)(path, to))
int lstat(const char *path, struct stat *to) ON_PATH(int, -1, STAT, AT_FDCWD, path, REAL(lstat)(path, to))
int lstat64(const char *path, struct stat64 *to) ON_PATH(int, -1, STAT, AT_FDCWD, path, REAL(lstat64)(path, to))
int fstatat(int at, const char *path, struct stat *to, int flags) ON_PATH(int, -1, STAT, at, path, REAL(fstatat)(at, path, to, flags))
int fstatat64(int at, const char *path, struct stat64 *to, int flags) ON_PATH(int, -1, STAT, at, path, REAL(fstatat64)(at, path, to, flags))
int statx(int at, const char *restrict path, int flags, unsigned mask, struct statx *restrict to) {
    char whole[PATH];
    const char *where = path && *path ? place(at, path, whole) : behind(at);
    AROUND(int, -1, STAT, where, 0, REAL(statx)(at, path, flags, mask, to))
    return result;
}
int statvfs(const char *path, struct statvfs *to) ON_PATH(int, -1, STATVFS, AT_FDCWD, path, REAL(statvfs)(path, to))
int statvfs64(const char *path, struct statvfs64 *to) ON_PATH(int, -1, STATVFS, AT_FDCWD, path, REAL(statvfs64)(path, to))
int rename(const char *path, const char *to) ON_PATH(int, -1, RENAME, AT_FDCWD, path, REAL(rename)(path, to))
int renameat(int at, const char *path, int at2, const char *to) ON_PATH(int, -1, RENAME, at, path, REAL(renameat)(at, path, at2, to))
int link(const char *path, const char *to) ON_PATH(int, -1, LINK, AT_FDCWD, path, REAL(link)(path, to))
int linkat(int at, const char *path, int at2, const char *to, int flags) ON_PATH(int, -1, LINK, at, path, REAL(linkat)(at, path, at2, to, flags))
int symlink(const char *to, const char *path) ON_PATH(int, -1, LINK, AT_FDCWD, path, REAL(symlink)(to, path))
int unlink(const char *path) ON_PATH(int, -1, UNLINK, AT_FDCWD, path, REAL(unlink)(path))
int unlinkat(int at, const char *path, int flags) ON_PATH(int, -1, flags & AT_REMOVEDIR ? RMDIR : UNLINK, at, path, REAL(unlinkat)(at, path, flags))
int rmdir(const char *path) ON_PATH(int, -1, RMDIR, AT_FDCWD, path, REAL(rmdir)(path))
int mkdir(const char *path, mode_t mode) ON_PATH(int, -1, MKDIR, AT_FDCWD, path, REAL(mkdir)(path, mode))
int mkdirat(int at, const char *path, mode_t mode) ON_PATH(int, -1, MKDIR, at, path, REAL(mkdirat)(at, path, mode))
int utimensat(int at, const char *path, const struct timespec times[2], int flags)
    ON_PATH(int, -1, UTIME, at, path, REAL(utimensat)(at, path, times, flags))
ssize_t readlink(const char *path, char *to, size_t size) ON_PATH(ssize_t, -1, READLINK, AT_FDCWD, path, REAL(readlink)(path, to, size))

DIR *opendir(const char *path) {
    char whole[PATH]; const char *where = place(AT_FDCWD, path, whole);
    AROUND(DIR *, NULL, OPENDIR, where, 0, REAL(opendir)(path))
    if (result) remember(dirfd(result), where);
    return result;
}
DIR *fdopendir(int fd) ON_FILE(DIR *, NULL, OPENDIR, fd, REAL(fdopendir)(fd))
int closedir(DIR *folder) {
    if (folder) remember(dirfd(folder), NULL);
    return REAL(closedir)(folder);
}
struct dirent *readdir(DIR *folder) ON_FILE(struct dirent *, NULL, READDIR, dirfd(folder), REAL(readdir)(folder))
struct dirent64 *readdir64(DIR *folder) ON_FILE(struct dirent64 *, NULL, READDIR, dirfd(folder), REAL(readdir64)(folder))
