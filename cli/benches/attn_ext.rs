//! What the checks of the attention op for a host's own graph cost, and what they must allow.
//!
//! `cargo bench --workspace --bench attn_ext -- [--prefix 8192] [--budgets 0.2,0.1] [-r 40] [-t 2]`: microseconds per node of one
//! query (8 KV heads of 128, 4 query heads each, F16), for several rounds of the check.
//!
//! `... --bench attn_ext -- -m MODEL -f TEXT [--tokens N]`: on the keys of a real model, what is refused wrongly and rightly in each
//! type of cache, and how far the means of clusters are from those of the same text in other batch shapes.

#[path = "../tests/op/host.rs"]
#[allow(dead_code)]
mod host;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use ggml_squeeze::attention::cpu::Guard;
use ggml_squeeze::attention::{Array, Element, Problem};
use ggml_squeeze::backend::{Capture, OpContext, OpOptions};
use ggml_squeeze::build::{self, LayerCapture, Settings};
use half::f16;
use host::{change, scope, take_stats, Backend, Data, Graph, Masked, Node, Spec};
use sqz::build_cmd::read_text;
use sqz::llama::{Context, Flash, GpuArgs, Model, ModelArgs, RopeArgs};

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 8192)]
    prefix: usize,
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.1")]
    budgets: Vec<f32>,
    #[arg(short, long, default_value_t = 40)]
    repetitions: usize,
    #[arg(short, long, default_value_t = 2)]
    threads: usize,
    #[arg(short, long, requires = "file")]
    model: Option<PathBuf>,
    #[arg(short, long)]
    file: Option<PathBuf>,
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

/// Caches of each way; all of them take turns and are together more than the last-level cache.
const N_CACHE: usize = 3;
/// A round without end compares the last token alone.
const ROUNDS: [usize; 5] = [usize::MAX, 1024, 512, 128, 1];

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn time(graph: &Graph, backend: &Backend) -> f64 {
    let start = Instant::now();
    graph.compute(backend);
    start.elapsed().as_secs_f64() * 1e6
}

fn timings(args: &Args) {
    let spec = Spec {
        dk: 128,
        dv: 128,
        group: 4,
        n_head_kv: 8,
        n_query: 1,
        n_prefix: args.prefix,
        n_kv: args.prefix + 64,
        masked: Masked::Open,
        ..Spec::default()
    };
    let (data, backend, scope) = (Data::new(&spec), Backend::new(args.threads), scope(1.0));
    let index = data.index();
    let contexts: Vec<OpContext> =
        ROUNDS.map(|round| OpContext::new(scope.clone(), OpOptions { round, ..OpOptions::default() })).into();
    let nodes: Vec<Node> = contexts.iter().map(|context| Node::Ours(context, &index)).chain([Node::Stock]).collect();
    let graphs: Vec<Vec<Graph>> =
        nodes.iter().map(|node| (0..N_CACHE).map(|_| Graph::new(&backend, &data, *node)).collect()).collect();
    let first: Vec<f64> = graphs[..ROUNDS.len()].iter().flatten().map(|graph| time(graph, &backend)).collect();
    println!("the first run, which verifies all: {:.0} us", median(first));
    let heads: String = ROUNDS
        .iter()
        .map(|r| format!(" round {} |", if *r == usize::MAX { "-".into() } else { r.to_string() }))
        .collect();
    println!("| budget |{heads} ggml_flash_attn_ext |\n|---|{}---:|", "---:|".repeat(ROUNDS.len()));
    for budget in &args.budgets {
        change(&scope, |c| c.mode = ggml_squeeze::config::ModeSetting::Budget(*budget));
        let mut times = vec![Vec::new(); nodes.len()];
        for repetition in 0..args.repetitions + 2 {
            // ours are a prime number of ways: each comes after each other one as often
            let n = ROUNDS.len();
            let order = (0..n).map(|i| (i * (1 + repetition % (n - 1)) + repetition) % n);
            for way in order.chain([n]) {
                let us: Vec<f64> = graphs[way].iter().map(|graph| time(graph, &backend)).collect();
                // the first ones warm up
                if repetition >= 2 {
                    times[way].extend(us);
                }
            }
        }
        assert!(take_stats(&scope).nodes_dense.is_empty(), "all nodes are sparse");
        let line: String = times.into_iter().map(|t| format!(" {:.1} |", median(t))).collect();
        println!("| {budget} |{line}");
    }
}

/// All layers of a text, as this batch shape and cache type give them.
fn captures(model: &Model, path: &Path, tokens: &[i32], ubatch: u32, element: Element) -> Result<Vec<LayerCapture>> {
    let args = ModelArgs {
        model: path.to_path_buf(),
        ctx_size: None,
        batch_size: 512,
        ubatch_size: ubatch,
        threads: Some(2),
        flash_attn: Flash::On,
        cache_type_k: element,
        cache_type_v: element,
        gpu: GpuArgs::default(),
        rope: RopeArgs::default(),
        swa_full: false,
    };
    let mut context = Context::new(model, &args, tokens.len(), Some(Capture::new(tokens.len(), 100)))?;
    context.prefill(tokens, |_| {})?;
    let capture = context.capture().context("the context was made with a capture")?;
    let numbers = capture.finish()?.0;
    numbers.into_iter().map(|n| Ok(capture.read(n).map_err(anyhow::Error::msg)?.0)).collect()
}

/// Distances of the means of clusters, times the root of their size, in units of the root mean square norm of their rows: of K
/// and of V.
fn distances(old: &LayerCapture, new: &LayerCapture, settings: &Settings) -> Result<[Vec<f64>; 2]> {
    let made = build::index_layer(old, settings, &|_| ())?;
    let view = made.parts.view();
    let mut out = [Vec::new(), Vec::new()];
    let halves = [
        (&new.k, view.centroids, view.shape.head_dim_k as usize),
        (&new.v, view.mean_values, view.shape.head_dim_v as usize),
    ];
    for (out, (rows, stored, d)) in out.iter_mut().zip(halves) {
        let row: usize = d * view.shape.n_head_kv as usize;
        for h in 0..view.shape.n_head_kv as usize {
            for (c, run) in view.head_offsets(h).windows(2).enumerate() {
                let mut sum = vec![0f64; d];
                let mut squares = 0.0;
                for j in run[0]..run[1] {
                    let at = view.member(h, j as usize) as usize * row + h * d;
                    let member: &[f16] = &rows[at..at + d];
                    sum.iter_mut().zip(member).for_each(|(s, x)| *s += x.to_f64());
                    squares += member.iter().map(|x| x.to_f64().powi(2)).sum::<f64>();
                }
                let n = f64::from(run[1] - run[0]);
                let stored = &stored[(h * view.shape.n_cluster as usize + c) * d..][..d];
                let distance: f64 = sum.iter().zip(stored).map(|(s, m)| (s / n - m.to_f64()).powi(2)).sum();
                out.push((distance * n / (squares / n)).sqrt());
            }
        }
    }
    Ok(out)
}

/// Of one layer, in a cache of this type: clusters that are refused although the rows are those that were indexed, clusters,
/// clusters that are refused when one row of K (of V) is that of another token, clusters tried.
fn verdicts(capture: &LayerCapture, settings: &Settings, element: Element) -> Result<[usize; 4]> {
    let made = build::index_layer(capture, settings, &|_| ())?;
    let view = made.parts.view();
    let (heads, dk, dv) =
        (view.shape.n_head_kv as usize, view.shape.head_dim_k as usize, view.shape.head_dim_v as usize);
    let n = capture.k.len() / capture.row_k();
    let stored = |rows: &[f16], d: usize| -> Vec<u8> {
        let rows: Vec<f32> = rows.iter().map(|x| x.to_f32()).collect();
        rows.chunks(d).flat_map(|row| host::encode(row, host::type_of(element))).collect()
    };
    let (mut k, mut v) = (stored(&capture.k, dk), stored(&capture.v, dv));
    let cache = |bytes: &mut [u8], d: usize| {
        let row = element.row_bytes(d);
        let nb = [element.block_bytes(), row * heads, row, row * heads * n];
        Array { data: bytes.as_mut_ptr(), ne: [d, n, heads, 1], nb }
    };
    let none = |ne| Array { data: std::ptr::null_mut(), ne, nb: [0; 4] };
    let n_head = heads * view.shape.n_group as usize;
    let problem = Problem {
        q: none([dk, 1, n_head, 1]),
        k: cache(&mut k, dk),
        v: cache(&mut v, dv),
        k_type: element,
        v_type: element,
        mask: None,
        sinks: None,
        dst: none([dv, n_head, 1, 1]),
        scale: 1.0,
        max_bias: 0.0,
        softcap: 0.0,
    };
    let guard = Guard::new(&problem, view, 0, OpOptions::default().tolerance);
    // SAFETY: K and V are there in all of their extents.
    let refused = |h: usize, c: usize| usize::from(!unsafe { guard.agrees(h, c..c + 1) });
    let n_cluster = view.shape.n_cluster as usize;
    let mut out = [0; 4];
    let mut random = host::Random(5);
    for (h, c) in (0..heads).flat_map(|h| (0..n_cluster).map(move |c| (h, c))) {
        out[0] += refused(h, c);
        out[1] += 1;
        let run = &view.head_offsets(h)[c..c + 2];
        let token = view.member(h, run[0] as usize + random.below((run[1] - run[0]) as usize)) as usize;
        let other = random.below(n);
        let a = if random.below(2) == 0 { &problem.k } else { &problem.v };
        let row = |token: usize| a.data.wrapping_add(token * a.nb[1] + h * a.nb[2]);
        // SAFETY: two rows of the cache, of nb[2] bytes each.
        unsafe {
            let own = std::slice::from_raw_parts(row(token), a.nb[2]).to_vec();
            let another = std::slice::from_raw_parts(row(other), a.nb[2]).to_vec();
            if own == another {
                continue;
            }
            std::ptr::copy_nonoverlapping(another.as_ptr(), row(token), a.nb[2]);
            out[2] += refused(h, c);
            out[3] += 1;
            std::ptr::copy_nonoverlapping(own.as_ptr(), row(token), a.nb[2]);
        }
    }
    Ok(out)
}

fn tolerances(path: &Path, file: &Path, n_token: usize) -> Result<()> {
    drop(Backend::new(1));
    let model = Model::load(path)?;
    let mut tokens = model.tokenise(&read_text(file)?, true)?;
    tokens.truncate(n_token);
    let settings = Settings { n_threads: 2, ..Settings::default() };
    let base = captures(&model, path, &tokens, 512, Element::F16)?;
    println!("{} tokens, {} layers\n", tokens.len(), base.len());
    println!(
        "| cache | clusters of the indexed rows refused | with one row of another token refused |\n|---|---:|---:|"
    );
    for element in Element::ALL {
        let mut all = [0; 4];
        for capture in &base {
            let found = verdicts(capture, &settings, element)?;
            all.iter_mut().zip(found).for_each(|(all, found)| *all += found);
        }
        let [wrong, n, found, tried] = all;
        println!("| {} | {wrong} of {n} | {:.1} % of {tried} |", element.name(), 100.0 * found as f64 / tried as f64);
    }
    println!("\n| against -ub 512 | K median | 99 % | 99.9 % | largest | V median | 99 % | 99.9 % | largest |");
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    for ubatch in [512, 64, 1] {
        let other = match captures(&model, path, &tokens, ubatch, Element::F16) {
            Ok(other) => other,
            Err(error) => {
                println!("| -ub {ubatch}: {error} |");
                continue;
            }
        };
        let mut all = [Vec::new(), Vec::new()];
        for (old, new) in base.iter().zip(&other) {
            let found = distances(old, new, &settings)?;
            all.iter_mut().zip(found).for_each(|(all, found)| all.extend(found));
        }
        let columns = all.map(|mut values| {
            values.sort_by(f64::total_cmp);
            let at = |share: f64| 100.0 * values[((values.len() - 1) as f64 * share) as usize];
            format!(" {:.2} % | {:.2} % | {:.2} % | {:.2} % |", at(0.5), at(0.99), at(0.999), at(1.0))
        });
        println!("| -ub {ubatch} |{}", columns.concat());
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    match (&args.model, &args.file) {
        (Some(model), Some(file)) => tolerances(model, file, args.tokens),
        _ => {
            timings(&args);
            Ok(())
        }
    }
}
