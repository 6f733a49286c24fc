//! Scores and masses against their definitions in f64.

use super::super::tests::{capture, settings};
use super::super::{calibrate, index_layer, sample, BuiltLayer, LayerCapture, Settings};
use super::*;
use crate::index::LayerParts;

/// Of every cluster and of all sinks, for one query and KV head, straight from the definitions.
struct Defined {
    score: Vec<f64>,
    sink_share: f64,
    mass: Vec<f64>,
    sink_mass: f64,
}

fn defined(parts: &LayerParts, c: &LayerCapture, n_sink: usize, w: usize, h: usize) -> Defined {
    let (d, n, g) = (24, parts.shape.n_cluster as usize, c.n_group as usize);
    let heads = c.n_head_kv as usize;
    let view = parts.view();
    let offsets = view.head_offsets(h);
    let mut out = Defined { score: vec![0.0; n], sink_share: 0.0, mass: vec![0.0; n], sink_mass: 0.0 };
    for r in 0..g {
        let q: Vec<f64> = c.q[((w * heads + h) * g + r) * d..][..d].iter().map(|&x| x as f64).collect();
        let dot = |x: &[f16]| -> f64 { q.iter().zip(x).map(|(a, b)| a * b.to_f64()).sum::<f64>() * c.scale as f64 };
        let key = |token: usize| dot(&c.k[(token * heads + h) * d..][..d]).exp();
        let sinks: f64 = (0..n_sink).map(key).sum();
        let wide = |i: usize| {
            let scale = parts.variance_scales[h * n + i] as f64;
            let var = &parts.variances[(h * n + i) * d..][..d];
            let s2: f64 = q.iter().zip(var).map(|(a, &v)| a * a * v as f64 * scale).sum();
            dot(&parts.centroids[(h * n + i) * d..][..d]) + SPREAD_ALPHA as f64 * c.scale as f64 * s2.sqrt()
        };
        let members = |i: usize| (offsets[i]..offsets[i + 1]).map(|j| view.member(h, j as usize) as usize);
        let whole: Vec<f64> = (0..n).map(|i| members(i).map(key).sum()).collect();
        let z_wide = sinks + (0..n).map(|i| members(i).count() as f64 * wide(i).exp()).sum::<f64>();
        let z_true = sinks + whole.iter().sum::<f64>();
        out.sink_share += sinks / z_wide / g as f64;
        out.sink_mass += sinks / z_true / g as f64;
        for (i, whole) in whole.iter().enumerate() {
            out.score[i] += wide(i).exp() / z_wide / g as f64;
            out.mass[i] += whole / z_true / g as f64;
        }
    }
    out
}

#[test]
fn scores_and_masses_follow_the_definitions() {
    // The second prefix is longer than a block of keys.
    for (n_prefix, n_sink) in [(260, 0), (260, 6), (2400, 6)] {
        let c = capture(n_prefix, 11, 2, 3, 4);
        let BuiltLayer { parts, scores, .. } = index_layer(&c, &settings(n_sink, 11), &|_| ()).unwrap();
        for (h, w) in [(0, 0), (1, 0), (0, 10), (1, 7)] {
            let want = defined(&parts, &c, n_sink as usize, w, h);
            let range = scores.clusters(h, w);
            for (i, at) in range.enumerate() {
                assert!((scores.scores[at] as f64 / want.score[i] - 1.0).abs() < 1e-4);
                assert!((scores.mass[at].to_f64() - want.mass[i]).abs() < 1e-3 * want.mass[i] + 1e-7);
            }
            assert!((scores.sink_share[h * 11 + w] as f64 - want.sink_share).abs() < 1e-5);
            assert!((scores.sink_mass[h * 11 + w] as f64 - want.sink_mass).abs() < 1e-5);
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
    assert!(calibrate(&[scores], &[0.2]).budgets[0].threshold > 0.0);
}

#[test]
fn long_prefixes_are_scored_by_some_queries() {
    assert_eq!(sampled_queries(100, ALL_QUERIES), (0..100).collect::<Vec<_>>());
    assert_eq!(sampled_queries(100, 2 * ALL_QUERIES), (0..50).map(|i| 2 * i + 1).collect::<Vec<_>>());
    assert_eq!(sampled_queries(100, 1 << 30), (1..=20).map(|i| 5 * i - 1).collect::<Vec<_>>());
    assert_eq!((sampled_queries(11, 1 << 30).len(), sampled_queries(11, 0).len()), (11, 11));
}

#[test]
fn some_queries_calibrate_like_all() {
    let settings = Settings { n_threads: 2, ..Settings::default() };
    let c = sample::prefix(24000, 100, 2, 3, 64, 5);
    let BuiltLayer { parts, scores, .. } = index_layer(&c, &settings, &|_| ()).unwrap();
    assert!(scores.n_query < 100);
    // All of the window's queries, as windows short enough to be scored whole.
    let n = scores.n_query as usize;
    let all: Vec<LayerScores> = (0..100 / n)
        .map(|part| {
            let row = c.q.len() / 100;
            let queries: Vec<f32> = (0..n).flat_map(|i| &c.q[(i * (100 / n) + part) * row..][..row]).copied().collect();
            window_scores(&parts.view(), &c.k, settings.n_sink as usize, &queries)
        })
        .collect();
    let (some, all) = (calibrate(&[scores], &[0.1, 0.2]), calibrate(&all, &[0.1, 0.2]));
    for (some, all) in some.budgets.iter().zip(&all.budgets) {
        assert!((some.kept / all.kept - 1.0).abs() < 0.1 && (some.mass - all.mass).abs() < 0.01, "{some:?} {all:?}");
    }
    for (some, all) in some.masses.iter().zip(&all.masses) {
        assert!((some.kept - all.kept).abs() < 0.1 * all.kept + 0.01, "{some:?} {all:?}");
    }
}
