// Lookup of a prefill: scores of a panel's columns with every cluster, twice, since there is no room for them. The first pass
// leaves the max and sum of each column's softmax, with the exact scores of the sinks, the second one sums probabilities over
// the columns: one number per panel and cluster, from which select makes the tile's mean.
#pragma once

#include "format.cuh"
#include "prefill_mma.cuh"

namespace squeeze {
namespace {

enum class Pass { SUMS, SQUARES, MASS };

// In the place of -inf: differences stay numbers.
constexpr float LOWEST = -1e30f;
// Largest number of F16 that the reciprocal of a query's largest number may become.
constexpr float INVERSE_MAX = 60000;

template <class Path, int D, bool DIAG>
struct Layout {
    // Steps between two meetings of all threads.
    static constexpr int GROUP = Path::MT == 1 && !DIAG ? 2 : 1;
    static constexpr int STAGES = Path::MT == 1 ? 2 * GROUP : DIAG || D > 128 ? 2 : 3;
    // Steps whose sizes and sums are kept.
    static constexpr int SLOTS = 2 * GROUP;
    static constexpr int QUERIES = PREFILL_COLUMNS * PADDED<D> * 2, KEYS = PREFILL_KEYS * PADDED<D> * 2;
    static constexpr int BYTES = DIAG ? PREFILL_KEYS * PADDED<D> : 0;
    static constexpr int STAGE = KEYS + BYTES;
    // Variances as F16; sizes and spreads of steps; sums of steps by warp, of squares and plain.
    static constexpr int VARIANCES = QUERIES + STAGES * STAGE, COUNTS = VARIANCES + (DIAG ? KEYS : 0);
    static constexpr int SUMS = COUNTS + SLOTS * 2 * PREFILL_KEYS * 4, WARPS = Path::THREADS / 32;
};

// Four bytes as F16.
__device__ __forceinline__ uint2 widened(uint32_t bytes) {
    half2 low, high;
    widen<0>(bytes, low, high);
    return {bits(low), bits(high)};
}

// Sums of 16 numbers over the 8 threads that share c; a thread ends with those of keys 8 t + 2c and the next, t being the bits
// of its r in falling order.
__device__ __forceinline__ float2 sum_columns(float (&v)[8][2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 4; n > 0; n /= 2) {
        const bool high = (lane / 4 & n) != 0;
#pragma unroll
        for (int t = 0; t < n; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float other = __shfl_xor_sync(ALL, high ? v[t][e] : v[t + n][e], 4 * n);
                v[t][e] = (high ? v[t + n][e] : v[t][e]) + other;
            }
    }
    return {v[0][0], v[0][1]};
}

}  // namespace

// Grid: (chunks * parts, own_slots, n_head_kv).
template <class Path, int D, bool DIAG, Pass PASS>
__device__ void lookup_panel(const Prefill &p) {
    using Own = Layout<Path, D, DIAG>;
    // Sums of one step, in floats.
    constexpr int STEP_SUMS = Own::WARPS * PREFILL_KEYS * (PASS == Pass::MASS ? 2 : 1);
    constexpr int GROUP = Own::GROUP, SLOTS = Own::SLOTS;
    // Threads that share a row, of which some may have no chunk of it.
    constexpr int MT = Path::MT, THREADS = Path::THREADS, CHUNKS = D / 8, LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32, ROWS = THREADS / LANES;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Call &call = p.call;
    const uint32_t chunk = blockIdx.x % p.chunks, part = blockIdx.x / p.chunks, head_kv = blockIdx.z;
    const QueryTile tile = p.tiles[p.first_slot + blockIdx.y];
    if (tile.bound < 0 || part >= parts_of(p, tile)) return;
    const Bound &bound = call.bound[tile.bound];
    const Layer &layer = bound.layer;
    const uint64_t pair = static_cast<uint64_t>(head_kv) * p.own_slots + blockIdx.y, panel = pair * p.parts + part;
    const uint32_t columns = min(tile.n_row * call.group - part * PREFILL_COLUMNS, PREFILL_COLUMNS);
    const uint32_t sink_steps = steps_of(layer.n_sink), n_step = sink_steps + steps_of(layer.n_cluster);
    const uint32_t begin = static_cast<uint64_t>(n_step) * chunk / p.chunks;
    const uint32_t from = PASS == Pass::SQUARES ? max(begin, sink_steps) : begin, to = static_cast<uint64_t>(n_step) * (chunk + 1) / p.chunks;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    unsigned char *base = memory + (Path::ALIGNMENT - shared_address(memory) % Path::ALIGNMENT) % Path::ALIGNMENT;
    const uint32_t q = shared_address(base), stages = q + Own::QUERIES, variances = q + Own::VARIANCES;
    float *counts = reinterpret_cast<float *>(base + Own::COUNTS), *sums = reinterpret_cast<float *>(base + Own::SUMS);

    // Sinks in the cache, or as `sinks` has left them.
    const bool as_they_are = p.sink_keys == nullptr;
    const char *keys = as_they_are ? keys_of(call, bound.stream, head_kv)
                                   : reinterpret_cast<const char *>(p.sink_keys + sink_row(p, tile.bound, head_kv) * D);
    const uint64_t first_cluster = static_cast<uint64_t>(head_kv) * layer.n_cluster;
    const int chunk16 = threadIdx.x % LANES, first_row = threadIdx.x / LANES;
    const bool has_chunk = CHUNKS == LANES || chunk16 < CHUNKS;
    // Rows of a thread that lie a multiple of 8 apart have the same place in the swizzle.
    const uint32_t own_chunk = chunk_at<PREFILL_KEYS>(stages, first_row, chunk16);
    const uint32_t other_chunk = chunk_at<PREFILL_KEYS>(stages, first_row + ROWS, chunk16) - ROWS * 128;
    auto row_at = [&](int i) { return (ROWS % 8 != 0 && i % 2 != 0 ? other_chunk : own_chunk) + i * ROWS * 128; };
    const char *centroids = reinterpret_cast<const char *>(layer.centroids + (first_cluster + first_row) * D) + 16 * chunk16;
    auto fetch = [&](uint32_t step, uint32_t stage) {
        if (step < to) {
            const uint32_t at = stages + stage * Own::STAGE, from_start = stage * Own::STAGE;
            if (has_chunk && step < sink_steps) {
#pragma unroll
                for (int i = 0; i < PREFILL_KEYS / ROWS; ++i) {
                    const uint32_t sink = step * PREFILL_KEYS + first_row + i * ROWS;
                    const bool there = sink < layer.n_sink;
                    const uint32_t own = there ? sink : 0;
                    const char *row = keys + (as_they_are ? min(bound.always[own], call.n_kv - 1) * call.k.nb1 : own * (2 * D));
                    copy_chunk(row_at(i) + from_start, row + 16 * chunk16, there);
                }
            } else if (has_chunk) {
                const uint32_t first = (step - sink_steps) * PREFILL_KEYS;
                const char *rows = centroids + static_cast<uint64_t>(first) * (2 * D);
                const int left = layer.n_cluster - first - first_row;
#pragma unroll
                for (int i = 0; i < PREFILL_KEYS / ROWS; ++i)
                    copy_chunk(row_at(i) + from_start, rows + i * ROWS * 2 * D, i * ROWS < left);
            }
            if constexpr (DIAG) {
#pragma unroll
                for (int i = 0; i < (PREFILL_KEYS * D / 16 + THREADS - 1) / THREADS; ++i) {
                    const int unit = threadIdx.x + i * THREADS, row = unit / (D / 16);
                    if (unit >= PREFILL_KEYS * D / 16) break;
                    const uint32_t cluster = (step - sink_steps) * PREFILL_KEYS + row;
                    const bool there = step >= sink_steps && cluster < layer.n_cluster;
                    copy_chunk(at + Own::KEYS + 16 * unit, layer.variances + (first_cluster + (there ? cluster : 0)) * D + 16 * (unit % (D / 16)), there);
                }
            }
        }
        commit_copies();
    };
    // Size and spread of a group's clusters, a thread each.
    const uint32_t own_step = threadIdx.x / PREFILL_KEYS, own_key = threadIdx.x % PREFILL_KEYS;
    float count = 0, width = 0;
    auto fetch_counts = [&](uint32_t group) {
        const uint32_t step = group + own_step;
        if (own_step >= GROUP || step >= to) return;
        count = width = 0;
        if (step < sink_steps) {
            count = step * PREFILL_KEYS + own_key < layer.n_sink;
            return;
        }
        const uint32_t cluster = (step - sink_steps) * PREFILL_KEYS + own_key;
        if (cluster >= layer.n_cluster) return;
        const uint32_t *offsets = offsets_of(layer, head_kv) + cluster;
        count = static_cast<float>(offsets[1] - offsets[0]);
        if (DIAG) width = layer.variance_scales[first_cluster + cluster];
        else if (call.spread == SPREAD_RADIUS) width = layer.radii[first_cluster + cluster];
    };
    // Stages of steps that are asked for at once, and groups that are asked for before the first is needed.
    constexpr int EARLY = Own::STAGES / GROUP - 1;
#pragma unroll
    for (int s = 0; s < EARLY * GROUP; ++s) fetch(from + s, s);
    fetch_counts(from);

    // Scores are for exp2, without the soft-cap. Of each column: the largest number or the sum of squares, for the spread.
    const float plain = (call.softcap == 0 ? 1.0f : call.softcap) * LOG2E;
    load_queries<THREADS, D>(p, head_kv, tile, part, base, 0, PREFILL_COLUMNS, threadIdx.x, plain, call.k_block,
                             [&](int column, int own_lane, Quads<D> &own) {
        float size = 0;
        own.each([&](float x) {
            // One row's numbers must not spoil the tile's means.
            x = fminf(fmaxf(x, -HALF_MAX), HALF_MAX);
            size = DIAG ? fmaxf(size, fabsf(x)) : fmaf(x, x, size);
            return x;
        });
#pragma unroll
        for (int d = Quads<D>::LANES / 2; d > 0; d /= 2) {
            const float other = __shfl_xor_sync(ALL, size, d);
            size = DIAG ? fmaxf(size, other) : size + other;
        }
        if (own_lane == 0) sums[column] = size;
    });
    __syncthreads();
    const float bonus = call.alpha;
    const bool spreads = DIAG || call.spread == SPREAD_RADIUS;
    float factor[MT][2], m[MT][2], l[MT][2];
    half2 inverse[MT][2];
    // p = exp2(y - norm); squares are exp2(2 y - 2 norm + shift).
    float norm[MT][2];
    const bool squared = tile.n_row > 1;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t column = Path::first_row() + 16 * i + r + 8 * h;
            const float size = sums[column];
            if (DIAG) {
                const half inv = __float2half(size > 0 ? fminf(1 / size, INVERSE_MAX) : 0);
                const float back = __half2float(inv);
                inverse[i][h] = __half2half2(inv);
                factor[i][h] = back > 0 ? 1 / (back * back) : 0;
            } else {
                factor[i][h] = bonus * sqrtf(size);
            }
            m[i][h] = LOWEST, l[i][h] = 0, norm[i][h] = INFINITY;
            if (PASS != Pass::SUMS && column < columns) {
                const float2 *partial = p.partial + panel * p.chunks * PREFILL_COLUMNS + column;
                float top = LOWEST, sum = 0;
                for (uint32_t j = 0; j < p.chunks; ++j) top = fmaxf(top, partial[j * PREFILL_COLUMNS].x);
                for (uint32_t j = 0; j < p.chunks; ++j) {
                    const float2 own = partial[j * PREFILL_COLUMNS];
                    sum += own.y * exp2_fast(own.x - top);
                }
                if (sum > 0) norm[i][h] = top + log2f(sum);
            }
        }
    typename Path::template Queries<D, DIAG> own_queries;
    typename Path::template Squares<D> own_squares;
    own_queries.load(q, Path::first_row());
    if (DIAG) own_squares.load(q, Path::first_row(), inverse);
    float sink_mass = 0;
    const bool works = Path::works(columns);
    // What a group's steps have left per warp becomes one number per cluster.
    auto add_up = [&](uint32_t group) {
        const uint32_t step = group + own_step;
        if (own_step >= GROUP || step >= to || step < sink_steps) return;
        const uint32_t cluster = (step - sink_steps) * PREFILL_KEYS + own_key;
        if (cluster >= layer.n_cluster) return;
        const float *own = sums + step % SLOTS * STEP_SUMS + own_key;
        float sum = 0, mass = 0;
#pragma unroll
        for (int w = 0; w < Own::WARPS; ++w) {
            sum += own[w * PREFILL_KEYS];
            if (PASS == Pass::MASS) mass += own[(Own::WARPS + w) * PREFILL_KEYS];
        }
        call.y[panel * call.n_cluster + cluster] = sum;
        if (PASS == Pass::MASS) call.x[panel * call.n_cluster + cluster] = mass;
    };
    uint32_t first_stage = Own::STAGES - GROUP;
    for (uint32_t group = from; group < to; group += GROUP) {
        // Those of the group before, which are no longer read.
        const uint32_t free_stage = first_stage;
        first_stage = first_stage + GROUP == Own::STAGES ? 0 : first_stage + GROUP;
        if (own_step < GROUP) {
            float *own = counts + (group + own_step) % SLOTS * (2 * PREFILL_KEYS) + own_key;
            own[0] = count, own[PREFILL_KEYS] = width;
        }
        await_copies<(EARLY - 1) * GROUP>();
        Path::publish();
        __syncthreads();
#pragma unroll
        for (int s = 0; s < GROUP; ++s) fetch(group + EARLY * GROUP + s, free_stage + s);
        fetch_counts(group + GROUP);
        if (PASS != Pass::SUMS && group > from) add_up(group - GROUP);
#pragma unroll 1
        for (uint32_t step = group; step < min(group + GROUP, to); ++step) {
            const uint32_t stage = first_stage + step - group;
            if constexpr (DIAG) {
                const uint32_t at = stage * Own::STAGE + Own::QUERIES + Own::KEYS;
#pragma unroll
                for (int i = 0; i < (PREFILL_KEYS * D / 16 + THREADS - 1) / THREADS; ++i) {
                    const int unit = threadIdx.x + i * THREADS, row = unit / (D / 16), two = unit % (D / 16) * 2;
                    if (unit >= PREFILL_KEYS * D / 16) break;
                    const uint4 bytes = *reinterpret_cast<const uint4 *>(base + at + 16 * unit);
                    const uint2 w[4] = {widened(bytes.x), widened(bytes.y), widened(bytes.z), widened(bytes.w)};
                    unsigned char *to16 = base + Own::VARIANCES;
                    *reinterpret_cast<uint4 *>(to16 + chunk_at<PREFILL_KEYS>(0, row, two)) = {w[0].x, w[0].y, w[1].x, w[1].y};
                    *reinterpret_cast<uint4 *>(to16 + chunk_at<PREFILL_KEYS>(0, row, two + 1)) = {w[2].x, w[2].y, w[3].x, w[3].y};
                }
                Path::publish();
                __syncthreads();
            }
            if (!works) {
                if (PASS != Pass::SUMS && step >= sink_steps) {
#pragma unroll
                    for (int pass = 0; pass < (PASS == Pass::MASS ? 2 : 1); ++pass) {
                        float *own = sums + step % SLOTS * STEP_SUMS + (pass * Own::WARPS + warp) * PREFILL_KEYS;
                        own[lane] = own[lane + 32] = 0;
                    }
                }
                continue;
            }
            const bool sinks = step < sink_steps, partly = sinks || (step + 1 == n_step);
            const float *own_counts = counts + step % SLOTS * (2 * PREFILL_KEYS), *widths = own_counts + PREFILL_KEYS;
            float s[MT][8][4];
            Path::template scores<D>(s, own_queries, stages + stage * Own::STAGE);
            if constexpr (DIAG) {
                float wide[MT][8][4];
                Path::template scores<D>(wide, own_squares, variances);
#pragma unroll
                for (int t = 0; t < 8; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float own = widths[8 * t + 2 * c + e];
#pragma unroll
                        for (int i = 0; i < MT; ++i)
#pragma unroll
                            for (int h = 0; h < 2; ++h)
                                s[i][t][2 * h + e] += bonus * sqrtf(wide[i][t][2 * h + e] * own * factor[i][h]);
                    }
            } else if (spreads) {
#pragma unroll
                for (int t = 0; t < 8; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float own = widths[8 * t + 2 * c + e];
#pragma unroll
                        for (int i = 0; i < MT; ++i)
#pragma unroll
                            for (int h = 0; h < 2; ++h) s[i][t][2 * h + e] += factor[i][h] * own;
                    }
            }
            if (partly) {
                // Centroids are finite, keys in the cache need not be.
#pragma unroll
                for (int t = 0; t < 8; ++t)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const bool there = own_counts[8 * t + 2 * c + e % 2] > 0;
#pragma unroll
                        for (int i = 0; i < MT; ++i) s[i][t][e] = there && fabsf(s[i][t][e]) < -LOWEST ? s[i][t][e] : LOWEST;
                    }
            }
            if constexpr (PASS == Pass::SUMS) {
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float top = m[i][h], sum = 0;
#pragma unroll
                        for (int t = 0; t < 8; ++t) top = fmaxf(top, fmaxf(s[i][t][2 * h], s[i][t][2 * h + 1]));
#pragma unroll
                        for (int t = 0; t < 8; ++t) {
                            const float2 n = *reinterpret_cast<const float2 *>(own_counts + 8 * t + 2 * c);
                            sum += n.x * exp2_fast(s[i][t][2 * h] - top);
                            sum += n.y * exp2_fast(s[i][t][2 * h + 1] - top);
                        }
                        l[i][h] = l[i][h] * exp2_fast(m[i][h] - top) + sum;
                        m[i][h] = top;
                    }
            } else if (sinks) {
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int t = 0; t < 8; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) sink_mass += exp2_fast(s[i][t][e] - norm[i][e / 2]);
            } else {
#pragma unroll
                for (int pass = 0; pass < (PASS == Pass::MASS ? 2 : 1); ++pass) {
                    const bool twice = pass == 0 && squared;
                    const float times = twice ? 2.0f : 1.0f;
                    float v[8][2];
#pragma unroll
                    for (int t = 0; t < 8; ++t) v[t][0] = v[t][1] = 0;
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const float less = twice ? 2 * norm[i][h] - SQUARE_SHIFT : norm[i][h];
#pragma unroll
                            for (int t = 0; t < 8; ++t)
#pragma unroll
                                for (int e = 0; e < 2; ++e) v[t][e] += exp2_fast(fmaf(times, s[i][t][2 * h + e], -less));
                        }
                    const float2 all = sum_columns(v);
                    float *own = sums + step % SLOTS * STEP_SUMS + (pass * Own::WARPS + warp) * PREFILL_KEYS;
                    *reinterpret_cast<float2 *>(own + 8 * r + 2 * c) = all;
                }
            }
        }
    }
    if constexpr (PASS == Pass::SUMS) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = fmaxf(m[i][h], __shfl_xor_sync(ALL, m[i][h], 1));
                top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
                float sum = l[i][h] * exp2_fast(m[i][h] - top);
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                const int column = Path::first_row() + 16 * i + r + 8 * h;
                if (c == 0) p.partial[(panel * p.chunks + chunk) * PREFILL_COLUMNS + column] = {top, sum};
            }
    } else {
        __syncthreads();
        if (to > from) add_up(from + (to - from - 1) / GROUP * GROUP);
        if (PASS == Pass::MASS) {
#pragma unroll
            for (int d = 16; d > 0; d /= 2) sink_mass += __shfl_xor_sync(ALL, sink_mass, d);
            __syncthreads();
            if (lane == 0) sums[warp] = sink_mass;
            __syncthreads();
            if (threadIdx.x == 0) {
                float all = 0;
                for (int w = 0; w < Own::WARPS; ++w) all += sums[w];
                p.sink_mass[panel * p.chunks + chunk] = all;
            }
        }
    }
}

// The sinks' keys as F16 in the basis of the index, for caches of other types or in another basis. Grid: (n_bound, n_head_kv).
template <int D>
__device__ void turn_sinks(const Prefill &p) {
    using Row = Quads<D>;
    const Call &call = p.call;
    const Bound &bound = call.bound[blockIdx.x];
    const char *keys = keys_of(call, bound.stream, blockIdx.y);
    half *to = p.sink_keys + sink_row(p, blockIdx.x, blockIdx.y) * D;
    const int lane = threadIdx.x % Row::LANES, n = (bound.layer.n_sink + 1) / 2 * 2;
    for (int sink = threadIdx.x / Row::LANES; sink < n; sink += SINK_THREADS / Row::LANES) {
        const bool there = sink < static_cast<int>(bound.layer.n_sink);
        const char *row = keys + min(bound.always[there ? sink : 0], call.n_kv - 1) * call.k.nb1;
        Row own;
#pragma unroll
        for (int j = 0; j < Row::N; ++j) {
            own.x[j] = {0, 0, 0, 0};
            const uint32_t at = 4 * (lane + Row::LANES * j);
            if (own.there(lane, j))
                own.x[j] = {number(call.k_type, row, at), number(call.k_type, row, at + 1), number(call.k_type, row, at + 2),
                            number(call.k_type, row, at + 3)};
        }
        own.turn(call.k_block, lane);
        own.each([](float x) { return in_half(x); });
#pragma unroll
        for (int j = 0; j < Row::N; ++j)
            if (there && own.there(lane, j))
                *reinterpret_cast<uint2 *>(to + sink * D + 4 * (lane + Row::LANES * j)) = {pack(own.x[j].x, own.x[j].y), pack(own.x[j].z, own.x[j].w)};
    }
}

#define LOOKUP(PATH, NAME, D, DIAG, BLOCKS, KIND, PASS)                                              \
    extern "C" __global__ void __launch_bounds__(PATH::THREADS, BLOCKS) prefill_lookup_##NAME##_##KIND( \
        const __grid_constant__ Prefill p) {                                                         \
        lookup_panel<PATH, D, DIAG, PASS>(p);                                                        \
    }
#define LOOKUPS(PATH, NAME, D, DIAG, BLOCKS)                     \
    LOOKUP(PATH, NAME, D, DIAG, BLOCKS, sums, Pass::SUMS)        \
    LOOKUP(PATH, NAME, D, DIAG, BLOCKS, squares, Pass::SQUARES) \
    LOOKUP(PATH, NAME, D, DIAG, BLOCKS, mass, Pass::MASS)
// Without and with the spread by dimension, and the sinks.
#define PREFILL_LOOKUP(D, BLOCKS)                                                                                      \
    LOOKUPS(Portable, D, D, false, BLOCKS)                                                                             \
    LOOKUPS(Portable, D##_diag, D, true, BLOCKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(SINK_THREADS) prefill_sinks_##D(const __grid_constant__ Prefill p) { \
        turn_sinks<D>(p);                                                                                              \
    }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PREFILL_LOOKUP_HOPPER(D)                     \
    LOOKUPS(Hopper, D##_hopper, D, false, 2)         \
    LOOKUPS(Hopper, D##_diag_hopper, D, true, 1)
#else
#define PREFILL_LOOKUP_HOPPER(D)
#endif

}  // namespace squeeze
