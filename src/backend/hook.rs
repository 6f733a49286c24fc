//! Patched backend instances: a CPU backend created after the plugin is the stock object with `graph_compute` and `free`
//! replaced. Nothing else of ggml is touched.

use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use ggml_sys as sys;

use super::graph::Instance;
use super::runtime::{snapshot, stats};
use super::stats::log;
use super::status;

type InitBackend = unsafe extern "C" fn(sys::ggml_backend_dev_t, *const std::ffi::c_char) -> sys::ggml_backend_t;

/// A patched backend: its original functions and our state.
struct Patched {
    original: sys::ggml_backend_i,
    instance: Mutex<Instance>,
}

#[derive(Default)]
struct Hooks {
    /// Original `init_backend` by device address.
    devices: HashMap<usize, InitBackend>,
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
pub unsafe fn patch_device(device: sys::ggml_backend_dev_t) -> Result<(), String> {
    let mut hooks = hooks();
    if hooks.devices.contains_key(&(device as usize)) {
        return Ok(());
    }
    // SAFETY: live by contract.
    let iface = unsafe { &mut (*device).iface };
    let original = iface.init_backend.ok_or("the CPU device has no init_backend: nothing can be hooked")?;
    hooks.devices.insert(device as usize, original);
    iface.init_backend = Some(init_patched);
    Ok(())
}

unsafe extern "C" fn init_patched(
    device: sys::ggml_backend_dev_t,
    params: *const std::ffi::c_char,
) -> sys::ggml_backend_t {
    let original = hooks().devices.get(&(device as usize)).copied();
    let Some(original) = original else { return std::ptr::null_mut() };
    // SAFETY: the device's own function, called as ggml would.
    let backend = unsafe { original(device, params) };
    if !backend.is_null() {
        // SAFETY: a live backend that was just created.
        unsafe { patch_backend(backend) };
    }
    backend
}

/// Replaces the two functions of one backend.
///
/// # Safety
/// `backend` is a live backend that is not computing.
pub unsafe fn patch_backend(backend: sys::ggml_backend_t) {
    // SAFETY: live by contract.
    let object = unsafe { &mut *backend };
    if object.iface.graph_compute.is_none() || object.iface.free.is_none() {
        return;
    }
    let patched = Patched { original: object.iface, instance: Mutex::default() };
    hooks().backends.insert(backend as usize, Arc::new(patched));
    object.iface.graph_compute = Some(compute_patched);
    object.iface.free = Some(free_patched);
}

unsafe extern "C" fn free_patched(backend: sys::ggml_backend_t) {
    let (patched, left) = {
        let mut hooks = hooks();
        (hooks.backends.remove(&(backend as usize)), hooks.backends.len())
    };
    if left == 0 {
        let snapshot = snapshot();
        status::finish(&snapshot);
        let totals = stats();
        if snapshot.config.log > 0 && totals.graphs > 0 {
            log(format_args!("totals: {totals}"));
        }
    }
    if let Some(free) = patched.and_then(|p| p.original.free) {
        // SAFETY: the backend's own function, called once as ggml would.
        unsafe { free(backend) };
    }
}

unsafe extern "C" fn compute_patched(backend: sys::ggml_backend_t, graph: *mut sys::ggml_cgraph) -> sys::ggml_status {
    let Some(patched) = hooks().backends.get(&(backend as usize)).cloned() else { return sys::GGML_STATUS_FAILED };
    let Some(compute) = patched.original.graph_compute else { return sys::GGML_STATUS_FAILED };
    let mut instance = patched.instance.lock().unwrap_or_else(|e| e.into_inner());
    let snapshot = snapshot();
    let decide = AssertUnwindSafe(|| {
        // SAFETY: ggml hands us a live graph with n_nodes nodes.
        let nodes = unsafe { std::slice::from_raw_parts((*graph).nodes, (*graph).n_nodes.max(0) as usize) };
        instance.rewrite(nodes, &snapshot)
    });
    // a panic while deciding costs nothing: the graph is still whole and goes to the stock backend
    let rewrite = catch_unwind(decide).unwrap_or_else(|_| {
        log("deciding on a graph failed; it is computed densely");
        None
    });
    let Some(mut rewrite) = rewrite else {
        // SAFETY: as the caller asked.
        let status = unsafe { compute(backend, graph) };
        status::graph_done(&snapshot);
        return status;
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
    if !rewrite.finish(&mut instance) {
        log("an attention kernel failed; the graph's result is refused (GGML_STATUS_FAILED)");
        return sys::GGML_STATUS_FAILED;
    }
    status::graph_done(&snapshot);
    status
}
