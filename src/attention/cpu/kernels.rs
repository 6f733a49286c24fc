//! The inner loops by name, dispatched once per block of rows to the code path of this processor.

use super::{scalar, Path};

/// Rows that one kernel call takes at most; also the stride between heads in a block of scores.
pub(super) const BLOCK: usize = 32;

/// Element type of the rows that `dots` reads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    F16,
    U8,
}

macro_rules! dispatch {
    ($path:expr, $name:ident($($arg:expr),*)) => {
        match $path {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Path::Avx2` exists only where AVX2, FMA and F16C were detected; the rest is the caller's contract.
            Path::Avx2 => unsafe { super::avx2::$name($($arg),*) },
            // SAFETY: the caller's contract.
            #[allow(unused_unsafe)]
            _ => unsafe { scalar::$name($($arg),*) },
        }
    };
}

/// `out[g * BLOCK + r] = q_g . row_r` for the heads in `q` (`[G][d]`). `next` are rows wanted soon.
///
/// # Safety
/// Every address in `rows` holds `d` elements; their number is a multiple of 4 and at most BLOCK; `d % 8 == 0`;
/// `out` holds `G * BLOCK`.
#[inline]
pub(super) unsafe fn dots(
    path: Path,
    source: Source,
    q: &[f32],
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    out: &mut [f32],
) {
    debug_assert!(rows.len() % 4 == 0 && rows.len() <= BLOCK && out.len() >= q.len() / d * BLOCK);
    dispatch!(path, dots(source, q, d, rows, next, out))
}

/// `acc_g += sum_r p[g * BLOCK + r] row_r` for the heads in `acc` (`[G][d]`); rows are F16.
///
/// # Safety
/// As for `dots`, with `p` in the place of `out`.
#[inline]
pub(super) unsafe fn accumulate(
    path: Path,
    p: &[f32],
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    acc: &mut [f32],
) {
    debug_assert!(rows.len() % 4 == 0 && rows.len() <= BLOCK && p.len() >= acc.len() / d * BLOCK);
    dispatch!(path, accumulate(p, d, rows, next, acc))
}

/// `s = exp(s - max)` in place; returns the sum.
#[inline]
pub(super) fn exp_sum(path: Path, s: &mut [f32], max: f32) -> f32 {
    dispatch!(path, exp_sum(s, max))
}

/// Largest element, NaN passed over; -inf of nothing.
#[inline]
pub(super) fn max(path: Path, s: &[f32]) -> f32 {
    dispatch!(path, max(s))
}

/// `s = cap * tanh(s)` in place.
#[inline]
pub(super) fn cap(path: Path, s: &mut [f32], cap: f32) {
    dispatch!(path, cap(s, cap))
}

/// `sum_i a_i b_i`.
#[inline]
pub(super) fn weighted_sum(path: Path, a: &[f32], b: &[f32]) -> f32 {
    dispatch!(path, weighted_sum(a, b))
}

/// `a += f b`.
#[inline]
pub(super) fn add_scaled(path: Path, a: &mut [f32], b: &[f32], f: f32) {
    dispatch!(path, add_scaled(a, b, f))
}
