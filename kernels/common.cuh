// Tensor core fragments, loads and reductions that the stages share.
//
// A product has 16 rows (keys or clusters, m) and 8 columns (query heads, n). A thread is (r, c) = (lane / 4, lane % 4): it
// holds rows r and r + 8 of the left side and column r of the right one. Both sides of a dot product may order dimensions
// as they like, so a thread takes 16 contiguous bytes of a row at a time: chunk 4 j + c feeds products 2 j and 2 j + 1.
#pragma once

#include "params.cuh"

namespace squeeze {

constexpr float LOG2E = 1.4426950408889634f;
constexpr unsigned ALL = 0xffffffffu;

// Waits for the results of the previous kernel of the stream, and lets the next one start: not before, so that a kernel that
// has started finds everything done but its direct predecessor. The parameters are brought near meanwhile.
__device__ __forceinline__ void await_previous(const Call &call) {
#if __CUDA_ARCH__ >= 900
    const uint32_t *words = reinterpret_cast<const uint32_t *>(&call);
#pragma unroll
    for (int i = 0; i < CALL_BYTES / 4; i += 16) asm volatile("" ::"r"(words[i]));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ const uint32_t *offsets_of(const Layer &layer, uint32_t head_kv) {
    return layer.offsets + static_cast<uint64_t>(head_kv) * layer.offset_stride;
}

// acc += a b; a: 16 x 16, b: 16 x 8, F16; acc: (r, 2c), (r, 2c + 1), (r + 8, 2c), (r + 8, 2c + 1).
__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit elements in a fragment, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// 2^x in one instruction; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Largest number of F16.
constexpr float HALF_MAX = 65504;
// The nearest number that F16 has room for; infinity and NaN stay.
__device__ __forceinline__ float in_half(float x) { return fabsf(x) < INFINITY ? fminf(fmaxf(x, -HALF_MAX), HALF_MAX) : x; }

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&h);
}

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_stream(const void *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// Dot products of a thread's two rows with 8 columns: a[j] are chunks 4 j + c of row r (0) and r + 8 (1), b[j] of column r.
template <int D>
__device__ __forceinline__ void dot(float (&acc)[4], const uint4 (&a)[2][D / 32], const uint4 (&b)[D / 32]) {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
        mma(acc, a[0][j].x, a[1][j].x, a[0][j].y, a[1][j].y, b[j].x, b[j].y);
        mma(acc, a[0][j].z, a[1][j].z, a[0][j].w, a[1][j].w, b[j].z, b[j].w);
    }
}

// Max and sum over the 8 threads that share c.
__device__ __forceinline__ float max_rows(float v) {
    v = fmaxf(v, __shfl_xor_sync(ALL, v, 4));
    v = fmaxf(v, __shfl_xor_sync(ALL, v, 8));
    return fmaxf(v, __shfl_xor_sync(ALL, v, 16));
}
__device__ __forceinline__ float sum_rows(float v) {
    v += __shfl_xor_sync(ALL, v, 4);
    v += __shfl_xor_sync(ALL, v, 8);
    return v + __shfl_xor_sync(ALL, v, 16);
}

__device__ __forceinline__ uint32_t shared_address(const void *at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Asynchronous copies so far are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last N of the thread's groups have arrived.
template <int N>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

// Sum over the lanes up to one's own.
__device__ __forceinline__ uint32_t sum_upto(uint32_t v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const uint32_t p = __shfl_up_sync(ALL, v, d);
        if (lane >= d) v += p;
    }
    return v;
}

// Where a query row is: its stream and its place in it.
struct RowAt {
    uint32_t stream, query;
    __device__ __forceinline__ RowAt(const Call &call, uint32_t row) : stream(row / call.n_query), query(row % call.n_query) {}
};

__device__ __forceinline__ const float *query_of(const Call &call, uint32_t row, uint32_t head) {
    const RowAt at(call, row);
    return reinterpret_cast<const float *>(call.q.data + at.query * call.q.nb1 + head * call.q.nb2 + at.stream * call.q.nb3);
}

__device__ __forceinline__ const half *mask_of(const Call &call, uint32_t row) {
    if (call.mask_streams == 0) return nullptr;
    const RowAt at(call, row);
    return reinterpret_cast<const half *>(call.mask.data + at.query * call.mask.nb1 + at.stream % call.mask_streams * call.mask.nb3);
}

__device__ __forceinline__ const char *keys_of(const Call &call, uint32_t stream, uint32_t head_kv) {
    return call.k.data + head_kv * call.k.nb2 + stream * call.k.nb3;
}
__device__ __forceinline__ const char *values_of(const Call &call, uint32_t stream, uint32_t head_kv) {
    return call.v.data + head_kv * call.v.nb2 + stream * call.v.nb3;
}

// Key `n` of those that a list of runs holds, for the key at `n = tile * TILE + lane`: the run's first key and what lies before
// it. The directory names the run that a tile starts in; each further run has a key at least, so that 32 of them hold 32 keys.
__device__ __forceinline__ uint32_t key_of(const Entry *entries, const uint32_t *directory, uint32_t n_entry, uint32_t tile) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = directory[tile], key = tile * TILE + lane;
    Entry own = {ALL, 0};
    if (first + lane <= n_entry) own = entries[first + lane];
    int at = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t before = __shfl_sync(ALL, own.before, (at + step) & 31);
        if (at + step < 32 && before <= key) at += step;
    }
    return __shfl_sync(ALL, own.first, at) + key - __shfl_sync(ALL, own.before, at);
}

// A word of a row and its place as one number: the finaliser of MurmurHash3. A digest is the sum over a K and a V row.
__device__ __forceinline__ uint64_t mixed(uint64_t word, uint32_t place) {
    uint64_t h = word + (place + 1) * 0x9e3779b97f4a7c15ull;
    h = (h ^ h >> 33) * 0xff51afd7ed558ccdull;
    h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53ull;
    return h ^ h >> 33;
}
__device__ __forceinline__ uint64_t sum_lanes(uint64_t sum) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(ALL, sum, d);
    return sum;
}

// Bits of a K and a V row as one number, in every lane of the warp that calls. Which head's rows depends on the token, so that
// all heads are looked at in turn. Rows of D elements of 16 bits each.
template <int D>
__device__ __forceinline__ uint64_t digest_of(const Call &call, const Bound &bound, uint32_t token, uint32_t cell) {
    constexpr int LANES = D / 8;
    const int lane = threadIdx.x % 32;
    const uint32_t head_kv = token % call.n_head_kv;
    uint64_t sum = 0;
    if (lane < 2 * LANES) {
        const char *row = lane < LANES ? keys_of(call, bound.stream, head_kv) + cell * call.k.nb1
                                       : values_of(call, bound.stream, head_kv) + cell * call.v.nb1;
        const ulonglong2 own = *reinterpret_cast<const ulonglong2 *>(row + 16 * (lane % LANES));
        sum = mixed(own.x, 2 * lane) + mixed(own.y, 2 * lane + 1);
    }
    return sum_lanes(sum);
}

// Eight bytes of a row of `bytes`, which lie on a multiple of 2; zeros past its end.
__device__ __forceinline__ uint64_t word_of(const char *row, uint32_t i, uint32_t bytes) {
    uint64_t word = 0;
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k)
        if (8 * i + 2 * k < bytes) word |= static_cast<uint64_t>(*reinterpret_cast<const uint16_t *>(row + 8 * i + 2 * k)) << 16 * k;
    return word;
}

// The same number of rows of any type.
__device__ __forceinline__ uint64_t digest_any(const Call &call, const Bound &bound, uint32_t token, uint32_t cell) {
    const uint32_t head_kv = token % call.n_head_kv, n_k = (call.k_bytes + 7) / 8, n_v = (call.v_bytes + 7) / 8;
    const char *k = keys_of(call, bound.stream, head_kv) + cell * call.k.nb1;
    const char *v = values_of(call, bound.stream, head_kv) + cell * call.v.nb1;
    uint64_t sum = 0;
    for (uint32_t i = threadIdx.x % 32; i < n_k + n_v; i += 32)
        sum += mixed(i < n_k ? word_of(k, i, call.k_bytes) : word_of(v, i - n_k, call.v_bytes), i);
    return sum_lanes(sum);
}

__device__ __forceinline__ uint32_t cell_of(const Bound &bound, uint32_t token) {
    return bound.cells != nullptr ? bound.cells[token] : bound.first_cell + token;
}

// Has `list_visible` (rows.cu) listed a row's cells for the binding that the row has now?
__device__ __forceinline__ bool is_listed(const Call &call, uint32_t row, int32_t bound) {
    return call.visible != nullptr && call.rows[row] == bound;
}

// Tiles of a pair in all.
__device__ __forceinline__ uint32_t tiles_of(const Work &work) {
    return work.always_tiles + work.member_tiles + work.estimate_tiles;
}

// Attend works as if it had so many blocks: its own, once per wave, and at least two per pair. A single wave has no more than
// give each warp a tile: merge reads what each block leaves.
__device__ __forceinline__ uint32_t virtual_blocks(const Call &call, uint32_t n_pair, uint32_t n_tile) {
    const uint32_t waves = (n_tile + call.n_block * call.wave_tiles / 2) / (call.n_block * call.wave_tiles);
    const uint32_t least = (2 * n_pair + call.n_block - 1) / call.n_block;
    const uint32_t all = call.n_block * max(min(waves, call.max_waves), least);
    return all > call.n_block ? all : min(all, 2 * n_pair + n_tile / ATTEND_WARPS);
}
// First tile of a block of lookup.
__device__ __forceinline__ uint32_t first_tile(uint32_t block, uint32_t n_block, uint32_t n_tile) {
    return static_cast<uint64_t>(block) * n_tile / n_block;
}

}  // namespace squeeze
