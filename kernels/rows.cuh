// What a graph hands to `rows_of` and a search to `gather`. Mirrored in src/attention/cuda/rows.rs.
#pragma once

#include "params.cuh"

namespace squeeze {

constexpr int ROWS_THREADS = 256;
// Tokens of a prefix that a block looks up in the masks.
constexpr uint32_t ROWS_PART = 2048;
// Rows that a block looks at, one after the other.
constexpr uint32_t ROWS_EACH = 16;
// Of `list_visible`: threads of a block, and cells that it looks at.
constexpr int LIST_THREADS = 1024;
constexpr uint32_t LIST_PART = 8192;
// Entries behind a list: attend fetches two tiles at a time.
constexpr uint32_t LIST_PADDING = 2 * TILE;
// Tensors of row numbers that a graph writes its cache by.
constexpr int MAX_WRITTEN = 4;

// Numbers of cache rows (cell + stream * cells per stream): 64 bits `wide`, or 32.
struct Written {
    const void *numbers;
    uint32_t n;
    uint32_t wide;
};

// A binding, as `Bound`.
struct Held {
    const uint32_t *cells;
    // [n_cell] bits: is the cell one of the prefix's?
    const uint32_t *holds;
    // Rows of all KV heads of one cell in the deepest layer, and the bytes, K's before V's, that they had when bound.
    const char *k, *v;
    const uint32_t *guard;
    uint32_t *valid;
    // Host memory: `valid` after the last launch.
    uint32_t *status;
    const uint32_t *always;
    uint32_t first_cell, n_prefix, stream, n_cell, k_bytes, v_bytes, n_always, unused;
};

struct Rows {
    Strided mask;
    Written written[MAX_WRITTEN];
    Held held[MAX_BOUND];
    // [n_row] binding of each row, -1: dense.
    int32_t *rows;
    // [MAX_BOUND][n_row] and a counter: 0 between launches.
    uint32_t *hidden, *done;
    // `n_row` may be 0: then only the bindings are checked.
    // The first `n_choice` bindings are those that rows may have.
    uint32_t n_query, n_row, n_kv, k_share, first_stream, mask_streams, n_bound, n_choice, n_written, visible_stride;
    // Host memory: rows that have a binding, after the last launch.
    uint32_t *n_sparse;
    // As in `Call`.
    uint32_t *visible, *n_visible;
};

// What a search compares of the K or the V rows of a cache, in the basis of the index.
struct Compared {
    const char *rows;
    uint64_t nb1;
    uint32_t type;
    // Elements that are multiplied by a Hadamard matrix together; 0: none are.
    uint32_t block;
    // Elements, and runs of 32 whose largest magnitude is wanted: of quantised rows alone.
    uint32_t n_dim, n_peak;
};

struct Gather {
    Compared k, v;
    // K's elements, the first ones of its runs, then V's.
    const uint32_t *elements;
    // [n_cell] of K, then of V: [n_dim] numbers, and of quantised rows [n_dim] variances of their rounding errors and [n_peak] largest
    // magnitudes.
    float *out;
    uint32_t n_cell, unused;
};

constexpr int ROWS_BYTES = 568;
constexpr int GATHER_BYTES = 88;
static_assert(sizeof(Rows) == ROWS_BYTES && sizeof(Gather) == GATHER_BYTES);

}  // namespace squeeze
