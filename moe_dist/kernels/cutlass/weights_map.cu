// How TMA is to read an expert matrix: boxes of 128 rows by 128 bytes, swizzled as wgmma reads them.
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>

// `rows` of `k` bytes, all experts' together. Rows and columns beyond them are read as 0. A CUDA error code.
extern "C" int moe_dist_weights_map(CUtensorMap *map, void *weights, int64_t rows, int64_t k) {
  void *found = nullptr;
  cudaDriverEntryPointQueryResult query;
#if CUDART_VERSION >= 12050
  cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query);
#else
  cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &query);
#endif
  if (error != cudaSuccess)
    return error;
  if (query != cudaDriverEntryPointSuccess || !found)
    return cudaErrorNotSupported;
  const cuuint64_t size[2] = {cuuint64_t(k), cuuint64_t(rows)}, stride[1] = {cuuint64_t(k)};
  const cuuint32_t box[2] = {128, 128}, step[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, weights, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

extern "C" const char *moe_dist_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
