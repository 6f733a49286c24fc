// Points sorted by cluster, those of a cluster by row: a radix sort, one digit of the labels per pass, lowest first. Each pass
// keeps the order of equal digits, so that the result does not depend on how blocks and warps take turns.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, BINS = 1 << DIGIT_BITS, SCAN_THREADS = 1024;
static_assert(BINS == THREADS);
constexpr int EACH = CHUNK / THREADS;

__device__ __forceinline__ bool idle(const Kmeans &call, uint32_t head) { return call.again && !call.repaired[head]; }

// Point `i` of a block's warp, and its digit.
struct Own {
    uint32_t row, digit;
    bool there;

    __device__ __forceinline__ Own(const Kmeans &call, uint32_t head, int i) {
        const uint32_t at = blockIdx.x * CHUNK + threadIdx.x / 32 * (32 * EACH) + i * 32 + threadIdx.x % 32;
        there = at < call.n_point;
        row = there ? row_of(call, call.from, head, at) : 0;
        digit = there ? call.label[static_cast<uint64_t>(head) * call.n_row + row] >> call.shift & (BINS - 1) : BINS;
    }
};

}  // namespace

// How many points of a chunk have each digit. Grid of this and of `scatter`: (n_chunk, n_head).
extern "C" __global__ void __launch_bounds__(THREADS) kmeans_count(const __grid_constant__ Kmeans call) {
    __shared__ uint32_t count[BINS];
    const uint32_t head = blockIdx.y;
    if (idle(call, head)) return;
    if (!call.again && blockIdx.x == 0 && threadIdx.x == 0) call.repaired[head] = 0;
    count[threadIdx.x] = 0;
    __syncthreads();
    for (int i = 0; i < EACH; ++i) {
        const Own own(call, head, i);
        if (own.there) atomicAdd(&count[own.digit], 1);
    }
    __syncthreads();
    call.digits[(static_cast<uint64_t>(head) * BINS + threadIdx.x) * call.n_chunk + blockIdx.x] = count[threadIdx.x];
}

// Counts become the place of the first such point. Grid: (n_head).
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) kmeans_scan(const __grid_constant__ Kmeans call) {
    __shared__ uint32_t scratch[SCAN_THREADS / 32];
    const uint32_t head = blockIdx.x, n = BINS * call.n_chunk;
    if (idle(call, head)) return;
    uint32_t *digits = call.digits + static_cast<uint64_t>(head) * n;
    uint32_t before = 0;
    for (uint32_t base = 0; base < n; base += SCAN_THREADS) {
        const uint32_t at = base + threadIdx.x;
        const uint2 sum = sum_before<SCAN_THREADS>(at < n ? digits[at] : 0, scratch);
        if (at < n) digits[at] = before + sum.x;
        before += sum.y;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) kmeans_scatter(const __grid_constant__ Kmeans call) {
    __shared__ uint32_t count[WARPS][BINS];
    const uint32_t head = blockIdx.y;
    if (idle(call, head)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int w = 0; w < WARPS; ++w) count[w][threadIdx.x] = 0;
    __syncthreads();
    // Of equal digits: those of the warp before this one, counted as they come.
    uint32_t row[EACH], digit[EACH], rank[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const Own own(call, head, i);
        row[i] = own.row, digit[i] = own.digit;
        const uint32_t same = __match_any_sync(ALL, own.digit);
        uint32_t before = 0;
        if (own.there) before = count[warp][own.digit];
        rank[i] = before + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (own.there && lane == __ffs(same) - 1) count[warp][own.digit] = before + __popc(same);
        __syncwarp();
    }
    __syncthreads();
    uint32_t place = call.digits[(static_cast<uint64_t>(head) * BINS + threadIdx.x) * call.n_chunk + blockIdx.x];
    for (int w = 0; w < WARPS; ++w) {
        const uint32_t n = count[w][threadIdx.x];
        count[w][threadIdx.x] = place;
        place += n;
    }
    __syncthreads();
    uint32_t *to = call.to + static_cast<uint64_t>(head) * call.n_row;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (digit[i] < BINS) to[count[warp][digit[i]] + rank[i]] = row[i];
    }
}

// Where each cluster begins among the sorted points. Grid: (n_point / THREADS, n_head).
extern "C" __global__ void __launch_bounds__(THREADS) kmeans_start(const __grid_constant__ Kmeans call) {
    const uint32_t at = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y;
    if (at >= call.n_point || idle(call, head)) return;
    const uint32_t *order = call.order + static_cast<uint64_t>(head) * call.n_row;
    const uint32_t *label = call.label + static_cast<uint64_t>(head) * call.n_row;
    uint32_t *start = call.start + static_cast<uint64_t>(head) * (call.n_cluster + 1);
    const uint32_t own = label[order[at]];
    for (uint32_t c = at > 0 ? label[order[at - 1]] + 1 : 0; c <= own; ++c) start[c] = at;
    if (at + 1 == call.n_point) {
        for (uint32_t c = own + 1; c <= call.n_cluster; ++c) start[c] = call.n_point;
    }
}

}  // namespace squeeze
