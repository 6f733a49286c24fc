// What a prefill hands to its kernels, by value, and what they share. Mirrored in src/attention/cuda/prefill/params.rs.
//
// Rows are put into tiles on the device: those of one tile share a selection per KV head. A tile and KV head is a pair; its
// columns are (row, head of the group), and a panel is PREFILL_COLUMNS of them. Rows without a binding are in dense tiles.
#pragma once

#include "common.cuh"

namespace squeeze {

// Keys or clusters of a step.
constexpr int PREFILL_KEYS = 64;
// Rows of one sequence from which they are tiles, as on the CPU (src/backend/graph.rs).
constexpr uint32_t PREFILL_RUN = 18;
// Steps that an attend block should have.
constexpr uint32_t PREFILL_STEPS = 4;
// Sums of squares are scaled by 2^100: probabilities down to 2^-113 keep their order.
constexpr float SQUARE_SHIFT = 100;
constexpr int SINK_THREADS = 256;

struct QueryTile {
    // -1: dense.
    int32_t bound;
    // Place of its first row in `order`.
    uint32_t first, n_row, stream;
};

struct Prefill {
    // As for decode, but: y and x are [pairs][parts][n_cluster] sums over a panel of squared and of plain probabilities; work,
    // entries and directory are those of pairs, head_kv * own_slots + slot.
    Call call;
    // Rows of a tile and of a dense one at most; tiles and dense tiles of the call at most.
    uint32_t tile, dense_tile, n_slot, n_dense_slot;
    // Those of this part of the call.
    uint32_t first_slot, own_slots, own_dense;
    // Panels of a tile at most; blocks of lookup that share a panel's clusters; blocks of attend.
    uint32_t parts, chunks, n_block;
    // The rows' masks are known to show the whole prefix.
    uint32_t checked;
    uint32_t seen_words;
    uint32_t *hidden;      // [n_row] 1: the row does not see its prefix
    uint32_t *follows;     // [n_row] 1: it sees what the row before sees
    uint32_t *broken;      // [MAX_BOUND][CHECK_BLOCKS] 1: the binding does not hold
    uint32_t *order;       // [2][n_row] all rows, and the dense ones
    QueryTile *tiles;      // [n_slot + n_dense_slot]
    int32_t *tile_bound;   // [n_slot]
    uint32_t *tile_rows;   // [n_slot]
    uint32_t *seen;        // [n_slot + n_dense_slot][seen_words] bits: does a row of the tile see this cell of `always`?
    float2 *partial;       // [pairs][parts][chunks][PREFILL_COLUMNS] max and sum of exp2
    float *sink_mass;      // [pairs][parts][chunks] sum of the sinks' probabilities
    uint32_t *units;       // [pairs, then dense ones, + 1] steps of all panels before a pair's
    float *state;          // [2 n_block][PREFILL_COLUMNS][head_dim_v]
    float2 *norms;         // [2 n_block][PREFILL_COLUMNS] max and sum
    half *sink_keys;       // [MAX_BOUND][n_head_kv][SINK_TILES * TILE][D] in the basis of the index; null: the cache has them so
};

constexpr int PREFILL_BYTES = CALL_BYTES + 160;
static_assert(sizeof(Prefill) == PREFILL_BYTES && sizeof(QueryTile) == 16);

// A pair of this part of the call.
struct Pair {
    uint32_t head_kv;
    // Number of its tile, and its place among `work`; that of a dense one is never used.
    uint32_t slot, work;

    __device__ __forceinline__ Pair(const Prefill &p, uint32_t pair) : work(pair) {
        const uint32_t sparse = p.own_slots * p.call.n_head_kv;
        if (pair < sparse) {
            head_kv = pair / p.own_slots, slot = p.first_slot + pair % p.own_slots;
        } else {
            head_kv = (pair - sparse) / p.own_dense, slot = p.n_slot + (pair - sparse) % p.own_dense;
        }
    }
};

__device__ __forceinline__ uint32_t pairs_of(const Prefill &p) { return (p.own_slots + p.own_dense) * p.call.n_head_kv; }

__device__ __forceinline__ uint32_t parts_of(const Prefill &p, const QueryTile &tile) {
    return (tile.n_row * p.call.group + PREFILL_COLUMNS - 1) / PREFILL_COLUMNS;
}

// Row of a KV head's first sink among `sink_keys`.
__device__ __forceinline__ uint64_t sink_row(const Prefill &p, uint32_t bound, uint32_t head_kv) {
    return (static_cast<uint64_t>(bound) * p.call.n_head_kv + head_kv) * (SINK_TILES * TILE);
}

// Cells always attended.
__device__ __forceinline__ uint32_t always_of(const Prefill &p, const QueryTile &tile) {
    return tile.bound < 0 ? p.call.n_kv : p.call.bound[tile.bound].n_always;
}

__device__ __forceinline__ uint32_t steps_of(uint32_t n) { return (n + PREFILL_KEYS - 1) / PREFILL_KEYS; }

// Attend's blocks cut the steps of all panels into equal runs: panel after panel, pair after pair.
struct Runs {
    uint32_t n_unit, n_block;

    __device__ __forceinline__ explicit Runs(const Prefill &p)
        : n_unit(p.units[pairs_of(p)]), n_block(min(p.n_block, (n_unit + PREFILL_STEPS - 1) / PREFILL_STEPS)) {}
    __device__ __forceinline__ uint32_t start(uint32_t block) const {
        return static_cast<uint64_t>(n_unit) * block / n_block;
    }
    // The block that a unit belongs to.
    __device__ __forceinline__ uint32_t block_of(uint32_t unit) const {
        return ((static_cast<uint64_t>(unit) + 1) * n_block - 1) / n_unit;
    }
};

// A run of steps of one panel.
struct Segment {
    Pair pair;
    QueryTile tile;
    // Panel of the tile, steps of each, the first of the segment, and the unit that the panel begins with.
    uint32_t part, steps, from, start;

    // The one that a unit belongs to. By whole warps.
    __device__ __forceinline__ static uint32_t find(const Prefill &p, uint32_t unit) {
        uint32_t low = 0, high = pairs_of(p);
        while (high - low > 1) {
            const uint32_t step = (high - low + 31) / 32, at = low + (threadIdx.x % 32 + 1) * step;
            low += step * __popc(__ballot_sync(ALL, at < high && p.units[at] <= unit));
            high = min(low + step, high);
        }
        return low;
    }
    __device__ __forceinline__ Segment(const Prefill &p, uint32_t unit, uint32_t number)
        : pair(p, number), tile(p.tiles[pair.slot]) {
        const uint32_t first = p.units[number];
        steps = (p.units[number + 1] - first) / parts_of(p, tile);
        part = (unit - first) / steps;
        from = (unit - first) % steps;
        start = unit - from;
    }
    // The segment at a unit, which exists.
    __device__ __forceinline__ Segment(const Prefill &p, uint32_t unit) : Segment(p, unit, find(p, unit)) {}
};

// Row of a column of a panel; ALL: there is none.
__device__ __forceinline__ uint32_t row_of(const Prefill &p, const QueryTile &tile, uint32_t part, uint32_t column) {
    const uint32_t own = (part * PREFILL_COLUMNS + column) / p.call.group;
    return own < tile.n_row ? p.order[tile.first + own] : ALL;
}
__device__ __forceinline__ uint32_t head_of(const Prefill &p, uint32_t head_kv, uint32_t part, uint32_t column) {
    return head_kv * p.call.group + (part * PREFILL_COLUMNS + column) % p.call.group;
}

__device__ __forceinline__ float *output_of(const Call &call, uint32_t row, uint32_t head) {
    const RowAt at(call, row);
    return reinterpret_cast<float *>(call.dst.data + head * call.dst.nb1 + at.query * call.dst.nb2 + at.stream * call.dst.nb3);
}

}  // namespace squeeze
