//! Results of the C functions, the text of the last error, and the wall that no panic passes.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{c_char, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::backend::CaptureError;
use crate::build::BuildError;
use crate::index::{IndexError, ModelError};

/// What a function returns: SQZ_OK or an error in a number range of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub enum sqz_status {
    SQZ_OK = 0,
    /// A pointer that must not be null is null.
    SQZ_ERROR_NULL = 27001,
    /// Not a live handle of the type that is asked for: freed, or of another type, or none at all.
    SQZ_ERROR_HANDLE = 27002,
    /// A value that is out of its range.
    SQZ_ERROR_ARGUMENT = 27003,
    /// The `size` of a structure is not one that this library knows.
    SQZ_ERROR_SIZE = 27004,
    /// A file cannot be read or written.
    SQZ_ERROR_IO = 27005,
    /// The file or memory holds no index that could be used: damaged, of another kind or version.
    SQZ_ERROR_INDEX = 27006,
    /// The index was made with another model, or the model cannot be read.
    SQZ_ERROR_MODEL = 27007,
    /// No index can be built of this.
    SQZ_ERROR_BUILD = 27008,
    /// The host did not decode what was to be captured.
    SQZ_ERROR_CAPTURE = 27009,
    /// A callback of the host asked for the end.
    SQZ_ERROR_CANCELLED = 27010,
    /// The index is attached there already.
    SQZ_ERROR_ATTACHED = 27011,
    /// The index is not attached there.
    SQZ_ERROR_NOT_ATTACHED = 27012,
    /// No ggml that this library is made for is in the process.
    SQZ_ERROR_HOST = 27013,
    /// A call that the kernels do not take.
    SQZ_ERROR_UNSUPPORTED = 27014,
    /// The system (or the GPU) has no memory for it.
    SQZ_ERROR_MEMORY = 27015,
    /// No GPU that could be used: none of this number, no driver, a build without kernels, or the driver refuses.
    SQZ_ERROR_DEVICE = 27016,
    /// A fault of this library; nothing was changed.
    SQZ_ERROR_INTERNAL = 27099,
}

use sqz_status::*;

/// An error with its text.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: sqz_status,
    pub text: String,
}

pub(super) type Outcome<T = ()> = Result<T, Failure>;

pub(super) fn fail<T>(status: sqz_status, text: impl Into<String>) -> Outcome<T> {
    Err(Failure { status, text: text.into() })
}

impl From<IndexError> for Failure {
    fn from(error: IndexError) -> Failure {
        let status = match error {
            IndexError::Io { .. } => SQZ_ERROR_IO,
            IndexError::Memory { .. } => SQZ_ERROR_MEMORY,
            _ => SQZ_ERROR_INDEX,
        };
        Failure { status, text: error.to_string() }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Failure {
        let status = if matches!(error, ModelError::Io { .. }) { SQZ_ERROR_IO } else { SQZ_ERROR_MODEL };
        Failure { status, text: error.to_string() }
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Failure {
        Failure { status: SQZ_ERROR_BUILD, text: error.to_string() }
    }
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Failure {
        let status = if matches!(error, CaptureError::Host(_)) { SQZ_ERROR_HOST } else { SQZ_ERROR_CAPTURE };
        Failure { status, text: error.to_string() }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

fn remember(text: String) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    // A thread that ends has no last error any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = text);
}

/// Runs what a C function does; an error or a panic becomes a status, with its text remembered for the thread.
pub(super) fn guard(run: impl FnOnce() -> Outcome) -> sqz_status {
    let failure = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return SQZ_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            Failure { status: SQZ_ERROR_INTERNAL, text: format!("a fault of ggml-squeeze: {}", why(&*panic)) }
        }
    };
    remember(failure.text);
    failure.status
}

fn why(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "unknown".to_string())
}

/// Text of a status, never null, static. Thread-safe.
#[no_mangle]
pub extern "C" fn sqz_status_str(status: i32) -> *const c_char {
    const TEXTS: [(sqz_status, &CStr); 18] = [
        (SQZ_OK, c"no error"),
        (SQZ_ERROR_NULL, c"a pointer is null"),
        (SQZ_ERROR_HANDLE, c"not a live handle of this type"),
        (SQZ_ERROR_ARGUMENT, c"a value is out of its range"),
        (SQZ_ERROR_SIZE, c"a structure has an unknown size"),
        (SQZ_ERROR_IO, c"a file cannot be read or written"),
        (SQZ_ERROR_INDEX, c"no index that could be used"),
        (SQZ_ERROR_MODEL, c"the index does not fit the model"),
        (SQZ_ERROR_BUILD, c"no index can be built of this"),
        (SQZ_ERROR_CAPTURE, c"the prefix was not captured"),
        (SQZ_ERROR_CANCELLED, c"cancelled"),
        (SQZ_ERROR_ATTACHED, c"the index is attached already"),
        (SQZ_ERROR_NOT_ATTACHED, c"the index is not attached"),
        (SQZ_ERROR_HOST, c"no ggml that this library is made for"),
        (SQZ_ERROR_UNSUPPORTED, c"a call that the kernels do not take"),
        (SQZ_ERROR_MEMORY, c"the system has no memory for it"),
        (SQZ_ERROR_DEVICE, c"no GPU that could be used"),
        (SQZ_ERROR_INTERNAL, c"a fault of ggml-squeeze"),
    ];
    TEXTS.iter().find(|(s, _)| *s as i32 == status).map_or(c"unknown status", |(_, text)| text).as_ptr()
}

/// What the last function that failed on this thread had to say: what, where and what to do. Never null; empty before the
/// first. Valid until the next failure on this thread, or its end.
#[no_mangle]
pub extern "C" fn sqz_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}
