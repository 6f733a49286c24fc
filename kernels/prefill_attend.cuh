// What both paths of a prefill's attend share: the way to the cells of a segment's steps, the softmax, and what is left of a
// panel.
#pragma once

#include "prefill_mma.cuh"

namespace squeeze {
namespace {

// What a segment's cells are found by; in shared memory, since few look at it.
struct Lists {
    const Bound *bound;
    const uint32_t *members, *directory, *seen;
    const Entry *entries;
    uint32_t n_always, n_kept, n_keys;

    __device__ __forceinline__ void set(const Prefill &p, const Segment &at) {
        const Call &call = p.call;
        bound = nullptr, n_kept = n_keys = 0;
        n_always = always_of(p, at.tile);
        seen = p.seen != nullptr ? p.seen + static_cast<uint64_t>(at.pair.slot) * p.seen_words : nullptr;
        if (at.tile.bound < 0) return;
        bound = &call.bound[at.tile.bound];
        const Work &work = call.work[at.pair.work];
        n_kept = work.n_kept, n_keys = work.n_keys;
        members = bound->layer.members + static_cast<uint64_t>(at.pair.head_kv) * bound->layer.n_clustered;
        entries = call.entries + static_cast<uint64_t>(at.pair.work) * (call.n_cluster + 1);
        directory = call.directory + static_cast<uint64_t>(at.pair.work) * call.max_tiles;
    }
};
static_assert(sizeof(Lists) <= 64);

// The way to the cells of a segment's steps: a chain of loads, of which each step makes one, so that none is waited for. Two
// warps do a step's, 32 keys each; with STRIDE 2 two others do the next step's meanwhile. AHEAD: steps from which a step's cells
// are wanted in shared memory before it. RING: steps whose cells are there.
template <int AHEAD, int STRIDE, int RING>
struct Cells {
    const Call &call;
    const Lists &lists;
    uint32_t always_steps, end;
    // What a step's number differs by from its place in the ring.
    uint32_t shift;
    // In the order of the chain: a tile's first entry, the entries from there on, a token (or cell), and a cell.
    uint32_t first;
    Entry entry;
    uint32_t token, bits;
    int cell;

    static __device__ __forceinline__ bool works() { return threadIdx.x < STRIDE * PREFILL_KEYS; }
    // The step that the warp is at while the first two are at `step`.
    static __device__ __forceinline__ uint32_t own(uint32_t step) { return step + threadIdx.x / PREFILL_KEYS; }
    // First key of the warp in a step of members.
    __device__ __forceinline__ uint32_t key(uint32_t step) const {
        return (step - always_steps) * PREFILL_KEYS + threadIdx.x % PREFILL_KEYS / 32 * 32;
    }
    __device__ __forceinline__ bool of_members(uint32_t step) const { return step >= always_steps && step < end; }

    __device__ __forceinline__ void load_first(uint32_t step) {
        if (of_members(step) && key(step) < lists.n_keys) first = lists.directory[key(step) / TILE];
    }
    __device__ __forceinline__ void load_entries(uint32_t step) {
        const uint32_t lane = threadIdx.x % 32;
        if (!of_members(step)) return;
        entry = {ALL, 0};
        if (key(step) < lists.n_keys && first + lane <= lists.n_kept) entry = lists.entries[first + lane];
    }
    __device__ __forceinline__ void load_token(uint32_t step) {
        const uint32_t lane = threadIdx.x % 32;
        token = ALL;
        if (of_members(step)) {
            // As key_of: each further run has a key at least.
            const uint32_t want = key(step) + lane;
            int at = 0;
#pragma unroll
            for (int d = 16; d > 0; d /= 2) {
                const uint32_t before = __shfl_sync(ALL, entry.before, (at + d) & 31);
                if (at + d < 32 && before <= want) at += d;
            }
            const uint32_t slot = __shfl_sync(ALL, entry.first, at) + want - __shfl_sync(ALL, entry.before, at);
            if (want < lists.n_keys) token = lists.members[slot];
        } else if (step < end) {
            const uint32_t from = step * PREFILL_KEYS + threadIdx.x % PREFILL_KEYS / 32 * 32, i = from + lane;
            bits = ALL;
            if (i < lists.n_always) {
                token = lists.bound != nullptr ? lists.bound->always[i] : i;
                if (lists.seen != nullptr) bits = lists.seen[i / 32];
            }
        }
    }
    __device__ __forceinline__ void load_cell(uint32_t step) {
        cell = -1;
        if (token == ALL) return;
        if (of_members(step)) cell = cell_of(*lists.bound, token);
        else if (token < call.n_kv && (bits >> threadIdx.x % 32 & 1) != 0) cell = token;
    }
    __device__ __forceinline__ void store(uint32_t step, int *ring) const {
        ring[(step + shift) % RING * PREFILL_KEYS + threadIdx.x % PREFILL_KEYS] = cell;
    }
    // Leaves the cells of the first AHEAD + STRIDE steps, and the chain as `advance` wants it for the first step.
    __device__ __forceinline__ void begin(uint32_t step, int *ring) {
        if (!works()) return;
        constexpr int N = AHEAD / STRIDE + 1;
        auto at = [&](int i) { return own(step) + i * STRIDE; };
        uint32_t firsts[N + 4];
#pragma unroll
        for (int i = 0; i < N + 4; ++i) load_first(at(i)), firsts[i] = first;
        Entry entries[N + 3];
#pragma unroll
        for (int i = 0; i < N + 3; ++i) first = firsts[i], load_entries(at(i)), entries[i] = entry;
        uint32_t tokens[N + 2], words[N + 2];
#pragma unroll
        for (int i = 0; i < N + 2; ++i) entry = entries[i], load_token(at(i)), tokens[i] = token, words[i] = bits;
        int cells[N + 1];
#pragma unroll
        for (int i = 0; i < N + 1; ++i) token = tokens[i], bits = words[i], load_cell(at(i)), cells[i] = cell;
#pragma unroll
        for (int i = 0; i < N; ++i) cell = cells[i], store(at(i), ring);
        first = firsts[N + 3], entry = entries[N + 2], token = tokens[N + 1], bits = words[N + 1], cell = cells[N];
    }
    // During STRIDE steps: the cells that the copies of the next ones want are left, and everything behind goes on.
    __device__ __forceinline__ void advance(uint32_t step, int *ring) {
        if (!works()) return;
        constexpr int N = AHEAD / STRIDE + 1;
        store(own(step) + N * STRIDE, ring);
        load_cell(own(step) + (N + 1) * STRIDE);
        load_token(own(step) + (N + 2) * STRIDE);
        load_entries(own(step) + (N + 3) * STRIDE);
        load_first(own(step) + (N + 4) * STRIDE);
    }
};

// The softmax of a panel's columns, those of a thread.
template <int MT>
struct Softmax {
    float m[MT][2], l[MT][2], factor[MT][2];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) m[i][h] = -INFINITY, l[i][h] = 0;
    }
    // From scores to weights; true if what was added up before must be multiplied by `factor`, in one of the warp's columns.
    __device__ __forceinline__ bool add(float (&s)[MT][8][4]) {
        bool rises = false;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = -INFINITY;
#pragma unroll
                for (int t = 0; t < 8; ++t) top = fmaxf(top, fmaxf(s[i][t][2 * h], s[i][t][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
                top = fmaxf(m[i][h], fmaxf(top, __shfl_xor_sync(ALL, top, 2)) * LOG2E);
                factor[i][h] = top == m[i][h] ? 1 : exp2_fast(m[i][h] - top);
                rises |= top > m[i][h];
                m[i][h] = top;
                const float less = top == -INFINITY ? 0 : top;
                float sum = 0;
#pragma unroll
                for (int t = 0; t < 8; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        s[i][t][2 * h + e] = exp2_fast(fmaf(s[i][t][2 * h + e], LOG2E, -less));
                        sum += s[i][t][2 * h + e];
                    }
                l[i][h] = l[i][h] * factor[i][h] + sum;
            }
        return __any_sync(ALL, rises);
    }
    template <int N>
    __device__ __forceinline__ void rescale(float (&acc)[MT][N][4]) const {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int t = 0; t < N; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[i][t][e] *= factor[i][e / 2];
    }
};

// Weights as the left side of the product with values.
template <int MT>
__device__ __forceinline__ void pack_weights(uint32_t (&to)[MT][4][4], const float (&s)[MT][8][4]) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int t = 0; t < 8; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) to[i][t / 2][t % 2 * 2 + h] = pack(s[i][t][2 * h], s[i][t][2 * h + 1]);
}


// Soft-cap and mask of the scores of a step; `cells`: those of its keys. Members are known to be visible, the last step may have
// fewer.
template <int MT>
__device__ __forceinline__ void finish_scores(float (&s)[MT][8][4], const Call &call, uint32_t step, uint32_t always_steps,
                                              uint32_t end, const int *cells, const uint32_t *rows, int first_row) {
    if (call.softcap != 0) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int t = 0; t < 8; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[i][t][e] = call.softcap * tanhf(s[i][t][e]);
    }
    if (step >= always_steps && step + 1 < end) return;
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const bool masked = step < always_steps && call.mask_streams > 0;
    const int *own = cells + 2 * c;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t row = rows[first_row + 16 * i + r + 8 * h];
            const half *mask = masked && row != ALL ? mask_of(call, row) : nullptr;
#pragma unroll
            for (int t = 0; t < 8; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int cell = own[8 * t + e];
                    float hidden = cell < 0 ? -INFINITY : 0;
                    if (cell >= 0 && mask != nullptr) hidden = __half2float(mask[cell]);
                    // A key that is not there is not looked at: its score may be anything.
                    s[i][t][2 * h + e] = hidden == -INFINITY ? -INFINITY : s[i][t][2 * h + e] + hidden;
                }
        }
}

// The result of a warp's columns, or (of a panel that several blocks work at) a state that merge puts together with others.
template <int MT, int D>
__device__ __forceinline__ void write_columns(const Prefill &p, const float (&acc)[MT][D / 8][4], const Softmax<MT> &softmax,
                                              const Segment &at, const uint32_t *rows, uint32_t columns, int first_row, bool whole,
                                              uint32_t state) {
    const Call &call = p.call;
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t column = first_row + 16 * i + r + 8 * h;
            const float m = softmax.m[i][h];
            float sum = softmax.l[i][h];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            if (column >= columns) continue;
            float times = 1;
            float *to_row = p.state + (static_cast<uint64_t>(state) * PREFILL_COLUMNS + column) * D;
            if (whole) {
                const uint32_t head = head_of(p, at.pair.head_kv, at.part, column);
                const float sink = call.sinks != nullptr ? call.sinks[head] * LOG2E : -INFINITY, top = fmaxf(m, sink);
                const float own = top == -INFINITY ? 0 : exp2_fast(m - top);
                const float all = top == -INFINITY ? 0 : sum * own + exp2_fast(sink - top);
                times = all > 0 ? own / all : 0;
                to_row = output_of(call, rows[column], head);
            } else if (c == 0) {
                p.norms[static_cast<uint64_t>(state) * PREFILL_COLUMNS + column] = {m, sum};
            }
#pragma unroll
            for (int t = 0; t < D / 8; ++t)
                *reinterpret_cast<float2 *>(to_row + 8 * t + 2 * c) = {acc[i][t][2 * h] * times, acc[i][t][2 * h + 1] * times};
        }
}

template <int MT, int D>
__device__ __forceinline__ void clear(float (&acc)[MT][D / 8][4]) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int t = 0; t < D / 8; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][t][e] = 0;
}

}  // namespace
}  // namespace squeeze
