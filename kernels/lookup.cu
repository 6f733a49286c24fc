// Lookup for F16 keys and values of 64 or 128 elements.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(64, 64, false, false, 8)
LOOKUP(64_diag, 64, true, false, 8)
LOOKUP(128, 128, false, false, 6)
// With 5 blocks the compiler spills there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
LOOKUP(128_diag, 128, true, false, 4)
#else
LOOKUP(128_diag, 128, true, false, 5)
#endif

}  // namespace squeeze
