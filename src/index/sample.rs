//! Valid random indexes for tests, benches and the fuzzer. Not part of the public interface.

use std::ops::Range;

use half::f16;

use super::gguf::{self, Cursor, Type};
use super::seal::Frame;
use super::types::*;
use crate::random::split_mix;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        split_mix(&mut self.0)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn halves(&mut self, n: usize) -> Vec<f16> {
        (0..n).map(|_| f16::from_f32(self.unit())).collect()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// `k` of `0..n`, ascending.
    fn choose(&mut self, n: usize, k: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        self.shuffle(&mut all);
        all.truncate(k);
        all.sort_unstable();
        all
    }

    /// Offsets of `k` non-empty runs that fill `0..n`.
    fn offsets(&mut self, n: usize, k: usize) -> Vec<u32> {
        let cuts = self.choose(n - 1, k - 1);
        std::iter::once(0).chain(cuts.into_iter().map(|cut| cut + 1)).chain([n as u32]).collect()
    }
}

/// Random but valid parts: layers `0..layers` indexed, layer `layers` dense, probes on every indexed layer but the first, no
/// hierarchy (see [`add_coarse`]). S is an eighth of the prefix, at most 16; W an eighth, at most 100. Two query heads per KV
/// head.
///
/// # Panics
/// Where the sizes admit no index: a zero, or more clusters than clustered keys.
pub fn sample_parts(
    seed: u64,
    n_prefix: usize,
    layers: usize,
    n_head_kv: usize,
    dk: usize,
    dv: usize,
    n_cluster: usize,
) -> IndexParts {
    let random = &mut Random(seed);
    let (n_sink, n_window) = ((n_prefix / 8).min(16), (n_prefix / 8).min(100));
    let n = n_prefix - n_sink - n_window;
    assert!(layers > 0 && n_head_kv > 0 && dk > 0 && dv > 0 && (1..=n).contains(&n_cluster), "no such index");

    let mut fingerprint = [0; 32];
    fingerprint.fill_with(|| random.next() as u8);
    let heads = |budget: f32, random: &mut Random| {
        let [kept, mass, budget_mass] = [0; 3].map(|_| budget * (1.0 + 0.5 * random.unit()));
        HeadShares { kept, mass, budget_mass }
    };
    let calibration = [0.05f32, 0.1, 0.2, 0.5].map(|budget| Calibration {
        budget,
        threshold: 1e-4 / budget,
        kept: budget,
        mass: budget.sqrt(),
        heads: (0..layers * n_head_kv).map(|_| heads(budget, random)).collect(),
    });
    let meta = IndexMeta {
        model: ModelId { architecture: "llama".into(), name: "Sample".into(), fingerprint },
        rope: Rope { kind: 2, freq_base: 10000.0, freq_scale: 1.0 },
        n_layer: layers as u32 + 1,
        tokens: (0..n_prefix).map(|_| random.below(32000) as i32).collect(),
        n_sink: n_sink as u32,
        n_window: n_window as u32,
        build: BuildSettings {
            seed,
            iterations: 10,
            cluster_share: n_cluster as f32 / n as f32,
            chat: "raw".into(),
            cache_types: ["f16".into(), "f16".into()],
            builder: "sample".into(),
        },
        calibration: calibration.to_vec(),
        mass_targets: [0.5f32, 0.9, 0.95]
            .map(|mass| MassTarget { mass, target: mass * mass, kept: mass / 3.0 })
            .to_vec(),
        dense_layers: vec![(layers as u32, "sliding window of 512".into())],
        synthetic: false,
    };

    let layer = |number: usize, random: &mut Random| {
        let rows = n_head_kv * n_cluster;
        let mut offsets = Vec::new();
        let mut members = Vec::new();
        for _ in 0..n_head_kv {
            let runs = random.offsets(n, n_cluster);
            let mut tokens: Vec<u32> = (n_sink as u32..(n_sink + n) as u32).collect();
            random.shuffle(&mut tokens);
            runs.windows(2).for_each(|run| tokens[run[0] as usize..run[1] as usize].sort_unstable());
            offsets.extend(runs);
            members.extend(tokens);
        }
        LayerParts {
            shape: LayerShape {
                layer: number as u32,
                n_head_kv: n_head_kv as u32,
                n_group: 2,
                head_dim_k: dk as u32,
                head_dim_v: dv as u32,
                n_cluster: n_cluster as u32,
                n_coarse: 0,
                scale: 1.0 / (dk as f32).sqrt(),
            },
            centroids: random.halves(rows * dk),
            mean_values: random.halves(rows * dv),
            variances: (0..rows * dk).map(|_| random.next() as u8).collect(),
            variance_scales: (0..rows).map(|_| random.unit().abs()).collect(),
            radii: (0..rows).map(|_| random.unit().abs()).collect(),
            offsets,
            members,
            coarse_centroids: Vec::new(),
            coarse_offsets: Vec::new(),
        }
    };
    let layers: Vec<LayerParts> = (0..layers).map(|number| layer(number, random)).collect();

    let (row_k, row_v) = (n_head_kv * dk, n_head_kv * dv);
    let (k_dims, v_dims) = (random.choose(row_k, row_k.min(8)), random.choose(row_v, row_v.min(8)));
    let runs = |row: usize| row.div_ceil(PEAK_RUN).min(8);
    let mut peaks = |n: usize| -> Vec<f16> { (0..n).map(|_| f16::from_f32(random.unit().abs())).collect() };
    let (k_peaks, v_peaks) = (peaks(n_prefix * runs(row_k)), peaks(n_prefix * runs(row_v)));
    let sketch = SketchParts {
        layer: 0,
        tolerance: SKETCH_TOLERANCE,
        k_block: if dk.is_multiple_of(64) { 64 } else { 0 },
        v_block: if dv.is_multiple_of(64) { 64 } else { 0 },
        k_peaks,
        v_peaks,
        k: random.halves(n_prefix * k_dims.len()),
        v: random.halves(n_prefix * v_dims.len()),
        k_dims,
        v_dims,
    };
    let probe = |layer: &LayerParts| {
        let tokens = random.choose(n_prefix, n_prefix.min(4));
        ProbeParts { layer: layer.shape.layer, k: random.halves(tokens.len() * row_k), tokens }
    };
    let probes = layers.iter().skip(1).map(probe).collect();
    IndexParts { meta, layers, sketch, probes }
}

/// Gives every layer a random coarse level of `n_coarse` clusters.
///
/// # Panics
/// Where `n_coarse` is 0 or more than the fine clusters.
pub fn add_coarse(parts: &mut IndexParts, seed: u64, n_coarse: usize) {
    let random = &mut Random(seed);
    for layer in &mut parts.layers {
        let heads = layer.shape.n_head_kv as usize;
        layer.shape.n_coarse = n_coarse as u32;
        let runs = |_| random.offsets(layer.shape.n_cluster as usize, n_coarse);
        layer.coarse_offsets = (0..heads).flat_map(runs).collect();
        layer.coarse_centroids = layer.view().coarse_means();
    }
}

/// Sets the checksums of a (perhaps hostile) file to what its bytes ask for, so that what lies behind the checksums is
/// reached. False: its header cannot be walked.
pub fn reseal(bytes: &mut [u8]) -> bool {
    super::seal::seal(bytes).is_ok()
}

/// Reads every view of an index to the last element; gives a sum, so that nothing is left out by the compiler.
pub fn touch(index: &super::Index) -> u64 {
    let halves = |x: &[f16]| x.iter().map(|h| u64::from(h.to_bits())).sum::<u64>();
    let words = |x: &[u32]| x.iter().copied().map(u64::from).sum::<u64>();
    let mut sum = index.file_bytes();
    for shape in index.shapes() {
        let Some(layer) = index.layer(shape.layer) else { continue };
        sum += index.layer_bytes(shape.layer);
        sum += halves(layer.centroids) + halves(layer.mean_values) + halves(layer.coarse_centroids);
        sum += words(layer.offsets) + words(layer.coarse_offsets);
        sum += layer.variances.iter().copied().map(u64::from).sum::<u64>();
        sum += layer.radii.iter().chain(layer.variance_scales).map(|x| u64::from(x.to_bits())).sum::<u64>();
        for head in 0..shape.n_head_kv as usize {
            sum += words(layer.head_offsets(head));
            sum += (0..layer.n_clustered()).map(|j| u64::from(layer.member(head, j))).sum::<u64>();
        }
    }
    let sketch = index.sketch();
    sum += words(sketch.k_dims) + words(sketch.v_dims) + halves(sketch.k) + halves(sketch.v);
    sum += halves(sketch.k_peaks) + halves(sketch.v_peaks);
    sum + index.probes().iter().map(|p| words(p.tokens) + halves(p.k)).sum::<u64>()
}

/// The parts that an index would be written from.
///
/// # Panics
/// Never: every layer that an index names is in it.
pub fn owned(index: &super::Index) -> IndexParts {
    let layer = |shape: &LayerShape| {
        let view = index.layer(shape.layer).expect("it names the layer");
        LayerParts {
            shape: *shape,
            centroids: view.centroids.to_vec(),
            mean_values: view.mean_values.to_vec(),
            variances: view.variances.to_vec(),
            variance_scales: view.variance_scales.to_vec(),
            radii: view.radii.to_vec(),
            offsets: view.offsets.to_vec(),
            members: (0..view.members.len()).map(|i| view.members.get(i)).collect(),
            coarse_centroids: view.coarse_centroids.to_vec(),
            coarse_offsets: view.coarse_offsets.to_vec(),
        }
    };
    let sketch = index.sketch();
    let probe = |p: &ProbeView| ProbeParts { layer: p.layer, tokens: p.tokens.to_vec(), k: p.k.to_vec() };
    IndexParts {
        meta: index.meta().clone(),
        layers: index.shapes().iter().map(layer).collect(),
        sketch: SketchParts {
            layer: sketch.layer,
            tolerance: sketch.tolerance,
            k_dims: sketch.k_dims.to_vec(),
            v_dims: sketch.v_dims.to_vec(),
            k: sketch.k.to_vec(),
            v: sketch.v.to_vec(),
            k_block: sketch.k_block,
            v_block: sketch.v_block,
            k_peaks: sketch.k_peaks.to_vec(),
            v_peaks: sketch.v_peaks.to_vec(),
        },
        probes: index.probes().iter().map(probe).collect(),
    }
}

/// Where a file's key values, tensor entries and tensor data lie, as far as its header can be walked.
pub fn fields(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut all = Vec::new();
    let Ok(frame) = Frame::read(bytes) else { return all };
    let mut cursor = Cursor::new(bytes, gguf::KEYS_START);
    for _ in 0..frame.counts.n_kv {
        all.extend(gguf::entry(&mut cursor).map(|entry| entry.value));
    }
    for _ in 0..frame.counts.n_tensor {
        let start = cursor.pos;
        let Ok(info) = gguf::info(&mut cursor) else { return all };
        all.push(start..cursor.pos);
        let size = Type::from_id(info.kind).and_then(|kind| gguf::tensor_bytes(&info.ne, kind));
        let data = (frame.data as u64).checked_add(info.offset).zip(size);
        let end = |(start, size): (u64, u64)| Some(start as usize..usize::try_from(start.checked_add(size)?).ok()?);
        all.extend(data.and_then(end).filter(|range| range.end <= bytes.len()));
    }
    all
}
