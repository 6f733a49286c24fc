//! Tiles of a prefill: consecutive query rows that share a selection. All heads of a group and all rows of a tile meet
//! each centroid, key and value together, so that a call is matrix products and each row of the cache is converted once
//! for dozens of query rows.
//!
//! `lookup` scores, `attend` runs over cells, `kernels` are the inner loops, `vector` what they are written in.

mod attend;
mod kernels;
mod lookup;
mod scratch;
mod vector;

use std::sync::atomic::AtomicBool;

use self::lookup::Share;
use self::scratch::{Scratch, ScratchLayout};
use super::lookup::Lookup;
use super::memory::{Carver, Pair, Space, SpaceLayout, Workspace};
use super::progress::LookupProgress;
use super::{Kept, Path};
use crate::attention::{Call, Mode, Row};
use crate::hadamard;

/// Cells of a block: their keys and values as f32 stay in the second-level cache with the panels of a tile.
const CELLS: usize = 64;

/// Lanes of a panel.
fn lanes(path: Path) -> usize {
    // SAFETY: paths are those of this processor.
    unsafe { kernels::lanes(path) }
}

/// What all tasks share.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) call: &'a Call,
    pub(super) path: Path,
    pub(super) memory: &'a Workspace,
    /// A thread panicked.
    pub(super) failed: &'a AtomicBool,
}

/// The tiles of a call: where their memory is, and how they are cut into tasks. A unit is a (tile, KV head); a panel some
/// of its query rows.
pub(super) struct Tiles {
    n_head_kv: usize,
    n_unit: usize,
    lanes: usize,
    /// Panels of the largest tile, and parts that a unit's attention is cut into; one if a task is a whole unit.
    n_panel: usize,
    n_part: usize,
    split: bool,
    space: SpaceLayout,
    scratch: ScratchLayout,
    /// Numbers of a panel's share of a selection, and of them those of each array.
    share: usize,
    n_cluster: usize,
    spaces_at: usize,
    shares_at: usize,
    scratch_at: usize,
    /// Of each unit.
    lookups: Vec<LookupProgress>,
}

/// A unit.
struct Tile<'a> {
    /// Of its first row.
    lookup: Lookup<'a>,
    n_row: usize,
    lanes: usize,
}

impl<'a> Tile<'a> {
    fn pair(&self) -> &Pair<'a> {
        &self.lookup.pair
    }

    /// Row number i of the tile.
    fn row(&self, i: usize) -> Pair<'a> {
        Pair { row: self.lookup.pair.row + i, ..self.lookup.pair }
    }

    fn n_lane(&self) -> usize {
        self.n_row * self.pair().problem().n_group()
    }

    fn n_panel(&self) -> usize {
        self.n_lane().div_ceil(self.lanes)
    }

    /// Lanes of a panel that have a row.
    fn used(&self, panel: usize) -> usize {
        (self.n_lane() - panel * self.lanes).min(self.lanes)
    }

    /// Loads the queries of panels `from..to`. Lanes without a row are 0.
    fn load(&self, (from, to): (usize, usize), scratch: &mut Scratch<'_>) {
        let (group, dk, width) = (self.pair().problem().n_group(), self.pair().problem().q.ne[0], self.lanes);
        let turn = self.pair().call.rotation.k;
        let (first, end) = (from * width, (to * width).min(self.n_lane()));
        if end < to * width {
            let last = (to - 1) * dk * width..to * dk * width;
            scratch.q[last.clone()].fill(0.0);
            if turn != 0 {
                scratch.plain[last].fill(0.0);
            }
        }
        for i in first / group..end.div_ceil(group) {
            self.row(i).load_query(&mut scratch.row[..group * dk]);
            for g in (0..group).filter(|g| (first..end).contains(&(i * group + g))) {
                let lane = i * group + g;
                let at = lane / width * dk * width + lane % width;
                let q = &mut scratch.row[g * dk..(g + 1) * dk];
                q.iter().enumerate().for_each(|(d, x)| scratch.q[at + d * width] = *x);
                if turn != 0 {
                    hadamard::rotate(q, turn);
                    q.iter().enumerate().for_each(|(d, x)| scratch.plain[at + d * width] = *x);
                }
            }
        }
    }
}

impl Tiles {
    /// Cuts the call's tiles into tasks for about `n_threads` threads, with memory from `carver`; `split` if a unit is
    /// more than one task.
    pub(super) fn new(
        call: &Call,
        path: Path,
        n_threads: usize,
        split: bool,
        wanted: usize,
        (n_cluster, n_sink, n_prefix): (usize, usize, usize),
        carver: &mut Carver,
    ) -> Tiles {
        let (lanes, n_head_kv) = (lanes(path), call.problem.k.ne[2]);
        let most = call.tiles.iter().map(|t| t.len()).max().unwrap_or(0);
        let n_panel = (most * call.problem.n_group()).div_ceil(lanes);
        let n_unit = call.tiles.len() * n_head_kv;
        let (n_cluster, n_sink, n_prefix) = if n_unit == 0 { (0, 0, 0) } else { (n_cluster, n_sink, n_prefix) };
        let by_mass = matches!(call.selection.mode, Mode::Mass(_));
        let share = if by_mass { 2 * n_cluster + 1 } else { n_cluster }.next_multiple_of(16);
        let space = SpaceLayout::new(0, n_cluster, 0, n_prefix);
        let scratch = ScratchLayout::new(call, path, n_panel, n_cluster, n_sink);
        let threads = if n_unit == 0 { 0 } else { n_threads };
        Tiles {
            n_head_kv,
            n_unit,
            lanes,
            n_panel,
            n_part: if split { wanted.div_ceil(n_unit.max(1)).clamp(1, n_panel.max(1)) } else { 1 },
            split,
            spaces_at: carver.area::<u8>(space.bytes * if split { n_unit } else { threads }),
            shares_at: carver.area::<f32>(share * if split { n_unit * n_panel } else { threads }),
            scratch_at: carver.area::<u8>(scratch.bytes * threads),
            lookups: (0..n_unit).map(|_| LookupProgress::default()).collect(),
            space,
            scratch,
            share,
            n_cluster,
        }
    }

    /// Number of tasks that score.
    pub(super) fn n_score(&self) -> usize {
        if self.split {
            self.n_unit * self.n_panel
        } else {
            0
        }
    }

    /// Number of tasks that attend.
    pub(super) fn n_attend(&self) -> usize {
        self.n_unit * self.n_part
    }

    /// Once every thread has left.
    pub(super) fn reset(&self) {
        self.lookups.iter().for_each(LookupProgress::reset);
    }

    /// Adds what the tiles kept in a run, each of their rows counted.
    pub(super) fn add_kept(&self, shared: Shared<'_>, out: &mut Kept) {
        for (unit, lookup) in self.lookups.iter().enumerate() {
            let Some(tile) = self.tile(shared, unit, 0) else { continue };
            let meta = tile.lookup.binding.index.meta();
            let share = (meta.n_sink as f64 + lookup.kept() as f64) / (meta.n_prefix() as f64 - meta.n_window as f64);
            out.share_sum += tile.n_row as f64 * share;
            out.count += tile.n_row as u64;
        }
    }

    /// Space number n: with the split schedule that of a unit, else of a thread.
    pub(super) fn space<'a>(&'a self, shared: Shared<'a>, n: usize) -> Space<'a> {
        Space { memory: shared.memory, layout: &self.space, at: self.spaces_at + n * self.space.bytes }
    }

    /// A unit, with a space for its selection.
    fn tile<'a>(&'a self, shared: Shared<'a>, unit: usize, space: usize) -> Option<Tile<'a>> {
        let Shared { call, path, .. } = shared;
        let rows = &call.tiles[unit / self.n_head_kv];
        let Row::Sparse(n) = call.rows[rows.start] else { return None };
        let binding = &call.bindings[n as usize];
        let pair = Pair { call, row: rows.start, head_kv: unit % self.n_head_kv, path };
        let view = binding.index.layer(call.layer)?;
        let lookup = Lookup { pair, binding, view, space: self.space(shared, space) };
        Some(Tile { lookup, n_row: rows.len(), lanes: self.lanes })
    }

    /// Number n of the shares.
    ///
    /// # Safety
    /// No other use of it is alive.
    unsafe fn share<'a>(&self, shared: Shared<'a>, n: usize, n_cluster: usize) -> Share<'a> {
        let by_mass = matches!(shared.call.selection.mode, Mode::Mass(_)) as usize;
        let at = self.shares_at + 4 * n * self.share;
        // SAFETY: the contract; the parts do not overlap.
        let part = |from: usize, n: usize| unsafe { shared.memory.slice::<f32>(at + 4 * from, n) };
        Share {
            squares: part(0, n_cluster),
            mass: part(self.n_cluster, by_mass * n_cluster),
            sinks: part(2 * self.n_cluster * by_mass, by_mass),
        }
    }

    /// A task that scores, one panel's share of its unit's selection; the last one done selects.
    ///
    /// # Safety
    /// The call's arrays are as it says; each task is claimed once, those that score before those that attend, by a thread
    /// with a number of its own below the planned one.
    pub(super) unsafe fn score(&self, shared: Shared<'_>, task: usize, ith: usize) {
        let (unit, panel) = (task / self.n_panel, task % self.n_panel);
        let Some(tile) = self.tile(shared, unit, unit) else { return };
        if panel >= tile.n_panel() {
            return;
        }
        let share = |panel: usize| unit * self.n_panel + panel;
        // SAFETY: a share is its task's own; the last one done of a unit may read all of them (acquire below).
        unsafe {
            let mut scratch = self.scratch.open(shared.memory, self.scratch_at + ith * self.scratch.bytes);
            tile.load((panel, panel + 1), &mut scratch);
            tile.share(panel, &mut scratch, self.share(shared, share(panel), tile.lookup.n_cluster()));
            if self.lookups[unit].is_last_score(tile.n_panel()) {
                let mut sum = Sum::new(&tile.lookup);
                for panel in 0..tile.n_panel() {
                    sum.add(&self.share(shared, share(panel), tile.lookup.n_cluster()));
                }
                self.select(&tile, unit, sum.sinks);
            }
        }
    }

    /// A task that attends: some panels of a unit, or with the fused schedule all that is to be done for a unit.
    ///
    /// # Safety
    /// As for `score`.
    pub(super) unsafe fn attend(&self, shared: Shared<'_>, task: usize, ith: usize) {
        if !self.split {
            // SAFETY: the same contract.
            return unsafe { self.whole(shared, task, ith) };
        }
        let (unit, n) = (task / self.n_part, task % self.n_part);
        let Some(tile) = self.tile(shared, unit, unit) else { return };
        let panels = (tile.n_panel() * n / self.n_part, tile.n_panel() * (n + 1) / self.n_part);
        if panels.0 == panels.1 || !self.lookups[unit].wait(shared.failed) {
            return;
        }
        // SAFETY: the selection is complete; panels and scratch are this task's own.
        unsafe {
            let mut scratch = self.scratch.open(shared.memory, self.scratch_at + ith * self.scratch.bytes);
            tile.load(panels, &mut scratch);
            tile.attend(panels, tile.lookup.space.chosen(), &mut scratch);
        }
    }

    /// Fused: all of a unit.
    unsafe fn whole(&self, shared: Shared<'_>, task: usize, ith: usize) {
        let Some(tile) = self.tile(shared, task, ith) else { return };
        let all = (0, tile.n_panel());
        // SAFETY: scratch, space and share number `ith` are this thread's own.
        unsafe {
            let mut scratch = self.scratch.open(shared.memory, self.scratch_at + ith * self.scratch.bytes);
            tile.load(all, &mut scratch);
            let mut sum = Sum::new(&tile.lookup);
            for panel in 0..all.1 {
                tile.share(panel, &mut scratch, self.share(shared, ith, tile.lookup.n_cluster()));
                sum.add(&self.share(shared, ith, tile.lookup.n_cluster()));
            }
            self.select(&tile, task, sum.sinks);
            tile.attend(all, tile.lookup.space.chosen(), &mut scratch);
        }
    }

    /// # Safety
    /// The sums of the unit's shares are in its space, which no other task has.
    unsafe fn select(&self, tile: &Tile<'_>, unit: usize, sink_share: f64) {
        // SAFETY: the contract.
        unsafe {
            tile.lookup.fill_count();
            tile.lookup.space.mean(tile.lookup.n_cluster()).iter_mut().for_each(|p| *p = p.sqrt());
            self.lookups[unit].select(tile.lookup.keep(sink_share));
        }
    }
}

/// Sums of a unit's shares, in the unit's space; squares where the mean will be.
struct Sum<'a> {
    mean: &'a mut [f32],
    mass: &'a mut [f32],
    sinks: f64,
}

impl<'a> Sum<'a> {
    /// # Safety
    /// No other use of the lookup's sums is alive.
    unsafe fn new(lookup: &Lookup<'a>) -> Sum<'a> {
        // SAFETY: the contract; distinct parts.
        let (mean, mass) = unsafe { (lookup.space.mean(lookup.n_cluster()), lookup.space.mass(lookup.n_cluster())) };
        mean.fill(0.0);
        mass.fill(0.0);
        Sum { mean, mass, sinks: 0.0 }
    }

    fn add(&mut self, share: &Share<'_>) {
        self.mean.iter_mut().zip(&*share.squares).for_each(|(sum, x)| *sum += x);
        self.mass.iter_mut().zip(&*share.mass).for_each(|(sum, x)| *sum += x);
        self.sinks += share.sinks.iter().map(|x| *x as f64).sum::<f64>();
    }
}
