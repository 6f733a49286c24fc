//! Thresholds and targets on real and synthetic scores.

use super::super::index_layer;
use super::super::tests::{capture, settings};
use half::f16;

use super::*;

/// A layer of clusters of 10 keys whose scores fall off from `top` by `ratio` each, the same for every query.
fn synthetic(n_head_kv: u32, n_cluster: u32, top: f32, ratio: f32, n_sink: u32) -> LayerScores {
    let n_query = 3;
    let rows = (n_head_kv * n_query) as usize;
    let row: Vec<f32> = (0..n_cluster).map(|i| top * ratio.powi(i as i32)).collect();
    LayerScores {
        layer: 0,
        n_head_kv,
        n_cluster,
        n_query,
        n_sink,
        n_clustered: 10 * n_cluster,
        sizes: vec![10; (n_head_kv * n_cluster) as usize],
        scores: row.repeat(rows),
        sink_share: vec![0.5; rows],
        sink_mass: vec![0.5; rows],
        mass: vec![f16::from_f32(0.5 / n_cluster as f32); rows * n_cluster as usize],
    }
}

#[test]
fn a_threshold_keeps_the_clusters_at_or_above_it() {
    // 100 clusters of 10 keys, no sinks: a fifth is the first 20 clusters, so T is the 20th score.
    let layer = synthetic(1, 100, 0.01, 0.9, 0);
    let row = &calibrate(std::slice::from_ref(&layer), &[0.2]).budgets[0];
    assert_eq!(row.threshold, layer.scores[19]);
    assert!((row.kept - 0.2).abs() < 1e-6 && (row.mass - 0.6).abs() < 1e-3, "{row:?}");
    assert_eq!((row.heads.len(), row.heads[0].kept, row.heads[0].mass), (1, row.kept, row.mass));
    // The first 20 clusters, as in budget mode.
    assert!((row.heads[0].budget_mass - row.mass).abs() < 1e-6);
}

#[test]
fn sinks_count_as_kept_keys() {
    // 100 sinks of 1100 keys: a fifth is 220 keys, 120 of them in 12 clusters.
    let layer = synthetic(1, 100, 0.01, 0.9, 100);
    let row = &calibrate(std::slice::from_ref(&layer), &[0.2]).budgets[0];
    assert_eq!(row.threshold, layer.scores[11]);
    // A budget below the sinks' share keeps nothing else.
    let row = &calibrate(std::slice::from_ref(&layer), &[0.05]).budgets[0];
    assert!(row.threshold > layer.scores[0] && row.threshold < 1.001 * layer.scores[0]);
    assert!((row.kept - 100.0 / 1100.0).abs() < 1e-6);
}

#[test]
fn one_threshold_serves_all_layers_with_a_floor_in_each() {
    // All of the first layer's scores are above all of the second's: at 0.2 it gets everything, the second the floor.
    let layers = [synthetic(2, 100, 0.9, 0.999, 0), synthetic(2, 100, 1e-6, 0.9, 0)];
    let row = &calibrate(&layers, &[0.2]).budgets[0];
    let kept: Vec<f32> = row.heads.iter().map(|h| h.kept).collect();
    assert!(kept[..2].iter().all(|kept| (kept - 0.4).abs() < 1e-6), "{row:?}");
    assert!(kept[2..].iter().all(|kept| (kept - THRESHOLD_FLOOR).abs() < 1e-6), "{row:?}");
    assert!((row.kept - (0.4 + THRESHOLD_FLOOR) / 2.0).abs() < 1e-6);
}

#[test]
fn the_floor_takes_the_best_clusters() {
    let mut layer = synthetic(1, 100, 1e-6, 0.9, 0);
    layer.mass[7] = f16::from_f32(0.25);
    layer.scores[7] = 2e-6;
    let mass = |layer: &LayerScores| measure(layer, 0, 1.0, THRESHOLD_FLOOR).1;
    let with = mass(&layer);
    layer.scores[7] = 0.0;
    assert!(with > mass(&layer) + 0.05, "the cluster of much mass was the best of query 0");
}

#[test]
fn equal_scores_stand_or_fall_together() {
    let row = &calibrate(&[synthetic(1, 100, 0.01, 1.0, 0)], &[0.2, 0.6]).budgets[..];
    // Nothing (then the floor's share) is nearer to 0.2 than everything; everything is nearer to 0.6.
    assert!((row[0].kept - THRESHOLD_FLOOR).abs() < 1e-6 && row[0].threshold > 0.01, "{row:?}");
    assert!((row[1].kept - 1.0).abs() < 1e-6 && row[1].threshold == 0.01, "{row:?}");
}

#[test]
fn thresholds_fall_and_kept_follows_the_budget() {
    let scores: Vec<LayerScores> = (0..3)
        .map(|seed| index_layer(&capture(2100, 30, 2, 2, seed), &settings(16, 30), &|_| ()).unwrap().scores)
        .collect();
    let table = calibrate(&scores, &BUDGETS).budgets;
    assert_eq!(table.iter().map(|r| r.budget).collect::<Vec<_>>(), BUDGETS);
    for pair in table.windows(2) {
        assert!(pair[0].threshold > pair[1].threshold && pair[0].kept < pair[1].kept && pair[0].mass < pair[1].mass);
    }
    for row in &table {
        assert_eq!(row.heads.len(), 6);
        assert!(row.mass > row.kept && row.mass <= 1.001, "{row:?}");
    }
    // The token-mean scores, to which T is fitted, keep what was asked.
    let mean = mean_scores(&scores);
    for row in &table {
        let clusters: u32 = mean.iter().filter(|c| c.0 >= row.threshold).map(|c| c.1).sum();
        let kept = (clusters as f32 / 6.0 + 16.0) / 2070.0;
        assert!((kept - row.budget).abs() < 0.005, "{kept} {}", row.budget);
    }
}

#[test]
fn no_layers_give_no_table() {
    assert_eq!(calibrate(&[], &BUDGETS), Tables::default());
}

#[test]
fn a_target_is_where_the_true_mass_is_as_asked() {
    // Sinks hold a half by the estimate and in truth, 100 clusters 0.005 each in truth; by the estimate that too in the first
    // layer, half of it in the second. At an estimate of t the first keeps t, the second 2 t - 0.5, until it has all at 0.75.
    let mut layers = [synthetic(1, 100, 0.0005, 1.0, 16), synthetic(1, 100, 0.00025, 1.0, 16)];
    let tables = calibrate(&layers, &[0.2]);
    for row in &tables.masses {
        let expected = match row.mass {
            0.5 => 0.0,
            mass if mass < 0.86 => (mass + 0.25) / 1.5,
            mass => 2.0 * mass - 1.0,
        };
        assert!((row.target - expected).abs() < 0.02, "{row:?}, not {expected}");
    }
    for (low, high) in tables.masses.iter().zip(&tables.masses[1..]) {
        assert!(low.target <= high.target && low.kept <= high.kept, "{low:?} {high:?}");
    }
    // Where the sinks have it all, nothing else is needed.
    layers.iter_mut().for_each(|layer| layer.sink_mass.fill(1.0));
    assert!(calibrate(&layers, &[0.2]).masses.iter().all(|row| row.target == 0.0 && row.kept < 0.02));
}

#[test]
fn targets_keep_the_mass_asked_for_on_the_window() {
    let scores: Vec<LayerScores> = (0..3)
        .map(|seed| index_layer(&capture(2100, 30, 2, 2, seed), &settings(16, 30), &|_| ()).unwrap().scores)
        .collect();
    for row in calibrate(&scores, &[0.2]).masses {
        let mut missed = Vec::new();
        for layer in &scores {
            for (h, w) in (0..2).flat_map(|h| (0..30).map(move |w| (h, w))) {
                let range = layer.clusters(h, w);
                let mut order: Vec<usize> = range.clone().collect();
                order.sort_by(|a, b| layer.scores[*b].total_cmp(&layer.scores[*a]));
                let at = h * 30 + w;
                let (mut estimate, mut mass) = (layer.sink_share[at] as f64, layer.sink_mass[at] as f64);
                for i in order {
                    if estimate >= row.target as f64 {
                        break;
                    }
                    estimate += layer.scores[i] as f64 * layer.head_sizes(h)[i - range.start] as f64;
                    mass += layer.mass[i].to_f64();
                }
                missed.push(1.0 - mass);
            }
        }
        let mean = missed.iter().sum::<f64>() / missed.len() as f64;
        let asked = 1.0 - row.mass as f64;
        assert!((mean / asked - 1.0).abs() < 0.05, "{row:?}: {mean} is missed");
    }
}
