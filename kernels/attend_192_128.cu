// Attend for keys of 192 and values of 128 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(192, 128, 1, 5)
ATTEND_ANY(192, 128, 2, 3)

}  // namespace squeeze
