//! Element-wise functions for AVX2 and FMA.

use std::arch::x86_64::*;

use crate::attention::cpu::scalar;

/// Sum of eight numbers.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn sum8(a: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

/// exp of eight numbers, about 1e-7 relative: 2^n times a Taylor polynomial of degree 7 on [-ln2/2, ln2/2].
/// Below -87.3 the result is 0; above 88 it is exp(88); NaN stays NaN.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn exp(x: __m256) -> __m256 {
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
pub(in super::super) unsafe fn exp_sum(s: &mut [f32], max: f32) -> f32 {
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
pub(in super::super) unsafe fn max(s: &[f32]) -> f32 {
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
pub(in super::super) unsafe fn cap(s: &mut [f32], cap: f32) {
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
pub(in super::super) unsafe fn weighted_sum(a: &[f32], b: &[f32]) -> f32 {
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
pub(in super::super) unsafe fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    scalar::add_scaled(a, b, f);
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn spread(x: &mut [f32], y: &mut [f32], sums: &[f32], scales: &[f32], bonus: f32) {
    scalar::spread(x, y, sums, scales, bonus);
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn weight_from(p: &[f32], weights: &[f32], cut: u32) -> f32 {
    scalar::weight_from(p, weights, cut)
}
