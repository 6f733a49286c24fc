//! Portable inner loops: what runs without AVX2, and what the AVX2 path is tested against. Contracts in `kernels`.

use half::f16;

use super::kernels::{Source, BLOCK};

/// # Safety
/// See `kernels::dots`.
pub(super) unsafe fn dots(
    source: Source,
    q: &[f32],
    d: usize,
    rows: &[*const u8],
    _next: &[*const u8],
    out: &mut [f32],
) {
    for (r, row) in rows.iter().enumerate() {
        for (g, q) in q.chunks_exact(d).enumerate() {
            let mut sum = 0.0;
            for (i, q) in q.iter().enumerate() {
                // SAFETY: a row holds `d` elements.
                sum += q * unsafe {
                    match source {
                        Source::F16 => row.cast::<f16>().add(i).read_unaligned().to_f32(),
                        Source::U8 => row.add(i).read() as f32,
                    }
                };
            }
            out[g * BLOCK + r] = sum;
        }
    }
}

/// # Safety
/// See `kernels::accumulate`.
pub(super) unsafe fn accumulate(p: &[f32], d: usize, rows: &[*const u8], _next: &[*const u8], acc: &mut [f32]) {
    for (r, row) in rows.iter().enumerate() {
        for i in 0..d {
            // SAFETY: a row holds `d` elements.
            let v = unsafe { row.cast::<f16>().add(i).read_unaligned() }.to_f32();
            for (g, acc) in acc.chunks_exact_mut(d).enumerate() {
                acc[i] += p[g * BLOCK + r] * v;
            }
        }
    }
}

pub(super) fn exp_sum(s: &mut [f32], max: f32) -> f32 {
    let mut sum = 0.0;
    for s in s {
        *s = (*s - max).exp();
        sum += *s;
    }
    sum
}

pub(super) fn max(s: &[f32]) -> f32 {
    s.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s))
}

pub(super) fn cap(s: &mut [f32], cap: f32) {
    s.iter_mut().for_each(|s| *s = cap * s.tanh());
}

pub(super) fn weighted_sum(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums, as the vector path has them: one long f32 sum would lose digits.
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

pub(super) fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += f * b);
}
