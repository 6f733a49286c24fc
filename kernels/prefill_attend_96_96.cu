// Attend of a prefill for keys of 96 and values of 96 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(96, 96, 2, 2)

}  // namespace squeeze
