/* The C ABI from C: what works, and one error for each thing that a host can do wrong. Run plainly, under valgrind and under
 * the sanitisers by scripts/c-tests.sh. Argument: a folder to write into. */
#include "squeeze.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int n_checks;

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        n_checks++;                                                                           \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: %s\n  %s\n", __FILE__, __LINE__, #condition, sqz_last_error()); \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)
/* An error comes with a sentence. */
#define FAILS(status, call)              \
    do {                                 \
        CHECK((call) == (status));       \
        CHECK(sqz_last_error()[0] != 0); \
    } while (0)

enum { P = 400, WINDOW = 20, SINKS = 4, HEADS = 2, GROUP = 2, DIM = 64, LAYERS = 3 };

static uint32_t seed = 1;

static float uniform(void) {
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / 8388608.0f - 1.0f;
}

/* F16 of a number between 2^-14 and 2 in size, or zero. */
static uint16_t half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (fabsf(x) < 1.0f / 16384) {
        return 0;
    }
    return (uint16_t)((bits >> 16 & 0x8000u) | ((((bits >> 23 & 0xffu) - 112u) << 10) | (bits >> 13 & 0x3ffu)));
}

struct buffers {
    uint16_t *k, *v;
    float *q;
};

static struct buffers random_layer(void) {
    struct buffers b;
    size_t i, n = (size_t)P * HEADS * DIM, n_q = (size_t)WINDOW * HEADS * GROUP * DIM;
    b.k = malloc(n * 2);
    b.v = malloc(n * 2);
    b.q = malloc(n_q * 4);
    CHECK(b.k && b.v && b.q);
    for (i = 0; i < n; i++) {
        b.k[i] = half(uniform());
        b.v[i] = half(uniform());
    }
    for (i = 0; i < n_q; i++) {
        b.q[i] = uniform();
    }
    return b;
}

static void release(struct buffers b) {
    free(b.k);
    free(b.v);
    free(b.q);
}

static struct sqz_layer layer_of(uint32_t number, struct buffers b) {
    struct sqz_layer layer;
    memset(&layer, 0, sizeof layer);
    layer.size = sizeof layer;
    layer.layer = number;
    layer.n_head_kv = HEADS;
    layer.n_group = GROUP;
    layer.head_dim_k = layer.head_dim_v = DIM;
    layer.scale = 0.125f;
    layer.k = b.k;
    layer.v = b.v;
    layer.q = b.q;
    return layer;
}

static struct sqz_builder_params small(void) {
    struct sqz_builder_params p = sqz_builder_params_default();
    p.n_sink = SINKS;
    p.n_window = WINDOW;
    p.n_threads = 2;
    return p;
}

static int32_t tokens[P];

static struct sqz_builder *new_builder(void) {
    struct sqz_builder_params p = small();
    struct sqz_builder *b = NULL;
    CHECK(sqz_builder_new(&p, tokens, P, &b) == SQZ_OK && b != NULL);
    return b;
}

static bool count_calls(float share, void *user_data) {
    CHECK(share >= 0.0f && share <= 1.0f);
    ++*(int *)user_data;
    return true;
}

static bool refuse(float share, void *user_data) {
    (void)share;
    (void)user_data;
    return false;
}

static struct sqz_index *build(void) {
    struct sqz_builder *b = new_builder();
    struct sqz_index *index = NULL;
    int calls = 0, i;
    CHECK(sqz_builder_set_progress(b, count_calls, &calls) == SQZ_OK);
    for (i = 0; i < LAYERS; i++) {
        struct buffers buffers = random_layer();
        struct sqz_layer layer = layer_of((uint32_t)i * 2, buffers);
        CHECK(sqz_builder_add_layer(b, &layer) == SQZ_OK);
        release(buffers);
    }
    CHECK(calls > LAYERS);
    CHECK(sqz_builder_build(b, &index) == SQZ_OK && index != NULL);
    CHECK(sqz_builder_free(b) == SQZ_OK);
    return index;
}

static void builder_errors(void) {
    struct sqz_builder_params p = small();
    struct sqz_builder *b = NULL;
    struct sqz_index *index = (struct sqz_index *)&p;
    struct buffers buffers = random_layer();
    struct sqz_layer layer = layer_of(1, buffers);
    int32_t negative[P];

    FAILS(SQZ_ERROR_NULL, sqz_builder_new(&p, NULL, P, &b));
    FAILS(SQZ_ERROR_NULL, sqz_builder_new(&p, tokens, P, NULL));
    FAILS(SQZ_ERROR_ARGUMENT, sqz_builder_new(&p, tokens, SINKS + WINDOW, &b));
    CHECK(b == NULL);
    memcpy(negative, tokens, sizeof negative);
    negative[7] = -1;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_builder_new(&p, negative, P, &b));
    p.cluster_share = NAN;
    FAILS(SQZ_ERROR_BUILD, sqz_builder_new(&p, tokens, P, &b));
    p = small();
    p.n_coarse = -2;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_builder_new(&p, tokens, P, &b));
    p = small();
    p.n_threads = 1025;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_builder_new(&p, tokens, P, &b));
    p = small();
    p.size = 3;
    FAILS(SQZ_ERROR_SIZE, sqz_builder_new(&p, tokens, P, &b));

    FAILS(SQZ_ERROR_NULL, sqz_builder_add_layer(NULL, &layer));
    FAILS(SQZ_ERROR_NULL, sqz_builder_build(NULL, &index));
    FAILS(SQZ_ERROR_NULL, sqz_builder_set_model(NULL, "model.gguf"));
    FAILS(SQZ_ERROR_NULL, sqz_builder_set_progress(NULL, refuse, NULL));
    CHECK(sqz_builder_free(NULL) == SQZ_OK);

    b = new_builder();
    FAILS(SQZ_ERROR_NULL, sqz_builder_add_layer(b, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_builder_build(b, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_builder_set_model(b, NULL));
    FAILS(SQZ_ERROR_IO, sqz_builder_set_model(b, "/nowhere/model.gguf"));
    FAILS(SQZ_ERROR_CAPTURE, sqz_builder_build(b, &index)); /* nothing was decoded */
    CHECK(index == NULL);
    layer.size = 0;
    FAILS(SQZ_ERROR_SIZE, sqz_builder_add_layer(b, &layer));
    layer = layer_of(1, buffers);
    layer.k = NULL;
    FAILS(SQZ_ERROR_NULL, sqz_builder_add_layer(b, &layer));
    layer = layer_of(1, buffers);
    layer.n_head_kv = layer.head_dim_k = 0xffffffffu;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_builder_add_layer(b, &layer));
    layer = layer_of(1, buffers);
    layer.n_group = 0;
    FAILS(SQZ_ERROR_BUILD, sqz_builder_add_layer(b, &layer));
    layer = layer_of(1, buffers);
    buffers.k[5] = 0x7c00; /* an infinity */
    FAILS(SQZ_ERROR_BUILD, sqz_builder_add_layer(b, &layer));
    buffers.k[5] = 0;
    CHECK(sqz_builder_set_progress(b, refuse, NULL) == SQZ_OK);
    FAILS(SQZ_ERROR_CANCELLED, sqz_builder_add_layer(b, &layer));
    CHECK(sqz_builder_set_progress(b, NULL, NULL) == SQZ_OK);
    CHECK(sqz_builder_add_layer(b, &layer) == SQZ_OK);
    FAILS(SQZ_ERROR_BUILD, sqz_builder_add_layer(b, &layer)); /* the same layer again */

    CHECK(sqz_builder_eval_callback(NULL, true, NULL) == false); /* no builder: every graph passes */
    CHECK(sqz_builder_eval_callback(NULL, false, NULL) == true);
    CHECK(sqz_builder_eval_callback(NULL, false, b) == true);
    FAILS(SQZ_ERROR_HANDLE, sqz_index_free((struct sqz_index *)b)); /* of another type */
    CHECK(sqz_builder_free(b) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_builder_free(b));
    FAILS(SQZ_ERROR_HANDLE, sqz_builder_add_layer(b, &layer));
    CHECK(sqz_builder_eval_callback(NULL, false, b) == true);
    release(buffers);
}

static void index_use(const char *folder) {
    struct sqz_index *index = build(), *other = NULL;
    struct sqz_index_info info;
    struct sqz_layer_info layer;
    const int32_t *found = NULL;
    size_t n = 0;
    char path[4096];
    unsigned char bytes[64];
    FILE *file;

    memset(&info, 0xff, sizeof info);
    info.size = sizeof info;
    CHECK(sqz_index_get_info(index, &info) == SQZ_OK);
    CHECK(info.size == sizeof info && info.n_prefix == P && info.n_sink == SINKS && info.n_window == WINDOW);
    CHECK(info.n_layer == 5 && info.n_layer_indexed == LAYERS && info.n_bytes > 0);
    CHECK(info.n_bytes_kv == (uint64_t)LAYERS * P * HEADS * DIM * 4);
    CHECK(strcmp(info.chat, "raw") == 0 && strcmp(info.model_name, "") == 0);
    layer.size = sizeof layer;
    CHECK(sqz_index_get_layer(index, 2, &layer) == SQZ_OK);
    CHECK(layer.layer == 4 && layer.n_head_kv == HEADS && layer.n_group == GROUP && layer.head_dim_v == DIM);
    CHECK(layer.n_cluster == 19 && layer.scale == 0.125f); /* 5 % of 376 keys */
    FAILS(SQZ_ERROR_ARGUMENT, sqz_index_get_layer(index, LAYERS, &layer));
    CHECK(sqz_index_get_tokens(index, &found, &n) == SQZ_OK && n == P && memcmp(found, tokens, sizeof tokens) == 0);

    FAILS(SQZ_ERROR_NULL, sqz_index_get_info(index, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_index_get_info(NULL, &info));
    info.size = 1;
    FAILS(SQZ_ERROR_SIZE, sqz_index_get_info(index, &info));
    FAILS(SQZ_ERROR_NULL, sqz_index_get_layer(index, 0, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_index_get_tokens(index, NULL, &n));
    FAILS(SQZ_ERROR_NULL, sqz_index_get_tokens(index, &found, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_index_write(index, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_index_write(NULL, "x"));
    FAILS(SQZ_ERROR_IO, sqz_index_write(index, "/nowhere/x.sqz.gguf"));

    snprintf(path, sizeof path, "%s/abi.sqz.gguf", folder);
    CHECK(sqz_index_write(index, path) == SQZ_OK);
    CHECK(sqz_index_open(path, &other) == SQZ_OK);
    CHECK(sqz_index_get_tokens(other, &found, &n) == SQZ_OK && memcmp(found, tokens, sizeof tokens) == 0);
    CHECK(sqz_index_free(other) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_index_free(other));
    FAILS(SQZ_ERROR_MODEL, sqz_index_verify(index, path)); /* an index is no such model */
    FAILS(SQZ_ERROR_NULL, sqz_index_verify(index, NULL));
    FAILS(SQZ_ERROR_IO, sqz_index_verify(index, "/nowhere/model.gguf"));

    other = index;
    FAILS(SQZ_ERROR_NULL, sqz_index_open(NULL, &other));
    CHECK(other == NULL);
    FAILS(SQZ_ERROR_NULL, sqz_index_open(path, NULL));
    FAILS(SQZ_ERROR_IO, sqz_index_open("/nowhere/x.sqz.gguf", &other));
    file = fopen(path, "rb");
    CHECK(file && fread(bytes, 1, sizeof bytes, file) == sizeof bytes);
    fclose(file);
    FAILS(SQZ_ERROR_INDEX, sqz_index_from_memory(bytes, sizeof bytes, &other)); /* cut */
    FAILS(SQZ_ERROR_INDEX, sqz_index_from_memory("no GGUF at all", 14, &other));
    FAILS(SQZ_ERROR_NULL, sqz_index_from_memory(NULL, 5, &other));
    CHECK(other == NULL);
    file = fopen(path, "r+b");
    CHECK(file && fseek(file, -5, SEEK_END) == 0 && fputc(0x5a, file) == 0x5a);
    fclose(file);
    FAILS(SQZ_ERROR_INDEX, sqz_index_open(path, &other)); /* damaged */
    CHECK(strstr(sqz_last_error(), path) != NULL);
    remove(path);
    CHECK(sqz_index_free(index) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_index_get_info(index, &info));
    FAILS(SQZ_ERROR_HANDLE, sqz_index_get_info((struct sqz_index *)&info, &info)); /* no handle at all */
}

static void contexts(void) {
    struct sqz_index *index = build();
    struct sqz_context *context = NULL;
    struct sqz_config config = sqz_config_default(), bad;
    struct {
        struct sqz_config config;
        char later[16];
    } longer;
    struct sqz_stats stats;

    FAILS(SQZ_ERROR_NULL, sqz_context_new(&config, NULL));
    bad = config;
    bad.size = 100000;
    FAILS(SQZ_ERROR_SIZE, sqz_context_new(&bad, &context));
    bad = config;
    bad.share = 0;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_context_new(&bad, &context));
    bad.share = NAN;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_context_new(&bad, &context));
    bad = config;
    bad.mode = 3;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_context_new(&bad, &context));
    bad = config;
    bad.spread = 9;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_configure(NULL, &bad));
    bad = config;
    bad.tile = 0;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_configure(NULL, &bad));
    bad = config;
    bad.disable = 2;
    FAILS(SQZ_ERROR_ARGUMENT, sqz_configure(NULL, &bad));
    CHECK(context == NULL);

    /* A host with a later header, whose new fields are zero, is understood; with others it is not. */
    memset(&longer, 0, sizeof longer);
    longer.config = config;
    longer.config.size = sizeof longer;
    CHECK(sqz_context_new(&longer.config, &context) == SQZ_OK);
    CHECK(sqz_context_free(context) == SQZ_OK);
    longer.later[3] = 1;
    FAILS(SQZ_ERROR_SIZE, sqz_context_new(&longer.config, &context));
    CHECK(sqz_context_new(NULL, &context) == SQZ_OK);

    CHECK(sqz_attach(context, index) == SQZ_OK);
    FAILS(SQZ_ERROR_ATTACHED, sqz_attach(context, index));
    CHECK(sqz_attach(NULL, index) == SQZ_OK); /* the process is another place */
    CHECK(sqz_detach(NULL, index) == SQZ_OK);
    FAILS(SQZ_ERROR_NOT_ATTACHED, sqz_detach(NULL, index));
    CHECK(sqz_detach(context, index) == SQZ_OK);
    FAILS(SQZ_ERROR_NOT_ATTACHED, sqz_detach(context, index));
    FAILS(SQZ_ERROR_NULL, sqz_attach(context, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_detach(context, NULL));
    FAILS(SQZ_ERROR_HANDLE, sqz_attach((struct sqz_context *)index, index));
    FAILS(SQZ_ERROR_HANDLE, sqz_attach(context, (struct sqz_index *)context));

    CHECK(sqz_context_enter(context) == SQZ_OK);
    CHECK(sqz_context_enter(NULL) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_context_enter((struct sqz_context *)index));
    memset(&stats, 0xff, sizeof stats);
    stats.size = sizeof stats;
    CHECK(sqz_get_stats(context, &stats) == SQZ_OK && stats.graphs == 0 && stats.kept_share == 0.0);
    CHECK(sqz_reset_stats(context) == SQZ_OK && sqz_reset_stats(NULL) == SQZ_OK);
    FAILS(SQZ_ERROR_NULL, sqz_get_stats(context, NULL));
    stats.size = 8;
    FAILS(SQZ_ERROR_SIZE, sqz_get_stats(context, &stats));

    CHECK(sqz_context_free(NULL) == SQZ_OK);
    CHECK(sqz_context_free(context) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_context_free(context));
    FAILS(SQZ_ERROR_HANDLE, sqz_attach(context, index));
    FAILS(SQZ_ERROR_HANDLE, sqz_context_enter(context));
    CHECK(sqz_index_free(NULL) == SQZ_OK);
    CHECK(sqz_index_free(index) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_attach(NULL, index));
}

static struct sqz_array array_of(void *data, uint32_t kind, size_t element, int64_t n0, int64_t n1, int64_t n2) {
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

/* A call over an index's own keys, sparse and dense, and every way in which it can be wrong. */
static void attention(void) {
    enum { N = HEADS * GROUP * DIM };
    struct sqz_builder *b = new_builder();
    struct sqz_index *index = NULL;
    struct sqz_context *context = NULL;
    struct sqz_config config = sqz_config_default();
    struct buffers buffers = random_layer();
    struct sqz_layer layer = layer_of(3, buffers);
    struct sqz_attention call, bad;
    struct sqz_attention_result result;
    static float q[N], dense[N], sparse[N];
    static uint16_t mask[P];
    int i;

    CHECK(sqz_builder_add_layer(b, &layer) == SQZ_OK && sqz_builder_build(b, &index) == SQZ_OK);
    CHECK(sqz_builder_free(b) == SQZ_OK);
    config.min_prefix = 0;
    config.share = 0.3f;
    CHECK(sqz_context_new(&config, &context) == SQZ_OK);
    memset(&call, 0, sizeof call);
    call.size = sizeof call;
    call.q = array_of(q, SQZ_TYPE_F32, 4, DIM, 1, HEADS * GROUP);
    call.k = array_of(buffers.k, SQZ_TYPE_F16, 2, DIM, P, HEADS);
    call.k.nb[1] = HEADS * DIM * 2;
    call.k.nb[2] = DIM * 2;
    call.v = call.k;
    call.v.data = buffers.v;
    call.dst = array_of(dense, SQZ_TYPE_F32, 4, DIM, HEADS * GROUP, 1);
    call.scale = 0.125f;
    call.n_threads = 2;
    for (i = 0; i < N; i++) {
        q[i] = 4 * uniform();
    }
    result.size = sizeof result;
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 0); /* no index */
    call.index = index;
    call.layer = 3;
    call.dst.data = sparse;
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 1);
    CHECK(result.kept_share > 0.25 && result.kept_share < 0.4 && memcmp(sparse, dense, sizeof dense) != 0);
    CHECK(sqz_attention_compute(context, &call, NULL) == SQZ_OK); /* nobody asks */
    call.mask = array_of(mask, SQZ_TYPE_F16, 2, P, 1, 1);
    mask[7] = 0xfc00; /* one prefix cell is hidden: the row is dense */
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 0);
    mask[7] = 0;
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 1);
    call.layer = 4; /* not in the index */
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 0);
    for (i = 0; i < N; i++) {
        CHECK(fabsf(sparse[i] - dense[i]) < 1e-5f);
    }
    call.layer = 3;
    buffers.k[(P - WINDOW - 1) * HEADS * DIM] ^= 0x0100; /* the last clustered token has changed */
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 0);
    buffers.k[(P - WINDOW - 1) * HEADS * DIM] ^= 0x0100;
    CHECK(sqz_attn_forget(context) == SQZ_OK);
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 1);

    FAILS(SQZ_ERROR_NULL, sqz_attention_compute(NULL, &call, &result));
    FAILS(SQZ_ERROR_NULL, sqz_attention_compute(context, NULL, &result));
    FAILS(SQZ_ERROR_HANDLE, sqz_attention_compute((struct sqz_context *)index, &call, &result));
    result.size = 0;
    FAILS(SQZ_ERROR_SIZE, sqz_attention_compute(context, &call, &result));
    result.size = sizeof result;
#define WITH(change, status)                                            \
    do {                                                                \
        bad = call;                                                     \
        change;                                                         \
        FAILS(status, sqz_attention_compute(context, &bad, &result));   \
    } while (0)
    WITH(bad.size = 9, SQZ_ERROR_SIZE);
    WITH(bad.q.data = NULL, SQZ_ERROR_NULL);
    WITH(bad.k.data = NULL, SQZ_ERROR_NULL);
    WITH(bad.dst.data = NULL, SQZ_ERROR_NULL);
    WITH(bad.index = (struct sqz_index *)context, SQZ_ERROR_HANDLE);
    WITH(bad.q.kind = SQZ_TYPE_F16, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.k.kind = 77, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.mask.kind = SQZ_TYPE_F32, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.k.ne[1] = 0, SQZ_ERROR_ARGUMENT);
    WITH(bad.k.ne[1] = -5, SQZ_ERROR_ARGUMENT);
    WITH(bad.k.ne[3] = INT64_MAX, SQZ_ERROR_ARGUMENT);
    WITH(bad.v.ne[1] = P - 1, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.dst.ne[1] = 1, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.k.nb[0] = 4, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.k.nb[1] = 3, SQZ_ERROR_ARGUMENT);
    WITH(bad.k.nb[1] = 0, SQZ_ERROR_ARGUMENT);
    WITH(bad.n_threads = 1025, SQZ_ERROR_ARGUMENT);
    WITH(bad.q.data = (char *)q + 1, SQZ_ERROR_ARGUMENT);
    WITH(bad.q.ne[0] = bad.k.ne[0] = 60, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.mask.ne[0] = P - 1, SQZ_ERROR_UNSUPPORTED);
    WITH(bad.scale = NAN, SQZ_ERROR_ARGUMENT);
    WITH((bad.max_bias = 1, bad.mask.data = NULL), SQZ_ERROR_UNSUPPORTED);
#undef WITH
    /* On a GPU: the same checks first; these buffers are none of its memory, if there is one. */
    FAILS(SQZ_ERROR_NULL, sqz_attention_launch(NULL, &call, 0, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_attention_launch(context, NULL, 0, NULL));
    FAILS(SQZ_ERROR_HANDLE, sqz_attention_launch((struct sqz_context *)index, &call, 0, NULL));
    FAILS(SQZ_ERROR_ARGUMENT, sqz_attention_launch(context, &call, -1, NULL));
    FAILS(SQZ_ERROR_DEVICE, sqz_attention_launch(context, &call, 1000, NULL));
    {
        const enum sqz_status status = sqz_attention_launch(context, &call, 0, NULL);
        CHECK(status == SQZ_ERROR_DEVICE || status == SQZ_ERROR_UNSUPPORTED);
    }
    bad = call;
    bad.q.data = NULL;
    FAILS(SQZ_ERROR_NULL, sqz_attention_launch(context, &bad, 0, NULL));
    FAILS(SQZ_ERROR_NULL, sqz_attn_forget(NULL));
    CHECK(sqz_attn_ext(NULL, NULL, NULL, NULL, NULL, NULL, 1, 0, 0, index, 0) == NULL && sqz_last_error()[0] != 0);
    CHECK(sqz_attn_ext(context, NULL, NULL, NULL, NULL, NULL, 1, 0, 0, index, 0) == NULL);
    CHECK(sqz_attn_ext(context, NULL, NULL, NULL, NULL, NULL, 1, 0, 0, index, -1) == NULL);

    CHECK(sqz_index_free(index) == SQZ_OK); /* the context keeps what it has computed with */
    FAILS(SQZ_ERROR_HANDLE, sqz_attention_compute(context, &call, &result));
    call.index = NULL;
    CHECK(sqz_attention_compute(context, &call, &result) == SQZ_OK && result.rows_sparse == 0);
    CHECK(sqz_context_free(context) == SQZ_OK);
    FAILS(SQZ_ERROR_HANDLE, sqz_attention_compute(context, &call, &result));
    release(buffers);
}

static void keep_line(const char *line, void *user_data) {
    snprintf((char *)user_data, 1000, "%s", line);
}

int main(int argc, char **argv) {
    char line[1000] = "";
    int32_t i;
    CHECK(argc == 2);
    for (i = 0; i < P; i++) {
        tokens[i] = i * 7 % 1000;
    }
    CHECK(sqz_abi_version() == SQZ_ABI_VERSION && sqz_version()[0] != 0);
    CHECK(sqz_last_error()[0] == 0);
    CHECK(strcmp(sqz_status_str(SQZ_OK), "no error") == 0);
    CHECK(strcmp(sqz_status_str(SQZ_ERROR_NULL), sqz_status_str(SQZ_ERROR_HANDLE)) != 0);
    CHECK(strcmp(sqz_status_str(1), sqz_status_str(-1)) == 0);

    /* There is no ggml in this process: one line says so, and the host goes on. */
    CHECK(sqz_set_log(keep_line, line) == SQZ_OK);
    FAILS(SQZ_ERROR_HOST, sqz_register());
    CHECK(strstr(line, "ggml") != NULL);
    CHECK(sqz_set_log(NULL, NULL) == SQZ_OK);

    builder_errors();
    index_use(argv[1]);
    contexts();
    attention();
    printf("%d checks passed\n", n_checks);
    return 0;
}
