//! The online half: one attention call over a cache, sparse where an index is bound to it.

pub mod cpu;
pub mod cuda;
pub mod oracle;
pub mod problem;
#[doc(hidden)]
pub mod rule;
pub use problem::*;
