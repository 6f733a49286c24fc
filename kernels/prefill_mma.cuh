// Matrix products of a prefill, over tiles in shared memory: rows of D F16 numbers, in panels of 64 numbers (128 bytes) whose
// chunks of 16 bytes are permuted by the row, which is what wgmma calls a swizzle of 128 bytes. `Warps` is for every GPU from
// compute capability 8.0 on, `Hopper` for 9.0 alone. Both leave row r of a warp's 16 (and r + 8) to thread (r, c) = (lane / 4,
// lane % 4), and of each 8 keys or dimensions numbers 2c and 2c + 1.
#pragma once

#include <type_traits>

#include "prefill.cuh"

namespace squeeze {

// Numbers that a row of D takes there: whole panels.
template <int D>
constexpr int PADDED = (D + 63) / 64 * 64;

// Address of a chunk of 16 bytes of a row of a tile of ROWS rows at `base`.
template <int ROWS>
__device__ __forceinline__ uint32_t chunk_at(uint32_t base, int row, int chunk) {
    return base + chunk / 8 * (ROWS * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
}

// Copies 16 bytes from global to shared memory while the thread goes on; zeros unless `there`.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Queries as the left side of a product: 16 rows by 16 numbers each, in registers, or in shared memory until they are wanted.
template <int MT, int D>
struct Held {
    uint32_t a[MT][D / 16][4];

    __device__ __forceinline__ void load(uint32_t q, int first_row) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk)
                load_matrices(a[m][kk], chunk_at<PREFILL_COLUMNS>(q, first_row + 16 * m + lane % 16, 2 * kk + lane / 16));
    }
    __device__ __forceinline__ void get(uint32_t (&to)[4], int m, int kk) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = a[m][kk][i];
    }
};

template <int MT, int D>
struct InShared {
    uint32_t q;
    int first_row;

    __device__ __forceinline__ void load(uint32_t at, int row) { q = at, first_row = row; }
    __device__ __forceinline__ void get(uint32_t (&to)[4], int m, int kk) const {
        const int lane = threadIdx.x % 32;
        load_matrices(to, chunk_at<PREFILL_COLUMNS>(q, first_row + 16 * m + lane % 16, 2 * kk + lane / 16));
    }
};

// Numbers times a factor per row (r and r + 8), squared.
__device__ __forceinline__ void square(uint32_t (&a)[4], const half2 (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        half2 x = __hmul2(*reinterpret_cast<half2 *>(&a[i]), factor[i % 2]);
        x = __hmul2(x, x);
        a[i] = *reinterpret_cast<uint32_t *>(&x);
    }
}

template <int MT, int D>
struct HeldSquares : Held<MT, D> {
    __device__ __forceinline__ void load(uint32_t q, int first_row, const half2 (&factor)[MT][2]) {
        Held<MT, D>::load(q, first_row);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int kk = 0; kk < D / 16; ++kk) square(this->a[m][kk], factor[m]);
    }
};

template <int MT, int D>
struct SquaresInShared : InShared<MT, D> {
    half2 by[MT][2];

    __device__ __forceinline__ void load(uint32_t at, int row, const half2 (&factor)[MT][2]) {
        InShared<MT, D>::load(at, row);
#pragma unroll
        for (int m = 0; m < MT; ++m) by[m][0] = factor[m][0], by[m][1] = factor[m][1];
    }
    __device__ __forceinline__ void get(uint32_t (&to)[4], int m, int kk) const {
        InShared<MT, D>::get(to, m, kk);
        square(to, by[m]);
    }
};

// Warps of 16 M rows, for every GPU.
template <int M>
struct Warps {
    static constexpr int MT = M, THREADS = 256 / M, ALIGNMENT = 1;
    // Queries of a lookup without and with squares, and these.
    template <int D, bool DIAG>
    using Queries = std::conditional_t<DIAG || (D > 128), InShared<MT, D>, Held<MT, D>>;
    template <int D>
    using Squares = SquaresInShared<MT, D>;

    __device__ static __forceinline__ int first_row() { return threadIdx.x / 32 * (16 * M); }
    // Is there work for the warp, with so many columns?
    __device__ static __forceinline__ bool works(uint32_t columns) { return static_cast<uint32_t>(first_row()) < columns; }
    // What this thread has written is there for the tensor cores, once all threads have met.
    __device__ static __forceinline__ void publish() {}

    // Scores of the warp's rows with 64 keys.
    template <int D, typename Left>
    __device__ static __forceinline__ void scores(float (&s)[MT][8][4], const Left &q, uint32_t k) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int t = 0; t < 8; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[m][t][e] = 0;
        // Queries in registers want all; of long ones in shared memory the addresses alone would fill the registers.
        constexpr int AT_ONCE = D > 128 ? 4 : D / 16;
#pragma unroll AT_ONCE
        for (int kk = 0; kk < D / 16; ++kk) {
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) q.get(a[m], m, kk);
#pragma unroll
            for (int t = 0; t < 8; t += 2) {
                uint32_t b[4];
                load_matrices(b, chunk_at<PREFILL_KEYS>(k, 8 * t + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma(s[m][t], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    mma(s[m][t + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                }
            }
        }
    }
    // acc += p v; p[m][j]: keys 16 j to 16 j + 15.
    template <int D>
    __device__ static __forceinline__ void values(float (&acc)[MT][D / 8][4], const uint32_t (&p)[MT][4][4], uint32_t v) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int t = 0; t < D / 8; t += 2) {
                uint32_t b[4];
                load_transposed(b, chunk_at<PREFILL_KEYS>(v, 16 * j + lane % 16, t + lane / 16));
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma(acc[m][t], p[m][j][0], p[m][j][1], p[m][j][2], p[m][j][3], b[0], b[1]);
                    mma(acc[m][t + 1], p[m][j][0], p[m][j][1], p[m][j][2], p[m][j][3], b[2], b[3]);
                }
            }
    }
};
using Portable = Warps<2>;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SQZ_ACC(A, I) "+f"(A[I][0]), "+f"(A[I][1]), "+f"(A[I][2]), "+f"(A[I][3])
#define SQZ_ACC8(A, I)                                                                                                 \
    SQZ_ACC(A, I), SQZ_ACC(A, I + 1), SQZ_ACC(A, I + 2), SQZ_ACC(A, I + 3), SQZ_ACC(A, I + 4), SQZ_ACC(A, I + 5), \
        SQZ_ACC(A, I + 6), SQZ_ACC(A, I + 7)
#define SQZ_R32                                                                                                     \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define SQZ_R64                                                                                                           \
    SQZ_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
            "%59,%60,%61,%62,%63"

// Two groups of four warps of 16 rows.
struct Hopper {
    static constexpr int THREADS = 256, MT = 1, ALIGNMENT = 1024;
    template <int D, bool DIAG>
    using Queries = Held<MT, D>;
    template <int D>
    using Squares = HeldSquares<MT, D>;

    __device__ static __forceinline__ int first_row() { return threadIdx.x / 32 * 16; }
    // The same in a whole group.
    __device__ static __forceinline__ bool works(uint32_t columns) { return threadIdx.x / 128 * 64 < columns; }
    __device__ static __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

    // What wgmma is told of a tile with the swizzle of 128 bytes; rows in groups of 8 take 1024 bytes. `panels`: bytes from one
    // panel to the next, where rows are what is summed over.
    __device__ static __forceinline__ uint64_t descriptor(uint32_t at, uint32_t panels) {
        return 1ull << 62 | 64ull << 32 | static_cast<uint64_t>(panels / 16) << 16 | (at & 0x3ffff) / 16;
    }
    __device__ static __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
    __device__ static __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
    // All but the last N products are done.
    template <int N>
    __device__ static __forceinline__ void await() {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    }
    // Nothing is done with these numbers on the other side of this.
    template <int N>
    __device__ static __forceinline__ void hold(float (&a)[N][4]) {
#pragma unroll
        for (int i = 0; i < N; ++i) asm volatile("" : SQZ_ACC(a, i)::"memory");
    }

    // Begins a product, behind a fence; it ends with `await`.
    template <int D>
    __device__ static __forceinline__ void begin_scores(float (&s)[MT][8][4], const Held<MT, D> &q, uint32_t k) {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
            const uint64_t b = descriptor(k + kk / 4 * (PREFILL_KEYS * 128) + kk % 4 * 32, 16);
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SQZ_R32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
                         : SQZ_ACC8(s[0], 0)
                         : "r"(q.a[0][kk][0]), "r"(q.a[0][kk][1]), "r"(q.a[0][kk][2]), "r"(q.a[0][kk][3]), "l"(b), "r"(kk)
                         : "memory");
        }
        commit();
    }
    template <int D>
    __device__ static __forceinline__ void begin_values(float (&acc)[MT][D / 8][4], const uint32_t (&p)[MT][4][4], uint32_t v) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint64_t b = descriptor(v + j * (16 * 128), PREFILL_KEYS * 128);
            if constexpr (D == 128) {
                asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                             "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" SQZ_R64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}"
                             : SQZ_ACC8(acc[0], 0), SQZ_ACC8(acc[0], 8)
                             : "r"(p[0][j][0]), "r"(p[0][j][1]), "r"(p[0][j][2]), "r"(p[0][j][3]), "l"(b), "r"(1)
                             : "memory");
            } else {
                asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                             "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SQZ_R32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}"
                             : SQZ_ACC8(acc[0], 0)
                             : "r"(p[0][j][0]), "r"(p[0][j][1]), "r"(p[0][j][2]), "r"(p[0][j][3]), "l"(b), "r"(1)
                             : "memory");
            }
        }
        commit();
    }
    template <int D>
    __device__ static __forceinline__ void scores(float (&s)[MT][8][4], const Held<MT, D> &q, uint32_t k) {
        hold(s[0]);
        fence();
        begin_scores<D>(s, q, k);
        await<0>();
        hold(s[0]);
    }
};
#endif

// A row of D numbers in the lanes that share it, four at a time: number 4 (lane + LANES j) + e in place e of part j.
template <int D>
struct Quads {
    static constexpr int LANES = D <= 64 ? 16 : 32, N = (D + 4 * LANES - 1) / (4 * LANES);
    float4 x[N];

    __device__ static __forceinline__ bool there(int lane, int j) { return D % (4 * LANES) == 0 || 4 * (lane + LANES * j) < D; }

    template <typename F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = {f(x[j].x), f(x[j].y), f(x[j].z), f(x[j].w)};
    }
    // Each block's product with the Hadamard matrix, its own inverse: from the basis of a cache to that of the index. By whole warps.
    __device__ __forceinline__ void turn(uint32_t block, int lane) {
        if (block < 4) return;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float4 v = {x[j].x + x[j].y, x[j].x - x[j].y, x[j].z + x[j].w, x[j].z - x[j].w};
            x[j] = {v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w};
        }
        for (uint32_t d = 1; d < min(block / 4, static_cast<uint32_t>(LANES)); d *= 2)
            each([&](float own) {
                const float other = __shfl_xor_sync(ALL, own, d);
                return lane & d ? other - own : own + other;
            });
        if constexpr (N == 2) {
            if (block > 4 * LANES) {
                const float4 a = x[0], b = x[1];
                x[0] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
                x[1] = {a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w};
            }
        }
        const float factor = rsqrtf(static_cast<float>(block));
        each([&](float own) { return own * factor; });
    }
};

// Columns `from` to `to` of a panel's queries to shared memory, times the scale and `factor`, blocks of `block` of their numbers (0: none)
// turned, by THREADS threads of which this is `thread`. `look` is given the columns' numbers and may change them.
template <int THREADS, int D, typename Look>
__device__ __forceinline__ void load_queries(const Prefill &p, uint32_t head_kv, const QueryTile &tile, uint32_t part, unsigned char *q,
                                             int from, int to, int thread, float factor, uint32_t block, Look look) {
    constexpr int LANES = Quads<D>::LANES, ROWS = THREADS / LANES, AT_ONCE = 8 / Quads<D>::N;
    const Call &call = p.call;
    const int lane = thread % LANES;
    const float scale = call.scale * factor;
#pragma unroll AT_ONCE
    for (int column = from + thread / LANES; column < to; column += ROWS) {
        const uint32_t row = row_of(p, tile, part, column);
        const float4 *query = nullptr;
        if (row != ALL) query = reinterpret_cast<const float4 *>(query_of(call, row, head_of(p, head_kv, part, column)));
        Quads<D> own;
#pragma unroll
        for (int j = 0; j < Quads<D>::N; ++j) {
            own.x[j] = {0, 0, 0, 0};
            if (row != ALL && own.there(lane, j)) own.x[j] = query[lane + LANES * j];
        }
        own.turn(block, lane);
        own.each([&](float x) { return x * scale; });
        look(column, lane, own);
#pragma unroll
        for (int j = 0; j < Quads<D>::N; ++j) {
            if (!own.there(lane, j)) continue;
            // Chunks begin at the tile's start, whose address is a multiple of 16 bytes.
            unsigned char *at = q + chunk_at<PREFILL_COLUMNS>(0, column, (lane + LANES * j) / 2) + lane % 2 * 8;
            *reinterpret_cast<uint2 *>(at) = {pack(own.x[j].x, own.x[j].y), pack(own.x[j].z, own.x[j].w)};
        }
    }
}

}  // namespace squeeze
