//! `sqz eval` from end to end on a model of random weights: what it measures there says nothing of quality, but whether everything
//! is asked, counted, kept and reported can be told.

mod common;

use std::path::{Path, PathBuf};
use std::process::Output;

use common::host::turn;
use common::{sqz, stderr};
use serde_json::{json, Value};

fn random_model(folder: &Path) -> String {
    let path = folder.join("random.gguf");
    let run = sqz(&["random-model", "-o", path.to_str().unwrap(), "--shape", "tiny"]);
    assert!(run.status.success(), "{}", stderr(&run));
    path.to_str().unwrap().to_string()
}

fn eval(model: &str, more: &[&str]) -> Output {
    let run = sqz(&[&["eval", "-m", model, "-t", "2", "--window", "50"], more].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    run
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn results(whole: &Value) -> &Vec<Value> {
    whole["results"].as_array().unwrap()
}

fn row<'a>(whole: &'a Value, variant: &str) -> &'a Value {
    results(whole).iter().find(|r| r["variant"] == variant).unwrap_or_else(|| panic!("no {variant} in {whole}"))
}

/// The same tree, but for the last digits of a number, which reading its decimals may change.
fn same(a: &Value, b: &Value, at: &str) {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64().unwrap(), y.as_f64().unwrap());
            assert!((x - y).abs() <= 1e-12 * x.abs().max(y.abs()), "{at}: {x} and {y}");
        }
        (Value::Array(x), Value::Array(y)) => {
            assert_eq!(x.len(), y.len(), "{at}");
            x.iter().zip(y).enumerate().for_each(|(i, (x, y))| same(x, y, &format!("{at}[{i}]")));
        }
        (Value::Object(x), Value::Object(y)) => {
            assert!(x.keys().eq(y.keys()), "{at}");
            x.iter().for_each(|(key, x)| same(x, &y[key], &format!("{at}.{key}")));
        }
        _ => assert_eq!(a, b, "{at}"),
    }
}

const TASKS: [&str; 8] =
    ["--tasks", "value,variable,quote,text", "--count", "2", "--tokens", "2600", "--spread", "diag"];

#[test]
fn every_way_to_attend_is_asked_everything_and_reads_what_it_is_to() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let report = folder.path().join("r.html");
    let given =
        ["--stock", "--budgets", "0.3,1", "--mass", "0.9", "--threshold", "0.3", "--try", "all", "--baselines", "all"];
    let run = eval(&model, &[&TASKS[..], &given, &["-o", report.to_str().unwrap()]].concat());
    let table = String::from_utf8(run.stdout).unwrap();
    assert!(table.contains("8 of 8 questions") && table.contains("| Quest, per head, as budget 0.3 "), "{table}");
    let whole = read(&report.with_extension("json"));
    // dense, llama.cpp, two budgets, a threshold, a mass, 14 tries and 8 baselines
    assert_eq!((results(&whole).len(), whole["questions"].as_array().unwrap().len()), (28, 8));
    for r in results(&whole) {
        let name = r["variant"].as_str().unwrap();
        assert_eq!(r["questions"], 8, "{name}");
        assert!(r["kl"]["mean"].as_f64().unwrap().is_finite() && r["perplexity"].as_f64().unwrap() > 1.0, "{name}");
        assert!(r["difference"]["mean"].is_number() && r["score"]["low"].is_number(), "{name}");
        assert_eq!(r["tasks"].as_array().unwrap().len(), 4, "{name}");
    }
    let number = |variant: &str, what: &str| row(&whole, variant)[what].as_f64().unwrap();
    let bytes = number("budget 0.3", "bytes");
    assert!(number("dense f32", "bytes") == 1.0 && number("dense f32", "kl_p95") == 0.0);
    assert!((0.3..0.42).contains(&bytes) && (number("budget 0.3", "kept") - 0.3).abs() < 0.02, "{bytes}");
    // All of the prefix and its centroids; nothing is missed, and what differs is rounding.
    assert!(number("budget 1", "recall") > 0.9999 && number("budget 1", "bytes") > 1.0);
    assert!(row(&whole, "budget 1")["kl"]["mean"].as_f64().unwrap() < 0.01);
    let oracle = number("oracle keys, as budget 0.3", "recall");
    for r in results(&whole).iter().filter(|r| r["variant"].as_str().unwrap().contains("as budget")) {
        let (name, own) = (r["variant"].as_str().unwrap(), r["bytes"].as_f64().unwrap());
        // Two of four layers are more than that.
        if name.starts_with("dense-layers=2") {
            continue;
        }
        // Calibrated modes keep what they keep on other queries.
        let near =
            if name.contains("threshold") || name.contains("mass") || name.contains("reference") { 0.2 } else { 0.03 };
        assert!((own - bytes).abs() < near, "{name} reads {own}, not {bytes}");
        let recall = r["recall"].as_f64().unwrap();
        let dense_rows = name.starts_with("recycled") || own > bytes + 0.03;
        assert!(recall <= oracle + 0.005 || dense_rows, "{name} keeps {recall}, the oracle {oracle}");
        assert_eq!(r["layers"].as_array().unwrap().len(), 4, "{name}");
    }
    let page = std::fs::read_to_string(&report).unwrap();
    assert!(page.contains("<svg") && !page.contains("http") && page.contains("value-02"));
}

#[test]
fn an_interrupted_run_goes_on_and_ends_as_one_that_was_not() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let given = |name: &str| {
        let path = folder.path().join(name);
        let more = ["--budgets", "0.2", "--baselines", "recycled,tokens", "-o"];
        (
            path.clone(),
            [&TASKS[..], &more, &[path.to_str().unwrap()]].concat().iter().map(|s| s.to_string()).collect::<Vec<_>>(),
        )
    };
    let run = |args: &[String], more: &[&str]| {
        eval(&model, &[&args.iter().map(String::as_str).collect::<Vec<_>>()[..], more].concat())
    };
    let (whole, args) = given("whole.html");
    run(&args, &[]);
    let (parts, args) = given("parts.html");
    let (mut n, mut lines) = (0, 0);
    // The time is always up, but for one result.
    loop {
        let said = run(&args, &["--minutes", "0"]);
        n += 1;
        let now = std::fs::read_to_string(parts.with_extension("jsonl")).unwrap().lines().count();
        let is_done = !stderr(&said).contains("the time is up");
        assert!(now > lines || is_done, "run {n} measured nothing");
        lines = now;
        if n == 3 {
            // An interruption in the middle of a line.
            let path = parts.with_extension("jsonl");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, &text[..text.len() - 20]).unwrap();
            lines -= 1;
        }
        if is_done {
            break;
        }
    }
    assert!(n > 10, "{n} runs");
    let (whole, parts) = (read(&whole.with_extension("json")), read(&parts.with_extension("json")));
    same(&whole["results"], &parts["results"], "results");
    same(&whole["questions"], &parts["questions"], "questions");
    // Nothing is left to be measured, and nothing is measured twice.
    let again = run(&args, &[]);
    assert!(!stderr(&again).contains("eval"), "{}", stderr(&again));
    let path: PathBuf = folder.path().join("parts.jsonl");
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), lines);
    // So are the halves of two runs, one after the other.
    let half = |part: &str| {
        let (path, args) = given(&format!("{}.html", part.replace('/', "-")));
        run(&args, &["--part", part]);
        std::fs::read_to_string(path.with_extension("jsonl")).unwrap()
    };
    let (both, of_both) = given("both.html");
    std::fs::write(both.with_extension("jsonl"), half("1/2") + &half("2/2")).unwrap();
    let said = run(&of_both, &[]);
    assert!(!stderr(&said).contains("eval"), "{}", stderr(&said));
    same(&whole["results"], &read(&both.with_extension("json"))["results"], "results of halves");
    // Another setting is another result.
    run(&args, &["--estimate"]);
    assert!(std::fs::read_to_string(&path).unwrap().lines().count() > lines);
}

#[test]
fn records_of_longbench_have_a_prefix_each() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let context = |from: usize| sqz::tasks::BUILT_IN[from..from + 900].to_string();
    let record = |dataset: &str, from: usize, input: &str, answer: &str| {
        json!({"dataset": dataset, "context": context(from), "input": input, "answers": [answer], "length": 1})
            .to_string()
    };
    let lines = [
        record("qasper", 0, "Who was she?", "Catherine"),
        record("qasper", 0, "Where was she born?", "in a village"),
        record("lcc", 2000, "return ", "x"),
    ];
    let path = folder.path().join("records.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    let run = eval(&model, &["--questions", path.to_str().unwrap(), "--tokens", "700", "--budgets", "0.3", "--json"]);
    let whole: Value = serde_json::from_slice(&run.stdout).unwrap();
    let prefixes = whole["prefixes"].as_array().unwrap();
    assert!(
        prefixes.len() == 2 && prefixes.iter().all(|p| (600..=720).contains(&p[1].as_u64().unwrap())),
        "{prefixes:?}"
    );
    let asked = whole["questions"].as_array().unwrap();
    let tasks: Vec<&str> = asked.iter().map(|q| q["task"].as_str().unwrap()).collect();
    assert_eq!(tasks, ["qasper", "qasper", "lcc"]);
    assert!(asked.iter().all(|q| q["dense_score"].is_number()));
}

#[test]
fn facts_are_asked_behind_an_index_or_a_text() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let model = random_model(folder.path());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    std::fs::write(path("novel.txt"), sqz::tasks::BUILT_IN).unwrap();
    let given = [
        "facts",
        "-m",
        &model,
        "-f",
        &path("novel.txt"),
        "--tokens",
        "6000",
        "-o",
        &path("text.txt"),
        "--questions",
        &path("q.jsonl"),
    ];
    let run = sqz(&given);
    assert!(run.status.success(), "{}", stderr(&run));
    let run = sqz(&[
        "build",
        "-m",
        &model,
        "-f",
        &path("text.txt"),
        "-o",
        &path("i.sqz.gguf"),
        "--state-file",
        &path("s"),
        "--window",
        "50",
    ]);
    assert!(run.status.success(), "{}", stderr(&run));
    let fixed = ["--questions", &path("q.jsonl"), "--budgets", "0.3", "--json"];
    let behind_index =
        eval(&model, &[&fixed[..], &["--index", &path("i.sqz.gguf"), "--state-file", &path("s")]].concat());
    let behind_text = eval(&model, &[&fixed[..], &["-f", &path("text.txt")]].concat());
    let (one, two): (Value, Value) =
        (serde_json::from_slice(&behind_index.stdout).unwrap(), serde_json::from_slice(&behind_text.stdout).unwrap());
    assert_eq!((one["answered"].as_u64(), two["answered"].as_u64()), (Some(22), Some(22)));
    // An index does not tell the last bytes of its text, which no token of the prefix stands for, so the prompts differ by these.
    for what in ["kept", "bytes", "recall"] {
        let of = |whole: &Value| row(whole, "budget 0.3")[what].as_f64().unwrap();
        assert!((of(&one) - of(&two)).abs() < 2e-3, "{what}: {} and {}", of(&one), of(&two));
    }
    let ids = |whole: &Value| -> Vec<Value> {
        whole["questions"].as_array().unwrap().iter().map(|q| q["id"].clone()).collect()
    };
    assert_eq!(ids(&one), ids(&two));
    let neither = sqz(&["eval", "-m", &model, "--questions", &path("q.jsonl")]);
    assert!(!neither.status.success() && stderr(&neither).contains("--index"), "{}", stderr(&neither));
}
