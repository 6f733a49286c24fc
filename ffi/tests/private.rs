//! Resolution where ggml is loaded late and privately, as Python and other plugin hosts do. Cargo puts the folder of the
//! libraries that llama-cpp-sys-2 built on the loader's path; this program does not link with them.

use ggml_sys::Api;

#[test]
fn nothing_is_found_before_and_everything_after_a_private_load() {
    let error = Api::resolve().expect_err("ggml is not loaded yet");
    assert!(error.contains("ggml_version is missing"), "{error}");

    // SAFETY: a NUL-terminated name; ggml's initialisers need nothing.
    let handle = unsafe { libc::dlopen(c"libggml.so.0".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "libggml.so.0 is not on the loader's path");
    // SAFETY: a NUL-terminated name and a pseudo handle.
    let visible = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"ggml_version".as_ptr()) };
    assert!(visible.is_null(), "the load was not private");

    let api = Api::resolve().expect("ggml is loaded");
    api.check().expect("the bindings are for this ggml");
}
