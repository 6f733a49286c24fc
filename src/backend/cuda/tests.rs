//! What is decided on the host, on made-up tensors: no GPU is needed.

use std::sync::Arc;

use ggml_sys as sys;

use super::super::binding::tests::{Prefix, N_PREFIX};
use super::super::layers::Layers;
use super::super::runtime::{Loaded, Snapshot};
use super::super::stats::Reason;
use super::super::tensor::Tensor;
use super::launch::cut;
use super::make::{are_too_many, make_room, refusal};
use super::survey::Survey;
use crate::attention::cuda::{RowNumbers, BOUND_MAX, MAX_PREFILL_ROWS, MAX_ROWS};
use crate::attention::{Array, Element, Mode, Problem, Selection, Spread};
use crate::config::Config;

fn snapshot() -> Snapshot {
    let selection =
        Selection { mode: Mode::Budget(0.2), spread: Spread::None, alpha: 2.0, estimate: false, coarse_share: 1.0 };
    let matcher = Arc::new(Prefix::new(1, N_PREFIX, 64).matcher);
    Snapshot { indexes: vec![Loaded { matcher, selection }], ..Snapshot::default() }
}

/// A tensor of these extents, contiguous, at a made-up address that is never read.
fn tensor(name: &str, kind: sys::ggml_type, size: usize, ne: [i64; 4], at: usize) -> Box<sys::ggml_tensor> {
    // SAFETY: plain numbers and pointers, for all of which zero is a value.
    let mut t: Box<sys::ggml_tensor> = Box::new(unsafe { std::mem::zeroed() });
    (t.type_, t.ne) = (kind, ne);
    t.nb[0] = size;
    (1..4).for_each(|i| t.nb[i] = t.nb[i - 1] * ne[i - 1] as usize);
    t.data = std::ptr::without_provenance_mut(at);
    t.name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as _);
    t
}

const N_KV: i64 = 256;

/// An attention node over a cache of layer 0 with `n_query` rows, and a node of another op that writes to its K by `numbers`.
// boxed: nodes keep their addresses
#[allow(clippy::vec_box)]
struct Graph {
    tensors: Vec<Box<sys::ggml_tensor>>,
}

impl Graph {
    fn new(n_query: i64, op: sys::ggml_op, wide: bool) -> Graph {
        let f16 = sys::GGML_TYPE_F16;
        let f32 = sys::GGML_TYPE_F32;
        let mut k = tensor("cache_k_l0", f16, 2, [128, N_KV, 1, 1], 0x10000);
        let mut v = tensor("cache_v_l0", f16, 2, [128, N_KV, 1, 1], 0x20000);
        let mut k_view = tensor("k", f16, 2, [64, N_KV, 2, 1], 0x10000);
        let mut v_view = tensor("v", f16, 2, [64, N_KV, 2, 1], 0x20000);
        (k_view.view_src, v_view.view_src) = (&mut *k, &mut *v);
        let mut q = tensor("q", f32, 4, [64, n_query, 4, 1], 0x30000);
        let mut mask = tensor("mask", f16, 2, [N_KV, n_query, 1, 1], 0x40000);
        let mut attention = tensor("attention", f32, 4, [64, 4, n_query, 1], 0x50000);
        attention.op = sys::GGML_OP_FLASH_ATTN_EXT;
        attention.src[..4].copy_from_slice(&[&mut *q, &mut *k_view, &mut *v_view, &mut *mask]);
        let (kind, size) = if wide { (sys::GGML_TYPE_I64, 8) } else { (sys::GGML_TYPE_I32, 4) };
        let mut numbers = tensor("numbers", kind, size, [n_query, 1, 1, 1], 0x60000);
        let mut writer = tensor("writer", f16, 2, [128, N_KV, 1, 1], 0x10000);
        (writer.op, writer.view_src, writer.src[1]) = (op, &mut *k, &mut *numbers);
        Graph { tensors: vec![writer, attention, mask, q, k_view, v_view, k, v, numbers] }
    }

    fn survey(&self) -> Survey {
        let raw = self.tensors[..2].iter().map(|t| &**t as *const sys::ggml_tensor);
        // SAFETY: the tensors live in `self`; data is not read.
        let nodes: Vec<Tensor> = raw.filter_map(|t| unsafe { Tensor::new(t) }).collect();
        Survey::of(&nodes, &snapshot(), &mut Layers::default())
    }
}

#[test]
fn writes_are_followed_where_their_rows_can_be_seen() {
    for wide in [true, false] {
        let survey = Graph::new(3, sys::GGML_OP_SET_ROWS, wide).survey();
        assert_eq!(survey.written, [RowNumbers { address: 0x60000, n: 3, wide }]);
        assert!(!survey.opaque && survey.sites.len() == 1 && survey.sites[0].layer == Some(0));
    }
    // A context shift rewrites keys in place.
    assert!(Graph::new(3, sys::GGML_OP_CPY, true).survey().opaque);
    // Row numbers that the graph computes are not there yet when they are wanted.
    let mut graph = Graph::new(3, sys::GGML_OP_SET_ROWS, true);
    graph.tensors[8].op = sys::GGML_OP_CPY;
    assert!(graph.survey().opaque);
}

#[test]
fn nodes_that_the_kernels_or_the_index_do_not_cover_are_refused_with_the_reason() {
    let of = |graph: &Graph| refusal(&graph.survey().sites[0], &snapshot());
    assert_eq!(of(&Graph::new(1, sys::GGML_OP_SET_ROWS, true)), None);
    assert_eq!(of(&Graph::new(MAX_ROWS as i64, sys::GGML_OP_SET_ROWS, true)), None);
    assert_eq!(of(&Graph::new(MAX_ROWS as i64 + 1, sys::GGML_OP_SET_ROWS, true)), Some(Reason::Prefill));
    // Tiles are asked for: then a prefill is ours, up to so many rows.
    let config = Config { tile: 64, ..snapshot().config };
    let with_tiles = Snapshot { config, ..snapshot() };
    let many = |n: usize| refusal(&Graph::new(n as i64, sys::GGML_OP_SET_ROWS, true).survey().sites[0], &with_tiles);
    assert_eq!((many(512), many(MAX_PREFILL_ROWS)), (None, None));
    assert_eq!(many(MAX_PREFILL_ROWS + 1), Some(Reason::Prefill));
    let changed = |change: fn(&mut Graph)| {
        let mut graph = Graph::new(1, sys::GGML_OP_SET_ROWS, true);
        change(&mut graph);
        of(&graph)
    };
    assert_eq!(changed(|g| g.tensors[1].op_params[1] = 8f32.to_bits() as i32), Some(Reason::Alibi));
    for kind in [sys::GGML_TYPE_BF16, sys::GGML_TYPE_Q8_0, sys::GGML_TYPE_Q4_0] {
        let mut graph = Graph::new(1, sys::GGML_OP_SET_ROWS, true);
        graph.tensors[4].type_ = kind;
        assert_eq!(of(&graph), None);
    }
    assert_eq!(changed(|g| g.tensors[4].type_ = sys::GGML_TYPE_F32), Some(Reason::Type));
    assert_eq!(changed(|g| g.tensors[2].op = sys::GGML_OP_CPY), Some(Reason::Mask));
    assert_eq!(changed(|g| g.tensors[1].src[3] = std::ptr::null_mut()), Some(Reason::Mask));
    assert_eq!(changed(|g| g.tensors[6].name[6] = b'x' as _), Some(Reason::NoCache));
    assert_eq!(changed(|g| g.tensors[6].name[9] = b'9' as _), Some(Reason::Layer));
}

#[test]
fn sums_over_experts_of_several_tokens_are_not_captured() {
    let mut graph = Graph::new(1, sys::GGML_OP_SET_ROWS, true);
    assert!(graph.survey().can_be_captured);
    for (kind, n_token, may) in
        [(sys::GGML_TYPE_Q4_0, 1, true), (sys::GGML_TYPE_Q4_0, 2, false), (sys::GGML_TYPE_F16, 1, false)]
    {
        let mut weights = tensor("experts", kind, 2, [64, 64, 8, 1], 0x70000);
        let node = &mut graph.tensors[0];
        (node.op, node.view_src, node.ne[2], node.src[0]) =
            (sys::GGML_OP_MUL_MAT_ID, std::ptr::null_mut(), n_token, &mut *weights);
        assert_eq!(graph.survey().can_be_captured, may, "{kind} {n_token}");
    }
}

#[test]
fn a_long_call_is_cut_into_calls_over_the_same_rows() {
    let at =
        |base: usize, ne: [usize; 4], nb: [usize; 4]| Array { data: std::ptr::without_provenance_mut(base), ne, nb };
    let (d, n_kv, n_query, n_head, n_stream) = (64, 512, 37, 6, 4);
    let p = Problem {
        q: at(1 << 20, [d, n_query, n_head, n_stream], [4, 1 << 10, 1 << 16, 1 << 18]),
        k: at(2 << 20, [d, n_kv, 2, 2], [2, 256, 128, 1 << 17]),
        v: at(3 << 20, [d, n_kv, 2, n_stream], [2, 256, 128, 1 << 16]),
        k_type: Element::F16,
        v_type: Element::F16,
        mask: Some(at(4 << 20, [n_kv, 40, 1, 2], [2, 1024, 40960, 40960])),
        sinks: None,
        dst: at(5 << 20, [d, n_head, n_query, n_stream], [4, 256, 1536, 1536 * 37]),
        scale: 0.1,
        max_bias: 0.0,
        softcap: 0.0,
    };
    let parts = cut(&p);
    let mut rows = Vec::new();
    for part in &parts {
        assert!(part.n_row() <= MAX_ROWS && part.q.ne[3] == 1 && part.k.ne == [d, n_kv, 2, 1]);
        for i in 0..part.q.ne[1] {
            let m = part.mask.unwrap();
            assert!(i < m.ne[1]);
            rows.push([
                part.q.data as usize + i * part.q.nb[1],
                part.k.data as usize,
                part.v.data as usize,
                m.data as usize + i * m.nb[1],
                part.dst.data as usize + i * part.dst.nb[2],
            ]);
        }
    }
    let mut want = Vec::new();
    for s in 0..n_stream {
        for i in 0..n_query {
            want.push([
                (1 << 20) + i * (1 << 10) + s * (1 << 18),
                // Queries of two streams read one stream of K.
                (2 << 20) + s / 2 * (1 << 17),
                (3 << 20) + s * (1 << 16),
                (4 << 20) + i * 1024 + s % 2 * 40960,
                (5 << 20) + i * 1536 + s * 1536 * 37,
            ]);
        }
    }
    assert_eq!(rows, want);
    let short = Problem { q: Array { ne: [d, 4, n_head, n_stream], ..p.q }, ..p };
    assert_eq!(cut(&short).len(), 1);
}

#[test]
fn the_oldest_binding_makes_room() {
    let mut all: Vec<usize> = Vec::new();
    for i in 0..BOUND_MAX + 2 {
        make_room(&mut all);
        all.push(i);
    }
    assert_eq!(all, (2..BOUND_MAX + 2).collect::<Vec<_>>());
}

#[test]
fn rows_that_visit_too_much_are_left_to_a_dense_kernel() {
    let many = |n_row, n_kv, n_bound, seen: Option<&[(usize, bool)]>| {
        are_too_many(n_row, n_kv, &vec![65000; n_bound], seen, Mode::Budget(0.1))
    };
    // One sequence and a draft of it, on a cache of its own.
    assert!(!many(1, 70000, 1, None) && !many(1, 70000, 1, Some(&[(66000, false)])));
    assert!(!many(5, 70000, 1, None) && !many(5, 70000, 1, Some(&[(66000, true); 5])));
    // Rows that keep more together than there is.
    assert!(!many(8, 70000, 1, Some(&[(66000, true); 8])) && many(16, 70000, 1, Some(&[(66000, true); 16])));
    assert!(many(16, 66000, 1, None));
    // Slots on one list of cells: four with a copy of the prefix each and four short ones, then such with long texts of their own.
    let slots = |other| [[(66000, true); 4], [(other, false); 4]].concat();
    assert!(!many(8, 266000, 4, None) && !many(8, 266000, 4, Some(&slots(2000))));
    assert!(many(8, 526000, 4, Some(&slots(130000))) && many(16, 160000, 1, None) && !many(16, 160000, 2, None));
    // A prefill is done in tiles.
    assert!(!many(MAX_ROWS + 1, 266000, 4, None));
}
