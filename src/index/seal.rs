//! Checksums. Every tensor has its own, in the header; the header (keys, tensor entries, padding) has one over all of its
//! bytes but its own eight, as the last key. Padding between tensors is zero. So no byte of a file can change unseen.

use std::ops::Range;

use xxhash_rust::xxh3::{xxh3_64, Xxh3};

use super::error::ensure;
use super::gguf::{self, Cursor, Type};
use super::types::FORMAT_VERSION;
use super::IndexError;

pub(super) const GENERAL_TYPE: &str = "squeeze-index";
/// `general.type` of an index whose clusters are made up: programs that do not know of such take it for no index.
pub(super) const SYNTHETIC_TYPE: &str = "squeeze-index-synthetic";
pub(super) const VERSION_KEY: &str = "squeeze.version";
pub(super) const CHECKSUMS_KEY: &str = "squeeze.checksums";
pub(super) const SEAL_KEY: &str = "squeeze.metadata_checksum";

/// The outline of an index file: enough to check and to set checksums.
#[derive(Debug)]
pub(super) struct Frame {
    pub counts: gguf::Counts,
    /// Where the tensor entries start.
    pub infos: usize,
    /// Where the tensor data starts.
    pub data: usize,
    /// The u64 values of `squeeze.checksums`.
    checksums: Range<usize>,
    /// The u64 value of `squeeze.metadata_checksum`.
    seal: Range<usize>,
}

impl Frame {
    /// Walks over the header of any GGUF file.
    ///
    /// # Errors
    /// `NotGguf`, `NotAnIndex` and `Version` as named; `Truncated` and `Invalid` for a header that is no header.
    pub fn read(bytes: &[u8]) -> Result<Frame, IndexError> {
        let counts = gguf::counts(bytes)?;
        let mut cursor = Cursor::new(bytes, gguf::KEYS_START);
        let (mut kind, mut version, mut checksums, mut seal) = (None, None, None, None);
        for i in 0..counts.n_kv {
            let entry = gguf::entry(&mut cursor)?;
            match (entry.key, entry.kind) {
                ("general.type", gguf::STRING) => {
                    kind = Some(String::from_utf8_lossy(&bytes[entry.value][8..]).into_owned());
                }
                (VERSION_KEY, gguf::U32) => version = Some(Cursor::new(bytes, entry.value.start).u32(VERSION_KEY)?),
                (CHECKSUMS_KEY, gguf::ARRAY) => {
                    let item = Cursor::new(bytes, entry.value.start).u32(CHECKSUMS_KEY)?;
                    ensure!(item == gguf::U64, "the key {CHECKSUMS_KEY:?} is not an array of u64");
                    checksums = Some(entry.value.start + 12..entry.value.end);
                }
                (SEAL_KEY, gguf::U64) if i + 1 == counts.n_kv => seal = Some(entry.value),
                _ => {}
            }
        }
        if !matches!(kind.as_deref(), Some(GENERAL_TYPE | SYNTHETIC_TYPE)) {
            return Err(IndexError::NotAnIndex(crate::text::one_line(&kind.unwrap_or_default())));
        }
        match version {
            Some(FORMAT_VERSION) => {}
            Some(found) => return Err(IndexError::Version { found }),
            None => return Err(IndexError::Invalid { what: format!("the key {VERSION_KEY:?} (u32) is missing") }),
        }
        let infos = cursor.pos;
        for _ in 0..counts.n_tensor {
            gguf::info(&mut cursor)?;
        }
        let padding = cursor.pos.next_multiple_of(gguf::ALIGNMENT) - cursor.pos;
        cursor.take(padding as u64, "the padding of the header")?;
        match (checksums, seal) {
            (Some(checksums), Some(seal)) => Ok(Frame { counts, infos, data: cursor.pos, checksums, seal }),
            _ => Err(IndexError::Invalid {
                what: format!("the key {CHECKSUMS_KEY:?} is missing, or {SEAL_KEY:?} (u64) is not the last key"),
            }),
        }
    }

    fn header_checksum(&self, bytes: &[u8]) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(&bytes[..self.seal.start]);
        hash.update(&bytes[self.seal.end..self.data]);
        hash.digest()
    }

    pub fn check_header(&self, bytes: &[u8]) -> Result<(), IndexError> {
        if bytes[self.seal.clone()] != self.header_checksum(bytes).to_le_bytes() {
            return Err(IndexError::Checksum { tensor: "the header".into() });
        }
        let n = self.checksums.len() as u64 / 8;
        ensure!(n == self.counts.n_tensor, "there are {n} checksums for {} tensors", self.counts.n_tensor);
        Ok(())
    }

    /// Checks tensor number `i`, whose data are `data`; call after `check_header`.
    pub fn check_tensor(&self, bytes: &[u8], i: usize, name: &str, data: &[u8]) -> Result<(), IndexError> {
        let at = self.checksums.start + 8 * i;
        if bytes[at..at + 8] == xxh3_64(data).to_le_bytes() {
            Ok(())
        } else {
            Err(IndexError::Checksum { tensor: name.into() })
        }
    }
}

/// Whether a file may be an index, by its first bytes: a reader need not take in what is another file. A cut header passes.
///
/// # Errors
/// `NotGguf` and `NotAnIndex`.
pub(super) fn begins(bytes: &[u8]) -> Result<(), IndexError> {
    let counts = match gguf::counts(bytes) {
        Err(IndexError::NotGguf) => return Err(IndexError::NotGguf),
        Err(_) => return Ok(()),
        Ok(counts) => counts,
    };
    // An index has it first.
    let mut cursor = Cursor::new(bytes, gguf::KEYS_START);
    let mut found = String::new();
    for i in 0..counts.n_kv {
        let Ok(entry) = gguf::entry(&mut cursor) else {
            if i == 0 {
                return Ok(());
            }
            break;
        };
        if (entry.key, entry.kind) == ("general.type", gguf::STRING) {
            found = String::from_utf8_lossy(&bytes[entry.value][8..]).into_owned();
            if matches!(found.as_str(), GENERAL_TYPE | SYNTHETIC_TYPE) {
                return Ok(());
            }
            break;
        }
    }
    Err(IndexError::NotAnIndex(crate::text::one_line(&found)))
}

/// Sets every checksum of a complete file. Tensor entries that point outside the file keep the checksum they have, so tests
/// and fuzzers can seal hostile files too.
///
/// # Errors
/// As `Frame::read`.
pub(super) fn seal(bytes: &mut [u8]) -> Result<(), IndexError> {
    let frame = Frame::read(bytes)?;
    let mut infos = frame.infos;
    for at in frame.checksums.clone().step_by(8).take(frame.counts.n_tensor.try_into().unwrap_or(usize::MAX)) {
        let mut cursor = Cursor::new(bytes, infos);
        let info = gguf::info(&mut cursor)?;
        infos = cursor.pos;
        let sum = data_range(&frame, &info).and_then(|range| bytes.get(range)).map(xxh3_64);
        if let Some(sum) = sum {
            bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let sum = frame.header_checksum(bytes);
    bytes[frame.seal].copy_from_slice(&sum.to_le_bytes());
    Ok(())
}

fn data_range(frame: &Frame, info: &gguf::Info) -> Option<Range<usize>> {
    let size = gguf::tensor_bytes(&info.ne, Type::from_id(info.kind)?)?;
    let start = (frame.data as u64).checked_add(info.offset)?;
    Some(start.try_into().ok()?..start.checked_add(size)?.try_into().ok()?)
}
