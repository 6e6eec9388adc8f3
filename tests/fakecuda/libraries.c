/* cuBLAS and NCCL: each product and each collective is written to the trace with its size, and nothing is computed or
 * sent. */
#include "fake.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>

/* ---- cuBLAS */

static cublasStatus_t product(long long m, long long n, long long k, long long batch) {
    return note("gemm", NULL, "%lld %lld %lld x %lld", m, n, k, batch), CUBLAS_STATUS_SUCCESS;
}

EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { return *handle = new_handle(), CUBLAS_STATUS_SUCCESS; }
EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    return *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    return *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                     const float *alpha, const float *a, int lda, const float *b, int ldb,
                                     const float *beta, float *c, int ldc) {
    return product(m, n, k, 1);
}
EXPORT cublasStatus_t cublasDgemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                     const double *alpha, const double *a, int lda, const double *b, int ldb,
                                     const double *beta, double *c, int ldc) {
    return product(m, n, k, 1);
}
EXPORT cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                   const void *alpha, const void *a, cudaDataType at, int lda, const void *b,
                                   cudaDataType bt, int ldb, const void *beta, void *c, cudaDataType ct, int ldc,
                                   cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return product(m, n, k, 1);
}
EXPORT cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                                                 int n, int k, const void *alpha, const void *a, cudaDataType at,
                                                 int lda, long long sa, const void *b, cudaDataType bt, int ldb,
                                                 long long sb, const void *beta, void *c, cudaDataType ct, int ldc,
                                                 long long sc, int batch, cublasComputeType_t compute,
                                                 cublasGemmAlgo_t algorithm) {
    return product(m, n, k, batch);
}

/* A layout of cublasLt is opaque to its users, so that ours may be our own. */
struct layout {
    uint64_t rows, columns;
};

EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t ld) {
    struct layout *fresh = malloc(sizeof *fresh);
    fresh->rows = rows, fresh->columns = columns;
    return *layout = (cublasLtMatrixLayout_t)fresh, CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return free(layout), CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    return *d = new_handle(), CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return free(d), CUBLAS_STATUS_SUCCESS; }
EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return *p = new_handle(), CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return free(p), CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out,
                                                     cublasLtMatmulPreference_t p, int asked,
                                                     cublasLtMatmulHeuristicResult_t results[], int *found) {
    memset(results, 0, sizeof results[0]);
    return *found = 1, CUBLAS_STATUS_SUCCESS;
}
EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                                     cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                                     const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                                     cublasLtMatrixLayout_t out, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t bytes, cudaStream_t stream) {
    struct layout *first = (struct layout *)a, *result = (struct layout *)out;
    return product(result->rows, result->columns, first->rows * first->columns / result->rows, 1);
}

/* ---- NCCL: rank 0 of as many as there are said to be; a collective of one rank copies, of more it leaves its output
 * as it is */

struct communicator {
    int rank, size;
};

EXPORT ncclResult_t ncclGetVersion(int *version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return memset(id, 1, sizeof *id), ncclSuccess; }
EXPORT const char *ncclGetErrorString(ncclResult_t result) { return "an error of the fake NCCL"; }
EXPORT const char *ncclGetLastError(ncclComm_t c) { return ""; }
EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int size, ncclUniqueId id, int rank,
                                           ncclConfig_t *configuration) {
    struct communicator *fresh = malloc(sizeof *fresh);
    fresh->rank = rank, fresh->size = size;
    return *c = (ncclComm_t)fresh, ncclSuccess;
}
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *c, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(c, size, id, rank, NULL);
}
EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int size, int rank, int ids, ncclUniqueId *id,
                                             ncclConfig_t *configuration) {
    return ncclCommInitRankConfig(c, size, id[0], rank, configuration);
}
EXPORT ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t *c, ncclConfig_t *configuration) {
    struct communicator *fresh = malloc(sizeof *fresh);
    *fresh = *(struct communicator *)parent; /* of all its ranks: how many share the colour, only they would know */
    return *c = (ncclComm_t)fresh, ncclSuccess;
}
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t c) { return free(c), ncclSuccess; }
EXPORT ncclResult_t ncclCommAbort(ncclComm_t c) { return free(c), ncclSuccess; }
EXPORT ncclResult_t ncclCommCount(const ncclComm_t c, int *count) {
    return *count = ((struct communicator *)c)->size, ncclSuccess;
}
EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) {
    return *rank = ((struct communicator *)c)->rank, ncclSuccess;
}
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) {
    return *error = ncclSuccess, ncclSuccess;
}

static size_t width(ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: return 4;
    }
}

static ncclResult_t collective(const char *name, const void *from, void *to, size_t count, ncclDataType_t type,
                               ncclComm_t c, cudaStream_t stream) {
    size_t size = count * width(type);
    note("nccl", stream, "%s %zu ranks %d", name, size, ((struct communicator *)c)->size);
    if (((struct communicator *)c)->size == 1 && from != to)
        cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c,
                                  cudaStream_t s) {
    return collective("all_reduce", from, to, n, t, c, s);
}
EXPORT ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t t, ncclComm_t c,
                                  cudaStream_t s) {
    return collective("all_gather", from, to, n, t, c, s);
}
EXPORT ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op,
                                      ncclComm_t c, cudaStream_t s) {
    return collective("reduce_scatter", from, to, n, t, c, s);
}
EXPORT ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                                  cudaStream_t s) {
    return collective("broadcast", from, to, n, t, c, s);
}
EXPORT ncclResult_t ncclBcast(void *buffer, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
    return collective("broadcast", buffer, buffer, n, t, c, s);
}
EXPORT ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t t, ncclRedOp_t op, int root,
                               ncclComm_t c, cudaStream_t s) {
    return collective("reduce", from, to, n, t, c, s);
}
EXPORT ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    return collective("send", from, (void *)from, n, t, c, s);
}
EXPORT ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    return collective("receive", to, to, n, t, c, s);
}
