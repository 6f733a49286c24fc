//! Device memory of a batch of KV heads.

use std::sync::Arc;

use half::f16;

use super::params::{Kmeans, CHUNK, DIGIT_BITS, POINTS};
use crate::attention::cuda::{Buffer, Carver, Device, Error, Pinned};
use crate::build::topdown::NEAR;

/// Keys of a batch at most, unless one head has more: enough to fill a GPU.
const BATCH: usize = 1 << 20;

/// Sizes of a layer's heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub n_head: usize,
    pub n_prefix: usize,
    pub n_sink: usize,
    /// N.
    pub n_row: usize,
    pub n_cluster: usize,
    pub n_coarse: usize,
    pub dk: usize,
    pub dv: usize,
}

/// The buffer, and where in it things are.
pub(super) struct Workspace {
    pub buffer: Buffer,
    /// What came from `sinks` on.
    pub results: Pinned,
    pub shape: Shape,
    /// Heads of a batch.
    pub n_head: usize,
    pub at: Areas,
}

/// Byte offsets of `[heads][what one head has]`, but for `broken`.
#[derive(Default)]
pub(super) struct Areas {
    pub unit: usize,
    pub broken: usize,
    pub label: usize,
    pub order: usize,
    /// Where a sort of several passes puts points meanwhile.
    pub spare: usize,
    pub digits: usize,
    pub repaired: usize,
    pub pieces: usize,
    pub extra: usize,
    pub empty: usize,
    pub direction: usize,
    pub coarse_direction: usize,
    pub bounds: usize,
    /// First point of the one group, and of the coarse clusters.
    pub whole: usize,
    pub group_start: usize,
    pub tiles: usize,
    pub n_tile: usize,
    pub near: usize,
    /// The first of what goes to the host; the rest follows.
    pub sinks: usize,
    pub start: usize,
    pub products: usize,
    pub centroids: usize,
    pub mean_values: usize,
    pub variances: usize,
    pub variance_scales: usize,
    pub radii: usize,
    pub members: usize,
    bytes: usize,
}

impl Shape {
    pub fn n_near(&self) -> usize {
        NEAR.min(self.n_coarse)
    }

    fn max_tiles(&self) -> usize {
        self.n_row.div_ceil(POINTS) + self.n_coarse.max(1)
    }

    fn areas(&self, heads: usize) -> Areas {
        let (n, c, coarse) = (heads * self.n_row, heads * self.n_cluster, heads * self.n_coarse);
        let mut carver = Carver::default();
        Areas {
            unit: carver.area::<f16>(n * self.dk),
            broken: carver.area::<u32>(2),
            label: carver.area::<u32>(n),
            order: carver.area::<u32>(n),
            spare: carver.area::<u32>(n),
            digits: carver.area::<u32>((heads * self.n_row.div_ceil(CHUNK)) << DIGIT_BITS),
            repaired: carver.area::<u32>(heads),
            pieces: carver.area::<u32>(c),
            extra: carver.area::<u32>(c),
            empty: carver.area::<u32>(c),
            direction: carver.area::<f16>(c * self.dk),
            coarse_direction: carver.area::<f16>(coarse * self.dk),
            bounds: carver.area::<u32>(coarse + heads),
            whole: carver.area::<u32>(2 * heads),
            group_start: carver.area::<u32>(coarse + heads),
            tiles: carver.area::<[u32; 2]>(heads * self.max_tiles()),
            n_tile: carver.area::<u32>(heads),
            near: carver.area::<u32>(coarse * self.n_near()),
            sinks: carver.area::<f16>(heads * self.n_sink * self.dk),
            start: carver.area::<u32>(c + heads),
            products: carver.area::<u64>(heads),
            centroids: carver.area::<f16>(c * self.dk),
            mean_values: carver.area::<f16>(c * self.dv),
            variances: carver.area::<u8>(c * self.dk),
            variance_scales: carver.area::<f32>(c),
            radii: carver.area::<f32>(c),
            members: carver.area::<u32>(n),
            bytes: carver.bytes,
        }
    }
}

impl Workspace {
    /// Room for as many heads at a time as are worth it, or for fewer where memory is short.
    ///
    /// # Errors
    /// There is not enough for one head, or the driver refuses.
    pub fn new(device: &Arc<Device>, shape: &Shape) -> Result<Workspace, Error> {
        let mut n_head = (BATCH / shape.n_row).clamp(1, shape.n_head);
        loop {
            let at = shape.areas(n_head);
            match Buffer::new(device, "clustering", at.bytes) {
                Ok(buffer) => {
                    let results = Pinned::new(device, at.bytes - at.sinks)?;
                    // What lies between the areas is copied with them.
                    buffer.write(at.sinks, results.bytes())?;
                    return Ok(Workspace { buffer, results, shape: *shape, n_head, at });
                }
                Err(Error::Memory { .. }) if n_head > 1 => n_head /= 2,
                Err(error) => return Err(error),
            }
        }
    }

    /// Device address of an area.
    pub fn address(&self, at: usize) -> u64 {
        self.buffer.address() + at as u64
    }

    /// What every kernel is told, with the fine level as the clusters and one group.
    pub fn parameters(&self) -> Kmeans {
        let (at, shape) = (&self.at, &self.shape);
        let address = |at| self.address(at);
        Kmeans {
            unit: address(at.unit),
            sinks: address(at.sinks),
            broken: address(at.broken),
            label: address(at.label),
            order: address(at.order),
            digits: address(at.digits),
            start: address(at.start),
            repaired: address(at.repaired),
            pieces: address(at.pieces),
            extra: address(at.extra),
            empty: address(at.empty),
            direction: address(at.direction),
            group_start: address(at.whole),
            tiles: address(at.tiles),
            n_tile: address(at.n_tile),
            products: address(at.products),
            centroids: address(at.centroids),
            mean_values: address(at.mean_values),
            variances: address(at.variances),
            variance_scales: address(at.variance_scales),
            radii: address(at.radii),
            members: address(at.members),
            n_prefix: shape.n_prefix as u32,
            n_sink: shape.n_sink as u32,
            n_row: shape.n_row as u32,
            n_point: shape.n_row as u32,
            n_cluster: shape.n_cluster as u32,
            n_group: 1,
            n_near: shape.n_near() as u32,
            max_tiles: shape.max_tiles() as u32,
            times: 1,
            ..Kmeans::default()
        }
    }
}
