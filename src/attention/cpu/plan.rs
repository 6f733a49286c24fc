//! Cuts a call into tasks that threads claim one by one, and runs them.
//!
//! Split, for few rows: the first tasks score chunks of clusters, and whoever finishes a pair's last chunk selects; the
//! others attend to parts of a pair's cells, once its selection is there, and whoever finishes its last part merges. There
//! is no barrier: while one thread selects, the next is busy with another pair. Fused, for many: a task is all of a pair.
//! A pair is a (row, KV head). Rows that share a selection are no pairs: `tile` cuts them into tasks, which come first.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

use super::attend::{attend, estimate, Cells, Part, State};
use super::check::check;
use super::lookup::Lookup;
use super::memory::{Carver, Memory, Pair, Scratch, ScratchLayout, Space, SpaceLayout, Workspace};
use super::progress::{last, LookupProgress, OnPanic};
use super::ruled::Ruled;
use super::tile::{Shared, Tiles};
use super::{Kept, Path, Unsupported};
use crate::attention::rule::{Rule, Seen};
use crate::attention::{Call, Mode, Problem, Rotation, Row, Selection, Spread};

/// Pairs per thread from which a task is a whole pair.
const FUSED_PAIRS: usize = 4;
/// Tasks per thread that splitting aims at, for scores and for cells, so that threads end together.
const SPLIT_TASKS: usize = 8;
/// Fewer clusters or cells than this are no task of their own.
const MIN_CLUSTERS: usize = 64;
const MIN_CELLS: usize = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Split,
    Fused,
}

/// What tests and benches choose by hand; `None` is the plan's choice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub path: Option<Path>,
    pub schedule: Option<Schedule>,
}

/// Tasks are claimed in order, so whoever waits for a selection knows that running threads have all of its scores.
/// Everything is as new once every thread has left.
#[derive(Default)]
struct Progress {
    /// Next task.
    next: AtomicUsize,
    /// Threads that have no more to do.
    left: AtomicUsize,
    /// A thread panicked: a selection that others wait for may never come.
    failed: AtomicBool,
    /// Of each sparse pair.
    lookups: Vec<LookupProgress>,
    /// Parts attended to of each pair.
    attended: Vec<AtomicUsize>,
}

/// An attention call ready to run. It may be run again with the same arrays.
pub struct Plan {
    call: Call,
    path: Path,
    schedule: Schedule,
    n_threads: usize,
    tiles: Tiles,
    /// Rows in no tile; the sparse ones among them, and the place of each row among those.
    single: Vec<usize>,
    sparse: Vec<usize>,
    place: Vec<usize>,
    space: SpaceLayout,
    scratch: ScratchLayout,
    memory: Arc<Workspace>,
    spaces_at: usize,
    scratch_at: usize,
    partials_at: usize,
    /// Chunks of clusters per sparse pair, and parts of cells (one more with the estimate) per pair.
    n_chunk: usize,
    n_part: usize,
    progress: Progress,
    measured: bool,
    rule: Option<Arc<dyn Rule>>,
}

impl Plan {
    /// Plans a call for about `n_threads` threads; costs about a microsecond.
    pub fn new(call: Call, n_threads: usize, memory: &mut Memory) -> Result<Plan, Unsupported> {
        Plan::with_options(call, n_threads, memory, Options::default())
    }

    /// Every row over all of its visible cells, with no index: the conformance path.
    pub fn forced(problem: Problem, n_threads: usize, memory: &mut Memory) -> Result<Plan, Unsupported> {
        let selection =
            Selection { mode: Mode::Budget(1.0), spread: Spread::None, alpha: 0.0, estimate: false, coarse_share: 1.0 };
        let rows = vec![Row::Dense; problem.n_row()].into();
        let (bindings, rotation, tiles) = (Vec::new().into(), Rotation::default(), Vec::new().into());
        Plan::new(Call { problem, layer: 0, rows, tiles, bindings, selection, rotation }, n_threads, memory)
    }

    /// As `new`, under another rule: for evaluations. Rows that share a selection keep the index's, and the rule is not told of
    /// them.
    #[doc(hidden)]
    pub fn ruled(
        mut call: Call,
        n_threads: usize,
        memory: &mut Memory,
        rule: Arc<dyn Rule>,
    ) -> Result<Plan, Unsupported> {
        call.selection = rule.selection(call.layer, call.selection);
        let options = Options { schedule: Some(Schedule::Fused), ..Options::default() };
        let plan = Plan::with_options(call, n_threads, memory, options)?;
        Ok(Plan { rule: Some(rule), ..plan })
    }

    /// As `new`, with the code path or the schedule given.
    pub fn with_options(
        call: Call,
        n_threads: usize,
        memory: &mut Memory,
        options: Options,
    ) -> Result<Plan, Unsupported> {
        check(&call)?;
        let p = &call.problem;
        let (group, n_head_kv, n_threads) = (p.n_group(), p.k.ne[2], n_threads.max(1));
        let (mut single, mut sparse) = (Vec::new(), Vec::new());
        let mut place = Vec::with_capacity(call.rows.len());
        let mut tiles = call.tiles.iter().peekable();
        for (row, kind) in call.rows.iter().enumerate() {
            place.push(sparse.len());
            while tiles.next_if(|tile| tile.end <= row).is_some() {}
            if tiles.peek().is_some_and(|tile| tile.contains(&row)) {
                continue;
            }
            single.push(row);
            if let Row::Sparse(_) = kind {
                sparse.push(row);
            }
        }
        let (mut n_cluster, mut n_sink, mut n_prefix) = (0, 0, 0);
        if !(sparse.is_empty() && call.tiles.is_empty()) {
            for b in call.bindings.iter() {
                n_cluster = n_cluster.max(b.index.layer(call.layer).map_or(0, |l| l.shape.n_cluster as usize));
                n_sink = n_sink.max(b.index.meta().n_sink as usize);
                n_prefix = n_prefix.max(b.index.meta().n_prefix());
            }
        }
        let (pairs, sparse_pairs) = (single.len() * n_head_kv, sparse.len() * n_head_kv);
        let units = call.tiles.len() * n_head_kv;
        let schedule = options.schedule.unwrap_or(match pairs + units >= FUSED_PAIRS * n_threads {
            true => Schedule::Fused,
            false => Schedule::Split,
        });
        let wanted = SPLIT_TASKS * n_threads;
        let n_chunk = wanted.div_ceil(sparse_pairs.max(1)).clamp(1, n_cluster.div_ceil(MIN_CLUSTERS).max(1));
        let n_part = wanted.div_ceil(pairs.max(1)).clamp(1, p.k.ne[1].div_ceil(MIN_CELLS).max(1));
        let n_part = n_part + call.selection.estimate as usize;

        let space = SpaceLayout::new(group, n_cluster, n_sink, n_prefix);
        let scratch = ScratchLayout::new(group, p.q.ne[0], p.v.ne[0]);
        let split = schedule == Schedule::Split;
        let n_space = match (split, sparse.is_empty()) {
            (_, true) => 0,
            (true, _) => sparse_pairs,
            (false, _) => n_threads,
        };
        let mut carver = Carver::default();
        let spaces_at = carver.area::<u8>(n_space * space.bytes);
        let scratch_at = carver.area::<u8>(n_threads * scratch.bytes);
        let partials_at = carver.area::<u8>(if split { pairs * n_part * partial_bytes(p) } else { 0 });
        let path = options.path.filter(|path| Path::available().contains(path)).unwrap_or_else(Path::detect);
        let tiles = Tiles::new(&call, path, n_threads, split, wanted, (n_cluster, n_sink, n_prefix), &mut carver);
        let progress = Progress {
            lookups: (0..sparse_pairs).map(|_| LookupProgress::default()).collect(),
            attended: (0..if split { pairs } else { 0 }).map(|_| AtomicUsize::new(0)).collect(),
            ..Progress::default()
        };
        Ok(Plan {
            path,
            schedule,
            n_threads,
            tiles,
            single,
            sparse,
            place,
            space,
            scratch,
            memory: memory.take(carver.bytes)?,
            spaces_at,
            scratch_at,
            partials_at,
            n_chunk,
            n_part,
            progress,
            measured: false,
            rule: None,
            call,
        })
    }

    /// The same plan, which also measures the attention mass that its selections miss: as much work as dense attention.
    pub fn measured(self) -> Plan {
        Plan { measured: true, ..self }
    }

    /// Runs the share of thread `ith` of `nth`. More threads than planned have nothing to do; fewer do it all.
    ///
    /// # Safety
    /// The call's arrays are valid and unchanged during the run; all of the `nth` threads, each with its own `ith`, call
    /// this once, at the same time; no other plan of the same memory runs meanwhile.
    pub unsafe fn run(&self, ith: usize, nth: usize) {
        let progress = &self.progress;
        let on_panic = OnPanic(&progress.failed);
        if ith < self.n_threads {
            let n_head_kv = self.n_head_kv();
            let (n_score, n_attend) = match self.schedule {
                Schedule::Fused => (0, self.single.len() * n_head_kv),
                Schedule::Split => {
                    (self.sparse.len() * n_head_kv * self.n_chunk, self.single.len() * n_head_kv * self.n_part)
                }
            };
            let mut prepared = None;
            // Numbers of tasks by kind, in order: all that scores comes before all that attends.
            let counts = [self.tiles.n_score(), n_score, self.tiles.n_attend(), n_attend];
            loop {
                let mut task = progress.next.fetch_add(1, Ordering::Relaxed);
                let kind = counts.iter().position(|n| task.checked_sub(*n).map(|rest| task = rest).is_none());
                // SAFETY: each task is claimed once; this thread's scratch is its own.
                unsafe {
                    match (kind, self.schedule) {
                        (Some(0), _) => self.tiles.score(self.shared(), task, ith),
                        (Some(1), _) => self.score(task, ith, &mut prepared),
                        (Some(2), _) => self.tiles.attend(self.shared(), task, ith),
                        (Some(_), Schedule::Fused) => self.whole(task, ith),
                        (Some(_), Schedule::Split) => self.attend(task, ith),
                        (None, _) => break,
                    }
                }
            }
        }
        std::mem::forget(on_panic);
        if progress.left.fetch_add(1, Ordering::AcqRel) + 1 == nth {
            progress.lookups.iter().for_each(LookupProgress::reset);
            self.tiles.reset();
            progress.next.store(0, Ordering::Relaxed);
            progress.left.store(0, Ordering::Relaxed);
        }
    }

    /// How much was kept; meaningful after a run.
    pub fn kept(&self) -> Kept {
        let mut out = Kept::default();
        for pair in 0..self.sparse.len() * self.n_head_kv() {
            let row = self.sparse[pair / self.n_head_kv()];
            let Row::Sparse(n) = self.call.rows[row] else { continue };
            let meta = self.call.bindings[n as usize].index.meta();
            let keys = self.progress.lookups[pair].kept();
            out.share_sum += (meta.n_sink as f64 + keys as f64) / (meta.n_prefix() as f64 - meta.n_window as f64);
            out.count += 1;
            if self.measured {
                out.missed_sum += self.progress.lookups[pair].missed();
                out.missed_count += 1;
            }
        }
        self.tiles.add_kept(self.shared(), &mut out);
        out
    }

    /// Kept clusters of a row and KV head, ascending, after a run and before another plan of the same memory runs; none for
    /// dense rows, and none with the fused schedule, which forgets them.
    pub fn selected(&self, row: usize, head_kv: usize) -> Option<Vec<u32>> {
        if self.schedule == Schedule::Fused || self.call.rows[row] == Row::Dense {
            return None;
        }
        let space = match self.call.tiles.iter().position(|tile| tile.contains(&row)) {
            Some(tile) => self.tiles.space(self.shared(), tile * self.n_head_kv() + head_kv),
            None => self.space(self.sparse_pair(row, head_kv)),
        };
        // SAFETY: the run is over, nobody writes.
        Some(unsafe { space.chosen() }.0.to_vec())
    }

    fn shared(&self) -> Shared<'_> {
        Shared { call: &self.call, path: self.path, memory: &self.memory, failed: &self.progress.failed }
    }

    fn n_head_kv(&self) -> usize {
        self.call.problem.k.ne[2]
    }

    /// Number of a sparse row's pair among the sparse ones.
    fn sparse_pair(&self, row: usize, head_kv: usize) -> usize {
        self.place[row] * self.n_head_kv() + head_kv
    }

    fn space(&self, n: usize) -> Space<'_> {
        Space { memory: &self.memory, layout: &self.space, at: self.spaces_at + n * self.space.bytes }
    }

    fn pair(&self, row: usize, head_kv: usize) -> Pair<'_> {
        Pair { call: &self.call, row, head_kv, path: self.path }
    }

    /// The lookup of a sparse pair in a space; none for a dense row.
    fn lookup(&self, pair: Pair<'_>, space: usize) -> Option<Lookup<'_>> {
        let Row::Sparse(n) = self.call.rows[pair.row] else { return None };
        let binding = &self.call.bindings[n as usize];
        let view = binding.index.layer(self.call.layer)?;
        let pair = self.pair(pair.row, pair.head_kv);
        Some(Lookup { pair, binding, view, space: self.space(space) })
    }

    /// Cells of a pair.
    ///
    /// # Safety
    /// The selection, if there is one, is complete.
    unsafe fn cells<'a>(&self, lookup: Option<Lookup<'a>>) -> Cells<'a> {
        match lookup {
            None => Cells::All(self.call.problem.k.ne[1]),
            Some(lookup) => {
                // SAFETY: the contract.
                let (kept, cells) = unsafe { lookup.space.chosen() };
                Cells::Listed { lookup, kept, cells }
            }
        }
    }

    /// # Safety
    /// All scores of the sparse pair are there; no other task has its space; its queries are in `scratch.q`.
    unsafe fn select(&self, lookup: &Lookup<'_>, scratch: &mut Scratch<'_>) {
        let progress = &self.progress.lookups[self.sparse_pair(lookup.pair.row, lookup.pair.head_kv)];
        // SAFETY: the contract.
        unsafe {
            let keys = lookup.select();
            let missed = self.measured.then(|| lookup.missed(scratch));
            if let Some(missed) = missed {
                progress.miss(missed);
            }
            if let Some(rule) = &self.rule {
                let Pair { row, head_kv, .. } = lookup.pair;
                let (layer, clusters) = (self.call.layer, lookup.space.chosen().0.len());
                rule.attended(&Seen { layer, row, head_kv, keys: keys as usize, clusters, missed });
            }
            progress.select(keys);
        }
    }

    /// Split: scores of one chunk of clusters. `prepared` is the sparse pair whose queries are in this thread's scratch.
    ///
    /// # Safety
    /// As for `run`; the same holds for the two below.
    unsafe fn score(&self, task: usize, ith: usize, prepared: &mut Option<usize>) {
        let (sparse_pair, chunk) = (task / self.n_chunk, task % self.n_chunk);
        let (row, head_kv) = (self.sparse[sparse_pair / self.n_head_kv()], sparse_pair % self.n_head_kv());
        let Some(lookup) = self.lookup(self.pair(row, head_kv), sparse_pair) else { return };
        // SAFETY: chunks are disjoint; the last one done of a pair finds all of its scores (acquire below).
        unsafe {
            let (mut scratch, _) = self.scratch.open(&self.memory, self.scratch_at + ith * self.scratch.bytes);
            if prepared.replace(sparse_pair) != Some(sparse_pair) {
                lookup.pair.load_query(scratch.q);
                lookup.prepare(&mut scratch);
            }
            let Range { start, end } = part(lookup.n_cluster(), chunk, self.n_chunk);
            lookup.score(&mut scratch, start, end);
            if chunk == 0 {
                lookup.score_sinks(&mut scratch);
            }
            if self.progress.lookups[sparse_pair].is_last_score(self.n_chunk) {
                self.select(&lookup, &mut scratch);
            }
        }
    }

    /// Split: one part of a pair's cells.
    unsafe fn attend(&self, task: usize, ith: usize) {
        let (number, n) = (task / self.n_part, task % self.n_part);
        let pair = self.pair(self.single[number / self.n_head_kv()], number % self.n_head_kv());
        let p = pair.problem();
        let group = p.n_group();
        let sparse_pair = self.sparse_pair(pair.row, pair.head_kv);
        let lookup = self.lookup(pair, sparse_pair);
        if lookup.is_some() && !self.progress.lookups[sparse_pair].wait(&self.progress.failed) {
            return;
        }
        let partial = |n: usize| self.partials_at + (number * self.n_part + n) * partial_bytes(p);
        // SAFETY: a part's state is its task's own; the last one done of a pair may read all of them (acquire below).
        unsafe {
            let (mut scratch, merged) = self.scratch.open(&self.memory, self.scratch_at + ith * self.scratch.bytes);
            let state = |at: usize| State::over(self.memory.slice(at, group * (p.v.ne[0] + 2)), group);
            let mut own = state(partial(n));
            own.reset();
            pair.load_query(scratch.q);
            let cells = self.cells(lookup);
            let n_cut = self.n_part - self.call.selection.estimate as usize;
            match &cells {
                _ if n < n_cut => {
                    let range = |n: usize| if n < n_cut { part(cells.len(), n, n_cut) } else { 0..0 };
                    let part = Part { own: range(n), ahead: range(n + self.n_threads) };
                    attend(&pair, &cells, part, &mut scratch, &mut own);
                }
                Cells::Listed { lookup, kept, .. } => estimate(lookup, kept, &mut scratch, &mut own),
                Cells::All(_) => {}
            }
            if last(&self.progress.attended[number], self.n_part) {
                let mut all = state(merged);
                all.reset();
                (0..self.n_part).for_each(|n| all.merge(&state(partial(n))));
                all.finish(&pair);
            }
        }
    }

    /// Fused: all of a pair. Tasks of a KV head follow each other, so that its centroids stay in cache.
    unsafe fn whole(&self, task: usize, ith: usize) {
        let pair = self.pair(self.single[task % self.single.len()], task / self.single.len());
        let p = pair.problem();
        // SAFETY: scratch and space number `ith` are this thread's own.
        unsafe {
            let (mut scratch, at) = self.scratch.open(&self.memory, self.scratch_at + ith * self.scratch.bytes);
            pair.load_query(scratch.q);
            let lookup = self.lookup(pair, ith);
            let mut state = State::over(self.memory.slice(at, p.n_group() * (p.v.ne[0] + 2)), p.n_group());
            state.reset();
            if let (Some(lookup), Some(rule)) = (lookup, &self.rule) {
                let sight = Ruled(lookup);
                if let Some(choice) = rule.choose(&sight) {
                    let (keys, missed) = sight.attend(&**rule, choice, self.measured, &mut scratch, &mut state);
                    let progress = &self.progress.lookups[self.sparse_pair(pair.row, pair.head_kv)];
                    missed.into_iter().for_each(|missed| progress.miss(missed));
                    progress.select(keys as u32);
                    return state.finish(&pair);
                }
            }
            if let Some(lookup) = &lookup {
                lookup.prepare(&mut scratch);
                lookup.score(&mut scratch, 0, lookup.n_cluster());
                lookup.score_sinks(&mut scratch);
                self.select(lookup, &mut scratch);
            }
            let cells = self.cells(lookup);
            if let (Cells::Listed { lookup, kept, .. }, true) = (&cells, self.call.selection.estimate) {
                estimate(lookup, kept, &mut scratch, &mut state);
            }
            attend(&pair, &cells, Part { own: 0..cells.len(), ahead: 0..0 }, &mut scratch, &mut state);
            state.finish(&pair);
        }
    }
}

/// Bytes of a softmax state of a group, on cache lines of its own.
fn partial_bytes(p: &Problem) -> usize {
    (4 * p.n_group() * (p.v.ne[0] + 2)).next_multiple_of(64)
}

/// Part `i` of `n` of `0..len`.
fn part(len: usize, i: usize, n: usize) -> Range<usize> {
    len * i / n..len * (i + 1) / n
}
