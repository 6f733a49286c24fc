// Attend for keys of 96 and values of 96 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(96, 96, 1, 5)
ATTEND_ANY(96, 96, 2, 4)

}  // namespace squeeze
