//! The parameters of a prefill's kernels, mirrored from kernels/prefill.cuh field by field, and what its kernels take of a
//! block's shared memory. Pointers are device addresses.

use super::super::params;

/// Columns of a panel, and keys or clusters of a step.
pub(super) const COLUMNS: usize = 128;
pub(super) const KEYS: usize = 64;
pub(super) const CHECK_THREADS: usize = 256;
pub(super) const PLAN_THREADS: usize = 1024;
pub(super) const SEEN_THREADS: usize = 256;
pub(super) const MERGE_THREADS: usize = 256;
/// Blocks of merge per panel.
pub(super) const MERGE_BLOCKS: usize = 4;
/// Bytes of what attend finds cells by.
const LISTS_BYTES: usize = 64;

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Prefill {
    pub call: params::Call,
    pub tile: u32,
    pub dense_tile: u32,
    pub n_slot: u32,
    pub n_dense_slot: u32,
    pub first_slot: u32,
    pub own_slots: u32,
    pub own_dense: u32,
    pub parts: u32,
    pub chunks: u32,
    pub n_block: u32,
    pub checked: u32,
    pub seen_words: u32,
    pub hidden: u64,
    pub follows: u64,
    pub broken: u64,
    pub order: u64,
    pub tiles: u64,
    pub tile_bound: u64,
    pub tile_rows: u64,
    pub seen: u64,
    pub partial: u64,
    pub sink_mass: u64,
    pub units: u64,
    pub state: u64,
    pub norms: u64,
}

/// Bytes of a tile: binding, place of the first row in `order`, rows, stream.
pub(super) const TILE_BYTES: usize = 16;

/// What a variant of the kernels is built with: threads of a block, the alignment that it wants, stages of attend (and bytes of
/// barriers for each), and those of lookup without and with the spread by dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub suffix: &'static str,
    pub lookup_threads: usize,
    pub attend_threads: usize,
    alignment: usize,
    attend_stages: usize,
    barriers: usize,
    /// Steps whose cells attend has in shared memory.
    ring: usize,
    lookup_stages: [usize; 2],
    /// Steps between two meetings of the threads.
    lookup_groups: [usize; 2],
}

pub(super) const PORTABLE: Path = Path {
    suffix: "",
    lookup_threads: 128,
    attend_threads: 128,
    alignment: 1,
    attend_stages: 2,
    barriers: 0,
    ring: 8,
    lookup_stages: [3, 2],
    lookup_groups: [1, 1],
};
pub(super) const HOPPER: Path = Path {
    suffix: "_hopper",
    lookup_threads: 256,
    attend_threads: 384,
    alignment: 1024,
    attend_stages: 5,
    barriers: 16,
    ring: 16,
    lookup_stages: [4, 2],
    lookup_groups: [2, 1],
};

impl Path {
    pub(super) fn attend_bytes(&self, d: usize) -> usize {
        let tiles = (COLUMNS + 2 * self.attend_stages * KEYS) * 2 * d;
        let barriers = self.barriers * self.attend_stages;
        tiles + 4 * (self.ring * KEYS + COLUMNS) + LISTS_BYTES + barriers + self.alignment - 1
    }

    pub(super) fn lookup_bytes(&self, d: usize, diag: bool, mass: bool) -> usize {
        let stage = KEYS * d * if diag { 3 } else { 2 };
        let variances = if diag { KEYS * d * 2 } else { 0 };
        let slots = 2 * self.lookup_groups[diag as usize];
        let sums = slots * (self.lookup_threads / 32) * KEYS * 4 * if mass { 2 } else { 1 };
        let tiles = COLUMNS * d * 2 + self.lookup_stages[diag as usize] * stage + variances;
        tiles + slots * 2 * KEYS * 4 + sums + self.alignment - 1
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::constant;
    use super::*;

    #[test]
    fn constants_are_those_of_the_kernels() {
        let files = [
            include_str!("../../../../kernels/params.cuh"),
            include_str!("../../../../kernels/prefill.cuh"),
            include_str!("../../../../kernels/prefill_plan.cu"),
            include_str!("../../../../kernels/prefill_attend.cuh"),
            include_str!("../../../../kernels/prefill_mma.cuh"),
        ]
        .concat();
        let of = |name: &str| -> usize { constant(&files, name).parse().expect(name) };
        for (name, own) in [
            ("PREFILL_COLUMNS", COLUMNS),
            ("PREFILL_KEYS", KEYS),
            ("CHECK_THREADS", CHECK_THREADS),
            ("PLAN_THREADS", PLAN_THREADS),
            ("SEEN_WARPS", SEEN_THREADS / 32),
        ] {
            assert_eq!(of(name), own, "{name}");
        }
        let bytes = size_of::<Prefill>() - size_of::<params::Call>();
        assert!(files.contains(&format!("PREFILL_BYTES = CALL_BYTES + {bytes};")));
        for path in [PORTABLE, HOPPER] {
            let threads = path.lookup_threads;
            let text = format!("THREADS = {threads}, MT = {}, ALIGNMENT = {};", 256 / threads, path.alignment);
            assert!(files.contains(&text), "{text}");
        }
        let attend = include_str!("../../../../kernels/prefill_attend.cu");
        assert!(attend.contains(&format!("STAGES = {}, RING = {};", PORTABLE.attend_stages, PORTABLE.ring)));
        let roles = include_str!("../../../../kernels/prefill_attend_hopper.cuh");
        assert!(roles.contains(&format!("STAGES = {}, RING = {};", HOPPER.attend_stages, HOPPER.ring)));
        assert!(roles.contains(&format!("ROLES_THREADS = {},", HOPPER.attend_threads)));
        let lookup = include_str!("../../../../kernels/prefill_lookup.cu");
        let ([plain, diag], [group, alone]) = (PORTABLE.lookup_stages, HOPPER.lookup_groups);
        assert!(lookup.contains(&format!("STAGES = Path::MT == 1 ? 2 * GROUP : DIAG ? {diag} : {plain};")));
        assert!(lookup.contains(&format!("GROUP = Path::MT == 1 && !DIAG ? {group} : {alone};")));
        assert_eq!((HOPPER.lookup_stages, PORTABLE.lookup_groups), ([2 * group, 2 * alone], [1, 1]));
    }

    #[test]
    fn attend_and_the_lookup_fit_in_what_a_block_may_have() {
        // 99 KiB on compute capability 8.6 and 8.9, 227 KiB on 9.0.
        for d in [64, 128] {
            assert!(PORTABLE.attend_bytes(d) <= 99 << 10 && HOPPER.attend_bytes(d) <= 227 << 10);
            assert!(
                PORTABLE.lookup_bytes(d, true, false) <= 99 << 10 && HOPPER.lookup_bytes(d, true, true) <= 227 << 10
            );
        }
    }
}
