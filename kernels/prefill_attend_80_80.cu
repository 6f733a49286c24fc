// Attend of a prefill for keys of 80 and values of 80 elements.
#include "prefill_attend_any.cuh"

namespace squeeze {

PREFILL_ATTEND(80, 80, 2, 2)

}  // namespace squeeze
