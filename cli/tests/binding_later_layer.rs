//! Binding where the sketch is not of layer 0: Gemma-3 begins with sliding windows, and the rows of its first full layer, the
//! sixth, carry the rounding of the layers below. A prefix binds whatever its batch shapes, one with another token never does,
//! near relatives of the true one included. One test: the plugin is one per process.

mod common;

use std::sync::Arc;

use common::context::{args, sparse_nodes, trials};
use ggml_squeeze::backend;
use ggml_squeeze::config::Config;
use ggml_squeeze::index::Index;
use sqz::llama::{start, Context, Model};

/// Another token that is written nearly like this one: in capitals, with or without the blank in front, in the plural.
fn relative(model: &Model, token: i32, i: usize) -> Option<i32> {
    let own = model.text(&[token]);
    let bare = own.trim_start();
    let mut written =
        vec![own.to_uppercase(), own.to_lowercase(), format!("{own}s"), bare.to_string(), format!(" {bare}")];
    written.rotate_left(i % 5);
    let ids = written.iter().filter_map(|text| model.tokenise(text, false).ok());
    ids.filter(|ids| ids.len() == 1).map(|ids| ids[0]).find(|&id| id != token)
}

#[test]
fn true_prefixes_bind_and_others_never() {
    let folder = tempfile::tempdir().unwrap();
    let file = common::model_file("gemma3-270m.gguf");
    let path = common::build_with(&file, folder.path(), &common::text(3400), &[]);
    let index = Arc::new(Index::open(&path).unwrap());
    assert_eq!(index.sketch().layer, 5);
    let (tokens, n_indexed) = (index.meta().tokens.clone(), index.shapes().len() as u64);
    let n = tokens.len();
    assert!((700..1000).contains(&n), "{n} tokens: the test is laid out for about 800");

    start(false).unwrap();
    let model = Model::load(&file).unwrap();
    let question = model.tokenise("\nWhat is said of the cells?", false).unwrap();
    backend::register(Config { min_prefix: 0, log: 1, ..Config::default() }).unwrap();
    backend::set_indexes(vec![index.clone()]);
    let fresh = |ubatch_size| Context::new(&model, &args(&file, ubatch_size), n + 64, None).unwrap();

    // shapes: -ub 1 is the farthest from what the index was made with
    for ubatch_size in [64, 300, 511, 7, 1] {
        let mut context = fresh(ubatch_size);
        context.prefill(&tokens, |_| {}).unwrap();
        assert_eq!(sparse_nodes(&mut context, 0, &question), n_indexed, "-ub {ubatch_size}");
    }

    let mut context = fresh(512);
    context.prefill(&tokens, |_| {}).unwrap();
    let (trials, mut relatives) = (trials(), 0);
    for i in 0..trials {
        let at = (n - 1) - i * (n - 2) / (trials - 1);
        let mut changed = tokens.clone();
        let near = if i % 2 == 0 { relative(&model, tokens[at], i) } else { None };
        relatives += usize::from(near.is_some());
        changed[at] = near.unwrap_or(tokens[(at + 1 + i % 7) % n]);
        if changed[at] == tokens[at] {
            changed[at] = question[i % question.len()];
        }
        assert_ne!(changed[at], tokens[at]);
        context.truncate(at).unwrap();
        context.prefill(&changed[at..], |_| {}).unwrap();
        let what = model.text(&changed[at..=at]);
        assert_eq!(
            sparse_nodes(&mut context, 0, &question),
            0,
            "token {at} of {n} is {what:?}, yet the index was used"
        );
        // what is before the next change must be the true prefix again
        context.truncate(at).unwrap();
    }
    assert!(relatives > trials / 4, "{relatives} near relatives tried");
    context.truncate(0).unwrap();
    context.prefill(&tokens, |_| {}).unwrap();
    assert_eq!(sparse_nodes(&mut context, 0, &question), n_indexed, "the true prefix again");
    println!("{trials} changed prefixes of {n} tokens, {relatives} by a near relative: none bound");
}
