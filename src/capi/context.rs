//! Where indexes are attached and settings hold: the process, or a context of the host's own.

use std::sync::Arc;

use super::handle;
use super::index::{sqz_index, OpenIndex};
use super::plain::{self, Plain};
use super::status::sqz_status::*;
use super::status::{fail, guard, sqz_status, Outcome};
use crate::attention::Spread;
use crate::backend::{self, OpContext, OpOptions, Scope};
use crate::config::{Config, ModeSetting, DEFAULT_BUDGET, DEFAULT_TILE};

/// Settings, attached indexes and counters of their own (opaque), for hosts with several models or users. Where a function
/// takes a context, null means the process: that of every backend that was made in no context.
#[allow(non_camel_case_types)]
pub struct sqz_context {
    _opaque: [u8; 0],
}

/// What a context handle stands for.
pub(super) struct Context {
    pub scope: Arc<Scope>,
    /// Of the nodes of sqz_attn_ext.
    pub op: OpContext,
}

/// Keep the best clusters until a share of the prefix's keys is kept: a fixed amount of work.
pub const SQZ_MODE_BUDGET: u32 = 0;
/// Keep every cluster above the calibrated threshold of this share.
pub const SQZ_MODE_THRESHOLD: u32 = 1;
/// Keep the best clusters until this share of the prefix's attention mass is reached (calibrated).
pub const SQZ_MODE_MASS: u32 = 2;

/// Bonus for wide clusters by per-dimension variances.
pub const SQZ_SPREAD_DIAG: u32 = 0;
/// By one radius.
pub const SQZ_SPREAD_RADIUS: u32 = 1;
/// No bonus.
pub const SQZ_SPREAD_NONE: u32 = 2;

/// Settings; sqz_config_default() gives the defaults.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_config {
    pub size: usize,
    /// SQZ_MODE_...
    pub mode: u32,
    /// The mode's share, above 0 and at most 1.
    pub share: f32,
    /// SQZ_SPREAD_...
    pub spread: u32,
    /// 1: add an estimate for dropped clusters.
    pub estimate: u32,
    /// Prefixes shorter than this stay dense; UINT32_MAX: than is worth it where it was measured.
    pub min_prefix: u32,
    /// Consecutive query tokens of a prefill that share a selection, at most; at least 1.
    pub tile: u32,
    /// 1: every graph is passed through as it is.
    pub disable: u32,
    /// 0 problems only, 1 bindings and totals, 2 also a line per graph.
    pub log: u32,
}

// SAFETY: repr(C), size first, numbers alone.
unsafe impl Plain for sqz_config {
    const NAME: &'static str = "sqz_config";
    const LEAST: usize = size_of::<sqz_config>();
}

/// Counters since the start or the last reset. Set `size` to the structure's size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct sqz_stats {
    pub size: usize,
    /// Graphs that were looked at.
    pub graphs: u64,
    /// Attention nodes with at least one sparse row.
    pub nodes_sparse: u64,
    /// Attention nodes on our kernels because of GGML_SQUEEZE_FORCE.
    pub nodes_forced: u64,
    /// Attention nodes left to the stock kernel while an index was attached.
    pub nodes_dense: u64,
    /// Query rows, counted per node, that were sparse.
    pub rows_sparse: u64,
    /// Times an index was bound to cache cells, and times that ended.
    pub bound: u64,
    pub unbound: u64,
    /// Mean kept share of the prefix keys over sparse rows and KV heads; 0 before the first.
    pub kept_share: f64,
}

// SAFETY: repr(C), size first, numbers alone.
unsafe impl Plain for sqz_stats {
    const NAME: &'static str = "sqz_stats";
    const LEAST: usize = size_of::<sqz_stats>();
}

impl Default for sqz_stats {
    fn default() -> Self {
        // `size` is what a caller has to set.
        sqz_stats {
            size: size_of::<sqz_stats>(),
            graphs: 0,
            nodes_sparse: 0,
            nodes_forced: 0,
            nodes_dense: 0,
            rows_sparse: 0,
            bound: 0,
            unbound: 0,
            kept_share: 0.0,
        }
    }
}

/// The default settings, with `size` set. They do not depend on the environment.
#[no_mangle]
pub extern "C" fn sqz_config_default() -> sqz_config {
    sqz_config {
        size: size_of::<sqz_config>(),
        mode: SQZ_MODE_BUDGET,
        share: DEFAULT_BUDGET,
        spread: SQZ_SPREAD_DIAG,
        estimate: 0,
        min_prefix: u32::MAX,
        tile: DEFAULT_TILE as u32,
        disable: 0,
        log: 0,
    }
}

/// Puts C's settings into ours; nothing is changed by an error.
fn apply(c: &sqz_config, config: &mut Config) -> Outcome {
    if !(c.share > 0.0 && c.share <= 1.0) {
        return fail(SQZ_ERROR_ARGUMENT, format!("share is {}: give one above 0 and at most 1", c.share));
    }
    let mode = match c.mode {
        SQZ_MODE_BUDGET => ModeSetting::Budget(c.share),
        SQZ_MODE_THRESHOLD => ModeSetting::Threshold(c.share),
        SQZ_MODE_MASS => ModeSetting::Mass(c.share),
        other => return fail(SQZ_ERROR_ARGUMENT, format!("mode is {other}: give one of SQZ_MODE_...")),
    };
    let spread = match c.spread {
        SQZ_SPREAD_DIAG => Spread::Diag,
        SQZ_SPREAD_RADIUS => Spread::Radius,
        SQZ_SPREAD_NONE => Spread::None,
        other => return fail(SQZ_ERROR_ARGUMENT, format!("spread is {other}: give one of SQZ_SPREAD_...")),
    };
    let flag = |name: &str, value: u32| match value {
        0 | 1 => Ok(value == 1),
        other => fail(SQZ_ERROR_ARGUMENT, format!("{name} is {other}: give 0 or 1")),
    };
    let (estimate, disable) = (flag("estimate", c.estimate)?, flag("disable", c.disable)?);
    if c.tile == 0 {
        return fail(SQZ_ERROR_ARGUMENT, "tile is 0: give a number of tokens above 0");
    }
    (config.mode, config.spread, config.estimate, config.disable) = (mode, spread, estimate, disable);
    config.min_prefix = (c.min_prefix != u32::MAX).then_some(c.min_prefix as usize);
    (config.tile, config.log) = (c.tile as usize, c.log);
    Ok(())
}

/// Runs something in a context, or in the process's where it is null.
fn within<T>(context: *const sqz_context, run: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    if context.is_null() {
        let _entered = backend::enter_process();
        return run();
    }
    let context = handle::get::<Context, _>(context)?;
    let _entered = backend::enter(&context.scope);
    run()
}

/// Makes a context. `config` may be null: the defaults. Free it with sqz_context_free.
///
/// # Safety
/// `config` is null or has as many bytes as it says; `out` is null or writable.
#[no_mangle]
pub unsafe extern "C" fn sqz_context_new(config: *const sqz_config, out: *mut *mut sqz_context) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let (out, config) = unsafe { (plain::place(out, "the context")?, plain::read(config, sqz_config_default())?) };
        let mut own = Config::default();
        apply(&config, &mut own)?;
        let scope = Arc::new(Scope::default());
        {
            let _entered = backend::enter(&scope);
            backend::configure(|c| *c = own);
        }
        let op = OpContext::new(scope.clone(), OpOptions::default());
        *out = handle::put(Context { scope, op });
        Ok(())
    })
}

/// Frees a handle; null does nothing. Backends that were made in the context keep its settings and indexes as long as they live.
#[no_mangle]
pub extern "C" fn sqz_context_free(context: *mut sqz_context) -> sqz_status {
    guard(|| handle::free::<Context, _>(context))
}

/// Puts the calling thread into a context, or (null) back into the process's: backends, hence llama contexts, that this thread
/// makes from now on belong to it. Computing needs no call: a backend keeps the context that it was made in.
#[no_mangle]
pub extern "C" fn sqz_context_enter(context: *const sqz_context) -> sqz_status {
    guard(|| {
        let scope = match context.is_null() {
            true => None,
            false => Some(handle::get::<Context, _>(context)?.scope.clone()),
        };
        backend::set_current(scope);
        Ok(())
    })
}

/// Changes the settings of a context (null: of the process); they hold from the next graph on. `config` may be null: the
/// defaults.
///
/// # Safety
/// `config` is null or has as many bytes as it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_configure(context: *const sqz_context, config: *const sqz_config) -> sqz_status {
    guard(|| {
        // SAFETY: by contract.
        let config = unsafe { plain::read(config, sqz_config_default())? };
        apply(&config, &mut Config::default())?;
        within(context, || {
            let mut applied = Ok(());
            backend::configure(|c| applied = apply(&config, c));
            applied
        })
    })
}

/// Attaches an index to a context (null: to the process): from the next graph on, prompts that begin with its prefix are
/// sparse. Needs sqz_register, or the plugin loaded by ggml, before the backends are made. The handle may be freed then.
#[no_mangle]
pub extern "C" fn sqz_attach(context: *const sqz_context, index: *const sqz_index) -> sqz_status {
    guard(|| {
        let open = handle::get::<OpenIndex, _>(index)?;
        within(context, || match backend::attach(&open.index)? {
            true => Ok(()),
            false => fail(SQZ_ERROR_ATTACHED, "this index is attached there already"),
        })
    })
}

/// Detaches an index: from the next graph on its prompts are dense again.
#[no_mangle]
pub extern "C" fn sqz_detach(context: *const sqz_context, index: *const sqz_index) -> sqz_status {
    guard(|| {
        let open = handle::get::<OpenIndex, _>(index)?;
        within(context, || match backend::detach(&open.index) {
            true => Ok(()),
            false => fail(SQZ_ERROR_NOT_ATTACHED, "this index is not attached there"),
        })
    })
}

/// Fills in the counters of a context (null: of the process). Found by name through the registry's `get_proc_address` too.
///
/// # Safety
/// `out` is null or has as many bytes as it says.
#[no_mangle]
pub unsafe extern "C" fn sqz_get_stats(context: *const sqz_context, out: *mut sqz_stats) -> sqz_status {
    guard(|| {
        if !context.is_null() {
            handle::get::<Context, _>(context)?.op.settle();
        }
        let totals = within(context, || Ok(backend::stats()))?;
        let stats = sqz_stats {
            size: size_of::<sqz_stats>(),
            graphs: totals.graphs,
            nodes_sparse: totals.nodes_sparse,
            nodes_forced: totals.nodes_forced,
            nodes_dense: totals.nodes_dense.values().sum(),
            rows_sparse: totals.rows_sparse,
            bound: totals.bound,
            unbound: totals.unbound,
            kept_share: totals.kept_share,
        };
        // SAFETY: by contract.
        unsafe { plain::write(out, stats) }
    })
}

/// Sets the counters of a context (null: of the process) to zero.
#[no_mangle]
pub extern "C" fn sqz_reset_stats(context: *const sqz_context) -> sqz_status {
    guard(|| {
        within(context, || {
            backend::reset_stats();
            Ok(())
        })
    })
}
