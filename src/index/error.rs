//! Why an index cannot be read or written. The path is named by `Io` alone: the other kinds come from bytes as well as
//! from files, and whoever opened the file names it.

use std::io;
use std::path::PathBuf;

use super::types::FORMAT_VERSION;
use crate::text::one_line;

#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file cannot be opened, read or written.
    #[error("{}: {source}: check that the path is right, permitted and on a disk with room", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The file ends too early.
    #[error("the index is cut off at {at}: copy it again in full, or rebuild it with `sqz build`")]
    Truncated { at: String },
    #[error(
        "this is not a GGUF file (its first bytes are not `GGUF`): give the .sqz.gguf file that `sqz build` wrote"
    )]
    NotGguf,
    /// A GGUF file of another kind, with its `general.type`.
    #[error(
        "this GGUF file is no squeeze index (its general.type is {0:?}): give the .sqz.gguf file that `sqz build` wrote, \
         not the model"
    )]
    NotAnIndex(String),
    #[error(
        "the index has format version {found}, this program reads version {}: rebuild the index with `sqz build` of this \
         program",
        FORMAT_VERSION
    )]
    Version { found: u32 },
    #[error("there is no memory for {bytes} bytes of the index: end other programs, or index a shorter prefix")]
    Memory { bytes: u64 },
    /// Bytes differ from those written; `tensor` is a tensor's name, or `the header`.
    #[error(
        "the index is damaged: the checksum of {tensor} does not match: copy it again, or rebuild it with `sqz build`"
    )]
    Checksum { tensor: String },
    /// See [`Index::open_any`](super::Index::open_any).
    #[error(
        "the index is synthetic: its clusters are made up to measure speed (`sqz bench --synthetic-index`), answers from it \
         would be wrong: make a real one with `sqz build`"
    )]
    Synthetic,
    /// A rule of the format or of `IndexParts` is broken.
    #[error("the index is not valid: {what}: rebuild it with `sqz build` of this program")]
    Invalid { what: String },
}

/// Returns `IndexError::Invalid` unless the condition holds. Conditions are stated so that a NaN fails them.
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => {
        if !$cond {
            return Err($crate::index::error::invalid(&format!($($arg)*)));
        }
    };
}
pub(super) use ensure;

pub(super) fn invalid(what: &str) -> IndexError {
    IndexError::Invalid { what: one_line(what) }
}

/// An empty list with room for `n` elements. What grows with a file's size is asked for like this: a host without the memory gets
/// an error, where a plain `Vec` would end it.
pub(crate) fn reserved<T>(n: usize) -> Result<Vec<T>, IndexError> {
    let mut list = Vec::new();
    match list.try_reserve_exact(n) {
        Ok(()) => Ok(list),
        Err(_) => Err(IndexError::Memory { bytes: (n as u64).saturating_mul(size_of::<T>() as u64) }),
    }
}
