// Attend of a prefill: exact softmax attention of a panel's columns over the keys that its tile keeps, sinks and tail, 64 keys
// a step. Rows of K and V are gathered into shared memory by asynchronous copies, ahead of the tensor cores.
#include "prefill_attend_hopper.cuh"

namespace squeeze {
namespace {

// AHEAD: steps by which copies begin before their products.
template <int D>
struct Layout {
    static constexpr int AHEAD = 1, STAGES = 2, RING = 8;
    static constexpr int QUERIES = PREFILL_COLUMNS * D * 2, KEYS = PREFILL_KEYS * D * 2;
    static constexpr int CELLS = QUERIES + STAGES * 2 * KEYS, ROWS = CELLS + RING * PREFILL_KEYS * 4;
    static constexpr int LISTS = ROWS + PREFILL_COLUMNS * 4;
};

}  // namespace

// For every GPU. Grid: (n_block).
template <int D>
__device__ void attend_panels(const Prefill &p) {
    using Own = Layout<D>;
    constexpr int MT = Portable::MT, THREADS = Portable::THREADS, CHUNKS = D / 8, ROWS = THREADS / CHUNKS, AHEAD = Own::AHEAD, RING = Own::RING;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Call &call = p.call;
    const Runs runs(p);
    if (blockIdx.x >= runs.n_block) return;
    const uint32_t q = shared_address(memory), tiles = q + Own::QUERIES;
    int *ring = reinterpret_cast<int *>(memory + Own::CELLS);
    uint32_t *rows = reinterpret_cast<uint32_t *>(memory + Own::ROWS);
    Lists &lists = *reinterpret_cast<Lists *>(memory + Own::LISTS);
    const uint32_t begin = runs.start(blockIdx.x), stop = runs.start(blockIdx.x + 1);

    for (uint32_t unit = begin; unit < stop;) {
        const Segment at(p, unit);
        const uint32_t from = at.from, to = min(at.steps, from + stop - unit), head_kv = at.pair.head_kv;
        const uint32_t columns = min(at.tile.n_row * call.group - at.part * PREFILL_COLUMNS, PREFILL_COLUMNS);
        const char *keys = keys_of(call, at.tile.stream / call.k_share, head_kv), *values = values_of(call, at.tile.stream / call.v_share, head_kv);
        // What the last segment left is no longer read.
        __syncthreads();
        if (threadIdx.x == 0) lists.set(p, at);
        load_queries<THREADS, D>(p, head_kv, at.tile, at.part, memory, 0, PREFILL_COLUMNS, threadIdx.x, 1.0f, [](int, int, float4 &) {});
        if (threadIdx.x < PREFILL_COLUMNS) rows[threadIdx.x] = row_of(p, at.tile, at.part, threadIdx.x);
        __syncthreads();
        Cells<AHEAD, 1, RING> cells = {call, lists, steps_of(lists.n_always), at.steps, 0};
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
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) fetch(from + i);
        Softmax<MT> softmax;
        softmax.reset();
        float acc[MT][D / 8][4], s[MT][8][4];
        uint32_t weights[MT][4][4];
        clear<MT, D>(acc);
        const int first_row = Portable::first_row();
        InShared<MT, D> queries;
        queries.load(q, first_row);
        const bool works = Portable::works(columns);
        for (uint32_t step = from; step < to; ++step) {
            // Copies of a step are there, those of a later one begin.
            await_copies<AHEAD - 1>();
            __syncthreads();
            fetch(step + AHEAD);
            cells.advance(step, ring);
            if (!works) continue;
            Portable::scores<D>(s, queries, stage(step));
            finish_scores<MT>(s, call, step, cells.always_steps, at.steps, ring + step % RING * PREFILL_KEYS, rows, first_row);
            if (softmax.add(s)) softmax.rescale(acc);
            pack_weights(weights, s);
            Portable::values<D>(acc, weights, stage(step) + Own::KEYS);
        }
        // A panel that is all this block's is done; of others there are parts.
        const bool whole = from == 0 && to == at.steps;
        const uint32_t state = 2 * blockIdx.x + (unit == begin ? 0 : 1);
        write_columns<MT, D>(p, acc, softmax, at, rows, columns, first_row, whole, state);
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

#define ATTEND(KERNEL, THREADS, NAME, D, BLOCKS)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) prefill_attend_##NAME(const __grid_constant__ Prefill p) { \
        KERNEL<D>(p);                                                                                                     \
    }
ATTEND(attend_panels, Portable::THREADS, 64, 64, 2)
ATTEND(attend_panels, Portable::THREADS, 128, 128, 2)
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
ATTEND(attend_in_roles, ROLES_THREADS, 64_hopper, 64, 1)
ATTEND(attend_in_roles, ROLES_THREADS, 128_hopper, 128, 1)
#endif

extern "C" __global__ void __launch_bounds__(256) prefill_merge_64(const __grid_constant__ Prefill p) { merge_panels<64>(p); }
extern "C" __global__ void __launch_bounds__(256) prefill_merge_128(const __grid_constant__ Prefill p) { merge_panels<128>(p); }

}  // namespace squeeze
