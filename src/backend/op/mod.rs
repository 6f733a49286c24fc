//! One attention op for graphs that a host builds itself: a GGML_OP_CUSTOM node that the stock CPU backend runs on its own
//! threads, and a patched CUDA backend by other means (`node`, `super::cuda::nodes`). Nothing is searched for: the prefix's tokens lie in cells 0 to P of K and V, in order. But what lies there is
//! verified (`places`), and a node computes densely where it is something else (`run`).

mod buffers;
mod node;
mod places;
mod run;
#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use ggml_sys as sys;
use ggml_sys::Api;

use super::cuda::Calls;
use super::runtime::{count, enter, Scope};
use super::stats::Reason;
use super::tensor::{Inputs, Tensor};
use crate::attention::cpu::{check_problem, check_shape, Memory};
use crate::attention::{Array, Problem};
use crate::index::Index;
pub use buffers::{AttendError, Attended};
pub use node::{is_node, node, stock_node, Node};
use places::Place;
use run::{run_node, Runs};

/// How a context checks that K and V hold the prefix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpOptions {
    /// How far a row of K or V may be from the row that was indexed, relative to the usual norm, when means are compared: 0.03.
    /// For a prefix that was processed token by token and indexed from batches 0.12 (docs/op.md).
    pub tolerance: f32,
    /// Runs in which every clustered token is compared once, in turn. An edit of one is found within so many runs, in half as
    /// many on average; that of the last one always at once. 1: every token in every run, at about the cost of dense attention.
    pub round: usize,
    /// Caches of one layer (sequences, streams) that are known at a time, at 8 bytes per clustered token; one that was longest
    /// not used makes room, and is verified anew when it comes back.
    pub max_places: usize,
}

impl Default for OpOptions {
    fn default() -> Self {
        OpOptions { tolerance: 0.03, round: 512, max_places: 32 }
    }
}

/// What the nodes of [`attn_ext`] need when they are run: it must live as long as any graph with such a node may. Graphs may be
/// rebuilt without end: what is kept is one state per index and layer.
pub struct OpContext {
    shared: Arc<Shared>,
    // boxed: nodes hold their addresses
    #[allow(clippy::vec_box)]
    states: Mutex<Vec<Box<State>>>,
    calls: Mutex<Vec<Calls>>,
}

/// What all states of a context have in common.
struct Shared {
    scope: Arc<Scope>,
    options: OpOptions,
    runs: Runs,
    /// One for each node that is run at a time.
    memory: Mutex<Vec<Memory>>,
    pool: buffers::Pool,
    #[cfg(test)]
    panics: std::sync::atomic::AtomicUsize,
}

/// User data of the nodes of one index and layer.
struct State {
    shared: Arc<Shared>,
    index: Arc<Index>,
    layer: u32,
    /// 0 to P.
    cells: Arc<[u32]>,
    /// Sinks and tail, and the number of cells that they are for.
    always: Mutex<(usize, Arc<[u32]>)>,
    places: Mutex<Vec<Place>>,
    /// What caches on a GPU were verified under.
    generation: Arc<AtomicU64>,
}

/// Has a node been made in this process?
static MADE: AtomicBool = AtomicBool::new(false);

/// May a graph hold nodes of the attention op?
pub fn is_in_use() -> bool {
    MADE.load(Ordering::Relaxed)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl OpContext {
    /// `scope`: settings and totals of the nodes.
    pub fn new(scope: Arc<Scope>, options: OpOptions) -> OpContext {
        let shared = Shared {
            scope,
            options,
            runs: Runs::default(),
            memory: Mutex::default(),
            pool: buffers::Pool::default(),
            #[cfg(test)]
            panics: Default::default(),
        };
        OpContext { shared: Arc::new(shared), states: Mutex::default(), calls: Mutex::default() }
    }

    /// Every cache is verified in full when it is next used: for a host that has changed K or V of a prefix.
    pub fn forget(&self) {
        lock(&self.states).iter().for_each(|state| {
            lock(&state.places).clear();
            state.generation.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Drops what is kept for an index.
    ///
    /// # Safety
    /// No graph with a node of this index is run any more.
    pub unsafe fn release(&self, index: &Arc<Index>) {
        lock(&self.states).retain(|state| !Arc::ptr_eq(&state.index, index));
    }

    /// States kept, and caches known to them.
    pub fn n_kept(&self) -> (usize, usize) {
        let states = lock(&self.states);
        (states.len(), states.iter().map(|state| lock(&state.places).len()).sum())
    }

    /// Address of the state of an index's layer.
    fn state(&self, index: &Arc<Index>, layer: u32) -> *const State {
        let mut states = lock(&self.states);
        let mut same = states.iter().filter(|state| Arc::ptr_eq(&state.index, index)).peekable();
        let cells = same.peek().map(|state| state.cells.clone());
        if let Some(state) = same.find(|state| state.layer == layer) {
            return &raw const **state;
        }
        let cells = cells.unwrap_or_else(|| (0..index.meta().n_prefix() as u32).collect());
        let (shared, index) = (self.shared.clone(), index.clone());
        let (always, places) = (Mutex::new((0, Arc::default())), Mutex::default());
        let generation = Arc::default();
        states.push(Box::new(State { shared, index, layer, cells, always, places, generation }));
        &raw const **states.last().expect("just pushed")
    }
}

/// Tensors of an attention op, in ggml's layouts: `q` F32 `[head_dim_k, n_query, n_head, n_stream]`, `k` and `v`
/// `[head_dim, n_kv, n_head_kv, n_stream]`, `mask` null or F16 `[n_kv, >= n_query, 1 or n_head, 1 or n_stream]`, contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub q: *mut sys::ggml_tensor,
    pub k: *mut sys::ggml_tensor,
    pub v: *mut sys::ggml_tensor,
    pub mask: *mut sys::ggml_tensor,
}

/// Makes an attention node, as `ggml_flash_attn_ext` does: the result is F32 `[head_dim_v, n_head, n_query, n_stream]`.
///
/// Where layer `layer` of the index fits the call, it is a GGML_OP_CUSTOM node: each stream's first P cells of K and V must hold
/// the index's prefix in order; a query row that its mask shows all of them with the value 0 attends to what is selected of
/// them and to all else that it sees, if they do hold it. All other rows are dense. Where it is known beforehand that every row
/// is dense (the layer is not in the index or has another shape, fewer than P cells, ALiBi, a head size or type that our kernels
/// do not take) it is a plain GGML_OP_FLASH_ATTN_EXT node, counted by reason when it is made.
///
/// # Errors
/// What `ggml_flash_attn_ext` would abort the process for, a null pointer, or another ggml than this build is made for.
///
/// # Safety
/// `ctx` is a live ggml context with room for a tensor, and the tensors are live; `context` outlives every graph with the node.
#[allow(clippy::too_many_arguments)]
pub unsafe fn attn_ext(
    context: &OpContext,
    ctx: *mut sys::ggml_context,
    source: Source,
    scale: f32,
    max_bias: f32,
    softcap: f32,
    index: &Arc<Index>,
    layer: u32,
) -> Result<*mut sys::ggml_tensor, String> {
    // SAFETY: null, or live by contract.
    let [q, k, v, mask] = [source.q, source.k, source.v, source.mask].map(|t| unsafe { Tensor::new(t) });
    let (false, Some(q), Some(k), Some(v)) = (ctx.is_null(), q, k, v) else {
        return Err("the attention op: the context, q, k or v is null: only the mask may be".to_string());
    };
    let api = Api::of_process()?;
    let (Some(custom), Some(flash)) = (api.ggml_custom_4d, api.ggml_flash_attn_ext) else {
        return Err("the attention op: the host's ggml has no ggml_custom_4d or no ggml_flash_attn_ext".to_string());
    };
    let inputs = Inputs { q, k, v, mask, sinks: None };
    check_inputs(&inputs, max_bias, api).map_err(|why| format!("the attention op of layer {layer}: {why}"))?;
    let numbers = [scale, max_bias, softcap];
    let ne = [v.ne()[0], q.ne()[2], q.ne()[1], q.ne()[3]];
    if let Err(reason) = problem_of(inputs, ne, numbers).and_then(|p| sparse_at_all(&p, index, layer)) {
        let _entered = enter(&context.shared.scope);
        count(|s| s.dense(reason));
        // SAFETY: the contract; what ggml asserts was checked.
        return Ok(unsafe { flash(ctx, source.q, source.k, source.v, source.mask, scale, max_bias, softcap) });
    }
    let mut sources = [source.q, source.k, source.v, source.mask];
    let n_source = if mask.is_some() { 4 } else { 3 };
    let state: *mut c_void = context.state(index, layer).cast_mut().cast();
    let [n0, n1, n2, n3] = ne.map(|n| n as i64);
    let (to, n_tasks, run) = (sources.as_mut_ptr(), sys::GGML_N_TASKS_MAX, Some(run_node as _));
    // SAFETY: the contract; the state lives as long as the context does.
    let node = unsafe { custom(ctx, sys::GGML_TYPE_F32, n0, n1, n2, n3, to, n_source, run, n_tasks, state) };
    // SAFETY: a node that was just made.
    unsafe { set_numbers(&mut *node, numbers) };
    MADE.store(true, Ordering::Relaxed);
    Ok(node)
}

/// Where a custom node's `op_params` are free: ggml has put callback, number of tasks and user data before it.
const NUMBERS_AT: usize = size_of::<sys::ggml_custom_op_params>().div_ceil(4);

/// Scale, max_bias and softcap travel in the node itself, so that a graph that is built anew leaves nothing behind.
fn set_numbers(node: &mut sys::ggml_tensor, numbers: [f32; 3]) {
    let free = &mut node.op_params[NUMBERS_AT..NUMBERS_AT + 3];
    free.iter_mut().zip(numbers).for_each(|(to, x)| *to = x.to_bits() as i32);
}

fn numbers(node: Tensor) -> [f32; 3] {
    [0, 1, 2].map(|i| f32::from_bits(node.raw().op_params[NUMBERS_AT + i] as u32))
}

/// The call as it will be, with a contiguous result of extents `ne`.
fn problem_of(inputs: Inputs, ne: [usize; 4], numbers: [f32; 3]) -> Result<Problem, Reason> {
    let nb = [4, 4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2]];
    inputs.problem(Array { data: std::ptr::null_mut(), ne, nb }, numbers)
}

/// May a row of the call be sparse?
fn sparse_at_all(problem: &Problem, index: &Index, layer: u32) -> Result<(), Reason> {
    check_problem(problem).map_err(|_| Reason::Kernel)?;
    let shape = index.layer(layer).ok_or(Reason::Layer)?.shape;
    check_shape(problem, &shape).map_err(|_| Reason::Shape)?;
    match problem.max_bias != 0.0 {
        true => Err(Reason::Alibi),
        false if problem.k.ne[1] < index.meta().n_prefix() => Err(Reason::Unbound),
        false => Ok(()),
    }
}

/// What `ggml_flash_attn_ext` and the CPU backend assert.
fn check_inputs(inputs: &Inputs, max_bias: f32, api: &Api) -> Result<(), String> {
    let Inputs { q, k, v, mask, .. } = inputs;
    let [dk, n_query, n_head, n_stream] = q.ne();
    let [_, n_kv, n_head_kv, _] = k.ne();
    if !q.is_f32() || q.raw().nb[0] != 4 {
        return Err("q must be F32, contiguous in dimension 0".to_string());
    }
    for (what, t) in [("k", k), ("v", v)] {
        // SAFETY: the type of a live tensor.
        if t.raw().nb[0] != unsafe { (api.ggml_type_size)(t.raw().type_) } {
            return Err(format!("{what} is not contiguous in dimension 0: is it transposed?"));
        }
    }
    for (what, dim, got, want) in [
        ("k", 0, k.ne()[0], dk),
        ("k", 3, k.ne()[3], n_stream),
        ("v", 1, v.ne()[1], n_kv),
        ("v", 2, v.ne()[2], n_head_kv),
        ("v", 3, v.ne()[3], n_stream),
    ] {
        if got != want {
            return Err(format!("{what} has {got} elements in dimension {dim}, the others need {want}"));
        }
    }
    if n_head_kv == 0 || n_head % n_head_kv != 0 {
        return Err(format!("{n_head} query heads are no multiple of {n_head_kv} KV heads"));
    }
    let Some(mask) = mask else {
        return if max_bias > 0.0 { Err("ALiBi (max_bias above 0) needs a mask".to_string()) } else { Ok(()) };
    };
    let ([m0, m1, m2, m3], nb) = (mask.ne(), mask.raw().nb);
    if !mask.is_f16() || nb != [2, 2 * m0, 2 * m0 * m1, 2 * m0 * m1 * m2] {
        return Err("the mask must be F16 and contiguous".to_string());
    }
    if m0 < n_kv || m1 < n_query || m2 == 0 || m3 == 0 || n_head % m2 != 0 || n_stream % m3 != 0 {
        return Err(format!(
            "a mask of [{m0}, {m1}, {m2}, {m3}] does not fit {n_kv} cells, {n_query} queries, {n_head} heads and \
             {n_stream} streams"
        ));
    }
    Ok(())
}
