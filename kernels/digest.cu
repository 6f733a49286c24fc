// Digest: what the rows of a binding's tokens are, for the checks of later calls.
#include "common.cuh"

namespace squeeze {
namespace {

constexpr int WARPS = 4;

}  // namespace

// Of the call's first binding. Grid: (tokens / WARPS); a warp per token.
extern "C" __global__ void __launch_bounds__(32 * WARPS) digest(const __grid_constant__ Call call) {
    const Bound &bound = call.bound[0];
    const uint32_t token = blockIdx.x * WARPS + threadIdx.x / 32;
    if (token >= bound.layer.n_prefix) return;
    const uint64_t own = digest_any(call, bound, token, cell_of(bound, token));
    if (threadIdx.x % 32 == 0) bound.digests[token] = own;
}

}  // namespace squeeze
