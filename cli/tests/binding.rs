//! Binding on a real model: a prefix binds whatever its batch shapes and cells, a prefix with one other token never does, and
//! an index that matches nothing leaves every bit of the logits. One test: the plugin is one per process.

mod common;

use std::sync::Arc;

use common::context::{sparse_nodes, trials};
use ggml_squeeze::backend;
use ggml_squeeze::capi::{sqz_context, sqz_stats, sqz_status};
use ggml_squeeze::config::Config;
use ggml_squeeze::index::sample::sample_parts;
use ggml_squeeze::index::{to_bytes, Index};
use sqz::llama::{start, Context, Model, ModelArgs, Outputs};

const QUESTION: &str = "\nWhat is said of the cells?";

fn args(ubatch_size: u32) -> ModelArgs {
    common::context::args(&common::model(), ubatch_size)
}

fn logits(context: &mut Context, tokens: &[i32]) -> Vec<u32> {
    context.truncate(0).unwrap();
    context.prefill(tokens, |_| {}).unwrap();
    context.decode(&tokens[..1], Outputs::Last).unwrap();
    context.logits(0).unwrap().iter().map(|x| x.to_bits()).collect()
}

/// The counters as a host finds them: through the registry.
fn registry_stats() -> sqz_stats {
    let registry = ggml_squeeze::capi::ggml_backend_init();
    let mut totals = sqz_stats::default();
    // SAFETY: a live registry; the function found under this name has this type.
    unsafe {
        let get = (*registry).iface.get_proc_address.unwrap();
        let found = get(registry, c"sqz_get_stats".as_ptr());
        assert!(!found.is_null());
        let get_stats: unsafe extern "C" fn(*const sqz_context, *mut sqz_stats) -> sqz_status =
            std::mem::transmute(found);
        assert_eq!(get_stats(std::ptr::null(), &mut totals), sqz_status::SQZ_OK);
    }
    totals
}

#[test]
fn true_prefixes_bind_and_others_never() {
    let folder = tempfile::tempdir().unwrap();
    let path = common::build(folder.path(), &common::text(1300), &[]);
    let index = Arc::new(Index::open(&path).unwrap());
    let tokens = index.meta().tokens.clone();
    let n = tokens.len();
    assert!((250..450).contains(&n), "{n} tokens: the test is laid out for about 300");

    start(false).unwrap();
    let model = Model::load(&common::model()).unwrap();
    let question = model.tokenise(QUESTION, false).unwrap();
    let n_layer = model.n_layer() as u64;

    // an index that matches nothing: the same bits as a context made before the plugin was there
    let mut stock = Context::new(&model, &args(512), n + 64, None).unwrap();
    let expected = logits(&mut stock, &tokens);
    drop(stock);
    backend::register(Config { min_prefix: Some(0), ..Config::default() }).unwrap();
    let foreign = Index::from_bytes(to_bytes(&sample_parts(1, 200, 2, 3, 64, 64, 4)).unwrap()).unwrap();
    backend::set_indexes(vec![Arc::new(foreign)]).unwrap();
    let mut context = Context::new(&model, &args(512), n + 64, None).unwrap();
    assert_eq!(logits(&mut context, &tokens), expected, "an index of something else changed a result");
    assert_eq!(backend::stats().nodes_sparse, 0);
    assert!(backend::stats().nodes_dense["unbound"] > 0, "the foreign index was not even looked at");
    drop(context);

    // batch shapes, the last one with a last ubatch of less than 64
    backend::set_indexes(vec![index.clone()]).unwrap();
    let short_end = (n - 20) as u32;
    for ubatch_size in [64, 300, 512, short_end] {
        let mut context = Context::new(&model, &args(ubatch_size), n + 64, None).unwrap();
        context.prefill(&tokens, |_| {}).unwrap();
        assert_eq!(sparse_nodes(&mut context, 0, &question), n_layer, "-ub {ubatch_size}");
    }

    // a restored state
    let state = folder.path().join("state");
    let mut context = Context::new(&model, &args(512), n + 64, None).unwrap();
    context.prefill(&tokens, |_| {}).unwrap();
    context.save_slot(&state, &tokens).unwrap();
    let mut restored = Context::new(&model, &args(512), n + 64, None).unwrap();
    restored.load_state(&state).unwrap();
    assert_eq!(sparse_nodes(&mut restored, 0, &question), n_layer, "restored state");
    drop(restored);

    // another slot's cells in between, on one unified cache
    let other = model.tokenise(&common::text(4000)[1300..], false).unwrap();
    let mut slots = Context::with_slots(&model, &args(512), 2 * n + 128, 2).unwrap();
    for (mine, theirs) in tokens.chunks(37).zip(other.chunks(29)) {
        slots.decode_in(0, mine, Outputs::Last).unwrap();
        slots.decode_in(1, theirs, Outputs::Last).unwrap();
    }
    assert_eq!(sparse_nodes(&mut slots, 0, &question), n_layer, "scattered cells");
    assert_eq!(sparse_nodes(&mut slots, 1, &question), 0, "the other slot");
    drop(slots);

    // one batch that replaces the end of a bound prefix and goes on behind it: the cells still hold the old tokens when the
    // graph is decided on
    assert_eq!(sparse_nodes(&mut context, 0, &question), n_layer, "bound before the edit");
    let mut batch: Vec<i32> = [&tokens[n - 50..], &question].concat();
    batch[3] = question[0];
    assert_ne!(batch[3], tokens[n - 47]);
    context.truncate(n - 50).unwrap();
    assert_eq!(sparse_nodes(&mut context, 0, &batch), 0, "an edit and its question in one batch");
    context.prefill(&tokens[n - 50..], |_| {}).unwrap();
    assert_eq!(sparse_nodes(&mut context, 0, &question), n_layer, "bound after the edit is taken back");

    // one other token, from the last position to the first: what is before it is still the true prefix
    let trials = trials();
    for i in 0..trials {
        let at = (n - 1) - i * (n - 1) / (trials - 1);
        let mut changed = tokens.clone();
        changed[at] = tokens[(at + 1 + i % 7) % n];
        if changed[at] == tokens[at] {
            changed[at] = question[i % question.len()];
        }
        assert_ne!(changed[at], tokens[at]);
        context.truncate(at).unwrap();
        context.prefill(&changed[at..], |_| {}).unwrap();
        assert_eq!(sparse_nodes(&mut context, 0, &question), 0, "token {at} of {n} is another, yet the index was used");
    }
    context.truncate(0).unwrap();
    context.prefill(&tokens, |_| {}).unwrap();
    assert_eq!(sparse_nodes(&mut context, 0, &question), n_layer, "the true prefix again");
    // the totals that another plugin or host reads by name
    let totals = backend::stats();
    let read = registry_stats();
    assert_eq!(
        (read.nodes_sparse, read.rows_sparse, read.bound),
        (totals.nodes_sparse, totals.rows_sparse, totals.bound)
    );
    assert!(read.kept_share > 0.15 && read.kept_share < 0.3, "kept {}", read.kept_share);

    println!("{trials} changed prefixes of {n} tokens: none bound");
}
