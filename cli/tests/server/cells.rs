//! Cells that the server moves, rotates, saves and restores behind the plugin's back. llama.cpp shifts and reuses only where
//! the memory can shift (no recurrent model, no position encoding by sections); SmolLM2's can.

use serde_json::json;

use crate::common::host::{turn, Answer};
use crate::{assert_dense, assert_fact, fact, fixture, other, server, BUDGET, FACTS, N, PREFIX, SLOT_FILE};

/// Cell at which the prefix was bound last, if it was bound while the answer was made.
fn bound_at(answer: &Answer) -> Option<usize> {
    let line = answer.log.lines().rfind(|l| l.contains(" is bound: "))?;
    line.split_once("from cell ")?.1.split_whitespace().next()?.parse().ok()
}

/// Sparse and dense graphs of single tokens in an answer, as runs: `[(sparse, length)]`.
fn runs(answer: &Answer) -> Vec<(bool, usize)> {
    let mut runs: Vec<(bool, usize)> = Vec::new();
    for graph in answer.graphs.iter().filter(|g| g.rows == 1) {
        match runs.last_mut() {
            Some((sparse, n)) if *sparse == (graph.sparse_nodes > 0) => *n += 1,
            _ => runs.push((graph.sparse_nodes > 0, 1)),
        }
    }
    runs
}

#[test]
fn a_context_shift_that_moves_the_prefix_makes_the_rest_dense() {
    let _turn = turn();
    let server = server(&["-np", "1", "-c", "512", "--context-shift", "--cache-ram", "0"], Some(BUDGET));
    let (prompt, right) = fact(0);
    // nothing is kept: half of the context goes, with the start of the prefix, and what is left is rotated in place
    let answer = server.ask(&prompt, 150, &json!({"n_keep": 0}));
    assert!(answer.content.starts_with(right) && answer.reply["truncated"] == true, "{}", answer.reply);
    let runs_of = runs(&answer);
    assert!(matches!(runs_of[..], [(true, 80..), (false, 10..)]), "{runs_of:?}\n{}", answer.log);
    assert!(answer.log.contains("no longer bound to stream 0: the cache is rewritten as a whole"), "{}", answer.log);
    // the prefix again, from its first token
    let again = server.ask(&fact(1).0, N, &json!({}));
    assert!(again.content.starts_with(fact(1).1) && again.graphs.last().unwrap().sparse_nodes > 0, "{}", again.log);
    let totals = server.stop();
    assert!(totals.contains("unbound: ") && totals.contains("dropped 1 times"), "{totals}");
}

#[test]
fn a_context_shift_that_keeps_the_prefix_binds_it_again() {
    let _turn = turn();
    let server = server(&["-np", "1", "-c", "512", "--context-shift"], Some(BUDGET));
    let (prompt, right) = fact(0);
    // the shift rotates every cell of the layer, those of the prefix by nothing
    let answer = server.ask(&prompt, 150, &json!({"n_keep": -1}));
    assert!(answer.content.starts_with(right) && answer.reply["truncated"] == true, "{}", answer.reply);
    assert!(answer.log.contains("the cache is rewritten as a whole"), "{}", answer.log);
    let runs = runs(&answer);
    assert!(matches!(runs[..], [(true, 140..)]), "{runs:?}\n{}", answer.log);
    server.stop();
}

#[test]
fn cache_reuse_behind_the_prefix_keeps_it_bound() {
    let _turn = turn();
    let server = server(&["-np", "1", "-c", "1024", "--cache-reuse", "16"], Some(BUDGET));
    let (old, kept) = ("\nThis sentence is gone in the second request.", &other(0, 200));
    let (question, right) = FACTS[0];
    server.ask(&format!("{PREFIX}{old}{kept}{question}"), N, &json!({}));
    let answer = server.ask(&format!("{PREFIX}{kept}{question}"), N, &json!({}));
    let reused = answer.cache_n as usize;
    assert!(reused > fixture().n_prefix + 30, "only {reused} tokens were reused\n{}", answer.log);
    assert_fact(&answer, right);
    server.stop();
}

#[test]
fn cache_reuse_that_moves_the_prefix_from_behind_another_text_stays_dense() {
    let _turn = turn();
    let server = server(&["-np", "1", "-c", "1024", "--cache-reuse", "16", "--slot-save-path", "."], Some(BUDGET));
    // the tokens of the prefix at its own positions in the end, but with keys that have seen another start
    let (prompt, right) = fact(0);
    assert_dense(&server.ask(&format!("{}\n\n{prompt}", other(1, 300)), N, &json!({})));
    let moved = server.ask(&prompt, N, &json!({}));
    assert!(moved.cache_n as usize > fixture().n_prefix - 40, "{}\n{}", moved.reply["timings"], moved.log);
    assert_dense(&moved);
    // computed anew it is bound
    server.slot(0, "erase", "");
    let anew = server.ask(&prompt, N, &json!({}));
    assert!(anew.cache_n == 0 && anew.content.starts_with(right), "{}", anew.log);
    assert!(anew.graphs.last().unwrap().sparse_nodes > 0, "{}", anew.log);
    server.stop();
}

#[test]
fn a_slot_file_of_sqz_build_is_restored_and_bound_also_in_other_cells() {
    let _turn = turn();
    let folder = fixture().folder.to_str().unwrap();
    let args = ["-np", "2", "-c", "2048", "--kv-unified", "--no-cache-idle-slots", "--slot-save-path", folder];
    let server = server(&args, Some(BUDGET));
    let n = fixture().n_prefix as u64;
    assert_eq!(server.slot(0, "restore", SLOT_FILE)["n_restored"], n);
    let (prompt, right) = fact(0);
    let first = server.ask_slot(0, &prompt, N);
    assert_eq!((first.cache_n, bound_at(&first)), (n, Some(0)), "{}", first.log);
    assert_fact(&first, right);

    // saved by the server, erased, its cells taken by another slot, and restored behind them
    assert!(server.slot(0, "save", "saved.slot")["n_saved"].as_u64().unwrap() > n);
    assert!(server.slot(0, "erase", "")["n_erased"].as_u64().unwrap() > n);
    assert_dense(&server.ask_slot(1, &other(1, 1200), N));
    server.slot(0, "restore", "saved.slot");
    let (prompt, right) = fact(1);
    let second = server.ask_slot(0, &prompt, N);
    assert!(second.cache_n >= n, "{}", second.reply["timings"]);
    assert!(bound_at(&second).is_some_and(|cell| cell > 0), "{}", second.log);
    assert_fact(&second, right);

    // restored where it was, over its own cells
    server.slot(0, "restore", SLOT_FILE);
    let (prompt, right) = fact(2);
    let third = server.ask_slot(0, &prompt, N);
    assert_eq!(third.cache_n, n, "{}", third.reply["timings"]);
    assert_fact(&third, right);
    server.stop();
}

#[test]
fn a_prefix_that_comes_back_from_the_prompt_cache_in_ram_is_bound_again() {
    let _turn = turn();
    // one slot: what it held goes to RAM when a request needs another prompt. Four slots (the default): idle ones go to RAM
    // and leave the unified cache whenever a request comes.
    for slots in [&["-np", "1"][..], &["-np", "4", "--kv-unified"]] {
        let args = [slots, &["-c", "2048", "--cache-ram", "256"]].concat();
        let server = server(&args, Some(BUDGET));
        server.ask(&fact(0).0, N, &json!({}));
        for i in 1..4 {
            assert_dense(&server.ask(&other(i, 1200), N, &json!({})));
            let (prompt, right) = fact(i);
            let back = server.ask(&prompt, N, &json!({}));
            assert!(back.cache_n as usize >= fixture().n_prefix, "{slots:?}: {}\n{}", back.reply["timings"], back.log);
            assert_fact(&back, right);
        }
        let log = server.stop();
        assert!(log.matches(" is bound: ").count() > 1, "it never left its cells: {log}");
    }
}
