//! Portable inner loops: what runs where no other path does, and what the others are tested against. Contracts in
//! `kernels`.

use half::{bf16, f16};

use super::kernels::{Source, BLOCK};
use super::HEAD_DIM_MAX;

/// A row as f32.
///
/// # Safety
/// `row` holds as many elements as `out`.
unsafe fn decode_row(source: Source, row: *const u8, out: &mut [f32]) {
    // SAFETY: elements below `out.len()` are inside the row.
    unsafe {
        match source {
            Source::F32 => each(out, |i| row.cast::<f32>().add(i).read_unaligned()),
            Source::F16 => each(out, |i| row.cast::<f16>().add(i).read_unaligned().to_f32()),
            Source::BF16 => each(out, |i| row.cast::<bf16>().add(i).read_unaligned().to_f32()),
            Source::U8 => each(out, |i| row.add(i).read() as f32),
            Source::Q8_0 => {
                for (b, out) in out.chunks_exact_mut(32).enumerate() {
                    let block = row.add(34 * b);
                    let d = block.cast::<f16>().read_unaligned().to_f32();
                    each(out, |i| d * block.add(2 + i).cast::<i8>().read() as f32);
                }
            }
            Source::Q4_0 => {
                for (b, out) in out.chunks_exact_mut(32).enumerate() {
                    let block = row.add(18 * b);
                    let d = block.cast::<f16>().read_unaligned().to_f32();
                    let (low, high) = out.split_at_mut(16);
                    each(low, |i| d * ((block.add(2 + i).read() & 15) as f32 - 8.0));
                    each(high, |i| d * ((block.add(2 + i).read() >> 4) as f32 - 8.0));
                }
            }
        }
    }
}

fn each(out: &mut [f32], value: impl Fn(usize) -> f32) {
    out.iter_mut().enumerate().for_each(|(i, out)| *out = value(i));
}

/// # Safety
/// See `kernels::decode`.
pub(super) unsafe fn decode(source: Source, rows: &[*const u8], d: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(d)) {
        // SAFETY: a row holds `d` elements.
        unsafe { decode_row(source, *row, out) };
    }
}

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
    let mut buffer = [0.0; HEAD_DIM_MAX];
    let k = &mut buffer[..d];
    for (r, row) in rows.iter().enumerate() {
        // SAFETY: a row holds `d` elements.
        unsafe { decode_row(source, *row, k) };
        for (g, q) in q.chunks_exact(d).enumerate() {
            out[g * BLOCK + r] = weighted_sum(q, k);
        }
    }
}

/// # Safety
/// See `kernels::accumulate`.
pub(super) unsafe fn accumulate(
    source: Source,
    p: &[f32],
    d: usize,
    rows: &[*const u8],
    _next: &[*const u8],
    acc: &mut [f32],
) {
    let mut buffer = [0.0; HEAD_DIM_MAX];
    let v = &mut buffer[..d];
    for (r, row) in rows.iter().enumerate() {
        // SAFETY: a row holds `d` elements.
        unsafe { decode_row(source, *row, v) };
        for (g, acc) in acc.chunks_exact_mut(d).enumerate() {
            add_scaled(acc, v, p[g * BLOCK + r]);
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
    // Eight sums, as the vector paths have them: one long f32 sum would lose digits.
    let mut sums = [0.0f32; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

#[inline(always)]
pub(super) fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += f * b);
}

/// See `kernels::spread`.
#[inline(always)]
pub(super) fn spread(x: &mut [f32], y: &mut [f32], sums: &[f32], scales: &[f32], bonus: f32) {
    let finite = |x: f32| if x.is_finite() { x } else { f32::NEG_INFINITY };
    for (((x, y), sum), scale) in x.iter_mut().zip(y).zip(sums).zip(scales) {
        *y = finite(*x + bonus * (sum * scale).sqrt());
        *x = finite(*x);
    }
}

/// See `kernels::weight_from`.
#[inline(always)]
pub(super) fn weight_from(p: &[f32], weights: &[f32], cut: u32) -> f32 {
    const LANES: usize = 16;
    let counted = |p: f32, w: f32| if p.to_bits() >= cut { w } else { 0.0 };
    let mut sums = [0.0f32; LANES];
    let (p, w) = (p.chunks_exact(LANES), weights.chunks_exact(LANES));
    let rest: f32 = p.remainder().iter().zip(w.remainder()).map(|(p, w)| counted(*p, *w)).sum();
    for (p, w) in p.zip(w) {
        sums.iter_mut().zip(p.iter().zip(w)).for_each(|(sum, (p, w))| *sum += counted(*p, *w));
    }
    sums.iter().sum::<f32>() + rest
}
