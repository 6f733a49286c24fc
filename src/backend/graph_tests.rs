//! A graph's writes to caches of every type, on made-up tensors: a binding is found through them and ends with them.

use rand::rngs::StdRng;
use rand::SeedableRng;

use super::super::binding::tests::{Cache, Prefix, N_CELL, N_PREFIX};
use super::*;
use crate::attention::{Element, Mode, Selection, Spread};

pub fn type_of(element: Element) -> sys::ggml_type {
    match element {
        Element::F32 => sys::GGML_TYPE_F32,
        Element::F16 => sys::GGML_TYPE_F16,
        Element::BF16 => sys::GGML_TYPE_BF16,
        Element::Q8_0 => sys::GGML_TYPE_Q8_0,
        Element::Q4_0 => sys::GGML_TYPE_Q4_0,
    }
}

/// A tensor of `[ne0, ne1]` over `data`.
pub fn tensor(
    name: &str,
    kind: sys::ggml_type,
    ne: [usize; 2],
    nb: [usize; 2],
    data: *mut u8,
) -> Box<sys::ggml_tensor> {
    // SAFETY: plain numbers and pointers, for all of which zero is a value.
    let mut t: Box<sys::ggml_tensor> = Box::new(unsafe { std::mem::zeroed() });
    t.type_ = kind;
    t.ne = [ne[0] as i64, ne[1] as i64, 1, 1];
    t.nb = [nb[0], nb[1], nb[1] * ne[1], nb[1] * ne[1]];
    t.data = data.cast();
    t.name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as _);
    t
}

/// Two layers with the same content, and an op that writes to the K cache of the first.
struct Graph {
    roots: Vec<sys::ggml_tensor>,
    writer: Box<sys::ggml_tensor>,
    /// What the writer's second source and its data are.
    _indices: (Box<sys::ggml_tensor>, Box<[i64]>),
}

impl Graph {
    fn new(cache: &mut Cache, [k, v]: [Element; 2], op: sys::ggml_op, row: i64) -> Graph {
        let mut roots = Vec::new();
        for layer in 0..2 {
            for (half, element, data) in [("k", k, cache.k.as_mut_ptr()), ("v", v, cache.v.as_mut_ptr())] {
                let nb = [element.block_bytes(), element.row_bytes(cache.len)];
                let name = format!("cache_{half}_l{layer}");
                roots.push(*tensor(&name, type_of(element), [cache.len, N_CELL], nb, data));
            }
        }
        let mut rows = vec![row].into_boxed_slice();
        let mut indices = tensor("rows", sys::GGML_TYPE_I64, [1, 1], [8, 8], rows.as_mut_ptr().cast());
        let mut writer = tensor("writer", type_of(k), [cache.len, N_CELL], [0, 0], cache.k.as_mut_ptr());
        writer.op = op;
        writer.view_src = &mut roots[0];
        writer.src[1] = &mut *indices;
        Graph { roots, writer, _indices: (indices, rows) }
    }

    /// An attention op per layer, with the writer before them.
    fn survey(&mut self, instance: &mut Instance, snapshot: &Snapshot) -> Writes {
        self.survey_of(0..2, instance, snapshot)
    }

    /// The same of some layers; the writer is in the graph of the first.
    fn survey_of(&mut self, layers: Range<usize>, instance: &mut Instance, snapshot: &Snapshot) -> Writes {
        let mut nodes: Vec<sys::ggml_tensor> = Vec::new();
        for layer in layers.clone() {
            let mut node = tensor("attention", sys::GGML_TYPE_F32, [1, 1], [4, 4], std::ptr::null_mut());
            node.op = sys::GGML_OP_FLASH_ATTN_EXT;
            node.src[1] = &mut self.roots[2 * layer];
            node.src[2] = &mut self.roots[2 * layer + 1];
            nodes.push(*node);
        }
        let writer = [&*self.writer as *const sys::ggml_tensor];
        let writers = writer.iter().copied().take(usize::from(layers.start == 0));
        let raw: Vec<_> = writers.chain(nodes.iter().map(|node| node as *const _)).collect();
        // SAFETY: alive until the end of this function; what the instance remembers of them are the roots, which live in
        // `self`.
        let nodes: Vec<Tensor> = raw.iter().filter_map(|&n| unsafe { Tensor::new(n) }).collect();
        instance.survey(&nodes, snapshot)
    }
}

fn snapshot(p: Prefix) -> Snapshot {
    let mode = Mode::Budget(0.2);
    let selection = Selection { mode, spread: Spread::None, alpha: 2.0, estimate: false, coarse_share: 1.0 };
    let mut snapshot =
        Snapshot { indexes: vec![Loaded { matcher: p.matcher.into(), selection }], ..Snapshot::default() };
    snapshot.config.min_prefix = Some(1);
    snapshot
}

#[test]
fn a_binding_ends_with_a_write_to_its_cells_whatever_the_type() {
    let other = N_CELL as i64 - 1;
    for (i, k) in Element::ALL.into_iter().enumerate() {
        let types = [k, Element::ALL[(i + 2) % Element::ALL.len()]];
        let p = Prefix::new(i as u64, N_PREFIX, 64);
        let cells: Vec<u32> = (3..3 + N_PREFIX as u32).collect();
        let mut cache = Cache::new(&p, types, &cells, &mut StdRng::seed_from_u64(1));
        let snapshot = snapshot(p);
        let visible: Vec<u32> = (0..N_CELL as u32).collect();
        let mut instance = Instance::default();
        let bind = |instance: &mut Instance, cache: &mut Cache| {
            let mut graph = Graph::new(cache, types, sys::GGML_OP_SET_ROWS, other);
            let writes = graph.survey(instance, &snapshot);
            assert!(!writes.opaque && writes.rows == [other]);
            assert_eq!(instance.caches.search(&snapshot, 1, 0, &visible, &writes), Some(0), "{types:?}");
            assert_eq!(instance.caches.bound[0].cells[..], cells[..]);
        };
        // Another cell is written: it stays. One of its own, or an op that we do not know (a context shift): it ends.
        for (op, row, stays) in [
            (sys::GGML_OP_SET_ROWS, other, true),
            (sys::GGML_OP_SET_ROWS, cells[5].into(), false),
            (sys::GGML_OP_CPY, other, false),
        ] {
            bind(&mut instance, &mut cache);
            let mut graph = Graph::new(&mut cache, types, op, row);
            let writes = graph.survey(&mut instance, &snapshot);
            assert_eq!(writes.opaque, op == sys::GGML_OP_CPY);
            assert_eq!(instance.caches.bound.len(), usize::from(stays), "{types:?} {row}");
            instance.caches.bound.clear();
        }
        // One bit of V of the last clustered token in the deepest layer: the guard sees it.
        bind(&mut instance, &mut cache);
        let last = cells[snapshot.indexes[0].matcher.last_clustered()] as usize;
        let size = types[1].row_bytes(cache.len);
        cache.v[(last + 1) * size - 1] ^= 1;
        let mut graph = Graph::new(&mut cache, types, sys::GGML_OP_SET_ROWS, other);
        graph.survey(&mut instance, &snapshot);
        assert!(instance.caches.bound.is_empty(), "{types:?}");
    }
}

#[test]
fn backends_with_a_layer_each_bind_what_all_agree_on() {
    let types = [Element::F16; 2];
    let p = Prefix::new(7, N_PREFIX, 64);
    let cells: Vec<u32> = (3..3 + N_PREFIX as u32).collect();
    let mut cache = Cache::new(&p, types, &cells, &mut StdRng::seed_from_u64(1));
    let mut same = Cache::new(&p, types, &cells, &mut StdRng::seed_from_u64(1));
    let other = Prefix::new(8, N_PREFIX, 64);
    let mut other = Cache::new(&other, types, &cells, &mut StdRng::seed_from_u64(1));
    let snapshot = snapshot(p);
    let visible: Vec<u32> = (0..N_CELL as u32).collect();
    let [mut first, mut second] = <[Instance; 2]>::default();
    // What a pass finds in the first layer, on one backend, and in the second, with rows of this cache, on the other.
    let mut pass = |deeper: &mut Cache, visible: &[u32]| {
        [(&mut first, &mut cache, 0..1), (&mut second, deeper, 1..2)].map(|(instance, cache, layers)| {
            let mut graph = Graph::new(cache, types, sys::GGML_OP_SET_ROWS, N_CELL as i64 - 1);
            let writes = graph.survey_of(layers, instance, &snapshot);
            let before = instance.caches.bound.len();
            let found = instance.caches.search(&snapshot, 1, 0, visible, &writes);
            instance.caches.bound.truncate(1);
            (before, found.is_some())
        })
    };
    assert_eq!(pass(&mut other, &visible), [(0, false), (0, false)], "the second layer is another text's");
    assert_eq!(pass(&mut same, &visible), [(0, false), (0, true)], "the first does not know yet");
    assert_eq!(pass(&mut same, &visible), [(0, true), (1, true)]);
    assert_eq!(pass(&mut same, &visible), [(1, true), (1, true)]);
    // The second backend's rows are replaced: it lets go at once, the first one with the next graph.
    assert_eq!(pass(&mut other, &visible), [(1, true), (0, false)]);
    assert_eq!(pass(&mut other, &visible), [(0, false), (0, false)]);
    // A row that does not see all of the cells.
    assert_eq!(pass(&mut same, &visible[4..]), [(0, false), (0, false)]);
}

#[test]
fn types_without_kernels_are_not_read() {
    let mut data = vec![0u8; 4096];
    for kind in [sys::GGML_TYPE_Q4_1, sys::GGML_TYPE_Q5_0, sys::GGML_TYPE_Q5_1, sys::GGML_TYPE_IQ4_NL] {
        let t = tensor("cache_k_l0", kind, [64, 4], [20, 40], data.as_mut_ptr());
        // SAFETY: `t` lives as long as the value.
        let t = unsafe { Tensor::new(&*t) }.unwrap();
        assert_eq!(t.element(), None);
        assert!(super::super::tensor::cache_rows(t, t, 0).is_none());
    }
}

#[test]
#[allow(clippy::single_range_in_vec_init)]
fn tiles_are_of_one_sequence_and_drafts_have_none() {
    const TILE: usize = 32;
    let (dense, one, two) = (Row::Dense, Row::Sparse(0), Row::Sparse(1));
    // Row i sees the prefix, cells 0..4, and of the other cells those of its sequence up to its own, i + 4.
    let tiles_of = |rows: &[Row], sequence: &[usize]| {
        let n_kv = rows.len() + 4;
        let shows = |row: usize, cell: usize| cell < 4 || (cell - 4 <= row && sequence[cell - 4] == sequence[row]);
        let mask: Vec<u16> =
            (0..rows.len() * n_kv).map(|i| if shows(i / n_kv, i % n_kv) { 0 } else { 0xfc00 }).collect();
        tiles(rows, rows.len(), TILE, |row| &mask[row * n_kv..(row + 1) * n_kv])
    };
    let n = PREFILL_ROWS;
    // A prompt, as few tiles as can be, its last row alone; a draft; one token of many sequences that share the prefix's cells.
    let prompt = 2 * TILE + 3;
    let tiles_of_prompt = tiles_of(&vec![one; prompt], &vec![0; prompt]);
    assert_eq!(tiles_of_prompt.len(), 3);
    assert!(tiles_of_prompt.iter().all(|t| t.len().abs_diff((prompt - 1) / 3) <= 1));
    assert_eq!((tiles_of_prompt[0].start, tiles_of_prompt[2].end), (0, prompt - 1));
    assert!(tiles_of(&vec![one; n - 1], &vec![0; n - 1]).is_empty());
    assert!(tiles_of(&vec![one; 2 * n], &(0..2 * n).collect::<Vec<_>>()).is_empty());
    // A prompt of one sequence between tokens of others, and between rows of another kind.
    let mut sequence = vec![0; n + 3];
    (sequence[0], sequence[n + 1], sequence[n + 2]) = (1, 2, 3);
    assert_eq!(tiles_of(&vec![one; n + 3], &sequence), [1..n]);
    for other in [dense, two] {
        let rows = [vec![other; 2], vec![one; n], vec![other]].concat();
        assert_eq!(tiles_of(&rows, &vec![0; n + 3]), [2..n + 1]);
    }
}
