// Lookup of a prefill for keys of 112 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(112, 2)

}  // namespace squeeze
