//! One thread's memory for a tile.

use super::kernels::MAX_LANES;
use super::{lanes, CELLS};
use crate::attention::cpu::memory::{Carver, Workspace};
use crate::attention::cpu::Path;
use crate::attention::{Call, Mode, Problem, Spread};

/// Where the parts are. LANES is that of the path; N is the number of panels of the largest tile.
pub(super) struct ScratchLayout {
    sizes: Sizes,
    q: usize,
    plain: usize,
    squares: usize,
    k: usize,
    v: usize,
    s: usize,
    y: usize,
    again: usize,
    acc: usize,
    m: usize,
    l: usize,
    factor: usize,
    count: usize,
    mask: usize,
    mask_rows: usize,
    row: usize,
    pub(super) bytes: usize,
}

/// Numbers in each part.
struct Sizes {
    q: usize,
    plain: usize,
    squares: usize,
    k: usize,
    v: usize,
    s: usize,
    y: usize,
    again: usize,
    acc: usize,
    lanes: usize,
    count: usize,
    mask: usize,
    row: usize,
}

pub(super) struct Scratch<'a> {
    /// `[N][dk][LANES]`, the queries times the call's scale.
    pub(super) q: &'a mut [f32],
    /// The same in the index's basis, where the call's is another; else empty.
    pub(super) plain: &'a mut [f32],
    /// `[dk][LANES]`, squares of a panel's queries.
    pub(super) squares: &'a mut [f32],
    /// `[CELLS][dk]` keys, `[CELLS][dv]` values.
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    /// `[CELLS][LANES]`.
    pub(super) s: &'a mut [f32],
    /// Selection scores of clusters and sinks, `[C + S, both rounded up to 8][LANES]`.
    pub(super) y: &'a mut [f32],
    /// The same once more in mass mode; else empty.
    pub(super) again: &'a mut [f32],
    /// `[N][dv][LANES]` sums of values, `[N][LANES]` maxima and sums of weights.
    pub(super) acc: &'a mut [f32],
    pub(super) m: &'a mut [f32],
    pub(super) l: &'a mut [f32],
    /// `[LANES]`.
    pub(super) factor: &'a mut [f32],
    /// `[C]` keys per cluster.
    pub(super) count: &'a mut [f32],
    /// `[N][CELLS][LANES]`.
    pub(super) mask: &'a mut [f32],
    /// Addresses of the rows' masks, at most one for each lane.
    pub(super) mask_rows: &'a mut [usize],
    /// `[G][dk]` queries of a row, or its `[dv]` output.
    pub(super) row: &'a mut [f32],
}

impl ScratchLayout {
    pub(super) fn new(call: &Call, path: Path, n_panel: usize, n_cluster: usize, n_sink: usize) -> ScratchLayout {
        let p: &Problem = &call.problem;
        let (dk, dv, l) = (p.q.ne[0], p.v.ne[0], lanes(path));
        debug_assert!(l <= MAX_LANES);
        let scored = (n_cluster.next_multiple_of(8) + n_sink.next_multiple_of(8)) * l;
        let when = |yes: bool, n: usize| if yes { n } else { 0 };
        let sizes = Sizes {
            q: n_panel * dk * l,
            plain: when(call.rotation.k != 0, n_panel * dk * l),
            squares: when(call.selection.spread != Spread::None, dk * l),
            k: CELLS * dk,
            v: CELLS * dv,
            s: CELLS * l,
            y: scored,
            again: when(matches!(call.selection.mode, Mode::Mass(_)), scored),
            acc: n_panel * dv * l,
            lanes: n_panel * l,
            count: n_cluster,
            mask: n_panel * CELLS * l,
            row: (p.n_group() * dk).max(dv),
        };
        let mut c = Carver::default();
        ScratchLayout {
            q: c.area::<f32>(sizes.q),
            plain: c.area::<f32>(sizes.plain),
            squares: c.area::<f32>(sizes.squares),
            k: c.area::<f32>(sizes.k),
            v: c.area::<f32>(sizes.v),
            s: c.area::<f32>(sizes.s),
            y: c.area::<f32>(sizes.y),
            again: c.area::<f32>(sizes.again),
            acc: c.area::<f32>(sizes.acc),
            m: c.area::<f32>(sizes.lanes),
            l: c.area::<f32>(sizes.lanes),
            factor: c.area::<f32>(MAX_LANES),
            count: c.area::<f32>(sizes.count),
            mask: c.area::<f32>(sizes.mask),
            mask_rows: c.area::<usize>(sizes.lanes),
            row: c.area::<f32>(sizes.row),
            bytes: c.bytes,
            sizes,
        }
    }

    /// Scratch of the thread whose area starts at `at`.
    ///
    /// # Safety
    /// The area is inside `memory` and no other use of it is alive.
    pub(super) unsafe fn open<'a>(&self, memory: &'a Workspace, at: usize) -> Scratch<'a> {
        let n = &self.sizes;
        // SAFETY: the caller's contract; the parts do not overlap.
        let part = |from: usize, n: usize| unsafe { memory.slice::<f32>(at + from, n) };
        Scratch {
            q: part(self.q, n.q),
            plain: part(self.plain, n.plain),
            squares: part(self.squares, n.squares),
            k: part(self.k, n.k),
            v: part(self.v, n.v),
            s: part(self.s, n.s),
            y: part(self.y, n.y),
            again: part(self.again, n.again),
            acc: part(self.acc, n.acc),
            m: part(self.m, n.lanes),
            l: part(self.l, n.lanes),
            factor: part(self.factor, MAX_LANES),
            count: part(self.count, n.count),
            mask: part(self.mask, n.mask),
            // SAFETY: as above.
            mask_rows: unsafe { memory.slice(at + self.mask_rows, n.lanes) },
            row: part(self.row, n.row),
        }
    }
}
