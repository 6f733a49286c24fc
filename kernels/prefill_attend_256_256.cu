// Attend of a prefill for keys of 256 and values of 256 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(256, 256, 1, 1)

}  // namespace squeeze
