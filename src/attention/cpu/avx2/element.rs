//! Elements of rows as f32, for AVX2 and F16C.

use std::arch::x86_64::*;

use crate::attention::cpu::kernels::stored::{Chunk, BF16, F16, F32, Q4_0, Q8_0, U8};

/// Elements of a chunk as vectors.
pub(super) trait Element: Chunk {
    /// What all elements of a chunk share.
    type Scale: Copy;
    /// Reads what the elements of a chunk share.
    ///
    /// # Safety
    /// The chunk is there (a plain type may end early), and the processor has AVX2, FMA and F16C.
    unsafe fn scale(chunk: *const u8) -> Self::Scale;
    /// Elements `8 j` to `8 j + 7` of a chunk.
    ///
    /// # Safety
    /// As for `scale`; these elements are there, and `j < 4`.
    unsafe fn load(chunk: *const u8, j: usize, scale: Self::Scale) -> __m256;
}

/// A type whose elements share nothing.
macro_rules! plain {
    ($name:ident, $size:expr, |$at:ident| $load:expr) => {
        impl Element for $name {
            type Scale = ();
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn scale(_chunk: *const u8) {}
            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn load(chunk: *const u8, j: usize, _scale: ()) -> __m256 {
                // SAFETY: eight elements are there by contract; the loads are unaligned ones.
                unsafe {
                    let $at = chunk.add(8 * $size * j);
                    $load
                }
            }
        }
    };
}

plain!(F32, 4, |at| _mm256_loadu_ps(at.cast()));
plain!(F16, 2, |at| _mm256_cvtph_ps(_mm_loadu_si128(at.cast())));
plain!(BF16, 2, |at| {
    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
});
plain!(U8, 1, |at| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))));

/// The F16 number at the start of a block, in all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_scale(block: *const u8) -> __m256 {
    // SAFETY: the block is there by the callers' contract.
    let bits = unsafe { block.cast::<i16>().read_unaligned() };
    _mm256_cvtph_ps(_mm_set1_epi16(bits))
}

impl Element for Q8_0 {
    type Scale = __m256;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale(chunk: *const u8) -> __m256 {
        // SAFETY: the same contract.
        unsafe { block_scale(chunk) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(chunk: *const u8, j: usize, scale: __m256) -> __m256 {
        // SAFETY: the block is there by contract.
        let bytes = unsafe { _mm_loadl_epi64(chunk.add(2 + 8 * j).cast()) };
        _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
    }
}

impl Element for Q4_0 {
    type Scale = __m256;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale(chunk: *const u8) -> __m256 {
        // SAFETY: the same contract.
        unsafe { block_scale(chunk) }
    }
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(chunk: *const u8, j: usize, scale: __m256) -> __m256 {
        // SAFETY: the block is there by contract.
        let bytes = unsafe { _mm_loadl_epi64(chunk.add(2 + 8 * (j % 2)).cast()) };
        let wide = _mm256_cvtepu8_epi32(bytes);
        let wide = if j < 2 { wide } else { _mm256_srli_epi32::<4>(wide) };
        let nibbles = _mm256_and_si256(wide, _mm256_set1_epi32(15));
        _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8))))
    }
}
