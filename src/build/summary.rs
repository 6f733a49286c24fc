//! From labels to what the index stores of a cluster: centroid, variances, radius, mean value, members.

use half::f16;
use rayon::prelude::*;

use super::kmeans::group;
use crate::index::LayerView;

/// Below this the largest variance of a cluster counts as none: its keys are equal, or there is one.
pub(super) const NO_VARIANCE: f64 = 1e-12;

/// The keys of one KV head: rows `first..first + n` of a `[P][stride]` array, `dim` elements from `column` on.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [f16],
    pub stride: usize,
    pub column: usize,
    pub dim: usize,
    pub first: usize,
}

impl<'a> Rows<'a> {
    pub fn row(&self, i: usize) -> &'a [f16] {
        &self.data[(self.first + i) * self.stride + self.column..][..self.dim]
    }
}

/// One KV head of `LayerParts`, in the same layouts.
pub(super) struct HeadParts {
    pub centroids: Vec<f16>,
    pub mean_values: Vec<f16>,
    pub variances: Vec<u8>,
    pub variance_scales: Vec<f32>,
    pub radii: Vec<f32>,
    pub offsets: Vec<u32>,
    pub members: Vec<u32>,
    pub coarse_offsets: Vec<u32>,
}

/// One cluster.
pub(super) struct Summary {
    pub centroid: Vec<f16>,
    pub mean_value: Vec<f16>,
    pub variances: Vec<u8>,
    pub variance_scale: f32,
    pub radius: f32,
}

impl Summary {
    /// What an index holds of cluster `c` of KV head `h`.
    pub fn stored(view: &LayerView, h: usize, c: usize) -> Summary {
        let (dk, dv) = (view.shape.head_dim_k as usize, view.shape.head_dim_v as usize);
        let at = h * view.shape.n_cluster as usize + c;
        Summary {
            centroid: view.centroids[at * dk..(at + 1) * dk].to_vec(),
            mean_value: view.mean_values[at * dv..(at + 1) * dv].to_vec(),
            variances: view.variances[at * dk..(at + 1) * dk].to_vec(),
            variance_scale: view.variance_scales[at],
            radius: view.radii[at],
        }
    }
}

/// Summarises the clusters of one KV head: `label` is one per clustered key, and fine clusters `coarse_offsets[j]..` belong to
/// coarse cluster j (empty: there is none).
pub(super) fn summarise(
    keys: Rows,
    values: Rows,
    label: &[u32],
    n_cluster: usize,
    coarse_offsets: &[u32],
) -> HeadParts {
    assemble(keys, label, n_cluster, coarse_offsets, &|_, members| summarise_one(keys, values, members))
}

/// The same with the summary of each cluster, by its number and its members, from `of`.
pub(super) fn assemble(
    keys: Rows,
    label: &[u32],
    n_cluster: usize,
    coarse_offsets: &[u32],
    of: &(dyn Fn(usize, &[u32]) -> Summary + Sync),
) -> HeadParts {
    let (start, order) = group(label, n_cluster);
    let summaries: Vec<Summary> =
        start.par_windows(2).enumerate().map(|(c, range)| of(c, &order[range[0]..range[1]])).collect();
    let mut head = HeadParts {
        centroids: Vec::with_capacity(n_cluster * keys.dim),
        mean_values: Vec::new(),
        variances: Vec::with_capacity(n_cluster * keys.dim),
        variance_scales: Vec::with_capacity(n_cluster),
        radii: Vec::with_capacity(n_cluster),
        offsets: start.iter().map(|&s| s as u32).collect(),
        members: order.iter().map(|&i| i + keys.first as u32).collect(),
        coarse_offsets: coarse_offsets.to_vec(),
    };
    for s in summaries {
        head.centroids.extend(s.centroid);
        head.mean_values.extend(s.mean_value);
        head.variances.extend(s.variances);
        head.variance_scales.push(s.variance_scale);
        head.radii.push(s.radius);
    }
    head
}

pub(super) fn summarise_one(keys: Rows, values: Rows, members: &[u32]) -> Summary {
    let centre = mean(keys, members);
    let mut variance = vec![0.0f64; keys.dim];
    for &i in members {
        for ((v, x), c) in variance.iter_mut().zip(keys.row(i as usize)).zip(&centre) {
            *v += (x.to_f64() - c).powi(2);
        }
    }
    variance.iter_mut().for_each(|v| *v /= members.len() as f64);
    let (variances, variance_scale) = quantise(&variance);
    Summary {
        centroid: centre.into_iter().map(f16::from_f64).collect(),
        mean_value: mean(values, members).into_iter().map(f16::from_f64).collect(),
        variances,
        variance_scale,
        radius: (variance.iter().sum::<f64>() / keys.dim as f64).sqrt() as f32,
    }
}

fn mean(rows: Rows, members: &[u32]) -> Vec<f64> {
    let mut sum = vec![0.0; rows.dim];
    for &i in members {
        sum.iter_mut().zip(rows.row(i as usize)).for_each(|(s, x)| *s += x.to_f64());
    }
    sum.iter_mut().for_each(|s| *s /= members.len() as f64);
    sum
}

/// Variances as multiples, 0 to 255, of one scale.
fn quantise(variance: &[f64]) -> (Vec<u8>, f32) {
    let largest = variance.iter().copied().fold(0.0, f64::max);
    if largest < NO_VARIANCE {
        return (vec![0; variance.len()], 0.0);
    }
    let scale = (largest / 255.0) as f32;
    (variance.iter().map(|v| (v / scale as f64).round().min(255.0) as u8).collect(), scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn summaries_match_the_definition(
            label in prop::collection::vec(0u32..4, 4..60),
            pool in prop::collection::vec(-60.0f32..60.0, 400),
            dim in 1usize..6,
            first in 0usize..3,
        ) {
            // Every cluster gets one key at least.
            let mut label = label;
            (0..4).for_each(|c| label[c] = c as u32);
            let stride = dim + 1;
            let element = |i: usize| f16::from_f32(pool[i * 7 % pool.len()]);
            let data: Vec<f16> = (0..(label.len() + first) * stride).map(element).collect();
            let keys = Rows { data: &data, stride, column: 1, dim, first };
            let values = Rows { data: &data, stride, column: 0, dim: 1, first };
            let head = summarise(keys, values, &label, 4, &[0, 1, 4]);
            for c in 0..4usize {
                let run = head.offsets[c] as usize..head.offsets[c + 1] as usize;
                let members: Vec<usize> = head.members[run].iter().map(|&m| m as usize).collect();
                let expected: Vec<usize> = (0..label.len()).filter(|&i| label[i] == c as u32).map(|i| i + first).collect();
                prop_assert_eq!(&members, &expected);
                let n = members.len() as f64;
                let at = |m: usize, k: usize| data[m * stride + k].to_f64();
                let mean = |k: usize| members.iter().map(|&m| at(m, k)).sum::<f64>() / n;
                let mut total = 0.0;
                for k in 0..dim {
                    let (m, scale) = (mean(k + 1), head.variance_scales[c] as f64);
                    let var = members.iter().map(|&i| (at(i, k + 1) - m).powi(2)).sum::<f64>() / n;
                    total += var;
                    prop_assert!((head.centroids[c * dim + k].to_f64() - m).abs() <= m.abs() / 1024.0 + 1e-6);
                    prop_assert!((head.variances[c * dim + k] as f64 * scale - var).abs() <= 0.51 * scale + 1e-9);
                }
                prop_assert!((head.radii[c] as f64 - (total / dim as f64).sqrt()).abs() <= 1e-5 * total.sqrt() + 1e-9);
                prop_assert!((head.mean_values[c].to_f64() - mean(0)).abs() <= mean(0).abs() / 1024.0 + 1e-6);
            }
        }
    }

    #[test]
    fn equal_keys_have_no_variance() {
        let data = vec![f16::from_f32(0.1); 30];
        let rows = Rows { data: &data, stride: 3, column: 0, dim: 3, first: 0 };
        let head = summarise(rows, rows, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 2, &[]);
        assert_eq!(head.variances, vec![0; 6]);
        assert_eq!((head.variance_scales, head.radii), (vec![0.0; 2], vec![0.0; 2]));
    }

    #[test]
    fn the_widest_dimension_is_255_and_a_constant_one_is_0() {
        assert_eq!(quantise(&[0.0, 5.1, 2.55]).0, [0, 255, 128]);
    }
}
