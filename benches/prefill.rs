//! Microseconds per query row of a prefill behind an index on one thread, at budget 0.2: rows that select for themselves,
//! and tiles of several sizes; then few rows, as one tile or each for itself. Runs interleave, the best of some counts.
//! `cargo bench --bench prefill [-- word...]` runs the lines that hold every word, for example `-- avx2 q8_0 d128`.

#[path = "../tests/attend_case/mod.rs"]
mod attend_case;

use attend_case::{Case, Spec};
use ggml_squeeze::attention::cpu::{Memory, Options, Path, Plan};
use ggml_squeeze::attention::{cut, runs, Call, Element, Row};
use half::f16;
use std::time::Instant;

const N_PREFIX: usize = 12288;
const N_QUERY: usize = 128;
const TILES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const FEW: [usize; 4] = [2, 3, 4, 8];
const REPETITIONS: usize = 7;

/// Row i sees the prefix and the first i + 1 of the other cells that are not hidden from all.
fn make_causal(case: &mut Case) {
    let mut is_prefix = vec![false; case.call.problem.k.ne[1]];
    case.call.bindings[0].cells.iter().for_each(|c| is_prefix[*c as usize] = true);
    let n_kv = is_prefix.len();
    let hidden: Vec<bool> = case.mask[..n_kv].iter().map(|m| *m == f16::NEG_INFINITY).collect();
    for query in 0..N_QUERY {
        let mut left = query + 1;
        for cell in (0..n_kv).filter(|c| !is_prefix[*c] && !hidden[*c]) {
            let mask = if left > 0 { f16::ZERO } else { f16::NEG_INFINITY };
            left = left.saturating_sub(1);
            case.mask[query * n_kv + cell] = mask;
        }
    }
}

/// The call with its first rows alone, in tiles.
fn with(case: &Case, n_query: usize, tile: usize, dense: bool) -> Call {
    let mut call = case.call.clone();
    call.problem.q.ne[1] = n_query;
    call.problem.dst.ne[2] = n_query;
    call.rows = vec![if dense { Row::Dense } else { Row::Sparse(0) }; n_query].into();
    let tiles = runs(&call.rows, n_query).into_iter().flat_map(|run| cut(run, tile));
    call.tiles = tiles.filter(|tile| tile.len() > 1).collect();
    call
}

/// Best time of each call per row, plan included.
fn microseconds(calls: &[Call], path: Path) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; calls.len()];
    let mut memory = Memory::default();
    for _ in 0..REPETITIONS {
        for (call, best) in calls.iter().zip(&mut best) {
            let start = Instant::now();
            let options = Options { path: Some(path), schedule: None };
            let plan =
                Plan::with_options(call.clone(), 1, &mut memory, options).expect("the bench's call is a supported one");
            // SAFETY: one thread is all threads.
            unsafe { plan.run(0, 1) };
            *best = best.min(start.elapsed().as_secs_f64() * 1e6 / call.problem.q.ne[1] as f64);
        }
    }
    best
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    println!("prefix {N_PREFIX}, budget 0.2, spread diag, one thread, us per query row\n");
    let columns = |sizes: &[usize], what: &str| -> String { sizes.iter().map(|n| format!(" {what}{n} |")).collect() };
    println!("| path | type | heads | size | dense |{}", columns(&TILES, "tile "));
    println!("|---|---|---|---|{}", "---:|".repeat(1 + TILES.len()));
    let mut few = Vec::new();
    for (element, (d, group)) in
        [Element::F16, Element::Q8_0].into_iter().flat_map(|t| [(64, 7), (128, 6)].map(|size| (t, size)))
    {
        let line = |path: Path| format!("{} | {} | {}/2 | d{d}", path.name(), element.name(), 2 * group);
        let wanted = |path: &Path| words.iter().all(|word| line(*path).split(" | ").any(|w| w == word));
        let paths: Vec<Path> = Path::available().into_iter().filter(wanted).collect();
        if paths.is_empty() {
            continue;
        }
        let mut case = Case::new(&Spec {
            dk: d,
            dv: d,
            group,
            n_head_kv: 2,
            n_query: N_QUERY,
            n_prefix: N_PREFIX,
            n_sink: 16,
            n_window: 100,
            n_other: 200,
            n_cluster: (N_PREFIX - 116) / 20,
            k_type: element,
            v_type: element,
            ..Spec::base()
        });
        make_causal(&mut case);
        for path in paths {
            let mut calls = vec![with(&case, N_QUERY, 1, true)];
            calls.extend(TILES.map(|tile| with(&case, N_QUERY, tile, false)));
            let times: String = microseconds(&calls, path).iter().map(|t| format!(" {t:.1} |")).collect();
            println!("| {} |{times}", line(path));
            let calls: Vec<Call> =
                FEW.into_iter().flat_map(|n| [1, n].map(|tile| with(&case, n, tile, false))).collect();
            let times = microseconds(&calls, path);
            let times: String = times.chunks(2).map(|t| format!(" {:.1} / {:.1} |", t[0], t[1])).collect();
            few.push(format!("| {} |{times}", line(path)));
        }
    }
    println!("\nFew rows, each for itself / as one tile:\n");
    println!("| path | type | heads | size |{}", columns(&FEW, "rows "));
    println!("|---|---|---|---|{}", "---:|".repeat(FEW.len()));
    few.iter().for_each(|line| println!("{line}"));
}
