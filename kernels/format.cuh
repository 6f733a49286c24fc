// Rows of K and V of every type: on their way to shared memory, and from there into fragments of the tensor cores.
//
// Blocks of quantised rows are taken two at a time: 64 elements are 17 words of four bytes in Q8_0, 9 in Q4_0. In bytes the even
// block is [scale 0..2][numbers], the odd one begins with the upper half of word 8 (4): its numbers are whole words, those of the
// even block are but for the first two and the last two, which are put together as one. Who holds which element is up to us, as
// long as both sides of a product agree: `key_dim` and `value_dim` say.
#pragma once

#include "common.cuh"

namespace squeeze {
namespace {

template <uint32_t TYPE, int D>
struct Format {
    static constexpr bool QUANTISED = TYPE == TYPE_Q8_0 || TYPE == TYPE_Q4_0;
    // Heads of a quantised cache are whole blocks.
    static constexpr bool EXISTS = !QUANTISED || D % 32 == 0;
    static constexpr int BYTES = TYPE == TYPE_Q8_0 ? D / 32 * 34 : TYPE == TYPE_Q4_0 ? D / 32 * 18 : 2 * D;
    // Bytes that are copied at a time: rows lie on multiples of these.
    static constexpr int UNIT = BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : BYTES % 4 == 0 ? 4 : 2;
    static constexpr int N_UNIT = BYTES / UNIT;
};

template <uint32_t TYPE>
struct Tag {
    static constexpr uint32_t value = TYPE;
};

// Calls `f` with the tag of a type, which is the same for the whole call.
template <int D, typename F>
__device__ __forceinline__ void with_type(uint32_t type, F f) {
    if (type == TYPE_F16) return f(Tag<TYPE_F16>());
    if (type == TYPE_BF16) return f(Tag<TYPE_BF16>());
    if constexpr (D % 32 == 0) {
        if (type == TYPE_Q8_0) return f(Tag<TYPE_Q8_0>());
        if (type == TYPE_Q4_0) return f(Tag<TYPE_Q4_0>());
    }
}

// Element of a K row in place e of a thread's four of product `step`, which has 16 elements.
__device__ __forceinline__ int key_dim(uint32_t type, int step, int c, int e) {
    if (type != TYPE_Q8_0 && type != TYPE_Q4_0) return 16 * step + 2 * c + e % 2 + 8 * (e / 2);
    const int block = step / 2, odd = block % 2;
    if (type == TYPE_Q8_0) {
        const int i = 4 * (step % 2) + e;
        return 32 * block + (odd ? 8 * c + i : c != 0 ? 8 * c - 2 + i : i < 2 ? i : i < 4 ? 28 + i : i - 2);
    }
    return 32 * block + 16 * (step % 2) + (odd ? 4 * c + e : c != 0 ? 4 * c - 2 + e : e < 2 ? e : 12 + e);
}

// Element of a V row that product i has in row r + 8 half.
template <uint32_t TYPE>
__device__ __forceinline__ int value_dim(int i, int r, int half) {
    if (TYPE != TYPE_Q8_0 && TYPE != TYPE_Q4_0) return 16 * i + r + 8 * half;
    const int odd = i / 2 % 2, e = 2 * (i % 2) + half, first = 64 * (i / 4) + 32 * odd;
    if (TYPE == TYPE_Q8_0) return first + (odd ? 4 * r + e : r != 0 ? 4 * r - 2 + e : e < 2 ? e : 28 + e);
    const int word = r % 4;
    return first + 16 * (r / 4) + (odd ? 4 * word + e : word != 0 ? 4 * word - 2 + e : e < 2 ? e : 12 + e);
}

// N bytes to shared memory, or zeros.
template <int N, bool WHOLE_LINES>
__device__ __forceinline__ void copy(char *to, const char *from, bool there) {
    if constexpr (N == 16 && WHOLE_LINES) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                     : "memory");
    } else if constexpr (N == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? N : 0), "n"(N)
                     : "memory");
    }
}
// Brings the rows of a tile's cells, key l % 16 in lane l (-1: zeros), to rows of `stage` bytes. Four threads of a row take units
// side by side.
template <uint32_t TYPE, int D>
__device__ __forceinline__ void copy_rows(char *to, uint32_t stage, const char *rows, uint64_t nb1, int cell) {
    using Row = Format<TYPE, D>;
    const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int own = __shfl_sync(ALL, cell, r + 8 * h);
        const char *from = rows + max(own, 0) * nb1 + Row::UNIT * c;
        char *at = to + (r + 8 * h) * stage + Row::UNIT * c;
        constexpr int N = (Row::N_UNIT + 3) / 4;
        if constexpr (Row::UNIT >= 4) {
#pragma unroll
            for (int u = 0; u < N; ++u)
                if (4 * u + 3 < Row::N_UNIT || 4 * u + c < Row::N_UNIT)
                    copy<Row::UNIT, Row::BYTES % 128 == 0>(at + 4 * Row::UNIT * u, from + 4 * Row::UNIT * u, own >= 0);
        } else {
            // Too little for a copy that nobody waits for.
            constexpr int EACH = 4;
#pragma unroll 1
            for (int u = 0; u < N; u += EACH) {
                uint16_t part[EACH];
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    part[i] = 0;
                    if (4 * (u + i) + c < Row::N_UNIT && own >= 0) part[i] = __ldg(reinterpret_cast<const uint16_t *>(from + 8 * (u + i)));
                }
#pragma unroll
                for (int i = 0; i < EACH; ++i)
                    if (4 * (u + i) + c < Row::N_UNIT) *reinterpret_cast<uint16_t *>(at + 8 * (u + i)) = part[i];
            }
        }
    }
}

// As mma, of BF16.
__device__ __forceinline__ void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], uint2 b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_f16(float (&acc)[4], const uint32_t (&a)[4], uint2 b) { mma(acc, a[0], a[1], a[2], a[3], b.x, b.y); }

// Two numbers as the sum of two of BF16 each.
__device__ __forceinline__ void split(float low, float high, uint32_t &large, uint32_t &rest) {
    const __nv_bfloat162 l = __floats2bfloat162_rn(low, high);
    const __nv_bfloat162 s = __floats2bfloat162_rn(low - __low2float(l), high - __high2float(l));
    large = *reinterpret_cast<const uint32_t *>(&l);
    rest = *reinterpret_cast<const uint32_t *>(&s);
}

// Four unsigned bytes less BIAS as F16: 1024 + n has the bits 0x6400 + n.
template <int BIAS>
__device__ __forceinline__ void widen(uint32_t bytes, half2 &low, half2 &high) {
    const half2 bias = __floats2half2_rn(1024.0f + BIAS, 1024.0f + BIAS);
    const uint32_t l = __byte_perm(bytes, 0x64646464u, 0x4140), h = __byte_perm(bytes, 0x64646464u, 0x4342);
    low = __hsub2(*reinterpret_cast<const half2 *>(&l), bias);
    high = __hsub2(*reinterpret_cast<const half2 *>(&h), bias);
}
// Four numbers of Q8_0 (signed bytes), or of Q4_0 with zeros between them.
template <uint32_t TYPE>
__device__ __forceinline__ void numbers(uint32_t bytes, half2 &low, half2 &high) {
    if (TYPE == TYPE_Q8_0) widen<128>(bytes ^ 0x80808080u, low, high);
    else widen<8>(bytes, low, high);
}
__device__ __forceinline__ uint32_t bits(half2 x) { return *reinterpret_cast<const uint32_t *>(&x); }
__device__ __forceinline__ half2 halves(uint32_t x) { return *reinterpret_cast<const half2 *>(&x); }

// Four bytes of two rows, as numbers for rows r and r + 8 of a product.
template <uint32_t TYPE, int NT>
__device__ __forceinline__ void add_scores(float (&s)[NT][4], uint32_t x, uint32_t y, const uint2 *q, int stride) {
    half2 a0, a1, a2, a3;
    numbers<TYPE>(x, a0, a2);
    numbers<TYPE>(y, a1, a3);
#pragma unroll
    for (int t = 0; t < NT; ++t) {
        const uint2 b = q[t * stride];
        mma(s[t], bits(a0), bits(a1), bits(a2), bits(a3), b.x, b.y);
    }
}

// Scores of a tile of K rows. q: a thread's part of the queries, [NT][D / 16][2][32] in the order of key_dim, the second of the two
// what BF16 leaves over.
template <uint32_t TYPE, int D, int NT>
__device__ __forceinline__ void score_rows(float (&s)[NT][4], const char *rows, uint32_t stage, const uint2 *q) {
    constexpr int EACH = D / 16 * 64;
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    if constexpr (!Format<TYPE, D>::QUANTISED) {
        const uint32_t at = shared_address(rows) + (lane % 8 + (lane & 8)) * stage + (lane & 16);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            uint32_t a[4];
            load_matrices(a, at + 32 * i);
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                const uint2 *b = q + t * EACH + 64 * i;
                if (TYPE == TYPE_F16) mma_f16(s[t], a, b[0]);
                else mma_bf16(s[t], a, b[0]), mma_bf16(s[t], a, b[32]);
            }
        }
    } else {
        constexpr int WORDS = TYPE == TYPE_Q8_0 ? 17 : 9, MIDDLE = WORDS / 2, EVEN = TYPE == TYPE_Q8_0 ? 2 : 1;
#pragma unroll
        for (int p = 0; p < (D + 63) / 64; ++p) {
            const uint32_t *row[2];
            uint32_t first[2], middle[2], x[2][EVEN];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                row[h] = reinterpret_cast<const uint32_t *>(rows + (r + 8 * h) * stage) + WORDS * p;
                first[h] = row[h][0], middle[h] = row[h][MIDDLE];
#pragma unroll
                for (int i = 0; i < EVEN; ++i) x[h][i] = row[h][EVEN * c + i];
                if (c == 0) x[h][0] = __byte_perm(first[h], middle[h], 0x5432);
            }
            const uint2 *b = q + 64 * 4 * p;
            auto block = [&](const uint32_t (&x)[2][EVEN], const uint2 *b, float d0, float d1) {
                float part[NT][4] = {};
                if constexpr (TYPE == TYPE_Q8_0) {
                    add_scores<TYPE, NT>(part, x[0][0], x[1][0], b, EACH);
                    add_scores<TYPE, NT>(part, x[0][1], x[1][1], b + 64, EACH);
                } else {
                    add_scores<TYPE, NT>(part, x[0][0] & 0x0f0f0f0fu, x[1][0] & 0x0f0f0f0fu, b, EACH);
                    add_scores<TYPE, NT>(part, x[0][0] >> 4 & 0x0f0f0f0fu, x[1][0] >> 4 & 0x0f0f0f0fu, b + 64, EACH);
                }
#pragma unroll
                for (int t = 0; t < NT; ++t) {
                    s[t][0] += d0 * part[t][0], s[t][1] += d0 * part[t][1];
                    s[t][2] += d1 * part[t][2], s[t][3] += d1 * part[t][3];
                }
            };
            block(x, b, __low2float(halves(first[0])), __low2float(halves(first[1])));
            if (64 * p + 32 < D) {
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int i = 0; i < EVEN; ++i) x[h][i] = row[h][MIDDLE + 1 + EVEN * c + i];
                block(x, b + 128, __high2float(halves(middle[0])), __high2float(halves(middle[1])));
            }
        }
    }
}

// Weights of a tile's keys as right sides: F16, or the sum of two of BF16.
template <int NT>
struct Weights {
    uint2 large[NT], rest[NT];

    template <uint32_t TYPE>
    __device__ __forceinline__ void set(const float (&p)[NT][4]) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            if (TYPE == TYPE_BF16) {
                uint32_t l0, l1, s0, s1;
                split(p[t][0], p[t][1], l0, s0);
                split(p[t][2], p[t][3], l1, s1);
                large[t] = {transpose(l0), transpose(l1)};
                rest[t] = {transpose(s0), transpose(s1)};
            } else {
                large[t] = {transpose(pack(p[t][0], p[t][1])), transpose(pack(p[t][2], p[t][3]))};
            }
        }
    }
};

// Adds the weighted sum of a tile of V rows.
template <uint32_t TYPE, int D, int NT>
__device__ __forceinline__ void add_rows(float (&acc)[NT][D / 16][4], const char *rows, uint32_t stage, const Weights<NT> &weights) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    if constexpr (!Format<TYPE, D>::QUANTISED) {
        const uint32_t at = shared_address(rows) + (lane % 8 + (lane & 16) / 2) * stage + 2 * (lane & 8);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            uint32_t a[4];
            load_transposed(a, at + 32 * i);
#pragma unroll
            for (int t = 0; t < NT; ++t) {
                if (TYPE == TYPE_F16) mma_f16(acc[t][i], a, weights.large[t]);
                else mma_bf16(acc[t][i], a, weights.large[t]), mma_bf16(acc[t][i], a, weights.rest[t]);
            }
        }
    } else {
        constexpr int WORDS = TYPE == TYPE_Q8_0 ? 17 : 9, MIDDLE = WORDS / 2;
        // Threads r and r + 4 take the halves of the same bytes of Q4_0.
        const int word = TYPE == TYPE_Q8_0 ? r : r % 4, shift = TYPE == TYPE_Q8_0 ? 0 : 4 * (r / 4);
        auto own = [&](uint32_t x) { return TYPE == TYPE_Q8_0 ? x : x >> shift & 0x0f0f0f0fu; };
        // Keys 2c, 2c + 1, 2c + 8, 2c + 9.
        const uint32_t *row[4];
#pragma unroll
        for (int h = 0; h < 4; ++h) row[h] = reinterpret_cast<const uint32_t *>(rows + (2 * c + h % 2 + 8 * (h / 2)) * stage);
#pragma unroll
        for (int p = 0; p < (D + 63) / 64; ++p) {
            // Two products: four elements of four keys, and the keys' scales, two at a time.
            auto block = [&](int i, const uint32_t (&x)[4], half2 d0, half2 d1) {
                half2 a[2][4];
                numbers<TYPE>(__byte_perm(x[0], x[1], 0x5140), a[0][0], a[0][1]);
                numbers<TYPE>(__byte_perm(x[0], x[1], 0x7362), a[1][0], a[1][1]);
                numbers<TYPE>(__byte_perm(x[2], x[3], 0x5140), a[0][2], a[0][3]);
                numbers<TYPE>(__byte_perm(x[2], x[3], 0x7362), a[1][2], a[1][3]);
#pragma unroll
                for (int w = 0; w < 2; ++w) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) a[w][e] = __hmul2(a[w][e], e < 2 ? d0 : d1);
#pragma unroll
                    for (int t = 0; t < NT; ++t)
                        mma(acc[t][i + w], bits(a[w][0]), bits(a[w][1]), bits(a[w][2]), bits(a[w][3]), weights.large[t].x, weights.large[t].y);
                }
            };
            uint32_t first[4], middle[4], x[4];
#pragma unroll
            for (int h = 0; h < 4; ++h) {
                first[h] = row[h][WORDS * p], middle[h] = row[h][WORDS * p + MIDDLE];
                x[h] = own(word == 0 ? __byte_perm(first[h], middle[h], 0x5432) : row[h][WORDS * p + word]);
            }
            block(4 * p, x, halves(__byte_perm(first[0], first[1], 0x5410)), halves(__byte_perm(first[2], first[3], 0x5410)));
            if (64 * p + 32 < D) {
#pragma unroll
                for (int h = 0; h < 4; ++h) x[h] = own(row[h][WORDS * p + MIDDLE + 1 + word]);
                block(4 * p + 2, x, halves(__byte_perm(middle[0], middle[1], 0x7632)), halves(__byte_perm(middle[2], middle[3], 0x7632)));
            }
        }
    }
}

// Number i of a row that lies on a multiple of 2.
__device__ __forceinline__ float number(uint32_t type, const char *row, uint32_t i) {
    const uint16_t *at = reinterpret_cast<const uint16_t *>(row);
    if (type == TYPE_F16) return __half2float(__ushort_as_half(at[i]));
    if (type == TYPE_BF16) return __uint_as_float(static_cast<uint32_t>(at[i]) << 16);
    const uint32_t block = i / 32, j = i % 32;
    if (type == TYPE_Q8_0) return __half2float(__ushort_as_half(at[17 * block])) * static_cast<signed char>(row[34 * block + 2 + j]);
    const uint32_t byte = static_cast<unsigned char>(row[18 * block + 2 + j % 16]);
    return __half2float(__ushort_as_half(at[9 * block])) * (static_cast<int>(j < 16 ? byte & 15 : byte >> 4) - 8);
}

// Elements i to i + 7 of such a row, i a multiple of 8, as they are there: loads that do not wait for each other.
struct Eight {
    uint16_t words[8];
    half scale;

    __device__ __forceinline__ void load(uint32_t type, const char *row, uint32_t i) {
        const uint32_t block = i / 32, j = i % 32;
        const bool plain = type == TYPE_F16 || type == TYPE_BF16;
        const char *from = row + (plain ? 2 * i : type == TYPE_Q8_0 ? 34 * block + 2 + j : 18 * block + 2 + j % 16);
        const uint16_t *at = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
        for (int k = 0; k < 8; ++k) words[k] = plain || k < 4 ? __ldg(at + k) : 0;
        const char *own = row + (type == TYPE_Q8_0 ? 34 : 18) * block;
        scale = plain ? __float2half(1) : __ushort_as_half(__ldg(reinterpret_cast<const uint16_t *>(own)));
    }
    // As F16; what is too large for that is the largest.
    __device__ __forceinline__ uint4 numbers(uint32_t type, uint32_t i) const {
        if (type == TYPE_F16) {
            return {words[0] | static_cast<uint32_t>(words[1]) << 16, words[2] | static_cast<uint32_t>(words[3]) << 16,
                    words[4] | static_cast<uint32_t>(words[5]) << 16, words[6] | static_cast<uint32_t>(words[7]) << 16};
        }
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            if (type == TYPE_BF16) {
                x[k] = __uint_as_float(static_cast<uint32_t>(words[k]) << 16);
            } else {
                const uint32_t byte = words[k / 2] >> 8 * (k % 2) & 255;
                const int q = type == TYPE_Q8_0 ? static_cast<signed char>(byte) : static_cast<int>(i % 32 < 16 ? byte & 15 : byte >> 4) - 8;
                x[k] = __half2float(scale) * q;
            }
            x[k] = in_half(x[k]);
        }
        return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
    }
};

}  // namespace
}  // namespace squeeze
