// Merge: the blocks' states of a (row, head) become its output.
#include "common.cuh"

namespace squeeze {

// A thread per dimension and group of states; groups are whole warps.
template <int D>
constexpr int LANES = (D + 31) / 32 * 32;

// Grid: (n_row * n_head_kv, group); block: (LANES<D>, MERGE_GROUPS).
template <int D>
__device__ void merge(const Call &call) {
    // States at a time: those that a thread has on their way, times the groups.
    constexpr int EACH = 16, BATCH = EACH * MERGE_GROUPS;
    __shared__ float values[MERGE_GROUPS][LANES<D>];
    const uint32_t pair = blockIdx.x, g = blockIdx.y, d = threadIdx.x, group = threadIdx.y;
    const uint32_t head_kv = pair / call.n_row, row = pair % call.n_row, head = head_kv * call.group + g;
    const int lane = d % 32;
    await_previous(call);
    const uint2 span = call.span[pair];
    const uint32_t n = span.y, step = call.group * (D + 2);
    const float *states = call.state + static_cast<uint64_t>(span.x) * step + g * (D + 2);
    float m = call.sinks != nullptr ? call.sinks[head] * LOG2E : -INFINITY;
    float value = 0, l = m > -INFINITY ? 1 : 0;
    for (uint32_t start = 0; start < n; start += BATCH) {
        float v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const uint32_t at = start + group + MERGE_GROUPS * i;
            v[i] = at < n && (D % 32 == 0 || d < D) ? states[static_cast<uint64_t>(at) * step + d] : 0;
        }
        // Every warp looks at all of the batch's maxima and sums.
        float tops[BATCH / 32], sizes[BATCH / 32], top = m;
#pragma unroll
        for (int i = 0; i < BATCH / 32; ++i) {
            const uint32_t at = start + lane + 32 * i;
            tops[i] = at < n ? states[static_cast<uint64_t>(at) * step + D] : -INFINITY;
            sizes[i] = at < n ? states[static_cast<uint64_t>(at) * step + D + 1] : 0;
            top = fmaxf(top, tops[i]);
        }
#pragma unroll
        for (int o = 16; o > 0; o /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        if (top == -INFINITY) continue;
        const float factor = exp2_fast(m - top);
        value *= factor, l *= factor, m = top;
        float weights[BATCH / 32], sum = 0;
#pragma unroll
        for (int i = 0; i < BATCH / 32; ++i) {
            weights[i] = exp2_fast(tops[i] - top);
            sum += weights[i] * sizes[i];
        }
#pragma unroll
        for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
        l += sum;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            value += __shfl_sync(ALL, weights[MERGE_GROUPS * i / 32], (group + MERGE_GROUPS * i) % 32) * v[i];
        }
    }
    values[group][d] = value;
    __syncthreads();
    if (group > 0 || (D % 32 != 0 && d >= D)) return;
#pragma unroll
    for (int w = 1; w < MERGE_GROUPS; ++w) value += values[w][d];
    const RowAt place(call, row);
    float *out = reinterpret_cast<float *>(call.dst.data + head * call.dst.nb1 + place.query * call.dst.nb2 + place.stream * call.dst.nb3);
    out[d] = l > 0 ? value / l : 0;
}

#define MERGE(D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(LANES<D> *MERGE_GROUPS) merge_##D(const __grid_constant__ Call call) { \
        merge<D>(call);                                                                                                 \
    }
MERGE(64)
MERGE(80)
MERGE(96)
MERGE(112)
MERGE(128)
MERGE(192)
MERGE(256)

}  // namespace squeeze
