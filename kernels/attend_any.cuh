// Attend for keys and values of every type and head size: each warp brings its tiles' rows to shared memory, K of the next tile
// while V of this one is on its way, and makes fragments of the tensor cores of them there. The types are numbers of the call, the
// same for all of it; head sizes are fixed in each kernel.
#pragma once

#include "attend.cuh"
#include "format.cuh"

namespace squeeze {
namespace {

template <int N>
__device__ __forceinline__ void await_copies_of_warp() {
    await_copies<N>();
    __syncwarp();
}

// What a warp has of its columns, 8 NT query heads: max and sum, and the weighted sum of values as `value_dim` has it.
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

    // A tile's scores (times log2 e; -inf: not there) become weights.
    __device__ __forceinline__ void weigh(float (&s)[NT][4]) {
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
#pragma unroll
            for (int e = 0; e < 4; ++e) s[t][e] = s[t][e] == -INFINITY ? 0 : exp2_fast(s[t][e] - m[t][e % 2]);
            l[t][0] += s[t][0] + s[t][2];
            l[t][1] += s[t][1] + s[t][3];
        }
    }
};

template <int DK, int NT>
struct Shared {
    SharedRuns runs;
    float m[ATTEND_WARPS][NT * COLUMNS], l[ATTEND_WARPS][NT * COLUMNS];
    // Queries of the pair at hand, as `score_rows` takes them.
    uint2 q[NT][DK / 16][2][32];
};

// By the whole block.
template <int DK, int NT>
__device__ __forceinline__ void load_queries(const Call &call, Shared<DK, NT> &shared, uint32_t row, uint32_t head_kv) {
    for (int i = threadIdx.x; i < NT * (DK / 16) * 32; i += THREADS) {
        const int lane = i % 32, step = i / 32 % (DK / 16), t = i / 32 / (DK / 16);
        const uint32_t g = t * COLUMNS + lane / 4;
        const float *from = query_of(call, row, head_kv * call.group + min(g, call.group - 1));
        const float factor = g < call.group ? call.scale : 0;
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = factor * from[key_dim(call.k_type, step, lane % 4, e)];
        uint2 large = {pack(x[0], x[1]), pack(x[2], x[3])}, rest = {0, 0};
        if (call.k_type == TYPE_BF16) split(x[0], x[1], large.x, rest.x), split(x[2], x[3], large.y, rest.y);
        shared.q[t][step][0][lane] = large;
        shared.q[t][step][1][lane] = rest;
    }
}

// What ALiBi multiplies a head's mask by, as in ggml.
__device__ __forceinline__ float slope_of(const Call &call, uint32_t head) {
    if (call.max_bias == 0) return 1;
    const uint32_t below = 1u << (31 - __clz(call.group * call.n_head_kv));
    const float step = call.max_bias / below;
    return exp2f(head < below ? -step * (head + 1) : -step * (head - below + 0.5f));
}

// Tiles from..to of a pair by one warp, whose rows have room at `room`.
template <int DK, int DV, int NT>
__device__ void sweep(const Call &call, Shared<DK, NT> &shared, char *room, State<DV, NT> &state, uint32_t pair, const Work &work,
                      uint32_t from, uint32_t to) {
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
    const uint32_t members_at = work.always_tiles, estimate_at = members_at + work.member_tiles, last = min(to, estimate_at);
    auto cells_from = [&](uint32_t tile) {
        if (tile >= last) return -1;
        return tile < members_at ? cells.always(tile, lane) : cells.member(tile - members_at, lane);
    };
    char *const k_room = room, *const v_room = room + TILE * call.k_stage;
    auto copy_keys = [&](int cell) {
        with_type<DK>(call.k_type, [&](auto tag) { copy_rows<decltype(tag)::value, DK>(k_room, call.k_stage, keys, call.k.nb1, cell); });
    };
    auto copy_values = [&](int cell) {
        with_type<DV>(call.v_type, [&](auto tag) { copy_rows<decltype(tag)::value, DV>(v_room, call.v_stage, values, call.v.nb1, cell); });
    };
    // A fetch covers two tiles of one kind.
    int cell = cells_from(from), own = __shfl_sync(ALL, cell, lane % TILE);
    if (from < last) copy_keys(own);
    commit_copies();
    if (from < last) copy_values(own);
    commit_copies();
    load_queries(call, shared, row, head_kv);
    __syncthreads();
    const uint2 *q = &shared.q[0][0][0][lane];
    float slope[NT][2];
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) slope[t][h] = slope_of(call, head_kv * call.group + t * COLUMNS + 2 * c + h);
    for (uint32_t tile = from; tile < last;) {
        const uint32_t end = tile + (tile + 1 < last && tile + 1 != members_at ? 2 : 1);
        // What leads to the next rows is fetched while these are on their way.
        const int next = cells_from(end);
        const bool masked = tile < members_at && cells.mask != nullptr;
        for (uint32_t i = tile; i < end; ++i) {
            const bool in_fetch = i + 1 < end;
            const int then = __shfl_sync(ALL, in_fetch ? cell : next, (in_fetch ? TILE : 0) + lane % TILE);
            float hidden[2] = {0, 0};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = __shfl_sync(ALL, own, r + 8 * h);
                if (at < 0) hidden[h] = -INFINITY;
                else if (masked) hidden[h] = __half2float(cells.mask[at]) * LOG2E;
            }
            await_copies_of_warp<1>();
            float s[NT][4] = {};
            with_type<DK>(call.k_type, [&](auto tag) { score_rows<decltype(tag)::value, DK, NT>(s, k_room, call.k_stage, q); });
            __syncwarp();
            if (i + 1 < last) copy_keys(then);
            commit_copies();
#pragma unroll
            for (int t = 0; t < NT; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (call.softcap != 0) s[t][e] = call.softcap * tanhf(s[t][e]);
                    s[t][e] = hidden[e / 2] == -INFINITY ? -INFINITY : s[t][e] * LOG2E + slope[t][e % 2] * hidden[e / 2];
                }
            }
            state.weigh(s);
            await_copies_of_warp<1>();
            with_type<DV>(call.v_type, [&](auto tag) {
                constexpr uint32_t TYPE = decltype(tag)::value;
                Weights<NT> weights;
                weights.template set<TYPE>(s);
                add_rows<TYPE, DV, NT>(state.acc, v_room, call.v_stage, weights);
            });
            __syncwarp();
            if (i + 1 < last) copy_values(then);
            commit_copies();
            own = then;
        }
        tile = end;
        cell = next;
    }
    await_copies_of_warp<0>();

    for (uint32_t tile = max(from, estimate_at); tile < to; ++tile) {
        const Layer &layer = bound->layer;
        const uint32_t first = (tile - estimate_at) * TILE;
        const uint32_t *offsets = offsets_of(layer, head_kv);
        const uint32_t *kept = call.kept + static_cast<uint64_t>(pair) * (call.n_cluster / 32);
        const uint32_t *ids = call.ids != nullptr ? call.ids + static_cast<uint64_t>(pair) * call.n_cluster : nullptr;
        const half *means = layer.mean_values + static_cast<uint64_t>(head_kv) * layer.n_cluster * DV;
        // Bits past the last cluster are set.
        auto dropped = [&](uint32_t i) { return (kept[i / 32] >> i % 32 & 1) == 0; };
        auto id = [&](uint32_t i) { return ids != nullptr ? ids[i] : i; };
        const uint32_t own_cluster = first + lane % TILE;
        const int mean = dropped(own_cluster) ? static_cast<int>(id(own_cluster)) : -1;
        const bool plain = call.v_type == TYPE_F16 || call.v_type == TYPE_BF16;
        if (plain) copy_rows<TYPE_F16, DV>(v_room, call.v_stage, reinterpret_cast<const char *>(means), 2 * DV, mean);
        commit_copies();
        float s[NT][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t i = first + r + 8 * h;
            const int at = __shfl_sync(ALL, mean, r + 8 * h);
            const uint32_t *bounds = offsets + max(at, 0);
            const float size = log2f(static_cast<float>(bounds[1] - bounds[0]));
#pragma unroll
            for (int t = 0; t < NT; ++t) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const uint32_t g = t * COLUMNS + 2 * c + e;
                    float logit = -INFINITY;
                    if (at >= 0 && g < call.group) {
                        logit = call.x[(static_cast<uint64_t>(pair) * call.group + g) * call.n_cluster + i];
                        if (call.softcap != 0) logit = call.softcap * tanhf(logit / call.softcap);
                        logit = logit * LOG2E + size;
                    }
                    s[t][2 * h + e] = logit;
                }
            }
        }
        state.weigh(s);
        Weights<NT> weights;
        weights.template set<TYPE_F16>(s);
        await_copies_of_warp<0>();
        if (plain) {
            add_rows<TYPE_F16, DV, NT>(state.acc, v_room, call.v_stage, weights);
        } else if constexpr (DV % 32 == 0) {
            // Two neighbouring elements of four clusters at a time, where the layout of quantised rows has them.
            const half *at[4];
            bool there[4];
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                const int from = __shfl_sync(ALL, mean, 2 * c + h % 2 + 8 * (h / 2));
                there[h] = from >= 0, at[h] = means + static_cast<uint64_t>(max(from, 0)) * DV;
            }
#pragma unroll
            for (int i = 0; i < DV / 16; ++i) {
                const int dim = call.v_type == TYPE_Q8_0 ? value_dim<TYPE_Q8_0>(i, r, 0) : value_dim<TYPE_Q4_0>(i, r, 0);
                uint32_t x[4];
#pragma unroll
                for (int h = 0; h < 4; ++h) x[h] = there[h] ? __ldg(reinterpret_cast<const uint32_t *>(at[h] + dim)) : 0;
                const uint32_t a[4] = {__byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632),
                                       __byte_perm(x[2], x[3], 0x5410), __byte_perm(x[2], x[3], 0x7632)};
#pragma unroll
                for (int t = 0; t < NT; ++t) mma_f16(state.acc[t][i], a, weights.large[t]);
            }
        }
        __syncwarp();
    }
}

// The warps' states become one, which goes to `to`; `room`: for ATTEND_WARPS * group * (DV + 2) numbers, where rows were.
template <int DK, int DV, int NT>
__device__ void store(const Call &call, Shared<DK, NT> &shared, float *room, const State<DV, NT> &state, float *to) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    __syncthreads();
    auto place = [&](uint32_t warp, uint32_t g) { return room + (warp * call.group + g) * (DV + 2); };
#pragma unroll
    for (int t = 0; t < NT; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t g = t * COLUMNS + 2 * c + h;
            const float l = sum_rows(state.l[t][h]);
            if (r == 0) shared.m[warp][g] = state.m[t][h], shared.l[warp][g] = l;
            if (g >= call.group) continue;
            float *at = place(warp, g);
            with_type<DV>(call.v_type, [&](auto tag) {
                constexpr uint32_t TYPE = decltype(tag)::value;
#pragma unroll
                for (int i = 0; i < DV / 16; ++i) {
                    at[value_dim<TYPE>(i, r, 0)] = state.acc[t][i][h];
                    at[value_dim<TYPE>(i, r, 1)] = state.acc[t][i][h + 2];
                }
            });
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < call.group * DV; i += THREADS) {
        const uint32_t g = i / DV, d = i % DV;
        float m = -INFINITY, value = 0, l = 0;
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; ++w) m = fmaxf(m, shared.m[w][g]);
        const float ref = m == -INFINITY ? 0 : m;
#pragma unroll
        for (int w = 0; w < ATTEND_WARPS; ++w) {
            const float factor = exp2_fast(shared.m[w][g] - ref);
            value += factor * place(w, g)[d];
            l += factor * shared.l[w][g];
        }
        to[g * (DV + 2) + d] = value;
        if (d == 0) to[g * (DV + 2) + DV] = m, to[g * (DV + 2) + DV + 1] = l;
    }
    __syncthreads();
}

}  // namespace

// Grid: (n_block). Dynamic shared memory: the warps' rows, or their states.
template <int DK, int DV, int NT>
__device__ void attend_any(const Call &call) {
    extern __shared__ __align__(16) char room[];
    __shared__ Shared<DK, NT> shared;
    const uint32_t warp = threadIdx.x / 32;
    char *own_room = room + warp * TILE * (call.k_stage + call.v_stage);
    await_previous(call);
    State<DV, NT> state;
    for_each_run(call, shared.runs, [&](uint32_t pair, uint32_t own, const Work &work, uint32_t from, uint32_t n) {
        state.reset();
        sweep(call, shared, own_room, state, pair, work, from + n * warp / ATTEND_WARPS, from + n * (warp + 1) / ATTEND_WARPS);
        store<DK, DV, NT>(call, shared, reinterpret_cast<float *>(room), state, call.state + static_cast<uint64_t>(own) * call.group * (DV + 2));
    });
}

// The compiler needs more registers for the same before 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int FEWER = 1;
#else
constexpr int FEWER = 0;
#endif

#define ATTEND_ANY(DK, DV, NT, BLOCKS)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS - FEWER)                                   \
        attend_any_##DK##_##DV##_##NT(const __grid_constant__ Call call) {                                  \
        attend_any<DK, DV, NT>(call);                                                                       \
    }

}  // namespace squeeze
