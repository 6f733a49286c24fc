//! Four numbers in plain code.

use super::Vector;

#[derive(Clone, Copy)]
pub(in super::super) struct Four([f32; 4]);

impl Four {
    #[inline(always)]
    fn map(self, other: Four, f: impl Fn(f32, f32) -> f32) -> Four {
        Four(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Vector for Four {
    const WIDTH: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Four([x; 4])
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: four numbers are there by contract.
        Four(unsafe { at.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: four numbers are there by contract.
        unsafe { at.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.map(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.map(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.map(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // Not `mul_add`: without an instruction for it that is a slow call.
        Four(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.map(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn sqrt(self) -> Self {
        self.map(self, |a, _| a.sqrt())
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        self.map(self, |a, _| a.exp())
    }
    #[inline(always)]
    unsafe fn finite(self) -> Self {
        self.map(self, |a, _| if a.is_finite() { a } else { f32::NEG_INFINITY })
    }
    #[inline(always)]
    unsafe fn masked(self, mask: Self) -> Self {
        self.map(mask, |a, m| if m == f32::NEG_INFINITY { m } else { a + m })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        (self.0[0] + self.0[1]) + (self.0[2] + self.0[3])
    }
}
