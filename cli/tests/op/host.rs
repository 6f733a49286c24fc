//! A host with graphs of its own: tensors of random but clustered keys, an index of them, and a graph with one attention node
//! on ggml's CPU backend.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Once};

use ggml_squeeze::attention::cpu::{Memory, Options, Plan, Schedule};
use ggml_squeeze::attention::*;
use ggml_squeeze::backend::{attn_ext, OpContext, OpOptions, Scope, Source, Stats};
use ggml_squeeze::build::{self, LayerCapture, Settings};
use ggml_squeeze::config::{Config, ModeSetting};
use ggml_squeeze::index::sample::sample_parts;
use ggml_squeeze::index::{to_bytes, Index, IndexParts};
use ggml_squeeze::random::split_mix;
use half::f16;
use llama_cpp_sys_2 as sys;
pub use sqz::llama::type_number as type_of;

pub const LAYER: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Masked {
    No,
    /// One mask for all heads; some rows do not see all of the prefix, and no row all of the rest.
    Shared,
    PerHead,
    /// Every row sees every cell.
    Open,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub dk: usize,
    pub dv: usize,
    pub group: usize,
    pub n_head_kv: usize,
    pub n_query: usize,
    pub n_stream: usize,
    pub n_prefix: usize,
    pub n_kv: usize,
    pub k_type: Element,
    pub v_type: Element,
    pub softcap: f32,
    pub masked: Masked,
    /// All heads of a cell together, as llama.cpp has them.
    pub cell_major: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            seed: 1,
            dk: 64,
            dv: 64,
            group: 3,
            n_head_kv: 2,
            n_query: 2,
            n_stream: 1,
            n_prefix: 400,
            n_kv: 450,
            k_type: Element::F16,
            v_type: Element::F16,
            softcap: 0.0,
            masked: Masked::Open,
            cell_major: true,
        }
    }
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        (split_mix(&mut self.0) % n as u64) as usize
    }
    /// -1 to 1.
    pub fn unit(&mut self) -> f32 {
        (split_mix(&mut self.0) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    pub fn row(&mut self, d: usize, size: f32) -> Vec<f32> {
        (0..d).map(|_| size * self.unit()).collect()
    }
}

pub fn encode(row: &[f32], kind: sys::ggml_type) -> Vec<u8> {
    // SAFETY: the buffer holds the row in its type.
    unsafe {
        let mut out = vec![0u8; sys::ggml_row_size(kind, row.len() as i64)];
        sys::ggml_quantize_chunk(kind, row.as_ptr(), out.as_mut_ptr().cast(), 0, 1, row.len() as i64, std::ptr::null());
        out
    }
}

/// K or V of all streams, in the plain: `[stream][cell][head][d]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    pub d: usize,
    pub heads: usize,
    pub n_kv: usize,
    pub data: Vec<f32>,
}

impl Rows {
    /// Cells below `n_prefix` are of few kinds and the same in every stream.
    fn new(r: &mut Random, spec: &Spec, d: usize) -> Rows {
        let kinds: Vec<Vec<f32>> = (0..12 * spec.n_head_kv).map(|_| r.row(d, 2.0)).collect();
        let mut prefix = Vec::new();
        for _ in 0..spec.n_prefix {
            let kind = r.below(12);
            for h in 0..spec.n_head_kv {
                let noise = r.row(d, 1.0);
                prefix.extend(kinds[h * 12 + kind].iter().zip(noise).map(|(a, b)| a + b));
            }
        }
        let mut data = Vec::new();
        for _ in 0..spec.n_stream {
            data.extend(&prefix);
            data.extend(r.row((spec.n_kv - spec.n_prefix) * spec.n_head_kv * d, 2.0));
        }
        Rows { d, heads: spec.n_head_kv, n_kv: spec.n_kv, data }
    }

    pub fn row(&mut self, stream: usize, cell: usize, head: usize) -> &mut [f32] {
        let at = ((stream * self.n_kv + cell) * self.heads + head) * self.d;
        &mut self.data[at..at + self.d]
    }

    /// The prefix of stream 0 as an index is made of it.
    fn prefix(&self, n_prefix: usize) -> Vec<f16> {
        self.data[..n_prefix * self.heads * self.d].iter().map(|x| f16::from_f32(*x)).collect()
    }

    /// As a tensor's bytes.
    fn bytes(&self, kind: sys::ggml_type, cell_major: bool) -> Vec<u8> {
        if cell_major {
            return self.data.chunks(self.d).flat_map(|row| encode(row, kind)).collect();
        }
        let n_stream = self.data.len() / (self.n_kv * self.heads * self.d);
        let mut out = Vec::new();
        for (s, h) in (0..n_stream).flat_map(|s| (0..self.heads).map(move |h| (s, h))) {
            for cell in 0..self.n_kv {
                let at = ((s * self.n_kv + cell) * self.heads + h) * self.d;
                out.extend(encode(&self.data[at..at + self.d], kind));
            }
        }
        out
    }
}

/// Numbers of a case.
#[derive(Clone)]
pub struct Data {
    pub spec: Spec,
    pub q: Vec<f32>,
    pub k: Rows,
    pub v: Rows,
    pub mask: Vec<f16>,
    /// Rows that see all of the prefix.
    pub sees: Vec<bool>,
}

impl Data {
    pub fn new(spec: &Spec) -> Data {
        let r = &mut Random(spec.seed);
        let (k, v) = (Rows::new(r, spec, spec.dk), Rows::new(r, spec, spec.dv));
        let n_head = spec.group * spec.n_head_kv;
        let q = r.row(spec.n_stream * spec.n_query * n_head * spec.dk, 3.0);
        let n_row = spec.n_stream * spec.n_query;
        let (mut mask, mut sees) = (Vec::new(), vec![true; n_row]);
        let heads = if spec.masked == Masked::PerHead { n_head } else { 1 };
        // [stream][head][query][cell]
        for (s, _, query) in (0..spec.n_stream)
            .flat_map(|s| (0..heads * spec.n_query).map(move |i| (s, i / spec.n_query, i % spec.n_query)))
        {
            let mut row = vec![f16::ZERO; spec.n_kv];
            if matches!(spec.masked, Masked::Shared | Masked::PerHead) {
                for cell in &mut row[spec.n_prefix..] {
                    *cell = [f16::ZERO, f16::NEG_INFINITY, f16::from_f32(-0.5)][r.below(3)];
                }
                if r.below(3 * heads) == 0 {
                    row[r.below(spec.n_prefix)] = [f16::NEG_INFINITY, f16::from_f32(0.25)][r.below(2)];
                    sees[s * spec.n_query + query] = false;
                }
            }
            mask.extend(row);
        }
        Data { spec: spec.clone(), q, k, v, mask, sees }
    }

    /// An index of the prefix, as it is in stream 0.
    pub fn index(&self) -> Arc<Index> {
        let spec = &self.spec;
        let settings = Settings { n_sink: 4, n_window: 20, iterations: 3, n_threads: 1, ..Settings::default() };
        let capture = LayerCapture {
            layer: LAYER,
            n_head_kv: spec.n_head_kv as u32,
            n_group: spec.group as u32,
            head_dim_k: spec.dk as u32,
            head_dim_v: spec.dv as u32,
            scale: scale(spec),
            k: self.k.prefix(spec.n_prefix),
            v: self.v.prefix(spec.n_prefix),
            q: Random(spec.seed ^ 77).row(20 * spec.group * spec.n_head_kv * spec.dk, 1.0),
        };
        let made = build::index_layer(&capture, &settings, &|_| ()).expect("the capture is well formed");
        let mut meta = sample_parts(1, 200, 1, spec.n_head_kv, spec.dk, spec.dv, 4).meta;
        meta.tokens = (0..spec.n_prefix as i32).collect();
        (meta.n_sink, meta.n_window, meta.n_layer) = (4, 20, LAYER + 1);
        let tables = build::calibrate(&[made.scores], &build::BUDGETS);
        (meta.calibration, meta.mass_targets) = (tables.budgets, tables.masses);
        meta.dense_layers.clear();
        let sketch = build::sketch(&capture).expect("rows of noise can be told apart");
        let parts = IndexParts { meta, layers: vec![made.parts], sketch, probes: Vec::new() };
        Arc::new(Index::from_bytes(to_bytes(&parts).expect("valid parts")).expect("what was just written"))
    }
}

pub fn scale(spec: &Spec) -> f32 {
    1.0 / (spec.dk as f32).sqrt()
}

/// A scope of a test's own, with this budget.
pub fn scope(budget: f32) -> Arc<Scope> {
    let scope = Arc::<Scope>::default();
    change(&scope, |c| (c.min_prefix, c.mode) = (Some(0), ModeSetting::Budget(budget)));
    scope
}

pub fn change(scope: &Arc<Scope>, how: impl FnOnce(&mut Config)) {
    let _entered = ggml_squeeze::backend::enter(scope);
    ggml_squeeze::backend::configure(how);
}

/// Totals of a scope, which are then set to zero.
pub fn take_stats(scope: &Arc<Scope>) -> Stats {
    let _entered = ggml_squeeze::backend::enter(scope);
    let stats = ggml_squeeze::backend::stats();
    ggml_squeeze::backend::reset_stats();
    stats
}

pub fn op_context(scope: &Arc<Scope>) -> OpContext {
    OpContext::new(scope.clone(), OpOptions::default())
}

pub struct Backend(sys::ggml_backend_t);

// SAFETY: used by one thread at a time.
unsafe impl Send for Backend {}

fn start() {
    static START: Once = Once::new();
    START.call_once(|| sqz::llama::start(false).expect("ggml's backends load"));
}

impl Backend {
    /// A hooked one on the first GPU.
    pub fn gpu() -> Backend {
        start();
        ggml_squeeze::backend::register(Config::default()).expect("the plugin can be registered");
        // SAFETY: ggml's own functions on its own devices.
        unsafe {
            let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_GPU);
            assert!(!device.is_null(), "no GPU backend: set SQZ_BACKENDS or GGML_BACKEND_PATH");
            Backend(sys::ggml_backend_dev_init(device, std::ptr::null()))
        }
    }

    pub fn raw(&self) -> sys::ggml_backend_t {
        self.0
    }

    pub fn new(n_threads: usize) -> Backend {
        start();
        // SAFETY: ggml's own functions on its own devices; the function found has this type in ggml-cpu.h.
        unsafe {
            let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
            let backend = sys::ggml_backend_dev_init(device, std::ptr::null());
            let registry = sys::ggml_backend_dev_backend_reg(device);
            let set = sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_set_n_threads".as_ptr());
            assert!(!set.is_null(), "the CPU backend has no ggml_backend_set_n_threads");
            let set: unsafe extern "C" fn(sys::ggml_backend_t, c_int) = std::mem::transmute(set);
            set(backend, n_threads as c_int);
            Backend(backend)
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe { sys::ggml_backend_free(self.0) };
    }
}

/// Which attention node a graph has.
#[derive(Clone, Copy)]
pub enum Node<'a> {
    Ours(&'a OpContext, &'a Arc<Index>),
    /// Another layer than that of the index, and ALiBi.
    Other(&'a OpContext, &'a Arc<Index>, u32, f32),
    Stock,
}

/// Tensors in a backend's memory and a graph with one attention node.
pub struct Graph {
    context: *mut sys::ggml_context,
    buffer: sys::ggml_backend_buffer_t,
    pub graph: *mut sys::ggml_cgraph,
    pub node: *mut sys::ggml_tensor,
    pub source: Source,
    /// Q, K and V as they were made, before views, and the mask.
    roots: [*mut sys::ggml_tensor; 4],
    spec: Spec,
    types: [sys::ggml_type; 2],
}

// SAFETY: used by one thread at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.context);
        }
    }
}

impl Graph {
    pub fn new(backend: &Backend, data: &Data, node: Node) -> Graph {
        let types = [data.spec.k_type, data.spec.v_type].map(type_of);
        Graph::with_types(backend, data, node, types).expect("the inputs are sound")
    }

    pub fn with_types(backend: &Backend, data: &Data, node: Node, types: [sys::ggml_type; 2]) -> Result<Graph, String> {
        let spec = data.spec.clone();
        let params = sys::ggml_init_params { mem_size: 1 << 20, mem_buffer: null_mut(), no_alloc: true };
        let [n_kv, n_query, heads, streams] =
            [spec.n_kv, spec.n_query, spec.n_head_kv, spec.n_stream].map(|n| n as i64);
        let n_head = heads * spec.group as i64;
        // SAFETY: one context, alive until drop; every tensor is made in it and filled within its size.
        unsafe {
            let c = sys::ggml_init(params);
            let cache = |kind: sys::ggml_type, d: usize| {
                let d = d as i64;
                if !spec.cell_major {
                    let t = sys::ggml_new_tensor_4d(c, kind, d, n_kv, heads, streams);
                    return (t, t);
                }
                let t = sys::ggml_new_tensor_3d(c, kind, d * heads, n_kv, streams);
                let head = sys::ggml_row_size(kind, d);
                let view = sys::ggml_view_4d(c, t, d, heads, n_kv, streams, head, (*t).nb[1], (*t).nb[2], 0);
                (t, sys::ggml_permute(c, view, 0, 2, 1, 3))
            };
            let ((k_root, k), (v_root, v)) = (cache(types[0], spec.dk), cache(types[1], spec.dv));
            let q_root = sys::ggml_new_tensor_4d(c, sys::GGML_TYPE_F32, spec.dk as i64, n_head, n_query, streams);
            let q = sys::ggml_permute(c, q_root, 0, 2, 1, 3);
            let mask_heads = if spec.masked == Masked::PerHead { n_head } else { 1 };
            let mask = match spec.masked {
                Masked::No => null_mut(),
                _ => sys::ggml_new_tensor_4d(c, sys::GGML_TYPE_F16, n_kv, n_query, mask_heads, streams),
            };
            let source = Source { q: q.cast(), k: k.cast(), v: v.cast(), mask: mask.cast() };
            let made = |context: &OpContext, index: &Arc<Index>, layer: u32, max_bias: f32| {
                attn_ext(context, c.cast(), source, scale(&spec), max_bias, spec.softcap, index, layer)
            };
            let made = match node {
                Node::Stock => Ok(sys::ggml_flash_attn_ext(c, q, k, v, mask, scale(&spec), 0.0, spec.softcap).cast()),
                Node::Ours(context, index) => made(context, index, LAYER, 0.0),
                Node::Other(context, index, layer, max_bias) => made(context, index, layer, max_bias),
            };
            let node: *mut sys::ggml_tensor = match made {
                Ok(node) => node.cast(),
                Err(error) => {
                    sys::ggml_free(c);
                    return Err(error);
                }
            };
            let graph = sys::ggml_new_graph(c);
            sys::ggml_build_forward_expand(graph, node);
            let buffer = sys::ggml_backend_alloc_ctx_tensors(c, backend.0);
            assert!(!buffer.is_null(), "no memory for the tensors");
            let roots = [q_root, k_root, v_root, mask];
            let made = Graph { context: c, buffer, graph, node, source, roots, spec, types };
            made.set(data);
            Ok(made)
        }
    }

    fn fill(&self, root: usize, bytes: &[u8]) {
        let tensor = self.roots[root];
        // SAFETY: a tensor of this graph, filled within its size.
        unsafe {
            assert_eq!(bytes.len(), sys::ggml_nbytes(tensor));
            sys::ggml_backend_tensor_set(tensor, bytes.as_ptr().cast(), 0, bytes.len());
        }
    }

    pub fn set_q(&self, q: &[f32]) {
        self.fill(0, bytes(q));
    }

    pub fn set_k(&self, k: &Rows) {
        self.fill(1, &k.bytes(self.types[0], self.spec.cell_major));
    }

    pub fn set_v(&self, v: &Rows) {
        self.fill(2, &v.bytes(self.types[1], self.spec.cell_major));
    }

    /// Fills all tensors.
    pub fn set(&self, data: &Data) {
        self.set_q(&data.q);
        self.set_k(&data.k);
        self.set_v(&data.v);
        if !self.roots[3].is_null() {
            self.fill(3, bytes(&data.mask));
        }
    }

    /// Lets K lie elsewhere, as another sequence's cache does. The memory must outlive the graph's use.
    pub fn move_k(&mut self, to: &mut [u8]) {
        // SAFETY: tensors of this graph, which reads within the size of K alone.
        unsafe {
            assert_eq!(to.len(), sys::ggml_nbytes(self.roots[1]));
            let k: *mut sys::ggml_tensor = self.source.k.cast();
            let mut t = k;
            while !t.is_null() {
                (*t).data = to.as_mut_ptr().cast::<c_void>();
                t = (*t).view_src;
            }
        }
    }

    pub fn k_bytes(&self, k: &Rows) -> Vec<u8> {
        k.bytes(self.types[0], self.spec.cell_major)
    }

    /// Is the node one that our callback computes?
    pub fn is_custom(&self) -> bool {
        // SAFETY: a live tensor.
        unsafe { (*self.node).op == sys::GGML_OP_CUSTOM }
    }

    pub fn compute(&self, backend: &Backend) {
        // SAFETY: a live graph on a live backend.
        let status = unsafe { sys::ggml_backend_graph_compute(backend.0, self.graph) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "the graph failed");
    }

    /// Computes the graph; `[stream][query][head][dv]`.
    pub fn run(&self, backend: &Backend) -> Vec<f32> {
        self.run_by(|| self.compute(backend))
    }

    /// The same with something that computes the graph.
    pub fn run_by(&self, compute: impl FnOnce()) -> Vec<f32> {
        // SAFETY: the node is F32 and contiguous.
        unsafe {
            let mut out = vec![f32::NAN; sys::ggml_nelements(self.node) as usize];
            sys::ggml_backend_tensor_set(self.node, out.as_ptr().cast(), 0, size_of_val(&out[..]));
            compute();
            sys::ggml_backend_tensor_get(self.node, out.as_mut_ptr().cast(), 0, size_of_val(&out[..]));
            out
        }
    }

    fn array<T>(&self, t: *mut T) -> Array {
        // SAFETY: a live tensor; both crates' bindings are of one structure.
        let t = unsafe { &*t.cast::<sys::ggml_tensor>() };
        Array { data: t.data.cast(), ne: t.ne.map(|n| n as usize), nb: t.nb }
    }

    /// The call that the node stands for, its rows with this `kind`, on the very memory; its result goes to `dst`.
    pub fn call(&self, index: &Arc<Index>, rows: Vec<Row>, budget: f32, dst: &mut [f32]) -> Call {
        let spec = &self.spec;
        let meta = index.meta();
        let dst_ne = [spec.dv, spec.group * spec.n_head_kv, spec.n_query, spec.n_stream];
        let (a, b) = (4 * dst_ne[0], 4 * dst_ne[0] * dst_ne[1]);
        let dst = Array { data: dst.as_mut_ptr().cast(), ne: dst_ne, nb: [4, a, b, b * dst_ne[2]] };
        let divided = if spec.softcap == 0.0 { scale(spec) } else { scale(spec) / spec.softcap };
        let problem = Problem {
            q: self.array(self.source.q),
            k: self.array(self.source.k),
            v: self.array(self.source.v),
            k_type: spec.k_type,
            v_type: spec.v_type,
            mask: (!self.source.mask.is_null()).then(|| self.array(self.source.mask)),
            sinks: None,
            dst,
            scale: divided,
            max_bias: 0.0,
            softcap: spec.softcap,
        };
        let tail = meta.n_prefix() as u32 - meta.n_window..spec.n_kv as u32;
        let binding = Binding {
            index: index.clone(),
            cells: (0..meta.n_prefix() as u32).collect(),
            always: (0..meta.n_sink).chain(tail).collect(),
        };
        let mode = Mode::Budget(budget);
        let selection = Selection { mode, spread: Spread::Diag, alpha: 2.0, estimate: false, coarse_share: 1.0 };
        let (rotation, tiles) = (Rotation::default(), Vec::new().into());
        Call { problem, layer: LAYER, rows: rows.into(), bindings: [binding].into(), selection, rotation, tiles }
    }

    /// What the node should give, by the specification: sparse in rows that see all of the prefix if `sparse`. Which clusters
    /// are kept is asked of a plan: the kernels' f32 and the specification's f64 may break a tie differently.
    pub fn expected(&self, data: &Data, index: &Arc<Index>, budget: f32, sparse: bool) -> Vec<f64> {
        let of = |sees: &bool| if *sees && sparse { Row::Sparse(0) } else { Row::Dense };
        let mut dst = vec![0.0; self.spec.dv * self.spec.group * self.spec.n_head_kv * data.sees.len()];
        let call = self.call(index, data.sees.iter().map(of).collect(), budget, &mut dst);
        let options = Options { path: None, schedule: Some(Schedule::Split) };
        let plan = Plan::with_options(call.clone(), 1, &mut Memory::default(), options).expect("a supported call");
        // SAFETY: the tensors and `dst` are there, and one thread is all threads.
        unsafe { plan.run(0, 1) };
        oracle::run_with(&call, &|row, head_kv| plan.selected(row, head_kv).unwrap())
    }
}

fn bytes<T>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers, read as bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
