// A llama.cpp host of its own that captures a prompt, builds its index, attaches it and answers a question, all in one process.
//
//     llama_host MODEL.gguf TEXT.txt QUESTION INDEX.sqz.gguf [BACKENDS]
//
// The index is kept in a file too. BACKENDS is the folder of ggml's backends, where they are libraries of their own
// (GGML_BACKEND_DL).
#include "ggml-backend.h"
#include "llama.h"
#include "squeeze.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static bool ok(sqz_status status, const char * what) {
    if (status != SQZ_OK) {
        fprintf(stderr, "%s: %s\n", what, sqz_last_error());
    }
    return status == SQZ_OK;
}

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text, bool first) {
    std::vector<llama_token> tokens(text.size() + 8);
    const int n = llama_tokenize(vocab, text.data(), (int) text.size(), tokens.data(), (int) tokens.size(), first, false);
    tokens.resize(std::max(n, 0));
    return tokens;
}

// Decodes tokens in batches; the last one's logits are there afterwards.
static bool decode(llama_context * context, std::vector<llama_token> & tokens) {
    const size_t n_batch = llama_n_batch(context);
    for (size_t i = 0; i < tokens.size(); i += n_batch) {
        const size_t n = std::min(n_batch, tokens.size() - i);
        if (llama_decode(context, llama_batch_get_one(tokens.data() + i, (int) n)) != 0) {
            fprintf(stderr, "llama_decode failed\n");
            return false;
        }
    }
    return true;
}

static int run(const char * model_path, const std::string & text, const std::string & question, const char * kept) {
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(model_path, model_params);
    if (!model) {
        return 1;
    }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> prefix = tokenize(vocab, text, true);
    std::vector<llama_token> asked = tokenize(vocab, question, false);

    // 1. The builder watches the context that decodes the prefix.
    sqz_builder * builder = nullptr;
    if (!ok(sqz_builder_new(nullptr, prefix.data(), prefix.size(), &builder), "sqz_builder_new") ||
        !ok(sqz_builder_set_model(builder, model_path), "sqz_builder_set_model")) {
        return 1;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx             = (uint32_t) (prefix.size() + asked.size() + 64);
    params.flash_attn_type   = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.cb_eval           = sqz_builder_eval_callback;
    params.cb_eval_user_data = builder;
    llama_context * context  = llama_init_from_model(model, params);
    if (!context || !decode(context, prefix)) {
        return 1;
    }

    // 2. Its index, kept for other programs and used at once.
    sqz_index * index = nullptr;
    if (!ok(sqz_builder_build(builder, &index), "sqz_builder_build") || !ok(sqz_builder_free(builder), "sqz_builder_free")) {
        return 1;
    }
    sqz_index_info info;
    info.size = sizeof info;
    if (!ok(sqz_index_get_info(index, &info), "sqz_index_get_info") ||
        !ok(sqz_index_verify(index, model_path), "sqz_index_verify") || !ok(sqz_index_write(index, kept), "sqz_index_write")) {
        return 1;
    }
    printf("%u tokens, %u of %u layers indexed, %.1f MiB\n", info.n_prefix, info.n_layer_indexed, info.n_layer,
           (double) info.n_bytes / 1048576.0);

    // 3. Attached, with a fifth of the keys for each question.
    sqz_config config = sqz_config_default();
    config.share      = 0.2f;
    config.min_prefix = 0;
    if (!ok(sqz_configure(nullptr, &config), "sqz_configure") || !ok(sqz_attach(nullptr, index), "sqz_attach")) {
        return 1;
    }

    // 4. The same context answers.
    if (!decode(context, asked)) {
        return 1;
    }
    printf("%s", question.c_str());
    for (int i = 0; i < 32; i++) {
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token best = (llama_token) (std::max_element(logits, logits + llama_vocab_n_tokens(vocab)) - logits);
        if (llama_vocab_is_eog(vocab, best)) {
            break;
        }
        char piece[256];
        const int n = llama_token_to_piece(vocab, best, piece, sizeof piece, 0, false);
        fwrite(piece, 1, (size_t) std::max(n, 0), stdout);
        std::vector<llama_token> next = { best };
        if (!decode(context, next)) {
            return 1;
        }
    }
    sqz_stats stats;
    stats.size = sizeof stats;
    if (!ok(sqz_get_stats(nullptr, &stats), "sqz_get_stats") || !ok(sqz_detach(nullptr, index), "sqz_detach") ||
        !ok(sqz_index_free(index), "sqz_index_free")) {
        return 1;
    }
    printf("\nsparse %llu of %llu attention nodes, %.3f of the prefix's keys kept\n", (unsigned long long) stats.nodes_sparse,
           (unsigned long long) (stats.nodes_sparse + stats.nodes_dense), stats.kept_share);
    llama_free(context);
    llama_model_free(model);
    return stats.nodes_sparse > 0 ? 0 : 1;
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL.gguf TEXT.txt QUESTION INDEX.sqz.gguf [BACKENDS]\n", argv[0]);
        return 2;
    }
    std::ifstream file(argv[2], std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (argc > 5) {
        ggml_backend_load_all_from_path(argv[5]);
    } else {
        ggml_backend_load_all();
    }
    // Before any context is made: backends made earlier are not hooked.
    if (!ok(sqz_register(), "sqz_register")) {
        return 1;
    }
    llama_backend_init();
    const int status = run(argv[1], text, argv[3], argv[4]);
    llama_backend_free();
    return status;
}
