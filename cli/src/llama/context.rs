//! A context: decode, logits, state files. Sequence 0 unless one is named.

use std::ffi::c_void;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::backend::Capture;
use llama_cpp_sys_2 as sys;

use super::{c_path, cause, type_number, Flash, Model, ModelArgs};
use crate::whole::write_whole;

/// llama.h's LLAMA_FILE_MAGIC_GGSN and _GGSQ: a whole state, and that of one sequence.
const MAGIC_SESSION: u32 = 0x6767_736e;
const MAGIC_SEQUENCE: u32 = 0x6767_7371;

/// The scheduler's callback; `user` is a `Capture`.
///
/// # Safety
/// Called by llama.cpp during a decode, with a live tensor and the pointer given at context creation.
unsafe extern "C" fn on_eval(t: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // SAFETY: see above; nobody else uses the capture during a decode. Both bindings are of one ggml.
    unsafe { (*user.cast::<Capture>()).on_eval(t.cast(), ask) }
}

/// Which tokens of a batch get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    Last,
    /// From this token of the batch on.
    From(usize),
}

/// A context with one sequence; freed on drop. A capture, if any, sees every graph it computes.
pub struct Context<'m> {
    raw: NonNull<sys::llama_context>,
    model: &'m Model,
    n_batch: usize,
    n_ubatch: usize,
    capture: Option<Box<Capture>>,
}

impl<'m> Context<'m> {
    /// `n_ctx` cells at least. `-c` overrules and must suffice.
    pub fn new(model: &'m Model, args: &ModelArgs, n_ctx: usize, capture: Option<Capture>) -> Result<Context<'m>> {
        // A state that is saved must fit the small sliding-window cache that llama.cpp's programs make; a cache that is
        // cut back again and again needs the full one.
        let swa_full = args.swa_full || capture.is_none();
        Self::make(model, args, n_ctx, 1, swa_full, capture)
    }

    /// A context with a capture that is cut back again and again after that has ended.
    pub fn with_capture(model: &'m Model, args: &ModelArgs, n_ctx: usize, capture: Capture) -> Result<Context<'m>> {
        Self::make(model, args, n_ctx, 1, true, Some(capture))
    }

    /// A context whose states fit the caches of llama.cpp's programs.
    pub fn for_states(model: &'m Model, args: &ModelArgs, n_ctx: usize) -> Result<Context<'m>> {
        Self::make(model, args, n_ctx, 1, args.swa_full, None)
    }

    /// `n_seq` sequences on one unified cache of `n_ctx` cells, as llama-server has its slots.
    pub fn with_slots(model: &'m Model, args: &ModelArgs, n_ctx: usize, n_seq: u32) -> Result<Context<'m>> {
        Self::make(model, args, n_ctx, n_seq, true, None)
    }

    fn make(
        model: &'m Model,
        args: &ModelArgs,
        n_ctx: usize,
        n_seq: u32,
        swa_full: bool,
        capture: Option<Capture>,
    ) -> Result<Context<'m>> {
        let n_ctx = match args.ctx_size {
            Some(c) if c != 0 && (c as usize) < n_ctx => {
                bail!("-c {c} is too small: {n_ctx} tokens are needed; leave -c out or raise it")
            }
            Some(c) if c != 0 => c,
            _ => u32::try_from(n_ctx.next_multiple_of(256)).context("the context is too long")?,
        };
        let mut capture = capture.map(Box::new);
        // SAFETY: the defaults are changed within their documented ranges; the capture is boxed, so its address holds as
        // long as the context that has it.
        let raw = unsafe {
            let mut p = sys::llama_context_default_params();
            p.n_ctx = n_ctx;
            p.n_batch = args.batch_size.max(args.ubatch_size).min(n_ctx);
            p.n_ubatch = args.ubatch_size.min(n_ctx);
            p.n_seq_max = n_seq;
            p.kv_unified = true;
            p.n_threads = args.n_threads() as i32;
            p.n_threads_batch = args.n_threads() as i32;
            p.flash_attn_type = match args.flash_attn {
                Flash::On => sys::LLAMA_FLASH_ATTN_TYPE_ENABLED,
                Flash::Auto => sys::LLAMA_FLASH_ATTN_TYPE_AUTO,
                Flash::Off => sys::LLAMA_FLASH_ATTN_TYPE_DISABLED,
            };
            p.type_k = type_number(args.cache_type_k);
            p.type_v = type_number(args.cache_type_v);
            args.rope.apply(&mut p);
            p.offload_kqv = !args.gpu.no_kv_offload;
            p.swa_full = swa_full;
            p.no_perf = true;
            if let Some(c) = capture.as_deref_mut() {
                p.cb_eval = Some(on_eval);
                p.cb_eval_user_data = std::ptr::from_mut(c).cast();
            }
            sys::llama_init_from_model(model.raw.as_ptr(), p)
        };
        let Some(raw) = NonNull::new(raw) else {
            bail!("cannot make a context of {n_ctx} tokens for {}{}", model.path().display(), cause())
        };
        // SAFETY: just made.
        let (n_batch, n_ubatch) = unsafe { (sys::llama_n_batch(raw.as_ptr()), sys::llama_n_ubatch(raw.as_ptr())) };
        Ok(Context { raw, model, n_batch: n_batch as usize, n_ubatch: n_ubatch as usize, capture })
    }

    pub fn n_ctx(&self) -> usize {
        // SAFETY: the context is alive as long as self.
        unsafe { sys::llama_n_ctx(self.raw.as_ptr()) as usize }
    }

    pub fn n_batch(&self) -> usize {
        self.n_batch
    }

    pub fn n_ubatch(&self) -> usize {
        self.n_ubatch
    }

    /// The capture. Between decodes llama.cpp does not touch it.
    pub fn capture(&mut self) -> Option<&mut Capture> {
        self.capture.as_deref_mut()
    }

    /// Tokens in the cache.
    pub fn n_past(&self) -> usize {
        self.n_past_in(0)
    }

    /// Tokens of one sequence in the cache.
    pub fn n_past_in(&self, seq: i32) -> usize {
        // SAFETY: as above; -1 is an empty sequence.
        unsafe { (sys::llama_memory_seq_pos_max(sys::llama_get_memory(self.raw.as_ptr()), seq) + 1) as usize }
    }

    /// Decodes tokens in one call at the end of the sequence; at most `n_batch`.
    pub fn decode(&mut self, tokens: &[i32], outputs: Outputs) -> Result<()> {
        self.decode_in(0, tokens, outputs)
    }

    /// The same for one sequence.
    pub fn decode_in(&mut self, seq: i32, tokens: &[i32], outputs: Outputs) -> Result<()> {
        let (n, pos) = (tokens.len(), self.n_past_in(seq));
        ensure!(
            n > 0 && n <= self.n_batch,
            "{n} tokens in one decode call, the batch size is {}: raise -b",
            self.n_batch
        );
        ensure!(pos + n <= self.n_ctx(), "{} tokens do not fit the context of {}: raise -c", pos + n, self.n_ctx());
        let mut token = tokens.to_vec();
        let mut position: Vec<i32> = (pos..pos + n).map(|p| p as i32).collect();
        let mut n_seq = vec![1i32; n];
        let mut seq_id = seq;
        let mut seq_ids = vec![std::ptr::from_mut(&mut seq_id); n];
        let first = match outputs {
            Outputs::Last => n - 1,
            Outputs::From(i) => i.min(n - 1),
        };
        let mut logits: Vec<i8> = (0..n).map(|i| i8::from(i >= first)).collect();
        if let Some(c) = self.capture.as_deref_mut() {
            c.begin(pos, n);
        }
        let batch = sys::llama_batch {
            n_tokens: n as i32,
            token: token.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: position.as_mut_ptr(),
            n_seq_id: n_seq.as_mut_ptr(),
            seq_id: seq_ids.as_mut_ptr(),
            logits: logits.as_mut_ptr(),
        };
        // SAFETY: every array has n_tokens entries and outlives the call, which copies what it keeps.
        let rc = unsafe {
            let rc = sys::llama_decode(self.raw.as_ptr(), batch);
            sys::llama_synchronize(self.raw.as_ptr());
            rc
        };
        ensure!(rc == 0, "llama.cpp could not decode tokens {pos} to {} (code {rc}){}", pos + n, cause());
        Ok(())
    }

    /// Decodes any number of tokens, one graph at a time, without logits but the last; `done` is told the number decoded.
    pub fn prefill(&mut self, tokens: &[i32], mut done: impl FnMut(usize)) -> Result<()> {
        let mut n = 0;
        for chunk in tokens.chunks(self.n_ubatch) {
            self.decode(chunk, Outputs::Last)?;
            n += chunk.len();
            done(n);
        }
        Ok(())
    }

    /// Logits of token `i` of the last decode call, `[n_vocab]`; the token must have been one of its outputs.
    pub fn logits(&self, i: usize) -> Result<&[f32]> {
        // SAFETY: llama.cpp checks the index and returns null for a token without logits; the row has n_vocab floats and
        // holds until the next decode, which needs &mut self.
        unsafe {
            let row = sys::llama_get_logits_ith(self.raw.as_ptr(), i as i32);
            ensure!(!row.is_null(), "token {i} of the batch has no logits{}", cause());
            Ok(std::slice::from_raw_parts(row, self.model.n_vocab()))
        }
    }

    /// Forgets everything from this position on.
    pub fn truncate(&mut self, n_past: usize) -> Result<()> {
        self.truncate_in(0, n_past)
    }

    /// The same for one sequence.
    pub fn truncate_in(&mut self, seq: i32, n_past: usize) -> Result<()> {
        // SAFETY: as above.
        let done =
            unsafe { sys::llama_memory_seq_rm(sys::llama_get_memory(self.raw.as_ptr()), seq, n_past as i32, -1) };
        ensure!(
            done,
            "this model's memory cannot be cut back to {n_past} tokens (a recurrent model?): it is not supported"
        );
        Ok(())
    }

    /// Writes what llama-completion reads as `--prompt-cache`: all tokens, but the cells of all but the last one, which
    /// it computes again to get its logits. The last token is forgotten by this context too.
    pub fn save_prompt_cache(&mut self, path: &Path, tokens: &[i32]) -> Result<()> {
        self.truncate(tokens.len() - 1)?;
        let raw = self.raw.as_ptr();
        write_whole(path, |to| {
            let name = c_path(to)?;
            // SAFETY: `tokens` has the length stated.
            let (ok, state) = unsafe {
                let ok = sys::llama_state_save_file(raw, name.as_ptr(), tokens.as_ptr(), tokens.len());
                (ok, sys::llama_state_get_size(raw))
            };
            ensure!(ok, "cannot write the state file {}{}", path.display(), cause());
            // Magic, version, number of tokens; the tokens; the state.
            Ok(12 + 4 * tokens.len() as u64 + state as u64)
        })
    }

    /// Writes what llama-server restores into a slot.
    pub fn save_slot(&mut self, path: &Path, tokens: &[i32]) -> Result<()> {
        let raw = self.raw.as_ptr();
        write_whole(path, |to| {
            let name = c_path(to)?;
            // SAFETY: `tokens` has the length stated.
            let bytes = unsafe { sys::llama_state_seq_save_file(raw, name.as_ptr(), 0, tokens.as_ptr(), tokens.len()) };
            ensure!(bytes > 0, "cannot write the slot file {}{}", path.display(), cause());
            Ok(bytes as u64)
        })
    }

    /// Restores a file of either kind and returns its tokens; cells of the last ones may be missing (see `n_past`).
    pub fn load_state(&mut self, path: &Path) -> Result<Vec<i32>> {
        use std::io::Read;
        let mut magic = [0u8; 4];
        std::fs::File::open(path)
            .and_then(|mut f| f.read_exact(&mut magic))
            .with_context(|| format!("cannot read the state file {}", path.display()))?;
        let name = c_path(path)?;
        let mut tokens = vec![0i32; self.n_ctx()];
        let mut n = 0usize;
        let (out, room) = (tokens.as_mut_ptr(), tokens.len());
        // SAFETY: `tokens` has the room stated.
        let ok = unsafe {
            match u32::from_le_bytes(magic) {
                MAGIC_SESSION => sys::llama_state_load_file(self.raw.as_ptr(), name.as_ptr(), out, room, &mut n),
                MAGIC_SEQUENCE => {
                    sys::llama_state_seq_load_file(self.raw.as_ptr(), name.as_ptr(), 0, out, room, &mut n) > 0
                }
                _ => bail!("{} is not a state file of llama.cpp: make one with sqz build --state-file", path.display()),
            }
        };
        ensure!(
            ok,
            "cannot restore the state {} (another model, -fa setting or cache type?){}",
            path.display(),
            cause()
        );
        tokens.truncate(n);
        Ok(tokens)
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: made by llama_init_from_model and freed once.
        unsafe { sys::llama_free(self.raw.as_ptr()) }
    }
}
