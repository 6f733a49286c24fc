//! One computation of a node: ggml's threads call it one by one, the first to come decides what is to be checked, all check,
//! whoever ends the last check plans, all run the plan, and the last to leave books it. Nothing of it outlives the computation,
//! so a graph may be computed again, on other data.

use std::ffi::{c_int, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ggml_sys as sys;

use super::places::{Check, Task};
use super::{lock, numbers, Shared, State};
use crate::attention::cpu::{Kept, Memory, Plan};
use crate::attention::{Binding, Call, Problem, Rotation, Row};
use crate::backend::graph::{shown, tiles};
use crate::backend::runtime::{count, enter, selection, snapshot, Snapshot};
use crate::backend::stats::{log, Reason};
use crate::backend::tensor::{Inputs, Tensor};

/// Computations that threads are still joining: node, threads so far.
#[derive(Default)]
pub(super) struct Runs(Mutex<Vec<(usize, usize, Arc<Run>)>>);

impl Runs {
    /// The computation of a node that this thread takes part in; true for the first one. Each of the `nth` threads joins once.
    fn join(&self, node: usize, nth: usize) -> (Arc<Run>, bool) {
        let mut runs = lock(&self.0);
        let at = runs.iter().position(|run| run.0 == node).unwrap_or_else(|| {
            runs.push((node, 0, Arc::default()));
            runs.len() - 1
        });
        runs[at].1 += 1;
        let (joined, run) = (runs[at].1, runs[at].2.clone());
        if joined == nth {
            runs.swap_remove(at);
        }
        (run, joined == 1)
    }
}

#[derive(Default)]
pub(super) struct Run {
    job: OnceLock<Job>,
    next: AtomicUsize,
    done: AtomicUsize,
    planned: OnceLock<Planned>,
    /// A thread panicked: nobody waits any longer.
    failed: AtomicBool,
    left: AtomicUsize,
}

impl Run {
    /// Tells the others that a thread of theirs panicked.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }
}

/// What the first thread found.
struct Job {
    problem: Problem,
    snapshot: Arc<Snapshot>,
    /// `[n_stream * n_query]`: does the mask show the row all of the prefix?
    sees: Vec<bool>,
    checks: Vec<Check>,
    tasks: Vec<Task>,
    /// Why no row is sparse, where that is known already and nobody has asked for it.
    dense: Option<Reason>,
}

struct Planned {
    plan: Plan,
    memory: Mutex<Option<Memory>>,
    /// Rows that are sparse, or why there are none.
    booked: Result<usize, Option<Reason>>,
}

/// Callback of the nodes. All of ggml's threads call it, each once, and no thread goes on to another node before all have left.
///
/// # Safety
/// As ggml calls it; `data` is a live `State`.
pub(super) unsafe extern "C" fn run_node(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int, data: *mut c_void) {
    // SAFETY: the contract.
    let state = unsafe { &*data.cast::<State>() };
    let (ith, nth) = (ith as usize, nth as usize);
    let (run, first) = state.shared.runs.join(dst as usize, nth);
    // SAFETY: the node that is being computed, and its sources.
    let work = AssertUnwindSafe(|| unsafe { state.work(&run, &|| problem_of(dst), first, ith, nth) });
    if catch_unwind(work).is_err() {
        run.fail();
    }
    if run.left.fetch_add(1, Ordering::AcqRel) + 1 < nth {
        return;
    }
    // All threads have left, and what they wrote is seen.
    if state.shared.finish(&run).is_none() {
        // SAFETY: as above.
        unsafe { recompute(dst, state) };
    }
}

/// The other threads are at it now, none of which waits for this one.
fn wait<'a, T>(cell: &'a OnceLock<T>, failed: &AtomicBool) -> Option<&'a T> {
    const SPINS: usize = 1 << 12;
    let mut spins = 0;
    loop {
        if let Some(value) = cell.get() {
            return Some(value);
        }
        if failed.load(Ordering::Relaxed) {
            return None;
        }
        spins += 1;
        match spins < SPINS {
            true => std::hint::spin_loop(),
            false => std::thread::yield_now(),
        }
    }
}

impl State {
    /// What one of `nth` threads does.
    ///
    /// # Safety
    /// The problem's arrays are valid and unchanged until all threads have left; it is one that the kernels take. Each thread is
    /// here once, and one of them is the first.
    pub(super) unsafe fn work(&self, run: &Run, problem: &dyn Fn() -> Problem, first: bool, ith: usize, nth: usize) {
        if first {
            let _entered = enter(&self.shared.scope);
            // SAFETY: the contract.
            let job = unsafe { self.job(problem()) };
            let nothing_to_do = job.tasks.is_empty();
            let job = run.job.get_or_init(|| job);
            if nothing_to_do {
                run.planned.get_or_init(|| self.plan(job, nth));
            }
        }
        let Some(job) = wait(&run.job, &run.failed) else { return };
        while let Some(task) = job.tasks.get(run.next.fetch_add(1, Ordering::Relaxed)) {
            // SAFETY: the sources of a node that is being computed; the node was made for such a problem.
            unsafe { self.check(&job.problem, &job.checks, task) };
            // acquire: the last one sees what all have found
            if run.done.fetch_add(1, Ordering::AcqRel) + 1 == job.tasks.len() {
                let _entered = enter(&self.shared.scope);
                run.planned.get_or_init(|| self.plan(job, nth));
            }
        }
        let Some(planned) = wait(&run.planned, &run.failed) else { return };
        #[cfg(test)]
        super::tests::fail(&self.shared.panics);
        // SAFETY: all of ggml's threads are here once; the plan has a memory of its own.
        unsafe { planned.plan.run(ith, nth) };
    }

    /// # Safety
    /// The mask can be read in all of its extents.
    unsafe fn job(&self, problem: Problem) -> Job {
        let snapshot = snapshot();
        let config = &snapshot.config;
        let mut job = Job {
            problem,
            sees: Vec::new(),
            checks: Vec::new(),
            tasks: Vec::new(),
            dense: None,
            snapshot: snapshot.clone(),
        };
        if config.force || config.disable {
            return job;
        }
        let n_prefix = self.index.meta().n_prefix();
        if n_prefix < config.min_prefix_cpu() {
            job.dense = Some(Reason::Short);
            return job;
        }
        let n_query = problem.q.ne[1];
        // SAFETY: the mask of a node that is being computed.
        job.sees = (0..problem.n_row()).map(|row| unsafe { sees(&problem, row, n_prefix) }).collect();
        let streams: Vec<usize> =
            (0..problem.q.ne[3]).filter(|s| job.sees[s * n_query..(s + 1) * n_query].contains(&true)).collect();
        if streams.is_empty() {
            job.dense = Some(Reason::Unbound);
        }
        (job.checks, job.tasks) = self.checks(&problem, &streams);
        job
    }

    /// Plans what the checks allow.
    fn plan(&self, job: &Job, nth: usize) -> Planned {
        let (problem, config) = (job.problem, &job.snapshot.config);
        let mut rows = vec![Row::Dense; problem.n_row()];
        let n_query = problem.q.ne[1];
        for check in &job.checks {
            let (holds, held) = self.conclude(check);
            if holds != (held == Some(true)) {
                count(|s| if holds { s.bound += 1 } else { s.unbound += 1 });
            }
            if !holds && held != Some(false) && config.log > 0 {
                let what = "K or V does not hold the prefix of the index in its first cells: dense";
                log(format_args!("attention op of layer {}, stream {}: {what}", self.layer, check.stream));
            }
            let own = check.stream * n_query..(check.stream + 1) * n_query;
            for (row, sees) in rows[own.clone()].iter_mut().zip(&job.sees[own]) {
                if holds && *sees {
                    *row = Row::Sparse(0);
                }
            }
        }
        let mut memory = lock(&self.shared.memory).pop().unwrap_or_default();
        let n_sparse = rows.iter().filter(|row| **row != Row::Dense).count();
        let stale = (!job.checks.is_empty()).then_some(Reason::Stale);
        let (plan, booked) = match n_sparse {
            0 => (None, Err(job.dense.or(stale))),
            _ => match Plan::new(self.call(job, rows), nth, &mut memory) {
                Ok(plan) if config.measure => (Some(plan.measured()), Ok(n_sparse)),
                Ok(plan) => (Some(plan), Ok(n_sparse)),
                Err(_) => (None, Err(Some(Reason::Kernel))),
            },
        };
        let dense =
            || Plan::forced(problem, nth, &mut memory).expect("the node was made for a call that the kernels take");
        Planned { plan: plan.unwrap_or_else(dense), memory: Mutex::new(Some(memory)), booked }
    }

    fn call(&self, job: &Job, rows: Vec<Row>) -> Call {
        let (problem, config, meta) = (job.problem, &job.snapshot.config, self.index.meta());
        let (n_kv, n_query) = (problem.k.ne[1], problem.q.ne[1]);
        let always = {
            let mut always = lock(&self.always);
            if always.0 != n_kv {
                let tail = meta.n_prefix() as u32 - meta.n_window..n_kv as u32;
                *always = (n_kv, (0..meta.n_sink).chain(tail).collect());
            }
            always.1.clone()
        };
        let all = vec![0; if problem.mask.is_none() && config.tile > 1 { n_kv } else { 0 }];
        let tiles = match &problem.mask {
            Some(mask) if mask.ne[2] > 1 => Vec::new(),
            // SAFETY: the mask of a node that is being computed.
            Some(_) => tiles(&rows, n_query, config.tile, |row| unsafe { mask_row(&problem, row, 0, n_kv) }),
            None => tiles(&rows, n_query, config.tile, |_| &all[..]),
        };
        let binding = Binding { index: self.index.clone(), cells: self.cells.clone(), always };
        Call {
            problem,
            layer: self.layer,
            rows: rows.into(),
            bindings: [binding].into(),
            selection: selection(config, meta),
            // a host's own graph keeps a quantised cache in the plain basis
            rotation: Rotation::default(),
            tiles: tiles.into(),
        }
    }
}

impl Shared {
    /// Books a computation that all threads have left: rows that were sparse, and what they kept. None where a thread
    /// panicked.
    pub(super) fn finish(&self, run: &Run) -> Option<(usize, Kept)> {
        if run.failed.load(Ordering::Acquire) {
            return None;
        }
        let (job, Planned { plan, memory, booked }) = (run.job.get()?, run.planned.get()?);
        lock(&self.memory).extend(lock(memory).take());
        let _entered = enter(&self.scope);
        let kept = if booked.is_ok() { plan.kept() } else { Kept::default() };
        count(|s| match booked {
            Ok(n_row) => {
                s.nodes_sparse += 1;
                s.rows_sparse += *n_row as u64;
                s.add_kept(kept.share_sum, kept.count);
                s.add_missed(kept.missed_sum, kept.missed_count);
            }
            Err(Some(reason)) => s.dense(*reason),
            Err(None) => s.nodes_forced += u64::from(job.snapshot.config.force),
        });
        Some((booked.unwrap_or(0), kept))
    }
}

/// # Safety
/// `dst` is a node of ours that is being computed.
unsafe fn problem_of(dst: *mut sys::ggml_tensor) -> Problem {
    // SAFETY: the contract.
    let node = unsafe { Tensor::new(dst) }.expect("ggml computes a node");
    let inputs = Inputs::of(node).expect("the node was made with q, k and v");
    inputs.problem(node.array(), numbers(node)).expect("the node was made with types that the kernels take")
}

/// The first `n` values of a mask's row of one head.
///
/// # Safety
/// There is a mask, it can be read in all of its extents, and these are no fewer than the problem's.
unsafe fn mask_row<'a>(problem: &Problem, row: usize, head: usize, n: usize) -> &'a [u16] {
    let Some(mask) = &problem.mask else { return &[] };
    let (stream, query) = (row / problem.q.ne[1], row % problem.q.ne[1]);
    let at = query * mask.nb[1] + head * mask.nb[2] + stream % mask.ne[3] * mask.nb[3];
    // SAFETY: the contract.
    unsafe { std::slice::from_raw_parts(mask.data.add(at).cast(), n) }
}

/// Does a row's mask show the cells below `n`, to every head?
///
/// # Safety
/// As for `mask_row`, if there is a mask.
unsafe fn sees(problem: &Problem, row: usize, n: usize) -> bool {
    let heads = problem.mask.as_ref().map_or(0, |mask| mask.ne[2]);
    (0..heads).all(|head| {
        // SAFETY: the contract.
        let bits = unsafe { mask_row(problem, row, head, n) };
        bits.chunks(256).all(|bits| shown(bits.iter().fold(0, |all, bits| all | bits)))
    })
}

/// After a panic: the node once more, densely, on this thread. The host gets a right answer late rather than none; where even
/// that fails it gets NaN, which cannot be taken for one.
///
/// # Safety
/// `dst` is a node of ours that is being computed, and all other threads have left it.
unsafe fn recompute(dst: *mut sys::ggml_tensor, state: &State) {
    // SAFETY: the contract; one thread is all threads.
    let dense = AssertUnwindSafe(|| unsafe {
        #[cfg(test)]
        super::tests::fail(&state.shared.panics);
        Plan::forced(problem_of(dst), 1, &mut Memory::default()).map(|plan| plan.run(0, 1))
    });
    let what = format!("a kernel of the attention op of layer {} panicked, please report it", state.layer);
    match catch_unwind(dense) {
        Ok(Ok(())) => log(format_args!("{what}; the node was computed densely instead")),
        _ => {
            // SAFETY: the node's own output, which is contiguous.
            unsafe {
                let n = (*dst).ne.iter().product::<i64>() as usize;
                std::slice::from_raw_parts_mut((*dst).data.cast::<f32>(), n).fill(f32::NAN);
            }
            log(format_args!("{what}; its output is NaN"));
        }
    }
}
