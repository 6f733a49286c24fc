//! An index in device memory: uploaded once per GPU, freed with its last user.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, Weak};

use half::f16;
use rayon::prelude::*;

use super::memory::Carver;
use super::params::Layer;
use super::{Buffer, Device, Error};
use crate::hadamard;
use crate::index::{Index, LayerView};

/// An index's layers on one GPU.
pub struct Resident {
    index: Arc<Index>,
    device: Arc<Device>,
    v_block: usize,
    layers: Vec<(u32, Levels, Buffer)>,
}

/// Parameters of a layer's fine clusters, and of its coarse ones. A layer without a coarse level has one coarse cluster that
/// holds all fine ones, so that a call may mix layers with and without.
pub(super) struct Levels {
    pub fine: Layer,
    pub coarse: Layer,
}

static RESIDENT: Mutex<Vec<Weak<Resident>>> = Mutex::new(Vec::new());

impl Resident {
    /// The index on that GPU; uploads it if nobody has yet. Waits for the copy. Mean values are brought to the basis of a cache
    /// whose values are multiplied by a Hadamard matrix in blocks of `v_block` elements (0: they are not).
    ///
    /// # Errors
    /// The blocks are no part of the heads, the memory does not suffice, or the driver refuses.
    pub fn of(index: &Arc<Index>, device: &Arc<Device>, v_block: usize) -> Result<Arc<Resident>, Error> {
        let mut all = RESIDENT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        all.retain(|r| r.strong_count() > 0);
        let same =
            |r: &Arc<Resident>| Arc::ptr_eq(&r.index, index) && Arc::ptr_eq(&r.device, device) && r.v_block == v_block;
        if let Some(found) = all.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(found);
        }
        let mut layers = Vec::new();
        for shape in index.shapes() {
            let Some(view) = index.layer(shape.layer) else { continue };
            if !hadamard::fits(v_block, shape.head_dim_v as usize) {
                return Err(Error::Unsupported {
                    what: "the basis of values",
                    got: format!("blocks of {v_block} elements in heads of {}", shape.head_dim_v),
                    want: "blocks that heads are made of",
                });
            }
            let (levels, buffer) = upload(index, &view, device, v_block)?;
            layers.push((shape.layer, levels, buffer));
        }
        let made = Arc::new(Resident { index: index.clone(), device: device.clone(), v_block, layers });
        all.push(Arc::downgrade(&made));
        Ok(made)
    }

    /// The index.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The basis of its mean values.
    pub fn v_block(&self) -> usize {
        self.v_block
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.2.bytes()).sum()
    }

    pub(super) fn layer(&self, layer: u32) -> Option<&Levels> {
        self.layers.iter().find(|l| l.0 == layer).map(|l| &l.1)
    }
}

/// Rows of offsets on multiples of 16 bytes, for loads of four: all rows, and the length of one.
fn padded<T: AsRef<[u32]>>(rows: impl Iterator<Item = T>) -> (Vec<u32>, u32) {
    let (mut out, mut stride) = (Vec::new(), 0);
    for row in rows {
        let row = row.as_ref();
        out.extend_from_slice(row);
        out.resize(out.len().next_multiple_of(4), 0);
        stride = row.len().next_multiple_of(4) as u32;
    }
    (out, stride)
}

/// Rows of `d` elements after the Hadamard transform in blocks.
fn turned(rows: &[f16], d: usize, block: usize) -> Vec<f16> {
    let mut out = rows.to_vec();
    out.par_chunks_exact_mut(d).for_each(|row| {
        let mut numbers: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
        hadamard::rotate(&mut numbers, block);
        row.iter_mut().zip(numbers).for_each(|(to, x)| *to = f16::from_f32(x));
    });
    out
}

fn upload(
    index: &Index,
    view: &LayerView<'_>,
    device: &Arc<Device>,
    v_block: usize,
) -> Result<(Levels, Buffer), Error> {
    let heads = view.shape.n_head_kv as usize;
    let (n_cluster, n_clustered) = (view.shape.n_cluster, view.n_clustered() as u32);
    // One width on the device: an index of short prefixes has 16-bit members.
    let members: Vec<u32> = (0..view.members.len()).map(|i| view.members.get(i)).collect();
    let (offsets, offset_stride) = padded((0..heads).map(|h| view.head_offsets(h)));
    let layered = view.shape.n_coarse > 0;
    let one = [0, n_cluster];
    let (coarse_fine, _) = padded((0..heads).map(|h| if layered { view.head_coarse_offsets(h) } else { &one[..] }));
    let keys = |h| if layered { view.head_coarse_keys(h) } else { vec![0, n_clustered] };
    let (coarse_keys, coarse_stride) = padded((0..heads).map(keys));
    let nothing = vec![f16::ZERO; if layered { 0 } else { heads * view.shape.head_dim_k as usize }];
    let coarse_centroids = if layered { view.coarse_centroids } else { &nothing };
    let mean_values = match v_block {
        0 => Cow::Borrowed(view.mean_values),
        block => Cow::Owned(turned(view.mean_values, view.shape.head_dim_v as usize, block)),
    };
    let parts: [&[u8]; 10] = [
        bytemuck::cast_slice(view.centroids),
        bytemuck::cast_slice(&mean_values),
        view.variances,
        bytemuck::cast_slice(view.variance_scales),
        bytemuck::cast_slice(view.radii),
        bytemuck::cast_slice(&offsets),
        bytemuck::cast_slice(&members),
        bytemuck::cast_slice(coarse_centroids),
        bytemuck::cast_slice(&coarse_keys),
        bytemuck::cast_slice(&coarse_fine),
    ];
    let mut carver = Carver::default();
    let places = parts.map(|part| carver.area::<u8>(part.len()));
    let buffer = Buffer::new(device, "an index", carver.bytes)?;
    for (at, part) in places.iter().zip(parts) {
        buffer.write(*at, part)?;
    }
    let [centroids, mean_values, variances, variance_scales, radii, offsets, members, coarse @ ..] =
        places.map(|at| buffer.address() + at as u64);
    let meta = index.meta();
    let (n_prefix, n_sink) = (meta.n_prefix() as u32, meta.n_sink);
    let fine = Layer {
        centroids,
        mean_values,
        variances,
        variance_scales,
        radii,
        offsets,
        members,
        fine: 0,
        offset_stride,
        n_cluster,
        n_clustered,
        n_prefix,
        n_sink,
    };
    let coarse = Layer {
        centroids: coarse[0],
        offsets: coarse[1],
        fine: coarse[2],
        offset_stride: coarse_stride,
        n_cluster: view.shape.n_coarse.max(1),
        n_clustered,
        n_prefix,
        n_sink,
        ..Layer::default()
    };
    Ok((Levels { fine, coarse }, buffer))
}
