//! Inner loops for AVX2, FMA and F16C. A row is read once for all heads of a GQA group. Contracts in `kernels`.
//!
//! Tiles are sized for 16 registers: 4 rows by up to 3 heads of dot products, 4 rows by 16 dimensions of values.

use std::arch::x86_64::*;

use super::kernels::{Source, BLOCK};

/// Eight consecutive elements as f32.
///
/// # Safety
/// `row` holds at least `i + 8` elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<const U8: bool>(row: *const u8, i: usize) -> __m256 {
    // SAFETY: in bounds by contract; both loads are unaligned ones.
    unsafe {
        if U8 {
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(row.add(i).cast())))
        } else {
            _mm256_cvtph_ps(_mm_loadu_si128(row.add(2 * i).cast()))
        }
    }
}

#[inline]
fn prefetch(rows: &[*const u8], from: usize, bytes: usize) {
    for row in rows.iter().skip(from).take(4) {
        for at in (0..bytes).step_by(64) {
            // SAFETY: a prefetch reads nothing and cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(at).cast()) };
        }
    }
}

/// Sums of four vectors, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sum4(a: [__m256; 4]) -> __m128 {
    let ab = _mm256_hadd_ps(a[0], a[1]);
    let cd = _mm256_hadd_ps(a[2], a[3]);
    let all = _mm256_hadd_ps(ab, cd);
    _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sum8(a: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

/// Four rows by H heads.
///
/// # Safety
/// `q` holds `H * d`, each row `d` elements, `out` is `H` blocks of scores of which four each are written.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_tile<const H: usize, const U8: bool>(q: *const f32, d: usize, rows: &[*const u8], out: *mut f32) {
    // SAFETY: every address is inside what the contract grants.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 4]; H];
        for i in (0..d).step_by(8) {
            let k = [load::<U8>(rows[0], i), load::<U8>(rows[1], i), load::<U8>(rows[2], i), load::<U8>(rows[3], i)];
            for (h, acc) in acc.iter_mut().enumerate() {
                let q = _mm256_loadu_ps(q.add(h * d + i));
                for r in 0..4 {
                    acc[r] = _mm256_fmadd_ps(k[r], q, acc[r]);
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
unsafe fn dots_of<const U8: bool>(q: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], out: &mut [f32]) {
    let heads = q.len() / d;
    for r in (0..rows.len()).step_by(4) {
        prefetch(next, r, if U8 { d } else { 2 * d });
        let tile = &rows[r..r + 4];
        let mut h = 0;
        while h < heads {
            // SAFETY: `h + H <= heads`, so query and output of the tile are in bounds.
            unsafe {
                let (q, out) = (q.as_ptr().add(h * d), out.as_mut_ptr().add(h * BLOCK + r));
                // Four heads left go as 2 + 2: a tile of one has too few chains to hide the latency of an FMA.
                h += match heads - h {
                    1 => {
                        dots_tile::<1, U8>(q, d, tile, out);
                        1
                    }
                    2 | 4 => {
                        dots_tile::<2, U8>(q, d, tile, out);
                        2
                    }
                    _ => {
                        dots_tile::<3, U8>(q, d, tile, out);
                        3
                    }
                };
            }
        }
    }
}

/// # Safety
/// See `kernels::dots`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dots(
    source: Source,
    q: &[f32],
    d: usize,
    rows: &[*const u8],
    next: &[*const u8],
    out: &mut [f32],
) {
    // SAFETY: the same contract.
    unsafe {
        match source {
            Source::F16 => dots_of::<false>(q, d, rows, next, out),
            Source::U8 => dots_of::<true>(q, d, rows, next, out),
        }
    }
}

/// Four rows by `8 * N` dimensions from `i`, all heads.
///
/// # Safety
/// `p` holds `heads` blocks, `acc` `heads * d`, each row `d` elements; `i + 8 * N <= d`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn values_tile<const N: usize>(
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
            for (n, v) in v.iter_mut().enumerate() {
                *v = load::<false>(*row, i + 8 * n);
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
pub(super) unsafe fn accumulate(p: &[f32], d: usize, rows: &[*const u8], next: &[*const u8], acc: &mut [f32]) {
    let heads = acc.len() / d;
    for r in (0..rows.len()).step_by(4) {
        prefetch(next, r, 2 * d);
        let tile = &rows[r..r + 4];
        // SAFETY: rows `r..r + 4` are in every block of `p`; the tiles stay below `d`.
        unsafe {
            let p = p.as_ptr().add(r);
            let mut i = 0;
            while i + 16 <= d {
                values_tile::<2>(p, heads, d, i, tile, acc.as_mut_ptr());
                i += 16;
            }
            if i < d {
                values_tile::<1>(p, heads, d, i, tile, acc.as_mut_ptr());
            }
        }
    }
}

/// exp of eight numbers, about 1e-7 relative: 2^n times a Taylor polynomial of degree 7 on [-ln2/2, ln2/2].
/// Below -87.3 the result is 0; above 88 it is exp(88); NaN stays NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exp(x: __m256) -> __m256 {
    const LOWEST: f32 = -87.3;
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let under = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(LOWEST));
    // With this operand order NaN passes through both clamps.
    let x = _mm256_min_ps(_mm256_set1_ps(88.0), _mm256_max_ps(_mm256_set1_ps(LOWEST), x));
    let n = _mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let mut y = _mm256_set1_ps(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    }
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
    _mm256_andnot_ps(under, _mm256_mul_ps(y, _mm256_castsi256_ps(power)))
}

/// Applies `f` to eight elements at a time; the last few go through a buffer filled up with `fill`.
macro_rules! each8 {
    ($s:expr, $fill:expr, |$x:ident| $body:expr) => {{
        let mut chunks = $s.chunks_exact_mut(8);
        for chunk in &mut chunks {
            let $x = _mm256_loadu_ps(chunk.as_ptr());
            let y = $body;
            _mm256_storeu_ps(chunk.as_mut_ptr(), y);
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            let mut buffer = [$fill; 8];
            buffer[..rest.len()].copy_from_slice(rest);
            let $x = _mm256_loadu_ps(buffer.as_ptr());
            let y = $body;
            _mm256_storeu_ps(buffer.as_mut_ptr(), y);
            rest.copy_from_slice(&buffer[..rest.len()]);
        }
    }};
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn exp_sum(s: &mut [f32], max: f32) -> f32 {
    // SAFETY: eight elements are there at each load and store.
    unsafe {
        let (mut sum, max) = (_mm256_setzero_ps(), _mm256_set1_ps(max));
        each8!(s, f32::NEG_INFINITY, |x| {
            let y = exp(_mm256_sub_ps(x, max));
            sum = _mm256_add_ps(sum, y);
            y
        });
        sum8(sum)
    }
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn max(s: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = s.chunks_exact(8);
    let rest = chunks.remainder();
    // SAFETY: eight elements are there at each load and store.
    unsafe {
        let mut m = _mm256_set1_ps(f32::NEG_INFINITY);
        for chunk in chunks {
            // With this operand order a NaN element leaves `m` as it is.
            m = _mm256_max_ps(_mm256_loadu_ps(chunk.as_ptr()), m);
        }
        _mm256_storeu_ps(lanes.as_mut_ptr(), m);
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, s| m.max(*s))
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn cap(s: &mut [f32], cap: f32) {
    // SAFETY: eight elements are there at each load and store.
    unsafe {
        let (cap, one, sign) = (_mm256_set1_ps(cap), _mm256_set1_ps(1.0), _mm256_set1_ps(-0.0));
        each8!(s, 0.0f32, |x| {
            // tanh |x| = 1 - 2 / (exp 2|x| + 1); near 0 that cancels, so there the series.
            let a = _mm256_andnot_ps(sign, x);
            let e = exp(_mm256_add_ps(a, a));
            let far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0), _mm256_add_ps(e, one)));
            let a2 = _mm256_mul_ps(a, a);
            let mut near = _mm256_set1_ps(62.0 / 2835.0);
            for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
                near = _mm256_fmadd_ps(near, a2, _mm256_set1_ps(c));
            }
            let near = _mm256_mul_ps(near, a);
            let is_far = _mm256_cmp_ps::<_CMP_GT_OQ>(a, _mm256_set1_ps(0.3));
            let y = _mm256_blendv_ps(near, far, is_far);
            _mm256_mul_ps(cap, _mm256_or_ps(y, _mm256_and_ps(sign, x)))
        });
    }
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn weighted_sum(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 32];
    for (a, b) in a.chunks_exact(32).zip(b.chunks_exact(32)) {
        for i in 0..32 {
            sums[i] += a[i] * b[i];
        }
    }
    let done = a.len() - a.len() % 32;
    let rest: f32 = a[done..].iter().zip(&b[done..]).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += f * b);
}

#[cfg(test)]
mod tests {
    use super::super::{scalar, Path};

    /// Numbers over a range, none of them round, and their number no multiple of 8.
    fn numbers(from: f32, to: f32) -> Vec<f32> {
        let n = 20_003;
        (0..n).map(|i| from + (to - from) * (i as f32 + 0.37) / n as f32).collect()
    }

    fn largest_error(got: &[f32], want: impl Iterator<Item = f64>) -> f64 {
        got.iter().zip(want).fold(0.0, |m, (g, w)| m.max((*g as f64 - w).abs() / w.abs().max(1e-30)))
    }

    #[test]
    fn elementwise_functions_are_exact_to_f32() {
        if Path::best() == Path::Scalar {
            return;
        }
        let x = numbers(-87.0, 5.0);
        let mut y = x.clone();
        // SAFETY: the processor has what is needed.
        let sum = unsafe { super::exp_sum(&mut y, 5.0) } as f64;
        let exact = || x.iter().map(|x| (*x as f64 - 5.0).exp()).map(|e| if e < 1.2e-38 { 0.0 } else { e });
        let visible: Vec<f32> = y.iter().copied().filter(|y| *y > 0.0).collect();
        assert!(visible.len() > x.len() * 9 / 10);
        let offset = x.len() - visible.len();
        assert!(largest_error(&y[offset..], x[offset..].iter().map(|x| ((x - 5.0) as f64).exp())) < 3e-7);
        assert!((sum / exact().sum::<f64>() - 1.0).abs() < 2e-6);

        let x = numbers(-12.0, 12.0);
        let mut y = x.clone();
        // SAFETY: as above.
        unsafe { super::cap(&mut y, 30.0) };
        assert!(largest_error(&y, x.iter().map(|x| 30.0 * (*x as f64).tanh())) < 6e-7);
    }

    #[test]
    fn edges_of_exp_and_max_are_those_of_the_scalar_path() {
        if Path::best() == Path::Scalar {
            return;
        }
        let edges = [f32::NEG_INFINITY, -1e30, -200.0, 0.0, -0.0, f32::NAN, -3.0, -87.0, -1.0];
        let (mut a, mut b) = (edges, edges);
        // SAFETY: the processor has what is needed.
        unsafe {
            super::exp_sum(&mut a, 0.0);
            assert_eq!(super::max(&edges), scalar::max(&edges));
            assert_eq!(super::max(&edges[..5]), 0.0);
            assert_eq!(super::max(&[]), f32::NEG_INFINITY);
        }
        scalar::exp_sum(&mut b, 0.0);
        for (a, b) in a.iter().zip(b) {
            assert!(a.is_nan() == b.is_nan() && (a.is_nan() || (a - b).abs() <= 2e-7 * b), "{a} and {b}");
        }
    }
}
