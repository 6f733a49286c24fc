//! Puts a call's kernels on a stream.

use std::sync::Arc;

use cudarc::driver::sys;

use super::params::{self, *};
use super::plan::{demand, Plan};
use super::{Bound, Buffer, Device, Error, Visible};
use crate::attention::{Problem, Rotation, Selection};

/// One call: arrays in device memory, and on the device, which binding each row has.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Arrays with device addresses. K and V F16, BF16, Q8_0 or Q4_0, head sizes of `HEAD_SIZES`, up to 16 rows, one mask for all
    /// heads, ALiBi only without bindings.
    pub problem: Problem,
    /// Basis of K, Q and V. Means something to sparse rows only.
    pub rotation: Rotation,
    /// Layer number in the model.
    pub layer: u32,
    pub selection: Selection,
    /// Device address of `[n_row]` i32: the number of each row's binding in `bounds`; -1: over every visible cell. Read when
    /// the kernels run.
    pub rows: u64,
    /// Were the rows' bindings found under this very mask? Then it is not looked at again, which takes longer than all else
    /// that lookup does behind a long prefix.
    pub seen: bool,
    /// At most 4.
    pub bounds: &'a [&'a Bound],
    /// Stream of the cache that K begins with.
    pub first_stream: u32,
}

/// Device memory that calls on one stream share, one after the other.
pub struct Workspace {
    buffer: Buffer,
}

impl Workspace {
    /// Room for these calls.
    ///
    /// # Errors
    /// A call is not supported, needs more than 256 MiB, or the memory cannot be had.
    pub fn for_calls(device: &Arc<Device>, calls: &[&Call<'_>]) -> Result<Workspace, Error> {
        Ok(Workspace { buffer: Buffer::new(device, "the workspace", Workspace::bytes_for(device, calls)?)? })
    }

    /// Size of what `for_calls` makes.
    ///
    /// # Errors
    /// A call is not supported or needs more than 256 MiB.
    pub fn bytes_for(device: &Device, calls: &[&Call<'_>]) -> Result<usize, Error> {
        calls.iter().try_fold(0, |bytes, call| Ok(Plan::new(device, call)?.bytes.max(bytes)))
    }

    /// Of so many bytes.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn of_bytes(device: &Arc<Device>, bytes: usize) -> Result<Workspace, Error> {
        Ok(Workspace { buffer: Buffer::new(device, "the workspace", bytes)? })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    pub(super) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Copies `n` elements from byte `at` to the host.
    pub(super) fn read<T: bytemuck::AnyBitPattern>(&self, at: usize, n: usize) -> Result<Vec<T>, Error> {
        self.buffer.read(at, n)
    }
}

/// Stages of a call, in the order in which they run. Without a coarse level the first two do nothing.
pub const STAGES: [&str; 6] = ["coarse lookup", "coarse select", "lookup", "select", "attend", "merge"];

/// A call that is ready to be put on streams, any number of times.
pub struct Attention {
    device: Arc<Device>,
    plan: Plan,
}

impl Attention {
    /// Plans a call. Its arrays, bindings and workspace must outlive every launch and every graph that holds one.
    ///
    /// # Errors
    /// The call is not supported, or the workspace is too small for it.
    pub fn new(device: &Arc<Device>, call: &Call<'_>, workspace: &Workspace) -> Result<Attention, Error> {
        let mut plan = Plan::new(device, call)?;
        demand(
            "the workspace",
            plan.bytes <= workspace.bytes(),
            format!("{} bytes", workspace.bytes()),
            "made for this call",
        )?;
        let at = |offset: usize| workspace.buffer.address() + offset as u64;
        let optional = |offset: usize, wanted: bool| if wanted { at(offset) } else { 0 };
        let mut parameters = params::Call {
            y: at(plan.y),
            x: optional(plan.x, call.selection.estimate),
            partial: at(plan.partial),
            check: at(plan.check),
            work: at(plan.work),
            entries: at(plan.entries),
            directory: at(plan.directory),
            kept: optional(plan.kept, call.selection.estimate),
            span: at(plan.span),
            state: at(plan.state),
            ..plan.parameters
        };
        if let Some(c) = &mut plan.coarse {
            parameters.opened = at(c.opened);
            parameters.opened_entries = at(c.entries);
            parameters.opened_directory = at(c.directory);
            parameters.dropped = at(c.dropped);
            parameters.list = at(c.list);
            parameters.ids = optional(c.ids, call.selection.estimate);
            c.parameters = params::Call {
                y: at(c.y),
                partial: at(c.partial),
                check: at(plan.check),
                work: at(c.opened),
                entries: at(c.entries),
                directory: at(c.directory),
                dropped: at(c.dropped),
                ..c.parameters
            };
        }
        plan.parameters = parameters;
        Ok(Attention { device: device.clone(), plan })
    }

    /// 32-bit words of what is counted of a row and KV head.
    pub const WORK_WORDS: usize = size_of::<Work>() / 4;

    /// From now on the counts go to `[n_head_kv][n_row]` entries at this device address, instead of to the workspace.
    pub fn count_at(&mut self, address: u64) {
        self.plan.parameters.work = address;
    }

    /// From now on rows attend the cells that a map has listed for them, and look none up in the mask; the call's `rows` are that
    /// map's.
    pub fn attend_listed(&mut self, visible: Visible) {
        let p = &mut self.plan.parameters;
        (p.visible, p.n_visible, p.visible_stride) = (visible.cells, visible.counts, visible.stride);
    }

    /// An entry of the counts: the row's binding, none if it was dense, and keys in its kept clusters.
    pub fn counts(words: &[u32; Self::WORK_WORDS]) -> (Option<usize>, usize) {
        (usize::try_from(words[0] as i32).ok(), words[2] as usize)
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
        (0..STAGES.len()).try_for_each(|stage| unsafe { self.launch_stage(stage, stream, true) })
    }

    /// The same where the stream comes from waiting for another one: nothing may start before that.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for `launch`.
    pub unsafe fn launch_after_others(&self, stream: sys::CUstream) -> Result<(), Error> {
        let first = if self.plan.coarse.is_some() { 0 } else { 2 };
        let first = if self.plan.parameters.n_bound == 0 { 3 } else { first };
        // SAFETY: the same contract.
        (0..STAGES.len()).try_for_each(|stage| unsafe { self.launch_stage(stage, stream, stage > first) })
    }

    /// One stage of `STAGES` alone, for benches; those before it must have run.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for `launch`.
    pub unsafe fn launch_stage(&self, stage: usize, stream: sys::CUstream, early: bool) -> Result<(), Error> {
        let (p, plan) = (&self.plan.parameters, &self.plan);
        let lookup = |p: &params::Call| [CHECK_BLOCKS as u32 + p.n_head_kv + p.lookup_blocks, p.n_bound, 1];
        let pairs = [p.n_row, p.n_head_kv, 1];
        let by_mass = (p.mode == MODE_MASS) as usize;
        let device = &self.device;
        let (flat, opened) = (plan.lookup.flat.map(|f| f.0), plan.lookup.opened.map(|f| f.0));
        let shared = if stage == 4 { plan.shared } else { 0 };
        let (function, grid, threads, parameters) = match (stage, &plan.coarse) {
            (0 | 2, _) if p.n_bound == 0 => return Ok(()),
            (0, Some(c)) => (flat[0], lookup(&c.parameters), [LOOKUP_THREADS, 1], &c.parameters),
            (1, Some(c)) => (device.select_coarse[c.select], pairs, [c.select_threads, 1], &c.parameters),
            (0 | 1, None) => return Ok(()),
            (2, Some(_)) => {
                let blocks = p.n_bound * p.n_head_kv + p.n_row * p.n_head_kv * p.n_part;
                (opened[plan.diag], [blocks, 1, 1], [LOOKUP_THREADS, 1], p)
            }
            (2, None) => (flat[plan.diag], lookup(p), [LOOKUP_THREADS, 1], p),
            (3, Some(_)) => (device.select_opened[plan.select][by_mass], pairs, [plan.select_threads, 1], p),
            (3, None) if plan.alone => (device.select_alone[plan.select], pairs, [plan.select_threads, 1], p),
            (3, None) => (device.select[plan.select][by_mass], pairs, [plan.select_threads, 1], p),
            (4, _) => (plan.attend.0, [p.n_block, 1, 1], [ATTEND_THREADS, 1], p),
            _ => {
                let threads = [plan.dv.next_multiple_of(32), MERGE_GROUPS];
                (device.merge_for(plan.dv), [p.n_row * p.n_head_kv, p.group, 1], threads, p)
            }
        };
        // SAFETY: the kernels take one parameter, a `params::Call`; the rest is the caller's contract.
        unsafe { self.device.start_with(function, grid, threads, shared, parameters, early, stream) }
    }

    /// Fine clusters that the coarse level opened for a row and KV head in the last launch, in the order of `scores`; none
    /// without a coarse level or for a row that was dense: for tests. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn opened(&self, workspace: &Workspace, row: usize, head_kv: usize) -> Result<Option<Vec<u32>>, Error> {
        let (p, Some(coarse)) = (&self.plan.parameters, &self.plan.coarse) else { return Ok(None) };
        let pair = head_kv * p.n_row as usize + row;
        let work: Vec<u32> = workspace.buffer.read(coarse.opened + pair * size_of::<Work>(), 2)?;
        if work[0] as i32 == -1 {
            return Ok(None);
        }
        let at = coarse.entries + ENTRY_BYTES * pair * (p.opened_cluster as usize + 1);
        let entries: Vec<u32> = workspace.buffer.read(at, 2 * (work[1] as usize + 1))?;
        let runs = entries.chunks_exact(2).zip(entries.chunks_exact(2).skip(1));
        Ok(Some(runs.flat_map(|(run, next)| run[1]..run[1] + next[0] - run[0]).collect()))
    }

    /// Selection scores of a row and KV head by the last launch, `[group][n_cluster]`, in units of ln: for tests. Waits for the
    /// device.
    ///
    /// # Errors
    /// The driver refuses.
    #[doc(hidden)]
    pub fn scores(
        &self,
        workspace: &Workspace,
        row: usize,
        head_kv: usize,
        n_cluster: usize,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let p = &self.plan.parameters;
        let pair = head_kv * p.n_row as usize + row;
        let ln = |y: f32| y * std::f32::consts::LN_2;
        let at = |g: usize| self.plan.y + 4 * p.n_cluster as usize * (pair * p.group as usize + g);
        (0..p.group as usize)
            .map(|g| Ok(workspace.buffer.read(at(g), n_cluster)?.into_iter().map(ln).collect()))
            .collect()
    }

    /// What was kept for a row and KV head by the last launch, for tests and statistics: kept clusters' first members, and
    /// their number of keys; none for a row that was dense. Waits for the device.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn kept(&self, workspace: &Workspace, row: usize, head_kv: usize) -> Result<Option<(Vec<u32>, u32)>, Error> {
        let p = &self.plan.parameters;
        let pair = head_kv * p.n_row as usize + row;
        let work: Vec<u32> = workspace.buffer.read(self.plan.work + pair * size_of::<Work>(), 3)?;
        if work[0] as i32 == -1 {
            return Ok(None);
        }
        let at = self.plan.entries + ENTRY_BYTES * pair * (p.n_cluster as usize + 1);
        let entries: Vec<u32> = workspace.buffer.read(at, 2 * work[1] as usize)?;
        Ok(Some((entries.chunks_exact(2).map(|e| e[1]).collect(), work[2])))
    }
}
