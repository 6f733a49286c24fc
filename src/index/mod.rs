//! The index of one prefix: types, and the sidecar file (GGUF v3).

#![forbid(unsafe_code)]

mod bytes;
mod coarse;
mod error;
mod gguf;
mod keys;
mod layout;
mod model;
mod read;
mod seal;
pub mod types;
mod validate;
mod write;

#[doc(hidden)]
pub mod sample;
#[cfg(test)]
mod tests;

pub(crate) use error::reserved;
pub use error::IndexError;
pub use model::{ModelError, ModelFile};
pub use read::Index;
pub use types::*;
pub(crate) use write::is_special;
pub use write::{to_bytes, write};
