//! Sixteen numbers in AVX-512.

use std::arch::x86_64::*;

use super::Vector;
use crate::attention::cpu::avx512;

#[derive(Clone, Copy)]
pub(in super::super) struct F32x16(__m512);

impl Vector for F32x16 {
    const WIDTH: usize = 16;
    const ROWS: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the numbers are there by contract.
        F32x16(unsafe { _mm512_loadu_ps(at) })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: the numbers are there by contract.
        unsafe { _mm512_storeu_ps(at, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { _mm512_sqrt_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        F32x16(unsafe { avx512::exp(self.0) })
    }
    #[inline(always)]
    unsafe fn finite(self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            // Both NaNs and both infinities.
            let not = _mm512_fpclass_ps_mask::<0x99>(self.0);
            F32x16(_mm512_mask_mov_ps(self.0, not, _mm512_set1_ps(f32::NEG_INFINITY)))
        }
    }
    #[inline(always)]
    unsafe fn masked(self, mask: Self) -> Self {
        // SAFETY: the processor has the instructions by contract.
        unsafe {
            let hidden = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(mask.0, _mm512_set1_ps(f32::NEG_INFINITY));
            F32x16(_mm512_mask_mov_ps(_mm512_add_ps(self.0, mask.0), hidden, mask.0))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the processor has the instructions by contract.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
}
