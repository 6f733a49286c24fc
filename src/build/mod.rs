//! The offline half: from the keys, values and window queries of a prefix to the layers of an index. Works on plain
//! arrays; knows nothing of models, files or ggml.
//!
//! Per layer [`index_layer`] makes the clusters and the scores that the window's queries give them; once all layers are
//! done [`calibrate`] finds the global thresholds. [`sketch`] and [`probe`] keep what binding needs.

mod calibrate;
mod error;
mod kmeans;
mod matmul;
mod sketch;
mod summary;

use std::sync::{Mutex, PoisonError};

use half::f16;
use rayon::prelude::*;

pub use calibrate::{calibrate, window_scores, LayerScores, BUDGETS};
pub use error::BuildError;
pub use sketch::{cache_blocks, probe, probe_tokens, sketch, sketch_margin, SketchMargin};

use crate::index::{LayerParts, LayerShape};
use crate::random::split_mix;
use summary::{HeadParts, Rows};

/// Number of what this code makes of a capture: part of the key under which an index is cached. Raise it with every change
/// that gives other bytes for the same text and model, one in the program that captures included; the hash that
/// `tests::the_bytes_of_this_version` pins tells when.
pub const BUILD_VERSION: u32 = 1;

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

/// Clusters one layer and scores its clusters with the window's queries.
///
/// `progress` gets the share done, rising to 1; it is called from worker threads, one call at a time. The result is
/// the same whatever `n_threads`. There is no hierarchy (`n_coarse` is 0).
///
/// # Errors
/// `Setting`; `TooShort` if no key lies between sinks and window; `Shape` and `NonFinite` for a bad capture; `Threads`.
pub fn index_layer(
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<(LayerParts, LayerScores), BuildError> {
    check_settings(settings)?;
    let n_threads = settings.n_threads.max(1);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|i| format!("squeeze-build-{i}"))
        .build()
        .map_err(|e| BuildError::Threads { n_threads, reason: e.to_string() })?;
    pool.install(|| index_layer_here(capture, settings, progress))
}

/// The same on the threads of the current rayon pool.
fn index_layer_here(
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<(LayerParts, LayerScores), BuildError> {
    let n_prefix = capture.checked_prefix()?;
    check_queries(capture, settings)?;
    let (n_sink, n_window) = (settings.n_sink as usize, settings.n_window as usize);
    let needed = n_sink + n_window + 1;
    if n_prefix < needed {
        return Err(BuildError::TooShort { n_prefix, needed });
    }
    let n = n_prefix - n_sink - n_window;
    let n_cluster = ((settings.cluster_share as f64 * n as f64).round() as usize).clamp(1, n);

    let total = capture.n_head_kv as f32 * settings.iterations as f32;
    let done = Mutex::new(0u64);
    let step = |k: u32| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += k as u64;
        progress(*done as f32 / total);
    };
    let head = |h: u32| -> HeadParts {
        let (dk, dv) = (capture.head_dim_k as usize, capture.head_dim_v as usize);
        let (row_k, row_v, h_k, h_v) = (capture.row_k(), capture.row_v(), h as usize * dk, h as usize * dv);
        let keys = Rows { data: &capture.k, stride: row_k, column: h_k, dim: dk, first: n_sink };
        let values = Rows { data: &capture.v, stride: row_v, column: h_v, dim: dv, first: n_sink };
        let mut unit: Vec<f32> = (0..n).flat_map(|i| keys.row(i).iter().map(|x| x.to_f32())).collect();
        kmeans::normalise(&mut unit, dk);
        let mut seed = settings.seed ^ (((capture.layer as u64) << 32) | h as u64);
        let seed = split_mix(&mut seed);
        let (label, _) = kmeans::cluster(&unit, dk, n_cluster, settings.iterations, seed, &step);
        summary::summarise(keys, values, &label, n_cluster)
    };
    let heads: Vec<HeadParts> = (0..capture.n_head_kv).into_par_iter().map(head).collect();
    let parts = join_heads(capture, n_cluster, heads);
    let scores = window_scores(&parts.view(), &capture.k[..n_sink * capture.row_k()], &capture.q);
    Ok((parts, scores))
}

fn join_heads(capture: &LayerCapture, n_cluster: usize, heads: Vec<HeadParts>) -> LayerParts {
    let mut parts = LayerParts {
        shape: LayerShape {
            layer: capture.layer,
            n_head_kv: capture.n_head_kv,
            n_group: capture.n_group,
            head_dim_k: capture.head_dim_k,
            head_dim_v: capture.head_dim_v,
            n_cluster: n_cluster as u32,
            n_coarse: 0,
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
    }
    parts
}

fn check_settings(settings: &Settings) -> Result<(), BuildError> {
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

fn check_queries(capture: &LayerCapture, settings: &Settings) -> Result<(), BuildError> {
    let (layer, found) = (capture.layer, capture.q.len());
    let row = capture.row_k() * capture.n_group as usize;
    if found != settings.n_window as usize * row {
        let expected = format!("{} window tokens x {row}", settings.n_window);
        return Err(BuildError::Shape { layer, what: "the window's queries", found, expected });
    }
    if let Some(i) = capture.q.iter().position(|x| !x.is_finite()) {
        return Err(BuildError::NonFinite { layer, what: "window query", token: i / row });
    }
    if !capture.scale.is_finite() || capture.scale <= 0.0 {
        let (value, wanted) = (capture.scale.to_string(), "the softmax scale of the attention op, above 0");
        return Err(BuildError::Setting { name: "scale", value, wanted });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
