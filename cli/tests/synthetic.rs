//! `sqz bench --synthetic-index` on a model of random weights, from end to end; and that nothing else takes such an index.

mod common;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{plugin, program, sqz, stderr, text};
use ggml_squeeze::random::split_mix;
use serde_json::Value;
use sqz::llama::{start, Context, Model, Outputs};

fn random_model(folder: &Path) -> PathBuf {
    let path = folder.join("random.gguf");
    let run = sqz(&["random-model", "-o", path.to_str().unwrap(), "--shape", "tiny"]);
    assert!(run.status.success(), "{}", stderr(&run));
    path
}

#[test]
fn each_word_of_a_text_is_a_token() {
    let folder = tempfile::tempdir().unwrap();
    start(false).unwrap();
    // words come last, behind bytes and pairs
    for (n_vocab, n_word) in [("512", 223), ("32000", 31385)] {
        let path = folder.path().join(n_vocab);
        let sizes = ["--layers", "1", "--head-dim", "32", "--ff", "32", "--vocab", n_vocab];
        let run = sqz(&[&["random-model", "-o", path.to_str().unwrap()], &sizes[..]].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        let model = Model::load(&path).unwrap();
        let mut state = 1;
        let ids: Vec<i32> =
            (0..8192).map(|_| model.n_vocab() as i32 - 1 - (split_mix(&mut state) % n_word) as i32).collect();
        let text = model.text(&ids);
        let words: Vec<&str> = text.split_whitespace().collect();
        assert!(words.len() == ids.len() && words.iter().all(|w| w.len() == 4), "{}", &text[..40]);
        assert_eq!(model.tokenise(&words.join(" "), true).unwrap(), [&[1], &ids[..]].concat());
        let n_distinct = words.iter().collect::<HashSet<_>>().len();
        assert!(n_distinct > 7000 || n_distinct as u64 == n_word, "{n_distinct} of {n_word}");
    }
}

/// `sqz bench` on a synthetic index.
fn bench(model: &Path, more: &[&str]) -> Output {
    let fixed =
        ["bench", "-m", model.to_str().unwrap(), "--synthetic-index", "-t", "2", "-p", "16", "-n", "4", "-r", "1"];
    sqz(&[&fixed, more].concat())
}

#[test]
fn random_weights_give_finite_logits_that_differ() {
    let folder = tempfile::tempdir().unwrap();
    let path = random_model(folder.path());
    start(false).unwrap();
    let model = Model::load(&path).unwrap();
    assert_eq!((model.n_layer(), model.n_vocab(), model.n_ctx_train()), (4, 512, 131072));
    let tokens = model.tokenise("Any text is bytes here.", true).unwrap();
    assert!(tokens.len() > 20, "{tokens:?}");
    let mut context = Context::new(&model, &common::context::args(&path, 512), 256, None).unwrap();
    let mut spread = |tokens: &[i32]| {
        context.truncate(0).unwrap();
        context.decode(tokens, Outputs::Last).unwrap();
        let logits = context.logits(tokens.len() - 1).unwrap().to_vec();
        let n = logits.len() as f32;
        let mean = logits.iter().sum::<f32>() / n;
        ((logits.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt(), logits)
    };
    let (deviation, one) = spread(&tokens);
    assert!((0.3..3.0).contains(&deviation), "the logits' standard deviation is {deviation}");
    assert_ne!(one, spread(&tokens[1..]).1);
}

#[test]
fn every_line_says_that_the_index_is_synthetic() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let run = bench(&model, &["--depth", "1500", "--budgets", "0.1,0.3", "--json"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let rows: Vec<Value> = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(rows.len(), 2 * 4);
    for row in &rows {
        assert!(
            row["synthetic_index"] == true && row["model"].as_str().unwrap().ends_with(", synthetic index"),
            "{row}"
        );
        assert!(
            row["test"].as_str().unwrap().ends_with(" @ d1500") && row["tokens_per_second"].as_f64().unwrap() > 0.0
        );
        let mode = row["mode"].as_str().unwrap();
        match mode.strip_prefix("budget ").map(|b| b.parse::<f64>().unwrap()) {
            // what was really kept: up to a cluster more than the budget
            Some(budget) => assert!((budget..budget + 0.05).contains(&row["kept"].as_f64().unwrap()), "{row}"),
            None => assert!(row["kept"].is_null(), "{row}"),
        }
    }
    // and in the table; the text gives the prefix
    std::fs::write(folder.path().join("text.txt"), text(900)).unwrap();
    let run = bench(&model, &["-f", folder.path().join("text.txt").to_str().unwrap(), "--budgets", "0.2"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let table = String::from_utf8_lossy(&run.stdout).into_owned();
    let lines: Vec<&str> = table.lines().skip(2).collect();
    assert!(lines.len() == 6 && lines.iter().all(|l| l.contains(", synthetic index |")), "{table}");
    let short = bench(&model, &["--depth", "50"]);
    assert!(!short.status.success() && stderr(&short).contains("too short"), "{}", stderr(&short));
}

#[test]
fn a_synthetic_index_binds_as_any_other_where_it_is_asked_for_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (index, prompt) = (path("kept.sqz.gguf"), path("text.txt"));
    std::fs::write(&prompt, text(900)).unwrap();
    let run = bench(&model, &["-f", &prompt, "--keep-index", &index]);
    assert!(run.status.success(), "{}", stderr(&run));

    let model = model.to_str().unwrap();
    let inspect = sqz(&["inspect", &index]);
    assert!(!inspect.status.success() && stderr(&inspect).contains("the index is synthetic"), "{}", stderr(&inspect));
    let other = sqz(&["bench", "-m", model, "--index", &index]);
    assert!(!other.status.success() && stderr(&other).contains("the index is synthetic"), "{}", stderr(&other));

    let completion = |variables: &[(&str, &str)]| {
        let mut command = Command::new(program("llama-completion"));
        command.args([
            "-m",
            model,
            "-f",
            &prompt,
            "-n",
            "32",
            "--temp",
            "0",
            "-no-cnv",
            "--no-display-prompt",
            "-t",
            "2",
        ]);
        command.args(["-c", "2048"]).envs(variables.iter().copied());
        let run = command.output().unwrap();
        assert!(run.status.success(), "{}", stderr(&run));
        run
    };
    let plugin = plugin();
    let used = [
        ("GGML_BACKEND_PATH", &*plugin),
        ("GGML_SQUEEZE_INDEX", &*index),
        ("GGML_SQUEEZE_MIN_PREFIX", "0"),
        ("GGML_SQUEEZE_LOG", "1"),
    ];
    let refused = completion(&used);
    let said = stderr(&refused);
    assert!(said.contains("the index is synthetic") && said.contains("stays dense"), "{said}");
    assert!(!said.contains("is bound"), "{said}");
    // llama.cpp prints from a thread of its own, whose last words a busy machine can lose.
    let (refused, plain) = (refused.stdout, completion(&[]).stdout);
    let n = refused.len().min(plain.len());
    assert!(n >= 32 && refused[..n] == plain[..n], "{refused:?} is not {plain:?}");
    let asked = stderr(&completion(&[&used[..], &[("GGML_SQUEEZE_SYNTHETIC", "1")]].concat()));
    assert!(asked.contains("kept.sqz.gguf is bound"), "{asked}");
    assert!(asked.lines().any(|l| l.contains("totals:") && !l.contains("sparse 0 nodes")), "{asked}");
}
