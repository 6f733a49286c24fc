// A team: the blocks that work on one (row, KV head) together, a cluster in the hardware's terms. Before sm_90 it is one block.
#pragma once

#include "common.cuh"

namespace squeeze {

// Blocks of a team at most: more are not portable.
constexpr int MAX_TEAM = 8;

__device__ __forceinline__ uint32_t team_size() {
    uint32_t n = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));
#endif
    return n;
}

// Every thread announces itself at its start, and waits before it first touches another block's shared memory.
__device__ __forceinline__ void announce(uint32_t team) {
#if __CUDA_ARCH__ >= 900
    if (team > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_team(uint32_t team) {
#if __CUDA_ARCH__ >= 900
    if (team > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Barrier over the team, for its shared memory.
__device__ __forceinline__ void sync_team(uint32_t team) {
#if __CUDA_ARCH__ >= 900
    if (team > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

#if __CUDA_ARCH__ >= 900
// The same place in another block's shared memory.
__device__ __forceinline__ uint32_t place_in(const uint32_t *at, uint32_t block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(block));
    return there;
}
#endif
__device__ __forceinline__ void put(uint32_t *at, uint32_t block, uint32_t value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(place_in(at, block)), "r"(value) : "memory");
#else
    *at = value;
#endif
}
__device__ __forceinline__ uint32_t get(const uint32_t *at, uint32_t block) {
#if __CUDA_ARCH__ >= 900
    uint32_t value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(place_in(at, block)) : "memory");
    return value;
#else
    return *at;
#endif
}

}  // namespace squeeze
