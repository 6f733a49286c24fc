//! The attention call on plain buffers of a host.

use std::ffi::c_void;

use super::context::{sqz_context, Context};
use super::handle;
use super::index::{sqz_index, OpenIndex};
use super::plain::{self, Plain};
use super::status::sqz_status::*;
use super::status::{fail, guard, sqz_status, Failure, Outcome};
use crate::attention::cpu::Unsupported;
use crate::attention::{cuda, Array, Element, Problem};
use crate::backend::{element_of, AttendError};

/// Element types, numbered as in ggml_type. Quantised ones have blocks of 32.
pub const SQZ_TYPE_F32: u32 = 0;
pub const SQZ_TYPE_F16: u32 = 1;
pub const SQZ_TYPE_Q4_0: u32 = 2;
pub const SQZ_TYPE_Q8_0: u32 = 8;
pub const SQZ_TYPE_BF16: u32 = 30;

/// A strided array in the host's memory, dimension 0 innermost, as ggml has them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_array {
    pub data: *mut c_void,
    /// Elements per dimension.
    pub ne: [i64; 4],
    /// Bytes per step of a dimension; in dimension 0 those of an element, or of a block of a quantised type.
    pub nb: [usize; 4],
    /// SQZ_TYPE_...
    pub kind: u32,
    pub reserved: u32,
}

/// Most threads that a call may ask for.
pub(super) const MAX_THREADS: u32 = 1024;

/// One attention call: dst = softmax(scale q k^T + mask) v, with the arrays and numbers of ggml_flash_attn_ext.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_attention {
    pub size: usize,
    /// F32 [head_dim_k, n_query, n_head, n_stream].
    pub q: sqz_array,
    /// Any type, [head_dim_k, n_kv, n_head_kv, 1 or n_stream].
    pub k: sqz_array,
    /// Any type, [head_dim_v, n_kv, n_head_kv, 1 or n_stream].
    pub v: sqz_array,
    /// F16 [n_kv, >= n_query, 1 or n_head, 1 or n_stream], added to the scaled scores; data null: none.
    pub mask: sqz_array,
    /// F32 [head_dim_v, n_head, n_query, n_stream]: the result.
    pub dst: sqz_array,
    /// `F32 [n_head]`: one more score per head, which takes mass and gives nothing; null: none.
    pub sinks: *const f32,
    pub scale: f32,
    /// ALiBi; 0: none. Such a call is dense.
    pub max_bias: f32,
    /// 0: none.
    pub softcap: f32,
    /// The index's layer. Without an index (null) the call is dense.
    pub layer: u32,
    pub index: *const sqz_index,
    /// 0: one per core; at most 1024.
    pub n_threads: u32,
    pub reserved: u32,
}

// SAFETY: repr(C), size first, numbers and addresses alone.
unsafe impl Plain for sqz_attention {
    const NAME: &'static str = "sqz_attention";
    const LEAST: usize = size_of::<sqz_attention>();
}

/// What a call computed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_attention_result {
    pub size: usize,
    /// Query rows that were sparse; the others are dense.
    pub rows_sparse: u64,
    /// Mean kept share of the prefix keys over those rows and the KV heads; 0 where there are none.
    pub kept_share: f64,
}

// SAFETY: repr(C), size first, numbers alone.
unsafe impl Plain for sqz_attention_result {
    const NAME: &'static str = "sqz_attention_result";
    const LEAST: usize = size_of::<sqz_attention_result>();
}

/// Computes attention over the host's buffers, on the CPU, with the settings of a context (which must not be null) on threads
/// of its own. `result` may be null.
///
/// The prefix's tokens must lie in cells 0 to P of K and V, in order, in each stream. A query row that its mask shows all of
/// them with the value 0 (without a mask: every row) attends to those that are selected, and to all else that it sees; other
/// rows are dense. K and V are verified against the index: in full at the first call, later in part, so that an edit of one
/// key is noticed within 512 calls, that of the last clustered token at once (sqz_attn_forget has it all verified again); where
/// they hold something else the call is dense. After SQZ_ERROR_UNSUPPORTED nothing was written. The context keeps an index that
/// it has computed with until it is freed.
///
/// # Safety
/// `call` is null or has as many bytes as it says, and its arrays are valid in all of their extents; `result` is null or has as
/// many bytes as it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_attention_compute(
    context: *const sqz_context,
    call: *const sqz_attention,
    result: *mut sqz_attention_result,
) -> sqz_status {
    guard(|| {
        let context = handle::get::<Context, _>(context)?;
        if call.is_null() {
            return fail(SQZ_ERROR_NULL, "the call is null");
        }
        // SAFETY: by contract; of plain numbers and pointers zero is a value.
        let call = unsafe { plain::read(call, std::mem::zeroed())? };
        let problem = problem(&call)?;
        let open = match call.index.is_null() {
            true => None,
            false => Some(handle::get::<OpenIndex, _>(call.index)?),
        };
        let n_threads = match call.n_threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n if n > MAX_THREADS => {
                return fail(SQZ_ERROR_ARGUMENT, format!("n_threads is {n}: at most {MAX_THREADS} are started"));
            }
            n => n as usize,
        };
        let index = open.as_ref().map(|open| (&open.index, call.layer));
        // SAFETY: by contract.
        let attended = unsafe { context.op.attend(problem, index, n_threads) }?;
        if result.is_null() {
            return Ok(());
        }
        let kept = attended.kept;
        let filled = sqz_attention_result {
            size: size_of::<sqz_attention_result>(),
            rows_sparse: attended.rows_sparse as u64,
            kept_share: if kept.count > 0 { kept.share_sum / kept.count as f64 } else { 0.0 },
        };
        // SAFETY: by contract.
        unsafe { plain::write(result, filled) }
    })
}

/// As sqz_attention_compute, but over arrays in the memory of CUDA device `device`, as a piece of work on `stream`: a CUstream or
/// cudaStream_t of the device's primary context (the CUDA runtime's), or null for the default stream. Every pointer in the call
/// is a device address, `sinks` too; `n_threads` means nothing.
///
/// It does not wait for the device but where K and V are new to the context, or may have changed: then they are copied to the
/// host and verified, so that it must not be called while the stream is captured. Later every call compares the keys of the
/// last clustered token, and 64 other tokens in turn. Arrays must stay valid until the stream has come past the call, and the
/// stream until the context is freed. Rows that were sparse are counted (sqz_get_stats) once the device is done; of calls with the
/// same arrays that are made faster than it computes them not each is counted. Up to 16 query rows are sparse, and, where `tile` in
/// the settings is above 1, up to 8192.
///
/// # Safety
/// `call` is null or has as many bytes as it says, and its arrays are valid device memory in all of their extents.
#[no_mangle]
pub unsafe extern "C" fn sqz_attention_launch(
    context: *const sqz_context,
    call: *const sqz_attention,
    device: i32,
    stream: *mut c_void,
) -> sqz_status {
    guard(|| {
        let context = handle::get::<Context, _>(context)?;
        if call.is_null() {
            return fail(SQZ_ERROR_NULL, "the call is null");
        }
        let Ok(ordinal) = usize::try_from(device) else {
            return fail(SQZ_ERROR_ARGUMENT, format!("device {device} is below 0"));
        };
        // SAFETY: by contract; of plain numbers and pointers zero is a value.
        let call = unsafe { plain::read(call, std::mem::zeroed())? };
        let problem = problem(&call)?;
        let open = match call.index.is_null() {
            true => None,
            false => Some(handle::get::<OpenIndex, _>(call.index)?),
        };
        let index = open.as_ref().map(|open| (&open.index, call.layer));
        // SAFETY: by contract.
        unsafe { context.op.launch(problem, index, ordinal, stream.cast()) }?;
        Ok(())
    })
}

impl From<AttendError> for Failure {
    fn from(error: AttendError) -> Failure {
        let status = match &error {
            AttendError::Unsupported(Unsupported::Memory { .. }) => SQZ_ERROR_MEMORY,
            AttendError::Unsupported(_) => SQZ_ERROR_UNSUPPORTED,
            AttendError::Threads { .. } => SQZ_ERROR_ARGUMENT,
            AttendError::Panic => SQZ_ERROR_INTERNAL,
            AttendError::Gpu(cuda::Error::Memory { .. }) => SQZ_ERROR_MEMORY,
            AttendError::Gpu(cuda::Error::Unsupported { .. }) => SQZ_ERROR_UNSUPPORTED,
            AttendError::Gpu(_) => SQZ_ERROR_DEVICE,
        };
        Failure { status, text: error.to_string() }
    }
}

fn element(kind: u32, what: &str) -> Outcome<Element> {
    let unknown = || fail(SQZ_ERROR_UNSUPPORTED, format!("{what} has type {kind}: give one of SQZ_TYPE_..."));
    element_of(kind).map_or_else(unknown, Ok)
}

/// An array whose extents fit the address space.
fn array(a: &sqz_array, element: Element, what: &str) -> Outcome<Array> {
    if a.data.is_null() {
        return fail(SQZ_ERROR_NULL, format!("{what} has no data"));
    }
    let bad = |why: &str| fail(SQZ_ERROR_ARGUMENT, format!("{what} {why}: ne {:?}, nb {:?}", a.ne, a.nb));
    if a.ne.iter().any(|n| *n < 1) {
        return bad("has a dimension without elements");
    }
    if a.ne.iter().zip(a.nb).skip(1).any(|(n, nb)| *n > 1 && nb == 0) {
        return bad("has a step of 0 bytes");
    }
    let ne = a.ne.map(|n| n as usize);
    if ne[0] % element.block() != 0 {
        return bad("has no whole number of blocks in dimension 0");
    }
    let first = (ne[0] / element.block()).checked_mul(element.block_bytes());
    let steps = ne.iter().zip(a.nb).skip(1).map(|(n, nb)| (n - 1).checked_mul(nb));
    let bytes = steps.fold(first, |sum, step| sum?.checked_add(step?));
    if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
        return bad("is larger than memory can be");
    }
    let unit = if element == Element::F32 { 4 } else { 2 };
    if !a.data.addr().is_multiple_of(unit) || a.nb.iter().any(|nb| !nb.is_multiple_of(unit)) {
        return bad("is not aligned to its elements");
    }
    Ok(Array { data: a.data.cast(), ne, nb: a.nb })
}

fn problem(c: &sqz_attention) -> Outcome<Problem> {
    let (k_type, v_type) = (element(c.k.kind, "k")?, element(c.v.kind, "v")?);
    for (what, found, wanted) in [("q", c.q.kind, SQZ_TYPE_F32), ("dst", c.dst.kind, SQZ_TYPE_F32)] {
        if found != wanted {
            return fail(SQZ_ERROR_UNSUPPORTED, format!("{what} has type {found}, it must be F32"));
        }
    }
    if !c.mask.data.is_null() && c.mask.kind != SQZ_TYPE_F16 {
        return fail(SQZ_ERROR_UNSUPPORTED, format!("the mask has type {}, it must be F16", c.mask.kind));
    }
    if !c.sinks.is_null() && !c.sinks.is_aligned() {
        return fail(SQZ_ERROR_ARGUMENT, "sinks is not aligned to its elements");
    }
    let numbers = [("scale", c.scale), ("max_bias", c.max_bias), ("softcap", c.softcap)];
    if let Some((name, x)) = numbers.into_iter().find(|(_, x)| !x.is_finite()) {
        return fail(SQZ_ERROR_ARGUMENT, format!("{name} is {x}"));
    }
    if c.max_bias != 0.0 && c.mask.data.is_null() {
        return fail(SQZ_ERROR_UNSUPPORTED, "ALiBi (max_bias) needs a mask");
    }
    let mask = match c.mask.data.is_null() {
        true => None,
        false => Some(array(&c.mask, Element::F16, "the mask")?),
    };
    Ok(Problem {
        q: array(&c.q, Element::F32, "q")?,
        k: array(&c.k, k_type, "k")?,
        v: array(&c.v, v_type, "v")?,
        k_type,
        v_type,
        mask,
        sinks: (!c.sinks.is_null()).then_some(c.sinks),
        dst: array(&c.dst, Element::F32, "dst")?,
        scale: if c.softcap == 0.0 { c.scale } else { c.scale / c.softcap },
        max_bias: c.max_bias,
        softcap: c.softcap,
    })
}
