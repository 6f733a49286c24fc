//! `sqz extend` on a real model: the longer index binds and is sparse, the old state saves the old part, and what does
//! not continue the old text or was made otherwise is refused.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::context::{args, sparse_nodes};
use common::{model, sqz, stderr, text};
use ggml_squeeze::backend;
use ggml_squeeze::config::Config;
use ggml_squeeze::index::Index;
use sqz::llama::{start, Context, Model};

/// Runs `sqz extend` on the index and the state that lie in `folder`.
fn extend(folder: &Path, text: &str, output: &str, more: &[&str]) -> std::process::Output {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_string();
    std::fs::write(folder.join("longer.txt"), text).unwrap();
    let (old, file, output) = (path("prefix.sqz.gguf"), path("longer.txt"), path(output));
    let model = model();
    sqz(&[&["extend", &old, "-m", model.to_str().unwrap(), "-f", &file, "-o", &output], more].concat())
}

#[test]
fn a_grown_text_is_indexed_from_its_beginning_on() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("old.state");
    let state = state.to_str().unwrap();
    let path = common::build(folder.path(), &text(2600), &["--state-file", state]);
    let old = Index::open(&path).unwrap();

    let open = |name: &str| Index::open(&folder.path().join(name)).unwrap();
    let longer = text(5200);
    let run = extend(folder.path(), &longer, "new.sqz.gguf", &["--old-state", state]);
    assert!(run.status.success(), "{}", stderr(&run));
    let new = Arc::new(open("new.sqz.gguf"));
    let (n_old, n) = (old.meta().n_prefix(), new.meta().n_prefix());
    assert!(n > n_old + 400 && new.meta().tokens[..n_old] == old.meta().tokens, "{n_old} {n}");
    assert_eq!(new.shapes().len(), old.shapes().len());
    assert_eq!(new.meta().calibration.len(), old.meta().calibration.len());
    let expected = (0.05 * new.meta().n_clustered() as f64).round() as u32;
    assert!(new.shapes().iter().all(|s| s.n_cluster == expected));
    assert_eq!(new.sketch().k[..old.sketch().k.len()], *old.sketch().k);
    assert!(stderr(&run).contains(&format!("{} of them new", n - n_old)), "{}", stderr(&run));

    // Without the state the old part is computed again.
    let run = extend(folder.path(), &longer, "again.sqz.gguf", &["--threads", "1"]);
    assert!(run.status.success() && stderr(&run).contains("no --old-state"), "{}", stderr(&run));
    assert_eq!(open("again.sqz.gguf").meta().tokens, new.meta().tokens);

    // A part that is shorter than the window: some of the old part is computed again for its queries.
    let run = extend(folder.path(), &text(2700), "little.sqz.gguf", &["--old-state", state]);
    assert!(run.status.success(), "{}", stderr(&run));
    let little = open("little.sqz.gguf").meta().n_prefix();
    assert!(little > n_old && little < n_old + 100, "{n_old} {little}");

    start(false).unwrap();
    backend::register(Config { min_prefix: Some(0), ..Config::default() }).unwrap();
    backend::set_indexes(vec![new.clone()]).unwrap();
    let loaded = Model::load(&model()).unwrap();
    let mut context = Context::new(&loaded, &args(&model(), 512), n + 64, None).unwrap();
    context.prefill(&new.meta().tokens, |_| {}).unwrap();
    let question = loaded.tokenise("\nWhat is said of the cells?", false).unwrap();
    assert_eq!(sparse_nodes(&mut context, 0, &question), loaded.n_layer() as u64);
}

#[test]
fn what_cannot_be_extended_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    common::build(folder.path(), &text(1300), &[]);
    let refused = |text: &str, more: &[&str]| {
        let run = extend(folder.path(), text, "new.sqz.gguf", more);
        assert!(!run.status.success());
        assert!(!folder.path().join("new.sqz.gguf").exists());
        stderr(&run)
    };
    let longer = text(2600);
    for other in [format!("Another {longer}"), text(1300), text(900)] {
        let why = refused(&other, &[]);
        assert!(why.contains("does not continue the old prefix") && why.contains("whole longer text"), "{why}");
    }
    let why = refused(&longer, &["-ctk", "q8_0"]);
    assert!(why.contains("cache types") && why.contains("q8_0"), "{why}");
    let why = refused(&longer, &["--rope-freq-base", "5000"]);
    assert!(why.contains("RoPE"), "{why}");
    let why = refused(&longer, &["--old-state", "no-such-state"]);
    assert!(why.contains("no-such-state"), "{why}");
}
