//! `sqz info`: versions, devices, kernels and defaults, as lines or as JSON.

use std::ffi::{c_char, CStr};
use std::fmt::Write as _;
use std::io::{self, Write as _};

use anyhow::Context as _;
use ggml_squeeze::attention::{cpu, cuda, Element};
use ggml_squeeze::build::Settings;
use ggml_squeeze::config::{DEFAULT_BUDGET, DEFAULT_MIN_PREFIX, DEFAULT_TILE};
use ggml_squeeze::index::FORMAT_VERSION;
use llama_cpp_sys_2 as sys;
use serde::Serialize;

use crate::run::find_plugin;

/// Options of `sqz info`.
#[derive(clap::Args, Clone, Debug)]
pub struct InfoArgs {
    /// Print the same data as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    ggml_version: String,
    ggml_commit: String,
    index_format: u32,
    plugin: Option<String>,
    cpu_path: &'static str,
    cuda: String,
    kernels: Kernels,
    devices: Vec<Device>,
    defaults: Defaults,
}

#[derive(Serialize)]
struct Kernels {
    devices: &'static [&'static str],
    head_size_min: usize,
    head_size_max: usize,
    head_size_step: usize,
    kv_types: [&'static str; Element::ALL.len()],
}

#[derive(Serialize)]
struct Device {
    name: String,
    description: String,
    bytes: u64,
    bytes_free: u64,
}

#[derive(Serialize)]
struct Defaults {
    budget: f32,
    min_prefix: usize,
    tile: usize,
    clusters: f32,
    sinks: u32,
    window: u32,
    iterations: u32,
    seed: u64,
}

/// Prints what there is to stdout.
///
/// # Errors
/// Stdout cannot be written.
pub fn run(args: &InfoArgs) -> anyhow::Result<()> {
    let report = report();
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { render(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}

/// # Safety
/// `text` is null or a terminated string that lives for the call.
unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn devices() -> Vec<Device> {
    // SAFETY: ggml's own functions on devices that it lists; their texts live as long as the process.
    unsafe {
        (0..sys::ggml_backend_dev_count())
            .map(|i| {
                let device = sys::ggml_backend_dev_get(i);
                let (mut free, mut total) = (0, 0);
                sys::ggml_backend_dev_memory(device, &mut free, &mut total);
                Device {
                    name: owned(sys::ggml_backend_dev_name(device)),
                    description: owned(sys::ggml_backend_dev_description(device)),
                    bytes: total as u64,
                    bytes_free: free as u64,
                }
            })
            .collect()
    }
}

/// The GPUs that the CUDA kernels run on, or why there are none.
fn gpus() -> String {
    use cuda::Device;
    let names = Device::count().and_then(|n| (0..n).map(Device::name_of).collect::<Result<Vec<_>, _>>());
    match names {
        Ok(names) if names.is_empty() => "kernels built in, no GPU".into(),
        Ok(names) => format!("kernels built in; {}", names.join(", ")),
        Err(error) => error.to_string(),
    }
}

fn report() -> Report {
    let settings = Settings::default();
    // SAFETY: both return static strings.
    let (ggml_version, ggml_commit) = unsafe { (owned(sys::ggml_version()), owned(sys::ggml_commit())) };
    Report {
        version: env!("CARGO_PKG_VERSION"),
        ggml_version,
        ggml_commit,
        index_format: FORMAT_VERSION,
        plugin: find_plugin(None).ok().map(|p| p.display().to_string()),
        cpu_path: cpu::path(),
        cuda: gpus(),
        kernels: Kernels {
            devices: &["CPU"],
            head_size_min: cpu::HEAD_DIM_MIN,
            head_size_max: cpu::HEAD_DIM_MAX,
            head_size_step: cpu::HEAD_DIM_STEP,
            kv_types: Element::ALL.map(Element::name),
        },
        devices: devices(),
        defaults: Defaults {
            budget: DEFAULT_BUDGET,
            min_prefix: DEFAULT_MIN_PREFIX,
            tile: DEFAULT_TILE,
            clusters: settings.cluster_share,
            sinks: settings.n_sink,
            window: settings.n_window,
            iterations: settings.iterations,
            seed: settings.seed,
        },
    }
}

fn render(r: &Report) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name:<10} {value}");
    };
    line("sqz", format!("{}, index format {}", r.version, r.index_format));
    line("ggml", format!("{} ({})", r.ggml_version, r.ggml_commit));
    line("plugin", r.plugin.clone().unwrap_or_else(|| "not beside sqz: run 'make plugin' or give --plugin".into()));
    let k = &r.kernels;
    line(
        "kernels",
        format!(
            "{}: head sizes {} to {} in steps of {}, K and V {}",
            k.devices.join(", "),
            k.head_size_min,
            k.head_size_max,
            k.head_size_step,
            k.kv_types.join(", ")
        ),
    );
    line("CPU path", r.cpu_path.to_string());
    line("CUDA", r.cuda.clone());
    for d in &r.devices {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        line(
            "device",
            format!("{}: {}, {:.1} GiB ({:.1} free)", d.name, d.description, gib(d.bytes), gib(d.bytes_free)),
        );
    }
    let d = &r.defaults;
    line(
        "defaults",
        format!(
            "budget {}, from {} tokens on, tile {}; clusters {}, sinks {}, window {}, {} iterations, seed {}",
            d.budget, d.min_prefix, d.tile, d.clusters, d.sinks, d.window, d.iterations, d.seed
        ),
    );
    out
}
