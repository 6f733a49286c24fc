//! Binding on made-up caches: true placements are found, whatever their order; one wrong row and nothing is.

use std::sync::Arc;

use half::f16;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::*;
use crate::index::sample::sample_parts;
use crate::index::{to_bytes, Index};

const N_PREFIX: usize = 90;
const N_CELL: usize = 256;

struct Cache {
    k: Vec<f16>,
    v: Vec<f16>,
    k_len: usize,
    v_len: usize,
}

impl Cache {
    /// Random rows, with the index's prefix in `cells`.
    fn new(index: &Index, cells: &[u32], rng: &mut StdRng) -> Cache {
        let sketch = index.sketch();
        let shape = index.layer(sketch.layer).unwrap().shape;
        let (k_len, v_len) =
            ((shape.n_head_kv * shape.head_dim_k) as usize, (shape.n_head_kv * shape.head_dim_v) as usize);
        let mut random = |n: usize| (0..n).map(|_| f16::from_f32(rng.random_range(-2.0..2.0))).collect();
        let mut cache = Cache { k: random(N_CELL * k_len), v: random(N_CELL * v_len), k_len, v_len };
        for (t, &cell) in cells.iter().enumerate() {
            cache.put(index, t, cell as usize);
        }
        cache
    }

    fn put(&mut self, index: &Index, token: usize, cell: usize) {
        let s = index.sketch();
        for (i, &d) in s.k_dims.iter().enumerate() {
            self.k[cell * self.k_len + d as usize] = s.k[token * s.k_dims.len() + i];
        }
        for (i, &d) in s.v_dims.iter().enumerate() {
            self.v[cell * self.v_len + d as usize] = s.v[token * s.v_dims.len() + i];
        }
    }

    fn rows(&self) -> CacheRows {
        CacheRows {
            k: self.k.as_ptr().cast(),
            v: self.v.as_ptr().cast(),
            k_stride: self.k_len * 2,
            v_stride: self.v_len * 2,
            k_len: self.k_len,
            v_len: self.v_len,
            n_cell: N_CELL,
        }
    }
}

fn matcher(seed: u64) -> Matcher {
    let parts = sample_parts(seed, N_PREFIX, 2, 2, 64, 64, 5);
    Matcher::new(Arc::new(Index::from_bytes(to_bytes(&parts).unwrap()).unwrap()))
}

fn all_cells() -> Vec<u32> {
    (0..N_CELL as u32).collect()
}

proptest! {
    #[test]
    fn a_prefix_is_found_in_a_row_and_scattered(seed: u64, start in 0..(N_CELL - N_PREFIX) as u32) {
        let mut rng = StdRng::seed_from_u64(seed);
        let m = matcher(seed);
        let in_a_row: Vec<u32> = (start..start + N_PREFIX as u32).collect();
        let mut scattered = all_cells();
        scattered.shuffle(&mut rng);
        scattered.truncate(N_PREFIX);
        for cells in [in_a_row, scattered] {
            let cache = Cache::new(&m.index, &cells, &mut rng);
            prop_assert_eq!(m.find(&cache.rows(), &all_cells(), &|_| true), Some(cells));
        }
    }

    #[test]
    fn one_other_row_or_a_hidden_or_rewritten_cell_unbinds(seed: u64, token in 0..N_PREFIX) {
        let mut rng = StdRng::seed_from_u64(seed);
        let m = matcher(seed);
        let cells: Vec<u32> = (7..7 + N_PREFIX as u32).collect();
        let mut cache = Cache::new(&m.index, &cells, &mut rng);
        let gone = cells[token];
        let seen: Vec<u32> = all_cells().into_iter().filter(|&c| c != gone).collect();
        prop_assert_eq!(m.find(&cache.rows(), &seen, &|_| true), None);
        prop_assert_eq!(m.find(&cache.rows(), &all_cells(), &|c| c != gone), None);
        cache.put(&m.index, (token + 1) % N_PREFIX, gone as usize);
        prop_assert_eq!(m.find(&cache.rows(), &all_cells(), &|_| true), None);
    }

    #[test]
    fn a_nan_row_never_matches(seed: u64, token in 0..N_PREFIX) {
        let m = matcher(seed);
        let cells: Vec<u32> = (0..N_PREFIX as u32).collect();
        let mut cache = Cache::new(&m.index, &cells, &mut StdRng::seed_from_u64(seed));
        cache.k[token * cache.k_len..(token + 1) * cache.k_len].fill(f16::NAN);
        prop_assert_eq!(m.find(&cache.rows(), &all_cells(), &|_| true), None);
    }
}

#[test]
fn always_cells_are_the_sinks_and_every_cell_that_is_not_clustered() {
    // tokens 0..6 in these cells: 2 sinks, 3 clustered, 1 window; 9 cells in all
    let cells = [4, 7, 0, 2, 8, 5];
    assert_eq!(always_cells(&cells, 2, 1, 9), [4, 7, 1, 3, 5, 6]);
}
