//! Plans a call: what the kernels take is checked, and the workspace laid out.

use super::device::Function;
use super::kinds::{self, Lookup};
use super::launch::Call;
use super::memory::Carver;
use super::params::{self, *};
use super::{Device, Error, MAX_ROWS};
use crate::attention::{keys_of_share, Mode, Selection, Spread};
use crate::hadamard;

/// Device memory that one context's calls share at most.
pub(super) const WORKSPACE_MAX: usize = 256 << 20;
/// Of that, the blocks' states: more blocks at once than fit here run one after the other.
const STATE_MAX: usize = 64 << 20;
/// Tiles that a block of attend should have per wave, where there are waves.
const WAVE_TILES: usize = 16;
/// With more clusters than these, groups of one head are selected by a kernel of their own.
const ALONE_MIN: usize = 1024;
/// Clusters per KV head that select takes.
const MAX_CLUSTERS: usize = SELECT[SELECT.len() - 1].0 * SELECT[SELECT.len() - 1].1;

/// Offsets of the workspace's parts, and the parameters, to which `Attention` adds the addresses.
pub(super) struct Plan {
    pub(super) parameters: params::Call,
    pub(super) lookup: Lookup,
    pub(super) diag: usize,
    pub(super) attend: Function,
    /// Bytes of shared memory that a block of attend needs beside its own.
    pub(super) shared: usize,
    pub(super) dv: usize,
    /// Variant of select (with a coarse level of that over opened clusters), and its threads.
    pub(super) select: usize,
    pub(super) select_threads: usize,
    pub(super) y: usize,
    pub(super) x: usize,
    pub(super) partial: usize,
    pub(super) check: usize,
    pub(super) work: usize,
    pub(super) entries: usize,
    pub(super) directory: usize,
    pub(super) kept: usize,
    pub(super) span: usize,
    pub(super) state: usize,
    /// That of `SELECT_ALONE`.
    pub(super) alone: bool,
    pub(super) coarse: Option<Coarse>,
    pub(super) bytes: usize,
}

/// The same of the coarse level, where there is one.
pub(super) struct Coarse {
    pub(super) parameters: params::Call,
    pub(super) select: usize,
    pub(super) select_threads: usize,
    pub(super) y: usize,
    pub(super) partial: usize,
    pub(super) opened: usize,
    pub(super) entries: usize,
    pub(super) directory: usize,
    pub(super) dropped: usize,
    pub(super) list: usize,
    pub(super) ids: usize,
}

/// Variant of select for so many clusters, and its threads.
pub(super) fn select_for(variants: &[(usize, usize)], n_cluster: usize) -> (usize, usize) {
    let fits = variants.iter().position(|(each, threads)| n_cluster <= each * threads).expect("checked before");
    (fits, n_cluster.div_ceil(variants[fits].0).next_power_of_two().max(SELECT_THREADS_MIN))
}

pub(super) fn demand(what: &'static str, holds: bool, got: impl ToString, want: &'static str) -> Result<(), Error> {
    holds.then_some(()).ok_or_else(|| Error::Unsupported { what, got: got.to_string(), want })
}

/// Shapes and strides that the kernels rely on.
fn check(call: &Call<'_>) -> Result<(), Error> {
    let p = &call.problem;
    let [d, n_query, n_head, n_stream] = p.q.ne;
    let [_, n_kv, n_head_kv, _] = p.k.ne;
    let dv = p.v.ne[0];
    kinds::demand(p)?;
    let fits = hadamard::fits(call.rotation.k, d) && hadamard::fits(call.rotation.v, dv);
    demand("the basis of K and V", fits, format!("{:?}", call.rotation), "blocks that heads are made of")?;
    demand("ALiBi's max_bias", p.max_bias == 0.0 || call.bounds.is_empty(), p.max_bias, "none beside bindings")?;
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
        p.dst.ne == [dv, n_head, n_query, n_stream],
        format!("{:?}", p.dst.ne),
        "that of the queries and values",
    )?;
    for (what, a) in [("K's streams", &p.k), ("V's streams", &p.v)] {
        demand(what, a.ne[3] > 0 && n_stream % a.ne[3] == 0, a.ne[3], "a divisor of the queries'")?;
    }
    let (k_step, v_step) = (p.k_type.block_bytes(), p.v_type.block_bytes());
    for (what, a, step) in [("q", &p.q, 4), ("k", &p.k, k_step), ("v", &p.v, v_step), ("dst", &p.dst, 4)] {
        demand("a step in dimension 0", a.nb[0] == step, format!("{} bytes in {what}", a.nb[0]), "that of its type")?;
    }
    // As much is read at a time.
    let (k, v) = (kinds::alignment(p.k_type, d), kinds::alignment(p.v_type, dv));
    for (what, a, bytes) in [("q", &p.q, 16), ("k", &p.k, k), ("v", &p.v, v)] {
        let aligned = (a.data as usize).is_multiple_of(bytes) && a.nb[1..].iter().all(|nb| nb % bytes == 0);
        let got = || format!("rows of {what} not on multiples of {bytes} bytes");
        demand("the alignment of a tensor", aligned, got(), "rows side by side, from a multiple of 16 bytes on")?;
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
    pub(super) fn new(device: &Device, call: &Call<'_>) -> Result<Plan, Error> {
        check(call)?;
        let p = &call.problem;
        let [d, n_query, n_head, n_stream] = p.q.ne;
        let [_, n_kv, n_head_kv, _] = p.k.ne;
        let dv = p.v.ne[0];
        let (group, n_row) = (p.n_group(), p.n_row());
        let (n_pair, n_column) = (n_row * n_head_kv, n_row * n_head);
        let Selection { mode, spread, alpha, estimate, .. } = call.selection;
        let [mut bound, mut coarse_bound] = [[params::Bound::default(); MAX_BOUND]; 2];
        let (mut n_cluster, mut n_member, mut n_coarse) = (0, 0, 0);
        for ((to, coarse), from) in bound.iter_mut().zip(&mut coarse_bound).zip(call.bounds) {
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
                [s.n_head_kv, s.n_group, s.head_dim_k, s.head_dim_v].map(|n| n as usize) == [n_head_kv, group, d, dv];
            demand("the index's shape of this layer", same, format!("{s:?}"), "that of the call")?;
            let v_block = from.resident().v_block();
            demand("the basis of the mean values", v_block == call.rotation.v, v_block, "that of V")?;
            demand("the number of clusters", s.n_cluster as usize <= MAX_CLUSTERS, s.n_cluster, "at most 65536")?;
            let n_sink = parameters[0].layer.n_sink as usize;
            demand("the number of sinks", n_sink <= SINK_TILES * TILE, n_sink, "at most 128")?;
            let meta = index.meta();
            let keys = |share: f32| match share >= 1.0 {
                true => EVERY,
                false => keys_of_share(share, meta.n_prefix(), meta.n_window as usize)
                    .saturating_sub(meta.n_sink as usize) as u32,
            };
            [*to, *coarse] = parameters;
            to.stream = to.stream.wrapping_sub(call.first_stream);
            coarse.stream = to.stream;
            // A level that only stands in for a missing one is opened whole.
            coarse.target = if s.n_coarse > 0 { keys(call.selection.opened_share()) } else { EVERY };
            n_coarse = n_coarse.max(s.n_coarse as usize);
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
        let (lookup, attend) = (device.lookup(p, call.rotation)?, device.attend(p)?);
        let (k_stage, v_stage) = (stage(p.k_type, d), stage(p.v_type, dv));
        let n_warp = ATTEND_THREADS / 32;
        let shared = attend.shared(wide, n_warp * TILE * (k_stage + v_stage), n_warp * group * (dv + 2) * 4)?;
        let attend = attend.functions[wide];
        // At least the one cluster that stands in for a missing level.
        let n_coarse = if call.selection.opened_share() < 1.0 && n_coarse > 0 { n_coarse } else { 0 };
        let (select, select_threads) = match n_coarse {
            0 => select_for(&SELECT, n_cluster),
            // With the many threads of the second variant, as few clusters per thread as were opened.
            _ => match select_for(&SELECT_OPENED, n_cluster) {
                (1, _) => (1, SELECT_OPENED[1].1),
                small => small,
            },
        };
        let n_block = device.attend_blocks(attend, shared)?;
        // Checks and sinks take blocks of their own; all run at once. Each KV head has the same number.
        let lookup_blocks = |diag: usize, n_cluster: usize| {
            let most = lookup.flat_blocks[diag].saturating_sub(CHECK_BLOCKS + n_head_kv) / n_head_kv;
            n_head_kv * most.min(n_cluster.div_ceil(TILE).div_ceil(LOOKUP_THREADS / 32)).max(1)
        };
        let opened_blocks = lookup.opened_blocks[diag].saturating_sub(call.bounds.len() * n_head_kv);
        let n_part = (opened_blocks / n_pair).clamp(1, n_cluster.div_ceil(TILE * LOOKUP_THREADS / 32).max(1));
        let state_bytes = group * (dv + 2) * 4;
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
        let fits = n_cluster > ALONE_MIN && select < SELECT_ALONE.len();
        let alone = group == 1 && matches!(mode, Mode::Budget(_)) && n_coarse == 0 && fits;
        let mut c = Carver::default();
        let scores = n_column * n_cluster;
        let partials = 2 * n_column * (n_tile + SINK_TILES);
        let mut plan = Plan {
            lookup,
            diag,
            attend,
            shared,
            dv,
            select,
            select_threads,
            y: c.area::<f32>(scores),
            x: c.area::<f32>(if estimate { scores } else { 0 }),
            partial: c.area::<f32>(partials),
            check: c.area::<u32>(MAX_BOUND * CHECK_BLOCKS * n_row),
            work: c.area::<Work>(n_pair),
            entries: c.area::<u8>(ENTRY_BYTES * n_pair * (n_cluster + 1)),
            directory: c.area::<u32>(n_pair * max_tiles),
            kept: c.area::<u32>(if estimate { n_pair * n_cluster / 32 } else { 0 }),
            span: c.area::<u64>(n_pair),
            state: c.area::<u8>(state_bytes * n_block * max_waves),
            alone,
            coarse: None,
            bytes: 0,
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
                lookup_blocks: lookup_blocks(diag, n_cluster) as u32,
                n_part: n_part as u32,
                n_block: n_block as u32,
                wave_tiles: WAVE_TILES as u32,
                max_waves: max_waves as u32,
                max_tiles: max_tiles as u32,
                k_type: type_number(p.k_type).unwrap_or_default(),
                v_type: type_number(p.v_type).unwrap_or_default(),
                k_block: call.rotation.k as u32,
                k_bytes: p.k_type.row_bytes(d) as u32,
                v_bytes: p.v_type.row_bytes(dv) as u32,
                k_stage: k_stage as u32,
                v_stage: v_stage as u32,
                max_bias: p.max_bias,
                seen: call.seen as u32,
                bound,
                ..Default::default()
            },
        };
        if n_coarse > 0 {
            let (select, select_threads) = select_for(&SELECT_COARSE, n_coarse);
            let lookup_blocks = lookup_blocks(0, n_coarse);
            let n_coarse = n_coarse.next_multiple_of(32);
            let max_tiles = n_cluster / TILE + 1;
            plan.parameters.opened_cluster = n_coarse as u32;
            plan.parameters.opened_tiles = max_tiles as u32;
            let n_dropped = select_threads / 32;
            plan.parameters.n_dropped = n_dropped as u32;
            plan.coarse = Some(Coarse {
                select,
                select_threads,
                y: c.area::<f32>(n_column * n_coarse),
                partial: c.area::<f32>(2 * n_column * (n_coarse / TILE + SINK_TILES)),
                opened: c.area::<Work>(n_pair),
                entries: c.area::<u8>(ENTRY_BYTES * n_pair * (n_coarse + 1)),
                directory: c.area::<u32>(n_pair * max_tiles),
                dropped: c.area::<f32>(2 * n_column * n_dropped),
                list: c.area::<u64>(n_pair * n_cluster),
                ids: c.area::<u32>(if estimate { n_pair * n_cluster } else { 0 }),
                parameters: params::Call {
                    spread: SPREAD_NONE,
                    mode: MODE_BUDGET,
                    estimate: 0,
                    n_cluster: n_coarse as u32,
                    n_tile: (n_coarse / TILE) as u32,
                    lookup_blocks: lookup_blocks as u32,
                    max_tiles: max_tiles as u32,
                    bound: coarse_bound,
                    ..plan.parameters
                },
            });
        }
        plan.bytes = c.bytes;
        demand("the workspace", plan.bytes <= WORKSPACE_MAX, format!("{} bytes", plan.bytes), "at most 256 MiB")?;
        Ok(plan)
    }
}
