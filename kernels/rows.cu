// Rows: which binding each query row of a graph has, found once per graph, before its layers. Ends bindings whose cells the
// graph is about to write, or whose last clustered token is no longer the one that was bound.
#include "format.cuh"
#include "rows.cuh"

namespace squeeze {
namespace {

__device__ __forceinline__ const half *mask_of(const Rows &call, uint32_t row) {
    const uint32_t stream = row / call.n_query, query = row % call.n_query;
    return reinterpret_cast<const half *>(call.mask.data + query * call.mask.nb1 + stream % call.mask_streams * call.mask.nb3);
}

// Does the graph write a cell that the binding holds?
__device__ bool writes(const Rows &call, const Held &held) {
    bool found = false;
    for (uint32_t w = 0; w < call.n_written; ++w) {
        const Written &written = call.written[w];
        for (uint32_t i = threadIdx.x; i < written.n; i += blockDim.x) {
            const int64_t at = written.wide ? reinterpret_cast<const int64_t *>(written.numbers)[i]
                                            : reinterpret_cast<const int32_t *>(written.numbers)[i];
            const uint64_t stream = static_cast<uint64_t>(at) / held.n_cell, cell = static_cast<uint64_t>(at) % held.n_cell;
            found |= stream == held.stream && (held.holds[cell / 32] >> cell % 32 & 1) != 0;
        }
    }
    return found;
}

// Do the rows of the guarded cell differ from those that were bound?
__device__ bool changed(const Held &held) {
    bool found = false;
    if (held.guard == nullptr) return false;
    for (uint32_t i = threadIdx.x; i < held.k_bytes / 4; i += blockDim.x)
        found |= reinterpret_cast<const uint32_t *>(held.k)[i] != held.guard[i];
    for (uint32_t i = threadIdx.x; i < held.v_bytes / 4; i += blockDim.x)
        found |= reinterpret_cast<const uint32_t *>(held.v)[i] != held.guard[held.k_bytes / 4 + i];
    return found;
}

}  // namespace

// Grid: (parts of the longest prefix, bindings, parts of the rows); the block that ends last decides.
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) rows_of(const __grid_constant__ Rows call) {
    const Held &held = call.held[blockIdx.y];
    if (blockIdx.x == 0 && blockIdx.z == 0) {
        const bool over = writes(call, held) || changed(held);
        if (__syncthreads_or(over) && threadIdx.x == 0) *held.valid = 0;
    }
    const uint32_t begin = blockIdx.x * ROWS_PART, end = min(begin + ROWS_PART, held.n_prefix);
    const uint32_t first = blockIdx.z * ROWS_EACH;
    for (uint32_t row = first; row < min(first + ROWS_EACH, call.n_row); ++row) {
        const half *mask = mask_of(call, row);
        bool hidden = row / call.n_query / call.k_share + call.first_stream != held.stream;
        if (!hidden) {
            for (uint32_t token = begin + threadIdx.x; token < end; token += ROWS_THREADS) {
                const uint32_t cell = held.cells != nullptr ? held.cells[token] : held.first_cell + token;
                hidden |= cell >= call.n_kv || (__half_as_ushort(mask[min(cell, call.n_kv - 1)]) & 0x7fff) != 0;
            }
        }
        if (__syncthreads_or(hidden) && threadIdx.x == 0) call.hidden[blockIdx.y * call.n_row + row] = 1;
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(call.done, 1) == gridDim.x * gridDim.y * gridDim.z - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    int n_sparse = 0;
    for (uint32_t from = 0; from < call.n_row; from += ROWS_THREADS) {
        const uint32_t row = from + threadIdx.x;
        int32_t own = -1;
        if (row < call.n_row) {
            for (int b = call.n_choice - 1; b >= 0; --b) {
                const bool holds = *static_cast<volatile uint32_t *>(call.held[b].valid) != 0;
                if (holds && *static_cast<volatile uint32_t *>(&call.hidden[b * call.n_row + row]) == 0) own = b;
            }
            call.rows[row] = own;
        }
        n_sparse += __syncthreads_count(own >= 0);
    }
    // For the next launch, and for whoever looks from the host.
    for (uint32_t i = threadIdx.x; i < MAX_BOUND * call.n_row; i += ROWS_THREADS) call.hidden[i] = 0;
    if (threadIdx.x == 0) *call.done = 0, *static_cast<volatile uint32_t *>(call.n_sparse) = n_sparse;
    if (threadIdx.x < call.n_bound) {
        *static_cast<volatile uint32_t *>(call.held[threadIdx.x].status) =
            *static_cast<volatile uint32_t *>(call.held[threadIdx.x].valid);
    }
}

// Lists the cells that each row attends whatever it selects, in order: of those that a row of its binding always attends, or of all, the
// ones that its mask shows. Each block counts for itself what comes before its part. Grid: (parts of the longest list, n_row).
extern "C" __global__ void __launch_bounds__(LIST_THREADS) list_visible(const __grid_constant__ Rows call) {
    constexpr int EACH = LIST_PART / LIST_THREADS, WARPS = LIST_THREADS / 32;
    static_assert(WARPS == 32 && LIST_PADDING == 32, "a lane per warp, and per entry behind the list");
    __shared__ uint32_t own_of[WARPS], before_of[WARPS];
    const uint32_t row = blockIdx.y, first = blockIdx.x * LIST_PART, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t bound = call.rows[row];
    const uint32_t *always = bound >= 0 ? call.held[bound].always : nullptr;
    const uint32_t n = bound >= 0 ? call.held[bound].n_always : call.n_kv;
    if (first >= n && first > 0) return;
    const half *mask = mask_of(call, row);
    auto cell_at = [&](uint32_t i) {
        const uint32_t cell = i >= n ? ~0u : always != nullptr ? always[i] : i;
        return cell < call.n_kv && __half_as_ushort(mask[cell]) != 0xfc00 ? cell : ~0u;
    };
    uint32_t before = 0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < first; i += LIST_THREADS) before += cell_at(i) != ~0u;
    uint32_t cells[EACH], shown[EACH], own = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) cells[j] = cell_at(first + 32 * (EACH * warp + j) + lane);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        shown[j] = __ballot_sync(~0u, cells[j] != ~0u);
        own += __popc(shown[j]);
    }
    before = __reduce_add_sync(~0u, before);
    if (lane == 0) own_of[warp] = own, before_of[warp] = before;
    __syncthreads();
    before = __reduce_add_sync(~0u, before_of[lane] + (lane < warp ? own_of[lane] : 0));
    uint32_t *list = call.visible + static_cast<uint64_t>(row) * call.visible_stride;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        if (cells[j] != ~0u) list[before + __popc(shown[j] & ((1u << lane) - 1))] = cells[j];
        before += __popc(shown[j]);
    }
    // The last part's last warp has seen all.
    if (first + LIST_PART < n || warp + 1 < WARPS) return;
    if (lane == 0) call.n_visible[row] = before;
    list[before + lane] = ~0u;
}

namespace {

__device__ __forceinline__ bool is_quantised(uint32_t type) { return type == TYPE_Q8_0 || type == TYPE_Q4_0; }

// Numbers of a cell.
__device__ __forceinline__ uint32_t width(const Compared &side) {
    return is_quantised(side.type) ? 2 * side.n_dim + side.n_peak : side.n_dim;
}

__device__ float scale_of(uint32_t type, const char *row, uint32_t element) {
    const uint32_t bytes = type == TYPE_Q8_0 ? 34 : 18;
    return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t *>(row + element / 32 * bytes)));
}

// Number i of a cell, and what belongs to it, to `out`.
__device__ void compare(const Compared &side, const uint32_t *elements, uint32_t cell, uint32_t i, float *out) {
    const char *row = side.rows + cell * side.nb1;
    const uint32_t d = elements[i];
    if (i >= side.n_dim) {
        // The scale gives it: -8 steps of Q4_0, 127 of Q8_0.
        out[side.n_dim + i] = fabsf(scale_of(side.type, row, d)) * (side.type == TYPE_Q8_0 ? 127 : 8);
        return;
    }
    const uint32_t n = max(side.block, 1u), first = d / n * n;
    float sum = 0;
    for (uint32_t j = 0; j < n; ++j) {
        const float x = number(side.type, row, first + j);
        sum += __popc(d % n & j) % 2 != 0 ? -x : x;
    }
    out[i] = sum * rsqrtf(static_cast<float>(n));
    if (!is_quantised(side.type)) return;
    // Each element of a block has an equal share of its rounding errors, which are uniform in a step.
    float noise = 0;
    for (uint32_t run = first / 32; 32 * run < first + n; ++run) noise += scale_of(side.type, row, 32 * run) * scale_of(side.type, row, 32 * run);
    out[side.n_dim + i] = noise / 12 / max(n / 32, 1u);
}

}  // namespace

// What a search compares of each cell. A thread per element or run.
extern "C" __global__ void __launch_bounds__(ROWS_THREADS) gather(const __grid_constant__ Gather call) {
    const uint32_t n_k = call.k.n_dim + call.k.n_peak, n = n_k + call.v.n_dim + call.v.n_peak;
    const uint64_t at = static_cast<uint64_t>(blockIdx.x) * ROWS_THREADS + threadIdx.x;
    const uint32_t i = at % n;
    const uint64_t cell = at / n;
    if (cell >= call.n_cell) return;
    float *out = call.out + cell * (width(call.k) + width(call.v));
    if (i < n_k) compare(call.k, call.elements, cell, i, out);
    else compare(call.v, call.elements + n_k, cell, i - n_k, out + width(call.k));
}

}  // namespace squeeze
