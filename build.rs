//! Link settings of the plugin, and its CUDA kernels where nvcc is found.
//!
//! nvcc is looked for in `$CUDA_HOME/bin`, on the `PATH`, in the packages of the `python3` on the `PATH` (nvidia-cuda-nvcc and
//! its kin) and in /usr/local/cuda/bin. `SQZ_CUDA=0` leaves the kernels out. `SQZ_CUDA_ARCHS` names the
//! architectures that get machine code, as in "80 90" (default "90"); every other from 8.0 on is served by the driver's
//! compiler, from PTX. (Names with GGML_ would have llama.cpp built again for sqz whenever they change.)

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;

/// Kernels by head size (of keys, or of keys and values) come in files of their own, so that many can be compiled at once.
const KERNELS: [&str; 47] = [
    "digest",
    "rows",
    "lookup",
    "lookup_64",
    "lookup_80",
    "lookup_96",
    "lookup_112",
    "lookup_128",
    "lookup_192",
    "lookup_256",
    "select",
    "attend",
    "attend_64_64",
    "attend_80_80",
    "attend_96_64",
    "attend_96_96",
    "attend_112_112",
    "attend_128_128",
    "attend_192_128",
    "attend_192_192",
    "attend_256_256",
    "merge",
    "prefill_plan",
    "prefill_lookup_64",
    "prefill_lookup_80",
    "prefill_lookup_96",
    "prefill_lookup_112",
    "prefill_lookup_128",
    "prefill_lookup_192",
    "prefill_lookup_256",
    "prefill_attend",
    "prefill_attend_64_64",
    "prefill_attend_80_80",
    "prefill_attend_96_64",
    "prefill_attend_96_96",
    "prefill_attend_112_112",
    "prefill_attend_128_128",
    "prefill_attend_192_128",
    "prefill_attend_192_192",
    "prefill_attend_256_256",
    "prefill_merge",
    "kmeans_unit",
    "kmeans_assign",
    "kmeans_sort",
    "kmeans_repair",
    "kmeans_centre",
    "kmeans_summary",
];
const DEFAULT_ARCHS: &str = "90";
/// Oldest architecture of the PTX.
const PTX: &str = "80";

fn main() {
    // ggml may close the plugin while patched backends still point into it
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["CUDA_HOME", "SQZ_CUDA", "SQZ_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let reason = match compiler() {
        Ok(nvcc) => match compile(&nvcc, &out) {
            Ok(()) => String::new(),
            Err(error) => {
                println!("cargo:warning=the CUDA kernels are left out: {error}");
                error
            }
        },
        Err(reason) => {
            println!("cargo:warning=built for the CPU only: {reason}");
            reason
        }
    };
    let mut code = format!(
        "/// Why the kernels are not built in; empty if they are.\npub(super) const MISSING: &str = {reason:?};\n"
    );
    for kernel in KERNELS {
        let path = out.join(format!("{kernel}.fatbin"));
        let bytes = if reason.is_empty() { format!("include_bytes!({path:?})") } else { "&[]".into() };
        code += &format!("pub(crate) static {}: &[u8] = {bytes};\n", kernel.to_uppercase());
    }
    fs::write(out.join("fatbins.rs"), code).expect("OUT_DIR can be written");
}

/// The compiler, or why there is none.
fn compiler() -> Result<PathBuf, String> {
    if env::var("SQZ_CUDA").is_ok_and(|v| v == "0") {
        return Err("SQZ_CUDA=0".into());
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    folders.extend(env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin")));
    folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    let script = "import nvidia; print('\\n'.join(nvidia.__path__))";
    if let Ok(found) = Command::new("python3").args(["-c", script]).output() {
        folders.extend(String::from_utf8_lossy(&found.stdout).lines().map(|l| Path::new(l).join("cu13/bin")));
    }
    folders.push("/usr/local/cuda/bin".into());
    let nvcc = folders.iter().map(|f| f.join("nvcc")).find(|p| p.is_file());
    nvcc.ok_or_else(|| {
        "no nvcc in $CUDA_HOME/bin, on the PATH, among python3's packages or in /usr/local/cuda/bin".into()
    })
}

/// Smallest machine code that every driver for this compiler loads: what nvcc 12 makes in this mode needs a driver for 12.4.
fn compression(nvcc: &Path) -> Option<&'static str> {
    let said = Command::new(nvcc).arg("--version").output().ok()?.stdout;
    let said = String::from_utf8_lossy(&said);
    let release: u32 = said.split("release ").nth(1)?.split('.').next()?.parse().ok()?;
    (release >= 13).then_some("--compress-mode=size")
}

/// Compiles a file for all architectures, one after the other; what the compiler says. What was compiled before from the same
/// text with the same command is kept.
fn compile_one(
    nvcc: &Path,
    out: &Path,
    kernel: &str,
    archs: &str,
    compression: Option<&str>,
) -> Result<String, String> {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v", "-fatbin", "-o"]);
    command.arg(out.join(format!("{kernel}.fatbin"))).arg(format!("kernels/{kernel}.cu"));
    command.args(compression);
    for arch in archs.split_whitespace() {
        // Hopper's own instructions (wgmma) exist in the code for that architecture alone.
        let arch = if arch == "90" && kernel.starts_with("prefill") { "90a" } else { arch };
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    command.arg(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
    let [key, log] = ["key", "log"].map(|end| out.join(format!("{kernel}.{end}")));
    let own = format!("{command:?}\n{:016x}", text_hash(kernel).map_err(|e| format!("kernels/ cannot be read: {e}"))?);
    let is_there = out.join(format!("{kernel}.fatbin")).is_file();
    if let (true, Ok(true), Ok(said)) =
        (is_there, fs::read_to_string(&key).map(|was| was == own), fs::read_to_string(&log))
    {
        return Ok(said);
    }
    let result = command.output().map_err(|e| format!("{} cannot be run: {e}", nvcc.display()))?;
    let said = String::from_utf8_lossy(&result.stderr);
    if !result.status.success() {
        return Err(format!("{} failed on {kernel}.cu: {}", nvcc.display(), said.replace('\n', " ")));
    }
    fs::write(&log, &*said).and_then(|()| fs::write(&key, own)).map_err(|e| e.to_string())?;
    Ok(said.into_owned())
}

/// Of a kernel's file and of every header, in the order of their names.
fn text_hash(kernel: &str) -> std::io::Result<u64> {
    let files = fs::read_dir("kernels")?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>()?;
    let mut files: Vec<PathBuf> = files.into_iter().filter(|f| f.extension().is_some_and(|e| e == "cuh")).collect();
    files.sort();
    files.push(Path::new("kernels").join(format!("{kernel}.cu")));
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(file)?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Compiles as many files at a time as cargo lets us use processors.
fn compile(nvcc: &Path, out: &Path) -> Result<(), String> {
    let compression = compression(nvcc);
    let archs = env::var("SQZ_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.into());
    let n_job = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, KERNELS.len());
    let (next, logs) = (AtomicUsize::new(0), Mutex::new(vec![Ok(String::new()); KERNELS.len()]));
    thread::scope(|scope| {
        for _ in 0..n_job {
            scope.spawn(|| {
                while let Some((i, kernel)) = KERNELS.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
                    let said = compile_one(nvcc, out, kernel, &archs, compression);
                    logs.lock().expect("nobody panics with it")[i] = said;
                }
            });
        }
    });
    let logs: Result<Vec<String>, String> = logs.into_inner().expect("nobody panics with it").into_iter().collect();
    // Registers and spills of each kernel, for scripts/kernels.sh.
    fs::write(out.join("ptxas.log"), logs?.concat()).map_err(|e| e.to_string())
}
