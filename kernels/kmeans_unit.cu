// Rows of the cache to keys of unit length, and a look for infinities and NaNs.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int WARPS = 8;

template <int D>
__device__ __forceinline__ bool finite(const Part<D> &part) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < D / 64; ++i) all &= (part.words[i] & 0x7c00) != 0x7c00 && (part.words[i] & 0x7c000000) != 0x7c000000;
    return all;
}

}  // namespace

// Grid: (n_prefix / WARPS, n_head); a warp per token.
template <int D>
__device__ void unit(const Kmeans &call) {
    const uint32_t token = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (token >= call.n_prefix) return;
    Part<D> part = Part<D>::of(key_at(call, head, token));
    if (!finite<D>(part)) atomicMin(&call.broken[0], token);
    if (token < call.n_sink) return part.put(call.sinks + (static_cast<uint64_t>(head) * call.n_sink + token) * D);
    if (token - call.n_sink >= call.n_row) return;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < D / 64; ++i) {
        const float2 x = part.two(i);
        squares += x.x * x.x + x.y * x.y;
    }
    const float norm = sqrtf(sum_lanes(squares));
#pragma unroll
    for (int i = 0; i < D / 64; ++i) {
        const float2 x = part.two(i);
        if (norm > 0) part.words[i] = pack(x.x / norm, x.y / norm);
    }
    part.put(call.unit + (static_cast<uint64_t>(head) * call.n_row + token - call.n_sink) * D);
}

// The same grid.
template <int D>
__device__ void values(const Kmeans &call) {
    const uint32_t token = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (token >= call.n_prefix) return;
    if (!finite<D>(Part<D>::of(value_at(call, head, token)))) atomicMin(&call.broken[1], token);
}

#define UNIT(D)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) kmeans_unit_##D(const __grid_constant__ Kmeans call) { \
        unit<D>(call);                                                                                              \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) kmeans_values_##D(const __grid_constant__ Kmeans call) { \
        values<D>(call);                                                                                            \
    }
UNIT(64)
UNIT(128)

}  // namespace squeeze
