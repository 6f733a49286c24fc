//! Indexes come and go, settings change and totals are read while several backends compute graphs with several threads each, as ggml
//! does it; on made-up tensors, without ggml. Fast enough for every run of the tests; under ThreadSanitizer it is what shows races.

use std::sync::atomic::AtomicBool;

use rand::rngs::StdRng;
use rand::SeedableRng;

use super::super::binding::tests::{Cache, Prefix, N_CELL, N_PREFIX};
use super::super::runtime::{attach, configure, detach, enter, reset_stats, snapshot, stats, Scope};
use super::tests::{tensor, type_of};
use super::*;
use crate::attention::Element;

const D: usize = 64;
const HEADS: usize = 2;
/// Query heads; the made-up index has two per KV head.
const N_HEAD: usize = 4;
const N_QUERY: usize = 3;
const THREADS: usize = 3;
/// Graphs of each backend.
const GRAPHS: usize = if cfg!(miri) { 2 } else { 150 };

/// A graph of two attention nodes over one cache, and all that it points to.
struct Graph {
    // boxed: tensors hold each other's addresses
    #[allow(clippy::vec_box)]
    tensors: Vec<Box<sys::ggml_tensor>>,
    nodes: Vec<*mut sys::ggml_tensor>,
    _data: (Vec<f32>, Vec<u16>, Vec<Vec<f32>>),
    outputs: Vec<*const f32>,
}

impl Graph {
    fn new(cache: &mut Cache) -> Graph {
        let (mut tensors, mut nodes) = (Vec::new(), Vec::new());
        let mut add = |mut t: Box<sys::ggml_tensor>| -> *mut sys::ggml_tensor {
            let at: *mut sys::ggml_tensor = &mut *t;
            tensors.push(t);
            at
        };
        let mut q: Vec<f32> = (0..D * N_QUERY * N_HEAD).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let mut mask = vec![0u16; N_CELL * N_QUERY];
        let mut outputs: Vec<Vec<f32>> = (0..2).map(|_| vec![f32::NAN; D * N_HEAD * N_QUERY]).collect();
        let shaped = |name: &str, kind, ne: [usize; 4], nb: [usize; 4], data: *mut u8| {
            let mut t = tensor(name, kind, [ne[0], ne[1]], [nb[0], nb[1]], data);
            (t.ne, t.nb) = (ne.map(|n| n as i64), nb);
            t
        };
        let row = 4 * D * N_HEAD;
        let q_at = q.as_mut_ptr().cast();
        let q_at = add(shaped("q", sys::GGML_TYPE_F32, [D, N_QUERY, N_HEAD, 1], [4, row, 4 * D, row * N_QUERY], q_at));
        let mask_nb = [2, 2 * N_CELL, 2 * N_CELL * N_QUERY, 2 * N_CELL * N_QUERY];
        let mask_at = mask.as_mut_ptr().cast();
        let mask_at = add(shaped("mask", sys::GGML_TYPE_F16, [N_CELL, N_QUERY, 1, 1], mask_nb, mask_at));
        for (layer, out) in outputs.iter_mut().enumerate() {
            let mut sources = Vec::new();
            for (half, data) in [("k", cache.k.as_mut_ptr()), ("v", cache.v.as_mut_ptr())] {
                let kind = type_of(Element::F16);
                let name = format!("cache_{half}_l{layer}");
                let root = add(tensor(&name, kind, [HEADS * D, N_CELL], [2, 2 * HEADS * D], data));
                let nb = [2, 2 * HEADS * D, 2 * D, 2 * HEADS * D * N_CELL];
                let mut view = shaped("view", kind, [D, N_CELL, HEADS, 1], nb, data);
                (view.view_src, view.op) = (root, sys::GGML_OP_VIEW);
                sources.push(add(view));
            }
            let out_at = out.as_mut_ptr().cast();
            let nb = [4, 4 * D, row, row * N_QUERY];
            let mut node = shaped("attention", sys::GGML_TYPE_F32, [D, N_HEAD, N_QUERY, 1], nb, out_at);
            node.op = sys::GGML_OP_FLASH_ATTN_EXT;
            (node.src[0], node.src[1], node.src[2], node.src[3]) = (q_at, sources[0], sources[1], mask_at);
            node.op_params[0] = 0.125f32.to_bits() as i32;
            nodes.push(add(node));
        }
        let places = outputs.iter().map(|out| out.as_ptr()).collect();
        Graph { tensors, nodes, _data: (q, mask, outputs), outputs: places }
    }

    /// What `compute_cpu` and ggml do: decide, compute what is ours, book. The result, if the graph was sparse.
    fn compute(&self, instance: &mut Instance) -> Option<Vec<f32>> {
        let snapshot = snapshot();
        let rewrite = instance.rewrite(&self.nodes, &snapshot)?;
        for node in &rewrite.nodes {
            // SAFETY: a custom node of the rewrite, whose parameters are at the start of `op_params`.
            let parameters: sys::ggml_custom_op_params = unsafe {
                assert!((**node).op == sys::GGML_OP_CUSTOM);
                (**node).op_params.as_ptr().cast::<sys::ggml_custom_op_params>().read_unaligned()
            };
            let (run, data) = (parameters.fun.unwrap(), parameters.userdata as usize);
            std::thread::scope(|scope| {
                for ith in 0..THREADS {
                    // SAFETY: as ggml calls it: each thread once; node and data live.
                    scope.spawn(move || unsafe {
                        run(std::ptr::null_mut(), ith as c_int, THREADS as c_int, data as *mut c_void);
                    });
                }
            });
        }
        assert!(rewrite.finish(instance), "a kernel panicked");
        let n = D * N_HEAD * N_QUERY;
        // SAFETY: the outputs have so many elements, and nobody writes them any more.
        let read = |at: &*const f32| unsafe { std::slice::from_raw_parts(*at, n).to_vec() };
        Some(self.outputs.iter().flat_map(read).collect())
    }
}

#[test]
fn indexes_come_and_go_while_graphs_are_computed() {
    let scope = Arc::<Scope>::default();
    let prefixes = [5, 6].map(|seed| Prefix::new(seed, N_PREFIX, D));
    let entered = enter(&scope);
    configure(|c| c.min_prefix = Some(1));
    for prefix in &prefixes {
        attach(&prefix.matcher.index).unwrap();
    }
    drop(entered);

    let ended = AtomicBool::new(false);
    let sparse = AtomicUsize::new(0);
    std::thread::scope(|threads| {
        let computing: Vec<_> = (0..2)
            .map(|i: usize| {
                let (scope, prefix, sparse) = (&scope, &prefixes[i], &sparse);
                threads.spawn(move || {
                    let _entered = enter(scope);
                    let cells: Vec<u32> = (7..7 + N_PREFIX as u32).collect();
                    let types = [Element::F16, Element::F16];
                    let mut cache = Cache::new(prefix, types, &cells, &mut StdRng::seed_from_u64(1));
                    let graph = Graph::new(&mut cache);
                    assert_eq!(graph.tensors.len(), 12);
                    let mut instance = Instance::default();
                    let mut first: Option<Vec<f32>> = None;
                    for _ in 0..GRAPHS {
                        // Whatever is attached at the moment: nothing (dense), or the same as ever.
                        if let Some(result) = graph.compute(&mut instance) {
                            assert!(result.iter().all(|x| x.is_finite()));
                            sparse.fetch_add(1, Ordering::Relaxed);
                            let first = first.get_or_insert_with(|| result.clone());
                            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
                            assert!(result.iter().zip(first.iter()).all(close), "another result than before");
                        }
                    }
                })
            })
            .collect();
        threads.spawn(|| {
            let _entered = enter(&scope);
            while !ended.load(Ordering::Relaxed) {
                for prefix in &prefixes {
                    assert!(detach(&prefix.matcher.index));
                    std::thread::yield_now();
                    assert!(attach(&prefix.matcher.index).unwrap());
                }
                configure(|c| c.tile = 1);
                assert!(stats().nodes_sparse < u64::MAX);
                std::thread::yield_now();
            }
        });
        computing.into_iter().for_each(|thread| thread.join().unwrap());
        ended.store(true, Ordering::Relaxed);
    });
    let _entered = enter(&scope);
    assert_eq!(stats().nodes_sparse, 2 * sparse.load(Ordering::Relaxed) as u64);
    assert!(sparse.load(Ordering::Relaxed) > 0, "no graph was sparse");
    reset_stats();
}
