//! What C sees: the plugin's entry point, registration for hosts that link us, statistics. No panic crosses.

use std::panic::catch_unwind;

use ggml_sys as sys;

use crate::backend;

/// Totals since the process began; filled by [`sqz_stats`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SqzStats {
    /// Attention nodes with at least one sparse row.
    pub nodes_sparse: u64,
    /// Attention nodes on our kernels because of GGML_SQUEEZE_FORCE.
    pub nodes_forced: u64,
    /// Attention nodes left to the stock kernel while an index was loaded.
    pub nodes_dense: u64,
    /// Query rows, counted per node, that were sparse.
    pub rows_sparse: u64,
    /// Times an index was bound to cache cells, and times that ended.
    pub bound: u64,
    pub unbound: u64,
    /// Mean kept share of the prefix keys over sparse rows and KV heads; 0 before the first.
    pub kept_share: f64,
}

/// Entry point of the plugin (`GGML_BACKEND_PATH`); null where the host's ggml is not the one that this build is made for.
#[no_mangle]
pub extern "C" fn ggml_backend_init() -> sys::ggml_backend_reg_t {
    catch_unwind(backend::registry).unwrap_or(std::ptr::null_mut())
}

/// For a host that links the library: hooks the CPU device with settings from the environment. Call it after ggml's
/// backends are loaded and before a backend or llama context is made. 0, or -1 after one line on stderr.
#[no_mangle]
pub extern "C" fn sqz_register() -> i32 {
    if ggml_backend_init().is_null() {
        -1
    } else {
        0
    }
}

/// Writes the totals to `out`. Found by name through the registry's `get_proc_address` too.
///
/// # Safety
/// `out` is null (then nothing happens) or points to a writable `SqzStats`.
#[no_mangle]
pub unsafe extern "C" fn sqz_stats(out: *mut SqzStats) {
    let Ok(totals) = catch_unwind(backend::stats) else { return };
    let filled = SqzStats {
        nodes_sparse: totals.nodes_sparse,
        nodes_forced: totals.nodes_forced,
        nodes_dense: totals.nodes_dense.values().sum(),
        rows_sparse: totals.rows_sparse,
        bound: totals.bound,
        unbound: totals.unbound,
        kept_share: totals.kept_share,
    };
    // SAFETY: writable by contract, or null.
    if let Some(out) = unsafe { out.as_mut() } {
        *out = filled;
    }
}
