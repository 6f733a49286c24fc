//! Elements of rows as f32, for Advanced SIMD.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::attention::cpu::kernels::stored::{Chunk, BF16, F16, F32, Q4_0, Q8_0, U8};

/// Elements of a chunk as vectors.
pub(super) trait Element: Chunk {
    /// What all elements of a chunk share.
    type Scale: Copy;
    /// Reads what the elements of a chunk share.
    ///
    /// # Safety
    /// The chunk is there (a plain type may end early).
    unsafe fn scale(chunk: *const u8) -> Self::Scale;
    /// Elements `8 j` to `8 j + 7` of a chunk.
    ///
    /// # Safety
    /// As for `scale`; these elements are there, and `j < 4`.
    unsafe fn load(chunk: *const u8, j: usize, scale: Self::Scale) -> [float32x4_t; 2];
}

/// A type whose elements share nothing.
macro_rules! plain {
    ($name:ident, $size:expr, |$at:ident| $load:expr) => {
        impl Element for $name {
            type Scale = ();
            #[inline]
            unsafe fn scale(_chunk: *const u8) {}
            #[inline]
            unsafe fn load(chunk: *const u8, j: usize, _scale: ()) -> [float32x4_t; 2] {
                // SAFETY: eight elements are there by contract; loads of bytes need no alignment.
                unsafe {
                    let $at = chunk.add(8 * $size * j);
                    $load
                }
            }
        }
    };
}

plain!(F32, 4, |at| [vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at.add(16)))]);
plain!(F16, 2, |at| of_f16(vreinterpretq_u16_u8(vld1q_u8(at))));
plain!(BF16, 2, |at| {
    let bits = vreinterpretq_u16_u8(vld1q_u8(at));
    let (low, high) = (vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits));
    [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
});
plain!(U8, 1, |at| {
    let wide = vmovl_u8(vld1_u8(at));
    [vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))]
});

/// Eight F16 numbers. Their intrinsics need a newer compiler than this crate does.
#[inline]
fn of_f16(bits: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: conversions between registers, part of every Advanced SIMD.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) low, in(vreg) bits, options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) high, in(vreg) bits, options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

/// The F16 number at the start of a block, in all lanes.
#[inline]
unsafe fn block_scale(block: *const u8) -> float32x4_t {
    // SAFETY: the block is there by the callers' contract.
    let bits = unsafe { block.cast::<u16>().read_unaligned() };
    // SAFETY: no memory is touched.
    of_f16(unsafe { vdupq_n_u16(bits) })[0]
}

/// Eight small integers times a scale.
#[inline]
fn scaled(q: int8x8_t, scale: float32x4_t) -> [float32x4_t; 2] {
    // SAFETY: no memory is touched.
    unsafe {
        let wide = vmovl_s8(q);
        let (low, high) = (vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide)));
        [vmulq_f32(scale, low), vmulq_f32(scale, high)]
    }
}

impl Element for Q8_0 {
    type Scale = float32x4_t;
    #[inline]
    unsafe fn scale(chunk: *const u8) -> float32x4_t {
        // SAFETY: the same contract.
        unsafe { block_scale(chunk) }
    }
    #[inline]
    unsafe fn load(chunk: *const u8, j: usize, scale: float32x4_t) -> [float32x4_t; 2] {
        // SAFETY: the block is there by contract.
        scaled(unsafe { vld1_s8(chunk.add(2 + 8 * j).cast()) }, scale)
    }
}

impl Element for Q4_0 {
    type Scale = float32x4_t;
    #[inline]
    unsafe fn scale(chunk: *const u8) -> float32x4_t {
        // SAFETY: the same contract.
        unsafe { block_scale(chunk) }
    }
    #[inline]
    unsafe fn load(chunk: *const u8, j: usize, scale: float32x4_t) -> [float32x4_t; 2] {
        // SAFETY: the block is there by contract.
        unsafe {
            let bytes = vld1_u8(chunk.add(2 + 8 * (j % 2)));
            let nibbles = if j < 2 { vand_u8(bytes, vdup_n_u8(15)) } else { vshr_n_u8::<4>(bytes) };
            scaled(vsub_s8(vreinterpret_s8_u8(nibbles), vdup_n_s8(8)), scale)
        }
    }
}
