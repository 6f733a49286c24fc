//! What is done once per graph: each row's binding by its mask, and what ends a binding.

use ggml_squeeze::attention::cuda::{gather, Compared, DeviceRows, Masks, RowMap, RowNumbers, Stream, Watched};

use super::attend_case::{decode, encode};
use super::*;
use ggml_squeeze::hadamard;

const N_CELL: usize = 700;
const N_KV: usize = 640;
const N_PREFIX: usize = 300;
const ROW: usize = 24;

/// An index of so many tokens in these cells.
fn bind(device: &Arc<Device>, cells: &[u32]) -> Watched {
    let case = Case::new(&Spec { n_prefix: N_PREFIX, ..Spec::base() });
    let resident = Resident::of(&case.call.bindings[0].index, device, 0).unwrap();
    Watched::new(Bound::new(resident, cells, N_CELL, 0).unwrap(), cells, N_CELL).unwrap()
}

/// A mask row that shows these cells.
fn row(shown: &[u32]) -> Vec<f16> {
    let mut row = vec![f16::NEG_INFINITY; N_KV];
    shown.iter().filter(|c| (**c as usize) < N_KV).for_each(|c| row[*c as usize] = f16::ZERO);
    row
}

struct Fixture {
    stream: Stream,
    masks: Buffer,
    cache: Buffer,
    numbers: Buffer,
    a: Watched,
    b: Watched,
    cells: [Vec<u32>; 2],
}

const N_ROW: usize = 6;

impl Fixture {
    /// Rows that see the first prefix, the second, both, the first but for one cell, nothing, and the first in another stream.
    fn new(device: &Arc<Device>, seed: u64) -> Fixture {
        let mut random = Random(seed + 1);
        let all = random.shuffled(N_KV);
        // One scattered, one consecutive where the other leaves room.
        let first: Vec<u32> = (20..20 + N_PREFIX as u32).collect();
        let second: Vec<u32> = all.into_iter().filter(|c| !first.contains(c)).take(N_PREFIX).collect();
        let gap: Vec<u32> = first.iter().copied().filter(|c| *c != 20 + seed as u32 % 300).collect();
        let rows = [row(&first), row(&second), row(&[&first[..], &second].concat()), row(&gap), row(&[]), row(&first)];
        let cache: Vec<f16> = (0..2 * N_CELL * ROW).map(|_| f16::from_f32(random.normal())).collect();
        Fixture {
            stream: Stream::new(device).unwrap(),
            masks: Buffer::of(device, "a test", &rows.concat()).unwrap(),
            cache: Buffer::of(device, "a test", &cache).unwrap(),
            numbers: Buffer::of(device, "a test", &[N_CELL as i64 - 1, N_KV as i64, N_KV as i64 + 7]).unwrap(),
            a: bind(device, &first),
            b: bind(device, &second),
            cells: [first, second],
        }
    }

    fn cache_rows(&self) -> DeviceRows {
        let at = |half: usize| (self.cache.address() + (half * N_CELL * ROW * 2) as u64, 2 * ROW, ROW);
        DeviceRows { k: at(0), v: at(1), types: [Element::F16; 2], n_cell: N_CELL }
    }

    fn map(&self, device: &Arc<Device>, n_choice: usize) -> RowMap {
        let mask = Array {
            data: self.masks.address() as *mut u8,
            ne: [N_KV, N_ROW / 2, 1, 2],
            nb: [2, 2 * N_KV, N_KV * N_ROW, N_KV * N_ROW],
        };
        // Both streams of queries read the one stream of K.
        let masks = Masks { mask, n_query: N_ROW / 2, n_stream: 2, k_streams: 1, first_stream: 0, n_kv: N_KV };
        let written = [RowNumbers { address: self.numbers.address(), n: 3, wide: true }];
        RowMap::new(device, Some(&masks), &[(&self.a, true), (&self.b, true)], n_choice, &written).unwrap()
    }

    fn run(&self, map: &RowMap) -> Vec<i32> {
        // SAFETY: everything lives in `self`.
        unsafe { map.launch(&self.stream) }.unwrap();
        let mut rows = vec![7; N_ROW];
        // SAFETY: the map's own memory.
        unsafe { self.stream.read(map.rows(), &mut rows) }.unwrap();
        assert_eq!(map.n_sparse(), rows.iter().filter(|r| **r >= 0).count());
        rows
    }
}

#[test]
fn rows_get_the_first_binding_that_they_see_whole() {
    let Some(device) = gpu() else { return };
    for seed in 0..8 {
        let f = Fixture::new(&device, seed);
        let map = f.map(&device, 2);
        assert_eq!(map.n_sparse(), N_ROW, "nothing is known yet");
        for _ in 0..3 {
            assert_eq!(f.run(&map), [0, 1, 0, -1, -1, 0]);
        }
        assert!(f.a.held() && f.b.held());
        assert_eq!(f.run(&f.map(&device, 1)), [0, -1, 0, -1, -1, 0], "the second is only checked");
    }
}

#[test]
fn a_write_to_a_cell_ends_its_binding_for_good() {
    let Some(device) = gpu() else { return };
    let f = Fixture::new(&device, 3);
    let map = f.map(&device, 2);
    f.run(&map);
    f.numbers.write(8, &[i64::from(f.cells[1][17])]).unwrap();
    assert_eq!(f.run(&map), [0, -1, 0, -1, -1, 0]);
    assert!(f.a.held() && !f.b.held());
    f.numbers.write(8, &[N_KV as i64]).unwrap();
    assert_eq!(f.run(&map), [0, -1, 0, -1, -1, 0]);
    // The same cell of another stream is another cell.
    f.numbers.write(8, &[N_CELL as i64 + i64::from(f.cells[0][17])]).unwrap();
    assert_eq!(f.run(&map), [0, -1, 0, -1, -1, 0]);
}

#[test]
fn a_change_of_the_guarded_rows_ends_a_binding() {
    let Some(device) = gpu() else { return };
    for in_values in [false, true] {
        let mut f = Fixture::new(&device, 4);
        let (rows, cell) = (f.cache_rows(), 123);
        // SAFETY: rows of `f.cache`.
        unsafe { f.a.guard(rows, cell, &f.stream) }.unwrap();
        let map = f.map(&device, 2);
        assert_eq!(f.run(&map), [0, 1, 0, -1, -1, 0]);
        let at = 2 * ROW * (cell + if in_values { N_CELL } else { 0 }) + 2 * (ROW - 1);
        f.cache.write(at, &[0x7bffu16]).unwrap();
        assert_eq!(f.run(&map), [-1, 1, 1, -1, -1, -1]);
        assert!(!f.a.held() && f.b.held());
    }
}

/// A case's call with bindings and lists as its map has found them.
fn through_a_map(device: &Arc<Device>, case: &Case, gpu: &OnGpu) {
    let (p, n_kv) = (&gpu.problem, gpu.problem.k.ne[1]);
    let watched = |(stream, b): (usize, &attention::Binding)| {
        let resident = Resident::of(&b.index, device, case.call.rotation.v).unwrap();
        Watched::new(Bound::new(resident, &b.cells, n_kv, stream as u32).unwrap(), &b.cells, n_kv).unwrap()
    };
    let watched: Vec<Watched> = case.call.bindings.iter().enumerate().map(watched).collect();
    let [_, n_query, _, n_stream] = p.q.ne;
    let mask = p.mask.expect("a case with a mask");
    let masks = Masks { mask, n_query, n_stream, k_streams: p.k.ne[3], first_stream: 0, n_kv };
    let all: Vec<(&Watched, bool)> = watched.iter().map(|w| (w, false)).collect();
    let map = RowMap::new(device, Some(&masks), &all, all.len(), &[]).unwrap();
    let stream = Stream::new(device).unwrap();
    // SAFETY: everything lives in this function.
    unsafe { map.launch(&stream) }.unwrap();
    for (row, (list, own)) in map.lists().unwrap().iter().zip(case.call.rows.iter()).enumerate() {
        let shown = |cell: &u32| case.mask[row * n_kv + *cell as usize] != f16::NEG_INFINITY;
        let want: Vec<u32> = match own {
            Row::Sparse(b) => case.call.bindings[*b as usize].always.iter().copied().filter(shown).collect(),
            _ => (0..n_kv as u32).filter(shown).collect(),
        };
        assert_eq!(list, &want, "row {row}");
    }
    let bounds: Vec<&Bound> = watched.iter().map(|w| &w.bound).collect();
    let (problem, rotation, selection, rows) = (gpu.problem, gpu.rotation, gpu.selection, map.rows());
    let call = Call { problem, rotation, layer: LAYER, selection, rows, seen: true, bounds: &bounds, first_stream: 0 };
    let workspace = Workspace::for_calls(device, &[&call]).unwrap();
    let outputs = [None, map.visible()].map(|visible| {
        let mut attention = Attention::new(device, &call, &workspace).unwrap();
        visible.into_iter().for_each(|visible| attention.attend_listed(visible));
        gpu.launch(&attention);
        gpu.output()
    });
    let want: Vec<f64> = outputs[0].iter().map(|x| f64::from(*x)).collect();
    let e = error(&outputs[1], &want);
    assert!(e <= 5e-4, "relative error {e}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn listed_cells_are_those_that_the_mask_shows(spec in specs(), n_other in 0usize..40000, quantised in any::<bool>()) {
        if let Some(device) = gpu() {
            let k_type = if quantised { Element::Q8_0 } else { Element::F16 };
            let case = Case::new(&Spec { mask: true, n_head_kv: 1, n_other, k_type, ..spec });
            through_a_map(&device, &case, &OnGpu::new(&device, &case));
        }
    }
}

/// Rows of 256 elements of a type as a cache holds them, turned in blocks, and the numbers in them.
fn cache_of(element: Element, block: usize, random: &mut Random) -> (Vec<u8>, Vec<Vec<f32>>) {
    let (mut bytes, mut rows) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        let first = bytes.len();
        let row: Vec<f32> = (0..256).map(|_| 2.0 * random.normal()).collect();
        encode(element, &row, &mut bytes);
        let mut row = decode(element, &bytes[first..]);
        hadamard::rotate(&mut row, block);
        rows.push(row);
    }
    (bytes, rows)
}

#[test]
fn what_a_search_compares_is_that_of_the_rows() {
    let Some(device) = gpu() else { return };
    let stream = Stream::new(&device).unwrap();
    let types = [Element::F16, Element::BF16, Element::Q8_0, Element::Q4_0];
    for (n, element) in types.into_iter().enumerate() {
        let random = &mut Random(n as u64);
        // K turned or not, V the other way round and of another type.
        let elements = [element, types[(n + 1) % 4]];
        let blocks = if n % 2 == 0 { [128, 0] } else { [0, 64] };
        let dims = [vec![0, 3, 23, 130, 255], vec![254, 1]];
        let peaks = [vec![0, 64, 224], vec![32]];
        let caches = [0, 1].map(|i| cache_of(elements[i], blocks[i], random));
        let buffers = [0, 1].map(|i| Buffer::of(&device, "a test", &caches[i].0).unwrap());
        let at = |i: usize| (buffers[i].address(), elements[i].row_bytes(256), 256);
        let rows = DeviceRows { k: at(0), v: at(1), types: elements, n_cell: 300 };
        let side = |i: usize| Compared { dims: &dims[i], block: blocks[i], peaks: &peaks[i] };
        // SAFETY: rows of `buffers`.
        let found = unsafe { gather(&rows, 280, &side(0), &side(1), &device, &stream) }.unwrap();
        let mut want = Vec::new();
        for cell in 0..280 {
            for i in 0..2 {
                want.extend(dims[i].iter().map(|d| caches[i].1[cell][*d as usize]));
                if elements[i].block() == 1 {
                    continue;
                }
                let size = elements[i].block_bytes();
                let scale = |element: usize| {
                    let at = cell * elements[i].row_bytes(256) + element / 32 * size;
                    f16::from_le_bytes([caches[i].0[at], caches[i].0[at + 1]]).to_f32()
                };
                want.extend(dims[i].iter().map(|d| {
                    let first = *d as usize / blocks[i].max(32) * blocks[i].max(32);
                    let runs = (first..first + blocks[i].max(32)).step_by(32);
                    let n = runs.len() as f32;
                    runs.map(|at| scale(at).powi(2) / 12.0).sum::<f32>() / n
                }));
                let steps = if elements[i] == Element::Q8_0 { 127.0 } else { 8.0 };
                want.extend(peaks[i].iter().map(|at| scale(*at as usize).abs() * steps));
            }
        }
        assert_eq!(found.len(), want.len(), "{element:?}");
        for (at, (f, w)) in found.iter().zip(&want).enumerate() {
            assert!((f - w).abs() <= 1e-5 * (1.0 + w.abs()), "{element:?}: number {at} is {f}, not {w}");
        }
    }
}
