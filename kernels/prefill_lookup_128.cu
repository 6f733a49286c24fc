// Lookup of a prefill for keys of 128 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(128, 2)
PREFILL_LOOKUP_HOPPER(128)

}  // namespace squeeze
