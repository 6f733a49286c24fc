//! Extension: recall and cost against fresh builds, invariants, untouched clusters, every error.

use proptest::prelude::*;

use super::super::tests::{capture, capture_of, settings};
use super::super::{index_layer, probe, probe_tokens, sample, sketch, LayerScores};
use super::*;
use crate::index::sample::sample_parts;
use crate::index::{to_bytes, Index, IndexParts};

const W: usize = 20;

/// The prefix of `n` tokens out of one long text, with the queries of its own end.
fn text(n: usize) -> LayerCapture {
    sample::prefix(n, W, 1, 2, 64, 11)
}

fn extend(old: &BuiltLayer, capture: &LayerCapture, settings: &Settings) -> BuiltLayer {
    extend_layer(&old.parts.view(), capture, settings, &|_| ()).unwrap()
}

fn build(capture: &LayerCapture, settings: &Settings) -> BuiltLayer {
    index_layer(capture, settings, &|_| ()).unwrap()
}

/// Short prefixes, and one that becomes long on the way.
#[test]
fn ten_extensions_keep_the_recall_and_cost_a_fraction() {
    let settings = settings(16, W as u32);
    for (first, step) in [(4000, 800), (15_500, 1000)] {
        let mut built = build(&text(first), &settings);
        let mut products = 0;
        for i in 1..=10 {
            built = extend(&built, &text(first + i * step), &settings);
            products += built.products;
        }
        let capture = text(first + 10 * step);
        let fresh = build(&capture, &settings);
        assert_eq!(built.parts.shape, fresh.parts.shape);
        assert!(products < fresh.products, "{products} {}", fresh.products);
        for budget in [0.1, 0.2] {
            let recall = |b: &BuiltLayer| sample::recall(&b.parts.view(), &b.scores, &capture, budget)[0];
            let (extended, fresh) = (recall(&built), recall(&fresh));
            assert!(extended > fresh - 0.015, "{first}, budget {budget}: {extended} {fresh}");
        }
    }
}

/// Multiply-adds: not twice as many behind a prefix four times as long, and not twice as many as for the new part alone.
#[test]
fn the_cost_is_in_proportion_to_the_new_part() {
    let settings = settings(16, W as u32);
    let base = [build(&text(16_600), &settings), build(&text(66_400), &settings)];
    let cost = |old: &BuiltLayer, n: usize| extend(old, &text(n), &settings).products as f64;
    let (one, longer, more) = (cost(&base[0], 17_100), cost(&base[1], 66_900), cost(&base[0], 18_600));
    assert!(longer < 2.0 * one, "{one} {longer}");
    let alone = build(&text(2000 + 16 + W), &settings).products as f64;
    assert!(more < 2.0 * alone, "{more} {alone}");
}

#[test]
fn the_same_bytes_with_any_number_of_threads() {
    let (short, long) = (text(2500), text(3000));
    for n_coarse in [Some(0), Some(12)] {
        let with = |n_threads| Settings { n_threads, n_coarse, ..settings(16, W as u32) };
        let old = build(&short, &with(2));
        let one = extend(&old, &long, &with(1));
        for n_threads in [2, 3, 8] {
            assert!(extend(&old, &long, &with(n_threads)) == one, "{n_threads} threads");
        }
    }
}

/// What no key entered or left is copied; the rest is what a summary of the same members gives.
#[test]
fn untouched_clusters_keep_their_bytes() {
    for n_coarse in [Some(0), Some(12)] {
        let settings = Settings { n_coarse, ..settings(16, W as u32) };
        let (old, new) =
            (build(&text(4000), &settings), extend(&build(&text(4000), &settings), &text(4040), &settings));
        let (old, new, capture) = (old.parts.view(), new.parts.view(), text(4040));
        let members = |v: &LayerView, c: usize| {
            let run = v.head_offsets(0)[c] as usize..v.head_offsets(0)[c + 1] as usize;
            run.map(|j| v.member(0, j)).collect::<Vec<u32>>()
        };
        let before: HashMap<Vec<u32>, usize> =
            (0..old.shape.n_cluster as usize).map(|c| (members(&old, c), c)).collect();
        let (keys, values) = super::super::head_rows(&capture, 0, 0);
        let (mut kept, same) = (0, |a: &Summary, b: &Summary| {
            (&a.centroid, &a.mean_value, &a.variances, a.variance_scale, a.radius)
                == (&b.centroid, &b.mean_value, &b.variances, b.variance_scale, b.radius)
        });
        for c in 0..new.shape.n_cluster as usize {
            let stored = Summary::stored(&new, 0, c);
            let own = members(&new, c);
            assert!(same(&stored, &summary::summarise_one(keys, values, &own)), "cluster {c}");
            if let Some(&from) = before.get(&own) {
                assert!(same(&stored, &Summary::stored(&old, 0, from)), "cluster {c}");
                kept += 1;
            }
        }
        assert!(kept > 150 && kept < old.shape.n_cluster, "{kept} of {}", old.shape.n_cluster);
    }
}

/// An index file of captures: the tokens are numbered by position, as far as `n` goes.
fn file(layers: Vec<BuiltLayer>, sketch: SketchParts, capture: &LayerCapture, settings: &Settings) -> IndexParts {
    let n = capture.k.len() / capture.row_k();
    let mut parts = sample_parts(1, 120, 1, 1, 24, 20, 3);
    parts.meta.tokens = (0..n as i32).collect();
    (parts.meta.n_sink, parts.meta.n_window, parts.meta.n_layer) = (settings.n_sink, settings.n_window, 6);
    parts.meta.build.cluster_share = settings.cluster_share;
    (parts.meta.build.seed, parts.meta.build.iterations) = (settings.seed, settings.iterations);
    let (layers, scores): (Vec<_>, Vec<LayerScores>) = layers.into_iter().map(|l| (l.parts, l.scores)).unzip();
    parts.layers = layers;
    parts.meta.dense_layers.clear();
    let tables = super::super::calibrate(&scores, &super::super::BUDGETS);
    (parts.meta.calibration, parts.meta.mass_targets) = (tables.budgets, tables.masses);
    parts.sketch = sketch;
    parts.probes = vec![probe(capture, &probe_tokens(n, settings))];
    parts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn extended_indexes_are_valid(
        n in 30usize..250, more in 1usize..250, share in 0.01f32..1.0, coarse in 0u32..12, later in 0u32..12, seed: u64,
    ) {
        let whole = capture(n + more, 8, 2, 2, seed);
        let part = capture_of(&whole, n);
        let settings = Settings { cluster_share: share, iterations: 3, n_coarse: Some(coarse), ..settings(4, 8) };
        let first = file(vec![build(&part, &settings)], sketch(&part).unwrap(), &part, &settings);
        let old = Index::from_bytes(to_bytes(&first).unwrap()).unwrap();
        prop_assert_eq!(Settings { n_coarse: Some(coarse), ..Settings::of_index(old.meta(), 2) }, settings.clone());
        let settings = Settings { n_coarse: Some(later), ..settings };
        let layer = extend_layer(&old.layer(5).unwrap(), &whole, &settings, &|_| ()).unwrap();
        let shape = layer.parts.shape;
        let expected = super::super::n_cluster(n + more - 12, &settings);
        prop_assert_eq!(shape.n_cluster as usize, expected.max(first.layers[0].shape.n_cluster as usize));
        prop_assert!(shape.n_coarse >= first.layers[0].shape.n_coarse);
        let extended = file(vec![layer], extend_sketch(&old.sketch(), &whole).unwrap(), &whole, &settings);
        check_extension(old.meta(), &extended.meta).unwrap();
        Index::from_bytes(to_bytes(&extended).unwrap()).unwrap();
    }
}

#[test]
fn an_extended_sketch_keeps_the_elements_and_takes_the_new_rows() {
    let whole = capture(400, 8, 2, 2, 5);
    let part = capture_of(&whole, 300);
    let old = sketch(&part).unwrap();
    let new = extend_sketch(&old.view(), &whole).unwrap();
    assert_eq!((&new.k_dims, &new.v_dims, new.tolerance), (&old.k_dims, &old.v_dims, old.tolerance));
    let at = |data: &[f16], row: usize, p: usize, d: u32| data[p * row + d as usize];
    for p in [0, 299, 300, 399] {
        let k: Vec<f16> = new.k_dims.iter().map(|&d| at(&whole.k, whole.row_k(), p, d)).collect();
        let v: Vec<f16> = new.v_dims.iter().map(|&d| at(&whole.v, whole.row_v(), p, d)).collect();
        assert_eq!((&new.k[p * k.len()..][..k.len()], &new.v[p * v.len()..][..v.len()]), (&k[..], &v[..]));
    }
    let fresh = sketch(&whole).unwrap();
    assert_eq!((new.k_peaks, new.v_peaks), (fresh.k_peaks, fresh.v_peaks));
}

#[test]
fn what_does_not_continue_the_old_sketch_is_refused() {
    let whole = capture(400, 8, 2, 2, 5);
    let old = sketch(&capture_of(&whole, 300)).unwrap();
    let refuse = |capture: &LayerCapture| extend_sketch(&old.view(), capture).unwrap_err();
    assert_eq!(refuse(&capture_of(&whole, 300)), BuildError::NotContinued { token: 300, n_old: 300, n_new: 300 });
    let mut other = whole.clone();
    other.layer = 6;
    assert!(matches!(refuse(&other), BuildError::Differs { what: "the sketched layer", .. }));
    let mut other = whole.clone();
    other.k[77 * 48..78 * 48].iter_mut().for_each(|x| *x = -*x);
    assert!(refuse(&other).to_string().contains("token 77"), "{}", refuse(&other));
    let mut other = whole.clone();
    other.v[40..80].iter_mut().for_each(|x| *x = -*x);
    assert!(matches!(refuse(&other), BuildError::Differs { what: "the values of the old prefix", .. }));
    let mut other = capture(400, 8, 1, 2, 5);
    other.layer = 5;
    assert!(matches!(refuse(&other), BuildError::Differs { what: "the row size", .. }));
}

#[test]
fn other_texts_models_and_settings_are_refused() {
    let mut old = sample_parts(1, 120, 1, 1, 24, 20, 3).meta;
    let mut new = old.clone();
    new.tokens.extend([7, 8, 9]);
    check_extension(&old, &new).unwrap();
    let refuse = |old: &IndexMeta, change: &dyn Fn(&mut IndexMeta)| {
        let mut bad = new.clone();
        change(&mut bad);
        check_extension(old, &bad).unwrap_err()
    };
    let error = refuse(&old, &|m| m.tokens[70] += 1);
    assert_eq!(error, BuildError::NotContinued { token: 70, n_old: 120, n_new: 123 });
    assert!(error.to_string().contains("does not continue"), "{error}");
    for n in [50, 119, 120] {
        let error = refuse(&old, &|m| m.tokens.truncate(n));
        assert_eq!(error, BuildError::NotContinued { token: n, n_old: 120, n_new: n });
    }
    old.model.name = "Other".into();
    let error = refuse(&old, &|m| m.model.fingerprint[0] ^= 1).to_string();
    assert!(error.contains("the model") && error.contains("Other") && error.contains("build a new index"), "{error}");
    type Change = fn(&mut IndexMeta);
    let changes: [(&str, Change); 8] = [
        ("sinks", |m| m.n_sink += 1),
        ("window", |m| m.n_window += 1),
        ("seed", |m| m.build.seed += 1),
        ("iterations", |m| m.build.iterations += 1),
        ("share of clusters", |m| m.build.cluster_share *= 2.0),
        ("chat", |m| m.build.chat = "system".into()),
        ("cache types", |m| m.build.cache_types[1] = "q8_0".into()),
        ("RoPE", |m| m.rope.freq_base = 1e6),
    ];
    for (what, change) in changes {
        let error = refuse(&old, &change).to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_layer_of_another_shape_or_without_new_keys_is_refused() {
    let settings = settings(4, 8);
    let whole = capture(200, 8, 2, 2, 5);
    let old = build(&capture_of(&whole, 150), &settings);
    let refuse = |capture: &LayerCapture| extend_layer(&old.parts.view(), capture, &settings, &|_| ()).unwrap_err();
    for n in [150, 140] {
        let error = refuse(&capture_of(&whole, n));
        assert_eq!(error, BuildError::NotContinued { token: n, n_old: 150, n_new: n });
    }
    let mut other = whole.clone();
    other.scale = 0.3;
    assert!(matches!(refuse(&other), BuildError::Differs { what: "the shape of a layer", .. }));
    let mut other = whole.clone();
    other.k[0] = f16::NAN;
    assert!(matches!(refuse(&other), BuildError::NonFinite { .. }));
    assert!(matches!(refuse(&capture_of(&whole, 12)), BuildError::TooShort { .. }));
}
