// What the kernels of K-means share. One launch works on the same step of several KV heads of a layer, those of a batch: heads
// have no part in each other. Mirrored field by field in src/build/cuda/params.rs, whose tests compare sizes.
//
// Rows are the clustered keys of a head, numbered from 0 (token S); points are rows in an order: sorted by cluster, or without
// an order n_point rows at even distances. Groups are runs of points that are compared with the same clusters.
#pragma once

#include "common.cuh"

namespace squeeze {

// Groups whose clusters a point is compared with, at most.
constexpr int NEAR = 16;
// Points of a tile of the comparison.
constexpr int POINTS = 128;
// Bits of a label that one pass of the sort orders by, and points of one of its blocks.
constexpr int DIGIT_BITS = 8;
constexpr int CHUNK = 4096;

// Addresses are of the batch's first head; the next head's lie as many elements further as an array has per head.
struct Kmeans {
    // [n_kv][n_head_kv] rows of the cache: bytes between cells, and between heads.
    const char *k, *v;
    uint64_t k_cell, k_head, v_cell, v_head;
    const uint32_t *cells;      // [n_prefix] cell of each token
    half *unit;                 // [n_row][D] keys of unit length
    half *sinks;                // [n_sink][D] raw keys
    uint32_t *broken;           // [2] first token with an infinity or a NaN in K, in V, of any head
    uint32_t *label;            // [n_row]
    // [n_row] points; null: at even distances. Where a pass of the sort reads and writes them.
    uint32_t *order;
    const uint32_t *from;
    uint32_t *to;
    uint32_t *digits;           // [1 << DIGIT_BITS][n_chunk] counts, then places
    uint32_t *start;            // [n_cluster + 1] first point of each cluster
    uint32_t *repaired;         // [1] 1: clusters that were empty have been filled, and points are no longer in order
    uint32_t *pieces;           // [n_cluster] what a cluster is cut into
    uint32_t *extra;            // [n_cluster] number of its first further piece
    uint32_t *empty;            // [n_cluster] clusters for these
    half *direction;            // [n_cluster][D] of unit length
    // [n_group + 1] first cluster of each group; null: one group.
    const uint32_t *bounds;
    uint32_t *group_start;      // [n_group + 1] first point of each group
    uint2 *tiles;               // [max_tiles] group, first point
    uint32_t *n_tile;           // [1]
    uint32_t *near;             // [n_group][n_near] groups around each group, ascending; null: itself
    unsigned long long *products;  // [1] comparisons of a point with a cluster
    // What the index stores, [n_cluster] rows each but for the last: [n_row] tokens.
    half *centroids, *mean_values;
    uint8_t *variances;
    float *variance_scales, *radii;
    uint32_t *members;
    uint64_t seed;
    uint32_t layer, first_head, n_head;
    uint32_t n_prefix, n_sink, n_row, n_point;
    uint32_t n_cluster, n_group, n_near, max_tiles, n_chunk;
    // Lowest bit of the pass; 1: only heads that were repaired are sorted.
    uint32_t shift, again;
    // 1: groups are those of the clusters that points are sorted by, 0: points are in one group or sorted by group.
    uint32_t nested;
    // Comparisons that the tiles stand for.
    uint32_t times;
};
constexpr int KMEANS_BYTES = 336;
static_assert(sizeof(Kmeans) == KMEANS_BYTES);

// Row of a point.
__device__ __forceinline__ uint32_t row_of(const Kmeans &call, const uint32_t *order, uint32_t head, uint32_t point) {
    if (order != nullptr) return order[static_cast<uint64_t>(head) * call.n_row + point];
    return static_cast<uint64_t>(point) * call.n_row / call.n_point;
}

__device__ __forceinline__ uint32_t first_cluster(const Kmeans &call, uint32_t head, uint32_t group) {
    return call.bounds != nullptr ? call.bounds[head * (call.n_group + 1) + group] : group * call.n_cluster;
}

__device__ __forceinline__ const char *key_at(const Kmeans &call, uint32_t head, uint32_t token) {
    return call.k + call.cells[token] * call.k_cell + head * call.k_head;
}
__device__ __forceinline__ const char *value_at(const Kmeans &call, uint32_t head, uint32_t token) {
    return call.v + call.cells[token] * call.v_cell + head * call.v_head;
}

// A lane's share of a row: D / 32 elements.
template <int D>
struct Part {
    uint32_t words[D / 64];

    static __device__ __forceinline__ Part of(const void *row) {
        Part part;
        const int lane = threadIdx.x % 32;
        if constexpr (D == 128) {
            const uint2 v = *(reinterpret_cast<const uint2 *>(row) + lane);
            part.words[0] = v.x, part.words[1] = v.y;
        } else {
            part.words[0] = *(reinterpret_cast<const uint32_t *>(row) + lane);
        }
        return part;
    }
    __device__ __forceinline__ void put(void *row) const {
        const int lane = threadIdx.x % 32;
        if constexpr (D == 128) {
            *(reinterpret_cast<uint2 *>(row) + lane) = {words[0], words[1]};
        } else {
            *(reinterpret_cast<uint32_t *>(row) + lane) = words[0];
        }
    }
    __device__ __forceinline__ float2 two(int i) const { return __half22float2(*reinterpret_cast<const half2 *>(&words[i])); }
};

__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(ALL, v, d);
    return v;
}

// Sum of what the threads before this one bring, and of all; `scratch` has a word per warp.
template <int THREADS>
__device__ __forceinline__ uint2 sum_before(uint32_t own, uint32_t *scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t upto = sum_upto(own);
    __syncthreads();
    if (lane == 31) scratch[warp] = upto;
    __syncthreads();
    uint32_t before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) {
        before += w < warp ? scratch[w] : 0;
        all += scratch[w];
    }
    return {before + upto - own, all};
}

// Calls `use(row)` with the lane's part of each row of a run of points, in their order.
template <int D, typename At, typename Use>
__device__ __forceinline__ void each_row(const uint32_t *points, uint32_t from, uint32_t to, At at, Use use) {
    // Rows on their way at a time.
    constexpr int FLIGHT = 8;
    const int lane = threadIdx.x % 32;
    for (uint32_t base = from; base < to; base += 32) {
        const uint32_t own = points[min(base + lane, to - 1)], n = min(to - base, 32u);
        for (uint32_t i = 0; i < n; i += FLIGHT) {
            Part<D> part[FLIGHT];
#pragma unroll
            for (int f = 0; f < FLIGHT; ++f) {
                const uint32_t row = __shfl_sync(ALL, own, min(i + f, n - 1));
                if (i + f < n) part[f] = Part<D>::of(at(row));
            }
#pragma unroll
            for (int f = 0; f < FLIGHT; ++f) {
                if (i + f < n) use(part[f]);
            }
        }
    }
}

}  // namespace squeeze
