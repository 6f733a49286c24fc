//! What a coarse level costs in recall, on the keys and queries of a real model: the share of the attention mass over the
//! clustered keys that lies in the kept ones, by the oracle's selection, with all fine centroids read (`flat`) and with those of
//! the best coarse clusters alone.
//! `cargo bench --workspace --bench recall -- -m MODEL -f TEXT [--tokens N] [--layers 0,4,8] [--shares 0.2,0.4,0.6]
//! [--budgets 0.1,0.2] [--queries 50]`

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use ggml_squeeze::attention::{oracle, Array, Binding, Call, Element, Mode, Problem, Rotation, Row, Selection, Spread};
use ggml_squeeze::backend::Capture;
use ggml_squeeze::build::{self, LayerCapture, Settings};
use ggml_squeeze::config::SPREAD_ALPHA;
use ggml_squeeze::index::sample::sample_parts;
use ggml_squeeze::index::{to_bytes, Index};
use sqz::build_cmd::read_text;
use sqz::llama::{start, Context, Model, ModelArgs};

/// Last tokens, of which some are the queries.
const WINDOW: usize = 400;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[arg(short, long)]
    file: PathBuf,
    /// Tokens of the text; a multiple of the ubatch size is best
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
    /// Layers [default: all]
    #[arg(long, value_delimiter = ',')]
    layers: Vec<u32>,
    /// Shares of the prefix whose coarse clusters are looked into
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.3,0.4,0.5,0.6")]
    shares: Vec<f32>,
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.2")]
    budgets: Vec<f32>,
    /// Query tokens, spread over the last 400
    #[arg(long, default_value_t = 50)]
    queries: usize,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// Sums over queries and heads.
#[derive(Clone, Copy, Default)]
struct Sums {
    recall: f64,
    /// Fine and coarse centroids read, per fine centroid.
    read: f64,
    n: f64,
}

fn array(data: *const u8, ne: [usize; 3], element: usize, order: [usize; 3]) -> Array {
    let mut nb = [element; 4];
    // `order`: dimensions from the innermost on
    let mut step = element;
    for d in order {
        nb[d] = step;
        step *= ne[d];
    }
    nb[3] = step;
    Array { data: data.cast_mut(), ne: [ne[0], ne[1], ne[2], 1], nb }
}

/// Attention mass of each clustered key, mean over the group.
fn mass(c: &LayerCapture, row: usize, head_kv: usize, keys: std::ops::Range<usize>) -> Vec<f64> {
    let (dk, group) = (c.head_dim_k as usize, c.n_group as usize);
    let mut mass = vec![0.0; keys.len()];
    for g in 0..group {
        let q = &c.q[(row * c.n_head_kv as usize * group + head_kv * group + g) * dk..][..dk];
        let score = |t: usize| {
            let k = &c.k[t * c.row_k() + head_kv * dk..][..dk];
            f64::from(c.scale) * q.iter().zip(k).map(|(a, b)| f64::from(*a) * b.to_f64()).sum::<f64>()
        };
        let scores: Vec<f64> = keys.clone().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        mass.iter_mut().zip(&scores).for_each(|(m, s)| *m += (s - max).exp() / (sum * group as f64));
    }
    mass
}

/// One layer: sums for each budget and each share, the last share being all (`flat`).
fn layer(c: &LayerCapture, args: &Args, settings: &Settings) -> Result<Vec<Vec<Sums>>> {
    let n_prefix = c.k.len() / c.row_k();
    let made = build::index_layer(c, settings, &|_| ())?;
    let view = made.parts.view();
    let mut parts = sample_parts(1, n_prefix, 1, c.n_head_kv as usize, c.head_dim_k as usize, c.head_dim_v as usize, 1);
    (parts.meta.n_sink, parts.meta.n_window) = (settings.n_sink, settings.n_window);
    parts.meta.n_layer = c.layer + 2;
    parts.meta.dense_layers.clear();
    parts.sketch.layer = c.layer;
    parts.layers = vec![made.parts.clone()];
    let index = Arc::new(Index::from_bytes(to_bytes(&parts)?)?);
    let (n_head_kv, dk, dv) = (c.n_head_kv as usize, c.head_dim_k as usize, c.head_dim_v as usize);
    let n_head = n_head_kv * c.n_group as usize;
    let (n_sink, n_tail) = (settings.n_sink, n_prefix as u32 - settings.n_window);
    let binding = Binding {
        index,
        cells: (0..n_prefix as u32).collect(),
        always: (0..n_sink).chain(n_tail..n_prefix as u32).collect(),
    };
    // the oracle's selection writes nothing
    let nothing = 0f32;
    let call = |mode, coarse_share| Call {
        problem: Problem {
            q: array(c.q.as_ptr().cast(), [dk, WINDOW, n_head], 4, [0, 2, 1]),
            k: array(c.k.as_ptr().cast(), [dk, n_prefix, n_head_kv], 2, [0, 2, 1]),
            v: array(c.v.as_ptr().cast(), [dv, n_prefix, n_head_kv], 2, [0, 2, 1]),
            k_type: Element::F16,
            v_type: Element::F16,
            mask: None,
            sinks: None,
            dst: array((&raw const nothing).cast(), [dv, n_head, WINDOW], 4, [0, 1, 2]),
            scale: c.scale,
            max_bias: 0.0,
            softcap: 0.0,
        },
        layer: c.layer,
        rows: vec![Row::Sparse(0); WINDOW].into(),
        bindings: vec![binding.clone()].into(),
        selection: Selection { mode, spread: Spread::Diag, alpha: SPREAD_ALPHA, estimate: false, coarse_share },
        rotation: Rotation::default(),
        tiles: Vec::new().into(),
    };
    let modes: Vec<Vec<Call>> = args
        .budgets
        .iter()
        .map(|b| args.shares.iter().chain(&[1.0]).map(|share| call(Mode::Budget(*b), *share)).collect())
        .collect();
    let pairs: Vec<(usize, usize)> = (0..args.queries)
        .map(|i| (i + 1) * WINDOW / args.queries - 1)
        .flat_map(|row| (0..n_head_kv).map(move |h| (row, h)))
        .collect();
    let one = |(row, h): (usize, usize)| -> Vec<Vec<Sums>> {
        let mass = mass(c, row, h, n_sink as usize..n_tail as usize);
        let of = |call: &Call| {
            let opened = oracle::opened(call, row, h);
            let kept = oracle::selection_among(call, row, h, opened.as_deref());
            let offsets = view.head_offsets(h);
            let members = kept.iter().flat_map(|i| offsets[*i as usize]..offsets[*i as usize + 1]);
            let recall = members.map(|j| mass[view.member(h, j as usize) as usize - n_sink as usize]).sum();
            let fine = opened.map_or(f64::from(view.shape.n_cluster), |opened| {
                let bounds = view.head_coarse_offsets(h);
                let of = |j: &u32| bounds[*j as usize + 1] - bounds[*j as usize];
                f64::from(opened.iter().map(of).sum::<u32>() + view.shape.n_coarse)
            });
            Sums { recall, read: fine / f64::from(view.shape.n_cluster), n: 1.0 }
        };
        modes.iter().map(|calls| calls.iter().map(of).collect()).collect()
    };
    let next = AtomicUsize::new(0);
    let work = || {
        let mut sums = vec![vec![Sums::default(); args.shares.len() + 1]; args.budgets.len()];
        while let Some(&pair) = pairs.get(next.fetch_add(1, Ordering::Relaxed)) {
            add(&mut sums, &one(pair));
        }
        sums
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..settings.n_threads).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("the oracle does not panic"))
            .reduce(|mut a, b| {
                add(&mut a, &b);
                a
            })
            .context("no thread")
    })
}

fn add(to: &mut [Vec<Sums>], more: &[Vec<Sums>]) {
    for (a, b) in to.iter_mut().flatten().zip(more.iter().flatten()) {
        *a = Sums { recall: a.recall + b.recall, read: a.read + b.read, n: a.n + b.n };
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    start(false)?;
    let model = Model::load(&args.model.model)?;
    let mut tokens = model.tokenise(&read_text(&args.file)?, true)?;
    ensure!(tokens.len() >= args.tokens, "the text has {} tokens, {} are asked for", tokens.len(), args.tokens);
    tokens.truncate(args.tokens);
    let mut context = Context::new(&model, &args.model, tokens.len(), Some(Capture::new(tokens.len(), WINDOW)))?;
    let total = tokens.len();
    context.prefill(&tokens, |n| eprintln!("prefill {n} of {total}"))?;
    let capture = context.capture().context("the context was made with a capture")?;
    let mut settings = Settings { n_window: WINDOW as u32, n_threads: args.model.n_threads(), ..Settings::default() };
    // as many as a prefix of 16384 keys and more gets by itself
    settings.n_coarse = Some(((total - WINDOW - settings.n_sink as usize) as f64).sqrt().round() as u32);
    let layers = capture.finish()?.0;
    let mut sums = vec![vec![Sums::default(); args.shares.len() + 1]; args.budgets.len()];
    println!("{total} tokens, {} coarse clusters, {} queries", settings.n_coarse.unwrap_or(0), args.queries);
    for number in layers.into_iter().filter(|l| args.layers.is_empty() || args.layers.contains(l)) {
        let (c, _) = capture.read(number).map_err(anyhow::Error::msg)?;
        let made = layer(&c, &args, &settings)?;
        let line: Vec<String> = made.iter().flatten().map(|s| format!("{:.1}", 100.0 * s.recall / s.n)).collect();
        println!("layer {number}: {}", line.join(" "));
        add(&mut sums, &made);
    }
    println!("| budget | looked into | centroids read | recall | against flat |");
    println!("|---|---|---|---|---|");
    for (budget, row) in args.budgets.iter().zip(&sums) {
        let flat = row[row.len() - 1];
        for (share, s) in args.shares.iter().map(|s| format!("{s}")).chain(["flat".to_string()]).zip(row) {
            let recall = 100.0 * s.recall / s.n;
            let read = 100.0 * s.read / s.n;
            println!(
                "| {budget} | {share} | {read:.1} % | {recall:.2} | {:+.2} |",
                recall - 100.0 * flat.recall / flat.n
            );
        }
    }
    Ok(())
}
