//! Attention calls on random data with a valid index, for tests and benches: clustered keys, permuted cells, hidden cells
//! full of NaN.
#![allow(dead_code)]

pub mod check;

use std::sync::Arc;

use ggml_squeeze::attention::cpu::{Memory, Options, Plan, Unsupported};
use ggml_squeeze::attention::*;
use ggml_squeeze::hadamard;
use ggml_squeeze::index::*;
use half::{bf16, f16};

/// Splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
    /// Mean 0, variance 1, bounded.
    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 3.0f32.sqrt()
    }
    pub fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut out: Vec<u32> = (0..n as u32).collect();
        (1..n).rev().for_each(|i| out.swap(i, self.below(i + 1)));
        out
    }
}

/// Size and flavour of a call.
#[derive(Clone, Debug)]
pub struct Spec {
    pub seed: u64,
    pub dk: usize,
    pub dv: usize,
    pub group: usize,
    pub n_head_kv: usize,
    pub n_query: usize,
    pub n_stream: usize,
    pub n_prefix: usize,
    pub n_sink: usize,
    pub n_window: usize,
    /// Cells beside the prefix; a third of them is hidden and holds NaN, if there is a mask.
    pub n_other: usize,
    pub n_cluster: usize,
    /// Coarse clusters (at most as many as fine ones) of the first `coarse_streams` streams' indexes; 0: no coarse level.
    pub n_coarse: usize,
    pub coarse_streams: usize,
    /// The first coarse cluster holds half of the fine ones.
    pub lopsided: bool,
    /// Share of the rows that are sparse.
    pub sparse: f32,
    pub mask: bool,
    pub mask_per_head: bool,
    pub softcap: f32,
    pub sinks: bool,
    pub max_bias: f32,
    pub selection: Selection,
    /// The prefix is in consecutive cells, in order; else anywhere.
    pub contiguous: bool,
    /// Bytes between rows of K and V that belong to nothing, a multiple of 4.
    pub gap: usize,
    /// Heads outermost in K and V, instead of all heads of a cell together.
    pub head_major: bool,
    /// Sparse rows see all cells but the hidden ones with mask 0, and so do dense ones.
    pub plain_mask: bool,
    pub k_type: Element,
    pub v_type: Element,
    /// The cache is rotated, the index is not.
    pub rotation: Rotation,
    /// Rows that share a selection, at most.
    pub tile: usize,
}

impl Spec {
    pub fn base() -> Spec {
        Spec {
            seed: 1,
            dk: 64,
            dv: 64,
            group: 3,
            n_head_kv: 2,
            n_query: 2,
            n_stream: 1,
            n_prefix: 300,
            n_sink: 4,
            n_window: 20,
            n_other: 30,
            n_cluster: 20,
            n_coarse: 0,
            coarse_streams: usize::MAX,
            lopsided: false,
            sparse: 1.0,
            mask: true,
            mask_per_head: false,
            softcap: 0.0,
            sinks: false,
            max_bias: 0.0,
            selection: Selection {
                mode: Mode::Budget(0.2),
                spread: Spread::Diag,
                alpha: 2.0,
                estimate: false,
                coarse_share: 1.0,
            },
            contiguous: false,
            gap: 0,
            head_major: false,
            plain_mask: false,
            k_type: Element::F16,
            v_type: Element::F16,
            rotation: Rotation::default(),
            tile: 1,
        }
    }
}

/// Appends a row of numbers, in whole blocks, as a cache holds them.
pub fn encode(element: Element, row: &[f32], out: &mut Vec<u8>) {
    for block in row.chunks_exact(element.block()) {
        let largest = block.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
        let scaled = |d: f32| if d == 0.0 { 0.0 } else { 1.0 / d };
        match element {
            Element::F32 => out.extend(block[0].to_le_bytes()),
            Element::F16 => out.extend(f16::from_f32(block[0]).to_le_bytes()),
            Element::BF16 => out.extend(bf16::from_f32(block[0]).to_le_bytes()),
            Element::Q8_0 => {
                let d = largest.abs() / 127.0;
                out.extend(f16::from_f32(d).to_le_bytes());
                out.extend(block.iter().map(|x| (x * scaled(d)).round() as i8 as u8));
            }
            Element::Q4_0 => {
                let d = largest / -8.0;
                out.extend(f16::from_f32(d).to_le_bytes());
                let half = |x: f32| (x * scaled(d) + 8.5).clamp(0.0, 15.0) as u8;
                out.extend((0..16).map(|i| half(block[i]) | half(block[i + 16]) << 4));
            }
        }
    }
}

/// The numbers of a row as a cache holds it.
pub fn decode(element: Element, row: &[u8]) -> Vec<f32> {
    let two = |b: &[u8]| [b[0], b[1]];
    let one = |b: &[u8]| -> Vec<f32> {
        let d = f16::from_le_bytes(two(b)).to_f32();
        match element {
            Element::F32 => vec![f32::from_le_bytes([b[0], b[1], b[2], b[3]])],
            Element::F16 => vec![d],
            Element::BF16 => vec![bf16::from_le_bytes(two(b)).to_f32()],
            Element::Q8_0 => b[2..].iter().map(|q| d * *q as i8 as f32).collect(),
            Element::Q4_0 => {
                let (low, high) = (b[2..].iter().map(|q| q & 15), b[2..].iter().map(|q| q >> 4));
                low.chain(high).map(|q| d * (q as f32 - 8.0)).collect()
            }
        }
    };
    row.chunks_exact(element.block_bytes()).flat_map(one).collect()
}

/// K or V of all streams.
struct Cache {
    element: Element,
    d: usize,
    rotation: usize,
    nb: [usize; 4],
    bytes: Vec<u8>,
}

impl Cache {
    fn new(spec: &Spec, element: Element, d: usize, rotation: usize) -> Cache {
        let (n_kv, heads, row) = (spec.n_prefix + spec.n_other, spec.n_head_kv, element.row_bytes(d));
        let step = element.block_bytes();
        let nb = match spec.head_major {
            true => [step, row + spec.gap, (row + spec.gap) * n_kv, (row + spec.gap) * n_kv * heads],
            false => [step, row * heads + spec.gap, row, (row * heads + spec.gap) * n_kv],
        };
        // NaN in every type, where nothing may be read.
        Cache { element, d, rotation, nb, bytes: vec![0xff; nb[3] * spec.n_stream] }
    }

    fn row(&mut self, [cell, head, stream]: [usize; 3]) -> &mut [u8] {
        let at = cell * self.nb[1] + head * self.nb[2] + stream * self.nb[3];
        &mut self.bytes[at..at + self.element.row_bytes(self.d)]
    }

    /// Stores a row given in the plain basis.
    fn store(&mut self, at: [usize; 3], mut row: Vec<f32>) {
        hadamard::rotate(&mut row, self.rotation);
        let mut bytes = Vec::new();
        encode(self.element, &row, &mut bytes);
        self.row(at).copy_from_slice(&bytes);
    }

    /// What a row holds, in the plain basis.
    fn load(&mut self, at: [usize; 3]) -> Vec<f32> {
        let mut row = decode(self.element, self.row(at));
        hadamard::rotate(&mut row, self.rotation);
        row
    }
}

/// A call and the memory behind it.
pub struct Case {
    pub call: Call,
    /// What the bindings' indexes are made of.
    pub parts: Vec<IndexParts>,
    pub q: Vec<f32>,
    /// As `k_type` and `v_type` say.
    pub k: Vec<u8>,
    pub v: Vec<u8>,
    pub mask: Vec<f16>,
    pub sinks: Vec<f32>,
    pub dst: Vec<f32>,
}

pub const LAYER: u32 = 3;

pub fn index_of(parts: IndexParts) -> Arc<Index> {
    Arc::new(Index::from_bytes(to_bytes(&parts).expect("valid parts")).expect("what was just written"))
}

/// Clusters the given prefix `[n_head_kv][P][d]` at random and states the truth about the clusters.
fn layer_parts(spec: &Spec, r: &mut Random, n_cluster: usize, keys: &[f16], values: &[f16]) -> LayerParts {
    let Spec { dk, dv, n_head_kv, n_prefix, n_sink, n_window, .. } = *spec;
    let n = n_prefix - n_sink - n_window;
    let shape = LayerShape {
        layer: LAYER,
        n_head_kv: n_head_kv as u32,
        n_group: spec.group as u32,
        head_dim_k: dk as u32,
        head_dim_v: dv as u32,
        n_cluster: n_cluster as u32,
        n_coarse: 0,
        scale: 1.0 / (dk as f32).sqrt(),
    };
    let mut out = LayerParts {
        shape,
        centroids: Vec::new(),
        mean_values: Vec::new(),
        variances: Vec::new(),
        variance_scales: Vec::new(),
        radii: Vec::new(),
        offsets: Vec::new(),
        members: Vec::new(),
        coarse_centroids: Vec::new(),
        coarse_offsets: Vec::new(),
    };
    for h in 0..n_head_kv {
        let mut clusters = vec![Vec::new(); n_cluster];
        for (i, token) in r.shuffled(n).into_iter().enumerate() {
            let c = if i < n_cluster { i } else { r.below(n_cluster) };
            clusters[c].push(token + n_sink as u32);
        }
        out.offsets.push(0);
        let start = out.members.len();
        for cluster in &mut clusters {
            cluster.sort_unstable();
            let mean = |rows: &[f16], d: usize, i: usize| {
                let at = |t: &u32| rows[(h * n_prefix + *t as usize) * d + i].to_f32();
                let mean = cluster.iter().map(at).sum::<f32>() / cluster.len() as f32;
                let var = cluster.iter().map(|t| (at(t) - mean).powi(2)).sum::<f32>() / cluster.len() as f32;
                (f16::from_f32(mean), var)
            };
            let moments: Vec<(f16, f32)> = (0..dk).map(|i| mean(keys, dk, i)).collect();
            let top = moments.iter().fold(0.0f32, |m, v| m.max(v.1));
            let scale = if top > 0.0 { top / 255.0 } else { 1.0 };
            out.centroids.extend(moments.iter().map(|m| m.0));
            out.variances.extend(moments.iter().map(|m| (m.1 / scale).round() as u8));
            out.variance_scales.push(scale);
            out.radii.push((moments.iter().map(|m| m.1).sum::<f32>() / dk as f32).sqrt());
            out.mean_values.extend((0..dv).map(|i| mean(values, dv, i).0));
            out.members.extend(cluster.iter());
            out.offsets.push((out.members.len() - start) as u32);
        }
    }
    out
}

/// Puts runs of fine clusters together.
fn add_coarse(spec: &Spec, r: &mut Random, layer: &mut LayerParts) {
    let n_cluster = layer.shape.n_cluster as usize;
    let n_coarse = spec.n_coarse.min(n_cluster);
    layer.shape.n_coarse = n_coarse as u32;
    for _ in 0..spec.n_head_kv {
        let first = if spec.lopsided && n_coarse > 1 { (n_cluster / 2).clamp(1, n_cluster - n_coarse + 1) } else { 1 };
        let mut cuts: Vec<u32> = r.shuffled(n_cluster - first).into_iter().map(|i| i + first as u32).collect();
        if n_coarse > 1 {
            cuts.retain(|i| *i != first as u32);
            cuts.truncate(n_coarse - 2);
            cuts.push(first as u32);
        } else {
            cuts.clear();
        }
        cuts.sort_unstable();
        layer.coarse_offsets.extend([0].into_iter().chain(cuts).chain([n_cluster as u32]));
    }
    layer.coarse_centroids = layer.view().coarse_means();
}

fn index_parts(spec: &Spec, r: &mut Random, n_cluster: usize, keys: &[f16], values: &[f16]) -> IndexParts {
    let meta = IndexMeta {
        model: ModelId { architecture: "llama".into(), name: "test".into(), fingerprint: [7; 32] },
        rope: Rope { kind: 0, freq_base: 10000.0, freq_scale: 1.0 },
        n_layer: LAYER + 1,
        tokens: (0..spec.n_prefix as i32).collect(),
        n_sink: spec.n_sink as u32,
        n_window: spec.n_window as u32,
        build: BuildSettings {
            seed: spec.seed,
            iterations: 1,
            cluster_share: 0.05,
            chat: "raw".into(),
            cache_types: ["f16".into(), "f16".into()],
            builder: "test".into(),
        },
        calibration: Vec::new(),
        mass_targets: Vec::new(),
        dense_layers: vec![(0, "test".into())],
        synthetic: false,
    };
    let dims: Vec<u32> = (0..8).collect();
    let sketch = |rows: &[f16], d: usize| (0..spec.n_prefix).flat_map(|t| rows[t * d..t * d + 8].to_vec()).collect();
    IndexParts {
        layers: vec![layer_parts(spec, r, n_cluster, keys, values)],
        sketch: SketchParts {
            layer: LAYER,
            tolerance: SKETCH_TOLERANCE,
            k_dims: dims.clone(),
            v_dims: dims,
            k: sketch(keys, spec.dk),
            v: sketch(values, spec.dv),
            k_peaks: vec![f16::ONE; spec.n_prefix],
            v_peaks: vec![f16::ONE; spec.n_prefix],
            ..SketchParts::default()
        },
        probes: Vec::new(),
        meta,
    }
}

impl Case {
    pub fn new(spec: &Spec) -> Case {
        let Spec { dk, dv, group, n_head_kv, n_query, n_stream, n_prefix, n_sink, n_window, .. } = *spec;
        let r = &mut Random(spec.seed);
        let (n_kv, n_head) = (n_prefix + spec.n_other, group * n_head_kv);
        let mut k = Cache::new(spec, spec.k_type, dk, spec.rotation.k);
        let mut v = Cache::new(spec, spec.v_type, dv, spec.rotation.v);
        let mut mask = vec![f16::ZERO; if spec.mask { n_stream * n_head * n_query * n_kv } else { 0 }];
        let mask_heads = if spec.mask_per_head { n_head } else { 1 };
        let rows: Vec<Row> = (0..n_stream * n_query)
            .map(|row| if r.unit() < spec.sparse { Row::Sparse((row / n_query) as u32) } else { Row::Dense })
            .collect();
        let (mut bindings, mut all_parts) = (Vec::new(), Vec::new());
        for s in 0..n_stream {
            let mut place = r.shuffled(n_kv);
            if spec.contiguous {
                let first = r.below(spec.n_other + 1);
                place = (first..n_kv).chain(0..first).map(|cell| cell as u32).collect();
            }
            let (cells, others) = place.split_at(n_prefix);
            let hidden: &[u32] = if spec.mask { &others[..others.len() / 3] } else { &[] };
            for cache in [&mut k, &mut v] {
                for (h, cell) in (0..n_head_kv).flat_map(|h| (0..n_kv).map(move |cell| (h, cell))) {
                    let center = 0.5 * r.normal();
                    let row = (0..cache.d).map(|_| r.normal() + center).collect();
                    match hidden.contains(&(cell as u32)) {
                        // NaN in every type, as a number or as a scale.
                        true => cache.row([cell, h, s]).fill(0xff),
                        false => cache.store([cell, h, s], row),
                    }
                }
            }
            let prefix = |cache: &mut Cache| -> Vec<f16> {
                let mut out = Vec::new();
                for (h, cell) in (0..n_head_kv).flat_map(|h| cells.iter().map(move |cell| (h, *cell as usize))) {
                    out.extend(cache.load([cell, h, s]).into_iter().map(f16::from_f32));
                }
                out
            };
            let (keys, values) = (prefix(&mut k), prefix(&mut v));
            let n_cluster = (spec.n_cluster + s).min(n_prefix - n_sink - n_window);
            let mut parts = index_parts(spec, r, n_cluster, &keys, &values);
            if spec.n_coarse > 0 && s < spec.coarse_streams {
                add_coarse(spec, r, &mut parts.layers[0]);
            }
            let index = index_of(parts.clone());
            all_parts.push(parts);
            let clustered = &cells[n_sink..n_prefix - n_window];
            let mut bound = vec![false; n_kv];
            cells[..n_sink].iter().chain(clustered).for_each(|c| bound[*c as usize] = true);
            let tail = (0..n_kv as u32).filter(|c| !bound[*c as usize]);
            let always = cells[..n_sink].iter().copied().chain(tail).collect();
            bindings.push(Binding { index, cells: cells.into(), always });

            let mut is_prefix = vec![false; n_kv];
            cells.iter().for_each(|c| is_prefix[*c as usize] = true);
            for (h, query) in (0..mask_heads).flat_map(|h| (0..n_query).map(move |q| (h, q))) {
                if !spec.mask {
                    break;
                }
                let at = ((s * mask_heads + h) * n_query + query) * n_kv;
                let row = &mut mask[at..at + n_kv];
                let sparse = rows[s * n_query + query] != Row::Dense;
                for (cell, m) in row.iter_mut().enumerate() {
                    if spec.plain_mask || (sparse && is_prefix[cell]) {
                        continue;
                    }
                    *m = match r.below(4) {
                        0 => f16::NEG_INFINITY,
                        1 => f16::from_f32(-2.0 * r.unit()),
                        _ => f16::ZERO,
                    };
                }
                hidden.iter().for_each(|c| row[*c as usize] = f16::NEG_INFINITY);
                if !sparse && !spec.plain_mask && r.below(8) == 0 {
                    row.fill(f16::NEG_INFINITY);
                }
            }
        }
        let mut q: Vec<f32> = (0..n_stream * n_query * n_head * dk).map(|_| 1.5 * r.normal()).collect();
        let mut dst = vec![f32::NAN; n_stream * n_query * n_head * dv];
        let sinks: Vec<f32> = (0..n_head).map(|_| 2.0 * r.normal()).collect();
        let scale = 1.0 / (dk as f32).sqrt();
        let array = |data: *mut u8, ne, nb| Array { data, ne, nb };
        let packed = |d: usize, a: usize, b: usize, size: usize| [size, size * d, size * d * a, size * d * a * b];
        let q_nb = [4, 4 * dk * n_head, 4 * dk, 4 * dk * n_head * n_query];
        let problem = Problem {
            q: array(q.as_mut_ptr().cast(), [dk, n_query, n_head, n_stream], q_nb),
            k: array(k.bytes.as_mut_ptr(), [dk, n_kv, n_head_kv, n_stream], k.nb),
            v: array(v.bytes.as_mut_ptr(), [dv, n_kv, n_head_kv, n_stream], v.nb),
            k_type: spec.k_type,
            v_type: spec.v_type,
            mask: spec.mask.then(|| {
                let nb = packed(n_kv, n_query, mask_heads, 2);
                array(mask.as_mut_ptr().cast(), [n_kv, n_query, mask_heads, n_stream], nb)
            }),
            sinks: spec.sinks.then_some(sinks.as_ptr()),
            dst: array(dst.as_mut_ptr().cast(), [dv, n_head, n_query, n_stream], packed(dv, n_head, n_query, 4)),
            scale: if spec.softcap == 0.0 { scale } else { scale / spec.softcap },
            max_bias: spec.max_bias,
            softcap: spec.softcap,
        };
        let tiles: Vec<_> = runs(&rows, n_query).into_iter().flat_map(|run| cut(run, spec.tile)).collect();
        let selection = spec.selection;
        let call = Call {
            problem,
            layer: LAYER,
            rows: rows.into(),
            bindings: bindings.into(),
            selection,
            rotation: spec.rotation,
            tiles: tiles.into(),
        };
        Case { call, parts: all_parts, q, k: k.bytes, v: v.bytes, mask, sinks, dst }
    }

    pub fn plan(&self, planned: usize, options: Options) -> Result<Plan, Unsupported> {
        Plan::with_options(self.call.clone(), planned, &mut Memory::default(), options)
    }

    /// Runs a plan on `nth` threads and returns what was written.
    pub fn run(&mut self, plan: &Plan, nth: usize) -> Vec<f32> {
        self.dst.fill(f32::NAN);
        std::thread::scope(|scope| {
            // SAFETY: the arrays belong to this case; each plan of a case has memory of its own.
            let threads: Vec<_> = (0..nth).map(|ith| scope.spawn(move || unsafe { plan.run(ith, nth) })).collect();
            // The scope's own end does not wait for what threads leave behind, which the leak checker may then see.
            threads.into_iter().for_each(|thread| thread.join().expect("a plan does not panic"));
        });
        // Read through the call's own address: the plan wrote there.
        let at = self.call.problem.dst.data.cast::<f32>();
        // SAFETY: `dst` has that many elements.
        (0..self.dst.len()).map(|i| unsafe { at.add(i).read() }).collect()
    }
}
