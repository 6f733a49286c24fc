//! Whole layers: determinism, invariants of `LayerParts`, and every error.

use proptest::prelude::*;

use super::*;

pub(super) fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || (crate::random::split_mix(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
    (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

pub(super) fn capture(n_prefix: usize, n_window: usize, n_head_kv: u32, n_group: u32, seed: u64) -> LayerCapture {
    let (head_dim_k, head_dim_v) = (24, 20);
    let row = |dim: u32| (n_head_kv * dim) as usize;
    let half = |x: Vec<f32>| x.into_iter().map(f16::from_f32).collect();
    LayerCapture {
        layer: 5,
        n_head_kv,
        n_group,
        head_dim_k,
        head_dim_v,
        scale: 0.2,
        k: half(gaussian(n_prefix * row(head_dim_k), seed)),
        v: half(gaussian(n_prefix * row(head_dim_v), seed ^ 7)),
        q: gaussian(n_window * row(head_dim_k) * n_group as usize, seed ^ 9),
    }
}

pub(super) fn settings(n_sink: u32, n_window: u32) -> Settings {
    Settings { n_sink, n_window, n_threads: 2, ..Settings::default() }
}

#[test]
fn the_same_bytes_with_any_number_of_threads() {
    let capture = capture(900, 10, 3, 2, 1);
    let build = |n_threads, seed| {
        let settings = Settings { n_threads, seed, ..settings(16, 10) };
        index_layer(&capture, &settings, &|_| ()).unwrap()
    };
    let one = build(1, 0);
    for n_threads in [0, 2, 3, 8] {
        assert!(build(n_threads, 0) == one, "{n_threads} threads");
    }
    assert!(build(2, 1).parts.members != one.parts.members, "the seed counts");
}

#[test]
fn a_hierarchy_has_the_same_bytes_with_any_number_of_threads() {
    let capture = capture(1900, 10, 2, 2, 1);
    let build = |n_threads| {
        let settings = Settings { n_threads, n_coarse: Some(20), ..settings(16, 10) };
        index_layer(&capture, &settings, &|_| ()).unwrap()
    };
    let one = build(1);
    assert_eq!((one.parts.shape.n_cluster, one.parts.shape.n_coarse), (94, 20));
    for n_threads in [2, 3, 8] {
        assert!(build(n_threads) == one, "{n_threads} threads");
    }
}

#[test]
fn coarse_centroids_are_the_means_of_all_keys_below_to_rounding() {
    let capture = capture(700, 10, 2, 1, 4);
    let settings = Settings { n_coarse: Some(7), ..settings(16, 10) };
    let parts = index_layer(&capture, &settings, &|_| ()).unwrap().parts;
    let (view, dim) = (parts.view(), 24);
    for h in 0..2 {
        for (j, run) in parts.coarse_offsets[h * 8..(h + 1) * 8].windows(2).enumerate() {
            let slots = view.head_offsets(h)[run[0] as usize]..view.head_offsets(h)[run[1] as usize];
            let keys: Vec<usize> = slots.map(|slot| view.member(h, slot as usize) as usize).collect();
            for d in 0..dim {
                let of = |f: fn(f64) -> f64| {
                    keys.iter().map(|t| f(capture.k[(t * 2 + h) * dim + d].to_f64())).sum::<f64>() / keys.len() as f64
                };
                let (mean, size) = (of(|x| x), of(f64::abs));
                let made = parts.coarse_centroids[(h * 7 + j) * dim + d].to_f64();
                assert!((made - mean).abs() <= (size + mean.abs()) / 2000.0, "head {h}, coarse {j}: {made} {mean}");
            }
        }
    }
}

/// Long prefixes are clustered top down by themselves: for a fraction of the work, with nearly the recall of one level.
#[test]
fn long_prefixes_get_a_hierarchy_that_costs_less_and_keeps_the_recall() {
    let capture = sample::prefix(20_000, 20, 1, 2, 64, 3);
    let build = |n_coarse| {
        let settings = Settings { n_coarse, ..settings(16, 20) };
        index_layer(&capture, &settings, &|_| ()).unwrap()
    };
    let (flat, tree) = (build(Some(0)), build(None));
    assert_eq!((flat.parts.shape.n_coarse, tree.parts.shape.n_coarse), (0, 141));
    assert_eq!(flat.parts.shape.n_cluster, tree.parts.shape.n_cluster);
    assert!(6 * tree.products < flat.products, "{} {}", tree.products, flat.products);
    for budget in [0.1, 0.2] {
        let [flat, tree] = [&flat, &tree].map(|b| sample::recall(&b.parts.view(), &b.scores, &capture, budget)[0]);
        assert!(tree > flat - 0.005 && flat > 0.6, "{budget}: {tree} {flat}");
    }
    let short = index_layer(&capture_of(&capture, 16_000), &settings(16, 20), &|_| ()).unwrap();
    assert_eq!(short.parts.shape.n_coarse, 0);
}

/// The first tokens of a capture, with its queries.
pub(super) fn capture_of(capture: &LayerCapture, n_prefix: usize) -> LayerCapture {
    let mut part = capture.clone();
    part.k.truncate(n_prefix * capture.row_k());
    part.v.truncate(n_prefix * capture.row_v());
    part
}

#[test]
fn heads_and_layers_start_from_different_keys() {
    // Two heads with equal keys are clustered differently, because each has its own start.
    let mut c = capture(400, 5, 2, 1, 3);
    for token in c.k.chunks_exact_mut(48) {
        let (first, second) = token.split_at_mut(24);
        second.copy_from_slice(first);
    }
    let parts = index_layer(&c, &settings(4, 5), &|_| ()).unwrap().parts;
    let n = parts.members.len() / 2;
    assert_ne!(parts.members[..n], parts.members[n..]);
}

#[test]
fn progress_rises_to_one() {
    let seen = Mutex::new(vec![0.0]);
    index_layer(&capture(300, 5, 2, 2, 1), &settings(4, 5), &|x| seen.lock().unwrap().push(x)).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.windows(2).all(|w| w[0] < w[1]), "{seen:?}");
    assert_eq!(seen.last(), Some(&1.0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers_keep_every_invariant(
        n in 1usize..300, n_sink in 0u32..20, n_window in 1u32..8, share in 0.01f32..1.0, n_head_kv in 1u32..4, seed: u64,
    ) {
        let n_prefix = n + (n_sink + n_window) as usize;
        let capture = capture(n_prefix, n_window as usize, n_head_kv, 2, seed);
        let settings = Settings { cluster_share: share, iterations: 3, seed, ..settings(n_sink, n_window) };
        let BuiltLayer { parts, scores, .. } = index_layer(&capture, &settings, &|_| ()).unwrap();
        let (shape, heads) = (parts.shape, n_head_kv as usize);
        let c = shape.n_cluster as usize;
        prop_assert_eq!(c, ((share as f64 * n as f64).round() as usize).clamp(1, n));
        prop_assert_eq!((shape.layer, shape.n_head_kv, shape.n_group, shape.n_coarse), (5, n_head_kv, 2, 0));
        prop_assert_eq!((shape.head_dim_k, shape.head_dim_v, shape.scale), (24, 20, 0.2));
        prop_assert_eq!((parts.centroids.len(), parts.variances.len()), (heads * c * 24, heads * c * 24));
        prop_assert_eq!(parts.mean_values.len(), heads * c * 20);
        prop_assert_eq!((parts.variance_scales.len(), parts.radii.len()), (heads * c, heads * c));
        prop_assert!(parts.centroids.iter().chain(&parts.mean_values).all(|x| x.is_finite()));
        prop_assert!(parts.variance_scales.iter().chain(&parts.radii).all(|x| x.is_finite() && *x >= 0.0));
        let view = parts.view();
        for h in 0..heads {
            let offsets = view.head_offsets(h);
            prop_assert!(offsets.windows(2).all(|w| w[0] < w[1]));
            prop_assert_eq!((offsets[0], offsets[c] as usize), (0, n));
            let mut members = parts.members[h * n..(h + 1) * n].to_vec();
            for w in offsets.windows(2) {
                let run = &members[w[0] as usize..w[1] as usize];
                prop_assert!(run.windows(2).all(|m| m[0] < m[1]));
            }
            members.sort_unstable();
            prop_assert!(members.iter().enumerate().all(|(i, &m)| m == n_sink + i as u32));
        }
        prop_assert_eq!(scores.sizes.iter().sum::<u32>() as usize, heads * n);
        prop_assert_eq!(scores.scores.len(), heads * n_window as usize * c);
    }
}

#[test]
fn a_text_that_is_too_short_has_its_own_message() {
    let error = index_layer(&capture(25, 10, 1, 1, 1), &settings(16, 10), &|_| ()).unwrap_err();
    assert_eq!(error, BuildError::TooShort { n_prefix: 25, needed: 27 });
    assert!(error.to_string().contains("longer text"), "{error}");
    index_layer(&capture(27, 10, 1, 1, 1), &settings(16, 10), &|_| ()).unwrap();
}

#[test]
fn broken_captures_are_refused() {
    let good = capture(60, 10, 2, 2, 1);
    let refuse = |change: &dyn Fn(&mut LayerCapture)| {
        let mut bad = good.clone();
        change(&mut bad);
        index_layer(&bad, &settings(16, 10), &|_| ()).unwrap_err()
    };
    let e = refuse(&|c| c.k[17 * 48 + 3] = f16::INFINITY);
    assert_eq!(e, BuildError::NonFinite { layer: 5, what: "key", token: 17 });
    let e = refuse(&|c| c.v[59 * 40] = f16::NAN);
    assert_eq!(e, BuildError::NonFinite { layer: 5, what: "value", token: 59 });
    let e = refuse(&|c| c.q[96 * 3] = f32::NAN);
    assert_eq!(e, BuildError::NonFinite { layer: 5, what: "window query", token: 3 });
    assert!(matches!(refuse(&|c| c.k.truncate(100)), BuildError::Shape { what: "K", .. }));
    assert!(matches!(refuse(&|c| c.v.truncate(800)), BuildError::Shape { what: "V", .. }));
    assert!(matches!(refuse(&|c| c.q.truncate(96)), BuildError::Shape { what: "the window's queries", .. }));
    assert!(matches!(refuse(&|c| c.head_dim_v = 0), BuildError::Shape { what: "a K or V row", .. }));
    assert!(matches!(refuse(&|c| c.scale = f32::NAN), BuildError::Setting { name: "scale", .. }));
}

#[test]
fn unusable_settings_are_refused() {
    let capture = capture(60, 10, 1, 1, 1);
    for share in [0.0, -1.0, 1.5, f32::NAN] {
        let settings = Settings { cluster_share: share, ..settings(16, 10) };
        let error = index_layer(&capture, &settings, &|_| ()).unwrap_err();
        assert!(matches!(error, BuildError::Setting { name: "cluster_share", .. }), "{error}");
    }
    for (name, settings) in
        [("iterations", Settings { iterations: 0, ..settings(16, 10) }), ("n_window", settings(16, 0))]
    {
        let error = index_layer(&capture, &settings, &|_| ()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

/// Without mean values and variances an index is half as large; radii alone serve the spread bonus then.
#[test]
fn the_layers_of_an_index_are_small_beside_their_cache() {
    use crate::index::sample::{add_coarse, sample_parts};
    use crate::index::{to_bytes, Index};
    let settings = Settings::default();
    for (n_prefix, dim) in
        [(1024, 64), (4096, 128), (16500, 64), (16500, 128), (32767, 64), (32767, 128), (32768, 128), (70000, 128)]
    {
        let n = n_prefix - 116;
        let fine = super::n_cluster(n, &settings);
        let coarse = super::n_coarse(n, fine, &settings);
        let mut parts = sample_parts(1, n_prefix, 1, 1, dim, dim, fine);
        if coarse > 0 {
            add_coarse(&mut parts, 2, coarse);
        }
        let index = Index::from_bytes(to_bytes(&parts).unwrap()).unwrap();
        let cache = (n_prefix * 2 * 2 * dim) as f64;
        let whole = index.layer_bytes(0) as f64;
        let both = fine * (2 * dim + dim + 4);
        assert!(whole <= 0.073 * cache, "{n_prefix} x {dim}: {:.2} %", 100.0 * whole / cache);
        let rest = whole - both as f64;
        assert!(rest <= 0.035 * cache, "{n_prefix} x {dim} without both: {:.2} %", 100.0 * rest / cache);
    }
}

/// Every part of an index that this code makes, of a capture made up here, as a file without calibration: one
/// layer clustered in one level, one top down.
fn made_up_index() -> (Vec<u8>, Tables) {
    let (n_prefix, n_head_kv, n_group, dim) = (120, 2, 2, 64);
    let mut parts = crate::index::sample::sample_parts(1, n_prefix, 1, 2, dim, dim, 4);
    let settings = settings(parts.meta.n_sink, parts.meta.n_window);
    let half = |n: usize, seed| gaussian(n, seed).into_iter().map(f16::from_f32).collect();
    let row = n_head_kv * dim;
    let capture = |layer: u32| LayerCapture {
        layer,
        n_head_kv: n_head_kv as u32,
        n_group: n_group as u32,
        head_dim_k: dim as u32,
        head_dim_v: dim as u32,
        scale: 0.125,
        k: half(n_prefix * row, u64::from(layer)),
        v: half(n_prefix * row, u64::from(layer) + 10),
        q: gaussian(settings.n_window as usize * row * n_group, u64::from(layer) + 20),
    };
    let made = [0, 1].map(|layer| {
        let settings = Settings { n_coarse: Some(2 * layer), ..settings.clone() };
        index_layer(&capture(layer), &settings, &|_| ()).unwrap()
    });
    let (layers, scores): (Vec<LayerParts>, Vec<LayerScores>) = made.into_iter().map(|l| (l.parts, l.scores)).unzip();
    parts.layers = layers;
    parts.meta.dense_layers.clear();
    parts.meta.calibration.clear();
    parts.meta.mass_targets.clear();
    parts.sketch = sketch(&capture(0)).unwrap();
    parts.probes = vec![probe(&capture(1), &probe_tokens(n_prefix, &settings))];
    (crate::index::to_bytes(&parts).unwrap(), calibrate(&scores, &BUDGETS))
}

/// Fails when the builder makes something else than it did: raise `BUILD_VERSION` then, so that `sqz run` builds its cached
/// indexes again, and pin what is made now. Thresholds are compared but for the rounding of matrix products, which differs
/// between machines.
#[test]
fn the_bytes_of_this_version() {
    use sha2::{Digest, Sha256};
    const PINNED: &str = "a693329cdfd2d6587efb577a3fc42b6adb9f5583b906270570a297171bbf6476";
    let (bytes, tables) = made_up_index();
    let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let row = tables.budgets.iter().find(|row| row.budget == 0.2).unwrap();
    let target = tables.masses.iter().find(|row| row.mass == 0.9).unwrap();
    let version = (crate::index::FORMAT_VERSION, BUILD_VERSION, hash.as_str());
    let close = |a: f32, b: f32| (a / b - 1.0).abs() < 1e-3;
    assert_eq!(version, (5, 5, PINNED), "{row:?} {target:?}");
    assert!(
        close(row.threshold, 0.0119180735) && close(row.kept, 0.37714285) && close(row.mass, 0.44004735),
        "{row:?}"
    );
    assert!(close(target.target, 0.8266282) && close(target.kept, 0.86328256), "{target:?}");
}
