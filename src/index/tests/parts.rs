//! Parts that break a rule are refused by the writer, by name.

use half::f16;

use super::*;
use crate::index::sample::owned;

/// A change that breaks a rule, and a word of the message it must give.
type Case = (&'static str, fn(&mut IndexParts));

#[test]
fn each_broken_rule_is_named() {
    let cases: [Case; 51] = [
        ("leave none to cluster", |p| p.meta.n_window = 21),
        ("leave none to cluster", |p| (p.meta.n_sink, p.meta.n_window) = (u32::MAX, u32::MAX)),
        ("token id -1", |p| p.meta.tokens[5] = -1),
        ("no layer", |p| p.layers.clear()),
        ("ascending", |p| p.layers[1].shape.layer = 0),
        ("the model has 1 layers", |p| p.meta.n_layer = 1),
        ("the model has 0 layers", |p| p.meta.n_layer = 0),
        ("both indexed and dense", |p| p.meta.dense_layers[0].0 = 1),
        ("dense layers are not ascending", |p| p.meta.dense_layers.push((2, String::new()))),
        ("cluster share", |p| p.meta.build.cluster_share = 0.0),
        ("RoPE", |p| p.meta.rope.freq_base = f32::INFINITY),
        ("scale NaN", |p| p.layers[0].shape.scale = f32::NAN),
        ("19 clusters for 18 keys", |p| p.layers[0].shape.n_cluster = 19),
        ("6 coarse clusters over 5", |p| p.layers[0].shape.n_coarse = 6),
        ("coarse data without", |p| p.layers[0].shape.n_coarse = 0),
        ("budgets", |p| p.meta.calibration[1].budget = 0.01),
        ("budget 1.5", |p| p.meta.calibration[3].budget = 1.5),
        ("threshold NaN", |p| p.meta.calibration[0].threshold = f32::NAN),
        ("share outside", |p| p.meta.calibration[0].kept = 1.1),
        ("share outside", |p| p.meta.calibration[2].mass = f32::NAN),
        ("5 KV heads", |p| p.meta.calibration[2].heads.push(HeadShares::default())),
        ("share outside", |p| p.meta.calibration[1].heads[3].kept = -0.1),
        ("share outside", |p| p.meta.calibration[1].heads[0].mass = f32::NAN),
        ("share outside", |p| p.meta.calibration[3].heads[2].budget_mass = 1.1),
        ("masses of mass mode's table", |p| p.meta.mass_targets[1].mass = 0.5),
        ("mass 1,", |p| p.meta.mass_targets[2].mass = 1.0),
        ("targets", |p| p.meta.mass_targets[2].target = 0.1),
        ("target NaN", |p| p.meta.mass_targets[0].target = f32::NAN),
        ("blk.1.centroids has 39", |p| p.layers[1].centroids.truncate(39)),
        ("blk.0.members", |p| p.layers[0].members.push(3)),
        ("blk.0.variances", |p| p.layers[0].variances.clear()),
        ("mean value", |p| p.layers[0].mean_values[1] = f16::INFINITY),
        ("radius -1", |p| p.layers[1].radii[3] = -1.0),
        ("variance scale", |p| p.layers[1].variance_scales[3] = f32::NAN),
        ("cluster offsets", |p| p.layers[0].offsets[1] = 0),
        ("coarse offsets", |p| p.layers[0].coarse_offsets[1] = 5),
        ("layer 1: the coarse centroids", |p| p.layers[1].coarse_centroids[15] = f16::ONE),
        ("layer 0: the coarse centroids", |p| p.layers[0].coarse_centroids.truncate(15)),
        ("members", |p| p.layers[1].members[20] = 2),
        ("elements of K", |p| p.sketch.k_dims[0] = 8),
        ("of V per token, not 1 to 64", |p| p.sketch.v_dims.clear()),
        ("tolerance", |p| p.sketch.tolerance = 0.0),
        ("tolerance", |p| p.sketch.tolerance = f32::NAN),
        ("tolerance", |p| p.sketch.tolerance = 0.11),
        ("65 elements of K", |p| p.sketch.k_dims = (0..65).collect()),
        ("blocks of 3 elements of K", |p| p.sketch.k_block = 3),
        ("blocks of 8 elements of V", |p| p.sketch.v_block = 8),
        ("0 peaks of K", |p| p.sketch.k_peaks.clear()),
        ("below 0", |p| p.sketch.v_peaks[0] = -half::f16::ONE),
        ("rows of 7 elements", |p| p.probes[0].k.truncate(28)),
        ("probe's tokens", |p| p.probes[0].tokens[3] = 24),
    ];
    to_bytes(&small()).unwrap();
    for (expected, change) in cases {
        let mut parts = small();
        change(&mut parts);
        let what = invalid(to_bytes(&parts));
        assert!(what.contains(expected), "{expected:?} is not in {what:?}");
    }
}

#[test]
fn a_cluster_with_unsorted_members_is_refused() {
    let mut parts = sample_parts(1, 8, 1, 1, 1, 1, 1);
    parts.layers[0].members.swap(2, 3);
    assert!(invalid(to_bytes(&parts)).contains("ascending inside a cluster"));
}

#[test]
fn a_probe_may_be_of_a_layer_that_is_not_indexed() {
    let mut parts = small();
    parts.probes.push(ProbeParts { layer: 2, tokens: vec![1], k: vec![f16::ONE; 6] });
    let index = open(&to_bytes(&parts).unwrap()).unwrap();
    assert_eq!(owned(&index), parts);
}

#[test]
fn coarse_centroids_are_weighted_means_of_fine_ones() {
    let mut parts = sample_parts(1, 32, 1, 1, 2, 1, 3);
    let (n_sink, layer) = (parts.meta.n_sink, &mut parts.layers[0]);
    layer.shape.n_coarse = 2;
    (layer.offsets, layer.coarse_offsets) = (vec![0, 1, 4, 24], vec![0, 2, 3]);
    layer.members = (n_sink..n_sink + 24).collect();
    // Alone the largest number stays what it is; beside it 3 keys weigh three times as much as 1.
    layer.centroids = [8.0, f32::from(f16::MAX), 4.0, f32::from(f16::MAX), 0.1, -3.0].map(f16::from_f32).to_vec();
    layer.coarse_centroids = [5.0, f32::from(f16::MAX), 0.1, -3.0].map(f16::from_f32).to_vec();
    let index = open(&to_bytes(&parts).unwrap()).unwrap();
    assert_eq!(index.layer(0).unwrap().coarse_centroids, parts.layers[0].coarse_centroids);
}
