//! The kernels' parameters, mirrored from kernels/params.cuh field by field. Pointers are device addresses.

use crate::attention::Element;

/// Bindings that one call may name, and checking blocks per binding.
pub(super) const MAX_BOUND: usize = 4;
pub(super) const CHECK_BLOCKS: usize = 8;
/// Tokens of a binding whose digest a checking block compares per call.
pub(super) const SAMPLE: usize = 8;
/// Keys or clusters of a tile.
pub(super) const TILE: usize = 16;
/// Query heads of a tile.
pub(super) const COLUMNS: usize = 8;
pub(super) const LOOKUP_THREADS: usize = 128;
pub(super) const ATTEND_THREADS: usize = 128;
pub(super) const DIGEST_THREADS: usize = 128;
/// Threads of a select block at least, and groups of threads of a merge block.
pub(super) const SELECT_THREADS_MIN: usize = 256;
pub(super) const MERGE_GROUPS: usize = 4;
/// Tiles of sinks of a binding at most.
pub(super) const SINK_TILES: usize = 8;
/// Variants of select: clusters per thread, and threads at most.
pub(super) const SELECT: [(usize, usize); 5] = [(4, 512), (8, 1024), (16, 1024), (32, 1024), (64, 1024)];
/// The same for groups of one head under a budget; more clusters per thread do not fit in its registers there. Otherwise the first
/// of `SELECT`.
pub(super) const SELECT_ALONE: [(usize, usize); 3] = [(4, 512), (8, 1024), (16, 1024)];
/// Over coarse clusters, and over fine ones of opened coarse ones.
pub(super) const SELECT_COARSE: [(usize, usize); 3] = [(4, 512), (8, 1024), (64, 1024)];
pub(super) const SELECT_OPENED: [(usize, usize); 2] = [(4, 512), (64, 1024)];
/// For the tiles of a prefill.
pub(super) const SELECT_TILE: [(usize, usize); 3] = [(8, 1024), (16, 1024), (64, 1024)];
/// (row, KV head) pairs of a call, and query heads per KV head, at most.
pub(super) const MAX_PAIRS: usize = 2048;
pub(super) const MAX_GROUP: usize = 16;

/// Head sizes of values that merge is built for.
pub(super) const HEAD_DIMS_V: [usize; 7] = [64, 80, 96, 112, 128, 192, 256];

/// The kernels' number of a type; they take all but F32.
pub(super) fn type_number(element: Element) -> Option<u32> {
    match element {
        Element::F32 => None,
        Element::F16 => Some(0),
        Element::BF16 => Some(1),
        Element::Q8_0 => Some(2),
        Element::Q4_0 => Some(3),
    }
}

/// Bytes from one row to the next in shared memory: an odd number of 16s, which spreads rows over the banks.
pub(super) fn stage(element: Element, d: usize) -> usize {
    16 * (element.row_bytes(d).div_ceil(16) | 1)
}

/// Instead of a number of keys: all clusters.
pub(super) const EVERY: u32 = u32::MAX;

pub(super) const SPREAD_NONE: u32 = 0;
pub(super) const SPREAD_RADIUS: u32 = 1;
pub(super) const SPREAD_DIAG: u32 = 2;
pub(super) const MODE_BUDGET: u32 = 0;
pub(super) const MODE_THRESHOLD: u32 = 1;
pub(super) const MODE_MASS: u32 = 2;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Layer {
    pub centroids: u64,
    pub mean_values: u64,
    pub variances: u64,
    pub variance_scales: u64,
    pub radii: u64,
    pub offsets: u64,
    pub members: u64,
    pub fine: u64,
    pub offset_stride: u32,
    pub n_cluster: u32,
    pub n_clustered: u32,
    pub n_prefix: u32,
    pub n_sink: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Bound {
    pub layer: Layer,
    pub cells: u64,
    pub always: u64,
    pub guard: u64,
    pub valid: u64,
    pub digests: u64,
    pub turns: u64,
    pub first_cell: u32,
    pub n_always: u32,
    pub guard_cell: u32,
    pub target: u32,
    pub floor: u32,
    pub stream: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Strided {
    pub data: u64,
    pub nb: [u64; 3],
}

pub(super) fn strided(a: &crate::attention::Array) -> Strided {
    Strided { data: a.data as u64, nb: [a.nb[1] as u64, a.nb[2] as u64, a.nb[3] as u64] }
}

/// What select leaves about one (row, KV head).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Work {
    pub bound: i32,
    pub n_kept: u32,
    pub n_keys: u32,
    pub always_tiles: u32,
    pub member_tiles: u32,
    pub estimate_tiles: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Call {
    pub q: Strided,
    pub k: Strided,
    pub v: Strided,
    pub mask: Strided,
    pub dst: Strided,
    pub sinks: u64,
    pub rows: u64,
    pub scale: f32,
    pub softcap: f32,
    pub alpha: f32,
    pub threshold: f32,
    pub mass: f32,
    pub spread: u32,
    pub mode: u32,
    pub estimate: u32,
    pub n_query: u32,
    pub n_row: u32,
    pub n_kv: u32,
    pub n_head_kv: u32,
    pub group: u32,
    pub k_share: u32,
    pub v_share: u32,
    pub mask_streams: u32,
    pub n_bound: u32,
    pub n_cluster: u32,
    pub n_tile: u32,
    pub lookup_blocks: u32,
    pub n_block: u32,
    pub wave_tiles: u32,
    pub max_waves: u32,
    pub max_tiles: u32,
    pub n_part: u32,
    pub opened_cluster: u32,
    pub opened_tiles: u32,
    pub n_dropped: u32,
    pub k_type: u32,
    pub v_type: u32,
    pub k_block: u32,
    pub k_bytes: u32,
    pub v_bytes: u32,
    pub k_stage: u32,
    pub v_stage: u32,
    pub max_bias: f32,
    pub seen: u32,
    pub visible_stride: u32,
    pub bound: [Bound; MAX_BOUND],
    pub y: u64,
    pub x: u64,
    pub partial: u64,
    pub check: u64,
    pub work: u64,
    pub entries: u64,
    pub directory: u64,
    pub kept: u64,
    pub span: u64,
    pub state: u64,
    pub opened: u64,
    pub opened_entries: u64,
    pub opened_directory: u64,
    pub dropped: u64,
    pub list: u64,
    pub ids: u64,
    pub visible: u64,
    pub n_visible: u64,
}

/// Bytes of a kept cluster in the workspace.
pub(super) const ENTRY_BYTES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// The header's numbers, read from its text: a constant changed on one side alone fails here. Sizes are compared on the
    /// device, where the kernels are (tests/cuda.rs).
    #[test]
    fn constants_are_those_of_the_header() {
        let header = include_str!("../../../kernels/params.cuh");
        let of = |name: &str| -> usize { super::super::constant(header, name).parse().expect(name) };
        for (name, own) in [
            ("MAX_BOUND", MAX_BOUND),
            ("CHECK_BLOCKS", CHECK_BLOCKS),
            ("SAMPLE", SAMPLE),
            ("int TILE", TILE),
            ("COLUMNS", COLUMNS),
            ("MERGE_GROUPS", MERGE_GROUPS),
            ("SINK_TILES", SINK_TILES),
            ("MAX_PAIRS", MAX_PAIRS),
            ("MAX_GROUP", MAX_GROUP),
            ("LOOKUP_WARPS", LOOKUP_THREADS / 32),
            ("ATTEND_WARPS", ATTEND_THREADS / 32),
            ("CALL_BYTES", size_of::<Call>()),
            ("WORK_BYTES", size_of::<Work>()),
        ] {
            assert_eq!(of(name), own, "{name}");
        }
        for (name, element) in
            [("F16", Element::F16), ("BF16", Element::BF16), ("Q8_0", Element::Q8_0), ("Q4_0", Element::Q4_0)]
        {
            assert_eq!(of(&format!("TYPE_{name}")), type_number(element).expect(name) as usize, "{name}");
        }
        let select = include_str!("../../../kernels/select.cu");
        let all = [
            ("SELECT", &SELECT[..]),
            ("ALONE", &SELECT_ALONE),
            ("COARSE", &SELECT_COARSE),
            ("OPENED", &SELECT_OPENED),
            ("TILE", &SELECT_TILE),
        ];
        for (kind, (e, t)) in all.iter().flat_map(|(kind, variants)| variants.iter().map(move |v| (kind, v))) {
            assert!(select.contains(&format!("\n{kind}({e}, {t})\n")), "{kind}({e}, {t})");
        }
    }
}
