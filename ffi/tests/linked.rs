//! Resolution where ggml is linked with the program: its symbols are visible to all.

use std::ffi::CStr;

#[test]
fn a_linked_ggml_is_found_and_is_the_one_of_the_bindings() {
    // SAFETY: no arguments. The call also keeps the linker from dropping the libraries.
    let devices = unsafe { llama_cpp_sys_2::ggml_backend_dev_count() };
    let api = ggml_sys::Api::resolve().expect("ggml is linked");
    api.check().expect("the bindings are for this ggml");
    // SAFETY: as ggml.h says.
    unsafe {
        assert_eq!((api.ggml_backend_dev_count)(), devices);
        assert_eq!((api.ggml_type_size)(ggml_sys::GGML_TYPE_F16), 2);
        assert_eq!(CStr::from_ptr((api.ggml_version)()).to_str(), Ok("0.26.0"));
    }
}
