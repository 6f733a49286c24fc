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
pub(super) const SINK_THREADS: usize = 256;
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
    pub sink_keys: u64,
}

/// Bytes of a tile: binding, place of the first row in `order`, rows, stream.
pub(super) const TILE_BYTES: usize = 16;

/// What a variant of attend is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AttendPath {
    pub threads: usize,
    alignment: usize,
    /// Steps whose K and V there is room for, and bytes of barriers for each.
    stages: usize,
    barriers: usize,
    /// Steps whose cells are in shared memory.
    ring: usize,
}

/// For every GPU and type, by head sizes.
pub(super) fn portable_attend(dk: usize, dv: usize) -> AttendPath {
    let threads = if dk.max(dv) > 128 { 256 } else { 128 };
    AttendPath { threads, alignment: 1, stages: 2, barriers: 0, ring: 8 }
}
/// For F16 of 64 or 128 elements on compute capability 9.0.
pub(super) const HOPPER_ATTEND: AttendPath =
    AttendPath { threads: 384, alignment: 1024, stages: 5, barriers: 16, ring: 16 };

/// What a variant of lookup is built with: steps that there is room for, without and with the spread by dimension, and steps between
/// two meetings of the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LookupPath {
    pub suffix: &'static str,
    pub threads: usize,
    alignment: usize,
    stages: [usize; 2],
    groups: [usize; 2],
}

pub(super) const PORTABLE_LOOKUP: LookupPath =
    LookupPath { suffix: "", threads: 128, alignment: 1, stages: [3, 2], groups: [1, 1] };
/// The same for keys of more than 128 elements.
const WIDE_STAGES: usize = 2;
pub(super) const HOPPER_LOOKUP: LookupPath =
    LookupPath { suffix: "_hopper", threads: 256, alignment: 1024, stages: [4, 2], groups: [2, 1] };

/// Elements that a row takes in shared memory.
fn padded(d: usize) -> usize {
    d.next_multiple_of(64)
}

impl AttendPath {
    /// Bytes of shared memory of a block.
    pub(super) fn bytes(&self, dk: usize, dv: usize) -> usize {
        let (dk, dv) = (padded(dk), padded(dv));
        let tiles = 2 * (COLUMNS * dk + self.stages * KEYS * (dk + dv));
        tiles + 4 * (self.ring * KEYS + COLUMNS) + LISTS_BYTES + self.barriers * self.stages + self.alignment - 1
    }
}

impl LookupPath {
    /// Bytes of shared memory of a block.
    pub(super) fn bytes(&self, d: usize, diag: bool, mass: bool) -> usize {
        let stages = if d > 128 { WIDE_STAGES } else { self.stages[diag as usize] };
        let d = padded(d);
        let stage = KEYS * d * if diag { 3 } else { 2 };
        let variances = if diag { KEYS * d * 2 } else { 0 };
        let slots = 2 * self.groups[diag as usize];
        let sums = slots * (self.threads / 32) * KEYS * 4 * if mass { 2 } else { 1 };
        let tiles = COLUMNS * d * 2 + stages * stage + variances;
        tiles + slots * 2 * KEYS * 4 + sums + self.alignment - 1
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{constant, HEAD_SIZES};
    use super::*;

    #[test]
    fn constants_are_those_of_the_kernels() {
        let files = [
            include_str!("../../../../kernels/params.cuh"),
            include_str!("../../../../kernels/prefill.cuh"),
            include_str!("../../../../kernels/prefill_plan.cu"),
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
            ("SINK_THREADS", SINK_THREADS),
        ] {
            assert_eq!(of(name), own, "{name}");
        }
        let bytes = size_of::<Prefill>() - size_of::<params::Call>();
        assert!(files.contains(&format!("PREFILL_BYTES = CALL_BYTES + {bytes};")));
        assert!(files.contains("MT = M, THREADS = 256 / M, ALIGNMENT = 1;"));
        let hopper = format!("THREADS = {}, MT = 1, ALIGNMENT = 1024;", HOPPER_LOOKUP.threads);
        assert!(files.contains(&hopper) && files.contains("using Portable = Warps<2>;"));
        let roles = include_str!("../../../../kernels/prefill_attend_hopper.cuh");
        assert!(roles.contains(&format!("STAGES = {}, RING = {};", HOPPER_ATTEND.stages, HOPPER_ATTEND.ring)));
        assert!(roles.contains(&format!("ROLES_THREADS = {},", HOPPER_ATTEND.threads)));
        let any = include_str!("../../../../kernels/prefill_attend_any.cuh");
        let own = portable_attend(128, 128);
        assert!(any.contains(&format!("RING = {},", own.ring)) && any.contains(&format!("{} * AREA,", own.stages)));
        let lookup = include_str!("../../../../kernels/prefill_lookup.cuh");
        let ([plain, diag], [group, alone]) = (PORTABLE_LOOKUP.stages, HOPPER_LOOKUP.groups);
        assert!(lookup
            .contains(&format!("STAGES = Path::MT == 1 ? 2 * GROUP : DIAG || D > 128 ? {WIDE_STAGES} : {plain};")));
        assert!(lookup.contains(&format!("GROUP = Path::MT == 1 && !DIAG ? {group} : {alone};")));
        assert_eq!((diag, HOPPER_LOOKUP.stages, PORTABLE_LOOKUP.groups), (2, [2 * group, 2 * alone], [1, 1]));
    }

    #[test]
    fn attend_and_the_lookup_fit_in_what_a_block_may_have() {
        // 99 KiB on compute capability 8.6 and 8.9, 163 KiB on 8.0, 227 KiB on 9.0.
        for (dk, dv) in HEAD_SIZES {
            let (attend, lookup) = (portable_attend(dk, dv).bytes(dk, dv), PORTABLE_LOOKUP.bytes(dk, true, true));
            assert!(attend <= 227 << 10 && lookup <= 227 << 10, "{dk}, {dv}");
            if dk <= 128 {
                assert!(attend <= 99 << 10 && PORTABLE_LOOKUP.bytes(dk, true, false) <= 99 << 10, "{dk}, {dv}");
            }
        }
        for d in [64, 128] {
            assert!(HOPPER_ATTEND.bytes(d, d) <= 227 << 10 && HOPPER_LOOKUP.bytes(d, true, true) <= 227 << 10);
        }
    }

    #[test]
    fn every_pair_of_head_sizes_has_its_kernels() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let text = |name: String| std::fs::read_to_string(folder.join(&name)).expect(&name);
        let merge = text("prefill_merge.cu".into());
        for (dk, dv) in HEAD_SIZES {
            let warps = 256 / portable_attend(dk, dv).threads;
            let attend = text(format!("prefill_attend_{dk}_{dv}.cu"));
            assert!(attend.contains(&format!("PREFILL_ATTEND({dk}, {dv}, {warps}, ")), "{attend}");
            assert!(text(format!("prefill_lookup_{dk}.cu")).contains(&format!("PREFILL_LOOKUP({dk}, ")));
            assert!(merge.contains(&format!("MERGE({dv})")));
        }
    }
}
