//! What holds for every index: one set of rules, asked of parts before they are written and of a file before it is used.

use half::f16;

use super::error::{ensure, reserved};
use super::keys::MAX_ROWS;
use super::layout::{Header, ProbeShape, SketchShape};
use super::types::*;
use super::IndexError;
use crate::hadamard;

/// Far above any model, low enough that products of a few of them fit 64 bits.
const MAX_HEADS: u32 = 1 << 16;
const MAX_DIM: u32 = 1 << 16;
const MAX_ROW: u32 = 1 << 24;
/// Shares are means of rounded numbers.
const SHARE_SLACK: f32 = 1e-3;

fn share(x: f32) -> bool {
    (0.0..=1.0 + SHARE_SLACK).contains(&x)
}

fn ascending<T: PartialOrd>(items: impl Iterator<Item = T> + Clone) -> bool {
    items.clone().zip(items.skip(1)).all(|(a, b)| a < b)
}

/// Everything but tensor data. After this, shapes can be multiplied and subtracted without care.
pub(super) fn header(header: &Header) -> Result<(), IndexError> {
    let Header { meta, shapes, sketch, probes } = header;
    check_prefix(meta)?;
    ensure!((1..=MAX_ROWS as u32).contains(&meta.n_layer), "the model has {} layers", meta.n_layer);
    ensure!(meta.rope.freq_base.is_finite() && meta.rope.freq_scale.is_finite(), "a RoPE setting is not finite");
    let cluster_share = meta.build.cluster_share;
    ensure!(cluster_share > 0.0 && cluster_share <= 1.0, "the cluster share is {cluster_share}, not in (0, 1]");

    ensure!(!shapes.is_empty(), "no layer is indexed");
    ensure!(ascending(shapes.iter().map(|s| s.layer)), "indexed layers are not ascending");
    for shape in shapes {
        check_layer_number(meta, shape.layer, "the indexed layer")?;
        check_shape(shape, meta.n_clustered())?;
    }
    check_calibration(&meta.calibration, shapes.iter().map(|s| s.n_head_kv as usize).sum())?;
    check_masses(&meta.mass_targets)?;

    ensure!(ascending(meta.dense_layers.iter().map(|(layer, _)| *layer)), "dense layers are not ascending");
    for (layer, _) in &meta.dense_layers {
        check_layer_number(meta, *layer, "the dense layer")?;
        ensure!(find(shapes, *layer).is_none(), "layer {layer} is both indexed and dense");
    }

    check_layer_number(meta, sketch.layer, "the layer of the sketch")?;
    ensure!(
        (1..=MAX_SKETCH).contains(&sketch.n_k) && (1..=MAX_SKETCH).contains(&sketch.n_v),
        "the sketch keeps {} elements of K and {} of V per token, not 1 to {MAX_SKETCH} of each",
        sketch.n_k,
        sketch.n_v
    );
    let tolerance = sketch.tolerance;
    let most = if sketch.layer == 0 { MAX_SKETCH_TOLERANCE } else { LATER_TOLERANCE };
    ensure!(
        tolerance > 0.0 && tolerance <= most,
        "the tolerance of the sketch is {tolerance}, not above 0 and at most {most}"
    );
    check_peaks(shapes, sketch)?;
    ensure!(probes.len() <= MAX_ROWS, "there are {} probes", probes.len());
    ensure!(ascending(probes.iter().map(|p| p.layer)), "layers of probes are not ascending");
    probes.iter().try_for_each(|probe| check_probe_shape(meta, shapes, probe))
}

fn check_prefix(meta: &IndexMeta) -> Result<(), IndexError> {
    let (n_prefix, n_sink, n_window) = (meta.n_prefix() as u64, meta.n_sink, meta.n_window);
    ensure!(n_prefix <= i32::MAX as u64, "the prefix has {n_prefix} tokens");
    ensure!(
        u64::from(n_sink) + u64::from(n_window) < n_prefix,
        "the prefix has {n_prefix} tokens, {n_sink} sinks and {n_window} window tokens leave none to cluster"
    );
    let negative = meta.tokens.iter().find(|t| **t < 0);
    ensure!(negative.is_none(), "the prefix holds the token id {}", negative.unwrap_or(&0));
    Ok(())
}

fn check_layer_number(meta: &IndexMeta, layer: u32, what: &str) -> Result<(), IndexError> {
    ensure!(layer < meta.n_layer, "{what} is {layer}, the model has {} layers", meta.n_layer);
    Ok(())
}

fn find(shapes: &[LayerShape], layer: u32) -> Option<&LayerShape> {
    shapes.binary_search_by_key(&layer, |s| s.layer).ok().map(|i| &shapes[i])
}

fn check_shape(shape: &LayerShape, n_clustered: usize) -> Result<(), IndexError> {
    let layer = shape.layer;
    ensure!(
        (1..=MAX_HEADS).contains(&shape.n_head_kv) && (1..=MAX_HEADS).contains(&shape.n_group),
        "layer {layer} has {} KV heads of {} query heads each",
        shape.n_head_kv,
        shape.n_group
    );
    ensure!(
        (1..=MAX_DIM).contains(&shape.head_dim_k) && (1..=MAX_DIM).contains(&shape.head_dim_v),
        "layer {layer} has head sizes {} and {}",
        shape.head_dim_k,
        shape.head_dim_v
    );
    ensure!(
        shape.n_cluster >= 1 && shape.n_cluster as usize <= n_clustered,
        "layer {layer} has {} clusters for {n_clustered} keys",
        shape.n_cluster
    );
    ensure!(
        shape.n_coarse <= shape.n_cluster,
        "layer {layer} has {} coarse clusters over {} fine ones",
        shape.n_coarse,
        shape.n_cluster
    );
    ensure!(shape.scale.is_finite() && shape.scale > 0.0, "layer {layer} has the scale {}", shape.scale);
    Ok(())
}

fn check_calibration(rows: &[Calibration], n_head: usize) -> Result<(), IndexError> {
    ensure!(rows.len() <= MAX_ROWS, "the calibration table has {} rows", rows.len());
    ensure!(ascending(rows.iter().map(|c| c.budget)), "the budgets of the calibration table are not ascending");
    for row in rows {
        let budget = row.budget;
        ensure!(budget > 0.0 && budget <= 1.0, "the calibration table has the budget {budget}, not in (0, 1]");
        ensure!(
            row.threshold.is_finite() && row.threshold >= 0.0,
            "the calibration table has the threshold {} at budget {budget}",
            row.threshold
        );
        ensure!(
            share(row.kept)
                && share(row.mass)
                && row.heads.iter().all(|h| share(h.kept) && share(h.mass) && share(h.budget_mass)),
            "the calibration table has a share outside 0 to 1 at budget {budget}"
        );
        ensure!(
            row.heads.len() == n_head,
            "the calibration table has {} KV heads at budget {budget}, {n_head} are indexed",
            row.heads.len()
        );
    }
    Ok(())
}

fn check_masses(rows: &[MassTarget]) -> Result<(), IndexError> {
    ensure!(rows.len() <= MAX_ROWS, "the table of mass mode has {} rows", rows.len());
    ensure!(ascending(rows.iter().map(|row| row.mass)), "the masses of mass mode's table are not ascending");
    let falls = rows.windows(2).any(|pair| pair[1].target < pair[0].target);
    ensure!(!falls, "the targets of mass mode's table fall");
    for MassTarget { mass, target, kept } in rows {
        ensure!(*mass > 0.0 && *mass < 1.0, "the table of mass mode has the mass {mass}, not in (0, 1)");
        ensure!(
            (0.0..=1.0).contains(target) && share(*kept),
            "the table of mass mode has the target {target} and the share {kept} at mass {mass}"
        );
    }
    Ok(())
}

fn check_peaks(shapes: &[LayerShape], sketch: &SketchShape) -> Result<(), IndexError> {
    let shape = find(shapes, sketch.layer);
    let row = |head_dim: u32| shape.map_or(MAX_ROW, |s| s.n_head_kv.saturating_mul(head_dim));
    let (dim_k, dim_v) = shape.map_or((MAX_DIM, MAX_DIM), |s| (s.head_dim_k, s.head_dim_v));
    for (what, block, n_peak, head_dim) in
        [("K", sketch.k_block, sketch.n_k_peak, dim_k), ("V", sketch.v_block, sketch.n_v_peak, dim_v)]
    {
        ensure!(
            hadamard::fits(block as usize, head_dim as usize),
            "the sketch has blocks of {block} elements of {what} for heads of {head_dim}"
        );
        let most = row(head_dim).div_ceil(PEAK_RUN as u32);
        ensure!((1..=most).contains(&n_peak), "the sketch has {n_peak} peaks of {what}, not 1 to {most}");
    }
    Ok(())
}

fn check_probe_shape(meta: &IndexMeta, shapes: &[LayerShape], probe: &ProbeShape) -> Result<(), IndexError> {
    let (layer, n_token, row) = (probe.layer, probe.n_token, probe.row);
    check_layer_number(meta, layer, "the layer of a probe")?;
    ensure!(
        n_token >= 1 && n_token as usize <= meta.n_prefix() && (1..=MAX_ROW).contains(&row),
        "the probe of layer {layer} has {n_token} rows of {row} elements"
    );
    if let Some(shape) = find(shapes, layer) {
        let expected = u64::from(shape.n_head_kv) * u64::from(shape.head_dim_k);
        ensure!(u64::from(row) == expected, "the probe of layer {layer} has rows of {row} elements, not {expected}");
    }
    Ok(())
}

/// No infinity and no NaN. Without early exit, so that it is vectorised: an index is mostly centroids.
fn finite(values: &[f16]) -> bool {
    const EXPONENT: u16 = 0x7c00;
    values.iter().map(|x| x.to_bits() & EXPONENT).max().unwrap_or(0) < EXPONENT
}

/// One layer's data but for the coarse centroids; slices have the lengths that the shape asks for.
pub(super) fn layer(meta: &IndexMeta, view: &LayerView) -> Result<(), IndexError> {
    let shape = &view.shape;
    let layer = shape.layer;
    for (what, values) in [("centroid", view.centroids), ("mean value", view.mean_values)] {
        ensure!(finite(values), "layer {layer} has a {what} that is not finite");
    }
    for (what, values) in [("variance scale", view.variance_scales), ("radius", view.radii)] {
        let wrong = values.iter().find(|x| !(x.is_finite() && **x >= 0.0));
        ensure!(wrong.is_none(), "layer {layer} has the {what} {}", wrong.unwrap_or(&0.0));
    }
    let (n, fine, coarse) = (meta.n_clustered(), shape.n_cluster as usize, shape.n_coarse as usize);
    let mut seen = reserved(n.div_ceil(64))?;
    seen.resize(n.div_ceil(64), 0u64);
    for head in 0..shape.n_head_kv as usize {
        let offsets = view.head_offsets(head);
        ensure!(runs(offsets, n), "layer {layer}, KV head {head}: cluster offsets do not ascend from 0 to {n}");
        if coarse > 0 {
            let offsets = &view.coarse_offsets[head * (coarse + 1)..(head + 1) * (coarse + 1)];
            ensure!(
                runs(offsets, fine),
                "layer {layer}, KV head {head}: coarse offsets do not ascend from 0 to {fine}"
            );
        }
        let members = head * n..(head + 1) * n;
        let ok = match view.members {
            Members::U16(m) => permutation(&m[members], offsets, meta.n_sink, &mut seen),
            Members::U32(m) => permutation(&m[members], offsets, meta.n_sink, &mut seen),
        };
        ensure!(
            ok,
            "layer {layer}, KV head {head}: members are not the tokens {}..{}, once each and ascending inside a cluster",
            meta.n_sink,
            meta.n_sink as usize + n
        );
    }
    Ok(())
}

/// The coarse centroids, which every reader makes anew, are those that it will make. The rest has passed `layer`.
pub(super) fn coarse(view: &LayerView) -> Result<(), IndexError> {
    ensure!(
        view.coarse_centroids == view.coarse_means(),
        "layer {}: the coarse centroids are not the means of their fine clusters (LayerView::coarse_means)",
        view.shape.layer
    );
    Ok(())
}

/// Strictly increasing from 0 to `end`.
fn runs(offsets: &[u32], end: usize) -> bool {
    offsets.first() == Some(&0)
        && offsets.last().is_some_and(|last| *last as usize == end)
        && offsets.windows(2).all(|pair| pair[0] < pair[1])
}

/// Members are each of `first..first + members.len()` once, ascending inside a cluster. Offsets have passed `runs`.
fn permutation<T: Copy + Into<u32>>(members: &[T], offsets: &[u32], first: u32, seen: &mut [u64]) -> bool {
    seen.fill(0);
    for run in offsets.windows(2) {
        let mut last = None;
        for member in &members[run[0] as usize..run[1] as usize] {
            let member: u32 = (*member).into();
            let Some(bit) = member.checked_sub(first).map(|m| m as usize).filter(|m| *m < members.len()) else {
                return false;
            };
            let (word, mask) = (bit / 64, 1u64 << (bit % 64));
            if last >= Some(member) || seen[word] & mask != 0 {
                return false;
            }
            seen[word] |= mask;
            last = Some(member);
        }
    }
    true
}

pub(super) fn sketch(shapes: &[LayerShape], view: &SketchView) -> Result<(), IndexError> {
    let shape = find(shapes, view.layer);
    let row = |head_dim: fn(&LayerShape) -> u32| {
        shape.map_or(u64::from(MAX_ROW), |s| u64::from(s.n_head_kv) * u64::from(head_dim(s)))
    };
    for (what, dims, row) in [("K", view.k_dims, row(|s| s.head_dim_k)), ("V", view.v_dims, row(|s| s.head_dim_v))] {
        ensure!(
            ascending(dims.iter()) && dims.last().is_some_and(|last| u64::from(*last) < row),
            "the sketch's elements of {what} are not ascending below {row}"
        );
    }
    ensure!(finite(view.k) && finite(view.v), "the sketch has an element that is not finite");
    let peaks = |values: &[f16]| finite(values) && values.iter().all(|x| x.to_bits() >> 15 == 0);
    ensure!(peaks(view.k_peaks) && peaks(view.v_peaks), "the sketch has a peak that is not finite or below 0");
    Ok(())
}

pub(super) fn probe(meta: &IndexMeta, view: &ProbeView) -> Result<(), IndexError> {
    let (layer, n_prefix) = (view.layer, meta.n_prefix());
    ensure!(
        ascending(view.tokens.iter()) && view.tokens.last().is_some_and(|last| (*last as usize) < n_prefix),
        "the probe's tokens of layer {layer} are not ascending below {n_prefix}"
    );
    ensure!(finite(view.k), "the probe of layer {layer} has an element that is not finite");
    Ok(())
}
