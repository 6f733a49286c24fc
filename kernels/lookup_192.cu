// Lookup for keys of 192 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_192, 192, false, true, 4)
LOOKUP(any_192_diag, 192, true, true, 3)

}  // namespace squeeze
