//! The baselines against brute force on random keys.

use proptest::prelude::*;

use super::*;

const D: usize = 8;

/// A pair with its keys and the queries of some rows.
struct Random {
    place: Place,
    /// `[end][D]`, sinks first.
    keys: Vec<f32>,
    /// `[row][G][D]`.
    q: Vec<f32>,
}

impl Random {
    fn new(seed: u64, n_row: usize, row: usize) -> Random {
        let mut r = crate::facts::Random::new(seed);
        let (first, open) = (r.below(5), 30 + r.below(200));
        let place = Place { layer: 2, row, head_kv: 1, n_group: 1 + r.below(4), head_dim: D, first, end: first + open };
        let mut numbers = |n: usize| (0..n).map(|_| (r.share() * 4.0 - 2.0) as f32).collect::<Vec<f32>>();
        Random { place, keys: numbers(place.end * D), q: numbers(n_row * place.n_group * D) }
    }

    fn layer(&self) -> Layer {
        Layer {
            n_prefix: self.place.end + 7,
            n_sink: self.place.first,
            n_window: 7,
            n_cluster: 5,
            head_dim_k: D,
            head_dim_v: D,
            key: 16.0,
            value: 16.0,
            member: 2.0,
        }
    }

    fn score(&self, row: usize, g: usize, token: usize) -> f64 {
        let (q, k) = (&self.q[(row * self.place.n_group + g) * D..][..D], &self.keys[token * D..][..D]);
        q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// Mean over the group of the probabilities of all keys of the prefix.
    fn probabilities(&self, row: usize) -> Vec<f64> {
        let mut out = vec![0.0; self.place.end];
        for g in 0..self.place.n_group {
            let total: f64 = (0..self.place.end).map(|t| self.score(row, g, t).exp()).sum();
            (0..self.place.end).for_each(|t| out[t] += self.score(row, g, t).exp() / total);
        }
        out
    }

    fn working(&self, method: Method, share: f64) -> Working {
        Working::new(method, share, HashMap::from([(2, self.layer())]), Arc::default())
    }
}

impl Sight for Random {
    fn place(&self) -> Place {
        self.place
    }
    fn query(&self, row: usize) -> Vec<f32> {
        let n = self.place.n_group * D;
        self.q[row * n..(row + 1) * n].to_vec()
    }
    fn keys(&self) -> Vec<f32> {
        self.keys[self.place.first * D..].to_vec()
    }
    fn scores(&self, row: usize, n: usize) -> Vec<f32> {
        let heads = 0..self.place.n_group;
        heads.flat_map(|g| (0..n).map(move |t| (g, t))).map(|(g, t)| self.score(row, g, t) as f32).collect()
    }
}

fn group(choice: Option<Choice>) -> Vec<u32> {
    match choice {
        Some(Choice::Group(mut list)) => {
            list.sort_unstable();
            list
        }
        other => panic!("{other:?}"),
    }
}

/// The tokens of the largest values, sinks excluded, by a full sort.
fn top(p: &[f64], first: usize, n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (first as u32..p.len() as u32).collect();
    order.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
    order.truncate(n);
    order.sort_unstable();
    order
}

proptest! {
    #[test]
    fn the_oracle_keeps_the_keys_of_the_largest_mass(seed in any::<u64>(), share in 0.05f64..0.9) {
        let r = Random::new(seed, 1, 0);
        let working = r.working(Method::Oracle, share);
        working.begin(0, 1);
        let list = group(working.choose(&r));
        prop_assert_eq!(list.len(), r.layer().keys(Method::Oracle, share, 1.0));
        prop_assert_eq!(list.clone(), top(&r.probabilities(0), r.place.first, list.len()));
    }

    #[test]
    fn the_window_keeps_the_last_keys(seed in any::<u64>(), share in 0.05f64..0.9) {
        let r = Random::new(seed, 1, 0);
        let working = r.working(Method::Window, share);
        working.begin(0, 1);
        let list = group(working.choose(&r));
        let want: Vec<u32> = ((r.place.end - list.len()) as u32..r.place.end as u32).collect();
        prop_assert_eq!(list.len(), r.layer().keys(Method::Window, share, 1.0));
        prop_assert_eq!(list, want);
    }

    /// Pages by bound and by mean: no page that was left out has a better value than one that was kept, values by definition.
    #[test]
    fn pages_are_the_best_ones(seed in any::<u64>(), share in 0.3f64..0.9, bounds in any::<bool>()) {
        let r = Random::new(seed, 1, 0);
        let (method, size) = if bounds { (Method::Bounds, BOUNDS_PAGE) } else { (Method::Means, MEANS_PAGE) };
        let working = r.working(method, share);
        working.begin(0, 1);
        let list = group(working.choose(&r));
        let pages: Vec<Vec<usize>> = (r.place.first..r.place.end).collect::<Vec<_>>().chunks(size).map(<[usize]>::to_vec).collect();
        let mut value = vec![0.0; pages.len()];
        for g in 0..r.place.n_group {
            let q = &r.q[g * D..][..D];
            let of = |page: &Vec<usize>| -> f64 {
                (0..D)
                    .map(|d| {
                        let terms = page.iter().map(|t| f64::from(q[d]) * f64::from(r.keys[t * D + d]));
                        match bounds {
                            true => terms.fold(f64::NEG_INFINITY, f64::max),
                            false => terms.sum::<f64>() / page.len() as f64,
                        }
                    })
                    .sum()
            };
            let scores: Vec<f64> = pages.iter().map(of).collect();
            let sinks: f64 = (0..r.place.first).map(|t| r.score(0, g, t).exp()).sum();
            let total = sinks + scores.iter().zip(&pages).map(|(s, p)| p.len() as f64 * s.exp()).sum::<f64>();
            value.iter_mut().zip(scores).for_each(|(v, s)| *v += s.exp() / total);
        }
        let kept: Vec<bool> = pages.iter().map(|p| list.contains(&(p[0] as u32))).collect();
        for (page, kept) in pages.iter().zip(&kept) {
            prop_assert!(page.iter().all(|t| list.contains(&(*t as u32)) == *kept), "a page is kept whole");
        }
        let least = (0..pages.len()).filter(|i| kept[*i]).map(|i| value[i]).fold(f64::INFINITY, f64::min);
        let most = (0..pages.len()).filter(|i| !kept[*i]).map(|i| value[i]).fold(0.0, f64::max);
        prop_assert!(least >= most * (1.0 - 1e-4));
        let keys = r.layer().keys(method, share, 1.0);
        prop_assert!(list.len() >= keys && list.len() < keys + size);
    }

    /// Each head has its own best pages; all together they have the keys.
    #[test]
    fn pages_of_each_head_are_its_best_ones(seed in any::<u64>(), share in 0.3f64..0.9) {
        let r = Random::new(seed, 1, 0);
        let working = r.working(Method::BoundsHead, share);
        working.begin(0, 1);
        let Some(Choice::Heads(lists)) = working.choose(&r) else { panic!("no lists of heads") };
        prop_assert_eq!(lists.len(), r.place.n_group);
        let mut union: Vec<u32> = lists.iter().flatten().copied().collect();
        union.sort_unstable();
        union.dedup();
        let keys = r.layer().keys(Method::BoundsHead, share, 1.0);
        prop_assert!(union.len() >= keys && union.len() < keys + BOUNDS_PAGE);
        let starts: Vec<usize> = (r.place.first..r.place.end).step_by(BOUNDS_PAGE).collect();
        for (g, list) in lists.iter().enumerate() {
            let q = &r.q[g * D..][..D];
            let bound = |start: usize| -> f64 {
                let page = start..(start + BOUNDS_PAGE).min(r.place.end);
                let of = |d: usize| page.clone().map(|t| f64::from(q[d]) * f64::from(r.keys[t * D + d])).fold(f64::NEG_INFINITY, f64::max);
                (0..D).map(of).sum()
            };
            let (kept, dropped): (Vec<usize>, Vec<usize>) = starts.iter().partition(|s| list.contains(&(**s as u32)));
            let least = kept.into_iter().map(bound).fold(f64::INFINITY, f64::min);
            let most = dropped.into_iter().map(bound).fold(f64::NEG_INFINITY, f64::max);
            prop_assert!(least >= most - 1e-4);
        }
    }

    /// Rows share the selection of the anchor before them; a dense anchor attends to all.
    #[test]
    fn selections_are_used_again(seed in any::<u64>(), share in 0.4f64..0.8, recycled in any::<bool>(), row in 0usize..12) {
        let r = Random::new(seed, 12, row);
        let n = 4;
        let method = if recycled { Method::Recycled(n) } else { Method::Tokens(n) };
        let working = r.working(method, share);
        working.begin(0, 12);
        let list = group(working.choose(&r));
        let keys = r.layer().keys(method, share, 0.25);
        if recycled && row % n == 0 {
            prop_assert_eq!(list.len(), r.place.end - r.place.first);
        } else {
            prop_assert_eq!(list, top(&r.probabilities(row / n * n), r.place.first, keys));
        }
    }

    /// Token by token it is the same as in one batch.
    #[test]
    fn one_row_after_the_other_is_as_one_batch(seed in any::<u64>(), recycled in any::<bool>()) {
        let method = if recycled { Method::Recycled(4) } else { Method::Tokens(4) };
        let whole = Random::new(seed, 8, 0).working(method, 0.7);
        let single = Random::new(seed, 8, 0).working(method, 0.7);
        whole.begin(0, 8);
        for row in 0..8 {
            let in_batch = Random::new(seed, 8, row);
            let n = in_batch.place.n_group * D;
            let alone = Random { place: Place { row: 0, ..in_batch.place }, q: in_batch.q[row * n..(row + 1) * n].to_vec(), ..Random::new(seed, 8, row) };
            single.begin(row, 1);
            prop_assert_eq!(group(whole.choose(&in_batch)), group(single.choose(&alone)), "row {}", row);
        }
    }
}

#[test]
fn what_is_read_is_summed_by_layer() {
    let r = Random::new(1, 8, 0);
    let layer = r.layer();
    let working = r.working(Method::Tokens(4), 0.5);
    working.begin(0, 8);
    for row in 0..8 {
        working.attended(&Seen { layer: 2, row, head_kv: 0, keys: 10, clusters: 0, missed: Some(0.25) });
    }
    let sums = working.take()[&2];
    let bytes = 2.0 * layer.read(Method::Tokens(4), 10, 0, true) + 6.0 * layer.read(Method::Tokens(4), 10, 0, false);
    assert_eq!((sums.n, sums.mean().missed), (8.0, 0.25));
    assert!((sums.bytes - bytes / layer.dense()).abs() < 1e-9);
    assert!(working.take().is_empty());
}

#[test]
fn the_index_selects_where_it_is_to() {
    let r = Random::new(1, 1, 0);
    let usual = Selection {
        mode: Mode::Threshold { threshold: 0.1, floor: 0.05 },
        spread: Spread::Diag,
        alpha: 2.0,
        estimate: false,
        coarse_share: 1.0,
    };
    let working = r.working(Method::Index { spread: Spread::Diag, estimate: false }, 0.2);
    assert_eq!((working.choose(&r), working.selection(0, usual)), (None, usual));
    let working = working.with(BTreeMap::from([(0, Mode::Budget(1.0))]), Some(3.0), true);
    assert_eq!(working.selection(0, usual), Selection { mode: Mode::Budget(1.0), alpha: 3.0, ..usual });
    let floorless = Mode::Threshold { threshold: 0.1, floor: 0.0 };
    assert_eq!(working.selection(1, usual), Selection { mode: floorless, alpha: 3.0, ..usual });
}
