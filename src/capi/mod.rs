//! The C ABI: `include/squeeze.h` is generated from this folder (scripts/header.sh). Handles are numbers that are looked up,
//! never followed; every other pointer is checked for null; errors are statuses; no panic crosses.

mod attention;
mod builder;
mod context;
mod handle;
mod index;
mod op;
mod plain;
mod status;

use std::ffi::{c_char, c_void, CStr};
use std::panic::catch_unwind;

use ggml_sys as sys;

use crate::backend;
use status::sqz_status::*;
use status::{fail, guard};

pub use attention::*;
pub use builder::*;
pub use context::*;
pub use index::*;
pub use op::*;
pub use status::{sqz_last_error, sqz_status, sqz_status_str};

/// Number of this interface; a library with another one does not fit a header.
pub const SQZ_ABI_VERSION: u32 = 1;

/// SQZ_ABI_VERSION of the library. Thread-safe.
#[no_mangle]
pub extern "C" fn sqz_abi_version() -> u32 {
    SQZ_ABI_VERSION
}

/// Version of the library, "0.1.0" say; static. Thread-safe.
#[no_mangle]
pub extern "C" fn sqz_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// Told one line of text, without an end of line. May be called from any thread, also while ggml computes.
#[allow(non_camel_case_types)]
pub type sqz_log_callback = Option<unsafe extern "C" fn(line: *const c_char, user_data: *mut c_void)>;

/// Where the library's lines go; null: to stderr, as at the start. `line` is valid during the call.
#[no_mangle]
pub extern "C" fn sqz_set_log(callback: sqz_log_callback, user_data: *mut c_void) -> sqz_status {
    guard(|| {
        let user_data = user_data.expose_provenance();
        backend::set_log(callback.map(|callback| -> backend::LogSink {
            Box::new(move |line: &CStr| {
                // SAFETY: the host's function with the host's data, which it promises to be usable from any thread.
                unsafe { callback(line.as_ptr(), std::ptr::with_exposed_provenance_mut(user_data)) }
            })
        }));
        Ok(())
    })
}

/// Entry point of the plugin (`GGML_BACKEND_PATH`); null where the host's ggml is not the one that this build is made for.
#[no_mangle]
pub extern "C" fn ggml_backend_init() -> sys::ggml_backend_reg_t {
    catch_unwind(backend::registry).unwrap_or(std::ptr::null_mut())
}

/// For a host that links the library: hooks the CPU's and the GPUs' backends, with settings from the environment. Call it
/// after ggml's backends are loaded and before a backend or llama context is made. A second call changes nothing.
#[no_mangle]
pub extern "C" fn sqz_register() -> sqz_status {
    guard(|| match backend::registry().is_null() {
        true => fail(
            SQZ_ERROR_HOST,
            "no ggml that this library is made for is in the process; the line that was logged says why",
        ),
        false => Ok(()),
    })
}
