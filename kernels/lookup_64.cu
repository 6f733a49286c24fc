// Lookup for keys of 64 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_64, 64, false, true, 7)
LOOKUP(any_64_diag, 64, true, true, 6)

}  // namespace squeeze
