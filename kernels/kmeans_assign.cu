// The nearest cluster of every point, on the tensor cores: a block has a tile of points of one group in registers, and the
// directions of the group's clusters pass by in shared memory.
#include "kmeans.cuh"

namespace squeeze {
namespace {

constexpr int THREADS = 128, TILE_THREADS = 1024;
// Directions in shared memory at a time; twice, one lot on its way.
constexpr int STAGE = 64;

__device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
    const uint32_t at = shared_address(to);
    // Without a source the bytes are zero.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// The runs of clusters that a group is compared with, one after the other.
struct Runs {
    uint32_t at[NEAR + 1], first[NEAR], n;

    // For thread 0.
    __device__ void fill(const Kmeans &call, uint32_t head, uint32_t group) {
        n = call.near != nullptr ? call.n_near : 1;
        at[0] = 0;
        for (uint32_t i = 0; i < n; ++i) {
            const uint32_t other = call.near != nullptr ? call.near[(head * call.n_group + group) * call.n_near + i] : group;
            first[i] = first_cluster(call, head, other);
            at[i + 1] = at[i] + first_cluster(call, head, other + 1) - first[i];
        }
    }
    __device__ __forceinline__ uint32_t cluster(uint32_t place) const {
        uint32_t i = 0;
        while (i + 1 < n && at[i + 1] <= place) ++i;
        return first[i] + place - at[i];
    }
};

}  // namespace

// Grid: (max_tiles, n_head).
template <int D>
__device__ void assign(const Kmeans &call) {
    __shared__ uint4 stage[2][STAGE][D / 8];
    __shared__ uint32_t clusters[2][STAGE];
    __shared__ Runs runs;
    const uint32_t head = blockIdx.y;
    if (blockIdx.x >= call.n_tile[head]) return;
    const uint2 tile = call.tiles[static_cast<uint64_t>(head) * call.max_tiles + blockIdx.x];
    const uint32_t end = call.group_start[head * (call.n_group + 1) + tile.x + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    if (threadIdx.x == 0) runs.fill(call, head, tile.x);

    // Rows r, r + 8, r + 16, r + 24 of the warp's 32, in two tiles of the tensor cores.
    uint4 a[2][2][D / 32];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = row_of(call, call.order, head, min(tile.y + 32 * warp + r + 8 * i, end - 1));
        const half *at = call.unit + (static_cast<uint64_t>(head) * call.n_row + row) * D + 8 * c;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) a[i / 2][i % 2][j] = load_stream(at + 32 * j);
    }
    __syncthreads();
    const uint32_t n = runs.at[runs.n], n_stage = (n + STAGE - 1) / STAGE;
    const half *directions = call.direction + static_cast<uint64_t>(head) * call.n_cluster * D;
    auto list = [&](uint32_t s) {
        const uint32_t place = s * STAGE + threadIdx.x;
        if (threadIdx.x < STAGE) clusters[s % 2][threadIdx.x] = place < n ? runs.cluster(place) : ALL;
    };
    // 16 bytes of odd rows change places with those 64 further on: then no two threads that load at once want the same bank.
    auto fetch = [&](uint32_t s) {
#pragma unroll
        for (int i = 0; i < STAGE * D / 8 / THREADS; ++i) {
            const int chunk = i * THREADS + threadIdx.x, column = chunk / (D / 8), q = chunk % (D / 8);
            const uint32_t cluster = clusters[s % 2][column];
            const half *from = directions + static_cast<uint64_t>(cluster == ALL ? 0 : cluster) * D + 8 * q;
            copy_16(&stage[s % 2][column][q ^ (column % 2 * 4)], from, cluster != ALL);
        }
        commit_copies();
    };
    list(0);
    __syncthreads();
    fetch(0);
    if (n_stage > 1) list(1);

    float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    uint32_t place[4] = {};
    for (uint32_t s = 0; s < n_stage; ++s) {
        await_copies<0>();
        __syncthreads();
        if (s + 1 < n_stage) fetch(s + 1);
        if (s + 2 < n_stage) list(s + 2);
#pragma unroll 2
        for (int t = 0; t < STAGE / 8; ++t) {
            const uint4 *column = stage[s % 2][8 * t + r];
            uint4 b[D / 32];
#pragma unroll
            for (int j = 0; j < D / 32; ++j) b[j] = column[(4 * j + c) ^ (r % 2 * 4)];
            const uint32_t first = s * STAGE + 8 * t + 2 * c;
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float x[4] = {};
                dot<D>(x, a[m], b);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const bool better = x[i] > best[2 * m + i / 2] && first + i % 2 < n;
                    best[2 * m + i / 2] = better ? x[i] : best[2 * m + i / 2];
                    place[2 * m + i / 2] = better ? first + i % 2 : place[2 * m + i / 2];
                }
            }
        }
    }
    // Of equals the first counts.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            const float other = __shfl_xor_sync(ALL, best[i], d);
            const uint32_t where = __shfl_xor_sync(ALL, place[i], d);
            if (other > best[i] || (other == best[i] && where < place[i])) best[i] = other, place[i] = where;
        }
        const uint32_t point = tile.y + 32 * warp + r + 8 * i;
        if (c == 0 && point < end) {
            call.label[static_cast<uint64_t>(head) * call.n_row + row_of(call, call.order, head, point)] = runs.cluster(place[i]);
        }
    }
}

// Where the groups begin, their tiles, and the number of comparisons. Grid: (n_head).
extern "C" __global__ void __launch_bounds__(TILE_THREADS) kmeans_tiles(const __grid_constant__ Kmeans call) {
    __shared__ uint32_t scratch[TILE_THREADS / 32];
    const uint32_t head = blockIdx.x;
    uint32_t *starts = call.group_start + head * (call.n_group + 1);
    const uint32_t *clusters = call.start + head * (call.n_cluster + 1ull);
    auto start_of = [&](uint32_t group) -> uint32_t {
        if (call.n_group == 1) return group * call.n_point;
        return call.nested ? clusters[first_cluster(call, head, group)] : starts[group];
    };
    unsigned long long products = 0;
    uint32_t n_tile = 0;
    for (uint32_t base = 0; base < call.n_group; base += TILE_THREADS) {
        const uint32_t group = base + threadIdx.x;
        uint32_t from = 0, size = 0;
        if (group < call.n_group) {
            from = start_of(group), size = start_of(group + 1) - from;
            uint32_t n = 0;
            const uint32_t n_near = call.near != nullptr ? call.n_near : 1;
            for (uint32_t i = 0; i < n_near; ++i) {
                const uint32_t other = call.near != nullptr ? call.near[(head * call.n_group + group) * call.n_near + i] : group;
                n += first_cluster(call, head, other + 1) - first_cluster(call, head, other);
            }
            products += static_cast<unsigned long long>(size) * n * call.times;
        }
        const uint32_t tiles = (size + POINTS - 1) / POINTS;
        const uint2 sum = sum_before<TILE_THREADS>(tiles, scratch);
        uint2 *out = call.tiles + static_cast<uint64_t>(head) * call.max_tiles + n_tile + sum.x;
        for (uint32_t t = 0; t < tiles; ++t) out[t] = {group, from + t * POINTS};
        n_tile += sum.y;
        if (group < call.n_group) {
            starts[group] = from;
            if (group + 1 == call.n_group) starts[group + 1] = from + size;
        }
    }
    if (products > 0) atomicAdd(call.products + head, products);
    if (threadIdx.x == 0) call.n_tile[head] = n_tile;
}

#define ASSIGN(D)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) kmeans_assign_##D(const __grid_constant__ Kmeans call) { \
        assign<D>(call);                                                                                             \
    }
ASSIGN(64)
ASSIGN(128)

}  // namespace squeeze
