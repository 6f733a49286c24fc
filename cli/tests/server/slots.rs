//! Several slots on one cache, or on one each.

use crate::common::host::{graphs, turn, Answer};
use crate::{assert_dense, assert_fact, fact, fixture, other, server, BUDGET, N, OTHERS, PREFIX};

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

#[test]
fn a_slot_overwritten_by_other_text_is_dense_from_its_first_token() {
    let _turn = turn();
    let server = server(&["-np", "1", "-c", "1024", "--cache-ram", "0"], Some(BUDGET));
    let (prompt, right) = fact(0);
    assert!(server.ask_slot(0, &prompt, N).content.starts_with(right));
    assert_fact(&server.ask_slot(0, &prompt, N), right);
    let answer = server.ask_slot(0, &other(0, 1500), N);
    assert_dense(&answer);
    assert!(answer.log.contains("no longer bound to stream 0: its cells are overwritten"), "{}", answer.log);
    // a text that goes on otherwise in the middle of the prefix
    server.ask_slot(0, &prompt, N);
    let half: String = PREFIX.chars().take(900).collect();
    let answer = server.ask_slot(0, &format!("{half}{}", other(1, 900)), N);
    assert!(answer.cache_n > 100, "{}", answer.reply["timings"]);
    assert_dense(&answer);
    let log = server.stop();
    let totals = log.lines().rfind(|l| l.contains("totals:")).unwrap();
    assert!(totals.contains("unbound: ") && totals.contains("bound 2 times, dropped 2 times"), "{totals}");
}

/// Two slots on the prefix (even numbers), two on other text (odd ones): what request `i` of a slot is, and its right answer.
fn request(slot: usize, i: usize) -> (String, Option<&'static str>) {
    if slot % 2 == 0 {
        let (prompt, right) = fact(i + slot / 2);
        return (prompt, Some(right));
    }
    // the slot's own text stays in its cells; what is asked of it differs
    (format!("{}\n{i}. In short,", OTHERS[slot / 2].chars().take(1000).collect::<String>()), None)
}

fn check(slot: usize, i: usize, answer: &Answer) {
    let (_, right) = request(slot, i);
    match right {
        Some(right) => assert!(answer.content.starts_with(right), "slot {slot}, request {i}: {:?}", answer.content),
        None => assert!(!answer.content.is_empty()),
    }
}

/// 40 requests over four slots, 200 with SQZ_THOROUGH; first one at a time in a fixed order, then all slots at once.
#[test]
fn two_slots_on_the_prefix_and_two_on_other_text_do_not_disturb_each_other() {
    let _turn = turn();
    let n = if std::env::var_os("SQZ_THOROUGH").is_some() { 25 } else { 5 };
    let args = ["-np", "4", "-c", "4096", "--kv-unified", "--no-cache-idle-slots"];
    let in_order = |budget: Option<&str>| {
        let server = server(&args, budget);
        let mut answers = Vec::new();
        for i in 0..n {
            for slot in 0..4 {
                let answer = server.ask_slot(slot, &request(slot, i).0, N);
                check(slot, i, &answer);
                answers.push(answer);
            }
        }
        (server, answers)
    };
    let (dense_server, dense) = in_order(None);
    dense_server.stop();
    let (server, sparse) = in_order(Some(BUDGET));
    for (k, (with, without)) in sparse.iter().zip(&dense).enumerate() {
        if k % 2 == 1 {
            assert_dense(with);
            assert_eq!(with.content, without.content, "request {k} off the prefix has another answer than without");
        } else if k >= 4 {
            assert!(with.sparse(), "request {k}: {}", with.log);
        }
    }

    let mark = server.log().len();
    std::thread::scope(|scope| {
        for slot in 0..4 {
            let server = &server;
            scope.spawn(move || {
                for i in n..2 * n {
                    check(slot, i, &server.ask_slot(slot, &request(slot, i).0, N));
                }
            });
        }
    });
    let mixed = graphs(&server.log()[mark..]).into_iter().filter(|g| g.sparse_rows > 0 && g.sparse_rows < g.rows);
    assert!(mixed.count() > n, "sparse and dense rows were hardly ever in one graph");
    server.stop();
}
