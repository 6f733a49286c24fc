//! Microseconds of one decode or prefill call on an NVIDIA GPU, in captured graphs: dense (our attend over all keys), the whole sparse call,
//! each stage, bytes moved and the share of the card's copy bandwidth. One JSON object per line on stdout; scripts/bench-cuda.py
//! adds PyTorch's dense attention and makes the table.
//!
//! `cargo bench --bench cuda -- HEADS/KV_HEADSxD@PREFIX ROWS BUDGET [radius|diag|none] [estimate] [coarse=SHARE] [unwatched] [cold]
//! [TYPE] [tile=N] [portable]`, each further call after a comma of its own. TYPE: that of K and V, `f16`, `bf16`, `q8_0` or `q4_0`;
//! quantised rows are turned as llama.cpp does. `coarse`: with a coarse level (1 % of the keys) that opens this share of them.
//! `unwatched`: without the check of sampled rows. `cold`: before each call as many bytes are written as the weights of a layer
//! have, which leaves nothing in the L2 cache, instructions included; what that takes is subtracted. More than 16 rows are a
//! prefill, in tiles of N (128), by the kernels for every GPU if `portable`; its lookup is all before select, and it has TFLOP/s.

use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use ggml_squeeze::attention::cuda::{
    Attention, Bound, Buffer, Call, Device, Prefill, PrefillCall, Resident, Workspace, MAX_ROWS, PREFILL_STAGES, STAGES,
};
use ggml_squeeze::attention::{Array, Element, Mode, Problem, Rotation, Selection, Spread};
use ggml_squeeze::index::*;
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

const SINKS: usize = 16;
const WINDOW: usize = 100;
/// Calls of one graph at least: what a graph costs at its start is then little.
const CALLS: usize = 8;
/// Touched by one replay at least, in different places: more than the L2 cache holds, several times.
const ROTATE: usize = 400 << 20;
/// Written before each call where caches are to be cold.
const WEIGHTS: usize = 140 << 20;

struct Shape {
    n_head: usize,
    n_head_kv: usize,
    d: usize,
    n_prefix: usize,
    n_row: usize,
    budget: f32,
    spread: Spread,
    estimate: bool,
    coarse_share: f32,
    watched: bool,
    cold: bool,
    element: Element,
    tile: usize,
    portable: bool,
}

fn parse(text: &str) -> Option<Shape> {
    let mut words = text.split_whitespace();
    let (heads, n_prefix) = words.next()?.split_once('@')?;
    let (heads, d) = heads.split_once('x')?;
    let (n_head, n_head_kv) = heads.split_once('/')?;
    let (n_row, budget) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let rest: Vec<&str> = words.collect();
    let spread = match () {
        () if rest.contains(&"diag") => Spread::Diag,
        () if rest.contains(&"none") => Spread::None,
        () => Spread::Radius,
    };
    Some(Shape {
        n_head: n_head.parse().ok()?,
        n_head_kv: n_head_kv.parse().ok()?,
        d: d.parse().ok()?,
        n_prefix: n_prefix.parse().ok()?,
        n_row,
        budget,
        spread,
        estimate: rest.contains(&"estimate"),
        coarse_share: rest.iter().find_map(|w| w.strip_prefix("coarse=")).map_or(Some(1.0), |w| w.parse().ok())?,
        watched: !rest.contains(&"unwatched"),
        cold: rest.contains(&"cold"),
        element: Element::ALL.into_iter().find(|e| rest.contains(&e.name())).unwrap_or(Element::F16),
        tile: rest.iter().find_map(|w| w.strip_prefix("tile=")).map_or(Some(128), |w| w.parse().ok())?,
        portable: rest.contains(&"portable"),
    })
}

/// A call that is ready to be put on a stream.
enum Ready {
    Decode(Box<Attention>),
    Prefill(Box<Prefill>),
}

impl Ready {
    fn new(device: &Arc<Device>, s: &Shape, calls: &[Call<'_>]) -> (Vec<Ready>, Workspace) {
        if s.n_row <= MAX_ROWS {
            let workspace = Workspace::for_calls(device, &calls.iter().collect::<Vec<_>>()).expect("a workspace");
            let made = calls.iter().map(|c| Attention::new(device, c, &workspace).expect("a supported call"));
            return (made.map(|a| Ready::Decode(Box::new(a))).collect(), workspace);
        }
        fn many<'a>(call: &Call<'a>, s: &Shape) -> PrefillCall<'a> {
            PrefillCall { call: *call, tile: s.tile, portable: s.portable, slots: 0 }
        }
        let bytes = calls.iter().map(|c| Prefill::bytes_for(device, &many(c, s)).expect("a supported call")).max();
        let workspace = Workspace::of_bytes(device, bytes.unwrap_or(0)).expect("a workspace");
        let made = calls.iter().map(|c| Prefill::new(device, &many(c, s), &workspace).expect("a supported call"));
        (made.map(|p| Ready::Prefill(Box::new(p))).collect(), workspace)
    }

    fn n_stage(&self) -> usize {
        match self {
            Ready::Decode(_) => STAGES.len(),
            Ready::Prefill(_) => PREFILL_STAGES.len(),
        }
    }

    /// The whole call, or a stage of it.
    ///
    /// # Safety
    /// As for the call's own.
    unsafe fn launch(&self, stage: Option<usize>, stream: sys::CUstream) {
        // SAFETY: the same contract.
        let done = unsafe {
            match (self, stage) {
                (Ready::Decode(a), None) => a.launch(stream),
                (Ready::Decode(a), Some(stage)) => a.launch_stage(stage, stream, true),
                (Ready::Prefill(p), None) => p.launch(stream),
                (Ready::Prefill(p), Some(stage)) => p.launch_stage(stage, stream),
            }
        };
        done.expect("a launch");
    }
}

fn normal(r: &mut SmallRng) -> f32 {
    (0..4).map(|_| r.random::<f32>() - 0.5).sum::<f32>() * 3.0f32.sqrt()
}

fn normals(seed: u64, n: usize) -> Vec<f16> {
    let part = |i: usize| {
        let mut r = SmallRng::seed_from_u64(seed + i as u64);
        (0..65536.min(n - i * 65536)).map(move |_| f16::from_f32(normal(&mut r))).collect::<Vec<_>>()
    };
    (0..n.div_ceil(65536)).into_par_iter().flat_map_iter(part).collect()
}

/// Random clusters of random sizes with members from anywhere: an index of the right shape, whose scores mean nothing.
fn index_bytes(s: &Shape) -> Vec<u8> {
    let n = s.n_prefix - SINKS - WINDOW;
    let n_cluster = n / 20;
    let n_coarse = n / 100;
    let cut = |r: &mut SmallRng, n: usize, parts: usize| -> Vec<u32> {
        let mut cuts = rand::seq::index::sample(r, n - 1, parts - 1).into_vec();
        cuts.sort_unstable();
        std::iter::once(0).chain(cuts.into_iter().map(|c| c as u32 + 1)).chain([n as u32]).collect()
    };
    let heads: Vec<(Vec<u32>, Vec<u32>)> = (0..s.n_head_kv)
        .into_par_iter()
        .map(|h| {
            let mut r = SmallRng::seed_from_u64(h as u64);
            let mut members: Vec<u32> = (SINKS as u32..(SINKS + n) as u32).collect();
            (1..n).rev().for_each(|i| members.swap(i, r.random_range(0..=i)));
            let offsets = cut(&mut r, n, n_cluster);
            offsets.windows(2).for_each(|w| members[w[0] as usize..w[1] as usize].sort_unstable());
            (offsets, members)
        })
        .collect();
    let rows = s.n_head_kv * n_cluster;
    let mut layer = LayerParts {
        shape: LayerShape {
            layer: 0,
            n_head_kv: s.n_head_kv as u32,
            n_group: (s.n_head / s.n_head_kv) as u32,
            head_dim_k: s.d as u32,
            head_dim_v: s.d as u32,
            n_cluster: n_cluster as u32,
            n_coarse: n_coarse as u32,
            scale: 1.0 / (s.d as f32).sqrt(),
        },
        centroids: normals(1, rows * s.d),
        mean_values: normals(2, rows * s.d),
        variances: normals(3, rows * s.d).into_iter().map(|x| (x.to_f32().abs() * 70.0) as u8).collect(),
        variance_scales: vec![0.003; rows],
        radii: normals(4, rows).into_iter().map(|x| 0.1 * x.to_f32().abs()).collect(),
        offsets: heads.iter().flat_map(|h| h.0.iter().copied()).collect(),
        members: heads.into_iter().flat_map(|h| h.1).collect(),
        coarse_centroids: Vec::new(),
        coarse_offsets: (0..s.n_head_kv as u64)
            .flat_map(|h| cut(&mut SmallRng::seed_from_u64(1000 + h), n_cluster, n_coarse))
            .collect(),
    };
    layer.coarse_centroids = layer.view().coarse_means();
    let meta = IndexMeta {
        model: ModelId { architecture: "bench".into(), name: "bench".into(), fingerprint: [7; 32] },
        rope: Rope { kind: 0, freq_base: 10000.0, freq_scale: 1.0 },
        n_layer: 1,
        tokens: (0..s.n_prefix as i32).collect(),
        n_sink: SINKS as u32,
        n_window: WINDOW as u32,
        build: BuildSettings {
            seed: 0,
            iterations: 0,
            cluster_share: 0.05,
            chat: "raw".into(),
            cache_types: ["f16".into(), "f16".into()],
            builder: "bench".into(),
        },
        calibration: Vec::new(),
        mass_targets: Vec::new(),
        dense_layers: vec![],
        synthetic: false,
    };
    let sketch = SketchParts {
        layer: 0,
        tolerance: SKETCH_TOLERANCE,
        k_dims: vec![0],
        v_dims: vec![0],
        k: vec![f16::ONE; s.n_prefix],
        v: vec![f16::ONE; s.n_prefix],
        k_peaks: vec![f16::ONE; s.n_prefix],
        v_peaks: vec![f16::ONE; s.n_prefix],
        ..SketchParts::default()
    };
    to_bytes(&IndexParts { meta, layers: vec![layer], sketch, probes: Vec::new() }).expect("valid parts")
}

/// So many random numbers as a cache holds them; scales of usual size.
fn cache_block(element: Element, n: usize) -> Vec<u8> {
    let numbers = normals(9, n);
    let bytes = |block: &[f16]| -> Vec<u8> {
        let scale = |steps: f32| f16::from_f32(3.5 / steps).to_le_bytes().into_iter();
        let step = |x: &f16, steps: f32| (x.to_f32() / 3.5 * steps).round() as i32;
        match element {
            Element::F32 => block[0].to_f32().to_le_bytes().to_vec(),
            Element::F16 => block[0].to_le_bytes().to_vec(),
            Element::BF16 => bf16::from_f32(block[0].to_f32()).to_le_bytes().to_vec(),
            Element::Q8_0 => scale(127.0).chain(block.iter().map(|x| step(x, 127.0) as u8)).collect(),
            Element::Q4_0 => {
                let half = |x: &f16| (step(x, 7.0) + 8) as u8;
                scale(7.0).chain((0..16).map(|i| half(&block[i]) | half(&block[i + 16]) << 4)).collect()
            }
        }
    };
    numbers.par_chunks_exact(element.block()).flat_map_iter(bytes).collect()
}

/// Device memory full of random numbers: one block of them, over and over.
fn random_memory(device: &Arc<Device>, block: &Buffer, bytes: usize) -> Buffer {
    let buffer = Buffer::new(device, "a bench", bytes).expect("memory");
    for at in (0..bytes).step_by(block.bytes()) {
        let n = block.bytes().min(bytes - at);
        // SAFETY: inside both buffers.
        unsafe { result::memcpy_dtod_sync(buffer.address() + at as u64, block.address(), n) }.expect("a copy");
    }
    buffer
}

struct Bench {
    stream: sys::CUstream,
    events: [sys::CUevent; 2],
}

impl Bench {
    /// Microseconds of what `put` puts on the stream, of each graph replay.
    fn time(&self, replays: usize, put: impl Fn(sys::CUstream)) -> Vec<f64> {
        let mut exec = MaybeUninit::uninit();
        // SAFETY: our own stream; what is captured outlives this function; handles are destroyed once.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            result::stream::begin_capture(self.stream, mode).expect("capture");
            put(self.stream);
            let graph = result::stream::end_capture(self.stream).expect("capture");
            sys::cuGraphInstantiateWithFlags(exec.as_mut_ptr(), graph, 0).result().expect("a graph");
            let exec = exec.assume_init();
            let times = self.each(replays, |stream| sys::cuGraphLaunch(exec, stream).result().expect("a replay"));
            sys::cuGraphExecDestroy(exec).result().expect("a graph");
            sys::cuGraphDestroy(graph).result().expect("a graph");
            times
        }
    }

    /// Microseconds of each run of what is put on the stream, events around it.
    fn each(&self, runs: usize, put: impl Fn(sys::CUstream)) -> Vec<f64> {
        let one = |_| {
            // SAFETY: our own events and stream.
            unsafe {
                result::event::record(self.events[0], self.stream).expect("an event");
                put(self.stream);
                result::event::record(self.events[1], self.stream).expect("an event");
                result::event::synchronize(self.events[1]).expect("the device");
                1e3 * result::event::elapsed(self.events[0], self.events[1]).expect("events") as f64
            }
        };
        (0..runs + 3).map(one).skip(3).collect()
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Bytes per microsecond of a large copy, read and written.
fn copy_rate(device: &Arc<Device>, bench: &Bench) -> f64 {
    let n = 1usize << 30;
    let [from, to] = [(); 2].map(|()| Buffer::new(device, "a bench", n).expect("memory"));
    // SAFETY: inside both buffers.
    // Not from a graph, where a copy engine does it, which is slower than the multiprocessors.
    let us = median(bench.each(20, |stream| unsafe {
        sys::cuMemcpyDtoDAsync_v2(to.address(), from.address(), n, stream).result().expect("a copy")
    }));
    2.0 * n as f64 / us
}

/// K, V, Q, output and an index of their own.
struct Set {
    q: Buffer,
    k: Buffer,
    v: Buffer,
    dst: Buffer,
    bound: Bound,
}

fn measure(device: &Arc<Device>, bench: &Bench, copy: f64, s: &Shape, index: &[u8]) -> String {
    let Shape { n_head, n_head_kv, d, n_prefix, n_row, .. } = *s;
    let n_kv = n_prefix + 64;
    let group = n_head / n_head_kv;
    let row_bytes = s.element.row_bytes(d);
    let rotation = match s.element.block() {
        1 => Rotation::default(),
        _ => Rotation { k: 1 << d.trailing_zeros(), v: 64 },
    };
    let selected = 2 * row_bytes * n_head_kv * (s.budget * n_prefix as f32) as usize;
    let n_set = ROTATE.div_ceil(selected).clamp(1, 8);
    let block = Buffer::of(device, "a bench", &cache_block(s.element, 8 << 20)).expect("memory");
    let array = |b: &Buffer, ne, nb| Array { data: b.address() as *mut u8, ne, nb };
    let kv = |b: &Buffer| {
        let nb = [s.element.block_bytes(), row_bytes * n_head_kv, row_bytes, row_bytes * n_head_kv * n_kv];
        array(b, [d, n_kv, n_head_kv, 1], nb)
    };
    let sets: Vec<Set> = (0..n_set)
        .map(|i| {
            let index = Arc::new(Index::from_bytes(index.to_vec()).expect("what was just written"));
            let resident = Resident::of(&index, device, rotation.v).expect("memory");
            let cells: Vec<u32> = (0..n_prefix as u32).collect();
            let mut r = SmallRng::seed_from_u64(100 + i as u64);
            let q: Vec<f32> = (0..n_row * n_head * d).map(|_| normal(&mut r)).collect();
            let mut set = Set {
                q: Buffer::of(device, "a bench", &q).expect("memory"),
                k: random_memory(device, &block, n_kv * n_head_kv * row_bytes),
                v: random_memory(device, &block, n_kv * n_head_kv * row_bytes),
                dst: Buffer::new(device, "a bench", 4 * n_row * n_head * d).expect("memory"),
                bound: Bound::new(resident, &cells, n_kv, 0).expect("a binding"),
            };
            if s.watched {
                // SAFETY: all arrays live until the end of this function.
                unsafe { set.bound.watch(0, &kv(&set.k), &kv(&set.v), [s.element; 2], bench.stream) }
                    .expect("a binding");
            }
            set
        })
        .collect();
    let rows = |n: i32| Buffer::of(device, "a bench", &vec![n; n_row]).expect("memory");
    let (sparse_rows, dense_rows) = (rows(0), rows(-1));
    // As in llama.cpp: a row of the mask for each query row, here with everything in sight.
    let mask = Buffer::of(device, "a bench", &vec![f16::ZERO; n_row * n_kv]).expect("memory");
    let weights = Buffer::new(device, "a bench", if s.cold { WEIGHTS } else { 4 }).expect("memory");
    // SAFETY: inside the buffer.
    let pass_weights = |stream| unsafe {
        let n = if s.cold { WEIGHTS / 4 } else { 0 };
        if n > 0 {
            sys::cuMemsetD32Async(weights.address(), 1, n, stream).result().expect("a write")
        }
    };
    let selection = Selection {
        mode: Mode::Budget(s.budget),
        spread: s.spread,
        alpha: 2.0,
        estimate: s.estimate,
        coarse_share: s.coarse_share,
    };
    let calls = |rows: &Buffer| -> (Vec<Ready>, Workspace) {
        let bounds: Vec<[&Bound; 1]> = sets.iter().map(|set| [&set.bound]).collect();
        let call = |(set, bounds): (&'_ Set, _)| {
            let problem = Problem {
                q: array(&set.q, [d, n_row, n_head, 1], [4, 4 * d * n_head, 4 * d, 4 * d * n_head * n_row]),
                k: kv(&set.k),
                v: kv(&set.v),
                k_type: s.element,
                v_type: s.element,
                mask: Some(array(&mask, [n_kv, n_row, 1, 1], [2, 2 * n_kv, 2 * n_kv * n_row, 2 * n_kv * n_row])),
                sinks: None,
                dst: array(&set.dst, [d, n_head, n_row, 1], [4, 4 * d, 4 * d * n_head, 4 * d * n_head * n_row]),
                scale: 1.0 / (d as f32).sqrt(),
                max_bias: 0.0,
                softcap: 0.0,
            };
            Call { problem, rotation, layer: 0, selection, rows: rows.address(), seen: true, bounds, first_stream: 0 }
        };
        let all: Vec<Call<'_>> = sets.iter().zip(&bounds).map(|(set, b)| call((set, &b[..]))).collect();
        Ready::new(device, s, &all)
    };
    let rounds = CALLS.div_ceil(n_set);
    let time = |replays, put: &dyn Fn(sys::CUstream)| -> Vec<f64> {
        let times = bench.time(replays, |stream| (0..rounds).for_each(|_| put(stream)));
        times.into_iter().map(|t| t / (rounds * n_set) as f64).collect()
    };
    let passing = match s.cold {
        true => median(time(30, &|stream| sets.iter().for_each(|_| pass_weights(stream)))),
        false => 0.0,
    };
    let time = |replays, put: &dyn Fn(&Ready, sys::CUstream), all: &[Ready]| -> Vec<f64> {
        let one = |a: &Ready, stream| {
            pass_weights(stream);
            put(a, stream);
        };
        time(replays, &|stream| all.iter().for_each(|a| one(a, stream))).into_iter().map(|t| t - passing).collect()
    };
    let (sparse, workspace) = calls(&sparse_rows);
    let whole = |calls: &[Ready], replays| {
        // SAFETY: everything lives until the end of this function.
        time(replays, &|call, stream| unsafe { call.launch(None, stream) }, calls)
    };
    let mut times = whole(&sparse, 30);
    let stages: Vec<f64> = (0..sparse[0].n_stage())
        .map(|stage| {
            // SAFETY: as above; the last whole call left what the stages read.
            let put = |call: &Ready, stream| unsafe { call.launch(Some(stage), stream) };
            median(time(30, &put, &sparse))
        })
        .collect();
    let (dense, _own) = calls(&dense_rows);
    let dense_us = median(whole(&dense, 15));
    times.extend(whole(&sparse, 30));
    let us = median(times);
    let attention = match &sparse[0] {
        Ready::Decode(attention) => attention,
        Ready::Prefill(prefill) => return prefill_line(s, prefill, &workspace, (us, dense_us, n_set, copy), &stages),
    };
    let keys: u64 = (0..n_head_kv)
        .flat_map(|h| (0..n_row).map(move |row| (row, h)))
        .map(|(row, h)| attention.kept(&workspace, row, h).expect("the device").expect("a sparse row").1 as u64)
        .sum();
    let n_cluster = (n_prefix - SINKS - WINDOW) / 20;
    let always = (SINKS + WINDOW + 64) * n_row * n_head_kv;
    let opened: usize = match s.coarse_share < 1.0 {
        true => (0..n_head_kv)
            .flat_map(|h| (0..n_row).map(move |row| (row, h)))
            .map(|(row, h)| attention.opened(&workspace, row, h).expect("the device").expect("a coarse level").len())
            .sum(),
        false => n_head_kv * n_cluster,
    };
    let lookup_bytes = opened * (2 * d + 8 + if s.spread == Spread::Diag { d } else { 0 });
    let attend_bytes = (keys as usize + always) * (2 * row_bytes + 4)
        + if s.estimate { n_head_kv * n_row * n_cluster * (2 * d + 4 * group) } else { 0 };
    let dense_bytes = n_kv * n_head_kv * 2 * row_bytes * n_row;
    let share = |bytes: usize, us: f64| bytes as f64 / us / copy;
    format!(
        "{{\"type\":\"{}\",\"heads\":{n_head},\"kv_heads\":{n_head_kv},\"d\":{d},\"prefix\":{n_prefix},\"rows\":{n_row},\"budget\":{},\
         \"spread\":\"{:?}\",\"estimate\":{},\"cold\":{},\"sets\":{n_set},\"copy_tb_s\":{:.3},\"us\":{us:.2},\"dense_us\":{dense_us:.2},\
         \"lookup_us\":{:.2},\"select_us\":{:.2},\"attend_us\":{:.2},\"merge_us\":{:.2},\"lookup_mb\":{:.1},\
         \"attend_mb\":{:.1},\"lookup_share\":{:.3},\"attend_share\":{:.3},\"dense_share\":{:.3},\"kept\":{:.4},\
         \"coarse_share\":{},\"coarse_lookup_us\":{:.2},\"coarse_select_us\":{:.2},\"opened\":{:.4}}}",
        s.element.name(),
        s.budget,
        s.spread,
        s.estimate,
        s.cold,
        copy / 1e6,
        stages[2],
        stages[3],
        stages[4],
        stages[5],
        lookup_bytes as f64 / 1e6,
        attend_bytes as f64 / 1e6,
        share(lookup_bytes, stages[2]),
        share(attend_bytes, stages[4]),
        share(dense_bytes, dense_us),
        keys as f64 / (n_prefix * n_row * n_head_kv) as f64,
        s.coarse_share,
        stages[0],
        stages[1],
        opened as f64 / (n_cluster * n_row * n_head_kv) as f64,
    )
}

/// A prefill's line: `us`, `dense_us`, sets and the copy's rate are as of `measure`.
fn prefill_line(
    s: &Shape,
    prefill: &Prefill,
    workspace: &Workspace,
    (us, dense_us, n_set, copy): (f64, f64, usize, f64),
    stages: &[f64],
) -> String {
    let stage = |name: &str| PREFILL_STAGES.iter().position(|s| *s == name).map_or(0.0, |i| stages[i]);
    let keys = prefill.mean_kept(workspace).expect("the device");
    let kept = keys / s.n_prefix as f64;
    let attended = keys + (SINKS + WINDOW + 64) as f64;
    let tflops =
        |keys: f64, products: f64, us: f64| 2.0 * products * keys * (s.n_row * s.n_head * s.d) as f64 / us / 1e6;
    let n_cluster = ((s.n_prefix - SINKS - WINDOW) / 20) as f64;
    let products = if s.spread == Spread::Diag { 2.0 } else { 1.0 };
    let lookup: f64 = ["check", "plan", "seen", "sinks", "sums", "means"].into_iter().map(stage).sum();
    format!(
        "{{\"heads\":{},\"kv_heads\":{},\"d\":{},\"prefix\":{},\"rows\":{},\"budget\":{},\"spread\":\"{:?}\",\"estimate\":false,\
         \"type\":\"{}\",\"tile\":{},\"portable\":{},\"sets\":{n_set},\"copy_tb_s\":{:.3},\"us\":{us:.2},\"dense_us\":{dense_us:.2},\
         \"lookup_us\":{lookup:.2},\"check_us\":{:.2},\"sums_us\":{:.2},\"means_us\":{:.2},\"select_us\":{:.2},\
         \"attend_us\":{:.2},\"merge_us\":{:.2},\"lookup_tflops\":{:.1},\"attend_tflops\":{:.1},\"kept\":{kept:.4},\
         \"coarse_share\":1}}",
        s.n_head,
        s.n_head_kv,
        s.d,
        s.n_prefix,
        s.n_row,
        s.budget,
        s.spread,
        s.element.name(),
        s.tile,
        s.portable,
        copy / 1e6,
        stage("check") + stage("plan") + stage("seen") + stage("sinks"),
        stage("sums"),
        stage("means"),
        stage("select"),
        stage("attend"),
        stage("merge"),
        tflops(n_cluster, 2.0 * products, stage("sums") + stage("means")),
        tflops(attended, 2.0, stage("attend")),
    )
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let text = words.join(" ");
    let shapes: Vec<Shape> = text.split(',').filter(|t| !t.trim().is_empty()).filter_map(parse).collect();
    if shapes.is_empty() {
        eprintln!("usage: cuda HEADS/KV_HEADSxD@PREFIX ROWS BUDGET [radius|diag|none] [estimate] [coarse=SHARE] [unwatched] [cold] [f16|bf16|q8_0|q4_0] [tile=N] [portable][, ...]");
        return;
    }
    let device = match Device::new(0) {
        Ok(device) => device,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).expect("an event");
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream");
    let bench = Bench { stream, events: [event(), event()] };
    let copy = copy_rate(&device, &bench);
    let mut last: Option<((usize, usize, usize), Vec<u8>)> = None;
    for shape in &shapes {
        let key = (shape.n_head_kv * 1000 + shape.n_head, shape.d, shape.n_prefix);
        let bytes = match last.take() {
            Some((k, bytes)) if k == key => bytes,
            _ => index_bytes(shape),
        };
        println!("{}", measure(&device, &bench, copy, shape, &bytes));
        last = Some((key, bytes));
    }
}
