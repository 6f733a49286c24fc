//! Top-down K-means for long prefixes: few coarse clusters of a sample first, then each of them on its own, then some
//! assignments of every key to the fine clusters of the coarse clusters around it, which undo what the coarse borders cut
//! apart. A key meets the coarse centroids about twice and some tens of their fine ones, instead of all `n_cluster` in every
//! iteration. Deterministic as `kmeans` is.

use rayon::prelude::*;

use super::kmeans::{self, Clustering};
use super::matmul::dot_rows;
use crate::random::split_mix;

/// Keys per coarse cluster in the sample that finds the coarse clusters.
pub(super) const SAMPLE: usize = 32;
/// Coarse clusters whose fine clusters a key is compared with in a refinement.
pub(super) const NEAR: usize = 16;
pub(super) const REFINEMENTS: usize = 3;
/// Fewer keys are clustered in one level.
const LEAST_KEYS: usize = 16384;

/// Clusters of one KV head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// At most one per key.
    pub n_cluster: usize,
    /// At most one per fine cluster; 0: one level.
    pub n_coarse: usize,
    /// Assignments per level.
    pub iterations: u32,
}

/// Keys in fine and coarse clusters.
pub(super) struct Tree {
    /// Fine cluster of each key; none is empty.
    pub label: Vec<u32>,
    /// Fine clusters of coarse cluster j are `coarse_offsets[j]..coarse_offsets[j + 1]`; empty without a coarse level.
    pub coarse_offsets: Vec<u32>,
    /// Multiply-adds of the assignments.
    pub products: u64,
}

/// Coarse clusters for `n` keys: the number for which both levels cost about the same to search, at decode as here.
pub(super) fn n_coarse(n: usize) -> usize {
    if n < LEAST_KEYS {
        return 0;
    }
    (n as f64).sqrt().round() as usize
}

/// Clusters `unit` (`[n][dim]`, unit rows). `step` gets shares of the work that are done; they add up to 1.
pub(super) fn cluster(unit: &[f32], dim: usize, plan: &Plan, seed: u64, step: &(dyn Fn(f64) + Sync)) -> Tree {
    let n = unit.len() / dim;
    let Plan { n_cluster, n_coarse, iterations } = *plan;
    if n_coarse == 0 {
        let step = |k: u32| step(k as f64 / iterations as f64);
        let Clustering { label, products, .. } = kmeans::cluster(unit, dim, n_cluster, iterations, seed, &step);
        return Tree { label, coarse_offsets: Vec::new(), products };
    }
    // Shares of coarse level, fine level and refinement, were all coarse clusters equal.
    let (rounds, fine) = (iterations as f64, n_cluster as f64 / n_coarse as f64);
    let sampled = (SAMPLE * n_coarse).min(n) as f64 / n as f64;
    let costs = [n_coarse as f64 * (1.0 + rounds * sampled), fine * rounds, fine * (NEAR * REFINEMENTS) as f64];
    let share = costs.map(|cost| cost / costs.iter().sum::<f64>());

    let top = coarse(unit, dim, n_coarse, iterations, seed, &|part| step(share[0] * part));
    let (start, order) = kmeans::group(&top.label, n_coarse);
    let sizes: Vec<usize> = start.windows(2).map(|w| w[1] - w[0]).collect();
    let coarse_offsets = offsets(&allot(&sizes, n_cluster));
    let run = |j: usize| coarse_offsets[j] as usize..coarse_offsets[j + 1] as usize;

    // The largest first, so that no thread is left with one at the end.
    let mut largest_first: Vec<usize> = (0..n_coarse).collect();
    largest_first.sort_by_key(|&j| std::cmp::Reverse(sizes[j]));
    let split = |&j: &usize| {
        let rows = gather(unit, dim, &order[start[j]..start[j + 1]]);
        let mut seed = seed ^ (j as u64 + 1).rotate_left(32);
        let made = kmeans::cluster(&rows, dim, run(j).len(), iterations, split_mix(&mut seed), &|_| ());
        step(share[1] * sizes[j] as f64 / n as f64);
        (j, made)
    };
    let parts: Vec<(usize, Clustering)> = largest_first.par_iter().with_max_len(1).map(split).collect();
    let mut label = vec![0; n];
    let mut direction = vec![0.0; n_cluster * dim];
    let mut products = top.products;
    for (j, part) in parts {
        for (&i, &c) in order[start[j]..start[j + 1]].iter().zip(&part.label) {
            label[i as usize] = coarse_offsets[j] + c;
        }
        direction[run(j).start * dim..run(j).end * dim].copy_from_slice(&part.direction);
        products += part.products;
    }

    let near = neighbours(&top.direction, dim, NEAR);
    for _ in 0..REFINEMENTS {
        kmeans::update(unit, dim, &label, &mut direction);
        products += refine(unit, dim, &direction, &coarse_offsets, &near, &mut label);
        step(share[2] / REFINEMENTS as f64);
    }
    Tree { label, coarse_offsets, products }
}

/// The coarse level: K-means on a sample at even distances, then one assignment of all keys.
fn coarse(
    unit: &[f32],
    dim: usize,
    n_coarse: usize,
    iterations: u32,
    seed: u64,
    step: &(dyn Fn(f64) + Sync),
) -> Clustering {
    let n = unit.len() / dim;
    let n_sample = (SAMPLE * n_coarse).min(n);
    let sample: Vec<u32> = (0..n_sample).map(|i| (i * n / n_sample) as u32).collect();
    let parts = (iterations + 1) as f64;
    let made =
        kmeans::cluster(&gather(unit, dim, &sample), dim, n_coarse, iterations, seed, &|k| step(k as f64 / parts));
    let (mut label, mut similarity) = (vec![0; n], vec![0.0; n]);
    kmeans::assign(unit, &made.direction, dim, &mut label, &mut similarity);
    kmeans::repair(unit, dim, n_coarse, &mut label, &similarity);
    step(1.0 / parts);
    Clustering { label, direction: made.direction, products: made.products + (n * n_coarse * dim) as u64 }
}

/// `total` clusters over coarse clusters of `sizes` keys: at least 1 and at most one per key each, otherwise in proportion to
/// the keys (by the method of Webster and Sainte-Lague).
pub(super) fn allot(sizes: &[usize], total: usize) -> Vec<usize> {
    use std::cmp::Ordering;
    use std::collections::BinaryHeap;

    /// Keys per seat, were the next one given; compared as fractions, of equals the lower number first.
    #[derive(PartialEq, Eq)]
    struct Claim(u64, u64, usize);
    impl Ord for Claim {
        fn cmp(&self, other: &Self) -> Ordering {
            (self.0 * other.1).cmp(&(other.0 * self.1)).then(other.2.cmp(&self.2))
        }
    }
    impl PartialOrd for Claim {
        fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
            Some(self.cmp(other))
        }
    }
    let claim = |j: usize, seats: usize| (seats < sizes[j]).then(|| Claim(sizes[j] as u64, 2 * seats as u64 + 1, j));
    let mut seats = vec![1; sizes.len()];
    let mut claims: BinaryHeap<Claim> = (0..sizes.len()).filter_map(|j| claim(j, 1)).collect();
    for _ in sizes.len()..total {
        let Some(Claim(_, _, j)) = claims.pop() else { break };
        seats[j] += 1;
        claims.extend(claim(j, seats[j]));
    }
    seats
}

pub(super) fn offsets(sizes: &[usize]) -> Vec<u32> {
    let ends = sizes.iter().scan(0, |end, &n| {
        *end += n as u32;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

pub(super) fn gather(rows: &[f32], dim: usize, which: &[u32]) -> Vec<f32> {
    which.iter().flat_map(|&i| &rows[i as usize * dim..][..dim]).copied().collect()
}

/// The `count` nearest to each of some directions, itself among them, ascending.
pub(super) fn neighbours(direction: &[f32], dim: usize, count: usize) -> Vec<Vec<u32>> {
    let n = direction.len() / dim;
    let near = |own: &[f32]| -> Vec<u32> {
        let mut dots = vec![0.0; n];
        dot_rows(own, direction, dim, &mut dots);
        let mut order: Vec<u32> = (0..n as u32).collect();
        if count < n {
            let by_dot = |a: &u32, b: &u32| dots[*b as usize].total_cmp(&dots[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(count, by_dot);
            order.truncate(count);
            order.sort_unstable();
        }
        order
    };
    direction.par_chunks(dim).map(near).collect()
}

/// Nearest fine cluster of every key below the coarse clusters around that of its label, and the cosine with it.
pub(super) struct Nearest {
    pub label: Vec<u32>,
    pub similarity: Vec<f32>,
    /// Multiply-adds.
    pub products: u64,
}

/// Compares every key with the fine clusters of `near[j]`, where its label is a fine cluster of coarse cluster j.
pub(super) fn nearest_around(
    unit: &[f32],
    dim: usize,
    direction: &[f32],
    coarse_offsets: &[u32],
    near: &[Vec<u32>],
    label: &[u32],
) -> Nearest {
    let parent = parents(coarse_offsets);
    let above: Vec<u32> = label.iter().map(|&c| parent[c as usize]).collect();
    let (start, order) = kmeans::group(&above, near.len());
    let compare = |j: usize| {
        let points = &order[start[j]..start[j + 1]];
        let fine: Vec<u32> =
            near[j].iter().flat_map(|&k| coarse_offsets[k as usize]..coarse_offsets[k as usize + 1]).collect();
        let (rows, candidates) = (gather(unit, dim, points), gather(direction, dim, &fine));
        let (mut nearest, mut similarity) = (vec![0; points.len()], vec![0.0; points.len()]);
        kmeans::assign(&rows, &candidates, dim, &mut nearest, &mut similarity);
        nearest.iter_mut().for_each(|c| *c = fine[*c as usize]);
        (nearest, similarity, (points.len() * fine.len() * dim) as u64)
    };
    let parts: Vec<(Vec<u32>, Vec<f32>, u64)> = (0..near.len()).into_par_iter().with_max_len(1).map(compare).collect();
    let n = label.len();
    let mut found = Nearest { label: vec![0; n], similarity: vec![0.0; n], products: 0 };
    for (j, (nearest, cosine, cost)) in parts.into_iter().enumerate() {
        for (&i, (c, x)) in order[start[j]..start[j + 1]].iter().zip(nearest.into_iter().zip(cosine)) {
            found.label[i as usize] = c;
            found.similarity[i as usize] = x;
        }
        found.products += cost;
    }
    found
}

/// Moves every key to the nearest cluster around it, as above; none is left empty. Returns the multiply-adds.
pub(super) fn refine(
    unit: &[f32],
    dim: usize,
    direction: &[f32],
    coarse_offsets: &[u32],
    near: &[Vec<u32>],
    label: &mut Vec<u32>,
) -> u64 {
    let found = nearest_around(unit, dim, direction, coarse_offsets, near, label);
    *label = found.label;
    kmeans::repair(unit, dim, direction.len() / dim, label, &found.similarity);
    found.products
}

/// Coarse cluster of every fine one.
pub(super) fn parents(coarse_offsets: &[u32]) -> Vec<u32> {
    coarse_offsets.windows(2).enumerate().flat_map(|(j, w)| vec![j as u32; (w[1] - w[0]) as usize]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::gaussian;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn seats_are_in_proportion(sizes in prop::collection::vec(1usize..90, 1..40), share in 0.0f64..1.0) {
            let n: usize = sizes.iter().sum();
            let total = ((n as f64 * share) as usize).clamp(sizes.len(), n);
            let seats = allot(&sizes, total);
            prop_assert_eq!(seats.iter().sum::<usize>(), total);
            prop_assert!(seats.iter().zip(&sizes).all(|(&s, &n)| (1..=n).contains(&s)));
            // No seat would be claimed more strongly elsewhere.
            for (a, &seats_a) in seats.iter().enumerate().filter(|(_, s)| **s > 1) {
                for (b, &seats_b) in seats.iter().enumerate().filter(|(b, s)| **s < sizes[*b]) {
                    prop_assert!(sizes[a] * (2 * seats_b + 1) >= sizes[b] * (2 * seats_a - 1));
                }
            }
        }

        #[test]
        fn no_cluster_is_empty_and_runs_fill_the_clusters(
            n in 1usize..400, kinds in 1usize..40, fine in 0.0f64..1.0, coarse in 0.0f64..1.0, seed: u64,
        ) {
            let n_cluster = ((n as f64 * fine) as usize).clamp(1, n);
            let n_coarse = ((n_cluster as f64 * coarse) as usize).clamp(1, n_cluster);
            let pool = gaussian(kinds * 5, seed);
            let mut unit: Vec<f32> = (0..n).flat_map(|i| pool[i % kinds * 5..][..5].to_vec()).collect();
            kmeans::normalise(&mut unit, 5);
            let done = std::sync::Mutex::new(0.0);
            let plan = Plan { n_cluster, n_coarse, iterations: 3 };
            let tree = cluster(&unit, 5, &plan, seed, &|share| *done.lock().unwrap() += share);
            let (start, _) = kmeans::group(&tree.label, n_cluster);
            prop_assert!(start.windows(2).all(|w| w[0] < w[1]));
            prop_assert_eq!(tree.coarse_offsets.len(), n_coarse + 1);
            prop_assert_eq!((tree.coarse_offsets[0], tree.coarse_offsets[n_coarse] as usize), (0, n_cluster));
            prop_assert!(tree.coarse_offsets.windows(2).all(|w| w[0] < w[1]));
            let done = done.into_inner().unwrap();
            prop_assert!((done - 1.0f64).abs() < 1e-9, "{}", done);
        }
    }

    #[test]
    fn planted_coarse_clusters_hold_their_own_keys() {
        // Keys of 6 far groups in turn, each of 5 narrower ones.
        let (dim, groups, kinds, n) = (32, 6, 5, 6 * 5 * 40);
        let (far, near, noise) = (gaussian(groups * dim, 1), gaussian(groups * kinds * dim, 2), gaussian(n * dim, 3));
        let group = |i: usize| i % groups;
        let kind = |i: usize| i % (groups * kinds);
        let mut unit: Vec<f32> = (0..n * dim)
            .map(|at| (at / dim, at % dim))
            .map(|(i, d)| far[group(i) * dim + d] + 0.4 * near[kind(i) * dim + d] + 0.05 * noise[i * dim + d])
            .collect();
        kmeans::normalise(&mut unit, dim);
        let plan = Plan { n_cluster: 4 * groups * kinds, n_coarse: 4 * groups, iterations: 10 };
        let tree = cluster(&unit, dim, &plan, 1, &|_| ());
        let coarse = |c: u32| tree.coarse_offsets.iter().filter(|o| **o <= c).count();
        for i in 0..n {
            for j in 0..i {
                if tree.label[i] == tree.label[j] {
                    assert_eq!(kind(i), kind(j), "keys {i} and {j}");
                }
                if coarse(tree.label[i]) == coarse(tree.label[j]) {
                    assert_eq!(group(i), group(j), "keys {i} and {j}");
                }
            }
        }
    }

    #[test]
    fn keys_end_with_the_nearest_cluster_around_them() {
        // With no more than NEAR coarse clusters a refinement looks at all fine ones.
        let (n, dim) = (900, 16);
        let mut unit = gaussian(n * dim, 3);
        kmeans::normalise(&mut unit, dim);
        let (offsets, near) = ([0u32, 4, 9, 12], vec![vec![0, 1, 2]; 3]);
        let mut direction = gaussian(12 * dim, 4);
        kmeans::normalise(&mut direction, dim);
        let mut label: Vec<u32> = (0..n as u32).map(|i| i % 12).collect();
        let products = refine(&unit, dim, &direction, &offsets, &near, &mut label);
        let (mut expected, mut similarity) = (vec![0; n], vec![0.0; n]);
        kmeans::assign(&unit, &direction, dim, &mut expected, &mut similarity);
        assert_eq!(label, expected);
        assert_eq!(products, (n * 12 * dim) as u64);
    }
}
