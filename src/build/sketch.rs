//! What binding needs of a prefix: a few elements of every token's K and V row in one layer (the sketch), whole K rows
//! of a few tokens in other layers (probes), and how well the sketch tells tokens and positions apart.

use std::collections::HashMap;

use half::prelude::*;

use super::{BuildError, LayerCapture, Settings};
use crate::hadamard::rotate;
use crate::index::{
    peak_run, tolerances, ProbeParts, SketchParts, SketchView, LATER_TOLERANCE, PEAK_RUN, SKETCH_TOLERANCE,
};
use crate::random::split_mix;

/// Elements kept of a K row and of a V row in layer 0.
const DIMS: usize = 16;
/// The same in a later layer, where a row depends on the text before it and is told from others less well.
const DIMS_LATER: usize = 64;
/// Peaks kept of a K row and of a V row, at most.
const PEAKS: usize = 8;
/// Pairs of rows that the choice of elements is based on.
const PAIRS: usize = 2048;
/// Fewer pairs of the same token than this say too little about positions.
const FEW_PAIRS: usize = 64;
/// Rows that `sketch_margin` compares with each other at most; more are thinned out evenly.
const MARGIN_ROWS: usize = 16384;
const PROBES: usize = 4;
/// Rows that the margin of a later layer is taken from, each compared with all.
const LATER_ROWS: usize = 512;

/// How well a sketch tells its own tokens apart; infinite where there is nothing to tell.
///
/// Distances are relative: the norm of the difference of two sketch rows, divided by the largest of both rows' norms
/// and a quarter of the root mean square norm of all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SketchMargin {
    /// Smallest distance between V parts of different tokens. Of a later layer than 0: what 99 of 100 tokens have at least.
    pub nearest_token: f32,
    /// Smallest distance between one token at two positions, the larger one of those of its K and V parts. Of a later layer:
    /// what 9 of 10 tokens have at least, K counted double; an insertion or omission moves all tokens behind it.
    pub nearest_position: f32,
    /// Is it of a later layer?
    pub is_later: bool,
}

impl SketchMargin {
    /// How far a row may be from its sketch ([`tolerances`]); `None` where tokens or positions are too near to each other.
    pub fn tolerance(&self) -> Option<f32> {
        let nearest = self.nearest_token.min(self.nearest_position);
        match self.is_later {
            true => (nearest >= LATER_TOLERANCE).then_some(LATER_TOLERANCE),
            false => (nearest >= 2.0 * SKETCH_TOLERANCE).then_some(SKETCH_TOLERANCE),
        }
    }
}

/// Chooses 16 elements of the K row and 16 of the V row, 64 in a later layer than 0 (all, if a row has fewer), and stores them
/// for every token. The margin tells whether its tolerance is safe.
///
/// The elements are those that best separate the hardest of many pairs of rows: for V, pairs of different rows; for K,
/// the same token (an equal V row, which in layer 0 is the same token) at different positions, near ones first.
/// Up to 8 peaks of each row are added, for quantised caches.
///
/// # Errors
/// `Shape` and `NonFinite` for a bad capture; `TooShort` for one of no tokens.
pub fn sketch(capture: &LayerCapture) -> Result<SketchParts, BuildError> {
    let n = capture.checked_prefix()?;
    if n == 0 {
        return Err(BuildError::TooShort { n_prefix: 0, needed: 1 });
    }
    let (row_k, row_v) = (capture.row_k(), capture.row_v());
    let groups = equal_rows(&capture.v, row_v);
    let mut near = position_pairs(&groups);
    if near.len() < FEW_PAIRS {
        near.extend(lagged_pairs(n));
    }
    let n_dim = if capture.layer == 0 { DIMS } else { DIMS_LATER };
    let k_dims = separating_dims(&capture.k, row_k, &near, n_dim);
    let v_dims = separating_dims(&capture.v, row_v, &token_pairs(&groups), n_dim);
    let k = take(&capture.k, row_k, &k_dims);
    let v = take(&capture.v, row_v, &v_dims);
    let (k_block, v_block) = cache_blocks(capture.head_dim_k, capture.head_dim_v);
    let k_peaks = peaks(&capture.k, row_k, k_block as usize);
    let v_peaks = peaks(&capture.v, row_v, v_block as usize);
    let (layer, tolerance) = (capture.layer, if capture.layer == 0 { SKETCH_TOLERANCE } else { LATER_TOLERANCE });
    Ok(SketchParts { layer, tolerance, k_dims, v_dims, k, v, k_block, v_block, k_peaks, v_peaks })
}

/// See [`super::extend_sketch`].
pub(super) fn extend(old: &SketchView, capture: &LayerCapture) -> Result<SketchParts, BuildError> {
    let n = capture.checked_prefix()?;
    let n_old = old.k.len() / old.k_dims.len();
    let differs = |what, old: String, new: String| BuildError::Differs { what, old, new };
    if old.layer != capture.layer {
        return Err(differs("the sketched layer", old.layer.to_string(), capture.layer.to_string()));
    }
    let (row_k, row_v) = (capture.row_k(), capture.row_v());
    if old.k_dims.last().is_some_and(|d| *d as usize >= row_k)
        || old.v_dims.last().is_some_and(|d| *d as usize >= row_v)
    {
        return Err(differs("the row size", "more elements".into(), format!("{row_k} and {row_v} elements")));
    }
    if n <= n_old {
        return Err(BuildError::NotContinued { token: n, n_old, n_new: n });
    }
    let (k, v) = (take(&capture.k, row_k, old.k_dims), take(&capture.v, row_v, old.v_dims));
    let [of_k, of_v] = tolerances(old.layer, old.tolerance);
    for (what, stored, found, width, tolerance) in [
        ("the keys of the old prefix", old.k, &k, old.k_dims.len(), of_k),
        ("the values of the old prefix", old.v, &v, old.v_dims.len(), of_v),
    ] {
        // Both as one table, so that a distance is that between a row of each.
        let both: Vec<f16> = stored.iter().chain(&found[..stored.len()]).copied().collect();
        let table = Table::new(&both, width);
        let apart = (0..n_old as u32).map(|p| table.distance(p, p + n_old as u32));
        let farthest = apart.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((token, distance)) = farthest.filter(|(_, distance)| *distance > tolerance) {
            let new = format!("rows {distance:.3} away (token {token})");
            return Err(differs(what, format!("within {tolerance} of the sketch"), new));
        }
    }
    let peaks = |stored: &[f16], data: &[f16], row: usize, block: u32| {
        let new = peaks(&data[n_old * row..], row, block as usize);
        stored.iter().copied().chain(new).collect::<Vec<f16>>()
    };
    Ok(SketchParts {
        layer: old.layer,
        tolerance: old.tolerance,
        k_dims: old.k_dims.to_vec(),
        v_dims: old.v_dims.to_vec(),
        k: [old.k, &k[old.k.len()..]].concat(),
        v: [old.v, &v[old.v.len()..]].concat(),
        k_block: old.k_block,
        v_block: old.v_block,
        k_peaks: peaks(old.k_peaks, &capture.k, row_k, old.k_block),
        v_peaks: peaks(old.v_peaks, &capture.v, row_v, old.v_block),
    })
}

/// Sizes of the Hadamard blocks in which llama.cpp turns K and V of these head sizes before it quantises them (`n_rot_k` and
/// `n_rot_v` in llama-kv-cache.cpp): for heads of whole 64s, the largest power of two that divides the head for K, and 64 for V.
/// 0: it turns none.
pub fn cache_blocks(head_dim_k: u32, head_dim_v: u32) -> (u32, u32) {
    let turned = |dim: u32| dim > 0 && dim.is_multiple_of(64);
    let k = if turned(head_dim_k) { 1 << head_dim_k.trailing_zeros() } else { 0 };
    (k, if turned(head_dim_v) { 64 } else { 0 })
}

/// Largest magnitudes in up to `PEAKS` runs of every row, after the transform.
fn peaks(data: &[f16], row: usize, block: usize) -> Vec<f16> {
    let n_run = row.div_ceil(PEAK_RUN);
    let n_peak = n_run.min(PEAKS);
    let mut turned = vec![0.0; row];
    let mut out = Vec::with_capacity(data.len() / row * n_peak);
    for raw in data.chunks_exact(row) {
        raw.convert_to_f32_slice(&mut turned);
        rotate(&mut turned, block);
        let largest = |run: &[f32]| run.iter().fold(0f32, |m, x| m.max(x.abs())).min(f16::MAX.to_f32());
        let run = |i: usize| turned.chunks(PEAK_RUN).nth(peak_run(i, n_peak, n_run)).unwrap_or_default();
        out.extend((0..n_peak).map(|i| f16::from_f32(largest(run(i)))));
    }
    out
}

/// Raw K rows of `tokens`.
///
/// # Panics
/// If a token is not in the capture.
pub fn probe(capture: &LayerCapture, tokens: &[u32]) -> ProbeParts {
    let row = capture.row_k();
    let k = tokens.iter().flat_map(|&t| &capture.k[t as usize * row..][..row]).copied().collect();
    ProbeParts { layer: capture.layer, tokens: tokens.to_vec(), k }
}

/// Tokens to probe, ascending: up to 4, spread over the clustered ones of a prefix of `n_prefix` tokens, the last of them
/// included. Empty if nothing is clustered.
pub fn probe_tokens(n_prefix: usize, settings: &Settings) -> Vec<u32> {
    let n_sink = settings.n_sink as usize;
    let n = n_prefix.saturating_sub(n_sink).saturating_sub(settings.n_window as usize);
    let count = PROBES.min(n);
    (1..=count).map(|i| (n_sink + n * i / count - 1) as u32).collect()
}

/// Positions with bit-equal rows, ascending, in the order of their first one.
fn equal_rows(data: &[f16], row: usize) -> Vec<Vec<u32>> {
    let mut number: HashMap<&[u8], usize> = HashMap::new();
    let mut groups: Vec<Vec<u32>> = Vec::new();
    // f16 has no Hash.
    let bits: Vec<u8> = data.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
    for (p, key) in bits.chunks_exact(2 * row).enumerate() {
        let next = groups.len();
        let g = *number.entry(key).or_insert(next);
        if g == next {
            groups.push(Vec::new());
        }
        groups[g].push(p as u32);
    }
    groups
}

/// Pairs of positions of one token: half of them the nearest there are, half spread over all distances.
fn position_pairs(groups: &[Vec<u32>]) -> Vec<(u32, u32)> {
    let mut pairs: Vec<(u32, u32)> = Vec::new();
    for g in groups {
        pairs.extend(g.windows(2).map(|w| (w[0], w[1])));
        pairs.extend(g.windows(4).map(|w| (w[0], w[3])));
        if g.len() > 2 {
            pairs.push((g[0], g[g.len() - 1]));
        }
    }
    pairs.sort_unstable_by_key(|&(a, b)| (b - a, a));
    if pairs.len() <= PAIRS {
        return pairs;
    }
    let rest = pairs.split_off(PAIRS / 2);
    pairs.extend(rest.iter().step_by(rest.len().div_ceil(PAIRS / 2)));
    pairs
}

/// Neighbours at growing distances, whatever their tokens: for layers whose V does not name the token.
fn lagged_pairs(n: usize) -> Vec<(u32, u32)> {
    let lags = [1usize, 1, 1, 2, 3, 5, 8, 21, 55, 144, 377, 987];
    let per_lag = PAIRS / lags.len();
    let of_lag = |&lag: &usize| {
        let count = n.saturating_sub(lag);
        (0..count.min(per_lag)).map(move |i| i * count / count.min(per_lag)).map(move |p| (p as u32, (p + lag) as u32))
    };
    lags.iter().flat_map(of_lag).collect()
}

/// Random pairs of different rows.
fn token_pairs(groups: &[Vec<u32>]) -> Vec<(u32, u32)> {
    let mut state = 0;
    let mut draw = |n: usize| ((split_mix(&mut state) as u128 * n as u128) >> 64) as usize;
    let n = groups.len();
    if n < 2 {
        return Vec::new();
    }
    (0..PAIRS)
        .map(|_| {
            let a = draw(n);
            let b = (a + 1 + draw(n - 1)) % n;
            (groups[a][0], groups[b][0])
        })
        .collect()
}

/// Up to `n_dim` elements of a row, ascending, chosen one by one so that the pairs that are still close part most: each
/// minimises the sum of `1 / (squared relative distance + small)^2` over the pairs.
fn separating_dims(data: &[f16], row: usize, pairs: &[(u32, u32)], n_dim: usize) -> Vec<u32> {
    let at = |p: u32, d: usize| data[p as usize * row + d].to_f32();
    // [dimension][pair], so that the inner loop runs over pairs.
    let n = pairs.len();
    let mut apart = vec![0.0f32; row * n];
    for (j, &(a, b)) in pairs.iter().enumerate() {
        let norm: f32 = (0..row).map(|d| at(a, d).powi(2) + at(b, d).powi(2)).sum();
        for d in 0..row {
            apart[d * n + j] = (at(a, d) - at(b, d)).powi(2) / norm.max(f32::MIN_POSITIVE);
        }
    }
    // One element carries about 1 / row of the distance.
    let small = 0.1 / row as f32;
    let mut distance = vec![small; n];
    let mut chosen: Vec<usize> = Vec::new();
    while chosen.len() < n_dim.min(row) {
        let cost = |d: usize| -> f64 {
            distance
                .iter()
                .zip(&apart[d * n..(d + 1) * n])
                .map(|(have, more)| (1.0 / (have + more) as f64).powi(2))
                .sum()
        };
        let free = (0..row).filter(|d| !chosen.contains(d)).map(|d| (d, cost(d)));
        let Some((best, _)) = free.min_by(|a, b| a.1.total_cmp(&b.1)) else { break };
        distance.iter_mut().zip(&apart[best * n..(best + 1) * n]).for_each(|(have, more)| *have += more);
        chosen.push(best);
    }
    chosen.sort_unstable();
    chosen.into_iter().map(|d| d as u32).collect()
}

fn take(data: &[f16], row: usize, dims: &[u32]) -> Vec<f16> {
    data.chunks_exact(row).flat_map(|r| dims.iter().map(|&d| r[d as usize])).collect()
}

/// Measures the margins of a sketch; `tokens` are the ids of the prefix, `[P]`.
///
/// Exact up to 16384 distinct rows (per token, for positions); beyond that evenly thinned out, so an upper bound. Of a later
/// layer 512 rows at equal steps stand for all.
pub fn sketch_margin(sketch: &SketchParts, tokens: &[i32]) -> SketchMargin {
    if sketch.layer > 0 {
        return later_margin(sketch, tokens);
    }
    let v = Table::new(&sketch.v, sketch.v_dims.len());
    let mut seen: Vec<u32> = (0..tokens.len() as u32).collect();
    // Equal rows of one token add nothing; what remains is about one row per token id.
    seen.sort_by(|&a, &b| {
        (tokens[a as usize], v.row(a)).partial_cmp(&(tokens[b as usize], v.row(b))).unwrap_or(std::cmp::Ordering::Equal)
    });
    seen.dedup_by(|a, b| tokens[*a as usize] == tokens[*b as usize] && v.row(*a) == v.row(*b));
    let nearest_token = v.nearest(seen, |a, b| tokens[a as usize] != tokens[b as usize], |_, _| 0.0);

    let k = Table::new(&sketch.k, sketch.k_dims.len());
    let mut positions: HashMap<i32, Vec<u32>> = HashMap::new();
    for (p, &t) in tokens.iter().enumerate() {
        positions.entry(t).or_default().push(p as u32);
    }
    let nearest_position = positions
        .into_values()
        .map(|group| k.nearest(group, |_, _| true, |a, b| v.distance(a, b)))
        .fold(f32::INFINITY, f32::min);
    SketchMargin { nearest_token, nearest_position, is_later: false }
}

/// A later layer's rows depend on their context, so a few that are alike say nothing of whether another text is told from this one.
fn later_margin(sketch: &SketchParts, tokens: &[i32]) -> SketchMargin {
    let (k, v) = (Table::new(&sketch.k, sketch.k_dims.len()), Table::new(&sketch.v, sketch.v_dims.len()));
    let n = tokens.len();
    let spread = |most: usize| (0..n.min(most)).map(move |i| i * n / n.min(most));
    let (mut token, mut position) = (Vec::new(), Vec::new());
    for a in spread(LATER_ROWS) {
        let (mut other, mut same) = (f32::INFINITY, f32::INFINITY);
        for b in spread(MARGIN_ROWS).filter(|b| *b != a) {
            let (a, b) = (a as u32, b as u32);
            match tokens[a as usize] == tokens[b as usize] {
                true => same = same.min(v.distance(a, b).max(2.0 * k.distance(a, b))),
                false => other = other.min(v.distance(a, b)),
            }
        }
        token.push(other);
        position.extend(same.is_finite().then_some(same));
    }
    let of = |mut nearest: Vec<f32>, share: usize| {
        nearest.sort_by(f32::total_cmp);
        nearest.get(nearest.len() / share).copied().unwrap_or(f32::INFINITY)
    };
    SketchMargin { nearest_token: of(token, 100), nearest_position: of(position, 10), is_later: true }
}

/// Sketch rows in f32 with their norms.
struct Table {
    data: Vec<f32>,
    width: usize,
    norm: Vec<f32>,
    /// A quarter of the root mean square norm.
    least_norm: f32,
}

impl Table {
    fn new(data: &[f16], width: usize) -> Table {
        let data: Vec<f32> = data.iter().map(|x| x.to_f32()).collect();
        let norm: Vec<f32> = data.chunks_exact(width).map(|r| r.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
        let square: f32 = norm.iter().map(|x| x * x).sum::<f32>() / norm.len().max(1) as f32;
        Table { data, width, norm, least_norm: 0.25 * square.sqrt() }
    }

    fn row(&self, p: u32) -> &[f32] {
        &self.data[p as usize * self.width..][..self.width]
    }

    /// Smallest relative distance between two of `rows` for which `counts` holds; `other` is the least that it is.
    fn nearest(&self, mut rows: Vec<u32>, counts: impl Fn(u32, u32) -> bool, other: impl Fn(u32, u32) -> f32) -> f32 {
        if rows.len() > MARGIN_ROWS {
            rows = rows.iter().copied().step_by(rows.len().div_ceil(MARGIN_ROWS)).collect();
        }
        // Sorted along the widest element, a row needs comparing only while that element alone is near enough.
        let spread = |d: usize| {
            let range =
                rows.iter().map(|&p| self.row(p)[d]).fold((f32::MAX, f32::MIN), |r, x| (r.0.min(x), r.1.max(x)));
            range.1 - range.0
        };
        let Some(widest) = (0..self.width).max_by(|&a, &b| spread(a).total_cmp(&spread(b))) else {
            return f32::INFINITY;
        };
        rows.sort_by(|&a, &b| self.row(a)[widest].total_cmp(&self.row(b)[widest]));
        let largest = rows.iter().map(|&p| self.norm[p as usize]).fold(self.least_norm, f32::max);
        let mut nearest = f32::INFINITY;
        for (i, &a) in rows.iter().enumerate() {
            for &b in &rows[i + 1..] {
                if self.row(b)[widest] - self.row(a)[widest] > nearest * largest {
                    break;
                }
                if counts(a, b) {
                    nearest = nearest.min(self.distance(a, b).max(other(a, b)));
                }
            }
        }
        nearest
    }

    fn distance(&self, a: u32, b: u32) -> f32 {
        let square: f32 = self.row(a).iter().zip(self.row(b)).map(|(x, y)| (x - y).powi(2)).sum();
        let norm = self.norm[a as usize].max(self.norm[b as usize]).max(self.least_norm);
        if norm == 0.0 {
            return 0.0;
        }
        square.sqrt() / norm
    }
}

#[cfg(test)]
#[path = "sketch_tests.rs"]
mod tests;
