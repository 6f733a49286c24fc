// Directions of clusters: where they start, the mean of their points, and which coarse clusters are around one.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, NEAR_THREADS = 128;

// SplitMix64, as src/random.rs has it.
__device__ __forceinline__ uint64_t split_mix(uint64_t state) {
    uint64_t z = state + 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

__device__ __forceinline__ uint32_t group_of(const Kmeans &call, uint32_t head, uint32_t cluster) {
    uint32_t low = 0, high = call.n_group;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        (first_cluster(call, head, middle) <= cluster ? low : high) = middle;
    }
    return low;
}

}  // namespace

// Each cluster starts at a point of its own: the group's points are cut into as many equal parts as it has clusters, and a
// random one is taken out of each. Grid of this and of `update`: (n_cluster / WARPS, n_head); a warp per cluster.
template <int D>
__device__ void begin(const Kmeans &call) {
    const uint32_t cluster = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (cluster >= call.n_cluster) return;
    const uint32_t group = group_of(call, head, cluster), first = first_cluster(call, head, group);
    const uint32_t *starts = call.group_start + head * (call.n_group + 1) + group;
    const uint64_t size = starts[1] - starts[0], n = first_cluster(call, head, group + 1) - first, i = cluster - first;
    const uint32_t from = i * size / n, width = (i + 1) * size / n - from;
    const uint64_t own = split_mix(call.seed ^ (static_cast<uint64_t>(call.layer) << 32 | (call.first_head + head)));
    const uint64_t random = split_mix(own ^ (static_cast<uint64_t>(call.n_cluster) << 32 | cluster));
    const uint32_t point = starts[0] + from + __umulhi(static_cast<uint32_t>(random >> 32), width);
    const uint32_t row = row_of(call, call.order, head, point);
    const Part<D> part = Part<D>::of(call.unit + (static_cast<uint64_t>(head) * call.n_row + row) * D);
    part.put(call.direction + (static_cast<uint64_t>(head) * call.n_cluster + cluster) * D);
}

// The normalised mean of the points; points that cancel out leave a direction where it was.
template <int D>
__device__ void update(const Kmeans &call) {
    const uint32_t cluster = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (cluster >= call.n_cluster) return;
    const uint32_t *start = call.start + static_cast<uint64_t>(head) * (call.n_cluster + 1) + cluster;
    const half *unit = call.unit + static_cast<uint64_t>(head) * call.n_row * D;
    float2 sum[D / 64] = {};
    each_row<D>(
        call.order + static_cast<uint64_t>(head) * call.n_row, start[0], start[1],
        [&](uint32_t row) { return unit + static_cast<uint64_t>(row) * D; },
        [&](const Part<D> &part) {
#pragma unroll
            for (int i = 0; i < D / 64; ++i) {
                const float2 x = part.two(i);
                sum[i].x += x.x, sum[i].y += x.y;
            }
        });
    float squares = 0;
#pragma unroll
    for (int i = 0; i < D / 64; ++i) squares += sum[i].x * sum[i].x + sum[i].y * sum[i].y;
    const float norm = sqrtf(sum_lanes(squares));
    if (norm == 0) return;
    Part<D> part;
#pragma unroll
    for (int i = 0; i < D / 64; ++i) part.words[i] = pack(sum[i].x / norm, sum[i].y / norm);
    part.put(call.direction + (static_cast<uint64_t>(head) * call.n_cluster + cluster) * D);
}

// The n_near clusters whose directions are nearest to each cluster's, itself among them. Grid: (n_cluster, n_head).
template <int D>
__device__ void near(const Kmeans &call) {
    __shared__ float own[D], scratch[NEAR_THREADS / 32];
    __shared__ uint32_t which[NEAR_THREADS / 32], found[NEAR];
    const uint32_t cluster = blockIdx.x, head = blockIdx.y;
    const half *directions = call.direction + static_cast<uint64_t>(head) * call.n_cluster * D;
    for (int d = threadIdx.x; d < D; d += NEAR_THREADS) own[d] = __half2float(directions[static_cast<uint64_t>(cluster) * D + d]);
    float last = INFINITY;
    uint32_t last_at = cluster;
    for (uint32_t i = 1; i < call.n_near; ++i) {
        __syncthreads();
        // The best behind the last one: dots are computed again rather than kept.
        float best = -INFINITY;
        uint32_t at = ALL;
        for (uint32_t other = threadIdx.x; other < call.n_cluster; other += NEAR_THREADS) {
            const uint4 *row = reinterpret_cast<const uint4 *>(directions + static_cast<uint64_t>(other) * D);
            float x = 0;
            for (int j = 0; j < D / 8; ++j) {
                const uint4 v = row[j];
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float2 two = __half22float2(*reinterpret_cast<const half2 *>(&words[k]));
                    x += two.x * own[8 * j + 2 * k] + two.y * own[8 * j + 2 * k + 1];
                }
            }
            const bool behind = other != cluster && (x < last || (x == last && other > last_at));
            if (behind && x > best) best = x, at = other;
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
            const float x = __shfl_xor_sync(ALL, best, d);
            const uint32_t where = __shfl_xor_sync(ALL, at, d);
            if (x > best || (x == best && where < at)) best = x, at = where;
        }
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = best, which[threadIdx.x / 32] = at;
        __syncthreads();
        best = scratch[0], at = which[0];
        for (int w = 1; w < NEAR_THREADS / 32; ++w) {
            if (scratch[w] > best || (scratch[w] == best && which[w] < at)) best = scratch[w], at = which[w];
        }
        last = best, last_at = at;
        if (threadIdx.x == 0) found[i] = at;
    }
    if (threadIdx.x > 0) return;
    found[0] = cluster;
    uint32_t *out = call.near + (static_cast<uint64_t>(head) * call.n_cluster + cluster) * call.n_near;
    for (uint32_t i = 0; i < call.n_near; ++i) {
        uint32_t j = i;
        for (; j > 0 && out[j - 1] > found[i]; --j) out[j] = out[j - 1];
        out[j] = found[i];
    }
}

#define CENTRE(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) kmeans_begin_##D(const __grid_constant__ Kmeans call) { begin<D>(call); } \
    extern "C" __global__ void __launch_bounds__(THREADS) kmeans_update_##D(const __grid_constant__ Kmeans call) { update<D>(call); } \
    extern "C" __global__ void __launch_bounds__(NEAR_THREADS) kmeans_near_##D(const __grid_constant__ Kmeans call) { near<D>(call); }
CENTRE(64)
CENTRE(128)

}  // namespace squeeze
