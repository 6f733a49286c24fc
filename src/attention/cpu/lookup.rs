//! Which clusters matter to a query: both scores of every cluster, then the best clusters until the mode is content.

use super::kernels::{add_scaled, dots, exp_sum, max, prefetch, spread, weight_from, weighted_sum, Source, BLOCK};
use super::memory::{Pair, Rows, Scratch, Space};
use super::Path;
use crate::attention::{keys_of_share, Binding, Mode, Selection, Spread};
use crate::hadamard;
use crate::index::{LayerView, Members};

/// A sparse (row, KV head) with its index.
#[derive(Clone, Copy)]
pub(super) struct Lookup<'a> {
    pub(super) pair: Pair<'a>,
    pub(super) binding: &'a Binding,
    pub(super) view: LayerView<'a>,
    pub(super) space: Space<'a>,
}

impl Lookup<'_> {
    pub(super) fn n_cluster(&self) -> usize {
        self.view.shape.n_cluster as usize
    }

    pub(super) fn n_sink(&self) -> usize {
        self.binding.index.meta().n_sink as usize
    }

    /// Makes of the queries in `scratch.q` what scoring needs: those in the index's plain basis, and their squares.
    pub(super) fn prepare(&self, scratch: &mut Scratch<'_>) {
        scratch.plain.copy_from_slice(scratch.q);
        let block = self.pair.call.rotation.k;
        scratch.plain.chunks_exact_mut(self.pair.problem().q.ne[0]).for_each(|q| hadamard::rotate(q, block));
        scratch.q2.iter_mut().zip(&*scratch.plain).for_each(|(q2, q)| *q2 = q * q);
    }

    /// Scores of clusters `from..to`, once the queries are prepared.
    ///
    /// # Safety
    /// Nobody else uses these clusters' scores meanwhile.
    pub(super) unsafe fn score(&self, scratch: &mut Scratch<'_>, from: usize, to: usize) {
        let p = self.pair.problem();
        let Selection { spread: spread_kind, alpha, .. } = self.pair.call.selection;
        let (dk, group, path) = (p.q.ne[0], p.n_group(), self.pair.path);
        let first = self.pair.head_kv * self.n_cluster();
        let last = first + self.n_cluster();
        let centroids = Rows::packed(self.view.centroids[first * dk..last * dk].as_ptr().cast(), 2 * dk);
        let variances = Rows::packed(self.view.variances[first * dk..last * dk].as_ptr(), dk);
        // The scale is already in q; the soft-cap's division is taken back.
        let undo = if p.softcap == 0.0 { 1.0 } else { p.softcap };
        for start in (from..to).step_by(BLOCK) {
            let n = BLOCK.min(to - start);
            let tile = n.next_multiple_of(4);
            // Rows repeat the last one up to a multiple of 4; those of the next block are fetched meanwhile.
            let after = (start + BLOCK).min(to)..(start + 2 * BLOCK).min(to);
            let block = |from: Rows<'_>| {
                let (mut rows, mut next) = ([std::ptr::null(); BLOCK], [std::ptr::null(); BLOCK]);
                rows[..tile].iter_mut().enumerate().for_each(|(j, r)| *r = from.get(start + j.min(n - 1)));
                next.iter_mut().zip(after.clone()).for_each(|(r, i)| *r = from.get(i));
                (rows, next)
            };
            // SAFETY: each address is that of a row inside the view's slices, checked above by slicing.
            unsafe {
                let (rows, next) = block(centroids);
                dots(path, Source::F16, scratch.plain, dk, &rows[..tile], &next[..after.len()], scratch.s);
                if spread_kind == Spread::Diag {
                    let (rows, next) = block(variances);
                    dots(path, Source::U8, scratch.q2, dk, &rows[..tile], &next[..after.len()], scratch.s2);
                }
            }
            let own = first + start..first + start + n;
            for g in 0..group {
                // SAFETY: the caller grants these clusters' scores.
                let (x, y) = unsafe { (self.space.x(g, start, n), self.space.y(g, start, n)) };
                for (x, s) in x.iter_mut().zip(&scratch.s[g * BLOCK..]) {
                    *x = s * undo;
                }
                let bonus = alpha * undo;
                match spread_kind {
                    Spread::None => spread(path, x, y, &[0.0; BLOCK], &[0.0; BLOCK], 0.0),
                    Spread::Radius => {
                        let norm = scratch.q2[g * dk..(g + 1) * dk].iter().sum::<f32>();
                        let mut squares = [0.0; BLOCK];
                        squares.iter_mut().zip(&self.view.radii[own.clone()]).for_each(|(s, r)| *s = r * r);
                        spread(path, x, y, &squares, &[norm; BLOCK], bonus);
                    }
                    Spread::Diag => {
                        let sums = &scratch.s2[g * BLOCK..];
                        spread(path, x, y, sums, &self.view.variance_scales[own.clone()], bonus);
                    }
                }
            }
        }
    }

    /// Exact logits of the sinks. `scratch.q` holds the queries.
    ///
    /// # Safety
    /// Nobody else uses the sinks' scores meanwhile; K holds the cells that the binding names.
    pub(super) unsafe fn score_sinks(&self, scratch: &mut Scratch<'_>) {
        let p = self.pair.problem();
        let (n_sink, keys) = (self.n_sink(), self.pair.keys());
        let undo = if p.softcap == 0.0 { 1.0 } else { p.softcap };
        for start in (0..n_sink).step_by(BLOCK) {
            let n = BLOCK.min(n_sink - start);
            let mut rows = [std::ptr::null(); BLOCK];
            let tile = n.next_multiple_of(4);
            for (j, r) in rows[..tile].iter_mut().enumerate() {
                // A cell outside the cache cannot be; reading the last one instead keeps a wrong binding harmless.
                *r = keys.get((self.binding.always[start + j.min(n - 1)] as usize).min(p.k.ne[1] - 1));
            }
            // SAFETY: the rows are in the cache.
            unsafe { dots(self.pair.path, p.k_type.into(), scratch.q, p.q.ne[0], &rows[..tile], &[], scratch.s) };
            for g in 0..p.n_group() {
                // SAFETY: the caller grants the sinks' scores.
                let sink = &mut unsafe { self.space.sink(g, n_sink) }[start..start + n];
                sink.iter_mut().zip(&scratch.s[g * BLOCK..]).for_each(|(x, s)| *x = s * undo);
                absent_if_not_finite(sink);
            }
        }
    }

    /// Turns the scores into the kept clusters. Returns the number of keys in them.
    ///
    /// # Safety
    /// All scores are there, and nobody else uses the space meanwhile.
    pub(super) unsafe fn select(&self) -> u32 {
        let (c, group, path) = (self.n_cluster(), self.pair.problem().n_group(), self.pair.path);
        // SAFETY: the caller grants the whole space; these are its distinct parts.
        let (count, mean, mass) = unsafe {
            self.fill_count();
            (self.space.count(c), self.space.mean(c), self.space.mass(c))
        };
        mean.fill(0.0);
        let mut sink_share = 0.0;
        for g in 0..group {
            // SAFETY: as above.
            let (y, sink) = unsafe { (self.space.y(g, 0, c), self.space.sink(g, self.n_sink())) };
            let top = max(path, y).max(max(path, sink));
            if top == f32::NEG_INFINITY {
                continue;
            }
            exp_sum(path, y, top);
            let sinks = exp_sum(path, sink, top);
            let total = (sinks + weighted_sum(path, y, count)) * group as f32;
            add_scaled(path, mean, y, 1.0 / total);
            sink_share += (sinks / total) as f64;
        }
        if matches!(self.pair.call.selection.mode, Mode::Mass(_)) {
            mass.copy_from_slice(mean);
        }
        // SAFETY: as above.
        unsafe { self.keep(sink_share) }
    }

    /// Writes the number of keys of each cluster.
    ///
    /// # Safety
    /// Nobody else uses these numbers meanwhile.
    pub(super) unsafe fn fill_count(&self) {
        // SAFETY: the contract.
        let count = unsafe { self.space.count(self.n_cluster()) };
        let offsets = self.view.head_offsets(self.pair.head_kv);
        count.iter_mut().zip(offsets.windows(2)).for_each(|(n, o)| *n = (o[1] - o[0]) as f32);
    }

    /// Turns counts, mean probabilities and (in mass mode) masses into the kept clusters. Returns the number of keys in them.
    ///
    /// # Safety
    /// All of those are there, and nobody else uses the space meanwhile.
    pub(super) unsafe fn keep(&self, sink_share: f64) -> u32 {
        let c = self.n_cluster();
        let offsets = self.view.head_offsets(self.pair.head_kv);
        // SAFETY: the caller grants the whole space; these are its distinct parts.
        let (count, mean, mass, kept, lengths) = unsafe {
            let s = self.space;
            (s.count(c), s.mean(c), s.mass(c), s.kept(c), s.lengths(2))
        };
        let end = self.end_of_kept(mean, count, mass, sink_share);
        let (mut n, mut keys) = (0, 0);
        for (i, p) in mean.iter().enumerate() {
            // Without a branch: which clusters are kept is not to be guessed.
            let keep = (rank(*p, i as u32) < end) as u32;
            kept[n] = i as u32;
            keys += keep * (offsets[i + 1] - offsets[i]);
            n += keep as usize;
        }
        // SAFETY: as above.
        let n_cell = unsafe { self.list(&kept[..n], offsets) };
        lengths.copy_from_slice(&[n as u32, n_cell as u32]);
        keys
    }

    /// Lists the cells of the kept clusters' keys, so that attending knows well ahead which rows it wants. Returns their
    /// number.
    ///
    /// # Safety
    /// Nobody else uses the space meanwhile.
    unsafe fn list(&self, kept: &[u32], offsets: &[u32]) -> usize {
        /// Clusters ahead whose members are fetched.
        const AHEAD: usize = 8;
        let (cells, n_kv) = (&self.binding.cells, self.pair.problem().k.ne[1]);
        // SAFETY: the caller's contract.
        let list = unsafe { self.space.cells(cells.len()) };
        let members = self.view.head_members(self.pair.head_kv);
        let mut n = 0;
        let mut push = |token: usize| {
            let cell = cells[token];
            list[n] = cell;
            // A cell outside the cache cannot be; leaving it out keeps a wrong binding harmless.
            n += ((cell as usize) < n_kv) as usize;
        };
        for (at, i) in kept.iter().enumerate() {
            if let Some(next) = kept.get(at + AHEAD) {
                prefetch(members.address(offsets[*next as usize] as usize));
            }
            match members.part(offsets[*i as usize] as usize..offsets[*i as usize + 1] as usize) {
                Members::U16(tokens) => tokens.iter().for_each(|t| push(*t as usize)),
                Members::U32(tokens) => tokens.iter().for_each(|t| push(*t as usize)),
            }
        }
        n
    }

    /// The rank below which clusters are kept. In mass mode `mass` becomes that of whole clusters.
    fn end_of_kept(&self, mean: &[f32], count: &[f32], mass: &mut [f32], sink_share: f64) -> u64 {
        let (meta, path) = (self.binding.index.meta(), self.pair.path);
        let until_share = |share: f32| {
            if share >= 1.0 {
                return u64::MAX;
            }
            let target = keys_of_share(share, meta.n_prefix(), meta.n_window as usize) as f32 - meta.n_sink as f32;
            end_of(path, mean, count, target)
        };
        match self.pair.call.selection.mode {
            Mode::Budget(share) => until_share(share),
            Mode::Threshold { threshold, floor } => until_share(floor).max(rank(threshold.max(0.0), u32::MAX)),
            Mode::Mass(share) if share >= 1.0 => u64::MAX,
            Mode::Mass(share) => {
                mass.iter_mut().zip(count).for_each(|(mass, n)| *mass *= n);
                end_of(path, mean, mass, (share as f64 - sink_share) as f32)
            }
        }
    }
}

fn absent_if_not_finite(s: &mut [f32]) {
    for s in s {
        *s = if s.is_finite() { *s } else { f32::NEG_INFINITY };
    }
}

/// Smaller is better: the higher probability, then the lower number. The bits of numbers from 0 up are ordered as they.
fn rank(p: f32, i: u32) -> u64 {
    ((!p.to_bits() as u64) << 32) | i as u64
}

/// One more than the smallest rank up to which the weights sum to `target` or more; the highest number if they never do; 0
/// if `target <= 0`. Counts are whole numbers, which f32 adds exactly up to 16 million. The bits of the cut are found by
/// bisection: some 31 sums over all, which vectors do in less time than any sorting takes.
fn end_of(path: Path, mean: &[f32], weights: &[f32], target: f32) -> u64 {
    if target <= 0.0 {
        return 0;
    }
    // From `low` up it is enough, from `high` up it is not.
    let (mut low, mut high) = (0, mean.iter().fold(0, |top, p| top.max(p.to_bits())).saturating_add(1));
    if weight_from(path, mean, weights, low) < target {
        return u64::MAX;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if weight_from(path, mean, weights, middle) >= target {
            low = middle;
        } else {
            high = middle;
        }
    }
    let mut sum = weight_from(path, mean, weights, high);
    for (i, (p, weight)) in mean.iter().zip(weights).enumerate() {
        if p.to_bits() == low {
            sum += weight;
            if sum >= target {
                return rank(*p, i as u32) + 1;
            }
        }
    }
    // The sum in this order is a little less than in that of the vectors: all of the ties.
    rank(f32::from_bits(low), u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_cut_agrees_with_a_full_sort(
            clusters in prop::collection::vec((0u8..6, 1u8..20), 1..80),
            share in 0.0f64..1.2,
        ) {
            let mean: Vec<f32> = clusters.iter().map(|c| c.0 as f32 / 8.0).collect();
            let weights: Vec<f32> = clusters.iter().map(|c| c.1 as f32).collect();
            let target = (share * weights.iter().sum::<f32>() as f64).round();
            let mut sorted: Vec<usize> = (0..mean.len()).collect();
            sorted.sort_by(|a, b| mean[*b].total_cmp(&mean[*a]).then(a.cmp(b)));
            let mut sum = 0.0;
            let mut want = vec![false; mean.len()];
            for i in sorted {
                if sum >= target {
                    break;
                }
                sum += weights[i] as f64;
                want[i] = true;
            }
            for path in Path::available() {
                let end = end_of(path, &mean, &weights, target as f32);
                let kept: Vec<bool> = mean.iter().enumerate().map(|(i, p)| rank(*p, i as u32) < end).collect();
                prop_assert_eq!(&kept, &want);
            }
        }
    }
}
