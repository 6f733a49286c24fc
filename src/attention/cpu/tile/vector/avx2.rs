//! Eight numbers in AVX2.

use std::arch::x86_64::*;

use super::Vector;
use crate::attention::cpu::avx2;

#[derive(Clone, Copy)]
pub(in super::super) struct F32x8(__m256);

impl Vector for F32x8 {
    const WIDTH: usize = 8;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the numbers are there by contract.
        F32x8(unsafe { _mm256_loadu_ps(at) })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the numbers are there by contract.
        unsafe { _mm256_storeu_ps(at, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { _mm256_sqrt_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x8(unsafe { avx2::exp(self.0) })
    }
    #[inline(always)]
    unsafe fn finite(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0);
            let finite = _mm256_cmp_ps::<_CMP_LT_OQ>(size, _mm256_set1_ps(f32::INFINITY));
            F32x8(_mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), self.0, finite))
        }
    }
    #[inline(always)]
    unsafe fn masked(self, mask: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            let hidden = _mm256_cmp_ps::<_CMP_EQ_OQ>(mask.0, _mm256_set1_ps(f32::NEG_INFINITY));
            F32x8(_mm256_blendv_ps(_mm256_add_ps(self.0, mask.0), mask.0, hidden))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the processor has the instructions by contract.
        unsafe { avx2::sum8(self.0) }
    }
}
