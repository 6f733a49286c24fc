//! Several indexes in one server: each slot finds its own, and one that fits nothing disturbs none.

use std::path::{Path, PathBuf};

use ggml_squeeze::index::Index;
use serde_json::json;

use crate::common::host::{graphs, squeeze, turn, Answer, Server};
use crate::{assert_fact, common, fact, fixture, next_log, other, BUDGET, N, PREFIX};

/// Characters of the second prefix; `other` begins with them.
const SECOND: usize = 1500;

/// Builds an index once per process, in a folder of the fixture's.
fn index_of(name: &str, model: &str, text: &str) -> PathBuf {
    common::build_with(&common::model_file(model), &fixture().folder.join(name), text, &[])
}

fn server_with(indexes: &[&PathBuf], args: &[&str]) -> Server {
    let list: Vec<&str> = indexes.iter().map(|p| p.to_str().unwrap()).collect();
    let variables = squeeze(Path::new(&list.join(":")), BUDGET);
    Server::start(&common::model(), args, &variables, &next_log(&fixture().folder))
}

/// Two slots on two texts in turn, then (with both indexes) at once.
fn two_prefixes(unified: bool) {
    let _turn = turn();
    let first = &fixture().index;
    let text = other(0, SECOND);
    let second = &index_of("second", "smollm2-135m.gguf", &text[..text.rfind('\n').unwrap()]);
    let foreign = &index_of("foreign", "gemma3-270m.gguf", &common::text(2400));
    let cache = if unified { "--kv-unified" } else { "--no-kv-unified" };
    let args = ["-np", "2", "-c", "2048", cache, "--no-cache-idle-slots"];
    let prompt = |i: usize| if i.is_multiple_of(2) { fact(i / 2).0 } else { other(2 * i - 2, SECOND) };
    let in_turn = |indexes: &[&PathBuf]| -> (Server, Vec<Answer>) {
        let server = server_with(indexes, &args);
        let answers = (0..6).map(|i| server.ask_slot(i % 2, &prompt(i), N)).collect();
        (server, answers)
    };

    let (server, both) = in_turn(&[foreign, first, second]);
    for (i, index) in [first, second].into_iter().enumerate() {
        let (alone_server, alone) = in_turn(&[index]);
        alone_server.stop();
        for k in (i..6).step_by(2) {
            assert_eq!(both[k].content, alone[k].content, "answer {k} is not that with {} alone", index.display());
            assert_eq!(both[k].graphs, alone[k].graphs, "answer {k}");
            assert!(k < 2 || both[k].sparse(), "answer {k}: {}", both[k].log);
        }
        let n = Index::open(index).unwrap().meta().n_prefix();
        let stream = if unified { 0 } else { i };
        let line = format!("{} is bound: {n} tokens from cell ", index.display());
        let log = server.log();
        let bound: Vec<&str> = log.lines().filter(|l| l.contains(&line)).collect();
        assert!(bound.len() == 1 && bound[0].contains(&format!("of stream {stream},")), "{bound:?}\n{log}");
    }

    let mark = server.log().len();
    std::thread::scope(|scope| {
        let ask = |slot: usize| {
            let server = &server;
            scope.spawn(move || (0..6).for_each(|i| check(slot, i, &server.ask_slot(slot, &prompt(2 * i + slot), N))));
        };
        ask(0);
        ask(1);
    });
    let together = graphs(&server.log()[mark..]).into_iter().filter(|g| g.rows == 2 && g.sparse_rows == 2);
    assert!(together.count() > 6, "the two prefixes were hardly ever sparse in one graph");

    let log = server.stop();
    let other_model = format!("{} was built with another model", foreign.display());
    assert!(log.contains(&other_model) && !log.contains(&format!("{} is bound", foreign.display())), "{log}");
    assert!(log.lines().rfind(|l| l.contains("totals:")).unwrap().contains("bound 2 times, dropped 0 times"), "{log}");
}

fn check(slot: usize, i: usize, answer: &Answer) {
    assert!(answer.sparse(), "slot {slot}: {}", answer.log);
    assert!(slot == 1 || answer.content.starts_with(fact(i).1), "{:?} instead of {:?}", answer.content, fact(i).1);
}

#[test]
fn two_prefixes_on_a_unified_cache_each_bind_their_own_index() {
    two_prefixes(true);
}

#[test]
fn two_prefixes_on_a_cache_each_each_bind_their_own_index() {
    two_prefixes(false);
}

/// The index of a text and that of its beginning: the longer one as soon as all of its text is there.
#[test]
fn of_two_indexes_that_fit_the_longer_one_is_used() {
    let _turn = turn();
    let text = format!("{PREFIX}\n{}", other(1, 1000));
    let (short, long) = (&fixture().index, &index_of("longer", "smollm2-135m.gguf", &text));
    let server = server_with(&[short, long], &["-np", "1", "-c", "2048"]);
    let bound = |answer: &Answer, index: &Path| answer.log.contains(&format!("{} is bound: ", index.display()));
    let (prompt, right) = fact(0);
    let answer = server.ask(&prompt, N, &json!({}));
    assert!(answer.content.starts_with(right) && bound(&answer, short) && !bound(&answer, long), "{}", answer.log);
    let question = |i: usize| format!("{text}{}", fact(i).0.strip_prefix(PREFIX).unwrap());
    let answer = server.ask(&question(0), N, &json!({}));
    assert!(bound(&answer, long) && answer.sparse(), "{}", answer.log);
    // it stays bound, and the shorter one serves prompts that leave the longer text
    let answer = server.ask(&question(1), N, &json!({}));
    assert_fact(&answer, fact(1).1);
    assert!(!bound(&answer, long) && !bound(&answer, short), "{}", answer.log);
    assert_fact(&server.ask(&fact(2).0, N, &json!({})), fact(2).1);
    server.stop();
}
