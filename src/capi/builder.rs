//! Builders: an index of raw buffers, layer by layer, or of what a llama.cpp host decodes.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use ggml_sys as sys;
use half::f16;

use super::attention::MAX_THREADS;
use super::handle;
use super::index::{sqz_index, OpenIndex};
use super::plain::{self, Plain};
use super::status::sqz_status::*;
use super::status::{fail, guard, sqz_status, Failure, Outcome};
use crate::attention::Element;
use crate::backend::Capture;
use crate::build::{self, Assembly, LayerCapture, Settings};
use crate::index::{reserved, to_bytes, BuildSettings, Index, IndexMeta, ModelFile, ModelId, Rope};

/// An index in the making (opaque). Calls with one builder wait for each other.
#[allow(non_camel_case_types)]
pub struct sqz_builder {
    _opaque: [u8; 0],
}

/// How to build; sqz_builder_params_default() gives the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_builder_params {
    pub size: usize,
    /// First tokens that are never clustered, and last ones; the queries of the last ones calibrate.
    pub n_sink: u32,
    pub n_window: u32,
    /// Clusters per clustered key, above 0 and at most 1.
    pub cluster_share: f32,
    /// Assignments of every key to its nearest centroid, at least 1.
    pub iterations: u32,
    pub seed: u64,
    /// Coarse clusters per KV head; 0: none; -1: as many as suit the prefix.
    pub n_coarse: i64,
    /// Worker threads; 0: one per core; at most 1024. The index does not depend on them.
    pub n_threads: u32,
    /// Number of the model's layers; 0: as its file says, or else as there are layers.
    pub n_layer: u32,
}

// SAFETY: repr(C), size first, numbers alone.
unsafe impl Plain for sqz_builder_params {
    const NAME: &'static str = "sqz_builder_params";
    const LEAST: usize = size_of::<sqz_builder_params>();
}

/// One layer's keys, values and window queries, P tokens of them (see sqz_builder_new), rows without gaps.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_layer {
    pub size: usize,
    /// Number of the layer in the model.
    pub layer: u32,
    pub n_head_kv: u32,
    /// Query heads per KV head; query head h uses KV head h / n_group.
    pub n_group: u32,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    /// Softmax scale.
    pub scale: f32,
    /// `F16 [P][n_head_kv][head_dim_k]`: keys as in the cache, after RoPE.
    pub k: *const c_void,
    /// `F16 [P][n_head_kv][head_dim_v]`.
    pub v: *const c_void,
    /// `F32 [n_window][n_head_kv * n_group][head_dim_k]`: queries of the last n_window tokens, after RoPE.
    pub q: *const f32,
}

// SAFETY: repr(C), size first, numbers and addresses alone.
unsafe impl Plain for sqz_layer {
    const NAME: &'static str = "sqz_layer";
    const LEAST: usize = size_of::<sqz_layer>();
}

/// Told the share of the work that is done, 0 to 1, from threads of the library, one call at a time; false asks for the end.
#[allow(non_camel_case_types)]
pub type sqz_progress_callback = Option<unsafe extern "C" fn(share: f32, user_data: *mut c_void) -> bool>;

/// A host's callback and what it gets.
#[derive(Clone, Copy)]
struct Progress {
    callback: unsafe extern "C" fn(f32, *mut c_void) -> bool,
    user_data: *mut c_void,
}

// SAFETY: the host promises that both may be used from any thread (sqz_builder_set_progress).
unsafe impl Send for Progress {}
// SAFETY: as above.
unsafe impl Sync for Progress {}

/// What a builder handle stands for.
pub(super) struct Builder(Mutex<State>);

impl Builder {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

struct State {
    settings: Settings,
    n_layer: u32,
    tokens: Vec<i32>,
    model: Option<ModelFile>,
    capture: Capture,
    /// Layers that were given as raw buffers.
    given: Option<Assembly>,
    progress: Option<Progress>,
}

/// The default parameters, with `size` set.
#[no_mangle]
pub extern "C" fn sqz_builder_params_default() -> sqz_builder_params {
    let s = Settings::default();
    sqz_builder_params {
        size: size_of::<sqz_builder_params>(),
        n_sink: s.n_sink,
        n_window: s.n_window,
        cluster_share: s.cluster_share,
        iterations: s.iterations,
        seed: s.seed,
        n_coarse: -1,
        n_threads: 0,
        n_layer: 0,
    }
}

fn settings(p: &sqz_builder_params) -> Outcome<Settings> {
    let n_coarse = match p.n_coarse {
        -1 => None,
        n => match u32::try_from(n) {
            Ok(n) => Some(n),
            Err(_) => return fail(SQZ_ERROR_ARGUMENT, format!("n_coarse is {n}: give a number of clusters, 0 or -1")),
        },
    };
    if p.n_threads > MAX_THREADS {
        let text = format!("n_threads is {}: at most {MAX_THREADS} are started", p.n_threads);
        return fail(SQZ_ERROR_ARGUMENT, text);
    }
    let defaults = Settings::default();
    Ok(Settings {
        n_sink: p.n_sink,
        n_window: p.n_window,
        cluster_share: p.cluster_share,
        iterations: p.iterations,
        seed: p.seed,
        n_coarse,
        n_threads: if p.n_threads == 0 { defaults.n_threads } else { p.n_threads as usize },
    })
}

/// Begins an index of a prefix of P tokens. `params` may be null: the defaults. Free it with sqz_builder_free.
///
/// # Safety
/// `params` is null or has as many bytes as it says; `tokens` is null or has `n_tokens` numbers; `out` is null or writable.
#[no_mangle]
pub unsafe extern "C" fn sqz_builder_new(
    params: *const sqz_builder_params,
    tokens: *const i32,
    n_tokens: usize,
    out: *mut *mut sqz_builder,
) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let (out, params, tokens) = unsafe {
            let params = plain::read(params, sqz_builder_params_default())?;
            (plain::place(out, "the builder")?, params, plain::slice(tokens, n_tokens, "the tokens")?)
        };
        let settings = settings(&params)?;
        build::check_settings(&settings)?;
        let least = settings.n_sink as usize + settings.n_window as usize + 1;
        if tokens.len() < least || tokens.len() > i32::MAX as usize || tokens.iter().any(|t| *t < 0) {
            let text = format!("the prefix has {} tokens: at least {least} are needed, none below 0", tokens.len());
            return fail(SQZ_ERROR_ARGUMENT, text);
        }
        let (tokens, n_window) = (tokens.to_vec(), settings.n_window as usize);
        let capture = Capture::following(tokens.clone(), n_window);
        let (n_layer, model, given, progress) = (params.n_layer, None, None, None);
        let state = State { settings, n_layer, tokens, model, capture, given, progress };
        *out = handle::put(Builder(Mutex::new(state)));
        Ok(())
    })
}

/// Frees a handle; null does nothing. No context that has the builder as its callback's data may decode any more.
#[no_mangle]
pub extern "C" fn sqz_builder_free(builder: *mut sqz_builder) -> sqz_status {
    guard(|| handle::free::<Builder, _>(builder))
}

/// Names the model that the keys are of: its architecture, name, number of layers and fingerprint go into the index.
///
/// # Safety
/// `model_path` is null or a terminated string.
#[no_mangle]
pub unsafe extern "C" fn sqz_builder_set_model(builder: *mut sqz_builder, model_path: *const c_char) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let path = unsafe { plain::path(model_path)? };
        let builder = handle::get::<Builder, _>(builder)?;
        let model = ModelFile::read(&path)?;
        builder.lock().model = Some(model);
        Ok(())
    })
}

/// Has a callback told of the progress of sqz_builder_add_layer and sqz_builder_build; null: none. It may be called from any
/// thread, and must not call functions of this builder.
#[no_mangle]
pub extern "C" fn sqz_builder_set_progress(
    builder: *mut sqz_builder,
    callback: sqz_progress_callback,
    user_data: *mut c_void,
) -> sqz_status {
    guard(|| {
        let builder = handle::get::<Builder, _>(builder)?;
        builder.lock().progress = callback.map(|callback| Progress { callback, user_data });
        Ok(())
    })
}

/// Adds a layer of raw buffers and clusters it: the lowest layer first, each once. The buffers are the caller's again then.
///
/// # Safety
/// `layer` is null or has as many bytes as it says; its buffers have the elements that it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_builder_add_layer(builder: *mut sqz_builder, layer: *const sqz_layer) -> sqz_status {
    guard(|| {
        if layer.is_null() {
            return fail(SQZ_ERROR_NULL, "the layer is null");
        }
        let builder = handle::get::<Builder, _>(builder)?;
        let mut state = builder.lock();
        // SAFETY: by contract.
        let capture = unsafe {
            let empty = std::mem::zeroed::<sqz_layer>();
            copy(&plain::read(layer, empty)?, state.tokens.len(), state.settings.n_window as usize)?
        };
        state.add(&capture)
    })
}

fn owned<T: Copy>(data: &[T]) -> Outcome<Vec<T>> {
    let mut list = reserved(data.len())?;
    list.extend_from_slice(data);
    Ok(list)
}

/// # Safety
/// The buffers have the elements that the layer says.
unsafe fn copy(l: &sqz_layer, n_prefix: usize, n_window: usize) -> Outcome<LayerCapture> {
    let count = |parts: [usize; 4]| {
        let product = parts.iter().try_fold(1usize, |n, part| n.checked_mul(*part));
        product.map_or_else(|| fail(SQZ_ERROR_ARGUMENT, format!("layer {} is too large to be one", l.layer)), Ok)
    };
    let (n_head_kv, dk, dv) = (l.n_head_kv as usize, l.head_dim_k as usize, l.head_dim_v as usize);
    // SAFETY: by contract.
    unsafe {
        Ok(LayerCapture {
            layer: l.layer,
            n_head_kv: l.n_head_kv,
            n_group: l.n_group,
            head_dim_k: l.head_dim_k,
            head_dim_v: l.head_dim_v,
            scale: l.scale,
            k: owned(plain::slice(l.k.cast::<f16>(), count([n_prefix, n_head_kv, dk, 1])?, "k")?)?,
            v: owned(plain::slice(l.v.cast::<f16>(), count([n_prefix, n_head_kv, dv, 1])?, "v")?)?,
            q: owned(plain::slice(l.q, count([n_window, n_head_kv, l.n_group as usize, dk])?, "q")?)?,
        })
    }
}

/// What `cb_eval` of llama_context_params is to be, with the builder as `cb_eval_user_data`: while the host decodes the prefix
/// (alone in the cache, from position 0 on, in batches as it likes), the builder learns what it needs. Other tokens are not
/// looked at. Then, the context being alive and the cache as it is, call sqz_builder_build. Has the type of
/// ggml_backend_sched_eval_callback. Without a live builder it lets every graph pass.
///
/// # Safety
/// Called by ggml's scheduler, with a live tensor.
#[no_mangle]
pub unsafe extern "C" fn sqz_builder_eval_callback(
    t: *mut sys::ggml_tensor,
    ask: bool,
    user_data: *mut c_void,
) -> bool {
    let mut answer = !ask;
    guard(|| {
        let builder = handle::get::<Builder, _>(user_data.cast::<sqz_builder>().cast_const())?;
        // SAFETY: by contract.
        answer = unsafe { builder.lock().capture.on_eval(t, ask) };
        Ok(())
    });
    answer
}

/// Makes the index: of the layers that were added, or else of what was captured. The builder can then be freed. `*out` is null
/// after an error.
///
/// # Safety
/// `out` is null or writable; after a capture the context that decoded is alive and idle.
#[no_mangle]
pub unsafe extern "C" fn sqz_builder_build(builder: *mut sqz_builder, out: *mut *mut sqz_index) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let out = unsafe { plain::place(out, "the index")? };
        let builder = handle::get::<Builder, _>(builder)?;
        let index = builder.lock().build()?;
        *out = handle::put(OpenIndex::new(index));
        Ok(())
    })
}

impl State {
    fn meta(&self, rope: Option<Rope>, cache_types: [Element; 2]) -> IndexMeta {
        let s = &self.settings;
        let unnamed = ModelId { architecture: String::new(), name: String::new(), fingerprint: [0; 32] };
        IndexMeta {
            model: self.model.as_ref().map_or(unnamed, |model| model.id.clone()),
            rope: rope.unwrap_or(Rope { kind: -1, freq_base: 0.0, freq_scale: 1.0 }),
            n_layer: 0,
            tokens: self.tokens.clone(),
            n_sink: s.n_sink,
            n_window: s.n_window,
            build: BuildSettings {
                seed: s.seed,
                iterations: s.iterations,
                cluster_share: s.cluster_share,
                chat: "raw".to_string(),
                cache_types: cache_types.map(|e| e.name().to_string()),
                builder: format!("libggml-squeeze {}", env!("CARGO_PKG_VERSION")),
            },
            calibration: Vec::new(),
            mass_targets: Vec::new(),
            dense_layers: Vec::new(),
            synthetic: false,
        }
    }

    /// Clusters a layer, telling the host of `from` to `to` of the whole.
    fn cluster(&self, capture: &LayerCapture, (from, to): (f32, f32)) -> Outcome<build::BuiltLayer> {
        let (ended, progress) = (AtomicBool::new(false), self.progress);
        let tell = |share: f32| {
            if let Some(p) = progress {
                // SAFETY: the host's function, with the host's data.
                if !ended.load(Ordering::Relaxed) && !unsafe { (p.callback)(from + (to - from) * share, p.user_data) } {
                    ended.store(true, Ordering::Relaxed);
                }
            }
        };
        let made = build::index_layer(capture, &self.settings, &tell)?;
        tell(1.0);
        match ended.into_inner() {
            true => fail(SQZ_ERROR_CANCELLED, "the progress callback asked for the end"),
            false => Ok(made),
        }
    }

    fn add(&mut self, capture: &LayerCapture) -> Outcome {
        let made = self.cluster(capture, (0.0, 1.0))?;
        let given = self.given.take();
        let mut index = given.unwrap_or_else(|| Assembly::new(self.meta(None, [Element::F16; 2]), &self.settings));
        let added = push(&mut index, capture, made);
        self.given = Some(index);
        added
    }

    fn build(&mut self) -> Outcome<Index> {
        let mut index = match self.given.take() {
            Some(index) => index,
            None => self.captured()?,
        };
        if let Some(model) = &self.model {
            index.meta_mut().model = model.id.clone();
        }
        let counted = index.last_layer().map_or(1, |last| last + 1);
        let of_file = self.model.as_ref().map_or(0, |model| model.n_layer);
        index.meta_mut().n_layer = [self.n_layer, of_file].into_iter().find(|n| *n > 0).unwrap_or(counted).max(counted);
        Ok(Index::from_bytes(to_bytes(&index.finish()?)?)?)
    }

    fn captured(&mut self) -> Outcome<Assembly> {
        let (good, dense) = self.capture.finish()?;
        self.capture.end();
        let (rope, types) = self.capture.settings(good[0]).unwrap_or((None, [Element::F16; 2]));
        let mut index = Assembly::new(self.meta(rope, types), &self.settings);
        dense.into_iter().for_each(|(number, why)| index.dense(number, why));
        for (i, &number) in good.iter().enumerate() {
            let (layer, _) = match self.capture.read(number) {
                Ok(read) => read,
                Err(why) => {
                    index.dense(number, why);
                    continue;
                }
            };
            let part = |i: usize| i as f32 / good.len() as f32;
            let made = self.cluster(&layer, (part(i), part(i + 1)))?;
            push(&mut index, &layer, made)?;
        }
        Ok(index)
    }
}

fn push(index: &mut Assembly, capture: &LayerCapture, made: build::BuiltLayer) -> Outcome {
    match index.is_empty() {
        true => index.begin(capture, made, build::sketch(capture)?).map(|_| ()),
        false => index.add(capture, made),
    }
    .map_err(Failure::from)
}
