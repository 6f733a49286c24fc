//! Clustering on an NVIDIA GPU, of keys and values where they lie in its memory: the same scheme as on the CPU, with keys and
//! directions rounded to F16 for the tensor cores, starts and repairs of its own. Indexes of both differ; those of a GPU have the
//! same bytes in every run.
//!
//! `run` has the steps, `workspace` the memory, `kernels` and `params` what kernels/kmeans_*.cu are launched with.

mod kernels;
mod params;
mod run;
mod workspace;

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::f16;
use half::vec::HalfBitsVecExt;
use rayon::prelude::*;

use super::{topdown, window_scores, BuildError, BuiltLayer, Settings};
use crate::attention::cuda::{Buffer, Device, Error, Stream, HEAD_DIMS};
use crate::attention::Array;
use crate::index::{LayerParts, LayerShape};
use kernels::Kernels;
use params::Kmeans;
use run::Run;
use workspace::{Shape, Workspace};

/// One layer's keys and values in a cache on the GPU, and the window's queries.
pub struct DeviceLayer<'a> {
    pub layer: u32,
    /// Query heads per KV head.
    pub n_group: u32,
    /// Softmax scale.
    pub scale: f32,
    /// F16 `[head_dim_k, n_kv, n_head_kv]` at a device address, post-RoPE; rows lie on multiples of 8 bytes.
    pub k: Array,
    /// F16 `[head_dim_v, n_kv, n_head_kv]`, likewise.
    pub v: Array,
    /// `[W][n_head][head_dim_k]` on the host, as in [`super::LayerCapture`].
    pub q: &'a [f32],
}

/// Clusters of a layer.
pub struct Clustered {
    pub parts: LayerParts,
    /// `[S][n_head_kv][head_dim_k]`: raw keys of the sinks.
    pub sinks: Vec<f16>,
    /// Multiply-adds of the comparisons of keys with centroids.
    pub products: u64,
    /// How long the results took to get to the host once they were there.
    pub copying: Duration,
}

/// Clusters the layers of one prefix on one GPU, one after the other. Holds the device memory of a batch of KV heads: unit keys
/// (as large as their part of K), labels and what comes out.
pub struct Clusterer {
    device: Arc<Device>,
    kernels: Kernels,
    settings: Settings,
    pool: rayon::ThreadPool,
    cells: Buffer,
    n_prefix: usize,
    /// Cells that a cache has at least.
    n_cell: usize,
    stream: Stream,
    workspace: Option<Workspace>,
}

impl Drop for Clusterer {
    fn drop(&mut self) {
        // What is still under way is waited for: the workspace goes next.
        let _ = self.device.enter().and_then(|()| self.stream.synchronize());
    }
}

fn failed(error: Error) -> BuildError {
    BuildError::Device { reason: error.to_string() }
}

impl Clusterer {
    /// For a prefix whose token t is in cell `cells[t]` of the cache.
    ///
    /// # Errors
    /// `Setting`, `TooShort` and `Threads`; `Device` if the driver refuses.
    pub fn new(device: &Arc<Device>, cells: &[u32], settings: &Settings) -> Result<Clusterer, BuildError> {
        super::check_settings(settings)?;
        super::between(cells.len(), settings)?;
        let kernels = Kernels::new(device).map_err(failed)?;
        let pool = super::pool(settings)?;
        let n_cell = cells.iter().max().map_or(0, |c| *c as usize + 1);
        let buffer = Buffer::of(device, "cells", cells).map_err(failed)?;
        let stream = Stream::new(device).map_err(failed)?;
        Ok(Clusterer {
            device: device.clone(),
            kernels,
            settings: settings.clone(),
            pool,
            cells: buffer,
            n_prefix: cells.len(),
            n_cell,
            stream,
            workspace: None,
        })
    }

    /// As [`super::index_layer`], with the scores of the window's queries computed on the CPU: from a host copy of the prefix's
    /// keys, `[P][n_head_kv][head_dim_k]`.
    ///
    /// # Errors
    /// Those of [`Clusterer::cluster`]; `Shape`, `NonFinite` and `Setting` for queries and keys.
    ///
    /// # Safety
    /// As for [`Clusterer::cluster`].
    pub unsafe fn index_layer(
        &mut self,
        layer: &DeviceLayer<'_>,
        keys: &[f16],
        progress: &dyn Fn(f32),
    ) -> Result<BuiltLayer, BuildError> {
        let row = layer.k.ne[0] * layer.k.ne[2] * layer.n_group as usize;
        let n_key = layer.k.ne[0] * layer.k.ne[2] * self.n_prefix;
        if keys.len() != n_key {
            let (what, expected) = ("the host's copy of the keys", format!("{n_key}"));
            return Err(BuildError::Shape { layer: layer.layer, what, found: keys.len(), expected });
        }
        super::check_queries(layer.layer, row, layer.scale, layer.q, &self.settings)?;
        // SAFETY: the same contract.
        let Clustered { parts, products, .. } = unsafe { self.cluster(layer, progress) }?;
        let scores = self.pool.install(|| window_scores(&parts.view(), keys, self.settings.n_sink as usize, layer.q));
        Ok(BuiltLayer { parts, scores, products })
    }

    /// Clusters one layer: long prefixes top down, as on the CPU. Waits for the GPU. `progress` gets the share done, after every
    /// batch of heads.
    ///
    /// # Errors
    /// `DeviceShape` for arrays that the kernels do not take, `NonFinite` for a broken cache, `DeviceMemory` if there is too little
    /// for one KV head, `Device` if the driver refuses.
    ///
    /// # Safety
    /// `k` and `v` are memory of this GPU that holds what they say, and whoever wrote it is done.
    pub unsafe fn cluster(&mut self, layer: &DeviceLayer<'_>, progress: &dyn Fn(f32)) -> Result<Clustered, BuildError> {
        let shape = self.shape(layer)?;
        if self.workspace.as_ref().is_none_or(|w| w.shape != shape) {
            // The old one first: both need not fit.
            self.workspace = None;
            self.workspace = Some(Workspace::new(&self.device, &shape).map_err(|error| match error {
                Error::Memory { bytes, free, .. } => BuildError::DeviceMemory { layer: layer.layer, bytes, free },
                error => failed(error),
            })?);
        }
        let Some(mut workspace) = self.workspace.take() else { unreachable!("made above") };
        let mut made = empty(&shape, layer);
        let each = workspace.n_head;
        let done = (0..shape.n_head).step_by(each).try_for_each(|first| {
            let n_head = each.min(shape.n_head - first);
            self.batch(&mut workspace, layer, first, n_head, &mut made)?;
            progress((first + n_head) as f32 / shape.n_head as f32);
            Ok(())
        });
        self.workspace = Some(workspace);
        done?;
        made.parts.coarse_centroids = self.pool.install(|| super::coarse_centroids(&made.parts.view()));
        Ok(made)
    }

    fn shape(&self, layer: &DeviceLayer<'_>) -> Result<Shape, BuildError> {
        let (k, v) = (&layer.k, &layer.v);
        let refuse = |what, got: String, wanted| Err(BuildError::DeviceShape { layer: layer.layer, what, got, wanted });
        if !HEAD_DIMS.contains(&k.ne[0]) || !HEAD_DIMS.contains(&v.ne[0]) {
            return refuse("the head size of keys and values", format!("{} and {}", k.ne[0], v.ne[0]), "64 and 128");
        }
        if k.ne[2] == 0 || k.ne[2] != v.ne[2] || layer.n_group == 0 {
            let got = format!("{} of keys, {} of values", k.ne[2], v.ne[2]);
            return refuse("the number of KV heads", got, "the same, at least 1, with 1 query head each");
        }
        for a in [k, v] {
            let aligned = (a.data as usize).is_multiple_of(8) && a.nb[1].is_multiple_of(8) && a.nb[2].is_multiple_of(8);
            if a.nb[0] != 2 || !aligned {
                let got = format!("{:?} bytes between elements, cells and heads at {:?}", &a.nb[..3], a.data);
                return refuse("the layout of the cache", got, "F16 rows on multiples of 8 bytes");
            }
            if a.ne[1] < self.n_cell {
                let got = format!("{} cells", a.ne[1]);
                return refuse("the cache", got, "every cell that holds a token of the prefix");
            }
        }
        let n_row = super::between(self.n_prefix, &self.settings)?;
        let n_cluster = super::n_cluster(n_row, &self.settings);
        Ok(Shape {
            n_head: k.ne[2],
            n_prefix: self.n_prefix,
            n_sink: self.settings.n_sink as usize,
            n_row,
            n_cluster,
            n_coarse: super::n_coarse(n_row, n_cluster, &self.settings),
            dk: k.ne[0],
            dv: v.ne[0],
        })
    }

    /// Heads `first..first + n_head` of a layer.
    fn batch(
        &self,
        workspace: &mut Workspace,
        layer: &DeviceLayer<'_>,
        first: usize,
        n_head: usize,
        made: &mut Clustered,
    ) -> Result<(), BuildError> {
        let shape = workspace.shape;
        let (Some(keys), Some(values)) = (self.kernels.of_size(shape.dk), self.kernels.of_size(shape.dv)) else {
            unreachable!("head sizes are checked before")
        };
        let head = |a: &Array| a.data as u64 + (first * a.nb[2]) as u64;
        let base = Kmeans {
            k: head(&layer.k),
            v: head(&layer.v),
            k_cell: layer.k.nb[1] as u64,
            k_head: layer.k.nb[2] as u64,
            v_cell: layer.v.nb[1] as u64,
            v_head: layer.v.nb[2] as u64,
            cells: self.cells.address(),
            seed: self.settings.seed,
            layer: layer.layer,
            first_head: first as u32,
            n_head: n_head as u32,
            ..workspace.parameters()
        };
        let (device, stream, iterations) = (&*self.device, self.stream.raw(), self.settings.iterations);
        let run = Run { device, kernels: &self.kernels, keys, values, workspace, stream, iterations, base };
        self.device.enter().map_err(failed)?;
        for (what, token) in ["key", "value"].into_iter().zip(run.prepare().map_err(failed)?) {
            if let Some(token) = token {
                return Err(BuildError::NonFinite { layer: layer.layer, what, token });
            }
        }
        let n_coarse = shape.n_coarse;
        if n_coarse == 0 {
            run.flat().map_err(failed)?;
        } else {
            run.coarse().map_err(failed)?;
            let starts = workspace.buffer.read(workspace.at.group_start, n_head * (n_coarse + 1)).map_err(failed)?;
            let bounds = |starts: &[u32]| {
                let sizes: Vec<usize> = starts.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
                topdown::offsets(&topdown::allot(&sizes, shape.n_cluster))
            };
            let bounds: Vec<Vec<u32>> = self.pool.install(|| starts.par_chunks(n_coarse + 1).map(bounds).collect());
            let bounds = bounds.concat();
            workspace.buffer.write(workspace.at.bounds, &bounds).map_err(failed)?;
            run.fine().map_err(failed)?;
            made.parts.coarse_offsets.extend(bounds);
        }
        run.summarise().map_err(failed)?;
        run.finish().map_err(failed)?;
        let start = Instant::now();
        workspace.results.fill(&workspace.buffer, workspace.at.sinks).map_err(failed)?;
        self.pool.install(|| take(workspace, first, n_head, made));
        made.copying += start.elapsed();
        Ok(())
    }

    /// Directions that the keys were last compared with, `[n_head_kv][C][head_dim_k]`, and coarse clusters around each coarse one,
    /// `[n_head_kv][Cc][n_near]`, of the last batch: for tests. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn compared(&self) -> Result<(Vec<f16>, Vec<u32>), BuildError> {
        let Some(workspace) = &self.workspace else { return Ok(Default::default()) };
        let (shape, n_head) = (&workspace.shape, workspace.n_head);
        let directions = workspace.buffer.read(workspace.at.direction, n_head * shape.n_cluster * shape.dk);
        let near = workspace.buffer.read(workspace.at.near, n_head * shape.n_coarse * shape.n_near());
        Ok((directions.map_err(failed)?, near.map_err(failed)?))
    }

    /// Device memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.cells.bytes() + self.workspace.as_ref().map_or(0, |w| w.buffer.bytes())
    }
}

/// Pages of zeros that the system has yet to touch.
fn zeros(n: usize) -> Vec<f16> {
    vec![0u16; n].reinterpret_into()
}

/// A layer that is still to be read, batch by batch.
fn empty(shape: &Shape, layer: &DeviceLayer<'_>) -> Clustered {
    let rows = shape.n_head * shape.n_cluster;
    let parts = LayerParts {
        shape: LayerShape {
            layer: layer.layer,
            n_head_kv: shape.n_head as u32,
            n_group: layer.n_group,
            head_dim_k: shape.dk as u32,
            head_dim_v: shape.dv as u32,
            n_cluster: shape.n_cluster as u32,
            n_coarse: shape.n_coarse as u32,
            scale: layer.scale,
        },
        centroids: zeros(rows * shape.dk),
        mean_values: zeros(rows * shape.dv),
        variances: vec![0; rows * shape.dk],
        variance_scales: vec![0.0; rows],
        radii: vec![0.0; rows],
        offsets: vec![0; rows + shape.n_head],
        members: vec![0; shape.n_head * shape.n_row],
        coarse_centroids: Vec::new(),
        coarse_offsets: Vec::new(),
    };
    Clustered { parts, sinks: zeros(shape.n_sink * shape.n_head * shape.dk), products: 0, copying: Duration::ZERO }
}

/// Copies what a batch gave to where it belongs, with the threads of the current pool: most of the time goes into memory that is
/// touched for the first time.
fn take(workspace: &Workspace, first: usize, n_head: usize, made: &mut Clustered) {
    /// Bytes of a copy that is worth a thread.
    const PIECE: usize = 1 << 18;

    /// The batch's part of arrays with some elements per head.
    struct Batch<'a>(&'a Workspace, usize, usize);
    impl<'a> Batch<'a> {
        fn of<T: bytemuck::AnyBitPattern>(&self, at: usize, n: usize) -> &'a [T] {
            bytemuck::cast_slice(&self.0.results.bytes()[at - self.0.at.sinks..][..n * size_of::<T>()])
        }
        fn take<T: bytemuck::AnyBitPattern + Send + Sync>(&self, at: usize, to: &mut [T], each: usize) {
            let to = &mut to[self.1 * each..][..self.2 * each];
            let pieces = to.par_chunks_mut(PIECE).zip(self.of(at, self.2 * each).par_chunks(PIECE));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
        }
    }
    let (batch, at) = (Batch(workspace, first, n_head), &workspace.at);
    let Shape { n_row, n_cluster, dk, dv, n_sink, n_head: all, .. } = workspace.shape;
    let parts = &mut made.parts;
    batch.take(at.centroids, &mut parts.centroids, n_cluster * dk);
    batch.take(at.mean_values, &mut parts.mean_values, n_cluster * dv);
    batch.take(at.variances, &mut parts.variances, n_cluster * dk);
    batch.take(at.variance_scales, &mut parts.variance_scales, n_cluster);
    batch.take(at.radii, &mut parts.radii, n_cluster);
    batch.take(at.start, &mut parts.offsets, n_cluster + 1);
    batch.take(at.members, &mut parts.members, n_row);
    for (i, row) in batch.of::<f16>(at.sinks, n_head * n_sink * dk).chunks_exact(dk).enumerate() {
        let (head, sink) = (first + i / n_sink, i % n_sink);
        made.sinks[(sink * all + head) * dk..][..dk].copy_from_slice(row);
    }
    made.products += batch.of::<u64>(at.products, n_head).iter().sum::<u64>() * dk as u64;
}
