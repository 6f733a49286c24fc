//! Which clusters matter to a tile: the scores of a panel of query rows by matrix products, and each cluster's share of
//! the tile's probability. Only sums leave a panel, so the memory does not grow with the tile.

use super::kernels::{add_radius, add_spread, probabilities, product, scale_finite, Matrix, Scored};
use super::scratch::Scratch;
use super::{Tile, CELLS};
use crate::attention::cpu::kernels::{decode, Source};
use crate::attention::cpu::memory::Rows;
use crate::attention::{Mode, Selection, Spread};

/// What one panel adds to the selection of its tile.
pub(super) struct Share<'a> {
    /// `[C]` squares of probabilities per key, and estimated masses per key in mass mode (else empty), over all lanes.
    pub(super) squares: &'a mut [f32],
    pub(super) mass: &'a mut [f32],
    /// One number: the estimated mass of the sinks.
    pub(super) sinks: &'a mut [f32],
}

impl Tile<'_> {
    /// Scores all clusters for a panel whose queries are loaded.
    ///
    /// # Safety
    /// The call's arrays are as it says.
    pub(super) unsafe fn share(&self, panel: usize, scratch: &mut Scratch<'_>, out: Share<'_>) {
        let p = self.pair().problem();
        let Selection { mode, spread, alpha, .. } = self.pair().call.selection;
        let (dk, path, lanes) = (p.q.ne[0], self.pair().path, self.lanes);
        let (c, n_sink) = (self.lookup.n_cluster(), self.lookup.n_sink());
        let count = &mut scratch.count[..c];
        let offsets = self.lookup.view.head_offsets(self.pair().head_kv);
        count.iter_mut().zip(offsets.windows(2)).for_each(|(n, o)| *n = (o[1] - o[0]) as f32);
        let scored = Scored { count, sinks: (c.next_multiple_of(8), n_sink) };
        let end = (scored.sinks.0 + n_sink.next_multiple_of(8)) * lanes;
        let panel_at = panel * dk * lanes..(panel + 1) * dk * lanes;
        let plain = match self.pair().call.rotation.k {
            0 => &scratch.q[panel_at.clone()],
            _ => &scratch.plain[panel_at.clone()],
        };
        if spread != Spread::None {
            scratch.squares.iter_mut().zip(plain).for_each(|(s, q)| *s = q * q);
        }
        let mut norm = [0.0; super::kernels::MAX_LANES];
        if spread == Spread::Radius {
            for row in scratch.squares.chunks_exact(lanes) {
                norm.iter_mut().zip(row).for_each(|(n, s)| *n += s);
            }
            norm.iter_mut().for_each(|n| *n = n.sqrt());
        }
        // The scale is already in q; the soft-cap's division is taken back.
        let undo = if p.softcap == 0.0 { 1.0 } else { p.softcap };
        let bonus = alpha * undo;
        let first = self.pair().head_kv * c;
        let view = &self.lookup.view;
        let centroids = Rows::packed(view.centroids[first * dk..(first + c) * dk].as_ptr().cast(), 2 * dk);
        let variances = Rows::packed(view.variances[first * dk..(first + c) * dk].as_ptr(), dk);
        let block = Matrix::Rows { data: scratch.k.as_ptr(), step: dk };
        let used = self.used(panel);
        let by_mass = matches!(mode, Mode::Mass(_));
        for start in (0..c).step_by(CELLS) {
            let n = CELLS.min(c - start);
            let m = n.next_multiple_of(8);
            let own = first + start..first + start + n;
            let mut rows = [std::ptr::null(); CELLS];
            let mut each = |from: Rows<'_>| {
                rows[..n].iter_mut().enumerate().for_each(|(i, r)| *r = from.get(start + i));
                rows
            };
            let y = scratch.y[start * lanes..(start + m) * lanes].as_mut_ptr();
            // SAFETY: rows lie in the view's slices, taken above; `y`, `k` and `s` hold `m` rows.
            unsafe {
                decode(path, Source::F16, &each(centroids)[..n], dk, scratch.k);
                product(path, used, block, (m, dk), plain.as_ptr(), None, y);
                scale_finite(path, y, n, undo);
                match spread {
                    Spread::None => {}
                    Spread::Radius => add_radius(path, y, &norm, &view.radii[own], bonus),
                    Spread::Diag => {
                        decode(path, Source::U8, &each(variances)[..n], dk, scratch.k);
                        let sums = scratch.s.as_mut_ptr();
                        product(path, used, block, (m, dk), scratch.squares.as_ptr(), None, sums);
                        add_spread(path, y, sums, &view.variance_scales[own], bonus);
                    }
                }
            }
        }
        let keys = self.pair().keys();
        for start in (0..n_sink).step_by(CELLS) {
            let n = CELLS.min(n_sink - start);
            let mut rows = [std::ptr::null(); CELLS];
            for (r, cell) in rows.iter_mut().zip(&self.lookup.binding.always[start..start + n]) {
                // A cell outside the cache cannot be; reading the last one instead keeps a wrong binding harmless.
                *r = keys.get((*cell as usize).min(p.k.ne[1] - 1));
            }
            let at = (scored.sinks.0 + start) * lanes;
            let y = scratch.y[at..at + n.next_multiple_of(8) * lanes].as_mut_ptr();
            let q = scratch.q[panel_at.clone()].as_ptr();
            // SAFETY: the rows are in the cache; `y` and `k` hold what they get.
            unsafe {
                decode(path, p.k_type.into(), &rows[..n], dk, scratch.k);
                product(path, used, block, (n.next_multiple_of(8), dk), q, None, y);
                scale_finite(path, y, n, undo);
            }
        }
        let factor = 1.0 / self.n_lane() as f32;
        if by_mass {
            let again = &mut scratch.again[..end];
            again.copy_from_slice(&scratch.y[..end]);
            // SAFETY: the scores are there.
            out.sinks[0] = unsafe { probabilities(path, again.as_mut_ptr(), scored, used, factor, false, out.mass) };
        }
        // SAFETY: the scores are there.
        unsafe { probabilities(path, scratch.y.as_mut_ptr(), scored, used, factor.sqrt(), true, out.squares) };
    }
}
