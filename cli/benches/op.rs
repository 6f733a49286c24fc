//! The attention op alone, through ggml, on the same tensors: llama.cpp's own flash attention, our kernels over every key,
//! and sparse ones; microseconds per call, medians of interleaved repetitions.
//! `cargo bench --workspace --bench op -- [--types f16,q8_0] [--shapes 14/2x64,12/2x128] [--lengths 4096,12288,24576]
//! [--queries 1] [--budgets 0.2,0.1] [--spread diag] [-r 15] [-t 2]`
//!
//! A graph holds several layers with caches of their own, together larger than the last-level cache, as in a model.

use std::ffi::{c_int, c_void, CString};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use ggml_squeeze::backend;
use ggml_squeeze::build::{self, LayerCapture, Settings};
use ggml_squeeze::config::{Config, ModeSetting};
use ggml_squeeze::hadamard::rotate;
use ggml_squeeze::index::sample::sample_parts;
use ggml_squeeze::index::{to_bytes, Index, IndexParts};
use half::f16;
use llama_cpp_sys_2 as sys;
use sqz::session::SpreadArg;

/// Bytes of K and V that the layers of a graph hold at least.
const CACHE_BYTES: usize = 192 << 20;
/// Cells behind the prefix, all but a few hidden.
const N_TAIL: usize = 256;
const N_SEEN_TAIL: usize = 40;

#[derive(Parser)]
struct Args {
    /// K and V types
    #[arg(long, value_delimiter = ',', default_value = "f16")]
    types: Vec<String>,
    /// Query heads / KV heads x head size
    #[arg(long, value_delimiter = ',', default_value = "14/2x64,12/2x128")]
    shapes: Vec<String>,
    /// Tokens of the prefix
    #[arg(long, value_delimiter = ',', default_value = "4096,12288,24576")]
    lengths: Vec<usize>,
    /// Query tokens
    #[arg(long, value_delimiter = ',', default_value = "1")]
    queries: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "0.2,0.1")]
    budgets: Vec<f32>,
    #[arg(long, value_enum, default_value = "diag")]
    spread: SpreadArg,
    #[arg(short, long, default_value_t = 15)]
    repetitions: usize,
    #[arg(short, long, default_value_t = std::thread::available_parallelism().map_or(1, |n| n.get()))]
    threads: usize,
    /// What cargo passes
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy)]
struct Shape {
    n_head: usize,
    n_head_kv: usize,
    dim: usize,
}

impl Shape {
    /// From `14/2x64`.
    fn parse(text: &str) -> Shape {
        let numbers: Vec<usize> = text.split(['/', 'x']).map(|n| n.parse().expect("a shape is like 14/2x64")).collect();
        let [n_head, n_head_kv, dim] = numbers[..] else { panic!("a shape is like 14/2x64, not {text}") };
        Shape { n_head, n_head_kv, dim }
    }
}

fn type_of(name: &str) -> sys::ggml_type {
    match name {
        "f32" => sys::GGML_TYPE_F32,
        "f16" => sys::GGML_TYPE_F16,
        "bf16" => sys::GGML_TYPE_BF16,
        "q8_0" => sys::GGML_TYPE_Q8_0,
        "q4_0" => sys::GGML_TYPE_Q4_0,
        other => panic!("type {other}: give f32, f16, bf16, q8_0 or q4_0"),
    }
}

/// Uniform in -1 to 1.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1664525).wrapping_add(1013904223);
        (self.0 >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

/// Keys that drift with the position, as real ones do: `[n][n_head_kv * dim]`.
fn rows(shape: Shape, n: usize, noise: &mut Noise) -> Vec<f16> {
    let len = shape.n_head_kv * shape.dim;
    let mut element = |p: usize, i: usize| (p as f32 * 0.9f32.powi(i as i32 % 64)).sin() + noise.next();
    (0..n * len).map(|j| f16::from_f32(element(j / len, j % len))).collect()
}

/// An index of `n_layer` equal layers.
fn index(shape: Shape, k: &[f16], v: &[f16], n_layer: u32) -> Index {
    let settings = Settings { iterations: 1, ..Settings::default() };
    let n_group = shape.n_head / shape.n_head_kv;
    let mut noise = Noise(7);
    let q = (0..settings.n_window as usize * shape.n_head * shape.dim).map(|_| noise.next()).collect();
    let capture = LayerCapture {
        layer: 0,
        n_head_kv: shape.n_head_kv as u32,
        n_group: n_group as u32,
        head_dim_k: shape.dim as u32,
        head_dim_v: shape.dim as u32,
        scale: 1.0 / (shape.dim as f32).sqrt(),
        k: k.to_vec(),
        v: v.to_vec(),
        q,
    };
    let build::BuiltLayer { parts, scores, .. } =
        build::index_layer(&capture, &settings, &|_| ()).expect("the capture is well formed");
    let n_prefix = k.len() / (shape.n_head_kv * shape.dim);
    let mut meta = sample_parts(1, 200, 1, shape.n_head_kv, shape.dim, shape.dim, 4).meta;
    meta.tokens = (0..n_prefix as i32).collect();
    (meta.n_sink, meta.n_window, meta.n_layer) = (settings.n_sink, settings.n_window, n_layer);
    let tables = build::calibrate(&vec![scores; n_layer as usize], &build::BUDGETS);
    (meta.calibration, meta.mass_targets) = (tables.budgets, tables.masses);
    meta.dense_layers.clear();
    let layers = (0..n_layer)
        .map(|l| {
            let mut layer = parts.clone();
            layer.shape.layer = l;
            layer
        })
        .collect();
    let sketch = build::sketch(&capture).expect("rows of noise can be told apart");
    let parts = IndexParts { meta, layers, sketch, probes: Vec::new() };
    Index::from_bytes(to_bytes(&parts).expect("the parts fit together")).expect("what was written can be read")
}

/// A graph of attention nodes on caches of their own, with all tensors in memory of ggml's CPU buffers.
struct Graph {
    context: *mut sys::ggml_context,
    buffer: sys::ggml_backend_buffer_t,
    graph: *mut sys::ggml_cgraph,
    n_layer: usize,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.context);
        }
    }
}

/// Rows as the cache holds them: in its type, and in llama.cpp's rotated basis if that is quantised.
fn stored(rows: &[f16], dim: usize, name: &str, block: usize) -> Vec<u8> {
    let mut values: Vec<f32> = rows.iter().map(|x| x.to_f32()).collect();
    if name.starts_with('q') && dim.is_multiple_of(64) {
        values.chunks_exact_mut(dim).for_each(|row| rotate(row, block));
    }
    // SAFETY: the buffer holds the rows in their type; a length is one "row" for the library.
    unsafe {
        let bytes = sys::ggml_row_size(type_of(name), values.len() as i64);
        let mut out = vec![0u8; bytes];
        let to: *mut c_void = out.as_mut_ptr().cast();
        sys::ggml_quantize_chunk(type_of(name), values.as_ptr(), to, 0, 1, values.len() as i64, std::ptr::null());
        out
    }
}

/// Layers of a graph whose K and V rows these are.
fn layers_of(k: &[u8], v: &[u8]) -> usize {
    (CACHE_BYTES / (k.len() + v.len())).clamp(2, 32)
}

impl Graph {
    fn new(
        backend: sys::ggml_backend_t,
        shape: Shape,
        name: &str,
        n_query: usize,
        k: &[u8],
        v: &[u8],
        n: usize,
    ) -> Graph {
        let n_kv = n + N_TAIL;
        let (dim, heads) = (shape.dim as i64, shape.n_head_kv as i64);
        let n_layer = layers_of(k, v);
        let params = sys::ggml_init_params { mem_size: (16 << 20), mem_buffer: null_mut(), no_alloc: true };
        let mut noise = Noise(3);
        // SAFETY: one context, alive until drop; every tensor is made in it and filled within its size.
        unsafe {
            let c = sys::ggml_init(params);
            let named = |t: *mut sys::ggml_tensor, name: String| {
                sys::ggml_set_name(t, CString::new(name).expect("no NUL").as_ptr());
                t
            };
            let cache = |half: &str, l: usize| {
                let t = sys::ggml_new_tensor_3d(c, type_of(name), dim * heads, n_kv as i64, 1);
                named(t, format!("cache_{half}_l{l}"))
            };
            let view = |t: *mut sys::ggml_tensor| {
                let (head, cell) = (sys::ggml_row_size(type_of(name), dim), (*t).nb[1]);
                let v = sys::ggml_view_4d(c, t, dim, heads, n_kv as i64, 1, head, cell, (*t).nb[2], 0);
                sys::ggml_permute(c, v, 0, 2, 1, 3)
            };
            let mask = sys::ggml_new_tensor_2d(c, sys::GGML_TYPE_F16, n_kv as i64, n_query as i64);
            let graph = sys::ggml_new_graph_custom(c, 4096, false);
            let mut roots = Vec::new();
            for l in 0..n_layer {
                let (kt, vt) = (cache("k", l), cache("v", l));
                let q = sys::ggml_new_tensor_3d(c, sys::GGML_TYPE_F32, dim, shape.n_head as i64, n_query as i64);
                let (q_view, scale) = (sys::ggml_permute(c, q, 0, 2, 1, 3), 1.0 / (shape.dim as f32).sqrt());
                let node = sys::ggml_flash_attn_ext(c, q_view, view(kt), view(vt), mask, scale, 0.0, 0.0);
                sys::ggml_build_forward_expand(graph, node);
                roots.push((kt, vt, q));
            }
            let buffer = sys::ggml_backend_alloc_ctx_tensors(c, backend);
            assert!(!buffer.is_null(), "no memory for the caches");
            let set = |t: *mut sys::ggml_tensor, bytes: &[u8]| {
                sys::ggml_backend_tensor_set(t, bytes.as_ptr().cast(), 0, bytes.len());
            };
            for (kt, vt, q) in roots {
                // The tail holds a copy of the first rows.
                let tail = |rows: &[u8]| rows[..rows.len() / n * N_TAIL].to_vec();
                set(kt, &[k, &tail(k)].concat());
                set(vt, &[v, &tail(v)].concat());
                let q_values: Vec<f32> = (0..n_query * shape.n_head * shape.dim).map(|_| 2.0 * noise.next()).collect();
                set(q, bytes(&q_values));
            }
            let row = (0..n_kv).map(|c| if c < n + N_SEEN_TAIL { f16::ZERO } else { f16::NEG_INFINITY });
            let row: Vec<f16> = row.collect();
            set(mask, bytes(&row.repeat(n_query)));
            Graph { context: c, buffer, graph, n_layer }
        }
    }

    /// Microseconds per attention call.
    fn time(&self, backend: sys::ggml_backend_t) -> f64 {
        let start = Instant::now();
        // SAFETY: a live graph on a live backend.
        let status = unsafe { sys::ggml_backend_graph_compute(backend, self.graph) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "the graph failed");
        start.elapsed().as_secs_f64() * 1e6 / self.n_layer as f64
    }
}

fn bytes<T>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers, read as bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn cpu_backend(n_threads: usize) -> sys::ggml_backend_t {
    // SAFETY: ggml's own functions on its own devices; the function found has this type in ggml-cpu.h.
    unsafe {
        let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
        let backend = sys::ggml_backend_dev_init(device, std::ptr::null());
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let set = sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_set_n_threads".as_ptr());
        assert!(!set.is_null(), "the CPU backend has no ggml_backend_set_n_threads");
        let set: unsafe extern "C" fn(sys::ggml_backend_t, c_int) = std::mem::transmute(set);
        set(backend, n_threads as c_int);
        backend
    }
}

/// What a timing is of.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Stock,
    OwnDense,
    Sparse(f32),
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let args = Args::parse();
    sqz::llama::start(false).expect("ggml's backends load");
    let stock = cpu_backend(args.threads);
    let spread = args.spread.value();
    backend::register(Config { min_prefix: Some(0), spread, ..Config::default() }).expect("this is our ggml");
    let ours = cpu_backend(args.threads);

    let mut ways = vec![Way::Stock, Way::OwnDense];
    ways.extend(args.budgets.iter().map(|b| Way::Sparse(*b)));
    let heads: Vec<String> = args.budgets.iter().map(|b| format!(" {b} us | x stock | x own |")).collect();
    println!(
        "path {}, {} threads, medians of {}\n",
        ggml_squeeze::attention::cpu::path(),
        args.threads,
        args.repetitions
    );
    println!("| type | heads | d | prefix | queries | stock us | own dense us |{}", heads.concat());
    println!("|---|---|---:|---:|---:|---:|---:|{}", "---:|---:|---:|".repeat(heads.len()));
    for shape_text in &args.shapes {
        let shape = Shape::parse(shape_text);
        for &n in &args.lengths {
            let mut noise = Noise(1);
            let (k, v) = (rows(shape, n, &mut noise), rows(shape, n, &mut noise));
            for name in &args.types {
                let k_block = (1 << (shape.dim.trailing_zeros())).max(64);
                let (k_stored, v_stored) = (stored(&k, shape.dim, name, k_block), stored(&v, shape.dim, name, 64));
                let n_layer = layers_of(&k_stored, &v_stored) as u32;
                backend::set_indexes(vec![Arc::new(index(shape, &k, &v, n_layer))])
                    .expect("the machine has the memory");
                for &n_query in &args.queries {
                    let graph = Graph::new(stock, shape, name, n_query, &k_stored, &v_stored, n);
                    let mut times = vec![Vec::new(); ways.len()];
                    for repetition in 0..args.repetitions + 2 {
                        for (way, times) in ways.iter().zip(&mut times) {
                            backend::configure(|c| {
                                c.force = *way == Way::OwnDense;
                                if let Way::Sparse(b) = way {
                                    c.mode = ModeSetting::Budget(*b);
                                }
                            });
                            backend::reset_stats();
                            let us = graph.time(if *way == Way::Stock { stock } else { ours });
                            let stats = backend::stats();
                            match way {
                                Way::Stock => assert_eq!(stats.graphs, 0),
                                Way::OwnDense => assert_eq!(stats.nodes_forced, graph.n_layer as u64),
                                Way::Sparse(_) => assert_eq!(stats.nodes_sparse, graph.n_layer as u64, "{stats}"),
                            }
                            // The first rounds bind and fill pools.
                            if repetition >= 2 {
                                times.push(us);
                            }
                        }
                    }
                    let us: Vec<f64> = times.into_iter().map(median).collect();
                    let sparse: Vec<String> =
                        us[2..].iter().map(|t| format!(" {t:.0} | {:.2}x | {:.2}x |", us[0] / t, us[1] / t)).collect();
                    println!(
                        "| {name} | {}/{} | {} | {n} | {n_query} | {:.0} | {:.0} |{}",
                        shape.n_head,
                        shape.n_head_kv,
                        shape.dim,
                        us[0],
                        us[1],
                        sparse.concat()
                    );
                }
            }
        }
    }
    // SAFETY: made above, freed once, no graph left.
    unsafe {
        sys::ggml_backend_free(ours);
        sys::ggml_backend_free(stock);
    }
}
