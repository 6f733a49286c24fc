//! Registration: checks that this is the ggml we were made for, hooks devices or offers named ones, and presents
//! both as a ggml backend registry.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::sync::{Mutex, OnceLock};

use ggml_sys as sys;
use ggml_sys::Api;

use super::hook::{patch_backend, patch_device, patch_supports, Kind};
use super::runtime;
use super::stats::log;
use crate::config::Config;

/// A value that ggml keeps a pointer to, made once and never moved or freed.
struct Fixed<T>(T);

// SAFETY: holds function pointers and addresses of objects that ggml shares between threads itself.
unsafe impl<T> Send for Fixed<T> {}
// SAFETY: as above; never changed after it is made.
unsafe impl<T> Sync for Fixed<T> {}

/// A device of ours under its own name, whose backends are patched ones of `origin`.
struct Named {
    device: Box<sys::ggml_backend_device>,
    origin: sys::ggml_backend_dev_t,
    kind: Kind,
    name: CString,
    description: CString,
}

/// What was found at registration: the CPU, and the named devices, if they were asked for.
struct Found {
    cpu: sys::ggml_backend_dev_t,
    named: Vec<Named>,
}

static FOUND: OnceLock<Fixed<Found>> = OnceLock::new();
static REGISTRY: OnceLock<Fixed<Box<sys::ggml_backend_reg>>> = OnceLock::new();

/// Devices that can be hooked, the CPU first.
fn devices(api: &Api) -> Result<Vec<(sys::ggml_backend_dev_t, Kind)>, String> {
    let mut found = Vec::new();
    // SAFETY: ggml's own functions, on devices that it lists.
    unsafe {
        for device in (0..(api.ggml_backend_dev_count)()).map(|i| (api.ggml_backend_dev_get)(i)) {
            if (api.ggml_backend_dev_type)(device) == sys::GGML_BACKEND_DEVICE_TYPE_CPU {
                found.insert(0, (device, Kind::Cpu));
            } else if let Some(bus_id) = cuda_bus_id(device) {
                found.push((device, Kind::Cuda(bus_id)));
            }
        }
    }
    match found.first() {
        Some((_, Kind::Cpu)) => Ok(found),
        _ => Err("no CPU device is loaded: load ggml's backends before ggml-squeeze".to_string()),
    }
}

/// The PCI bus id of a CUDA device that can be hooked.
///
/// # Safety
/// `device` is one of ggml's.
unsafe fn cuda_bus_id(device: sys::ggml_backend_dev_t) -> Option<String> {
    // SAFETY: a live device and its registry; names are terminated strings; the properties are filled by the device's own
    // function.
    unsafe {
        let reg = (*device).reg;
        let name = (*reg).iface.get_name?;
        if CStr::from_ptr(name(reg)) != c"CUDA" {
            return None;
        }
        let get = (*device).iface.get_props?;
        let mut props: sys::ggml_backend_dev_props = std::mem::zeroed();
        get(device, &mut props);
        (!props.device_id.is_null()).then(|| CStr::from_ptr(props.device_id).to_string_lossy().into_owned())
    }
}

/// Does the CUDA backend spread parts of a layer over streams? Attention nodes are where it joins them again: cutting a graph
/// there would lose that.
fn forks_streams() -> bool {
    std::env::var("GGML_CUDA_GRAPH_OPT").is_ok_and(|v| v.trim().parse::<i32>() == Ok(1))
}

/// Hooks the CPU and the CUDA devices of this process (or, with `config.devices`, prepares the named devices `SQZ-CPU`, `SQZ0`
/// and so on) and puts `config` in force. Backends made before stay as they are. A second call only changes the settings.
///
/// # Errors
/// Another ggml than the one that this build is made for, or no CPU device: then nothing is changed.
pub fn register(config: Config) -> Result<(), String> {
    static ONCE: Mutex<()> = Mutex::new(());
    let _guard = ONCE.lock().unwrap_or_else(|e| e.into_inner());
    if FOUND.get().is_none() {
        let mut all = devices(Api::of_process()?)?;
        if forks_streams() && all.len() > 1 {
            log("GGML_CUDA_GRAPH_OPT=1 spreads a layer over several streams: attention on GPUs stays llama.cpp's");
            all.truncate(1);
        }
        if all.len() > 1 {
            if let Some(why) = crate::attention::cuda::missing() {
                log(format_args!("this build has no CUDA kernels ({why}): attention on GPUs stays llama.cpp's"));
                all.truncate(1);
            }
        }
        let cpu = all[0].0;
        let mut named = Vec::new();
        for (i, (device, kind)) in all.into_iter().enumerate() {
            if config.devices {
                named.push(named_device(device, kind, i));
            } else {
                // SAFETY: a device of ggml's registry.
                unsafe { patch_device(device, kind)? };
            }
        }
        FOUND.get_or_init(|| Fixed(Found { cpu, named }));
    }
    runtime::start(config);
    Ok(())
}

/// The registry for `ggml_backend_init`, with settings from the environment, or null (after one line on stderr) where the
/// host's ggml is not ours.
pub fn registry() -> sys::ggml_backend_reg_t {
    // ggml may load the same plugin twice
    if FOUND.get().is_none() {
        let (config, problems) = Config::from_env(|name| std::env::var(name).ok());
        problems.iter().for_each(log);
        if let Err(error) = register(config) {
            log(format_args!("{error}; the plugin stays out"));
            return std::ptr::null_mut();
        }
    }
    registry_object()
}

fn registry_object() -> sys::ggml_backend_reg_t {
    let registry = REGISTRY.get_or_init(|| {
        Fixed(Box::new(sys::ggml_backend_reg {
            api_version: sys::GGML_BACKEND_API_VERSION as i32,
            iface: sys::ggml_backend_reg_i {
                get_name: Some(registry_name),
                get_device_count: Some(device_count),
                get_device: Some(device),
                get_proc_address: Some(proc_address),
            },
            context: std::ptr::null_mut(),
        }))
    });
    (&*registry.0 as *const sys::ggml_backend_reg).cast_mut()
}

unsafe extern "C" fn registry_name(_reg: sys::ggml_backend_reg_t) -> *const c_char {
    c"SQZ".as_ptr()
}

fn named() -> &'static [Named] {
    FOUND.get().map_or(&[], |found| &found.0.named)
}

unsafe extern "C" fn device_count(_reg: sys::ggml_backend_reg_t) -> usize {
    named().len()
}

unsafe extern "C" fn device(_reg: sys::ggml_backend_reg_t, i: usize) -> sys::ggml_backend_dev_t {
    named().get(i).map_or(std::ptr::null_mut(), |own| (&*own.device as *const sys::ggml_backend_device).cast_mut())
}

unsafe extern "C" fn proc_address(_reg: sys::ggml_backend_reg_t, name: *const c_char) -> *mut c_void {
    // SAFETY: ggml passes a terminated string.
    let wanted = unsafe { CStr::from_ptr(name) };
    if wanted == c"sqz_get_stats" {
        return crate::capi::sqz_get_stats as *mut c_void;
    }
    if named().is_empty() {
        return std::ptr::null_mut();
    }
    // The CPU's functions abort for a backend that is not the CPU's: a host asks the registry, then calls for each backend.
    match wanted.to_bytes() {
        b"ggml_backend_set_n_threads" => set_n_threads as *mut c_void,
        b"ggml_backend_set_abort_callback" => set_abort_callback as *mut c_void,
        b"ggml_backend_cpu_set_threadpool" => set_threadpool as *mut c_void,
        _ => of_cpu(wanted),
    }
}

/// What the CPU's registry has under a name.
fn of_cpu(name: &CStr) -> *mut c_void {
    let Some(found) = FOUND.get() else { return std::ptr::null_mut() };
    // SAFETY: the CPU device and its registry live as long as the process.
    unsafe {
        let reg = (*found.0.cpu).reg;
        match (*reg).iface.get_proc_address {
            Some(get) => get(reg, name.as_ptr()),
            None => std::ptr::null_mut(),
        }
    }
}

/// The CPU's function of a name, if the backend is one of the CPU.
///
/// # Safety
/// `backend` is live.
unsafe fn for_cpu(backend: sys::ggml_backend_t, name: &CStr) -> Option<std::ptr::NonNull<c_void>> {
    // SAFETY: live by contract.
    let own = named_of(unsafe { (*backend).device })?;
    std::ptr::NonNull::new(if own.kind == Kind::Cpu { of_cpu(name) } else { std::ptr::null_mut() })
}

unsafe extern "C" fn set_n_threads(backend: sys::ggml_backend_t, n: c_int) {
    // SAFETY: ggml's types of these functions (ggml-backend.h); the CPU's registry has them under these names.
    unsafe {
        if let Some(found) = for_cpu(backend, c"ggml_backend_set_n_threads") {
            let own: unsafe extern "C" fn(sys::ggml_backend_t, c_int) = std::mem::transmute(found.as_ptr());
            own(backend, n);
        }
    }
}

unsafe extern "C" fn set_abort_callback(backend: sys::ggml_backend_t, callback: *mut c_void, data: *mut c_void) {
    // SAFETY: as above; the callback is passed through.
    unsafe {
        if let Some(found) = for_cpu(backend, c"ggml_backend_set_abort_callback") {
            let own: unsafe extern "C" fn(sys::ggml_backend_t, *mut c_void, *mut c_void) =
                std::mem::transmute(found.as_ptr());
            own(backend, callback, data);
        }
    }
}

unsafe extern "C" fn set_threadpool(backend: sys::ggml_backend_t, pool: *mut c_void) {
    // SAFETY: as above; the pool is passed through.
    unsafe {
        if let Some(found) = for_cpu(backend, c"ggml_backend_cpu_set_threadpool") {
            let own: unsafe extern "C" fn(sys::ggml_backend_t, *mut c_void) = std::mem::transmute(found.as_ptr());
            own(backend, pool);
        }
    }
}

/// A device under another name, whose backends are patched ones; number 0 is the CPU.
fn named_device(origin: sys::ggml_backend_dev_t, kind: Kind, number: usize) -> Named {
    // SAFETY: a live device; a copy keeps its functions and context.
    let mut device = Box::new(unsafe { *origin });
    device.iface.get_name = Some(named_name);
    device.iface.get_description = Some(named_description);
    device.iface.init_backend = Some(named_init);
    device.reg = registry_object();
    if kind != Kind::Cpu {
        // SAFETY: a copy that nobody else knows yet.
        unsafe { patch_supports(&mut *device) };
    }
    let (name, description) = match kind {
        Kind::Cpu => ("SQZ-CPU".to_string(), "ggml-squeeze on the CPU".to_string()),
        Kind::Cuda(_) => (format!("SQZ{}", number - 1), format!("ggml-squeeze on GPU {}", number - 1)),
    };
    let text = |s: String| CString::new(s).unwrap_or_default();
    Named { device, origin, kind, name: text(name), description: text(description) }
}

/// The named device that ggml means; it only knows those of ours.
fn named_of(dev: sys::ggml_backend_dev_t) -> Option<&'static Named> {
    named().iter().find(|own| std::ptr::eq(&*own.device, dev))
}

unsafe extern "C" fn named_name(dev: sys::ggml_backend_dev_t) -> *const c_char {
    named_of(dev).map_or(c"SQZ".as_ptr(), |own| own.name.as_ptr())
}

unsafe extern "C" fn named_description(dev: sys::ggml_backend_dev_t) -> *const c_char {
    named_of(dev).map_or(c"".as_ptr(), |own| own.description.as_ptr())
}

unsafe extern "C" fn backend_name(backend: sys::ggml_backend_t) -> *const c_char {
    // SAFETY: a live backend of a named device.
    unsafe { named_name((*backend).device) }
}

unsafe extern "C" fn named_init(dev: sys::ggml_backend_dev_t, params: *const c_char) -> sys::ggml_backend_t {
    let Some(own) = named_of(dev) else { return std::ptr::null_mut() };
    // SAFETY: the original device's own function on that device; the result is patched before anybody else sees it.
    unsafe {
        let Some(init) = (*own.origin).iface.init_backend else { return std::ptr::null_mut() };
        let backend = init(own.origin, params);
        if !backend.is_null() {
            patch_backend(backend, &own.kind);
            (*backend).device = dev;
            (*backend).iface.get_name = Some(backend_name);
        }
        backend
    }
}
