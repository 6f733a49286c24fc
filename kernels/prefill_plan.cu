// Before a prefill's selection: does each binding hold, does each row see its prefix, which rows are tiles, and which of the
// cells that are always attended does a tile see at all? And after it: how many steps of attend come before each pair's.
#include "prefill.cuh"

namespace squeeze {
namespace {

constexpr int CHECK_THREADS = 256;
constexpr int PLAN_THREADS = 1024;
// Rows of a call at most, per thread of the plan.
constexpr int EACH = 8;
constexpr int SEEN_WARPS = 8;

__device__ __forceinline__ bool shown(half m) { return (__half_as_ushort(m) & 0x7fff) == 0; }

// Are the guard's keys and a sample of all rows still there? As in the lookup of decode.
__device__ void check_binding(const Prefill &p, uint32_t z, uint32_t block) {
    const Call &call = p.call;
    const Bound &bound = call.bound[z];
    const uint32_t from = static_cast<uint64_t>(bound.layer.n_prefix) * block / CHECK_BLOCKS;
    const uint32_t to = static_cast<uint64_t>(bound.layer.n_prefix) * (block + 1) / CHECK_BLOCKS;
    int changed = 0;
    if (bound.valid != nullptr) changed = *bound.valid == 0;
    if (block == 0 && bound.guard != nullptr) {
        const uint32_t words = call.k_bytes / 2, cell = min(bound.guard_cell, call.n_kv - 1);
        const uint16_t *was = reinterpret_cast<const uint16_t *>(bound.guard);
        for (uint32_t i = threadIdx.x; i < call.n_head_kv * words; i += blockDim.x) {
            const char *row = keys_of(call, bound.stream, i / words) + cell * call.k.nb1;
            changed |= reinterpret_cast<const uint16_t *>(row)[i % words] != was[i];
        }
    }
    if (bound.digests != nullptr && to > from) {
        const uint32_t turn = bound.turns[block] % (to - from);
        for (uint32_t i = threadIdx.x / 32; i < SAMPLE; i += CHECK_THREADS / 32) {
            const uint32_t t = from + (turn + i) % (to - from), cell = cell_of(bound, t);
            if (cell < call.n_kv) changed |= digest_any(call, bound, t, cell) != bound.digests[t];
        }
        __syncthreads();
        if (threadIdx.x == 0) bound.turns[block] = turn + SAMPLE;
    }
    changed = __syncthreads_or(changed);
    if (threadIdx.x != 0) return;
    if (changed && bound.valid != nullptr) *bound.valid = 0;
    p.broken[z * CHECK_BLOCKS + block] = changed != 0;
}

// Does a mask hide a cell of the prefix? The same in every thread.
__device__ bool hides(const Call &call, const Bound &bound, const half *mask) {
    const uint32_t n = bound.layer.n_prefix;
    int hidden = 0;
    uint32_t done = 0;
    if (bound.cells == nullptr) {
        if (bound.first_cell + n > call.n_kv) return true;
        const half *at = mask + bound.first_cell;
        if (reinterpret_cast<uintptr_t>(at) % 16 == 0) {
            done = n / 8 * 8;
#pragma unroll 4
            for (uint32_t i = threadIdx.x; i < n / 8; i += CHECK_THREADS) {
                const uint4 v = reinterpret_cast<const uint4 *>(at)[i];
                hidden |= ((v.x | v.y | v.z | v.w) & 0x7fff7fff) != 0;
            }
        }
    }
#pragma unroll 4
    for (uint32_t t = done + threadIdx.x; t < n; t += CHECK_THREADS) {
        const uint32_t cell = cell_of(bound, t);
        hidden |= cell >= call.n_kv || !shown(mask[min(cell, call.n_kv - 1)]);
    }
    return __syncthreads_or(hidden) != 0;
}

}  // namespace

// Grid: (CHECK_BLOCKS * n_bound + n_row).
extern "C" __global__ void __launch_bounds__(CHECK_THREADS) prefill_check(const __grid_constant__ Prefill p) {
    const Call &call = p.call;
    const uint32_t blocks = CHECK_BLOCKS * call.n_bound;
    if (blockIdx.x < blocks) return check_binding(p, blockIdx.x / CHECK_BLOCKS, blockIdx.x % CHECK_BLOCKS);
    const uint32_t row = blockIdx.x - blocks;
    const int32_t own = call.rows[row];
    const half *mask = mask_of(call, row);
    bool hidden = false, follows = row % call.n_query != 0;
    if (own >= 0 && mask != nullptr) {
        const Bound &bound = call.bound[own];
        hidden = !p.checked && hides(call, bound, mask);
        // A token sees what the token before it in its sequence sees; one of another sequence does not see that token.
        if (follows) {
            const half *before = mask_of(call, row - 1);
            int other = 0;
            for (uint32_t i = threadIdx.x; i < bound.n_always; i += CHECK_THREADS) {
                const uint32_t cell = bound.always[i];
                if (cell < call.n_kv) other |= shown(before[cell]) && !shown(mask[cell]);
            }
            follows = __syncthreads_or(other) == 0;
        }
    }
    if (threadIdx.x == 0) p.hidden[row] = hidden, p.follows[row] = follows;
}

namespace {

// Sums, maxima and minima over the threads before or after one's own.
struct Scan {
    uint32_t (&warps)[32];

    __device__ __forceinline__ uint32_t sum(uint32_t own, uint32_t &total) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t upto = sum_upto(own);
        __syncthreads();
        if (lane == 31) warps[warp] = upto;
        __syncthreads();
        total = __reduce_add_sync(ALL, warps[lane]);
        return upto - own + __reduce_add_sync(ALL, lane < warp ? warps[lane] : 0);
    }
    __device__ __forceinline__ uint32_t max_before(uint32_t own) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t upto = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const uint32_t other = __shfl_up_sync(ALL, upto, d);
            if (lane >= d) upto = max(upto, other);
        }
        __syncthreads();
        if (lane == 31) warps[warp] = upto;
        __syncthreads();
        const uint32_t before = __shfl_up_sync(ALL, upto, 1);
        return max(lane > 0 ? before : 0, __reduce_max_sync(ALL, lane < warp ? warps[lane] : 0));
    }
    __device__ __forceinline__ uint32_t min_after(uint32_t own) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        uint32_t from = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const uint32_t other = __shfl_down_sync(ALL, from, d);
            if (lane + d < 32) from = min(from, other);
        }
        __syncthreads();
        if (lane == 0) warps[warp] = from;
        __syncthreads();
        const uint32_t after = __shfl_down_sync(ALL, from, 1);
        return min(lane < 31 ? after : ALL, __reduce_min_sync(ALL, lane > warp ? warps[lane] : ALL));
    }
};

}  // namespace

// Tiles of the whole call. Runs of rows of one stream, binding and sequence are cut as on the CPU: the last row alone, the
// others into as few tiles as there can be; short runs into single rows. Rows past the last slot are dense. One block.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS) prefill_plan(const __grid_constant__ Prefill p) {
    __shared__ uint32_t warps[32];
    __shared__ uint32_t broken[MAX_BOUND];
    const Call &call = p.call;
    const uint32_t n = call.n_row, each = (n + PLAN_THREADS - 1) / PLAN_THREADS, from = threadIdx.x * each, to = min(from + each, n);
    Scan scan = {warps};
    if (threadIdx.x < MAX_BOUND) {
        uint32_t any = 0;
        if (threadIdx.x < call.n_bound)
            for (int i = 0; i < CHECK_BLOCKS; ++i) any |= p.broken[threadIdx.x * CHECK_BLOCKS + i];
        broken[threadIdx.x] = any;
    }
    for (uint32_t i = threadIdx.x; i < p.n_slot + p.n_dense_slot; i += PLAN_THREADS) {
        p.tiles[i] = {-1, 0, 0, 0};
        if (i < p.n_slot) p.tile_bound[i] = -1, p.tile_rows[i] = 0;
    }
    __syncthreads();
    auto binding = [&](uint32_t row) {
        const int32_t own = call.n_bound > 0 ? call.rows[row] : -1;
        return own < 0 || broken[own] != 0 || p.hidden[row] != 0 ? -1 : own;
    };
    auto starts = [&](uint32_t row) {
        return row % call.n_query == 0 || binding(row - 1) != binding(row) || p.follows[row] == 0;
    };
    // First row of the last run that starts here (plus 1), and the first row that ends one.
    int32_t own[EACH];
    uint32_t first = 0, last = ALL;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint32_t row = from + i;
        own[i] = row < to ? binding(row) : -1;
        if (own[i] >= 0 && starts(row)) first = row + 1;
    }
#pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
        const uint32_t row = from + i;
        if (own[i] >= 0 && (row + 1 == n || binding(row + 1) != own[i] || starts(row + 1))) last = row;
    }
    uint32_t run_first = scan.max_before(first), run_last[EACH], after = scan.min_after(last);
#pragma unroll
    for (int i = EACH - 1; i >= 0; --i) {
        const uint32_t row = from + i;
        if (own[i] >= 0 && (row + 1 == n || binding(row + 1) != own[i] || starts(row + 1))) after = row;
        run_last[i] = after;
    }
    // Rows of the tile that starts at a row; 0: none does.
    uint32_t rows[EACH], n_start = 0, total;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint32_t row = from + i;
        rows[i] = 0;
        if (own[i] < 0) continue;
        if (starts(row)) run_first = row + 1;
        const uint32_t at = row + 1 - run_first, all = run_last[i] - row + at, most = max(p.tile, 1u);
        rows[i] = 1;
        if (all + 1 >= PREFILL_RUN && most > 1 && at < all) {
            const uint32_t n_tile = (all + most - 1) / most, tile = (at * n_tile + all - 1) / all, start = all * tile / n_tile;
            rows[i] = start == at ? all * (tile + 1) / n_tile - start : 0;
        }
        n_start += rows[i] > 0;
    }
    uint32_t slot = scan.sum(n_start, total);
    bool dense[EACH];
    uint32_t n_dense = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint32_t row = from + i;
        if (rows[i] > 0) {
            if (slot < p.n_slot) {
                p.tiles[slot] = {own[i], row, rows[i], row / call.n_query};
                p.tile_bound[slot] = own[i], p.tile_rows[slot] = rows[i];
            }
            slot += 1;
        }
        dense[i] = row < to && (own[i] < 0 || slot > p.n_slot);
        n_dense += dense[i];
        if (row < to) p.order[row] = row;
    }
    // What is known of the rows is no longer needed: number of dense rows before each stream.
    uint32_t *before = p.hidden, at = scan.sum(n_dense, total);
    uint32_t place = at;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const uint32_t row = from + i;
        if (row < to && row % call.n_query == 0) before[row / call.n_query] = place;
        if (dense[i]) p.order[n + place++] = row;
    }
    __syncthreads();
    uint32_t n_dense_start = 0, all;
    place = at;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (dense[i]) n_dense_start += (place++ - before[(from + i) / call.n_query]) % p.dense_tile == 0;
    uint32_t dense_slot = scan.sum(n_dense_start, all);
    place = at;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (!dense[i]) continue;
        const uint32_t stream = (from + i) / call.n_query;
        if ((place - before[stream]) % p.dense_tile == 0) {
            const uint32_t end = (stream + 1) * call.n_query < n ? before[stream + 1] : total;
            p.tiles[p.n_slot + dense_slot++] = {-1, n + place, min(p.dense_tile, end - place), stream};
        }
        place += 1;
    }
}

// Grid: (n_slot + n_dense_slot, blocks that share a tile's cells).
extern "C" __global__ void __launch_bounds__(32 * SEEN_WARPS) prefill_seen(const __grid_constant__ Prefill p) {
    __shared__ uint32_t seen[2][SEEN_WARPS];
    const Call &call = p.call;
    const QueryTile tile = p.tiles[blockIdx.x];
    const uint32_t n = tile.n_row == 0 ? 0 : always_of(p, tile);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int turn = 0;
    for (uint32_t word = blockIdx.y; word * 32 < n; word += gridDim.y, turn ^= 1) {
        const uint32_t i = word * 32 + lane;
        uint32_t cell = i < n ? i : ALL;
        if (tile.bound >= 0 && i < n) cell = call.bound[tile.bound].always[i];
        bool any = false;
        if (cell < call.n_kv) {
#pragma unroll 16
            for (uint32_t r = warp; r < tile.n_row; r += SEEN_WARPS)
                any |= __half_as_ushort(mask_of(call, p.order[tile.first + r])[cell]) != 0xfc00;
        }
        const uint32_t bits = __ballot_sync(ALL, any);
        if (lane == 0) seen[turn][warp] = bits;
        __syncthreads();
        if (warp == 0) {
            const uint32_t all = __reduce_or_sync(ALL, lane < SEEN_WARPS ? seen[turn][lane] : 0);
            if (lane == 0) p.seen[static_cast<uint64_t>(blockIdx.x) * p.seen_words + word] = all;
        }
    }
}

// One block.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS) prefill_share(const __grid_constant__ Prefill p) {
    __shared__ uint32_t warps[32];
    const uint32_t n = pairs_of(p), each = (n + PLAN_THREADS - 1) / PLAN_THREADS;
    const uint32_t from = min(threadIdx.x * each, n), to = min(from + each, n);
    auto units = [&](uint32_t i) -> uint32_t {
        const Pair pair(p, i);
        const QueryTile tile = p.tiles[pair.slot];
        if (tile.n_row == 0) return 0;
        const uint32_t members = tile.bound < 0 ? 0 : p.call.work[pair.work].n_keys;
        return (steps_of(always_of(p, tile)) + steps_of(members)) * parts_of(p, tile);
    };
    uint32_t sum = 0, total;
    for (uint32_t i = from; i < to; ++i) sum += units(i);
    Scan scan = {warps};
    uint32_t before = scan.sum(sum, total);
    for (uint32_t i = from; i < to; ++i) {
        p.units[i] = before;
        before += units(i);
    }
    if (threadIdx.x == 0) p.units[n] = total;
}

}  // namespace squeeze
