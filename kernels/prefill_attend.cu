// Attend of a prefill: exact softmax attention of a panel's columns over the keys that its tile keeps, sinks and tail, 64 keys
// a step. Rows of K and V are gathered into shared memory by asynchronous copies, ahead of the tensor cores.
#include "prefill_mma.cuh"

namespace squeeze {
namespace {

// Steps whose cells are in shared memory.
constexpr int RING = 8;

// AHEAD: steps by which copies begin before their products.
template <class Path, int D>
struct Layout {
    static constexpr int AHEAD = Path::MT == 1 ? 3 : 1, STAGES = Path::MT == 1 ? 5 : 2;
    static constexpr int QUERIES = PREFILL_COLUMNS * D * 2, KEYS = PREFILL_KEYS * D * 2;
    static constexpr int CELLS = QUERIES + STAGES * 2 * KEYS, ROWS = CELLS + RING * PREFILL_KEYS * 4;
    static constexpr int LISTS = ROWS + PREFILL_COLUMNS * 4;
};

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

// The way to the cells of a segment's steps: a chain of loads, of which each step makes one, so that none is waited for. The
// first two warps do it, 32 keys each. AHEAD: steps from which a step's cells are wanted in shared memory before it.
template <int AHEAD>
struct Cells {
    const Call &call;
    const Lists &lists;
    uint32_t always_steps, end;
    // In the order of the chain: a tile's first entry, the entries from there on, a token (or cell), and a cell.
    uint32_t first;
    Entry own;
    uint32_t token, bits;
    int cell;

    // First key of the warp in a step of members.
    __device__ __forceinline__ uint32_t key(uint32_t step) const {
        return (step - always_steps) * PREFILL_KEYS + threadIdx.x / 32 * 32;
    }
    __device__ __forceinline__ bool of_members(uint32_t step) const { return step >= always_steps && step < end; }

    __device__ __forceinline__ void load_first(uint32_t step) {
        if (of_members(step) && key(step) < lists.n_keys) first = lists.directory[key(step) / TILE];
    }
    __device__ __forceinline__ void load_entries(uint32_t step) {
        const uint32_t lane = threadIdx.x % 32;
        if (!of_members(step)) return;
        own = {ALL, 0};
        if (key(step) < lists.n_keys && first + lane <= lists.n_kept) own = lists.entries[first + lane];
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
                const uint32_t before = __shfl_sync(ALL, own.before, (at + d) & 31);
                if (at + d < 32 && before <= want) at += d;
            }
            const uint32_t slot = __shfl_sync(ALL, own.first, at) + want - __shfl_sync(ALL, own.before, at);
            if (want < lists.n_keys) token = lists.members[slot];
        } else if (step < end) {
            const uint32_t from = step * PREFILL_KEYS + threadIdx.x / 32 * 32, i = from + lane;
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
        ring[step % RING * PREFILL_KEYS + threadIdx.x] = cell;
    }
    // Leaves the cells of the first AHEAD + 1 steps, and the chain as `advance` wants it for the first step.
    __device__ __forceinline__ void begin(uint32_t step, int *ring) {
        if (threadIdx.x >= PREFILL_KEYS) return;
        constexpr int N = AHEAD + 1;
        uint32_t firsts[N + 4];
#pragma unroll
        for (int i = 0; i < N + 4; ++i) load_first(step + i), firsts[i] = first;
        Entry owns[N + 3];
#pragma unroll
        for (int i = 0; i < N + 3; ++i) first = firsts[i], load_entries(step + i), owns[i] = own;
        uint32_t tokens[N + 2], words[N + 2];
#pragma unroll
        for (int i = 0; i < N + 2; ++i) own = owns[i], load_token(step + i), tokens[i] = token, words[i] = bits;
        int cells[N + 1];
#pragma unroll
        for (int i = 0; i < N + 1; ++i) token = tokens[i], bits = words[i], load_cell(step + i), cells[i] = cell;
#pragma unroll
        for (int i = 0; i < N; ++i) cell = cells[i], store(step + i, ring);
        first = firsts[N + 3], own = owns[N + 2], token = tokens[N + 1], bits = words[N + 1], cell = cells[N];
    }
    // During a step: the cells that the next step's copies want are left, and everything behind goes on by one.
    __device__ __forceinline__ void advance(uint32_t step, int *ring) {
        if (threadIdx.x >= PREFILL_KEYS) return;
        constexpr int N = AHEAD + 1;
        store(step + N, ring);
        load_cell(step + N + 1);
        load_token(step + N + 2);
        load_entries(step + N + 3);
        load_first(step + N + 4);
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

}  // namespace

// Grid: (n_block).
template <class Path, int D>
__device__ void attend_panels(const Prefill &p) {
    using Own = Layout<Path, D>;
    constexpr int MT = Path::MT, CHUNKS = D / 8, ROWS = Path::THREADS / CHUNKS, AHEAD = Own::AHEAD;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Call &call = p.call;
    const Runs runs(p);
    if (blockIdx.x >= runs.n_block) return;
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    unsigned char *base = memory + (Path::ALIGNMENT - shared_address(memory) % Path::ALIGNMENT) % Path::ALIGNMENT;
    const uint32_t q = shared_address(base), tiles = q + Own::QUERIES;
    int *ring = reinterpret_cast<int *>(base + Own::CELLS);
    uint32_t *rows = reinterpret_cast<uint32_t *>(base + Own::ROWS);
    Lists &lists = *reinterpret_cast<Lists *>(base + Own::LISTS);
    const uint32_t begin = runs.start(blockIdx.x), stop = runs.start(blockIdx.x + 1);

    for (uint32_t unit = begin; unit < stop;) {
        const Segment at(p, unit);
        const uint32_t from = at.from, to = min(at.steps, from + stop - unit), head_kv = at.pair.head_kv;
        const uint32_t columns = min(at.tile.n_row * call.group - at.part * PREFILL_COLUMNS, PREFILL_COLUMNS);
        const char *keys = keys_of(call, at.tile.stream / call.k_share, head_kv), *values = values_of(call, at.tile.stream / call.v_share, head_kv);
        // What the last segment left is no longer read.
        __syncthreads();
        if (threadIdx.x == 0) lists.set(p, at);
        load_queries<Path, D>(p, head_kv, at.tile, at.part, base, [](int, int, float4 &) {});
        if (threadIdx.x < PREFILL_COLUMNS) rows[threadIdx.x] = row_of(p, at.tile, at.part, threadIdx.x);
        __syncthreads();
        Cells<AHEAD> cells = {call, lists, steps_of(lists.n_always), at.steps};
        cells.begin(from, ring);
        __syncthreads();
        auto stage = [&](uint32_t step) { return tiles + (step - from) % Own::STAGES * (2 * Own::KEYS); };
        auto fetch = [&](uint32_t step) {
            if (step < to) {
                const int chunk = threadIdx.x % CHUNKS;
                const uint32_t k = stage(step), v = k + Own::KEYS;
#pragma unroll
                for (int i = 0; i < PREFILL_KEYS / ROWS; ++i) {
                    const int row = threadIdx.x / CHUNKS + i * ROWS, cell = ring[step % RING * PREFILL_KEYS + row];
                    const uint64_t own = max(cell, 0);
                    copy_chunk(chunk_at<PREFILL_KEYS>(k, row, chunk), keys + own * call.k.nb1 + 16 * chunk, cell >= 0);
                    copy_chunk(chunk_at<PREFILL_KEYS>(v, row, chunk), values + own * call.v.nb1 + 16 * chunk, cell >= 0);
                }
            }
            commit_copies();
        };
        // Soft-cap and mask.
        auto finish_scores = [&](float (&s)[MT][8][4], uint32_t step) {
            if (call.softcap != 0) {
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int t = 0; t < 8; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[i][t][e] = call.softcap * tanhf(s[i][t][e]);
            }
            // Members are known to be visible; the last step may have fewer.
            if (step >= cells.always_steps && step + 1 < at.steps) return;
            const bool masked = step < cells.always_steps && call.mask_streams > 0;
            const int *own = ring + step % RING * PREFILL_KEYS + 2 * c;
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t row = rows[Path::first_row() + 16 * i + r + 8 * h];
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
        };
        // Copies of a step are there, those of a later one begin.
        auto next = [&](uint32_t step) {
            await_copies<AHEAD - 1>();
            Path::publish();
            __syncthreads();
            fetch(step + AHEAD);
            cells.advance(step, ring);
        };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) fetch(from + i);
        Softmax<MT> softmax;
        softmax.reset();
        float acc[MT][D / 8][4], s[MT][8][4];
        uint32_t weights[MT][4][4];
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int t = 0; t < D / 8; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[i][t][e] = 0;
        if constexpr (MT == 1) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
            // The product with a step's values is done beside the next step's softmax.
            Held<MT, D> queries;
            queries.load(q, Path::first_row());
            next(from);
            Path::template scores<D>(s, queries, stage(from));
            finish_scores(s, from);
            softmax.add(s);
            pack_weights(weights, s);
            for (uint32_t step = from + 1; step < to; ++step) {
                next(step);
                Path::hold(s[0]);
                Path::hold(acc[0]);
                Path::fence();
                Path::template begin_scores<D>(s, queries, stage(step));
                Path::template begin_values<D>(acc, weights, stage(step - 1) + Own::KEYS);
                Path::template await<1>();
                Path::hold(s[0]);
                finish_scores(s, step);
                const bool rises = softmax.add(s);
                Path::template await<0>();
                Path::hold(acc[0]);
                if (rises) softmax.rescale(acc);
                pack_weights(weights, s);
            }
            Path::hold(acc[0]);
            Path::fence();
            Path::template begin_values<D>(acc, weights, stage(to - 1) + Own::KEYS);
            Path::template await<0>();
            Path::hold(acc[0]);
#endif
        } else {
            InShared<MT, D> queries;
            queries.load(q, Path::first_row());
            const bool works = Path::works(columns);
            for (uint32_t step = from; step < to; ++step) {
                next(step);
                if (!works) continue;
                Path::template scores<D>(s, queries, stage(step));
                finish_scores(s, step);
                if (softmax.add(s)) softmax.rescale(acc);
                pack_weights(weights, s);
                Path::template values<D>(acc, weights, stage(step) + Own::KEYS);
            }
        }
        // A panel that is all this block's is done; of others there are parts, which merge puts together.
        const bool whole = from == 0 && to == at.steps;
        const uint32_t state = 2 * blockIdx.x + (unit == begin ? 0 : 1);
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t column = Path::first_row() + 16 * i + r + 8 * h;
                const float m = softmax.m[i][h];
                float sum = softmax.l[i][h];
                sum += __shfl_xor_sync(ALL, sum, 1);
                sum += __shfl_xor_sync(ALL, sum, 2);
                if (column >= columns) continue;
                float times = 1;
                float *to_row = p.state + (static_cast<uint64_t>(state) * PREFILL_COLUMNS + column) * D;
                if (whole) {
                    const uint32_t head = head_of(p, head_kv, at.part, column);
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
        unit += to - from;
    }
}

// Panels that several blocks have worked at. Grid: (n_block - 1, 4); each block has a fourth of the columns.
template <int D>
__device__ void merge_panels(const Prefill &p) {
    constexpr int EACH = D / 32;
    const Call &call = p.call;
    const Runs runs(p);
    const uint32_t block = blockIdx.x + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (block >= runs.n_block) return;
    const uint32_t unit = runs.start(block);
    const Segment at(p, unit);
    // The first of a panel's cuts does it.
    if (at.from == 0 || runs.block_of(at.start) != block - 1) return;
    const uint32_t first = block - 1, last = runs.block_of(at.start + at.steps - 1);
    for (uint32_t column = blockIdx.y * 32 + warp; column < (blockIdx.y + 1) * 32; column += blockDim.x / 32) {
        const uint32_t row = row_of(p, at.tile, at.part, column);
        if (row == ALL) return;
        const uint32_t head = head_of(p, at.pair.head_kv, at.part, column);
        float m = call.sinks != nullptr ? call.sinks[head] * LOG2E : -INFINITY;
        float l = m > -INFINITY ? 1 : 0, acc[EACH] = {};
        for (uint32_t own = first; own <= last; ++own) {
            const uint64_t state = 2 * own + (own == first && runs.start(own) != at.start ? 1 : 0), place = state * PREFILL_COLUMNS + column;
            const float2 norm = p.norms[place];
            float v[EACH];
#pragma unroll
            for (int i = 0; i < EACH; ++i) v[i] = p.state[place * D + lane + 32 * i];
            const float top = fmaxf(m, norm.x);
            if (top == -INFINITY) continue;
            const float old = exp2_fast(m - top), more = exp2_fast(norm.x - top);
            m = top, l = l * old + norm.y * more;
#pragma unroll
            for (int i = 0; i < EACH; ++i) acc[i] = acc[i] * old + v[i] * more;
        }
        float *out = output_of(call, row, head);
#pragma unroll
        for (int i = 0; i < EACH; ++i) out[lane + 32 * i] = l > 0 ? acc[i] / l : 0;
    }
}

#define ATTEND(PATH, NAME, D, BLOCKS)                                                                                            \
    extern "C" __global__ void __launch_bounds__(PATH::THREADS, BLOCKS) prefill_attend_##NAME(const __grid_constant__ Prefill p) { \
        attend_panels<PATH, D>(p);                                                                                               \
    }
ATTEND(Portable, 64, 64, 2)
ATTEND(Portable, 128, 128, 2)
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
ATTEND(Hopper, 64_hopper, 64, 1)
ATTEND(Hopper, 128_hopper, 128, 1)
#endif

extern "C" __global__ void __launch_bounds__(256) prefill_merge_64(const __grid_constant__ Prefill p) { merge_panels<64>(p); }
extern "C" __global__ void __launch_bounds__(256) prefill_merge_128(const __grid_constant__ Prefill p) { merge_panels<128>(p); }

}  // namespace squeeze
