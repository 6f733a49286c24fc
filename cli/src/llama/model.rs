//! A loaded model: its facts, its tokeniser.

use std::ffi::{c_char, CStr, CString};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use anyhow::{bail, ensure, Context as _, Result};
use llama_cpp_sys_2 as sys;

use super::{c_path, cause, GpuArgs};

/// The devices of these names and a null; nothing for no names.
fn devices(names: &[String]) -> Result<Vec<sys::ggml_backend_dev_t>> {
    let mut found = Vec::new();
    for name in names.iter().filter(|name| *name != "none") {
        let c_name = CString::new(name.as_str())?;
        // SAFETY: a C string; ggml answers an unknown name with null.
        let device = unsafe { sys::ggml_backend_dev_by_name(c_name.as_ptr()) };
        ensure!(
            !device.is_null(),
            "there is no device {name}: sqz info lists them (a GPU needs its backend, GGML_BACKEND_PATH=libggml-cuda.so)"
        );
        found.push(device);
    }
    if !names.is_empty() {
        found.push(std::ptr::null_mut());
    }
    Ok(found)
}

/// A loaded model; freed on drop.
pub struct Model {
    pub(super) raw: NonNull<sys::llama_model>,
    path: PathBuf,
}

// SAFETY: after loading a model is read only, and llama.cpp lets several threads read it (tokenise).
unsafe impl Sync for Model {}

impl Model {
    /// On the CPU alone.
    pub fn load(path: &Path) -> Result<Model> {
        Model::load_on(path, &GpuArgs { n_gpu_layers: Some(0), device: vec!["none".to_string()], ..GpuArgs::default() })
    }

    /// With layers on GPUs, where there are any.
    pub fn load_on(path: &Path, gpu: &GpuArgs) -> Result<Model> {
        std::fs::File::open(path).with_context(|| format!("cannot read the model {}", path.display()))?;
        let name = c_path(path)?;
        let mut devices = devices(&gpu.device)?;
        // SAFETY: llama.cpp's defaults, changed within their documented ranges; the path is a C string, and the list of devices,
        // which ends with a null, is copied by the call.
        let raw = unsafe {
            let mut p = sys::llama_model_default_params();
            if let Some(n) = gpu.n_gpu_layers {
                p.n_gpu_layers = i32::try_from(n).unwrap_or(i32::MAX);
            }
            if !devices.is_empty() {
                p.devices = devices.as_mut_ptr();
            }
            sys::llama_model_load_from_file(name.as_ptr(), p)
        };
        let Some(raw) = NonNull::new(raw) else { bail!("cannot load the model {}{}", path.display(), cause()) };
        Ok(Model { raw, path: path.to_path_buf() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive as long as self.
        unsafe { sys::llama_model_get_vocab(self.raw.as_ptr()) }
    }

    pub fn n_vocab(&self) -> usize {
        // SAFETY: as above.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) as usize }
    }

    pub fn n_layer(&self) -> u32 {
        // SAFETY: as above.
        unsafe { sys::llama_model_n_layer(self.raw.as_ptr()) as u32 }
    }

    pub fn n_ctx_train(&self) -> usize {
        // SAFETY: as above.
        unsafe { sys::llama_model_n_ctx_train(self.raw.as_ptr()) as usize }
    }

    /// Width of the sliding window that some layers have, or all; 0 without.
    pub fn n_swa(&self) -> usize {
        // SAFETY: as above.
        unsafe { sys::llama_model_n_swa(self.raw.as_ptr()).max(0) as usize }
    }

    pub fn rope_type(&self) -> i32 {
        // SAFETY: as above.
        unsafe { sys::llama_model_rope_type(self.raw.as_ptr()) }
    }

    pub fn rope_freq_scale(&self) -> f32 {
        // SAFETY: as above.
        unsafe { sys::llama_model_rope_freq_scale_train(self.raw.as_ptr()) }
    }

    /// Base of RoPE, by llama.cpp's own default where the file has none.
    pub fn rope_freq_base(&self) -> f32 {
        let architecture = self.meta("general.architecture").unwrap_or_default();
        self.meta(&format!("{architecture}.rope.freq_base")).and_then(|v| v.parse().ok()).unwrap_or(10000.0)
    }

    pub fn is_end(&self, token: i32) -> bool {
        // SAFETY: as above; an unknown token is answered with false.
        unsafe { sys::llama_vocab_is_eog(self.vocab(), token) }
    }

    /// What llama-bench prints in its first column, for instance `llama ?B Q4_K - Medium`.
    pub fn description(&self) -> String {
        // SAFETY: at most `len` bytes are written to `buf`.
        text_of(|buf, len| unsafe { sys::llama_model_desc(self.raw.as_ptr(), buf, len) }).unwrap_or_default()
    }

    /// A scalar of the GGUF's metadata, as text.
    pub fn meta(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        // SAFETY: at most `len` bytes are written to `buf`.
        text_of(|buf, len| unsafe { sys::llama_model_meta_val_str(self.raw.as_ptr(), key.as_ptr(), buf, len) })
    }

    /// The chat template of the GGUF, if it has one.
    pub fn chat_template(&self) -> Option<CString> {
        // SAFETY: the text belongs to the model and is copied at once.
        unsafe {
            let text = sys::llama_model_chat_template(self.raw.as_ptr(), std::ptr::null());
            (!text.is_null()).then(|| CStr::from_ptr(text).to_owned())
        }
    }

    /// BOS and EOS as text, empty where there is none, and whether the tokeniser begins every prompt with BOS.
    pub fn chat_tokens(&self) -> (String, String, bool) {
        // SAFETY: as above; at most `len` bytes are written to `buf`.
        let piece = |token: i32| {
            let write = |buf, len| unsafe { sys::llama_token_to_piece(self.vocab(), token, buf, len as i32, 0, true) };
            let mut buf = vec![0u8; 256];
            let n = if token < 0 { 0 } else { write(buf.as_mut_ptr().cast(), buf.len()) };
            buf.truncate(n.max(0) as usize);
            String::from_utf8_lossy(&buf).into_owned()
        };
        // SAFETY: as above.
        let (bos, eos, add) = unsafe {
            let vocab = self.vocab();
            (sys::llama_vocab_bos(vocab), sys::llama_vocab_eos(vocab), sys::llama_vocab_get_add_bos(vocab))
        };
        (piece(bos), piece(eos), add)
    }

    /// Token ids, with the special tokens that the model wants around a prompt (BOS) if `add_special`, and special
    /// tokens written out in the text taken as such: what llama-completion and llama-server do with a prompt.
    pub fn tokenise(&self, text: &str, add_special: bool) -> Result<Vec<i32>> {
        let len = i32::try_from(text.len()).context("the text is longer than 2 GiB")?;
        let mut tokens = vec![0i32; text.len() / 2 + 16];
        loop {
            // SAFETY: `text` has `len` bytes and `tokens` room for as many ids as stated.
            let n = unsafe {
                let (data, room) = (text.as_ptr().cast(), tokens.len() as i32);
                sys::llama_tokenize(self.vocab(), data, len, tokens.as_mut_ptr(), room, add_special, true)
            };
            ensure!(n != i32::MIN, "the text makes too many tokens");
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// Text of tokens: without BOS, other special tokens written out.
    pub fn text(&self, tokens: &[i32]) -> String {
        let mut buf = vec![0u8; tokens.len() * 8 + 64];
        loop {
            // SAFETY: `tokens` and `buf` have the lengths stated.
            let n = unsafe {
                let (ids, room) = (tokens.as_ptr(), buf.len() as i32);
                sys::llama_detokenize(self.vocab(), ids, tokens.len() as i32, buf.as_mut_ptr().cast(), room, true, true)
            };
            if n >= 0 {
                buf.truncate(n as usize);
                return String::from_utf8_lossy(&buf).into_owned();
            }
            buf.resize(n.unsigned_abs() as usize, 0);
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: contexts borrow the model, so none is left.
        unsafe { sys::llama_model_free(self.raw.as_ptr()) }
    }
}

/// Text from a function that writes at most `len` bytes and returns the whole length, negative if there is none.
fn text_of(write: impl Fn(*mut c_char, usize) -> i32) -> Option<String> {
    let mut buf = vec![0u8; 256];
    let n = usize::try_from(write(buf.as_mut_ptr().cast(), buf.len())).ok()?;
    if n >= buf.len() {
        buf.resize(n + 1, 0);
        write(buf.as_mut_ptr().cast(), buf.len());
    }
    buf.truncate(n);
    String::from_utf8(buf).ok()
}
