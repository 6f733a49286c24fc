//! A resident index tied to cells of a cache stream.

use std::sync::Arc;

use cudarc::driver::sys;

use super::params::{self, CHECK_BLOCKS, SAMPLE};
use super::{Buffer, Error, Resident};
use crate::attention::{Array, Element};

/// Where the prefix's tokens are in the cache, on the device.
pub struct Bound {
    resident: Arc<Resident>,
    first_cell: u32,
    /// `None`: the cells are consecutive.
    cells: Option<Buffer>,
    always: Buffer,
    /// Sinks, then the tail ascending: as `always` has them.
    always_cells: Vec<u32>,
    /// Stream of K and V.
    stream: u32,
    /// Layer, its cell, and what the K rows of that cell were.
    guards: Vec<(u32, u32, Buffer)>,
    /// Layer, and per token a hash of its rows, then where each checking block goes on.
    digests: Vec<(u32, Buffer)>,
    /// One word; 0 once a row was found changed.
    valid: Buffer,
}

/// Addresses and numbers of a binding; 0 for `cells`: consecutive from `first_cell`.
pub(super) struct Place {
    pub cells: u64,
    pub valid: u64,
    pub first_cell: u32,
    pub n_prefix: u32,
    pub stream: u32,
}

impl Bound {
    /// Binds to `cells` (`[P]`, one per prefix token) of a cache of `n_cell` cells per stream.
    ///
    /// # Errors
    /// The cells are not the prefix's, or device memory is short.
    pub fn new(resident: Arc<Resident>, cells: &[u32], n_cell: usize, stream: u32) -> Result<Bound, Error> {
        let meta = resident.index().meta();
        let unsupported = |got: String| Error::Unsupported {
            what: "the map of cells",
            got,
            want: "one cell of the cache per prefix token",
        };
        if cells.len() != meta.n_prefix() {
            return Err(unsupported(format!("{} long", cells.len())));
        }
        if let Some(cell) = cells.iter().find(|c| **c as usize >= n_cell) {
            return Err(unsupported(format!("one with cell {cell} of {n_cell}")));
        }
        let device = resident.device();
        let (n_sink, n_window) = (meta.n_sink as usize, meta.n_window as usize);
        let mut taken = vec![false; n_cell];
        cells[..cells.len() - n_window].iter().for_each(|c| taken[*c as usize] = true);
        let mut always_cells = cells[..n_sink].to_vec();
        always_cells.extend((0..n_cell as u32).filter(|c| !taken[*c as usize]));
        let always = Buffer::of(device, "a binding", &always_cells)?;
        let contiguous = cells.windows(2).all(|w| w[1] == w[0] + 1);
        let (first_cell, cells) = match contiguous {
            true => (cells.first().copied().unwrap_or(0), None),
            false => (0, Some(Buffer::of(device, "a binding", cells)?)),
        };
        let valid = Buffer::of(device, "a binding", &[1u32])?;
        Ok(Bound {
            resident,
            first_cell,
            cells,
            always,
            always_cells,
            stream,
            guards: Vec::new(),
            digests: Vec::new(),
            valid,
        })
    }

    /// From now on every call of that layer checks first that K's rows in `cell` are these, of all KV heads, one after the other.
    ///
    /// # Errors
    /// Device memory is short.
    pub fn guard(&mut self, layer: u32, cell: u32, rows: &[u8]) -> Result<(), Error> {
        let buffer = Buffer::of(self.resident.device(), "a binding", rows)?;
        self.guards.retain(|g| g.0 != layer);
        self.guards.push((layer, cell, buffer));
        Ok(())
    }

    /// From now on every call of that layer compares 64 tokens' rows, each call other ones, with what `k` and `v` hold when the
    /// stream comes to this: `[d, n_kv, n_head_kv, n_stream]` as in a call, of `types`. After ceil(P / 64) calls all have had their
    /// turn. Of a token one KV head's K and V row are compared: a cell is written for all heads or for none. Does not wait.
    ///
    /// # Errors
    /// The layer is not in the index, the arrays are not its shape, or device memory is short.
    ///
    /// # Safety
    /// `stream` is one of the device's primary context; the arrays are valid until it is done.
    pub unsafe fn watch(
        &mut self,
        layer: u32,
        k: &Array,
        v: &Array,
        types: [Element; 2],
        stream: sys::CUstream,
    ) -> Result<(), Error> {
        let resident = self.resident.clone();
        let (device, n_prefix) = (resident.device(), resident.index().meta().n_prefix());
        let shape = resident.index().layer(layer).map(|view| view.shape);
        let wanted = shape.map(|s| [s.head_dim_k, s.head_dim_v, s.n_head_kv].map(|n| n as usize));
        if wanted != Some([k.ne[0], v.ne[0], k.ne[2]]) || k.ne[1] != v.ne[1] {
            let got = format!("{:?} and {:?}", k.ne, v.ne);
            return Err(Error::Unsupported { what: "the shape of K and V", got, want: "that of an indexed layer" });
        }
        if [k, v].iter().any(|a| !(a.data as usize | a.nb[1] | a.nb[2] | a.nb[3]).is_multiple_of(2)) {
            let got = format!("{:?} and {:?}", k.nb, v.nb);
            return Err(Error::Unsupported { what: "the place of K and V", got, want: "rows on multiples of 2 bytes" });
        }
        // A captured call may hold the address of an earlier one.
        if self.digests.iter().all(|d| d.0 != layer) {
            self.digests.push((layer, Buffer::new(device, "a binding", 8 * n_prefix + 4 * CHECK_BLOCKS)?));
        }
        let mut call = params::Call {
            k: params::strided(k),
            v: params::strided(v),
            n_kv: k.ne[1] as u32,
            n_head_kv: k.ne[2] as u32,
            k_bytes: types[0].row_bytes(k.ne[0]) as u32,
            v_bytes: types[1].row_bytes(v.ne[0]) as u32,
            ..Default::default()
        };
        call.bound[0] = self.parameters(layer, k.ne[1]).expect("the layer was looked up above")[0];
        // Layers begin at different tokens: what changes a token changes it in all of them.
        let turn = layer.wrapping_mul(SAMPLE as u32);
        let grid = [n_prefix.div_ceil(params::DIGEST_THREADS / 32) as u32, 1, 1];
        // SAFETY: the buffer was made for these sizes; the rest is the caller's contract.
        unsafe {
            sys::cuMemsetD32Async(call.bound[0].turns, turn, CHECK_BLOCKS, stream)
                .result()
                .map_err(Error::driver("set memory"))?;
            device.start(device.digest, grid, [params::DIGEST_THREADS, 1], &call, false, stream)
        }
    }

    /// Does every row that was checked still hold? Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn holds(&self) -> Result<bool, Error> {
        Ok(self.valid.read::<u32>(0, 1)?[0] != 0)
    }

    /// The index.
    pub fn resident(&self) -> &Arc<Resident> {
        &self.resident
    }

    /// Where its tokens are, for other kernels.
    pub(super) fn place(&self) -> Place {
        Place {
            cells: self.cells.as_ref().map_or(0, Buffer::address),
            valid: self.valid.address(),
            first_cell: self.first_cell,
            n_prefix: self.resident.index().meta().n_prefix() as u32,
            stream: self.stream,
        }
    }

    /// Is that layer's rotating check on?
    pub fn watches(&self, layer: u32) -> bool {
        self.digests.iter().any(|d| d.0 == layer)
    }

    /// Device address of the cells below `n_kv` that its rows attend whatever they select, and their number.
    pub(super) fn always(&self, n_kv: usize) -> (u64, usize) {
        let n_sink = self.resident.index().meta().n_sink as usize;
        let n_tail = self.always_cells[n_sink..].partition_point(|c| (*c as usize) < n_kv);
        (self.always.address(), n_sink + n_tail)
    }

    /// Of the fine level, and of the coarse one.
    pub(super) fn parameters(&self, layer: u32, n_kv: usize) -> Option<[params::Bound; 2]> {
        let meta = self.resident.index().meta();
        let (always, n_always) = self.always(n_kv);
        let guard = self.guards.iter().find(|g| g.0 == layer);
        let digests = self.digests.iter().find(|d| d.0 == layer).map(|d| d.1.address());
        let levels = self.resident.layer(layer)?;
        Some([levels.fine, levels.coarse].map(|layer| params::Bound {
            layer,
            cells: self.cells.as_ref().map_or(0, Buffer::address),
            always,
            guard: guard.map_or(0, |g| g.2.address()),
            valid: self.valid.address(),
            digests: digests.unwrap_or(0),
            turns: digests.map_or(0, |at| at + 8 * meta.n_prefix() as u64),
            first_cell: self.first_cell,
            n_always: n_always as u32,
            guard_cell: guard.map_or(0, |g| g.1),
            target: 0,
            floor: 0,
            stream: self.stream,
        }))
    }
}
