// One GEMM in one format: compiled once for each of library.py's INSTANCES, with MOE_DIST_GEMM, MOE_DIST_KIND and
// MOE_DIST_VARIANT (0 or 1) defined, and the size that library.py takes Args to have.
#include "grouped_gemm.cuh"

static_assert(sizeof(moe_dist::Args) == MOE_DIST_ARGS_BYTES, "library.py fills another structure");

#define MOE_DIST_NAME_(gemm, kind, variant) moe_dist_gemm_##gemm##_##kind##_##variant
#define MOE_DIST_NAME(gemm, kind, variant) MOE_DIST_NAME_(gemm, kind, variant)

// `share`: how many thread blocks share weights, 1 or 2. On `sms` multiprocessors of `device`, which this library's own
// CUDA runtime must be told. A CUDA error code; cudaErrorInvalidValue for another `share`.
extern "C" int MOE_DIST_NAME(MOE_DIST_GEMM, MOE_DIST_KIND,
                             MOE_DIST_VARIANT)(const moe_dist::Args *args, const CUtensorMap *weights, int share,
                                               int device, int sms, int early, cudaStream_t stream) {
  if (cudaError_t error = cudaSetDevice(device))
    return error;
  if (share == 2)
    return moe_dist::launch<MOE_DIST_GEMM, MOE_DIST_KIND, 2, MOE_DIST_VARIANT>(*args, *weights, sms, early, stream);
#ifndef MOE_DIST_ONE_INSTANCE
  if (share == 1)
    return moe_dist::launch<MOE_DIST_GEMM, MOE_DIST_KIND, 1, MOE_DIST_VARIANT>(*args, *weights, sms, early, stream);
#endif
  return cudaErrorInvalidValue;
}
