//! Whether what was captured is what the attention op had: attention over it must give the op's output.

#![forbid(unsafe_code)]

use crate::build::LayerCapture;

/// Relative error above which captured K, Q and V are taken to be something else than the op's. A wrong layout is at 1.
/// llama.cpp's kernels stay near 0.0001; with a quantised K cache, where they round the queries too, below 0.1.
const VERIFY_TOLERANCE: f32 = 0.1;
/// The same where the op had so few query rows that llama.cpp's CPU sums values in F16: above 0.1 behind 6480 tokens.
const VERIFY_TOLERANCE_FEW: f32 = 0.5;
const FEW_ROWS: usize = 64;
/// Heads per layer that are checked so.
const VERIFY_HEADS: usize = 4;

/// Largest error that is believed, of an op with so many query rows.
pub fn tolerance(n_row: usize) -> f32 {
    if n_row < FEW_ROWS {
        VERIFY_TOLERANCE_FEW
    } else {
        VERIFY_TOLERANCE
    }
}

/// What the op of the last prefix token had and gave, in the plain basis.
pub struct Seen<'a> {
    pub n_head: usize,
    pub softcap: f32,
    /// One per query head, or none.
    pub sinks: &'a [f32],
    /// `[n_head][head_dim_v]`.
    pub output: &'a [f32],
}

impl Seen<'_> {
    /// Largest relative error of the heads that are checked.
    pub fn error(&self, capture: &LayerCapture) -> f32 {
        let dv = capture.head_dim_v as usize;
        (0..self.n_head)
            .step_by(self.n_head.div_ceil(VERIFY_HEADS))
            .map(|h| {
                let seen = self.output.get(h * dv..(h + 1) * dv).unwrap_or_default();
                relative_error(&self.attend(capture, h), seen)
            })
            .fold(0.0, f32::max)
    }

    /// Exact attention of one head of the last prefix token over the captured keys and values, `[head_dim_v]`.
    fn attend(&self, c: &LayerCapture, head: usize) -> Vec<f32> {
        let (dk, dv, n_kv) = (c.head_dim_k as usize, c.head_dim_v as usize, c.n_head_kv as usize);
        let (kv, n_prefix) = (head / c.n_group as usize, c.k.len() / (n_kv * dk));
        let q = &c.q[c.q.len() - (self.n_head - head) * dk..][..dk];
        let score = |t: usize| {
            let k = &c.k[(t * n_kv + kv) * dk..][..dk];
            let dot: f32 = q.iter().zip(k).map(|(a, b)| a * b.to_f32()).sum();
            match self.softcap {
                cap if cap > 0.0 => cap * (dot * c.scale / cap).tanh(),
                _ => dot * c.scale,
            }
        };
        let scores: Vec<f32> = (0..n_prefix).map(score).collect();
        let sink = self.sinks.get(head).copied().unwrap_or(f32::NEG_INFINITY);
        let max = scores.iter().copied().fold(sink, f32::max);
        let mut sum = f64::from((sink - max).exp());
        let mut acc = vec![0.0f64; dv];
        for (t, s) in scores.iter().enumerate() {
            let p = f64::from((s - max).exp());
            sum += p;
            let v = &c.v[(t * n_kv + kv) * dv..][..dv];
            acc.iter_mut().zip(v).for_each(|(a, x)| *a += p * x.to_f64());
        }
        acc.iter().map(|a| (a / sum) as f32).collect()
    }
}

/// |a - b| / |b|, infinite if the shapes differ or something is not a number.
fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(x, y)| square(x - y)).sum();
    let norm: f64 = b.iter().map(|y| square(*y)).sum();
    let error = (difference / norm.max(1e-30)).sqrt() as f32;
    if a.len() != b.len() || error.is_nan() {
        return f32::INFINITY;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error_tells_equal_scaled_and_broken() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.3, 4.4], &[3.0, 4.0]) - 0.1).abs() < 1e-6);
        assert_eq!(relative_error(&[3.0], &[3.0, 4.0]), f32::INFINITY);
        assert_eq!(relative_error(&[f32::NAN, 4.0], &[3.0, 4.0]), f32::INFINITY);
    }
}
