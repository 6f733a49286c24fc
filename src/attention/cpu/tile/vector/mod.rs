//! Vectors of f32, one type per code path, so that the inner loops of tiles are written once.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod scalar;

/// Some numbers, one per lane.
///
/// # Safety
/// All functions: the processor has what the path needs, and addresses hold `WIDTH` numbers. Implementations are
/// `inline(always)`: they become part of a function that enables the path's features.
pub(super) trait Vector: Copy {
    /// Lanes.
    const WIDTH: usize;
    /// Rows that a register tile of two vectors each may have beside what it needs: 4 or 8.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn store(self, at: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The larger one; `other` where `self` is NaN.
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn sqrt(self) -> Self;
    /// About 1e-7 relative; 0 below -87.3.
    unsafe fn exp(self) -> Self;
    /// -inf where `self` is not finite.
    unsafe fn finite(self) -> Self;
    /// `self + mask`; -inf where that is the mask, whatever `self` is.
    unsafe fn masked(self, mask: Self) -> Self;
    /// Sum of the lanes.
    unsafe fn sum(self) -> f32;
}

/// Makes a function of a `Path` and some arguments from one that is generic over the path's vector.
macro_rules! on_path {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $t:ty),* $(,)?) $(-> $r:ty)?, $generic:ident) => {
        $(#[$doc])*
        pub(super) unsafe fn $name(path: $crate::attention::cpu::Path, $($arg: $t),*) $(-> $r)? {
            use $crate::attention::cpu::Path;
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            unsafe fn avx512($($arg: $t),*) $(-> $r)? {
                // SAFETY: the same contract.
                unsafe { $generic::<vector::avx512::F32x16>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $t),*) $(-> $r)? {
                // SAFETY: the same contract.
                unsafe { $generic::<vector::avx2::F32x8>($($arg),*) }
            }
            // SAFETY: `Path::available` has a path only where its features were detected; the rest is the caller's contract.
            unsafe {
                match path {
                    #[cfg(target_arch = "x86_64")]
                    Path::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    Path::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    Path::Neon => $generic::<vector::neon::F32x4>($($arg),*),
                    Path::Scalar => $generic::<vector::scalar::Four>($($arg),*),
                }
            }
        }
    };
}
pub(super) use on_path;
