// Lookup of a prefill for keys of 80 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(80, 2)

}  // namespace squeeze
