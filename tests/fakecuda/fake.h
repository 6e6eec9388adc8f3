/* A CUDA runtime without a device: what its files share. README.md says what is real and what is not. */
#pragma once
#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* trace.c */
void note(const char *kind, const void *stream, const char *format, ...) __attribute__((format(printf, 3, 4)));
void note_with_stack(const char *kind, const void *stream, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void remember_kernel(const void *function, const char *name);
const char *kernel_name(const void *function);

/* device.c: a kernel may have written whatever scalar this thread reads next */
void count_launch(void);

/* A handle of any library (stream, event, communicator): memory that nobody reads, and that is never given back. */
static inline void *new_handle(void) { return calloc(1, 64); }
