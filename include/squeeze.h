/*
 * ggml-squeeze: Squeezed Attention for ggml and llama.cpp.
 *
 * Functions that can fail return a status: SQZ_OK is 0, errors have a number range of their own, and sqz_last_error() has a
 * sentence for the calling thread. Handles (sqz_index, sqz_builder, sqz_context) come from functions that make them and are
 * freed by the function of the same name with _free; a handle that was freed, or is of another type, is an error wherever it is
 * given, never a crash. Every function may be called from any thread. Structures begin with their size, which the caller sets
 * (the _default functions do), so that they can grow. Strings are UTF-8 and terminated; paths are the system's bytes.
 */

#ifndef SQUEEZE_H
#define SQUEEZE_H

/* Generated from src/capi/ by scripts/header.sh; do not edit. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ggml_context;
struct ggml_tensor;

/*
 Number of this interface; a library with another one does not fit a header.
 */
#define SQZ_ABI_VERSION 1

/*
 Keep the best clusters until a share of the prefix's keys is kept: a fixed amount of work.
 */
#define SQZ_MODE_BUDGET 0

/*
 Keep every cluster above the calibrated threshold of this share.
 */
#define SQZ_MODE_THRESHOLD 1

/*
 Keep the best clusters until this share of the prefix's attention mass is reached (calibrated).
 */
#define SQZ_MODE_MASS 2

/*
 Bonus for wide clusters by per-dimension variances.
 */
#define SQZ_SPREAD_DIAG 0

/*
 By one radius.
 */
#define SQZ_SPREAD_RADIUS 1

/*
 No bonus.
 */
#define SQZ_SPREAD_NONE 2

/*
 Element types, numbered as in ggml_type. Quantised ones have blocks of 32.
 */
#define SQZ_TYPE_F32 0

#define SQZ_TYPE_F16 1

#define SQZ_TYPE_Q4_0 2

#define SQZ_TYPE_Q8_0 8

#define SQZ_TYPE_BF16 30

/*
 What a function returns: SQZ_OK or an error in a number range of its own.
 */
enum sqz_status {
  SQZ_OK = 0,
  /*
   A pointer that must not be null is null.
   */
  SQZ_ERROR_NULL = 27001,
  /*
   Not a live handle of the type that is asked for: freed, or of another type, or none at all.
   */
  SQZ_ERROR_HANDLE = 27002,
  /*
   A value that is out of its range.
   */
  SQZ_ERROR_ARGUMENT = 27003,
  /*
   The `size` of a structure is not one that this library knows.
   */
  SQZ_ERROR_SIZE = 27004,
  /*
   A file cannot be read or written.
   */
  SQZ_ERROR_IO = 27005,
  /*
   The file or memory holds no index that could be used: damaged, of another kind or version.
   */
  SQZ_ERROR_INDEX = 27006,
  /*
   The index was made with another model, or the model cannot be read.
   */
  SQZ_ERROR_MODEL = 27007,
  /*
   No index can be built of this.
   */
  SQZ_ERROR_BUILD = 27008,
  /*
   The host did not decode what was to be captured.
   */
  SQZ_ERROR_CAPTURE = 27009,
  /*
   A callback of the host asked for the end.
   */
  SQZ_ERROR_CANCELLED = 27010,
  /*
   The index is attached there already.
   */
  SQZ_ERROR_ATTACHED = 27011,
  /*
   The index is not attached there.
   */
  SQZ_ERROR_NOT_ATTACHED = 27012,
  /*
   No ggml that this library is made for is in the process.
   */
  SQZ_ERROR_HOST = 27013,
  /*
   A call that the kernels do not take.
   */
  SQZ_ERROR_UNSUPPORTED = 27014,
  /*
   The system (or the GPU) has no memory for it.
   */
  SQZ_ERROR_MEMORY = 27015,
  /*
   No GPU that could be used: none of this number, no driver, a build without kernels, or the driver refuses.
   */
  SQZ_ERROR_DEVICE = 27016,
  /*
   A fault of this library; nothing was changed.
   */
  SQZ_ERROR_INTERNAL = 27099,
};

/*
 An index in the making (opaque). Calls with one builder wait for each other.
 */
struct sqz_builder;

/*
 Settings, attached indexes and counters of their own (opaque), for hosts with several models or users. Where a function
 takes a context, null means the process: that of every backend that was made in no context.
 */
struct sqz_context;

/*
 An index of one prefix (opaque). Indexes do not change: one may be used by several threads and contexts at a time.
 */
struct sqz_index;

/*
 Told one line of text, without an end of line. May be called from any thread, also while ggml computes.
 */
typedef void (*sqz_log_callback)(const char *line, void *user_data);

/*
 What an index is of. Set `size` to the structure's size before the call.
 */
struct sqz_index_info {
  size_t size;
  /*
   Tokens of the prefix.
   */
  uint32_t n_prefix;
  /*
   First tokens that are never clustered, and last ones.
   */
  uint32_t n_sink;
  uint32_t n_window;
  /*
   Layers of the model, and those of them that are indexed.
   */
  uint32_t n_layer;
  uint32_t n_layer_indexed;
  /*
   llama_rope_type in force, its base frequency and the factor on it.
   */
  int32_t rope_type;
  float rope_freq_base;
  float rope_freq_scale;
  /*
   Bytes of the index, and those that K and V of its layers take in F16.
   */
  uint64_t n_bytes;
  uint64_t n_bytes_kv;
  /*
   The model's general.architecture and general.name, and the chat mode of the prefix (raw, system, user); valid until the
   handle is freed.
   */
  const char *architecture;
  const char *model_name;
  const char *chat;
  /*
   SHA-256 over the model's metadata and a sample of its weights.
   */
  uint8_t fingerprint[32];
};

/*
 One indexed layer. Set `size` to the structure's size before the call.
 */
struct sqz_layer_info {
  size_t size;
  /*
   Number of the layer in the model.
   */
  uint32_t layer;
  uint32_t n_head_kv;
  /*
   Query heads per KV head.
   */
  uint32_t n_group;
  uint32_t head_dim_k;
  uint32_t head_dim_v;
  /*
   Fine and coarse clusters per KV head.
   */
  uint32_t n_cluster;
  uint32_t n_coarse;
  /*
   Softmax scale.
   */
  float scale;
};

/*
 How to build; sqz_builder_params_default() gives the defaults.
 */
struct sqz_builder_params {
  size_t size;
  /*
   First tokens that are never clustered, and last ones; the queries of the last ones calibrate.
   */
  uint32_t n_sink;
  uint32_t n_window;
  /*
   Clusters per clustered key, above 0 and at most 1.
   */
  float cluster_share;
  /*
   Assignments of every key to its nearest centroid, at least 1.
   */
  uint32_t iterations;
  uint64_t seed;
  /*
   Coarse clusters per KV head; 0: none; -1: as many as suit the prefix.
   */
  int64_t n_coarse;
  /*
   Worker threads; 0: one per core; at most 1024. The index does not depend on them.
   */
  uint32_t n_threads;
  /*
   Number of the model's layers; 0: as its file says, or else as there are layers.
   */
  uint32_t n_layer;
};

/*
 Told the share of the work that is done, 0 to 1, from threads of the library, one call at a time; false asks for the end.
 */
typedef bool (*sqz_progress_callback)(float share, void *user_data);

/*
 One layer's keys, values and window queries, P tokens of them (see sqz_builder_new), rows without gaps.
 */
struct sqz_layer {
  size_t size;
  /*
   Number of the layer in the model.
   */
  uint32_t layer;
  uint32_t n_head_kv;
  /*
   Query heads per KV head; query head h uses KV head h / n_group.
   */
  uint32_t n_group;
  uint32_t head_dim_k;
  uint32_t head_dim_v;
  /*
   Softmax scale.
   */
  float scale;
  /*
   `F16 [P][n_head_kv][head_dim_k]`: keys as in the cache, after RoPE.
   */
  const void *k;
  /*
   `F16 [P][n_head_kv][head_dim_v]`.
   */
  const void *v;
  /*
   `F32 [n_window][n_head_kv * n_group][head_dim_k]`: queries of the last n_window tokens, after RoPE.
   */
  const float *q;
};

/*
 Settings; sqz_config_default() gives the defaults.
 */
struct sqz_config {
  size_t size;
  /*
   SQZ_MODE_...
   */
  uint32_t mode;
  /*
   The mode's share, above 0 and at most 1.
   */
  float share;
  /*
   SQZ_SPREAD_...
   */
  uint32_t spread;
  /*
   1: add an estimate for dropped clusters.
   */
  uint32_t estimate;
  /*
   Prefixes shorter than this stay dense; UINT32_MAX: than is worth it where it was measured.
   */
  uint32_t min_prefix;
  /*
   Consecutive query tokens of a prefill that share a selection, at most; at least 1.
   */
  uint32_t tile;
  /*
   1: every graph is passed through as it is.
   */
  uint32_t disable;
  /*
   0 problems only, 1 bindings and totals, 2 also a line per graph.
   */
  uint32_t log;
};

/*
 Counters since the start or the last reset. Set `size` to the structure's size before the call.
 */
struct sqz_stats {
  size_t size;
  /*
   Graphs that were looked at.
   */
  uint64_t graphs;
  /*
   Attention nodes with at least one sparse row.
   */
  uint64_t nodes_sparse;
  /*
   Attention nodes on our kernels because of GGML_SQUEEZE_FORCE.
   */
  uint64_t nodes_forced;
  /*
   Attention nodes left to the stock kernel while an index was attached.
   */
  uint64_t nodes_dense;
  /*
   Query rows, counted per node, that were sparse.
   */
  uint64_t rows_sparse;
  /*
   Times an index was bound to cache cells, and times that ended.
   */
  uint64_t bound;
  uint64_t unbound;
  /*
   Mean kept share of the prefix keys over sparse rows and KV heads; 0 before the first.
   */
  double kept_share;
};

/*
 A strided array in the host's memory, dimension 0 innermost, as ggml has them.
 */
struct sqz_array {
  void *data;
  /*
   Elements per dimension.
   */
  int64_t ne[4];
  /*
   Bytes per step of a dimension; in dimension 0 those of an element, or of a block of a quantised type.
   */
  size_t nb[4];
  /*
   SQZ_TYPE_...
   */
  uint32_t kind;
  uint32_t reserved;
};

/*
 One attention call: dst = softmax(scale q k^T + mask) v, with the arrays and numbers of ggml_flash_attn_ext.
 */
struct sqz_attention {
  size_t size;
  /*
   F32 [head_dim_k, n_query, n_head, n_stream].
   */
  struct sqz_array q;
  /*
   Any type, [head_dim_k, n_kv, n_head_kv, 1 or n_stream].
   */
  struct sqz_array k;
  /*
   Any type, [head_dim_v, n_kv, n_head_kv, 1 or n_stream].
   */
  struct sqz_array v;
  /*
   F16 [n_kv, >= n_query, 1 or n_head, 1 or n_stream], added to the scaled scores; data null: none.
   */
  struct sqz_array mask;
  /*
   F32 [head_dim_v, n_head, n_query, n_stream]: the result.
   */
  struct sqz_array dst;
  /*
   `F32 [n_head]`: one more score per head, which takes mass and gives nothing; null: none.
   */
  const float *sinks;
  float scale;
  /*
   ALiBi; 0: none. Such a call is dense.
   */
  float max_bias;
  /*
   0: none.
   */
  float softcap;
  /*
   The index's layer. Without an index (null) the call is dense.
   */
  uint32_t layer;
  const struct sqz_index *index;
  /*
   0: one per core; at most 1024.
   */
  uint32_t n_threads;
  uint32_t reserved;
};

/*
 What a call computed.
 */
struct sqz_attention_result {
  size_t size;
  /*
   Query rows that were sparse; the others are dense.
   */
  uint64_t rows_sparse;
  /*
   Mean kept share of the prefix keys over those rows and the KV heads; 0 where there are none.
   */
  double kept_share;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Text of a status, never null, static. Thread-safe.
 */
const char *sqz_status_str(int32_t status);

/*
 What the last function that failed on this thread had to say: what, where and what to do. Never null; empty before the
 first. Valid until the next failure on this thread, or its end.
 */
const char *sqz_last_error(void);

/*
 SQZ_ABI_VERSION of the library. Thread-safe.
 */
uint32_t sqz_abi_version(void);

/*
 Version of the library, "0.1.0" say; static. Thread-safe.
 */
const char *sqz_version(void);

/*
 Where the library's lines go; null: to stderr, as at the start. `line` is valid during the call.
 */
enum sqz_status sqz_set_log(sqz_log_callback callback, void *user_data);

/*
 For a host that links the library: hooks the CPU's and the GPUs' backends, with settings from the environment. Call it
 after ggml's backends are loaded and before a backend or llama context is made. A second call changes nothing.
 */
enum sqz_status sqz_register(void);

/*
 Opens an index file (`sqz build`): reads it and checks all of it. `*out` is null after an error. Free it with
 sqz_index_free. Afterwards the file is not looked at again: it may be changed, cut or removed.

 Pointers:
 `path` is null or a terminated string; `out` is null or writable.
 */
enum sqz_status sqz_index_open(const char *path, struct sqz_index **out);

/*
 The same from memory, which is copied.

 Pointers:
 `data` is null or has `n_bytes` readable bytes; `out` is null or writable.
 */
enum sqz_status sqz_index_from_memory(const void *data, size_t n_bytes, struct sqz_index **out);

/*
 Frees a handle; null does nothing. Contexts that the index is attached to keep it until it is detached.
 */
enum sqz_status sqz_index_free(struct sqz_index *index);

/*
 Writes an index to a file, under its name only once it is whole.

 Pointers:
 `path` is null or a terminated string.
 */
enum sqz_status sqz_index_write(const struct sqz_index *index, const char *path);

/*
 Fills in what an index is of.

 Pointers:
 `out` is null or has as many bytes as it says.
 */
enum sqz_status sqz_index_get_info(const struct sqz_index *index, struct sqz_index_info *out);

/*
 Fills in the i-th indexed layer, the lowest first.

 Pointers:
 `out` is null or has as many bytes as it says.
 */
enum sqz_status sqz_index_get_layer(const struct sqz_index *index, uint32_t i, struct sqz_layer_info *out);

/*
 The prefix's tokens; valid until the handle is freed.

 Pointers:
 `tokens` and `n_tokens` are null or writable.
 */
enum sqz_status sqz_index_get_tokens(const struct sqz_index *index, const int32_t **tokens, size_t *n_tokens);

/*
 Does an index fit a model file? SQZ_OK if it was made with this very file; else SQZ_ERROR_MODEL, and the last error says what
 differs. (Where it does not fit, attention simply stays dense.)

 Pointers:
 `model_path` is null or a terminated string.
 */
enum sqz_status sqz_index_verify(const struct sqz_index *index,
                                 const char *model_path);

/*
 The default parameters, with `size` set.
 */
struct sqz_builder_params sqz_builder_params_default(void);

/*
 Begins an index of a prefix of P tokens. `params` may be null: the defaults. Free it with sqz_builder_free.

 Pointers:
 `params` is null or has as many bytes as it says; `tokens` is null or has `n_tokens` numbers; `out` is null or writable.
 */
enum sqz_status sqz_builder_new(const struct sqz_builder_params *params,
                                const int32_t *tokens,
                                size_t n_tokens,
                                struct sqz_builder **out);

/*
 Frees a handle; null does nothing. No context that has the builder as its callback's data may decode any more.
 */
enum sqz_status sqz_builder_free(struct sqz_builder *builder);

/*
 Names the model that the keys are of: its architecture, name, number of layers and fingerprint go into the index.

 Pointers:
 `model_path` is null or a terminated string.
 */
enum sqz_status sqz_builder_set_model(struct sqz_builder *builder,
                                      const char *model_path);

/*
 Has a callback told of the progress of sqz_builder_add_layer and sqz_builder_build; null: none. It may be called from any
 thread, and must not call functions of this builder.
 */
enum sqz_status sqz_builder_set_progress(struct sqz_builder *builder,
                                         sqz_progress_callback callback,
                                         void *user_data);

/*
 Adds a layer of raw buffers and clusters it: the lowest layer first, each once. The buffers are the caller's again then.

 Pointers:
 `layer` is null or has as many bytes as it says; its buffers have the elements that it says.
 */
enum sqz_status sqz_builder_add_layer(struct sqz_builder *builder,
                                      const struct sqz_layer *layer);

/*
 What `cb_eval` of llama_context_params is to be, with the builder as `cb_eval_user_data`: while the host decodes the prefix
 (alone in the cache, from position 0 on, in batches as it likes), the builder learns what it needs. Other tokens are not
 looked at. Then, the context being alive and the cache as it is, call sqz_builder_build. Has the type of
 ggml_backend_sched_eval_callback. Without a live builder it lets every graph pass.

 Pointers:
 Called by ggml's scheduler, with a live tensor.
 */
bool sqz_builder_eval_callback(struct ggml_tensor *t,
                               bool ask,
                               void *user_data);

/*
 Makes the index: of the layers that were added, or else of what was captured. The builder can then be freed. `*out` is null
 after an error.

 Pointers:
 `out` is null or writable; after a capture the context that decoded is alive and idle.
 */
enum sqz_status sqz_builder_build(struct sqz_builder *builder,
                                  struct sqz_index **out);

/*
 The default settings, with `size` set. They do not depend on the environment.
 */
struct sqz_config sqz_config_default(void);

/*
 Makes a context. `config` may be null: the defaults. Free it with sqz_context_free.

 Pointers:
 `config` is null or has as many bytes as it says; `out` is null or writable.
 */
enum sqz_status sqz_context_new(const struct sqz_config *config, struct sqz_context **out);

/*
 Frees a handle; null does nothing. Backends that were made in the context keep its settings and indexes as long as they live.
 */
enum sqz_status sqz_context_free(struct sqz_context *context);

/*
 Puts the calling thread into a context, or (null) back into the process's: backends, hence llama contexts, that this thread
 makes from now on belong to it. Computing needs no call: a backend keeps the context that it was made in.
 */
enum sqz_status sqz_context_enter(const struct sqz_context *context);

/*
 Changes the settings of a context (null: of the process); they hold from the next graph on. `config` may be null: the
 defaults.

 Pointers:
 `config` is null or has as many bytes as it says.
 */
enum sqz_status sqz_configure(const struct sqz_context *context,
                              const struct sqz_config *config);

/*
 Attaches an index to a context (null: to the process): from the next graph on, prompts that begin with its prefix are
 sparse. Needs sqz_register, or the plugin loaded by ggml, before the backends are made. The handle may be freed then.
 */
enum sqz_status sqz_attach(const struct sqz_context *context,
                           const struct sqz_index *index);

/*
 Detaches an index: from the next graph on its prompts are dense again.
 */
enum sqz_status sqz_detach(const struct sqz_context *context, const struct sqz_index *index);

/*
 Fills in the counters of a context (null: of the process). Found by name through the registry's `get_proc_address` too.

 Pointers:
 `out` is null or has as many bytes as it says.
 */
enum sqz_status sqz_get_stats(const struct sqz_context *context,
                              struct sqz_stats *out);

/*
 Sets the counters of a context (null: of the process) to zero.
 */
enum sqz_status sqz_reset_stats(const struct sqz_context *context);

/*
 Makes an attention node in place of ggml_flash_attn_ext, with its arguments and its result: F32
 [head_dim_v, n_head, n_query, n_stream]. Null after an error (sqz_last_error), which is all that ggml's function aborts for.

 The prefix's tokens must lie in cells 0 to P of K and V, in order, in each stream. A query row that its mask shows all of them
 (without a mask: every row) attends to those that the context's settings select, and to all else that it sees; other rows are
 dense. K and V are verified against the index, and are dense where they hold something else. Where no row can be sparse
 (the layer is not in the index or has another shape, fewer cells, ALiBi, a head size or type that the kernels do not take), the
 node is a plain GGML_OP_FLASH_ATTN_EXT.

 Nodes are computed by the threads of ggml's CPU backend, or by a CUDA device that sqz_register has hooked (docs/op.md). The
 context must not be freed before the last graph with the node was computed; the index may.

 Pointers:
 `ctx` is null or a live ggml context with room for the node; `q`, `k`, `v` and `mask` are null or live tensors.
 */
struct ggml_tensor *sqz_attn_ext(const struct sqz_context *context,
                                 struct ggml_context *ctx,
                                 struct ggml_tensor *q,
                                 struct ggml_tensor *k,
                                 struct ggml_tensor *v,
                                 struct ggml_tensor *mask,
                                 float scale,
                                 float max_bias,
                                 float softcap,
                                 const struct sqz_index *index,
                                 int32_t layer);

/*
 Has K and V verified in full when a node of the context is next computed: for a host that has changed the prefix's cells.
 */
enum sqz_status sqz_attn_forget(const struct sqz_context *context);

/*
 Computes attention over the host's buffers, on the CPU, with the settings of a context (which must not be null) on threads
 of its own. `result` may be null.

 The prefix's tokens must lie in cells 0 to P of K and V, in order, in each stream. A query row that its mask shows all of
 them with the value 0 (without a mask: every row) attends to those that are selected, and to all else that it sees; other
 rows are dense. K and V are verified against the index: in full at the first call, later in part, so that an edit of one
 key is noticed within 512 calls, that of the last clustered token at once (sqz_attn_forget has it all verified again); where
 they hold something else the call is dense. After SQZ_ERROR_UNSUPPORTED nothing was written. The context keeps an index that
 it has computed with until it is freed.

 Pointers:
 `call` is null or has as many bytes as it says, and its arrays are valid in all of their extents; `result` is null or has as
 many bytes as it says.
 */
enum sqz_status sqz_attention_compute(const struct sqz_context *context,
                                      const struct sqz_attention *call,
                                      struct sqz_attention_result *result);

/*
 As sqz_attention_compute, but over arrays in the memory of CUDA device `device`, as a piece of work on `stream`: a CUstream or
 cudaStream_t of the device's primary context (the CUDA runtime's), or null for the default stream. Every pointer in the call
 is a device address, `sinks` too; `n_threads` means nothing.

 It does not wait for the device but where K and V are new to the context, or may have changed: then they are copied to the
 host and verified, so that it must not be called while the stream is captured. Later every call compares the keys of the
 last clustered token, and 64 other tokens in turn. Arrays must stay valid until the stream has come past the call, and the
 stream until the context is freed. Rows that were sparse are counted (sqz_get_stats) once the device is done; of calls with the
 same arrays that are made faster than it computes them not each is counted. Up to 16 query rows are sparse, and, where `tile` in
 the settings is above 1, up to 8192.

 Pointers:
 `call` is null or has as many bytes as it says, and its arrays are valid device memory in all of their extents.
 */
enum sqz_status sqz_attention_launch(const struct sqz_context *context,
                                     const struct sqz_attention *call,
                                     int32_t device,
                                     void *stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SQUEEZE_H */
