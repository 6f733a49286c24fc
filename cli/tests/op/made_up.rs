//! A GPU of ggml's that is the CPU: what a patched CUDA backend needs of one, to be computed beside a driver that is made up.

use std::ffi::{c_char, CStr};
use std::sync::OnceLock;

use ggml_sys as sys;

struct MadeUp {
    /// Never freed; hooks write to it.
    device: sys::ggml_backend_dev_t,
    cpu: sys::ggml_backend_dev_t,
    init: unsafe extern "C" fn(sys::ggml_backend_dev_t, *const c_char) -> sys::ggml_backend_t,
}

// SAFETY: made once; ggml shares its registries and devices between threads itself.
unsafe impl Send for MadeUp {}
// SAFETY: as above.
unsafe impl Sync for MadeUp {}

static MADE_UP: OnceLock<MadeUp> = OnceLock::new();

fn made_up() -> &'static MadeUp {
    MADE_UP.get().expect("made before ggml knows of it")
}

/// Makes the GPU known to ggml, as the CUDA backend's. Before the plugin hooks any device.
pub fn register() {
    let cpu: sys::ggml_backend_dev_t = {
        // SAFETY: ggml's own list; both crates' bindings are of one structure.
        unsafe { llama_cpp_sys_2::ggml_backend_dev_by_type(llama_cpp_sys_2::GGML_BACKEND_DEVICE_TYPE_CPU).cast() }
    };
    // SAFETY: a live device; a copy keeps its functions.
    let mut copy = unsafe { *cpu };
    let init = copy.iface.init_backend.expect("the CPU makes backends");
    copy.iface.get_name = Some(device_name);
    copy.iface.get_type = Some(device_type);
    copy.iface.get_props = Some(properties);
    copy.iface.init_backend = Some(make_backend);
    let registry = Box::into_raw(Box::new(sys::ggml_backend_reg {
        api_version: sys::GGML_BACKEND_API_VERSION as i32,
        iface: sys::ggml_backend_reg_i {
            get_name: Some(registry_name),
            get_device_count: Some(one_device),
            get_device: Some(the_device),
            get_proc_address: None,
        },
        context: std::ptr::null_mut(),
    }));
    copy.reg = registry;
    MADE_UP.get_or_init(|| MadeUp { device: Box::into_raw(Box::new(copy)), cpu, init });
    // SAFETY: a registry with one device, neither of which is ever freed.
    unsafe { llama_cpp_sys_2::ggml_backend_register(registry.cast()) };
}

unsafe extern "C" fn registry_name(_: sys::ggml_backend_reg_t) -> *const c_char {
    c"CUDA".as_ptr()
}

unsafe extern "C" fn one_device(_: sys::ggml_backend_reg_t) -> usize {
    1
}

unsafe extern "C" fn the_device(_: sys::ggml_backend_reg_t, _: usize) -> sys::ggml_backend_dev_t {
    made_up().device
}

unsafe extern "C" fn device_name(_: sys::ggml_backend_dev_t) -> *const c_char {
    c"CUDA0".as_ptr()
}

unsafe extern "C" fn device_type(_: sys::ggml_backend_dev_t) -> sys::ggml_backend_dev_type {
    sys::GGML_BACKEND_DEVICE_TYPE_GPU
}

unsafe extern "C" fn properties(_: sys::ggml_backend_dev_t, properties: *mut sys::ggml_backend_dev_props) {
    const BUS_ID: &CStr = c"0000:01:00.0";
    // SAFETY: ggml passes room for them.
    unsafe {
        let own = made_up();
        if let Some(of_cpu) = (*own.cpu).iface.get_props {
            of_cpu(own.cpu, properties);
        }
        (*properties).device_id = BUS_ID.as_ptr();
    }
}

unsafe extern "C" fn make_backend(_: sys::ggml_backend_dev_t, params: *const c_char) -> sys::ggml_backend_t {
    let own = made_up();
    // SAFETY: the CPU's own function, on the CPU; the result is nobody else's yet.
    unsafe {
        let backend = (own.init)(own.cpu, params);
        (*backend).device = own.device;
        (*backend).iface.event_record = Some(nothing);
        (*backend).iface.event_wait = Some(nothing);
        backend
    }
}

/// What is computed is there at once: events order nothing.
unsafe extern "C" fn nothing(_: sys::ggml_backend_t, _: sys::ggml_backend_event_t) {}
