//! Microseconds of one decode call on one thread: dense and sparse through our kernels, by prefix length and head size.
//! `cargo bench --bench attend`.

#[path = "../tests/attend_case/mod.rs"]
mod attend_case;

use attend_case::{Case, Spec};
use ggml_squeeze::attention::cpu::{self, Plan};
use ggml_squeeze::attention::{Call, Mode, Row};

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
const FLUSH: usize = 256 << 20;

/// Best of some runs from a cold cache, plan included: a plan is made for every graph call.
fn microseconds(call: &Call, flush: &mut [u8]) -> (f64, f64) {
    let (mut best, mut planning) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..12 {
        flush.iter_mut().step_by(64).for_each(|x| *x = x.wrapping_add(1));
        std::hint::black_box(&flush);
        let start = now();
        let plan = Plan::new(call.clone(), 1).expect("the bench's call is a supported one");
        planning = planning.min(now() - start);
        for stage in 0..plan.n_stage() {
            // SAFETY: one thread is all threads.
            unsafe { plan.run(stage, 0, 1) };
        }
        best = best.min(now() - start);
    }
    (best, planning)
}

fn main() {
    println!("path {}, 4 KV heads, one thread, cold cache, us of CPU time per call\n", cpu::path());
    let mut flush = vec![1u8; FLUSH];
    println!("| prefix | d | G | dense | 0.2 | speed-up | 0.1 | speed-up | plan |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for n_prefix in [4096, 12288, 24576] {
        for (d, group) in [(64, 3), (64, 7), (128, 3), (128, 7)] {
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
                ..Spec::base()
            };
            let case = Case::new(&spec);
            let mut with = |row: Row, budget: f32| {
                let mut call = case.call.clone();
                call.rows = vec![row].into();
                call.selection.mode = Mode::Budget(budget);
                microseconds(&call, &mut flush)
            };
            let (dense, _) = with(Row::Dense, 1.0);
            let ((fifth, plan), (tenth, _)) = (with(Row::Sparse(0), 0.2), with(Row::Sparse(0), 0.1));
            let (a, b) = (dense / fifth, dense / tenth);
            println!(
                "| {n_prefix} | {d} | {group} | {dense:.0} | {fifth:.0} | {a:.1}x | {tenth:.0} | {b:.1}x | {plan:.1} |"
            );
        }
    }
}
