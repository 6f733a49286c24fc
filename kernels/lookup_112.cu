// Lookup for keys of 112 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_112, 112, false, true, 5)
LOOKUP(any_112_diag, 112, true, true, 4)

}  // namespace squeeze
