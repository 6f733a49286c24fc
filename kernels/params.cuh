// What a call hands to its kernels, by value. Mirrored field by field in src/attention/cuda/params.rs, whose tests compare
// sizes. Lengths count elements, strides bytes, unless a comment says otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace squeeze {

// Bindings that one call may name, and checking blocks per binding.
constexpr int MAX_BOUND = 4;
constexpr int CHECK_BLOCKS = 8;
// Tokens of a binding whose digest a checking block compares per call.
constexpr int SAMPLE = 8;
// Keys or clusters of a tile: one side of the tensor core's product.
constexpr int TILE = 16;
// Columns (query heads) of a tile: its other side.
constexpr int COLUMNS = 8;
constexpr int LOOKUP_WARPS = 4;
constexpr int ATTEND_WARPS = 4;
// Groups of threads of a merge block.
constexpr int MERGE_GROUPS = 4;
// Tiles of sinks of a binding at most.
constexpr int SINK_TILES = 8;
// (row, KV head) pairs of a call, and query heads per KV head, at most.
constexpr int MAX_PAIRS = 2048;
constexpr int MAX_GROUP = 16;
// Columns of a prefill's panel: (row, head of the group).
constexpr int PREFILL_COLUMNS = 128;

enum Spread : uint32_t { SPREAD_NONE = 0, SPREAD_RADIUS = 1, SPREAD_DIAG = 2 };
enum Mode : uint32_t { MODE_BUDGET = 0, MODE_THRESHOLD = 1, MODE_MASS = 2 };
// Elements of K and V, in ggml's layouts: blocks of 32 behind an F16 scale, in the quantised types.
enum Type : uint32_t {
    TYPE_F16 = 0,
    TYPE_BF16 = 1,
    TYPE_Q8_0 = 2,
    TYPE_Q4_0 = 3,
};

// One indexed layer, resident on the device; arrays as in index::LayerView, KV head outermost.
struct Layer {
    const half *centroids;
    const half *mean_values;
    const uint8_t *variances;
    const float *variance_scales;
    const float *radii;
    // Rows of offset_stride numbers, on multiples of 16 bytes.
    const uint32_t *offsets;
    const uint32_t *members;
    // Of a coarse level's clusters: offsets that count fine clusters, in rows like those of `offsets`, which count keys.
    const uint32_t *fine;
    uint32_t offset_stride;
    uint32_t n_cluster;
    uint32_t n_clustered;
    uint32_t n_prefix;
    uint32_t n_sink;
};

// An indexed layer bound to cells of the cache.
struct Bound {
    Layer layer;
    // [n_prefix] cell of each prefix token; null: token t is in cell first_cell + t.
    const uint32_t *cells;
    // [n_always] cells always attended, the sinks first.
    const uint32_t *always;
    // [n_head_kv] K rows that guard_cell held when it was bound, one after the other; null: not checked.
    const half *guard;
    // [1] 0: the binding no longer holds; null: it does. Cleared by a failed check of the guard.
    uint32_t *valid;
    // [n_prefix] hash of a K and a V row of each token when it was bound, and [CHECK_BLOCKS] where in its part of the prefix a
    // checking block goes on; null: not checked.
    uint64_t *digests;
    uint32_t *turns;
    uint32_t first_cell;
    uint32_t n_always;
    uint32_t guard_cell;
    // Keys that the clusters kept by share must reach; ~0: all clusters.
    uint32_t target;
    // Likewise, the floor of threshold mode.
    uint32_t floor;
    // Stream of K and V that the binding's cells are in.
    uint32_t stream;
};

// A strided array; dimension 0 is contiguous.
struct Strided {
    char *data;
    uint64_t nb1, nb2, nb3;
};

// What select leaves for attend about one (row, KV head).
struct Work {
    // Binding; -1: every cell below n_kv is attended, as far as the mask shows it.
    int32_t bound;
    uint32_t n_kept;
    uint32_t n_keys;
    // Tiles of always or all cells, of members, of the estimate.
    uint32_t always_tiles, member_tiles, estimate_tiles;
};

struct Entry {
    // Kept keys before this cluster, and its first member.
    uint32_t before, first;
};

struct Call {
    Strided q, k, v, mask, dst;
    const float *sinks;
    // [n_row] binding of each row; -1: dense.
    const int32_t *rows;
    float scale, softcap, alpha, threshold, mass;
    uint32_t spread, mode, estimate;
    uint32_t n_query, n_row, n_kv, n_head_kv, group;
    // Streams of q per stream of k, of v; extent of the mask in streams (0: there is no mask).
    uint32_t k_share, v_share, mask_streams;
    uint32_t n_bound;
    // Row length of what is kept per cluster, and the largest number of tiles of clusters of a binding.
    uint32_t n_cluster, n_tile;
    // Blocks of lookup that score clusters, blocks of attend.
    uint32_t lookup_blocks, n_block;
    // Tiles that an attend block should have per wave, and waves at most. More work than one wave is done head by head, so
    // that rows of the same KV head run side by side and share what the L2 cache holds.
    uint32_t wave_tiles, max_waves;
    // Tiles of members of a (row, KV head) at most.
    uint32_t max_tiles;
    // Blocks of the lookup among opened clusters per pair; row lengths of `opened_entries` (less 1) and `opened_directory`.
    uint32_t n_part, opened_cluster, opened_tiles;
    // Partial sums of dropped coarse clusters per column: one per warp of their select.
    uint32_t n_dropped;
    uint32_t k_type, v_type;
    // Elements of K and Q that are multiplied by a Hadamard matrix together; 0: none are.
    uint32_t k_block;
    // Bytes of a row of one head, and from one row to the next where it lies in shared memory.
    uint32_t k_bytes, v_bytes, k_stage, v_stage;
    // ALiBi; 0 where there are bindings.
    float max_bias;
    // 1: bindings of rows were found under this very mask, which lookup then does not look at again.
    uint32_t seen;
    // From one row's list of `visible` to the next.
    uint32_t visible_stride;
    Bound bound[MAX_BOUND];
    // Workspace. A pair is head_kv * n_row + row, a column pair * group + head of the group.
    float *y;             // [columns][n_cluster] selection scores
    float *x;             // the same, plain; null without estimate
    float2 *partial;      // [columns][n_tile + SINK_TILES] max and sum of exp of a tile, those of sinks last
    uint32_t *check;      // [MAX_BOUND][CHECK_BLOCKS][n_row] 1: the row must be dense
    Work *work;           // [pairs]
    Entry *entries;       // [pairs][n_cluster + 1]
    uint32_t *directory;  // [pairs][max_tiles] kept cluster of a tile's first key
    uint32_t *kept;       // [pairs][n_cluster / 32] bits; null without estimate
    uint2 *span;          // [pairs] first state of a pair, and their number
    float *state;         // [virtual blocks][group][head_dim_v + 2] values, max, sum
    // Where there is a coarse level, its own lookup and select run first, with a Call whose layers are the coarse ones. These
    // are what that leaves: as work, entries and directory, of coarse clusters, with fine ones in the place of keys.
    const Work *opened;
    const Entry *opened_entries;
    const uint32_t *opened_directory;
    float2 *dropped;      // [columns][n_dropped] max and sum of exp of the coarse clusters that are not opened
    // In place of clusters 0..n_cluster a pair then has those opened, one after the other.
    uint2 *list;          // [pairs][n_cluster] first member, number of keys
    uint32_t *ids;        // [pairs][n_cluster] number in the index; null without estimate
    // Null: not listed. [n_row][visible_stride] the cells that a row with the binding of `rows` attends whatever it selects, as far
    // as its mask shows them, then ~0 up to two tiles, and [n_row] their numbers.
    const uint32_t *visible, *n_visible;
};

// Sizes that the other side counts on.
constexpr int CALL_BYTES = 1112;
constexpr int WORK_BYTES = 24;
static_assert(sizeof(Call) == CALL_BYTES && sizeof(Work) == WORK_BYTES);

}  // namespace squeeze
