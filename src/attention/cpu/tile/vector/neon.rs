//! Four numbers in Advanced SIMD.

use std::arch::aarch64::*;

use super::Vector;
use crate::attention::cpu::neon;

#[derive(Clone, Copy)]
pub(in super::super) struct F32x4(float32x4_t);

impl Vector for F32x4 {
    const WIDTH: usize = 4;
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vdupq_n_f32(x) })
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the numbers are there by contract.
        F32x4(unsafe { vld1q_f32(at) })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the numbers are there by contract.
        unsafe { vst1q_f32(at, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vaddq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vsubq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vmulq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vbslq_f32(vcgtq_f32(self.0, other.0), self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x4(unsafe { vsqrtq_f32(self.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        F32x4(neon::exp(self.0))
    }
    #[inline(always)]
    unsafe fn finite(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            let finite = vcaltq_f32(self.0, vdupq_n_f32(f32::INFINITY));
            F32x4(vbslq_f32(finite, self.0, vdupq_n_f32(f32::NEG_INFINITY)))
        }
    }
    #[inline(always)]
    unsafe fn masked(self, mask: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            let hidden = vceqq_f32(mask.0, vdupq_n_f32(f32::NEG_INFINITY));
            F32x4(vbslq_f32(hidden, mask.0, vaddq_f32(self.0, mask.0)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the processor has the instructions by contract.
        unsafe { vaddvq_f32(self.0) }
    }
}
