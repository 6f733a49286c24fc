//! Which clusters matter to a query: both scores of every cluster, then the best clusters until the mode is content.

use super::kernels::{add_scaled, dots, exp_sum, max, weighted_sum, Source, BLOCK};
use super::memory::{Pair, Rows, Scratch, Space};
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

    /// Scores of clusters `from..to`. `scratch.q` holds the queries.
    ///
    /// # Safety
    /// Nobody else uses these clusters' scores meanwhile.
    pub(super) unsafe fn score(&self, scratch: &mut Scratch<'_>, from: usize, to: usize) {
        let p = self.pair.problem();
        let Selection { spread, alpha, .. } = self.pair.call.selection;
        let (dk, group, path) = (p.q.ne[0], p.n_group(), self.pair.path);
        let first = self.pair.head_kv * self.n_cluster();
        let last = first + self.n_cluster();
        let centroids = Rows::packed(self.view.centroids[first * dk..last * dk].as_ptr().cast(), 2 * dk);
        let variances = Rows::packed(self.view.variances[first * dk..last * dk].as_ptr(), dk);
        // The scale is already in q; the soft-cap's division is taken back.
        let undo = if p.softcap == 0.0 { 1.0 } else { p.softcap };
        // The index is in the plain basis.
        let q = match self.pair.call.rotation.k {
            0 => &*scratch.q,
            block => {
                scratch.plain.copy_from_slice(scratch.q);
                scratch.plain.chunks_exact_mut(dk).for_each(|q| hadamard::rotate(q, block));
                &*scratch.plain
            }
        };
        if spread != Spread::None {
            scratch.q2.iter_mut().zip(q).for_each(|(q2, q)| *q2 = q * q);
        }
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
                dots(path, Source::F16, q, dk, &rows[..tile], &next[..after.len()], scratch.s);
                if spread == Spread::Diag {
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
                match spread {
                    Spread::None => y.copy_from_slice(x),
                    Spread::Radius => {
                        let norm = scratch.q2[g * dk..(g + 1) * dk].iter().sum::<f32>().sqrt();
                        for ((y, x), r) in y.iter_mut().zip(x.iter()).zip(&self.view.radii[own.clone()]) {
                            *y = x + bonus * norm * r;
                        }
                    }
                    Spread::Diag => {
                        let scales = &self.view.variance_scales[own.clone()];
                        let sums = &scratch.s2[g * BLOCK..];
                        for (((y, x), scale), sum) in y.iter_mut().zip(x.iter()).zip(scales).zip(sums) {
                            *y = x + bonus * (sum * scale).sqrt();
                        }
                    }
                }
                absent_if_not_finite(x);
                absent_if_not_finite(y);
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
        let offsets = self.view.head_offsets(self.pair.head_kv);
        // SAFETY: the caller grants the whole space; these are its distinct parts.
        let (count, mean, mass, key, kept, lengths) = unsafe {
            let s = self.space;
            (s.count(c), s.mean(c), s.mass(c), s.key(c), s.kept(c), s.lengths(2))
        };
        count.iter_mut().zip(offsets.windows(2)).for_each(|(n, o)| *n = (o[1] - o[0]) as f32);
        mean.fill(0.0);
        let by_mass = matches!(self.pair.call.selection.mode, Mode::Mass(_));
        if by_mass {
            mass.fill(0.0);
        }
        let mut sink_share = 0.0;
        for g in 0..group {
            // SAFETY: as above.
            let (y, sink) = unsafe { (self.space.y(g, 0, c), self.space.sink(g, self.n_sink())) };
            if by_mass {
                // SAFETY: as above.
                let x = unsafe { self.space.x(g, 0, c) };
                sink_share += self.add_mass(x, sink, count, mass);
            }
            let top = max(path, y).max(max(path, sink));
            if top == f32::NEG_INFINITY {
                continue;
            }
            exp_sum(path, y, top);
            let sinks = exp_sum(path, sink, top);
            let total = (sinks + weighted_sum(path, y, count)) * group as f32;
            add_scaled(path, mean, y, 1.0 / total);
        }
        let last = self.last_kept(mean, count, mass, key, sink_share);
        let (mut n, mut keys) = (0, 0);
        for (i, p) in mean.iter().enumerate() {
            if last.is_some_and(|last| rank(*p, i as u32) <= last) {
                kept[n] = i as u32;
                keys += offsets[i + 1] - offsets[i];
                n += 1;
            }
        }
        // SAFETY: as above.
        let n_cell = unsafe { self.list(&kept[..n], offsets) };
        lengths.copy_from_slice(&[n as u32, n_cell as u32]);
        keys
    }

    /// Lists the cells of the kept clusters' keys in the order of the prefix: neighbours share pages and lines of DRAM,
    /// which the order of clusters would scatter (measured). Returns their number.
    ///
    /// # Safety
    /// Nobody else uses the space meanwhile.
    unsafe fn list(&self, kept: &[u32], offsets: &[u32]) -> usize {
        let n_prefix = self.binding.cells.len();
        // SAFETY: the caller grants the whole space; these are distinct parts.
        let (bits, cells) = unsafe { (self.space.bits(n_prefix.div_ceil(64)), self.space.cells(n_prefix)) };
        bits.fill(0);
        let mut mark = |token: usize| bits[token / 64] |= 1 << (token % 64);
        let members = self.view.head_members(self.pair.head_kv);
        for i in kept {
            match members.part(offsets[*i as usize] as usize..offsets[*i as usize + 1] as usize) {
                Members::U16(tokens) => tokens.iter().for_each(|t| mark(*t as usize)),
                Members::U32(tokens) => tokens.iter().for_each(|t| mark(*t as usize)),
            }
        }
        let n_kv = self.pair.problem().k.ne[1];
        let mut n = 0;
        for (tokens, word) in self.binding.cells.chunks(64).zip(bits) {
            let mut left = *word;
            while left != 0 {
                let cell = tokens[left.trailing_zeros() as usize];
                left &= left - 1;
                cells[n] = cell;
                // A cell outside the cache cannot be; leaving it out keeps a wrong binding harmless.
                n += ((cell as usize) < n_kv) as usize;
            }
        }
        n
    }

    /// Adds one head's estimate of each cluster's mass per key, by the plain logits, to `mass`; returns that of the sinks.
    fn add_mass(&self, x: &[f32], sink: &[f32], count: &[f32], mass: &mut [f32]) -> f64 {
        let path = self.pair.path;
        let top = max(path, x).max(max(path, sink));
        if top == f32::NEG_INFINITY {
            return 0.0;
        }
        let exp = |s: &f32| (s - top).exp();
        let sinks: f32 = sink.iter().map(exp).sum();
        let clusters: f32 = x.iter().zip(count).map(|(x, n)| n * exp(x)).sum();
        let total = (sinks + clusters) * self.pair.problem().n_group() as f32;
        mass.iter_mut().zip(x).for_each(|(m, x)| *m += exp(x) / total);
        (sinks / total) as f64
    }

    /// Rank of the last cluster to keep; none if the sinks alone suffice.
    fn last_kept(&self, mean: &[f32], count: &[f32], mass: &[f32], key: &mut [u64], sink_share: f64) -> Option<u64> {
        let meta = self.binding.index.meta();
        let mut until_share = |share: f32| {
            if share >= 1.0 {
                return Some(u64::MAX);
            }
            let target = keys_of_share(share, meta.n_prefix(), meta.n_window as usize) as f64 - meta.n_sink as f64;
            last_until(mean, key, |i| count[i as usize] as f64, target)
        };
        match self.pair.call.selection.mode {
            Mode::Budget(share) => until_share(share),
            Mode::Threshold { threshold, floor } => {
                let above = rank(threshold.max(0.0), u32::MAX);
                Some(until_share(floor).map_or(above, |last| last.max(above)))
            }
            Mode::Mass(share) if share >= 1.0 => Some(u64::MAX),
            Mode::Mass(share) => {
                let of_cluster = |i: u32| (count[i as usize] * mass[i as usize]) as f64;
                last_until(mean, key, of_cluster, share as f64 - sink_share)
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

/// Smallest rank up to which the weights sum to `target` or more; the largest rank if they never do; none if
/// `target <= 0`. O(C): weights are summed by exponent and first bits of the probability, and only the ranks in the bucket
/// that the sum crosses in are halved, with a selection each time. `keys` is room for a rank of each.
fn last_until(mean: &[f32], keys: &mut [u64], weight: impl Fn(u32) -> f64, target: f64) -> Option<u64> {
    const BUCKETS: usize = 1024;
    let bucket = |p: f32| ((p.to_bits() >> 21) as usize).min(BUCKETS - 1);
    if target <= 0.0 || mean.is_empty() {
        return None;
    }
    let mut sums = [0.0f64; BUCKETS];
    let (mut best, mut worst) = (0, BUCKETS - 1);
    for (i, p) in mean.iter().enumerate() {
        let bucket = bucket(*p);
        sums[bucket] += weight(i as u32);
        (best, worst) = (best.max(bucket), worst.min(bucket));
    }
    let (mut crossed, mut left) = (best, target);
    while crossed > worst && sums[crossed] < left {
        left -= sums[crossed];
        crossed -= 1;
    }
    let mut n = 0;
    for (i, p) in mean.iter().enumerate() {
        keys[n] = rank(*p, i as u32);
        n += (bucket(*p) == crossed) as usize;
    }
    let mut keys = &mut keys[..n];
    while keys.len() > 1 {
        let middle = keys.len() / 2;
        keys.select_nth_unstable(middle);
        let (better, worse) = keys.split_at_mut(middle);
        let sum: f64 = better.iter().map(|k| weight(*k as u32)).sum();
        if sum >= left {
            keys = better;
        } else {
            left -= sum;
            keys = worse;
        }
    }
    Some(keys[0])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn last_until_agrees_with_a_full_sort(
            clusters in prop::collection::vec((0u8..6, 1u8..20), 1..80),
            share in 0.0f64..1.2,
        ) {
            let mean: Vec<f32> = clusters.iter().map(|c| c.0 as f32 / 8.0).collect();
            let total: f64 = clusters.iter().map(|c| c.1 as f64).sum();
            let target = (share * total).round();
            let mut key = vec![0; mean.len()];
            let mut sorted: Vec<usize> = (0..mean.len()).collect();
            sorted.sort_by(|a, b| mean[*b].total_cmp(&mean[*a]).then(a.cmp(b)));
            let mut sum = 0.0;
            let mut want = None;
            for i in sorted {
                if sum >= target {
                    break;
                }
                sum += clusters[i].1 as f64;
                want = Some(rank(mean[i], i as u32));
            }
            prop_assert_eq!(last_until(&mean, &mut key, |i| clusters[i as usize].1 as f64, target), want);
        }
    }
}
