// Attend of a prefill for keys of 128 and values of 128 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(128, 128, 2, 2)

}  // namespace squeeze
