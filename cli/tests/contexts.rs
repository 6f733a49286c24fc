//! Contexts of the C ABI on a real model: each has its own indexes, settings and counters; indexes come and go while another
//! thread decodes. One test: the plugin is one per process.

mod common;

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

use ggml_squeeze::capi::sqz_status::{SQZ_ERROR_NOT_ATTACHED, SQZ_OK};
use ggml_squeeze::capi::*;
use sqz::llama::{start, Context, Model, Outputs};

const QUESTION: &str = "\nWhat is said of the cells?";

fn stats(context: *const sqz_context) -> sqz_stats {
    let mut out = sqz_stats::default();
    // SAFETY: a live handle or null, and a place for the result.
    assert_eq!(unsafe { sqz_get_stats(context, &mut out) }, SQZ_OK);
    out
}

fn answer(context: &mut Context, question: &[i32]) -> Vec<f32> {
    let n_past = context.n_past();
    context.decode(question, Outputs::Last).unwrap();
    let logits = context.logits(question.len() - 1).unwrap().to_vec();
    context.truncate(n_past).unwrap();
    logits
}

#[test]
fn contexts_keep_to_themselves_and_indexes_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    // Graphs of few tokens, whose attention llama.cpp sums less exactly: every layer must be captured even so.
    let path = common::build(folder.path(), &common::text(1300), &["--ubatch-size", "48"]);
    start(false).unwrap();
    assert_eq!(sqz_register(), SQZ_OK);
    let model = Model::load(&common::model()).unwrap();
    let args = common::context::args(&common::model(), 512);
    let question = model.tokenise(QUESTION, false).unwrap();

    let (mut index, mut own) = (null_mut(), null_mut());
    let path = CString::new(path.to_str().unwrap()).unwrap();
    let config = sqz_config { min_prefix: 0, share: 0.3, ..sqz_config_default() };
    // SAFETY: terminated strings, whole structures, places for results.
    unsafe {
        assert_eq!(sqz_index_open(path.as_ptr(), &mut index), SQZ_OK);
        assert_eq!(sqz_context_new(&config, &mut own), SQZ_OK);
    }
    let (mut data, mut n) = (null(), 0);
    // SAFETY: as above; the tokens live as long as the handle.
    let tokens = unsafe {
        assert_eq!(sqz_index_get_tokens(index, &mut data, &mut n), SQZ_OK);
        std::slice::from_raw_parts(data, n).to_vec()
    };

    assert_eq!(sqz_context_enter(own), SQZ_OK);
    let mut inside = Context::new(&model, &args, n + 64, None).unwrap();
    assert_eq!(sqz_context_enter(null()), SQZ_OK);
    let mut outside = Context::new(&model, &args, n + 64, None).unwrap();
    for context in [&mut inside, &mut outside] {
        context.prefill(&tokens, |_| {}).unwrap();
    }
    let dense = answer(&mut outside, &question);
    assert_eq!(answer(&mut inside, &question), dense, "nothing is attached yet");

    assert_eq!(sqz_attach(own, index), SQZ_OK);
    let sparse = answer(&mut inside, &question);
    assert_ne!(sparse, dense);
    assert_eq!(answer(&mut outside, &question), dense, "attached elsewhere");
    let (of_own, of_process) = (stats(own), stats(null()));
    assert_eq!((of_own.nodes_sparse, of_own.bound), (u64::from(model.n_layer()), 1));
    assert!((0.25..0.4).contains(&of_own.kept_share), "{}", of_own.kept_share);
    assert_eq!((of_process.graphs, of_process.bound), (0, 0));

    // An answer while the index comes and goes is one of the two: a graph is computed under one set of indexes.
    let ended = AtomicBool::new(false);
    let (own_address, index_address) = (own as usize, index as usize);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (own, index) = (own_address as *mut sqz_context, index_address as *mut sqz_index);
            while !ended.load(Ordering::Relaxed) {
                assert_eq!(sqz_detach(own, index), SQZ_OK);
                assert_eq!(sqz_attach(own, index), SQZ_OK);
            }
        });
        for _ in 0..40 {
            let found = answer(&mut inside, &question);
            assert!(found == dense || found == sparse);
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(answer(&mut inside, &question), sparse);

    // Settings of a context hold from the next graph on; what was freed lives on where it is in use.
    let off = sqz_config { disable: 1, ..config };
    // SAFETY: whole structures.
    unsafe { assert_eq!(sqz_configure(own, &off), SQZ_OK) };
    assert_eq!(answer(&mut inside, &question), dense);
    // SAFETY: as above.
    unsafe { assert_eq!(sqz_configure(own, &config), SQZ_OK) };
    assert_eq!(sqz_context_free(own), SQZ_OK);
    assert_eq!(answer(&mut inside, &question), sparse);
    assert_eq!(sqz_detach(null(), index), SQZ_ERROR_NOT_ATTACHED);
    assert_eq!(sqz_index_free(index), SQZ_OK);
    assert_eq!(answer(&mut inside, &question), sparse);
}
