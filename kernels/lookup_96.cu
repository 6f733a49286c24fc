// Lookup for keys of 96 elements of any type.
#include "lookup.cuh"

namespace squeeze {

LOOKUP(any_96, 96, false, true, 6)
LOOKUP(any_96_diag, 96, true, true, 4)

}  // namespace squeeze
