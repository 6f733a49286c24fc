//! Exact softmax attention of one GQA group over a list of cells, as a state (max, sum, sum of values) per head that
//! merges with others in any grouping.

use std::ops::Range;

use half::f16;

use super::kernels::{accumulate, cap, dots, exp_sum, max, prefetch_far, Source, BLOCK};
use super::lookup::Lookup;
use super::memory::{Pair, Rows, Scratch};
use crate::hadamard;

/// Softmax state of the heads of a group.
pub(super) struct State<'a> {
    m: &'a mut [f32],
    l: &'a mut [f32],
    acc: &'a mut [f32],
}

impl<'a> State<'a> {
    /// A state in `memory`, which holds `group * (dv + 2)` numbers.
    pub(super) fn over(memory: &'a mut [f32], group: usize) -> State<'a> {
        let (m, rest) = memory.split_at_mut(group);
        let (l, acc) = rest.split_at_mut(group);
        State { m, l, acc }
    }

    pub(super) fn reset(&mut self) {
        self.m.fill(f32::NEG_INFINITY);
        self.l.fill(0.0);
        self.acc.fill(0.0);
    }

    fn head(&mut self, g: usize) -> State<'_> {
        let dv = self.acc.len() / self.m.len();
        State { m: &mut self.m[g..g + 1], l: &mut self.l[g..g + 1], acc: &mut self.acc[g * dv..(g + 1) * dv] }
    }

    /// Raises the max of a head to `top`.
    fn raise(&mut self, g: usize, top: f32) {
        if top > self.m[g] {
            let dv = self.acc.len() / self.m.len();
            let factor = (self.m[g] - top).exp();
            self.m[g] = top;
            self.l[g] *= factor;
            self.acc[g * dv..(g + 1) * dv].iter_mut().for_each(|a| *a *= factor);
        }
    }

    /// Adds what another state has seen.
    pub(super) fn merge(&mut self, other: &State<'_>) {
        let dv = self.acc.len() / self.m.len();
        for g in 0..self.m.len() {
            self.raise(g, other.m[g]);
            // Both -inf: nothing seen, unless every score was NaN, and that shall show.
            let factor = if other.m[g] == self.m[g] { 1.0 } else { (other.m[g] - self.m[g]).exp() };
            self.l[g] += factor * other.l[g];
            let own = g * dv..(g + 1) * dv;
            self.acc[own.clone()].iter_mut().zip(&other.acc[own]).for_each(|(a, b)| *a += factor * b);
        }
    }

    /// Adds ggml's sinks and writes the output.
    ///
    /// # Safety
    /// No other task writes this pair's output.
    pub(super) unsafe fn finish(&mut self, pair: &Pair<'_>) {
        let dv = self.acc.len() / self.m.len();
        for g in 0..self.m.len() {
            let sink = pair.sink(g);
            self.raise(g, sink);
            if sink > f32::NEG_INFINITY {
                self.l[g] += (sink - self.m[g]).exp();
            }
            let factor = if self.l[g] == 0.0 { 0.0 } else { 1.0 / self.l[g] };
            // SAFETY: the caller's contract.
            unsafe { pair.store(g, &self.acc[g * dv..(g + 1) * dv], factor) };
        }
    }
}

/// Cells to attend to. Made once per task and never stored, so its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(super) enum Cells<'a> {
    /// All of the cache, as the mask allows.
    All(usize),
    /// The binding's always-cells, then those of the kept clusters, which are known to be visible.
    Listed { lookup: Lookup<'a>, kept: &'a [u32], cells: &'a [u32] },
}

impl Cells<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Cells::All(n) => *n,
            Cells::Listed { lookup, cells, .. } => lookup.binding.always.len() + cells.len(),
        }
    }
}

/// What a task attends to, by place in the list of cells.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) own: Range<usize>,
    /// What its thread is likely to attend to next: the first rows are fetched meanwhile.
    pub(super) ahead: Range<usize>,
}

/// Up to BLOCK visible cells.
struct Block {
    n: usize,
    keys: [*const u8; BLOCK],
    values: [*const u8; BLOCK],
    mask: [f32; BLOCK],
    /// Some mask value is not 0.
    masked: bool,
}

impl Block {
    fn new() -> Block {
        Block {
            n: 0,
            keys: [std::ptr::null(); BLOCK],
            values: [std::ptr::null(); BLOCK],
            mask: [0.0; BLOCK],
            masked: false,
        }
    }

    /// Repeats the last row up to a multiple of 4, which is returned; those get weight 0.
    fn pad(&mut self) -> usize {
        let tile = self.n.next_multiple_of(4);
        for i in self.n..tile {
            self.keys[i] = self.keys[self.n - 1];
            self.values[i] = self.values[self.n - 1];
        }
        tile
    }
}

/// Walks over a part of the cells and fills blocks with the visible ones.
struct Cursor<'a, 'c> {
    cells: &'c Cells<'a>,
    keys: Rows<'a>,
    values: Rows<'a>,
    row_bytes: (usize, usize),
    mask: Option<Rows<'a>>,
    n_kv: usize,
    at: usize,
    end: usize,
    /// Cells wanted after those, so that their first rows are on their way.
    ahead: Range<usize>,
}

impl Cursor<'_, '_> {
    /// Takes a cell unless it is masked (or outside the cache, which a wrong binding could ask for).
    #[inline]
    fn push(&self, block: &mut Block, cell: usize, mask: Option<Rows<'_>>) {
        const MINUS_INF: u16 = 0xfc00;
        if cell >= self.n_kv {
            return;
        }
        // SAFETY: the mask has a value for every cell.
        let bits = mask.map_or(0, |m| unsafe { m.bits(cell) });
        if bits == MINUS_INF {
            return;
        }
        let n = block.n;
        block.mask[n] = if bits == 0 { 0.0 } else { f16::from_bits(bits).to_f32() };
        block.masked |= bits != 0;
        block.keys[n] = self.keys.get(cell);
        block.values[n] = self.values.get(cell);
        block.n = n + 1;
    }

    fn fill(&mut self, block: &mut Block) {
        block.n = 0;
        block.masked = false;
        while block.n < BLOCK && self.at < self.end {
            match self.cells {
                Cells::All(_) => {
                    self.push(block, self.at, self.mask);
                    self.at += 1;
                }
                Cells::Listed { lookup, .. } if self.at < lookup.binding.always.len() => {
                    self.push(block, lookup.binding.always[self.at] as usize, self.mask);
                    self.at += 1;
                }
                Cells::Listed { lookup, cells, .. } => {
                    let j = self.at - lookup.binding.always.len();
                    let n = (BLOCK - block.n).min(self.end - self.at);
                    for (i, cell) in cells[j..j + n].iter().enumerate() {
                        block.mask[block.n + i] = 0.0;
                        block.keys[block.n + i] = self.keys.get(*cell as usize);
                        block.values[block.n + i] = self.values.get(*cell as usize);
                    }
                    block.n += n;
                    self.at += n;
                }
            }
        }
        self.foresee();
    }

    /// Fetches the rows of the block after this one: they are anywhere in memory, which no hardware foresees (measured: a third
    /// of the time).
    fn foresee(&mut self) {
        let Cells::Listed { lookup, cells, .. } = self.cells else { return };
        let end = (self.at + BLOCK).min(self.end);
        let beyond = self.ahead.start..self.ahead.end.min(self.ahead.start + BLOCK - (end - self.at));
        self.ahead.start = beyond.end;
        let always = &lookup.binding.always;
        let (key_bytes, value_bytes) = self.row_bytes;
        for i in (self.at..end).chain(beyond) {
            let cell = if i < always.len() { always[i] } else { cells[i - always.len()] } as usize;
            prefetch_far(self.keys.get(cell), key_bytes);
            prefetch_far(self.values.get(cell), value_bytes);
        }
    }
}

/// Adds a part of the cells to the state. `scratch.q` holds the queries.
///
/// # Safety
/// The call's arrays are as it says.
pub(super) unsafe fn attend(
    pair: &Pair<'_>,
    cells: &Cells<'_>,
    part: Part,
    scratch: &mut Scratch<'_>,
    state: &mut State<'_>,
) {
    let p = pair.problem();
    let group = p.n_group();
    // With a mask per head a cell may be hidden (its value NaN) from one head and visible to the next: no sharing then.
    let own_masks = p.mask.is_some_and(|m| m.ne[2] > 1) && group > 1;
    if !own_masks {
        // SAFETY: the same contract.
        return unsafe { sweep(pair, 0, cells, part, scratch.q, scratch.s, state) };
    }
    for g in 0..group {
        // SAFETY: the same contract.
        unsafe { attend_head(pair, g, cells, part.clone(), scratch, state) };
    }
}

/// The same for head `g` of the group alone: no other head of `state` is touched.
///
/// # Safety
/// As for `attend`.
pub(super) unsafe fn attend_head(
    pair: &Pair<'_>,
    g: usize,
    cells: &Cells<'_>,
    part: Part,
    scratch: &mut Scratch<'_>,
    state: &mut State<'_>,
) {
    let d = pair.problem().q.ne[0];
    // SAFETY: the same contract.
    unsafe { sweep(pair, g, cells, part, &scratch.q[g * d..(g + 1) * d], scratch.s, &mut state.head(g)) }
}

/// The same for the heads in `state`, which start at head `g` of the group and share a mask.
unsafe fn sweep(
    pair: &Pair<'_>,
    g: usize,
    cells: &Cells<'_>,
    part: Part,
    q: &[f32],
    s: &mut [f32],
    state: &mut State<'_>,
) {
    let p = pair.problem();
    let mut cursor = Cursor {
        cells,
        keys: pair.keys(),
        values: pair.values(),
        row_bytes: (p.k_type.row_bytes(p.q.ne[0]), p.v_type.row_bytes(p.v.ne[0])),
        mask: pair.mask(g),
        n_kv: p.k.ne[1],
        at: part.own.start,
        end: part.own.end,
        ahead: part.ahead,
    };
    let (mut block, mut next) = (Block::new(), Block::new());
    cursor.fill(&mut block);
    while block.n > 0 {
        // The rows of the next block are fetched while this one is worked on.
        cursor.fill(&mut next);
        let tile = block.pad();
        // SAFETY: the rows are in the cache.
        unsafe { dots(pair.path, p.k_type.into(), q, p.q.ne[0], &block.keys[..tile], &next.keys[..next.n], s) };
        for (h, s) in s.chunks_exact_mut(BLOCK).take(state.m.len()).enumerate() {
            if p.softcap != 0.0 {
                cap(pair.path, &mut s[..block.n], p.softcap);
            }
            if block.masked {
                let slope = p.slope(pair.first_head() + g + h);
                s.iter_mut().zip(&block.mask).for_each(|(s, m)| *s += slope * m);
            }
        }
        // SAFETY: as above.
        unsafe { absorb(pair, p.v_type.into(), s, block.n, &block.values[..tile], &next.values[..next.n], state) };
        std::mem::swap(&mut block, &mut next);
    }
}

/// Adds rows with scores `s` (`[heads][BLOCK]`, `n` of each count) to the state.
///
/// # Safety
/// As for `accumulate`.
unsafe fn absorb(
    pair: &Pair<'_>,
    source: Source,
    s: &mut [f32],
    n: usize,
    values: &[*const u8],
    next: &[*const u8],
    state: &mut State<'_>,
) {
    let heads = state.m.len();
    for (h, s) in s.chunks_exact_mut(BLOCK).take(heads).enumerate() {
        let s = &mut s[..n.next_multiple_of(8)];
        s[n..].fill(f32::NEG_INFINITY);
        state.raise(h, max(pair.path, s));
        let reference = if state.m[h] == f32::NEG_INFINITY { 0.0 } else { state.m[h] };
        state.l[h] += exp_sum(pair.path, s, reference);
    }
    // SAFETY: the caller's contract.
    unsafe { accumulate(pair.path, source, s, state.acc.len() / heads, values, next, state.acc) };
}

/// Adds the estimate of the dropped clusters, `n_i exp(x_i)` with the mean value, to an empty state.
///
/// # Safety
/// Scores and selection are complete, and nobody else writes them meanwhile.
pub(super) unsafe fn estimate(lookup: &Lookup<'_>, kept: &[u32], scratch: &mut Scratch<'_>, state: &mut State<'_>) {
    let (p, c) = (lookup.pair.problem(), lookup.n_cluster());
    let dv = p.v.ne[0];
    let first = lookup.pair.head_kv * c;
    let means = lookup.view.mean_values[first * dv..(first + c) * dv].as_ptr().cast();
    let means = Rows::packed(means, 2 * dv);
    let offsets = lookup.view.head_offsets(lookup.pair.head_kv);
    let mut kept = kept.iter().copied().peekable();
    let mut dropped = (0..c).filter(|i| kept.next_if_eq(&(*i as u32)).is_none());
    loop {
        let mut block = Block::new();
        let mut clusters = [0usize; BLOCK];
        for i in dropped.by_ref().take(BLOCK) {
            clusters[block.n] = i;
            block.values[block.n] = means.get(i);
            block.n += 1;
        }
        if block.n == 0 {
            // Mean values are in the plain basis; their sum is rotated once, in the place of each.
            state.acc.chunks_exact_mut(dv).for_each(|acc| hadamard::rotate(acc, lookup.pair.call.rotation.v));
            return;
        }
        let tile = block.pad();
        for (g, s) in scratch.s.chunks_exact_mut(BLOCK).enumerate() {
            // SAFETY: the caller's contract.
            let x = unsafe { lookup.space.x(g, 0, c) };
            let s = &mut s[..block.n];
            for (s, i) in s.iter_mut().zip(&clusters) {
                *s = x[*i];
            }
            if p.softcap != 0.0 {
                s.iter_mut().for_each(|s| *s /= p.softcap);
                cap(lookup.pair.path, s, p.softcap);
            }
            for (s, i) in s.iter_mut().zip(&clusters) {
                *s += ((offsets[i + 1] - offsets[*i]) as f32).ln();
            }
        }
        // SAFETY: the rows are mean values of the index.
        unsafe { absorb(&lookup.pair, Source::F16, scratch.s, block.n, &block.values[..tile], &[], state) };
    }
}
