//! Scores against the definition in f64, and thresholds on real and synthetic scores.

use super::super::tests::{capture, settings};
use super::super::{index_layer, BuiltLayer, LayerCapture};
use super::*;
use crate::index::LayerParts;

/// `(score, mass)` of every cluster and the sinks' mass, for one query and KV head, straight from the definition.
fn defined(parts: &LayerParts, c: &LayerCapture, n_sink: usize, w: usize, h: usize) -> (Vec<f64>, Vec<f64>, f64) {
    let (d, n, g) = (24, parts.shape.n_cluster as usize, c.n_group as usize);
    let heads = c.n_head_kv as usize;
    let view = parts.view();
    let size = |i: usize| (view.head_offsets(h)[i + 1] - view.head_offsets(h)[i]) as f64;
    let (mut score, mut mass, mut sink_mass) = (vec![0.0; n], vec![0.0; n], 0.0);
    for r in 0..g {
        let q: Vec<f64> = c.q[((w * heads + h) * g + r) * d..][..d].iter().map(|&x| x as f64).collect();
        let dot = |x: &[f16]| -> f64 { q.iter().zip(x).map(|(a, b)| a * b.to_f64()).sum::<f64>() * c.scale as f64 };
        let sinks: f64 = (0..n_sink).map(|s| dot(&c.k[(s * heads + h) * d..][..d]).exp()).sum();
        let plain = |i: usize| dot(&parts.centroids[(h * n + i) * d..][..d]);
        let wide = |i: usize| {
            let scale = parts.variance_scales[h * n + i] as f64;
            let var = &parts.variances[(h * n + i) * d..][..d];
            let s2: f64 = q.iter().zip(var).map(|(a, &v)| a * a * v as f64 * scale).sum();
            plain(i) + SPREAD_ALPHA as f64 * c.scale as f64 * s2.sqrt()
        };
        let z_plain = sinks + (0..n).map(|i| size(i) * plain(i).exp()).sum::<f64>();
        let z_wide = sinks + (0..n).map(|i| size(i) * wide(i).exp()).sum::<f64>();
        sink_mass += sinks / z_plain / g as f64;
        for i in 0..n {
            score[i] += wide(i).exp() / z_wide / g as f64;
            mass[i] += size(i) * plain(i).exp() / z_plain / g as f64;
        }
    }
    (score, mass, sink_mass)
}

#[test]
fn scores_follow_the_definition() {
    for n_sink in [0, 6] {
        let c = capture(260, 11, 2, 3, 4);
        let BuiltLayer { parts, scores, .. } = index_layer(&c, &settings(n_sink, 11), &|_| ()).unwrap();
        for (h, w) in [(0, 0), (1, 0), (0, 10), (1, 7)] {
            let (score, mass, sink_mass) = defined(&parts, &c, n_sink as usize, w, h);
            let range = scores.clusters(h, w);
            for (i, at) in range.enumerate() {
                assert!((scores.scores[at] as f64 / score[i] - 1.0).abs() < 1e-4);
                assert!((scores.mass[at].to_f64() / mass[i] - 1.0).abs() < 2e-3);
            }
            assert!((scores.sink_mass[h * 11 + w] as f64 - sink_mass).abs() < 1e-5);
        }
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let mut c = capture(260, 5, 1, 2, 4);
    c.q.iter_mut().for_each(|x| *x *= 1e4);
    let scores = index_layer(&c, &settings(6, 5), &|_| ()).unwrap().scores;
    assert!(scores.scores.iter().all(|x| x.is_finite()));
    for w in 0..5 {
        let mass: f32 = scores.mass[scores.clusters(0, w)].iter().map(|x| x.to_f32()).sum();
        assert!((mass + scores.sink_mass[w] - 1.0).abs() < 1e-2);
    }
    assert!(calibrate(&[scores], &[0.2])[0].threshold > 0.0);
}

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
        sink_mass: vec![0.5; rows],
        mass: vec![f16::from_f32(0.5 / n_cluster as f32); rows * n_cluster as usize],
    }
}

#[test]
fn a_threshold_keeps_the_clusters_at_or_above_it() {
    // 100 clusters of 10 keys, no sinks: a fifth is the first 20 clusters, so T is the 20th score.
    let layer = synthetic(1, 100, 0.01, 0.9, 0);
    let row = &calibrate(std::slice::from_ref(&layer), &[0.2])[0];
    assert_eq!(row.threshold, layer.scores[19]);
    assert!((row.kept - 0.2).abs() < 1e-6 && (row.mass - 0.6).abs() < 1e-3, "{row:?}");
    assert_eq!(row.layer_kept, [row.kept]);
}

#[test]
fn sinks_count_as_kept_keys() {
    // 100 sinks of 1100 keys: a fifth is 220 keys, 120 of them in 12 clusters.
    let layer = synthetic(1, 100, 0.01, 0.9, 100);
    let row = &calibrate(std::slice::from_ref(&layer), &[0.2])[0];
    assert_eq!(row.threshold, layer.scores[11]);
    // A budget below the sinks' share keeps nothing else.
    let row = &calibrate(std::slice::from_ref(&layer), &[0.05])[0];
    assert!(row.threshold > layer.scores[0] && row.threshold < 1.001 * layer.scores[0]);
    assert!((row.kept - 100.0 / 1100.0).abs() < 1e-6);
}

#[test]
fn one_threshold_serves_all_layers_with_a_floor_in_each() {
    // All of the first layer's scores are above all of the second's: at 0.2 it gets everything, the second the floor.
    let layers = [synthetic(2, 100, 0.9, 0.999, 0), synthetic(2, 100, 1e-6, 0.9, 0)];
    let row = &calibrate(&layers, &[0.2])[0];
    assert!((row.layer_kept[0] - 0.4).abs() < 1e-6, "{row:?}");
    assert!((row.layer_kept[1] - THRESHOLD_FLOOR).abs() < 1e-6, "{row:?}");
    assert!((row.kept - (0.4 + THRESHOLD_FLOOR) / 2.0).abs() < 1e-6);
}

#[test]
fn the_floor_takes_the_best_clusters() {
    let mut layer = synthetic(1, 100, 1e-6, 0.9, 0);
    layer.mass[7] = f16::from_f32(0.25);
    layer.scores[7] = 2e-6;
    let mass = |layer: &LayerScores| measure(layer, 1.0).1;
    let with = mass(&layer);
    layer.scores[7] = 0.0;
    assert!(with > mass(&layer) + 0.05, "the cluster of much mass was the best of query 0");
}

#[test]
fn equal_scores_stand_or_fall_together() {
    let row = &calibrate(&[synthetic(1, 100, 0.01, 1.0, 0)], &[0.2, 0.6])[..];
    // Nothing (then the floor's share) is nearer to 0.2 than everything; everything is nearer to 0.6.
    assert!((row[0].kept - THRESHOLD_FLOOR).abs() < 1e-6 && row[0].threshold > 0.01, "{row:?}");
    assert!((row[1].kept - 1.0).abs() < 1e-6 && row[1].threshold == 0.01, "{row:?}");
}

#[test]
fn thresholds_fall_and_kept_follows_the_budget() {
    let scores: Vec<LayerScores> = (0..3)
        .map(|seed| index_layer(&capture(2100, 30, 2, 2, seed), &settings(16, 30), &|_| ()).unwrap().scores)
        .collect();
    let table = calibrate(&scores, &BUDGETS);
    assert_eq!(table.iter().map(|r| r.budget).collect::<Vec<_>>(), BUDGETS);
    for pair in table.windows(2) {
        assert!(pair[0].threshold > pair[1].threshold && pair[0].kept < pair[1].kept && pair[0].mass < pair[1].mass);
    }
    for row in &table {
        assert_eq!(row.layer_kept.len(), 3);
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
    assert_eq!(calibrate(&[], &BUDGETS), Vec::new());
}
