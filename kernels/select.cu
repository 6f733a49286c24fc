// Select: from scores to the kept clusters of one (row, KV head), and their keys laid out as tiles for attend.
//
// A thread holds E neighbouring clusters in registers. The cut is found in two steps: a histogram of the keys, weighted by
// what the clusters stand for, names the bin that holds it; the bin's few clusters are then ranked against each other.
//
// With a coarse level it runs twice: COARSE ranks coarse clusters by keys and lists the fine clusters of those that it opens,
// as if they were keys; OPENED ranks the fine clusters that lookup found there.
//
// TILE is for the tiles of a prefill (prefill.cuh), which stand in the place of rows: lookup has summed their probabilities, of
// each of `group` panels, into y (and x). Then `check` is the tiles' [n_row] numbers of rows, `n_part` the heads per KV head,
// and `dropped` [pairs][group][n_dropped] sums of the sinks' probabilities, as floats.
#include "common.cuh"

namespace squeeze {
namespace {

constexpr int MAX_WARPS = 32;
constexpr int THREADS_MIN = 256;
constexpr int BINS = 2048;
// Bins of plain scores, 2 percent wide, 64 octaves to either side of 0; what lies beyond is in the outermost ones.
constexpr int SCORE_BINS = 4096;
constexpr int OCTAVE_BINS = 32;
// Those of probabilities are 2^17 float bits wide, 0.8 to 1.6 percent; the last one ends at 1.
constexpr int BIN_SHIFT = 17;
constexpr int FIRST_BIN = (0x3f800000 >> BIN_SHIFT) - BINS + 1;
// Clusters of the cut's bin that are ranked directly.
constexpr int CANDIDATES = 512;
// Undoes what sums of squares are scaled by (prefill.cuh).
constexpr float SQUARE_ROOT_SCALE = 0x1p-50f;
// Kept clusters that are listed in shared memory first.
constexpr uint32_t ROOM = 4096;

// ALONE: FLAT for groups of one head and a budget. Its scores need not be normalised: they are in the right order as they are.
enum class Level { FLAT, ALONE, COARSE, OPENED, TILE };

struct Shared {
    union {
        struct {
            alignas(16) uint32_t histogram[SCORE_BINS];
            uint32_t key[CANDIDATES], index[CANDIDATES], weight[CANDIDATES];
        };
        Entry list[ROOM];
    };
    uint32_t warp[2][MAX_WARPS];
    float2 partial[MAX_WARPS];
    uint32_t bin, above, n_candidate, least, last;
};

// Exclusive sums over the block, of two numbers at once.
__device__ __forceinline__ void scan(Shared &shared, uint32_t &a, uint32_t &b, uint32_t &a_total, uint32_t &b_total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warp = blockDim.x / 32;
    const uint32_t x = sum_upto(a), y = sum_upto(b);
    if (lane == 31) shared.warp[0][warp] = x, shared.warp[1][warp] = y;
    __syncthreads();
    const uint32_t of_x = lane < n_warp ? shared.warp[0][lane] : 0, of_y = lane < n_warp ? shared.warp[1][lane] : 0;
    a_total = __reduce_add_sync(ALL, of_x);
    b_total = __reduce_add_sync(ALL, of_y);
    a = x - a + __reduce_add_sync(ALL, lane < warp ? of_x : 0);
    b = y - b + __reduce_add_sync(ALL, lane < warp ? of_y : 0);
}

// The bin in which the sum from the largest down reaches `want`; the sum above it goes to `above`. ALL if no bin does.
template <int N>
__device__ uint32_t bin_of(Shared &shared, uint32_t want, uint32_t &above) {
    constexpr int EACH = N / THREADS_MIN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, low = N - EACH * (static_cast<int>(threadIdx.x) + 1);
    if (threadIdx.x == 0) shared.bin = ALL;
    // The first warps do it; others wait.
    uint32_t bins[EACH] = {}, sum = 0, upto = 0;
    if (low >= 0) {
#pragma unroll
        for (int i = 0; i < EACH; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(&shared.histogram[low + i]);
            bins[i] = four.x, bins[i + 1] = four.y, bins[i + 2] = four.z, bins[i + 3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) sum += bins[i];
        upto = sum_upto(sum);
        if (lane == 31) shared.warp[0][warp] = upto;
    }
    __syncthreads();
    if (low >= 0) {
        uint32_t before = upto - sum + __reduce_add_sync(ALL, lane < warp ? shared.warp[0][lane] : 0);
        if (before < want && before + sum >= want) {
#pragma unroll
            for (int i = EACH - 1; i >= 0; --i) {
                if (before < want && before + bins[i] >= want) shared.bin = low + i, shared.above = before;
                before += bins[i];
            }
        }
    }
    __syncthreads();
    above = shared.above;
    return shared.bin;
}

// Per head of the group, the max and the sum of all partial sums of a column, in every warp: lane g * share.
struct Norms {
    float2 own;
    int share;
    // Max, and 1 / (sum times group); 0 if nothing is there.
    __device__ __forceinline__ float2 of(uint32_t g, uint32_t group) const {
        const float m = __shfl_sync(ALL, own.x, g * share), l = __shfl_sync(ALL, own.y, g * share);
        return {m, m == -INFINITY ? 0 : __fdividef(1, l * group)};
    }
};

// Max and sum over 2^k lanes of each (max, sum of exp2(. - max)).
__device__ __forceinline__ float2 combine(float2 own, int lanes) {
    float m = own.x;
    for (int d = lanes / 2; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(ALL, m, d));
    float l = m == -INFINITY ? 0 : own.y * exp2_fast(own.x - m);
    for (int d = lanes / 2; d > 0; d /= 2) l += __shfl_xor_sync(ALL, l, d);
    return {m, l};
}

// Warps per head of the group.
__device__ __forceinline__ int warps_per_head(uint32_t group) {
    return 1 << max(31 - __clz(blockDim.x / 32 / group), 0);
}

// `dropped`: [group][n_dropped] further partial sums.
__device__ void sum_partials(const Call &call, float2 *shared, const float2 *partial, uint32_t n_tile, uint32_t n_sink_tile,
                             const float2 *dropped, uint32_t n_dropped) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_warp = blockDim.x / 32, share = warps_per_head(call.group);
    const uint32_t n_own = n_tile + n_sink_tile, n = n_own + n_dropped;
    for (int slot = warp; slot < share * static_cast<int>(call.group); slot += n_warp) {
        const float2 *from = partial + static_cast<uint64_t>(slot / share) * (call.n_tile + SINK_TILES);
        float2 all = {-INFINITY, 0};
        for (uint32_t start = slot % share * 32 + lane; start < n; start += share * 128) {
            float2 part[4];
            float m = all.x;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t at = start + i * share * 32;
                part[i] = {-INFINITY, 0};
                if (at < n_own) part[i] = from[at < n_tile ? at : call.n_tile + at - n_tile];
                else if (at < n) part[i] = dropped[slot / share * n_dropped + at - n_own];
                m = fmaxf(m, part[i].x);
            }
            if (m == -INFINITY) continue;
            float l = all.y * exp2_fast(all.x - m);
#pragma unroll
            for (int i = 0; i < 4; ++i) l += part[i].y * exp2_fast(part[i].x - m);
            all = {m, l};
        }
        all = combine(all, 32);
        if (lane == 0) shared[slot] = all;
    }
}

// What `sum_partials` left, behind a barrier.
__device__ Norms norms_of(const Call &call, const float2 *shared) {
    const int lane = threadIdx.x % 32, share = warps_per_head(call.group);
    const float2 own = lane < share * static_cast<int>(call.group) ? shared[lane] : float2{-INFINITY, 0};
    return {combine(own, share), share};
}

}  // namespace

// Grid: (n_row, n_head_kv); block: a power of two of at least 256 threads, with E clusters each.
template <int E, bool MASS, int THREADS, Level LEVEL>
__device__ void select_clusters(const Call &call, Shared &shared) {
    const uint32_t row = blockIdx.x, head_kv = blockIdx.y, pair = head_kv * call.n_row + row, from = threadIdx.x * E;
    const int lane = threadIdx.x % 32;
    // Lookup has started, so whatever was before it is done. Without bindings there is no lookup, and no row is sparse.
    Work work = {call.n_bound > 0 ? call.rows[row] : -1, 0, 0, (call.n_kv + TILE - 1) / TILE, 0, 0};
    const Work *opened = LEVEL == Level::OPENED ? &call.opened[pair] : nullptr;
    if (LEVEL == Level::OPENED) work.bound = opened->bound;
    const Bound &bound = call.bound[max(work.bound, 0)];
    const Layer &layer = bound.layer;
    const uint32_t n = LEVEL == Level::OPENED ? opened->n_keys : layer.n_cluster;
    const uint32_t n_tile = (n + TILE - 1) / TILE, n_sink_tile = (layer.n_sink + TILE - 1) / TILE;
    // Nor does the index change: it is read before the scores are there.
    uint32_t size[E] = {}, member = 0;
    auto load_sizes = [&](const uint32_t *offsets) {
        const uint4 *at = reinterpret_cast<const uint4 *>(offsets + static_cast<uint64_t>(head_kv) * layer.offset_stride + from);
        uint4 four = from < n ? at[0] : uint4{0, 0, 0, 0};
        member = four.x;
#pragma unroll
        for (int e = 0; e < E; e += 4) {
            // A row's last group of four is followed by its last offset at most.
            const uint4 next = from + e + 4 <= n ? at[e / 4 + 1] : uint4{0, 0, 0, 0};
            size[e] = from + e < n ? four.y - four.x : 0;
            size[e + 1] = from + e + 1 < n ? four.z - four.y : 0;
            size[e + 2] = from + e + 2 < n ? four.w - four.z : 0;
            size[e + 3] = from + e + 3 < n ? next.x - four.w : 0;
            four = next;
        }
    };
    if (LEVEL != Level::OPENED && work.bound >= 0) load_sizes(layer.offsets);
    constexpr int N_BIN = LEVEL == Level::ALONE ? SCORE_BINS : BINS;
    for (int i = threadIdx.x; i < N_BIN; i += blockDim.x) shared.histogram[i] = 0;
    if (threadIdx.x == 0) shared.n_candidate = 0;
    await_previous(call);

    bool bad = work.bound < 0;
    if (LEVEL != Level::OPENED && LEVEL != Level::TILE && !bad && threadIdx.x < CHECK_BLOCKS) bad = call.check[(work.bound * CHECK_BLOCKS + threadIdx.x) * call.n_row + row] != 0;
    const uint64_t column = static_cast<uint64_t>(pair) * call.group;
    // Rows of E floats from `from` on are aligned; what lies past a row's end is never used.
    auto load_scores = [&](const float *scores, uint32_t g, float4 (&out)[E / 4]) {
        const float4 *at = reinterpret_cast<const float4 *>(scores + (column + g) * call.n_cluster + from);
#pragma unroll
        for (int e = 0; e < E / 4; ++e) out[e] = from + 4 * e < n ? at[e] : float4{0, 0, 0, 0};
    };
    // Scores of so many heads are on their way at once.
    constexpr int HEADS = THREADS <= 512 ? 4 : E <= 8 ? 2 : 1;
    float4 y[HEADS][E / 4];
    const uint2 *listed = call.list + static_cast<uint64_t>(pair) * call.n_cluster + from;
    float2 *dropped = call.dropped + column * call.n_dropped;
    if (LEVEL != Level::TILE && work.bound >= 0) {
#pragma unroll
        for (int h = 0; h < HEADS; ++h) load_scores(call.y, min(h, call.group - 1), y[h]);
        const uint64_t at = column * (call.n_tile + SINK_TILES);
        const uint32_t n_dropped = LEVEL == Level::OPENED ? call.n_dropped : 0;
        if (LEVEL == Level::OPENED) {
#pragma unroll
            for (int e = 0; e < E; e += 2) {
                const uint4 two = from + e < n ? *reinterpret_cast<const uint4 *>(listed + e) : uint4{0, 0, 0, 0};
                size[e] = two.y, size[e + 1] = from + e + 1 < n ? two.w : 0;
            }
        }
        if (LEVEL != Level::ALONE && LEVEL != Level::TILE) sum_partials(call, shared.partial, call.partial + at, n_tile, n_sink_tile, dropped, n_dropped);
    }
    if (__syncthreads_or(bad)) {
        work.bound = -1;
        if (is_listed(call, row, -1)) work.always_tiles = (call.n_visible[row] + TILE - 1) / TILE;
        if (threadIdx.x == 0) call.work[pair] = work;
        return;
    }

    // Panels of a tile, added up in order.
    const uint32_t tile_rows = LEVEL == Level::TILE ? call.check[row] : 0;
    const uint32_t panels = (tile_rows * call.n_part + PREFILL_COLUMNS - 1) / PREFILL_COLUMNS;
    auto add_panels = [&](const float *scores, float (&to)[E]) {
        for (uint32_t g = 0; g < panels; ++g) {
            float4 own[E / 4];
            load_scores(scores, g, own);
#pragma unroll
            for (int e = 0; e < E; e += 4) {
                to[e] += own[e / 4].x, to[e + 1] += own[e / 4].y, to[e + 2] += own[e / 4].z, to[e + 3] += own[e / 4].w;
            }
        }
    };
    float p[E] = {};
    auto add_scores = [&](const float4 (&scores)[E / 4], float2 norm, float (&to)[E]) {
        if (norm.y == 0) return;
#pragma unroll
        for (int e = 0; e < E; e += 4) {
            const float4 s = scores[e / 4];
            to[e] += exp2_fast(s.x - norm.x) * norm.y;
            to[e + 1] += exp2_fast(s.y - norm.x) * norm.y;
            to[e + 2] += exp2_fast(s.z - norm.x) * norm.y;
            to[e + 3] += exp2_fast(s.w - norm.x) * norm.y;
        }
    };
    if constexpr (LEVEL == Level::ALONE) {
#pragma unroll
        for (int e = 0; e < E; e += 4) {
            const float4 four = y[0][e / 4];
            // One zero alone.
            p[e] = four.x + 0.0f, p[e + 1] = four.y + 0.0f, p[e + 2] = four.z + 0.0f, p[e + 3] = four.w + 0.0f;
        }
    } else if constexpr (LEVEL == Level::TILE) {
        add_panels(call.y, p);
        // The mean, or the root of the mean square.
        const bool squared = tile_rows > 1;
        const float each = __fdividef(1, tile_rows * call.n_part);
#pragma unroll
        for (int e = 0; e < E; ++e) p[e] = squared ? sqrtf(p[e] * each) * SQUARE_ROOT_SCALE : p[e] * each;
    } else {
        const Norms norms = norms_of(call, shared.partial);
        for (uint32_t first = 0; first < call.group; first += HEADS) {
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                if (first > 0) load_scores(call.y, min(first + h, call.group - 1), y[h]);
            }
#pragma unroll
            for (int h = 0; h < HEADS; ++h) {
                if (first + h < call.group) add_scores(y[h], norms.of(first + h, call.group), p);
            }
        }
    }

    // What a cluster counts towards the target: its keys, or its mass in fixed point, so that sums have no order.
    uint32_t mass[MASS ? E : 1], target = call.mode == MODE_BUDGET ? bound.target : bound.floor;
    if constexpr (MASS && LEVEL == Level::TILE) {
        const float each = __fdividef(1, tile_rows * call.n_part);
        float sinks = 0, mean[E] = {};
        const float *own = reinterpret_cast<const float *>(call.dropped) + column * call.n_dropped;
        for (uint32_t i = 0; i < panels * call.n_dropped; ++i) sinks += own[i];
        add_panels(call.x, mean);
#pragma unroll
        for (int e = 0; e < E; ++e) mass[e] = from + e < n ? static_cast<uint32_t>(mean[e] * each * size[e] * 0x1p30f) : 0;
        const float want = call.mass - sinks * each;
        target = call.mass >= 1 ? ALL : want <= 0 ? 0 : max(1u, static_cast<uint32_t>(want * 0x1p30f));
    } else if constexpr (MASS) {
        const float2 *partial = call.partial + column * (call.n_tile + SINK_TILES);
        const Norms norms = norms_of(call, shared.partial);
        float sinks = 0;
        for (uint32_t g = 0; g < call.group; ++g) {
            const float2 norm = norms.of(g, call.group);
            for (uint32_t t = 0; t < n_sink_tile; ++t) {
                const float2 part = partial[g * static_cast<uint64_t>(call.n_tile + SINK_TILES) + call.n_tile + t];
                if (norm.y > 0 && part.x > -INFINITY) sinks += part.y * exp2_fast(part.x - norm.x) * norm.y;
            }
        }
#pragma unroll
        for (int e = 0; e < E; ++e) mass[e] = from + e < n ? static_cast<uint32_t>(p[e] * size[e] * 0x1p30f) : 0;
        const float want = call.mass - sinks;
        target = call.mass >= 1 ? ALL : want <= 0 ? 0 : max(1u, static_cast<uint32_t>(want * 0x1p30f));
    }
    auto weight = [&](int e) { return MASS ? mass[MASS ? e : 0] : size[e]; };

    // The key of a cluster: larger is better. Its rank among all: the key, then the lower number.
    auto order = [&](int e) {
        const uint32_t bits = __float_as_uint(p[e]);
        return LEVEL != Level::ALONE ? bits : bits ^ (static_cast<int32_t>(bits) < 0 ? ALL : 0x80000000u);
    };
    auto bin = [&](int e) {
        if (LEVEL == Level::ALONE) return static_cast<int>(fminf(fmaxf(p[e] * OCTAVE_BINS + SCORE_BINS / 2, 0), SCORE_BINS - 1));
        return min(max(static_cast<int>(__float_as_uint(p[e]) >> BIN_SHIFT) - FIRST_BIN, 0), BINS - 1);
    };
    // Kept are the keys above `least`, and of those equal to it the clusters up to `last`.
    uint32_t least = 0, last = ALL;
    if (target == 0) least = ALL;
    if (target != ALL && target != 0) {
        // Past the last cluster the weight is 0.
#pragma unroll
        for (int e = 0; e < E; ++e) atomicAdd(&shared.histogram[bin(e)], weight(e));
        __syncthreads();
        uint32_t above;
        const uint32_t cut = bin_of<N_BIN>(shared, target, above);
        if (cut != ALL) {
#pragma unroll
            for (int e = 0; e < E; ++e) {
                if (from + e < n && bin(e) == static_cast<int>(cut)) {
                    const uint32_t at = atomicAdd(&shared.n_candidate, 1);
                    if (at < CANDIDATES) shared.key[at] = order(e), shared.index[at] = from + e, shared.weight[at] = weight(e);
                }
            }
            __syncthreads();
            const uint32_t n_candidate = shared.n_candidate;
            if (n_candidate <= CANDIDATES) {
                for (uint32_t i = threadIdx.x / 32; i < n_candidate; i += blockDim.x / 32) {
                    const uint32_t key = shared.key[i], index = shared.index[i];
                    uint32_t better = 0;
                    for (uint32_t j = lane; j < n_candidate; j += 32)
                        if (shared.key[j] > key || (shared.key[j] == key && shared.index[j] < index)) better += shared.weight[j];
                    better = above + __reduce_add_sync(ALL, better);
                    if (lane == 0 && better < target && better + shared.weight[i] >= target) shared.least = key, shared.last = index;
                }
                __syncthreads();
                least = shared.least, last = shared.last;
            } else {
                // Many equal or very small ones: 11 bits of the rank at a time, the cluster's number being its last 24.
                auto rank = [&](int e) { return static_cast<uint64_t>(order(e)) << 24 | (0xffffff - (from + e)); };
                uint64_t found = 0;
                for (int shift = LEVEL == Level::ALONE ? 55 : 44; shift >= 0; shift -= 11) {
                    __syncthreads();
                    for (int i = threadIdx.x; i < BINS; i += blockDim.x) shared.histogram[i] = 0;
                    __syncthreads();
#pragma unroll
                    for (int e = 0; e < E; ++e) {
                        const bool mine = from + e < n && bin(e) == static_cast<int>(cut);
                        if (mine && rank(e) >> shift >> 11 == found) atomicAdd(&shared.histogram[rank(e) >> shift & (BINS - 1)], weight(e));
                    }
                    __syncthreads();
                    uint32_t more;
                    const uint32_t digit = bin_of<BINS>(shared, target - above, more);
                    found = found << 11 | digit;
                    above += more;
                }
                least = found >> 24, last = 0xffffff - (found & 0xffffff);
            }
        }
    }
    if (call.mode == MODE_THRESHOLD && target != ALL) {
        const uint32_t cut = __float_as_uint(fmaxf(call.threshold, 0.0f));
        if (cut <= least) least = cut, last = ALL;
    }

    uint32_t n_kept = 0, n_keys = 0, bits[(E + 31) / 32] = {};
#pragma unroll
    for (int e = 0; e < E; ++e) {
        const uint32_t key = order(e);
        const bool keep = from + e < n && (key > least || (key == least && from + e <= last));
        if (keep) n_kept += 1, n_keys += size[e], bits[e / 32] |= 1u << e % 32;
    }
    if (LEVEL == Level::COARSE) {
        // What is not opened stays in the denominators: each warp adds up its own.
#pragma unroll 1
        for (uint32_t g = 0; g < call.group; ++g) {
            load_scores(call.y, g, y[0]);
            float scores[E], m = -INFINITY, l = 0;
#pragma unroll
            for (int e = 0; e < E; ++e) {
                const float4 four = y[0][e / 4];
                const float own = e % 4 == 0 ? four.x : e % 4 == 1 ? four.y : e % 4 == 2 ? four.z : four.w;
                const bool closed = from + e < n && (bits[e / 32] >> e % 32 & 1) == 0;
                scores[e] = closed ? own : -INFINITY;
                m = fmaxf(m, scores[e]);
            }
#pragma unroll
            for (int e = 0; e < E; ++e)
                if (m > -INFINITY) l += size[e] * exp2_fast(scores[e] - m);
            const float2 all = combine({m, l}, 32);
            if (lane == 0) dropped[g * call.n_dropped + threadIdx.x / 32] = all;
        }
        // From here on fine clusters take the place of keys.
        load_sizes(layer.fine);
        n_keys = 0;
#pragma unroll
        for (int e = 0; e < E; ++e)
            if (bits[e / 32] >> e % 32 & 1) n_keys += size[e];
    }
    uint32_t kept_at = n_kept, key_at = n_keys, kept_total, key_total;
    __syncthreads();
    scan(shared, kept_at, key_at, kept_total, key_total);

    Entry *entries = call.entries + static_cast<uint64_t>(pair) * (call.n_cluster + 1);
    uint32_t *directory = call.directory + static_cast<uint64_t>(pair) * call.max_tiles;
    // First the kept clusters alone, in shared memory if they fit, then a thread for each.
    Entry *list = kept_total < ROOM ? shared.list : entries;
#pragma unroll
    for (int e = 0; e < E; ++e) {
        if (bits[e / 32] >> e % 32 & 1) {
            list[kept_at++] = {key_at, LEVEL == Level::OPENED ? listed[e].x : member};
            key_at += size[e];
        }
        member += size[e];
    }
    if (threadIdx.x == 0) list[kept_total] = {key_total, 0};
    __syncthreads();
    const uint32_t *members = layer.members + static_cast<uint64_t>(head_kv) * layer.n_clustered;
    for (uint32_t base = threadIdx.x - lane; base <= kept_total; base += blockDim.x) {
        const uint32_t i = base + lane;
        const bool there = i < kept_total;
        const Entry own = i <= kept_total ? list[i] : Entry{0, 0};
        const uint32_t end = there ? list[i + 1].before : own.before;
        if (i <= kept_total && list != entries) entries[i] = own;
        if (LEVEL != Level::COARSE && there) asm volatile("prefetch.global.L2 [%0];" ::"l"(members + own.first));
        const bool is_long = end - own.before > 8 * TILE;
        if (!is_long)
            for (uint32_t t = (own.before + TILE - 1) / TILE; t * TILE < end; ++t) directory[t] = i;
        // A long cluster's tiles are written by the whole warp.
        for (uint32_t left = __ballot_sync(ALL, is_long); left != 0; left &= left - 1) {
            const int owner = __ffs(left) - 1;
            const uint32_t start = __shfl_sync(ALL, own.before, owner), stop = __shfl_sync(ALL, end, owner);
            for (uint32_t t = (start + TILE - 1) / TILE + lane; t * TILE < stop; t += 32) directory[t] = base + owner;
        }
    }
    if (LEVEL != Level::COARSE && call.estimate) {
        // Past the last cluster nothing is missing.
#pragma unroll
        for (int e = 0; e < E; ++e)
            if (from + e >= n) bits[e / 32] |= 1u << e % 32;
        // E bits per thread: whole words or whole parts of one.
        uint32_t *words = call.kept + static_cast<uint64_t>(pair) * (call.n_cluster / 32);
        if (E >= 32) {
#pragma unroll
            for (int w = 0; w < (E + 31) / 32; ++w)
                if (from + 32 * w < call.n_cluster) words[from / 32 + w] = bits[w];
        } else {
            uint32_t word = bits[0] << from % 32;
#pragma unroll
            for (int d = 1; d < 32 / E; d *= 2) word |= __shfl_xor_sync(ALL, word, d);
            if (from % 32 == 0 && from < call.n_cluster) words[from / 32] = word;
        }
    }
    if (threadIdx.x == 0) {
        work.n_kept = kept_total;
        work.n_keys = key_total;
        if (LEVEL == Level::TILE) {
            // Attend counts for itself; the tile's rows are for statistics.
            work.always_tiles = tile_rows;
            call.work[pair] = work;
            return;
        }
        work.always_tiles = ((is_listed(call, row, work.bound) ? call.n_visible[row] : bound.n_always) + TILE - 1) / TILE;
        work.member_tiles = (key_total + TILE - 1) / TILE;
        work.estimate_tiles = call.estimate && kept_total < n ? n_tile : 0;
        call.work[pair] = work;
    }
}

// How many fine clusters were opened is known on the device alone: as few as possible per thread.
template <int E, bool MASS, int THREADS>
__device__ void select_opened(const Call &call, Shared &shared) {
    // Of the kernel before the one before this.
    const uint32_t n = call.opened[blockIdx.y * call.n_row + blockIdx.x].n_keys;
    if (E > 8 && n <= 8 * blockDim.x) return select_clusters<8, MASS, THREADS, Level::OPENED>(call, shared);
    if (E > 16 && n <= 16 * blockDim.x) return select_clusters<16, MASS, THREADS, Level::OPENED>(call, shared);
    select_clusters<E, MASS, THREADS, Level::OPENED>(call, shared);
}

#define KERNEL(NAME, THREADS, BODY)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Call call) { \
        __shared__ Shared shared;                                                                      \
        BODY(call, shared);                                                                            \
    }
#define SELECT(E, THREADS)                                                                     \
    KERNEL(select_##E##_##THREADS, THREADS, (select_clusters<E, false, THREADS, Level::FLAT>)) \
    KERNEL(select_##E##_##THREADS##_mass, THREADS, (select_clusters<E, true, THREADS, Level::FLAT>))
#define ALONE(E, THREADS) KERNEL(select_alone_##E##_##THREADS, THREADS, (select_clusters<E, false, THREADS, Level::ALONE>))
#define COARSE(E, THREADS) \
    KERNEL(select_coarse_##E##_##THREADS, THREADS, (select_clusters<E, false, THREADS, Level::COARSE>))
#define OPENED(E, THREADS)                                                             \
    KERNEL(select_opened_##E##_##THREADS, THREADS, (select_opened<E, false, THREADS>)) \
    KERNEL(select_opened_##E##_##THREADS##_mass, THREADS, (select_opened<E, true, THREADS>))
#define TILE(E, THREADS)                                                                     \
    KERNEL(select_tile_##E##_##THREADS, THREADS, (select_clusters<E, false, THREADS, Level::TILE>)) \
    KERNEL(select_tile_##E##_##THREADS##_mass, THREADS, (select_clusters<E, true, THREADS, Level::TILE>))
SELECT(4, 512)
SELECT(8, 1024)
SELECT(16, 1024)
SELECT(32, 1024)
SELECT(64, 1024)
ALONE(4, 512)
ALONE(8, 1024)
ALONE(16, 1024)
COARSE(4, 512)
COARSE(8, 1024)
COARSE(64, 1024)
OPENED(4, 512)
OPENED(64, 1024)
TILE(8, 1024)
TILE(16, 1024)
TILE(64, 1024)

}  // namespace squeeze
