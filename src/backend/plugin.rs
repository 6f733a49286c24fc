//! Registration: checks that this is the ggml we were made for, hooks the CPU device or offers a named one, and presents
//! both as a ggml backend registry.

use std::ffi::{c_char, c_void, CStr};
use std::sync::{Mutex, OnceLock};

use ggml_sys as sys;
use ggml_sys::Api;

use super::hook::{patch_backend, patch_device};
use super::runtime;
use super::stats::log;
use crate::config::Config;

/// A value that ggml keeps a pointer to, made once and never moved or freed.
struct Fixed<T>(T);

// SAFETY: holds function pointers and addresses of objects that ggml shares between threads itself.
unsafe impl<T> Send for Fixed<T> {}
// SAFETY: as above; never changed after it is made.
unsafe impl<T> Sync for Fixed<T> {}

static CPU: OnceLock<Fixed<sys::ggml_backend_dev_t>> = OnceLock::new();
static NAMED: OnceLock<Fixed<Box<sys::ggml_backend_device>>> = OnceLock::new();
static REGISTRY: OnceLock<Fixed<Box<sys::ggml_backend_reg>>> = OnceLock::new();

fn cpu_device(api: &Api) -> Result<sys::ggml_backend_dev_t, String> {
    // SAFETY: ggml's own functions, on devices that it lists.
    unsafe {
        (0..(api.ggml_backend_dev_count)())
            .map(|i| (api.ggml_backend_dev_get)(i))
            .find(|&d| (api.ggml_backend_dev_type)(d) == sys::GGML_BACKEND_DEVICE_TYPE_CPU)
            .ok_or_else(|| "no CPU device is loaded: load ggml's backends before ggml-squeeze".to_string())
    }
}

/// Hooks the CPU device of this process (or, with `config.devices`, prepares the named device `SQZ-CPU`) and puts
/// `config` in force. Backends made before stay as they are. A second call only changes the settings.
///
/// # Errors
/// Another ggml than the one that this build is made for, or no CPU device: then nothing is changed.
pub fn register(config: Config) -> Result<(), String> {
    static ONCE: Mutex<()> = Mutex::new(());
    let _guard = ONCE.lock().unwrap_or_else(|e| e.into_inner());
    if CPU.get().is_none() {
        let api = Api::resolve()?;
        api.check()?;
        let cpu = cpu_device(&api)?;
        if config.devices {
            NAMED.get_or_init(|| Fixed(Box::new(named_device(cpu))));
        } else {
            // SAFETY: a device of ggml's registry.
            unsafe { patch_device(cpu)? };
        }
        CPU.get_or_init(|| Fixed(cpu));
    }
    runtime::start(config);
    Ok(())
}

/// The registry for `ggml_backend_init`, with settings from the environment, or null (after one line on stderr) where the
/// host's ggml is not ours.
pub fn registry() -> sys::ggml_backend_reg_t {
    // ggml may load the same plugin twice
    if CPU.get().is_none() {
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

unsafe extern "C" fn device_count(_reg: sys::ggml_backend_reg_t) -> usize {
    usize::from(NAMED.get().is_some())
}

unsafe extern "C" fn device(_reg: sys::ggml_backend_reg_t, i: usize) -> sys::ggml_backend_dev_t {
    match NAMED.get() {
        Some(named) if i == 0 => (&*named.0 as *const sys::ggml_backend_device).cast_mut(),
        _ => std::ptr::null_mut(),
    }
}

unsafe extern "C" fn proc_address(_reg: sys::ggml_backend_reg_t, name: *const c_char) -> *mut c_void {
    // SAFETY: ggml passes a terminated string.
    let wanted = unsafe { CStr::from_ptr(name) };
    if wanted == c"sqz_stats" {
        return crate::capi::sqz_stats as *mut c_void;
    }
    // what else a host asks of a CPU-like registry (thread count, features) is the CPU's own business
    let Some(cpu) = CPU.get().filter(|_| NAMED.get().is_some()) else { return std::ptr::null_mut() };
    // SAFETY: the CPU device and its registry live as long as the process.
    unsafe {
        let reg = (*cpu.0).reg;
        match (*reg).iface.get_proc_address {
            Some(get) => get(reg, name),
            None => std::ptr::null_mut(),
        }
    }
}

/// The CPU device under another name, whose backends are patched ones.
fn named_device(cpu: sys::ggml_backend_dev_t) -> sys::ggml_backend_device {
    // SAFETY: a live device; a copy keeps its functions and context.
    let mut named = unsafe { *cpu };
    named.iface.get_name = Some(named_name);
    named.iface.get_description = Some(named_description);
    named.iface.init_backend = Some(named_init);
    named.reg = registry_object();
    named
}

unsafe extern "C" fn named_name(_dev: sys::ggml_backend_dev_t) -> *const c_char {
    c"SQZ-CPU".as_ptr()
}

unsafe extern "C" fn named_description(_dev: sys::ggml_backend_dev_t) -> *const c_char {
    c"ggml-squeeze on the CPU".as_ptr()
}

unsafe extern "C" fn backend_name(_backend: sys::ggml_backend_t) -> *const c_char {
    c"SQZ-CPU".as_ptr()
}

unsafe extern "C" fn named_init(dev: sys::ggml_backend_dev_t, params: *const c_char) -> sys::ggml_backend_t {
    let Some(cpu) = CPU.get() else { return std::ptr::null_mut() };
    // SAFETY: the CPU device's own function on the CPU device; the result is patched before anybody else sees it.
    unsafe {
        let Some(init) = (*cpu.0).iface.init_backend else { return std::ptr::null_mut() };
        let backend = init(cpu.0, params);
        if !backend.is_null() {
            patch_backend(backend);
            (*backend).device = dev;
            (*backend).iface.get_name = Some(backend_name);
        }
        backend
    }
}
