//! Plans a prefill: what the kernels take is checked, the workspace laid out, and the tiles cut into parts that it has room
//! for.

use super::super::device::Function;
use super::super::memory::Carver;
use super::super::params::{self, *};
use super::super::plan::{demand, select_for, WORKSPACE_MAX};
use super::super::{kinds, Call, Device, Error};
use super::kernels::Kernel;
use super::params::{Prefill, COLUMNS, KEYS, TILE_BYTES};
use super::{PrefillCall, MAX_PREFILL_ROWS};
use crate::attention::{keys_of_share, Element, Mode, Spread};
use crate::hadamard;

/// Clusters per KV head that select takes.
const MAX_CLUSTERS: usize = SELECT_TILE[SELECT_TILE.len() - 1].0 * SELECT_TILE[SELECT_TILE.len() - 1].1;
/// Tiles that there may be beside one per `tile` rows: the last row of each run, and short runs.
const MORE_TILES: usize = 16;
/// Blocks of lookup that share a panel's clusters at most, and steps of each at least.
const CHUNKS_MAX: usize = 16;
const CHUNK_STEPS: usize = 4;

/// Tiles that are done together.
pub(super) struct Part {
    pub parameters: Prefill,
    /// For select.
    pub select_call: params::Call,
}

pub(super) struct Plan {
    pub parts: Vec<Part>,
    pub dv: usize,
    /// Where the cache does not have the sinks as the index has its centroids.
    pub sinks: Option<Function>,
    pub attend: Kernel,
    /// Sums, squares, mass.
    pub lookup: [Kernel; 3],
    pub select: usize,
    pub select_threads: usize,
    pub bytes: usize,
}

impl Prefill {
    pub(super) fn n_row(&self) -> usize {
        self.call.n_row as usize
    }
}

/// Shapes and strides that the kernels rely on.
fn check(call: &Call<'_>, tile: usize) -> Result<(), Error> {
    let p = &call.problem;
    let [d, n_query, n_head, n_stream] = p.q.ne;
    let [_, n_kv, n_head_kv, _] = p.k.ne;
    let dv = p.v.ne[0];
    kinds::demand(p)?;
    let fits = hadamard::fits(call.rotation.k, d) && !matches!(call.rotation.k, 1 | 2);
    demand("the basis of K", fits, format!("{:?}", call.rotation), "blocks of 4 or more that heads are made of")?;
    demand("ALiBi's max_bias", p.max_bias == 0.0, p.max_bias, "none")?;
    demand("the estimate", !call.selection.estimate, "on", "none in a prefill")?;
    demand("the rows of a tile", tile > 0, tile, "1 or more")?;
    demand("the number of query rows", (1..=MAX_PREFILL_ROWS).contains(&p.n_row()), p.n_row(), "1 to 8192")?;
    let groups = n_head_kv > 0 && n_head % n_head_kv == 0;
    demand("the number of query heads", groups, n_head, "a multiple of the KV heads")?;
    demand("the GQA group", (1..=MAX_GROUP).contains(&p.n_group()), p.n_group(), "1 to 16")?;
    let cells = n_kv > 0 && n_kv < 1 << 31 && p.v.ne[1] == n_kv;
    demand("the number of KV cells", cells, n_kv, "the same for K and V, below 2^31")?;
    demand("V's number of heads", p.v.ne[2] == n_head_kv, p.v.ne[2], "that of K")?;
    let same = p.dst.ne == [dv, n_head, n_query, n_stream];
    demand("the output's shape", same, format!("{:?}", p.dst.ne), "that of the queries and values")?;
    for (what, a) in [("K's streams", &p.k), ("V's streams", &p.v)] {
        demand(what, a.ne[3] > 0 && n_stream % a.ne[3] == 0, a.ne[3], "a divisor of the queries'")?;
    }
    let (k_step, v_step) = (p.k_type.block_bytes(), p.v_type.block_bytes());
    for (what, a, step) in [("q", &p.q, 4), ("k", &p.k, k_step), ("v", &p.v, v_step), ("dst", &p.dst, 4)] {
        demand("a step in dimension 0", a.nb[0] == step, format!("{} bytes in {what}", a.nb[0]), "that of its type")?;
    }
    // As much is read or written at a time.
    let (k, v) = (kinds::alignment(p.k_type, d), kinds::alignment(p.v_type, dv));
    for (what, a, bytes) in [("q", &p.q, 16), ("k", &p.k, k), ("v", &p.v, v), ("dst", &p.dst, 8)] {
        let aligned = (a.data as usize).is_multiple_of(bytes) && a.nb[1..].iter().all(|nb| nb.is_multiple_of(bytes));
        let got = || format!("rows of {what} not on multiples of {bytes} bytes");
        demand("the alignment of a tensor", aligned, got(), "rows side by side, from a multiple of 16 bytes on")?;
    }
    if let Some(m) = &p.mask {
        demand("the mask's number of heads", m.ne[2] == 1, m.ne[2], "1")?;
        let size = m.ne[0] >= n_kv && m.ne[1] >= n_query && m.nb[0] == 2;
        demand("the mask's size", size, format!("{:?}", m.ne), "that of the cache")?;
        demand("the mask's streams", m.ne[3] > 0 && n_stream % m.ne[3] == 0, m.ne[3], "a divisor of the queries'")?;
    }
    demand("the number of bindings", call.bounds.len() <= MAX_BOUND, call.bounds.len(), "at most 4")
}

/// Blocks that share a panel's clusters, so that so many of them at once keep the GPU busy.
fn chunks_for(panels: usize, steps: usize, at_once: usize) -> usize {
    let most = (steps / CHUNK_STEPS).clamp(1, CHUNKS_MAX);
    // Waves, as long as a chunk; each block fetches queries first, about three steps' worth of time.
    let time = |n: usize| (panels * n).div_ceil(at_once.max(1)) * (steps.div_ceil(n) + 3);
    (1..=most).min_by_key(|n| time(*n)).unwrap_or(1)
}

impl Plan {
    /// With the workspace at this address.
    pub(super) fn new(device: &Device, of: &PrefillCall<'_>, workspace: u64) -> Result<Plan, Error> {
        let call = &of.call;
        check(call, of.tile)?;
        let p = &call.problem;
        let [d, n_query, _, n_stream] = p.q.ne;
        let [_, n_kv, n_head_kv, _] = p.k.ne;
        let dv = p.v.ne[0];
        let (group, n_row, mode) = (p.n_group(), p.n_row(), call.selection.mode);
        let mut bound = [params::Bound::default(); MAX_BOUND];
        let (mut n_cluster, mut n_member) = (0, 0);
        for (to, from) in bound.iter_mut().zip(call.bounds) {
            let index = from.resident().index();
            let (Some(parameters), Some(view)) = (from.parameters(call.layer, n_kv), index.layer(call.layer)) else {
                let got = call.layer.to_string();
                return Err(Error::Unsupported { what: "the layer", got, want: "layers of the index" });
            };
            let s = view.shape;
            let same =
                [s.n_head_kv, s.n_group, s.head_dim_k, s.head_dim_v].map(|n| n as usize) == [n_head_kv, group, d, dv];
            demand("the index's shape of this layer", same, format!("{s:?}"), "that of the call")?;
            demand("the number of clusters", s.n_cluster as usize <= MAX_CLUSTERS, s.n_cluster, "at most 65536")?;
            [*to, _] = parameters;
            demand(
                "the number of sinks",
                to.layer.n_sink as usize <= SINK_TILES * TILE,
                to.layer.n_sink,
                "at most 128",
            )?;
            let meta = index.meta();
            let keys = |share: f32| match share >= 1.0 {
                true => EVERY,
                false => keys_of_share(share, meta.n_prefix(), meta.n_window as usize)
                    .saturating_sub(meta.n_sink as usize) as u32,
            };
            to.stream = to.stream.wrapping_sub(call.first_stream);
            match mode {
                Mode::Budget(share) => to.target = keys(share),
                Mode::Threshold { floor, .. } => to.floor = keys(floor),
                Mode::Mass(_) => {}
            }
            n_cluster = n_cluster.max(s.n_cluster as usize);
            n_member = n_member.max(view.n_clustered());
        }
        let (diag, by_mass) = ((call.selection.spread == Spread::Diag) as usize, matches!(mode, Mode::Mass(_)));
        let kernels = device.prefill()?;
        let (lookups, attends) = (kernels.lookup(device, d)?, kernels.attend(device, p)?);
        let as_they_are = call.rotation.k == 0 && p.k_type == Element::F16;
        let sinks = (!as_they_are && !call.bounds.is_empty()).then_some(lookups.sinks);
        // Those for this GPU's architecture alone are the fastest.
        let attend = attends.own.filter(|_| !of.portable).or(attends.portable);
        let lookup =
            [lookups.own.filter(|_| !of.portable), Some(lookups.portable)].iter().flatten().find_map(|passes| {
                let [sums, squares, mass] = passes[diag];
                Some(if by_mass { [sums?, squares?, mass?] } else { [sums?, squares?, squares?] })
            });
        let (Some(attend), Some(lookup)) = (attend, lookup) else {
            let got = format!("less than a prefill with keys of {d} and values of {dv} elements needs");
            return Err(Error::Unsupported { what: "the shared memory of a block", got, want: "up to 227 KiB" });
        };
        let (select, select_threads) = select_for(&SELECT_TILE, n_cluster);

        let tile = of.tile.min(n_query);
        let n_step = n_cluster.div_ceil(KEYS) + 1;
        let n_cluster = n_cluster.next_multiple_of(32);
        let max_tiles = n_member.div_ceil(TILE) + 1;
        let dense_tile = (COLUMNS / group).max(1);
        let n_dense_slot = n_row.div_ceil(dense_tile) + n_stream;
        let n_slot = if call.bounds.is_empty() { 0 } else { n_row.min(n_row.div_ceil(tile) + MORE_TILES) };
        let parts = (tile * group).div_ceil(COLUMNS);
        let seen_words = if p.mask.is_some() { n_kv.div_ceil(32) } else { 0 };
        let sink_bytes = call.bounds.len() * n_head_kv * SINK_TILES * TILE * 2 * d;
        let layout = |own_slots: usize, chunks: usize, c: &mut Carver| -> Prefill {
            let mut area = |bytes: usize| workspace + c.area::<u8>(bytes) as u64;
            let n_pair = own_slots * n_head_kv;
            let n_panel = n_pair * parts;
            let n_state = 2 * attend.blocks * COLUMNS;
            let scores = 4 * n_panel * n_cluster;
            let y = area(scores);
            let x = if by_mass { area(scores) } else { 0 };
            let mut own = Prefill {
                hidden: area(4 * n_row),
                follows: area(4 * n_row),
                broken: area(4 * MAX_BOUND * CHECK_BLOCKS),
                order: area(8 * n_row),
                tiles: area(TILE_BYTES * (n_slot + n_dense_slot)),
                tile_bound: area(4 * n_slot),
                tile_rows: area(4 * n_slot),
                seen: if seen_words > 0 { area(4 * (n_slot + n_dense_slot) * seen_words) } else { 0 },
                partial: area(8 * n_panel * chunks * COLUMNS),
                sink_mass: area(4 * n_panel * chunks),
                units: area(4 * (n_pair + n_dense_slot * n_head_kv + 1)),
                state: area(4 * n_state * dv),
                norms: area(8 * n_state),
                sink_keys: if sinks.is_some() { area(sink_bytes) } else { 0 },
                ..Default::default()
            };
            own.call.y = y;
            own.call.x = x;
            own.call.work = area(n_slot * n_head_kv * size_of::<Work>());
            own.call.entries = area(ENTRY_BYTES * n_pair * (n_cluster + 1));
            own.call.directory = area(4 * n_pair * max_tiles);
            own
        };
        let bytes = |own_slots: usize| {
            let mut c = Carver::default();
            layout(own_slots, CHUNKS_MAX, &mut c);
            c.bytes
        };
        let mut n_part = if of.slots > 0 { n_slot.div_ceil(of.slots).max(1) } else { 1 };
        while n_part < n_slot && bytes(n_slot.div_ceil(n_part)) > WORKSPACE_MAX {
            n_part += 1;
        }
        let own_slots = n_slot.div_ceil(n_part);
        // Slots beyond one per `tile` rows and one for the last row of a stream are mostly empty.
        let panels = own_slots.min(n_row.div_ceil(tile) + n_stream) * parts * n_head_kv;
        let at_once = lookup.iter().map(|k| k.blocks).min().unwrap_or(1);
        let chunks = chunks_for(panels, n_step, at_once);
        let mut carver = Carver::default();
        let laid = layout(own_slots, chunks, &mut carver);
        demand("the workspace", carver.bytes <= WORKSPACE_MAX, format!("{} bytes", carver.bytes), "at most 256 MiB")?;

        let whole = Prefill {
            tile: tile as u32,
            dense_tile: dense_tile as u32,
            n_slot: n_slot as u32,
            n_dense_slot: n_dense_slot as u32,
            parts: parts as u32,
            chunks: chunks as u32,
            n_block: attend.blocks as u32,
            checked: of.call.seen as u32,
            seen_words: seen_words as u32,
            call: params::Call {
                q: strided(&p.q),
                k: strided(&p.k),
                v: strided(&p.v),
                mask: p.mask.as_ref().map(strided).unwrap_or_default(),
                dst: strided(&p.dst),
                sinks: p.sinks.map_or(0, |s| s as u64),
                rows: call.rows,
                scale: p.scale,
                softcap: p.softcap,
                alpha: call.selection.alpha,
                threshold: if let Mode::Threshold { threshold, .. } = mode { threshold } else { 0.0 },
                mass: if let Mode::Mass(share) = mode { share } else { 0.0 },
                spread: match call.selection.spread {
                    Spread::None => SPREAD_NONE,
                    Spread::Radius => SPREAD_RADIUS,
                    Spread::Diag => SPREAD_DIAG,
                },
                mode: match mode {
                    Mode::Budget(_) => MODE_BUDGET,
                    Mode::Threshold { .. } => MODE_THRESHOLD,
                    Mode::Mass(_) => MODE_MASS,
                },
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
                max_tiles: max_tiles as u32,
                k_type: type_number(p.k_type).unwrap_or_default(),
                v_type: type_number(p.v_type).unwrap_or_default(),
                k_block: call.rotation.k as u32,
                k_bytes: p.k_type.row_bytes(d) as u32,
                v_bytes: p.v_type.row_bytes(dv) as u32,
                bound,
                ..laid.call
            },
            ..laid
        };
        let part = |i: usize| {
            let first = (i * own_slots).min(n_slot);
            let own = (n_slot - first).min(own_slots);
            let mut parameters = Prefill {
                first_slot: first as u32,
                own_slots: own as u32,
                own_dense: if i + 1 == n_part { n_dense_slot as u32 } else { 0 },
                ..whole
            };
            parameters.call.work += (first * n_head_kv * size_of::<Work>()) as u64;
            let select_call = params::Call {
                rows: whole.tile_bound + 4 * first as u64,
                check: whole.tile_rows + 4 * first as u64,
                n_row: own as u32,
                group: parts as u32,
                n_part: group as u32,
                dropped: whole.sink_mass,
                n_dropped: chunks as u32,
                ..parameters.call
            };
            Part { parameters, select_call }
        };
        let parts = (0..n_part).map(part).filter(|p| p.parameters.own_slots + p.parameters.own_dense > 0).collect();
        let bytes = carver.bytes;
        Ok(Plan { parts, dv, sinks, attend, lookup, select, select_threads, bytes })
    }

    pub(super) fn n_head_kv(&self) -> usize {
        self.parts[0].parameters.call.n_head_kv as usize
    }
}

#[cfg(test)]
mod tests {
    use super::chunks_for;

    #[test]
    fn lookup_fills_the_gpu() {
        // 512 rows of 32 heads on 132 multiprocessors with two blocks each; few panels; few clusters.
        assert_eq!(chunks_for(128, 103, 264), 2);
        assert_eq!(chunks_for(256, 103, 264), 1);
        assert!(chunks_for(8, 103, 264) >= 12);
        assert_eq!(chunks_for(8, 3, 264), 1);
    }
}
