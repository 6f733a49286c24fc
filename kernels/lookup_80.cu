// Lookup for keys of 80 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_80, 80, false, true, 6)
LOOKUP(any_80_diag, 80, true, true, 5)

}  // namespace squeeze
