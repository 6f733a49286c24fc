//! Extension: the index of a longer prefix out of that of its beginning. New keys join near clusters, the others get new
//! clusters, some of the clusters touched are refined, and what no key entered or left stays as it is. The work on keys grows
//! with the new part: old keys are looked at only where their cluster is refined or summarised again.

use std::collections::HashMap;

use half::f16;

use super::summary::{self, HeadParts, Rows, Summary};
use super::topdown::{self, Nearest, Plan};
use super::{kmeans, BuildError, BuiltLayer, LayerCapture, Settings};
use crate::index::{IndexMeta, LayerView, SketchParts, SketchView};
use crate::random::split_mix;

/// Old members that the bound for near keys is taken from, at most.
const BOUND_SAMPLE: usize = 4096;
/// Share of the old members that are nearer to their own centroid than the bound asks of a new key. High, because a member
/// has drawn its centroid towards itself.
const NEAR_SHARE: f64 = 0.85;
/// Keys that become new clusters, per cluster, at least.
const LEAST_FAR: usize = 4;
/// Clusters that a key is compared with in a refinement.
const AROUND: usize = 32;
const REFINEMENTS: usize = 2;

impl Settings {
    /// The settings that an index was built with.
    pub fn of_index(meta: &IndexMeta, n_threads: usize) -> Settings {
        Settings {
            n_sink: meta.n_sink,
            n_window: meta.n_window,
            cluster_share: meta.build.cluster_share,
            iterations: meta.build.iterations,
            seed: meta.build.seed,
            n_coarse: None,
            n_threads,
        }
    }
}

/// Whether an index can be extended to what `new` describes (calibration and dense layers aside).
///
/// # Errors
/// `NotContinued` where the tokens are not those of a longer text that begins with the old one; `Differs` for another model or
/// other settings.
pub fn check_extension(old: &IndexMeta, new: &IndexMeta) -> Result<(), BuildError> {
    let differs = |what: &'static str, old: String, new: String| Err(BuildError::Differs { what, old, new });
    let hex = |f: &[u8; 32]| f[..8].iter().map(|b| format!("{b:02x}")).collect::<String>();
    if old.model.fingerprint != new.model.fingerprint {
        let name = |m: &IndexMeta| format!("{} ({}...)", m.model.name, hex(&m.model.fingerprint));
        return differs("the model", name(old), name(new));
    }
    if let Some(token) = old.tokens.iter().zip(&new.tokens).position(|(a, b)| a != b) {
        return Err(BuildError::NotContinued { token, n_old: old.n_prefix(), n_new: new.n_prefix() });
    }
    if new.n_prefix() <= old.n_prefix() {
        return Err(BuildError::NotContinued { token: new.n_prefix(), n_old: old.n_prefix(), n_new: new.n_prefix() });
    }
    let settings = |m: &IndexMeta| {
        let (build, rope) = (&m.build, &m.rope);
        [
            ("the number of sinks", m.n_sink.to_string()),
            ("the window", m.n_window.to_string()),
            ("the seed", build.seed.to_string()),
            ("the iterations", build.iterations.to_string()),
            ("the share of clusters", build.cluster_share.to_string()),
            ("the chat template's use", build.chat.clone()),
            ("the cache types", build.cache_types.join(" and ")),
            ("RoPE", format!("type {}, base {}, scale {}", rope.kind, rope.freq_base, rope.freq_scale)),
        ]
    };
    for ((what, old), (_, new)) in settings(old).into_iter().zip(settings(new)) {
        if old != new {
            return differs(what, old, new);
        }
    }
    Ok(())
}

/// Extends one layer: `old` is its part of an index whose prefix is the beginning of the one captured, built with the same
/// settings. The old window's keys are clustered now. Clusters are `cluster_share` of the keys again, the scores are of all
/// clusters with the new window's queries, and a prefix that has become long gets a coarse level.
///
/// The same whatever `n_threads`. `progress` as in [`super::index_layer`]. `products` counts the multiply-adds of this call.
///
/// # Errors
/// Those of `index_layer`; `Differs` if the layers have other shapes, `NotContinued` if nothing was added.
pub fn extend_layer(
    old: &LayerView,
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<BuiltLayer, BuildError> {
    super::check_settings(settings)?;
    super::pool(settings)?.install(|| extend_layer_here(old, capture, settings, progress))
}

fn extend_layer_here(
    old: &LayerView,
    capture: &LayerCapture,
    settings: &Settings,
    progress: &(dyn Fn(f32) + Sync),
) -> Result<BuiltLayer, BuildError> {
    let n = super::n_clustered(capture, settings)?;
    check_shape(old, capture)?;
    let n_old = old.n_clustered();
    if n <= n_old {
        let beside = (settings.n_sink + settings.n_window) as usize;
        return Err(BuildError::NotContinued { token: n + beside, n_old: n_old + beside, n_new: n + beside });
    }
    let old_clusters = old.shape.n_cluster as usize;
    let n_cluster = super::n_cluster(n, settings).clamp(old_clusters, old_clusters + n - n_old);
    // A first coarse level is over all clusters, later ones grow by coarse clusters over the new ones.
    let most_coarse = match old.shape.n_coarse as usize {
        0 => n_cluster,
        n_coarse => n_coarse + n_cluster - old_clusters,
    };
    let n_coarse = super::n_coarse(n, n_cluster, settings).clamp(old.shape.n_coarse as usize, most_coarse);
    let plan = Plan { n_cluster, n_coarse, iterations: settings.iterations };
    let head = |h: u32| {
        let (keys, values) = super::head_rows(capture, h, settings.n_sink as usize);
        let mut seed = super::head_seed(settings, capture.layer, h) ^ n as u64;
        let mut extension =
            Extension { old, h: h as usize, keys, values, n, plan, seed: split_mix(&mut seed), products: 0 };
        let head = extension.run();
        progress((h + 1) as f32 / capture.n_head_kv as f32);
        (head, extension.products)
    };
    // One head after the other, as for long prefixes.
    let heads: Vec<(HeadParts, u64)> = (0..capture.n_head_kv).map(head).collect();
    Ok(super::join(capture, settings, &plan, heads, &capture.q))
}

fn check_shape(old: &LayerView, capture: &LayerCapture) -> Result<(), BuildError> {
    let shape = &old.shape;
    let text = |layer, n_head_kv, n_group, dim_k, dim_v, scale: f32| {
        format!("layer {layer}: {n_head_kv} KV heads of {n_group} query heads, head sizes {dim_k} and {dim_v}, scale {scale}")
    };
    let old = text(shape.layer, shape.n_head_kv, shape.n_group, shape.head_dim_k, shape.head_dim_v, shape.scale);
    let c = capture;
    let new = text(c.layer, c.n_head_kv, c.n_group, c.head_dim_k, c.head_dim_v, c.scale);
    if old == new {
        return Ok(());
    }
    Err(BuildError::Differs { what: "the shape of a layer", old, new })
}

/// One KV head at work.
struct Extension<'a> {
    old: &'a LayerView<'a>,
    h: usize,
    keys: Rows<'a>,
    values: Rows<'a>,
    /// Clustered keys of the longer prefix.
    n: usize,
    plan: Plan,
    seed: u64,
    products: u64,
}

impl Extension<'_> {
    fn run(&mut self) -> HeadParts {
        let (n_old, dim) = (self.old.n_clustered(), self.keys.dim);
        let old_clusters = self.old.shape.n_cluster as usize;
        let mut label = self.old_labels();
        let old_label = label.clone();
        let mut direction = self.directions(self.old.centroids, old_clusters);

        let new: Vec<u32> = (n_old as u32..self.n as u32).collect();
        let rows = self.unit_keys(&new);
        let found = self.nearest(&rows, &direction);
        label.extend(&found.label);
        let n_added = self.plan.n_cluster - old_clusters;
        if n_added > 0 {
            let far = self.far(&found.similarity, &direction, &old_label, n_added);
            let plan = Plan { n_cluster: n_added, n_coarse: topdown::n_coarse(far.len()).min(n_added), ..self.plan };
            let made = topdown::cluster(&topdown::gather(&rows, dim, &far), dim, &plan, self.seed, &|_| ());
            self.products += made.products;
            far.iter().zip(made.label).for_each(|(&i, c)| label[n_old + i as usize] = old_clusters as u32 + c);
        }
        drop(rows);
        // Directions of new clusters follow from their keys, in the refinement.
        direction.resize(self.plan.n_cluster * dim, 0.0);
        self.refine(&mut direction, &mut label);

        let (coarse_offsets, origin) = self.coarse_level(&direction);
        let mut touched = vec![false; self.plan.n_cluster];
        label[n_old..].iter().for_each(|&c| touched[c as usize] = true);
        for (&before, &now) in old_label.iter().zip(&label).filter(|(before, now)| before != now) {
            (touched[before as usize], touched[now as usize]) = (true, true);
        }
        let mut number = vec![0; origin.len()];
        origin.iter().enumerate().for_each(|(to, &from)| number[from as usize] = to as u32);
        label.iter_mut().for_each(|c| *c = number[*c as usize]);
        summary::assemble(self.keys, &label, self.plan.n_cluster, &coarse_offsets, &|c, members| {
            let from = origin[c] as usize;
            if touched[from] {
                summary::summarise_one(self.keys, self.values, members)
            } else {
                Summary::stored(self.old, self.h, from)
            }
        })
    }

    fn old_labels(&self) -> Vec<u32> {
        let mut label = vec![0; self.old.n_clustered()];
        for (c, run) in self.old.head_offsets(self.h).windows(2).enumerate() {
            for slot in run[0]..run[1] {
                label[self.old.member(self.h, slot as usize) as usize - self.keys.first] = c as u32;
            }
        }
        label
    }

    fn unit_keys(&self, which: &[u32]) -> Vec<f32> {
        let keys = self.keys;
        super::unit(which.iter().map(|&i| keys.row(i as usize)), which.len(), keys.dim)
    }

    /// Directions of this head's `n` centroids, out of those of all heads.
    fn directions(&self, centroids: &[f16], n: usize) -> Vec<f32> {
        let dim = self.keys.dim;
        super::unit(centroids[self.h * n * dim..][..n * dim].chunks_exact(dim), n, dim)
    }

    fn old_coarse(&self) -> &[u32] {
        match self.old.shape.n_coarse {
            0 => &[],
            _ => self.old.head_coarse_offsets(self.h),
        }
    }

    fn old_coarse_directions(&self) -> Vec<f32> {
        self.directions(self.old.coarse_centroids, self.old.shape.n_coarse as usize)
    }

    /// The nearest old cluster of every row; through the coarse level where there is one.
    fn nearest(&mut self, rows: &[f32], direction: &[f32]) -> Nearest {
        let dim = self.keys.dim;
        let n = rows.len() / dim;
        let (mut label, mut similarity) = (vec![0; n], vec![0.0; n]);
        let offsets = self.old_coarse();
        if offsets.is_empty() {
            kmeans::assign(rows, direction, dim, &mut label, &mut similarity);
            self.products += (rows.len() * (direction.len() / dim)) as u64;
            return Nearest { label, similarity, products: 0 };
        }
        let coarse = self.old_coarse_directions();
        kmeans::assign(rows, &coarse, dim, &mut label, &mut similarity);
        label.iter_mut().for_each(|j| *j = offsets[*j as usize]);
        let near = topdown::neighbours(&coarse, dim, topdown::NEAR);
        let found = topdown::nearest_around(rows, dim, direction, offsets, &near, &label);
        self.products += found.products + ((rows.len() + coarse.len()) * (coarse.len() / dim)) as u64;
        found
    }

    /// The new keys for new clusters, ascending: those less near to an old centroid than old members are to theirs, and
    /// enough of the least near.
    fn far(&mut self, similarity: &[f32], direction: &[f32], old_label: &[u32], n_added: usize) -> Vec<u32> {
        let (n_old, dim) = (old_label.len(), self.keys.dim);
        let count = n_old.min(BOUND_SAMPLE);
        let sample: Vec<u32> = (0..count).map(|i| (i * n_old / count) as u32).collect();
        let rows = self.unit_keys(&sample);
        let cosine = |(row, &i): (&[f32], &u32)| -> f32 {
            let own = &direction[old_label[i as usize] as usize * dim..][..dim];
            row.iter().zip(own).map(|(a, b)| a * b).sum()
        };
        let mut own: Vec<f32> = rows.chunks_exact(dim).zip(&sample).map(cosine).collect();
        self.products += rows.len() as u64;
        own.sort_by(f32::total_cmp);
        let bound = own[((1.0 - NEAR_SHARE) * (count - 1) as f64).round() as usize];

        let mut order: Vec<u32> = (0..similarity.len() as u32).collect();
        order.sort_by(|&a, &b| similarity[a as usize].total_cmp(&similarity[b as usize]));
        let below = order.partition_point(|&i| similarity[i as usize] < bound);
        order.truncate(below.max(LEAST_FAR * n_added));
        order.sort_unstable();
        order
    }

    /// Some assignments of the members of new clusters, and of those old clusters that gained most, to the clusters around
    /// them: as many old clusters as together have no more old members than there are new keys.
    fn refine(&mut self, direction: &mut [f32], label: &mut [u32]) {
        let (n_old, dim) = (self.old.n_clustered(), self.keys.dim);
        let old_clusters = self.old.shape.n_cluster as usize;
        let mut gained: HashMap<u32, u32> = HashMap::new();
        label[n_old..]
            .iter()
            .filter(|c| (**c as usize) < old_clusters)
            .for_each(|&c| *gained.entry(c).or_insert(0) += 1);
        let offsets = self.old.head_offsets(self.h);
        let size = |c: u32| offsets[c as usize + 1] - offsets[c as usize];
        let mut chosen: Vec<(u32, u32)> = gained.into_iter().collect();
        let weight = |&(c, new): &(u32, u32)| new as f64 / size(c) as f64;
        chosen.sort_by(|a, b| weight(b).total_cmp(&weight(a)).then(a.0.cmp(&b.0)));
        let mut left = (self.n - n_old) as i64;
        chosen.retain(|&(c, _)| {
            left -= size(c) as i64;
            left >= 0
        });
        let mut clusters: Vec<u32> = chosen.into_iter().map(|(c, _)| c).collect();
        clusters.extend(old_clusters as u32..self.plan.n_cluster as u32);
        clusters.sort_unstable();
        if clusters.is_empty() {
            return;
        }

        let mut local = vec![u32::MAX; self.plan.n_cluster];
        clusters.iter().enumerate().for_each(|(i, &c)| local[c as usize] = i as u32);
        let points: Vec<u32> = (0..self.n as u32).filter(|&i| local[label[i as usize] as usize] != u32::MAX).collect();
        let mut own: Vec<u32> = points.iter().map(|&i| local[label[i as usize] as usize]).collect();
        let rows = self.unit_keys(&points);
        let mut centres = topdown::gather(direction, dim, &clusters);
        kmeans::update(&rows, dim, &own, &mut centres);
        let each = topdown::offsets(&vec![1; clusters.len()]);
        let near = topdown::neighbours(&centres, dim, AROUND);
        self.products += (centres.len() * clusters.len()) as u64;
        for i in 0..REFINEMENTS {
            if i > 0 {
                kmeans::update(&rows, dim, &own, &mut centres);
            }
            self.products += topdown::refine(&rows, dim, &centres, &each, &near, &mut own);
        }
        kmeans::update(&rows, dim, &own, &mut centres);
        points.iter().zip(own).for_each(|(&i, c)| label[i as usize] = clusters[c as usize]);
        for (&c, centre) in clusters.iter().zip(centres.chunks_exact(dim)) {
            direction[c as usize * dim..][..dim].copy_from_slice(centre);
        }
    }

    /// The coarse level over all clusters, and the clusters in its order. Old clusters keep their parents; new ones get new
    /// parents as the number of coarse clusters grows, or the nearest old one. A first coarse level takes in all clusters.
    fn coarse_level(&mut self, direction: &[f32]) -> (Vec<u32>, Vec<u32>) {
        let dim = self.keys.dim;
        let (n, n_coarse) = (self.plan.n_cluster, self.plan.n_coarse);
        let old_coarse = self.old.shape.n_coarse as usize;
        let mut origin: Vec<u32> = (0..n as u32).collect();
        if n_coarse == 0 {
            return (Vec::new(), origin);
        }
        let mut parent = topdown::parents(self.old_coarse());
        let orphans = &direction[parent.len() * dim..];
        let n_orphan = orphans.len() / dim;
        let n_new = n_coarse - old_coarse;
        if n_new > 0 {
            let made = kmeans::cluster(orphans, dim, n_new, self.plan.iterations, self.seed, &|_| ());
            self.products += made.products;
            parent.extend(made.label.iter().map(|j| old_coarse as u32 + j));
        } else if n_orphan > 0 {
            let (mut label, mut similarity) = (vec![0; n_orphan], vec![0.0; n_orphan]);
            let coarse = self.old_coarse_directions();
            kmeans::assign(orphans, &coarse, dim, &mut label, &mut similarity);
            self.products += (orphans.len() * old_coarse) as u64;
            parent.extend(label);
        }
        origin.sort_by_key(|&c| parent[c as usize]);
        let (start, _) = kmeans::group(&parent, n_coarse);
        (start.into_iter().map(|s| s as u32).collect(), origin)
    }
}

/// The sketch of the longer prefix (`capture` is of the sketched layer): the same elements of every token
/// as `old` keeps, those of the new tokens from `capture`.
/// Its margin may differ: measure it again.
///
/// # Errors
/// `Differs` if `capture` is of another layer or row size, or its old rows are farther from the old sketch than the tolerance
/// allows; `Shape`, `NonFinite` and `NotContinued` as in [`extend_layer`].
pub fn extend_sketch(old: &SketchView, capture: &LayerCapture) -> Result<SketchParts, BuildError> {
    super::sketch::extend(old, capture)
}

#[cfg(test)]
#[path = "extend_tests.rs"]
mod tests;
