// Lookup for keys of 256 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_256, 256, false, true, 3)
LOOKUP(any_256_diag, 256, true, true, 2)

}  // namespace squeeze
