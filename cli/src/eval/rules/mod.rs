//! Ways to attend that are compared: the index's selection, and baselines that read as many bytes. The baselines are here alone:
//! the plugin has none of them.
//!
//! Every baseline attends to the sinks, the window and the tail, as the index's selection does. Baselines that use a selection
//! again count rows from the first one behind the prefix: every n-th is an anchor, and the rows up to the next one share its
//! selection.

pub mod bytes;
mod select;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use ggml_squeeze::attention::rule::{Choice, Place, Rule, Seen, Sight};
use ggml_squeeze::attention::{Mode, Selection, Spread};
use serde::{Deserialize, Serialize};

use bytes::{Layer, BOUNDS_PAGE, MEANS_PAGE};
use select::{best, best_first, group_mean, until, until_union, Pages};

/// A way to attend, as far as the bytes that it reads depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The clusters that the index selects.
    Index { spread: Spread, estimate: bool },
    /// The keys of the largest attention mass, which only an oracle knows without reading all.
    Oracle,
    /// Pages of 16 keys by the bound of their scores (Quest): each query head its own pages, what a group reads once counts once.
    BoundsHead,
    /// The same by the mean over the group of the bounds' probabilities.
    Bounds,
    /// Pages of 20 keys by the score of their mean key.
    Means,
    /// The last keys (StreamingLLM).
    Window,
    /// The best keys by exact scores, voted for by the heads of the group; every n-th row scans all keys (TokenSelect's idea).
    Tokens(usize),
    /// Every n-th row is dense; those after it attend to the keys that were best for it (Recycled Attention's idea).
    Recycled(usize),
}

/// What the rows of a run read and missed, summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Pairs of a row and a KV head.
    pub n: f64,
    /// Keys attended to of those that are clustered, and their sinks, as a share of `P - W`.
    pub kept: f64,
    /// Bytes, as a share of those of the prefix's K and V.
    pub bytes: f64,
    /// Attention mass of the prefix that was missed, of `measured` pairs.
    pub missed: f64,
    pub measured: f64,
}

impl Sums {
    pub fn add(&mut self, other: &Sums) {
        self.n += other.n;
        self.kept += other.kept;
        self.bytes += other.bytes;
        self.missed += other.missed;
        self.measured += other.measured;
    }

    /// The same per pair; the numbers of pairs stay.
    pub fn mean(&self) -> Sums {
        let n = self.n.max(1.0);
        let missed = self.missed / self.measured.max(1.0);
        Sums { kept: self.kept / n, bytes: self.bytes / n, missed, ..*self }
    }
}

/// What the baselines of a prefix share: pages by their size, layer and KV head.
#[derive(Default)]
pub struct Shared {
    pages: Mutex<HashMap<(usize, u32, usize), Arc<Pages>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Where a batch stands.
#[derive(Clone, Copy, Default)]
struct Batch {
    /// Number of its first row behind the prefix.
    first: usize,
    n_row: usize,
}

/// Tokens selected by anchors, by layer, KV head and row.
type Anchors = HashMap<(u32, usize, usize), Arc<Vec<u32>>>;

/// A method at work on one prefix.
pub struct Working {
    method: Method,
    /// Share of the bytes that a baseline may read.
    share: f64,
    /// Modes of layers that have their own.
    budgets: BTreeMap<u32, Mode>,
    alpha: Option<f32>,
    floorless: bool,
    layers: HashMap<u32, Layer>,
    shared: Arc<Shared>,
    batch: Mutex<Batch>,
    anchors: Mutex<Anchors>,
    sums: Mutex<BTreeMap<u32, Sums>>,
}

impl Working {
    pub fn new(method: Method, share: f64, layers: HashMap<u32, Layer>, shared: Arc<Shared>) -> Working {
        Working {
            method,
            share,
            budgets: BTreeMap::new(),
            alpha: None,
            floorless: false,
            layers,
            shared,
            batch: Mutex::default(),
            anchors: Mutex::default(),
            sums: Mutex::default(),
        }
    }

    /// With modes of layers, another weight of the spread bonus, or thresholds without a floor.
    pub fn with(self, budgets: BTreeMap<u32, Mode>, alpha: Option<f32>, floorless: bool) -> Working {
        Working { budgets, alpha, floorless, ..self }
    }

    /// Before a batch of `n_row` rows, the first of them number `first` behind the prefix. What anchors from there on selected is
    /// forgotten.
    pub fn begin(&self, first: usize, n_row: usize) {
        *lock(&self.batch) = Batch { first, n_row };
        lock(&self.anchors).retain(|(_, _, row), _| *row < first);
    }

    /// Sums by layer since the last call.
    pub fn take(&self) -> BTreeMap<u32, Sums> {
        std::mem::take(&mut *lock(&self.sums))
    }

    /// Rows from one anchor to the next; 1 where every row selects for itself.
    fn period(&self) -> usize {
        match self.method {
            Method::Tokens(n) | Method::Recycled(n) => n.max(1),
            _ => 1,
        }
    }

    /// Share of anchors among the rows of the batch; of a batch that is shorter than a period, as in a long run.
    fn anchor_share(&self, batch: Batch) -> f64 {
        let n = self.period();
        if batch.n_row < n {
            return 1.0 / n as f64;
        }
        let anchors = (batch.first..batch.first + batch.n_row).filter(|row| row % n == 0).count();
        anchors as f64 / batch.n_row as f64
    }

    fn pages(&self, sight: &dyn Sight, place: &Place, size: usize) -> Arc<Pages> {
        let key = (size, place.layer, place.head_kv);
        if let Some(pages) = lock(&self.shared.pages).get(&key) {
            return pages.clone();
        }
        let pages = Arc::new(Pages::new(&sight.keys(), place.head_dim, size));
        lock(&self.shared.pages).entry(key).or_insert(pages).clone()
    }

    /// `n` keys by the group's mean probability for the queries of a row.
    fn best_keys(sight: &dyn Sight, place: &Place, row: usize, n: usize) -> Vec<u32> {
        let scores = sight.scores(row, place.end);
        let heads: Vec<(&[f32], &[f32])> = scores.chunks_exact(place.end).map(|s| s.split_at(place.first)).collect();
        let sinks: Vec<&[f32]> = heads.iter().map(|h| h.0).collect();
        let clustered: Vec<Vec<f32>> = heads.iter().map(|h| h.1.to_vec()).collect();
        let p = group_mean(&clustered, &sinks, &vec![1; place.end - place.first]);
        best(&p, n).into_iter().map(|i| (place.first + i) as u32).collect()
    }

    /// The pages that each head of the group, or all together, want.
    fn best_pages(&self, sight: &dyn Sight, place: &Place, size: usize, keys: usize) -> Choice {
        let pages = self.pages(sight, place, size);
        let (q, sizes) = (sight.query(place.row), pages.sizes());
        let scores: Vec<Vec<f32>> = q
            .chunks_exact(place.head_dim)
            .map(|q| if self.method == Method::Means { pages.mean_scores(q) } else { pages.bounds(q) })
            .collect();
        let tokens = |list: Vec<usize>| -> Vec<u32> {
            list.into_iter().flat_map(|page| pages.keys(page)).map(|i| (place.first + i) as u32).collect()
        };
        if self.method == Method::BoundsHead {
            let orders: Vec<Vec<usize>> = scores.iter().map(|s| best_first(s)).collect();
            return Choice::Heads(until_union(&orders, &sizes, keys).into_iter().map(tokens).collect());
        }
        let of_sinks = sight.scores(place.row, place.first);
        let sink = |g: usize| &of_sinks[g * place.first..(g + 1) * place.first];
        let sinks: Vec<&[f32]> = (0..place.n_group).map(sink).collect();
        Choice::Group(tokens(until(&best_first(&group_mean(&scores, &sinks, &sizes)), &sizes, keys)))
    }

    /// What the anchor of a row selected, by its own queries.
    fn of_anchor(&self, sight: &dyn Sight, place: &Place, batch: Batch, keys: usize) -> Vec<u32> {
        let row = batch.first + place.row;
        let anchor = row / self.period() * self.period();
        let key = (place.layer, place.head_kv, anchor);
        if let Some(known) = lock(&self.anchors).get(&key) {
            return known.to_vec();
        }
        // An anchor that is gone (the batch was the first to be seen): the first row of the batch stands for it.
        let list = Self::best_keys(sight, place, anchor.saturating_sub(batch.first), keys);
        lock(&self.anchors).insert(key, Arc::new(list.clone()));
        list
    }
}

impl Rule for Working {
    fn selection(&self, layer: u32, usual: Selection) -> Selection {
        let own = self.budgets.get(&layer).copied();
        let mode = match own.unwrap_or(usual.mode) {
            Mode::Threshold { threshold, .. } if self.floorless => Mode::Threshold { threshold, floor: 0.0 },
            mode => mode,
        };
        Selection { mode, alpha: self.alpha.unwrap_or(usual.alpha), ..usual }
    }

    fn choose(&self, sight: &dyn Sight) -> Option<Choice> {
        if let Method::Index { .. } = self.method {
            return None;
        }
        let (place, batch) = (sight.place(), *lock(&self.batch));
        let layer = self.layers.get(&place.layer)?;
        let keys = layer.keys(self.method, self.share, self.anchor_share(batch));
        let is_anchor = (batch.first + place.row).is_multiple_of(self.period());
        Some(match self.method {
            Method::Index { .. } => return None,
            Method::Oracle => Choice::Group(Self::best_keys(sight, &place, place.row, keys)),
            Method::BoundsHead | Method::Bounds => self.best_pages(sight, &place, BOUNDS_PAGE, keys),
            Method::Means => self.best_pages(sight, &place, MEANS_PAGE, keys),
            Method::Window => Choice::Group((place.end - keys..place.end).map(|i| i as u32).collect()),
            Method::Tokens(_) => Choice::Group(self.of_anchor(sight, &place, batch, keys)),
            Method::Recycled(_) if is_anchor => {
                self.of_anchor(sight, &place, batch, keys);
                Choice::Group((place.first..place.end).map(|i| i as u32).collect())
            }
            Method::Recycled(_) => Choice::Group(self.of_anchor(sight, &place, batch, keys)),
        })
    }

    fn attended(&self, seen: &Seen) {
        let Some(layer) = self.layers.get(&seen.layer) else { return };
        let anchor = (lock(&self.batch).first + seen.row).is_multiple_of(self.period());
        let open = (layer.n_prefix - layer.n_window) as f64;
        let sums = Sums {
            n: 1.0,
            kept: (layer.n_sink + seen.keys) as f64 / open,
            bytes: layer.read(self.method, seen.keys, seen.clusters, anchor) / layer.dense(),
            missed: seen.missed.unwrap_or(0.0),
            measured: f64::from(u8::from(seen.missed.is_some())),
        };
        lock(&self.sums).entry(seen.layer).or_default().add(&sums);
    }
}

#[cfg(test)]
mod tests;
