//! Patched backend instances: a CPU or CUDA backend created after the plugin is the stock object with `graph_compute` and `free`
//! replaced. Nothing else of ggml is touched.

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use ggml_sys as sys;

use super::cuda;
use super::graph;
use super::op;
use super::runtime::{current, enter, snapshot, stats, Scope, Snapshot};
use super::stats::log;
use super::status;

type SupportsOp = unsafe extern "C" fn(sys::ggml_backend_dev_t, *const sys::ggml_tensor) -> bool;
type InitBackend = unsafe extern "C" fn(sys::ggml_backend_dev_t, *const std::ffi::c_char) -> sys::ggml_backend_t;

/// What a device computes with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Cpu,
    /// An NVIDIA GPU, by its PCI bus id.
    Cuda(String),
}

/// State of one backend.
enum Instance {
    Cpu(Box<graph::Instance>),
    Cuda(cuda::Instance),
}

/// A patched backend: its original functions and our state.
struct Patched {
    original: sys::ggml_backend_i,
    instance: Mutex<Instance>,
    scope: Arc<Scope>,
}

#[derive(Default)]
struct Hooks {
    /// Original `init_backend` by device address.
    devices: HashMap<usize, (InitBackend, Kind)>,
    /// Original `supports_op` of GPUs by device address.
    supports: HashMap<usize, SupportsOp>,
    backends: HashMap<usize, Arc<Patched>>,
}

fn hooks() -> MutexGuard<'static, Hooks> {
    static HOOKS: OnceLock<Mutex<Hooks>> = OnceLock::new();
    HOOKS.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner())
}

/// Makes every backend that `device` creates from now on a patched one. Doing it twice changes nothing.
///
/// # Safety
/// `device` is a live ggml device in writable memory, as registries hand out.
pub unsafe fn patch_device(device: sys::ggml_backend_dev_t, kind: Kind) -> Result<(), String> {
    let mut hooks = hooks();
    if hooks.devices.contains_key(&(device as usize)) {
        return Ok(());
    }
    // SAFETY: live by contract.
    let iface = unsafe { &mut (*device).iface };
    let original = iface.init_backend.ok_or("a device has no init_backend: nothing can be hooked")?;
    hooks.devices.insert(device as usize, (original, kind));
    iface.init_backend = Some(init_patched);
    let is_gpu = matches!(hooks.devices[&(device as usize)].1, Kind::Cuda(_));
    drop(hooks);
    if is_gpu {
        // SAFETY: as above.
        unsafe { patch_supports(device) };
    }
    Ok(())
}

/// Lets a GPU's device answer for nodes of the attention op too: those that it could compute as plain attention.
///
/// # Safety
/// As for `patch_device`.
pub unsafe fn patch_supports(device: sys::ggml_backend_dev_t) {
    // SAFETY: live by contract.
    let iface = unsafe { &mut (*device).iface };
    let Some(original) = iface.supports_op else { return };
    if original as usize != supports_patched as *const () as usize {
        hooks().supports.insert(device as usize, original);
        iface.supports_op = Some(supports_patched);
    }
}

unsafe extern "C" fn supports_patched(device: sys::ggml_backend_dev_t, node: *const sys::ggml_tensor) -> bool {
    let Some(original) = hooks().supports.get(&(device as usize)).copied() else { return false };
    // SAFETY: ggml asks about a live node, or one without data.
    let stock = if op::is_in_use() { op::stock_node(unsafe { &*node }) } else { None };
    let asked = stock.as_ref().map_or(node, |stock| stock as *const sys::ggml_tensor);
    // SAFETY: the device's own function.
    unsafe { original(device, asked) }
}

unsafe extern "C" fn init_patched(
    device: sys::ggml_backend_dev_t,
    params: *const std::ffi::c_char,
) -> sys::ggml_backend_t {
    let original = hooks().devices.get(&(device as usize)).cloned();
    let Some((original, kind)) = original else { return std::ptr::null_mut() };
    // SAFETY: the device's own function, called as ggml would.
    let backend = unsafe { original(device, params) };
    if !backend.is_null() {
        // SAFETY: a live backend that was just created.
        unsafe { patch_backend(backend, &kind) };
    }
    backend
}

/// Replaces the two functions of one backend.
///
/// # Safety
/// `backend` is a live backend that is not computing.
pub unsafe fn patch_backend(backend: sys::ggml_backend_t, kind: &Kind) {
    // SAFETY: live by contract.
    let object = unsafe { &mut *backend };
    if object.iface.graph_compute.is_none() || object.iface.free.is_none() {
        return;
    }
    let instance = match kind {
        Kind::Cpu => Instance::Cpu(Box::default()),
        Kind::Cuda(bus_id) => Instance::Cuda(cuda::Instance::new(bus_id)),
    };
    let patched = Patched { original: object.iface, instance: Mutex::new(instance), scope: current() };
    hooks().backends.insert(backend as usize, Arc::new(patched));
    object.iface.graph_compute = Some(compute_patched);
    object.iface.free = Some(free_patched);
}

/// Books what graphs on GPUs have counted, waiting for those that are under way; those that another thread is computing are
/// left out.
pub fn settle() {
    let all: Vec<Arc<Patched>> = hooks().backends.values().cloned().collect();
    for patched in all {
        let _entered = enter(&patched.scope);
        if let Ok(mut instance) = patched.instance.try_lock() {
            if let Instance::Cuda(instance) = &mut *instance {
                instance.settle();
            }
        }
    }
}

unsafe extern "C" fn free_patched(backend: sys::ggml_backend_t) {
    let (patched, left) = {
        let mut hooks = hooks();
        let patched = hooks.backends.remove(&(backend as usize));
        let beside = |p: &&Arc<Patched>| patched.as_ref().is_some_and(|own| Arc::ptr_eq(&p.scope, &own.scope));
        let left = hooks.backends.values().filter(beside).count();
        (patched, left)
    };
    let free = patched.as_ref().and_then(|p| p.original.free);
    let _entered = patched.as_ref().map(|p| enter(&p.scope));
    // What a GPU's last graphs did is counted now.
    drop(patched);
    if left == 0 {
        let snapshot = snapshot();
        status::finish(&snapshot);
        let totals = stats();
        if snapshot.config.log > 0 && totals.graphs > 0 {
            log(format_args!("totals: {totals}"));
        }
    }
    if let Some(free) = free {
        // SAFETY: the backend's own function, called once as ggml would.
        unsafe { free(backend) };
    }
}

unsafe extern "C" fn compute_patched(backend: sys::ggml_backend_t, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
    let Some(patched) = hooks().backends.get(&(backend as usize)).cloned() else { return sys::GGML_STATUS_FAILED };
    let mut instance = patched.instance.lock().unwrap_or_else(|e| e.into_inner());
    let _entered = enter(&patched.scope);
    let snapshot = snapshot();
    let status = match &mut *instance {
        // SAFETY: as ggml called us.
        Instance::Cpu(instance) => unsafe { compute_cpu(backend, graph, &patched.original, instance, &snapshot) },
        Instance::Cuda(instance) => {
            let stock = cuda::Stock { backend, original: &patched.original };
            let compute = AssertUnwindSafe(|| instance.compute(graph, &stock, &snapshot));
            catch_unwind(compute).unwrap_or_else(|_| {
                log("deciding on a graph failed; its result is refused (GGML_STATUS_FAILED), later ones are the GPU's own");
                instance.abandon();
                sys::GGML_STATUS_FAILED
            })
        }
    };
    if status == sys::GGML_STATUS_SUCCESS {
        status::graph_done(&snapshot);
    }
    status
}

/// # Safety
/// `backend` and `graph` are what ggml gives to the backend's `graph_compute`, which is in `original`.
unsafe fn compute_cpu(
    backend: sys::ggml_backend_t,
    graph: *mut sys::ggml_cgraph,
    original: &sys::ggml_backend_i,
    instance: &mut graph::Instance,
    snapshot: &Snapshot,
) -> sys::ggml_status {
    let Some(compute) = original.graph_compute else { return sys::GGML_STATUS_FAILED };
    let decide = AssertUnwindSafe(|| {
        // SAFETY: ggml hands us a live graph with n_nodes nodes.
        let nodes = unsafe { std::slice::from_raw_parts((*graph).nodes, (*graph).n_nodes.max(0) as usize) };
        instance.rewrite(nodes, snapshot)
    });
    // a panic while deciding costs nothing: the graph is still whole and goes to the stock backend
    let rewrite = catch_unwind(decide).unwrap_or_else(|_| {
        log("deciding on a graph failed; it is computed densely");
        // what it writes may not have been seen
        instance.forget();
        None
    });
    let Some(mut rewrite) = rewrite else {
        // SAFETY: as the caller asked.
        return unsafe { compute(backend, graph) };
    };
    // SAFETY: a copy of a live graph whose node list is replaced by ours, alive until the call returns.
    let status = unsafe {
        let mut ours = *graph;
        ours.nodes = rewrite.nodes.as_mut_ptr();
        ours.n_nodes = rewrite.nodes.len() as i32;
        ours.size = ours.size.max(ours.n_nodes);
        ours.uid = 0;
        compute(backend, &mut ours)
    };
    if !rewrite.finish(instance) {
        log("an attention kernel failed; the graph's result is refused (GGML_STATUS_FAILED)");
        return sys::GGML_STATUS_FAILED;
    }
    status
}
