//! Which cells of a cache hold an index's prefix: matches the sketch of every prefix token against raw cache rows. Reads rows
//! through `CacheRows` only; knows nothing of graphs.

use std::sync::Arc;

use half::f16;

use crate::index::{Index, SKETCH_TOLERANCE};

/// Largest relative distance of whole rows of later layers, where batch shapes alone give up to 0.015.
pub const PROBE_TOLERANCE: f32 = 0.08;
/// Start cells tried for a contiguous placement.
const MAX_STARTS: usize = 32;

/// K and V rows of one layer and one stream of a cache, F16.
#[derive(Clone, Copy)]
pub struct CacheRows {
    pub k: *const u8,
    pub v: *const u8,
    /// Bytes from one cell to the next.
    pub k_stride: usize,
    pub v_stride: usize,
    /// Elements per row.
    pub k_len: usize,
    pub v_len: usize,
    pub n_cell: usize,
}

impl CacheRows {
    pub fn k_row(&self, cell: usize) -> &[f16] {
        assert!(cell < self.n_cell);
        // SAFETY: whoever made the value vouches for n_cell rows of k_len elements, 2-byte aligned, alive while it is used.
        unsafe { std::slice::from_raw_parts(self.k.add(cell * self.k_stride).cast(), self.k_len) }
    }

    pub fn v_row(&self, cell: usize) -> &[f16] {
        assert!(cell < self.n_cell);
        // SAFETY: as in `k_row`.
        unsafe { std::slice::from_raw_parts(self.v.add(cell * self.v_stride).cast(), self.v_len) }
    }
}

/// An index made ready for matching.
pub struct Matcher {
    pub index: Arc<Index>,
    /// Squared distance allowed per token.
    k_limit: Vec<f32>,
    v_limit: Vec<f32>,
    /// Tokens by the first K element of their sketch.
    by_first_k: Vec<u32>,
    /// Allowed difference of one element: the largest distance allowed to any token.
    first_k_reach: f32,
}

fn limits(sketch: &[f16], n_dim: usize, n_token: usize) -> Vec<f32> {
    let norms: Vec<f32> =
        sketch.chunks_exact(n_dim).map(|row| row.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>()).collect();
    let mean = norms.iter().sum::<f32>() / n_token.max(1) as f32;
    // a row of tiny norm is measured against the usual row: half-precision rounding does not shrink with it
    norms.iter().map(|&n| n.max(mean / 16.0) * SKETCH_TOLERANCE * SKETCH_TOLERANCE).collect()
}

fn distance2(row: &[f16], dims: &[u32], sketch: &[f16]) -> f32 {
    dims.iter()
        .zip(sketch)
        .map(|(&d, s)| {
            let x = row[d as usize].to_f32() - s.to_f32();
            x * x
        })
        .sum()
}

impl Matcher {
    pub fn new(index: Arc<Index>) -> Matcher {
        let sketch = index.sketch();
        let n = index.meta().n_prefix();
        let (nk, nv) = (sketch.k_dims.len(), sketch.v_dims.len());
        let k_limit = limits(sketch.k, nk, n);
        let v_limit = limits(sketch.v, nv, n);
        let mut by_first_k: Vec<u32> = (0..n as u32).collect();
        by_first_k.sort_by(|&a, &b| sketch.k[a as usize * nk].total_cmp(&sketch.k[b as usize * nk]));
        let first_k_reach = k_limit.iter().fold(0f32, |m, &x| m.max(x)).sqrt();
        Matcher { index, k_limit, v_limit, by_first_k, first_k_reach }
    }

    /// Does `cell` hold prefix token `token` at its position?
    pub fn matches(&self, token: usize, rows: &CacheRows, cell: usize) -> bool {
        let sketch = self.index.sketch();
        let (nk, nv) = (sketch.k_dims.len(), sketch.v_dims.len());
        // written so that a NaN does not match
        distance2(rows.k_row(cell), sketch.k_dims, &sketch.k[token * nk..(token + 1) * nk]) <= self.k_limit[token]
            && distance2(rows.v_row(cell), sketch.v_dims, &sketch.v[token * nv..(token + 1) * nv])
                <= self.v_limit[token]
    }

    /// True where the rows can be compared at all.
    pub fn fits(&self, rows: &CacheRows) -> bool {
        let sketch = self.index.sketch();
        self.index.layer(sketch.layer).is_some_and(|layer| {
            let s = layer.shape;
            rows.k_len == (s.n_head_kv * s.head_dim_k) as usize && rows.v_len == (s.n_head_kv * s.head_dim_v) as usize
        })
    }

    /// Cell of every prefix token among `visible` (ascending), or `None`. `usable` excludes cells (being rewritten).
    pub fn find(&self, rows: &CacheRows, visible: &[u32], usable: &dyn Fn(u32) -> bool) -> Option<Vec<u32>> {
        let n = self.index.meta().n_prefix();
        if visible.len() < n || !self.fits(rows) {
            return None;
        }
        let contiguous = |start: u32| {
            let end = start as usize + n;
            end <= rows.n_cell
                && visible.binary_search(&start).is_ok_and(|i| visible.get(i + n - 1) == Some(&((end - 1) as u32)))
                && (0..n).all(|t| usable(start + t as u32) && self.matches(t, rows, start as usize + t))
        };
        let starts = visible.iter().copied().filter(|&c| self.matches(0, rows, c as usize));
        if let Some(start) = starts.take(MAX_STARTS).find(|&c| contiguous(c)) {
            return Some((start..start + n as u32).collect());
        }
        self.find_scattered(rows, visible, usable)
    }

    fn find_scattered(&self, rows: &CacheRows, visible: &[u32], usable: &dyn Fn(u32) -> bool) -> Option<Vec<u32>> {
        let n = self.index.meta().n_prefix();
        let anchor = self.last_clustered();
        if !visible.iter().any(|&c| self.matches(anchor, rows, c as usize)) {
            return None;
        }
        let sketch = self.index.sketch();
        let nk = sketch.k_dims.len();
        let first = |token: u32| sketch.k[token as usize * nk].to_f32();
        let mut cells = vec![u32::MAX; n];
        let mut missing = n;
        for &cell in visible.iter().filter(|&&c| usable(c)) {
            let value = rows.k_row(cell as usize)[sketch.k_dims[0] as usize].to_f32();
            let from = self.by_first_k.partition_point(|&t| first(t) < value - self.first_k_reach);
            let near = self.by_first_k[from..].iter().take_while(|&&t| first(t) <= value + self.first_k_reach);
            for &t in near {
                if cells[t as usize] == u32::MAX && self.matches(t as usize, rows, cell as usize) {
                    cells[t as usize] = cell;
                    missing -= 1;
                    break;
                }
            }
        }
        (missing == 0).then_some(cells)
    }

    /// Number of the last clustered token: an edit of the prefix replaces everything behind it, so it changes too.
    pub fn last_clustered(&self) -> usize {
        let meta = self.index.meta();
        meta.n_prefix() - meta.n_window as usize - 1
    }

    /// Do the probe rows of later layers agree? `rows_of(layer)` gives that layer's cache, `None` where it is not known.
    pub fn probes_agree(&self, cells: &[u32], rows_of: &dyn Fn(u32) -> Option<CacheRows>) -> bool {
        self.index.probes().iter().all(|probe| {
            let Some(rows) = rows_of(probe.layer) else { return false };
            probe.k.chunks_exact(rows.k_len).zip(probe.tokens).all(|(expected, &token)| {
                let row = rows.k_row(cells[token as usize] as usize);
                let (mut difference, mut norm) = (0f32, 0f32);
                for (a, b) in row.iter().zip(expected) {
                    difference += (a.to_f32() - b.to_f32()).powi(2);
                    norm += b.to_f32().powi(2);
                }
                difference <= norm * PROBE_TOLERANCE * PROBE_TOLERANCE
            }) && probe.k.len() == rows.k_len * probe.tokens.len()
        })
    }
}

/// Cells that every sparse row attends: the sinks first, then every cell below `n_kv` that holds no sink and no
/// clustered token.
pub fn always_cells(cells: &[u32], n_sink: usize, n_window: usize, n_kv: usize) -> Vec<u32> {
    let mut taken = vec![false; n_kv];
    for &cell in &cells[..cells.len() - n_window] {
        taken[cell as usize] = true;
    }
    let tail = (0..n_kv as u32).filter(|&c| !taken[c as usize]);
    cells[..n_sink].iter().copied().chain(tail).collect()
}

#[cfg(test)]
#[path = "binding_tests.rs"]
mod tests;
