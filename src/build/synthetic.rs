//! Made-up clusters for speed figures: lopsided sizes and members in short runs, as K-means leaves them, without its work. What
//! is stored of them (centroids, variances, mean values) is true of their keys, so a search over them has real numbers.

use rayon::prelude::*;

use super::summary::{summarise, HeadParts};
use super::topdown::{offsets, Plan};
use super::{check_settings, head_rows, head_seed, join, n_clustered, n_coarse, pool};
use super::{n_cluster as clusters_of, BuildError, BuiltLayer, LayerCapture, Settings};
use crate::random::split_mix;

/// Standard deviation of the logarithm of a cluster's size. Median over the heads of SmolLM2-135M on 3800 tokens: 0.56, of
/// Qwen2.5-Coder-0.5B on 3300: 0.52.
const SIGMA: f32 = 0.55;
/// Keys in a row that stay in a cluster, on average; the same models have 3.0 and 3.6.
const RUN: f32 = 3.2;

/// As [`super::index_layer`], but with made-up clusters: the sizes and the order of members that K-means would give, of keys that
/// have nothing to do with each other. An index of it must be marked (`IndexMeta::synthetic`).
///
/// # Errors
/// As [`super::index_layer`].
pub fn synthetic_layer(capture: &LayerCapture, settings: &Settings) -> Result<BuiltLayer, BuildError> {
    check_settings(settings)?;
    pool(settings)?.install(|| {
        let n = n_clustered(capture, settings)?;
        let n_cluster = clusters_of(n, settings);
        let plan = Plan { n_cluster, n_coarse: n_coarse(n, n_cluster, settings), iterations: settings.iterations };
        let coarse: Vec<usize> =
            (0..plan.n_coarse).map(|j| (j + 1) * n_cluster / plan.n_coarse - j * n_cluster / plan.n_coarse).collect();
        let coarse_offsets = if coarse.is_empty() { Vec::new() } else { offsets(&coarse) };
        let head = |h: u32| -> (HeadParts, u64) {
            let (keys, values) = head_rows(capture, h, settings.n_sink as usize);
            let label = labels(n, n_cluster, head_seed(settings, capture.layer, h));
            (summarise(keys, values, &label, n_cluster, &coarse_offsets), 0)
        };
        let heads = (0..capture.n_head_kv).into_par_iter().map(head).collect();
        // Scores of made-up clusters would calibrate nothing.
        Ok(join(capture, settings, &plan, heads, &[]))
    })
}

/// Cluster of each of `n` keys; none of the `n_cluster` is empty.
fn labels(n: usize, n_cluster: usize, mut seed: u64) -> Vec<u32> {
    let mut uniform = || (split_mix(&mut seed) >> 40) as f32 / (1u64 << 24) as f32;
    // The sum of 12 uniform numbers is nearly Gaussian.
    let weights: Vec<f64> =
        (0..n_cluster).map(|_| (SIGMA * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).exp().into()).collect();
    let (total, free) = (weights.iter().sum::<f64>(), (n - n_cluster) as f64);
    let (mut sum, mut given, mut runs) = (0.0, 0, Vec::new());
    for (c, weight) in weights.iter().enumerate() {
        sum += weight;
        let end = (free * sum / total).round() as usize;
        let mut left = 1 + end - given;
        given = end;
        while left > 0 {
            let length = (1.0 + (1.0 - uniform()).ln() / (1.0 - 1.0 / RUN).ln()) as usize;
            runs.push((c as u32, length.clamp(1, left)));
            left -= length.clamp(1, left);
        }
    }
    for i in (1..runs.len()).rev() {
        runs.swap(i, (uniform() * (i + 1) as f32) as usize % (i + 1));
    }
    runs.into_iter().flat_map(|(c, length)| std::iter::repeat_n(c, length)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{capture, settings};
    use super::*;
    use crate::index::sample::sample_parts;
    use crate::index::{to_bytes, Index};

    #[test]
    fn sizes_and_runs_are_those_of_real_clusters() {
        for (n, n_cluster) in [(4000, 200), (32000, 1600)] {
            let label = labels(n, n_cluster, 1);
            assert_eq!(label.len(), n);
            let mut sizes = vec![0.0f64; n_cluster];
            label.iter().for_each(|&c| sizes[c as usize] += 1.0);
            let mean = sizes.iter().map(|s| s.ln()).sum::<f64>() / n_cluster as f64;
            let sigma = (sizes.iter().map(|s| (s.ln() - mean).powi(2)).sum::<f64>() / n_cluster as f64).sqrt();
            let largest = sizes.iter().fold(0.0, |m, s| s.max(m)) * n_cluster as f64 / n as f64;
            let run = n as f64 / (1 + label.windows(2).filter(|w| w[0] != w[1]).count()) as f64;
            assert!((0.45..0.65).contains(&sigma), "logarithms of sizes spread by {sigma}");
            assert!((2.0..8.0).contains(&largest), "the largest is {largest} times the mean");
            assert!((2.8..3.6).contains(&run), "runs of {run}");
        }
    }

    #[test]
    fn no_cluster_is_empty_at_any_share() {
        for (n, n_cluster) in [(1, 1), (5, 5), (40, 39), (1000, 900)] {
            let label = labels(n, n_cluster, 7);
            assert!(
                label.len() == n && (0..n_cluster as u32).all(|c| label.contains(&c)),
                "{n} keys, {n_cluster} clusters"
            );
        }
    }

    #[test]
    fn a_layer_is_valid_with_and_without_a_coarse_level() {
        let capture = capture(900, 10, 3, 2, 1);
        for n_coarse in [0, 7] {
            let settings = Settings { n_coarse: Some(n_coarse), ..settings(16, 10) };
            let made = synthetic_layer(&capture, &settings).unwrap();
            let one = Settings { n_threads: 1, ..settings.clone() };
            assert!(synthetic_layer(&capture, &one).unwrap() == made, "the number of threads counts");
            // the writer holds it to every rule of an index
            let mut parts = sample_parts(1, 900, 1, 3, 24, 20, 5);
            (parts.meta.n_sink, parts.meta.n_window, parts.meta.n_layer) = (16, 10, 6);
            parts.meta.dense_layers.clear();
            parts.meta.synthetic = true;
            parts.probes.clear();
            parts.sketch.layer = 5;
            parts.layers = vec![made.parts];
            let bytes = to_bytes(&parts).unwrap();
            assert!(Index::from_bytes(bytes).is_err(), "a synthetic index is taken for a real one");
        }
        assert!(matches!(synthetic_layer(&capture, &settings(16, 884)), Err(BuildError::Shape { .. })));
    }
}
