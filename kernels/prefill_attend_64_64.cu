// Attend of a prefill for keys of 64 and values of 64 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(64, 64, 2, 2)

}  // namespace squeeze
