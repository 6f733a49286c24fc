//! Indexes: opening, looking into, holding against a model, writing, closing.

use std::ffi::{c_char, c_void, CString};
use std::sync::Arc;

use super::handle;
use super::plain::{self, Plain};
use super::status::sqz_status::*;
use super::status::{fail, guard, sqz_status, Outcome};
use crate::index::{Index, ModelFile};

/// An index of one prefix (opaque). Indexes do not change: one may be used by several threads and contexts at a time.
#[allow(non_camel_case_types)]
pub struct sqz_index {
    _opaque: [u8; 0],
}

/// What an index handle stands for.
pub(super) struct OpenIndex {
    pub index: Arc<Index>,
    architecture: CString,
    name: CString,
    chat: CString,
}

impl OpenIndex {
    pub fn new(index: Index) -> OpenIndex {
        let meta = index.meta();
        let text = |s: &str| CString::new(s.replace('\0', " ")).unwrap_or_default();
        let (architecture, name) = (text(&meta.model.architecture), text(&meta.model.name));
        let chat = text(&meta.build.chat);
        OpenIndex { architecture, name, chat, index: Arc::new(index) }
    }
}

/// What an index is of. Set `size` to the structure's size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_index_info {
    pub size: usize,
    /// Tokens of the prefix.
    pub n_prefix: u32,
    /// First tokens that are never clustered, and last ones.
    pub n_sink: u32,
    pub n_window: u32,
    /// Layers of the model, and those of them that are indexed.
    pub n_layer: u32,
    pub n_layer_indexed: u32,
    /// llama_rope_type in force, its base frequency and the factor on it.
    pub rope_type: i32,
    pub rope_freq_base: f32,
    pub rope_freq_scale: f32,
    /// Bytes of the index, and those that K and V of its layers take in F16.
    pub n_bytes: u64,
    pub n_bytes_kv: u64,
    /// The model's general.architecture and general.name, and the chat mode of the prefix (raw, system, user); valid until the
    /// handle is freed.
    pub architecture: *const c_char,
    pub model_name: *const c_char,
    pub chat: *const c_char,
    /// SHA-256 over the model's metadata and a sample of its weights.
    pub fingerprint: [u8; 32],
}

// SAFETY: repr(C), size first, numbers and addresses alone.
unsafe impl Plain for sqz_index_info {
    const NAME: &'static str = "sqz_index_info";
    const LEAST: usize = size_of::<sqz_index_info>();
}

/// One indexed layer. Set `size` to the structure's size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_layer_info {
    pub size: usize,
    /// Number of the layer in the model.
    pub layer: u32,
    pub n_head_kv: u32,
    /// Query heads per KV head.
    pub n_group: u32,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    /// Fine and coarse clusters per KV head.
    pub n_cluster: u32,
    pub n_coarse: u32,
    /// Softmax scale.
    pub scale: f32,
}

// SAFETY: repr(C), size first, numbers alone.
unsafe impl Plain for sqz_layer_info {
    const NAME: &'static str = "sqz_layer_info";
    const LEAST: usize = size_of::<sqz_layer_info>();
}

/// Opens an index file (`sqz build`): reads it and checks all of it. `*out` is null after an error. Free it with
/// sqz_index_free. Afterwards the file is not looked at again: it may be changed, cut or removed.
///
/// # Safety
/// `path` is null or a terminated string; `out` is null or writable.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_open(path: *const c_char, out: *mut *mut sqz_index) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let (out, path) = unsafe { (plain::place(out, "the index")?, plain::path(path)?) };
        *out = handle::put(OpenIndex::new(Index::open(&path).map_err(|error| named(error, &path))?));
        Ok(())
    })
}

/// An error's text with the file in front, where it does not name it.
fn named(error: crate::index::IndexError, path: &std::path::Path) -> super::status::Failure {
    let mut failure = super::status::Failure::from(error);
    if failure.status != SQZ_ERROR_IO {
        failure.text = format!("{}: {}", path.display(), failure.text);
    }
    failure
}

/// The same from memory, which is copied.
///
/// # Safety
/// `data` is null or has `n_bytes` readable bytes; `out` is null or writable.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_from_memory(
    data: *const c_void,
    n_bytes: usize,
    out: *mut *mut sqz_index,
) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let (out, bytes) =
            unsafe { (plain::place(out, "the index")?, plain::slice(data.cast::<u8>(), n_bytes, "the data")?) };
        *out = handle::put(OpenIndex::new(Index::from_slice(bytes)?));
        Ok(())
    })
}

/// Frees a handle; null does nothing. Contexts that the index is attached to keep it until it is detached.
#[no_mangle]
pub extern "C" fn sqz_index_free(index: *mut sqz_index) -> sqz_status {
    guard(|| handle::free::<OpenIndex, _>(index))
}

/// Writes an index to a file, under its name only once it is whole.
///
/// # Safety
/// `path` is null or a terminated string.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_write(index: *const sqz_index, path: *const c_char) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let path = unsafe { plain::path(path)? };
        handle::get::<OpenIndex, _>(index)?.index.save(&path)?;
        Ok(())
    })
}

/// Fills in what an index is of.
///
/// # Safety
/// `out` is null or has as many bytes as it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_get_info(index: *const sqz_index, out: *mut sqz_index_info) -> sqz_status {
    guard(|| {
        let open = handle::get::<OpenIndex, _>(index)?;
        let (index, meta) = (&open.index, open.index.meta());
        let info = sqz_index_info {
            size: size_of::<sqz_index_info>(),
            n_prefix: meta.n_prefix() as u32,
            n_sink: meta.n_sink,
            n_window: meta.n_window,
            n_layer: meta.n_layer,
            n_layer_indexed: index.shapes().len() as u32,
            rope_type: meta.rope.kind,
            rope_freq_base: meta.rope.freq_base,
            rope_freq_scale: meta.rope.freq_scale,
            n_bytes: index.bytes().len() as u64,
            n_bytes_kv: index.shapes().iter().map(|shape| shape.cache_bytes(meta.n_prefix())).sum(),
            architecture: open.architecture.as_ptr(),
            model_name: open.name.as_ptr(),
            chat: open.chat.as_ptr(),
            fingerprint: meta.model.fingerprint,
        };
        // SAFETY: by contract.
        unsafe { plain::write(out, info) }
    })
}

/// Fills in the i-th indexed layer, the lowest first.
///
/// # Safety
/// `out` is null or has as many bytes as it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_get_layer(index: *const sqz_index, i: u32, out: *mut sqz_layer_info) -> sqz_status {
    guard(|| {
        let open = handle::get::<OpenIndex, _>(index)?;
        let shapes = open.index.shapes();
        let Some(s) = shapes.get(i as usize) else {
            return fail(SQZ_ERROR_ARGUMENT, format!("layer {i} of {} indexed ones is asked for", shapes.len()));
        };
        let info = sqz_layer_info {
            size: size_of::<sqz_layer_info>(),
            layer: s.layer,
            n_head_kv: s.n_head_kv,
            n_group: s.n_group,
            head_dim_k: s.head_dim_k,
            head_dim_v: s.head_dim_v,
            n_cluster: s.n_cluster,
            n_coarse: s.n_coarse,
            scale: s.scale,
        };
        // SAFETY: by contract.
        unsafe { plain::write(out, info) }
    })
}

/// The prefix's tokens; valid until the handle is freed.
///
/// # Safety
/// `tokens` and `n_tokens` are null or writable.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_get_tokens(
    index: *const sqz_index,
    tokens: *mut *const i32,
    n_tokens: *mut usize,
) -> sqz_status {
    guard(|| {
        if tokens.is_null() || n_tokens.is_null() {
            return fail(SQZ_ERROR_NULL, "the place for the tokens or for their number is null");
        }
        let open = handle::get::<OpenIndex, _>(index)?;
        let all = &open.index.meta().tokens;
        // SAFETY: writable by contract.
        unsafe {
            tokens.write_unaligned(all.as_ptr());
            n_tokens.write_unaligned(all.len());
        }
        Ok(())
    })
}

/// Does an index fit a model file? SQZ_OK if it was made with this very file; else SQZ_ERROR_MODEL, and the last error says what
/// differs. (Where it does not fit, attention simply stays dense.)
///
/// # Safety
/// `model_path` is null or a terminated string.
#[no_mangle]
pub unsafe extern "C" fn sqz_index_verify(index: *const sqz_index, model_path: *const c_char) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let path = unsafe { plain::path(model_path)? };
        let open = handle::get::<OpenIndex, _>(index)?;
        verify(&open.index, &ModelFile::read(&path)?)
    })
}

fn verify(index: &Index, model: &ModelFile) -> Outcome {
    let meta = index.meta();
    let differs = |what: &str, index: &str, model: &str| {
        fail(
            SQZ_ERROR_MODEL,
            format!("the index is for {what} {index}, the model has {model}: build an index with this model"),
        )
    };
    if meta.model.architecture != model.id.architecture {
        return differs("architecture", &meta.model.architecture, &model.id.architecture);
    }
    if model.n_layer != 0 && meta.n_layer != model.n_layer {
        return differs("a number of layers of", &meta.n_layer.to_string(), &model.n_layer.to_string());
    }
    if meta.model.fingerprint != model.id.fingerprint {
        let hex = |bytes: &[u8]| bytes[..8].iter().map(|b| format!("{b:02x}")).collect::<String>();
        return differs("weights", &hex(&meta.model.fingerprint), &hex(&model.id.fingerprint));
    }
    Ok(())
}
