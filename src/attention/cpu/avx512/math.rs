//! Element-wise functions for AVX-512. The last few elements go through masks.

use std::arch::x86_64::*;

use crate::attention::cpu::scalar;

/// exp of sixteen numbers, about 1e-7 relative: 2^n times a Taylor polynomial of degree 7 on [-ln2/2, ln2/2].
/// Below -87.3 the result is 0; above 88 it is exp(88); NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) fn exp(x: __m512) -> __m512 {
    const LOWEST: f32 = -87.3;
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let not_under = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LOWEST));
    // With this operand order NaN passes through both clamps.
    let x = _mm512_min_ps(_mm512_set1_ps(88.0), _mm512_max_ps(_mm512_set1_ps(LOWEST), x));
    let n = _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
    let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
    let mut y = _mm512_set1_ps(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    }
    _mm512_maskz_scalef_ps(not_under, y, n)
}

/// Sixteen elements from `i` on, or as many as there are.
macro_rules! each16 {
    ($n:expr, |$i:ident, $mask:ident| $body:expr) => {{
        let n = $n;
        for $i in (0..n).step_by(16) {
            let $mask: __mmask16 = if n - $i >= 16 { 0xffff } else { (1 << (n - $i)) - 1 };
            $body
        }
    }};
}

/// # Safety
/// The processor has AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn exp_sum(s: &mut [f32], max: f32) -> f32 {
    let (mut sum, max) = (_mm512_setzero_ps(), _mm512_set1_ps(max));
    each16!(s.len(), |i, mask| {
        // SAFETY: the mask keeps load and store inside the slice.
        unsafe {
            let at = s.as_mut_ptr().add(i);
            let y = exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, at), max));
            sum = _mm512_mask_add_ps(sum, mask, sum, y);
            _mm512_mask_storeu_ps(at, mask, y);
        }
    });
    _mm512_reduce_add_ps(sum)
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn max(s: &[f32]) -> f32 {
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut m = lowest;
    each16!(s.len(), |i, mask| {
        // SAFETY: the mask keeps the load inside the slice.
        let x = unsafe { _mm512_mask_loadu_ps(lowest, mask, s.as_ptr().add(i)) };
        // With this operand order a NaN element leaves `m` as it is.
        m = _mm512_max_ps(x, m);
    });
    _mm512_reduce_max_ps(m)
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn cap(s: &mut [f32], cap: f32) {
    let (cap, one, sign) = (_mm512_set1_ps(cap), _mm512_set1_ps(1.0), _mm512_set1_ps(-0.0));
    each16!(s.len(), |i, mask| {
        // SAFETY: the mask keeps load and store inside the slice.
        unsafe {
            let at = s.as_mut_ptr().add(i);
            let x = _mm512_maskz_loadu_ps(mask, at);
            // tanh |x| = 1 - 2 / (exp 2|x| + 1); near 0 that cancels, so there the series.
            let a = _mm512_andnot_ps(sign, x);
            let e = exp(_mm512_add_ps(a, a));
            let far = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0), _mm512_add_ps(e, one)));
            let a2 = _mm512_mul_ps(a, a);
            let mut near = _mm512_set1_ps(62.0 / 2835.0);
            for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
                near = _mm512_fmadd_ps(near, a2, _mm512_set1_ps(c));
            }
            let is_far = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, _mm512_set1_ps(0.3));
            let y = _mm512_mask_mov_ps(_mm512_mul_ps(near, a), is_far, far);
            let y = _mm512_mul_ps(cap, _mm512_or_ps(y, _mm512_and_ps(sign, x)));
            _mm512_mask_storeu_ps(at, mask, y);
        }
    });
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn weighted_sum(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    each16!(a.len().min(b.len()), |i, mask| {
        // SAFETY: the mask keeps both loads inside the slices.
        let (a, b) =
            unsafe { (_mm512_maskz_loadu_ps(mask, a.as_ptr().add(i)), _mm512_maskz_loadu_ps(mask, b.as_ptr().add(i))) };
        sum = _mm512_fmadd_ps(a, b, sum);
    });
    _mm512_reduce_add_ps(sum)
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    scalar::add_scaled(a, b, f);
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn spread(x: &mut [f32], y: &mut [f32], sums: &[f32], scales: &[f32], bonus: f32) {
    scalar::spread(x, y, sums, scales, bonus);
}

/// # Safety
/// As `exp_sum`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in super::super) unsafe fn weight_from(p: &[f32], weights: &[f32], cut: u32) -> f32 {
    scalar::weight_from(p, weights, cut)
}
