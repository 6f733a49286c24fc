// Attend for keys of 128 and values of 128 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(128, 128, 1, 5)
ATTEND_ANY(128, 128, 2, 3)

}  // namespace squeeze
