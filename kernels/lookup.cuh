// Lookup: scores of every cluster for every query head, and per tile of clusters the softmax's max and sum; the same of the
// sinks, whose scores are exact. Some blocks check meanwhile that the binding still holds. With a coarse level this runs over
// the coarse clusters, and a second lookup over the fine ones of those that select has opened.
//
// ANY: K and V of any type and head size, K and Q perhaps multiplied by a Hadamard matrix, in whose basis the index is not. Without
// it they are F16, of 64 or 128 elements.
#pragma once

#include "format.cuh"

namespace squeeze {
namespace {

// Columns whose queries are in shared memory at a time, and a row's padding there, which spreads rows over the banks.
constexpr uint32_t PASS = 32;
constexpr int THREADS = 32 * LOOKUP_WARPS;
template <int D>
constexpr int PAD = (36 - D / 8) % 8 * 8;
// Whole chunks of four threads, and what is left: 8 bytes of F16 each, or 4, 8 or 12 bytes of variances.
template <int D>
constexpr bool HAS_REST = D % 32 != 0;
template <int D>
constexpr int REST_WORDS = D % 64 / 16;

template <int D, bool DIAG>
struct Shared {
    alignas(16) half q[PASS][D + PAD<D>];
    alignas(16) half squares[DIAG ? PASS : 1][D + PAD<D>];
    // Factor of the spread bonus of a column, and whether its row has this binding, or none and this is the first.
    float factor[PASS];
    bool mine[PASS];
};

// Four variances each of two rows times as many squares.
__device__ __forceinline__ void add_variances(float (&acc)[4], uint32_t x, uint32_t y, uint32_t b0, uint32_t b1) {
    half2 a0, a1, a2, a3;
    widen<0>(x, a0, a2);
    widen<0>(y, a1, a3);
    mma(acc, bits(a0), bits(a1), bits(a2), bits(a3), b0, b1);
}

// Sums of squares times variances: a thread's 16 bytes of chunk 4 j + c are four products.
template <int D>
__device__ __forceinline__ void dot_variances(float (&acc)[4], const uint4 (&a)[2][D / 64], const half *squares, int c) {
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
        const uint4 b0 = *reinterpret_cast<const uint4 *>(squares + 16 * (4 * j + c));
        const uint4 b1 = *reinterpret_cast<const uint4 *>(squares + 16 * (4 * j + c) + 8);
        const uint32_t b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
        const uint32_t rows[2][4] = {{a[0][j].x, a[0][j].y, a[0][j].z, a[0][j].w}, {a[1][j].x, a[1][j].y, a[1][j].z, a[1][j].w}};
#pragma unroll
        for (int i = 0; i < 4; ++i) add_variances(acc, rows[0][i], rows[1][i], b[2 * i], b[2 * i + 1]);
    }
}
// Of what is left: a thread's words are one after the other.
template <int D>
__device__ __forceinline__ void dot_rest(float (&acc)[4], const uint32_t (&a)[2][REST_WORDS<D> + 1], const half *squares, int c) {
#pragma unroll
    for (int i = 0; i < REST_WORDS<D>; ++i) {
        const uint2 b = *reinterpret_cast<const uint2 *>(squares + D / 64 * 64 + 4 * (REST_WORDS<D> * c + i));
        add_variances(acc, a[0][i], a[1][i], b.x, b.y);
    }
}

// Queries on their way to shared memory: of a warp's columns, one after the other.
template <int D>
struct Queries {
    static constexpr int N = (D + 31) / 32;
    float q[N];
    bool mine;

    // A column of the KV head; zeros from `end` on. `z`: the binding whose clusters are scored.
    __device__ __forceinline__ void load(const Call &call, uint32_t head_kv, uint32_t column, uint32_t end, uint32_t z) {
        const int lane = threadIdx.x % 32;
        mine = false;
#pragma unroll
        for (int j = 0; j < N; ++j) q[j] = 0;
        if (column >= end) return;
        const uint32_t row = column / call.group;
        const float *from = query_of(call, row, head_kv * call.group + column % call.group);
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (D % 32 == 0 || lane + 32 * j < D) q[j] = from[lane + 32 * j];
        // Select looks at a dense row's scores before it knows that the row is dense.
        mine = max(call.rows[row], 0) == static_cast<int32_t>(z);
    }
    // Each block's product with the Hadamard matrix, its own inverse: from the basis of a cache to that of the index.
    __device__ __forceinline__ void turn(uint32_t block) {
        if (block == 0) return;
        const int lane = threadIdx.x % 32;
        for (int d = 1; d < min(block, 32u); d *= 2) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float other = __shfl_xor_sync(ALL, q[j], d);
                q[j] = lane & d ? other - q[j] : q[j] + other;
            }
        }
#pragma unroll
        for (int step = 1; step < N; step *= 2) {
            if (32 * step >= block) break;
#pragma unroll
            for (int j = 0; j + step < N; ++j) {
                if (j & step) continue;
                const float low = q[j], high = q[j + step];
                q[j] = low + high, q[j + step] = low - high;
            }
        }
        const float factor = rsqrtf(static_cast<float>(block));
#pragma unroll
        for (int j = 0; j < N; ++j) q[j] *= factor;
    }
    template <bool DIAG>
    __device__ __forceinline__ void store(const Call &call, Shared<D, DIAG> &shared, int i) const {
        const int lane = threadIdx.x % 32;
        float factor = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float own = q[j] * call.scale;
            if (D % 32 == 0 || lane + 32 * j < D) shared.q[i][lane + 32 * j] = __float2half(own);
            factor = DIAG ? fmaxf(factor, own * own) : factor + own * own;
        }
        if (DIAG || call.spread == SPREAD_RADIUS) {
#pragma unroll
            for (int d = 16; d > 0; d /= 2) {
                const float other = __shfl_xor_sync(ALL, factor, d);
                factor = DIAG ? fmaxf(factor, other) : factor + other;
            }
        }
        if (DIAG) {
            // The largest square becomes 1: F16 then holds all that matter.
            const float inverse = factor > 0 ? 1 / factor : 0;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float own = q[j] * call.scale;
                if (D % 32 == 0 || lane + 32 * j < D) shared.squares[i][lane + 32 * j] = __float2half(own * own * inverse);
            }
        }
        if (lane == 0) shared.factor[i] = DIAG ? factor : sqrtf(factor), shared.mine[i] = mine;
    }
};

// Puts the queries of columns `first..end` of the KV head into shared memory, as many as fit, blocks of `block` elements (0: none)
// turned to the index's basis. `meanwhile` is done while the first are on their way.
template <bool ANY, int D, bool DIAG, typename Meanwhile>
__device__ __forceinline__ void stage(const Call &call, Shared<D, DIAG> &shared, uint32_t head_kv, uint32_t first, uint32_t end,
                                      uint32_t z, uint32_t block, Meanwhile meanwhile) {
    const int warp = threadIdx.x / 32;
    const int n = min((end - first + COLUMNS - 1) / COLUMNS * COLUMNS, PASS);
    Queries<D> own, next;
    own.load(call, head_kv, first + warp, end, z);
    next.load(call, head_kv, first + warp + LOOKUP_WARPS, end, z);
    meanwhile();
    // Nobody may still read what the last pass left.
    __syncthreads();
    for (int i = warp; i < n; i += LOOKUP_WARPS) {
        if (ANY) own.turn(block);
        own.template store<DIAG>(call, shared, i);
        own = next;
        next.load(call, head_kv, first + i + 2 * LOOKUP_WARPS, end, z);
    }
    __syncthreads();
}

// Does the row still see every cell of the prefix, and are the guard's keys and a sample of all rows still there? One word per
// block and row.
template <int D, bool ANY>
__device__ void check(const Call &call, const Bound &bound, uint32_t z, uint32_t block) {
    const uint32_t from = static_cast<uint64_t>(bound.layer.n_prefix) * block / CHECK_BLOCKS;
    const uint32_t to = static_cast<uint64_t>(bound.layer.n_prefix) * (block + 1) / CHECK_BLOCKS;
    int changed = 0;
    if (bound.valid != nullptr) changed = *bound.valid == 0;
    if (ANY && block == 0 && bound.guard != nullptr) {
        const uint32_t words = call.k_bytes / 2, cell = min(bound.guard_cell, call.n_kv - 1);
        const uint16_t *was = reinterpret_cast<const uint16_t *>(bound.guard);
        for (uint32_t i = threadIdx.x; i < call.n_head_kv * words; i += blockDim.x) {
            const char *row = keys_of(call, bound.stream, i / words) + cell * call.k.nb1;
            changed |= reinterpret_cast<const uint16_t *>(row)[i % words] != was[i];
        }
    }
    if (!ANY && block == 0 && bound.guard != nullptr) {
        const uint32_t words = D / 2, cell = min(bound.guard_cell, call.n_kv - 1);
        const uint32_t *was = reinterpret_cast<const uint32_t *>(bound.guard);
        for (uint32_t i = threadIdx.x; i < call.n_head_kv * words; i += blockDim.x) {
            const char *row = keys_of(call, bound.stream, i / words) + cell * call.k.nb1;
            changed |= reinterpret_cast<const uint32_t *>(row)[i % words] != was[i];
        }
    }
    if (bound.digests != nullptr && to > from) {
        // Each call goes on where the last one ended: a counter of its own tells every block, however the call is launched.
        const uint32_t turn = bound.turns[block] % (to - from);
#pragma unroll
        for (int i = 0; i < SAMPLE / LOOKUP_WARPS; ++i) {
            const uint32_t t = from + (turn + i * LOOKUP_WARPS + threadIdx.x / 32) % (to - from), cell = cell_of(bound, t);
            // A cell beyond this call's view hides its row below.
            if (cell < call.n_kv) changed |= (ANY ? digest_any(call, bound, t, cell) : digest_of<D>(call, bound, t, cell)) != bound.digests[t];
        }
        __syncthreads();
        if (threadIdx.x == 0) bound.turns[block] = turn + SAMPLE;
    }
    changed = __syncthreads_or(changed);
    if (changed && threadIdx.x == 0 && bound.valid != nullptr) *bound.valid = 0;
    for (uint32_t row = 0; row < call.n_row; ++row) {
        const half *mask = call.seen ? nullptr : mask_of(call, row);
        int hidden = changed;
        if (mask != nullptr && call.rows[row] == static_cast<int32_t>(z)) {
#pragma unroll 8
            for (uint32_t t = from + threadIdx.x; t < to; t += blockDim.x) {
                const uint32_t cell = cell_of(bound, t);
                // Anything but a zero of either sign is no plain view of the cell.
                hidden |= cell >= call.n_kv || (__half_as_ushort(mask[min(cell, call.n_kv - 1)]) & 0x7fff) != 0;
            }
        }
        hidden = __syncthreads_or(hidden);
        if (threadIdx.x == 0) call.check[(z * CHECK_BLOCKS + block) * call.n_row + row] = hidden != 0;
    }
}

// Elements d..d + 4 of a row as F16; what is too large for that is the largest.
__device__ __noinline__ uint2 four_numbers(uint32_t type, const char *row, uint32_t d) {
    float x[4];
    for (int i = 0; i < 4; ++i) {
        x[i] = in_half(number(type, row, d + i));
    }
    return {pack(x[0], x[1]), pack(x[2], x[3])};
}

// Rows of a tile, as left sides: clusters of the index or sinks in the cache.
template <int D, bool DIAG>
struct Tile {
    uint4 a[2][D / 32], v[2][DIAG ? D / 64 : 1];
    uint2 a_rest[2];
    uint32_t v_rest[2][REST_WORDS<D> + 1];
    // Keys that a row stands for (0: no row), and the factor of its spread.
    float count[2], width[2];

    // Row i: a cluster's centroid and spread.
    __device__ __forceinline__ void load_row(const Call &call, const Layer &layer, uint32_t head_kv, int i, uint32_t cluster) {
        const int c = threadIdx.x % 4;
        const uint64_t at = static_cast<uint64_t>(head_kv) * layer.n_cluster + cluster;
        const char *row = reinterpret_cast<const char *>(layer.centroids + at * D) + 16 * c;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) a[i][j] = load_stream(row + 64 * j);
        if (DIAG) {
#pragma unroll
            for (int j = 0; j < D / 64; ++j) v[i][j] = load_stream(layer.variances + at * D + 16 * (4 * j + c));
#pragma unroll
            for (int j = 0; j < REST_WORDS<D>; ++j) {
                const uint8_t *from = layer.variances + at * D + D / 64 * 64 + 4 * (REST_WORDS<D> * c + j);
                v_rest[i][j] = __ldg(reinterpret_cast<const uint32_t *>(from));
            }
        }
        if (HAS_REST<D>) a_rest[i] = __ldg(reinterpret_cast<const uint2 *>(row - 16 * c + 64 * (D / 32) + 8 * c));
        width[i] = DIAG ? layer.variance_scales[at] : call.spread == SPREAD_RADIUS ? layer.radii[at] : 0;
    }

    __device__ __forceinline__ void load_clusters(const Call &call, const Layer &layer, uint32_t head_kv, uint32_t tile) {
        const int r = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t own = min(tile * TILE + r + 8 * i, layer.n_cluster - 1);
            load_row(call, layer, head_kv, i, own);
            const uint32_t *offsets = offsets_of(layer, head_kv) + own;
            count[i] = tile * TILE + r + 8 * i < layer.n_cluster ? static_cast<float>(offsets[1] - offsets[0]) : 0;
        }
    }

    // The clusters of 16 lanes from `base` on (~0: none), and their sizes.
    __device__ __forceinline__ void load_listed(const Call &call, const Layer &layer, uint32_t head_kv, uint32_t cluster, int base) {
        const int r = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t own = __shfl_sync(ALL, cluster, base + r + 8 * i);
            if (own != ALL) load_row(call, layer, head_kv, i, own);
        }
    }
    __device__ __forceinline__ void count_listed(uint32_t size, int base) {
        const int r = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) count[i] = __shfl_sync(ALL, size, base + r + 8 * i);
    }

    template <bool ANY>
    __device__ __forceinline__ void load_sinks(const Call &call, const Bound &bound, uint32_t head_kv, uint32_t tile) {
        const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t own = min(tile * TILE + r + 8 * i, bound.layer.n_sink - 1);
            const char *row = keys_of(call, bound.stream, head_kv) + min(bound.always[own], call.n_kv - 1) * call.k.nb1;
            if constexpr (ANY) {
                Eight own_row[D / 32];
#pragma unroll
                for (int j = 0; j < D / 32; ++j) own_row[j].load(call.k_type, row, 8 * (4 * j + c));
#pragma unroll
                for (int j = 0; j < D / 32; ++j) a[i][j] = own_row[j].numbers(call.k_type, 8 * (4 * j + c));
                if (HAS_REST<D>) a_rest[i] = four_numbers(call.k_type, row, 32 * (D / 32) + 4 * c);
            } else {
#pragma unroll
                for (int j = 0; j < D / 32; ++j) a[i][j] = load_stream(row + 16 * c + 64 * j);
            }
#pragma unroll
            for (int j = 0; j < (DIAG ? D / 64 : 1); ++j) v[i][j] = {0, 0, 0, 0};
            count[i] = tile * TILE + r + 8 * i < bound.layer.n_sink;
            width[i] = 0;
        }
    }
};

// Scores of a tile for the `columns` from `first` on that are in shared memory. `slot` is the tile's place among the partial
// sums.
template <int D, bool DIAG>
__device__ __forceinline__ void score(const Call &call, const Shared<D, DIAG> &shared, const Tile<D, DIAG> &tile, uint64_t first,
                                      uint32_t columns, uint32_t number, uint32_t slot, bool sinks) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const float undo = call.softcap == 0 ? 1.0f : call.softcap;
    const float bonus = call.alpha * undo;
    for (uint32_t t = 0; t < columns; t += COLUMNS) {
        uint4 b[D / 32];
#pragma unroll
        for (int j = 0; j < D / 32; ++j) b[j] = *reinterpret_cast<const uint4 *>(&shared.q[t + r][8 * (4 * j + c)]);
        float x[4] = {}, s[4] = {};
        dot<D>(x, tile.a, b);
        if constexpr (HAS_REST<D>) {
            const uint2 rest = *reinterpret_cast<const uint2 *>(&shared.q[t + r][32 * (D / 32) + 4 * c]);
            mma(x, tile.a_rest[0].x, tile.a_rest[1].x, tile.a_rest[0].y, tile.a_rest[1].y, rest.x, rest.y);
        }
        if constexpr (DIAG) {
            if (!sinks) {
                dot_variances<D>(s, tile.v, shared.squares[t + r], c);
                if constexpr (REST_WORDS<D> > 0) dot_rest<D>(s, tile.v_rest, shared.squares[t + r], c);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float factor = shared.factor[t + 2 * c + h];
            const bool mine = shared.mine[t + 2 * c + h];
            const uint64_t to = first + t + 2 * c + h;
            float y[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float logit = x[2 * i + h] * undo;
                const float spread = DIAG ? sqrtf(s[2 * i + h] * factor * tile.width[i]) : factor * tile.width[i];
                const float score = logit + bonus * spread;
                const bool there = tile.count[i] > 0;
                y[i] = there && isfinite(score) ? score * LOG2E : -INFINITY;
                if (mine && !sinks) {
                    const uint64_t at = to * call.n_cluster + number * TILE + r + 8 * i;
                    call.y[at] = y[i];
                    if (call.x != nullptr) call.x[at] = there && isfinite(logit) ? logit : -INFINITY;
                }
            }
            const uint64_t at = to * (call.n_tile + SINK_TILES) + slot;
            const float m = max_rows(fmaxf(y[0], y[1])), ref = m == -INFINITY ? 0 : m;
            const float l = sum_rows(tile.count[0] * exp2_fast(y[0] - ref) + tile.count[1] * exp2_fast(y[1] - ref));
            if (r == 0 && mine) call.partial[at] = {m, l};
        }
    }
}

// A binding's sinks, for all columns of a KV head. Queries stay in the basis of the keys.
template <bool ANY, int D, bool DIAG>
__device__ void score_sinks(const Call &call, Shared<D, DIAG> &shared, Tile<D, DIAG> &tile, uint32_t z, uint32_t head_kv) {
    const Bound &bound = call.bound[z];
    const uint32_t n_column = call.n_row * call.group, warp = threadIdx.x / 32, n_tile = (bound.layer.n_sink + TILE - 1) / TILE;
    for (uint32_t first = 0; first < n_column; first += PASS) {
        uint32_t t = warp;
        stage<ANY>(call, shared, head_kv, first, n_column, z, 0, [&] {
            if (t < n_tile) tile.template load_sinks<ANY>(call, bound, head_kv, t);
        });
        while (t < n_tile) {
            const uint64_t column = static_cast<uint64_t>(head_kv) * n_column + first;
            score(call, shared, tile, column, min(n_column - first, PASS), t, call.n_tile + t, true);
            t += LOOKUP_WARPS;
            if (t < n_tile) tile.template load_sinks<ANY>(call, bound, head_kv, t);
        }
    }
}

}  // namespace

// Grid: (CHECK_BLOCKS + n_head_kv + lookup_blocks, n_bound).
template <int D, bool DIAG, bool ANY>
__device__ void lookup(const Call &call) {
    __shared__ Shared<D, DIAG> shared;
    const Bound &bound = call.bound[blockIdx.y];
    const Layer &layer = bound.layer;
    const uint32_t n_column = call.n_row * call.group, warp = threadIdx.x / 32;
    Tile<D, DIAG> tile;
    if (blockIdx.x < CHECK_BLOCKS) {
        await_previous(call);
        return check<D, ANY>(call, bound, blockIdx.y, blockIdx.x);
    }
    if (blockIdx.x < CHECK_BLOCKS + call.n_head_kv) {
        await_previous(call);
        return score_sinks<ANY>(call, shared, tile, blockIdx.y, blockIdx.x - CHECK_BLOCKS);
    }
    // An equal run of the tiles of one KV head: queries are fetched once.
    const uint32_t n_tile = (layer.n_cluster + TILE - 1) / TILE, n_block = call.lookup_blocks / call.n_head_kv;
    const uint32_t block = blockIdx.x - CHECK_BLOCKS - call.n_head_kv, own_start = block / n_block * n_tile;
    uint32_t from = own_start + first_tile(block % n_block, n_block, n_tile);
    const uint32_t end = own_start + first_tile(block % n_block + 1, n_block, n_tile), begin = from;
    // The index does not change: its first rows are on their way before the previous kernel is done.
    if (from + warp < min(end, (from / n_tile + 1) * n_tile)) tile.load_clusters(call, layer, from / n_tile, (from + warp) % n_tile);
    await_previous(call);
    while (from < end) {
        const uint32_t head_kv = from / n_tile, start = head_kv * n_tile, to = min(end, start + n_tile);
        for (uint32_t first = 0; first < n_column; first += PASS) {
            uint32_t t = from + warp;
            stage<ANY>(call, shared, head_kv, first, n_column, blockIdx.y, call.k_block, [&] {
                if (t < to && (from != begin || first > 0)) tile.load_clusters(call, layer, head_kv, t - start);
            });
            while (t < to) {
                const uint64_t column = static_cast<uint64_t>(head_kv) * n_column + first;
                score(call, shared, tile, column, min(n_column - first, PASS), t - start, t - start, false);
                t += LOOKUP_WARPS;
                if (t < to) tile.load_clusters(call, layer, head_kv, t - start);
            }
        }
        from = to;
    }
}

// The fine clusters of the opened coarse ones; the list of them is left for select.
// Grid: (n_bound * n_head_kv + pairs * n_part).
template <int D, bool DIAG, bool ANY>
__device__ void lookup_opened(const Call &call) {
    __shared__ Shared<D, DIAG> shared;
    Tile<D, DIAG> tile;
    if (blockIdx.x < call.n_bound * call.n_head_kv) {
        await_previous(call);
        return score_sinks<ANY>(call, shared, tile, blockIdx.x / call.n_head_kv, blockIdx.x % call.n_head_kv);
    }
    const uint32_t block = blockIdx.x - call.n_bound * call.n_head_kv, pair = block / call.n_part, part = block % call.n_part;
    const uint32_t head_kv = pair / call.n_row, row = pair % call.n_row, first = row * call.group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Work work;
    uint32_t t, end, cluster, member, size;
    // Two tiles' clusters, one per lane.
    auto listed = [&](uint32_t from) {
        cluster = key_of(call.opened_entries + static_cast<uint64_t>(pair) * (call.opened_cluster + 1),
                         call.opened_directory + static_cast<uint64_t>(pair) * call.opened_tiles, work.n_kept, from);
        // Other warps list what lies past this one's end.
        if (from * TILE + lane >= work.n_keys || from + lane / TILE >= end) cluster = ALL;
        const uint32_t *offsets = offsets_of(call.bound[work.bound].layer, head_kv) + (cluster == ALL ? 0 : cluster);
        member = offsets[0], size = cluster == ALL ? 0 : offsets[1] - member;
    };
    auto load = [&](int base) { tile.load_listed(call, call.bound[work.bound].layer, head_kv, cluster, base); };
    // Queries are those of the call, done before the kernel before this one was: they need not be waited for.
    stage<ANY>(call, shared, head_kv, first, first + call.group, max(call.rows[row], 0), call.k_block, [&] {
        await_previous(call);
        work = call.opened[pair];
        const uint32_t n_tile = work.bound < 0 ? 0 : (work.n_keys + TILE - 1) / TILE;
        const uint32_t from = first_tile(part, call.n_part, n_tile), n = first_tile(part + 1, call.n_part, n_tile) - from;
        t = from + n * warp / LOOKUP_WARPS, end = from + n * (warp + 1) / LOOKUP_WARPS;
        if (t < end) listed(t), load(0);
    });
    const uint64_t column = static_cast<uint64_t>(pair) * call.group, place = static_cast<uint64_t>(pair) * call.n_cluster + lane;
    uint32_t keys = 0;
    for (uint32_t second = 0; t < end; ++t, second ^= 1) {
        if (!second) {
            keys = size;
            // Select reads whole tiles.
            if (t + lane / TILE < end) {
                call.list[place + t * TILE] = {member, size};
                if (call.ids != nullptr) call.ids[place + t * TILE] = cluster;
            }
        }
        tile.count_listed(keys, second * TILE);
        // What leads to the next rows is fetched while these are on their way.
        if (second && t + 1 < end) listed(t + 1);
        score(call, shared, tile, column, call.group, t, t, false);
        if (t + 1 < end) load(second ? 0 : TILE);
    }
}

#define LOOKUP(NAME, D, DIAG, ANY, BLOCKS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) lookup_##NAME(const __grid_constant__ Call call) {        \
        lookup<D, DIAG, ANY>(call);                                                                                         \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) lookup_opened_##NAME(const __grid_constant__ Call call) { \
        lookup_opened<D, DIAG, ANY>(call);                                                                                  \
    }

}  // namespace squeeze
