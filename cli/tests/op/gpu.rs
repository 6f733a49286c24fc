//! The attention op in graphs on an NVIDIA GPU. Needs one, and llama.cpp's CUDA backend: run with `--ignored gpu::`.

use std::sync::Arc;

use ggml_squeeze::attention::cuda::HEAD_SIZES;
use ggml_squeeze::attention::{Element, Row};
use ggml_squeeze::backend::OpContext;
use ggml_squeeze::index::Index;
use llama_cpp_sys_2 as sys;

use super::control::{run_with, FORWARD};
use super::host::*;
use super::{booked, Booked, BUDGET};

/// Relative error of a whole result.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let off: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(*g) - w)).sum();
    (off / want.iter().map(|w| square(*w)).sum::<f64>().max(1e-30)).sqrt()
}

fn allowed(spec: &Spec) -> f64 {
    let plain = |t: Element| matches!(t, Element::F16 | Element::BF16);
    if plain(spec.k_type) && plain(spec.v_type) {
        2e-3
    } else {
        1e-2
    }
}

/// A case on the GPU, and its twin on the CPU, whose memory the specification reads.
struct Case {
    data: Data,
    index: Arc<Index>,
    scope: Arc<ggml_squeeze::backend::Scope>,
    context: OpContext,
    gpu: Backend,
    graph: Graph,
    twin: Graph,
}

impl Case {
    fn new(spec: &Spec, budget: f32, edit: impl FnOnce(&mut Data)) -> Case {
        let mut data = Data::new(spec);
        let index = data.index();
        edit(&mut data);
        let (scope, gpu) = (scope(budget), Backend::gpu());
        let context = op_context(&scope);
        let graph = Graph::new(&gpu, &data, Node::Ours(&context, &index));
        let twin = Graph::new(&Backend::new(1), &data, Node::Ours(&context, &index));
        take_stats(&scope);
        Case { data, index, scope, context, gpu, graph, twin }
    }

    /// Runs the graph: what was booked, and the error against the specification for what was booked.
    fn run(&self, budget: f32) -> (Booked, f64) {
        let got = self.graph.run(&self.gpu);
        let how = booked(&take_stats(&self.scope));
        let sparse = matches!(how, Booked::Sparse(_));
        (how, relative_error(&got, &self.twin.expected(&self.data, &self.index, budget, sparse)))
    }

    fn rewrite(&mut self, edit: impl FnOnce(&mut Data)) {
        edit(&mut self.data);
        self.graph.set(&self.data);
        self.twin.set(&self.data);
    }

    fn dense(&self) -> Vec<f32> {
        Graph::new(&self.gpu, &self.data, Node::Stock).run(&self.gpu)
    }
}

fn spec(r: &mut Random) -> Spec {
    let types = [Element::F16, Element::F16, Element::BF16, Element::Q8_0, Element::Q4_0];
    let (dk, dv) = HEAD_SIZES[r.below(HEAD_SIZES.len())];
    let whole = |t: Element| if dk % t.block() == 0 && dv % t.block() == 0 { t } else { Element::F16 };
    let (k_type, v_type) = (whole(types[r.below(5)]), whole(types[r.below(5)]));
    let n_prefix = 60 + r.below(600);
    Spec {
        seed: r.0,
        dk,
        dv,
        group: 1 + r.below(8),
        n_head_kv: 1 + r.below(3),
        n_query: 1 + r.below(4),
        n_stream: 1 + r.below(2),
        n_prefix,
        n_kv: n_prefix + r.below(200),
        k_type,
        v_type,
        softcap: [0.0, 0.0, 20.0][r.below(3)],
        masked: [Masked::No, Masked::Shared, Masked::Shared, Masked::Open][r.below(4)],
        cell_major: r.below(2) == 0,
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nodes_of_every_kind_agree_with_the_specification() {
    let r = &mut Random(5);
    let mut ties = 0;
    for number in 0..96 {
        let (spec, budget) = (spec(r), [0.1f32, 0.3, 1.0][r.below(3)]);
        let case = Case::new(&spec, budget, |_| ());
        let n_seen = case.data.sees.iter().filter(|sees| **sees).count() as u64;
        for time in ["first", "second"] {
            let (how, off) = case.run(budget);
            let wanted = if n_seen > 0 { Booked::Sparse(n_seen) } else { Booked::Dense("unbound") };
            assert_eq!(how, wanted, "case {number}, {time}: {spec:?}");
            if off < allowed(&spec) {
                continue;
            }
            // The sums of the kernels and the CPU's may break a tie between two clusters differently: then all is well with all.
            ties += 1;
            change(&case.scope, |c| c.mode = ggml_squeeze::config::ModeSetting::Budget(1.0));
            let (_, whole) = case.run(1.0);
            let what = format!("case {number}, {time}: off by {off}, {whole} at budget 1: {spec:?}");
            assert!(budget < 1.0 && whole < allowed(&spec) && ties < 3, "{what}");
            change(&case.scope, |c| c.mode = ggml_squeeze::config::ModeSetting::Budget(budget));
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_is_not_the_prefix_is_llama_cpps_own_attention() {
    type Edit = (&'static str, fn(&mut Data));
    let edits: [Edit; 5] = [
        ("one key", |d| d.k.row(0, 200, 1).iter_mut().for_each(|x| *x = -*x)),
        ("one value", |d| d.v.row(0, 201, 0).iter_mut().for_each(|x| *x = 1.0 - *x)),
        ("the last clustered key", |d| d.k.row(0, 379, 0).fill(0.3)),
        ("all keys", |d| d.k.data.reverse()),
        ("all values", |d| d.v.data.iter_mut().for_each(|x| *x *= 1.5)),
    ];
    for element in [Element::F16, Element::BF16, Element::Q8_0] {
        let spec = Spec { k_type: element, v_type: element, ..Spec::default() };
        for (what, edit) in edits {
            let case = Case::new(&spec, BUDGET, edit);
            for _ in 0..2 {
                let got = case.graph.run(&case.gpu);
                assert_eq!(booked(&take_stats(&case.scope)), Booked::Dense("stale"), "{what} in {element:?}");
                assert_eq!(got, case.dense(), "{what} in {element:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn edits_of_a_verified_prefix_are_found() {
    let mut case = Case::new(&Spec::default(), BUDGET, |_| ());
    assert_eq!(case.run(BUDGET).0, Booked::Sparse(2));
    // The last clustered token: in the same run, by the kernels, and verified in full in the next.
    case.rewrite(|d| d.k.row(0, 379, 1).fill(0.3));
    let (how, off) = case.run(BUDGET);
    assert!(how == Booked::Dense("unbound") && off < 2e-3, "{how:?}, off by {off}");
    assert_eq!(case.run(BUDGET).0, Booked::Dense("stale"));
    let whole = Data::new(&Spec::default());
    case.rewrite(|d| *d = whole.clone());
    let back = (0..200).find(|_| matches!(case.run(BUDGET).0, Booked::Sparse(2)));
    assert!(back.is_some(), "a prefix that is back is not found");
    // Any other: within a round of the check in turn.
    case.rewrite(|d| d.v.row(0, 100, 0).fill(0.25));
    let found = (0..20).find(|_| !matches!(case.run(BUDGET).0, Booked::Sparse(_)));
    assert!(found.is_some(), "an edited value is not found");
    case.rewrite(|d| *d = whole.clone());
    case.context.forget();
    assert_eq!(case.run(BUDGET).0, Booked::Sparse(2));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn settings_hold_from_the_next_run_on_and_caches_are_forgotten_with_their_context() {
    let case = Case::new(&Spec::default(), BUDGET, |_| ());
    change(&case.scope, |c| c.min_prefix = Some(401));
    assert_eq!(case.run(BUDGET).0, Booked::Dense("short prefix"));
    change(&case.scope, |c| c.min_prefix = Some(400));
    assert_eq!(case.run(BUDGET).0, Booked::Sparse(2));
    change(&case.scope, |c| c.mode = ggml_squeeze::config::ModeSetting::Budget(0.6));
    let (how, off) = case.run(0.6);
    assert!(how == Booked::Sparse(2) && off < 2e-3, "{how:?}, off by {off}");
    change(&case.scope, |c| c.disable = true);
    assert_eq!(case.graph.run(&case.gpu), case.dense());
}

/// A scheduler over the GPU and the CPU.
struct Scheduler(sys::ggml_backend_sched_t);

impl Drop for Scheduler {
    fn drop(&mut self) {
        // SAFETY: made in the test, freed once.
        unsafe { sys::ggml_backend_sched_free(self.0) };
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_scheduled_graph_runs_on_the_gpu_again_and_again() {
    let mut case = Case::new(&Spec { n_query: 1, ..Spec::default() }, BUDGET, |_| ());
    let cpu = Backend::new(1);
    let mut backends = [case.gpu.raw(), cpu.raw()];
    // SAFETY: live backends, alive until the scheduler is freed; a graph whose tensors are allocated.
    let (sched, on) = unsafe {
        let null = std::ptr::null_mut();
        let sched = Scheduler(sys::ggml_backend_sched_new(backends.as_mut_ptr(), null, 2, 4096, false, false));
        assert!(sys::ggml_backend_sched_alloc_graph(sched.0, case.graph.graph), "no memory for the graph");
        let on = sys::ggml_backend_sched_get_tensor_backend(sched.0, case.graph.node);
        (sched, on)
    };
    assert_eq!(on, case.gpu.raw(), "the node is not on the GPU");
    for round in 0..12 {
        let other = Data::new(&Spec { n_query: 1, seed: 40 + round, ..Spec::default() });
        case.rewrite(|d| d.q = other.q);
        let got = case.graph.run_by(|| {
            // SAFETY: as above.
            let status = unsafe { sys::ggml_backend_sched_graph_compute(sched.0, case.graph.graph) };
            assert_eq!(status, sys::GGML_STATUS_SUCCESS);
        });
        assert_eq!(booked(&take_stats(&case.scope)), Booked::Sparse(1), "round {round}");
        let off = relative_error(&got, &case.twin.expected(&case.data, &case.index, BUDGET, true));
        assert!(off < 2e-3, "round {round}: off by {off}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_call_on_device_memory_agrees_with_the_specification() {
    let r = &mut Random(8);
    for number in 0..48 {
        let (spec, budget) = (spec(r), [0.1f32, 0.3, 1.0][r.below(3)]);
        let mut case = Case::new(&spec, budget, |_| ());
        let n_seen = case.data.sees.iter().filter(|sees| **sees).count() as u64;
        let n_row = case.data.sees.len();
        for time in ["sparse", "again", "edited", "edited, again", "without an index"] {
            if time == "edited" {
                case.rewrite(|d| d.k.data.reverse());
                case.context.forget();
            }
            let index = (time != "without an index").then_some((&case.index, LAYER));
            let got = case.graph.run_by(|| {
                let mut nowhere = [0.0; 0];
                let mut problem = case.graph.call(&case.index, vec![Row::Dense; n_row], budget, &mut nowhere).problem;
                // SAFETY: the graph's node, in memory of its own size.
                problem.dst.data = unsafe { (*case.graph.node).data.cast() };
                // SAFETY: arrays on the first GPU; the default stream.
                unsafe { case.context.launch(problem, index, 0, std::ptr::null_mut()) }.expect(time);
                case.context.settle();
            });
            let stats = take_stats(&case.scope);
            let sparse = matches!(time, "sparse" | "again");
            let wanted = match (time, n_seen) {
                ("without an index", _) => None,
                ("sparse" | "again", 1..) => Some(Booked::Sparse(n_seen)),
                ("sparse" | "again", _) => Some(Booked::Dense("unbound")),
                _ => Some(Booked::Dense("stale")),
            };
            let what = format!("case {number}, {time}: {spec:?}");
            match wanted {
                Some(wanted) => assert_eq!(booked(&stats), wanted, "{what}"),
                None => assert!(stats.nodes_sparse == 0 && stats.nodes_dense.is_empty(), "{what}"),
            }
            let off = relative_error(&got, &case.twin.expected(&case.data, &case.index, budget, sparse));
            assert!(off < allowed(&spec), "{what}: off by {off}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn whatever_call_of_the_driver_fails_a_graph_is_computed() {
    let said = run_with(FORWARD, "faults::on_a_real_gpu");
    assert_eq!(said.matches("failing calls").count(), 2, "{said}");
}
