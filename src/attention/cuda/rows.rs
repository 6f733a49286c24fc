//! What is done once per graph, on the device: which binding each query row has, and the checks of the bindings.

use std::sync::Arc;

use super::params::type_number;
use super::params::{Strided, MAX_BOUND};
use super::{Bound, Buffer, Device, Error, Mapped, Stream, MAX_PREFILL_ROWS, MAX_ROWS};
use crate::attention::Element;

const THREADS: usize = 256;
const PART: usize = 2048;
/// Rows that a block looks at.
const EACH: usize = 16;
/// Of the kernel that lists cells: threads of a block, cells that it looks at, and entries behind a list.
const LIST_THREADS: usize = 1024;
const LIST_PART: usize = 8192;
const LIST_PADDING: usize = 32;
/// Tensors of row numbers of one graph at most.
pub const MAX_WRITTEN: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Written {
    numbers: u64,
    n: u32,
    wide: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Held {
    cells: u64,
    holds: u64,
    k: u64,
    v: u64,
    guard: u64,
    valid: u64,
    status: u64,
    always: u64,
    first_cell: u32,
    n_prefix: u32,
    stream: u32,
    n_cell: u32,
    k_bytes: u32,
    v_bytes: u32,
    n_always: u32,
    unused: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Parameters {
    mask: Strided,
    written: [Written; MAX_WRITTEN],
    held: [Held; MAX_BOUND],
    rows: u64,
    hidden: u64,
    done: u64,
    n_query: u32,
    n_row: u32,
    n_kv: u32,
    k_share: u32,
    first_stream: u32,
    mask_streams: u32,
    n_bound: u32,
    n_choice: u32,
    n_written: u32,
    visible_stride: u32,
    n_sparse: u64,
    visible: u64,
    n_visible: u64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Side {
    rows: u64,
    nb1: u64,
    element: u32,
    block: u32,
    n_dim: u32,
    n_peak: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Gather {
    k: Side,
    v: Side,
    elements: u64,
    out: u64,
    n_cell: u32,
    unused: u32,
}

/// Row numbers (cell + stream * cells per stream) that a graph writes its cache by: a contiguous vector in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowNumbers {
    pub address: u64,
    pub n: usize,
    /// 64 bits each, or 32.
    pub wide: bool,
}

/// One layer's cache in device memory: rows of all KV heads, on multiples of 4 bytes and whole 4 bytes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRows {
    /// Address, bytes per cell, and elements per row.
    pub k: (u64, usize, usize),
    pub v: (u64, usize, usize),
    /// Of K and of V: F16, BF16, Q8_0 or Q4_0.
    pub types: [Element; 2],
    pub n_cell: usize,
}

impl DeviceRows {
    fn row_bytes(&self) -> [usize; 2] {
        [self.types[0].row_bytes(self.k.2), self.types[1].row_bytes(self.v.2)]
    }

    fn row(&self, cell: usize) -> [u64; 2] {
        [self.k, self.v].map(|(at, step, _)| at + (cell * step) as u64)
    }
}

/// A binding with what ends it: writes to its cells, and a change of its last clustered token in the deepest layer.
pub struct Watched {
    pub bound: Bound,
    holds: Buffer,
    n_cell: usize,
    guard: Option<(Buffer, DeviceRows, usize)>,
    /// 1 as long as it holds, as of the last launch that is done.
    status: Mapped,
}

impl Watched {
    /// `cells` are those of `bound`, in a stream of `n_cell`.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(bound: Bound, cells: &[u32], n_cell: usize) -> Result<Watched, Error> {
        let device = bound.resident().device().clone();
        let mut bits = vec![0u32; n_cell.div_ceil(32)];
        cells.iter().for_each(|c| bits[*c as usize / 32] |= 1 << (c % 32));
        let holds = Buffer::of(&device, "a binding", &bits)?;
        let status = Mapped::new(&device, 1)?;
        status.set(0, 1);
        Ok(Watched { bound, holds, n_cell, guard: None, status })
    }

    /// From now on each graph compares the rows of `cell` with what they are when the stream comes to this.
    ///
    /// # Errors
    /// Memory is short, or the driver refuses.
    ///
    /// # Safety
    /// The rows are device memory for as long as the binding is checked; they lie on multiples of 4 bytes.
    pub unsafe fn guard(&mut self, rows: DeviceRows, cell: usize, stream: &Stream) -> Result<(), Error> {
        let [k_bytes, v_bytes] = rows.row_bytes();
        let saved = Buffer::new(self.bound.resident().device(), "a binding", k_bytes + v_bytes)?;
        let [k, v] = rows.row(cell);
        // SAFETY: as large as made; rows by contract.
        unsafe {
            stream.copy(saved.address(), k, k_bytes)?;
            stream.copy(saved.address() + k_bytes as u64, v, v_bytes)?;
        }
        self.guard = Some((saved, rows, cell));
        Ok(())
    }

    /// Did it hold in the last graph that is done?
    pub fn held(&self) -> bool {
        self.status.get(0) != 0
    }

    /// For a graph over cells below `n_kv`.
    fn parameters(&self, n_kv: usize) -> Held {
        let own = self.bound.place();
        let (always, n_always) = self.bound.always(n_kv);
        let mut held = Held {
            cells: own.cells,
            holds: self.holds.address(),
            valid: own.valid,
            status: self.status.address(0),
            always,
            n_always: n_always as u32,
            first_cell: own.first_cell,
            n_prefix: own.n_prefix,
            stream: own.stream,
            n_cell: self.n_cell as u32,
            ..Held::default()
        };
        if let Some((saved, rows, cell)) = &self.guard {
            [held.k, held.v] = rows.row(*cell);
            [held.k_bytes, held.v_bytes] = rows.row_bytes().map(|n| n as u32);
            held.guard = saved.address();
        }
        held
    }
}

/// The masks of a graph's query rows: F16, device memory.
#[derive(Clone, Copy, Debug)]
pub struct Masks {
    pub mask: crate::attention::Array,
    pub n_query: usize,
    /// Streams of the queries, and of K; the first of K's in the cache.
    pub n_stream: usize,
    pub k_streams: usize,
    pub first_stream: usize,
    pub n_kv: usize,
}

/// Lists of the cells that query rows attend whatever they select: device addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visible {
    /// `[n_row]` lists, one every `stride` numbers.
    pub(super) cells: u64,
    /// `[n_row]` their lengths.
    pub(super) counts: u64,
    pub(super) stride: u32,
}

/// Finds each row's binding, for all layers of a graph.
pub struct RowMap {
    device: Arc<Device>,
    parameters: Parameters,
    n_part: u32,
    memory: Buffer,
    /// Cells that rows attend whatever they select; of a decode alone.
    listed: Option<(Buffer, Visible)>,
    /// Rows that had a binding in the last launch that is done.
    n_sparse: Mapped,
}

impl RowMap {
    /// For rows with these masks (none: the bindings are only checked) and at most 4 bindings, the first `n_choice` of which the
    /// rows may have, in a graph that writes its cache by `written`. Of several that a row sees it has the first.
    ///
    /// # Errors
    /// There is too much of something, or memory is short. A binding is given with whether its guarded rows are still there.
    pub fn new(
        device: &Arc<Device>,
        masks: Option<&Masks>,
        watched: &[(&Watched, bool)],
        n_choice: usize,
        written: &[RowNumbers],
    ) -> Result<RowMap, Error> {
        let n_row = masks.map_or(0, |m| m.n_query * m.n_stream);
        let fits = n_row <= MAX_PREFILL_ROWS && watched.len() <= MAX_BOUND && written.len() <= MAX_WRITTEN;
        if !fits {
            return Err(Error::Unsupported {
                what: "a graph",
                got: format!("{n_row} rows, {} bindings, {} writes", watched.len(), written.len()),
                want: "8192 rows, 4 bindings and 4 tensors of row numbers at most",
            });
        }
        // Rows that nobody has looked at yet are dense.
        let mut words = vec![u32::MAX; n_row];
        words.resize(n_row + MAX_BOUND * n_row + 1, 0);
        let memory = Buffer::of(device, "the rows of a graph", &words)?;
        let n_sparse = Mapped::new(device, 1)?;
        // Until the device knows better.
        n_sparse.set(0, n_row as u32);
        let rows = memory.address();
        let hidden = rows + 4 * n_row as u64;
        let mut parameters = Parameters {
            rows,
            hidden,
            done: hidden + 4 * (MAX_BOUND * n_row) as u64,
            n_row: n_row as u32,
            n_query: 1,
            k_share: 1,
            mask_streams: 1,
            n_bound: watched.len() as u32,
            n_choice: n_choice as u32,
            n_written: written.len() as u32,
            n_sparse: n_sparse.address(0),
            ..Parameters::default()
        };
        if let Some(m) = masks {
            parameters.mask = super::params::strided(&m.mask);
            parameters.n_query = m.n_query as u32;
            parameters.n_kv = m.n_kv as u32;
            parameters.k_share = (m.n_stream / m.k_streams.max(1)).max(1) as u32;
            parameters.first_stream = m.first_stream as u32;
            parameters.mask_streams = m.mask.ne[3].max(1) as u32;
        }
        for (to, (from, guarded)) in parameters.held.iter_mut().zip(watched) {
            *to = from.parameters(parameters.n_kv as usize);
            if !guarded {
                (to.guard, to.k_bytes, to.v_bytes) = (0, 0, 0);
            }
        }
        for (to, from) in parameters.written.iter_mut().zip(written) {
            *to = Written { numbers: from.address, n: from.n as u32, wide: from.wide as u32 };
        }
        let longest = parameters.held.iter().map(|h| h.n_prefix).max().unwrap_or(0) as usize;
        let n_part = if n_row == 0 { 1 } else { longest.div_ceil(PART).max(1) as u32 };
        let mut map = RowMap { device: device.clone(), parameters, n_part, memory, listed: None, n_sparse };
        if n_choice > 0 && (1..=MAX_ROWS).contains(&n_row) {
            map.list()?;
        }
        Ok(map)
    }

    /// Makes room for the lists of visible cells.
    fn list(&mut self) -> Result<(), Error> {
        let n_row = self.n_row();
        let stride = self.longest_list() + LIST_PADDING;
        let buffer = Buffer::new(&self.device, "the rows of a graph", 4 * n_row * (stride + 1))?;
        let (counts, cells) = (buffer.address(), buffer.address() + 4 * n_row as u64);
        let stride = stride as u32;
        let p = &mut self.parameters;
        (p.n_visible, p.visible, p.visible_stride) = (counts, cells, stride);
        self.listed = Some((buffer, Visible { cells, counts, stride }));
        Ok(())
    }

    /// Cells that a row may attend whatever it selects.
    fn longest_list(&self) -> usize {
        let p = &self.parameters;
        p.held.iter().take(p.n_choice as usize).map(|h| h.n_always).fold(p.n_kv, u32::max) as usize
    }

    /// What calls of the graph find of each row after a launch.
    pub fn visible(&self) -> Option<Visible> {
        self.listed.as_ref().map(|own| own.1)
    }

    /// Device address of `[n_row]` i32: each row's binding, by its place in the list; -1: none.
    pub fn rows(&self) -> u64 {
        self.memory.address()
    }

    /// What was listed for each row in the last launch, for tests. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn lists(&self) -> Result<Vec<Vec<u32>>, Error> {
        let Some((buffer, own)) = &self.listed else { return Ok(Vec::new()) };
        let lengths: Vec<u32> = buffer.read(0, self.n_row())?;
        let at = |row: usize| 4 * (lengths.len() + row * own.stride as usize);
        lengths.iter().enumerate().map(|(row, n)| buffer.read(at(row), *n as usize)).collect()
    }

    /// Rows that had a binding in the last launch that is done; before the first, all.
    pub fn n_sparse(&self) -> usize {
        self.n_sparse.get(0) as usize
    }

    /// Rows that it is made for.
    pub fn n_row(&self) -> usize {
        self.parameters.n_row as usize
    }

    /// What `n_sparse` says until the first launch is done.
    pub fn expect(&self, n_sparse: usize) {
        self.n_sparse.set(0, n_sparse as u32);
    }

    /// Puts it on a stream. Waits for nothing, allocates nothing.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// Masks, row numbers, caches and bindings are alive when it runs.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), Error> {
        if self.parameters.n_bound == 0 {
            return Ok(());
        }
        let rows = self.n_row().div_ceil(EACH).max(1) as u32;
        let grid = [self.n_part, self.parameters.n_bound, rows];
        // SAFETY: the kernel takes these parameters; the rest is the caller's contract.
        unsafe {
            self.device.start(self.device.rows_of, grid, [THREADS, 1], &self.parameters, false, stream.raw())?;
            if self.listed.is_some() {
                let grid = [self.longest_list().div_ceil(LIST_PART) as u32, self.n_row() as u32, 1];
                let list = self.device.list_visible;
                self.device.start(list, grid, [LIST_THREADS, 1], &self.parameters, false, stream.raw())?;
            }
        }
        Ok(())
    }
}

/// What is compared of each K or V row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compared<'a> {
    /// Elements of the row, in the basis of the index.
    pub dims: &'a [u32],
    /// Elements that the cache multiplies by a Hadamard matrix together; 0: none are.
    pub block: usize,
    /// First elements of the runs of 32 whose largest magnitude is compared; of quantised rows alone.
    pub peaks: &'a [u32],
}

/// What is compared of each of a cache's first `n_cell` cells, on the host: `[n_cell]` of K, then of V: a number per element, and of
/// quantised rows the variance of each one's rounding error and the peaks. Waits for the device.
///
/// # Errors
/// Memory is short, or the driver refuses.
///
/// # Panics
/// An element is not in the rows, or a type is not one of the kernels'.
///
/// # Safety
/// The rows are device memory.
pub unsafe fn gather(
    rows: &DeviceRows,
    n_cell: usize,
    k: &Compared<'_>,
    v: &Compared<'_>,
    device: &Arc<Device>,
    stream: &Stream,
) -> Result<Vec<f32>, Error> {
    let mut elements = Vec::new();
    let mut width = 0;
    let mut side = |own: &Compared<'_>, (at, step, len): (u64, usize, usize), element: Element| {
        let peaks = if element.block() > 1 { own.peaks } else { &[] };
        let all = own.dims.iter().chain(peaks);
        assert!(all.clone().all(|d| (*d as usize) < len), "elements outside of a row");
        assert!(own.block == 0 || len.is_multiple_of(own.block), "a row of broken blocks");
        elements.extend(all.copied());
        width += if element.block() > 1 { 2 * own.dims.len() + peaks.len() } else { own.dims.len() };
        Side {
            rows: at,
            nb1: step as u64,
            element: type_number(element).expect("a type of the kernels'"),
            block: own.block as u32,
            n_dim: own.dims.len() as u32,
            n_peak: peaks.len() as u32,
        }
    };
    let (k, v) = (side(k, rows.k, rows.types[0]), side(v, rows.v, rows.types[1]));
    assert!(n_cell <= rows.n_cell, "cells outside of a cache");
    let mut found = vec![0.0; width * n_cell];
    if found.is_empty() {
        return Ok(found);
    }
    let n = elements.len();
    let elements = Buffer::of(device, "a search", &elements)?;
    let out = Buffer::new(device, "a search", 4 * found.len())?;
    let (elements_at, out_at, n_cells) = (elements.address(), out.address(), n_cell as u32);
    let parameters = Gather { k, v, elements: elements_at, out: out_at, n_cell: n_cells, unused: 0 };
    let grid = [(n * n_cell).div_ceil(THREADS) as u32, 1, 1];
    // SAFETY: elements lie inside the rows (asserted), `out` has room; the copy waits for the kernel.
    unsafe {
        device.start(device.gather, grid, [THREADS, 1], &parameters, false, stream.raw())?;
        stream.read(out.address(), &mut found)?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_header() {
        let header = include_str!("../../../kernels/rows.cuh");
        let of = |name: &str| -> usize { super::super::constant(header, name).parse().expect(name) };
        for (name, own) in [
            ("ROWS_THREADS", THREADS),
            ("ROWS_PART", PART),
            ("ROWS_EACH", EACH),
            ("LIST_THREADS", LIST_THREADS),
            ("LIST_PART", LIST_PART),
            ("MAX_WRITTEN", MAX_WRITTEN),
            ("ROWS_BYTES", size_of::<Parameters>()),
            ("GATHER_BYTES", size_of::<Gather>()),
        ] {
            assert_eq!(of(name), own, "{name}");
        }
    }
}
