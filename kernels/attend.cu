// Attend for F16 keys and values of equal size, 64 or 128: rows go straight from memory into fragments of the tensor cores.
#include "attend.cuh"

namespace squeeze {
namespace {

// Softmax state of a warp: NT column tiles; acc[t][i]: dimension 8 (r + 8 (i / 4)) + 2 (i % 4) and the next one.
template <int D, int NT>
struct State {
    float m[NT][2], l[NT][2], acc[NT][D / 16][4];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
#pragma unroll
            for (int h = 0; h < 2; ++h) m[t][h] = -INFINITY, l[t][h] = 0;
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[t][i][e] = 0;
        }
    }

    // Adds a tile of 16 keys with scores s (times log2 e; -inf: not there), whose values are v[k]: keys 2c, 2c + 1, 2c + 8,
    // 2c + 9, chunks r and r + 8.
    __device__ __forceinline__ void add(float (&s)[NT][4], const uint4 (&v)[4][D / 64]) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            float top[2] = {fmaxf(m[t][0], max_rows(fmaxf(s[t][0], s[t][2]))), fmaxf(m[t][1], max_rows(fmaxf(s[t][1], s[t][3])))};
            if (__any_sync(ALL, top[0] > m[t][0] || top[1] > m[t][1])) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float factor = top[h] == m[t][h] ? 1 : exp2_fast(m[t][h] - top[h]);
                    m[t][h] = top[h];
                    l[t][h] *= factor;
#pragma unroll
                    for (int i = 0; i < D / 16; ++i) acc[t][i][h] *= factor, acc[t][i][h + 2] *= factor;
                }
            }
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) p[e] = s[t][e] == -INFINITY ? 0 : exp2_fast(s[t][e] - m[t][e % 2]);
            l[t][0] += p[0] + p[2];
            l[t][1] += p[1] + p[3];
            const uint32_t b0 = transpose(pack(p[0], p[1])), b1 = transpose(pack(p[2], p[3]));
#pragma unroll
            for (int j = 0; j < D / 64; ++j) {
                const uint32_t k[4][4] = {{v[0][j].x, v[0][j].y, v[0][j].z, v[0][j].w}, {v[1][j].x, v[1][j].y, v[1][j].z, v[1][j].w},
                                          {v[2][j].x, v[2][j].y, v[2][j].z, v[2][j].w}, {v[3][j].x, v[3][j].y, v[3][j].z, v[3][j].w}};
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mma(acc[t][4 * j + i], __byte_perm(k[0][i], k[1][i], 0x5410), __byte_perm(k[0][i], k[1][i], 0x7632),
                        __byte_perm(k[2][i], k[3][i], 0x5410), __byte_perm(k[2][i], k[3][i], 0x7632), b0, b1);
            }
        }
    }
};

template <int D, int NT>
struct Shared {
    SharedRuns runs;
    float m[ATTEND_WARPS][NT * COLUMNS], l[ATTEND_WARPS][NT * COLUMNS];
    // Rows of a warp's columns; the padding spreads writers over the banks.
    alignas(16) float acc[ATTEND_WARPS][NT * COLUMNS][D + 2];
};

// Tiles from..to of a pair by one warp.
template <int D, int NT>
__device__ void sweep(const Call &call, State<D, NT> &state, uint32_t pair, const Work &work, uint32_t from, uint32_t to) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const uint32_t head_kv = pair / call.n_row, row = pair % call.n_row;
    const Bound *bound = work.bound >= 0 ? &call.bound[work.bound] : nullptr;
    const uint32_t stream = RowAt(call, row).stream;
    const char *keys = keys_of(call, stream / call.k_share, head_kv), *values = values_of(call, stream / call.v_share, head_kv);
    Cells cells = {call, bound, mask_of(call, row), is_listed(call, row, work.bound), row, nullptr, nullptr, nullptr, work.n_kept, work.n_keys};
    if (bound != nullptr) {
        cells.members = bound->layer.members + static_cast<uint64_t>(head_kv) * bound->layer.n_clustered;
        cells.entries = call.entries + static_cast<uint64_t>(pair) * (call.n_cluster + 1);
        cells.directory = call.directory + static_cast<uint64_t>(pair) * call.max_tiles;
    }
    const uint32_t members_at = work.always_tiles, estimate_at = members_at + work.member_tiles;
    auto cells_from = [&](uint32_t tile) {
        if (tile >= estimate_at || tile >= to) return -1;
        return tile < members_at ? cells.always(tile, lane) : cells.member(tile - members_at, lane);
    };
    // A fetch covers two tiles of one kind.
    auto after = [&](uint32_t tile) { return tile + (tile + 1 < to && tile + 1 != members_at && tile + 1 != estimate_at ? 2 : 1); };
    // Queries and the first cells are fetched side by side.
    float4 raw[NT][D / 32][2];
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        const float *at = query_of(call, row, head_kv * call.group + min(t * COLUMNS + r, call.group - 1));
#pragma unroll
        for (int j = 0; j < D / 32; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) raw[t][j][h] = *reinterpret_cast<const float4 *>(at + 8 * (4 * j + c) + 4 * h);
    }
    int next = cells_from(from);
    uint4 q[NT][D / 32];
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        const float f = t * COLUMNS + r < call.group ? call.scale : 0;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            const float4 low = raw[t][j][0], high = raw[t][j][1];
            q[t][j] = {pack(low.x * f, low.y * f), pack(low.z * f, low.w * f), pack(high.x * f, high.y * f), pack(high.z * f, high.w * f)};
        }
    }
    for (uint32_t tile = from; tile < min(to, estimate_at);) {
        const int cell = next;
        const uint32_t end = min(after(tile), estimate_at);
        const bool masked = tile < members_at && cells.mask != nullptr;
        for (uint32_t i = tile; i < end; ++i) {
            const int base = (i - tile) * TILE;
            uint4 k[2][D / 32] = {}, v[4][D / 64] = {};
            int own[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                own[h] = __shfl_sync(ALL, cell, base + r + 8 * h);
                if (own[h] < 0) continue;
                const char *at = keys + own[h] * call.k.nb1 + 16 * c;
#pragma unroll
                for (int j = 0; j < D / 32; ++j) k[h][j] = load_stream(at + 64 * j);
            }
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                const int at = __shfl_sync(ALL, cell, base + 2 * c + h % 2 + 8 * (h / 2));
                if (at < 0) continue;
#pragma unroll
                for (int j = 0; j < D / 64; ++j) v[h][j] = load_stream(values + at * call.v.nb1 + 16 * (r + 8 * j));
            }
            // What leads to the next keys is fetched while these are on their way.
            if (i == tile) next = cells_from(end);
            float s[NT][4] = {};
            float hidden[2] = {0, 0};
            if (masked) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (own[h] >= 0) hidden[h] = __half2float(cells.mask[own[h]]) * LOG2E;
            }
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                dot<D>(s[t], k, q[t]);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (call.softcap != 0) s[t][e] = call.softcap * tanhf(s[t][e]);
                    s[t][e] = own[e / 2] < 0 ? -INFINITY : s[t][e] * LOG2E + hidden[e / 2];
                }
            }
            state.add(s, v);
        }
        tile = end;
    }

    for (uint32_t tile = max(from, estimate_at); tile < to; ++tile) {
        const Layer &layer = bound->layer;
        const uint32_t first = (tile - estimate_at) * TILE;
        const uint32_t *offsets = offsets_of(layer, head_kv);
        const uint32_t *kept = call.kept + static_cast<uint64_t>(pair) * (call.n_cluster / 32);
        const uint32_t *ids = call.ids != nullptr ? call.ids + static_cast<uint64_t>(pair) * call.n_cluster : nullptr;
        // Bits past the last cluster are set.
        auto dropped = [&](uint32_t i) { return (kept[i / 32] >> i % 32 & 1) == 0; };
        auto id = [&](uint32_t i) { return ids != nullptr ? ids[i] : i; };
        uint4 v[4][D / 64] = {};
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const uint32_t i = first + 2 * c + h % 2 + 8 * (h / 2);
            if (!dropped(i)) continue;
            const half *at = layer.mean_values + (static_cast<uint64_t>(head_kv) * layer.n_cluster + id(i)) * D;
#pragma unroll
            for (int j = 0; j < D / 64; ++j) v[h][j] = load_stream(at + 8 * (r + 8 * j));
        }
        float s[NT][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t i = first + r + 8 * h;
            const bool there = dropped(i);
            const uint32_t *bounds = offsets + (there ? id(i) : 0);
            const float size = log2f(static_cast<float>(bounds[1] - bounds[0]));
#pragma unroll
            for (int t = 0; t < NT; ++t) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const uint32_t g = t * COLUMNS + 2 * c + e;
                    float logit = -INFINITY;
                    if (there && g < call.group) {
                        logit = call.x[(static_cast<uint64_t>(pair) * call.group + g) * call.n_cluster + i];
                        if (call.softcap != 0) logit = call.softcap * tanhf(logit / call.softcap);
                        logit = logit * LOG2E + size;
                    }
                    s[t][2 * h + e] = logit;
                }
            }
        }
        state.add(s, v);
    }
}

// The warps' states become one, which goes to `to`.
template <int D, int NT>
__device__ void store(const Call &call, Shared<D, NT> &shared, State<D, NT> &state, float *to) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t g = t * COLUMNS + 2 * c + h;
            const float l = sum_rows(state.l[t][h]);
            if (r == 0) shared.m[warp][g] = state.m[t][h], shared.l[warp][g] = l;
            if (g >= call.group) continue;
#pragma unroll
            for (int i = 0; i < D / 16; ++i) {
                float *at = &shared.acc[warp][g][8 * (r + 8 * (i / 4)) + 2 * (i % 4)];
                *reinterpret_cast<float2 *>(at) = {state.acc[t][i][h], state.acc[t][i][h + 2]};
            }
        }
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < call.group * D; i += THREADS) {
        const uint32_t g = i / D, d = i % D;
        float m = -INFINITY, value = 0, l = 0;
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; ++w) m = fmaxf(m, shared.m[w][g]);
        const float ref = m == -INFINITY ? 0 : m;
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; ++w) {
            const float factor = exp2_fast(shared.m[w][g] - ref);
            value += factor * shared.acc[w][g][d];
            l += factor * shared.l[w][g];
        }
        to[g * (D + 2) + d] = value;
        if (d == 0) to[g * (D + 2) + D] = m, to[g * (D + 2) + D + 1] = l;
    }
    __syncthreads();
}

}  // namespace

template <int D, int NT>
__device__ void attend(const Call &call) {
    __shared__ Shared<D, NT> shared;
    const uint32_t warp = threadIdx.x / 32;
    await_previous(call);
    State<D, NT> state;
    for_each_run(call, shared.runs, [&](uint32_t pair, uint32_t own, const Work &work, uint32_t from, uint32_t n) {
        state.reset();
        sweep(call, state, pair, work, from + n * warp / ATTEND_WARPS, from + n * (warp + 1) / ATTEND_WARPS);
        store(call, shared, state, call.state + static_cast<uint64_t>(own) * call.group * (D + 2));
    });
}

#define ATTEND(D, NT, BLOCKS)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend_##D##_##NT(const __grid_constant__ Call call) { \
        attend<D, NT>(call);                                                                                                \
    }
ATTEND(64, 1, 4)
ATTEND(64, 2, 4)
ATTEND(128, 1, 3)
ATTEND(128, 2, 2)

}  // namespace squeeze
