//! Spherical K-means: unit rows, cosine assignment, seeded random start, no empty cluster. Knows nothing of attention.
//!
//! The same labels come out whatever the number of threads: work is split by fixed blocks of points and by cluster, and
//! every sum runs over a cluster's members in ascending order.

use rayon::prelude::*;

use super::matmul::dot_rows;
use crate::random::split_mix;

/// Points per matrix product, and directions per product: 128 x 512 dots of 4 bytes stay in the L2 cache.
const BLOCK: usize = 128;
const TILE: usize = 512;

/// Points in clusters.
pub(super) struct Clustering {
    /// Cluster of each point.
    pub label: Vec<u32>,
    /// `[n_cluster][dim]`, the directions that the points were last compared with.
    pub direction: Vec<f32>,
    /// Multiply-adds of the assignments.
    pub products: u64,
}

/// `rows` scaled to unit length in place; a row of zeros stays as it is.
pub(super) fn normalise(rows: &mut [f32], dim: usize) {
    for row in rows.chunks_exact_mut(dim) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|x| *x /= norm);
        }
    }
}

/// Clusters `unit` (`[n][dim]`, unit rows) into `n_cluster <= n` clusters with at most `iterations >= 1` assignments.
/// `step(k)` is told that k more of them are done; they add up to `iterations`.
///
/// Clusters are numbered by their first point; none is empty.
pub(super) fn cluster(
    unit: &[f32],
    dim: usize,
    n_cluster: usize,
    iterations: u32,
    seed: u64,
    step: &(dyn Fn(u32) + Sync),
) -> Clustering {
    let n = unit.len() / dim;
    let mut products = 0;
    let mut direction = Vec::with_capacity(n_cluster * dim);
    for i in sample(n, n_cluster, seed) {
        direction.extend_from_slice(&unit[i * dim..(i + 1) * dim]);
    }
    let mut label = vec![0; n];
    let mut similarity = vec![0.0; n];
    let mut previous = Vec::new();
    for done in 1..=iterations {
        assign(unit, &direction, dim, &mut label, &mut similarity);
        products += (n * n_cluster * dim) as u64;
        repair(unit, dim, n_cluster, &mut label, &similarity);
        if done == iterations || label == previous {
            step(1 + iterations - done);
            break;
        }
        previous.clone_from(&label);
        update(unit, dim, &label, &mut direction);
        step(1);
    }
    let (label, direction) = by_first_point(label, &direction, dim);
    Clustering { label, direction, products }
}

/// Points of each cluster: `order[start[c]..start[c + 1]]`, ascending.
pub(super) fn group(label: &[u32], n_cluster: usize) -> (Vec<usize>, Vec<u32>) {
    let mut start = vec![0usize; n_cluster + 1];
    for &c in label {
        start[c as usize + 1] += 1;
    }
    for c in 0..n_cluster {
        start[c + 1] += start[c];
    }
    let mut next = start.clone();
    let mut order = vec![0u32; label.len()];
    for (i, &c) in label.iter().enumerate() {
        order[next[c as usize]] = i as u32;
        next[c as usize] += 1;
    }
    (start, order)
}

/// `n_take` different numbers below `n`: the head of a seeded Fisher-Yates shuffle.
fn sample(n: usize, n_take: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut all: Vec<usize> = (0..n).collect();
    for i in 0..n_take {
        let below = (n - i) as u128;
        all.swap(i, i + ((split_mix(&mut state) as u128 * below) >> 64) as usize);
    }
    all.truncate(n_take);
    all
}

/// Nearest direction of every point, and the cosine with it; of equals the lowest number.
pub(super) fn assign(unit: &[f32], direction: &[f32], dim: usize, label: &mut [u32], similarity: &mut [f32]) {
    let scratch = label.len().min(BLOCK) * (direction.len() / dim).min(TILE);
    label.par_chunks_mut(BLOCK).zip(similarity.par_chunks_mut(BLOCK)).zip(unit.par_chunks(BLOCK * dim)).for_each_init(
        || vec![0.0f32; scratch],
        |dots, ((label, similarity), rows)| {
            similarity.fill(f32::NEG_INFINITY);
            for (t, tile) in direction.chunks(TILE * dim).enumerate() {
                let n = tile.len() / dim;
                let dots = &mut dots[..label.len() * n];
                dot_rows(rows, tile, dim, dots);
                for (i, row) in dots.chunks_exact(n).enumerate() {
                    let (j, best) = first_maximum(row);
                    if best > similarity[i] {
                        similarity[i] = best;
                        label[i] = (t * TILE + j) as u32;
                    }
                }
            }
        },
    );
}

/// Position and value of the first maximum. Two passes over chunks without early exits, which compile to vector code.
fn first_maximum(x: &[f32]) -> (usize, f32) {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    let best = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let chunk = x.chunks(LANES).position(|c| c.iter().fold(false, |found, &v| found | (v == best))).unwrap_or(0);
    let first = chunk * LANES;
    (first + x[first..].iter().position(|&v| v == best).unwrap_or(0), best)
}

/// Moves every direction to the normalised mean of its points. Points that cancel out leave it where it was.
pub(super) fn update(unit: &[f32], dim: usize, label: &[u32], direction: &mut [f32]) {
    let (start, order) = group(label, direction.len() / dim);
    direction.par_chunks_mut(dim).enumerate().with_min_len(16).for_each(|(c, direction)| {
        let mut sum = vec![0.0f32; dim];
        for &i in &order[start[c]..start[c + 1]] {
            let row = &unit[i as usize * dim..][..dim];
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
        }
        if sum.iter().any(|&x| x != 0.0) {
            normalise(&mut sum, dim);
            direction.copy_from_slice(&sum);
        }
    });
}

/// Gives every empty cluster half of the largest one: the points nearest to its least typical point.
pub(super) fn repair(unit: &[f32], dim: usize, n_cluster: usize, label: &mut [u32], similarity: &[f32]) {
    let mut size = vec![0u32; n_cluster];
    label.iter().for_each(|&c| size[c as usize] += 1);
    let row = |i: usize| &unit[i * dim..(i + 1) * dim];
    for empty in 0..n_cluster {
        if size[empty] != 0 {
            continue;
        }
        let largest = (0..n_cluster).rev().max_by_key(|&c| size[c]).unwrap_or(0);
        let mut points: Vec<usize> = (0..label.len()).filter(|&i| label[i] == largest as u32).collect();
        let Some(&far) = points.iter().min_by(|&&a, &&b| similarity[a].total_cmp(&similarity[b])) else { return };
        let nearness: Vec<f32> =
            points.iter().map(|&i| row(i).iter().zip(row(far)).map(|(a, b)| a * b).sum()).collect();
        let mut rank: Vec<usize> = (0..points.len()).collect();
        rank.sort_by(|&a, &b| nearness[b].total_cmp(&nearness[a]));
        points = rank[..points.len() / 2].iter().map(|&r| points[r]).collect();
        for i in &points {
            label[*i] = empty as u32;
        }
        size[empty] = points.len() as u32;
        size[largest] -= points.len() as u32;
    }
}

/// Numbers the clusters by their first point, so that clusters of nearby tokens are neighbours in memory.
fn by_first_point(mut label: Vec<u32>, direction: &[f32], dim: usize) -> (Vec<u32>, Vec<f32>) {
    let mut number = vec![u32::MAX; direction.len() / dim];
    let mut ordered = Vec::with_capacity(direction.len());
    let mut next = 0;
    for c in &mut label {
        let old = *c as usize;
        if number[old] == u32::MAX {
            number[old] = next;
            next += 1;
            ordered.extend_from_slice(&direction[old * dim..(old + 1) * dim]);
        }
        *c = number[old];
    }
    (label, ordered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gaussian(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || (split_mix(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
        (0..n).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
    }

    fn sizes(label: &[u32], n_cluster: usize) -> Vec<usize> {
        let (start, _) = group(label, n_cluster);
        start.windows(2).map(|w| w[1] - w[0]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn assignment_is_the_argmax(n in 1usize..300, dim in 1usize..24, c in 1usize..1200, seed: u64) {
            let mut unit = gaussian(n * dim, seed);
            let mut direction = gaussian(c * dim, seed ^ 1);
            normalise(&mut unit, dim);
            normalise(&mut direction, dim);
            let (mut label, mut similarity) = (vec![0; n], vec![0.0; n]);
            assign(&unit, &direction, dim, &mut label, &mut similarity);
            for i in 0..n {
                let exact = |c: usize| -> f64 {
                    (0..dim).map(|k| unit[i * dim + k] as f64 * direction[c * dim + k] as f64).sum()
                };
                let best = (0..c).map(exact).fold(f64::NEG_INFINITY, f64::max);
                prop_assert!(exact(label[i] as usize) > best - 1e-6);
                prop_assert!((similarity[i] as f64 - best).abs() < 1e-6);
            }
        }

        #[test]
        fn no_cluster_is_empty(n in 1usize..200, kinds in 1usize..8, share in 0.0f64..1.0, seed: u64, iterations in 1u32..6) {
            // Many copies of few points, and up to as many clusters as points.
            let (dim, c) = (5, ((n as f64 * share) as usize).clamp(1, n));
            let pool = gaussian(kinds * dim, seed);
            let mut unit: Vec<f32> = (0..n).flat_map(|i| pool[i % kinds * dim..][..dim].to_vec()).collect();
            normalise(&mut unit, dim);
            let label = cluster(&unit, dim, c, iterations, seed, &|_| ()).label;
            prop_assert!(sizes(&label, c).iter().all(|&s| s > 0));
            let mut seen = 0;
            for &l in &label {
                prop_assert!(l <= seen, "numbered by first point");
                seen = seen.max(l + 1);
            }
        }

        #[test]
        fn samples_are_distinct(n in 1usize..500, share in 0.0f64..1.0, seed: u64) {
            let take = (n as f64 * share) as usize;
            let mut got = sample(n, take, seed);
            got.sort_unstable();
            got.dedup();
            prop_assert!(got.len() == take && got.iter().all(|&i| i < n));
        }
    }

    #[test]
    fn of_equal_maxima_the_first_counts() {
        for n in 1..70 {
            for first in 0..n {
                let mut x = vec![-1.0; n];
                x[first..].iter_mut().step_by(3).for_each(|v| *v = 0.5);
                assert_eq!(first_maximum(&x), (first, 0.5));
            }
        }
    }

    #[test]
    fn of_equal_directions_the_first_counts_in_any_tile() {
        let (dim, c) = (4, TILE + 40);
        let mut direction = vec![0.0; c * dim];
        for i in [7, 30, TILE + 3] {
            direction[i * dim] = 1.0;
        }
        let (mut label, mut similarity) = ([0; 1], [0.0; 1]);
        assign(&[1.0, 0.0, 0.0, 0.0], &direction, dim, &mut label, &mut similarity);
        assert_eq!((label, similarity), ([7], [1.0]));
    }

    #[test]
    fn zero_and_equal_rows_are_spread_over_all_clusters() {
        for value in [0.0, 1.0] {
            let mut unit = vec![value; 50 * 3];
            normalise(&mut unit, 3);
            assert!(sizes(&cluster(&unit, 3, 50, 4, 0, &|_| ()).label, 50).iter().all(|&s| s == 1));
            let spread = sizes(&cluster(&unit, 3, 8, 4, 0, &|_| ()).label, 8);
            assert!(spread.iter().all(|&s| (4..=13).contains(&s)), "{spread:?}");
        }
    }

    #[test]
    fn points_sit_with_the_direction_they_were_compared_with() {
        let (n, dim, c) = (600, 16, 30);
        let mut unit = gaussian(n * dim, 3);
        normalise(&mut unit, dim);
        let Clustering { label, direction, .. } = cluster(&unit, dim, c, 7, 5, &|_| ());
        let (mut again, mut similarity) = (vec![0; n], vec![0.0; n]);
        assign(&unit, &direction, dim, &mut again, &mut similarity);
        assert_eq!(label, again);
    }

    #[test]
    fn iterations_make_clusters_tighter() {
        let (n, dim, c) = (2000, 8, 40);
        let mut unit = gaussian(n * dim, 11);
        normalise(&mut unit, dim);
        let tightness = |iterations| {
            let direction = cluster(&unit, dim, c, iterations, 1, &|_| ()).direction;
            let (mut label, mut similarity) = (vec![0; n], vec![0.0; n]);
            assign(&unit, &direction, dim, &mut label, &mut similarity);
            similarity.iter().sum::<f32>() / n as f32
        };
        let (one, ten) = (tightness(1), tightness(10));
        assert!(ten > one + 0.02, "{one} {ten}");
    }

    #[test]
    fn planted_clusters_are_found() {
        let (dim, planted, each) = (32, 12, 40);
        let centres = gaussian(planted * dim, 21);
        let noise = gaussian(planted * each * dim, 22);
        let mut unit = vec![0.0; planted * each * dim];
        for (i, row) in unit.chunks_exact_mut(dim).enumerate() {
            let centre = &centres[i % planted * dim..][..dim];
            row.iter_mut().enumerate().for_each(|(k, x)| *x = centre[k] + 0.1 * noise[i * dim + k]);
        }
        normalise(&mut unit, dim);
        // Three times as many clusters: a random start then touches (nearly) every planted one, and no found cluster
        // may mix two of them.
        let label = cluster(&unit, dim, 6 * planted, 10, 1, &|_| ()).label;
        let (start, order) = group(&label, 6 * planted);
        let mixed = start.windows(2).filter(|w| {
            let points = &order[w[0]..w[1]];
            points.iter().any(|&i| i as usize % planted != points[0] as usize % planted)
        });
        assert_eq!(mixed.count(), 0);
    }

    #[test]
    fn progress_adds_up_even_when_it_stops_early() {
        let mut unit = gaussian(40 * 4, 1);
        normalise(&mut unit, 4);
        let total = std::sync::atomic::AtomicU32::new(0);
        let made = cluster(&unit, 4, 3, 500, 1, &|k| {
            total.fetch_add(k, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 500);
        let one = 40 * 3 * 4;
        assert!(
            made.products >= one && made.products < 100 * one && made.products.is_multiple_of(one),
            "{}",
            made.products
        );
    }
}
