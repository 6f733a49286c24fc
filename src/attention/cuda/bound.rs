//! A resident index tied to cells of a cache stream.

use std::sync::Arc;

use super::{Buffer, Error, Resident};

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
    /// One word; 0 once a guard was found changed.
    valid: Buffer,
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
        Ok(Bound { resident, first_cell, cells, always, always_cells, stream, guards: Vec::new(), valid })
    }

    /// From now on every call of that layer checks first that K's rows in `cell` are these: `[n_head_kv][head_dim_k]` F16.
    ///
    /// # Errors
    /// Device memory is short.
    pub fn guard(&mut self, layer: u32, cell: u32, rows: &[half::f16]) -> Result<(), Error> {
        let buffer = Buffer::of(self.resident.device(), "a binding", rows)?;
        self.guards.retain(|g| g.0 != layer);
        self.guards.push((layer, cell, buffer));
        Ok(())
    }

    /// Does every guard that was checked still hold? Waits for the device.
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

    pub(super) fn parameters(&self, layer: u32, n_kv: usize) -> Option<super::params::Bound> {
        let meta = self.resident.index().meta();
        let n_sink = meta.n_sink as usize;
        let n_tail = self.always_cells[n_sink..].partition_point(|c| (*c as usize) < n_kv);
        let guard = self.guards.iter().find(|g| g.0 == layer);
        Some(super::params::Bound {
            layer: *self.resident.layer(layer)?,
            cells: self.cells.as_ref().map_or(0, Buffer::address),
            always: self.always.address(),
            guard: guard.map_or(0, |g| g.2.address()),
            valid: self.valid.address(),
            first_cell: self.first_cell,
            n_always: (n_sink + n_tail) as u32,
            guard_cell: guard.map_or(0, |g| g.1),
            target: 0,
            floor: 0,
            stream: self.stream,
        })
    }
}
