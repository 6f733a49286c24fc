//! The written specification of squeezed attention, in f64: slow, allocating, clear. Kernels are tested against it.

use half::{bf16, f16};

use super::{keys_of_share, Array, Binding, Call, Element, Mode, Problem, Row, Spread};
use crate::index::LayerView;

/// Scores of every cluster for one query row and KV head: the logits of the row itself, the rest over the rows of its tile.
/// Fine clusters of coarse ones that are not looked into have logits of -inf and probabilities of 0.
#[derive(Clone, Debug)]
pub struct Scores {
    /// `[C]`: is the cluster in a coarse one that is looked into? All are where there is no coarse step.
    pub open: Vec<bool>,
    /// `[G][C]` plain logit `s q.c_i` (no soft-cap); -inf where it is not finite.
    pub x: Vec<Vec<f64>>,
    /// `[G][C]` selection score: `x` plus the spread bonus.
    pub y: Vec<Vec<f64>>,
    /// `[C]` p_i: probability per key, from `y`: mean over the group, or root mean square over the group and the rows of a
    /// tile, where a mean would lose what one row needs alone.
    pub p: Vec<f64>,
    /// `[C]` estimated mass per key, from `y`, mean over the group and the tile.
    pub mass: Vec<f64>,
    /// Mass of the sinks beside `mass`, likewise.
    pub sink_share: f64,
}

fn address(a: &Array, i: [usize; 4]) -> *const u8 {
    let at: usize = i.iter().zip(a.nb).map(|(i, nb)| i * nb).sum();
    a.data.wrapping_add(at)
}

fn read_f16(a: &Array, i: [usize; 4]) -> f64 {
    // SAFETY: the caller's indexes are below `ne`, and the maker of the call vouches for the memory behind the array.
    unsafe { address(a, i).cast::<f16>().read_unaligned() }.to_f64()
}

fn read_f32(a: &Array, i: [usize; 4]) -> f64 {
    // SAFETY: as in `read_f16`.
    unsafe { address(a, i).cast::<f32>().read_unaligned() as f64 }
}

/// Element `i[0]` of a row of K or V.
fn read(a: &Array, element: Element, i: [usize; 4]) -> f64 {
    let block = address(a, [i[0] / element.block(), i[1], i[2], i[3]]);
    let j = i[0] % element.block();
    // SAFETY: as in `read_f16`; a quantised element lies in its block.
    unsafe {
        let scale = || block.cast::<f16>().read_unaligned().to_f64();
        match element {
            Element::F32 => block.cast::<f32>().read_unaligned() as f64,
            Element::F16 => block.cast::<f16>().read_unaligned().to_f64(),
            Element::BF16 => block.cast::<bf16>().read_unaligned().to_f64(),
            Element::Q8_0 => scale() * block.add(2 + j).cast::<i8>().read() as f64,
            Element::Q4_0 => {
                let byte = block.add(2 + j % 16).read();
                let nibble = if j < 16 { byte & 15 } else { byte >> 4 };
                scale() * (nibble as f64 - 8.0)
            }
        }
    }
}

/// The product with the block-diagonal Hadamard matrix, by its definition.
fn rotated(x: &[f64], block: usize) -> Vec<f64> {
    if block == 0 {
        return x.to_vec();
    }
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let row = |i: usize| {
        let own = &x[i / block * block..(i / block + 1) * block];
        own.iter().enumerate().map(|(j, x)| sign(i % block, j) * x).sum::<f64>() / (block as f64).sqrt()
    };
    (0..x.len()).map(row).collect()
}

/// Stream of K or V that a stream of Q reads.
fn stream_of(p: &Problem, a: &Array, stream: usize) -> usize {
    stream / (p.q.ne[3] / a.ne[3])
}

fn dot_key(p: &Problem, row: usize, head: usize, cell: usize) -> f64 {
    let (stream, query) = (row / p.q.ne[1], row % p.q.ne[1]);
    let (head_kv, from) = (head / p.n_group(), stream_of(p, &p.k, stream));
    (0..p.q.ne[0])
        .map(|d| read_f32(&p.q, [d, query, head, stream]) * read(&p.k, p.k_type, [d, cell, head_kv, from]))
        .sum()
}

/// Additive mask of a cell; 0 without a mask.
fn mask(p: &Problem, row: usize, head: usize, cell: usize) -> f64 {
    let (stream, query) = (row / p.q.ne[1], row % p.q.ne[1]);
    p.mask.as_ref().map_or(0.0, |m| read_f16(m, [cell, query, head % m.ne[2], stream % m.ne[3]]))
}

fn cap(p: &Problem, s: f64) -> f64 {
    if p.softcap == 0.0 {
        s
    } else {
        p.softcap as f64 * s.tanh()
    }
}

fn finite(x: f64) -> f64 {
    if x.is_finite() {
        x
    } else {
        f64::NEG_INFINITY
    }
}

/// Both scores of every cluster. `row` must be sparse and its layer in the index.
pub fn scores(call: &Call, row: usize, head_kv: usize) -> Scores {
    scores_among(call, row, head_kv, opened(call, row, head_kv).as_deref())
}

/// The same with the opened coarse clusters given (`None`: all fine ones).
pub fn scores_among(call: &Call, row: usize, head_kv: usize, opened: Option<&[u32]>) -> Scores {
    let tile = call.tile_of(row);
    let power = if tile.len() > 1 { 2 } else { 1 };
    let mut out = scores_alone(call, row, head_kv, opened, power);
    for other in tile.clone().filter(|other| *other != row) {
        let other = scores_alone(call, other, head_kv, opened, power);
        out.p.iter_mut().zip(other.p).for_each(|(sum, p)| *sum += p);
        out.mass.iter_mut().zip(other.mass).for_each(|(sum, m)| *sum += m);
        out.sink_share += other.sink_share;
    }
    let n = tile.len() as f64;
    out.p.iter_mut().chain(&mut out.mass).for_each(|sum| *sum /= n);
    out.sink_share /= n;
    out.p.iter_mut().for_each(|p| *p = p.powf(1.0 / power as f64));
    out
}

/// Coarse clusters that a sparse row and KV head looks into, ascending; the same for all rows of a tile. `None`: all, there is
/// no coarse step. Best first by probability per key, from plain logits against the coarse centroids; else as in `selection`.
pub fn opened(call: &Call, row: usize, head_kv: usize) -> Option<Vec<u32>> {
    let (_, view) = bound(call, row);
    let share = call.selection.opened_share();
    if view.shape.n_coarse == 0 || share >= 1.0 {
        return None;
    }
    let order = best_first(&coarse_scores(call, row, head_kv), |_| true);
    let mut opened = until_share(call, row, &order, &view.head_coarse_keys(head_kv), share);
    opened.sort_unstable();
    Some(opened)
}

/// `[Cc]`: what ranks coarse clusters, the probability per key or for a tile what grows with it.
pub fn coarse_scores(call: &Call, row: usize, head_kv: usize) -> Vec<f64> {
    let tile = call.tile_of(row);
    let power = if tile.len() > 1 { 2 } else { 1 };
    let (offsets, group) = (bound(call, row).1.head_coarse_keys(head_kv), call.problem.n_group());
    let mut p = vec![0.0; offsets.len() - 1];
    for (row, head) in tile.flat_map(|row| (head_kv * group..(head_kv + 1) * group).map(move |head| (row, head))) {
        let x = coarse_logits(call, row, head);
        softmax(&x, &sink_logits(call, row, head), &offsets, &[], &mut p, group, power);
    }
    p
}

/// `s q.c`; -inf where it is not finite.
fn logit(s: f64, q: &[f64], centroid: &[f16]) -> f64 {
    finite(s * q.iter().zip(centroid).map(|(q, c)| q * c.to_f64()).sum::<f64>())
}

fn coarse_logits(call: &Call, row: usize, head: usize) -> Vec<f64> {
    let (_, view) = bound(call, row);
    let p = &call.problem;
    let (q, s, d) = (query(call, row, head), p.logit_scale() as f64, p.q.ne[0]);
    let (n, head_kv) = (view.shape.n_coarse as usize * d, head / p.n_group());
    view.coarse_centroids[head_kv * n..(head_kv + 1) * n].chunks_exact(d).map(|c| logit(s, &q, c)).collect()
}

fn sink_logits(call: &Call, row: usize, head: usize) -> Vec<f64> {
    let (binding, _) = bound(call, row);
    let s = call.problem.logit_scale() as f64;
    let sinks = &binding.always[..binding.index.meta().n_sink as usize];
    sinks.iter().map(|cell| finite(s * dot_key(&call.problem, row, head, *cell as usize))).collect()
}

/// A query head's numbers, in the basis of the index.
fn query(call: &Call, row: usize, head: usize) -> Vec<f64> {
    let p = &call.problem;
    let (stream, query) = (row / p.q.ne[1], row % p.q.ne[1]);
    let q: Vec<f64> = (0..p.q.ne[0]).map(|d| read_f32(&p.q, [d, query, head, stream])).collect();
    rotated(&q, call.rotation.k)
}

/// The same as `scores` with no other row's part in the means, and the mean of a power of the probability. Coarse clusters that
/// are not looked into count in the denominators with their plain logit.
fn scores_alone(call: &Call, row: usize, head_kv: usize, opened: Option<&[u32]>, power: i32) -> Scores {
    let p = &call.problem;
    let (_, view) = bound(call, row);
    let (c, dk, group) = (view.shape.n_cluster as usize, p.q.ne[0], p.n_group());
    let s = p.logit_scale() as f64;
    let offsets = view.head_offsets(head_kv);
    let mut open = vec![opened.is_none(); c];
    for j in opened.into_iter().flatten() {
        let run = &view.head_coarse_offsets(head_kv)[*j as usize..*j as usize + 2];
        open[run[0] as usize..run[1] as usize].fill(true);
    }
    let mut out = Scores { open, x: vec![], y: vec![], p: vec![0.0; c], mass: vec![0.0; c], sink_share: 0.0 };
    for head in head_kv * group..(head_kv + 1) * group {
        let q = query(call, row, head);
        let norm = q.iter().map(|q| q * q).sum::<f64>().sqrt();
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for (i, open) in (head_kv * c..(head_kv + 1) * c).zip(&out.open) {
            if !open {
                x.push(f64::NEG_INFINITY);
                y.push(f64::NEG_INFINITY);
                continue;
            }
            let plain = logit(s, &q, &view.centroids[i * dk..(i + 1) * dk]);
            let width = match call.selection.spread {
                Spread::None => 0.0,
                Spread::Radius => norm * view.radii[i] as f64,
                Spread::Diag => {
                    let sum: f64 = (0..dk).map(|d| q[d] * q[d] * view.variances[i * dk + d] as f64).sum();
                    (sum * view.variance_scales[i] as f64).sqrt()
                }
            };
            x.push(plain);
            y.push(finite(plain + call.selection.alpha as f64 * s * width));
        }
        let sinks = sink_logits(call, row, head);
        let mut rest = Vec::new();
        if let Some(opened) = opened {
            let keys = view.head_coarse_keys(head_kv);
            let coarse = coarse_logits(call, row, head);
            let closed = (0..coarse.len()).filter(|j| !opened.contains(&(*j as u32)));
            rest.extend(closed.map(|j| ((keys[j + 1] - keys[j]) as f64, coarse[j])));
        }
        softmax(&y, &sinks, offsets, &rest, &mut out.p, group, power);
        out.sink_share += softmax(&y, &sinks, offsets, &rest, &mut out.mass, group, 1);
        out.x.push(x);
        out.y.push(y);
    }
    out
}

/// Adds a power of the probability per key of each cluster, over `group`, to `per_key`; returns the probability of all
/// sinks, over `group`. `rest`: keys and score of what counts in the denominator alone.
fn softmax(
    scores: &[f64],
    sinks: &[f64],
    offsets: &[u32],
    rest: &[(f64, f64)],
    per_key: &mut [f64],
    group: usize,
    power: i32,
) -> f64 {
    let max = scores.iter().chain(sinks).chain(rest.iter().map(|r| &r.1)).fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    if max == f64::NEG_INFINITY {
        return 0.0;
    }
    let sink_sum: f64 = sinks.iter().map(|s| (s - max).exp()).sum();
    let cluster_sum: f64 =
        scores.iter().zip(offsets.windows(2)).map(|(s, o)| (o[1] - o[0]) as f64 * (s - max).exp()).sum();
    let rest_sum: f64 = rest.iter().map(|(n, s)| n * (s - max).exp()).sum();
    let (total, group) = (sink_sum + cluster_sum + rest_sum, group as f64);
    per_key.iter_mut().zip(scores).for_each(|(p, s)| *p += ((s - max).exp() / total).powi(power) / group);
    sink_sum / total / group
}

/// Clusters by falling p, then rising number; those that `among` names.
fn best_first(p: &[f64], among: impl Fn(usize) -> bool) -> Vec<u32> {
    let mut order: Vec<u32> = (0..p.len() as u32).filter(|i| among(*i as usize)).collect();
    order.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]).then(a.cmp(b)));
    order
}

/// The first of `order` until they and the sinks hold a share of the `P - W` prefix keys.
fn until_share(call: &Call, row: usize, order: &[u32], offsets: &[u32], share: f32) -> Vec<u32> {
    let meta = bound(call, row).0.index.meta();
    let target = keys_of_share(share, meta.n_prefix(), meta.n_window as usize);
    let mut keys = meta.n_sink as usize;
    let size = |i: u32| (offsets[i as usize + 1] - offsets[i as usize]) as usize;
    order.iter().copied().take_while(|i| (keys < target || share >= 1.0, keys += size(*i)).0).collect()
}

/// Clusters kept for one sparse row and KV head, ascending; the same for all rows of a tile. Best first means: higher p,
/// then lower number.
pub fn selection(call: &Call, row: usize, head_kv: usize) -> Vec<u32> {
    selection_among(call, row, head_kv, opened(call, row, head_kv).as_deref())
}

/// The same with the opened coarse clusters given (`None`: all fine ones).
pub fn selection_among(call: &Call, row: usize, head_kv: usize, opened: Option<&[u32]>) -> Vec<u32> {
    let (_, view) = bound(call, row);
    let Scores { p, mass: estimate, sink_share, open, .. } = scores_among(call, row, head_kv, opened);
    let offsets = view.head_offsets(head_kv);
    let size = |i: u32| (offsets[i as usize + 1] - offsets[i as usize]) as usize;
    let order = best_first(&p, |i| open[i]);
    let until = |share: f32| until_share(call, row, &order, offsets, share);
    let mut kept = match call.selection.mode {
        Mode::Budget(share) => until(share),
        Mode::Threshold { threshold, floor } => {
            let above = order.iter().take_while(|i| p[**i as usize] >= threshold as f64).count();
            let floor = until(floor).len();
            order[..above.max(floor)].to_vec()
        }
        Mode::Mass(share) => {
            let mut mass = sink_share;
            let more =
                |i: &u32| (mass < share as f64 || share >= 1.0, mass += size(*i) as f64 * estimate[*i as usize]).0;
            order.iter().copied().take_while(more).collect()
        }
    };
    kept.sort_unstable();
    kept
}

/// The whole call: `[stream][query][head][head_dim_v]`.
pub fn run(call: &Call) -> Vec<f64> {
    run_with(call, &|row, head_kv| selection(call, row, head_kv))
}

/// The whole call with the kept clusters of each sparse `(row, head_kv)` given: isolates attention from selection.
pub fn run_with(call: &Call, kept: &dyn Fn(usize, usize) -> Vec<u32>) -> Vec<f64> {
    run_among(call, &|row, head_kv| (opened(call, row, head_kv), kept(row, head_kv)))
}

/// Opened coarse clusters (`None`: all), and kept fine ones.
pub type Chosen = (Option<Vec<u32>>, Vec<u32>);

/// The same with the opened coarse clusters given too.
pub fn run_among(call: &Call, chosen: &dyn Fn(usize, usize) -> Chosen) -> Vec<f64> {
    let p = &call.problem;
    let mut out = Vec::with_capacity(p.n_row() * p.q.ne[2] * p.v.ne[0]);
    for row in 0..p.n_row() {
        let mut lists = Vec::new();
        for head_kv in 0..p.k.ne[2] {
            lists.push(match call.rows[row] {
                Row::Dense => None,
                Row::Sparse(_) => Some(chosen(row, head_kv)),
            });
        }
        for head in 0..p.q.ne[2] {
            out.extend(attend(call, row, head, lists[head / p.n_group()].as_ref()));
        }
    }
    out
}

/// Attention mass on the keys of the clusters that are not kept, as a share of that on all sinks and clustered keys: mean over
/// the group.
pub fn missed(call: &Call, row: usize, head_kv: usize, kept: &[u32]) -> f64 {
    let (binding, view) = bound(call, row);
    let (p, offsets) = (&call.problem, view.head_offsets(head_kv));
    let of = |head: usize| {
        let score = |cell: u32| cap(p, p.scale as f64 * dot_key(p, row, head, cell as usize));
        let mut terms: Vec<(bool, f64)> =
            binding.always[..binding.index.meta().n_sink as usize].iter().map(|cell| (true, score(*cell))).collect();
        for i in 0..view.shape.n_cluster {
            let members = offsets[i as usize]..offsets[i as usize + 1];
            let cells = members.map(|j| binding.cells[view.member(head_kv, j as usize) as usize]);
            terms.extend(cells.map(|cell| (kept.contains(&i), score(cell))));
        }
        let max = terms.iter().fold(f64::NEG_INFINITY, |m, t| m.max(t.1));
        let sum = |of: &dyn Fn(bool) -> bool| terms.iter().filter(|t| of(t.0)).map(|t| (t.1 - max).exp()).sum::<f64>();
        sum(&|kept| !kept) / sum(&|_| true)
    };
    (head_kv * p.n_group()..(head_kv + 1) * p.n_group()).map(of).sum::<f64>() / p.n_group() as f64
}

/// One row of one head: exact softmax over its visible cells, the estimate of dropped clusters, ggml's sink.
fn attend(call: &Call, row: usize, head: usize, chosen: Option<&Chosen>) -> Vec<f64> {
    let p = &call.problem;
    let (head_kv, from) = (head / p.n_group(), stream_of(p, &p.v, row / p.q.ne[1]));
    let dv = p.v.ne[0];
    let cell_value =
        |cell: usize| -> Vec<f64> { (0..dv).map(|d| read(&p.v, p.v_type, [d, cell, head_kv, from])).collect() };
    let mut cells: Vec<usize> = Vec::new();
    let mut terms: Vec<(f64, f64, Vec<f64>)> = Vec::new();
    match chosen {
        None => cells.extend(0..p.k.ne[1]),
        Some((opened, kept)) => {
            let (binding, view) = bound(call, row);
            let offsets = view.head_offsets(head_kv);
            cells.extend(binding.always.iter().map(|cell| *cell as usize));
            for i in kept {
                for j in offsets[*i as usize]..offsets[*i as usize + 1] {
                    cells.push(binding.cells[view.member(head_kv, j as usize) as usize] as usize);
                }
            }
            if call.selection.estimate {
                let x = &scores_alone(call, row, head_kv, opened.as_deref(), 1).x[head % p.n_group()];
                for i in (0..x.len()).filter(|i| x[*i] > f64::NEG_INFINITY && !kept.contains(&(*i as u32))) {
                    let at = (head_kv * x.len() + i) * dv;
                    let mean: Vec<f64> = view.mean_values[at..at + dv].iter().map(|v| v.to_f64()).collect();
                    let mean = rotated(&mean, call.rotation.v);
                    let logit = if p.softcap == 0.0 { x[i] } else { cap(p, x[i] / p.softcap as f64) };
                    terms.push(((offsets[i + 1] - offsets[i]) as f64, logit, mean));
                }
            }
        }
    }
    for cell in cells {
        let m = mask(p, row, head, cell);
        if m > f64::NEG_INFINITY {
            let s = cap(p, p.scale as f64 * dot_key(p, row, head, cell)) + p.slope(head) as f64 * m;
            terms.push((1.0, s, cell_value(cell)));
        }
    }
    // SAFETY: the maker of the call vouches for `n_head` floats.
    let sink = p.sinks.map_or(f64::NEG_INFINITY, |s| unsafe { s.add(head).read() } as f64);
    let max = terms.iter().fold(sink, |m, t| m.max(t.1));
    let mut out = vec![0.0; dv];
    if max == f64::NEG_INFINITY {
        return out;
    }
    let mut sum = (sink - max).exp();
    for (n, s, value) in &terms {
        let weight = n * (s - max).exp();
        sum += weight;
        out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
    }
    out.iter_mut().for_each(|o| *o /= sum);
    out
}

fn bound(call: &Call, row: usize) -> (&Binding, LayerView<'_>) {
    let Row::Sparse(n) = call.rows[row] else { panic!("row {row} is dense: it has no clusters") };
    let binding = &call.bindings[n as usize];
    let view = binding.index.layer(call.layer).expect("a sparse row's layer is in its index");
    (binding, view)
}
