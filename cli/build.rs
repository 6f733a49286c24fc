//! Lets `sqz` find the llama.cpp libraries that cargo built, wherever it is started from.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let backends = std::env::var("DEP_LLAMA_BACKENDS_DIR")
        .expect("llama-cpp-sys-2 tells the folder of its backends when built with the feature dynamic-backends");
    let libs = Path::new(&backends).with_file_name("lib");
    assert!(libs.is_dir(), "no folder {} beside llama.cpp's backends: run cargo clean and build again", libs.display());
    // DT_RPATH rather than DT_RUNPATH: only the former is also used for the libraries that libllama.so needs.
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,{}", libs.display());
}
