//! The kernels' parameters, mirrored from kernels/kmeans.cuh field by field. Pointers are device addresses.

/// Points of a tile of the comparison.
pub(super) const POINTS: usize = 128;
/// Bits of a label that one pass of the sort orders by, and points of one of its blocks.
pub(super) const DIGIT_BITS: usize = 8;
pub(super) const CHUNK: usize = 4096;
/// Threads of a block, but for those below; a cluster or a token is a warp's.
pub(super) const THREADS: usize = 256;
pub(super) const ASSIGN_THREADS: usize = 128;
pub(super) const NEAR_THREADS: usize = 128;
/// Where one block does a head.
pub(super) const HEAD_THREADS: usize = 1024;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Kmeans {
    pub k: u64,
    pub v: u64,
    pub k_cell: u64,
    pub k_head: u64,
    pub v_cell: u64,
    pub v_head: u64,
    pub cells: u64,
    pub unit: u64,
    pub sinks: u64,
    pub broken: u64,
    pub label: u64,
    pub order: u64,
    pub from: u64,
    pub to: u64,
    pub digits: u64,
    pub start: u64,
    pub repaired: u64,
    pub pieces: u64,
    pub extra: u64,
    pub empty: u64,
    pub direction: u64,
    pub bounds: u64,
    pub group_start: u64,
    pub tiles: u64,
    pub n_tile: u64,
    pub near: u64,
    pub products: u64,
    pub centroids: u64,
    pub mean_values: u64,
    pub variances: u64,
    pub variance_scales: u64,
    pub radii: u64,
    pub members: u64,
    pub seed: u64,
    pub layer: u32,
    pub first_head: u32,
    pub n_head: u32,
    pub n_prefix: u32,
    pub n_sink: u32,
    pub n_row: u32,
    pub n_point: u32,
    pub n_cluster: u32,
    pub n_group: u32,
    pub n_near: u32,
    pub max_tiles: u32,
    pub n_chunk: u32,
    pub shift: u32,
    pub again: u32,
    pub nested: u32,
    pub times: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::cuda::constant;
    use crate::build::{summary, topdown};

    /// The sources' numbers, read from their text: a constant changed on one side alone fails here.
    #[test]
    fn constants_are_those_of_the_kernels() {
        macro_rules! source {
            ($name:literal) => {
                include_str!(concat!("../../../kernels/", $name))
            };
        }
        for (text, name, own) in [
            (source!("kmeans.cuh"), "NEAR", topdown::NEAR),
            (source!("kmeans.cuh"), "POINTS", POINTS),
            (source!("kmeans.cuh"), "DIGIT_BITS", DIGIT_BITS),
            (source!("kmeans.cuh"), "CHUNK", CHUNK),
            (source!("kmeans.cuh"), "KMEANS_BYTES", size_of::<Kmeans>()),
            (source!("kmeans_unit.cu"), "WARPS", THREADS / 32),
            (source!("kmeans_assign.cu"), "THREADS", ASSIGN_THREADS),
            (source!("kmeans_assign.cu"), "TILE_THREADS", HEAD_THREADS),
            (source!("kmeans_sort.cu"), "THREADS", THREADS),
            (source!("kmeans_sort.cu"), "SCAN_THREADS", HEAD_THREADS),
            (source!("kmeans_repair.cu"), "THREADS", THREADS),
            (source!("kmeans_centre.cu"), "THREADS", THREADS),
            (source!("kmeans_centre.cu"), "NEAR_THREADS", NEAR_THREADS),
            (source!("kmeans_summary.cu"), "THREADS", THREADS),
        ] {
            assert_eq!(constant(text, name).parse(), Ok(own), "{name}");
        }
        assert_eq!(constant(source!("kmeans_summary.cu"), "NO_VARIANCE").parse(), Ok(summary::NO_VARIANCE));
    }
}
