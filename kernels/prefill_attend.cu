// Attend of a prefill on compute capability 9.0, F16 of 64 or 128 elements.
#include "prefill_attend_hopper.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace squeeze {

#define ATTEND(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(ROLES_THREADS, 1) prefill_attend_##D(const __grid_constant__ Prefill p) { \
        attend_in_roles<D>(p);                                                                                            \
    }
ATTEND(64)
ATTEND(128)

}  // namespace squeeze
#endif
