//! Inner loops for Advanced SIMD, which every 64-bit ARM processor has. A row is read once for all heads of a GQA group.
//! Contracts in `kernels`.
//!
//! Tiles are sized for 32 registers: 4 rows by up to 4 heads of dot products, 4 rows by 16 dimensions of values.

mod element;
mod math;

use std::arch::aarch64::*;

use super::kernels::{fetch, of_source, over_sources, stored, Source, BLOCK};
pub(super) use super::scalar::{spread, weight_from};
use element::Element;
pub(super) use math::{add_scaled, cap, exp, exp_sum, max, weighted_sum};

over_sources!();

/// Four rows by H heads.
///
/// # Safety
/// `q` holds `H * d`, each row `d` elements, `out` is `H` blocks of scores of which four each are written.
#[inline]
unsafe fn dots_tile<E: Element, const H: usize>(q: *const f32, d: usize, rows: &[*const u8], out: *mut f32) {
    // SAFETY: every address is inside what the contract grants.
    unsafe {
        let mut acc = [[vdupq_n_f32(0.0); 4]; H];
        for c in 0..d.div_ceil(32) {
            let chunk = |r: usize| rows[r].add(c * E::BYTES);
            let scale = [E::scale(chunk(0)), E::scale(chunk(1)), E::scale(chunk(2)), E::scale(chunk(3))];
            let mut step = |j: usize| {
                let k = |r: usize| E::load(chunk(r), j, scale[r]);
                let k = [k(0), k(1), k(2), k(3)];
                for (h, acc) in acc.iter_mut().enumerate() {
                    let q = q.add(h * d + 32 * c + 8 * j);
                    let q = [vld1q_f32(q), vld1q_f32(q.add(4))];
                    for r in 0..4 {
                        acc[r] = vfmaq_f32(vfmaq_f32(acc[r], k[r][0], q[0]), k[r][1], q[1]);
                    }
                }
            };
            match (d - 32 * c) / 8 {
                n @ 0..=3 => (0..n).for_each(step),
                _ => {
                    step(0);
                    step(1);
                    step(2);
                    step(3);
                }
            }
        }
        for (h, acc) in acc.into_iter().enumerate() {
            let sums = vpaddq_f32(vpaddq_f32(acc[0], acc[1]), vpaddq_f32(acc[2], acc[3]));
            vst1q_f32(out.add(h * BLOCK), sums);
        }
    }
}

unsafe fn dots_of<E: Element>(q: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], out: &mut [f32]) {
    let heads = q.len() / d;
    for r in (0..rows.len()).step_by(4) {
        fetch(next, r, r + 4, d * E::BYTES / 32);
        let tile = &rows[r..r + 4];
        let mut h = 0;
        while h < heads {
            // SAFETY: `h + n <= heads`, so query and output of the tile are in bounds.
            unsafe {
                let (q, out) = (q.as_ptr().add(h * d), out.as_mut_ptr().add(h * BLOCK + r));
                let n = (heads - h).min(4);
                match n {
                    1 => dots_tile::<E, 1>(q, d, tile, out),
                    2 => dots_tile::<E, 2>(q, d, tile, out),
                    3 => dots_tile::<E, 3>(q, d, tile, out),
                    _ => dots_tile::<E, 4>(q, d, tile, out),
                }
                h += n;
            }
        }
    }
}

/// Four rows by `8 * N` dimensions from `i`, a multiple of 16, all heads.
///
/// # Safety
/// `p` holds `heads` blocks, `acc` `heads * d`, each row `d` elements; `i + 8 * N <= d`.
#[inline]
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
        let mut v = [[[vdupq_n_f32(0.0); 2]; N]; 4];
        for (v, row) in v.iter_mut().zip(rows) {
            let chunk = row.add(i / 32 * E::BYTES);
            let scale = E::scale(chunk);
            for (n, v) in v.iter_mut().enumerate() {
                *v = E::load(chunk, i % 32 / 8 + n, scale);
            }
        }
        for g in 0..heads {
            let p = vld1q_f32(p.add(g * BLOCK));
            for n in 0..2 * N {
                let at = acc.add(g * d + i + 4 * n);
                let v = |r: usize| v[r][n / 2][n % 2];
                let sum = vfmaq_laneq_f32::<0>(vld1q_f32(at), v(0), p);
                let sum = vfmaq_laneq_f32::<1>(sum, v(1), p);
                let sum = vfmaq_laneq_f32::<2>(sum, v(2), p);
                vst1q_f32(at, vfmaq_laneq_f32::<3>(sum, v(3), p));
            }
        }
    }
}

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
unsafe fn decode_of<E: Element>(rows: &[*const u8], d: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(d)) {
        for (c, out) in out.chunks_mut(32).enumerate() {
            // SAFETY: the eights of a chunk that `out` has are in the row; the last chunk of a plain type may end early.
            unsafe {
                let chunk = row.add(c * E::BYTES);
                let scale = E::scale(chunk);
                for (j, out) in out.chunks_exact_mut(8).enumerate() {
                    let [low, high] = E::load(chunk, j, scale);
                    vst1q_f32(out.as_mut_ptr(), low);
                    vst1q_f32(out.as_mut_ptr().add(4), high);
                }
            }
        }
    }
}
