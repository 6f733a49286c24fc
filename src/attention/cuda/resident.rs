//! An index in device memory: uploaded once per GPU, freed with its last user.

use std::sync::{Arc, Mutex, Weak};

use super::memory::Carver;
use super::params::Layer;
use super::{Buffer, Device, Error};
use crate::index::{Index, LayerView};

/// An index's layers on one GPU.
pub struct Resident {
    index: Arc<Index>,
    device: Arc<Device>,
    /// Layer number, the shape's parameters, and the memory behind them.
    layers: Vec<(u32, Layer, Buffer)>,
}

static RESIDENT: Mutex<Vec<Weak<Resident>>> = Mutex::new(Vec::new());

impl Resident {
    /// The index on that GPU; uploads it if nobody has yet. Waits for the copy.
    ///
    /// # Errors
    /// The memory does not suffice, or the driver refuses.
    pub fn of(index: &Arc<Index>, device: &Arc<Device>) -> Result<Arc<Resident>, Error> {
        let mut all = RESIDENT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|r| r.strong_count() > 0);
        let same = |r: &Arc<Resident>| Arc::ptr_eq(&r.index, index) && Arc::ptr_eq(&r.device, device);
        if let Some(found) = all.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(found);
        }
        let mut layers = Vec::new();
        for shape in index.shapes() {
            let Some(view) = index.layer(shape.layer) else { continue };
            let (layer, buffer) = upload(index, &view, device)?;
            layers.push((shape.layer, layer, buffer));
        }
        let made = Arc::new(Resident { index: index.clone(), device: device.clone(), layers });
        all.push(Arc::downgrade(&made));
        Ok(made)
    }

    /// The index.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.2.bytes()).sum()
    }

    pub(super) fn layer(&self, layer: u32) -> Option<&Layer> {
        self.layers.iter().find(|l| l.0 == layer).map(|l| &l.1)
    }
}

fn upload(index: &Index, view: &LayerView<'_>, device: &Arc<Device>) -> Result<(Layer, Buffer), Error> {
    // One width on the device: an index of short prefixes has 16-bit members.
    let members: Vec<u32> = (0..view.members.len()).map(|i| view.members.get(i)).collect();
    // Rows of offsets on multiples of 16 bytes, for loads of four.
    let n_cluster = view.shape.n_cluster as usize;
    let offset_stride = (n_cluster + 1).next_multiple_of(4);
    let mut offsets = Vec::with_capacity(offset_stride * view.shape.n_head_kv as usize);
    for row in view.offsets.chunks_exact(n_cluster + 1) {
        offsets.extend_from_slice(row);
        offsets.resize(offsets.len().next_multiple_of(4), 0);
    }
    let parts: [&[u8]; 7] = [
        bytemuck::cast_slice(view.centroids),
        bytemuck::cast_slice(view.mean_values),
        view.variances,
        bytemuck::cast_slice(view.variance_scales),
        bytemuck::cast_slice(view.radii),
        bytemuck::cast_slice(&offsets),
        bytemuck::cast_slice(&members),
    ];
    let mut carver = Carver::default();
    let places = parts.map(|part| carver.area::<u8>(part.len()));
    let buffer = Buffer::new(device, "an index", carver.bytes)?;
    for (at, part) in places.iter().zip(parts) {
        buffer.write(*at, part)?;
    }
    let [centroids, mean_values, variances, variance_scales, radii, offsets, members] =
        places.map(|at| buffer.address() + at as u64);
    let meta = index.meta();
    let layer = Layer {
        centroids,
        mean_values,
        variances,
        variance_scales,
        radii,
        offsets,
        members,
        offset_stride: offset_stride as u32,
        n_cluster: view.shape.n_cluster,
        n_clustered: view.n_clustered() as u32,
        n_prefix: meta.n_prefix() as u32,
        n_sink: meta.n_sink,
        unused: 0,
    };
    Ok((layer, buffer))
}
