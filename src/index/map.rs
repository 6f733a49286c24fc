//! The bytes of an index: a mapped file, or a copy in aligned memory. Both start on a multiple of 8.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

pub(super) enum Bytes {
    Mapped(Mmap),
    Owned { words: Vec<u64>, len: usize },
}

impl Bytes {
    /// Maps a regular file. The file must not be changed in place while it is mapped (`write` never does: it renames); one
    /// that is cut while in use ends the process with SIGBUS, as with any mapped model.
    pub fn map(path: &Path) -> io::Result<Bytes> {
        // Before opening: a pipe would block, a directory opens and then fails to map with a puzzling message.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the mapping is private to us, read-only and outlives every slice of it; nobody is to change the file in
        // place while it is open, as the documentation above asks.
        Ok(Bytes::Mapped(unsafe { Mmap::map(&file)? }))
    }

    pub fn copy(bytes: &[u8]) -> Bytes {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Bytes::Owned { words, len: bytes.len() }
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned { words, len } => &bytemuck::cast_slice(words)[..*len],
        }
    }
}
