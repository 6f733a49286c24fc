//! Numbers that compare one run of a model with another: divergence, agreement, quantiles, mean and deviation.

pub mod bootstrap;
pub mod text;

/// Token with the largest logit; of equal ones the first.
pub fn argmax(logits: &[f32]) -> i32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] || logits[best].is_nan() {
            best = i;
        }
    }
    best as i32
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
}

/// KL(p || q) in nats over the whole vocabulary, of two rows of logits.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (zp, zq) = (log_sum_exp(p), log_sum_exp(q));
    p.iter()
        .zip(q)
        .map(|(a, b)| {
            let log_p = f64::from(*a) - zp;
            // A token that p excludes (-inf) adds nothing.
            if log_p.is_finite() {
                log_p.exp() * (log_p - (f64::from(*b) - zq))
            } else {
                0.0
            }
        })
        .sum()
}

/// Loss of a token, in nats: minus the logarithm of its probability.
pub fn loss(logits: &[f32], token: i32) -> f64 {
    let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    log_sum_exp(logits) - f64::from(logit)
}

pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() {
        0.0
    } else {
        values.iter().sum::<f64>() / values.len() as f64
    }
}

/// Sample standard deviation; 0 for fewer than two values.
pub fn deviation(values: &[f64]) -> f64 {
    let m = mean(values);
    let square: f64 = values.iter().map(|v| (v - m) * (v - m)).sum();
    if values.len() < 2 {
        0.0
    } else {
        (square / (values.len() - 1) as f64).sqrt()
    }
}

/// Quantile by the nearest rank.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_known_distributions() {
        let logits = |p: [f64; 2]| p.map(|x| x.ln() as f32);
        let expected = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((kl(&logits([0.75, 0.25]), &logits([0.5, 0.5])) - expected).abs() < 1e-6);
        // Logits are free of an added constant.
        assert!(kl(&[1.0, 2.0, 3.0], &[101.0, 102.0, 103.0]).abs() < 1e-6);
        assert!(kl(&[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY]).abs() < 1e-12);
        assert!(kl(&[0.0, 0.0], &[0.0, f32::NAN]).is_nan());
    }

    #[test]
    fn the_loss_is_minus_the_log_probability() {
        let logits: Vec<f32> = [0.5f64, 0.25, 0.25].iter().map(|p| p.ln() as f32 + 3.0).collect();
        assert!((loss(&logits, 0) - 2f64.ln()).abs() < 1e-6 && (loss(&logits, 2) - 4f64.ln()).abs() < 1e-6);
        assert_eq!(loss(&logits, 7), f64::INFINITY);
    }

    #[test]
    fn largest_logit_with_ties_and_nan() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -1.0, -2.0]), 1);
    }

    #[test]
    fn moments_and_quantiles() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((mean(&values), quantile(&values, 0.95), quantile(&values, 1.0)), (50.5, 95.0, 100.0));
        assert!((deviation(&[1.0, 3.0]) - 2f64.sqrt()).abs() < 1e-12);
        assert_eq!((mean(&[]), deviation(&[5.0]), quantile(&[], 0.5)), (0.0, 0.0, 0.0));
    }
}
