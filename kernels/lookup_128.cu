// Lookup for keys of 128 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_128, 128, false, true, 5)
LOOKUP(any_128_diag, 128, true, true, 4)

}  // namespace squeeze
