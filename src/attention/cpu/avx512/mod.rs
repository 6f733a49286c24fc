//! Inner loops for AVX-512 F, BW, VL and DQ. A row is converted once for up to 8 heads of a GQA group. Contracts in
//! `kernels`.
//!
//! Tiles are sized for 32 registers: dot products of 4 rows by up to 5 heads or 2 rows by up to 8; sums of values stay in
//! registers over a block of rows, 64 dimensions by up to 5 heads or 32 by up to 8. BF16 and VNNI products are not used:
//! both would round the query.

mod element;
mod math;

use std::arch::x86_64::*;

use super::kernels::{fetch, of_source, over_sources, stored, Source, BLOCK};
use element::Element;
pub(super) use math::{add_scaled, cap, exp, exp_sum, max, spread, weight_from, weighted_sum};

over_sources!();

/// Sums of four vectors, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn sum4(a: [__m512; 4]) -> __m128 {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
    let all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
}

/// R rows by H heads; R is 2 or 4.
///
/// # Safety
/// `q` holds `H * d`, each of R rows `d` elements, `out` is `H` blocks of scores of which R each are written.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn dots_tile<E: Element, const R: usize, const H: usize>(
    q: *const f32,
    d: usize,
    rows: &[*const u8],
    out: *mut f32,
) {
    // SAFETY: every address is inside what the contract grants; a masked load touches only the elements asked for.
    unsafe {
        let zero = _mm512_setzero_ps();
        let mut acc = [[zero; R]; H];
        for c in 0..d / 32 {
            let mut k = [[zero; 2]; R];
            for r in 0..R {
                k[r] = E::load(rows[r].add(c * E::BYTES));
            }
            for (h, acc) in acc.iter_mut().enumerate() {
                let q = q.add(h * d + 32 * c);
                let q = [_mm512_loadu_ps(q), _mm512_loadu_ps(q.add(16))];
                for r in 0..R {
                    acc[r] = _mm512_fmadd_ps(k[r][0], q[0], acc[r]);
                    acc[r] = _mm512_fmadd_ps(k[r][1], q[1], acc[r]);
                }
            }
        }
        if !d.is_multiple_of(32) {
            let (c, mask) = (d / 32, (1u32 << (d % 32)) - 1);
            for r in 0..R {
                let k = E::load_part(rows[r].add(c * E::BYTES), mask);
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = q.add(h * d + 32 * c);
                    acc[r] = _mm512_fmadd_ps(k[0], _mm512_maskz_loadu_ps(mask as u16, q), acc[r]);
                    let q = _mm512_maskz_loadu_ps((mask >> 16) as u16, q.wrapping_add(16));
                    acc[r] = _mm512_fmadd_ps(k[1], q, acc[r]);
                }
            }
        }
        if R == 4 {
            for (h, acc) in acc.iter().enumerate() {
                _mm_storeu_ps(out.add(h * BLOCK), sum4([acc[0], acc[1], acc[2], acc[3]]));
            }
        } else {
            for (h, acc) in acc.chunks(2).enumerate() {
                let last = acc[acc.len() - 1];
                let sums = sum4([acc[0][0], acc[0][1], last[0], last[1]]);
                _mm_storel_epi64(out.add(2 * h * BLOCK).cast(), _mm_castps_si128(sums));
                if acc.len() == 2 {
                    let high = _mm_castps_si128(_mm_movehl_ps(sums, sums));
                    _mm_storel_epi64(out.add((2 * h + 1) * BLOCK).cast(), high);
                }
            }
        }
    }
}

/// All rows by H heads, R rows at a time.
///
/// # Safety
/// As for `kernels::dots`, of the H heads from `q` and `out` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn dots_heads<E: Element, const R: usize, const H: usize>(
    q: *const f32,
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    out: *mut f32,
) {
    for (i, tile) in rows.chunks_exact(R).enumerate() {
        fetch(next, R * i, R * i + R, d * E::BYTES / 32);
        // SAFETY: the same contract.
        unsafe { dots_tile::<E, R, H>(q, d, tile, out.add(R * i)) };
    }
}

/// Heads of the next tile: all that are left, or half of those.
fn tile_of(left: usize) -> usize {
    if left > 8 {
        (left / 2).min(8)
    } else {
        left
    }
}

/// # Safety
/// See `kernels::dots`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn dots_of<E: Element>(q: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], out: &mut [f32]) {
    let (heads, mut h, mut next) = (q.len() / d, 0, next);
    while h < heads {
        let n = tile_of(heads - h);
        // SAFETY: `h + n <= heads`, so query and output of the tile are in bounds.
        unsafe {
            let (q, out) = (q.as_ptr().add(h * d), out.as_mut_ptr().add(h * BLOCK));
            match n {
                1 => dots_heads::<E, 4, 1>(q, d, rows, next, out),
                2 => dots_heads::<E, 4, 2>(q, d, rows, next, out),
                3 => dots_heads::<E, 4, 3>(q, d, rows, next, out),
                4 => dots_heads::<E, 4, 4>(q, d, rows, next, out),
                5 => dots_heads::<E, 4, 5>(q, d, rows, next, out),
                6 => dots_heads::<E, 2, 6>(q, d, rows, next, out),
                7 => dots_heads::<E, 2, 7>(q, d, rows, next, out),
                _ => dots_heads::<E, 2, 8>(q, d, rows, next, out),
            }
        }
        next = &[];
        h += n;
    }
}

/// All rows by N chunks of dimensions from number `c` on and H heads.
///
/// # Safety
/// As for `kernels::accumulate`, of the H heads from `p` and `acc` on; these chunks are whole.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn values_tile<E: Element, const N: usize, const H: usize>(
    p: *const f32,
    d: usize,
    c: usize,
    rows: &[*const u8],
    acc: *mut f32,
) {
    // SAFETY: every address is inside what the contract grants.
    unsafe {
        let at = |h: usize, n: usize| acc.add(h * d + 32 * (c + n));
        let mut sum = [[[_mm512_setzero_ps(); 2]; N]; H];
        for (h, sum) in sum.iter_mut().enumerate() {
            for (n, sum) in sum.iter_mut().enumerate() {
                *sum = [_mm512_loadu_ps(at(h, n)), _mm512_loadu_ps(at(h, n).add(16))];
            }
        }
        for (r, row) in rows.iter().enumerate() {
            let mut v = [[_mm512_setzero_ps(); 2]; N];
            for (n, v) in v.iter_mut().enumerate() {
                *v = E::load(row.add((c + n) * E::BYTES));
            }
            for (h, sum) in sum.iter_mut().enumerate() {
                let p = _mm512_set1_ps(p.add(h * BLOCK + r).read());
                for (sum, v) in sum.iter_mut().zip(&v) {
                    sum[0] = _mm512_fmadd_ps(p, v[0], sum[0]);
                    sum[1] = _mm512_fmadd_ps(p, v[1], sum[1]);
                }
            }
        }
        for (h, sum) in sum.iter().enumerate() {
            for (n, sum) in sum.iter().enumerate() {
                _mm512_storeu_ps(at(h, n), sum[0]);
                _mm512_storeu_ps(at(h, n).add(16), sum[1]);
            }
        }
    }
}

/// All rows by the last, incomplete chunk of dimensions and H heads.
///
/// # Safety
/// As for `values_tile`; `d % 32 != 0`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn values_rest<E: Element, const H: usize>(p: *const f32, d: usize, rows: &[*const u8], acc: *mut f32) {
    let (c, mask) = (d / 32, (1u32 << (d % 32)) - 1);
    let masks = [mask as u16, (mask >> 16) as u16];
    // SAFETY: every address is inside what the contract grants; masks keep loads and stores there.
    unsafe {
        let at = |h: usize, half: usize| acc.wrapping_add(h * d + 32 * c + 16 * half);
        let mut sum = [[_mm512_setzero_ps(); 2]; H];
        for (h, sum) in sum.iter_mut().enumerate() {
            *sum = [_mm512_maskz_loadu_ps(masks[0], at(h, 0)), _mm512_maskz_loadu_ps(masks[1], at(h, 1))];
        }
        for (r, row) in rows.iter().enumerate() {
            let v = E::load_part(row.add(c * E::BYTES), mask);
            for (h, sum) in sum.iter_mut().enumerate() {
                let p = _mm512_set1_ps(p.add(h * BLOCK + r).read());
                sum[0] = _mm512_fmadd_ps(p, v[0], sum[0]);
                sum[1] = _mm512_fmadd_ps(p, v[1], sum[1]);
            }
        }
        for (h, sum) in sum.iter().enumerate() {
            _mm512_mask_storeu_ps(at(h, 0), masks[0], sum[0]);
            _mm512_mask_storeu_ps(at(h, 1), masks[1], sum[1]);
        }
    }
}

/// All rows by all dimensions, N chunks at a time, and H heads.
///
/// # Safety
/// As for `kernels::accumulate`, of the H heads from `p` and `acc` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn values_heads<E: Element, const N: usize, const H: usize>(
    p: *const f32,
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    acc: *mut f32,
) {
    let (mut c, mut fetched) = (0, 0);
    // The prefetches are spread over the steps.
    let share = next.len().div_ceil((d / 32).div_ceil(N));
    // SAFETY: the same contract; chunks below `d / 32` are whole.
    unsafe {
        while c < d / 32 {
            fetch(next, fetched, fetched + share, d * E::BYTES / 32);
            fetched += share;
            if c + N <= d / 32 {
                values_tile::<E, N, H>(p, d, c, rows, acc);
            } else {
                values_tile::<E, 1, H>(p, d, c, rows, acc);
            }
            c += N;
        }
        if !d.is_multiple_of(32) {
            values_rest::<E, H>(p, d, rows, acc);
        }
    }
}

/// # Safety
/// See `kernels::accumulate`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn accumulate_of<E: Element>(p: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], acc: &mut [f32]) {
    let (heads, mut h, mut next) = (acc.len() / d, 0, next);
    while h < heads {
        let n = tile_of(heads - h);
        // SAFETY: `h + n <= heads`, so weights and sums of the tile are in bounds.
        unsafe {
            let (p, acc) = (p.as_ptr().add(h * BLOCK), acc.as_mut_ptr().add(h * d));
            match n {
                1 => values_heads::<E, 2, 1>(p, d, rows, next, acc),
                2 => values_heads::<E, 2, 2>(p, d, rows, next, acc),
                3 => values_heads::<E, 2, 3>(p, d, rows, next, acc),
                4 => values_heads::<E, 2, 4>(p, d, rows, next, acc),
                5 => values_heads::<E, 2, 5>(p, d, rows, next, acc),
                6 => values_heads::<E, 1, 6>(p, d, rows, next, acc),
                7 => values_heads::<E, 1, 7>(p, d, rows, next, acc),
                _ => values_heads::<E, 1, 8>(p, d, rows, next, acc),
            }
        }
        next = &[];
        h += n;
    }
}

/// # Safety
/// See `kernels::decode`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn decode_of<E: Element>(rows: &[*const u8], d: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(d)) {
        let mut parts = out.chunks_exact_mut(32);
        for (c, out) in parts.by_ref().enumerate() {
            // SAFETY: chunks below `d / 32` are whole, and so is `out`.
            unsafe {
                let [low, high] = E::load(row.add(c * E::BYTES));
                _mm512_storeu_ps(out.as_mut_ptr(), low);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), high);
            }
        }
        let rest = parts.into_remainder();
        if !rest.is_empty() {
            let mask = (1u32 << rest.len()) - 1;
            // SAFETY: the mask keeps loads and stores inside the row and `rest`.
            unsafe {
                let [low, high] = E::load_part(row.add(d / 32 * E::BYTES), mask);
                _mm512_mask_storeu_ps(rest.as_mut_ptr(), mask as u16, low);
                _mm512_mask_storeu_ps(rest.as_mut_ptr().wrapping_add(16), (mask >> 16) as u16, high);
            }
        }
    }
}
