// Lookup of a prefill for keys of 256 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(256, 1)

}  // namespace squeeze
