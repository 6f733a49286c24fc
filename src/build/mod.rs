//! The offline half: from the keys, values and window queries of a prefix to the layers of an index. Works on plain
//! arrays; knows nothing of models, files or ggml.
//!
//! Per layer [`index_layer`] makes the clusters and the scores that the window's queries give them; once all layers are
//! done [`calibrate`] finds the global thresholds and targets. [`sketch`] and [`probe`] keep what binding needs. An
//! [`Assembly`] puts all of it together.

mod assemble;
mod calibrate;
#[allow(unsafe_code)]
pub mod cuda;
mod error;
mod extend;
mod kmeans;
#[allow(unsafe_code)]
mod matmul;
#[doc(hidden)]
pub mod sample;
mod sketch;
mod summary;
mod synthetic;
mod topdown;
mod window;

use std::sync::{Mutex, PoisonError};

use half::f16;
use rayon::prelude::*;

pub use assemble::Assembly;
pub use calibrate::{calibrate, Tables, BUDGETS, MASSES};
pub use error::BuildError;
pub use extend::{check_extension, extend_layer, extend_sketch};
pub use sketch::{cache_blocks, probe, probe_tokens, sketch, sketch_margin, SketchMargin};
pub use synthetic::synthetic_layer;
pub use window::{sampled_queries, window_scores, LayerScores};

use crate::index::{LayerParts, LayerShape, LayerView};
use crate::random::split_mix;
use summary::{HeadParts, Rows};
use topdown::Plan;

/// Number of what this code makes of a capture: part of the key under which an index is cached. Raise it with every change
/// that gives other bytes for the same text and model, one in the program that captures included; the hash that
/// `tests::the_bytes_of_this_version` pins tells when.
pub const BUILD_VERSION: u32 = 5;

/// How to build.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// S: first tokens that are never clustered.
    pub n_sink: u32,
    /// W: last tokens that are never clustered; their queries calibrate.
    pub n_window: u32,
    /// Clusters per clustered key, above 0 and at most 1.
    pub cluster_share: f32,
    /// Assignments of every key to its nearest centroid, at least 1.
    pub iterations: u32,
    pub seed: u64,
    /// Coarse clusters per KV head, at most one per fine cluster; 0: none. `None`: as many as suit the prefix.
    pub n_coarse: Option<u32>,
    /// Worker threads; the index does not depend on their number.
    pub n_threads: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            n_sink: 16,
            n_window: 100,
            cluster_share: 0.05,
            iterations: 10,
            seed: 0,
            n_coarse: None,
            n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }
}

/// What one layer's attention saw while the prefix (P tokens) was processed.
#[derive(Clone, Debug)]
pub struct LayerCapture {
    pub layer: u32,
    pub n_head_kv: u32,
    /// Query heads per KV head.
    pub n_group: u32,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    /// Softmax scale.
    pub scale: f32,
    /// `[P][n_head_kv][head_dim_k]`, post-RoPE, as in the cache.
    pub k: Vec<f16>,
    /// `[P][n_head_kv][head_dim_v]`.
    pub v: Vec<f16>,
    /// `[W][n_head][head_dim_k]`: queries of the window; head h uses KV head `h / n_group`.
    pub q: Vec<f32>,
}

impl LayerCapture {
    /// Elements of a token's whole K row.
    pub fn row_k(&self) -> usize {
        self.n_head_kv as usize * self.head_dim_k as usize
    }

    /// Elements of a token's whole V row.
    pub fn row_v(&self) -> usize {
        self.n_head_kv as usize * self.head_dim_v as usize
    }

    /// P, after checking that K and V agree on it and are finite.
    ///
    /// # Errors
    /// `Shape` and `NonFinite`.
    fn checked_prefix(&self) -> Result<usize, BuildError> {
        let layer = self.layer;
        if self.row_k() == 0 || self.row_v() == 0 || self.n_group == 0 {
            let expected = "at least 1 head, 1 query head per KV head and 1 element per head".to_string();
            return Err(BuildError::Shape { layer, what: "a K or V row", found: 0, expected });
        }
        let n_prefix = self.k.len() / self.row_k();
        for (what, found, row) in [("K", self.k.len(), self.row_k()), ("V", self.v.len(), self.row_v())] {
            if found != n_prefix * row {
                let expected = format!("{n_prefix} tokens x {row}");
                return Err(BuildError::Shape { layer, what, found, expected });
            }
        }
        for (what, data, row) in [("key", &self.k, self.row_k()), ("value", &self.v, self.row_v())] {
            if let Some(i) = data.par_iter().position_first(|x| !x.is_finite()) {
                return Err(BuildError::NonFinite { layer, what, token: i / row });
            }
        }
        Ok(n_prefix)
    }
}

/// One layer of an index.
#[derive(Clone, Debug, PartialEq)]
pub struct BuiltLayer {
    pub parts: LayerParts,
    pub scores: LayerScores,
    /// Multiply-adds of the comparisons of keys with centroids: what clustering costs.
    pub products: u64,
}

/// Clusters one layer and scores its clusters with the window's queries. Long prefixes are clustered top down and get a
/// hierarchy ([`Settings::n_coarse`]).
///
/// `progress` gets the share done, rising to 1; it is called from worker threads, one call at a time. The result is
/// the same whatever `n_threads`.
///
/// # Errors
/// `Setting`; `TooShort` if no key lies between sinks and window; `Shape` and `NonFinite` for a bad capture; `Threads`.
pub fn index_layer(
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<BuiltLayer, BuildError> {
    check_settings(settings)?;
    pool(settings)?.install(|| index_layer_here(capture, settings, progress))
}

fn pool(settings: &Settings) -> Result<rayon::ThreadPool, BuildError> {
    let n_threads = settings.n_threads.max(1);
    rayon::ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|i| format!("squeeze-build-{i}"))
        .build()
        .map_err(|e| BuildError::Threads { n_threads, reason: e.to_string() })
}

/// N of a capture that has passed every check.
fn n_clustered(capture: &LayerCapture, settings: &Settings) -> Result<usize, BuildError> {
    let n_prefix = capture.checked_prefix()?;
    let row = capture.row_k() * capture.n_group as usize;
    check_queries(capture.layer, row, capture.scale, &capture.q, settings)?;
    between(n_prefix, settings)
}

/// Keys between the sinks and the window.
fn between(n_prefix: usize, settings: &Settings) -> Result<usize, BuildError> {
    let beside = (settings.n_sink + settings.n_window) as usize;
    match n_prefix.checked_sub(beside) {
        None | Some(0) => Err(BuildError::TooShort { n_prefix, needed: beside + 1 }),
        Some(n) => Ok(n),
    }
}

/// Fine clusters for `n` keys.
fn n_cluster(n: usize, settings: &Settings) -> usize {
    ((settings.cluster_share as f64 * n as f64).round() as usize).clamp(1, n)
}

/// Coarse clusters over them.
fn n_coarse(n: usize, n_cluster: usize, settings: &Settings) -> usize {
    settings.n_coarse.map_or_else(|| topdown::n_coarse(n), |c| c as usize).min(n_cluster)
}

/// The same on the threads of the current rayon pool.
fn index_layer_here(
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<BuiltLayer, BuildError> {
    let n = n_clustered(capture, settings)?;
    let n_cluster = n_cluster(n, settings);
    let plan = Plan { n_cluster, n_coarse: n_coarse(n, n_cluster, settings), iterations: settings.iterations };

    let total = capture.n_head_kv as f32;
    let done = Mutex::new(0.0f64);
    let step = |share: f64| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += share;
        progress((*done as f32 / total).min(1.0));
    };
    let head = |h: u32| -> (HeadParts, u64) {
        let (keys, values) = head_rows(capture, h, settings.n_sink as usize);
        let unit = unit((0..n).map(|i| keys.row(i)), n, keys.dim);
        let made = topdown::cluster(&unit, keys.dim, &plan, head_seed(settings, capture.layer, h), &step);
        drop(unit);
        (summary::summarise(keys, values, &made.label, n_cluster, &made.coarse_offsets), made.products)
    };
    // Long heads are shared by all threads one after the other, which bounds the memory by one head's keys.
    let heads: Vec<(HeadParts, u64)> = match plan.n_coarse {
        0 => (0..capture.n_head_kv).into_par_iter().map(head).collect(),
        _ => (0..capture.n_head_kv).map(head).collect(),
    };
    Ok(join(capture, settings, &plan, heads, &capture.q))
}

/// A layer of its heads, each with its multiply-adds, scored by the queries `q`.
fn join(
    capture: &LayerCapture,
    settings: &Settings,
    plan: &Plan,
    heads: Vec<(HeadParts, u64)>,
    q: &[f32],
) -> BuiltLayer {
    let products = heads.iter().map(|(_, products)| products).sum();
    let parts = join_heads(capture, plan, heads.into_iter().map(|(head, _)| head));
    let scores = window_scores(&parts.view(), &capture.k, settings.n_sink as usize, q);
    BuiltLayer { parts, scores, products }
}

/// Keys and values of one KV head from token `first` on.
fn head_rows(capture: &LayerCapture, h: u32, first: usize) -> (Rows<'_>, Rows<'_>) {
    let (dk, dv) = (capture.head_dim_k as usize, capture.head_dim_v as usize);
    let (row_k, row_v, h) = (capture.row_k(), capture.row_v(), h as usize);
    let keys = Rows { data: &capture.k, stride: row_k, column: h * dk, dim: dk, first };
    (keys, Rows { data: &capture.v, stride: row_v, column: h * dv, dim: dv, first })
}

/// `n` rows of `dim` elements, scaled to unit length.
fn unit<'a>(rows: impl Iterator<Item = &'a [f16]>, n: usize, dim: usize) -> Vec<f32> {
    let mut unit: Vec<f32> = Vec::with_capacity(n * dim);
    rows.for_each(|row| unit.extend(row.iter().map(|x| x.to_f32())));
    kmeans::normalise(&mut unit, dim);
    unit
}

/// Every head of every layer starts from keys of its own.
fn head_seed(settings: &Settings, layer: u32, h: u32) -> u64 {
    let mut seed = settings.seed ^ (((layer as u64) << 32) | h as u64);
    split_mix(&mut seed)
}

fn join_heads(capture: &LayerCapture, plan: &Plan, heads: impl Iterator<Item = HeadParts>) -> LayerParts {
    let mut parts = LayerParts {
        shape: LayerShape {
            layer: capture.layer,
            n_head_kv: capture.n_head_kv,
            n_group: capture.n_group,
            head_dim_k: capture.head_dim_k,
            head_dim_v: capture.head_dim_v,
            n_cluster: plan.n_cluster as u32,
            n_coarse: plan.n_coarse as u32,
            scale: capture.scale,
        },
        centroids: Vec::new(),
        mean_values: Vec::new(),
        variances: Vec::new(),
        variance_scales: Vec::new(),
        radii: Vec::new(),
        offsets: Vec::new(),
        members: Vec::new(),
        coarse_centroids: Vec::new(),
        coarse_offsets: Vec::new(),
    };
    for head in heads {
        parts.centroids.extend(head.centroids);
        parts.mean_values.extend(head.mean_values);
        parts.variances.extend(head.variances);
        parts.variance_scales.extend(head.variance_scales);
        parts.radii.extend(head.radii);
        parts.offsets.extend(head.offsets);
        parts.members.extend(head.members);
        parts.coarse_offsets.extend(head.coarse_offsets);
    }
    parts.coarse_centroids = coarse_centroids(&parts.view());
    parts
}

/// The coarse centroids of a layer, on the threads of the current rayon pool.
fn coarse_centroids(view: &LayerView) -> Vec<f16> {
    let heads = (0..view.shape.n_head_kv as usize).into_par_iter();
    heads.flat_map_iter(|head| view.head_coarse_means(head)).collect()
}

/// Whether settings can be used.
///
/// # Errors
/// `Setting`.
pub fn check_settings(settings: &Settings) -> Result<(), BuildError> {
    let share = settings.cluster_share;
    if !(share > 0.0 && share <= 1.0) {
        let wanted = "a share above 0 and at most 1";
        return Err(BuildError::Setting { name: "cluster_share", value: share.to_string(), wanted });
    }
    if settings.iterations == 0 {
        return Err(BuildError::Setting {
            name: "iterations",
            value: "0".to_string(),
            wanted: "at least 1 (usual: 10)",
        });
    }
    if settings.n_window == 0 {
        let wanted = "at least 1 (usual: 100): the window's queries calibrate the thresholds";
        return Err(BuildError::Setting { name: "n_window", value: "0".to_string(), wanted });
    }
    Ok(())
}

/// `row`: elements of a token's queries, all heads.
fn check_queries(layer: u32, row: usize, scale: f32, q: &[f32], settings: &Settings) -> Result<(), BuildError> {
    let found = q.len();
    if found != settings.n_window as usize * row {
        let expected = format!("{} window tokens x {row}", settings.n_window);
        return Err(BuildError::Shape { layer, what: "the window's queries", found, expected });
    }
    if let Some(i) = q.iter().position(|x| !x.is_finite()) {
        return Err(BuildError::NonFinite { layer, what: "window query", token: i / row });
    }
    if !scale.is_finite() || scale <= 0.0 {
        let (value, wanted) = (scale.to_string(), "the softmax scale of the attention op, above 0");
        return Err(BuildError::Setting { name: "scale", value, wanted });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
