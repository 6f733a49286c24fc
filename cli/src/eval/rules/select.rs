//! The baselines' arithmetic on plain numbers: page bounds and means, softmax over a group, the best of a list.

/// Pages of consecutive keys: bounds (least and greatest of each dimension) and means.
#[derive(Clone, Debug, PartialEq)]
pub struct Pages {
    d: usize,
    /// `[n][d]`.
    least: Vec<f32>,
    most: Vec<f32>,
    means: Vec<f32>,
    /// First key of each page, and the number of keys.
    starts: Vec<usize>,
}

impl Pages {
    /// `keys` is `[N][d]`; `size` keys per page, the last one may have fewer.
    pub fn new(keys: &[f32], d: usize, size: usize) -> Pages {
        let n = keys.len() / d;
        let mut pages = Pages { d, least: Vec::new(), most: Vec::new(), means: Vec::new(), starts: vec![] };
        for page in keys.chunks(size * d) {
            let (mut least, mut most, mut sum) = (page[..d].to_vec(), page[..d].to_vec(), vec![0.0; d]);
            for key in page.chunks_exact(d) {
                for (i, x) in key.iter().enumerate() {
                    least[i] = least[i].min(*x);
                    most[i] = most[i].max(*x);
                    sum[i] += x;
                }
            }
            let rows = (page.len() / d) as f32;
            pages.starts.push(pages.means.len() / d * size);
            pages.least.extend(least);
            pages.most.extend(most);
            pages.means.extend(sum.iter().map(|x| x / rows));
        }
        pages.starts.push(n);
        pages
    }

    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// Keys of a page.
    pub fn keys(&self, page: usize) -> std::ops::Range<usize> {
        self.starts[page]..self.starts[page + 1]
    }

    pub fn sizes(&self) -> Vec<usize> {
        (0..self.len()).map(|page| self.keys(page).len()).collect()
    }

    /// The largest score that a key of each page could have (Quest).
    pub fn bounds(&self, q: &[f32]) -> Vec<f32> {
        let of = |(least, most): (&[f32], &[f32])| {
            q.iter().zip(least).zip(most).map(|((q, least), most)| (q * least).max(q * most)).sum()
        };
        self.least.chunks_exact(self.d).zip(self.most.chunks_exact(self.d)).map(of).collect()
    }

    /// Scores of the mean keys.
    pub fn mean_scores(&self, q: &[f32]) -> Vec<f32> {
        self.means.chunks_exact(self.d).map(|mean| mean.iter().zip(q).map(|(a, b)| a * b).sum()).collect()
    }
}

/// Mean over heads of the probability per key: `scores` and `sinks` of each head; item i stands for `sizes[i]` keys.
pub fn group_mean(scores: &[Vec<f32>], sinks: &[&[f32]], sizes: &[usize]) -> Vec<f32> {
    let mut out = vec![0.0f32; sizes.len()];
    for (scores, sinks) in scores.iter().zip(sinks) {
        let top = scores.iter().chain(*sinks).fold(f32::NEG_INFINITY, |m, s| m.max(*s));
        if top == f32::NEG_INFINITY {
            continue;
        }
        let of_sinks: f32 = sinks.iter().map(|s| (s - top).exp()).sum();
        let weights: Vec<f32> = scores.iter().map(|s| (s - top).exp()).collect();
        let total: f32 = of_sinks + weights.iter().zip(sizes).map(|(w, n)| w * *n as f32).sum::<f32>();
        out.iter_mut().zip(&weights).for_each(|(p, w)| *p += w / total);
    }
    out
}

/// Numbers by falling value, then rising number.
pub fn best_first(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order
}

/// The `n` best, in no order.
pub fn best(values: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    if n == 0 {
        order.clear();
    } else if n < order.len() {
        order.select_nth_unstable_by(n - 1, |a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
        order.truncate(n);
    }
    order
}

/// The first pages of an order until they have `keys` keys.
pub fn until(order: &[usize], sizes: &[usize], keys: usize) -> Vec<usize> {
    let mut n = 0;
    order.iter().copied().take_while(|page| (n < keys, n += sizes[*page]).0).collect()
}

/// For each head the first pages of its own order, as many for each, until all together have `keys` keys; pages that several
/// heads want count once.
pub fn until_union(orders: &[Vec<usize>], sizes: &[usize], keys: usize) -> Vec<Vec<usize>> {
    let mut taken = vec![false; sizes.len()];
    let mut lists = vec![Vec::new(); orders.len()];
    let mut n = 0;
    for rank in 0..sizes.len() {
        for (list, order) in lists.iter_mut().zip(orders) {
            if n >= keys {
                return lists;
            }
            let page = order[rank];
            n += if std::mem::replace(&mut taken[page], true) { 0 } else { sizes[page] };
            list.push(page);
        }
    }
    lists
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rows(n: usize, d: usize) -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-3.0f32..3.0, n * d)
    }

    proptest! {
        /// A bound holds for every key, and is the least that follows from each dimension's extremes.
        #[test]
        fn bounds_and_means_against_every_key(
            (keys, q) in (1usize..70).prop_flat_map(|n| (rows(n, 8), rows(1, 8))),
            size in 1usize..20,
        ) {
            let pages = Pages::new(&keys, 8, size);
            let n = keys.len() / 8;
            prop_assert_eq!(pages.sizes().iter().sum::<usize>(), n);
            let (bounds, means) = (pages.bounds(&q), pages.mean_scores(&q));
            for page in 0..pages.len() {
                let own = pages.keys(page);
                prop_assert!(own.len() == size || page + 1 == pages.len());
                let key = |i: usize| &keys[i * 8..(i + 1) * 8];
                let score = |i: usize| key(i).iter().zip(&q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let corner: f64 = (0..8)
                    .map(|d| own.clone().map(|i| f64::from(key(i)[d]) * f64::from(q[d])).fold(f64::NEG_INFINITY, f64::max))
                    .sum();
                prop_assert!(own.clone().all(|i| score(i) <= f64::from(bounds[page]) + 1e-4));
                prop_assert!((corner - f64::from(bounds[page])).abs() < 1e-4);
                let mean = own.clone().map(score).sum::<f64>() / own.len() as f64;
                prop_assert!((mean - f64::from(means[page])).abs() < 1e-4);
            }
        }

        #[test]
        fn the_best_are_those_of_a_full_sort(values in prop::collection::vec(0u8..9, 1..60), n in 0usize..70) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let mut got = best(&values, n);
            got.sort_unstable();
            let mut want: Vec<usize> = best_first(&values).into_iter().take(n).collect();
            want.sort_unstable();
            prop_assert_eq!(got, want);
        }

        /// One head needs no more than the keys; with several, all have as many pages, but for those that come last.
        #[test]
        fn unions_hold_the_keys_and_no_page_too_many(
            orders in (2usize..30).prop_flat_map(|n| prop::collection::vec(Just((0..n).collect::<Vec<_>>()).prop_shuffle(), 1..5)),
            keys in 0usize..120,
        ) {
            let sizes = vec![4; orders[0].len()];
            let lists = until_union(&orders, &sizes, keys);
            let union = |lists: &[Vec<usize>]| {
                let mut all: Vec<usize> = lists.iter().flatten().copied().collect();
                all.sort_unstable();
                all.dedup();
                4 * all.len()
            };
            prop_assert!(union(&lists) >= keys.min(4 * sizes.len()) && union(&lists) < keys + 4);
            let (most, least) = (lists.iter().map(Vec::len).max().unwrap(), lists.iter().map(Vec::len).min().unwrap());
            prop_assert!(most - least <= 1);
            for (list, order) in lists.iter().zip(&orders) {
                prop_assert_eq!(&list[..], &order[..list.len()]);
            }
            if orders.len() == 1 {
                prop_assert_eq!(&lists[0], &until(&orders[0], &sizes, keys));
            }
        }
    }

    #[test]
    fn probabilities_by_hand() {
        // Two items of 1 and 3 keys with weights 2 and 1, a sink of weight 1: total 6. The other head sees the sink alone.
        let head = vec![2f32.ln(), 0.0];
        let p = group_mean(&[head, vec![f32::NEG_INFINITY; 2]], &[&[0.0], &[0.0]], &[1, 3]);
        assert!((p[0] - 2.0 / 6.0).abs() < 1e-6 && (p[1] - 1.0 / 6.0).abs() < 1e-6, "{p:?}");
    }
}
