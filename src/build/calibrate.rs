//! Scores of the clusters for the window's queries, and the global thresholds that follow from them: one
//! threshold for all layers and heads, with a floor per KV head.

use half::f16;
use rayon::prelude::*;

use super::matmul::dot_rows;
use crate::config::{SPREAD_ALPHA, THRESHOLD_FLOOR};
use crate::index::{Calibration, LayerView};

/// Nominal shares of the prefix keys that an index is calibrated for.
pub const BUDGETS: [f32; 8] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5];

/// Query tokens scored at a time: bounds the scratch memory.
const QUERIES: usize = 8;

/// What the window's queries think of one layer's clusters.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerScores {
    pub layer: u32,
    pub n_head_kv: u32,
    /// C.
    pub n_cluster: u32,
    /// W.
    pub n_query: u32,
    /// S.
    pub n_sink: u32,
    /// N, clustered keys per KV head.
    pub n_clustered: u32,
    /// `[n_head_kv][C]`: keys per cluster.
    pub sizes: Vec<u32>,
    /// `[n_head_kv][W][C]`: mean over the group of the probability per key, with the spread bonus (`diag`).
    pub scores: Vec<f32>,
    /// `[n_head_kv][W]`: estimated share of the prefix's mass in the sinks, without the bonus.
    pub sink_mass: Vec<f32>,
    /// `[n_head_kv][W][C]`: estimated share of the prefix's mass in each cluster, without the bonus.
    pub mass: Vec<f16>,
}

impl LayerScores {
    fn clusters(&self, head: usize, query: usize) -> std::ops::Range<usize> {
        let (c, w) = (self.n_cluster as usize, self.n_query as usize);
        (head * w + query) * c..(head * w + query + 1) * c
    }

    fn head_sizes(&self, head: usize) -> &[u32] {
        let c = self.n_cluster as usize;
        &self.sizes[head * c..(head + 1) * c]
    }

    /// P - W.
    fn n_key(&self) -> f64 {
        (self.n_sink + self.n_clustered) as f64
    }
}

/// One KV head of `LayerScores`.
struct HeadScores {
    scores: Vec<f32>,
    sink_mass: Vec<f32>,
    mass: Vec<f16>,
}

/// Scores every cluster of a layer for every window query.
///
/// `sink_keys` is `[S][n_head_kv][head_dim_k]`, `q` is `[W][n_head][head_dim_k]`.
pub fn window_scores(view: &LayerView, sink_keys: &[f16], q: &[f32]) -> LayerScores {
    let shape = view.shape;
    let (n_head_kv, dim) = (shape.n_head_kv as usize, shape.head_dim_k as usize);
    let n_query = q.len() / (n_head_kv * shape.n_group as usize * dim);
    let heads: Vec<HeadScores> =
        (0..n_head_kv).into_par_iter().map(|h| head_scores(view, h, sink_keys, q, n_query)).collect();
    let mut layer = LayerScores {
        layer: shape.layer,
        n_head_kv: shape.n_head_kv,
        n_cluster: shape.n_cluster,
        n_query: n_query as u32,
        n_sink: (sink_keys.len() / (n_head_kv * dim)) as u32,
        n_clustered: view.n_clustered() as u32,
        sizes: (0..n_head_kv).flat_map(|h| view.head_offsets(h).windows(2).map(|w| w[1] - w[0])).collect(),
        scores: Vec::new(),
        sink_mass: Vec::new(),
        mass: Vec::new(),
    };
    for head in heads {
        layer.scores.extend(head.scores);
        layer.sink_mass.extend(head.sink_mass);
        layer.mass.extend(head.mass);
    }
    layer
}

fn head_scores(view: &LayerView, h: usize, sink_keys: &[f16], q: &[f32], n_query: usize) -> HeadScores {
    let shape = view.shape;
    let (n_head_kv, n_group) = (shape.n_head_kv as usize, shape.n_group as usize);
    let (dim, c) = (shape.head_dim_k as usize, shape.n_cluster as usize);
    let n_sink = sink_keys.len() / (n_head_kv * dim);
    let (scale, alpha) = (shape.scale, SPREAD_ALPHA * shape.scale);

    let centroids: Vec<f32> = view.centroids[h * c * dim..(h + 1) * c * dim].iter().map(|x| x.to_f32()).collect();
    let variances: Vec<f32> = (h * c..(h + 1) * c)
        .flat_map(|i| view.variances[i * dim..(i + 1) * dim].iter().map(move |&u| (i, u)))
        .map(|(i, u)| u as f32 * view.variance_scales[i])
        .collect();
    let sinks: Vec<f32> =
        (0..n_sink).flat_map(|s| &sink_keys[(s * n_head_kv + h) * dim..][..dim]).map(|x| x.to_f32()).collect();
    let sizes: Vec<f32> = view.head_offsets(h).windows(2).map(|w| (w[1] - w[0]) as f32).collect();

    let mut head = HeadScores {
        scores: vec![0.0; n_query * c],
        sink_mass: vec![0.0; n_query],
        mass: Vec::with_capacity(n_query * c),
    };
    let queries: Vec<usize> = (0..n_query).collect();
    for block in queries.chunks(QUERIES) {
        let rows: Vec<f32> =
            block.iter().flat_map(|&w| &q[(w * n_head_kv + h) * n_group * dim..][..n_group * dim]).copied().collect();
        let squares: Vec<f32> = rows.iter().map(|x| x * x).collect();
        let n_row = block.len() * n_group;
        let (mut plain, mut wide, mut exact) = (vec![0.0; n_row * c], vec![0.0; n_row * c], vec![0.0; n_row * n_sink]);
        dot_rows(&rows, &centroids, dim, &mut plain);
        dot_rows(&squares, &variances, dim, &mut wide);
        dot_rows(&rows, &sinks, dim, &mut exact);
        exact.iter_mut().for_each(|x| *x *= scale);
        for (wide, plain) in wide.iter_mut().zip(&mut plain) {
            *plain *= scale;
            *wide = *plain + alpha * wide.max(0.0).sqrt();
        }
        for (b, &w) in block.iter().enumerate() {
            let mut mass = vec![0.0f32; c];
            for r in b * n_group..(b + 1) * n_group {
                let exact = &exact[r * n_sink..(r + 1) * n_sink];
                let scores = &mut head.scores[w * c..(w + 1) * c];
                add_probabilities(exact, &wide[r * c..(r + 1) * c], &sizes, n_group, scores);
                head.sink_mass[w] += add_probabilities(exact, &plain[r * c..(r + 1) * c], &sizes, n_group, &mut mass);
            }
            head.mass.extend(mass.iter().zip(&sizes).map(|(p, n)| f16::from_f32(p * n)));
        }
    }
    head
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

/// One global threshold per budget, in the order of `budgets`; none if `scores` is empty.
///
/// T is taken from the scores averaged over the window's queries: the cut that brings the kept share of the `P - W` keys
/// (sinks counted) nearest to the budget, over all layers and heads. (Cut from single queries' scores, more than
/// the budget is kept later.) What is reported as kept and as mass is measured query by query, with the floor of
/// `THRESHOLD_FLOOR` per KV head. Layers must share P, S and W.
pub fn calibrate(scores: &[LayerScores], budgets: &[f32]) -> Vec<Calibration> {
    if scores.is_empty() {
        return Vec::new();
    }
    let mean = mean_scores(scores);
    let row = |&budget: &f32| {
        let threshold = threshold(scores, &mean, budget);
        let (layer_kept, layer_mass): (Vec<f32>, Vec<f32>) = scores.iter().map(|l| measure(l, threshold)).unzip();
        let average = |x: &[f32]| x.iter().sum::<f32>() / x.len() as f32;
        Calibration { budget, threshold, kept: average(&layer_kept), mass: average(&layer_mass), layer_kept }
    };
    budgets.iter().map(row).collect()
}

/// Mean score over the window's queries and size of every cluster of every layer and head, best first.
fn mean_scores(scores: &[LayerScores]) -> Vec<(f32, u32)> {
    let mut all = Vec::new();
    for layer in scores {
        for h in 0..layer.n_head_kv as usize {
            let mut sum = vec![0.0f64; layer.n_cluster as usize];
            for w in 0..layer.n_query as usize {
                sum.iter_mut().zip(&layer.scores[layer.clusters(h, w)]).for_each(|(s, &p)| *s += p as f64);
            }
            let mean = sum.iter().map(|s| (s / layer.n_query as f64) as f32);
            all.extend(mean.zip(layer.head_sizes(h).iter().copied()));
        }
    }
    all.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    all
}

/// The cut through `mean` (best first) whose kept share is nearest to `budget`.
fn threshold(scores: &[LayerScores], mean: &[(f32, u32)], budget: f32) -> f32 {
    let heads = |l: &LayerScores| l.n_head_kv as f64;
    let n_key: f64 = scores.iter().map(|l| heads(l) * l.n_key()).sum();
    let mut kept: f64 = scores.iter().map(|l| heads(l) * l.n_sink as f64).sum();
    let distance = |kept: f64| (kept / n_key - budget as f64).abs();
    // Nothing but sinks: just above the best score.
    let (mut best, mut nearest) = (f32::from_bits(mean[0].0.to_bits() + 1), distance(kept));
    for (i, &(score, size)) in mean.iter().enumerate() {
        kept += size as f64;
        // Clusters of equal score are kept or dropped together.
        if mean.get(i + 1).is_none_or(|next| next.0 < score) && distance(kept) < nearest {
            (best, nearest) = (score, distance(kept));
        }
    }
    // A score that underflowed to 0 must not let everything in.
    best.max(f32::MIN_POSITIVE)
}

/// Kept share of the `P - W` keys and kept share of the estimated mass in one layer: mean over its heads and queries.
fn measure(layer: &LayerScores, threshold: f32) -> (f32, f32) {
    let n_key = layer.n_key();
    let floor = (THRESHOLD_FLOOR * n_key as f32) as f64;
    let (mut kept_sum, mut mass_sum) = (0.0, 0.0);
    for h in 0..layer.n_head_kv as usize {
        let sizes = layer.head_sizes(h);
        for w in 0..layer.n_query as usize {
            let (scores, mass) = (&layer.scores[layer.clusters(h, w)], &layer.mass[layer.clusters(h, w)]);
            let mut kept = layer.n_sink as f64;
            let mut kept_mass = layer.sink_mass[h * layer.n_query as usize + w] as f64;
            let mut dropped = Vec::new();
            for i in 0..scores.len() {
                if scores[i] >= threshold {
                    kept += sizes[i] as f64;
                    kept_mass += mass[i].to_f64();
                } else {
                    dropped.push(i);
                }
            }
            if kept < floor {
                dropped.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                for i in dropped {
                    if kept >= floor {
                        break;
                    }
                    kept += sizes[i] as f64;
                    kept_mass += mass[i].to_f64();
                }
            }
            kept_sum += kept / n_key;
            mass_sum += kept_mass;
        }
    }
    let n = (layer.n_head_kv * layer.n_query) as f64;
    ((kept_sum / n) as f32, (mass_sum / n) as f32)
}

#[cfg(test)]
#[path = "calibrate_tests.rs"]
mod tests;
