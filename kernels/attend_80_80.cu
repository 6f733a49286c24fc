// Attend for keys of 80 and values of 80 elements.
#include "attend_any.cuh"

namespace squeeze {

ATTEND_ANY(80, 80, 1, 5)
ATTEND_ANY(80, 80, 2, 4)

}  // namespace squeeze
