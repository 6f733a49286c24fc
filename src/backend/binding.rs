//! Which cells of a cache hold an index's prefix: matches the sketch of every prefix token against raw cache rows. Reads rows
//! through `CacheRows` only; knows nothing of graphs.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use half::f16;

use super::rows::{is_quantised, CacheRows, Part, Row, Rows};
use super::stats::log;
use crate::attention::{Element, Rotation};
use crate::hadamard::rotate;
use crate::index::{peak_run, reserved, tolerances, Index, IndexError, PEAK_RUN};

/// Largest relative distance of the probed rows of a later layer, where batch shapes alone give up to 0.015 and a Q8_0 cache
/// up to 0.05.
pub const PROBE_TOLERANCE: f32 = 0.08;
/// The same where the sketch is not of layer 0: rows of such a model differ more (0.064 over 64 rows of Gemma-3-270M's last layer).
pub const PROBE_TOLERANCE_LATER: f32 = 0.15;
/// The same where K or V is Q4_0: its rounding adds up over the layers, to a median of 0.26 in Qwen2.5-Coder-0.5B.
pub const PROBE_TOLERANCE_Q4_0: f32 = 0.5;
/// Largest relative distance of the peaks of a row. On one machine 0.0005 was seen, half-precision rounding.
pub const PEAK_TOLERANCE: f32 = 0.0075;
/// Largest distance of the peaks of a later layer's row, as a share of what its elements may have; 0.36 was seen in prose.
const PEAK_SHARE_LATER: f32 = 0.75;
/// Rounding of a quantised row is allowed for this many times over in the square of a distance. Normal errors of 16 elements
/// exceed five times their mean in 1 row of 5 10^9; four times would be 1 of 10^7, too often for long prefixes.
const NOISE_ALLOWANCE: f32 = 5.0;
/// Start cells tried for a contiguous placement.
const MAX_STARTS: usize = 32;
/// Rows compared in one search of scattered cells, seconds' worth. A prefix whose tokens can be told apart needs few; without a
/// bound a hostile index could hold a host for cells times tokens.
const MAX_COMPARED: usize = if cfg!(test) { 1 << 14 } else { 1 << 28 };

/// An index made ready for matching.
pub struct Matcher {
    pub index: Arc<Index>,
    /// Squared distance allowed per token: to the elements, and to the peaks.
    k_limit: Vec<f32>,
    v_limit: Vec<f32>,
    k_peak_limit: Vec<f32>,
    v_peak_limit: Vec<f32>,
    by_element: Order,
    by_peak: Order,
    /// A search compared too much: there are no more.
    costly: AtomicBool,
}

/// Tokens in the order of one number of their sketch.
struct Order {
    tokens: Vec<u32>,
    /// Allowed difference of that number: the largest distance allowed to any token.
    reach: f32,
}

impl Order {
    /// By the first of the `n` numbers that each token has.
    fn new(numbers: &[f16], n: usize, limits: &[f32]) -> Result<Order, IndexError> {
        let mut tokens = reserved(limits.len())?;
        tokens.extend(0..limits.len() as u32);
        tokens.sort_unstable_by(|&a, &b| {
            numbers[a as usize * n].total_cmp(&numbers[b as usize * n]).then_with(|| a.cmp(&b))
        });
        Ok(Order { tokens, reach: limits.iter().fold(0f32, |m, &x| m.max(x)).sqrt() })
    }

    /// Tokens within reach of `value`.
    fn near<'a>(&'a self, value: f32, number: impl Fn(u32) -> f32 + 'a) -> impl Iterator<Item = u32> + 'a {
        let from = self.tokens.partition_point(|&t| number(t) < value - self.reach);
        self.tokens[from..].iter().copied().take_while(move |&t| number(t) <= value + self.reach)
    }
}

/// Squared distances allowed to rows of `n` numbers.
fn limits(rows: &[f16], n: usize, n_token: usize, tolerance: f32) -> Result<Vec<f32>, IndexError> {
    let mut limits = reserved(n_token)?;
    limits.extend(rows.chunks_exact(n).map(|row| row.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>()));
    let mean = limits.iter().sum::<f32>() / n_token.max(1) as f32;
    // a row of tiny norm is measured against the usual row: half-precision rounding does not shrink with it
    limits.iter_mut().for_each(|x| *x = x.max(mean / 16.0) * tolerance * tolerance);
    Ok(limits)
}

/// Squared distance of a row's elements `dims` to those of a sketch, less what the rounding of the row may give. `block`: the
/// row's basis.
fn distance2(row: Row, block: usize, dims: &[u32], sketch: &[f16]) -> f32 {
    let difference = |x: f32, expected: &f16| (x - expected.to_f32()).powi(2);
    if row.compact.is_some() {
        let noise = |i| if is_quantised(row.element) { row.copied(Part::Noise, i) } else { 0.0 };
        let of = |(i, s)| difference(row.copied(Part::Element, i), s) - NOISE_ALLOWANCE * noise(i);
        return sketch.iter().enumerate().map(of).sum();
    }
    if block == 0 {
        let of = |(&d, s)| difference(row.get(d as usize), s) - NOISE_ALLOWANCE * row.noise(d as usize);
        return dims.iter().zip(sketch).map(of).sum();
    }
    let mut turned = vec![0.0; block];
    let (mut sum, mut noise, mut first) = (0.0, 0.0, usize::MAX);
    for (&d, s) in dims.iter().zip(sketch) {
        let d = d as usize;
        if first != d / block * block {
            first = d / block * block;
            row.decode(first, &mut turned);
            rotate(&mut turned, block);
            // every element of a block gets an equal share of its rounding errors
            let total: f32 = (first..first + block).step_by(PEAK_RUN).map(|i| row.noise(i)).sum();
            noise = total / (block / PEAK_RUN).max(1) as f32;
        }
        sum += difference(turned[d - first], s) - NOISE_ALLOWANCE * noise;
    }
    sum
}

/// Squared distance of a quantised row's peaks to those of a sketch.
fn peak_distance2(row: Row, n_run: usize, peaks: &[f16]) -> f32 {
    let peak = |i| match row.compact {
        Some(_) => row.copied(Part::Peak, i),
        None => row.peak(peak_run(i, peaks.len(), n_run) * PEAK_RUN).unwrap_or(f32::NAN),
    };
    peaks.iter().enumerate().map(|(i, expected)| (peak(i) - expected.to_f32()).powi(2)).sum()
}

/// One half of a token's sketch.
struct Half<'a> {
    dims: &'a [u32],
    elements: &'a [f16],
    peaks: &'a [f16],
    limit: f32,
    peak_limit: f32,
    block: usize,
}

impl Half<'_> {
    /// Written so that a NaN does not match.
    fn matches(&self, row: Row, len: usize) -> bool {
        if !is_quantised(row.element) {
            return distance2(row, 0, self.dims, self.elements) <= self.limit;
        }
        peak_distance2(row, len / PEAK_RUN, self.peaks) <= self.peak_limit
            && distance2(row, self.block, self.dims, self.elements) <= self.limit
    }
}

impl Matcher {
    /// # Errors
    /// `Memory`: 24 bytes a token are not to be had.
    pub fn new(index: Arc<Index>) -> Result<Matcher, IndexError> {
        let sketch = index.sketch();
        let n = index.meta().n_prefix();
        let of = |rows: &[f16], tolerance| limits(rows, (rows.len() / n.max(1)).max(1), n, tolerance);
        let [k, v] = tolerances(sketch.layer, sketch.tolerance);
        let (k_limit, v_limit) = (of(sketch.k, k)?, of(sketch.v, v)?);
        let [k, v] = [k, v].map(|t| if sketch.layer == 0 { PEAK_TOLERANCE } else { PEAK_SHARE_LATER * t });
        let (k_peak_limit, v_peak_limit) = (of(sketch.k_peaks, k)?, of(sketch.v_peaks, v)?);
        let by_element = Order::new(sketch.k, sketch.k_dims.len(), &k_limit)?;
        let by_peak = Order::new(sketch.k_peaks, sketch.k_peaks.len() / n.max(1), &k_peak_limit)?;
        let costly = AtomicBool::new(false);
        Ok(Matcher { index, k_limit, v_limit, k_peak_limit, v_peak_limit, by_element, by_peak, costly })
    }

    fn k_half(&self, token: usize) -> Half<'_> {
        let s = self.index.sketch();
        let (n, n_peak) = (s.k_dims.len(), s.k_peaks.len() / self.k_limit.len());
        Half {
            dims: s.k_dims,
            elements: &s.k[token * n..(token + 1) * n],
            peaks: &s.k_peaks[token * n_peak..(token + 1) * n_peak],
            limit: self.k_limit[token],
            peak_limit: self.k_peak_limit[token],
            block: s.k_block as usize,
        }
    }

    fn v_half(&self, token: usize) -> Half<'_> {
        let s = self.index.sketch();
        let (n, n_peak) = (s.v_dims.len(), s.v_peaks.len() / self.v_limit.len());
        Half {
            dims: s.v_dims,
            elements: &s.v[token * n..(token + 1) * n],
            peaks: &s.v_peaks[token * n_peak..(token + 1) * n_peak],
            limit: self.v_limit[token],
            peak_limit: self.v_peak_limit[token],
            block: s.v_block as usize,
        }
    }

    /// Does `cell` hold prefix token `token` at its position?
    pub fn matches(&self, token: usize, rows: &CacheRows, cell: usize) -> bool {
        self.k_half(token).matches(rows.k_row(cell), rows.k.len)
            && self.v_half(token).matches(rows.v_row(cell), rows.v.len)
    }

    /// Basis of a cache of these types, once it has matched.
    pub fn rotation(&self, k: Element, v: Element) -> Rotation {
        let sketch = self.index.sketch();
        let block = |element, block: u32| if is_quantised(element) { block as usize } else { 0 };
        Rotation { k: block(k, sketch.k_block), v: block(v, sketch.v_block) }
    }

    /// First elements of the runs whose peaks the sketch has, of a K row and of a V row of so many elements.
    pub fn peak_places(&self, len_k: usize, len_v: usize) -> [Vec<u32>; 2] {
        let sketch = self.index.sketch();
        let places = |peaks: &[f16], len: usize| {
            let n = peaks.len() / self.k_limit.len();
            (0..n).map(|i| (peak_run(i, n, len / PEAK_RUN) * PEAK_RUN) as u32).collect()
        };
        [places(sketch.k_peaks, len_k), places(sketch.v_peaks, len_v)]
    }

    /// True where the rows can be compared at all.
    pub fn fits(&self, rows: &CacheRows) -> bool {
        let sketch = self.index.sketch();
        self.index.layer(sketch.layer).is_some_and(|layer| {
            let s = layer.shape;
            let len = |rows: &Rows, head_dim: u32, dims: &[u32]| match rows.compact {
                Some(_) => rows.len == dims.len(),
                None => rows.len == (s.n_head_kv * head_dim) as usize,
            };
            len(&rows.k, s.head_dim_k, sketch.k_dims) && len(&rows.v, s.head_dim_v, sketch.v_dims)
        })
    }

    /// Cell of every prefix token among `visible` (ascending), or `None`. `usable` excludes cells (being rewritten).
    pub fn find(&self, rows: &CacheRows, visible: &[u32], usable: &dyn Fn(u32) -> bool) -> Option<Vec<u32>> {
        let n = self.index.meta().n_prefix();
        if visible.len() < n || !self.fits(rows) || self.costly.load(Ordering::Relaxed) {
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
        let mut cells = vec![u32::MAX; n];
        let mut missing = n;
        let mut next = 0;
        let compared = Cell::new(0usize);
        for &cell in visible.iter().filter(|&&c| usable(c)) {
            if compared.get() > MAX_COMPARED {
                self.costly.store(true, Ordering::Relaxed);
                let name = self.index.path().map_or("an index".to_string(), |path| path.display().to_string());
                log(format_args!(
                    "{name} is used no more: its tokens are too much alike to be found among cells in reasonable time; \
                     attention stays dense"
                ));
                return None;
            }
            let free = |t: usize| {
                let open = cells.get(t) == Some(&u32::MAX);
                compared.set(compared.get() + usize::from(open));
                open && self.matches(t, rows, cell as usize)
            };
            // a prefix lies in a few long runs: its cells were taken in order
            let found = if free(next) { Some(next) } else { self.near(rows, cell as usize).find(|&t| free(t)) };
            if let Some(t) = found {
                (cells[t], missing, next) = (cell, missing - 1, t + 1);
            }
            if missing == 0 {
                return Some(cells);
            }
        }
        None
    }

    /// Tokens whose sketch is near to a cell's K row in one number.
    fn near<'a>(&'a self, rows: &CacheRows, cell: usize) -> Box<dyn Iterator<Item = usize> + 'a> {
        let sketch = self.index.sketch();
        let row = rows.k_row(cell);
        let (order, numbers, n) = match is_quantised(row.element) {
            true => (&self.by_peak, sketch.k_peaks, sketch.k_peaks.len() / self.k_limit.len()),
            false => (&self.by_element, sketch.k, sketch.k_dims.len()),
        };
        let value = match (row.compact, row.peak(0)) {
            (Some(_), _) if is_quantised(row.element) => row.copied(Part::Peak, 0),
            (Some(_), _) => row.copied(Part::Element, 0),
            // the first peak is that of the first run
            (None, Some(peak)) => peak,
            (None, None) => row.get(sketch.k_dims[0] as usize),
        };
        Box::new(order.near(value, move |t| numbers[t as usize * n].to_f32()).map(|t| t as usize))
    }

    /// Number of the last clustered token: an edit of the prefix replaces everything behind it, so it changes too.
    pub fn last_clustered(&self) -> usize {
        let meta = self.index.meta();
        meta.n_prefix() - meta.n_window as usize - 1
    }

    /// Do the probe rows of later layers agree? `rows_of(layer)` gives that layer's cache; those without are not compared.
    pub fn probes_agree(&self, cells: &[u32], rows_of: &dyn Fn(u32) -> Option<CacheRows>) -> bool {
        self.index.probes().iter().all(|probe| {
            let Some(rows) = rows_of(probe.layer) else { return true };
            let block = self.rotation(rows.k.element, rows.v.element).k;
            if probe.k.len() != rows.k.len * probe.tokens.len() || (block > 0 && rows.k.len % block != 0) {
                return false;
            }
            let coarse = [rows.k.element, rows.v.element].contains(&Element::Q4_0);
            let tolerance = match self.index.sketch().layer {
                _ if coarse => PROBE_TOLERANCE_Q4_0,
                0 => PROBE_TOLERANCE,
                _ => PROBE_TOLERANCE_LATER,
            };
            let mut plain = vec![0.0; rows.k.len];
            let (mut difference, mut norm) = (0f32, 0f32);
            for (expected, &token) in probe.k.chunks_exact(rows.k.len).zip(probe.tokens) {
                rows.k_row(cells[token as usize] as usize).decode(0, &mut plain);
                rotate(&mut plain, block);
                for (a, b) in plain.iter().zip(expected) {
                    difference += (a - b.to_f32()).powi(2);
                    norm += b.to_f32().powi(2);
                }
            }
            difference <= norm * tolerance * tolerance
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
pub mod tests;
