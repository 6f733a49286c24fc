// Lookup of a prefill for keys of 64 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(64, 2)
PREFILL_LOOKUP_HOPPER(64)

}  // namespace squeeze
