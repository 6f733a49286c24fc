//! What is in force: settings and the indexes made ready, swapped as one, and totals. There is one such scope for the
//! process, and one for each context that a host makes through the C ABI. Functions here mean the scope that the calling
//! thread is in: while a graph is computed, that of its backend.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::cmp::Reverse;
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use super::binding::Matcher;
use super::stats::{log, Stats};
use crate::attention::{Mode, Selection};
use crate::config::{Config, ModeSetting, SPREAD_ALPHA, THRESHOLD_FLOOR};
use crate::index::{Index, IndexError, IndexMeta};

/// An index that is loaded, and how its clusters are selected under the present settings.
#[derive(Clone)]
pub struct Loaded {
    pub matcher: Arc<Matcher>,
    pub selection: Selection,
}

/// A consistent picture of settings and indexes; one graph is computed under one.
#[derive(Clone, Default)]
pub struct Snapshot {
    pub config: Config,
    /// Longest prefix first: of several that fit, the longest is used.
    pub indexes: Vec<Loaded>,
    /// Changes whenever the indexes do: bindings made under another number are dropped.
    pub generation: u64,
}

/// What belongs together; backends keep the scope that they were made in.
#[derive(Default)]
pub struct Scope {
    snapshot: RwLock<Arc<Snapshot>>,
    stats: Mutex<Stats>,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Scope>>> = const { RefCell::new(None) };
}

fn process() -> &'static Arc<Scope> {
    static PROCESS: OnceLock<Arc<Scope>> = OnceLock::new();
    PROCESS.get_or_init(Arc::default)
}

/// The scope that this thread is in; the process's unless it has entered another.
pub fn current() -> Arc<Scope> {
    // A thread that ends has no scope of its own any more.
    let own = CURRENT.try_with(|current| current.borrow().clone()).ok().flatten();
    own.unwrap_or_else(|| process().clone())
}

/// Puts this thread into a scope until the next call; `None`: that of the process.
pub fn set_current(scope: Option<Arc<Scope>>) -> Option<Arc<Scope>> {
    CURRENT.try_with(|current| current.replace(scope)).ok().flatten()
}

/// Puts this thread back when it is dropped.
pub struct Entered(Option<Arc<Scope>>);

/// Puts this thread into a scope for a while.
pub fn enter(scope: &Arc<Scope>) -> Entered {
    Entered(set_current(Some(scope.clone())))
}

/// Puts this thread into the process's scope for a while.
pub fn enter_process() -> Entered {
    Entered(set_current(None))
}

impl Drop for Entered {
    fn drop(&mut self) {
        set_current(self.0.take());
    }
}

/// Threshold of a nominal share: the nearest calibrated ones, interpolated in the logarithm.
fn threshold(meta: &IndexMeta, share: f32) -> f32 {
    let table = &meta.calibration;
    let above = table.iter().position(|c| c.budget >= share).unwrap_or(table.len().saturating_sub(1));
    let Some(hi) = table.get(above) else { return 0.0 };
    let lo = &table[above.saturating_sub(1)];
    if hi.budget <= lo.budget || share >= hi.budget || lo.threshold <= 0.0 || hi.threshold <= 0.0 {
        return hi.threshold;
    }
    let t = ((share - lo.budget) / (hi.budget - lo.budget)).max(0.0);
    (lo.threshold.ln() * (1.0 - t) + hi.threshold.ln() * t).exp()
}

/// The estimated mass to stop at for a true one: the nearest calibrated ones, interpolated in the logarithm of what is missed.
/// Beyond the table that keeps its ratio to the last one.
fn mass_target(meta: &IndexMeta, mass: f32) -> f32 {
    let missed = |share: f32| -(1.0 - share.min(1.0 - f32::EPSILON)).ln();
    let table = &meta.mass_targets;
    let Some(last) = table.last() else { return mass };
    if mass >= 1.0 {
        return 1.0;
    }
    let above = table.iter().position(|row| row.mass >= mass);
    let at = |i: usize| (missed(table[i].mass), missed(table[i].target));
    let x = missed(mass);
    let y = match above {
        None => missed(last.target) + x - missed(last.mass),
        Some(i) => {
            let ((x0, y0), (x1, y1)) = (if i > 0 { at(i - 1) } else { (0.0, 0.0) }, at(i));
            y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        }
    };
    1.0 - (-y).exp()
}

pub fn selection(config: &Config, meta: &IndexMeta) -> Selection {
    let mode = match config.mode {
        ModeSetting::Budget(b) => Mode::Budget(b),
        ModeSetting::Mass(m) => Mode::Mass(mass_target(meta, m)),
        ModeSetting::Threshold(b) => {
            Mode::Threshold { threshold: threshold(meta, b), floor: THRESHOLD_FLOOR.min(b / 2.0) }
        }
    };
    Selection { mode, spread: config.spread, alpha: SPREAD_ALPHA, estimate: config.estimate, coarse_share: 1.0 }
}

/// Makes settings and indexes of the present ones, in one step.
fn update(make: impl FnOnce(&Snapshot) -> (Config, Vec<Arc<Matcher>>, bool)) {
    let scope = current();
    let mut slot = scope.snapshot.write().unwrap_or_else(|e| e.into_inner());
    let (config, mut matchers, new_indexes) = make(&slot);
    matchers.sort_by_key(|matcher| Reverse(matcher.index.meta().n_prefix()));
    let indexes = matchers
        .into_iter()
        .map(|matcher| Loaded { selection: selection(&config, matcher.index.meta()), matcher })
        .collect();
    *slot = Arc::new(Snapshot { config, indexes, generation: slot.generation + u64::from(new_indexes) });
}

pub fn snapshot() -> Arc<Snapshot> {
    current().snapshot.read().unwrap_or_else(|e| e.into_inner()).clone()
}

fn matchers(snapshot: &Snapshot) -> Vec<Arc<Matcher>> {
    snapshot.indexes.iter().map(|l| l.matcher.clone()).collect()
}

/// Puts settings in force and loads the indexes that they name. An index that cannot be used is named on stderr and
/// left out: its prompts stay dense.
pub fn start(config: Config) {
    let mut found = Vec::new();
    for path in &config.index_paths {
        let opened = if config.synthetic { Index::open_any(path) } else { Index::open(path) };
        match opened.and_then(|index| Matcher::new(Arc::new(index))) {
            Ok(matcher) => found.push(Arc::new(matcher)),
            Err(error @ IndexError::Io { .. }) => log(format_args!("{error}; attention stays dense")),
            Err(error) => log(format_args!("{}: {error}; attention stays dense", path.display())),
        }
    }
    update(|_| (config, found, true));
}

/// Changes settings; they hold from the next graph on.
pub fn configure(change: impl FnOnce(&mut Config)) {
    update(|old| {
        let mut config = old.config.clone();
        change(&mut config);
        (config, matchers(old), false)
    });
}

/// Replaces the indexes in force.
///
/// # Errors
/// `Memory`; then nothing is changed.
pub fn set_indexes(indexes: Vec<Arc<Index>>) -> Result<(), IndexError> {
    let made = indexes.into_iter().map(|index| Matcher::new(index).map(Arc::new)).collect::<Result<_, _>>()?;
    update(|old| (old.config.clone(), made, true));
    Ok(())
}

/// Adds an index to those in force; false if it is one of them.
///
/// # Errors
/// `Memory`; then nothing is changed.
pub fn attach(index: &Arc<Index>) -> Result<bool, IndexError> {
    let matcher = Arc::new(Matcher::new(index.clone())?);
    let mut added = false;
    update(|old| {
        let mut all = matchers(old);
        added = !all.iter().any(|m| Arc::ptr_eq(&m.index, index));
        if added {
            all.push(matcher);
        }
        (old.config.clone(), all, added)
    });
    Ok(added)
}

/// Takes an index out of those in force; false if it is none of them. A graph that is being computed ends with it.
pub fn detach(index: &Arc<Index>) -> bool {
    let mut removed = false;
    update(|old| {
        let mut all = matchers(old);
        all.retain(|m| !Arc::ptr_eq(&m.index, index));
        removed = all.len() < old.indexes.len();
        (old.config.clone(), all, removed)
    });
    removed
}

/// Totals since the start or the last reset.
pub fn stats() -> Stats {
    current().stats.lock().unwrap_or_else(|e| e.into_inner()).clone()
}

pub fn reset_stats() {
    *current().stats.lock().unwrap_or_else(|e| e.into_inner()) = Stats::default();
}

pub fn count(change: impl FnOnce(&mut Stats)) {
    change(&mut current().stats.lock().unwrap_or_else(|e| e.into_inner()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::sample::sample_parts;
    use crate::index::MassTarget;

    #[test]
    fn a_mass_between_calibrated_ones_is_interpolated_in_what_is_missed() {
        let mut meta = sample_parts(1, 200, 1, 1, 4, 4, 3).meta;
        let row = |mass, target| MassTarget { mass, target, kept: 0.1 };
        meta.mass_targets = vec![row(0.9, 0.8), row(0.99, 0.95)];
        let close = |mass: f32, target: f32| {
            let found = mass_target(&meta, mass);
            assert!((found - target).abs() < 1e-5, "{mass}: {found}, not {target}");
        };
        close(0.9, 0.8);
        close(0.99, 0.95);
        // Missed: 0.1 and 0.01, with 0.2 and 0.05 by the estimate.
        close(1.0 - 0.1f32.powf(1.5), 1.0 - (0.2f32 * 0.05).sqrt());
        // Below: from nothing missed by neither; above: five times the true one.
        close(1.0 - 0.1f32.sqrt(), 1.0 - 0.2f32.sqrt());
        close(0.999, 0.995);
        assert_eq!(mass_target(&meta, 1.0), 1.0);
        meta.mass_targets = vec![row(0.5, 0.0), row(0.9, 1.0)];
        assert_eq!(mass_target(&meta, 0.5), 0.0);
        assert!(mass_target(&meta, 0.95) > 0.999_99);
        meta.mass_targets.clear();
        assert_eq!(mass_target(&meta, 0.7), 0.7);
    }
}
