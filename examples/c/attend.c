/* Squeezed attention on plain buffers, without ggml: an index of a long prefix's keys, then one question token after the other.
 * Keys are made up: a few hundred directions with noise, as in a text that speaks of a few hundred things. */
#define _POSIX_C_SOURCE 199309L
#include "squeeze.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { P = 8192, TAIL = 128, N_KV = P + TAIL, HEADS = 4, GROUP = 4, DIM = 128, WINDOW = 100, TOPICS = 300 };

static uint32_t seed = 7;

/* About normal, mean 0, variance 1. */
static float normal(void) {
    float sum = 0;
    int i;
    for (i = 0; i < 12; i++) {
        seed = seed * 1664525u + 1013904223u;
        sum += (float)(seed >> 8) / 16777216.0f;
    }
    return sum - 6;
}

/* To F16, without subnormal numbers. */
static uint16_t half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return fabsf(x) < 6.2e-5f ? 0 : (uint16_t)((bits >> 16 & 0x8000u) | (((bits >> 23 & 0xffu) - 112u) << 10) | (bits >> 13 & 0x3ffu));
}

static void check(enum sqz_status status, const char *what) {
    if (status != SQZ_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, sqz_status_str(status), sqz_last_error());
        exit(1);
    }
}

/* Dimensions 0 to 3 of a contiguous array. */
static struct sqz_array array(void *data, uint32_t kind, size_t element, int64_t n0, int64_t n1, int64_t n2) {
    struct sqz_array a;
    memset(&a, 0, sizeof a);
    a.data = data;
    a.kind = kind;
    a.ne[0] = n0;
    a.ne[1] = n1;
    a.ne[2] = n2;
    a.ne[3] = 1;
    a.nb[0] = element;
    a.nb[1] = element * (size_t)n0;
    a.nb[2] = a.nb[1] * (size_t)n1;
    a.nb[3] = a.nb[2] * (size_t)n2;
    return a;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *memory(size_t bytes) {
    void *p = calloc(bytes, 1);
    if (!p) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return p;
}

/* |a - b| / |b| */
static double difference(const float *a, const float *b, size_t n) {
    double d = 0, norm = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(d / norm);
}

int main(void) {
    /* K and V as in a cache: [cell][head][dim]. */
    const size_t row = (size_t)HEADS * DIM, n_out = (size_t)HEADS * GROUP * DIM;
    float *topics = memory(TOPICS * DIM * sizeof(float)), *window = memory((size_t)WINDOW * n_out * sizeof(float));
    uint16_t *k = memory(N_KV * row * 2), *v = memory(N_KV * row * 2);
    float *q = memory(n_out * sizeof(float)), *dense = memory(n_out * sizeof(float)), *out = memory(n_out * sizeof(float));
    int32_t *tokens = memory(P * sizeof(int32_t));
    struct sqz_builder *builder = NULL;
    struct sqz_index *index = NULL;
    struct sqz_context *context = NULL;
    struct sqz_layer layer;
    struct sqz_attention call;
    struct sqz_attention_result result;
    struct sqz_config config = sqz_config_default();
    const float shares[] = {1.0f, 0.2f, 0.1f};
    double dense_ms = 0, start;
    size_t i, s, head, d;
    int run, failed = 0;

    for (i = 0; i < TOPICS * DIM; i++) {
        topics[i] = normal();
    }
    for (i = 0; i < N_KV; i++) {
        for (head = 0; head < HEADS; head++) {
            const float *topic = topics + (size_t)((i * 7919 + head * 104729) % TOPICS) * DIM;
            for (d = 0; d < DIM; d++) {
                k[i * row + head * DIM + d] = half(topic[d] + 0.5f * normal());
                v[i * row + head * DIM + d] = half(normal());
            }
        }
    }
    for (i = 0; i < P; i++) {
        tokens[i] = (int32_t)((i * 31) % 997);
    }
    for (i = 0; i < (size_t)WINDOW * n_out; i++) {
        window[i] = topics[(i / DIM * 13 % TOPICS) * DIM + i % DIM] + normal();
    }

    /* 1. The index, once. */
    check(sqz_builder_new(NULL, tokens, P, &builder), "sqz_builder_new");
    memset(&layer, 0, sizeof layer);
    layer.size = sizeof layer;
    layer.layer = 0;
    layer.n_head_kv = HEADS;
    layer.n_group = GROUP;
    layer.head_dim_k = layer.head_dim_v = DIM;
    layer.scale = 1 / sqrtf(DIM);
    layer.k = k;
    layer.v = v;
    layer.q = window;
    start = now();
    check(sqz_builder_add_layer(builder, &layer), "sqz_builder_add_layer");
    check(sqz_builder_build(builder, &index), "sqz_builder_build");
    check(sqz_builder_free(builder), "sqz_builder_free");
    printf("%d keys of %d heads indexed in %.2f s\n", P, HEADS, now() - start);

    /* 2. A call: one query token, no mask, so it sees everything. */
    check(sqz_context_new(&config, &context), "sqz_context_new");
    memset(&call, 0, sizeof call);
    call.size = sizeof call;
    call.q = array(q, SQZ_TYPE_F32, 4, DIM, 1, HEADS * GROUP);
    call.k = array(k, SQZ_TYPE_F16, 2, DIM, N_KV, HEADS);
    call.k.nb[1] = row * 2; /* heads lie within a cell */
    call.k.nb[2] = DIM * 2;
    call.v = call.k;
    call.v.data = v;
    call.dst = array(dense, SQZ_TYPE_F32, 4, DIM, HEADS * GROUP, 1);
    call.scale = layer.scale;
    for (i = 0; i < n_out; i++) {
        q[i] = topics[(i / DIM * 37 % TOPICS) * DIM + i % DIM] + normal();
    }
    for (run = 0; run < 21; run++) {
        start = now();
        check(sqz_attention_compute(context, &call, NULL), "dense attention");
        dense_ms = run == 0 || (now() - start) * 1e3 < dense_ms ? (now() - start) * 1e3 : dense_ms;
    }
    printf("dense       %.3f ms\n", dense_ms);

    /* 3. The same with the index, at several budgets. */
    call.index = index;
    call.dst.data = out;
    result.size = sizeof result;
    for (s = 0; s < sizeof shares / sizeof *shares; s++) {
        double ms = 0, error;
        config.share = shares[s];
        check(sqz_configure(context, &config), "sqz_configure");
        for (run = 0; run < 21; run++) {
            start = now();
            check(sqz_attention_compute(context, &call, &result), "sparse attention");
            ms = run == 0 || (now() - start) * 1e3 < ms ? (now() - start) * 1e3 : ms;
        }
        error = difference(out, dense, n_out);
        printf("budget %.1f  %.3f ms  %.3f of the keys  error %.1e\n", (double)shares[s], ms, result.kept_share, error);
        failed |= result.rows_sparse != 1 || error > (shares[s] == 1.0f ? 1e-3 : 0.2);
    }

    /* 4. Keys that are no longer those of the index: dense, whatever the budget. */
    k[(P - WINDOW - 1) * row] = half(9);
    check(sqz_attention_compute(context, &call, &result), "attention over another prefix");
    call.index = NULL;
    call.dst.data = dense;
    check(sqz_attention_compute(context, &call, NULL), "dense attention");
    printf("edited: %s, error %.1e\n", result.rows_sparse == 0 ? "dense" : "sparse", difference(out, dense, n_out));
    failed |= result.rows_sparse != 0 || difference(out, dense, n_out) > 1e-6;

    check(sqz_index_free(index), "sqz_index_free");
    check(sqz_context_free(context), "sqz_context_free");
    free(topics);
    free(window);
    free(k);
    free(v);
    free(q);
    free(dense);
    free(out);
    free(tokens);
    return failed;
}
