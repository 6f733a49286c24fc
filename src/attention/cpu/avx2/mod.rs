//! Inner loops for AVX2, FMA and F16C. A row is read once for all heads of a GQA group. Contracts in `kernels`.
//!
//! Tiles are sized for 16 registers: 4 rows by up to 3 heads of dot products, 4 rows by 16 dimensions of values.

mod element;
mod math;

use std::arch::x86_64::*;

use super::kernels::{fetch, of_source, over_sources, stored, Source, BLOCK};
use element::Element;
pub(super) use math::{add_scaled, cap, exp, exp_sum, max, spread, sum8, weight_from, weighted_sum};

over_sources!();

/// Sums of four vectors, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sum4(a: [__m256; 4]) -> __m128 {
    let ab = _mm256_hadd_ps(a[0], a[1]);
    let cd = _mm256_hadd_ps(a[2], a[3]);
    let all = _mm256_hadd_ps(ab, cd);
    _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all))
}

/// Four rows by H heads.
///
/// # Safety
/// `q` holds `H * d`, each row `d` elements, `out` is `H` blocks of scores of which four each are written.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_tile<E: Element, const H: usize>(q: *const f32, d: usize, rows: &[*const u8], out: *mut f32) {
    // SAFETY: every address is inside what the contract grants.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 4]; H];
        for c in 0..d.div_ceil(32) {
            let chunk = |r: usize| rows[r].add(c * E::BYTES);
            let scale = [E::scale(chunk(0)), E::scale(chunk(1)), E::scale(chunk(2)), E::scale(chunk(3))];
            let mut step = |j: usize| {
                let k = |r: usize| E::load(chunk(r), j, scale[r]);
                let k = [k(0), k(1), k(2), k(3)];
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = _mm256_loadu_ps(q.add(h * d + 32 * c + 8 * j));
                    for r in 0..4 {
                        acc[r] = _mm256_fmadd_ps(k[r], q, acc[r]);
                    }
                }
            };
            match (d - 32 * c) / 8 {
                0 => {}
                1 => step(0),
                2 => (0..2).for_each(step),
                3 => (0..3).for_each(step),
                _ => {
                    step(0);
                    step(1);
                    step(2);
                    step(3);
                }
            }
        }
        for (h, acc) in acc.into_iter().enumerate() {
            _mm_storeu_ps(out.add(h * BLOCK), sum4(acc));
        }
    }
}

/// # Safety
/// See `kernels::dots`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of<E: Element>(q: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], out: &mut [f32]) {
    let heads = q.len() / d;
    for r in (0..rows.len()).step_by(4) {
        fetch(next, r, r + 4, d * E::BYTES / 32);
        let tile = &rows[r..r + 4];
        let mut h = 0;
        while h < heads {
            // SAFETY: `h + H <= heads`, so query and output of the tile are in bounds.
            unsafe {
                let (q, out) = (q.as_ptr().add(h * d), out.as_mut_ptr().add(h * BLOCK + r));
                // Four heads left go as 2 + 2: a tile of one has too few chains to hide the latency of an FMA.
                h += match heads - h {
                    1 => {
                        dots_tile::<E, 1>(q, d, tile, out);
                        1
                    }
                    2 | 4 => {
                        dots_tile::<E, 2>(q, d, tile, out);
                        2
                    }
                    _ => {
                        dots_tile::<E, 3>(q, d, tile, out);
                        3
                    }
                };
            }
        }
    }
}

/// Four rows by `8 * N` dimensions from `i`, a multiple of 16, all heads.
///
/// # Safety
/// `p` holds `heads` blocks, `acc` `heads * d`, each row `d` elements; `i + 8 * N <= d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values_tile<E: Element, const N: usize>(
    p: *const f32,
    heads: usize,
    d: usize,
    i: usize,
    rows: &[*const u8],
    acc: *mut f32,
) {
    // SAFETY: every address is inside what the contract grants.
    unsafe {
        let mut v = [[_mm256_setzero_ps(); N]; 4];
        for (v, row) in v.iter_mut().zip(rows) {
            let chunk = row.add(i / 32 * E::BYTES);
            let scale = E::scale(chunk);
            for (n, v) in v.iter_mut().enumerate() {
                *v = E::load(chunk, i % 32 / 8 + n, scale);
            }
        }
        for g in 0..heads {
            let at = acc.add(g * d + i);
            let mut sum = [_mm256_setzero_ps(); N];
            for (n, sum) in sum.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(at.add(8 * n));
            }
            for (r, v) in v.iter().enumerate() {
                let p = _mm256_broadcast_ss(&*p.add(g * BLOCK + r));
                for (sum, v) in sum.iter_mut().zip(v) {
                    *sum = _mm256_fmadd_ps(p, *v, *sum);
                }
            }
            for (n, sum) in sum.into_iter().enumerate() {
                _mm256_storeu_ps(at.add(8 * n), sum);
            }
        }
    }
}

/// # Safety
/// See `kernels::accumulate`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn accumulate_of<E: Element>(p: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], acc: &mut [f32]) {
    let heads = acc.len() / d;
    for r in (0..rows.len()).step_by(4) {
        fetch(next, r, r + 4, d * E::BYTES / 32);
        let tile = &rows[r..r + 4];
        // SAFETY: rows `r..r + 4` are in every block of `p`; the tiles stay below `d`.
        unsafe {
            let p = p.as_ptr().add(r);
            let mut i = 0;
            while i + 16 <= d {
                values_tile::<E, 2>(p, heads, d, i, tile, acc.as_mut_ptr());
                i += 16;
            }
            if i < d {
                values_tile::<E, 1>(p, heads, d, i, tile, acc.as_mut_ptr());
            }
        }
    }
}

/// # Safety
/// See `kernels::decode`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_of<E: Element>(rows: &[*const u8], d: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(d)) {
        for (c, out) in out.chunks_mut(32).enumerate() {
            // SAFETY: the eights of a chunk that `out` has are in the row; the last chunk of a plain type may end early.
            unsafe {
                let chunk = row.add(c * E::BYTES);
                let scale = E::scale(chunk);
                for (j, out) in out.chunks_exact_mut(8).enumerate() {
                    _mm256_storeu_ps(out.as_mut_ptr(), E::load(chunk, j, scale));
                }
            }
        }
    }
}
