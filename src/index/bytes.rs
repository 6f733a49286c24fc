//! The bytes of an index, in memory of our own that starts on a multiple of 8. A file is read, not mapped: one that is cut while
//! it is mapped ends the process with SIGBUS, and one that is overwritten changes what was checked and kernels rely on.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::error::reserved;
use super::{seal, IndexError};

/// Words of one read.
const CHUNK: usize = 1 << 15;

pub(super) struct Bytes {
    words: Vec<u64>,
    len: usize,
}

/// A regular file, and its size.
pub(super) fn regular(path: &Path) -> io::Result<(File, u64)> {
    // Before opening: a pipe would block.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    Ok((file, size))
}

impl Bytes {
    /// Reads a file that begins as an index does; another one is refused after its first bytes.
    pub fn read(path: &Path) -> Result<Bytes, IndexError> {
        let io = |source| IndexError::Io { path: path.to_path_buf(), source };
        let (mut file, size) = regular(path).map_err(io)?;
        let Ok(len) = usize::try_from(size) else {
            return Err(IndexError::Memory { bytes: size });
        };
        let (mut words, mut chunk) = (Vec::new(), reserved(CHUNK)?);
        chunk.resize(CHUNK, 0u64);
        let mut left = len;
        while left > 0 {
            let n = left.min(8 * CHUNK);
            let taken = n.div_ceil(8);
            // The last word's bytes behind the end of the file stay what they are: nobody sees them.
            file.read_exact(&mut bytemuck::cast_slice_mut(&mut chunk)[..n]).map_err(|error| {
                io(match error.kind() {
                    io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "it became shorter while it was read"),
                    _ => error,
                })
            })?;
            if left == len {
                seal::begins(&bytemuck::cast_slice(&chunk)[..n])?;
                words = reserved(len.div_ceil(8))?;
            }
            words.extend_from_slice(&chunk[..taken]);
            left -= n;
        }
        Ok(Bytes { words, len })
    }

    pub fn copy(bytes: &[u8]) -> Result<Bytes, IndexError> {
        let mut words = reserved(bytes.len().div_ceil(8))?;
        let whole = bytes.chunks_exact(8);
        let rest = whole.remainder();
        words.extend(whole.map(bytemuck::pod_read_unaligned::<u64>));
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            words.push(u64::from_ne_bytes(last));
        }
        Ok(Bytes { words, len: bytes.len() })
    }

    pub fn as_slice(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}
