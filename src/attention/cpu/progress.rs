//! How far the threads of a plan are with a selection.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Of one selection, shared by all of its tasks.
#[derive(Default)]
pub(super) struct LookupProgress {
    /// Tasks scored.
    scored: AtomicUsize,
    selected: AtomicBool,
    /// Keys in the kept clusters.
    kept: AtomicU32,
    /// Bits of the true mass of the dropped clusters, where it was measured.
    missed: AtomicU64,
}

impl LookupProgress {
    /// Counts a scored task; true for the last of `n`, which then sees all scores.
    pub(super) fn is_last_score(&self, n: usize) -> bool {
        last(&self.scored, n)
    }

    /// Tells those who wait that the selection is there, with so many keys.
    pub(super) fn select(&self, keys: u32) {
        self.kept.store(keys, Ordering::Relaxed);
        self.selected.store(true, Ordering::Release);
    }

    pub(super) fn kept(&self) -> u32 {
        self.kept.load(Ordering::Relaxed)
    }

    /// Books what a selection misses.
    pub(super) fn miss(&self, mass: f64) {
        self.missed.store(mass.to_bits(), Ordering::Relaxed);
    }

    pub(super) fn missed(&self) -> f64 {
        f64::from_bits(self.missed.load(Ordering::Relaxed))
    }

    /// Waits until the selection is there; false if it may never be. By the order of tasks all of its scores are in the
    /// hands of running threads, none of which waits.
    pub(super) fn wait(&self, failed: &AtomicBool) -> bool {
        const SPINS: usize = 1 << 12;
        let mut spins = 0;
        while !self.selected.load(Ordering::Acquire) {
            if failed.load(Ordering::Relaxed) {
                return false;
            }
            spins += 1;
            match spins < SPINS {
                true => std::hint::spin_loop(),
                false => std::thread::yield_now(),
            }
        }
        true
    }

    /// Once every thread has left.
    pub(super) fn reset(&self) {
        self.selected.store(false, Ordering::Relaxed);
    }
}

/// Tells the threads that wait for a selection.
pub(super) struct OnPanic<'a>(pub(super) &'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Counts a finished part; true for the last of `n`, which then sees what the others wrote.
pub(super) fn last(counter: &AtomicUsize, n: usize) -> bool {
    let last = counter.fetch_add(1, Ordering::AcqRel) + 1 == n;
    if last {
        counter.store(0, Ordering::Relaxed);
    }
    last
}
