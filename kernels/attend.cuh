// Attend: exact softmax attention over the kept keys, sinks and tail, and the estimate of dropped clusters. Each (row, KV head)
// pair gets as many blocks as its share of all tiles demands, whatever the selection was, and they cut its tiles into equal runs.
// Here is how work is shared out and which cells a tile has; attend.cu and attend_any.cuh compute.
#pragma once

#include "common.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 32 * ATTEND_WARPS;
// Parts of a row's keys that rows take turns at.
constexpr uint32_t PARTS = 2;

// Cells of two tiles' keys, one per lane; -1: no such key, or none that the mask shows.
struct Cells {
    const Call &call;
    const Bound *bound;
    const half *mask;
    // Are the cells of `always` that are visible listed?
    bool listed;
    uint32_t row;
    const uint32_t *members;
    const Entry *entries;
    const uint32_t *directory;
    uint32_t n_kept, n_keys;

    __device__ __forceinline__ int visible(uint32_t cell) const {
        if (cell >= call.n_kv || (mask != nullptr && __half2float(mask[cell]) == -INFINITY)) return -1;
        return cell;
    }
    __device__ __forceinline__ int always(uint32_t tile, int lane) const {
        const uint32_t i = tile * TILE + lane;
        if (listed) return static_cast<int>(call.visible[row * call.visible_stride + i]);
        if (bound == nullptr) return i < call.n_kv ? visible(i) : -1;
        return i < bound->n_always ? visible(bound->always[i]) : -1;
    }
    // Members are known to be visible.
    __device__ __forceinline__ int member(uint32_t tile, int lane) const {
        const uint32_t slot = key_of(entries, directory, n_kept, tile);
        return tile * TILE + lane < n_keys ? static_cast<int>(cell_of(*bound, members[slot])) : -1;
    }
};

// First virtual block of each pair, and their number.
struct SharedRuns {
    uint32_t first[MAX_PAIRS + 1];
    uint32_t warp[ATTEND_WARPS];
};

// First virtual block of a pair that has so many tiles before it: each pair gets one, and of the rest its share.
struct Shares {
    uint32_t n_block, rest;
    float per_tile;

    __device__ __forceinline__ Shares(const Call &call, uint32_t n_pair, uint32_t n_tile)
        : n_block(virtual_blocks(call, n_pair, n_tile)), rest(n_block - n_pair), per_tile(static_cast<float>(rest) / max(n_tile, 1u)) {}
    __device__ __forceinline__ uint32_t first(uint32_t pair, uint32_t before) const {
        return pair + min(static_cast<uint32_t>(before * per_tile), rest);
    }
};

// Fills `first` for more pairs than a warp has lanes; returns the number of virtual blocks.
__device__ uint32_t share_out(const Call &call, SharedRuns &shared) {
    const uint32_t n_pair = call.n_row * call.n_head_kv, each = (n_pair + THREADS - 1) / THREADS;
    const uint32_t from = min(threadIdx.x * each, n_pair), to = min(from + each, n_pair);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t sum = 0;
    for (uint32_t i = from; i < to; ++i) {
        const uint32_t n = tiles_of(call.work[i]);
        shared.first[i] = n;
        sum += n;
    }
    const uint32_t all = sum_upto(sum);
    if (lane == 31) shared.warp[warp] = all;
    __syncthreads();
    uint32_t before = all - sum, total = 0;
#pragma unroll
    for (int w = 0; w < ATTEND_WARPS; ++w) {
        if (w < warp) before += shared.warp[w];
        total += shared.warp[w];
    }
    const Shares shares(call, n_pair, total);
    for (uint32_t i = from; i < to; ++i) {
        const uint32_t n = shared.first[i];
        shared.first[i] = shares.first(i, before);
        before += n;
    }
    if (threadIdx.x == 0) shared.first[n_pair] = shares.n_block;
    __syncthreads();
    return shares.n_block;
}

// Last pair whose first virtual block is this one or before it.
__device__ uint32_t pair_of(const uint32_t *first, uint32_t n_pair, uint32_t block) {
    uint32_t low = 0, high = n_pair;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (first[middle] <= block) low = middle;
        else high = middle;
    }
    return low;
}

// Rows of a KV head take turns, a part of each after the other, so that blocks side by side read the same keys from the L2 cache.
// From a virtual block and its pair to the pair and the virtual block whose turn it is.
__device__ uint32_t take_turns(uint32_t n_row, const uint32_t *first, uint32_t pair, uint32_t &block) {
    const uint32_t lane = threadIdx.x % 32, head = pair / n_row * n_row;
    const uint32_t start = lane < n_row ? first[head + lane] : 0, n = lane < n_row ? first[head + lane + 1] - start : 0;
    uint32_t at = block - first[head];
    for (uint32_t part = 0; part < PARTS; ++part) {
        const uint32_t from = n * part / PARTS, own = n * (part + 1) / PARTS - from, upto = sum_upto(own);
        const uint32_t all = __shfl_sync(ALL, upto, 31);
        if (at < all) {
            const int row = __popc(__ballot_sync(ALL, upto <= at));
            block = __shfl_sync(ALL, start + from + at - (upto - own), row);
            return head + row;
        }
        at -= all;
    }
    return pair;
}

// What a block does: `each(pair, virtual block, its work, first tile, number of tiles)` for its runs of tiles. Grid: (n_block).
template <typename Each>
__device__ __forceinline__ void for_each_run(const Call &call, SharedRuns &shared, Each each) {
    const uint32_t n_pair = call.n_row * call.n_head_kv, lane = threadIdx.x % 32;
    // So few pairs each warp counts for itself, a lane per pair.
    const bool few = n_pair <= 32;
    uint32_t n_block, lane_first = 0;
    if (few) {
        const uint32_t own = lane < n_pair ? tiles_of(call.work[lane]) : 0, upto = sum_upto(own);
        const Shares shares(call, n_pair, __shfl_sync(ALL, upto, 31));
        n_block = shares.n_block;
        lane_first = lane < n_pair ? shares.first(lane, upto - own) : n_block;
    } else {
        n_block = share_out(call, shared);
    }
    for (uint32_t block = blockIdx.x; block < n_block; block += gridDim.x) {
        uint32_t pair, first, last, own = block;
        if (few) {
            pair = __popc(__ballot_sync(ALL, lane_first <= block)) - 1;
            first = __shfl_sync(ALL, lane_first, pair);
            last = pair < 31 ? __shfl_sync(ALL, lane_first, pair + 1) : n_block;
        } else {
            pair = pair_of(shared.first, n_pair, block);
            if (call.n_row > 1) pair = take_turns(call.n_row, shared.first, pair, own);
            first = shared.first[pair], last = shared.first[pair + 1];
        }
        // For merge: where a pair's states are.
        if (own == first && threadIdx.x == 0) call.span[pair] = {first, last - first};
        const Work work = call.work[pair];
        const uint32_t n_tile = tiles_of(work), share = n_tile / (last - first), rest = n_tile % (last - first), i = own - first;
        each(pair, own, work, i * share + min(i, rest), share + (i < rest));
    }
}

}  // namespace
}  // namespace squeeze
