//! Tables of an index, from its window's queries: thresholds, one for all layers and heads with a floor per KV head, and
//! targets of mass mode, likewise one for all. What they keep is counted in true attention mass.

use rayon::prelude::*;

use super::window::LayerScores;
use crate::config::THRESHOLD_FLOOR;
use crate::index::{Calibration, HeadShares, MassTarget};

/// Nominal shares of the prefix keys that an index is calibrated for.
pub const BUDGETS: [f32; 8] = [0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5];

/// Shares of the attention mass that mass mode is calibrated for.
pub const MASSES: [f32; 11] = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99];

/// Targets that are tried for them: `1 - exp(-STEP i)`.
const STEP: f64 = 0.05;
const N_TARGET: usize = 281;

/// What calibration gives an index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// One row per budget, in the order asked for.
    pub budgets: Vec<Calibration>,
    /// One row per mass of `MASSES`.
    pub masses: Vec<MassTarget>,
}

/// One global threshold per budget and one global target per mass; no rows if no query was scored.
///
/// T is taken from the scores averaged over the window's queries: the cut that brings the kept share of the `P - W` keys
/// (sinks counted) nearest to the budget, over all layers and heads. (Cut from single queries' scores, more than
/// the budget is kept later.) What is reported as kept and as mass is measured query by query, with the floor. A target is
/// where estimating stops with the true mass as asked for, on average over queries, heads and layers. Layers must
/// share P, S and W.
pub fn calibrate(scores: &[LayerScores], budgets: &[f32]) -> Tables {
    if scores.iter().all(|layer| layer.n_query == 0) {
        return Tables::default();
    }
    let mean = mean_scores(scores);
    let heads: Vec<(&LayerScores, usize)> =
        scores.iter().flat_map(|layer| (0..layer.n_head_kv as usize).map(move |h| (layer, h))).collect();
    let walks: Vec<Walk> = heads.par_iter().map(|(layer, h)| walk(layer, *h, budgets)).collect();
    let row = |(b, &budget): (usize, &f32)| {
        let threshold = threshold(scores, &mean, budget);
        let floor = THRESHOLD_FLOOR.min(budget / 2.0);
        let measured = heads.par_iter().map(|(layer, h)| measure(layer, *h, threshold, floor));
        let measured: Vec<(f32, f32)> = measured.collect();
        let shares = measured.iter().zip(&walks).map(|((kept, mass), walk)| HeadShares {
            kept: *kept,
            mass: *mass,
            budget_mass: walk.budget_mass[b] as f32,
        });
        let average = |x: fn(&(f32, f32)) -> f32| measured.iter().map(x).sum::<f32>() / measured.len() as f32;
        let (kept, mass) = (average(|m| m.0), average(|m| m.1));
        Calibration { budget, threshold, kept, mass, heads: shares.collect() }
    };
    Tables { budgets: budgets.iter().enumerate().map(row).collect(), masses: targets(&walks) }
}

/// What one KV head keeps as clusters are added best first, mean over the window's queries.
struct Walk {
    /// True mass when each budget is reached.
    budget_mass: Vec<f64>,
    /// True mass and share of the keys when the estimated mass reaches each target.
    mass: Vec<f64>,
    kept: Vec<f64>,
}

fn target(i: usize) -> f64 {
    1.0 - (-STEP * i as f64).exp()
}

fn walk(layer: &LayerScores, h: usize, budgets: &[f32]) -> Walk {
    let (n_key, sizes, n_query) = (layer.n_key(), layer.head_sizes(h), layer.n_query as usize);
    let wanted: Vec<f64> = budgets.iter().map(|b| (*b as f64 * n_key).round()).collect();
    let mut out = Walk { budget_mass: vec![0.0; budgets.len()], mass: vec![0.0; N_TARGET], kept: vec![0.0; N_TARGET] };
    for w in 0..n_query {
        let (scores, masses) = (&layer.scores[layer.clusters(h, w)], &layer.mass[layer.clusters(h, w)]);
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_unstable_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
        let mut estimate = layer.sink_share[h * n_query + w] as f64;
        let (mut keys, mut mass) = (layer.n_sink as f64, layer.sink_mass[h * n_query + w] as f64);
        let (mut order, mut b, mut t) = (order.into_iter(), 0, 0);
        loop {
            let next = order.next();
            while b < wanted.len() && (keys >= wanted[b] || next.is_none()) {
                out.budget_mass[b] += mass / n_query as f64;
                b += 1;
            }
            while t < N_TARGET && (estimate >= target(t) || next.is_none()) {
                out.mass[t] += mass / n_query as f64;
                out.kept[t] += keys / n_key / n_query as f64;
                t += 1;
            }
            let Some(i) = next.map(|i| i as usize) else { break };
            estimate += scores[i] as f64 * sizes[i] as f64;
            keys += sizes[i] as f64;
            mass += masses[i].to_f64();
        }
    }
    out
}

/// The target of each of `MASSES`: interpolated in the logarithm of what is missed.
fn targets(walks: &[Walk]) -> Vec<MassTarget> {
    let mean = |of: fn(&Walk) -> &[f64], i: usize| walks.iter().map(|w| of(w)[i]).sum::<f64>() / walks.len() as f64;
    let mass: Vec<f64> = (0..N_TARGET).map(|i| mean(|w| &w.mass, i)).collect();
    let row = |&wanted: &f32| {
        let i = mass.partition_point(|m| *m < wanted as f64).min(N_TARGET - 1);
        let before = i.saturating_sub(1);
        let rise = mass[i] - mass[before];
        let part = if rise > 0.0 { ((wanted as f64 - mass[before]) / rise).clamp(0.0, 1.0) } else { 0.0 };
        let kept = mean(|w| &w.kept, before) * (1.0 - part) + mean(|w| &w.kept, i) * part;
        let target = 1.0 - (-STEP * (before as f64 + part * (i - before) as f64)).exp();
        MassTarget { mass: wanted, target: target as f32, kept: kept as f32 }
    };
    MASSES.iter().map(row).collect()
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

/// Kept share of the `P - W` keys and of the true mass in one KV head: mean over its queries.
fn measure(layer: &LayerScores, h: usize, threshold: f32, floor: f32) -> (f32, f32) {
    let (n_key, sizes, n_query) = (layer.n_key(), layer.head_sizes(h), layer.n_query as usize);
    let floor = (floor as f64 * n_key).round();
    let (mut kept_sum, mut mass_sum) = (0.0, 0.0);
    for w in 0..n_query {
        let (scores, mass) = (&layer.scores[layer.clusters(h, w)], &layer.mass[layer.clusters(h, w)]);
        let mut kept = layer.n_sink as f64;
        let mut kept_mass = layer.sink_mass[h * n_query + w] as f64;
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
    let n = n_query as f64;
    ((kept_sum / n) as f32, (mass_sum / n) as f32)
}

#[cfg(test)]
#[path = "calibrate_tests.rs"]
mod tests;
