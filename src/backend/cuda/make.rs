//! Makes the plan of a graph: which bindings its rows may have, and what computes each attention node.

use half::f16;

use super::super::binding::Matcher;
use super::super::graph::unrotated;
use super::super::runtime::{Loaded, Snapshot};
use super::super::stats::Reason;
use super::bindings::{device_rows, Gpu};
use super::launch::{cut, dense_call, prefill, Launch};
use super::plan::{Plan, Share, Step, Tally};
use super::seen::Seen;
use super::stock::Stock;
use super::survey::{Site, Survey};
use super::Ready;
use crate::attention::cuda::{
    self, Bound, Call, Error, Masks, Prefill, RowMap, RowNumbers, Watched, Workspace, BOUND_MAX, MAX_PREFILL_ROWS,
    MAX_ROWS,
};
use crate::attention::{Array, Element, Mode, Problem, Rotation, Selection};
use crate::index::Index;

/// A plan, the reasons of nodes that stay dense, and the number of forced ones.
type Made = (Plan, Vec<Reason>, u64);

/// Rows of a prefill whose masks are looked at for a binding.
const ROWS_SEEN: usize = 16;

/// Shortest prefix that an index is used for.
fn min_prefix(snapshot: &Snapshot, matcher: &Matcher) -> usize {
    snapshot.config.min_prefix.unwrap_or_else(|| min_prefix_of(&matcher.index))
}

/// The measured one.
pub(super) fn min_prefix_of(index: &Index) -> usize {
    let shapes = index.shapes().iter();
    shapes.map(|s| cuda::min_prefix(s.n_head_kv as usize, s.head_dim_k as usize)).max().unwrap_or(usize::MAX)
}

/// Would a dense kernel, which visits each cell once for all rows, visit fewer than these rows of a decode? Each visits what it keeps and
/// what it sees of the cells that are in no cluster of its own; one without a binding all that it sees. `seen`: how many cells each
/// row sees, and whether a binding is among them; none: it is not known, and each cell in no cluster is taken to be one row's.
/// `clustered`: keys in clusters of each binding, the longest first.
pub(super) fn are_too_many(
    n_row: usize,
    n_kv: usize,
    clustered: &[usize],
    seen: Option<&[(usize, bool)]>,
    mode: Mode,
) -> bool {
    let longest = clustered.first().copied().unwrap_or(0);
    let kept = if let Mode::Budget(share) = mode { (f64::from(share) * longest as f64) as usize } else { 0 };
    let of_row = |(n, bound): &(usize, bool)| if *bound { kept + n.saturating_sub(longest) } else { *n };
    let visits = match seen {
        Some(rows) => rows.iter().map(of_row).sum(),
        None => n_row * kept + n_kv.saturating_sub(clustered.iter().sum()),
    };
    (2..=MAX_ROWS).contains(&n_row) && visits > n_kv
}

/// Why a node is none of ours whatever is bound, if so.
pub(super) fn refusal(site: &Site, snapshot: &Snapshot) -> Option<Reason> {
    let p = &site.problem;
    let Some(layer) = site.layer else { return Some(Reason::NoCache) };
    let indexed = |l: &Loaded| l.matcher.index.layer(layer).is_some();
    if !snapshot.indexes.iter().any(indexed) {
        return Some(Reason::Layer);
    }
    if p.max_bias != 0.0 {
        return Some(Reason::Alibi);
    }
    if p.k_type == Element::F32 || p.v_type == Element::F32 {
        return Some(Reason::Type);
    }
    if unrotated(p, snapshot) {
        return Some(Reason::Basis);
    }
    // Tiles are off unless they are asked for (docs/quality.md).
    if p.n_row() > MAX_ROWS && (snapshot.config.tile < 2 || p.n_row() > MAX_PREFILL_ROWS) {
        return Some(Reason::Prefill);
    }
    let rows = |m: &Array| m.ne[0] >= p.k.ne[1] && m.ne[1] >= p.q.ne[1] && m.ne[2] == 1 && m.nb[0] == 2;
    match &p.mask {
        Some(mask) if site.mask_is_input && rows(mask) => None,
        _ => Some(Reason::Mask),
    }
}

/// Nodes that share masks, a place in the cache and its types share their rows' bindings.
fn key(site: &Site) -> (usize, usize, [usize; 4], [usize; 4], [Element; 2]) {
    let p = &site.problem;
    (p.mask.map_or(0, |m| m.data as usize), site.first_stream, p.k.ne, p.q.ne, [p.k_type, p.v_type])
}

fn masks(site: &Site, mask: Array) -> Masks {
    let p = &site.problem;
    Masks {
        mask,
        n_query: p.q.ne[1],
        n_stream: p.q.ne[3],
        k_streams: p.k.ne[3],
        first_stream: site.first_stream,
        n_kv: p.k.ne[1],
    }
}

impl Ready {
    pub(super) fn make(
        &mut self,
        survey: &Survey,
        n_node: usize,
        stock: &Stock<'_>,
        snapshot: &Snapshot,
    ) -> Result<Made, Error> {
        let config = &snapshot.config;
        let mut dense = survey.dense.clone();
        if config.attention_free {
            let zero = |site: &Site| {
                let dst = &site.problem.dst;
                let n: usize = dst.ne.iter().product();
                (site.node, Step::Zero { at: dst.data as u64, bytes: 4 * n })
            };
            let own = survey.sites.iter().map(zero).collect();
            return Ok((self.plan_of(survey, own, n_node), dense, 0));
        }
        if config.force {
            let own = self.forced(survey, &mut dense)?;
            let n = own.len() as u64;
            return Ok((self.plan_of(survey, own, n_node), dense, n));
        }
        let mut sites = Vec::new();
        for site in &survey.sites {
            match refusal(site, snapshot) {
                Some(reason) => dense.push(reason),
                None => sites.push(site),
            }
        }
        if survey.sites.iter().any(|site| site.problem.n_row() > MAX_ROWS) {
            self.bindings.prefilled();
        }
        if let Some(first) = sites.first().copied() {
            let same = |site: &&Site| key(site) == key(first);
            dense.extend(sites.iter().filter(|s| !same(s)).map(|_| Reason::Mask));
            sites.retain(same);
            if let Some(plan) = self.sparse(&mut sites, survey, n_node, stock, snapshot, &mut dense)? {
                return Ok((plan, dense, 0));
            }
            dense.extend(sites.iter().map(|_| Reason::Unbound));
        }
        let mut plan = Plan::default();
        if !self.bindings.all.is_empty() && !survey.written.is_empty() {
            plan.map = Some(self.map(None, &[], &survey.written)?);
        }
        Ok((plan, dense, 0))
    }

    /// A plan in which `own` (by node) replaces nodes.
    fn plan_of(&self, survey: &Survey, own: Vec<(usize, Step)>, n_node: usize) -> Plan {
        Plan::of(own, n_node, survey.can_be_captured, self.planner.workspace.clone())
    }

    /// Every node that the kernels take, over all its cells.
    fn forced(&mut self, survey: &Survey, dense: &mut Vec<Reason>) -> Result<Vec<(usize, Step)>, Error> {
        let rows = self.dense_rows.address();
        let call = |problem: Problem| dense_call(&problem, rows);
        let mut own = Vec::new();
        // All share one workspace, which has to be large enough for each.
        let mut most = 0;
        for site in &survey.sites {
            let whole = call(site.problem);
            let many = prefill(&whole, 1).and_then(|many| Prefill::bytes_for(&self.gpu, &many).ok());
            let calls: Vec<Call<'_>> = cut(&site.problem).into_iter().map(call).collect();
            // What the kernels for few rows take is more.
            let bytes = match many {
                Some(bytes) => Ok(bytes),
                None => Workspace::bytes_for(&self.gpu, &calls.iter().collect::<Vec<_>>()),
            };
            match bytes {
                Ok(bytes) => {
                    most = most.max(bytes);
                    own.push((site.node, whole, many.is_some(), calls));
                }
                Err(Error::Unsupported { .. }) => dense.push(Reason::Kernel),
                Err(error) => return Err(error),
            }
        }
        let workspace = self.planner.workspace(most)?;
        let step = |(node, whole, is_many, calls): (usize, Call<'_>, bool, Vec<Call<'_>>)| {
            if let Some(many) = prefill(&whole, 1).filter(|_| is_many) {
                return Ok((node, Step::Attend(vec![Launch::new(&self.gpu, &whole, Some(&many), &workspace)?])));
            }
            let launches = calls.iter().map(|call| Launch::new(&self.gpu, call, None, &workspace));
            Ok((node, Step::Attend(launches.collect::<Result<_, _>>()?)))
        };
        own.into_iter().map(step).collect()
    }

    /// A map over all bindings, of which rows may have those numbered in `choice`.
    fn map(&self, masks: Option<&Masks>, choice: &[usize], written: &[RowNumbers]) -> Result<RowMap, Error> {
        let all = &self.bindings.all;
        let others = (0..all.len()).filter(|i| !choice.contains(i));
        let watched: Vec<(&Watched, bool)> = choice
            .iter()
            .copied()
            .chain(others)
            .map(|i| {
                let (layer, rows) = all[i].guard;
                // Memory that is no longer the cache's must not be read.
                (&all[i].watched, device_rows(&self.layers, layer, all[i].stream) == Some(rows))
            })
            .collect();
        RowMap::new(&self.gpu, masks, &watched, choice.len(), written)
    }

    /// What each query row sees, or of a prefill's some of each stream, evenly spread, the last one among them: copied from
    /// their masks. Waits for the device.
    fn seen(&self, site: &Site, mask: &Array) -> Result<Vec<Seen>, Error> {
        let p = &site.problem;
        let ([_, n_query, _, n_stream], n_kv) = (p.q.ne, p.k.ne[1]);
        if p.n_row() == 0 || n_kv == 0 {
            return Ok(Vec::new());
        }
        let share = (n_stream / p.k.ne[3].max(1)).max(1);
        let n = if p.n_row() > MAX_ROWS { (ROWS_SEEN / n_stream).clamp(1, n_query) } else { n_query };
        let (step, mut all, mut rows) = (n_query / n, Vec::new(), vec![f16::ZERO; n * n_kv]);
        let first = n_query - 1 - (n - 1) * step;
        for stream in 0..n_stream {
            let at = mask.data as u64 + (first * mask.nb[1] + stream % mask.ne[3].max(1) * mask.nb[3]) as u64;
            let to = bytemuck::cast_slice_mut(&mut rows);
            // SAFETY: rows of the graph's mask, n_kv elements each inside its extents (checked by `refusal`).
            unsafe { self.lanes.stream.read_rows(at, step * mask.nb[1], 2 * n_kv, to)? };
            all.extend(rows.chunks_exact(n_kv).map(|row| Seen::of(site.first_stream + stream / share, row)));
        }
        Ok(all)
    }

    /// Binds what the rows of a graph see: what that is, and whether anything is new. Waits for the device.
    fn search(
        &mut self,
        site: &Site,
        mask: &Array,
        survey: &Survey,
        snapshot: &Snapshot,
    ) -> Result<(Vec<Seen>, bool), Error> {
        let rows = self.seen(site, mask)?;
        let gpu = Gpu { device: &self.gpu, stream: &self.lanes.stream };
        let least = |matcher: &Matcher| min_prefix(snapshot, matcher);
        let found = self.bindings.search(snapshot, &self.layers, &rows, &survey.written, &gpu, &least)?;
        if found {
            // Plans made before do not know the new one.
            self.graphs.clear();
        }
        Ok((rows, found))
    }

    /// Looks again for what the rows of a planned graph may see by now; true if something new is bound.
    pub(super) fn search_again(
        &mut self,
        survey: &Survey,
        stock: &Stock<'_>,
        snapshot: &Snapshot,
    ) -> Result<bool, Error> {
        let first = survey.sites.iter().find(|site| refusal(site, snapshot).is_none());
        let Some((first, mask)) = first.and_then(|site| Some((site, site.problem.mask?))) else { return Ok(false) };
        if survey.opaque || !self.is_here(first, survey)? {
            return Ok(false);
        }
        self.lanes.follow(stock)?;
        Ok(self.search(first, &mask, survey, snapshot)?.1)
    }

    /// Is all that is read for a node in this GPU's memory?
    fn is_here(&self, site: &Site, survey: &Survey) -> Result<bool, Error> {
        let written = survey.written.iter().map(|numbers| numbers.address);
        Ok(cuda::is_on(&self.gpu, written)? && self.planner.is_here(&site.problem)?)
    }

    /// The plan of a graph whose rows may have a binding; `None` where there is none for them. `sites` loses those that are
    /// dense for another reason.
    fn sparse(
        &mut self,
        sites: &mut Vec<&Site>,
        survey: &Survey,
        n_node: usize,
        stock: &Stock<'_>,
        snapshot: &Snapshot,
        dense: &mut Vec<Reason>,
    ) -> Result<Option<Plan>, Error> {
        let first = sites[0];
        let (Some(mask), false) = (first.problem.mask, survey.opaque) else { return Ok(None) };
        let p = &first.problem;
        if !self.is_here(first, survey)? {
            return Ok(None);
        }
        self.lanes.follow(stock)?;
        let seen = match self.bindings.wants_search() {
            true => Some(self.search(first, &mask, survey, snapshot)?.0),
            false => None,
        };
        let streams = first.first_stream..first.first_stream + p.k.ne[3];
        let bindings = &self.bindings.all;
        let usable = |i: &usize| streams.contains(&bindings[*i].stream) && bindings[*i].last_cell < p.k.ne[1];
        let mut choice: Vec<usize> = (0..bindings.len()).filter(usable).collect();
        // The longest index first: of those that a row sees it has that.
        choice.sort_by_key(|i| bindings[*i].index_number);
        let Some(&best) = choice.first() else { return Ok(None) };
        // One call has one selection and one basis: rows of an index with others stay dense.
        let settings = |i: usize| {
            let loaded = &snapshot.indexes[bindings[i].index_number];
            (loaded.selection, loaded.matcher.rotation(p.k_type, p.v_type))
        };
        let (own, rotation) = settings(best);
        choice.retain(|i| settings(*i) == (own, rotation));
        let index_of = |i: usize| &snapshot.indexes[bindings[i].index_number].matcher.index;
        let has_layer = |site: &&Site| {
            let layer = site.layer.unwrap_or(u32::MAX);
            choice.iter().all(|i| index_of(*i).layer(layer).is_some())
        };
        dense.extend(sites.iter().filter(|s| !has_layer(s)).map(|_| Reason::Layer));
        sites.retain(has_layer);
        if sites.is_empty() {
            return Ok(None);
        }
        let sees = |row: &Seen| choice.iter().any(|i| bindings[*i].stream == row.stream && row.all(&bindings[*i].runs));
        let seen = seen.map(|rows| rows.iter().map(|row| (row.n_cell(), sees(row))).collect::<Vec<_>>());
        // Whoever says from which prefix on wants it there.
        if snapshot.config.min_prefix.is_none() {
            let clustered = |i: &usize| {
                let meta = index_of(*i).meta();
                meta.n_prefix() - (meta.n_sink + meta.n_window) as usize
            };
            let clustered: Vec<usize> = choice.iter().map(clustered).collect();
            if are_too_many(p.n_row(), p.k.ne[1], &clustered, seen.as_deref(), own.mode) {
                dense.extend(sites.drain(..).map(|_| Reason::Rows));
                return Ok(None);
            }
        }
        let share = |i: &usize| {
            let meta = index_of(*i).meta();
            let n_sink = meta.n_sink as usize;
            Share { n_sink, n_key: meta.n_prefix() - meta.n_window as usize }
        };
        let shares = choice.iter().map(share).collect();
        self.watch(&choice, sites)?;

        let map = self.map(Some(&masks(first, mask)), &choice, &survey.written)?;
        if let Some(rows) = &seen {
            map.expect(rows.iter().filter(|row| row.1).count() * p.n_row() / rows.len().max(1));
        }
        let launches = self.launches(sites, &choice, own, rotation, &map, snapshot.config.tile)?;
        let mut made = Vec::new();
        let mut left = Vec::new();
        for (i, launch) in launches.into_iter().enumerate() {
            match launch {
                Ok(launch) => made.push(launch),
                Err(_) => left.push(i),
            }
        }
        if !left.is_empty() {
            // Which bindings there may be depends on the nodes.
            dense.extend(left.iter().map(|_| Reason::Kernel));
            let taken: Vec<&Site> = (0..sites.len()).filter(|i| !left.contains(i)).map(|i| sites[i]).collect();
            *sites = taken;
            return match sites.is_empty() {
                true => Ok(None),
                false => self.sparse(sites, survey, n_node, stock, snapshot, dense),
            };
        }
        let counted = sites.iter().zip(&made).map(|(site, launch)| {
            let p = &site.problem;
            launch.counted(p.n_row(), p.k.ne[2], None)
        });
        let tally = Tally::new(&self.gpu, counted.collect(), p.n_row(), shares)?;
        let steps = sites.iter().zip(made).enumerate();
        let own_steps = steps.map(|(i, (site, launch))| (site.node, launch.step(tally.address(i)))).collect();
        let plan = self.plan_of(survey, own_steps, n_node);
        Ok(Some(Plan { map: Some(map), tally: Some(tally), ..plan }))
    }

    /// Turns on the rotating check of the layers that are computed sparse.
    fn watch(&mut self, choice: &[usize], sites: &[&Site]) -> Result<(), Error> {
        for i in choice {
            let bound = &mut self.bindings.all[*i].watched.bound;
            for site in sites {
                let Some(layer) = site.layer.filter(|layer| !bound.watches(*layer)) else { continue };
                // From the first stream of the cache on, as the binding counts.
                let whole = |a: &Array| Array { data: a.data.wrapping_sub(site.first_stream * a.nb[3]), ..*a };
                let (k, v) = (whole(&site.problem.k), whole(&site.problem.v));
                let types = [site.problem.k_type, site.problem.v_type];
                // Other rows are none of the kernels'.
                let even = [&k, &v].iter().all(|a| (a.data as usize | a.nb[1] | a.nb[2] | a.nb[3]).is_multiple_of(2));
                if even {
                    // SAFETY: a live cache.
                    unsafe { bound.watch(layer, &k, &v, types, self.lanes.stream.raw())? };
                }
            }
        }
        Ok(())
    }

    /// A launch per node, or why the kernels do not take it.
    #[allow(clippy::type_complexity)]
    fn launches(
        &mut self,
        sites: &[&Site],
        choice: &[usize],
        selection: Selection,
        rotation: Rotation,
        map: &RowMap,
        tile: usize,
    ) -> Result<Vec<Result<Launch, Error>>, Error> {
        let all = std::mem::take(&mut self.bindings.all);
        let bounds: Vec<&Bound> = choice.iter().map(|i| &all[*i].watched.bound).collect();
        let rows = map.rows();
        let call = |site: &&Site| Call {
            problem: site.problem,
            rotation,
            layer: site.layer.unwrap_or(u32::MAX),
            selection,
            rows,
            // `rows` is what the graph's map has made of its one mask.
            seen: true,
            bounds: &bounds,
            first_stream: site.first_stream as u32,
        };
        let calls: Vec<Call<'_>> = sites.iter().map(call).collect();
        let bytes = calls.iter().filter_map(|call| match prefill(call, tile) {
            Some(many) => Prefill::bytes_for(&self.gpu, &many).ok(),
            None => Workspace::bytes_for(&self.gpu, &[call]).ok(),
        });
        let bytes = bytes.max().unwrap_or(0);
        let gpu = self.gpu.clone();
        let launch = |call: &Call<'_>, workspace: &Workspace| {
            let many = prefill(call, tile);
            let mut launch = Launch::new(&gpu, call, many.as_ref(), workspace)?;
            if let Some(visible) = map.visible() {
                launch.attend_listed(visible);
            }
            Ok(launch)
        };
        let made =
            self.planner.workspace(bytes).map(|workspace| calls.iter().map(|call| launch(call, &workspace)).collect());
        self.bindings.all = all;
        made
    }
}

/// Bindings at most: a fifth takes the place of the first.
pub(super) fn make_room<T>(all: &mut Vec<T>) {
    if all.len() == BOUND_MAX {
        all.remove(0);
    }
}
