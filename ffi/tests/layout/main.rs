//! The bindings' sizes and offsets against those that the C compiler gave for the same headers (`table.rs`).

use ggml_sys::*;

#[rustfmt::skip]
mod table;

#[test]
fn every_size_and_offset_is_what_the_c_compiler_says() {
    for (name, rust, c) in table::LAYOUT {
        assert_eq!(rust, c, "{name}");
    }
}

#[test]
fn the_table_covers_what_the_plugin_relies_on() {
    let has = |name: &str| table::LAYOUT.iter().any(|(n, _, _)| *n == name);
    let relied_on = [
        "ggml_tensor",
        "ggml_tensor.type_",
        "ggml_tensor.op_params",
        "ggml_tensor.src",
        "ggml_tensor.view_src",
        "ggml_tensor.name",
        "ggml_cgraph",
        "ggml_cgraph.nodes",
        "ggml_backend.iface",
        "ggml_backend_i.graph_compute",
        "ggml_backend_i.free",
        "ggml_backend_device_i.init_backend",
        "ggml_backend_reg.api_version",
    ];
    for name in relied_on {
        assert!(has(name), "{name}");
    }
    assert_eq!((GGML_BACKEND_API_VERSION, GGML_N_TASKS_MAX), (3, -1));
}
