//! Exact softmax attention of a tile's panels over blocks of cells: a block's keys and values are converted once, and
//! each panel takes its scores, an online softmax step and the sum of values from them while they are in cache.

use half::f16;

use super::kernels::{add_mask, add_per_row, product, scale_finite, softmax, Matrix};
use super::scratch::Scratch;
use super::{Tile, CELLS};
use crate::attention::cpu::kernels::{cap, decode, fetch, Source};
use crate::attention::cpu::memory::Rows;
use crate::hadamard;

const MINUS_INF: u16 = 0xfc00;

/// Cells that some lane sees.
struct Block {
    n: usize,
    keys: [*const u8; CELLS],
    values: [*const u8; CELLS],
    /// Number of the cell, where a lane's mask is not 0 there.
    masked: [Option<u32>; CELLS],
    any_masked: bool,
}

impl Block {
    fn new() -> Block {
        let none = [std::ptr::null(); CELLS];
        Block { n: 0, keys: none, values: none, masked: [None; CELLS], any_masked: false }
    }
}

/// Walks over the always-cells, then those of the kept clusters.
struct Cursor<'a, 'c> {
    tile: &'c Tile<'a>,
    /// Of the kept clusters.
    cells: &'c [u32],
    keys: Rows<'a>,
    values: Rows<'a>,
    /// How many of either are done.
    always: usize,
    listed: usize,
}

/// Which lanes a slice of a tile's panels has, and where their masks are.
struct Lanes<'s> {
    first: usize,
    end: usize,
    /// Lanes that share a mask row: those of a query row, or each its own.
    per_mask: usize,
    /// Addresses of the mask rows of lanes `first / per_mask * per_mask` on; none without a mask.
    masks: &'s [usize],
}

impl Lanes<'_> {
    /// Bits of mask number i for a cell.
    ///
    /// # Safety
    /// The mask has a value for the cell.
    unsafe fn bits(&self, i: usize, cell: usize) -> u16 {
        // SAFETY: the contract.
        unsafe { Rows::packed(self.masks[i] as *const u8, 2).bits(cell) }
    }

    /// Lanes that mask number i is for.
    fn of_mask(&self, i: usize) -> std::ops::Range<usize> {
        let from = (self.first / self.per_mask + i) * self.per_mask;
        from.max(self.first)..(from + self.per_mask).min(self.end)
    }
}

impl Cursor<'_, '_> {
    fn push(&self, block: &mut Block, cell: usize, masked: bool) {
        let n = block.n;
        block.keys[n] = self.keys.get(cell);
        block.values[n] = self.values.get(cell);
        block.masked[n] = masked.then_some(cell as u32);
        block.any_masked |= masked;
        block.n = n + 1;
    }

    fn fill(&mut self, block: &mut Block, lanes: &Lanes<'_>) {
        let lookup = &self.tile.lookup;
        let n_kv = lookup.pair.problem().k.ne[1];
        block.n = 0;
        block.any_masked = false;
        let always = &lookup.binding.always;
        while block.n < CELLS && self.always < always.len() {
            let some = &always[self.always..always.len().min(self.always + CELLS - block.n)];
            self.always += some.len();
            let (mut seen, mut masked) = ([lanes.masks.is_empty(); CELLS], [false; CELLS]);
            for i in 0..lanes.masks.len() {
                for ((seen, masked), cell) in seen.iter_mut().zip(&mut masked).zip(some) {
                    if (*cell as usize) < n_kv {
                        // SAFETY: the mask has a value for every cell of the cache.
                        let bits = unsafe { lanes.bits(i, *cell as usize) };
                        *seen |= bits != MINUS_INF;
                        *masked |= bits != 0;
                    }
                }
            }
            for ((cell, seen), masked) in some.iter().zip(seen).zip(masked) {
                // A cell outside the cache is one that only a wrong binding asks for.
                if seen && (*cell as usize) < n_kv {
                    self.push(block, *cell as usize, masked);
                }
            }
        }
        // Cells of the kept clusters are known to be visible, and to be in the cache.
        let listed = &self.cells[self.listed..self.cells.len().min(self.listed + CELLS - block.n)];
        self.listed += listed.len();
        listed.iter().for_each(|cell| self.push(block, *cell as usize, false));
    }
}

impl Tile<'_> {
    /// Attention of panels `from..to`, whose queries are loaded, over the always-cells and the kept clusters, to the
    /// output.
    ///
    /// # Safety
    /// The call's arrays are as it says; the selection is complete; no other task has these panels.
    pub(super) unsafe fn attend(
        &self,
        (from, to): (usize, usize),
        (kept, cells): (&[u32], &[u32]),
        scratch: &mut Scratch<'_>,
    ) {
        let p = self.pair().problem();
        let width = self.lanes;
        scratch.m[from * width..to * width].fill(f32::MIN);
        scratch.l[from * width..to * width].fill(0.0);
        scratch.acc[from * width * p.v.ne[0]..to * width * p.v.ne[0]].fill(0.0);
        // SAFETY: the contract, for all that follows.
        unsafe {
            if self.pair().call.selection.estimate {
                self.estimate((from, to), kept, scratch);
            }
            self.sweep((from, to), cells, scratch);
            self.store((from, to), scratch);
        }
    }

    unsafe fn sweep(&self, (from, to): (usize, usize), cells: &[u32], scratch: &mut Scratch<'_>) {
        let p = self.pair().problem();
        let (dk, dv, width, path) = (p.q.ne[0], p.v.ne[0], self.lanes, self.pair().path);
        let group = p.n_group();
        let (first, end) = (from * width, (to * width).min(self.n_lane()));
        // With a mask per head each lane has its own.
        let per_mask = if p.mask.is_some_and(|m| m.ne[2] > 1) { 1 } else { group };
        let n_mask = if p.mask.is_some() { end.div_ceil(per_mask) - first / per_mask } else { 0 };
        // Taken for the time of the sweep, so that the rest of the scratch can be lent.
        let mask_rows = std::mem::take(&mut scratch.mask_rows);
        for (i, address) in mask_rows[..n_mask].iter_mut().enumerate() {
            let lane = (first / per_mask + i) * per_mask;
            *address = self.row(lane / group).mask(lane % group).map_or(0, |m| m.get(0) as usize);
        }
        let lanes = Lanes { first, end, per_mask, masks: &mask_rows[..n_mask] };
        let mut cursor =
            Cursor { tile: self, cells, keys: self.pair().keys(), values: self.pair().values(), always: 0, listed: 0 };
        let (mut block, mut next) = (Block::new(), Block::new());
        cursor.fill(&mut block, &lanes);
        while block.n > 0 {
            // The rows of the next block are fetched while this one is worked on.
            cursor.fill(&mut next, &lanes);
            let n = block.n;
            let share = next.n.div_ceil(to - from);
            // SAFETY: rows of the cache; the buffers hold CELLS of them and of scores.
            unsafe {
                decode(path, p.k_type.into(), &block.keys[..n], dk, scratch.k);
                decode(path, p.v_type.into(), &block.values[..n], dv, scratch.v);
                let apart = if block.any_masked { self.masks(&block, &lanes, from, scratch) } else { 0 };
                let keys = Matrix::Rows { data: scratch.k.as_ptr(), step: dk };
                for panel in from..to {
                    let fetched = (panel - from) * share;
                    fetch(&next.keys[..next.n], fetched, fetched + share, p.k_type.row_bytes(dk));
                    fetch(&next.values[..next.n], fetched, fetched + share, p.v_type.row_bytes(dv));
                    let q = scratch.q[panel * dk * width..].as_ptr();
                    let s = scratch.s.as_mut_ptr();
                    product(path, self.used(panel), keys, (n.next_multiple_of(8), dk), q, None, s);
                    if p.softcap != 0.0 {
                        cap(path, &mut scratch.s[..n * width], p.softcap);
                    }
                    if block.any_masked {
                        let mask = scratch.mask[(panel - from) * CELLS * width..].as_ptr();
                        add_mask(path, scratch.s.as_mut_ptr(), mask, n);
                    }
                    self.absorb(panel, n, scratch);
                    if apart != 0 {
                        self.add_apart(&block, apart, panel, from, scratch);
                    }
                }
            }
            std::mem::swap(&mut block, &mut next);
        }
        scratch.mask_rows = mask_rows;
    }

    /// Adds a block, whose scores are in `s` and values in `v`, to the state of a panel.
    unsafe fn absorb(&self, panel: usize, n: usize, scratch: &mut Scratch<'_>) {
        let (dv, width, path) = (self.pair().problem().v.ne[0], self.lanes, self.pair().path);
        let own = panel * width..(panel + 1) * width;
        let (s, used) = (scratch.s.as_mut_ptr(), self.used(panel));
        let values = Matrix::Columns { data: scratch.v.as_ptr(), step: dv };
        // SAFETY: the buffers hold n rows, the state is the panel's own.
        unsafe {
            softmax(path, used, s, n, &mut scratch.m[own.clone()], &mut scratch.l[own], scratch.factor);
            let acc = scratch.acc[panel * dv * width..(panel + 1) * dv * width].as_mut_ptr();
            product(path, used, values, (dv, n), s, Some(&*scratch.factor), acc);
        }
    }

    /// Writes the masks of a block. A value that is not finite must not meet the weight 0 of a lane that does not see it:
    /// such a value is taken out of the block, and its bit is set in the result.
    unsafe fn masks(&self, block: &Block, lanes: &Lanes<'_>, from: usize, scratch: &mut Scratch<'_>) -> u64 {
        let (dv, width) = (self.pair().problem().v.ne[0], self.lanes);
        let n_panel = (lanes.end - from * width).div_ceil(width);
        scratch.mask[..n_panel * CELLS * width].fill(0.0);
        let mut apart = 0;
        for (j, cell) in block.masked[..block.n].iter().enumerate() {
            let Some(cell) = *cell else { continue };
            let mut hidden = false;
            for i in 0..lanes.masks.len() {
                // SAFETY: the cell is in the cache.
                let bits = unsafe { lanes.bits(i, cell as usize) };
                if bits != 0 {
                    hidden |= bits == MINUS_INF;
                    for lane in lanes.of_mask(i) {
                        let lane = lane - from * width;
                        scratch.mask[(lane / width * CELLS + j) * width + lane % width] = f16::from_bits(bits).to_f32();
                    }
                }
            }
            if hidden && scratch.v[j * dv..(j + 1) * dv].iter().any(|v| !v.is_finite()) {
                apart |= 1 << j;
            }
        }
        for j in (0..block.n).filter(|j| apart >> j & 1 == 1) {
            scratch.v[j * dv..(j + 1) * dv].fill(0.0);
        }
        apart
    }

    /// Adds the values that were taken out of a block to the lanes that see them. Their weights are in `s`.
    unsafe fn add_apart(&self, block: &Block, apart: u64, panel: usize, from: usize, scratch: &mut Scratch<'_>) {
        let p = self.pair().problem();
        let (dv, width) = (p.v.ne[0], self.lanes);
        for j in (0..block.n).filter(|j| apart >> j & 1 == 1) {
            let mut value = [0.0; crate::attention::cpu::HEAD_DIM_MAX];
            // SAFETY: the row is in the cache.
            unsafe { decode(self.pair().path, p.v_type.into(), &block.values[j..j + 1], dv, &mut value) };
            let mask = &scratch.mask[((panel - from) * CELLS + j) * width..][..width];
            for lane in (0..width).filter(|lane| mask[*lane] > f32::NEG_INFINITY) {
                let weight = scratch.s[j * width + lane];
                let acc = scratch.acc[panel * dv * width..].iter_mut().skip(lane).step_by(width);
                acc.zip(&value[..dv]).for_each(|(acc, v)| *acc += weight * v);
            }
        }
    }

    /// Adds the estimate of the dropped clusters, `n_i exp(x_i)` with the mean value, to an empty state.
    unsafe fn estimate(&self, (from, to): (usize, usize), kept: &[u32], scratch: &mut Scratch<'_>) {
        let (p, c) = (self.pair().problem(), self.lookup.n_cluster());
        let (dk, dv, width, path) = (p.q.ne[0], p.v.ne[0], self.lanes, self.pair().path);
        let (view, first) = (&self.lookup.view, self.pair().head_kv * c);
        let centroids = Rows::packed(view.centroids[first * dk..(first + c) * dk].as_ptr().cast(), 2 * dk);
        let means = Rows::packed(view.mean_values[first * dv..(first + c) * dv].as_ptr().cast(), 2 * dv);
        let offsets = view.head_offsets(self.pair().head_kv);
        let undo = if p.softcap == 0.0 { 1.0 } else { p.softcap };
        let mut kept = kept.iter().copied().peekable();
        let mut dropped = (0..c).filter(|i| kept.next_if_eq(&(*i as u32)).is_none());
        loop {
            let mut block = Block::new();
            let mut log_count = [0.0; CELLS];
            for i in dropped.by_ref().take(CELLS) {
                (block.keys[block.n], block.values[block.n]) = (centroids.get(i), means.get(i));
                log_count[block.n] = ((offsets[i + 1] - offsets[i]) as f32).ln();
                block.n += 1;
            }
            let n = block.n;
            if n == 0 {
                break;
            }
            // SAFETY: the rows are the index's; the buffers hold CELLS of them and of scores.
            unsafe {
                decode(path, Source::F16, &block.keys[..n], dk, scratch.k);
                decode(path, Source::F16, &block.values[..n], dv, scratch.v);
                let keys = Matrix::Rows { data: scratch.k.as_ptr(), step: dk };
                for panel in from..to {
                    let plain = if self.pair().call.rotation.k == 0 { &*scratch.q } else { &*scratch.plain };
                    let q = plain[panel * dk * width..].as_ptr();
                    let s = scratch.s.as_mut_ptr();
                    product(path, self.used(panel), keys, (n.next_multiple_of(8), dk), q, None, s);
                    scale_finite(path, s, n, undo);
                    if p.softcap != 0.0 {
                        scratch.s[..n * width].iter_mut().for_each(|s| *s /= p.softcap);
                        cap(path, &mut scratch.s[..n * width], p.softcap);
                    }
                    add_per_row(path, scratch.s.as_mut_ptr(), &log_count[..n]);
                    self.absorb(panel, n, scratch);
                }
            }
        }
        // Mean values are in the plain basis; their sum is rotated once, in the place of each.
        if self.pair().call.rotation.v != 0 {
            for lane in from * width..(to * width).min(self.n_lane()) {
                let at = lane / width * dv * width + lane % width;
                let row = &mut scratch.row[..dv];
                row.iter_mut().enumerate().for_each(|(d, x)| *x = scratch.acc[at + d * width]);
                hadamard::rotate(row, self.pair().call.rotation.v);
                row.iter().enumerate().for_each(|(d, x)| scratch.acc[at + d * width] = *x);
            }
        }
    }

    /// Adds ggml's sinks and writes the output.
    unsafe fn store(&self, (from, to): (usize, usize), scratch: &mut Scratch<'_>) {
        let p = self.pair().problem();
        let (dv, width, group) = (p.v.ne[0], self.lanes, p.n_group());
        for lane in from * width..(to * width).min(self.n_lane()) {
            let (pair, g) = (self.row(lane / group), lane % group);
            let (m, l, sink) = (scratch.m[lane], scratch.l[lane], pair.sink(g));
            let top = m.max(sink);
            let factor = (m - top).exp();
            let sum = l * factor + if sink > f32::NEG_INFINITY { (sink - top).exp() } else { 0.0 };
            let factor = if sum == 0.0 { 0.0 } else { factor / sum };
            let at = lane / width * dv * width + lane % width;
            let row = &mut scratch.row[..dv];
            row.iter_mut().enumerate().for_each(|(d, x)| *x = scratch.acc[at + d * width]);
            // SAFETY: the row and head are this task's own.
            unsafe { pair.store(g, row, factor) };
        }
    }
}
