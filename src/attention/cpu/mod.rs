//! The attention call on CPU threads that somebody else owns: a plan of tasks that they share. Knows nothing of ggml.
//!
//! `plan` cuts a call into tasks, `lookup` scores and selects clusters, `attend` runs over cells, `tile` does both for
//! query rows that share a selection, `ruled` is for evaluations with another rule, `guard` compares a cache with an index,
//! `kernels` are the inner loops, `memory` is all pointer arithmetic.

mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod check;
mod guard;
mod kernels;
mod lookup;
mod measure;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plan;
mod progress;
mod ruled;
mod scalar;
mod tile;

use std::sync::OnceLock;

pub use check::{check_problem, check_shape};
pub use guard::Guard;
pub use memory::Memory;
pub use plan::{Options, Plan, Schedule};

/// Smallest and largest head size, and the step between them, that the kernels take.
pub const HEAD_DIM_MIN: usize = 64;
pub const HEAD_DIM_MAX: usize = 256;
pub const HEAD_DIM_STEP: usize = 8;

/// Code path of the inner loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    Scalar,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL and DQ, and what `Avx2` has.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Advanced SIMD, which every 64-bit ARM processor has.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Path {
    /// The best path of this processor, or the one that `GGML_SQUEEZE_CPU_PATH` (`scalar`, `avx2`, `avx512`, `neon`) names
    /// if it is there. Decided once.
    pub fn detect() -> Path {
        static PATH: OnceLock<Path> = OnceLock::new();
        *PATH.get_or_init(|| {
            let wanted = std::env::var("GGML_SQUEEZE_CPU_PATH").unwrap_or_default();
            let all = Path::available();
            all.iter().copied().find(|path| path.name() == wanted).unwrap_or(all[all.len() - 1])
        })
    }

    /// The paths that run on this processor, the best one last.
    pub fn available() -> Vec<Path> {
        #[allow(unused_mut)]
        let mut all = vec![Path::Scalar];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            all.push(Path::Avx2);
            let more = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if more && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512dq") {
                all.push(Path::Avx512);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Path::Neon);
        all
    }

    /// Name for people, and for `GGML_SQUEEZE_CPU_PATH`.
    pub fn name(self) -> &'static str {
        match self {
            Path::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Path::Neon => "neon",
        }
    }
}

/// Name of the code path that plans use here.
pub fn path() -> &'static str {
    Path::detect().name()
}

/// Why a call cannot run here; the caller computes it densely, by other means.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    #[error("{what} head size {size}: multiples of 8 from 64 to 256 are supported; such a layer stays dense")]
    HeadDim { what: &'static str, size: usize },
    #[error("{what} head size {size} is no multiple of {block}, the block of {element}: such a layer stays dense")]
    Block { what: &'static str, size: usize, element: &'static str, block: usize },
    #[error("{what} is rotated in blocks of {block}, which must be a power of two that divides the head size {size}")]
    Rotation { what: &'static str, block: usize, size: usize },
    #[error("{what} has a step of {step} bytes in dimension 0, {want} is needed: make it contiguous there")]
    Stride { what: &'static str, step: usize, want: usize },
    #[error("{what} has {got} elements in dimension {dim}, the call needs {want}: the tensors do not fit together")]
    Shape { what: &'static str, dim: usize, got: usize, want: usize },
    #[error("the call names {got} rows but has {want}: give one entry for each query of each stream")]
    Rows { got: usize, want: usize },
    #[error(
        "tile {tile} is no run of two or more sparse rows of one binding and one stream behind the tile before it"
    )]
    Tile { tile: usize },
    #[error("a row names binding {got} of {n}: bind the index first, or make the row dense")]
    NoBinding { got: usize, n: usize },
    #[error("layer {layer} is not in the index: it stays dense")]
    NoLayer { layer: u32 },
    #[error("the index was built with {what} {index}, the call has {call}: build the index with this model")]
    Index { what: &'static str, index: usize, call: usize },
    #[error("a binding maps {got} {what}, the index needs {want}: bind the index again")]
    Binding { what: &'static str, got: usize, want: usize },
    #[error("there is no memory for {bytes} bytes of scratch: end other programs, or use fewer threads")]
    Memory { bytes: usize },
    #[error("sparse rows with ALiBi (max_bias {max_bias}): such a call stays dense")]
    Alibi { max_bias: String },
}

/// How much of the prefix the sparse rows of a call attended to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Kept {
    /// Sum of `(S + selected keys) / (P - W)`.
    pub share_sum: f64,
    /// Number of (sparse row, KV head) pairs in the sum.
    pub count: u64,
    /// Sum of the true attention mass, of that of the sinks and clustered keys, on keys not kept; and its number of pairs:
    /// where it is measured, those whose row selects for itself.
    pub missed_sum: f64,
    pub missed_count: u64,
}
