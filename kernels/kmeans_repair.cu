// No cluster stays empty: the largest ones of a group are cut into equal pieces by token, as many as there are empty clusters.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// Points per piece of a cluster.
struct Claim {
    uint32_t size, pieces, cluster;

    // Of equals the first counts.
    __device__ __forceinline__ bool above(const Claim &other) const {
        const uint64_t a = static_cast<uint64_t>(size) * other.pieces, b = static_cast<uint64_t>(other.size) * pieces;
        return a > b || (a == b && cluster < other.cluster);
    }
};

__device__ __forceinline__ Claim largest(Claim own, Claim *scratch) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        const Claim other = {__shfl_xor_sync(ALL, own.size, d), __shfl_xor_sync(ALL, own.pieces, d), __shfl_xor_sync(ALL, own.cluster, d)};
        if (other.above(own)) own = other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
    __syncthreads();
    own = scratch[0];
    for (int w = 1; w < WARPS; ++w) {
        if (scratch[w].above(own)) own = scratch[w];
    }
    return own;
}

}  // namespace

// Grid: (n_group, n_head). Points are sorted by cluster.
extern "C" __global__ void __launch_bounds__(THREADS) kmeans_repair(const __grid_constant__ Kmeans call) {
    __shared__ uint32_t sums[WARPS];
    __shared__ Claim claims[WARPS];
    const uint32_t head = blockIdx.y, from = first_cluster(call, head, blockIdx.x), to = first_cluster(call, head, blockIdx.x + 1);
    const uint32_t *start = call.start + static_cast<uint64_t>(head) * (call.n_cluster + 1);
    auto size = [&](uint32_t c) { return start[c + 1] - start[c]; };
    uint32_t n_own = 0;
    for (uint32_t c = from + threadIdx.x; c < to; c += THREADS) n_own += size(c) == 0;
    uint32_t left = sum_before<THREADS>(n_own, sums).y;
    if (left == 0) return;

    uint32_t *pieces = call.pieces + static_cast<uint64_t>(head) * call.n_cluster;
    uint32_t *extra = call.extra + static_cast<uint64_t>(head) * call.n_cluster;
    uint32_t *empty = call.empty + static_cast<uint64_t>(head) * call.n_cluster;
    if (threadIdx.x == 0) call.repaired[head] = 1;
    // Each thread knows the largest of its clusters.
    auto best_own = [&]() {
        Claim best = {0, 1, ALL};
        for (uint32_t c = from + threadIdx.x; c < to; c += THREADS) {
            const Claim own = {size(c), pieces[c], c};
            if (own.size > 0 && own.above(best)) best = own;
        }
        return best;
    };
    for (uint32_t c = from + threadIdx.x; c < to; c += THREADS) pieces[c] = 1;
    Claim own = best_own();
    for (; left > 0; --left) {
        const Claim cut = largest(own, claims);
        if (own.cluster == cut.cluster) {
            pieces[cut.cluster] = cut.pieces + 1;
            own = best_own();
        }
    }
    // The first empty clusters go to the first clusters that are cut.
    uint32_t n_empty = 0, n_extra = 0;
    for (uint32_t base = from; base < to; base += THREADS) {
        const uint32_t c = base + threadIdx.x;
        const bool none = c < to && size(c) == 0;
        const uint2 empties = sum_before<THREADS>(none, sums), extras = sum_before<THREADS>(c < to ? pieces[c] - 1 : 0, sums);
        if (none) empty[from + n_empty + empties.x] = c;
        if (c < to) extra[c] = from + n_extra + extras.x;
        n_empty += empties.y, n_extra += extras.y;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const uint32_t *order = call.order + static_cast<uint64_t>(head) * call.n_row;
    uint32_t *label = call.label + static_cast<uint64_t>(head) * call.n_row;
    for (uint32_t base = from + threadIdx.x / 32 * 32; base < to; base += THREADS) {
        for (unsigned cut = __ballot_sync(ALL, base + lane < to && pieces[min(base + lane, to - 1)] > 1); cut != 0; cut &= cut - 1) {
            const uint32_t c = base + __ffs(cut) - 1, n = size(c), first = start[c], parts = pieces[c], more = extra[c];
            for (uint32_t i = lane; i < n; i += 32) {
                const uint32_t piece = static_cast<uint64_t>(i) * parts / n;
                if (piece > 0) label[order[first + i]] = empty[more + piece - 1];
            }
        }
    }
}

}  // namespace squeeze
