/* The trace: one line for each launch, copy, allocation, collective and wait, in the order in which the host made the
 * calls.
 *
 * A line is KIND, the calling thread's number, the stream, and words, with tabs between them. Those lines at which the
 * host waits are followed by the thread's Python stack, so that a test can say who waited: the thread sends itself a
 * signal for which Python's faulthandler is registered, which needs no lock of the interpreter.
 */
#include "fake.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int file = -1, stack_signal;

/* Begins (or, without a path, ends) a trace. */
EXPORT void fakecuda_trace(const char *path, int signal_number) {
    pthread_mutex_lock(&lock);
    if (file >= 0) close(file);
    file = path && *path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    stack_signal = signal_number;
    pthread_mutex_unlock(&lock);
}

static void write_line(const char *kind, const void *stream, const char *format, va_list words, bool stack) {
    if (file < 0) return;
    char line[1024];
    int used = snprintf(line, sizeof line, "%s\t%d\t%lx\t", kind, gettid(), (unsigned long)stream);
    used += vsnprintf(line + used, sizeof line - used, format, words);
    if (used > (int)sizeof line - 2) used = sizeof line - 2;
    line[used++] = '\n';
    pthread_mutex_lock(&lock); /* held while Python writes the stack: no other thread's line comes in between */
    if (write(file, line, used) < 0) perror("fakecuda: trace");
    if (stack && stack_signal) raise(stack_signal);
    pthread_mutex_unlock(&lock);
}

void note(const char *kind, const void *stream, const char *format, ...) {
    va_list words;
    va_start(words, format);
    write_line(kind, stream, format, words, false);
    va_end(words);
}

void note_with_stack(const char *kind, const void *stream, const char *format, ...) {
    va_list words;
    va_start(words, format);
    write_line(kind, stream, format, words, true);
    va_end(words);
}

/* A line of the caller's own: where a part of a step begins. */
EXPORT void fakecuda_mark(const char *text) { note("mark", NULL, "%s", text); }

/* Names of kernels by the address of their host function: open addressing, never removed. */
#define KERNELS (1u << 20)
static struct {
    const void *function;
    const char *name;
} kernels[KERNELS];

static unsigned slot_of(const void *function) {
    unsigned slot = (unsigned)(((uint64_t)(uintptr_t)function * 11400714819323198485ull) >> 44);
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) % KERNELS;
    return slot;
}

void remember_kernel(const void *function, const char *name) {
    unsigned slot = slot_of(function);
    kernels[slot].function = function;
    kernels[slot].name = name;
}

const char *kernel_name(const void *function) {
    const char *name = kernels[slot_of(function)].name;
    return name ? name : "?";
}
