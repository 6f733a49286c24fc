//! The index of one prefix: types, and the sidecar file (GGUF v3).

pub mod types;
pub use types::*;
