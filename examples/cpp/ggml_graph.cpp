// A host that builds its own ggml graph: random clustered keys as a prefix, an index of them through the C ABI, and one
// attention node over them on the CPU backend. At budget 1 it must give what attention gives; at 0.1 it is timed.
//
//     ggml_graph [BACKENDS]
//
// BACKENDS is the folder of ggml's backends, where they are libraries of their own (GGML_BACKEND_DL).
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "squeeze.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

static const int32_t D = 128, HEADS = 8, GROUP = 4, PREFIX = 8192, CELLS = PREFIX + 64, LAYER = 0;

static bool ok(sqz_status status, const char * what) {
    if (status != SQZ_OK) {
        fprintf(stderr, "%s: %s\n", what, sqz_last_error());
    }
    return status == SQZ_OK;
}

// [CELLS][HEADS][D] in F16: the prefix is of 100 kinds that come and go, what follows it is noise.
static std::vector<ggml_fp16_t> rows(std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<float> kinds(100 * HEADS * D);
    for (float & x : kinds) {
        x = 2.0f * normal(random);
    }
    std::vector<ggml_fp16_t> out((size_t) CELLS * HEADS * D);
    size_t kind = 0;
    for (int32_t cell = 0; cell < CELLS; cell++) {
        if (cell % 7 == 0) {
            kind = random() % 100;
        }
        for (size_t i = 0; i < (size_t) HEADS * D; i++) {
            const float centre = cell < PREFIX ? kinds[kind * HEADS * D + i] : 0.0f;
            out[cell * (size_t) HEADS * D + i] = ggml_fp32_to_fp16(centre + normal(random));
        }
    }
    return out;
}

static sqz_index * build(const std::vector<ggml_fp16_t> & k, const std::vector<ggml_fp16_t> & v, std::mt19937 & random) {
    sqz_builder_params params = sqz_builder_params_default();
    params.iterations = 3;
    std::normal_distribution<float> normal;
    std::vector<float> q((size_t) params.n_window * HEADS * GROUP * D);
    for (float & x : q) {
        x = normal(random);
    }
    std::vector<int32_t> tokens(PREFIX);
    for (int32_t i = 0; i < PREFIX; i++) {
        tokens[i] = i;
    }
    sqz_layer layer = {};
    layer.size       = sizeof layer;
    layer.layer      = LAYER;
    layer.n_head_kv  = HEADS;
    layer.n_group    = GROUP;
    layer.head_dim_k = layer.head_dim_v = D;
    layer.scale      = 1.0f / std::sqrt((float) D);
    layer.k          = k.data();
    layer.v          = v.data();
    layer.q          = q.data();
    sqz_builder * builder = nullptr;
    sqz_index * index     = nullptr;
    if (!ok(sqz_builder_new(&params, tokens.data(), tokens.size(), &builder), "sqz_builder_new") ||
        !ok(sqz_builder_add_layer(builder, &layer), "sqz_builder_add_layer") ||
        !ok(sqz_builder_build(builder, &index), "sqz_builder_build")) {
        return nullptr;
    }
    sqz_builder_free(builder);
    return index;
}

// Attention of one head in double precision.
static std::vector<double> attention(const float * q, const ggml_fp16_t * k, const ggml_fp16_t * v, float scale) {
    std::vector<double> score(CELLS), out(D);
    for (int32_t cell = 0; cell < CELLS; cell++) {
        for (int32_t d = 0; d < D; d++) {
            score[cell] += (double) scale * q[d] * ggml_fp16_to_fp32(k[(size_t) cell * HEADS * D + d]);
        }
    }
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0.0;
    for (int32_t cell = 0; cell < CELLS; cell++) {
        const double p = std::exp(score[cell] - top);
        sum += p;
        for (int32_t d = 0; d < D; d++) {
            out[d] += p * ggml_fp16_to_fp32(v[(size_t) cell * HEADS * D + d]);
        }
    }
    for (double & x : out) {
        x /= sum;
    }
    return out;
}

// Runs as many threads as there are cores: more would wait for each other.
static void set_threads(ggml_backend_t backend) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads");
    if (set) {
        set(backend, (int) std::max(1u, std::thread::hardware_concurrency()));
    }
}

static double median_ms(ggml_backend_t backend, ggml_cgraph * graph) {
    std::vector<double> ms(21);
    for (double & x : ms) {
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        x = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    }
    std::sort(ms.begin(), ms.end());
    return ms[ms.size() / 2];
}

int main(int argc, char ** argv) {
    if (argc > 1) {
        ggml_backend_load_all_from_path(argv[1]);
    } else {
        ggml_backend_load_all();
    }
    ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (!backend) {
        fprintf(stderr, "no CPU backend: give the folder of ggml's backends\n");
        return 1;
    }
    set_threads(backend);
    std::mt19937 random(1);
    const std::vector<ggml_fp16_t> k_rows = rows(random), v_rows = rows(random);
    sqz_index * index     = build(k_rows, v_rows, random);
    sqz_context * context = nullptr;
    if (!index || !ok(sqz_context_new(nullptr, &context), "sqz_context_new")) {
        return 1;
    }

    // The cache as llama.cpp has it, all heads of a cell together, and two graphs over it.
    ggml_context * ctx = ggml_init({ 1 << 20, nullptr, true });
    ggml_tensor * q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, 1, HEADS * GROUP, 1);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, D, HEADS, CELLS);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, D, HEADS, CELLS);
    ggml_tensor * ks   = ggml_permute(ctx, k, 0, 2, 1, 3);
    ggml_tensor * vs   = ggml_permute(ctx, v, 0, 2, 1, 3);
    const float scale  = 1.0f / std::sqrt((float) D);
    ggml_tensor * dense  = ggml_flash_attn_ext(ctx, q, ks, vs, nullptr, scale, 0.0f, 0.0f);
    ggml_tensor * sparse = sqz_attn_ext(context, ctx, q, ks, vs, nullptr, scale, 0.0f, 0.0f, index, LAYER);
    if (!sparse) {
        fprintf(stderr, "sqz_attn_ext: %s\n", sqz_last_error());
        return 1;
    }
    ggml_cgraph * dense_graph  = ggml_new_graph(ctx);
    ggml_cgraph * sparse_graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(dense_graph, dense);
    ggml_build_forward_expand(sparse_graph, sparse);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_tensor_set(k, k_rows.data(), 0, ggml_nbytes(k));
    ggml_backend_tensor_set(v, v_rows.data(), 0, ggml_nbytes(v));
    std::normal_distribution<float> normal;
    std::vector<float> query((size_t) D * HEADS * GROUP);
    for (float & x : query) {
        x = normal(random);
    }
    ggml_backend_tensor_set(q, query.data(), 0, ggml_nbytes(q));

    // Budget 1: every key.
    sqz_config config = sqz_config_default();
    config.share      = 1.0f;
    sqz_configure(context, &config);
    ggml_backend_graph_compute(backend, dense_graph);
    ggml_backend_graph_compute(backend, sparse_graph);
    const size_t n = (size_t) ggml_nelements(dense);
    std::vector<float> stock(n), ours(n);
    ggml_backend_tensor_get(dense, stock.data(), 0, n * sizeof(float));
    ggml_backend_tensor_get(sparse, ours.data(), 0, n * sizeof(float));
    double stock_error = 0.0, our_error = 0.0;
    for (int32_t head = 0; head < HEADS * GROUP; head++) {
        const size_t from = (size_t) (head / GROUP) * D;
        const std::vector<double> exact =
            attention(query.data() + (size_t) head * D, k_rows.data() + from, v_rows.data() + from, scale);
        for (int32_t d = 0; d < D; d++) {
            stock_error = std::max(stock_error, std::fabs(stock[(size_t) head * D + d] - exact[d]));
            our_error   = std::max(our_error, std::fabs(ours[(size_t) head * D + d] - exact[d]));
        }
    }
    printf("budget 1: off by %.1e at most, ggml_flash_attn_ext by %.1e\n", our_error, stock_error);
    const bool exact = our_error < 1e-5;

    config.share = 0.1f;
    sqz_configure(context, &config);
    sqz_reset_stats(context);
    const double dense_ms = median_ms(backend, dense_graph), sparse_ms = median_ms(backend, sparse_graph);
    sqz_stats stats = {};
    stats.size = sizeof stats;
    sqz_get_stats(context, &stats);
    printf("budget 0.1: %.3f of the prefix's keys kept, %.3f ms, dense %.3f ms\n", stats.kept_share, sparse_ms, dense_ms);

    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    ggml_backend_free(backend);
    sqz_context_free(context);
    sqz_index_free(index);
    return exact && stats.nodes_sparse == 21 ? 0 : 1;
}
