//! Elements of rows as f32, for AVX-512.

use std::arch::x86_64::*;

use crate::attention::cpu::kernels::stored::{Chunk, BF16, F16, F32, Q4_0, Q8_0, U8};

/// Elements of a chunk as vectors.
pub(super) trait Element: Chunk {
    /// Both halves of a chunk.
    ///
    /// # Safety
    /// The chunk is there, and the processor has AVX-512 F, BW, VL and DQ.
    unsafe fn load(chunk: *const u8) -> [__m512; 2];
    /// The first elements of a chunk, one for each bit from the lowest up; the others are 0. Quantised types have no
    /// such chunks: theirs are taken as whole.
    ///
    /// # Safety
    /// As for `load`, of the elements asked for.
    unsafe fn load_part(chunk: *const u8, mask: u32) -> [__m512; 2];
}

/// A type of plain numbers: how 16 bits of a mask and an address become a vector, and an address alone.
macro_rules! plain {
    ($name:ident, $size:expr, |$at:ident| $load:expr, |$mask:ident| $part:expr) => {
        impl Element for $name {
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            unsafe fn load(chunk: *const u8) -> [__m512; 2] {
                // SAFETY: in bounds by contract; the loads are unaligned ones.
                unsafe {
                    let low = {
                        let $at = chunk;
                        $load
                    };
                    let $at = chunk.add(16 * $size);
                    [low, $load]
                }
            }
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            unsafe fn load_part(chunk: *const u8, mask: u32) -> [__m512; 2] {
                // SAFETY: elements whose bit is 0 are not touched, the others there by contract.
                unsafe {
                    let low = {
                        let ($at, $mask) = (chunk, mask as u16);
                        $part
                    };
                    let ($at, $mask) = (chunk.wrapping_add(16 * $size), (mask >> 16) as u16);
                    [low, $part]
                }
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn of_bf16(bits: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

plain!(F32, 4, |at| _mm512_loadu_ps(at.cast()), |mask| _mm512_maskz_loadu_ps(mask, at.cast()));
plain!(F16, 2, |at| _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())), |mask| {
    _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at.cast()))
});
plain!(BF16, 2, |at| of_bf16(_mm256_loadu_si256(at.cast())), |mask| {
    of_bf16(_mm256_maskz_loadu_epi16(mask, at.cast()))
});
plain!(U8, 1, |at| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(at.cast()))), |mask| {
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at.cast())))
});

/// The F16 number at the start of a block, in all lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn block_scale(block: *const u8) -> __m512 {
    // SAFETY: the block is there by the callers' contract.
    let bits = unsafe { block.cast::<i16>().read_unaligned() };
    _mm512_cvtph_ps(_mm256_set1_epi16(bits))
}

impl Element for Q8_0 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(chunk: *const u8) -> [__m512; 2] {
        // SAFETY: the block is there by contract.
        unsafe {
            let scale = block_scale(chunk);
            let half = |at: *const u8| {
                let wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()));
                _mm512_mul_ps(scale, _mm512_cvtepi32_ps(wide))
            };
            [half(chunk.add(2)), half(chunk.add(18))]
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load_part(chunk: *const u8, _mask: u32) -> [__m512; 2] {
        // SAFETY: the same contract.
        unsafe { Self::load(chunk) }
    }
}

impl Element for Q4_0 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load(chunk: *const u8) -> [__m512; 2] {
        // SAFETY: the block is there by contract.
        unsafe {
            let values =
                _mm512_setr_ps(-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            let values = _mm512_mul_ps(block_scale(chunk), values);
            // The permutation looks at the lowest four bits of each lane alone: no mask, no conversion.
            let wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(chunk.add(2).cast()));
            [_mm512_permutexvar_ps(wide, values), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(wide), values)]
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn load_part(chunk: *const u8, _mask: u32) -> [__m512; 2] {
        // SAFETY: the same contract.
        unsafe { Self::load(chunk) }
    }
}
