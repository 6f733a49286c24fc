//! Decides, node by node, what of a graph is computed sparse, and makes the graph that the stock CPU backend computes
//! instead: each sparse FLASH_ATTN_EXT becomes a GGML_OP_CUSTOM node, run by ggml's own threads.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use ggml_sys as sys;

use super::cache::{Caches, Writes, MAX_SEARCHES};
use super::layers::ends;
use super::runtime::{count, stats, Loaded, Snapshot};
use super::stats::{log, Reason};
use super::tensor::{problem, Half, Tensor};
use crate::attention::cpu::{Memory, Plan};
use crate::attention::{cut, runs, Array, Binding, Call, Problem, Rotation, Row};
use crate::hadamard;

/// Rows of one sequence from which they are tiles. In time tiles pay from about 4 rows on (benches/prefill.rs); but a draft
/// to be verified is decode, which shall lose no quality, and has up to 17 rows with llama.cpp's defaults.
const PREFILL_ROWS: usize = 18;

/// What a custom node does.
enum Work {
    Attend(Arc<Plan>),
    /// Zeros: what attention would cost if it were free (bench).
    Zero(Array),
}

/// User data of a custom node; lives in [`Rewrite`] until the graph is done.
pub struct Stage {
    work: Work,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// A kernel panicked: the graph's result must not be used.
    failed: AtomicBool,
    n_threads: AtomicUsize,
}

/// A graph with sparse nodes replaced, and what it needs to stay alive.
pub struct Rewrite {
    pub nodes: Vec<*mut sys::ggml_tensor>,
    // boxed: the graph and the nodes keep their addresses
    #[allow(clippy::vec_box)]
    custom: Vec<Box<sys::ggml_tensor>>,
    #[allow(clippy::vec_box)]
    stages: Vec<Box<Stage>>,
    plans: Vec<(Arc<Plan>, bool)>,
    shared: Arc<Shared>,
}

/// State of one backend instance.
pub struct Instance {
    caches: Caches,
    n_threads: usize,
    /// Of all plans: ggml's nodes run one after the other.
    memory: Memory,
}

impl Default for Instance {
    fn default() -> Self {
        let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Instance { caches: Caches::default(), n_threads, memory: Memory::default() }
    }
}

/// Rows of all nodes that share one mask and one place in the cache.
struct Rows {
    key: (usize, usize, usize),
    rows: Arc<[Row]>,
    tiles: Arc<[Range<usize>]>,
    bindings: Arc<[Binding]>,
    /// Number of the loaded index behind each binding.
    index_numbers: Vec<usize>,
}

unsafe extern "C" fn run_stage(_dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int, data: *mut c_void) {
    // SAFETY: `data` is a Stage of a Rewrite that outlives the graph's computation.
    let stage = unsafe { &*data.cast::<Stage>() };
    let (ith, nth) = (ith as usize, nth as usize);
    stage.shared.n_threads.store(nth, Ordering::Relaxed);
    let run = AssertUnwindSafe(|| match &stage.work {
        // SAFETY: ggml calls every thread of a node once and puts a barrier between nodes; tensors are live.
        Work::Attend(plan) => unsafe { plan.run(ith, nth) },
        Work::Zero(dst) => zero(dst, ith, nth),
    });
    if catch_unwind(run).is_err() {
        stage.shared.failed.store(true, Ordering::Relaxed);
    }
}

fn zero(dst: &Array, ith: usize, nth: usize) {
    let [n0, n1, n2, n3] = dst.ne;
    for r in (ith..n1 * n2 * n3).step_by(nth) {
        let (i1, i2, i3) = (r % n1, r / n1 % n2, r / n1 / n2);
        // SAFETY: a row of the node's own output, inside its extents.
        unsafe {
            let row = dst.data.add(i1 * dst.nb[1] + i2 * dst.nb[2] + i3 * dst.nb[3]);
            std::ptr::write_bytes(row, 0, n0 * 4);
        }
    }
}

impl Rewrite {
    fn new() -> Rewrite {
        Rewrite { nodes: Vec::new(), custom: Vec::new(), stages: Vec::new(), plans: Vec::new(), shared: Arc::default() }
    }

    fn push(&mut self, node: &sys::ggml_tensor, work: Work) {
        let mut stage = Box::new(Stage { work, shared: self.shared.clone() });
        let parameters = sys::ggml_custom_op_params {
            fun: Some(run_stage),
            n_tasks: sys::GGML_N_TASKS_MAX,
            userdata: (&mut *stage as *mut Stage).cast(),
        };
        let mut custom = Box::new(*node);
        custom.op = sys::GGML_OP_CUSTOM;
        custom.op_params.fill(0);
        // SAFETY: op_params is 64 bytes, aligned for pointers by the fields before it is not promised: copied as bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (&raw const parameters).cast::<u8>(),
                custom.op_params.as_mut_ptr().cast::<u8>(),
                size_of_val(&parameters),
            );
        }
        self.nodes.push(&mut *custom);
        self.custom.push(custom);
        self.stages.push(stage);
    }

    fn push_plan(&mut self, node: &sys::ggml_tensor, plan: Plan, forced: bool) {
        let plan = Arc::new(plan);
        self.push(node, Work::Attend(plan.clone()));
        self.plans.push((plan, forced));
    }

    /// Books what was computed; false if a kernel failed and the result must not be used.
    pub fn finish(&self, instance: &mut Instance) -> bool {
        match self.shared.n_threads.load(Ordering::Relaxed) {
            0 => {}
            n => instance.n_threads = n,
        }
        count(|s| {
            for (plan, forced) in &self.plans {
                if !forced {
                    let kept = plan.kept();
                    s.add_kept(kept.share_sum, kept.count);
                    s.add_missed(kept.missed_sum, kept.missed_count);
                }
            }
        });
        !self.shared.failed.load(Ordering::Relaxed)
    }
}

/// Does a mask of 0 show a cell?
pub fn shown(bits: u16) -> bool {
    bits & 0x7fff == 0
}

/// Runs of rows of one sequence, cut into tiles of at most `tile` rows. `seen` gives a row's mask.
pub fn tiles<'a>(rows: &[Row], n_query: usize, tile: usize, seen: impl Fn(usize) -> &'a [u16]) -> Vec<Range<usize>> {
    let mut tiles = Vec::new();
    if tile < 2 {
        return tiles;
    }
    for run in runs(rows, n_query) {
        // A token sees what the token before it in its sequence sees; one of another sequence does not see that token.
        let follows = |row: usize| {
            let (before, own) = (seen(row - 1), seen(row));
            before.iter().zip(own).all(|(before, own)| shown(*own) | !shown(*before))
        };
        let mut start = run.start;
        for end in run.start + 1..=run.end {
            if end == run.end || !follows(end) {
                if end - start >= PREFILL_ROWS {
                    // The next token comes from the last row's output: it selects for itself.
                    tiles.extend(cut(start..end - 1, tile));
                }
                start = end;
            }
        }
    }
    tiles
}

/// Is this a quantised cache that llama.cpp was told not to rotate? Then its rows are not what an index's sketch is of.
pub(super) fn unrotated(problem: &Problem, snapshot: &Snapshot) -> bool {
    static DISABLED: OnceLock<bool> = OnceLock::new();
    let read = || std::env::var("LLAMA_ATTN_ROT_DISABLE").is_ok_and(|v| v.trim().parse::<i32>().is_ok_and(|n| n != 0));
    let turned = |l: &Loaded| l.matcher.rotation(problem.k_type, problem.v_type) != Rotation::default();
    *DISABLED.get_or_init(read) && snapshot.indexes.iter().any(turned)
}

impl Instance {
    /// Bindings must be found anew.
    pub fn forget(&mut self) {
        self.caches.bound.clear();
    }

    /// The graph to compute instead of `graph`, or `None` where nothing is ours: then the caller passes it through as it is.
    pub fn rewrite(&mut self, graph: &[*mut sys::ggml_tensor], snapshot: &Snapshot) -> Option<Rewrite> {
        let config = &snapshot.config;
        if config.disable {
            // writes pass unseen from here on
            self.forget();
            return None;
        }
        if !(config.force || config.attention_free || !snapshot.indexes.is_empty()) {
            return None;
        }
        // SAFETY: nodes of the graph that ggml hands us to compute.
        let nodes: Vec<Tensor> = graph.iter().filter_map(|&n| unsafe { Tensor::new(n) }).collect();
        if nodes.len() != graph.len() {
            return None;
        }
        let writes = self.survey(&nodes, snapshot);
        if !nodes.iter().any(Tensor::is_flash_attention) {
            return None;
        }
        count(|s| s.graphs += 1);
        let before = (config.log > 1).then(stats);
        let mut rewrite = Rewrite::new();
        let mut known: Vec<Rows> = Vec::new();
        let mut searches = 0;
        for (&raw, node) in graph.iter().zip(&nodes) {
            if !node.is_flash_attention() {
                rewrite.nodes.push(raw);
                continue;
            }
            match self.replace(*node, snapshot, &writes, &mut known, &mut searches, &mut rewrite) {
                Ok(()) => {}
                Err(reason) => {
                    count(|s| s.dense(reason));
                    rewrite.nodes.push(raw);
                }
            }
        }
        if let Some(before) = before {
            let q = nodes.iter().find(|n| n.is_flash_attention()).and_then(|n| n.src(0));
            log(stats().graph_line(&before, q.map_or(0, |q| q.ne()[1] * q.ne()[3])));
        }
        (!rewrite.custom.is_empty()).then_some(rewrite)
    }

    /// Learns the cache tensors of the graph and what it writes to them, and drops bindings that no longer hold.
    fn survey(&mut self, nodes: &[Tensor], snapshot: &Snapshot) -> Writes {
        let mut writes = Writes::default();
        let mut seen = Vec::new();
        let mut index_tensors = Vec::new();
        for node in nodes {
            let indexed = |layer: u32| snapshot.indexes.iter().any(|l| l.matcher.index.layer(layer).is_some());
            if node.is_flash_attention() {
                for root in [node.src(1), node.src(2)].into_iter().flatten().map(|t| t.root()) {
                    seen.extend(root.cache_layer().map(|(layer, half)| (layer, half, root)));
                }
                continue;
            }
            if node.is_alias() {
                continue;
            }
            let root = node.root();
            let Some((layer, half)) = root.cache_layer() else { continue };
            seen.push((layer, half, root));
            if !indexed(layer) {
                continue;
            }
            let indices = if node.is_set_rows() { node.src(1) } else { None };
            match indices {
                Some(t) if index_tensors.contains(&t.address()) => {}
                Some(t) if half == Half::K && t.is_leaf() => match t.indices() {
                    Some(rows) => {
                        index_tensors.push(t.address());
                        writes.rows.extend(rows);
                    }
                    None => writes.opaque = true,
                },
                // V rows go where K rows go
                Some(_) if half == Half::V => {}
                _ => writes.opaque = true,
            }
        }
        if let Some(layers) = ends(&seen) {
            self.caches.begin(layers, snapshot);
        }
        for (layer, half, root) in seen {
            let (k, v) = if half == Half::K { (Some(root), None) } else { (None, Some(root)) };
            self.caches.see(layer, k, v);
        }
        self.caches.check(snapshot, &writes);
        writes
    }

    fn replace(
        &mut self,
        node: Tensor,
        snapshot: &Snapshot,
        writes: &Writes,
        known: &mut Vec<Rows>,
        searches: &mut usize,
        rewrite: &mut Rewrite,
    ) -> Result<(), Reason> {
        if snapshot.config.attention_free {
            rewrite.push(node.raw(), Work::Zero(node.array()));
            return Ok(());
        }
        let problem = problem(node)?;
        if snapshot.config.force {
            let plan = Plan::forced(problem, self.n_threads, &mut self.memory).map_err(|_| Reason::Kernel)?;
            rewrite.push_plan(node.raw(), plan, true);
            count(|s| s.nodes_forced += 1);
            return Ok(());
        }
        let k = node.src(1).ok_or(Reason::Shape)?;
        let root = k.root();
        let Some((layer, Half::K)) = root.cache_layer() else { return Err(Reason::NoCache) };
        if snapshot.indexes.iter().all(|l| l.matcher.index.layer(layer).is_none()) {
            return Err(Reason::Layer);
        }
        if problem.max_bias != 0.0 {
            return Err(Reason::Alibi);
        }
        if unrotated(&problem, snapshot) {
            return Err(Reason::Basis);
        }
        let mask = node.src(3).ok_or(Reason::Mask)?;
        let first_stream = k.offset_in(root) / root.raw().nb[2].max(1);
        let key = (mask.address(), first_stream, problem.k.ne[1]);
        let at = match known.iter().position(|r| r.key == key) {
            Some(at) => at,
            None => {
                let rows = self.rows(key, mask, &problem, snapshot, writes, searches)?;
                known.push(rows);
                known.len() - 1
            }
        };
        let Rows { rows, tiles, bindings, index_numbers, .. } = &known[at];
        let Some(&number) = index_numbers.first() else { return Err(Reason::Unbound) };
        if bindings.iter().any(|b| b.index.layer(layer).is_none()) {
            return Err(Reason::Layer);
        }
        let loaded = &snapshot.indexes[number];
        let (selection, rotation) = (loaded.selection, loaded.matcher.rotation(problem.k_type, problem.v_type));
        if !(hadamard::fits(rotation.k, problem.k.ne[0]) && hadamard::fits(rotation.v, problem.v.ne[0])) {
            return Err(Reason::Shape);
        }
        let (rows_of_call, tiles, bindings) = (rows.clone(), tiles.clone(), bindings.clone());
        let call = Call { problem, layer, rows: rows_of_call, tiles, bindings, selection, rotation };
        let plan = match &snapshot.config.rule {
            None => Plan::new(call, self.n_threads, &mut self.memory),
            Some(rule) => Plan::ruled(call, self.n_threads, &mut self.memory, rule.0.clone()),
        };
        let plan = plan.map_err(|_| Reason::Kernel)?;
        let plan = if snapshot.config.measure { plan.measured() } else { plan };
        rewrite.push_plan(node.raw(), plan, false);
        count(|s| {
            s.nodes_sparse += 1;
            s.rows_sparse += rows.iter().filter(|r| **r != Row::Dense).count() as u64;
        });
        Ok(())
    }

    /// Which query rows see a whole bound prefix; looks for new bindings where none is seen.
    fn rows(
        &mut self,
        key: (usize, usize, usize),
        mask: Tensor,
        problem: &Problem,
        snapshot: &Snapshot,
        writes: &Writes,
        searches: &mut usize,
    ) -> Result<Rows, Reason> {
        let array = problem.mask.ok_or(Reason::Mask)?;
        let (n_kv, n_query, n_stream) = (problem.k.ne[1], problem.q.ne[1], problem.q.ne[3]);
        // rows are read now, before the graph runs: the mask must be an input, one for all heads
        if !mask.is_leaf() || array.ne[0] < n_kv || array.ne[1] < n_query || array.ne[2] != 1 || array.nb[0] != 2 {
            return Err(Reason::Mask);
        }
        let shortest = snapshot.indexes.iter().map(|l| l.matcher.index.meta().n_prefix()).min().unwrap_or(usize::MAX);
        // SAFETY: row i1 of the mask of stream i3, n_kv F16 elements inside its extents (checked above).
        let seen = |i1: usize, i3: usize| -> &[u16] {
            unsafe {
                let row = array.data.add(i1 * array.nb[1] + (i3 % array.ne[3].max(1)) * array.nb[3]);
                std::slice::from_raw_parts(row.cast(), n_kv)
            }
        };
        let mut rows = Vec::with_capacity(n_query * n_stream);
        let mut used: Vec<usize> = Vec::new();
        for i3 in 0..n_stream {
            let stream = key.1 + i3;
            for i1 in 0..n_query {
                let found = self.row(seen(i1, i3), stream, shortest, snapshot, writes, searches);
                rows.push(match found {
                    None => Row::Dense,
                    Some(b) => Row::Sparse(used.iter().position(|&u| u == b).unwrap_or_else(|| {
                        used.push(b);
                        used.len() - 1
                    }) as u32),
                });
            }
        }
        // one call has one selection and one basis: rows of an index with others than the first's stay dense
        let of = |u: usize| {
            let loaded = &snapshot.indexes[self.caches.bound[u].index_number];
            (loaded.selection, loaded.matcher.rotation(problem.k_type, problem.v_type))
        };
        let differs: Vec<bool> = used.iter().map(|&u| of(u) != of(used[0])).collect();
        for row in &mut rows {
            if matches!(row, Row::Sparse(n) if differs[*n as usize]) {
                *row = Row::Dense;
            }
        }
        let bindings: Vec<Binding> = used.iter().map(|&b| self.caches.binding(b, snapshot, n_kv)).collect();
        let index_numbers = used.iter().map(|&b| self.caches.bound[b].index_number).collect();
        let tiles = tiles(&rows, n_query, snapshot.config.tile, |row| seen(row % n_query, row / n_query)).into();
        Ok(Rows { key, rows: rows.into(), tiles, bindings: bindings.into(), index_numbers })
    }

    fn row(
        &mut self,
        seen: &[u16],
        stream: usize,
        shortest: usize,
        snapshot: &Snapshot,
        writes: &Writes,
        searches: &mut usize,
    ) -> Option<usize> {
        let sees_all = |b: &super::cache::Bound| {
            if b.contiguous {
                let (from, to) = (b.cells[0] as usize, b.cells[b.cells.len() - 1] as usize);
                seen.get(from..=to).is_some_and(|cells| cells.iter().all(|&bits| shown(bits)))
            } else {
                b.cells.iter().all(|&c| seen.get(c as usize).is_some_and(|&bits| shown(bits)))
            }
        };
        let min_prefix = snapshot.config.min_prefix_cpu();
        let usable = |b: &super::cache::Bound| b.stream == stream && b.cells.len() >= min_prefix && sees_all(b);
        let number = |i: usize| self.caches.bound[i].index_number;
        let bound = (0..self.caches.bound.len()).filter(|&i| usable(&self.caches.bound[i]));
        // indexes are in order of length, the longest first
        let found = bound.min_by_key(|&i| number(i));
        let n_index = found.map_or(snapshot.indexes.len(), number);
        if n_index == 0 || *searches >= MAX_SEARCHES || writes.opaque {
            return found;
        }
        let n_seen = seen.iter().filter(|&&bits| shown(bits)).count();
        if n_seen < shortest {
            return found;
        }
        if let Some(i) = found {
            // A longer index can fit once cells enough for it are there and no longer being written: then it is looked for.
            let bound = &mut self.caches.bound[i];
            let being_written = |&cell: &usize| seen.get(cell).is_some_and(|&bits| shown(bits));
            let n_settled = n_seen - writes.cells(bound.n_cell(), stream).filter(being_written).count();
            let tried = std::mem::replace(&mut bound.tried, n_settled);
            let fits_now = |l: &Loaded| (tried + 1..=n_settled).contains(&l.matcher.index.meta().n_prefix());
            if !snapshot.indexes[..n_index].iter().any(fits_now) {
                return found;
            }
        }
        let visible: Vec<u32> = (0..seen.len() as u32).filter(|&c| shown(seen[c as usize])).collect();
        *searches += 1;
        self.caches.search(snapshot, n_index, stream, &visible, writes).or(found)
    }
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "graph_threads_tests.rs"]
mod threads_tests;
