//! The index's clusters against plain flat K-means (unit keys, random keys as the first centroids, 8 iterations), on the keys and queries
//! of a real model, under the same two rules: one threshold for all layers and heads with a floor of 5 % (`threshold`), and the best
//! clusters of each KV head (`budget`); no spread bonus. Recall: attention mass over the prefix without its window that lies on kept keys,
//! sinks among both; mean over answer tokens, query heads and layers. The threshold is the one that keeps the budget on these tokens.
//! `cargo bench --workspace --bench clusters -- -m MODEL --text TEXT --questions FILE [--count 5] [--layers 0,2,4] [--seeds 3]`
//! with what `sqz facts` writes. The questions and their dense greedy answers follow the text one after the other.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use ggml_squeeze::backend::Capture;
use ggml_squeeze::build::{self, LayerCapture, Settings};
use ggml_squeeze::random::split_mix;
use half::f16;
use sqz::build_cmd::read_text;
use sqz::facts::Question;
use sqz::llama::{start, Context, Model, ModelArgs, Outputs};

/// Least share of a KV head's keys under a threshold.
const FLOOR: f64 = 0.05;
const ITERATIONS: usize = 8;
const BUDGETS: [f64; 2] = [0.1, 0.2];

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[arg(long)]
    text: PathBuf,
    #[arg(long)]
    questions: PathBuf,
    /// Questions that have an answer
    #[arg(long, default_value_t = 5)]
    count: usize,
    /// Tokens of each answer
    #[arg(long, default_value_t = 17)]
    answer: usize,
    /// Layers [default: all]
    #[arg(long, value_delimiter = ',')]
    layers: Vec<u32>,
    /// Plain K-means runs
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// Clusters of one KV head: of each its centroid, the mean of raw keys, and its keys, counted from the first clustered one.
struct Clusters {
    centroids: Vec<f32>,
    members: Vec<Vec<u32>>,
}

/// A cluster as one token and KV head sees it.
#[derive(Clone, Copy)]
struct Seen {
    score: f64,
    keys: u32,
    mass: f64,
}

/// One token and KV head: its clusters, best first, with what the sinks hold.
struct Choice {
    clusters: Vec<Seen>,
    sink_mass: f64,
}

impl Choice {
    /// Kept keys and mass of the clusters that `keep` takes, given each one's score and the keys before it.
    fn kept(&self, keep: impl Fn(f64, u32) -> bool) -> (u32, f64) {
        let mut sum = (0, self.sink_mass);
        for c in &self.clusters {
            if !keep(c.score, sum.0) {
                break;
            }
            sum = (sum.0 + c.keys, sum.1 + c.mass);
        }
        sum
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s += a * b);
    }
    sums.iter().sum()
}

/// One KV head's raw keys behind the sinks, `[n][d]`.
fn keys(c: &LayerCapture, head: usize, first: usize, n: usize) -> Vec<f32> {
    let d = c.head_dim_k as usize;
    (first..first + n).flat_map(|t| &c.k[t * c.row_k() + head * d..][..d]).map(|x| x.to_f32()).collect()
}

/// The index's own.
fn of_index(c: &LayerCapture, settings: &Settings) -> Result<Vec<Clusters>> {
    let made = build::index_layer(c, settings, &|_| ())?;
    let view = made.parts.view();
    let (n, d) = (view.shape.n_cluster as usize, c.head_dim_k as usize);
    let one = |h: usize| {
        let offsets = view.head_offsets(h);
        let members = offsets
            .windows(2)
            .map(|w| (w[0]..w[1]).map(|j| view.member(h, j as usize) - settings.n_sink).collect())
            .collect();
        Clusters { centroids: view.centroids[h * n * d..][..n * d].iter().map(|x: &f16| x.to_f32()).collect(), members }
    };
    Ok((0..c.n_head_kv as usize).map(one).collect())
}

/// Plain K-means of one KV head.
fn flat(keys: &[f32], d: usize, n_cluster: usize, mut seed: u64) -> Clusters {
    let unit: Vec<f32> = keys
        .chunks_exact(d)
        .flat_map(|k| {
            let norm = dot(k, k).sqrt().max(1e-30);
            k.iter().map(move |x| x / norm)
        })
        .collect();
    let n = keys.len() / d;
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..n_cluster {
        order.swap(i, i + (split_mix(&mut seed) % (n - i) as u64) as usize);
    }
    let mut centres: Vec<f32> = order[..n_cluster].iter().flat_map(|i| &unit[i * d..][..d]).copied().collect();
    let mut label = vec![0usize; n];
    for _ in 0..ITERATIONS {
        let halves: Vec<f32> = centres.chunks_exact(d).map(|c| dot(c, c) / 2.0).collect();
        for (key, label) in unit.chunks_exact(d).zip(&mut label) {
            let near = |i: usize| dot(key, &centres[i * d..][..d]) - halves[i];
            *label = (0..n_cluster).map(|i| (i, near(i))).max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |best| best.0);
        }
        means(&unit, d, &label, &mut centres);
    }
    means(keys, d, &label, &mut centres);
    let mut members = vec![Vec::new(); n_cluster];
    label.iter().enumerate().for_each(|(i, l)| members[*l].push(i as u32));
    Clusters { centroids: centres, members }
}

/// Each cluster's mean row; one without rows stays as it was.
fn means(rows: &[f32], d: usize, label: &[usize], centres: &mut [f32]) {
    let mut sums = vec![0f64; centres.len()];
    let mut counts = vec![0u32; centres.len() / d];
    for (row, l) in rows.chunks_exact(d).zip(label) {
        counts[*l] += 1;
        sums[l * d..][..d].iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
    }
    for (i, count) in counts.iter().enumerate().filter(|(_, n)| **n > 0) {
        let of = centres[i * d..][..d].iter_mut().zip(&sums[i * d..][..d]);
        of.for_each(|(c, s)| *c = (s / f64::from(*count)) as f32);
    }
}

/// Scores of rows for one query.
fn scores(q: &[f32], rows: &[f32], scale: f32) -> Vec<f64> {
    rows.chunks_exact(q.len()).map(|k| f64::from(scale * dot(q, k))).collect()
}

/// What one token's query heads see in each of several clusterings of their KV head.
fn choices(c: &LayerCapture, row: usize, head: usize, sinks: &[f32], keys: &[f32], of: &[&Clusters]) -> Vec<Choice> {
    let (d, group) = (c.head_dim_k as usize, c.n_group as usize);
    let n_head = c.n_head_kv as usize * group;
    let mut seen: Vec<Vec<Seen>> = of
        .iter()
        .map(|o| o.members.iter().map(|m| Seen { score: 0.0, keys: m.len() as u32, mass: 0.0 }).collect())
        .collect();
    let mut sink_mass = 0.0;
    for g in 0..group {
        let q = &c.q[(row * n_head + head * group + g) * d..][..d];
        let (sink, mut key) = (scores(q, sinks, c.scale), scores(q, keys, c.scale));
        let max = sink.iter().chain(&key).copied().fold(f64::NEG_INFINITY, f64::max);
        let sink: f64 = sink.iter().map(|s| (s - max).exp()).sum();
        key.iter_mut().for_each(|s| *s = (*s - max).exp());
        let whole = (sink + key.iter().sum::<f64>()) * group as f64;
        sink_mass += sink / whole;
        for (seen, o) in seen.iter_mut().zip(of) {
            let p: Vec<f64> = scores(q, &o.centroids, c.scale).into_iter().map(|s| (s - max).exp()).collect();
            let z: f64 = sink + p.iter().zip(&o.members).map(|(p, m)| p * m.len() as f64).sum::<f64>();
            for ((seen, p), members) in seen.iter_mut().zip(p).zip(&o.members) {
                seen.score += p / (z * group as f64);
                seen.mass += members.iter().map(|m| key[*m as usize]).sum::<f64>() / whole;
            }
        }
    }
    let sorted = |mut clusters: Vec<Seen>| {
        clusters.retain(|s| s.keys > 0);
        clusters.sort_by(|a, b| b.score.total_cmp(&a.score));
        Choice { clusters, sink_mass }
    };
    seen.into_iter().map(sorted).collect()
}

/// One layer: for each clustering (the index's first) what all answer tokens see.
fn layer(c: &LayerCapture, args: &Args, settings: &Settings, rows: &[usize]) -> Result<Vec<Vec<Choice>>> {
    let (d, n_sink) = (c.head_dim_k as usize, settings.n_sink as usize);
    let n = c.k.len() / c.row_k() - n_sink - settings.n_window as usize;
    let heads: Vec<(Vec<f32>, Vec<f32>)> =
        (0..c.n_head_kv as usize).map(|h| (keys(c, h, 0, n_sink), keys(c, h, n_sink, n))).collect();
    let index = of_index(c, settings)?;
    let n_cluster = index[0].members.len();
    let jobs: Vec<(usize, u64)> = (0..args.seeds).flat_map(|s| (0..heads.len()).map(move |h| (h, s))).collect();
    let plain = parallel(settings.n_threads, &jobs, |(h, s)| {
        flat(&heads[*h].1, d, n_cluster, (u64::from(c.layer) << 32) + (*h as u64) * 1000 + s)
    });
    let pairs: Vec<(usize, usize)> = rows.iter().flat_map(|r| (0..heads.len()).map(move |h| (*r, h))).collect();
    let seen = parallel(settings.n_threads, &pairs, |&(row, h)| {
        let of: Vec<&Clusters> =
            std::iter::once(&index[h]).chain((0..args.seeds as usize).map(|s| &plain[s * heads.len() + h])).collect();
        choices(c, row, h, &heads[h].0, &heads[h].1, &of)
    });
    let mut out: Vec<Vec<Choice>> = (0..=args.seeds).map(|_| Vec::new()).collect();
    seen.into_iter().for_each(|all| out.iter_mut().zip(all).for_each(|(to, one)| to.push(one)));
    Ok(out)
}

/// `f` of each item, in their order.
fn parallel<T: Sync, R: Send>(n_threads: usize, items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let made = Mutex::new(Vec::with_capacity(items.len()));
    let work = || {
        while let Some((i, item)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| items.get(i).map(|x| (i, x)))
        {
            let one = f(item);
            made.lock().expect("no thread panics with it").push((i, one));
        }
    };
    std::thread::scope(|scope| (0..n_threads).for_each(|_| drop(scope.spawn(work))));
    let mut made = made.into_inner().expect("no thread panics with it");
    made.sort_by_key(|m| m.0);
    made.into_iter().map(|m| m.1).collect()
}

/// Mean kept share and recall, sinks among the keys, of choices among `n` clustered keys and `n_sink` sinks.
fn mean(all: &[Choice], n: usize, n_sink: usize, keep: impl Fn(f64, u32) -> bool) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for choice in all {
        let (keys, mass) = choice.kept(&keep);
        sums = (sums.0 + (keys as usize + n_sink) as f64 / (n + n_sink) as f64, sums.1 + mass);
    }
    (sums.0 / all.len() as f64, sums.1 / all.len() as f64)
}

/// The recall of the threshold that keeps `budget`, with the floor.
fn by_threshold(all: &[Choice], n: usize, n_sink: usize, budget: f64) -> (f64, f64) {
    let floor = (FLOOR * n as f64) as u32;
    let with = |log: f64| mean(all, n, n_sink, |score, before| score >= log.exp() || before < floor);
    let (mut low, mut high) = (-40.0, 0.0);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        *(if with(middle).0 > budget { &mut low } else { &mut high }) = middle;
    }
    with(high)
}

fn main() -> Result<()> {
    let args = Args::parse();
    start(false)?;
    let model = Model::load(&args.model.model)?;
    let tokens = model.tokenise(&read_text(&args.text)?, true)?;
    let n_prefix = tokens.len();
    let text = std::fs::read_to_string(&args.questions)?;
    let questions = text.lines().map(serde_json::from_str).collect::<Result<Vec<Question>, _>>()?;
    let prompts: Vec<Vec<i32>> = questions
        .iter()
        .filter(|q| q.answer.is_some())
        .take(args.count)
        .map(|q| model.tokenise(&q.prompt, false))
        .collect::<Result<_>>()?;
    ensure!(!prompts.is_empty(), "{} has no question with an answer", args.questions.display());
    let behind = prompts.iter().map(|p| p.len() + args.answer).sum::<usize>();
    let total = n_prefix + behind;
    let mut context = Context::new(&model, &args.model, total, Some(Capture::new(total, behind + 100)))?;
    context.prefill(&tokens, |n| eprintln!("prefill {n} of {n_prefix}"))?;
    let mut positions = Vec::new();
    for prompt in &prompts {
        context.decode(prompt, Outputs::Last)?;
        positions.extend(context.n_past() - 1..context.n_past() - 1 + args.answer);
        let mut logits = context.logits(prompt.len() - 1)?.to_vec();
        for _ in 0..args.answer {
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0) as i32;
            context.decode(&[best], Outputs::Last)?;
            logits = context.logits(0)?.to_vec();
        }
    }
    let capture = context.capture().context("the context was made with a capture")?;
    let settings = Settings { n_window: behind as u32 + 100, n_threads: args.model.n_threads(), ..Settings::default() };
    let rows: Vec<usize> = positions.iter().map(|p| p + 100 - n_prefix).collect();
    let (n_sink, n) = (settings.n_sink as usize, n_prefix - 100 - settings.n_sink as usize);
    let mut all: Vec<Vec<Choice>> = (0..=args.seeds).map(|_| Vec::new()).collect();
    let mut n_layer = 0;
    for number in capture.finish()?.0.into_iter().filter(|l| args.layers.is_empty() || args.layers.contains(l)) {
        let (c, _) = capture.read(number).map_err(anyhow::Error::msg)?;
        let made = layer(&c, &args, &settings, &rows)?;
        all.iter_mut().zip(made).for_each(|(to, more)| to.extend(more));
        n_layer += 1;
        eprintln!("layer {number}");
    }
    println!("{n_prefix} tokens, {n} clustered, {n_layer} layers, {} answer tokens", rows.len());
    println!("| clusters | threshold 0.1 | budget 0.1 | threshold 0.2 | budget 0.2 |");
    println!("|---|---:|---:|---:|---:|");
    for (i, choices) in all.iter().enumerate() {
        let cells = BUDGETS.map(|budget| {
            let keys = (budget * (n + n_sink) as f64) as u32 - n_sink as u32;
            let best = mean(choices, n, n_sink, |_, before| before < keys);
            [by_threshold(choices, n, n_sink, budget), best]
        });
        let cells: Vec<String> =
            cells.iter().flatten().map(|c| format!("{:.2} (kept {:.4})", 100.0 * c.1, c.0)).collect();
        let name = if i == 0 { "index".to_string() } else { format!("flat, seed {}", i - 1) };
        println!("| {name} | {} |", cells.join(" | "));
    }
    Ok(())
}
