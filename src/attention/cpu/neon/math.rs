//! Element-wise functions for Advanced SIMD. None needs more of its caller than slices give.

use std::arch::aarch64::*;

use super::super::scalar;

/// exp of four numbers, about 1e-7 relative: 2^n times a Taylor polynomial of degree 7 on [-ln2/2, ln2/2].
/// Below -87.3 the result is 0; above 88 it is exp(88); NaN stays NaN.
#[inline]
pub(in super::super) fn exp(x: float32x4_t) -> float32x4_t {
    const LOWEST: f32 = -87.3;
    // ln 2 in two parts; the first has few enough bits that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: no memory is touched.
    unsafe {
        let under = vcltq_f32(x, vdupq_n_f32(LOWEST));
        // Both clamps pass NaN on.
        let x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(LOWEST)), vdupq_n_f32(88.0));
        let n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(std::f32::consts::LOG2_E)));
        let r = vfmsq_f32(x, n, vdupq_n_f32(LN2_HIGH));
        let r = vfmsq_f32(r, n, vdupq_n_f32(LN2_LOW));
        let mut y = vdupq_n_f32(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            y = vfmaq_f32(vdupq_n_f32(c), y, r);
        }
        let power = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
        let y = vmulq_f32(y, vreinterpretq_f32_s32(power));
        vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), under))
    }
}

/// Applies a function to four elements at a time; the last few go through a buffer filled up with `fill`.
#[inline]
fn each4(s: &mut [f32], fill: f32, mut f: impl FnMut(float32x4_t) -> float32x4_t) {
    // SAFETY: four elements are there at each load and store.
    let mut apply = |s: &mut [f32; 4]| unsafe { vst1q_f32(s.as_mut_ptr(), f(vld1q_f32(s.as_ptr()))) };
    for chunk in s.chunks_mut(4) {
        let mut buffer = [fill; 4];
        buffer[..chunk.len()].copy_from_slice(chunk);
        apply(&mut buffer);
        chunk.copy_from_slice(&buffer[..chunk.len()]);
    }
}

pub(in super::super) fn exp_sum(s: &mut [f32], max: f32) -> f32 {
    // SAFETY: no memory is touched.
    unsafe {
        let mut sum = vdupq_n_f32(0.0);
        each4(s, f32::NEG_INFINITY, |x| {
            let y = exp(vsubq_f32(x, vdupq_n_f32(max)));
            sum = vaddq_f32(sum, y);
            y
        });
        vaddvq_f32(sum)
    }
}

pub(in super::super) fn max(s: &[f32]) -> f32 {
    scalar::max(s)
}

pub(in super::super) fn cap(s: &mut [f32], cap: f32) {
    each4(s, 0.0, |x| {
        // SAFETY: no memory is touched.
        unsafe {
            // tanh |x| = 1 - 2 / (exp 2|x| + 1); near 0 that cancels, so there the series.
            let (one, a) = (vdupq_n_f32(1.0), vabsq_f32(x));
            let e = exp(vaddq_f32(a, a));
            let far = vsubq_f32(one, vdivq_f32(vdupq_n_f32(2.0), vaddq_f32(e, one)));
            let a2 = vmulq_f32(a, a);
            let mut near = vdupq_n_f32(62.0 / 2835.0);
            for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
                near = vfmaq_f32(vdupq_n_f32(c), near, a2);
            }
            let y = vbslq_f32(vcgtq_f32(a, vdupq_n_f32(0.3)), far, vmulq_f32(near, a));
            let y = vbslq_f32(vdupq_n_u32(1 << 31), x, y);
            vmulq_f32(vdupq_n_f32(cap), y)
        }
    });
}

pub(in super::super) fn weighted_sum(a: &[f32], b: &[f32]) -> f32 {
    scalar::weighted_sum(a, b)
}

pub(in super::super) fn add_scaled(a: &mut [f32], b: &[f32], f: f32) {
    scalar::add_scaled(a, b, f)
}
