// Lookup of a prefill for keys of 192 elements.
#include "prefill_lookup.cuh"

namespace squeeze {

PREFILL_LOOKUP(192, 1)

}  // namespace squeeze
