//! Indexes with a structure: valid ones of any shape, whose parts, header fields and tensor data are then falsified, with checksums
//! that agree. What the reader still takes must be safe to compute with: attention runs over it on every code path.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use ggml_squeeze::attention::cpu::{Memory, Options, Path, Plan, Schedule, HEAD_DIM_MIN};
use ggml_squeeze::attention::{Array, Binding, Call, Element, Mode, Problem, Rotation, Row, Selection, Spread};
use ggml_squeeze::index::sample::{add_coarse, fields, owned, reseal, sample_parts, touch};
use ggml_squeeze::index::{to_bytes, Index, IndexParts, LayerShape};
use half::f16;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    seed: u64,
    n_prefix: u8,
    layers: u8,
    heads: u8,
    dk: u8,
    dv: u8,
    clusters: u8,
    coarse: u8,
    parts: Vec<PartsEdit>,
    file: Vec<FileEdit>,
}

/// What a careless builder could get wrong.
#[derive(Arbitrary, Debug)]
enum PartsEdit {
    Sinks(u32),
    Window(u32),
    Token(u8, i32),
    Shape {
        layer: u8,
        field: u8,
        value: u32,
    },
    Scale(u8, f32),
    /// A list of a layer gets longer (true) or shorter, or one of its elements another value.
    Resize {
        layer: u8,
        list: u8,
        longer: bool,
    },
    Element {
        layer: u8,
        list: u8,
        at: u8,
        bits: u32,
    },
    Sketch {
        field: u8,
        value: u32,
    },
    Tolerance(f32),
    Calibration {
        row: u8,
        field: u8,
        value: f32,
    },
    Mass {
        row: u8,
        field: u8,
        value: f32,
    },
    Text(u8, String),
}

/// What a hostile file could say.
#[derive(Arbitrary, Debug)]
enum FileEdit {
    /// A key's value, a tensor entry or tensor data, from its start on.
    Field {
        field: u8,
        at: u8,
        value: Value,
    },
    Anywhere {
        at: u16,
        value: Value,
    },
    Cut {
        at: u16,
        n: u8,
    },
    Double {
        at: u16,
        n: u8,
    },
}

#[derive(Arbitrary, Debug)]
enum Value {
    Byte(u8),
    Edge(u8),
    Word(u32),
    Long(u64),
    Float(f32),
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        const EDGES: [u64; 8] = [0, 1, 2, 1 << 16, 1 << 32, i64::MAX as u64, u64::MAX, u32::MAX as u64];
        match self {
            Value::Byte(x) => vec![*x],
            Value::Edge(i) => EDGES[*i as usize % EDGES.len()].to_le_bytes().to_vec(),
            Value::Word(x) => x.to_le_bytes().to_vec(),
            Value::Long(x) => x.to_le_bytes().to_vec(),
            Value::Float(x) => x.to_le_bytes().to_vec(),
        }
    }
}

fn resize<T: Default>(list: &mut Vec<T>, longer: bool) {
    match longer {
        true => list.push(T::default()),
        false => drop(list.pop()),
    }
}

fn set<T>(list: &mut [T], at: u8, value: T) {
    if let Some(last) = list.len().checked_sub(1) {
        list[(at as usize).min(last)] = value;
    }
}

impl PartsEdit {
    fn apply(&self, parts: &mut IndexParts) {
        let n_layer = parts.layers.len();
        match *self {
            PartsEdit::Sinks(n) => parts.meta.n_sink = n,
            PartsEdit::Window(n) => parts.meta.n_window = n,
            PartsEdit::Token(at, token) => set(&mut parts.meta.tokens, at, token),
            PartsEdit::Shape { layer, field, value } => {
                let s = &mut parts.layers[layer as usize % n_layer].shape;
                let fields = [
                    &mut s.layer,
                    &mut s.n_head_kv,
                    &mut s.n_group,
                    &mut s.head_dim_k,
                    &mut s.head_dim_v,
                    &mut s.n_cluster,
                    &mut s.n_coarse,
                ];
                let n = fields.len();
                *fields.into_iter().nth(field as usize % n).unwrap() = value;
            }
            PartsEdit::Scale(layer, scale) => parts.layers[layer as usize % n_layer].shape.scale = scale,
            PartsEdit::Resize { layer, list, longer } => {
                let l = &mut parts.layers[layer as usize % n_layer];
                match list % 9 {
                    0 => resize(&mut l.centroids, longer),
                    1 => resize(&mut l.mean_values, longer),
                    2 => resize(&mut l.variances, longer),
                    3 => resize(&mut l.variance_scales, longer),
                    4 => resize(&mut l.radii, longer),
                    5 => resize(&mut l.offsets, longer),
                    6 => resize(&mut l.members, longer),
                    7 => resize(&mut l.coarse_offsets, longer),
                    _ => resize(&mut l.coarse_centroids, longer),
                }
            }
            PartsEdit::Element { layer, list, at, bits } => {
                let l = &mut parts.layers[layer as usize % n_layer];
                match list % 6 {
                    0 => set(&mut l.centroids, at, f16::from_bits(bits as u16)),
                    1 => set(&mut l.mean_values, at, f16::from_bits(bits as u16)),
                    2 => set(&mut l.radii, at, f32::from_bits(bits)),
                    3 => set(&mut l.offsets, at, bits),
                    4 => set(&mut l.members, at, bits),
                    _ => set(&mut l.coarse_offsets, at, bits),
                }
            }
            PartsEdit::Sketch { field, value } => {
                let s = &mut parts.sketch;
                match field % 7 {
                    0 => s.layer = value,
                    1 => s.k_block = value,
                    2 => s.v_block = value,
                    3 => set(&mut s.k_dims, value as u8, value >> 8),
                    4 => set(&mut s.v_dims, value as u8, value >> 8),
                    5 => set(&mut s.k, value as u8, f16::from_bits((value >> 8) as u16)),
                    _ => set(&mut s.k_peaks, value as u8, f16::from_bits((value >> 8) as u16)),
                }
            }
            PartsEdit::Tolerance(x) => parts.sketch.tolerance = x,
            PartsEdit::Calibration { row, field, value } => {
                let n = parts.meta.calibration.len();
                let c = &mut parts.meta.calibration[row as usize % n];
                match field % 5 {
                    0 => c.budget = value,
                    1 => c.threshold = value,
                    2 => c.kept = value,
                    3 => c.mass = value,
                    _ => c.heads[0].budget_mass = value,
                }
            }
            PartsEdit::Mass { row, field, value } => {
                let n = parts.meta.mass_targets.len();
                let m = &mut parts.meta.mass_targets[row as usize % n];
                *[&mut m.mass, &mut m.target, &mut m.kept].into_iter().nth(field as usize % 3).unwrap() = value;
            }
            PartsEdit::Text(field, ref text) => {
                let meta = &mut parts.meta;
                let fields = [&mut meta.model.name, &mut meta.model.architecture, &mut meta.build.chat];
                *fields.into_iter().nth(field as usize % 3).unwrap() = text.clone();
            }
        }
    }
}

/// Overwrites as much as there is.
fn put(bytes: &mut [u8], at: usize, value: &Value) {
    bytes.iter_mut().skip(at).zip(value.bytes()).for_each(|(to, from)| *to = from);
}

impl FileEdit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let end = bytes.len();
        let place = |at: u16| at as usize % end.max(1);
        match self {
            FileEdit::Field { field, at, value } => {
                let all = fields(bytes);
                if let Some(range) = all.get(*field as usize % all.len().max(1)).filter(|range| !range.is_empty()) {
                    put(bytes, range.start + *at as usize % range.len(), value);
                }
            }
            FileEdit::Anywhere { at, value } => put(bytes, place(*at), value),
            FileEdit::Cut { at, n } => {
                let at = place(*at);
                drop(bytes.drain(at..(at + *n as usize).min(end)));
            }
            FileEdit::Double { at, n } => {
                let at = place(*at);
                let copy = bytes[at..(at + *n as usize).min(end)].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

/// Attention with one query over made-up keys, through the index.
fn compute(index: &Arc<Index>, shape: &LayerShape) {
    let [dk, dv, heads, group] =
        [shape.head_dim_k, shape.head_dim_v, shape.n_head_kv, shape.n_group].map(|n| n as usize);
    let meta = index.meta();
    let (n_prefix, n_kv) = (meta.n_prefix(), meta.n_prefix() + 5);
    if [dk, dv].iter().any(|d| !(HEAD_DIM_MIN..=128).contains(d) || d % 8 != 0) || heads * group > 16 {
        return;
    }
    let noise =
        |n: usize| -> Vec<f16> { (0..n).map(|i| f16::from_f32((i * 7919 % 1013) as f32 / 500.0 - 1.0)).collect() };
    let (mut k, mut v) = (noise(heads * n_kv * dk), noise(heads * n_kv * dv));
    let mut q = vec![0.5f32; heads * group * dk];
    let mut dst = vec![f32::NAN; heads * group * dv];
    let packed = |size: usize, ne: [usize; 4]| [size, size * ne[0], size * ne[0] * ne[1], size * ne[0] * ne[1] * ne[2]];
    let array = |data: *mut u8, size, ne| Array { data, ne, nb: packed(size, ne) };
    let problem = Problem {
        q: array(q.as_mut_ptr().cast(), 4, [dk, 1, heads * group, 1]),
        k: array(k.as_mut_ptr().cast(), 2, [dk, n_kv, heads, 1]),
        v: array(v.as_mut_ptr().cast(), 2, [dv, n_kv, heads, 1]),
        k_type: Element::F16,
        v_type: Element::F16,
        mask: None,
        sinks: None,
        dst: array(dst.as_mut_ptr().cast(), 4, [dv, heads * group, 1, 1]),
        scale: shape.scale.min(1.0),
        max_bias: 0.0,
        softcap: 0.0,
    };
    let tail = n_prefix as u32 - meta.n_window..n_kv as u32;
    let binding = Binding {
        index: index.clone(),
        cells: (0..n_prefix as u32).collect(),
        always: (0..meta.n_sink).chain(tail).collect(),
    };
    let bindings: Arc<[Binding]> = [binding].into();
    for (path, schedule) in
        Path::available().into_iter().flat_map(|p| [Schedule::Split, Schedule::Fused].map(|s| (p, s)))
    {
        for (spread, estimate) in [(Spread::Diag, true), (Spread::Radius, false)] {
            let mode = if estimate { Mode::Budget(0.3) } else { Mode::Mass(0.5) };
            let selection = Selection { mode, spread, alpha: 2.0, estimate, coarse_share: 1.0 };
            let call = Call {
                problem,
                layer: shape.layer,
                rows: [Row::Sparse(0)].into(),
                bindings: bindings.clone(),
                selection,
                rotation: Rotation::default(),
                tiles: [].into(),
            };
            let options = Options { path: Some(path), schedule: Some(schedule) };
            let plan = Plan::with_options(call, 1, &mut Memory::default(), options).expect("the shapes fit");
            // SAFETY: the arrays have the extents that the call says; one thread is all threads.
            unsafe { plan.run(0, 1) };
        }
    }
}

fuzz_target!(|input: Input| {
    let of = |x: u8, least: usize, most: usize| least + x as usize % (most - least + 1);
    let n_prefix = of(input.n_prefix, 8, 90);
    let clustered = n_prefix - 2 * (n_prefix / 8).min(16);
    let n_cluster = of(input.clusters, 1, clustered.min(20));
    let dims = |x: u8| [1, 4, 64, 72, 32, 3, 128, 80][x as usize % 8];
    let (dk, dv) = (dims(input.dk), dims(input.dv));
    let mut parts =
        sample_parts(input.seed, n_prefix, of(input.layers, 1, 3), of(input.heads, 1, 3), dk, dv, n_cluster);
    if input.coarse % 2 == 1 {
        add_coarse(&mut parts, input.seed, of(input.coarse / 2, 1, n_cluster));
    }
    input.parts.iter().for_each(|edit| edit.apply(&mut parts));
    let Ok(mut bytes) = to_bytes(&parts) else { return };
    let index = Index::from_slice(&bytes).expect("what the writer takes, the reader takes");
    // A NaN is refused, so equality holds.
    assert!(owned(&index) == parts, "another index than the one that was written");

    input.file.iter().for_each(|edit| edit.apply(&mut bytes));
    reseal(&mut bytes);
    let Ok(index) = Index::from_slice(&bytes) else { return };
    touch(&index);
    assert!(to_bytes(&owned(&index)).expect("the reader took it") == bytes);
    let index = Arc::new(index);
    index.shapes().iter().for_each(|shape| compute(&index, shape));
});
