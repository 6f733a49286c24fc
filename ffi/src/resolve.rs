//! Finds the host's ggml in this process and checks that it is the one that the bindings describe.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::mem::size_of;
use std::sync::OnceLock;

use crate::*;

const VERSION: &str = GGML_SERIES;
/// `sizeof(struct ggml_object)`, private to ggml.c: part of what `ggml_tensor_overhead()` returns.
const OBJECT_SIZE: usize = 32;
/// Operations that the plugin tells apart by number, with ggml's name for each.
const OPS: [(ggml_op, &CStr); 11] = [
    (GGML_OP_NONE, c"NONE"),
    (GGML_OP_CPY, c"CPY"),
    (GGML_OP_RESHAPE, c"RESHAPE"),
    (GGML_OP_VIEW, c"VIEW"),
    (GGML_OP_PERMUTE, c"PERMUTE"),
    (GGML_OP_TRANSPOSE, c"TRANSPOSE"),
    (GGML_OP_GET_ROWS, c"GET_ROWS"),
    (GGML_OP_SET_ROWS, c"SET_ROWS"),
    (GGML_OP_ROPE, c"ROPE"),
    (GGML_OP_FLASH_ATTN_EXT, c"FLASH_ATTN_EXT"),
    (GGML_OP_CUSTOM, c"CUSTOM"),
];

/// Where symbols are looked for: a function from name to address, null if it is not there.
type Scope<'a> = &'a dyn Fn(&CStr) -> *mut c_void;

macro_rules! api {
    (
        required { $($(#[$doc:meta])* $name:ident: $kind:ident = fn($($arg:ty),*) $(-> $ret:ty)?;)* }
        optional { $($(#[$optional_doc:meta])* $optional:ident: $optional_kind:ident;)* }
    ) => {
        /// Functions of the host's ggml, all out of one copy of it. Field names are ggml's.
        #[derive(Clone, Copy, Debug)]
        pub struct Api {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            $($(#[$optional_doc])* pub $optional: $optional_kind,)*
        }

        // The header's type of each function, as bindgen read it, is the type of the field.
        $(const _: fn(unsafe extern "C" fn($($arg),*) $(-> $ret)?) -> $kind = |f| Some(f);)*

        impl Api {
            /// Looks every function up in one scope; an error is the number of missing ones, the optional ones aside, and the
            /// first of their names.
            fn from_scope(scope: Scope) -> Result<Api, (usize, &'static str)> {
                let mut missing = Vec::new();
                $(let $name = scope(const { as_c_str(concat!(stringify!($name), "\0")) });
                if $name.is_null() {
                    missing.push(stringify!($name));
                })*
                match missing.first() {
                    Some(first) => Err((missing.len(), first)),
                    None => Ok(Api {
                        // SAFETY: not null, and exported under ggml's name for a function of this very type (checked above
                        // against the header; that the host's header was the same is what `check` is for).
                        $($name: unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>($name)
                        },)*
                        // SAFETY: as above, or null, which is `None`.
                        $($optional: unsafe {
                            std::mem::transmute::<*mut c_void, $optional_kind>(
                                scope(const { as_c_str(concat!(stringify!($optional), "\0")) }),
                            )
                        },)*
                    }),
                }
            }
        }
    };
}

const fn as_c_str(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a symbol name holds a NUL byte"),
    }
}

api! {
    required {
        ggml_version: ggml_version_fn = fn() -> *const c_char;
        /// The operation must be below `GGML_OP_COUNT`.
        ggml_op_name: ggml_op_name_fn = fn(ggml_op) -> *const c_char;
        /// Bytes of one block of the type.
        ggml_type_size: ggml_type_size_fn = fn(ggml_type) -> usize;
        ggml_tensor_overhead: ggml_tensor_overhead_fn = fn() -> usize;
        ggml_backend_dev_count: ggml_backend_dev_count_fn = fn() -> usize;
        /// The index must be below `ggml_backend_dev_count()`.
        ggml_backend_dev_get: ggml_backend_dev_get_fn = fn(usize) -> ggml_backend_dev_t;
        ggml_backend_dev_name: ggml_backend_dev_name_fn = fn(ggml_backend_dev_t) -> *const c_char;
        ggml_backend_dev_type: ggml_backend_dev_type_fn = fn(ggml_backend_dev_t) -> ggml_backend_dev_type;
        ggml_backend_buffer_is_host: ggml_backend_buffer_is_host_fn = fn(ggml_backend_buffer_t) -> bool;
        /// Tensor, destination, offset into the tensor and size in bytes; waits for the copy.
        ggml_backend_tensor_get: ggml_backend_tensor_get_fn = fn(*const ggml_tensor, *mut c_void, usize, usize);
    }
    optional {
        /// Context, type, 4 extents, sources and their number, callback, number of tasks, user data.
        ggml_custom_4d: ggml_custom_4d_fn;
        /// Context, q, k, v, mask or null, scale, max_bias, logit_softcap.
        ggml_flash_attn_ext: ggml_flash_attn_ext_fn;
    }
}

impl Api {
    /// The ggml of this process, found and checked once it is there.
    ///
    /// # Errors
    /// As `resolve` and `check`; a later call looks again.
    pub fn of_process() -> Result<&'static Api, String> {
        static FOUND: OnceLock<Api> = OnceLock::new();
        if let Some(api) = FOUND.get() {
            return Ok(api);
        }
        let api = Api::resolve()?;
        api.check()?;
        Ok(FOUND.get_or_init(|| api))
    }

    /// Finds ggml in this process: among the symbols visible to all, then, as a host may have loaded it privately
    /// (`RTLD_LOCAL`, as Python does), in each loaded library whose file name contains "ggml" or "llama".
    ///
    /// # Errors
    /// No copy of ggml has every function: a sentence that names a missing one.
    pub fn resolve() -> Result<Api, String> {
        // SAFETY: a NUL-terminated name and a pseudo handle.
        let (mut fewest, mut name) =
            match Api::from_scope(&|name| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) }) {
                Ok(api) => return Ok(api),
                Err(missing) => missing,
            };
        for library in loaded_libraries() {
            // SAFETY: RTLD_NOLOAD runs no initialiser; it only takes a reference to what is loaded already.
            let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
            if handle.is_null() {
                continue;
            }
            // SAFETY: a live handle and a NUL-terminated name.
            match Api::from_scope(&|name| unsafe { libc::dlsym(handle, name.as_ptr()) }) {
                // The reference is kept: ggml must stay where the pointers point.
                Ok(api) => return Ok(api),
                Err(missing) if missing.0 < fewest => (fewest, name) = missing,
                Err(_) => {}
            }
            // SAFETY: the handle came from dlopen above and is not used again.
            unsafe { libc::dlclose(handle) };
        }
        Err(format!(
            "no loaded library has all the functions of ggml {VERSION} that ggml-squeeze calls; {name} is missing \
             ({fewest} in all): the host must have that version in shared libraries (BUILD_SHARED_LIBS=ON), or export its \
             own functions (-rdynamic)"
        ))
    }

    /// Compares the ggml that was found with the one that the bindings were made from: version, numbers of the
    /// operations, size of a tensor.
    ///
    /// # Errors
    /// A sentence that says what differs; nothing in the bindings may then be relied on.
    pub fn check(&self) -> Result<(), String> {
        let remedy = format!("use a llama.cpp with ggml {VERSION}, or a ggml-squeeze made for this one");
        // SAFETY: no arguments; ggml returns a static string.
        let version = unsafe { text((self.ggml_version)()) };
        let series = version.strip_prefix(VERSION);
        if !series.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-'])) {
            return Err(format!("the host's ggml is version {version}: {remedy}"));
        }
        for (op, expected) in OPS {
            // SAFETY: a valid operation of ggml 0.26, as the version above is; ggml returns a static string.
            let found = unsafe { text((self.ggml_op_name)(op)) };
            if expected.to_bytes() != found.as_bytes() {
                let expected = expected.to_string_lossy();
                return Err(format!("operation {op} of the host's ggml is {found}, not {expected}: {remedy}"));
            }
        }
        // SAFETY: no arguments.
        let size = unsafe { (self.ggml_tensor_overhead)() }.wrapping_sub(OBJECT_SIZE);
        if size != size_of::<ggml_tensor>() {
            return Err(format!(
                "a tensor of the host's ggml has {size} bytes, not {} (was it built with another GGML_MAX_NAME?): {remedy}",
                size_of::<ggml_tensor>()
            ));
        }
        Ok(())
    }
}

/// # Safety
/// Null, or a NUL-terminated string that is never freed.
unsafe fn text(raw: *const c_char) -> String {
    if raw.is_null() {
        return "(null)".to_string();
    }
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned()
}

/// Paths of the loaded libraries that may hold ggml.
fn loaded_libraries() -> Vec<CString> {
    unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, found: *mut c_void) -> c_int {
        // SAFETY: `found` is the vector below, and the loader hands out a valid entry.
        let (found, path) = unsafe { (&mut *found.cast::<Vec<CString>>(), (*info).dlpi_name) };
        if !path.is_null() {
            // SAFETY: the loader's path of the library, NUL-terminated.
            let path = unsafe { CStr::from_ptr(path) };
            if may_hold_ggml(path.to_bytes()) {
                found.push(path.to_owned());
            }
        }
        0
    }
    let mut found: Vec<CString> = Vec::new();
    // SAFETY: the callback gets the vector, for the time of the call, and does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut found).cast()) };
    found
}

fn may_hold_ggml(path: &[u8]) -> bool {
    let file = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
    file.windows(4).any(|w| w == b"ggml") || file.windows(5).any(|w| w == b"llama")
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn version_now() -> *const c_char {
        c"0.26.3".as_ptr()
    }
    unsafe extern "C" fn version_later() -> *const c_char {
        c"0.260.0".as_ptr()
    }
    unsafe extern "C" fn op_name(op: ggml_op) -> *const c_char {
        OPS.iter().find(|(n, _)| *n == op).map_or(c"X", |(_, name)| name).as_ptr()
    }
    unsafe extern "C" fn op_name_shifted(op: ggml_op) -> *const c_char {
        // SAFETY: any number will do.
        unsafe { op_name(op.wrapping_sub(1)) }
    }
    unsafe extern "C" fn overhead() -> usize {
        OBJECT_SIZE + size_of::<ggml_tensor>()
    }
    unsafe extern "C" fn overhead_long_names() -> usize {
        OBJECT_SIZE + size_of::<ggml_tensor>() + 64
    }

    fn api() -> Api {
        let mut api = Api::from_scope(&|_| version_now as *mut c_void).expect("every name is there");
        api.ggml_op_name = op_name;
        api.ggml_tensor_overhead = overhead;
        api
    }

    #[test]
    fn the_expected_ggml_passes_and_each_difference_is_named() {
        api().check().expect("as expected");
        let error = Api { ggml_version: version_later, ..api() }.check().expect_err("version");
        assert!(error.contains("version 0.260.0"), "{error}");
        let error = Api { ggml_op_name: op_name_shifted, ..api() }.check().expect_err("operations");
        assert!(error.contains("operation 0 ") && error.contains("not NONE"), "{error}");
        let error = Api { ggml_tensor_overhead: overhead_long_names, ..api() }.check().expect_err("size");
        assert!(error.contains("GGML_MAX_NAME"), "{error}");
    }

    #[test]
    fn a_scope_lacking_one_function_is_refused_by_its_name() {
        let lacks = |missing: &'static CStr| {
            Api::from_scope(&move |name| {
                if name == missing {
                    std::ptr::null_mut()
                } else {
                    version_now as *mut c_void
                }
            })
        };
        assert_eq!(lacks(c"ggml_backend_dev_get").err(), Some((1, "ggml_backend_dev_get")));
        assert_eq!(lacks(c"ggml_version").err(), Some((1, "ggml_version")));
        assert!(lacks(c"ggml_custom_4d").is_ok_and(|api| api.ggml_custom_4d.is_none()), "it is optional");
        assert!(lacks(c"ggml_other").is_ok_and(|api| api.ggml_custom_4d.is_some()));
    }

    #[test]
    fn libraries_are_told_by_their_file_name() {
        for path in ["/usr/lib/libggml.so.0", "libllama.so", "/x/libggml-base.so.0.26.0", "/y/_llama_cpp.so"] {
            assert!(may_hold_ggml(path.as_bytes()), "{path}");
        }
        for path in ["", "/ggml/libc.so.6", "/llama/x.so", "libgg.so"] {
            assert!(!may_hold_ggml(path.as_bytes()), "{path}");
        }
    }
}
