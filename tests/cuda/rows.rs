//! What is done once per graph: each row's binding by its mask, and what ends a binding.

use ggml_squeeze::attention::cuda::{gather, DeviceRows, Masks, RowMap, RowNumbers, Stream, Watched};

use super::*;

const N_CELL: usize = 700;
const N_KV: usize = 640;
const N_PREFIX: usize = 300;
const ROW: usize = 24;

/// An index of so many tokens in these cells.
fn bind(device: &Arc<Device>, cells: &[u32]) -> Watched {
    let case = Case::new(&Spec { n_prefix: N_PREFIX, ..Spec::base() });
    let resident = Resident::of(&case.call.bindings[0].index, device).unwrap();
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
        DeviceRows { k: at(0), v: at(1), n_cell: N_CELL }
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

#[test]
fn gathered_elements_are_those_of_the_rows() {
    let Some(device) = gpu() else { return };
    let f = Fixture::new(&device, 5);
    let (k_dims, v_dims) = ([0, 3, 23], [22, 1]);
    // SAFETY: rows of `f.cache`.
    let found = unsafe { gather(&f.cache_rows(), 650, &k_dims, &v_dims, &device, &f.stream) }.unwrap();
    let cache: Vec<f16> = f.cache.read(0, 2 * N_CELL * ROW).unwrap();
    for (cell, own) in found.chunks_exact(5).enumerate() {
        let element = |half: usize, d: u32| cache[(half * N_CELL + cell) * ROW + d as usize];
        let want: Vec<f16> = k_dims.map(|d| element(0, d)).into_iter().chain(v_dims.map(|d| element(1, d))).collect();
        assert_eq!(own, want);
    }
}
