//! A small owner-based wrapper of libllama: model, context, tokens, decode, logits, state files. Everything that needs
//! `unsafe` for llama.cpp, but for reading tensors (`capture.rs`), is here and in `llama/`.

use std::ffi::{c_char, c_void, CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::attention::Element;
use llama_cpp_sys_2 as sys;

mod context;
mod model;

pub use context::{Context, Outputs};
pub use model::Model;

static VERBOSE: AtomicBool = AtomicBool::new(false);
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

/// llama.cpp's short options of several letters, and the long one of each.
pub const SHORT_OPTIONS: [(&str, &str); 7] = [
    ("-ub", "ubatch-size"),
    ("-ngl", "n-gpu-layers"),
    ("-dev", "device"),
    ("-nkvo", "no-kv-offload"),
    ("-fa", "flash-attn"),
    ("-ctk", "cache-type-k"),
    ("-ctv", "cache-type-v"),
];

/// The long option of one of `SHORT_OPTIONS`.
pub fn long_option(short: &str) -> Option<&'static str> {
    SHORT_OPTIONS.iter().find(|(name, _)| *name == short).map(|(_, long)| *long)
}

/// llama.cpp's `-fa`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Flash {
    On,
    Auto,
    Off,
}

/// Options that every command with a model has, under llama.cpp's names.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// Model file (GGUF)
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    /// Context size in tokens [default: what is needed]
    #[arg(short, long, value_name = "N")]
    pub ctx_size: Option<u32>,
    /// Most tokens per decode call
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_size: u32,
    /// Most tokens per graph (-ub)
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub ubatch_size: u32,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub threads: Option<u32>,
    /// Flash attention (-fa)
    #[arg(long, value_enum, default_value_t = Flash::Auto, value_name = "on|auto|off")]
    pub flash_attn: Flash,
    /// Type of the K cache (-ctk): f32, f16, bf16, q8_0 or q4_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_k: Element,
    /// Type of the V cache (-ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = cache_type)]
    pub cache_type_v: Element,
    #[command(flatten)]
    pub gpu: GpuArgs,
    #[command(flatten)]
    pub rope: RopeArgs,
    /// Full-size cache for sliding-window layers; states for a program that has this option need it too
    #[arg(long)]
    pub swa_full: bool,
}

/// Where the model runs. A GPU needs ggml's backend for it: GGML_BACKEND_PATH=libggml-cuda.so.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct GpuArgs {
    /// Layers on the GPU (-ngl) [default: all, where a GPU backend is loaded]
    #[arg(long, visible_alias = "gpu-layers", value_name = "N")]
    pub n_gpu_layers: Option<u32>,
    /// Devices that layers are offloaded to (-dev), separated by commas; none: the CPU alone [default: all GPUs]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Cache in the CPU's memory even so (-nkvo)
    #[arg(long)]
    pub no_kv_offload: bool,
}

/// How positions are rotated: what shapes keys besides the model. The same options as the program that answers.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct RopeArgs {
    /// RoPE scaling method [default: the model's]
    #[arg(long, value_enum, value_name = "METHOD")]
    pub rope_scaling: Option<RopeScaling>,
    /// Context is expanded by this factor
    #[arg(long, value_name = "N")]
    pub rope_scale: Option<f32>,
    /// RoPE base frequency [default: the model's]
    #[arg(long, value_name = "N")]
    pub rope_freq_base: Option<f32>,
    /// RoPE frequency factor; context is expanded by 1/N
    #[arg(long, value_name = "N", conflicts_with = "rope_scale")]
    pub rope_freq_scale: Option<f32>,
    /// YaRN: context size that the model was trained with [default: the model's]
    #[arg(long, value_name = "N")]
    pub yarn_orig_ctx: Option<u32>,
    /// YaRN: extrapolation mix factor
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub yarn_ext_factor: Option<f32>,
    /// YaRN: scale of the attention magnitude
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub yarn_attn_factor: Option<f32>,
    /// YaRN: high correction dimension
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub yarn_beta_slow: Option<f32>,
    /// YaRN: low correction dimension
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub yarn_beta_fast: Option<f32>,
}

/// llama.cpp's `--rope-scaling`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RopeScaling {
    None,
    Linear,
    Yarn,
}

impl RopeArgs {
    /// The frequency factor, however it was given.
    pub fn freq_scale(&self) -> Option<f32> {
        self.rope_freq_scale.or(self.rope_scale.map(|s| 1.0 / s))
    }

    fn apply(&self, p: &mut sys::llama_context_params) {
        fn set<T>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(
            &mut p.rope_scaling_type,
            self.rope_scaling.map(|s| match s {
                RopeScaling::None => sys::LLAMA_ROPE_SCALING_TYPE_NONE,
                RopeScaling::Linear => sys::LLAMA_ROPE_SCALING_TYPE_LINEAR,
                RopeScaling::Yarn => sys::LLAMA_ROPE_SCALING_TYPE_YARN,
            }),
        );
        set(&mut p.rope_freq_base, self.rope_freq_base);
        set(&mut p.rope_freq_scale, self.freq_scale());
        set(&mut p.yarn_orig_ctx, self.yarn_orig_ctx);
        set(&mut p.yarn_ext_factor, self.yarn_ext_factor);
        set(&mut p.yarn_attn_factor, self.yarn_attn_factor);
        set(&mut p.yarn_beta_slow, self.yarn_beta_slow);
        set(&mut p.yarn_beta_fast, self.yarn_beta_fast);
    }
}

/// A type of K or V by llama.cpp's name.
///
/// # Errors
/// llama.cpp or the plugin has no cache of this type.
pub fn cache_type(name: &str) -> Result<Element, String> {
    let known = || Element::ALL.map(Element::name).join(", ");
    Element::ALL
        .into_iter()
        .find(|e| e.name() == name)
        .ok_or_else(|| format!("no cache type that can be indexed: give one of {}", known()))
}

/// ggml's number of a type.
pub fn type_number(element: Element) -> sys::ggml_type {
    match element {
        Element::F32 => sys::GGML_TYPE_F32,
        Element::F16 => sys::GGML_TYPE_F16,
        Element::BF16 => sys::GGML_TYPE_BF16,
        Element::Q8_0 => sys::GGML_TYPE_Q8_0,
        Element::Q4_0 => sys::GGML_TYPE_Q4_0,
    }
}

impl ModelArgs {
    /// Types of K and V, as messages name them.
    pub fn cache_types(&self) -> String {
        match (self.cache_type_k.name(), self.cache_type_v.name()) {
            (k, v) if k == v => k.to_string(),
            (k, v) => format!("{k}/{v}"),
        }
    }

    pub fn n_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        self.threads.map_or_else(cores, |n| n as usize)
    }
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated text that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    if VERBOSE.load(Ordering::Relaxed) {
        eprint!("{text}");
    }
    if level == sys::GGML_LOG_LEVEL_ERROR {
        *LAST_ERROR.lock().unwrap_or_else(|e| e.into_inner()) = text.trim().to_string();
    }
}

/// What llama.cpp said last, as the tail of a sentence of ours.
fn cause() -> String {
    let text = std::mem::take(&mut *LAST_ERROR.lock().unwrap_or_else(|e| e.into_inner()));
    if text.is_empty() {
        ": run with -v for llama.cpp's own messages".to_string()
    } else {
        format!(": llama.cpp says '{text}'")
    }
}

/// Folder of ggml's backends: SQZ_BACKENDS, else that of an installation, else where cargo built them.
///
/// # Errors
/// There is none of them.
pub fn backends() -> Result<PathBuf> {
    let given = std::env::var_os("SQZ_BACKENDS").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let installed = || {
        let program = std::env::current_exe().ok()?;
        let folder = program.parent()?.parent()?.join("lib/ggml-squeeze");
        folder.is_dir().then_some(folder)
    };
    let built = || sys::BACKENDS_DIR.map(PathBuf::from);
    given
        .or_else(installed)
        .or_else(built)
        .context("llama-cpp-sys-2 was built without dynamic backends: build with its feature")
}

/// Sends llama.cpp's log to stderr (`verbose`) or nowhere, and loads ggml's backends. Once, first.
pub fn start(verbose: bool) -> Result<()> {
    VERBOSE.store(verbose, Ordering::Relaxed);
    let folder = c_path(&backends()?)?;
    // This program has the plugin linked in; a second copy of it must not patch the same device.
    if std::env::var("GGML_BACKEND_PATH").is_ok_and(|p| p.contains("squeeze")) {
        std::env::remove_var("GGML_BACKEND_PATH");
    }
    // SAFETY: called before any thread is started; the callback is a static function and the path a C string.
    unsafe {
        sys::llama_log_set(Some(on_log), std::ptr::null_mut());
        sys::ggml_backend_load_all_from_path(folder.as_ptr());
        sys::llama_backend_init();
        ensure!(
            sys::ggml_backend_dev_count() > 0,
            "no ggml backend could be loaded from {}: build or install sqz again, or name the folder by SQZ_BACKENDS",
            folder.to_string_lossy()
        );
    }
    Ok(())
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .with_context(|| format!("{} has a NUL in its name", path.display()))
}

/// One turn through a chat template of llama.cpp's own list (detected from the template's text).
pub fn apply_template(template: &CStr, messages: &[(&str, &str)], answer_follows: bool) -> Result<String> {
    let owned: Vec<(CString, CString)> = messages
        .iter()
        .map(|(role, content)| Ok((CString::new(*role)?, CString::new(*content)?)))
        .collect::<Result<_>>()
        .context("the text contains a NUL character: remove it")?;
    let chat: Vec<sys::llama_chat_message> = owned
        .iter()
        .map(|(role, content)| sys::llama_chat_message { role: role.as_ptr(), content: content.as_ptr() })
        .collect();
    let mut buf = vec![0u8; messages.iter().map(|m| m.1.len() + 256).sum::<usize>() + 1024];
    loop {
        // SAFETY: `chat` and `buf` have the lengths stated, and the texts live in `owned`.
        let n = unsafe {
            let (room, out) = (buf.len() as i32, buf.as_mut_ptr().cast());
            sys::llama_chat_apply_template(template.as_ptr(), chat.as_ptr(), chat.len(), answer_follows, out, room)
        };
        ensure!(n >= 0, "llama.cpp does not know this model's chat template: use --chat raw");
        if n as usize <= buf.len() {
            buf.truncate(n as usize);
            return String::from_utf8(buf).context("the chat template made text that is not UTF-8");
        }
        buf.resize(n as usize, 0);
    }
}
