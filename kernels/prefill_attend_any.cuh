// Attend of a prefill for keys and values of every type and head size: exact softmax attention of a panel's columns over the keys
// that its tile keeps, sinks and tail, 64 keys a step. Rows are gathered by asynchronous copies: those of F16 straight to where the
// tensor cores want them, a step ahead; others as they are, to be made F16 there once the step before is done. BF16 beyond F16's
// range becomes its largest number; in llama.cpp's own prefill it becomes infinite.
#pragma once

#include "format.cuh"
#include "prefill_attend.cuh"

namespace squeeze {
namespace {

// Two areas: steps by turns where both types are F16; else a step's tiles, and the next one's rows as they are.
template <int DK, int DV>
struct AnyLayout {
    static constexpr int RING = 8, QUERIES = PREFILL_COLUMNS * PADDED<DK> * 2;
    static constexpr int KEYS = PREFILL_KEYS * PADDED<DK> * 2, AREA = KEYS + PREFILL_KEYS * PADDED<DV> * 2;
    static constexpr int CELLS = QUERIES + 2 * AREA, ROWS = CELLS + RING * PREFILL_KEYS * 4, LISTS = ROWS + PREFILL_COLUMNS * 4;
};

// From one row to the next, as they are: never more than 2 D.
template <uint32_t TYPE, int D>
constexpr int RAW = (Format<TYPE, D>::BYTES + 15) / 16 * 16;

// The thread's number, as something that only just becomes known: what follows from it is not kept in registers from step to step.
__device__ __forceinline__ int own_thread() {
    int own = threadIdx.x;
    asm volatile("" : "+r"(own));
    return own;
}

// Asynchronous copies of 64 rows as they are; zeros where there is no cell.
template <uint32_t TYPE, int D, int THREADS>
__device__ __forceinline__ void copy_raw(char *to, const char *rows, uint64_t nb1, const int *cells) {
    using Row = Format<TYPE, D>;
    constexpr int N = PREFILL_KEYS * Row::N_UNIT;
#pragma unroll 4
    for (int i = own_thread(); i < N; i += THREADS) {
        const int row = i / Row::N_UNIT, unit = Row::UNIT * (i % Row::N_UNIT), cell = cells[row];
        const char *from = rows + max(cell, 0) * nb1 + unit;
        char *at = to + row * RAW<TYPE, D> + unit;
        // Two bytes are too little for a copy that nobody waits for.
        if constexpr (Row::UNIT >= 4) copy<Row::UNIT, false>(at, from, cell >= 0);
        else *reinterpret_cast<uint16_t *>(at) = cell >= 0 ? __ldg(reinterpret_cast<const uint16_t *>(from)) : 0;
    }
}

// The same of F16, to a tile.
template <int D, int THREADS>
__device__ __forceinline__ void copy_tile(uint32_t tile, const char *rows, uint64_t nb1, const int *cells) {
    constexpr int CHUNKS = D / 8;
#pragma unroll 4
    for (int i = own_thread(); i < PREFILL_KEYS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS, cell = cells[row];
        copy_chunk(chunk_at<PREFILL_KEYS>(tile, row, chunk), rows + max(cell, 0) * nb1 + 16 * chunk, cell >= 0);
    }
}

// Eight numbers of a row in shared memory as F16, from number 8 chunk on.
template <uint32_t TYPE>
__device__ __forceinline__ uint4 eight_of(const char *row, int chunk) {
    if constexpr (TYPE == TYPE_F16 || TYPE == TYPE_BF16) {
        const uint4 own = *reinterpret_cast<const uint4 *>(row + 16 * chunk);
        if (TYPE == TYPE_F16) return own;
        auto narrow = [](uint32_t two) {
            auto held = [](uint32_t bits) { return in_half(__uint_as_float(bits)); };
            return pack(held(two << 16), held(two & 0xffff0000u));
        };
        return {narrow(own.x), narrow(own.y), narrow(own.z), narrow(own.w)};
    } else {
        const int part = chunk % 4;
        const char *block = row + chunk / 4 * (TYPE == TYPE_Q8_0 ? 34 : 18);
        const uint16_t *at = reinterpret_cast<const uint16_t *>(block + 2 + 8 * (TYPE == TYPE_Q8_0 ? part : part % 2));
        uint32_t two[2] = {at[0] | static_cast<uint32_t>(at[1]) << 16, at[2] | static_cast<uint32_t>(at[3]) << 16};
        const half2 scale = __half2half2(*reinterpret_cast<const half *>(block));
        half2 n[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (TYPE == TYPE_Q4_0) two[h] = two[h] >> 4 * (part / 2) & 0x0f0f0f0fu;
            numbers<TYPE>(two[h], n[2 * h], n[2 * h + 1]);
        }
        return {bits(__hmul2(n[0], scale)), bits(__hmul2(n[1], scale)), bits(__hmul2(n[2], scale)), bits(__hmul2(n[3], scale))};
    }
}

// 64 rows as they are become a tile.
template <uint32_t TYPE, int D, int THREADS>
__device__ __forceinline__ void convert(unsigned char *memory, uint32_t tile, const char *raw) {
    constexpr int CHUNKS = D / 8;
#pragma unroll 4
    for (int i = own_thread(); i < PREFILL_KEYS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        *reinterpret_cast<uint4 *>(memory + chunk_at<PREFILL_KEYS>(tile, row, chunk)) = eight_of<TYPE>(raw + row * RAW<TYPE, D>, chunk);
    }
}

}  // namespace

// Grid: (n_block).
template <class Path, int DK, int DV>
__device__ void attend_any_panels(const Prefill &p) {
    using Own = AnyLayout<DK, DV>;
    constexpr int MT = Path::MT, THREADS = Path::THREADS, RING = Own::RING;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Call &call = p.call;
    const Runs runs(p);
    if (blockIdx.x >= runs.n_block) return;
    const uint32_t q = shared_address(memory);
    int *ring = reinterpret_cast<int *>(memory + Own::CELLS);
    uint32_t *rows = reinterpret_cast<uint32_t *>(memory + Own::ROWS);
    Lists &lists = *reinterpret_cast<Lists *>(memory + Own::LISTS);
    const uint32_t begin = runs.start(blockIdx.x), stop = runs.start(blockIdx.x + 1);
    const bool plain = call.k_type == TYPE_F16 && call.v_type == TYPE_F16;
    char *const raw_keys = reinterpret_cast<char *>(memory) + Own::QUERIES + Own::AREA, *const raw_values = raw_keys + Own::KEYS;

    for (uint32_t unit = begin; unit < stop;) {
        const Segment at(p, unit);
        const uint32_t from = at.from, to = min(at.steps, from + stop - unit), head_kv = at.pair.head_kv;
        const uint32_t columns = min(at.tile.n_row * call.group - at.part * PREFILL_COLUMNS, PREFILL_COLUMNS);
        const char *keys = keys_of(call, at.tile.stream / call.k_share, head_kv), *values = values_of(call, at.tile.stream / call.v_share, head_kv);
        // What the last segment left is no longer read.
        __syncthreads();
        if (threadIdx.x == 0) lists.set(p, at);
        load_queries<THREADS, DK>(p, head_kv, at.tile, at.part, memory, 0, PREFILL_COLUMNS, threadIdx.x, 1.0f, 0,
                                  [](int, int, Quads<DK> &) {});
        if (threadIdx.x < PREFILL_COLUMNS) rows[threadIdx.x] = row_of(p, at.tile, at.part, threadIdx.x);
        __syncthreads();
        Cells<1, 1, RING> cells = {call, lists, steps_of(lists.n_always), at.steps, 0};
        cells.begin(from, ring);
        __syncthreads();
        // Where a step's tiles are, from the queries on.
        auto tiles = [&](uint32_t step) { return Own::QUERIES + (plain ? (step - from) % 2 * Own::AREA : 0); };
        auto fetch = [&](uint32_t step) {
            const int *own = ring + step % RING * PREFILL_KEYS;
            if (step < to && plain) {
                copy_tile<DK, THREADS>(q + tiles(step), keys, call.k.nb1, own);
                copy_tile<DV, THREADS>(q + tiles(step) + Own::KEYS, values, call.v.nb1, own);
            } else if (step < to) {
                with_type<DK>(call.k_type, [&](auto tag) { copy_raw<decltype(tag)::value, DK, THREADS>(raw_keys, keys, call.k.nb1, own); });
                with_type<DV>(call.v_type, [&](auto tag) { copy_raw<decltype(tag)::value, DV, THREADS>(raw_values, values, call.v.nb1, own); });
            }
            commit_copies();
        };
        fetch(from);
        Softmax<MT> softmax;
        softmax.reset();
        float acc[MT][DV / 8][4], s[MT][8][4];
        uint32_t weights[MT][4][4];
        clear<MT, DV>(acc);
        const int first_row = Path::first_row();
        InShared<MT, DK> queries;
        queries.load(q, first_row);
        const bool works = Path::works(columns);
        for (uint32_t step = from; step < to; ++step) {
            // Copies of a step are there, and what the step before has used is free.
            await_copies<0>();
            __syncthreads();
            if (!plain) {
                with_type<DK>(call.k_type, [&](auto tag) { convert<decltype(tag)::value, DK, THREADS>(memory, tiles(step), raw_keys); });
                with_type<DV>(call.v_type,
                              [&](auto tag) { convert<decltype(tag)::value, DV, THREADS>(memory, tiles(step) + Own::KEYS, raw_values); });
                __syncthreads();
            }
            fetch(step + 1);
            cells.advance(step, ring);
            if (!works) continue;
            Path::template scores<DK>(s, queries, q + tiles(step));
            finish_scores<MT>(s, call, step, cells.always_steps, at.steps, ring + step % RING * PREFILL_KEYS, rows, first_row);
            if (softmax.add(s)) softmax.rescale(acc);
            pack_weights(weights, s);
            Path::template values<DV>(acc, weights, q + tiles(step) + Own::KEYS);
        }
        // A panel that is all this block's is done; of others there are parts.
        const bool whole = from == 0 && to == at.steps;
        const uint32_t state = 2 * blockIdx.x + (unit == begin ? 0 : 1);
        write_columns<MT, DV>(p, acc, softmax, at, rows, columns, first_row, whole, state);
        unit += to - from;
    }
}

#define PREFILL_ATTEND(DK, DV, MT, BLOCKS)                                                               \
    extern "C" __global__ void __launch_bounds__(Warps<MT>::THREADS, BLOCKS) prefill_attend_##DK##_##DV( \
        const __grid_constant__ Prefill p) {                                                             \
        attend_any_panels<Warps<MT>, DK, DV>(p);                                                         \
    }

}  // namespace squeeze
