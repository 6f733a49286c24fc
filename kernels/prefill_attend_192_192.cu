// Attend of a prefill for keys of 192 and values of 192 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(192, 192, 1, 1)

}  // namespace squeeze
