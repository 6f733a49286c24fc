// Attend of a prefill for keys of 112 and values of 112 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(112, 112, 2, 2)

}  // namespace squeeze
