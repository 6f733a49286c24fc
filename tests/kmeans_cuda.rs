//! Clustering on an NVIDIA GPU against the definitions in f64 and against the CPU. Needs `--features gpu-tests` and a GPU.

mod gpu;

use std::sync::Arc;

use ggml_squeeze::attention::cuda::{Buffer, Device};
use ggml_squeeze::attention::Array;
use ggml_squeeze::build::cuda::{Clusterer, DeviceLayer};
use ggml_squeeze::build::{index_layer, sample, BuildError, BuiltLayer, LayerCapture, Settings};
use ggml_squeeze::index::*;
use ggml_squeeze::random::split_mix;
use half::f16;
use proptest::prelude::*;
use rayon::prelude::*;

/// How a cache holds the rows of a capture.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// Token t in cell t, a cell holds all heads.
    Plain,
    /// Cells anywhere, heads one after the other; what holds no token is NaN.
    Scattered,
}

/// A capture in the GPU's memory.
struct Cache {
    cells: Vec<u32>,
    k: (Buffer, Array),
    v: (Buffer, Array),
}

fn permutation(n: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut all: Vec<u32> = (0..n as u32).collect();
    (1..n).rev().for_each(|i| all.swap(i, (split_mix(&mut state) % (i as u64 + 1)) as usize));
    all
}

impl Cache {
    fn new(device: &Arc<Device>, capture: &LayerCapture, layout: Layout) -> Cache {
        let heads = capture.n_head_kv as usize;
        let n_prefix = capture.k.len() / capture.row_k();
        let n_cell = if layout == Layout::Plain { n_prefix } else { n_prefix + 300 };
        let cells = match layout {
            Layout::Plain => (0..n_prefix as u32).collect(),
            Layout::Scattered => permutation(n_cell, 5)[..n_prefix].to_vec(),
        };
        let place = |rows: &[f16], d: usize| {
            let mut data = vec![f16::NAN; n_cell * heads * d];
            let [cell_step, head_step] = if layout == Layout::Plain { [heads * d, d] } else { [d, n_cell * d] };
            for (t, row) in rows.chunks_exact(heads * d).enumerate() {
                for (h, row) in row.chunks_exact(d).enumerate() {
                    data[cells[t] as usize * cell_step + h * head_step..][..d].copy_from_slice(row);
                }
            }
            let buffer = Buffer::of(device, "a test", &data).unwrap();
            let nb = [2, 2 * cell_step, 2 * head_step, 2 * data.len()];
            let array = Array { data: buffer.address() as *mut u8, ne: [d, n_cell, heads, 1], nb };
            (buffer, array)
        };
        let (k, v) = (place(&capture.k, capture.head_dim_k as usize), place(&capture.v, capture.head_dim_v as usize));
        Cache { cells, k, v }
    }

    fn layer<'a>(&self, capture: &'a LayerCapture) -> DeviceLayer<'a> {
        let LayerCapture { layer, n_group, scale, q, .. } = capture;
        DeviceLayer { layer: *layer, n_group: *n_group, scale: *scale, k: self.k.1, v: self.v.1, q }
    }
}

fn clusterer(device: &Arc<Device>, cache: &Cache, settings: &Settings) -> Clusterer {
    Clusterer::new(device, &cache.cells, settings).unwrap()
}

fn build(clusterer: &mut Clusterer, cache: &Cache, capture: &LayerCapture) -> Result<BuiltLayer, BuildError> {
    // SAFETY: the cache lives, and its copies are done.
    unsafe { clusterer.index_layer(&cache.layer(capture), &capture.k, &|_| ()) }
}

fn settings(n_coarse: Option<u32>) -> Settings {
    Settings { n_window: 20, n_coarse, n_threads: 2, ..Settings::default() }
}

/// An index of this one layer passes every check that a file must pass.
fn validate(built: &BuiltLayer, capture: &LayerCapture, settings: &Settings) {
    let n_prefix = capture.k.len() / capture.row_k();
    let mut parts = ggml_squeeze::index::sample::sample_parts(1, n_prefix, 1, 1, 64, 64, 1);
    (parts.meta.n_sink, parts.meta.n_window) = (settings.n_sink, settings.n_window);
    parts.meta.dense_layers.clear();
    parts.meta.calibration.clear();
    parts.probes.clear();
    let mut layer = built.parts.clone();
    layer.shape.layer = 0;
    parts.layers = vec![layer];
    let bytes = to_bytes(&parts).unwrap();
    let index = Index::from_bytes(bytes).unwrap();
    let members = index.layer(0).unwrap().members;
    assert_eq!(matches!(members, Members::U16(_)), n_prefix <= 32767, "{n_prefix} tokens");
}

/// What the index stores of every cluster is what its members give in f64.
fn check_summaries(built: &BuiltLayer, capture: &LayerCapture) {
    let (parts, view) = (&built.parts, built.parts.view());
    let (dk, dv) = (capture.head_dim_k as usize, capture.head_dim_v as usize);
    let (c, coarse) = (view.shape.n_cluster as usize, view.shape.n_coarse as usize);
    let near = |got: f16, want: f64| (got.to_f64() - want).abs() <= want.abs() / 2000.0 + 4e-8;
    for h in 0..capture.n_head_kv as usize {
        let key = |t: u32, d: usize| capture.k[t as usize * capture.row_k() + h * dk + d].to_f64();
        let value = |t: u32, d: usize| capture.v[t as usize * capture.row_v() + h * dv + d].to_f64();
        let mean = |tokens: &[u32], of: &dyn Fn(u32, usize) -> f64, d: usize| {
            tokens.iter().map(|t| of(*t, d)).sum::<f64>() / tokens.len() as f64
        };
        let offsets = view.head_offsets(h);
        let tokens = |from: u32, to: u32| (from..to).map(|j| view.member(h, j as usize)).collect::<Vec<u32>>();
        for i in 0..c {
            let members = tokens(offsets[i], offsets[i + 1]);
            let (at, mut total) = (h * c + i, 0.0);
            let scale = parts.variance_scales[at] as f64;
            for d in 0..dk {
                let m = mean(&members, &key, d);
                let variance = mean(&members, &|t, d| (key(t, d) - m).powi(2), d);
                total += variance;
                assert!(near(parts.centroids[at * dk + d], m), "centroid {i} of head {h}");
                let code = parts.variances[at * dk + d] as f64;
                assert!((code * scale - variance).abs() <= 0.51 * scale + 1e-12, "variance of {i}: {code} {variance}");
            }
            let radius = (total / dk as f64).sqrt();
            assert!((parts.radii[at] as f64 - radius).abs() <= 1e-6 * radius + 1e-12, "radius of {i}");
            for d in 0..dv {
                assert!(near(parts.mean_values[at * dv + d], mean(&members, &value, d)), "mean value of {i}");
            }
        }
        for j in 0..coarse {
            let run = &view.head_coarse_offsets(h)[j..j + 2];
            let members = tokens(offsets[run[0] as usize], offsets[run[1] as usize]);
            for d in 0..dk {
                let got = parts.coarse_centroids[(h * coarse + j) * dk + d].to_f64();
                let (want, size) = (mean(&members, &key, d), mean(&members, &|t, d| key(t, d).abs(), d));
                // Rounded twice: the centroids that it is the mean of, and itself.
                let slack = (size + want.abs()) / 2000.0 + 8e-8;
                assert!((got - want).abs() <= slack, "coarse centroid {j} of head {h}: {got} {want}");
            }
        }
    }
}

/// Rounding of a cosine with both sides in F16.
const ROUNDING: f64 = 1e-3;

/// Every key is with the best of the directions that it was compared with, but for those that fill a cluster which would be
/// empty. Returns the share of keys for which that holds among the clusters around their final coarse one, which can differ from
/// those around the one they came from.
fn check_nearest(clusterer: &Clusterer, built: &BuiltLayer, capture: &LayerCapture) -> f64 {
    let (directions, around) = clusterer.compared().unwrap();
    let (view, dk) = (built.parts.view(), capture.head_dim_k as usize);
    let (c, coarse) = (view.shape.n_cluster as usize, view.shape.n_coarse as usize);
    let n_near = coarse.min(16);
    let (mut good, mut all) = (0, 0);
    for h in 0..capture.n_head_kv as usize {
        let directions: Vec<f64> = directions[h * c * dk..][..c * dk].iter().map(|x| x.to_f64()).collect();
        let offsets = view.head_offsets(h);
        // Keys with the best, keys that are not, and clusters that are the only one near the best for a key.
        let look = |own: usize| -> (usize, usize, Vec<usize>) {
            let considered: Vec<usize> = match coarse {
                0 => (0..c).collect(),
                _ => {
                    let bounds = view.head_coarse_offsets(h);
                    let parent = bounds.partition_point(|b| *b as usize <= own) - 1;
                    let near = &around[(h * coarse + parent) * n_near..][..n_near];
                    near.iter().flat_map(|j| bounds[*j as usize] as usize..bounds[*j as usize + 1] as usize).collect()
                }
            };
            let (mut good, mut late, mut wanted) = (0, 0, Vec::new());
            for slot in offsets[own]..offsets[own + 1] {
                let token = view.member(h, slot as usize) as usize;
                let row = &capture.k[token * capture.row_k() + h * dk..][..dk];
                let row: Vec<f64> = row.iter().map(|x| x.to_f64()).collect();
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-30);
                let cosine = |i: usize| row.iter().zip(&directions[i * dk..]).map(|(a, b)| a * b).sum::<f64>() / norm;
                let cosines: Vec<f64> = considered.iter().map(|i| cosine(*i)).collect();
                let best = cosines.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut close = considered.iter().zip(&cosines).filter(|(_, x)| **x >= best - ROUNDING);
                if let (Some((one, _)), None) = (close.next(), close.next()) {
                    wanted.push(*one);
                }
                *if cosine(own) >= best - ROUNDING { &mut good } else { &mut late } += 1;
            }
            (good, late, wanted)
        };
        let found: Vec<(usize, usize, Vec<usize>)> = (0..c).into_par_iter().map(look).collect();
        let mut wanted = vec![false; c];
        found.iter().flat_map(|f| &f.2).for_each(|i| wanted[*i] = true);
        for (own, (fit, late, _)) in found.into_iter().enumerate() {
            all += fit + late;
            good += if wanted[own] { fit } else { fit + late };
            assert!(coarse > 16 || !wanted[own] || late == 0, "{late} keys of head {h} are not with the best");
        }
    }
    good as f64 / all as f64
}

/// Random keys: `kinds` different ones, with noise, times `scale`.
fn capture(n_prefix: usize, heads: usize, dk: usize, dv: usize, kinds: usize, noise: f32, scale: f32) -> LayerCapture {
    let mut state = (n_prefix * 31 + kinds) as u64;
    let mut normal = || {
        let mut uniform = || (split_mix(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
        (0..4).map(|_| uniform()).sum::<f32>() * 1.7 - 3.4
    };
    let pool: Vec<f32> = (0..kinds * heads * dk).map(|_| normal()).collect();
    let mut k = Vec::with_capacity(n_prefix * heads * dk);
    for t in 0..n_prefix {
        let row = &pool[t * 7 % kinds * heads * dk..][..heads * dk];
        k.extend(row.iter().map(|x| f16::from_f32(scale * (x + noise * normal()))));
    }
    let v = (0..n_prefix * heads * dv).map(|_| f16::from_f32(normal())).collect();
    let q = (0..20 * 2 * heads * dk).map(|_| normal()).collect();
    let (head_dim_k, head_dim_v) = (dk as u32, dv as u32);
    LayerCapture { layer: 7, n_head_kv: heads as u32, n_group: 2, head_dim_k, head_dim_v, scale: 0.1, k, v, q }
}

/// Builds twice, checks all that must hold; the layer and the share of `check_nearest`.
fn check(device: &Arc<Device>, capture: &LayerCapture, layout: Layout, settings: &Settings) -> (BuiltLayer, f64) {
    let cache = Cache::new(device, capture, layout);
    let mut first = clusterer(device, &cache, settings);
    let built = build(&mut first, &cache, capture).unwrap();
    validate(&built, capture, settings);
    check_summaries(&built, capture);
    let share = check_nearest(&first, &built, capture);
    assert!(build(&mut first, &cache, capture).unwrap() == built, "a second run differs");
    let mut other = clusterer(device, &cache, &Settings { n_threads: 3, ..settings.clone() });
    assert!(build(&mut other, &cache, capture).unwrap() == built, "another clusterer's run differs");
    (built, share)
}

#[test]
fn clusters_of_the_cpu_pass_these_checks() {
    let capture = capture(900, 2, 64, 128, 60, 0.5, 1.0);
    for n_coarse in [0, 7] {
        let settings = settings(Some(n_coarse));
        let built = index_layer(&capture, &settings, &|_| ()).unwrap();
        validate(&built, &capture, &settings);
        check_summaries(&built, &capture);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn layers_of_every_kind_are_right(
        n in 1usize..3000, n_sink in 0u32..20, share in 0.01f32..1.0, heads in 1usize..4, wide_k: bool, wide_v: bool,
        kinds in 1usize..400, noise in prop_oneof![Just(0.0f32), Just(0.3), Just(2.0)], coarse in 0.0f64..1.0, deep: bool,
        scattered: bool, iterations in 1u32..5, seed: u64,
    ) {
        let Some(device) = gpu::device() else { return Ok(()) };
        let capture = capture(n + n_sink as usize + 20, heads, 64 << wide_k as u32, 64 << wide_v as u32, kinds, noise, 1.0);
        let n_cluster = ((share as f64 * n as f64).round() as usize).clamp(1, n);
        // Up to 16 coarse clusters, where every key meets every fine cluster in the end, or any number.
        let n_coarse = (coarse * coarse * if deep { n_cluster as f64 } else { n_cluster.min(16) as f64 }) as u32;
        let layout = if scattered { Layout::Scattered } else { Layout::Plain };
        let settings = Settings { n_sink, cluster_share: share, iterations, seed, ..settings(Some(n_coarse)) };
        check(&device, &capture, layout, &settings);
    }
}

#[test]
fn long_layers_are_right() {
    let Some(device) = gpu::device() else { return };
    for (n_prefix, heads, dim, n_coarse, layout) in [
        (20_000, 2, 64, None, Layout::Scattered),
        (10_000, 1, 128, Some(0), Layout::Plain),
        (40_000, 1, 128, None, Layout::Plain),
        (18_000, 1, 64, Some(16), Layout::Plain),
    ] {
        let capture = sample::prefix(n_prefix, 20, heads, 2, dim, 3);
        let (_, share) = check(&device, &capture, layout, &settings(n_coarse));
        assert!(share > 0.95, "{share} of the keys are with the best cluster around them");
    }
}

#[test]
fn degenerate_keys_are_clustered() {
    let Some(device) = gpu::device() else { return };
    for n_coarse in [0, 5, 40] {
        for (n_prefix, share, kinds, noise, scale) in [
            (3000, 0.05, 1, 0.0, 1.0),   // all equal
            (3000, 0.05, 1, 0.0, 0.0),   // all zero
            (3000, 0.05, 9, 0.0, 1.0),   // fewer kinds than clusters
            (3000, 0.05, 50, 0.5, 1e-6), // subnormal
            (3000, 0.05, 50, 0.5, 1e4),  // near the largest
            (300, 1.0, 1, 0.0, 1.0),     // a cluster for every key
            (120, 0.7, 60, 0.5, 1.0),    // fewer keys than two per cluster
        ] {
            let capture = capture(n_prefix, 2, 64, 64, kinds, noise, scale);
            let settings = Settings { cluster_share: share, ..settings(Some(n_coarse)) };
            let (built, _) = check(&device, &capture, Layout::Plain, &settings);
            if kinds == 1 {
                // Equal keys are spread evenly.
                let sizes =
                    built.parts.offsets[..built.parts.shape.n_cluster as usize + 1].windows(2).map(|w| w[1] - w[0]);
                let (n, c) = (n_prefix as f64 - 36.0, built.parts.shape.n_cluster as f64);
                assert!(sizes.clone().all(|s| s as f64 <= 4.0 * n / c), "{:?}", sizes.max());
                assert!(
                    built.parts.radii.iter().all(|r| *r == 0.0)
                        && built.parts.variance_scales.iter().all(|s| *s == 0.0)
                );
            }
        }
    }
    let lonely = capture(37, 1, 128, 64, 3, 0.1, 1.0);
    check(&device, &lonely, Layout::Scattered, &settings(None));
}

#[test]
fn heads_in_batches_of_their_own_give_the_same() {
    let Some(device) = gpu::device() else { return };
    // 70 heads of 20000 keys are more than a batch.
    let capture = capture(20_036, 70, 64, 64, 500, 0.5, 1.0);
    let cache = Cache::new(&device, &capture, Layout::Plain);
    let settings = Settings { iterations: 2, ..settings(None) };
    let built = build(&mut clusterer(&device, &cache, &settings), &cache, &capture).unwrap();
    validate(&built, &capture, &settings);
    check_summaries(&built, &capture);
    // A layer of the first three alone.
    let mut some = cache.layer(&capture);
    (some.k.ne[2], some.v.ne[2]) = (3, 3);
    let q: Vec<f32> = capture.q.chunks_exact(140 * 64).flat_map(|q| &q[..6 * 64]).copied().collect();
    let some = DeviceLayer { q: &q, ..some };
    let dim = some.k.ne[0];
    let keys: Vec<f16> =
        capture.k.chunks_exact(capture.k.len() / cache.cells.len()).flat_map(|k| &k[..3 * dim]).copied().collect();
    // SAFETY: part of a cache that lives.
    let part = unsafe { clusterer(&device, &cache, &settings).index_layer(&some, &keys, &|_| ()) }.unwrap();
    let n = part.parts.members.len();
    assert_eq!(part.parts.members, built.parts.members[..n]);
    assert_eq!(part.parts.centroids, built.parts.centroids[..part.parts.centroids.len()]);
}

/// As good as the CPU's clusters, on keys with the structure of real ones.
#[test]
fn recall_is_that_of_the_cpu() {
    let Some(device) = gpu::device() else { return };
    for (n_prefix, heads, dim) in [(10_000, 2, 64), (24_000, 3, 64), (24_000, 1, 128)] {
        let capture = sample::prefix(n_prefix, 60, heads, 4, dim, 11);
        let settings = Settings { n_window: 60, ..settings(None) };
        let cpu = index_layer(&capture, &settings, &|_| ()).unwrap();
        let cache = Cache::new(&device, &capture, Layout::Plain);
        let gpu = build(&mut clusterer(&device, &cache, &settings), &cache, &capture).unwrap();
        assert_eq!((cpu.parts.shape, cpu.scores.sink_mass.len()), (gpu.parts.shape, gpu.scores.sink_mass.len()));
        for budget in [0.1, 0.2] {
            let [cpu, gpu] =
                [&cpu, &gpu].map(|b| 100.0 * sample::recall(&b.parts.view(), &b.scores, &capture, budget)[0]);
            println!("{n_prefix} x {dim} at {budget}: CPU {cpu:.2}, GPU {gpu:.2}");
            assert!((cpu - gpu).abs() < 0.3, "{n_prefix} x {dim} at {budget}: CPU {cpu}, GPU {gpu}");
        }
    }
}

#[test]
fn what_cannot_be_clustered_is_refused() {
    let Some(device) = gpu::device() else { return };
    let good = capture(400, 2, 64, 64, 20, 0.5, 1.0);
    let try_with = |change: &dyn Fn(&mut LayerCapture)| {
        let mut bad = good.clone();
        change(&mut bad);
        let cache = Cache::new(&device, &bad, Layout::Scattered);
        build(&mut clusterer(&device, &cache, &settings(None)), &cache, &bad).unwrap_err()
    };
    let layer = 7;
    let key = try_with(&|c| c.k[17 * 128 + 64] = f16::INFINITY);
    assert_eq!(key, BuildError::NonFinite { layer, what: "key", token: 17 });
    let value = try_with(&|c| c.v[399 * 128 + 3] = f16::NAN);
    assert_eq!(value, BuildError::NonFinite { layer, what: "value", token: 399 });
    assert!(matches!(try_with(&|c| c.q.truncate(10)), BuildError::Shape { what: "the window's queries", .. }));
    assert!(matches!(try_with(&|c| c.scale = 0.0), BuildError::Setting { name: "scale", .. }));

    let cache = Cache::new(&device, &good, Layout::Plain);
    let with = |change: &dyn Fn(&mut DeviceLayer)| {
        let mut layer = cache.layer(&good);
        change(&mut layer);
        // SAFETY: refused before anything is read.
        unsafe { clusterer(&device, &cache, &settings(None)).cluster(&layer, &|_| ()) }.err().unwrap().to_string()
    };
    assert!(with(&|l| l.k.ne[0] = 80).contains("takes 64 and 128"));
    assert!(with(&|l| l.v.nb[0] = 4).contains("F16 rows"));
    assert!(with(&|l| l.k.ne[1] = 399).contains("every cell"));
    assert!(with(&|l| l.v.ne[2] = 1).contains("KV heads"));
    let short = Clusterer::new(&device, &[0; 36], &settings(None)).err().unwrap();
    assert_eq!(short, BuildError::TooShort { n_prefix: 36, needed: 37 });
}

#[test]
fn short_memory_is_an_error_with_a_remedy() {
    let Some(device) = gpu::device() else { return };
    let good = capture(400, 1, 64, 64, 20, 0.5, 1.0);
    let cache = Cache::new(&device, &good, Layout::Plain);
    // A prefix whose keys fill any GPU's memory, all of them in one cell.
    let mut clusterer = Clusterer::new(&device, &vec![0; 1 << 30], &settings(None)).unwrap();
    // SAFETY: the cache lives.
    let error = unsafe { clusterer.cluster(&cache.layer(&good), &|_| ()) }.err().unwrap();
    assert!(matches!(error, BuildError::DeviceMemory { layer: 7, .. }), "{error}");
    assert!(error.to_string().contains("free some"), "{error}");
}
