//! Confidence intervals by the bootstrap: questions are drawn again, each task among its own.

use ggml_squeeze::random::split_mix;
use serde::{Deserialize, Serialize};

use super::mean;

const DRAWS: usize = 2000;

/// A mean and its 95 % interval (percentiles of the bootstrap).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// Mean over groups of the mean over a group's values. The same values give the same interval. Groups without values count for
/// nothing; `None` if all are.
pub fn interval(groups: &[Vec<f64>]) -> Option<Interval> {
    let groups: Vec<&Vec<f64>> = groups.iter().filter(|g| !g.is_empty()).collect();
    if groups.is_empty() {
        return None;
    }
    let of = |values: &dyn Fn(&Vec<f64>) -> f64, groups: &[&Vec<f64>]| {
        groups.iter().map(|g| values(g)).sum::<f64>() / groups.len() as f64
    };
    let mut state = 0x5eed;
    let mut draws: Vec<f64> = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        let mut sum = 0.0;
        for g in &groups {
            let drawn: f64 = (0..g.len()).map(|_| g[(split_mix(&mut state) % g.len() as u64) as usize]).sum();
            sum += drawn / g.len() as f64;
        }
        draws.push(sum / groups.len() as f64);
    }
    draws.sort_by(f64::total_cmp);
    let at = |share: f64| draws[((share * DRAWS as f64) as usize).min(DRAWS - 1)];
    Some(Interval { mean: of(&|g| mean(g), &groups), low: at(0.025), high: at(0.975) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_coin_is_that_of_the_binomial() {
        let values: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let i = interval(&[values]).unwrap();
        // Normal approximation: 0.5 +- 1.96 * 0.05.
        assert!(i.mean == 0.5 && (i.low - 0.402).abs() < 0.02 && (i.high - 0.598).abs() < 0.02, "{i:?}");
    }

    #[test]
    fn groups_weigh_alike_and_a_constant_has_no_width() {
        let i = interval(&[vec![1.0; 3], vec![0.0; 30], vec![]]).unwrap();
        assert_eq!(i, Interval { mean: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(interval(&[vec![], vec![]]), None);
        assert_eq!(interval(&[vec![1.0, 2.0]]), interval(&[vec![1.0, 2.0]]));
    }
}
