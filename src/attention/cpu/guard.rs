//! Whether K and V hold in cells 0 to P the prefix that an index describes: the means of a cluster's rows against those that
//! the index stores, and digests of a token's rows, which tell any later change.

use std::ops::Range;

use half::f16;
use xxhash_rust::xxh3::xxh3_64;

use super::kernels::{decode, BLOCK};
use super::memory::address;
use super::Path;
use crate::attention::{Array, Element, Problem};
use crate::index::LayerView;

/// Half precision of the stored means.
const MEAN_ROUNDING: f64 = 1.0 / 2048.0;
/// The same for numbers too small for full precision.
const SMALLEST: f64 = 1.0 / (1u64 << 24) as f64;
/// An element of a quantised row may be half a step of its scale away: in the square, three times the variance of a rounding
/// error. Such errors may all be of one sign (elements that are small beside the largest of their block), and a mean keeps them.
const NOISE_ALLOWANCE: f64 = 3.0;

/// One stream of a call, held against one layer of an index.
pub struct Guard<'a> {
    problem: &'a Problem,
    view: LayerView<'a>,
    stream: usize,
    tolerance: f64,
    path: Path,
}

/// K or V.
struct Half<'a> {
    array: &'a Array,
    element: Element,
    stored: &'a [f16],
}

impl<'a> Guard<'a> {
    /// For a problem that passed `check_problem` and `check_shape` and has a cell for each token of the prefix. `tolerance`:
    /// distance of a row from the row that was indexed, relative to the usual norm of its cluster's rows, that is taken for
    /// rounding. Such errors are independent: those of a mean are allowed the root of the number of rows less.
    pub fn new(problem: &'a Problem, view: LayerView<'a>, stream: usize, tolerance: f32) -> Guard<'a> {
        Guard { problem, view, stream, tolerance: tolerance.into(), path: Path::detect() }
    }

    fn halves(&self) -> [Half<'a>; 2] {
        let (p, view) = (self.problem, self.view);
        [
            Half { array: &p.k, element: p.k_type, stored: view.centroids },
            Half { array: &p.v, element: p.v_type, stored: view.mean_values },
        ]
    }

    /// Address of a token's row.
    fn row(&self, array: &Array, token: usize, head_kv: usize) -> *const u8 {
        address(array, [token, head_kv, self.stream / (self.problem.q.ne[3] / array.ne[3])])
    }

    /// Are the means of K and of V over each of these clusters of a KV head those of the index? No NaN agrees.
    ///
    /// # Safety
    /// K and V can be read in all of their extents.
    pub unsafe fn agrees(&self, head_kv: usize, clusters: Range<usize>) -> bool {
        let offsets = self.view.head_offsets(head_kv);
        let members = self.view.head_members(head_kv);
        let mut decoded = Vec::new();
        self.halves().iter().all(|half| {
            let d = half.array.ne[0];
            clusters.clone().all(|c| {
                let run = offsets[c] as usize..offsets[c + 1] as usize;
                let rows = run.map(|j| self.row(half.array, members.get(j) as usize, head_kv));
                let stored = &half.stored[(head_kv * (offsets.len() - 1) + c) * d..][..d];
                // SAFETY: the contract; members are tokens of the prefix.
                unsafe { self.is_mean(stored, rows, half.element, &mut decoded) }
            })
        })
    }

    /// # Safety
    /// As for `agrees`: every row has as many elements as `stored`.
    unsafe fn is_mean(
        &self,
        stored: &[f16],
        rows: impl ExactSizeIterator<Item = *const u8>,
        element: Element,
        decoded: &mut Vec<f32>,
    ) -> bool {
        let (d, n) = (stored.len(), rows.len() as f64);
        decoded.resize(BLOCK * d, 0.0);
        let (mut sum, mut squares, mut noise) = (vec![0f32; d], 0f64, 0f64);
        let mut rows = rows.peekable();
        while rows.peek().is_some() {
            let block: Vec<*const u8> = rows.by_ref().take(BLOCK).collect();
            // SAFETY: the contract, and the sizes above.
            unsafe { decode(self.path, element.into(), &block, d, decoded) };
            for (row, at) in decoded.chunks_exact(d).zip(&block) {
                sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
                squares += norm2(row);
                // SAFETY: as above.
                noise += unsafe { rounding(*at, element, d) };
            }
        }
        let (mut distance, mut norm) = (0.0, 0.0);
        for (sum, stored) in sum.iter().zip(stored) {
            let stored = stored.to_f64();
            distance += (f64::from(*sum) / n - stored).powi(2);
            norm += stored * stored;
        }
        let allowed = self.tolerance * self.tolerance * squares / n / n
            + NOISE_ALLOWANCE * noise / n
            + MEAN_ROUNDING * MEAN_ROUNDING * norm
            + SMALLEST * SMALLEST * d as f64;
        distance <= allowed && allowed < f64::INFINITY
    }

    /// A digest of a token's rows of all KV heads.
    ///
    /// # Safety
    /// K and V can be read in all of their extents; the token has a cell.
    pub unsafe fn digest(&self, token: usize) -> u64 {
        let mut digest = 0u64;
        for half in self.halves() {
            let (a, size) = (half.array, half.element.row_bytes(half.array.ne[0]));
            let mut add = |head_kv: usize, size: usize| {
                // SAFETY: the contract; `size` bytes are those of the row, or of all rows of a cell where they are packed.
                let bytes = unsafe { std::slice::from_raw_parts(self.row(a, token, head_kv), size) };
                digest = digest.rotate_left(23) ^ xxh3_64(bytes);
            };
            match a.nb[2] == size {
                true => add(0, size * a.ne[2]),
                false => (0..a.ne[2]).for_each(|head_kv| add(head_kv, size)),
            }
        }
        digest
    }
}

/// Eight sums at a time, which the compiler keeps in registers.
fn norm2(row: &[f32]) -> f64 {
    let mut sums = [0f32; 8];
    for eight in row.chunks_exact(8) {
        sums.iter_mut().zip(eight).for_each(|(s, x)| *s += x * x);
    }
    sums.iter().map(|s| f64::from(*s)).sum()
}

/// Variance of the rounding error of a row of `d` elements: that of a whole step of each block's scale.
///
/// # Safety
/// The row can be read.
unsafe fn rounding(row: *const u8, element: Element, d: usize) -> f64 {
    let n = element.block();
    if n == 1 {
        return 0.0;
    }
    let scale = |block: usize| {
        // SAFETY: a block of the row; it begins with its scale.
        let bits = unsafe { row.add(block * element.block_bytes()).cast::<u16>().read_unaligned() };
        f16::from_bits(bits).to_f64()
    };
    (0..d / n).map(|block| scale(block).powi(2) * n as f64 / 12.0).sum()
}
