//! On the same queries and keys of a real model, CPU and GPU keep the same clusters. Needs a GPU, and llama.cpp's CUDA backend: run with
//! `--ignored`, the model and a text in SQZ_MODEL and SQZ_TEXT.

mod common;

use std::sync::Arc;

use ggml_squeeze::attention::cpu::{Memory, Options, Plan, Schedule};
use ggml_squeeze::attention::cuda::{self, Attention, Bound, Buffer, Device, Resident, Stream, Workspace};
use ggml_squeeze::attention::{Array, Binding, Call, Element, Mode, Problem, Rotation, Row, Selection, Spread};
use ggml_squeeze::backend::Capture;
use ggml_squeeze::build::LayerCapture;
use ggml_squeeze::config::SPREAD_ALPHA;
use ggml_squeeze::index::Index;
use sqz::llama::{Context, Model};

/// Query rows of one call.
const ROWS: usize = cuda::MAX_ROWS;

/// Rows of a layer's heads side by side, as captured.
fn heads(data: *const u8, element: usize, d: usize, n_head: usize, n: usize) -> Array {
    let row = element * d * n_head;
    Array { data: data.cast_mut(), ne: [d, n, n_head, 1], nb: [element, row, element * d, row * n] }
}

/// The captured window's queries over the prefix; arrays at these addresses.
fn problem(layer: &LayerCapture, n: usize, [q, k, v, dst]: [*const u8; 4]) -> Problem {
    let [dk, dv] = [layer.head_dim_k, layer.head_dim_v].map(|d| d as usize);
    let (n_head_kv, n_prefix) = (layer.n_head_kv as usize, layer.k.len() / layer.row_k());
    let n_head = n_head_kv * layer.n_group as usize;
    let out = 4 * dv * n_head;
    Problem {
        q: heads(q, 4, dk, n_head, n),
        k: heads(k, 2, dk, n_head_kv, n_prefix),
        k_type: Element::F16,
        v: heads(v, 2, dv, n_head_kv, n_prefix),
        v_type: Element::F16,
        mask: None,
        sinks: None,
        dst: Array { data: dst.cast_mut(), ne: [dv, n_head, n, 1], nb: [4, 4 * dv, out, out * n] },
        scale: layer.scale,
        max_bias: 0.0,
        softcap: 0.0,
    }
}

/// Kept clusters of each row and KV head, on the CPU.
fn on_cpu(layer: &LayerCapture, q: &[f32], index: &Arc<Index>, selection: Selection) -> Vec<Vec<u32>> {
    let meta = index.meta();
    let (p, w) = (meta.n_prefix() as u32, meta.n_window);
    let binding = Binding {
        index: index.clone(),
        cells: (0..p).collect::<Vec<_>>().into(),
        always: (0..meta.n_sink).chain(p - w..p).collect::<Vec<_>>().into(),
    };
    let n = q.len() / (layer.row_k() * layer.n_group as usize);
    let mut out = vec![0f32; n * layer.row_v() * layer.n_group as usize];
    let at =
        [q.as_ptr().cast(), layer.k.as_ptr().cast(), layer.v.as_ptr().cast(), out.as_mut_ptr().cast_const().cast()];
    let call = Call {
        problem: problem(layer, n, at),
        layer: layer.layer,
        rows: vec![Row::Sparse(0); n].into(),
        tiles: Vec::new().into(),
        bindings: vec![binding].into(),
        selection,
        rotation: Rotation::default(),
    };
    let options = Options { schedule: Some(Schedule::Split), ..Options::default() };
    let plan = Plan::with_options(call, 1, &mut Memory::default(), options).expect("a call that the CPU takes");
    // SAFETY: the arrays live until the end of this function, and one thread runs it.
    unsafe { plan.run(0, 1) };
    let pairs = (0..n).flat_map(|row| (0..layer.n_head_kv as usize).map(move |head| (row, head)));
    pairs.map(|(row, head)| plan.selected(row, head).expect("a sparse row")).collect()
}

/// A layer's keys and values on the GPU.
struct OnGpu {
    device: Arc<Device>,
    stream: Stream,
    k: Buffer,
    v: Buffer,
    bound: Bound,
}

impl OnGpu {
    fn new(layer: &LayerCapture, index: &Arc<Index>, device: &Arc<Device>) -> Result<OnGpu, cuda::Error> {
        let of = |rows: &[half::f16]| Buffer::of(device, "a test", rows);
        let n = index.meta().n_prefix();
        let cells: Vec<u32> = (0..n as u32).collect();
        Ok(OnGpu {
            device: device.clone(),
            stream: Stream::new(device)?,
            k: of(&layer.k)?,
            v: of(&layer.v)?,
            bound: Bound::new(Resident::of(index, device, 0)?, &cells, n, 0)?,
        })
    }

    fn kept(&self, layer: &LayerCapture, q: &[f32], selection: Selection) -> Result<Vec<Vec<u32>>, cuda::Error> {
        let n = q.len() / (layer.row_k() * layer.n_group as usize);
        let q = Buffer::of(&self.device, "a test", q)?;
        let out = Buffer::new(&self.device, "a test", 4 * n * layer.row_v() * layer.n_group as usize)?;
        let rows = Buffer::of(&self.device, "a test", &vec![0i32; n])?;
        let at = [&q, &self.k, &self.v, &out].map(|buffer| buffer.address() as *const u8);
        let bounds = [&self.bound];
        let call = cuda::Call {
            problem: problem(layer, n, at),
            rotation: Rotation::default(),
            layer: layer.layer,
            selection,
            rows: rows.address(),
            seen: true,
            bounds: &bounds,
            first_stream: 0,
        };
        let workspace = Workspace::for_calls(&self.device, &[&call])?;
        let attention = Attention::new(&self.device, &call, &workspace)?;
        // SAFETY: everything lives until the stream is done.
        unsafe { attention.launch(self.stream.raw())? };
        self.stream.synchronize()?;
        let index = self.bound.resident().index();
        let view = index.layer(layer.layer).expect("an indexed layer");
        let mut all = Vec::new();
        for (row, head) in (0..n).flat_map(|row| (0..layer.n_head_kv as usize).map(move |head| (row, head))) {
            let (first, _) = attention.kept(&workspace, row, head)?.expect("a sparse row");
            let offsets = view.head_offsets(head);
            all.push(first.iter().map(|f| offsets.binary_search(f).expect("a cluster's start") as u32).collect());
        }
        Ok(all)
    }
}

/// What two selections agree on: decisions alike, decisions, clusters that one alone keeps, and those that the CPU keeps.
#[derive(Default)]
struct Agreement([u64; 4]);

impl Agreement {
    fn add(&mut self, cpu: &[u32], gpu: &[u32], n_cluster: u64) {
        let alone = |a: &[u32], b: &[u32]| a.iter().filter(|c| !b.contains(c)).count() as u64;
        let differ = alone(cpu, gpu) + alone(gpu, cpu);
        let more = [n_cluster - differ, n_cluster, differ, cpu.len() as u64];
        self.0.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
    }

    fn share(&self) -> f64 {
        self.0[0] as f64 / self.0[1].max(1) as f64
    }
}

#[test]
#[ignore = "needs a GPU, SQZ_MODEL and SQZ_TEXT"]
fn cpu_and_gpu_keep_the_same_clusters() {
    sqz::llama::start(false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let build = common::gpu::build(&dir.path().join("index.sqz.gguf"));
    let index = common::gpu::index(&build);
    let tokens = index.meta().tokens.clone();
    let device = Device::new(0).unwrap();

    let model = Model::load_on(&build.model.model, &build.model.gpu).unwrap();
    let capture = Capture::new(tokens.len(), index.meta().n_window as usize);
    let mut context = Context::new(&model, &build.model, tokens.len(), Some(capture)).unwrap();
    context.prefill(&tokens, |_| ()).unwrap();
    let capture = &*context.capture().unwrap();
    let base = Selection {
        mode: Mode::Budget(0.1),
        spread: Spread::Diag,
        alpha: SPREAD_ALPHA,
        estimate: false,
        coarse_share: 1.0,
    };
    let modes = [Mode::Budget(0.1), Mode::Budget(0.2), Mode::Mass(0.9)];
    let mut found = modes.map(|_| Agreement::default());
    for shape in index.shapes() {
        let (layer, _) = capture.read(shape.layer).unwrap();
        let on_gpu = OnGpu::new(&layer, &index, &device).unwrap();
        for q in layer.q.chunks(ROWS * layer.row_k() * layer.n_group as usize) {
            for (mode, sum) in modes.iter().zip(&mut found) {
                let selection = Selection { mode: *mode, ..base };
                let (cpu, gpu) = (on_cpu(&layer, q, &index, selection), on_gpu.kept(&layer, q, selection).unwrap());
                assert_eq!(cpu.len(), gpu.len());
                cpu.iter().zip(&gpu).for_each(|(c, g)| sum.add(c, g, u64::from(shape.n_cluster)));
            }
        }
    }
    let (n, w) = (tokens.len(), index.meta().n_window);
    println!("{n} tokens, {w} queries, {} layers", index.shapes().len());
    for (mode, sum) in modes.iter().zip(&found) {
        let [alike, all, differ, kept] = sum.0;
        println!(
            "{mode:?}: {:.4} % alike ({alike} of {all}); {differ} kept by one alone, {kept} by the CPU",
            100.0 * sum.share()
        );
        assert!(all > 0 && kept > 0 && sum.share() >= 0.995, "{mode:?}: too few are alike");
    }
}
