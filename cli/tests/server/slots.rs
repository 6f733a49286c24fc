//! Several slots on one cache, or on one each.

use serde_json::json;

use crate::common::host::{turn, Answer};
use crate::{assert_dense, assert_fact, fact, fixture, other, server, BUDGET, N};

/// Fills the slots alternately with the prefix and other text, then asks each again.
fn slots(n: usize, unified: bool) {
    let _turn = turn();
    let (parallel, size) = (n.to_string(), (n * 768).to_string());
    let cache = if unified { "--kv-unified" } else { "--no-kv-unified" };
    // by default idle slots on a unified cache are cleared: cells.rs has that
    let server = server(&["-np", &parallel, "-c", &size, cache, "--no-cache-idle-slots"], Some(BUDGET));
    for round in 0..2 {
        for slot in 0..n {
            if slot % 2 == 1 {
                assert_dense(&server.ask_slot(slot, &other(slot, 1500), N));
                continue;
            }
            let (prompt, right) = fact(slot / 2 + round);
            let answer = server.ask_slot(slot, &prompt, N);
            if round == 0 {
                // the graph that writes the prefix is dense; the tokens behind it are not
                assert!(answer.content.starts_with(right), "slot {slot}: {:?}", answer.content);
                assert!(answer.graphs.last().unwrap().sparse_nodes == fixture().n_layer, "{}", answer.log);
            } else {
                assert!(answer.cache_n as usize >= fixture().n_prefix, "slot {slot}: {}", answer.reply["timings"]);
                assert_fact(&answer, right);
            }
        }
    }
    server.stop();
}

#[test]
fn one_slot() {
    slots(1, false);
}

#[test]
fn four_slots_on_a_unified_cache() {
    slots(4, true);
}

#[test]
fn four_slots_on_a_cache_each() {
    slots(4, false);
}

#[test]
fn eight_slots_on_a_unified_cache() {
    slots(8, true);
}

#[test]
fn eight_slots_on_a_cache_each() {
    slots(8, false);
}
