// Attend for keys of 256 and values of 256 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(256, 256, 1, 3)
ATTEND_ANY(256, 256, 2, 2)

}  // namespace squeeze
