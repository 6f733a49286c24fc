// Attend for keys of 112 and values of 112 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(112, 112, 1, 5)
ATTEND_ANY(112, 112, 2, 3)

}  // namespace squeeze
