//! CUDA drivers that are missing, do not start, are too old or know no GPU: each is an error that says so, and none a panic. The drivers
//! are made up, so that this runs on machines without a GPU.

use std::path::Path;
use std::process::Command;

use ggml_squeeze::attention::cuda::Device;

/// The few functions that are asked before anything else, with these answers.
const DRIVER: &str = "
int cuInit(unsigned flags) { (void)flags; return INIT; }
int cuDriverGetVersion(int * version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int * n) { *n = 0; return 0; }
int cuDeviceGetByPCIBusId(int * device, const char * id) { (void)device; (void)id; return 101; }
int cuGetErrorName(int error, const char ** text) { (void)error; *text = \"CUDA_ERROR_MADE_UP\"; return 0; }
int cuGetErrorString(int error, const char ** text) { (void)error; *text = \"made up\"; return 0; }
";

/// What `one_case` says with a driver in `folder`.
fn said(folder: &Path) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "one_case", "--nocapture", "--include-ignored"]).env("LD_LIBRARY_PATH", folder);
    let run = command.output().unwrap();
    let out = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(run.status.success(), "{out}{}", String::from_utf8_lossy(&run.stderr));
    out.lines().filter_map(|line| line.split_once("driver: ")).map(|(_, said)| said.to_string() + "\n").collect()
}

#[test]
fn a_driver_that_cannot_be_used_is_named() {
    if ggml_squeeze::attention::cuda::missing().is_some() {
        println!("skipped: this build has no CUDA kernels");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let none = said(folder.path());
    if none.starts_with("Ok") {
        println!("skipped: this machine has a GPU");
        return;
    }
    let with = |init: u32, version: u32| {
        let own = tempfile::tempdir().unwrap();
        let source = own.path().join("driver.c");
        std::fs::write(&source, DRIVER).unwrap();
        let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
        cc.args(["-shared", "-fPIC", &format!("-DINIT={init}"), &format!("-DVERSION={version}")]);
        assert!(cc.arg(&source).arg("-o").arg(own.path().join("libcuda.so")).status().unwrap().success());
        said(own.path())
    };
    assert!(none.contains("no CUDA driver is installed"), "{none}");
    let stopped = with(999, 13000);
    assert!(stopped.contains("the CUDA driver cannot start"), "{stopped}");
    let old = with(0, 11080);
    assert!(old.contains("is for CUDA 11.8, 12.0 is needed"), "{old}");
    let empty = with(0, 13000);
    assert!(empty.contains("Ok(0)") && empty.contains("cannot find the device of a backend"), "{empty}");
}

/// One process's part; run by the test above.
#[test]
#[ignore = "a part of a_driver_that_cannot_be_used_is_named"]
fn one_case() {
    match Device::count() {
        Ok(n) => println!("\ndriver: Ok({n})"),
        Err(error) => println!("\ndriver: {error}"),
    }
    if let Err(error) = Device::with_bus_id("0000:01:00.0") {
        println!("\ndriver: {error}");
    }
}
