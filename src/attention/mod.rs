//! The online half: one attention call over a cache, sparse where an index is bound to it.

#[allow(unsafe_code)]
pub mod cpu;
#[allow(unsafe_code)]
pub mod cuda;
#[allow(unsafe_code)]
pub mod oracle;
#[allow(unsafe_code)]
pub mod problem;
#[doc(hidden)]
pub mod rule;
pub use problem::*;
