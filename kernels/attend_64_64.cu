// Attend for keys of 64 and values of 64 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(64, 64, 1, 6)
ATTEND_ANY(64, 64, 2, 4)

}  // namespace squeeze
