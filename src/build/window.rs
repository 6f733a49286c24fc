//! What the window's queries make of a layer's clusters: the scores that select online, and the true attention mass.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::matmul::dot_rows;
use crate::config::SPREAD_ALPHA;
use crate::index::LayerView;

/// Query rows scored at a time at least, query tokens likewise, and keys: bound the scratch memory.
const ROWS: usize = 32;
const QUERIES: usize = 8;
const KEYS: usize = 1024;
/// Clustered keys up to which all queries of the window are scored, and how many of them at least behind more: each meets every
/// key, and neighbours say much the same.
const ALL_QUERIES: usize = 16384;
const QUERIES_MIN: usize = 20;

/// What the window's queries think of one layer's clusters.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScores {
    pub layer: u32,
    pub n_head_kv: u32,
    /// C.
    pub n_cluster: u32,
    /// Queries of the window that were scored: `sampled_queries`.
    pub n_query: u32,
    /// S.
    pub n_sink: u32,
    /// N, clustered keys per KV head.
    pub n_clustered: u32,
    /// `[n_head_kv][C]`: keys per cluster.
    pub sizes: Vec<u32>,
    /// `[n_head_kv][n_query][C]`: mean over the group of the probability per key, with the spread bonus (`diag`).
    pub scores: Vec<f32>,
    /// `[n_head_kv][n_query]`: the same of all sinks together.
    pub sink_share: Vec<f32>,
    /// `[n_head_kv][n_query][C]`: true share of the prefix's attention mass in each cluster, mean over the group.
    pub mass: Vec<f16>,
    /// `[n_head_kv][n_query]`: the same of all sinks together.
    pub sink_mass: Vec<f32>,
}

impl LayerScores {
    pub(super) fn clusters(&self, head: usize, query: usize) -> std::ops::Range<usize> {
        let (c, w) = (self.n_cluster as usize, self.n_query as usize);
        (head * w + query) * c..(head * w + query + 1) * c
    }

    pub(super) fn head_sizes(&self, head: usize) -> &[u32] {
        let c = self.n_cluster as usize;
        &self.sizes[head * c..(head + 1) * c]
    }

    /// P - W.
    pub(super) fn n_key(&self) -> f64 {
        (self.n_sink + self.n_clustered) as f64
    }
}

/// Some queries' part of one KV head of `LayerScores`.
struct Part {
    scores: Vec<f32>,
    sink_share: Vec<f32>,
    mass: Vec<f16>,
    sink_mass: Vec<f32>,
}

/// Which of a window's W queries score the clusters of so many keys: all, or some at equal steps, the last one among them.
pub fn sampled_queries(n_window: usize, n_clustered: usize) -> Vec<usize> {
    let n = (n_window * ALL_QUERIES).div_ceil(n_clustered.max(1)).max(QUERIES_MIN).min(n_window);
    (1..=n).map(|i| i * n_window / n - 1).collect()
}

/// Scores every cluster of a layer for the window's queries, or for some of them (`sampled_queries`).
///
/// `k` is `[P][n_head_kv][head_dim_k]`, `q` is `[W][n_head][head_dim_k]`.
pub fn window_scores(view: &LayerView, k: &[f16], n_sink: usize, q: &[f32]) -> LayerScores {
    let shape = view.shape;
    let (n_head_kv, dim, n_group) = (shape.n_head_kv as usize, shape.head_dim_k as usize, shape.n_group as usize);
    let queries = sampled_queries(q.len() / (n_head_kv * n_group * dim), view.n_clustered());
    let blocks: Vec<&[usize]> = queries.chunks(QUERIES.max(ROWS / n_group)).collect();
    let tasks: Vec<(usize, &[usize])> = (0..n_head_kv).flat_map(|h| blocks.iter().map(move |b| (h, *b))).collect();
    let parts: Vec<Part> = tasks.into_par_iter().map(|(h, block)| part(view, h, k, n_sink, q, block)).collect();
    let mut layer = LayerScores {
        layer: shape.layer,
        n_head_kv: shape.n_head_kv,
        n_cluster: shape.n_cluster,
        n_query: queries.len() as u32,
        n_sink: n_sink as u32,
        n_clustered: view.n_clustered() as u32,
        sizes: (0..n_head_kv).flat_map(|h| view.head_offsets(h).windows(2).map(|w| w[1] - w[0])).collect(),
        scores: Vec::new(),
        sink_share: Vec::new(),
        mass: Vec::new(),
        sink_mass: Vec::new(),
    };
    for part in parts {
        layer.scores.extend(part.scores);
        layer.sink_share.extend(part.sink_share);
        layer.mass.extend(part.mass);
        layer.sink_mass.extend(part.sink_mass);
    }
    layer
}

/// One KV head and these of the window's queries.
fn part(view: &LayerView, h: usize, k: &[f16], n_sink: usize, q: &[f32], queries: &[usize]) -> Part {
    let shape = view.shape;
    let (n_head_kv, n_group) = (shape.n_head_kv as usize, shape.n_group as usize);
    let (dim, c) = (shape.head_dim_k as usize, shape.n_cluster as usize);
    let (scale, alpha) = (shape.scale, SPREAD_ALPHA * shape.scale);

    let mut centroids = vec![0.0; c * dim];
    view.centroids[h * c * dim..(h + 1) * c * dim].convert_to_f32_slice(&mut centroids);
    let variances: Vec<f32> = (h * c..(h + 1) * c)
        .flat_map(|i| view.variances[i * dim..(i + 1) * dim].iter().map(move |&u| (i, u)))
        .map(|(i, u)| u as f32 * view.variance_scales[i])
        .collect();
    let copy_key = |token: usize, to: &mut [f32]| k[(token * n_head_kv + h) * dim..][..dim].convert_to_f32_slice(to);
    let mut sinks = vec![0.0; n_sink * dim];
    sinks.chunks_exact_mut(dim).enumerate().for_each(|(token, to)| copy_key(token, to));
    let sizes: Vec<f32> = view.head_offsets(h).windows(2).map(|w| (w[1] - w[0]) as f32).collect();
    let once = vec![1.0; c];

    let rows: Vec<f32> =
        queries.iter().flat_map(|&w| &q[(w * n_head_kv + h) * n_group * dim..][..n_group * dim]).copied().collect();
    let squares: Vec<f32> = rows.iter().map(|x| x * x).collect();
    let n_row = queries.len() * n_group;
    let (mut plain, mut wide, mut exact) = (vec![0.0; n_row * c], vec![0.0; n_row * c], vec![0.0; n_row * n_sink]);
    dot_rows(&rows, &centroids, dim, &mut plain);
    dot_rows(&squares, &variances, dim, &mut wide);
    dot_rows(&rows, &sinks, dim, &mut exact);
    exact.iter_mut().for_each(|x| *x *= scale);
    for (wide, plain) in wide.iter_mut().zip(&plain) {
        *wide = *plain * scale + alpha * wide.max(0.0).sqrt();
    }
    let whole = cluster_sums(view, h, &copy_key, &rows);
    let mut part = Part {
        scores: vec![0.0; queries.len() * c],
        sink_share: vec![0.0; queries.len()],
        mass: Vec::with_capacity(queries.len() * c),
        sink_mass: vec![0.0; queries.len()],
    };
    for w in 0..queries.len() {
        let mut mass = vec![0.0f32; c];
        for r in w * n_group..(w + 1) * n_group {
            let exact = &exact[r * n_sink..(r + 1) * n_sink];
            let scores = &mut part.scores[w * c..(w + 1) * c];
            part.sink_share[w] += add_probabilities(exact, &wide[r * c..(r + 1) * c], &sizes, n_group, scores);
            part.sink_mass[w] += add_probabilities(exact, &whole[r * c..(r + 1) * c], &once, n_group, &mut mass);
        }
        part.mass.extend(mass.iter().map(|m| f16::from_f32(*m)));
    }
    part
}

/// `[rows][C]`: the logarithm of the sum of `exp(s q.k)` over each cluster's keys.
fn cluster_sums(view: &LayerView, h: usize, copy_key: &impl Fn(usize, &mut [f32]), rows: &[f32]) -> Vec<f32> {
    let (dim, c, scale) = (view.shape.head_dim_k as usize, view.shape.n_cluster as usize, view.shape.scale);
    let (offsets, n_row, n) = (view.head_offsets(h), rows.len() / dim, view.n_clustered());
    let mut sums = vec![f32::NEG_INFINITY; n_row * c];
    let (mut keys, mut dots) = (vec![0.0; KEYS * dim], vec![0.0; n_row * KEYS]);
    for start in (0..n).step_by(KEYS) {
        let end = (start + KEYS).min(n);
        let (keys, dots) = (&mut keys[..(end - start) * dim], &mut dots[..n_row * (end - start)]);
        for (slot, to) in (start..end).zip(keys.chunks_exact_mut(dim)) {
            copy_key(view.member(h, slot) as usize, to);
        }
        dot_rows(rows, keys, dim, dots);
        let first = offsets.partition_point(|o| *o as usize <= start) - 1;
        for (dots, sums) in dots.chunks_exact(end - start).zip(sums.chunks_exact_mut(c)) {
            let mut from = start;
            for (i, sum) in sums.iter_mut().enumerate().skip(first) {
                let to = (offsets[i + 1] as usize).min(end);
                let own = &dots[from - start..to - start];
                let max = own.iter().fold(*sum, |max, x| max.max(x * scale));
                *sum = max + ((*sum - max).exp() + own.iter().map(|x| (x * scale - max).exp()).sum::<f32>()).ln();
                from = to;
                if from == end {
                    break;
                }
            }
        }
    }
    sums
}

/// Adds to `p` a group's share of the probability per key of every cluster, and returns that of all sinks together.
fn add_probabilities(sinks: &[f32], logits: &[f32], sizes: &[f32], n_group: usize, p: &mut [f32]) -> f32 {
    let max = sinks.iter().chain(logits).copied().fold(f32::NEG_INFINITY, f32::max);
    let sink_sum: f64 = sinks.iter().map(|x| (x - max).exp() as f64).sum();
    let exps: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = sink_sum + exps.iter().zip(sizes).map(|(e, n)| (e * n) as f64).sum::<f64>();
    let factor = 1.0 / (sum * n_group as f64);
    p.iter_mut().zip(&exps).for_each(|(p, e)| *p += (*e as f64 * factor) as f32);
    (sink_sum * factor) as f32
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
