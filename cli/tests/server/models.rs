//! Other models than the index's, beside it or in its place: drafts, adapters, RoPE flags, sliding windows.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

use ggml_squeeze::index::Index;
use ggml_squeeze::random::split_mix;
use llama_cpp_sys_2 as sys;
use serde_json::json;

use crate::common::host::{squeeze, turn, Answer, Graph, Server};
use crate::common::{build_with, model, model_file, sqz, stderr};
use crate::{assert_dense, assert_fact, fact, fixture, other, server, BUDGET, FACTS, N, OTHERS, PREFIX, SLOT_FILE};

/// Answers to a fact and to a text that repeats itself (n-gram drafts need that), each asked twice.
fn answers(args: &[&str], budget: Option<&str>) -> (Vec<Answer>, String) {
    let common = ["-np", "1", "-c", "1024"];
    let server = server(&[&common[..], args].concat(), budget);
    let repeated = format!("{PREFIX}\nFees are paid at the second window on the left. The cashier takes coins, notes");
    let prompts = [fact(0).0, fact(0).0, repeated.clone(), repeated];
    let answers = prompts.iter().map(|prompt| server.ask(prompt, 24, &json!({}))).collect();
    (answers, server.stop())
}

/// At budget 1 drafts and answers are those of a server without the plugin; draft and target each bind in their own context.
#[test]
fn speculative_decoding_gives_the_same_answers() {
    let _turn = turn();
    let model = model();
    let draft = ["-md", model.to_str().unwrap(), "--spec-type", "draft-simple", "--spec-draft-n-max", "4", "-td", "2"];
    let ngram = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "8"];
    for (args, contexts) in [(&draft[..], 2), (&ngram, 1)] {
        let (dense, _) = answers(args, None);
        let (sparse, log) = answers(args, Some("1"));
        assert_eq!(log.matches(" is bound: ").count(), contexts, "{args:?}: {log}");
        let mut accepted = 0;
        for (with, without) in sparse.iter().zip(&dense) {
            assert_eq!(with.content, without.content, "{args:?}");
            accepted += with.reply["timings"]["draft_n_accepted"].as_u64().unwrap_or(0);
        }
        assert!(accepted > 10, "{args:?}: {accepted} drafted tokens accepted");
        // a draft is checked in one graph of several rows
        assert!(sparse[1].sparse() && sparse[3].graphs.iter().any(|g| g.sparse_rows > 1), "{}", sparse[3].log);
    }
}

/// Writes a LoRA of rank 4 for attention outputs of SmolLM2, of random numbers.
fn random_lora(path: &Path) {
    const EMBED: usize = 576;
    const RANK: usize = 4;
    let mut seed = 7u64;
    let mut random = || ((split_mix(&mut seed) >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.5;
    let text = |s: &str| CString::new(s).unwrap();
    // SAFETY: ggml's own builder: tensors of one context with memory for all of them, filled to their sizes, freed once.
    unsafe {
        let mem_size = 1 << 20;
        let ctx = sys::ggml_init(sys::ggml_init_params { mem_size, mem_buffer: null_mut(), no_alloc: false });
        let gguf = sys::gguf_init_empty();
        for (key, value) in [("general.type", "adapter"), ("general.architecture", "llama"), ("adapter.type", "lora")] {
            sys::gguf_set_val_str(gguf, text(key).as_ptr(), text(value).as_ptr());
        }
        sys::gguf_set_val_f32(gguf, text("adapter.lora.alpha").as_ptr(), RANK as f32);
        for layer in [3, 9] {
            for (part, ne) in [("lora_a", [EMBED, RANK]), ("lora_b", [RANK, EMBED])] {
                let tensor = sys::ggml_new_tensor_2d(ctx, sys::GGML_TYPE_F32, ne[0] as i64, ne[1] as i64);
                sys::ggml_set_name(tensor, text(&format!("blk.{layer}.attn_output.weight.{part}")).as_ptr());
                let data = (*tensor).data.cast::<f32>();
                (0..ne[0] * ne[1]).for_each(|i| data.add(i).write(random()));
                sys::gguf_add_tensor(gguf, tensor);
            }
        }
        assert!(sys::gguf_write_to_file(gguf, text(path.to_str().unwrap()).as_ptr(), false));
        sys::gguf_free(gguf);
        sys::ggml_free(ctx);
    }
}

fn lora_file() -> PathBuf {
    let path = fixture().folder.join("lora.gguf");
    random_lora(&path);
    path
}

#[test]
fn a_lora_is_refused_and_its_scale_may_change_at_run_time() {
    let _turn = turn();
    let lora = lora_file();
    let (prompt, right) = fact(0);
    let folder = fixture().folder.to_str().unwrap();
    let args = ["-np", "1", "-c", "1024", "--lora", lora.to_str().unwrap(), "--slot-save-path", folder];
    let server = server(&args, Some(BUDGET));
    let scale = |scale: f32| server.post("/lora-adapters", &json!([{"id": 0, "scale": scale}]));

    // on from the start: other keys in later layers
    assert_dense(&server.ask(&prompt, N, &json!({})));
    let on = server.ask(&prompt, N, &json!({}));
    assert_dense(&on);
    assert!(server.log().contains("other keys in later layers"), "{}", server.log());

    // off for everybody; the cells were made with it, so they are made anew here
    scale(0.0);
    server.slot(0, "erase", "");
    server.ask(&prompt, N, &json!({}));
    let off = server.ask(&prompt, N, &json!({}));
    assert_fact(&off, right);

    // on for one request: the server forgets the slot's cells, which then hold other keys
    let one = json!({"lora": [{"id": 0, "scale": 1.0}]});
    let with = server.ask(&prompt, N, &one);
    assert_eq!(with.cache_n, 0, "{}", with.reply["timings"]);
    assert_dense(&with);
    assert_dense(&server.ask(&prompt, N, &one));

    // without the field it is off again, but the server keeps the cells that were made with it
    let stale = server.ask(&prompt, N, &json!({}));
    assert!(stale.cache_n > 300, "{}", stale.reply["timings"]);
    assert_dense(&stale);

    // on for everybody: the server keeps the cells that were made without it, and they are what the index says
    server.slot(0, "erase", "");
    server.ask(&prompt, N, &json!({}));
    assert_fact(&server.ask(&prompt, N, &json!({})), right);
    scale(1.0);
    let kept = server.ask(&prompt, N, &json!({}));
    assert!(kept.cache_n > 300 && kept.sparse(), "{}", kept.log);
    // made anew with it they are refused again
    server.slot(0, "erase", "");
    server.ask(&prompt, N, &json!({}));
    assert_dense(&server.ask(&prompt, N, &json!({})));
    server.stop();
}

#[test]
fn other_rope_flags_than_at_the_build_are_refused() {
    let _turn = turn();
    let yarn = &["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "2048"][..];
    for flags in [&["--rope-freq-base", "20000"][..], &["--rope-freq-scale", "0.5"], yarn] {
        let server = server(&[&["-np", "1", "-c", "1024"], flags].concat(), Some(BUDGET));
        let (prompt, _) = fact(0);
        for _ in 0..2 {
            assert_dense(&server.ask(&prompt, N, &json!({})));
        }
        let log = server.stop();
        let totals = log.lines().rfind(|l| l.contains("totals:")).unwrap();
        assert!(totals.contains("sparse 0 nodes") && totals.contains("unbound: "), "{flags:?}: {totals}");
    }
}

/// Gemma-3 has a full-attention layer after every five with a sliding window of 512 tokens. A text that the window holds is
/// refused: its layers could not be told apart, and sliding ones have a cache, hence cells, of their own.
#[test]
fn full_attention_layers_of_a_sliding_window_model_are_indexed() {
    let _turn = turn();
    let model = model_file("gemma3-270m.gguf");
    let folder = fixture().folder.join("gemma3");
    std::fs::create_dir_all(&folder).unwrap();
    let (short, unused) = (folder.join("short.txt"), folder.join("short.sqz.gguf"));
    std::fs::write(&short, PREFIX).unwrap();
    let paths = [&model, &short, &unused].map(|p| p.to_str().unwrap());
    let refused = sqz(&["build", "-m", paths[0], "-f", paths[1], "-o", paths[2]]);
    assert!(!refused.status.success() && stderr(&refused).contains("sliding window of 512"), "{}", stderr(&refused));

    let long = format!("{}\n{PREFIX}", &OTHERS[0][..1500]);
    let slot = folder.join(SLOT_FILE);
    let index = build_with(&model, &folder, &long, &["--slot-file", slot.to_str().unwrap()]);
    let opened = Index::open(&index).unwrap();
    assert_eq!(opened.shapes().iter().map(|s| s.layer).collect::<Vec<_>>(), [5, 11, 17]);
    let prompt = format!("{long}{}", FACTS[0].0);
    let ask = |full: bool, variables: &[(String, String)]| {
        let args = ["-np", "2", "-c", "4096", "--kv-unified", "--no-cache-idle-slots", "--slot-save-path"];
        let more = [folder.to_str().unwrap(), "--swa-full"];
        let args = [&args[..], if full { &more } else { &more[..1] }].concat();
        let server = Server::start(&model, &args, variables, &folder.join("server.log"));
        // the other slot first: in the two kinds of cache the prefix then lies in different cells
        server.ask_slot(1, &other(1, 2500), N);
        server.slot(0, "restore", SLOT_FILE);
        let answers = [0, 1].map(|_| server.ask_slot(0, &prompt, N));
        server.stop();
        answers
    };
    for full in [false, true] {
        let dense = ask(full, &[]);
        let sparse = ask(full, &squeeze(&index, BUDGET));
        for (with, without) in sparse.iter().zip(&dense) {
            assert_eq!(with.content, without.content);
            assert!(with.content.starts_with(FACTS[0].1), "{:?}", with.content);
        }
        // Without --swa-full llama-server takes a restored slot of such a model for too short and computes it anew, in other
        // batches than sqz build.
        assert_eq!(sparse[0].cache_n > 0, full, "{}", sparse[0].log);
        for answer in &sparse {
            // What computes the prefix itself is dense.
            let unbound =
                |g: &&Graph| (g.sparse_nodes, &*g.dense) == (0, "layer not indexed: 15 nodes, unbound: 3 nodes");
            let own = answer.graphs.iter().skip_while(|g| !full && unbound(g)).collect::<Vec<_>>();
            let bound = |g: &&Graph| (g.sparse_nodes, &*g.dense) == (3, "layer not indexed: 15 nodes");
            assert!(own.len() >= N && own.iter().all(bound), "{full}: {}", answer.log);
        }
    }
}
