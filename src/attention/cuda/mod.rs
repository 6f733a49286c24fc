//! The attention call on an NVIDIA GPU: the same call as on the CPU, as a few kernels on a stream that somebody else owns.
//! Knows nothing of ggml.
//!
//! `device` finds the driver, `kinds` loads the kernels for some types and head sizes, `resident` holds an index in device memory,
//! `bound` ties it to cells of a cache, `plan` lays a call out and `launch` puts it on a stream; `prefill` is for calls of many
//! rows. Nothing in a launch allocates, waits or depends on what the
//! device computes: a launch can be captured in a CUDA graph and replayed with other data at the same addresses.

mod bound;
mod device;
mod kinds;
mod launch;
mod memory;
mod module;
mod params;
mod plan;
mod prefill;
mod resident;
mod rows;
mod stream;

pub use bound::Bound;
pub use device::Device;
pub(crate) use device::{KMEANS_ASSIGN, KMEANS_CENTRE, KMEANS_REPAIR, KMEANS_SORT, KMEANS_SUMMARY, KMEANS_UNIT};
pub use launch::{Attention, Call, Workspace, STAGES};
pub use memory::{is_on, Buffer};
pub(crate) use memory::{Carver, Pinned};
pub(crate) use module::Module;
pub use prefill::{Prefill, PrefillCall, Tile, MAX_PREFILL_ROWS, PREFILL_STAGES, TILE_RUN};
pub use resident::Resident;
pub use rows::{gather, Compared, DeviceRows, Masks, RowMap, RowNumbers, Visible, Watched, MAX_WRITTEN};
pub use stream::{Event, Executable, Mapped, Stream};

/// Head sizes of keys and of values that the kernels are built for; quantised ones are whole blocks of 32.
pub const HEAD_SIZES: [(usize, usize); 9] =
    [(64, 64), (80, 80), (96, 64), (96, 96), (112, 112), (128, 128), (192, 128), (192, 192), (256, 256)];
/// Head sizes that an index can be built for on the GPU.
pub const HEAD_DIMS: [usize; 2] = [64, 128];
/// Query rows of one call of `Attention` at most.
pub const MAX_ROWS: usize = 16;
/// Bindings of one call at most.
pub const BOUND_MAX: usize = params::MAX_BOUND;

/// Prefix, in tokens, from which a sparse call of one query row is faster than the best dense attention: the default of the
/// smallest prefix on a GPU. Measured on an H100 (docs/benchmarks-gpu.md); what counts is the bytes that a token has in the cache.
/// Kinds of heads that lie between two measured ones get the longer prefix.
pub fn min_prefix(n_head_kv: usize, head_dim: usize) -> usize {
    match n_head_kv * head_dim {
        4096.. => 2048,
        1024.. => 4096,
        _ => 16384,
    }
}

/// Prefix, in tokens, from which a coarse level (1 % of the keys, `coarse_share` 0.3) makes a call of one query row faster; below
/// it, run flat, with a share of 1. Measured and rounded up as above.
pub fn coarse_min_prefix(n_head_kv: usize, head_dim: usize) -> usize {
    match n_head_kv * head_dim {
        4096.. => 262144,
        _ => 524288,
    }
}

/// Why something cannot be done on a GPU; the caller computes densely, by other means.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("this build has no CUDA kernels ({why}): build it where nvcc is found, as the README says")]
    NotBuilt { why: &'static str },
    #[error("no CUDA driver is installed (libcuda was not found)")]
    NoDriver,
    #[error("the CUDA driver is for CUDA {found}, 12.0 is needed: update it")]
    OldDriver { found: String },
    #[error("GPU {ordinal} has compute capability {major}.{minor}, 8.0 is needed: attention stays dense there")]
    OldDevice { ordinal: usize, major: i32, minor: i32 },
    #[error("the CUDA driver cannot {what}: {code}")]
    Driver { what: &'static str, code: String },
    #[error("{bytes} bytes of GPU memory for {what} cannot be had, {free} are free: attention stays dense")]
    Memory { what: &'static str, bytes: usize, free: usize },
    #[error("{what} is {got}, the CUDA kernels take {want}: such a call stays dense")]
    Unsupported { what: &'static str, got: String, want: &'static str },
}

/// What the library was built without, if it has no CUDA kernels.
pub fn missing() -> Option<&'static str> {
    (!device::MISSING.is_empty()).then_some(device::MISSING)
}

/// The value of `NAME = value` in a kernel's source.
#[cfg(test)]
pub(crate) fn constant<'a>(text: &'a str, name: &str) -> &'a str {
    let at = text.find(&format!("{name} = ")).expect(name) + name.len() + 3;
    text[at..].split([';', ',']).next().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    #[test]
    fn shorter_prefixes_pay_where_a_token_has_more_bytes() {
        assert_eq!([(32, 128), (8, 128), (2, 64)].map(|(n, d)| super::min_prefix(n, d)), [2048, 4096, 16384]);
        assert_eq!(super::min_prefix(4, 128), super::min_prefix(2, 64));
    }
}
