/* One H200: its properties and its memory.
 *
 * Device memory lies where the host may not touch it (a read there is a segmentation fault, as on a GPU). Its bytes are
 * kept SHADOW bytes further on, in pages that the system gives only when they are written. Nothing but copies and
 * memsets ever writes them: kernels do nothing.
 */
#include "fake.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#define GIB (1ull << 30)
#define MEMORY (141 * GIB)
#define ARENA (4096 * GIB) /* addresses are not used twice */
#define PAGE (2ull << 20)
#define DEVICE 0x200000000000ull
#define SHADOW ARENA
#define PINNED (DEVICE + 2 * ARENA)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t sizes[2 * ARENA / PAGE]; /* of each block, by its first page: the device's, then page-locked ones */
static uint64_t device_top, pinned_top, used;
static size_t copy_limit = SIZE_MAX;

/* Copies and memsets of more bytes than this only stand in the trace: a model of gigabytes then costs no memory of the
 * host. */
EXPORT void fakecuda_copy_limit(size_t size) { copy_limit = size; }

static void *map(uint64_t address, int protection) {
    void *got = mmap((void *)address, ARENA, protection,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (got != (void *)address) {
        perror("fakecuda: no address space for the device's memory");
        abort();
    }
    return got;
}

__attribute__((constructor)) static void prepare(void) {
    map(DEVICE, PROT_NONE);
    map(DEVICE + SHADOW, PROT_READ | PROT_WRITE);
    map(PINNED, PROT_READ | PROT_WRITE);
}

static bool on_device(const void *pointer) { return (uint64_t)pointer - DEVICE < ARENA; }
static bool is_pinned(const void *pointer) { return (uint64_t)pointer - PINNED < ARENA; }
static void *bytes(const void *pointer) { return (char *)pointer + (on_device(pointer) ? SHADOW : 0); }

static void *take(uint64_t base, uint64_t *top, size_t *sizes_here, size_t size) {
    size_t whole = (size + PAGE - 1) / PAGE * PAGE;
    if (*top + whole > ARENA) return NULL;
    sizes_here[*top / PAGE] = whole;
    void *pointer = (void *)(base + *top);
    *top += whole;
    return pointer;
}

static size_t drop(uint64_t base, size_t *sizes_here, void *pointer) {
    size_t *size = &sizes_here[((uint64_t)pointer - base) / PAGE], whole = *size;
    *size = 0;
    madvise(bytes(pointer), whole, MADV_DONTNEED);
    return whole;
}

EXPORT cudaError_t cudaMalloc(void **pointer, size_t size) {
    pthread_mutex_lock(&lock);
    *pointer = used + size > MEMORY ? NULL : take(DEVICE, &device_top, sizes, size);
    if (*pointer) used += sizes[((uint64_t)*pointer - DEVICE) / PAGE];
    pthread_mutex_unlock(&lock);
    note("malloc", NULL, "%zu", size);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    pthread_mutex_lock(&lock);
    used -= drop(DEVICE, sizes, pointer);
    pthread_mutex_unlock(&lock);
    note("free", NULL, "%p", pointer); /* a GPU would be waited for */
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    pthread_mutex_lock(&lock);
    *pointer = take(PINNED, &pinned_top, sizes + ARENA / PAGE, size);
    pthread_mutex_unlock(&lock);
    note("pin", NULL, "%zu", size);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaFreeHost(void *pointer) {
    pthread_mutex_lock(&lock);
    drop(PINNED, sizes + ARENA / PAGE, pointer);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = MEMORY;
    *available = MEMORY - used;
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    memset(a, 0, sizeof *a);
    a->type = on_device(pointer)   ? cudaMemoryTypeDevice
              : is_pinned(pointer) ? cudaMemoryTypeHost
                                   : cudaMemoryTypeUnregistered;
    a->devicePointer = a->hostPointer = (void *)pointer;
    return cudaSuccess;
}

/* What comes back from the device: what was copied to exactly that place and size, and zeros otherwise, because a
 * kernel would have written it and what lies there is left over from others. A scalar (a loss, a count, "not finite")
 * is also zero if this thread has launched a kernel since. */
#define COPIES (1u << 20)
static struct {
    const void *place;
    size_t size;
    unsigned long launch;
} copies[COPIES]; /* the last copy to a place; places may push each other out */
static __thread unsigned long launches;
void count_launch(void) { launches++; }

static unsigned slot_of(const void *place) { return (unsigned)(((uint64_t)place * 11400714819323198485ull) >> 44); }

static bool is_known(const void *place, size_t size) {
    unsigned slot = slot_of(place);
    return copies[slot].place == place && copies[slot].size == size && (size > 8 || copies[slot].launch == launches);
}

static void move(void *to, const void *from, size_t size) {
    bool known = !on_device(from) || is_known(from, size);
    if (on_device(to)) {
        unsigned slot = slot_of(to);
        copies[slot].place = known ? to : NULL;
        copies[slot].size = size;
        copies[slot].launch = launches;
    }
    if (known && size <= copy_limit) memmove(bytes(to), bytes(from), size);
    else if (!on_device(to)) memset(to, 0, size);
}

static void copy(void *to, const void *from, size_t size, cudaStream_t stream) {
    const char *kind = on_device(to) ? (on_device(from) ? "d2d" : "h2d") : "d2h";
    const void *host = on_device(to) ? from : to;
    if (on_device(to) && on_device(from)) note(kind, stream, "%zu", size);
    else if (is_pinned(host)) note(kind, stream, "%zu pinned", size);
    else note_with_stack(kind, stream, "%zu pageable", size); /* the host is held while such memory is staged */
    move(to, from, size);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    copy(to, from, size, stream);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    note_with_stack("sync", NULL, "cudaMemcpy");
    copy(to, from, size, NULL);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    note("memset", stream, "%zu", size);
    copies[slot_of(to)].place = NULL;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }

/* ---- properties: an H200 (sm_90) */

EXPORT cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    return snprintf(text, length, "0000:01:00.0"), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200 (fake)");
    p->major = 9;
    p->totalGlobalMem = MEMORY;
    p->multiProcessorCount = 132;
    p->l2CacheSize = 60 << 20;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->totalConstMem = 65536;
    p->memoryBusWidth = 6144;
    p->textureAlignment = 512;
    p->concurrentKernels = p->unifiedAddressing = p->cooperativeLaunch = p->ECCEnabled = 1;
    p->asyncEngineCount = 3;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0; /* compute capability's minor, and whatever this device cannot do */
    }
    return cudaSuccess;
}
