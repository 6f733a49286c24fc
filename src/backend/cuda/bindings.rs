//! Which cells of a cache in device memory hold which index: found on the host, from a copy of the sketch's elements, when a
//! new graph is planned; checked on the device in every graph.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::super::binding::Matcher;
use super::super::layers::Layers;
use super::super::pass::{claims, Claim, Member, Verdict};
use super::super::rows::{is_quantised, CacheRows, Rows};
use super::super::runtime::{count, Loaded, Snapshot};
use super::super::stats::log;
use super::make::make_room;
use super::seen::{runs_of, Seen};
use crate::attention::cuda::{self, Bound, Compared, Device, DeviceRows, Error, Resident, RowNumbers, Stream, Watched};
use crate::attention::Element;
use crate::index::Index;

/// Elements of a K or a V row that a search copies at most; a sketch has 16.
const ELEMENTS_MAX: usize = 64;
/// Searches without a find in a row after which every other, then every fourth, ... new graph is left out.
const LONGEST_PAUSE: u32 = 64;

/// An index bound to cells.
pub struct Binding {
    pub index_number: usize,
    pub stream: usize,
    pub cells: Arc<[u32]>,
    pub runs: Vec<Range<u32>>,
    pub last_cell: usize,
    pub watched: Watched,
    /// Layer whose rows end it when they change, and where they were.
    pub guard: (u32, DeviceRows),
    /// Where other backends have layers of the index.
    claim: Option<Arc<Claim>>,
}

/// What is bound in one backend instance.
#[derive(Default)]
pub struct Bindings {
    pub all: Vec<Binding>,
    generation: u64,
    /// Indexes of which it was said already why they are not used.
    told: Vec<usize>,
    fruitless: u32,
    pause: u32,
    member: Member,
}

/// What a search needs of its backend.
pub struct Gpu<'a> {
    pub device: &'a Arc<Device>,
    /// Comes after all that the cache was written by.
    pub stream: &'a Stream,
}

/// A layer's rows as addresses, of one stream; `None` for what the kernels do not read.
pub fn device_rows(layers: &Layers, layer: u32, stream: usize) -> Option<DeviceRows> {
    let rows = layers.rows(layer, stream)?;
    let known = |r: &Rows| {
        let whole = (r.data as usize | r.stride | r.element.row_bytes(r.len)).is_multiple_of(4);
        r.element != Element::F32 && whole
    };
    let of = |r: &Rows| (r.data as u64, r.stride, r.len);
    let types = [rows.k.element, rows.v.element];
    (known(&rows.k) && known(&rows.v)).then(|| DeviceRows {
        k: of(&rows.k),
        v: of(&rows.v),
        types,
        n_cell: rows.n_cell,
    })
}

fn name(snapshot: &Snapshot, index_number: usize) -> String {
    let index = &snapshot.indexes[index_number].matcher.index;
    index.path().map_or_else(|| "index".to_string(), |p| p.display().to_string())
}

impl Bindings {
    /// Drops what another set of indexes had bound; true if there was any.
    pub fn follow(&mut self, snapshot: &Snapshot) -> bool {
        if self.generation == snapshot.generation {
            return false;
        }
        *self = Bindings { generation: snapshot.generation, ..Bindings::default() };
        true
    }

    /// Drops bindings that a graph that is done found ended, or another device has refused; true if there was any.
    pub fn drop_ended(&mut self, snapshot: &Snapshot) -> bool {
        let before = self.all.len();
        self.all.retain(|b| {
            let refused = b.claim.as_ref().is_some_and(|claim| claim.is_refused());
            let why = match (b.watched.held(), refused) {
                (true, false) => return true,
                (false, _) => "its cells are overwritten or hold something else now",
                (_, true) => "another device has other keys for it",
            };
            ended(b, snapshot, why);
            false
        });
        self.all.len() != before
    }

    /// Drops all, for this reason; true if there was any.
    pub fn drop_all(&mut self, snapshot: &Snapshot, why: &str) -> bool {
        let all = std::mem::take(&mut self.all);
        all.iter().for_each(|b| ended(b, snapshot, why));
        !all.is_empty()
    }

    /// Drops all after a failure, and looks for none for a while.
    pub fn give_up(&mut self, snapshot: &Snapshot) {
        self.drop_all(snapshot, "the GPU cannot do it now");
        self.pause = LONGEST_PAUSE;
    }

    /// A graph with the caches of these layers, lowest and deepest, is next.
    pub fn enter(&mut self, layers: Option<(u32, u32)>) {
        self.member.enter(layers, self.all.iter().filter_map(|b| b.claim.as_ref()));
    }

    /// Shall a new graph look for bindings? Seldom, while nothing is found.
    pub fn wants_search(&mut self) -> bool {
        if self.member.has_news() {
            return true;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        true
    }

    /// A prefill has written to the cache: look again.
    pub fn prefilled(&mut self) {
        (self.fruitless, self.pause) = (0, 0);
    }

    /// Binds what the rows see and is not bound yet; true if something new is. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses, or memory is short.
    pub fn search(
        &mut self,
        snapshot: &Snapshot,
        layers: &Layers,
        seen: &[Seen],
        written: &[RowNumbers],
        gpu: &Gpu<'_>,
        min_prefix: &dyn Fn(&Matcher) -> usize,
    ) -> Result<bool, Error> {
        let mut found = false;
        let mut written = Written { numbers: written, rows: None };
        for row in seen {
            // Indexes are in order of length, the longest first.
            for (number, loaded) in snapshot.indexes.iter().enumerate() {
                let matcher = &loaded.matcher;
                if self.all.iter().any(|b| b.index_number == number && b.stream == row.stream && row.all(&b.runs)) {
                    break;
                }
                let n = matcher.index.meta().n_prefix();
                if row.n_cell() < n || n < min_prefix(matcher) {
                    continue;
                }
                if self.try_index(snapshot, number, layers, row, &mut written, gpu)? {
                    found = true;
                    break;
                }
            }
        }
        found |= self.follow_claims(snapshot, layers, seen, &mut written, gpu, min_prefix)?;
        self.fruitless = if found { 0 } else { (self.fruitless + 1).min(LONGEST_PAUSE.ilog2() + 4) };
        // The first few cost little; an index that never fits shall not be looked for all the time.
        self.pause = if self.fruitless > 4 { 1 << (self.fruitless - 4) } else { 0 };
        Ok(found)
    }

    /// Binds what backends with earlier layers claim in this pass; true if something new is. Waits for the device.
    fn follow_claims(
        &mut self,
        snapshot: &Snapshot,
        layers: &Layers,
        seen: &[Seen],
        written: &mut Written<'_>,
        gpu: &Gpu<'_>,
        min_prefix: &dyn Fn(&Matcher) -> usize,
    ) -> Result<bool, Error> {
        let mut found = false;
        for claim in claims() {
            self.member.look(&claim);
            let (stream, cells) = (claim.stream, &claim.cells);
            let same = |loaded: &Loaded| Arc::ptr_eq(&loaded.matcher.index, &claim.index);
            let Some(number) = snapshot.indexes.iter().position(same) else { continue };
            if layers.rows(claim.index.sketch().layer, stream).is_some() {
                continue;
            }
            let is_it = |b: &Binding| b.index_number == number && b.stream == stream && b.cells == *cells;
            let long_enough = cells.len() >= min_prefix(&snapshot.indexes[number].matcher);
            let is_seen = || {
                let runs = runs_of(cells.iter().copied());
                seen.iter().any(|row| row.stream == stream && row.all(&runs))
            };
            if self.all.iter().any(is_it) || !long_enough || !is_seen() {
                continue;
            }
            let Some(deep) = deepest(layers, &claim.index, stream) else { continue };
            let Some(rows) = device_rows(layers, deep, stream) else { continue };
            let being_written = written.cells(rows.n_cell, stream, gpu)?;
            let inside = cells.iter().all(|cell| (*cell as usize) < rows.n_cell);
            if inside && !being_written.iter().any(|cell| cells.contains(cell)) {
                found |= self.bind(snapshot, number, layers, (stream, cells), Some(claim.clone()), gpu)?;
            }
        }
        Ok(found)
    }

    fn try_index(
        &mut self,
        snapshot: &Snapshot,
        number: usize,
        layers: &Layers,
        row: &Seen,
        written: &mut Written<'_>,
        gpu: &Gpu<'_>,
    ) -> Result<bool, Error> {
        let matcher = &snapshot.indexes[number].matcher;
        let (sketch, stream) = (matcher.index.sketch(), row.stream);
        let Some(full) = layers.rows(sketch.layer, stream) else { return Ok(false) };
        if !matcher.fits(&full) {
            let model = &matcher.index.meta().model.name;
            let why = format_args!(
                "was built with another model ({model}) than this one: attention stays dense with this model"
            );
            self.tell(snapshot, number, why);
            return Ok(false);
        }
        let Some(rows) = device_rows(layers, sketch.layer, stream) else { return Ok(false) };
        let n_cell = row.end();
        if sketch.k_dims.len().max(sketch.v_dims.len()) > ELEMENTS_MAX || n_cell > rows.n_cell {
            return Ok(false);
        }
        let rotation = matcher.rotation(full.k.element, full.v.element);
        let whole = |len: usize, block: usize| block == 0 || len.is_multiple_of(block);
        if !whole(full.k.len, rotation.k) || !whole(full.v.len, rotation.v) {
            return Ok(false);
        }
        let [k_peaks, v_peaks] = matcher.peak_places(full.k.len, full.v.len);
        let k = Compared { dims: sketch.k_dims, block: rotation.k, peaks: &k_peaks };
        let v = Compared { dims: sketch.v_dims, block: rotation.v, peaks: &v_peaks };
        // SAFETY: rows of a live cache of this backend.
        let copy = unsafe { cuda::gather(&rows, n_cell, &k, &v, gpu.device, gpu.stream)? };
        let compact = compact(&copy, &full, &k, &v, n_cell);
        let being_written = written.cells(rows.n_cell, stream, gpu)?;
        let Some(cells) = matcher.find(&compact, &row.cells(), &|cell| !being_written.contains(&cell)) else {
            return Ok(false);
        };
        self.bind(snapshot, number, layers, (stream, &cells.into()), None, gpu)
    }

    /// Binds cells that hold the index's tokens, if rows of later layers agree: those here, and those of other backends, which
    /// `claim` knows of where it was one of them that found the cells. Waits for the device.
    fn bind(
        &mut self,
        snapshot: &Snapshot,
        number: usize,
        layers: &Layers,
        (stream, cells): (usize, &Arc<[u32]>),
        claim: Option<Arc<Claim>>,
        gpu: &Gpu<'_>,
    ) -> Result<bool, Error> {
        let matcher = &snapshot.indexes[number].matcher;
        let index = &matcher.index;
        let is_here = |layer: u32| device_rows(layers, layer, stream).is_some();
        let agree = probes_agree(matcher, layers, stream, cells, gpu)?;
        let verdict = self.member.judge(claim, (index, stream, cells), &is_here, agree);
        if let Verdict::Refuse = verdict {
            let model = &index.meta().model.name;
            let why = format_args!(
                "has other keys in later layers than this cache for the same tokens: another model than {model}, a LoRA, or \
                 cells moved from behind another text; attention over them stays dense"
            );
            self.tell(snapshot, number, why);
            return Ok(false);
        }
        let Verdict::Bind(claim) = verdict else { return Ok(false) };
        let Some(deepest) = deepest(layers, index, stream) else { return Ok(false) };
        let (Some(deep), Some(full)) = (device_rows(layers, deepest, stream), layers.rows(deepest, stream)) else {
            return Ok(false);
        };
        let rotation = matcher.rotation(full.k.element, full.v.element);
        let resident = Resident::of(index, gpu.device, rotation.v)?;
        let bound = Bound::new(resident, cells, deep.n_cell, stream as u32)?;
        let mut watched = Watched::new(bound, cells, deep.n_cell)?;
        let last = cells[matcher.last_clustered()] as usize;
        // SAFETY: as above; plans check that the rows are where they were.
        unsafe { watched.guard(deep, last, gpu.stream)? };
        let runs = runs_of(cells.iter().copied());
        if snapshot.config.log > 0 {
            let how = if runs.len() == 1 { "contiguous" } else { "scattered" };
            let (n, first, gpu) = (cells.len(), cells[0], gpu.device.name());
            log(format_args!(
                "{} is bound: {n} tokens from cell {first} of stream {stream}, {how}, on {gpu}",
                name(snapshot, number)
            ));
        }
        count(|s| s.bound += 1);
        let last_cell = cells.iter().copied().max().unwrap_or(0) as usize;
        let guard = (deepest, deep);
        make_room(&mut self.all);
        let cells = cells.clone();
        self.all.push(Binding { index_number: number, stream, cells, runs, last_cell, watched, guard, claim });
        Ok(true)
    }

    /// Says once why an index is not used although its layers or tokens are there.
    pub fn tell(&mut self, snapshot: &Snapshot, index_number: usize, why: impl fmt::Display) {
        if !self.told.contains(&index_number) {
            self.told.push(index_number);
            log(format_args!("{} {why}", name(snapshot, index_number)));
        }
    }
}

/// Deepest indexed layer that is here.
fn deepest(layers: &Layers, index: &Index, stream: usize) -> Option<u32> {
    index.shapes().iter().map(|s| s.layer).filter(|layer| device_rows(layers, *layer, stream).is_some()).max()
}

fn ended(binding: &Binding, snapshot: &Snapshot, why: &str) {
    count(|s| s.unbound += 1);
    if snapshot.config.log > 0 && binding.index_number < snapshot.indexes.len() {
        let index = name(snapshot, binding.index_number);
        log(format_args!("{index} is no longer bound to stream {}: {why}", binding.stream));
    }
}

/// The copy of what is compared of a cache as rows for the matcher.
fn compact(copy: &[f32], full: &CacheRows, k: &Compared<'_>, v: &Compared<'_>, n_cell: usize) -> CacheRows {
    let width = |element, own: &Compared<'_>| match is_quantised(element) {
        true => 2 * own.dims.len() + own.peaks.len(),
        false => own.dims.len(),
    };
    let n_k = width(full.k.element, k);
    let stride = 4 * (n_k + width(full.v.element, v));
    let rows = |first: usize, own: &Compared<'_>, element| Rows {
        data: copy[first.min(copy.len())..].as_ptr().cast(),
        stride,
        len: own.dims.len(),
        element,
        compact: Some(own.peaks.len()),
    };
    CacheRows { k: rows(0, k, full.k.element), v: rows(n_k, v, full.v.element), n_cell }
}

/// Rows of the cache that the graph at hand writes, copied to the host at first need.
struct Written<'a> {
    numbers: &'a [RowNumbers],
    rows: Option<Vec<i64>>,
}

impl Written<'_> {
    /// Those cells of one stream of `n_cell`. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    fn cells(&mut self, n_cell: usize, stream: usize, gpu: &Gpu<'_>) -> Result<Vec<u32>, Error> {
        let rows = match &self.rows {
            Some(rows) => rows,
            None => self.rows.insert(read_numbers(self.numbers, gpu)?),
        };
        let own = rows.iter().filter(|r| **r >= 0 && **r as usize / n_cell == stream);
        Ok(own.map(|r| (*r as usize % n_cell) as u32).collect())
    }
}

fn read_numbers(written: &[RowNumbers], gpu: &Gpu<'_>) -> Result<Vec<i64>, Error> {
    let mut all = Vec::new();
    for numbers in written {
        // SAFETY: vectors of so many numbers, inputs of the graph at hand.
        unsafe {
            if numbers.wide {
                let mut own = vec![0i64; numbers.n];
                gpu.stream.read(numbers.address, &mut own)?;
                all.extend(own);
            } else {
                let mut own = vec![0i32; numbers.n];
                gpu.stream.read(numbers.address, &mut own)?;
                all.extend(own.into_iter().map(i64::from));
            }
        }
    }
    Ok(all)
}

/// Compares the probed rows of later layers that are here, which it copies to the host.
fn probes_agree(
    matcher: &Matcher,
    layers: &Layers,
    stream: usize,
    cells: &[u32],
    gpu: &Gpu<'_>,
) -> Result<bool, Error> {
    let mut tokens: Vec<u32> = matcher.index.probes().iter().flat_map(|p| p.tokens.iter().copied()).collect();
    tokens.sort_unstable();
    tokens.dedup();
    // Rows are copied side by side: that is where the matcher then finds the tokens.
    let mut places = vec![0u32; cells.len()];
    tokens.iter().enumerate().for_each(|(at, t)| places[*t as usize] = at as u32);
    let mut copies: Vec<(u32, Vec<u8>)> = Vec::new();
    for probe in matcher.index.probes() {
        let Some(rows) = device_rows(layers, probe.layer, stream) else { continue };
        let bytes = rows.types[0].row_bytes(rows.k.2);
        let mut copy = vec![0; bytes * tokens.len()];
        for (token, to) in tokens.iter().zip(copy.chunks_exact_mut(bytes)) {
            let cell = cells[*token as usize] as usize;
            // SAFETY: a row of a live cache.
            unsafe { gpu.stream.read(rows.k.0 + (cell * rows.k.1) as u64, to)? };
        }
        copies.push((probe.layer, copy));
    }
    let rows_of = |layer: u32| {
        let (full, copy) = (layers.rows(layer, stream)?, &copies.iter().find(|c| c.0 == layer)?.1);
        let k = Rows { data: copy.as_ptr(), stride: full.k.element.row_bytes(full.k.len), ..full.k };
        Some(CacheRows { k, v: full.v, n_cell: tokens.len() })
    };
    Ok(matcher.probes_agree(&places, &rows_of))
}
