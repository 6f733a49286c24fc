// A host that builds its own ggml graph: random clustered keys as a prefix, an index of them through the C ABI, and one
// attention node over them on the CPU backend. At budget 1 it must give what dense attention gives; at 0.1 it is timed.
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

    // Budget 1: every key, so what ggml gives but for rounding.
    sqz_config config = sqz_config_default();
    config.share      = 1.0f;
    sqz_configure(context, &config);
    ggml_backend_graph_compute(backend, dense_graph);
    ggml_backend_graph_compute(backend, sparse_graph);
    const size_t n = (size_t) ggml_nelements(dense);
    std::vector<float> a(n), b(n);
    ggml_backend_tensor_get(dense, a.data(), 0, n * sizeof(float));
    ggml_backend_tensor_get(sparse, b.data(), 0, n * sizeof(float));
    double difference = 0.0, largest = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference = std::max(difference, std::fabs((double) a[i] - b[i]));
        largest    = std::max(largest, std::fabs((double) a[i]));
    }
    printf("budget 1: largest difference from dense attention %.1e of %.2f\n", difference, largest);
    const bool same = difference < 5e-3 * largest;

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
    return same && stats.nodes_sparse == 21 ? 0 : 1;
}
