// Lookup of a prefill for keys of 96 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(96, 2)

}  // namespace squeeze
