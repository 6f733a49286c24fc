//! The setting of a calibrated mode at which it keeps a share of the keys, on tokens that are asked.

use anyhow::Result;

/// Trials.
const STEPS: usize = 8;
/// Near enough, relative to the share.
const NEAR: f64 = 0.02;

/// A number near which `kept` is `wanted`, by the secant rule on the logarithm of the share; `kept` rises all the way, or
/// falls if not `rises`. The best of few trials, from `start` on.
pub fn solve(start: f64, wanted: f64, rises: bool, kept: &mut dyn FnMut(f64) -> Result<f64>) -> Result<f64> {
    let off = |share: f64| share.max(1e-6).ln() - wanted.max(1e-6).ln();
    let mut trials: Vec<(f64, f64)> = Vec::new();
    let mut x = start;
    let sign = if rises { 1.0 } else { -1.0 };
    for step in 0..STEPS {
        trials.push((x, off(kept(x)?)));
        let best =
            trials.iter().copied().fold((start, f64::INFINITY), |a, b| if b.1.abs() < a.1.abs() { b } else { a });
        if best.1.abs() < NEAR || step + 1 == STEPS {
            return Ok(best.0);
        }
        // Between the nearest trials on either side, if there are such, else along the line through the last two.
        let below = trials.iter().filter(|t| t.1 < 0.0).max_by(|a, b| a.1.total_cmp(&b.1));
        let above = trials.iter().filter(|t| t.1 >= 0.0).min_by(|a, b| a.1.total_cmp(&b.1));
        let (a, b) = match (below, above, trials.len()) {
            (Some(a), Some(b), _) => (*a, *b),
            (_, _, n) if n > 1 => (trials[n - 2], trials[n - 1]),
            _ => ((x - sign, best.1 - 1.0), (x, best.1)),
        };
        let slope = (b.1 - a.1) / (b.0 - a.0);
        // A line from far away says little: halves then.
        if a.1 * b.1 < 0.0 && (b.1 - a.1).abs() > 2.0 {
            x = (a.0 + b.0) / 2.0;
            continue;
        }
        let step = if slope.is_finite() && slope * sign > 1e-3 { -b.1 / slope } else { -b.1.signum() * sign * 3.0 };
        x = b.0 + step.clamp(-3.0, 3.0);
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_met_from_either_side() {
        for wanted in [0.05, 0.2, 0.6] {
            for start in [-12.0, -7.0, -2.0] {
                // Falls with the threshold, as a share of keys does.
                let mut share = |x: f64| Ok(1.0 / (1.0 + (x + 7.0).exp()));
                let x = solve(start, wanted, false, &mut share).unwrap();
                let got = share(x).unwrap();
                assert!((got / wanted - 1.0).abs() < 0.06, "{got}, not {wanted}, from {start}");
                let mut rising = |x: f64| Ok(1.0 - (-x.exp()).exp());
                let x = solve(1.0, wanted, true, &mut rising).unwrap();
                assert!((rising(x).unwrap() / wanted - 1.0).abs() < 0.06);
            }
        }
    }

    #[test]
    fn what_does_not_change_ends() {
        let mut trials = 0;
        solve(1.0, 0.5, true, &mut |_| {
            trials += 1;
            Ok(0.1)
        })
        .unwrap();
        assert_eq!(trials, STEPS);
    }
}
