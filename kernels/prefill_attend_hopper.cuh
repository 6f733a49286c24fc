// Attend of F16 on compute capability 9.0: four warps fetch, two groups of four warps multiply, 64 columns each. Fetched stages go round
// in shared memory: `full` tells the groups that one is there, `empty` the fetching warps that it is no longer read.
#pragma once

#include "prefill_attend.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace squeeze {
namespace {

constexpr int ROLES_THREADS = 384, FETCHERS = 128;
// What of the block's 168 registers per thread goes where, in threads' worth: 72 + 2 * 216 = 3 * 168.
constexpr int FETCH_REGISTERS = 72, MULTIPLY_REGISTERS = 216;

template <int D>
struct RolesLayout {
    static constexpr int STAGES = 5, RING = 16;
    static constexpr int QUERIES = PREFILL_COLUMNS * D * 2, KEYS = PREFILL_KEYS * D * 2, STAGE = 2 * KEYS;
    static constexpr int CELLS = QUERIES + STAGES * STAGE, ROWS = CELLS + RING * PREFILL_KEYS * 4;
    static constexpr int LISTS = ROWS + PREFILL_COLUMNS * 4, FULL = LISTS + 64, EMPTY = FULL + 8 * STAGES;
};

__device__ __forceinline__ void make_barrier(uint32_t at, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
// The thread arrives once its copies so far have.
__device__ __forceinline__ void arrive_with_copies(uint32_t at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void await_phase(uint32_t at, uint32_t parity) {
    uint32_t over;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(over)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (over == 0);
}
// 128 threads meet; barrier 0 is __syncthreads.
__device__ __forceinline__ void meet(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

// A place in the round of stages, and how often it has come round.
template <int STAGES>
struct Round {
    uint32_t stage = 0, turn = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, ++turn;
    }
};

template <int D>
__device__ __forceinline__ void fetch_panels(const Prefill &p, uint32_t begin, uint32_t stop, unsigned char *base) {
    using Own = RolesLayout<D>;
    constexpr int CHUNKS = D / 8, ROWS = FETCHERS / CHUNKS, RING = Own::RING;
    const Call &call = p.call;
    const uint32_t tiles = shared_address(base) + Own::QUERIES, full = shared_address(base) + Own::FULL, empty = shared_address(base) + Own::EMPTY;
    int *ring = reinterpret_cast<int *>(base + Own::CELLS);
    Lists &lists = *reinterpret_cast<Lists *>(base + Own::LISTS);
    // Rows of a thread lie 8 or 16 apart, so that all have the same place in the swizzle.
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const uint32_t own = chunk_at<PREFILL_KEYS>(tiles, first, chunk);
    Round<Own::STAGES> round;
    uint32_t n_step = 0;
    for (uint32_t unit = begin; unit < stop;) {
        const Segment at(p, unit);
        const uint32_t from = at.from, to = min(at.steps, from + stop - unit), head_kv = at.pair.head_kv;
        const char *keys = keys_of(call, at.tile.stream / call.k_share, head_kv) + 16 * chunk;
        const char *values = values_of(call, at.tile.stream / call.v_share, head_kv) + 16 * chunk;
        meet(1);
        if (threadIdx.x == 0) lists.set(p, at);
        meet(1);
        Cells<0, 2, RING> cells = {call, lists, steps_of(lists.n_always), at.steps, n_step - from};
        cells.begin(from, ring);
        for (uint32_t pair = from; pair < to; pair += 2) {
            // The cells of both steps are in the ring.
            meet(1);
#pragma unroll 1
            for (uint32_t step = pair; step < min(pair + 2, to); ++step) {
                await_phase(empty + 8 * round.stage, (round.turn & 1) ^ 1);
                const int *slot = ring + n_step % RING * PREFILL_KEYS + first;
                const uint32_t k = own + round.stage * Own::STAGE;
#pragma unroll
                for (int i = 0; i < PREFILL_KEYS / ROWS; ++i) {
                    const int cell = slot[i * ROWS];
                    const uint64_t at_cell = max(cell, 0);
                    copy_chunk(k + i * ROWS * 128, keys + at_cell * call.k.nb1, cell >= 0);
                    copy_chunk(k + Own::KEYS + i * ROWS * 128, values + at_cell * call.v.nb1, cell >= 0);
                }
                arrive_with_copies(full + 8 * round.stage);
                round.next(), ++n_step;
            }
            cells.advance(pair, ring);
        }
        unit += to - from;
    }
}

template <int D>
__device__ __forceinline__ void multiply_panels(const Prefill &p, uint32_t begin, uint32_t stop, unsigned char *base) {
    using Own = RolesLayout<D>;
    const Call &call = p.call;
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, first_column = 64 * group;
    const int first_row = first_column + thread / 32 * 16;
    const uint32_t q = shared_address(base), tiles = q + Own::QUERIES, full = q + Own::FULL, empty = q + Own::EMPTY;
    const int *ring = reinterpret_cast<const int *>(base + Own::CELLS);
    uint32_t *rows = reinterpret_cast<uint32_t *>(base + Own::ROWS);
    constexpr int RING = Own::RING;
    Round<Own::STAGES> round;
    uint32_t n_step = 0;
    // A stage is there, also for the tensor cores, which read by another way than the copies wrote.
    auto await_stage = [&]() {
        await_phase(full + 8 * round.stage, round.turn & 1);
        Hopper::publish();
    };
    auto release = [&](uint32_t stage) {
        if (threadIdx.x % 32 == 0) arrive(empty + 8 * stage);
    };
    for (uint32_t unit = begin; unit < stop;) {
        const Segment at(p, unit);
        const uint32_t from = at.from, to = min(at.steps, from + stop - unit), head_kv = at.pair.head_kv;
        const uint32_t columns = min(at.tile.n_row * call.group - at.part * PREFILL_COLUMNS, PREFILL_COLUMNS);
        if (static_cast<uint32_t>(first_column) >= columns) {
            for (uint32_t step = from; step < to; ++step) {
                await_phase(full + 8 * round.stage, round.turn & 1);
                release(round.stage);
                round.next(), ++n_step;
            }
            unit += to - from;
            continue;
        }
        // What the last segment left is no longer read.
        meet(2 + group);
        load_queries<128, D>(p, head_kv, at.tile, at.part, base, first_column, first_column + 64, thread, 1.0f, 0,
                             [](int, int, Quads<D> &) {});
        if (thread < 64) rows[first_column + thread] = row_of(p, at.tile, at.part, first_column + thread);
        meet(2 + group);
        const uint32_t always_steps = steps_of(always_of(p, at.tile));
        Held<1, D> queries;
        queries.load(q, first_row);
        Softmax<1> softmax;
        softmax.reset();
        float acc[1][D / 8][4], s[1][8][4];
        uint32_t weights[1][4][4];
        clear<1, D>(acc);
        auto finish = [&](uint32_t step) {
            finish_scores<1>(s, call, step, always_steps, at.steps, ring + n_step % RING * PREFILL_KEYS, rows, first_row);
        };
        auto stage_at = [&](uint32_t stage) { return tiles + stage * Own::STAGE; };
        await_stage();
        Hopper::scores<D>(s, queries, stage_at(round.stage));
        finish(from);
        softmax.add(s);
        pack_weights(weights, s);
        uint32_t last = round.stage;
        round.next(), ++n_step;
        // The product with a step's values is begun beside the next step's scores.
        for (uint32_t step = from + 1; step < to; ++step) {
            await_stage();
            Hopper::hold(s[0]);
            Hopper::hold(acc[0]);
            Hopper::fence();
            Hopper::begin_scores<D>(s, queries, stage_at(round.stage));
            Hopper::begin_values<D>(acc, weights, stage_at(last) + Own::KEYS);
            Hopper::await<1>();
            Hopper::hold(s[0]);
            finish(step);
            const bool rises = softmax.add(s);
            Hopper::await<0>();
            Hopper::hold(acc[0]);
            release(last);
            if (rises) softmax.rescale(acc);
            pack_weights(weights, s);
            last = round.stage;
            round.next(), ++n_step;
        }
        Hopper::hold(acc[0]);
        Hopper::fence();
        Hopper::begin_values<D>(acc, weights, stage_at(last) + Own::KEYS);
        Hopper::await<0>();
        Hopper::hold(acc[0]);
        release(last);
        const bool whole = from == 0 && to == at.steps;
        const uint32_t state = 2 * blockIdx.x + (unit == begin ? 0 : 1);
        write_columns<1, D>(p, acc, softmax, at, rows, columns, first_row, whole, state);
        unit += to - from;
    }
}

}  // namespace

// Grid: (n_block).
template <int D>
__device__ void attend_in_roles(const Prefill &p) {
    using Own = RolesLayout<D>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Runs runs(p);
    if (blockIdx.x >= runs.n_block) return;
    unsigned char *base = memory + (Hopper::ALIGNMENT - shared_address(memory) % Hopper::ALIGNMENT) % Hopper::ALIGNMENT;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Own::STAGES; ++i) {
            make_barrier(shared_address(base) + Own::FULL + 8 * i, FETCHERS);
            make_barrier(shared_address(base) + Own::EMPTY + 8 * i, (ROLES_THREADS - FETCHERS) / 32);
        }
    }
    __syncthreads();
    const uint32_t begin = runs.start(blockIdx.x), stop = runs.start(blockIdx.x + 1);
    if (threadIdx.x < FETCHERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGISTERS));
        fetch_panels<D>(p, begin, stop, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
        multiply_panels<D>(p, begin, stop, base);
    }
}

}  // namespace squeeze
#endif
