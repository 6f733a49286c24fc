// Attend for keys of 192 and values of 192 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(192, 192, 1, 4)
ATTEND_ANY(192, 192, 2, 2)

}  // namespace squeeze
