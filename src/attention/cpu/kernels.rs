//! The inner loops by name, dispatched once per block of rows to the code path of this processor.

use super::{scalar, Path};
use crate::attention::Element;

/// Rows that one kernel call takes at most; also the stride between heads in a block of scores.
pub(super) const BLOCK: usize = 32;

/// Element type of rows: those of K and V, and the bytes of the variances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub(super) enum Source {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    U8,
}

impl From<Element> for Source {
    fn from(element: Element) -> Source {
        match element {
            Element::F32 => Source::F32,
            Element::F16 => Source::F16,
            Element::BF16 => Source::BF16,
            Element::Q8_0 => Source::Q8_0,
            Element::Q4_0 => Source::Q4_0,
        }
    }
}

/// The sources as types: a path implements its loads on them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod stored {
    use crate::attention::Element;

    /// How the elements of a row are stored, 32 of them at a time: a chunk.
    pub(in super::super) trait Chunk {
        /// Bytes of a chunk.
        const BYTES: usize;
    }

    macro_rules! stored {
        ($($name:ident: $bytes:expr),*) => {
            $(
                #[allow(non_camel_case_types)]
                pub(in super::super) struct $name;
                impl Chunk for $name {
                    const BYTES: usize = $bytes;
                }
            )*
        };
    }

    stored!(
        F32: Element::F32.row_bytes(32),
        F16: Element::F16.row_bytes(32),
        BF16: Element::BF16.row_bytes(32),
        Q8_0: Element::Q8_0.row_bytes(32),
        Q4_0: Element::Q4_0.row_bytes(32),
        U8: 32
    );
}

/// Calls a function that is generic over the element type with the type that a source names. The types have the sources'
/// names; a new one is a row here and an implementation per path.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! of_source {
    ($source:expr, $name:ident($($arg:expr),*)) => {
        match $source {
            Source::F32 => $name::<stored::F32>($($arg),*),
            Source::F16 => $name::<stored::F16>($($arg),*),
            Source::BF16 => $name::<stored::BF16>($($arg),*),
            Source::Q8_0 => $name::<stored::Q8_0>($($arg),*),
            Source::Q4_0 => $name::<stored::Q4_0>($($arg),*),
            Source::U8 => $name::<stored::U8>($($arg),*),
        }
    };
}

/// A path's `dots`, `accumulate` and `decode`, from functions of it that are generic over the element type.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! over_sources {
    () => {
        /// # Safety
        /// See `kernels::dots`; the processor has what this path needs.
        pub(super) unsafe fn dots(
            source: Source,
            q: &[f32],
            d: usize,
            rows: &[*const u8],
            next: &[*const u8],
            out: &mut [f32],
        ) {
            // SAFETY: the same contract.
            unsafe { of_source!(source, dots_of(q, d, rows, next, out)) }
        }

        /// # Safety
        /// See `kernels::accumulate`; the processor has what this path needs.
        pub(super) unsafe fn accumulate(
            source: Source,
            p: &[f32],
            d: usize,
            rows: &[*const u8],
            next: &[*const u8],
            acc: &mut [f32],
        ) {
            // SAFETY: the same contract.
            unsafe { of_source!(source, accumulate_of(p, d, rows, next, acc)) }
        }

        /// # Safety
        /// See `kernels::decode`; the processor has what this path needs.
        pub(super) unsafe fn decode(source: Source, rows: &[*const u8], d: usize, out: &mut [f32]) {
            // SAFETY: the same contract.
            unsafe { of_source!(source, decode_of(rows, d, out)) }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use {of_source, over_sources};

macro_rules! dispatch {
    ($path:expr, $name:ident($($arg:expr),*)) => {
        match $path {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Path::available` has this one only where its features were detected; the rest is the caller's contract.
            Path::Avx512 => unsafe { super::avx512::$name($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Path::Avx2 => unsafe { super::avx2::$name($($arg),*) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            #[allow(unused_unsafe)]
            Path::Neon => unsafe { super::neon::$name($($arg),*) },
            // SAFETY: the caller's contract.
            #[allow(unused_unsafe)]
            Path::Scalar => unsafe { scalar::$name($($arg),*) },
        }
    };
}

/// Asks for the cache line at an address, which need not be one.
#[inline]
pub(super) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and cannot fault.
    unsafe {
        use std::arch::x86_64::*;
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Asks for the lines of a row that is wanted later, no nearer than in the second-level cache: the first level's few
/// outstanding misses are for the rows wanted next.
#[inline]
pub(super) fn prefetch_far(row: *const u8, bytes: usize) {
    let mut line = row.wrapping_sub(row as usize % 64);
    while line < row.wrapping_add(bytes) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing and cannot fault.
        unsafe {
            use std::arch::x86_64::*;
            _mm_prefetch::<_MM_HINT_T1>(line.cast());
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) line, options(nostack, preserves_flags, readonly));
        }
        line = line.wrapping_add(64);
    }
}

/// Asks for the lines of rows `from..to`, as far as there are any; rows start anywhere in a line.
#[inline]
pub(super) fn fetch(rows: &[*const u8], from: usize, to: usize, bytes: usize) {
    for row in &rows[from.min(rows.len())..to.min(rows.len())] {
        let mut line = row.wrapping_sub(*row as usize % 64);
        while line < row.wrapping_add(bytes) {
            prefetch(line);
            line = line.wrapping_add(64);
        }
    }
}

/// `out[g * BLOCK + r] = q_g . row_r` for the heads in `q` (`[G][d]`). `next` are rows wanted soon.
///
/// # Safety
/// Every address in `rows` holds `d` elements; their number is a multiple of 4 and at most BLOCK; `d` is a head size
/// that the plan allows, of whole blocks of the source; `out` holds `G * BLOCK`.
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
    debug_assert!(rows.len().is_multiple_of(4) && rows.len() <= BLOCK && out.len() >= q.len() / d * BLOCK);
    dispatch!(path, dots(source, q, d, rows, next, out))
}

/// `acc_g += sum_r p[g * BLOCK + r] row_r` for the heads in `acc` (`[G][d]`).
///
/// # Safety
/// As for `dots`, with `p` in the place of `out`.
#[inline]
pub(super) unsafe fn accumulate(
    path: Path,
    source: Source,
    p: &[f32],
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    acc: &mut [f32],
) {
    debug_assert!(rows.len().is_multiple_of(4) && rows.len() <= BLOCK && p.len() >= acc.len() / d * BLOCK);
    dispatch!(path, accumulate(source, p, d, rows, next, acc))
}

/// Rows as f32, `d` numbers each, one after the other.
///
/// # Safety
/// Every address in `rows` holds `d` elements; `d` is a head size that the plan allows, of whole blocks of the source;
/// `out` holds all of them.
#[inline]
pub(super) unsafe fn decode(path: Path, source: Source, rows: &[*const u8], d: usize, out: &mut [f32]) {
    debug_assert!(out.len() >= rows.len() * d);
    dispatch!(path, decode(source, rows, d, out))
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

/// Both scores of clusters: `x` gives the plain ones, `y = x + bonus * sqrt(sums * scales)`; not finite becomes -inf in both.
#[inline]
pub(super) fn spread(path: Path, x: &mut [f32], y: &mut [f32], sums: &[f32], scales: &[f32], bonus: f32) {
    dispatch!(path, spread(x, y, sums, scales, bonus))
}

/// Sum of the weights of those whose number, not below 0, has bits from `cut` up. Never grows with `cut`.
#[inline]
pub(super) fn weight_from(path: Path, p: &[f32], weights: &[f32], cut: u32) -> f32 {
    dispatch!(path, weight_from(p, weights, cut))
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
