//! Attention of a prefill on a GPU: up to 8192 query rows, tiles of which share a selection per KV head. See docs/cuda.md.
//!
//! `plan` checks a call and lays it out, `kernels` are what runs, with `params` as their parameters.

mod kernels;
mod params;
mod plan;

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys;

pub(super) use self::kernels::Kernels;
use self::params::{CHECK_THREADS, MERGE_BLOCKS, MERGE_THREADS, PLAN_THREADS, SEEN_THREADS, SINK_THREADS};
use self::plan::{Part, Plan};
use super::params::{Work, CHECK_BLOCKS, ENTRY_BYTES, MODE_MASS};
use super::plan::demand;
use super::{Call, Device, Error, Workspace};

/// Query rows of one call at most.
pub const MAX_PREFILL_ROWS: usize = 8192;
/// Rows of one sequence from which they are tiles, as on the CPU.
pub const TILE_RUN: usize = 18;
/// Blocks that share the cells that a tile may see.
const SEEN_BLOCKS: u32 = 32;

/// A call of many rows.
///
/// Runs of rows of one stream, one binding and one sequence (each sees what the row before sees) are found on the device. Of a
/// run of 18 rows or more the last selects for itself, the others are cut into as few tiles of at most `tile` rows as can be;
/// rows of shorter runs select for themselves. Where there are more tiles than expected (one per `tile` rows, and 16), the rows
/// of those that are too many are dense.
#[derive(Clone, Copy)]
pub struct PrefillCall<'a> {
    /// As for decode, but with up to 8192 rows, and without a coarse level, whatever its selection says. The estimate and ALiBi are not
    /// supported.
    pub call: Call<'a>,
    pub tile: usize,
    /// Without the kernels for this GPU's architecture alone, and so many tiles at a time (0: as many as there is memory for):
    /// for tests.
    #[doc(hidden)]
    pub portable: bool,
    #[doc(hidden)]
    pub slots: usize,
}

/// Rows that share a selection, or that are dense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tile {
    /// None: dense.
    pub bound: Option<usize>,
    pub rows: Vec<usize>,
}

/// A call of many rows that is ready to be put on streams.
pub struct Prefill {
    device: Arc<Device>,
    plan: Plan,
}

/// Stages of a call, in the order in which they run; those from `LOOKUP` on once for each part of it.
pub const PREFILL_STAGES: [&str; 9] = ["check", "plan", "seen", "sinks", "sums", "means", "select", "attend", "merge"];
const PART_STAGE: usize = 4;

impl Prefill {
    /// Bytes of workspace that a call needs.
    ///
    /// # Errors
    /// The call is not supported or needs more than 256 MiB.
    pub fn bytes_for(device: &Device, call: &PrefillCall<'_>) -> Result<usize, Error> {
        Ok(Plan::new(device, call, 0)?.bytes)
    }

    /// Plans a call. Its arrays, bindings and workspace must outlive every launch and every graph that holds one.
    ///
    /// # Errors
    /// The call is not supported, or the workspace is too small for it.
    pub fn new(device: &Arc<Device>, call: &PrefillCall<'_>, workspace: &Workspace) -> Result<Prefill, Error> {
        let plan = Plan::new(device, call, workspace.address())?;
        let has = format!("{} bytes", workspace.bytes());
        demand("the workspace", plan.bytes <= workspace.bytes(), has, "made for this call")?;
        Ok(Prefill { device: device.clone(), plan })
    }

    /// Tiles of a call at most, which is what is counted of; parts of them that are counted one after the other.
    pub fn slots(&self) -> Vec<usize> {
        self.plan.parts.iter().map(|part| part.parameters.own_slots as usize).collect()
    }

    /// From now on the counts go to this device address: for each part of `slots`, `[n_head_kv][slots]` entries.
    pub fn count_at(&mut self, address: u64) {
        let n_head_kv = self.plan.n_head_kv() as u64;
        for part in &mut self.plan.parts {
            let own = address + u64::from(part.parameters.first_slot) * n_head_kv * size_of::<Work>() as u64;
            (part.parameters.call.work, part.select_call.work) = (own, own);
        }
    }

    /// An entry of the counts: the tile's binding (none where there is no tile), keys in its kept clusters, and its rows.
    pub fn counts(words: &[u32; super::Attention::WORK_WORDS]) -> (Option<usize>, usize, usize) {
        (usize::try_from(words[0] as i32).ok(), words[2] as usize, words[3] as usize)
    }

    /// Puts the call on a stream. Waits for nothing, allocates nothing.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// `stream` is one of the device's primary context; every address in the call is valid when the kernels run, and nobody
    /// else uses the workspace meanwhile.
    pub unsafe fn launch(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: the same contract.
        unsafe {
            (0..PART_STAGE).try_for_each(|stage| self.stage(stage, &self.plan.parts[0], stream))?;
            self.plan.parts.iter().try_for_each(|part| {
                (PART_STAGE..PREFILL_STAGES.len()).try_for_each(|stage| self.stage(stage, part, stream))
            })
        }
    }

    /// One stage of all parts, for benches; those before it must have run.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for `launch`.
    pub unsafe fn launch_stage(&self, stage: usize, stream: sys::CUstream) -> Result<(), Error> {
        let n = if stage < PART_STAGE { 1 } else { self.plan.parts.len() };
        // SAFETY: the same contract.
        self.plan.parts[..n].iter().try_for_each(|part| unsafe { self.stage(stage, part, stream) })
    }

    unsafe fn stage(&self, stage: usize, part: &Part, stream: sys::CUstream) -> Result<(), Error> {
        let (p, plan, device) = (&part.parameters, &self.plan, &self.device);
        let kernels = device.prefill()?;
        let (n_row, n_bound, n_head_kv) = (p.call.n_row, p.call.n_bound, p.call.n_head_kv);
        let lookup = |pass: usize| {
            let kernel = plan.lookup[pass];
            (kernel.function, [p.chunks * p.parts, p.own_slots, n_head_kv], kernel.threads, kernel.bytes)
        };
        let by_mass = (p.call.mode == MODE_MASS) as usize;
        let (function, grid, threads, bytes) = match PREFILL_STAGES[stage] {
            "check" if n_bound == 0 => return Ok(()),
            "sums" | "means" | "select" if p.own_slots == 0 => return Ok(()),
            "seen" if p.seen == 0 => return Ok(()),
            "check" => (kernels.check, [CHECK_BLOCKS as u32 * n_bound + n_row, 1, 1], CHECK_THREADS, 0),
            "plan" => (kernels.plan, [1, 1, 1], PLAN_THREADS, 0),
            "seen" => (kernels.seen, [p.n_slot + p.n_dense_slot, SEEN_BLOCKS, 1], SEEN_THREADS, 0),
            "sinks" => {
                let Some(sinks) = plan.sinks else { return Ok(()) };
                (sinks, [n_bound, n_head_kv, 1], SINK_THREADS, 0)
            }
            "sums" => lookup(0),
            "means" => lookup(1 + by_mass),
            "select" => {
                let function = device.select_tile[plan.select][by_mass];
                let grid = [p.own_slots, n_head_kv, 1];
                // SAFETY: the kernel takes one `params::Call`; the rest is the caller's contract.
                return unsafe {
                    device.start(function, grid, [plan.select_threads, 1], &part.select_call, false, stream)
                };
            }
            "attend" => {
                // SAFETY: the kernel takes one `params::Prefill`; the rest is the caller's contract.
                unsafe { device.start(kernels.share.0, [1, 1, 1], [PLAN_THREADS, 1], p, false, stream)? };
                (plan.attend.function, [p.n_block, 1, 1], plan.attend.threads, plan.attend.bytes)
            }
            _ => (kernels.merge_for(plan.dv), [p.n_block.max(2) - 1, MERGE_BLOCKS as u32, 1], MERGE_THREADS, 0),
        };
        // SAFETY: as above.
        unsafe { device.start_with(function.0, grid, [threads, 1], bytes, p, false, stream) }
    }

    /// The tiles of the last launch, those that select first. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn tiles(&self, workspace: &Workspace) -> Result<Vec<Option<Tile>>, Error> {
        let p = &self.plan.parts[0].parameters;
        let read = |at: u64, n: usize| workspace.read::<u32>((at - workspace.address()) as usize, n);
        let order = read(p.order, 2 * p.n_row())?;
        let tiles = read(p.tiles, 4 * (p.n_slot + p.n_dense_slot) as usize)?;
        let of = |t: &[u32]| {
            let rows: Range<usize> = t[1] as usize..(t[1] + t[2]) as usize;
            let bound = usize::try_from(t[0] as i32).ok();
            (t[2] > 0).then(|| Tile { bound, rows: order[rows].iter().map(|r| *r as usize).collect() })
        };
        Ok(tiles.chunks_exact(4).map(of).collect())
    }

    /// What was kept for a tile of the last part and a KV head: kept clusters' first members, and their number of keys. Waits
    /// for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn kept(&self, workspace: &Workspace, slot: usize, head_kv: usize) -> Result<Option<(Vec<u32>, u32)>, Error> {
        let Some((p, pair)) = self.pair(slot, head_kv) else { return Ok(None) };
        let read = |at: u64, n: usize| workspace.read::<u32>((at - workspace.address()) as usize, n);
        let work = read(p.call.work + (pair * size_of::<Work>()) as u64, 3)?;
        if work[0] as i32 == -1 {
            return Ok(None);
        }
        let entries = p.call.entries + (ENTRY_BYTES * pair * (p.call.n_cluster as usize + 1)) as u64;
        let entries = read(entries, 2 * work[1] as usize)?;
        Ok(Some((entries.chunks_exact(2).map(|e| e[1]).collect(), work[2])))
    }

    /// Keys in the kept clusters of the last launch, mean over the rows that are in tiles and KV heads. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn mean_kept(&self, workspace: &Workspace) -> Result<f64, Error> {
        let (mut sum, mut n) = (0.0, 0);
        for part in &self.plan.parts {
            let p = &part.parameters;
            let words = (p.own_slots * p.call.n_head_kv) as usize * size_of::<Work>() / 4;
            let words = workspace.read::<u32>((p.call.work - workspace.address()) as usize, words)?;
            for work in words.chunks_exact(size_of::<Work>() / 4) {
                if let (Some(_), keys, rows) = Prefill::counts(work.try_into().expect("the size of a chunk")) {
                    sum += (keys * rows) as f64;
                    n += rows;
                }
            }
        }
        Ok(sum / n.max(1) as f64)
    }

    /// `[n_cluster]`: what a tile of the last part ranks the clusters of a KV head by. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn means(
        &self,
        workspace: &Workspace,
        slot: usize,
        head_kv: usize,
        n_row: usize,
        n_cluster: usize,
    ) -> Result<Vec<f64>, Error> {
        let Some((p, pair)) = self.pair(slot, head_kv) else { return Ok(Vec::new()) };
        let columns = n_row * p.call.group as usize;
        let mut sums = vec![0.0; n_cluster];
        for panel in 0..columns.div_ceil(params::COLUMNS) {
            let row = (pair * p.parts as usize + panel) * p.call.n_cluster as usize;
            let at = p.call.y + 4 * row as u64;
            let own = workspace.read::<f32>((at - workspace.address()) as usize, n_cluster)?;
            sums.iter_mut().zip(own).for_each(|(sum, x)| *sum += f64::from(x));
        }
        let mean = |x: f64| x / columns as f64;
        let of = |x: f64| if n_row > 1 { mean(x).sqrt() * (-50f64).exp2() } else { mean(x) };
        Ok(sums.into_iter().map(of).collect())
    }

    /// A tile's pair, if the last part has it.
    fn pair(&self, slot: usize, head_kv: usize) -> Option<(&params::Prefill, usize)> {
        let p = &self.plan.parts.last()?.parameters;
        let own = slot.checked_sub(p.first_slot as usize).filter(|own| *own < p.own_slots as usize)?;
        Some((p, head_kv * p.own_slots as usize + own))
    }
}
