//! `sqz eval`: what each budget costs, for a model and a text: questions behind a prefix, answered with dense and with sparse
//! attention, and compared. One process holds the prefix; results are kept as they come, so that an interrupted run goes on.

mod allocate;
mod asked;
mod longbench;
mod plot;
mod report;
mod rules;
mod runner;
mod solve;
mod source;
mod store;
mod summary;
mod variant;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::index::ModelFile;

use crate::build_cmd::ClusterArgs;
use crate::llama::{Model, ModelArgs};
use crate::progress::Phase;
use crate::session::{share, SpreadArg};
use crate::tasks::{Question, Task};
use asked::Asked;
use report::About;
use runner::Runner;
use source::Source;
use store::{key, Store};
use summary::Answered;
use variant::{Baseline, Build, Variant};

/// Questions that calibrated modes are set on, and their tokens at most.
const PROBES: usize = 6;
const PROBE_TOKENS: usize = 160;
const DEFAULT_BUDGETS: [f32; 5] = [0.1, 0.2, 0.33, 0.5, 1.0];

/// Options of `sqz eval`.
#[derive(Clone, Debug, clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text that tasks are planted into, or that --questions of sqz facts are about [default: a novel of Jane Austen]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Questions instead of tasks: records of LongBench (context, input, answers, dataset), or those of sqz facts
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// What is asked [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    tasks: Vec<Task>,
    /// Questions of each task
    #[arg(long, value_name = "N", default_value_t = 12)]
    count: usize,
    /// Tokens of the prefix; of a longer context of a record the middle is left out [default: what the model was trained on, 8192 at
    /// most]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Seed of the tasks
    #[arg(long, value_name = "N", default_value_t = 1)]
    task_seed: u64,
    /// An index that is there, for --questions of sqz facts
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// The prefix's state in a cache of these types, from sqz build [default: the prefix is computed]
    #[arg(long, value_name = "FILE", requires = "index")]
    state_file: Option<PathBuf>,
    /// Shares of the prefix keys [default: 0.1,0.2,0.33,0.5,1; none with --bytes]
    #[arg(long, value_delimiter = ',', value_parser = share, value_name = "LIST")]
    budgets: Vec<f32>,
    /// Budgets by the share of the KV bytes that is read, centroids and lists counted
    #[arg(long, value_delimiter = ',', value_parser = share, value_name = "LIST")]
    bytes: Vec<f32>,
    /// Also threshold mode at these nominal shares
    #[arg(long, value_delimiter = ',', value_parser = share, value_name = "LIST")]
    threshold: Vec<f32>,
    /// Also mass mode at these shares
    #[arg(long, value_delimiter = ',', value_parser = share, value_name = "LIST")]
    mass: Vec<f32>,
    /// Also one setting changed, at as many bytes: all, or any of spread=none|radius|diag, mode=threshold|mass, alpha=N, sinks=N,
    /// clusters=SHARE, seed=N, dense-layers=N, estimate, per-layer, no-floor, joined by +
    #[arg(long = "try", value_delimiter = ',', value_name = "LIST")]
    tries: Vec<String>,
    /// Also other rules, at as many bytes
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    baselines: Vec<Baseline>,
    /// Also llama.cpp's own kernels: what rounding alone does
    #[arg(long)]
    stock: bool,
    /// Questions of each task on which recall is measured, which takes as long as dense attention
    #[arg(long, value_name = "N", default_value_t = 2)]
    recall: usize,
    /// Spread bonus of budgets, thresholds and masses
    #[arg(long, value_delimiter = ',', value_enum, default_value = "diag")]
    spread: Vec<SpreadArg>,
    /// Add the estimate of dropped clusters
    #[arg(long)]
    estimate: bool,
    /// Query tokens of a batch that share a selection, at most, of budgets, thresholds and masses
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    tile: Vec<usize>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Feed answers token by token, as generation does, not in one batch
    #[arg(long)]
    stepwise: bool,
    /// The report, one HTML page. Beside it: .json, and .jsonl with the results that a run with the same settings goes on from
    #[arg(short, long, value_name = "REPORT.html")]
    output: Option<PathBuf>,
    /// Forget the results of earlier runs
    #[arg(long, requires = "output")]
    fresh: bool,
    /// Measure one of N parts of the questions alone, so that N processes do them all: the lines of their .jsonl files together are those
    /// of a run without --part
    #[arg(long, value_name = "I/N", value_parser = part, requires = "output")]
    part: Option<(usize, usize)>,
    /// Stop after about so many minutes; the same command goes on
    #[arg(long, value_name = "N", requires = "output")]
    minutes: Option<f64>,
    /// Tables of every task
    #[arg(long)]
    each: bool,
    /// One JSON object on stdout instead of tables
    #[arg(long)]
    json: bool,
}

/// A part, counted from 1, and the number of parts.
fn part(text: &str) -> Result<(usize, usize), String> {
    let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    numbers.filter(|(i, n)| (1..=*n).contains(i)).ok_or_else(|| "not a part such as 2/8".into())
}

impl EvalArgs {
    fn budgets(&self) -> Vec<f32> {
        match (self.budgets.is_empty(), self.bytes.is_empty()) {
            (true, true) => DEFAULT_BUDGETS.to_vec(),
            _ => self.budgets.clone(),
        }
    }
}

/// A question of a prefix with the keys of its results.
struct Keyed<'a> {
    question: &'a Question,
    /// Recall is measured on it.
    recall: bool,
    reference: String,
    outcomes: Vec<String>,
}

/// Options that all results depend on.
fn settings(args: &EvalArgs, usual: Build) -> String {
    format!("{} {} {usual:?} {:?} {}", args.stepwise, args.cluster.window, args.spread[0], args.estimate)
}

/// Keys of everything that is to be measured behind a prefix.
fn keyed<'a>(
    args: &EvalArgs,
    of: &str,
    questions: &'a [Question],
    variants: &[Variant],
    usual: Build,
) -> Result<Vec<Keyed<'a>>> {
    let settings = settings(args, usual);
    let variants = variants.iter().map(|v| {
        // What a label or a series is called does not matter.
        Ok(serde_json::to_string(&(v.how, v.amount))?)
    });
    let variants = variants.collect::<Result<Vec<String>>>()?;
    let mut asked: HashMap<&str, usize> = HashMap::new();
    let keyed = |question: &'a Question| -> Result<Keyed<'a>> {
        let n = asked.entry(&question.task).or_default();
        *n += 1;
        let recall = *n <= args.recall;
        let text = serde_json::to_string(question)?;
        let outcome = |v: &String| key(&[of, &text, &settings, &format!("{recall}"), v]);
        Ok(Keyed { question, recall, reference: key(&[of, &text]), outcomes: variants.iter().map(outcome).collect() })
    };
    questions.iter().map(keyed).collect()
}

/// What results behind a prefix depend on, beside questions and variants.
fn identity(args: &EvalArgs, model: &ModelFile, source: &Source) -> String {
    let index = source.given.as_ref().map(|(index, _)| index.display().to_string()).unwrap_or_default();
    let m = &args.model;
    key(&[
        &format!("{:?}", model.id.fingerprint),
        &format!("{:?}", source.tokens),
        &m.cache_types(),
        &format!("{:?} {:?} {:?}", m.rope, m.flash_attn, m.gpu),
        &index,
    ])
}

/// Measures what is missing behind one prefix; false if the time is up.
#[allow(clippy::too_many_arguments)]
fn measure(
    args: &EvalArgs,
    model: &Model,
    source: &Source,
    of: &str,
    keyed: &[Keyed<'_>],
    variants: &[Variant],
    store: &mut Store,
    end: Option<Instant>,
    usual: Build,
) -> Result<bool> {
    let is_missing =
        |k: &&Keyed| k.outcomes.iter().any(|o| store.outcome(o).is_none()) || store.reference(&k.reference).is_none();
    let mut all: Vec<&Keyed> = keyed.iter().collect();
    if let Some((own, n_part)) = args.part {
        // Those with recall take several times as long as the others: each part gets as many.
        all.sort_by_key(|k| !k.recall);
        all = all.into_iter().skip(own - 1).step_by(n_part).collect();
    }
    let missing: Vec<&Keyed> = all.into_iter().filter(is_missing).collect();
    if missing.is_empty() {
        return Ok(true);
    }
    let mut builds = vec![usual];
    for build in variants.iter().map(|v| v.build(usual)) {
        if !builds.contains(&build) {
            builds.push(build);
        }
    }
    let temporary = std::env::temp_dir().join(format!("sqz-eval-{}", std::process::id()));
    let folder = args.output.as_ref().map_or(temporary.clone(), |path| path.with_extension("work"));
    let prepared = source::prepare(args, model, source, &builds, &folder, of)?;
    let asked = missing.iter().map(|k| Asked::new(model, source, k.question)).collect::<Result<Vec<_>>>()?;
    // The same whatever is missing.
    let step = keyed.len().div_ceil(PROBES).max(1);
    let probe = keyed.iter().step_by(step).map(|k| Asked::new(model, source, k.question));
    let probe: Vec<i32> =
        probe.collect::<Result<Vec<_>>>()?.into_iter().flat_map(|a| [a.tokens, a.right].concat()).collect();
    let probe = &probe[..probe.len().min(PROBE_TOKENS)];
    let slack = asked.iter().map(Asked::n_token).max().unwrap_or(0).max(probe.len());
    let mut runner = Runner::open(args, model, &prepared, usual, slack)?;
    for variant in variants.iter().filter(|v| v.is_solved()) {
        let name = key(&[
            of,
            &format!("{probe:?}"),
            &settings(args, usual),
            &serde_json::to_string(&(variant.how, variant.amount))?,
        ]);
        let known = store.setting(&name);
        let value = runner.solve(variant, probe, known)?;
        if known.is_none() {
            store.add_setting(&name, value)?;
        }
    }
    let phase = Phase::new("eval", missing.len());
    let mut in_time = true;
    'questions: for (i, (k, asked)) in missing.iter().zip(&asked).enumerate() {
        let known = store.reference(&k.reference).cloned();
        let (reference, dense) = runner.reference(asked, known.as_ref())?;
        if known.is_none() {
            store.add_reference(&k.reference, reference.clone())?;
        }
        for (j, (variant, name)) in variants.iter().zip(&k.outcomes).enumerate() {
            if store.outcome(name).is_some() {
                continue;
            }
            let outcome = runner
                .outcome(variant, asked, &reference, &dense, k.recall)
                .with_context(|| format!("question {} with {}", k.question.id, variant.label))?;
            store.add_outcome(name, outcome)?;
            phase.part(i, (j + 1) as f32 / variants.len() as f32);
            // Every run gets on by one result at least.
            if end.is_some_and(|end| Instant::now() > end) {
                in_time = false;
                break 'questions;
            }
        }
        phase.step(i + 1);
    }
    phase.end();
    drop(runner);
    if source.given.is_none() && args.output.is_none() {
        prepared.remove();
        let _ = std::fs::remove_dir(&temporary);
    }
    Ok(in_time)
}

/// The command as it was given, for people.
fn command() -> String {
    let quoted = |arg: String| if arg.contains([' ', '\'', '"']) { format!("{arg:?}") } else { arg };
    let own = std::env::args().skip(1).map(quoted);
    ["sqz".to_string()].into_iter().chain(own).collect::<Vec<_>>().join(" ")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let end = args.minutes.map(|m| Instant::now() + Duration::from_secs_f64((60.0 * m).clamp(0.0, 1e9)));
    let variants = variant::variants(args)?;
    let usual = Build { sinks: args.cluster.sinks, clusters: args.cluster.clusters, seed: args.cluster.seed };
    let with = |ending: &str| args.output.as_ref().map(|path| path.with_extension(ending));
    if let Some(path) = &args.output {
        let is_own = path.extension().is_some_and(|e| e == "json" || e == "jsonl" || e == "work");
        ensure!(!is_own, "{} is a name for what goes beside the report: end it in .html", path.display());
    }
    let mut store = Store::open(with("jsonl").as_deref(), args.fresh)?;
    let file = ModelFile::read(&args.model.model)?;
    let model = Model::load_on(&args.model.model, &args.model.gpu)?;
    let sources = source::sources(args, &model)?;
    let n_asked = sources.iter().map(|s| s.questions.len()).sum::<usize>();
    let mut answered: Vec<Answered> = Vec::new();
    let mut in_time = true;
    for source in &sources {
        let of = identity(args, &file, source);
        let keyed = keyed(args, &of, &source.questions, &variants, usual)?;
        if in_time {
            in_time = measure(args, &model, source, &of, &keyed, &variants, &mut store, end, usual)?;
        }
        for k in &keyed {
            let outcomes: Option<Vec<_>> = k.outcomes.iter().map(|o| store.outcome(o).cloned()).collect();
            if let (Some(outcomes), Some(reference)) = (outcomes, store.reference(&k.reference)) {
                let (question, reference) = (k.question.clone(), reference.clone());
                answered.push(Answered { question, prefix: source.name.clone(), reference, outcomes });
            }
        }
        // The files of one of many prefixes are not needed again.
        if sources.len() > 1 && in_time {
            with("work").iter().for_each(|folder| drop(std::fs::remove_dir_all(folder)));
        }
    }
    let rows = summary::rows(&variants, &answered);
    let about = About {
        model: model.description(),
        cache: args.model.cache_types(),
        prefixes: sources.iter().map(|s| (s.name.clone(), s.tokens.len())).collect(),
        version: format!("sqz {}", env!("CARGO_PKG_VERSION")),
        command: command(),
        date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        answered: answered.len(),
        asked: n_asked,
    };
    let json = report::json(&about, &variants, &answered, &rows)?;
    if let Some(path) = &args.output {
        write(path, &report::html(&about, &variants, &answered, &rows)?)?;
        with("json").iter().try_for_each(|path| write(path, &json))?;
    }
    if args.json {
        print!("{json}");
        return Ok(());
    }
    println!(
        "{}, {} cache, {} prefix{} of {} tokens, {} of {n_asked} questions; reference: dense f32\n",
        about.model,
        about.cache,
        sources.len(),
        if sources.len() == 1 { "" } else { "es" },
        about.prefixes.iter().map(|p| p.1).sum::<usize>(),
        answered.len(),
    );
    print!("{}", summary::table(&rows));
    for task in summary::tasks(&answered).iter().filter(|_| args.each) {
        let of_task = |r: &summary::Row| {
            let all = r.tasks.iter().find(|t| t.task == *task).map(|t| t.numbers.clone()).unwrap_or_default();
            summary::Row { all, ..r.clone() }
        };
        println!("\n{task}\n\n{}", summary::table(&rows.iter().map(of_task).collect::<Vec<_>>()).trim_end());
    }
    if !in_time {
        eprintln!("the time is up: the same command goes on with the rest");
    }
    Ok(())
}
