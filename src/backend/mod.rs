//! Glue to ggml: patched CPU backends, binding of an index to cache cells, what of a graph runs sparse. Holds no arithmetic.

mod binding;
mod cache;
mod graph;
mod hook;
mod plugin;
mod rows;
mod runtime;
mod stats;
mod status;
mod tensor;

pub use plugin::{register, registry};
pub use rows::{is_quantised, Row};
pub use runtime::{configure, reset_stats, set_indexes, stats};
pub use stats::Stats;
