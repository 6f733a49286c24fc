//! One attention op for hosts that build their own ggml graphs.

use ggml_sys as sys;

use super::context::{sqz_context, Context};
use super::handle;
use super::index::{sqz_index, OpenIndex};
use super::status::sqz_status::*;
use super::status::{fail, guard, sqz_status};
use crate::backend::{attn_ext, Source};

/// Makes an attention node in place of ggml_flash_attn_ext, with its arguments and its result: F32
/// [head_dim_v, n_head, n_query, n_stream]. Null after an error (sqz_last_error), which is all that ggml's function aborts for.
///
/// The prefix's tokens must lie in cells 0 to P of K and V, in order, in each stream. A query row that its mask shows all of them
/// (without a mask: every row) attends to those that the context's settings select, and to all else that it sees; other rows are
/// dense. K and V are verified against the index, and are dense where they hold something else. Where no row can be sparse
/// (the layer is not in the index or has another shape, fewer cells, ALiBi, a head size or type that the kernels do not take), the
/// node is a plain GGML_OP_FLASH_ATTN_EXT.
///
/// Nodes are computed by the threads of ggml's CPU backend, or by a CUDA device that sqz_register has hooked (docs/op.md). The
/// context must not be freed before the last graph with the node was computed; the index may.
///
/// # Safety
/// `ctx` is null or a live ggml context with room for the node; `q`, `k`, `v` and `mask` are null or live tensors.
#[no_mangle]
pub unsafe extern "C" fn sqz_attn_ext(
    context: *const sqz_context,
    ctx: *mut sys::ggml_context,
    q: *mut sys::ggml_tensor,
    k: *mut sys::ggml_tensor,
    v: *mut sys::ggml_tensor,
    mask: *mut sys::ggml_tensor,
    scale: f32,
    max_bias: f32,
    softcap: f32,
    index: *const sqz_index,
    layer: i32,
) -> *mut sys::ggml_tensor {
    let mut node = std::ptr::null_mut();
    guard(|| {
        let context = handle::get::<Context, _>(context)?;
        let open = handle::get::<OpenIndex, _>(index)?;
        let Ok(layer) = u32::try_from(layer) else {
            return fail(SQZ_ERROR_ARGUMENT, format!("layer {layer} is below 0"));
        };
        let source = Source { q, k, v, mask };
        // SAFETY: by contract; nulls are checked.
        let made = unsafe { attn_ext(&context.op, ctx, source, scale, max_bias, softcap, &open.index, layer) };
        match made {
            Ok(made) => node = made,
            Err(why) => return fail(SQZ_ERROR_ARGUMENT, why),
        }
        Ok(())
    });
    node
}

/// Has K and V verified in full when a node of the context is next computed: for a host that has changed the prefix's cells.
#[no_mangle]
pub extern "C" fn sqz_attn_forget(context: *const sqz_context) -> sqz_status {
    guard(|| {
        handle::get::<Context, _>(context)?.op.forget();
        Ok(())
    })
}
