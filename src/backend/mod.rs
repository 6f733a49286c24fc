//! Glue to ggml: patched backends, binding of an index to cache cells, what of a graph runs sparse. Holds no arithmetic.

mod binding;
mod cache;
mod capture;
mod cuda;
mod graph;
mod hook;
mod layers;
mod op;
mod pass;
mod plugin;
mod rows;
mod runtime;
mod stats;
mod status;
mod tensor;

pub use capture::{Capture, CaptureError, DenseLayers};
pub use op::{attn_ext, AttendError, Attended, OpContext, OpOptions, Source};
pub use plugin::{register, registry};
pub use rows::{is_quantised, Row};
pub use runtime::{attach, configure, current, detach, enter, enter_process, set_current, set_indexes, Entered, Scope};
pub use stats::{set_log, LogSink, Stats};
pub use tensor::element_of;

/// Totals since the start or the last reset. Waits for what GPUs still count.
pub fn stats() -> Stats {
    hook::settle();
    runtime::stats()
}

/// Sets the totals to zero.
pub fn reset_stats() {
    hook::settle();
    runtime::reset_stats();
}
