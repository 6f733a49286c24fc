//! What llama-server does around a prefix, in the unmodified program on real models: slots and caches, restored and shifted
//! cells, draft models, adapters, other flags. docs/server.md says the same in a table. A text of about 400 tokens with
//! facts in it is the prefix; the plugin's line per graph (GGML_SQUEEZE_LOG=2) tells which rows were sparse.

#[path = "../common/mod.rs"]
mod common;

mod cells;
mod faults;
mod indexes;
mod models;
mod slots;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use common::host::{squeeze, Answer, Server};
use ggml_squeeze::index::Index;

/// The prefix.
pub const PREFIX: &str = include_str!("handbook.txt");

/// What is asked of it, and what the answer begins with. SmolLM2 gives these answers without the plugin, and at `BUDGET`.
/// A question whose answer is a near tie (to whom the lighthouse keeper wrote: right at budget 1 wherever the cells are, wrong
/// at 0.35 in some of them) is no test of bindings and not asked.
pub const FACTS: [(&str, &str); 5] = [
    ("\nThe cat of the archivist is named", " Ambrose"),
    ("\nEvery visitor signs the", " green book"),
    ("\nLost things are kept for one year in the", " cellar"),
    ("\nFees are paid at the second window on the", " left"),
    ("\nIn winter they get hot soup from the", " kitchen"),
];

/// Share of the prefix keys that is attended: of 400 tokens, a third.
pub const BUDGET: &str = "0.35";

/// Texts that have nothing to do with it, longer than it.
pub const OTHERS: [&str; 2] = [include_str!("../common/text.txt"), include_str!("other.txt")];

/// Tokens of an answer.
pub const N: usize = 8;

pub fn fact(i: usize) -> (String, &'static str) {
    let (question, answer) = FACTS[i % FACTS.len()];
    (format!("{PREFIX}{question}"), answer)
}

/// The first `n` bytes of another text, and a question that differs with `i`.
pub fn other(i: usize, n: usize) -> String {
    let text: String = OTHERS[i % 2].chars().take(n).collect();
    format!("{text}\n{i}. In short,")
}

/// An index of the prefix and the server's slot file of it, built once.
pub struct Fixture {
    pub folder: PathBuf,
    pub index: PathBuf,
    pub n_prefix: usize,
    pub n_layer: u64,
}

/// File that `sqz build --slot-file` writes, in the fixture's folder.
pub const SLOT_FILE: &str = "prefix.slot";

pub fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("server");
        let slot = folder.join(SLOT_FILE);
        let index = common::build(&folder, PREFIX, &["--slot-file", slot.to_str().unwrap()]);
        let opened = Index::open(&index).unwrap();
        let (n_prefix, n_layer) = (opened.meta().n_prefix(), opened.shapes().len() as u64);
        assert!((350..450).contains(&n_prefix), "{n_prefix} tokens: the tests are laid out for about 400");
        Fixture { folder, index, n_prefix, n_layer }
    })
}

/// Number of servers started, for the names of their logs.
fn next_log(folder: &Path) -> PathBuf {
    static NUMBER: Mutex<usize> = Mutex::new(0);
    let mut number = NUMBER.lock().unwrap();
    *number += 1;
    folder.join(format!("server-{number}.log"))
}

/// SmolLM2 behind llama-server, with the plugin and its index at this budget, or without (`None`).
pub fn server(args: &[&str], budget: Option<&str>) -> Server {
    let fixture = fixture();
    let variables = budget.map_or(Vec::new(), |b| squeeze(&fixture.index, b));
    Server::start(&common::model(), args, &variables, &next_log(&fixture.folder))
}

/// An answer holds the fact, in graphs that were all sparse.
pub fn assert_fact(answer: &Answer, fact: &str) {
    assert!(answer.content.starts_with(fact), "{:?} instead of {fact:?}\n{}", answer.content, answer.log);
    assert!(answer.sparse(), "not sparse throughout: {:#?}\n{}", answer.graphs, answer.log);
}

pub fn assert_dense(answer: &Answer) {
    assert!(answer.dense(), "not dense throughout: {:#?}\n{}", answer.graphs, answer.log);
}
