//! Graphs on a GPU whose driver fails, at one call after the other: the result is there all the same, and the next one too.
//!
//! On any machine the driver is made up and the GPU is the CPU (`made_up`): our kernels then do nothing, which shows which nodes were left
//! to llama.cpp. On a GPU (`--ignored gpu::`) the driver is the real one, but for the call that fails.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use ggml_squeeze::attention::cuda;
use ggml_squeeze::backend::{set_log, OpContext, Scope};
use ggml_squeeze::config::ModeSetting;
use ggml_squeeze::index::Index;
use llama_cpp_sys_2 as sys;

use super::control::{run_with, Driver, MADE_UP};
use super::gpu::relative_error;
use super::host::*;
use super::{made_up, BUDGET};

/// Runs of a graph: part by part, captured, and twice more.
const N_RUN: usize = 4;

#[test]
fn whatever_call_of_the_driver_fails_a_graph_is_computed() {
    if cuda::missing().is_some() {
        println!("skipped: this build has no CUDA kernels");
        return;
    }
    let said = run_with(MADE_UP, "faults::on_a_made_up_gpu");
    assert_eq!(said.matches("failing calls").count(), 2, "{said}");
}

/// Which node a graph has, and its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The op, whose cache is verified.
    Op,
    /// ggml's own, put on our kernels.
    Forced,
}

struct Host {
    kind: Kind,
    data: Data,
    index: Arc<Index>,
    scope: Arc<Scope>,
    context: OpContext,
}

/// A run's status and output.
type Ran = (sys::ggml_status, Vec<f32>);

impl Host {
    fn new(kind: Kind) -> Host {
        let (data, scope) = (Data::new(&Spec { n_query: 1, ..Spec::default() }), scope(BUDGET));
        Host { kind, index: data.index(), context: op_context(&scope), scope, data }
    }

    fn node(&self) -> Node<'_> {
        match self.kind {
            Kind::Op => Node::Ours(&self.context, &self.index),
            Kind::Forced => Node::Stock,
        }
    }

    /// On a backend of its own, which is gone afterwards.
    fn run(&self, disable: bool) -> Vec<Ran> {
        let _entered = ggml_squeeze::backend::enter(&self.scope);
        let gpu = Backend::gpu();
        // What registers the plugin sets all settings.
        change(&self.scope, |c| {
            (c.min_prefix, c.mode) = (Some(0), ModeSetting::Budget(BUDGET));
            (c.force, c.disable) = (self.kind == Kind::Forced && !disable, disable);
        });
        let graph = Graph::new(&gpu, &self.data, self.node());
        // SAFETY: a live graph; both crates' bindings are of one structure. A scheduler numbers its graphs like this.
        unsafe { (*graph.graph.cast::<ggml_sys::ggml_cgraph>()).uid = 7 };
        let run = |_| {
            let mut status = sys::GGML_STATUS_FAILED;
            // SAFETY: a live graph on a live backend.
            let out = graph.run_by(|| status = unsafe { sys::ggml_backend_graph_compute(gpu.raw(), graph.graph) });
            (status, out)
        };
        (0..N_RUN).map(run).collect()
    }

    fn dense(&self) -> Vec<f32> {
        let all = self.run(true);
        assert!(all.iter().all(|(status, out)| *status == sys::GGML_STATUS_SUCCESS && *out == all[0].1));
        all[0].1.clone()
    }
}

/// Whose result it is.
#[derive(PartialEq, Debug, Clone, Copy)]
enum Whose {
    Ours,
    LlamaCpps,
}

/// Every failing call, alone and with all behind it; `whose` knows a right output. `step`: between calls that are tried.
fn attack(driver: &Driver, host: &Host, step: usize, whose: &dyn Fn(&[f32]) -> Option<Whose>, counts: bool) {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = lines.clone();
    set_log(Some(Box::new(move |line| sink.lock().unwrap().push(line.to_string_lossy().into_owned()))));
    let live = || if counts { driver.live() } else { 0 };
    let whole = || {
        driver.fail(0, 0, false);
        let before = live();
        let all = host.run(false);
        let right = |(status, out): &Ran| *status == sys::GGML_STATUS_SUCCESS && whose(out) == Some(Whose::Ours);
        let owners: Vec<_> = all.iter().map(|(status, out)| (status, whose(out))).collect();
        assert!(
            all.iter().all(right),
            "{:?} without a failing call: {owners:?}, {:?}, {}",
            host.kind,
            lines.lock().unwrap(),
            take_stats(&host.scope)
        );
        assert_eq!(live(), before, "something is left");
    };
    whole();
    let n = driver.calls();
    let (mut failed, mut mended, mut refused) = (BTreeSet::new(), 0, 0);
    // out of memory; launch failed
    for (code, at) in [2, 719].into_iter().flat_map(|code| (1..=n).step_by(step).map(move |at| (code, at))) {
        lines.lock().unwrap().clear();
        let before = live();
        driver.fail(at, code, false);
        let all = host.run(false);
        let (name, said) = (driver.failed(), lines.lock().unwrap().clone());
        let what = format!("{:?}, call {at} of {n}, {name}, answers {code}: {said:?}", host.kind);
        failed.insert(name);
        let owners: Vec<Option<Whose>> = all.iter().map(|(_, out)| whose(out)).collect();
        assert!(all.iter().all(|(status, _)| *status == sys::GGML_STATUS_SUCCESS), "{what}");
        assert!(owners.iter().all(Option::is_some), "{what}: {owners:?}");
        // To a context that cannot be made current nothing can be given back.
        assert!(name == "cuCtxSetCurrent" || live() == before, "{what}: something is left");
        if owners.contains(&Some(Whose::LlamaCpps)) {
            mended += 1;
            let clear = |line: &String| line.contains("CUDA driver cannot") || line.contains("cannot be had");
            assert!(!said.is_empty() && said.iter().all(clear), "{what}");
        }
    }
    for at in (1..=n).step_by(step) {
        // A device that is lost.
        driver.fail(at, 719, true);
        for (status, out) in host.run(false) {
            let right = status == sys::GGML_STATUS_FAILED || whose(&out).is_some();
            assert!(right, "{:?}, from call {at} on: {status}, {:?}", host.kind, lines.lock().unwrap());
            refused += usize::from(status == sys::GGML_STATUS_FAILED);
        }
    }
    whole();
    set_log(None);
    for name in ["cuMemAlloc_v2", "cuLaunchKernelEx", "cuEventRecord", "cuStreamEndCapture", "cuGraphLaunch"] {
        assert!(step > 1 || failed.contains(name), "{name} never failed, only {failed:?}");
    }
    assert!(mended > 0 && (step > 1 || refused > 0));
    println!("{:?}: {n} failing calls, one in {step} tried, {mended} jobs of {N_RUN} runs partly llama.cpp's, {refused} runs refused", host.kind);
}

#[test]
#[ignore = "a part of whatever_call_of_the_driver_fails_a_graph_is_computed"]
fn on_a_made_up_gpu() {
    let Some(driver) = Driver::of_process() else { return };
    sqz::llama::start(false).unwrap();
    made_up::register();
    for kind in [Kind::Op, Kind::Forced] {
        let host = Host::new(kind);
        let dense = host.dense();
        // What our kernels would have computed is as it was before.
        let whose = |out: &[f32]| match out.iter().all(|x| x.is_nan()) {
            true => Some(Whose::Ours),
            false => (*out == dense).then_some(Whose::LlamaCpps),
        };
        attack(&driver, &host, 1, &whose, true);
    }
}

#[test]
#[ignore = "a part of gpu::whatever_call_of_the_driver_fails_a_graph_is_computed"]
fn on_a_real_gpu() {
    let Some(driver) = Driver::of_process() else { return };
    for kind in [Kind::Op, Kind::Forced] {
        let host = Host::new(kind);
        let dense = host.dense();
        let twin = Graph::new(&Backend::new(1), &host.data, Node::Ours(&host.context, &host.index));
        let want = twin.expected(&host.data, &host.index, BUDGET, kind == Kind::Op);
        let whose = |out: &[f32]| match *out == dense {
            true => Some(Whose::LlamaCpps),
            false => (relative_error(out, &want) < 2e-3).then_some(Whose::Ours),
        };
        attack(&driver, &host, 3, &whose, false);
    }
}
