//! The CUDA path against the oracle on random calls. Needs `--features gpu-tests` and an NVIDIA GPU.

mod attend_case;
#[path = "cuda/coarse.rs"]
mod coarse;
mod gpu;
#[path = "cuda/graph.rs"]
mod graph;
#[path = "cuda/prefill.rs"]
mod prefill;
#[path = "cuda/rows.rs"]
mod rows;
#[path = "cuda/types.rs"]
mod types;
#[path = "cuda/watch.rs"]
mod watch;

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use attend_case::{Case, Random, Spec, LAYER};
use cudarc::driver::{result, sys};
use ggml_squeeze::attention::cuda::{Attention, Bound, Buffer, Call, Device, Error, Resident, Workspace};
use ggml_squeeze::attention::{self, oracle, Array, Element, Mode, Problem, Rotation, Row, Selection, Spread};
use graph::Graph;
use half::f16;
use proptest::prelude::*;

/// The GPU. Waiting for it breaks a capture, in whatever thread: tests share it, but for one that captures.
struct Gpu {
    device: Arc<Device>,
    _shared: Option<RwLockReadGuard<'static, ()>>,
    _alone: Option<RwLockWriteGuard<'static, ()>>,
}

impl std::ops::Deref for Gpu {
    type Target = Arc<Device>;
    fn deref(&self) -> &Arc<Device> {
        &self.device
    }
}

static USERS: RwLock<()> = RwLock::new(());

/// A test that gets none has said why and is skipped.
fn gpu() -> Option<Gpu> {
    let shared = USERS.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    gpu::device().map(|device| Gpu { device, _shared: Some(shared), _alone: None })
}

/// The same for a test that captures.
fn gpu_alone() -> Option<Gpu> {
    let alone = USERS.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    gpu::device().map(|device| Gpu { device, _shared: None, _alone: Some(alone) })
}

/// A case's arrays on the GPU.
struct OnGpu {
    device: Arc<Device>,
    problem: Problem,
    dst: Buffer,
    k: Buffer,
    mask: Option<Buffer>,
    q: Buffer,
    rows: Buffer,
    bounds: Vec<Bound>,
    selection: Selection,
    rotation: Rotation,
    stream: sys::CUstream,
    _others: Vec<Buffer>,
}

impl OnGpu {
    fn new(device: &Arc<Device>, case: &Case) -> OnGpu {
        let of = |bytes: &[u8]| Buffer::of(device, "a test", bytes).unwrap();
        let (q, k, v) = (of(bytemuck::cast_slice(&case.q)), of(&case.k), of(&case.v));
        let mask = case.call.problem.mask.map(|_| of(bytemuck::cast_slice(&case.mask)));
        let sinks = of(bytemuck::cast_slice(&case.sinks));
        // Whatever is not written stays NaN.
        let dst = of(bytemuck::cast_slice(&vec![f32::NAN; case.dst.len()]));
        let at = |a: Array, buffer: &Buffer| Array { data: buffer.address() as *mut u8, ..a };
        let p = &case.call.problem;
        let problem = Problem {
            q: at(p.q, &q),
            k: at(p.k, &k),
            v: at(p.v, &v),
            mask: p.mask.map(|m| at(m, mask.as_ref().unwrap())),
            sinks: p.sinks.map(|_| sinks.address() as *const f32),
            dst: at(p.dst, &dst),
            ..*p
        };
        let bounds = case.call.bindings.iter().enumerate().map(|(stream, b)| {
            let resident = Resident::of(&b.index, device, case.call.rotation.v).unwrap();
            Bound::new(resident, &b.cells, p.k.ne[1], stream as u32).unwrap()
        });
        let bounds = bounds.collect();
        let rows = numbers(&case.call.rows);
        let rows = of(bytemuck::cast_slice(&rows));
        device.enter().unwrap();
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let (selection, rotation, device) = (case.call.selection, case.call.rotation, device.clone());
        OnGpu { device, problem, dst, k, mask, q, rows, bounds, selection, rotation, stream, _others: vec![v, sinks] }
    }

    fn with<T>(&self, then: impl FnOnce(&Attention, &Workspace) -> T) -> T {
        let bounds: Vec<&Bound> = self.bounds.iter().collect();
        let (problem, selection, rotation, rows) = (self.problem, self.selection, self.rotation, self.rows.address());
        let call =
            Call { problem, rotation, layer: LAYER, selection, rows, seen: false, bounds: &bounds, first_stream: 0 };
        let workspace = Workspace::for_calls(&self.device, &[&call]).unwrap();
        let attention = Attention::new(&self.device, &call, &workspace).unwrap();
        then(&attention, &workspace)
    }

    fn output(&self) -> Vec<f32> {
        self.dst.read(0, self.dst.bytes() / 4).unwrap()
    }

    fn launch(&self, attention: &Attention) {
        self.dst.write(0, &vec![f32::NAN; self.dst.bytes() / 4]).unwrap();
        // SAFETY: everything lives in `self`.
        unsafe { attention.launch(self.stream) }.unwrap();
    }
}

impl Drop for OnGpu {
    fn drop(&mut self) {
        // SAFETY: ours; nothing is launched any more. After a failed test the context may be of no use.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

fn numbers(rows: &[Row]) -> Vec<i32> {
    rows.iter().map(|r| if let Row::Sparse(n) = r { *n as i32 } else { -1 }).collect()
}

/// Relative L2 error.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let sum = |terms: &mut dyn Iterator<Item = f64>| terms.map(|x| x * x).sum::<f64>().sqrt();
    let difference = sum(&mut got.iter().zip(want).map(|(g, w)| *g as f64 - w));
    difference / sum(&mut want.iter().copied()).max(1e-30)
}

/// Largest relative error of a call, by the types of K and V.
fn allowed(p: &Problem) -> f64 {
    match p.k_type.block().max(p.v_type.block()) {
        1 => 2e-3,
        _ => 1e-2,
    }
}

/// Clusters whose first members are these.
fn clusters(case: &Case, row: usize, head_kv: usize, first: &[u32]) -> Vec<u32> {
    let Row::Sparse(n) = case.call.rows[row] else { panic!("row {row} is dense") };
    let view = case.call.bindings[n as usize].index.layer(LAYER).unwrap();
    let offsets = view.head_offsets(head_kv);
    first.iter().map(|f| offsets.binary_search(f).expect("the start of a cluster") as u32).collect()
}

/// Clusters, chosen best first by `p`, are the oracle's, up to what F16 queries cannot tell apart.
fn same_choice(what: &str, got: &[u32], want: &[u32], p: &[f64]) {
    let differ = (0..p.len() as u32).filter(|i| got.contains(i) != want.contains(i));
    let last = want.iter().chain(got).map(|i| p[*i as usize]).fold(f64::INFINITY, f64::min);
    for i in differ {
        let p = p[i as usize];
        assert!((p - last).abs() <= 0.02 * p.max(last) + 1e-9, "{what}: cluster {i} with p {p}, the cut is at {last}");
    }
}

/// Opened coarse clusters of a row and KV head (none: no coarse step), the fine ones in them, and kept fine ones.
fn chosen(
    case: &Case,
    attention: &Attention,
    workspace: &Workspace,
    row: usize,
    head_kv: usize,
) -> (oracle::Chosen, Vec<u32>) {
    let Row::Sparse(b) = case.call.rows[row] else { panic!("row {row} is dense") };
    let view = case.call.bindings[b as usize].index.layer(LAYER).unwrap();
    let (first, n) = attention.kept(workspace, row, head_kv).unwrap().expect("a sparse row");
    let kept = clusters(case, row, head_kv, &first);
    let offsets = view.head_offsets(head_kv);
    assert_eq!(kept.iter().map(|i| offsets[*i as usize + 1] - offsets[*i as usize]).sum::<u32>(), n);
    let fine = attention.opened(workspace, row, head_kv).unwrap();
    let fine = fine.unwrap_or_else(|| (0..view.shape.n_cluster).collect());
    let opened = oracle::opened(&case.call, row, head_kv).map(|_| {
        let bounds = view.head_coarse_offsets(head_kv);
        let opened: Vec<u32> = (0..view.shape.n_coarse).filter(|j| fine.contains(&bounds[*j as usize])).collect();
        let whole = opened.iter().flat_map(|j| bounds[*j as usize]..bounds[*j as usize + 1]);
        assert_eq!(whole.collect::<Vec<u32>>(), fine);
        opened
    });
    ((opened, kept), fine)
}

fn check(device: &Arc<Device>, spec: &Spec) {
    let case = Case::new(spec);
    let gpu = OnGpu::new(device, &case);
    gpu.with(|attention, workspace| {
        gpu.launch(attention);
        let got = gpu.output();
        let p = &case.call.problem;
        for row in 0..p.n_row() {
            for head_kv in 0..p.k.ne[2] {
                if case.call.rows[row] == Row::Dense {
                    assert_eq!(attention.kept(workspace, row, head_kv).unwrap(), None);
                    continue;
                }
                let ((opened, kept), fine) = chosen(&case, attention, workspace, row, head_kv);
                if let Some(opened) = &opened {
                    let want = oracle::opened(&case.call, row, head_kv).unwrap();
                    same_choice("coarse", opened, &want, &oracle::coarse_scores(&case.call, row, head_kv));
                }
                let want = oracle::scores_among(&case.call, row, head_kv, opened.as_deref());
                let scores = attention.scores(workspace, row, head_kv, fine.len()).unwrap();
                for (got, want) in scores.iter().zip(&want.y) {
                    let largest = fine.iter().fold(1.0f64, |m, i| m.max(want[*i as usize].abs()));
                    for (g, i) in got.iter().zip(&fine) {
                        let w = want[*i as usize];
                        assert!((*g as f64 - w).abs() <= 4e-3 * largest, "score {g}, the oracle has {w}: {spec:?}");
                    }
                }
                let selection = oracle::selection_among(&case.call, row, head_kv, opened.as_deref());
                same_choice(&format!("row {row}"), &kept, &selection, &want.p);
            }
        }
        let want = oracle::run_among(&case.call, &|row, head_kv| chosen(&case, attention, workspace, row, head_kv).0);
        let e = error(&got, &want);
        assert!(e <= allowed(p), "relative error {e}: {spec:?}");
        gpu.launch(attention);
        assert_eq!(bits(&gpu.output()), bits(&got), "a second run differs: {spec:?}");
    });
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

prop_compose! {
    fn specs()(
        seed in any::<u64>(),
        wide in any::<bool>(),
        group in prop_oneof![1usize..17, Just(1), Just(4)],
        n_head_kv in 1usize..5,
        n_query in 1usize..5,
        n_stream in 1usize..4,
        n_prefix in 60usize..3000,
        n_sink in 0usize..20,
        n_window in 0usize..30,
        n_other in 0usize..200,
        cluster_share in 0.0f64..1.0,
        sparse in prop_oneof![Just(1.0f32), Just(0.6), Just(0.0)],
        mask in any::<bool>(),
        softcap in prop_oneof![Just(0.0f32), Just(20.0)],
        sinks in any::<bool>(),
        share in prop_oneof![Just(0.01f32), Just(0.1), Just(0.2), Just(0.5), Just(1.0), 0.01f32..1.0],
        mode in 0usize..3,
        spread in prop_oneof![Just(Spread::None), Just(Spread::Radius), Just(Spread::Diag)],
        estimate in any::<bool>(),
        head_major in any::<bool>(),
        contiguous in any::<bool>(),
    ) -> Spec {
        let mode = match mode {
            0 => Mode::Budget(share),
            1 => Mode::Threshold { threshold: 2e-3 * share, floor: 0.05 },
            _ => Mode::Mass(share),
        };
        // Few large clusters as often as many small ones.
        let n_cluster = 1 + (((n_prefix - n_sink - n_window - 1) as f64) * cluster_share.powi(3)) as usize;
        Spec {
            seed, dk: 64 + 64 * wide as usize, dv: 64 + 64 * wide as usize, group, n_head_kv, n_query, n_stream,
            n_prefix, n_sink, n_window, n_other, n_cluster, sparse, mask, softcap, sinks, head_major, contiguous,
            selection: Selection { mode, spread, alpha: 2.0, estimate, coarse_share: 1.0 },
            ..Spec::base()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn calls_of_every_kind_agree_with_the_oracle(spec in specs()) {
        if let Some(device) = gpu() {
            check(&device, &spec);
        }
    }
}

#[test]
fn long_prefixes_and_lopsided_clusters_agree_with_the_oracle() {
    let Some(device) = gpu() else { return };
    let base =
        Spec { n_query: 1, dk: 128, dv: 128, n_prefix: 20000, n_sink: 16, n_window: 100, n_other: 100, ..Spec::base() };
    let budget = |b: f32| Selection { mode: Mode::Budget(b), ..base.selection };
    for (n_cluster, group, n_head_kv) in [(1, 1, 2), (2, 4, 1), (1000, 1, 4), (990, 7, 2), (19884, 1, 1)] {
        for share in [0.01, 0.1, 1.0] {
            let seed = (n_cluster * 7 + group) as u64;
            check(&device, &Spec { seed, n_cluster, group, n_head_kv, selection: budget(share), ..base.clone() });
        }
    }
}

#[test]
fn budget_1_is_dense_attention() {
    let Some(device) = gpu() else { return };
    let selection = Selection { mode: Mode::Budget(1.0), ..Spec::base().selection };
    for seed in 0..4 {
        let case =
            Case::new(&Spec { seed, n_prefix: 3000, n_cluster: 150, plain_mask: true, selection, ..Spec::base() });
        let mut dense = case.call.clone();
        dense.rows = vec![Row::Dense; dense.rows.len()].into();
        let gpu = OnGpu::new(&device, &case);
        gpu.with(|attention, _| gpu.launch(attention));
        let e = error(&gpu.output(), &oracle::run(&dense));
        assert!(e <= 2e-3, "relative error {e}");
    }
}

#[test]
fn a_call_that_does_not_see_the_whole_prefix_is_dense() {
    let Some(device) = gpu() else { return };
    for seed in 0..8 {
        let case = Case::new(&Spec { seed, n_query: 3, n_prefix: 700, n_cluster: 35, ..Spec::base() });
        let gpu = OnGpu::new(&device, &case);
        // Row 1 no longer sees one cell of the prefix.
        let hidden = case.call.bindings[0].cells[Random(seed).below(700)] as usize;
        let n_kv = case.call.problem.k.ne[1];
        let mut mask = case.mask.clone();
        mask[n_kv + hidden] = f16::NEG_INFINITY;
        gpu.mask.as_ref().unwrap().write(0, &mask).unwrap();
        let mut call = case.call.clone();
        call.problem.mask.as_mut().unwrap().data = mask.as_ptr() as *mut u8;
        call.rows = vec![call.rows[0], Row::Dense, call.rows[2]].into();
        gpu.with(|attention, workspace| {
            gpu.launch(attention);
            let kept = |row, head_kv| {
                let (first, _) = attention.kept(workspace, row, head_kv).unwrap().expect("a sparse row");
                clusters(&case, row, head_kv, &first)
            };
            let e = error(&gpu.output(), &oracle::run_with(&call, &kept));
            assert!(e <= 2e-3, "relative error {e}");
            assert_eq!(attention.kept(workspace, 1, 0).unwrap(), None);
        });
    }
}

#[test]
fn a_changed_guard_makes_this_and_every_later_call_dense() {
    let Some(device) = gpu() else { return };
    for element in [Element::F16, Element::BF16, Element::Q8_0, Element::Q4_0] {
        changed_guard(&device, element);
    }
}

fn changed_guard(device: &Arc<Device>, element: Element) {
    let (k_type, v_type) = (element, element);
    let case =
        Case::new(&Spec { n_query: 2, mask: false, n_prefix: 500, n_cluster: 25, k_type, v_type, ..Spec::base() });
    let mut gpu = OnGpu::new(device, &case);
    let p = case.call.problem;
    let cell = case.call.bindings[0].cells[479];
    let row = |head: usize| {
        let at = cell as usize * p.k.nb[1] + head * p.k.nb[2];
        case.k[at..at + element.row_bytes(p.k.ne[0])].to_vec()
    };
    let rows: Vec<u8> = (0..p.k.ne[2]).flat_map(row).collect();
    gpu.bounds[0].guard(LAYER, cell, &rows).unwrap();
    gpu.with(|attention, workspace| {
        gpu.launch(attention);
        assert!(attention.kept(workspace, 0, 0).unwrap().is_some());
        assert!(gpu.bounds[0].holds().unwrap());
        let mut k = case.k.clone();
        k[cell as usize * p.k.nb[1] + p.k.nb[2] + 5] ^= 1;
        gpu.k.write(0, &k).unwrap();
        gpu.launch(attention);
        assert_eq!(attention.kept(workspace, 0, 0).unwrap(), None);
        let mut dense = case.call.clone();
        dense.rows = vec![Row::Dense; 2].into();
        assert!(error(&gpu.output(), &oracle::run(&dense)) <= allowed(&p));
        assert!(!gpu.bounds[0].holds().unwrap());
        gpu.k.write(0, &case.k).unwrap();
        gpu.launch(attention);
        assert_eq!(attention.kept(workspace, 0, 0).unwrap(), None);
    });
}

#[test]
fn two_copies_of_a_prefix_are_told_apart() {
    let Some(device) = gpu() else { return };
    // Streams hold the copies; here both are in one stream's cells.
    let one = Case::new(&Spec { n_query: 2, n_prefix: 400, n_cluster: 20, n_other: 440, mask: false, ..Spec::base() });
    let p = one.call.problem;
    let b = &one.call.bindings[0];
    let mut k = one.k.clone();
    let mut v = one.v.clone();
    let others: Vec<u32> =
        b.always[b.index.meta().n_sink as usize..].iter().copied().filter(|c| !b.cells.contains(c)).collect();
    for (from, to) in b.cells.iter().zip(&others) {
        for (cache, nb) in [(&mut k, p.k.nb[1]), (&mut v, p.v.nb[1])] {
            let at = *from as usize * nb;
            cache.copy_within(at..at + nb, *to as usize * nb);
        }
    }
    let mut gpu = OnGpu::new(&device, &one);
    gpu.k.write(0, &k).unwrap();
    gpu._others[0].write(0, &v).unwrap();
    let resident = Resident::of(&b.index, &device, 0).unwrap();
    gpu.bounds.push(Bound::new(resident, &others[..400], p.k.ne[1], 0).unwrap());
    gpu.rows.write(0, &[0i32, 1]).unwrap();
    let mut call = one.call.clone();
    let mut second = b.clone();
    second.cells = others[..400].into();
    let meta = b.index.meta();
    let n_clustered = meta.n_prefix() - meta.n_window as usize;
    let bound: Vec<u32> = second.cells[..n_clustered].to_vec();
    let tail = (0..p.k.ne[1] as u32).filter(|c| !bound.contains(c));
    second.always = second.cells[..meta.n_sink as usize].iter().copied().chain(tail).collect();
    call.bindings = vec![b.clone(), second].into();
    call.rows = vec![Row::Sparse(0), Row::Sparse(1)].into();
    call.problem.k.data = k.as_mut_ptr();
    call.problem.v.data = v.as_mut_ptr();
    gpu.with(|attention, workspace| {
        gpu.launch(attention);
        let kept = |row, head_kv| {
            let (first, _) = attention.kept(workspace, row, head_kv).unwrap().expect("a sparse row");
            clusters(&one, 0, head_kv, &first)
        };
        let e = error(&gpu.output(), &oracle::run_with(&call, &kept));
        assert!(e <= 2e-3, "relative error {e}");
    });
}

#[test]
fn a_captured_call_is_right_on_replay_with_other_data() {
    let Some(device) = gpu_alone() else { return };
    let spec = Spec { n_query: 3, n_prefix: 2000, n_cluster: 100, group: 4, sparse: 0.7, ..Spec::base() };
    let case = Case::new(&spec);
    let gpu = OnGpu::new(&device, &case);
    gpu.with(|attention, _| {
        let graph = Graph::new(&gpu, attention);
        for seed in 10..13 {
            let mut r = Random(seed);
            let q: Vec<f32> = case.q.iter().map(|_| 1.5 * r.normal()).collect();
            gpu.q.write(0, &q).unwrap();
            let rows: Vec<Row> = (0..3).map(|_| if r.below(3) > 0 { Row::Sparse(0) } else { Row::Dense }).collect();
            // A row with an arbitrary mask may not become sparse.
            let rows: Vec<Row> = rows
                .iter()
                .zip(case.call.rows.iter())
                .map(|(r, was)| if *was == Row::Dense { *was } else { *r })
                .collect();
            gpu.rows.write(0, &numbers(&rows)).unwrap();
            let replayed = graph.replay(&gpu);
            gpu.launch(attention);
            assert_eq!(bits(&replayed), bits(&gpu.output()));
            let mut call = case.call.clone();
            call.problem.q.data = q.as_ptr() as *mut u8;
            call.rows = rows.into();
            let e = error(&replayed, &oracle::run(&call));
            // The oracle's own selection may differ at the cut.
            assert!(e <= 2e-2, "relative error {e}");
        }
    });
}

#[test]
fn an_index_is_resident_once_and_freed_with_its_last_user() {
    let Some(device) = gpu() else { return };
    let case = Case::new(&Spec { n_prefix: 3000, ..Spec::base() });
    let index = &case.call.bindings[0].index;
    let one = Resident::of(index, &device, 0).unwrap();
    let two = Resident::of(index, &device, 0).unwrap();
    assert!(Arc::ptr_eq(&one, &two));
    let weak = Arc::downgrade(&one);
    drop((one, two));
    assert!(weak.upgrade().is_none());
}

#[test]
fn calls_that_do_not_fit_are_refused_with_the_reason() {
    let Some(device) = gpu() else { return };
    let case = Case::new(&Spec { dk: 64, dv: 128, ..Spec::base() });
    let gpu = OnGpu::new(&device, &case);
    let bounds: Vec<&Bound> = gpu.bounds.iter().collect();
    let call = Call {
        problem: gpu.problem,
        rotation: gpu.rotation,
        layer: LAYER,
        selection: gpu.selection,
        rows: gpu.rows.address(),
        seen: false,
        bounds: &bounds,
        first_stream: 0,
    };
    let refused = Workspace::for_calls(&device, &[&call]).err().expect("the head sizes differ");
    assert_eq!(
        refused,
        Error::Unsupported {
            what: "the types and head sizes of K and V",
            got: "f16 of 64 and f16 of 128".into(),
            want: "f16, bf16, q8_0 or q4_0 of 64, 80, 96, 112, 128, 192 or 256, 192 and 128, or 96 and 64",
        }
    );
    let memory = Buffer::new(&device, "a test", 1 << 50).err().expect("no GPU has as much");
    assert!(memory.to_string().contains("bytes of GPU memory for a test cannot be had"), "{memory}");
}

#[test]
fn of_equal_clusters_the_first_are_kept() {
    let Some(device) = gpu() else { return };
    for (n_prefix, n_cluster) in [(3000, 900), (3000, 2900), (30000, 9000), (70000, 40000)] {
        for (spread, group) in [(Spread::None, 2), (Spread::Radius, 2), (Spread::Radius, 1)] {
            let selection =
                Selection { mode: Mode::Budget(0.3), spread, alpha: 2.0, estimate: false, coarse_share: 1.0 };
            let spec =
                Spec { n_prefix, n_cluster, n_query: 1, n_head_kv: 1, group, mask: false, selection, ..Spec::base() };
            let mut case = Case::new(&spec);
            case.q.fill(0.0);
            case.call.problem.q.data = case.q.as_mut_ptr().cast();
            let gpu = OnGpu::new(&device, &case);
            gpu.with(|attention, workspace| {
                gpu.launch(attention);
                let (first, _) = attention.kept(workspace, 0, 0).unwrap().expect("a sparse row");
                assert_eq!(clusters(&case, 0, 0, &first), oracle::selection(&case.call, 0, 0), "{n_cluster} clusters");
            });
        }
    }
}
