// Merge of a prefill: what blocks of attend have left of panels that they share becomes output.
#include "prefill.cuh"

namespace squeeze {

// Panels that several blocks have worked at. Grid: (n_block - 1, 4); each block has a fourth of the columns.
template <int D>
__device__ void merge_panels(const Prefill &p) {
    constexpr int EACH = (D + 31) / 32;
    const Call &call = p.call;
    const Runs runs(p);
    const uint32_t block = blockIdx.x + 1, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (block >= runs.n_block) return;
    auto there = [&](int i) { return D % 32 == 0 || lane + 32 * i < D; };
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
            for (int i = 0; i < EACH; ++i) v[i] = there(i) ? p.state[place * D + lane + 32 * i] : 0;
            const float top = fmaxf(m, norm.x);
            if (top == -INFINITY) continue;
            const float old = exp2_fast(m - top), more = exp2_fast(norm.x - top);
            m = top, l = l * old + norm.y * more;
#pragma unroll
            for (int i = 0; i < EACH; ++i) acc[i] = acc[i] * old + v[i] * more;
        }
        float *out = output_of(call, row, head);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (there(i)) out[lane + 32 * i] = l > 0 ? acc[i] / l : 0;
    }
}

#define MERGE(D) \
    extern "C" __global__ void __launch_bounds__(256) prefill_merge_##D(const __grid_constant__ Prefill p) { merge_panels<D>(p); }
MERGE(64)
MERGE(80)
MERGE(96)
MERGE(112)
MERGE(128)
MERGE(192)
MERGE(256)

}  // namespace squeeze
