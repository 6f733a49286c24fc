//! What one backend instance knows of its KV cache: which index is bound to which cells, and when that ends. A binding is
//! trusted for a graph only after its cells were checked against what the graph will write and what the cache holds now.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use super::binding::always_cells;
use super::layers::Layers;
use super::pass::{claims, Claim, Member, Verdict};
use super::rows::CacheRows;
use super::runtime::{count, Snapshot};
use super::stats::log;
use super::tensor::Tensor;
use crate::attention::Binding;
use crate::index::Index;

/// Prefix tokens whose sketch is compared again in every graph, in turn.
const ROTATING_SAMPLE: usize = 16;
/// Searches for a binding per graph; each costs one pass over a layer's visible keys.
pub const MAX_SEARCHES: usize = 8;

/// One index bound to cells of one stream.
pub struct Bound {
    pub index_number: usize,
    pub stream: usize,
    pub cells: Arc<[u32]>,
    pub contiguous: bool,
    /// Cells that its row saw, and that were not being written, when longer indexes were last looked for.
    pub tried: usize,
    holds: Vec<bool>,
    /// Where other backends have layers of the index.
    claim: Option<Arc<Claim>>,
    always: Option<(usize, Arc<[u32]>)>,
    /// K and V of the last clustered token in the deepest indexed layer that is here, as they were when bound. That row depends on every
    /// prefix token, so another text, restored or recomputed in these cells, changes its bits.
    guard: Vec<u8>,
    guard_layer: u32,
    next_sample: usize,
}

impl Bound {
    fn is_written(&self, writes: &Writes) -> bool {
        writes.cells(self.n_cell(), self.stream).any(|cell| self.holds[cell])
    }

    /// Cells of its stream.
    pub fn n_cell(&self) -> usize {
        self.holds.len()
    }
}

/// What the present graph does to the cache.
#[derive(Default)]
pub struct Writes {
    /// Rows (cell + stream * cells per stream) that SET_ROWS nodes replace.
    pub rows: Vec<i64>,
    /// Something writes where it cannot be seen: nothing is trusted in this graph.
    pub opaque: bool,
}

impl Writes {
    /// Cells of one stream of `n_cell` that are replaced.
    pub fn cells(&self, n_cell: usize, stream: usize) -> impl Iterator<Item = usize> + '_ {
        let rows = self.rows.iter().map(|&row| row.max(0) as usize);
        rows.filter(move |row| row / n_cell == stream).map(move |row| row % n_cell)
    }
}

#[derive(Default)]
pub struct Caches {
    layers: Layers,
    pub bound: Vec<Bound>,
    generation: u64,
    /// Indexes of which it was said already why they are not used.
    told: Vec<usize>,
    member: Member,
}

/// What another backend claims of an index in this pass, if a row sees those cells and none is unusable.
fn claimed(index: &Arc<Index>, stream: usize, visible: &[u32], usable: &dyn Fn(u32) -> bool) -> Option<Arc<Claim>> {
    let fits = |claim: &Arc<Claim>| {
        let is_seen = |cell: &u32| usable(*cell) && visible.binary_search(cell).is_ok();
        Arc::ptr_eq(&claim.index, index) && claim.stream == stream && claim.cells.iter().all(is_seen)
    };
    claims().into_iter().find(fits)
}

fn bytes_of(rows: &CacheRows, cell: usize) -> Vec<u8> {
    [rows.k_row(cell).bytes, rows.v_row(cell).bytes].concat()
}

impl Caches {
    /// Forgets cache tensors of an earlier pass and bindings of replaced indexes. The graph at hand has the caches of these layers:
    /// lowest and deepest.
    pub fn begin(&mut self, layers: (u32, u32), snapshot: &Snapshot) {
        self.layers.begin(layers.0);
        if self.generation != snapshot.generation {
            self.bound.clear();
            self.told.clear();
            self.generation = snapshot.generation;
        }
        self.member.enter(Some(layers), self.bound.iter().filter_map(|bound| bound.claim.as_ref()));
    }

    pub fn see(&mut self, layer: u32, k: Option<Tensor>, v: Option<Tensor>) {
        self.layers.see(layer, k, v);
    }

    pub fn rows(&self, layer: u32, stream: usize) -> Option<CacheRows> {
        self.layers.rows(layer, stream)
    }

    /// Drops every binding that this graph's writes or the cache's present content contradict.
    pub fn check(&mut self, snapshot: &Snapshot, writes: &Writes) {
        let mut kept = Vec::new();
        for mut bound in std::mem::take(&mut self.bound) {
            let why = if writes.opaque {
                "the cache is rewritten as a whole"
            } else if bound.is_written(writes) {
                "its cells are overwritten"
            } else if !self.still_holds(&mut bound, snapshot) {
                "its cells hold something else now"
            } else if bound.claim.as_ref().is_some_and(|claim| claim.is_refused()) {
                "another device has other keys for it"
            } else {
                kept.push(bound);
                continue;
            };
            count(|s| s.unbound += 1);
            if snapshot.config.log > 0 {
                let index = name(snapshot, bound.index_number);
                log(format_args!("{index} is no longer bound to stream {}: {why}", bound.stream));
            }
        }
        self.bound = kept;
        for (number, loaded) in snapshot.indexes.iter().enumerate() {
            let Some(rows) = self.rows(loaded.matcher.index.sketch().layer, 0) else { continue };
            if !loaded.matcher.fits(&rows) {
                let model = &loaded.matcher.index.meta().model.name;
                self.tell(
                    snapshot,
                    number,
                    format_args!(
                        "was built with another model ({model}) than this one (the rows of its cache have {} and {} \
                         elements): attention stays dense with this model; build an index with it",
                        rows.k.len, rows.v.len
                    ),
                );
            }
        }
    }

    /// Says once why an index is not used in this context although its layers or tokens are there.
    fn tell(&mut self, snapshot: &Snapshot, index_number: usize, why: fmt::Arguments<'_>) {
        if !self.told.contains(&index_number) {
            self.told.push(index_number);
            log(format_args!("{} {why}", name(snapshot, index_number)));
        }
    }

    fn still_holds(&self, bound: &mut Bound, snapshot: &Snapshot) -> bool {
        let matcher = &snapshot.indexes[bound.index_number].matcher;
        let last = bound.cells[matcher.last_clustered()] as usize;
        // layers of this pass that have not come by yet (eval callback) cannot be compared; nothing is sparse without them
        if let Some(rows) = self.rows(matcher.index.sketch().layer, bound.stream) {
            let n = bound.cells.len();
            let same = |t: usize| {
                let cell = bound.cells[t] as usize;
                cell < rows.n_cell && matcher.fits(&rows) && matcher.matches(t, &rows, cell)
            };
            let mut sample = (0..ROTATING_SAMPLE).map(|j| (bound.next_sample + j) % n);
            if !(sample.all(same) && same(matcher.last_clustered())) {
                return false;
            }
            bound.next_sample = (bound.next_sample + ROTATING_SAMPLE) % n;
        }
        match self.rows(bound.guard_layer, bound.stream) {
            Some(deep) => last < deep.n_cell && bytes_of(&deep, last) == bound.guard,
            None => true,
        }
    }

    /// Number of a new binding for a query row that sees exactly `visible` (ascending), if one of the first `n_index` indexes
    /// fits.
    pub fn search(
        &mut self,
        snapshot: &Snapshot,
        n_index: usize,
        stream: usize,
        visible: &[u32],
        writes: &Writes,
    ) -> Option<usize> {
        for (index_number, loaded) in snapshot.indexes.iter().take(n_index).enumerate() {
            let matcher = &loaded.matcher;
            let n = matcher.index.meta().n_prefix();
            if n < snapshot.config.min_prefix_cpu() || visible.len() < n {
                continue;
            }
            let index = &matcher.index;
            let is_here = |layer: u32| self.layers.rows(layer, stream).is_some();
            let Some(deepest) = index.shapes().iter().map(|s| s.layer).filter(|l| is_here(*l)).max() else { continue };
            let Some(deep) = self.rows(deepest, stream) else { continue };
            let written: Vec<u32> = writes.cells(deep.n_cell, stream).map(|cell| cell as u32).collect();
            let usable = |cell| !written.contains(&cell);
            let (cells, claim) = match self.rows(index.sketch().layer, stream) {
                Some(rows) => match matcher.find(&rows, visible, &usable) {
                    Some(cells) => (Arc::from(cells), None),
                    None => continue,
                },
                None => match claimed(index, stream, visible, &usable) {
                    Some(claim) => (claim.cells.clone(), Some(claim)),
                    None => continue,
                },
            };
            let agree = matcher.probes_agree(&cells, &|layer| self.layers.rows(layer, stream));
            let verdict = self.member.judge(claim, (index, stream, &cells), &is_here, agree);
            if let Verdict::Refuse = verdict {
                let model = &matcher.index.meta().model.name;
                self.tell(
                    snapshot,
                    index_number,
                    format_args!(
                        "has other keys in later layers than this cache for the same tokens: another model than {model}, a \
                         LoRA, or cells moved from behind another text; attention over them stays dense"
                    ),
                );
                continue;
            }
            let Verdict::Bind(claim) = verdict else { continue };
            let contiguous = cells.windows(2).all(|w| w[1] == w[0] + 1);
            if snapshot.config.log > 0 {
                let how = if contiguous { "contiguous" } else { "scattered" };
                let (index, first) = (name(snapshot, index_number), cells[0]);
                log(format_args!("{index} is bound: {n} tokens from cell {first} of stream {stream}, {how}"));
            }
            count(|s| s.bound += 1);
            let mut holds = vec![false; deep.n_cell];
            cells.iter().for_each(|&c| holds[c as usize] = true);
            let guard = bytes_of(&deep, cells[matcher.last_clustered()] as usize);
            self.bound.push(Bound {
                index_number,
                stream,
                cells,
                contiguous,
                claim,
                guard_layer: deepest,
                tried: visible.len() - written.iter().filter(|c| visible.binary_search(c).is_ok()).count(),
                holds,
                always: None,
                guard,
                next_sample: 0,
            });
            return Some(self.bound.len() - 1);
        }
        None
    }

    /// The binding as `attention` takes it, for a call over cells below `n_kv`.
    pub fn binding(&mut self, i: usize, snapshot: &Snapshot, n_kv: usize) -> Binding {
        let bound = &mut self.bound[i];
        let index = snapshot.indexes[bound.index_number].matcher.index.clone();
        let always = match &bound.always {
            Some((n, always)) if *n == n_kv => always.clone(),
            _ => {
                let meta = index.meta();
                let made = always_cells(&bound.cells, meta.n_sink as usize, meta.n_window as usize, n_kv);
                let made: Arc<[u32]> = made.into();
                bound.always = Some((n_kv, made.clone()));
                made
            }
        };
        Binding { index, cells: bound.cells.clone(), always }
    }
}

fn name(snapshot: &Snapshot, index_number: usize) -> String {
    let index = &snapshot.indexes[index_number].matcher.index;
    index.path().map_or_else(|| "index".to_string(), |p| p.display().to_string())
}
