//! What a selection misses, by exact scores of every key: for calibration and evaluation, not for use.

use super::kernels::{cap, dots, BLOCK};
use super::lookup::Lookup;
use super::memory::Scratch;

/// A sum of exponentials, relative to the largest exponent so far.
#[derive(Clone, Copy)]
pub(super) struct Mass {
    top: f32,
    sum: f64,
}

impl Mass {
    pub(super) const NONE: Mass = Mass { top: f32::NEG_INFINITY, sum: 0.0 };

    pub(super) fn add(&mut self, s: f32) {
        if s > self.top {
            self.sum *= ((self.top - s) as f64).exp();
            self.top = s;
        }
        if s.is_finite() {
            self.sum += ((s - self.top) as f64).exp();
        }
    }

    /// Share of this in this and another.
    pub(super) fn share_beside(self, other: Mass) -> f64 {
        let top = self.top.max(other.top);
        let of = |mass: Mass| if mass.sum > 0.0 { mass.sum * ((mass.top - top) as f64).exp() } else { 0.0 };
        match of(self) + of(other) {
            total if total > 0.0 => of(self) / total,
            _ => 0.0,
        }
    }
}

impl Lookup<'_> {
    /// Attention mass on the keys of the dropped clusters, as a share of that on all clustered keys and sinks: mean over the
    /// group.
    ///
    /// # Safety
    /// The selection is complete and `scratch.q` holds the queries; K holds the cells that the binding names.
    pub(super) unsafe fn missed(&self, scratch: &mut Scratch<'_>) -> f64 {
        let (group, n_sink) = (self.pair.problem().n_group(), self.n_sink());
        // SAFETY: the contract.
        let kept = unsafe { self.space.chosen() }.0;
        let offsets = self.view.head_offsets(self.pair.head_kv);
        let members = self.view.head_members(self.pair.head_kv);
        let cells_of =
            |i: usize| (offsets[i]..offsets[i + 1]).map(|j| self.binding.cells[members.get(j as usize) as usize]);
        let is_kept = |i: &usize| kept.binary_search(&(*i as u32)).is_ok();
        let (kept, dropped): (Vec<usize>, Vec<usize>) = (0..self.n_cluster()).partition(is_kept);
        let mut near: Vec<u32> = self.binding.always[..n_sink].to_vec();
        near.extend(kept.into_iter().flat_map(cells_of));
        let far: Vec<u32> = dropped.into_iter().flat_map(cells_of).collect();
        // SAFETY: the contract.
        let (near, far) = unsafe { (self.masses(&near, scratch), self.masses(&far, scratch)) };
        far.iter().zip(near).map(|(far, near)| far.share_beside(near)).sum::<f64>() / group as f64
    }

    /// Sum over cells for each head of the group.
    ///
    /// # Safety
    /// As for `missed`.
    unsafe fn masses(&self, cells: &[u32], scratch: &mut Scratch<'_>) -> Vec<Mass> {
        let (p, path, keys) = (self.pair.problem(), self.pair.path, self.pair.keys());
        let mut out = vec![Mass::NONE; p.n_group()];
        for cells in cells.chunks(BLOCK) {
            let mut rows = [std::ptr::null(); BLOCK];
            let tile = cells.len().next_multiple_of(4);
            for (j, row) in rows[..tile].iter_mut().enumerate() {
                // A cell outside the cache cannot be; reading the last one instead keeps a wrong binding harmless.
                *row = keys.get((cells[j.min(cells.len() - 1)] as usize).min(p.k.ne[1] - 1));
            }
            // SAFETY: the rows are in the cache.
            unsafe { dots(path, p.k_type.into(), scratch.q, p.q.ne[0], &rows[..tile], &[], scratch.s) };
            for (g, mass) in out.iter_mut().enumerate() {
                let s = &mut scratch.s[g * BLOCK..g * BLOCK + cells.len()];
                if p.softcap != 0.0 {
                    cap(path, s, p.softcap);
                }
                s.iter().for_each(|s| mass.add(*s));
            }
        }
        out
    }
}
