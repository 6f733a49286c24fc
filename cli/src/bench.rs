//! `sqz bench`: tokens per second behind a prefix, dense and sparse, from one process on one state, with the modes taking
//! turns so that a slow minute of the machine hits all of them. The ceiling is the model with no attention at all.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::backend;
use ggml_squeeze::config::{ModeSetting, DEFAULT_BUDGET, DEFAULT_TILE};
use serde::Serialize;

use crate::build_cmd::{self, BuildArgs, ClusterArgs, OutputArgs};
use crate::llama::{Model, ModelArgs, Outputs};
use crate::metrics;
use crate::progress::Phase;
use crate::session::{share, Attention, Session, SpreadArg};
use crate::synthetic;
use crate::tokens::Chat;

/// Tokens that come first and are not in the rate: with them a mode that takes its turn finds its cells, brings its index to the GPU
/// and (generating) has its graph captured, which a conversation pays once. Before a prompt they are taken back.
const WARM_UP: usize = 4;
/// Tokens of a synthetic prefix.
const DEFAULT_DEPTH: usize = 4096;

/// Options of `sqz bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A text to index first (into a temporary file); with --synthetic-index the prefix
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["index", "state_file"])]
    file: Option<PathBuf>,
    /// The index
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// The prefix's state in a cache of these types, from sqz build [default: the prefix is computed]
    #[arg(long, value_name = "FILE", requires = "index")]
    state_file: Option<PathBuf>,
    /// Speed alone, on any model, without clustering: an index whose clusters are made up, of a prefix of --depth tokens by chance
    /// or from -f. Every line of the result says so
    #[arg(long, conflicts_with_all = ["index", "state_file"])]
    synthetic_index: bool,
    /// Tokens of that prefix [default: the text's, or 4096]
    #[arg(short, long, value_name = "N", requires = "synthetic_index")]
    depth: Option<usize>,
    /// Where that index is written, and left [default: a temporary file]. Only with GGML_SQUEEZE_SYNTHETIC=1 the plugin takes it
    #[arg(long, value_name = "FILE", requires = "synthetic_index")]
    keep_index: Option<PathBuf>,
    /// Shares of the prefix keys
    #[arg(long, value_delimiter = ',', value_parser = share, default_values_t = [0.1, DEFAULT_BUDGET])]
    budgets: Vec<f32>,
    /// Spread bonus
    #[arg(long, value_enum, default_value = "diag")]
    spread: SpreadArg,
    /// Query tokens of a prefill that share a selection, at most
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [DEFAULT_TILE])]
    tile: Vec<usize>,
    /// Tokens to generate, after 4 that do not count; 0: no such test
    #[arg(short, long, value_name = "N", default_value_t = 32)]
    n_gen: usize,
    /// Tokens of the question; 0: no such test
    #[arg(short = 'p', long, value_name = "N", default_value_t = 128)]
    n_prompt: usize,
    /// Repetitions, after one that does not count
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// JSON on stdout instead of a table
    #[arg(long)]
    json: bool,
}

/// What is timed, behind the prefix.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    Prompt(usize),
    Generate(usize),
}

impl Test {
    fn n(self) -> usize {
        match self {
            Test::Prompt(n) | Test::Generate(n) => n,
        }
    }
    /// As llama-bench names it.
    fn name(self, depth: usize) -> String {
        match self {
            Test::Prompt(n) => format!("pp{n} @ d{depth}"),
            Test::Generate(n) => format!("tg{n} @ d{depth}"),
        }
    }
}

/// One row of the table.
#[derive(Clone, Debug, Serialize)]
struct Row {
    model: String,
    /// The clusters were made up: speed is all that this row says.
    synthetic_index: bool,
    test: String,
    mode: String,
    tokens_per_second: f64,
    deviation: f64,
    /// Against the dense row of the same test.
    speed_up: f64,
    kept: Option<f64>,
    repetitions: Vec<f64>,
    /// Milliseconds of each generated token of the last repetition, after the four of the warm-up; none for a prompt.
    warm_up_ms: Vec<f64>,
    token_ms: Vec<f64>,
}

/// Seconds of each decode call of a test with the present attention: those of the warm-up, and those that count.
fn time(session: &mut Session<'_>, test: Test) -> Result<(Vec<f64>, Vec<f64>)> {
    session.context.truncate(session.n_prefix)?;
    // Real text, from a third of the prefix on: random tokens would ask for keys that no reader asks for.
    let start = session.tokens.len() / 3;
    let (n_warm_up, n_part) = match test {
        Test::Prompt(_) => (0, session.context.n_batch()),
        Test::Generate(_) => (WARM_UP, 1),
    };
    let text: Vec<i32> = session.tokens.iter().copied().cycle().skip(start).take(n_warm_up + test.n()).collect();
    if n_warm_up == 0 {
        // A question too finds the cells of the one before it.
        for token in text.chunks(1).take(WARM_UP) {
            session.context.decode(token, Outputs::Last)?;
        }
        session.context.truncate(session.n_prefix)?;
    }
    let mut seconds = Vec::new();
    for part in text.chunks(n_part) {
        let begin = Instant::now();
        session.context.decode(part, Outputs::Last)?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    let counted = seconds.split_off(n_warm_up);
    Ok((seconds, counted))
}

fn measure(session: &mut Session<'_>, args: &BenchArgs, model: &str) -> Result<Vec<Row>> {
    let mut modes = vec![("dense".to_string(), Attention::Stock)];
    for (b, tile) in args.budgets.iter().flat_map(|b| args.tile.iter().map(move |tile| (*b, *tile))) {
        let of_tile = if tile == 1 { String::new() } else { format!(" tile {tile}") };
        let attention = Attention::Sparse(ModeSetting::Budget(b), args.spread.value(), tile);
        modes.push((format!("budget {b}{of_tile}"), attention));
    }
    modes.push(("ceiling".to_string(), Attention::Free));
    let tests: Vec<Test> =
        [Test::Prompt(args.n_prompt), Test::Generate(args.n_gen)].into_iter().filter(|t| t.n() > 0).collect();
    ensure!(!tests.is_empty(), "nothing to measure: give -p or -n above 0");
    let mut speed = vec![vec![Vec::new(); modes.len()]; tests.len()];
    let mut kept = vec![vec![None; modes.len()]; tests.len()];
    let mut last = vec![vec![(Vec::new(), Vec::new()); modes.len()]; tests.len()];
    let phase = Phase::new("bench", args.repetitions as usize + 1);
    for repetition in 0..=args.repetitions {
        for (t, test) in tests.iter().enumerate() {
            for (m, (_, attention)) in modes.iter().enumerate() {
                attention.apply(false, false);
                let seconds = time(session, *test)?;
                attention.check()?;
                if repetition > 0 {
                    speed[t][m].push(test.n() as f64 / seconds.1.iter().sum::<f64>());
                }
                last[t][m] = seconds;
                if matches!(attention, Attention::Sparse(..)) {
                    kept[t][m] = Some(backend::stats().kept_share);
                }
            }
        }
        phase.step(repetition as usize + 1);
    }
    phase.end();
    let ms = |seconds: &[f64]| seconds.iter().map(|s| (s * 1e6).round() / 1e3).collect();
    let generates = |t: usize| matches!(tests[t], Test::Generate(_));
    let row = |t: usize, m: usize| Row {
        model: model.to_string(),
        synthetic_index: args.synthetic_index,
        test: tests[t].name(session.n_prefix),
        mode: modes[m].0.clone(),
        tokens_per_second: metrics::mean(&speed[t][m]),
        deviation: metrics::deviation(&speed[t][m]),
        speed_up: metrics::mean(&speed[t][m]) / metrics::mean(&speed[t][0]),
        kept: kept[t][m],
        repetitions: speed[t][m].clone(),
        warm_up_ms: ms(&last[t][m].0),
        token_ms: if generates(t) { ms(&last[t][m].1) } else { Vec::new() },
    };
    Ok((0..tests.len()).flat_map(|t| (0..modes.len()).map(move |m| (t, m))).map(|(t, m)| row(t, m)).collect())
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![["model", "test", "mode", "t/s", "speed-up", "kept"].map(str::to_string)];
    lines.extend(rows.iter().map(|r| {
        [
            r.model.clone(),
            r.test.clone(),
            r.mode.clone(),
            format!("{:.2} +- {:.2}", r.tokens_per_second, r.deviation),
            format!("{:.2}x", r.speed_up),
            r.kept.map_or("-".to_string(), |k| format!("{k:.3}")),
        ]
    }));
    let width: Vec<usize> = (0..6).map(|c| lines.iter().map(|l| l[c].len()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        for (c, cell) in line.iter().enumerate() {
            // Text to the left, numbers to the right, as llama-bench.
            out += &if c < 3 { format!("| {cell:<0$} ", width[c]) } else { format!("| {cell:>0$} ", width[c]) };
        }
        out += "|\n";
        if i == 0 {
            for (c, w) in width.iter().enumerate() {
                out += &format!("|{}{}", "-".repeat(w + 1), if c < 3 { '-' } else { ':' });
            }
            out += "|\n";
        }
    }
    out
}

/// Indexes a text into a temporary folder: index and state.
fn prepare(args: &BenchArgs, file: &Path, folder: &Path) -> Result<(PathBuf, Option<PathBuf>)> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let (output, state) = (folder.join("bench.sqz.gguf"), folder.join("bench.state"));
    build_cmd::make(&BuildArgs {
        model: ModelArgs { ctx_size: None, ..args.model.clone() },
        file: file.to_path_buf(),
        files: OutputArgs { output: output.clone(), state_file: Some(state.clone()), slot_file: None },
        chat: Chat::Raw,
        cluster: args.cluster.clone(),
    })?;
    Ok((output, Some(state)))
}

/// A prefix and its synthetic index.
fn synthetic_session<'m>(args: &BenchArgs, model: &'m Model, slack: usize, folder: &Path) -> Result<Session<'m>> {
    let settings = args.cluster.settings(args.model.n_threads())?;
    let tokens = match &args.file {
        Some(file) => synthetic::text(model, &build_cmd::read_text(file)?, args.depth, settings.n_threads)?,
        None => synthetic::by_chance(model, args.depth.unwrap_or(DEFAULT_DEPTH), settings.seed),
    };
    let prefix = synthetic::Prefix { tokens, attention_free: args.file.is_none() };
    let file = args.keep_index.clone().unwrap_or_else(|| folder.join("bench.sqz.gguf"));
    if args.keep_index.is_none() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    }
    synthetic::open(model, &args.model, prefix, &settings, slack, &file).context(if args.file.is_some() {
        "no synthetic index of this text"
    } else {
        "no synthetic index of tokens by chance: give a text with -f"
    })
}

/// The command.
pub fn run(args: &BenchArgs) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("sqz-bench-{}", std::process::id()));
    let measured = (|| {
        let made = match (&args.file, &args.index, &args.state_file) {
            _ if args.synthetic_index => None,
            (Some(file), None, None) => Some(prepare(args, file, &folder)?),
            (None, Some(index), state) => Some((index.clone(), state.clone())),
            _ => bail!("what is measured behind? Give a text with -f, an index with --index, or --synthetic-index"),
        };
        let model = Model::load_on(&args.model.model, &args.model.gpu)?;
        let slack = args.n_prompt.max(args.n_gen + WARM_UP) + 16;
        let mut name = model.description();
        if args.model.cache_types() != "f16" {
            name += &format!(", {} cache", args.model.cache_types());
        }
        let mut session = match made {
            Some((index, state)) => Session::open(&model, &args.model, &index, state.as_deref(), slack)?,
            None => {
                name += ", synthetic index";
                synthetic_session(args, &model, slack, &folder)?
            }
        };
        measure(&mut session, args, &name)
    })();
    if folder.exists() {
        std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    let rows = measured?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", table(&rows));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_names_everything() {
        let row = |mode: &str, speed, kept| Row {
            model: "llama 135M Q5".into(),
            synthetic_index: false,
            test: Test::Generate(32).name(6500),
            mode: mode.into(),
            tokens_per_second: speed,
            deviation: 0.5,
            speed_up: speed / 20.0,
            kept,
            repetitions: vec![speed],
            warm_up_ms: Vec::new(),
            token_ms: Vec::new(),
        };
        let text = table(&[row("dense", 20.0, None), row("budget 0.2", 110.0, Some(0.2))]);
        assert!(text.contains("tg32 @ d6500") && text.contains("110.00 +- 0.50") && text.contains("5.50x"), "{text}");
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(widths.len() == 4 && widths.iter().all(|w| *w == widths[0]), "{text}");
    }
}
