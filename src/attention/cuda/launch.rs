//! Plans a call and puts its kernels on a stream.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use cudarc::driver::sys;

use super::memory::Carver;
use super::params::{self, *};
use super::{Bound, Buffer, Device, Error, HEAD_DIMS, MAX_ROWS};
use crate::attention::{keys_of_share, Element, Mode, Problem, Selection, Spread};

/// Device memory that one context's calls share at most.
const WORKSPACE_MAX: usize = 256 << 20;
/// Of that, the blocks' states: more blocks at once than fit here run one after the other.
const STATE_MAX: usize = 64 << 20;
/// Tiles that a block of attend should have per wave, where there are waves.
const WAVE_TILES: usize = 16;
/// Clusters per KV head that select takes.
const MAX_CLUSTERS: usize = SELECT[SELECT.len() - 1].0 * SELECT[SELECT.len() - 1].1;

/// One call: arrays in device memory, and on the device, which binding each row has.
pub struct Call<'a> {
    /// Arrays with device addresses. K and V F16, head size 64 or 128, up to 16 rows, one mask for all heads, no ALiBi.
    pub problem: Problem,
    /// Layer number in the model.
    pub layer: u32,
    pub selection: Selection,
    /// Device address of `[n_row]` i32: the number of each row's binding in `bounds`; -1: over every visible cell. Read when
    /// the kernels run.
    pub rows: u64,
    /// At most 4.
    pub bounds: &'a [&'a Bound],
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
        let mut bytes = 0;
        for call in calls {
            bytes = bytes.max(Plan::new(device, call)?.bytes);
        }
        Ok(Workspace { buffer: Buffer::new(device, "the workspace", bytes)? })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

/// Offsets of the workspace's parts, and the parameters without addresses.
struct Plan {
    parameters: params::Call,
    head: usize,
    diag: usize,
    wide: usize,
    /// Variant of select, and its threads.
    select: usize,
    select_threads: usize,
    y: usize,
    x: usize,
    partial: usize,
    plain: usize,
    check: usize,
    work: usize,
    entries: usize,
    directory: usize,
    kept: usize,
    span: usize,
    state: usize,
    bytes: usize,
}

fn demand(what: &'static str, holds: bool, got: impl ToString, want: &'static str) -> Result<(), Error> {
    holds.then_some(()).ok_or_else(|| Error::Unsupported { what, got: got.to_string(), want })
}

fn strided(a: &crate::attention::Array) -> Strided {
    Strided { data: a.data as u64, nb: [a.nb[1] as u64, a.nb[2] as u64, a.nb[3] as u64] }
}

/// Shapes and strides that the kernels rely on.
fn check(call: &Call<'_>) -> Result<(), Error> {
    let p = &call.problem;
    let [d, n_query, n_head, n_stream] = p.q.ne;
    let [_, n_kv, n_head_kv, _] = p.k.ne;
    demand("the type of K or V", p.k_type == Element::F16 && p.v_type == Element::F16, p.k_type.name(), "f16")?;
    demand("the head size of keys", HEAD_DIMS.contains(&d) && p.k.ne[0] == d, d, "64 or 128")?;
    demand("the head size of values", p.v.ne[0] == d && p.dst.ne[0] == d, p.v.ne[0], "that of the keys")?;
    demand("ALiBi's max_bias", p.max_bias == 0.0, p.max_bias, "none")?;
    demand("the number of query rows", (1..=MAX_ROWS).contains(&p.n_row()), p.n_row(), "1 to 16")?;
    demand(
        "the number of query heads",
        n_head_kv > 0 && n_head % n_head_kv == 0,
        n_head,
        "a multiple of the KV heads",
    )?;
    demand("the GQA group", (1..=MAX_GROUP).contains(&p.n_group()), p.n_group(), "1 to 16")?;
    demand(
        "the number of rows times KV heads",
        p.n_row() * n_head_kv <= MAX_PAIRS,
        p.n_row() * n_head_kv,
        "at most 2048",
    )?;
    demand(
        "the number of KV cells",
        n_kv > 0 && n_kv < 1 << 31 && p.v.ne[1] == n_kv,
        n_kv,
        "the same for K and V, below 2^31",
    )?;
    demand("V's number of heads", p.v.ne[2] == n_head_kv, p.v.ne[2], "that of K")?;
    demand(
        "the output's shape",
        p.dst.ne == [d, n_head, n_query, n_stream],
        format!("{:?}", p.dst.ne),
        "that of the queries",
    )?;
    for (what, a) in [("K's streams", &p.k), ("V's streams", &p.v)] {
        demand(what, a.ne[3] > 0 && n_stream % a.ne[3] == 0, a.ne[3], "a divisor of the queries'")?;
    }
    for (what, a, step) in [("q", &p.q, 4), ("k", &p.k, 2), ("v", &p.v, 2), ("dst", &p.dst, 4)] {
        demand("a step in dimension 0", a.nb[0] == step, format!("{} bytes in {what}", a.nb[0]), "that of its type")?;
    }
    // Rows are read 16 bytes at a time.
    for (what, a) in [("q", &p.q), ("k", &p.k), ("v", &p.v)] {
        let aligned = (a.data as usize).is_multiple_of(16) && a.nb[1..].iter().all(|nb| nb % 16 == 0);
        demand("the alignment of a tensor", aligned, what, "q, k and v with rows on multiples of 16 bytes")?;
    }
    if let Some(m) = &p.mask {
        demand("the mask's number of heads", m.ne[2] == 1, m.ne[2], "1")?;
        demand(
            "the mask's size",
            m.ne[0] >= n_kv && m.ne[1] >= n_query && m.nb[0] == 2,
            format!("{:?}", m.ne),
            "that of the cache",
        )?;
        demand("the mask's streams", m.ne[3] > 0 && n_stream % m.ne[3] == 0, m.ne[3], "a divisor of the queries'")?;
    }
    demand("the number of bindings", call.bounds.len() <= MAX_BOUND, call.bounds.len(), "at most 4")
}

impl Plan {
    fn new(device: &Device, call: &Call<'_>) -> Result<Plan, Error> {
        check(call)?;
        let p = &call.problem;
        let [d, n_query, n_head, n_stream] = p.q.ne;
        let [_, n_kv, n_head_kv, _] = p.k.ne;
        let (group, n_row) = (p.n_group(), p.n_row());
        let (n_pair, n_column) = (n_row * n_head_kv, n_row * n_head);
        let Selection { mode, spread, alpha, estimate } = call.selection;
        let mut bound = [params::Bound::default(); MAX_BOUND];
        let (mut n_cluster, mut n_member) = (0, 0);
        for (to, from) in bound.iter_mut().zip(call.bounds) {
            let index = from.resident().index();
            let parameters = from.parameters(call.layer, n_kv);
            let (Some(parameters), Some(view)) = (parameters, index.layer(call.layer)) else {
                return Err(Error::Unsupported {
                    what: "the layer",
                    got: call.layer.to_string(),
                    want: "layers of the index",
                });
            };
            let s = view.shape;
            let same =
                [s.n_head_kv, s.n_group, s.head_dim_k, s.head_dim_v].map(|n| n as usize) == [n_head_kv, group, d, d];
            demand("the index's shape of this layer", same, format!("{s:?}"), "that of the call")?;
            demand("the number of clusters", s.n_cluster as usize <= MAX_CLUSTERS, s.n_cluster, "at most 65536")?;
            let n_sink = parameters.layer.n_sink as usize;
            demand("the number of sinks", n_sink <= SINK_TILES * TILE, n_sink, "at most 128")?;
            let meta = index.meta();
            let keys = |share: f32| match share >= 1.0 {
                true => EVERY,
                false => keys_of_share(share, meta.n_prefix(), meta.n_window as usize)
                    .saturating_sub(meta.n_sink as usize) as u32,
            };
            *to = parameters;
            match mode {
                Mode::Budget(share) => to.target = keys(share),
                Mode::Threshold { floor, .. } => to.floor = keys(floor),
                Mode::Mass(_) => {}
            }
            n_cluster = n_cluster.max(s.n_cluster as usize);
            n_member = n_member.max(view.n_clustered());
        }
        let wide = (group > COLUMNS) as usize;
        let diag = (spread == Spread::Diag) as usize;
        let head = HEAD_DIMS.iter().position(|dim| *dim == d).expect("checked above");
        let select = SELECT.iter().position(|(each, threads)| n_cluster <= each * threads).expect("checked above");
        let select_threads = n_cluster.div_ceil(SELECT[select].0).next_power_of_two().max(SELECT_THREADS_MIN);
        let n_block = device.heads[head].attend_blocks[wide];
        // Checks and sinks take blocks of their own; all run at once. Each KV head has the same number.
        let most = device.heads[head].lookup_blocks[diag].saturating_sub(CHECK_BLOCKS + n_head_kv) / n_head_kv;
        let lookup_blocks = n_head_kv * most.min(n_cluster.div_ceil(TILE).div_ceil(LOOKUP_THREADS / 32)).max(1);
        let state_bytes = group * (d + 2) * 4;
        let most_tiles = n_pair * (n_kv.div_ceil(TILE) + n_member.div_ceil(TILE) + n_cluster.div_ceil(TILE) + 1);
        // Each pair takes two blocks at least.
        let least = (2 * n_pair).div_ceil(n_block);
        let max_waves = match n_row {
            1 => least,
            _ => most_tiles.div_ceil(n_block * WAVE_TILES).min(STATE_MAX / state_bytes / n_block).max(least),
        };

        // Whole words of bits, and rows on 128 bytes.
        let n_cluster = n_cluster.next_multiple_of(32);
        let n_tile = n_cluster / TILE;
        let max_tiles = n_member.div_ceil(TILE) + 1;
        let by_mass = matches!(mode, Mode::Mass(_));
        let mut c = Carver::default();
        let scores = n_column * n_cluster;
        let partials = 2 * n_column * (n_tile + SINK_TILES);
        let plan = Plan {
            head,
            diag,
            wide,
            select,
            select_threads,
            y: c.area::<f32>(scores),
            x: c.area::<f32>(if estimate || by_mass { scores } else { 0 }),
            partial: c.area::<f32>(partials),
            plain: c.area::<f32>(if by_mass { partials } else { 0 }),
            check: c.area::<u32>(MAX_BOUND * CHECK_BLOCKS * n_row),
            work: c.area::<Work>(n_pair),
            entries: c.area::<u8>(ENTRY_BYTES * n_pair * (n_cluster + 1)),
            directory: c.area::<u32>(n_pair * max_tiles),
            kept: c.area::<u32>(if estimate { n_pair * n_cluster / 32 } else { 0 }),
            span: c.area::<u64>(n_pair),
            state: c.area::<u8>(state_bytes * n_block * max_waves),
            bytes: c.bytes,
            parameters: params::Call {
                q: strided(&p.q),
                k: strided(&p.k),
                v: strided(&p.v),
                mask: p.mask.as_ref().map(strided).unwrap_or_default(),
                dst: strided(&p.dst),
                sinks: p.sinks.map_or(0, |s| s as u64),
                rows: call.rows,
                scale: p.scale,
                softcap: p.softcap,
                alpha,
                threshold: if let Mode::Threshold { threshold, .. } = mode { threshold } else { 0.0 },
                mass: if let Mode::Mass(share) = mode { share } else { 0.0 },
                spread: match spread {
                    Spread::None => SPREAD_NONE,
                    Spread::Radius => SPREAD_RADIUS,
                    Spread::Diag => SPREAD_DIAG,
                },
                mode: match mode {
                    Mode::Budget(_) => MODE_BUDGET,
                    Mode::Threshold { .. } => MODE_THRESHOLD,
                    Mode::Mass(_) => MODE_MASS,
                },
                estimate: estimate as u32,
                n_query: n_query as u32,
                n_row: n_row as u32,
                n_kv: n_kv as u32,
                n_head_kv: n_head_kv as u32,
                group: group as u32,
                k_share: (n_stream / p.k.ne[3]) as u32,
                v_share: (n_stream / p.v.ne[3]) as u32,
                mask_streams: p.mask.as_ref().map_or(0, |m| m.ne[3]) as u32,
                n_bound: call.bounds.len() as u32,
                n_cluster: n_cluster as u32,
                n_tile: n_tile as u32,
                lookup_blocks: lookup_blocks as u32,
                n_block: n_block as u32,
                wave_tiles: WAVE_TILES as u32,
                max_waves: max_waves as u32,
                max_tiles: max_tiles as u32,
                bound,
                ..Default::default()
            },
        };
        demand("the workspace", plan.bytes <= WORKSPACE_MAX, format!("{} bytes", plan.bytes), "at most 256 MiB")?;
        Ok(plan)
    }
}

/// Stages of a call, in the order in which they run.
pub const STAGES: [&str; 4] = ["lookup", "select", "attend", "merge"];

/// A call that is ready to be put on streams, any number of times.
pub struct Attention {
    device: Arc<Device>,
    plan: Plan,
    parameters: params::Call,
}

impl Attention {
    /// Plans a call. Its arrays, bindings and workspace must outlive every launch and every graph that holds one.
    ///
    /// # Errors
    /// The call is not supported, or the workspace is too small for it.
    pub fn new(device: &Arc<Device>, call: &Call<'_>, workspace: &Workspace) -> Result<Attention, Error> {
        let plan = Plan::new(device, call)?;
        demand(
            "the workspace",
            plan.bytes <= workspace.bytes(),
            format!("{} bytes", workspace.bytes()),
            "made for this call",
        )?;
        let at = |offset: usize| workspace.buffer.address() + offset as u64;
        let optional = |offset: usize, wanted: bool| if wanted { at(offset) } else { 0 };
        let by_mass = matches!(call.selection.mode, Mode::Mass(_));
        let parameters = params::Call {
            y: at(plan.y),
            x: optional(plan.x, call.selection.estimate || by_mass),
            partial: at(plan.partial),
            plain: optional(plan.plain, by_mass),
            check: at(plan.check),
            work: at(plan.work),
            entries: at(plan.entries),
            directory: at(plan.directory),
            kept: optional(plan.kept, call.selection.estimate),
            span: at(plan.span),
            state: at(plan.state),
            ..plan.parameters
        };
        Ok(Attention { device: device.clone(), plan, parameters })
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
        (0..STAGES.len()).try_for_each(|stage| unsafe { self.launch_stage(stage, stream) })
    }

    /// One stage of `STAGES` alone, for benches; those before it must have run.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for `launch`.
    pub unsafe fn launch_stage(&self, stage: usize, stream: sys::CUstream) -> Result<(), Error> {
        let p = &self.parameters;
        let kernels = &self.device.heads[self.plan.head];
        let lookup = [CHECK_BLOCKS as u32 + p.n_head_kv + p.lookup_blocks, p.n_bound, 1];
        // SAFETY: the kernels take one parameter, a `params::Call`; the rest is the caller's contract.
        unsafe {
            match stage {
                0 if p.n_bound == 0 => Ok(()),
                0 => self.start(kernels.lookup[self.plan.diag], lookup, [LOOKUP_THREADS, 1], stream),
                1 => {
                    let threads = [self.plan.select_threads, 1];
                    self.start(
                        self.device.select[self.plan.select][(p.mode == MODE_MASS) as usize],
                        [p.n_row, p.n_head_kv, 1],
                        threads,
                        stream,
                    )
                }
                2 => self.start(kernels.attend[self.plan.wide], [p.n_block, 1, 1], [ATTEND_THREADS, 1], stream),
                _ => {
                    let threads = [HEAD_DIMS[self.plan.head], MERGE_GROUPS];
                    self.start(kernels.merge, [p.n_row * p.n_head_kv, p.group, 1], threads, stream)
                }
            }
        }
    }

    /// # Safety
    /// As for `launch`.
    unsafe fn start(
        &self,
        function: sys::CUfunction,
        grid: [u32; 3],
        threads: [usize; 2],
        stream: sys::CUstream,
    ) -> Result<(), Error> {
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: threads[0] as c_uint,
            blockDimY: threads[1] as c_uint,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream,
            attrs: &mut attribute,
            numAttrs: self.device.overlap as c_uint,
        };
        let mut arguments = [(&raw const self.parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the parameter is what the kernel takes and is copied by the call; the rest is the caller's contract.
        unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(Error::driver("launch a kernel"))
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
        let p = &self.parameters;
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
        let p = &self.parameters;
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
