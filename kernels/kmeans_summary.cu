// What the index stores of each cluster, from the raw rows in the cache. Sums in F64, over the members in ascending order, as on
// the CPU.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Below this the largest variance of a cluster counts as none.
constexpr double NO_VARIANCE = 1e-12;

template <int D>
struct Sum {
    double x[D / 32] = {};

    __device__ __forceinline__ void add(const Part<D> &part) {
#pragma unroll
        for (int i = 0; i < D / 64; ++i) {
            const float2 two = part.two(i);
            x[2 * i] += static_cast<double>(two.x), x[2 * i + 1] += static_cast<double>(two.y);
        }
    }
    __device__ __forceinline__ void divide(uint32_t n) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) x[i] /= n;
    }
    __device__ __forceinline__ void put(half *row) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) row[lane * (D / 32) + i] = __double2half(x[i]);
    }
};

// Points of a head, and those of a cluster.
struct Run {
    const uint32_t *order;
    uint32_t from, to;
    __device__ __forceinline__ Run(const Kmeans &call, uint32_t head, uint32_t first, uint32_t end) {
        const uint32_t *start = call.start + static_cast<uint64_t>(head) * (call.n_cluster + 1);
        order = call.order + static_cast<uint64_t>(head) * call.n_row, from = start[first], to = start[end];
    }
};

}  // namespace

// Centroids, variances, radii and members. Grid of this and of `mean_values`: (n_cluster / WARPS, n_head); a warp per cluster.
template <int D>
__device__ void summary(const Kmeans &call) {
    const uint32_t cluster = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    const int lane = threadIdx.x % 32;
    if (cluster >= call.n_cluster) return;
    const Run run(call, head, cluster, cluster + 1);
    const uint32_t n = run.to - run.from;
    const uint64_t at = static_cast<uint64_t>(head) * call.n_cluster + cluster;
    auto key = [&](uint32_t row) { return key_at(call, head, row + call.n_sink); };
    Sum<D> mean, variance;
    each_row<D>(run.order, run.from, run.to, key, [&](const Part<D> &part) { mean.add(part); });
    mean.divide(n);
    mean.put(call.centroids + at * D);
    each_row<D>(run.order, run.from, run.to, key, [&](const Part<D> &part) {
#pragma unroll
        for (int i = 0; i < D / 64; ++i) {
            const float2 two = part.two(i);
            const double a = two.x - mean.x[2 * i], b = two.y - mean.x[2 * i + 1];
            variance.x[2 * i] += a * a, variance.x[2 * i + 1] += b * b;
        }
    });
    variance.divide(n);
    double largest = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) largest = fmax(largest, variance.x[i]), sum += variance.x[i];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {
        largest = fmax(largest, __shfl_xor_sync(ALL, largest, d));
        sum += __shfl_xor_sync(ALL, sum, d);
    }
    const float scale = largest < NO_VARIANCE ? 0.0f : static_cast<float>(largest / 255);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
        const double code = scale > 0 ? fmin(round(variance.x[i] / static_cast<double>(scale)), 255.0) : 0.0;
        call.variances[at * D + lane * (D / 32) + i] = static_cast<uint8_t>(code);
    }
    if (lane == 0) {
        call.variance_scales[at] = scale;
        call.radii[at] = static_cast<float>(sqrt(sum / D));
    }
    for (uint32_t p = run.from + lane; p < run.to; p += 32) {
        call.members[static_cast<uint64_t>(head) * call.n_row + p] = run.order[p] + call.n_sink;
    }
}

template <int D>
__device__ void mean_values(const Kmeans &call) {
    const uint32_t cluster = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (cluster >= call.n_cluster) return;
    const Run run(call, head, cluster, cluster + 1);
    Sum<D> mean;
    each_row<D>(
        run.order, run.from, run.to, [&](uint32_t row) { return value_at(call, head, row + call.n_sink); },
        [&](const Part<D> &part) { mean.add(part); });
    mean.divide(run.to - run.from);
    mean.put(call.mean_values + (static_cast<uint64_t>(head) * call.n_cluster + cluster) * D);
}

#define SUMMARY(D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) kmeans_summary_##D(const __grid_constant__ Kmeans call) { summary<D>(call); } \
    extern "C" __global__ void __launch_bounds__(THREADS) kmeans_mean_values_##D(const __grid_constant__ Kmeans call) {         \
        mean_values<D>(call);                                                                                                   \
    }
SUMMARY(64)
SUMMARY(128)

}  // namespace squeeze
