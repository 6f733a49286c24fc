//! Microseconds of one decode call on one thread: dense and sparse through our kernels, by code path, type of the cache,
//! prefix length and head size. `cargo bench --bench attend [-- word...]` runs the lines that hold every word, for example
//! `-- avx512 q8_0 12288 d128 g7`.

#[path = "../tests/attend_case/mod.rs"]
mod attend_case;

use attend_case::{Case, Spec};
use ggml_squeeze::attention::cpu::{Memory, Options, Path, Plan};
use ggml_squeeze::attention::{Call, Element, Mode, Row};

/// CPU time of this thread in microseconds: a dense call outlasts a scheduler slice, a sparse one does not, so on a busy
/// machine wall time would flatter the sparse one.
fn now() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is there to be written.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    assert_eq!(rc, 0, "this system has no thread clock");
    t.tv_sec as f64 * 1e6 + t.tv_nsec as f64 / 1e3
}

/// More than the last-level cache. In a model the other layers run between two calls of a layer; without emptying the
/// cache the few cells that a sparse call reads would still be there, and its speed-up would exceed what memory allows.
const FLUSH: usize = 96 << 20;

/// Best of some runs from a cold cache, plan included: a plan is made for every graph call. Of the plan alone, too.
fn microseconds(call: &Call, path: Path, flush: &[u64], memory: &mut Memory) -> (f64, f64) {
    let (mut best, mut best_plan) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..12 {
        // Read, not written, as weights are: no line has to go back to memory while the call runs.
        std::hint::black_box(flush.iter().step_by(8).fold(0, |sum, x| sum ^ x));
        let start = now();
        let options = Options { path: Some(path), schedule: None };
        let plan = Plan::with_options(call.clone(), 1, memory, options).expect("the bench's call is a supported one");
        let planned = now();
        // SAFETY: one thread is all threads.
        unsafe { plan.run(0, 1) };
        best = best.min(now() - start);
        best_plan = best_plan.min(planned - start);
    }
    (best, best_plan)
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    println!("4 KV heads, one thread, cold cache, us of CPU time per call; 0.0 is lookup and tail alone\n");
    let mut memory = Memory::default();
    let flush: Vec<u64> = (0..FLUSH as u64 / 8).collect();
    println!("| path | type | prefix | size | group | dense | 0.2 | speed-up | 0.1 | speed-up | plan | 0.0 |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let sizes = [(64, 3), (64, 7), (128, 3), (128, 7)];
    let all = Element::ALL.into_iter().flat_map(|t| [4096, 12288, 24576].map(|n| (t, n)));
    for (element, n_prefix, (d, group)) in all.flat_map(|(t, n)| sizes.map(|size| (t, n, size))) {
        let line = |path: Path| format!("{} | {} | {n_prefix} | d{d} | g{group}", path.name(), element.name());
        let wanted = |path: &Path| words.iter().all(|word| line(*path).split(" | ").any(|w| w == word));
        let paths: Vec<Path> = Path::available().into_iter().filter(wanted).collect();
        if paths.is_empty() {
            continue;
        }
        let spec = Spec {
            dk: d,
            dv: d,
            group,
            n_head_kv: 4,
            n_query: 1,
            n_prefix,
            n_sink: 16,
            n_window: 100,
            n_other: 64,
            n_cluster: (n_prefix - 116) / 20,
            plain_mask: true,
            k_type: element,
            v_type: element,
            ..Spec::base()
        };
        let case = Case::new(&spec);
        for path in paths {
            let mut with = |row: Row, budget: f32| {
                let mut call = case.call.clone();
                call.rows = vec![row].into();
                call.selection.mode = Mode::Budget(budget);
                microseconds(&call, path, &flush, &mut memory)
            };
            let (dense, _) = with(Row::Dense, 1.0);
            let ((fifth, plan), (tenth, _), (none, _)) =
                (with(Row::Sparse(0), 0.2), with(Row::Sparse(0), 0.1), with(Row::Sparse(0), 0.0));
            println!(
                "| {} | {dense:.0} | {fifth:.0} | {:.1}x | {tenth:.0} | {:.1}x | {plan:.1} | {none:.0} |",
                line(path),
                dense / fifth,
                dense / tenth
            );
        }
    }
}
