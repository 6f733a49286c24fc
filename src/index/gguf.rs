//! The parts of GGUF v3 that an index needs: a cursor over untrusted bytes, a walk over any GGUF header, and a writer.
//! Knows nothing of squeeze keys. Allocates nothing while reading.

use std::ops::Range;

use super::error::{ensure, invalid};
use super::IndexError;
use crate::text::one_line;

#[cfg(target_endian = "big")]
compile_error!("the index is used in place as little-endian numbers; this host is big-endian");

pub(super) const VERSION: u32 = 3;
/// Tensor data starts at multiples of this.
pub(super) const ALIGNMENT: usize = 32;

pub(super) const U32: u32 = 4;
pub(super) const I32: u32 = 5;
pub(super) const F32: u32 = 6;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;
pub(super) const U64: u32 = 10;

/// Tensor element types in use, numbered as in `ggml_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    F32 = 0,
    F16 = 1,
    /// Holds our unsigned bytes; GGUF has no U8 tensors.
    I8 = 24,
    I16 = 25,
    I32 = 26,
}

impl Type {
    pub fn from_id(id: u32) -> Option<Type> {
        [Type::F32, Type::F16, Type::I8, Type::I16, Type::I32].into_iter().find(|t| *t as u32 == id)
    }

    /// Bytes per element.
    pub fn size(self) -> u64 {
        match self {
            Type::F32 | Type::I32 => 4,
            Type::F16 | Type::I16 => 2,
            Type::I8 => 1,
        }
    }
}

/// Next multiple of the alignment.
pub(super) fn align(pos: u64) -> Option<u64> {
    pos.checked_next_multiple_of(ALIGNMENT as u64)
}

/// A position in untrusted bytes; every step is bounded by their end.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pub pos: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8], pos: usize) -> Self {
        Cursor { bytes, pos }
    }

    pub fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], IndexError> {
        let left = self.bytes.get(self.pos..).unwrap_or(&[]);
        match usize::try_from(n).ok().and_then(|n| left.get(..n)) {
            Some(taken) => {
                self.pos += taken.len();
                Ok(taken)
            }
            None => Err(IndexError::Truncated {
                at: one_line(&format!("byte {} ({what} needs {n} bytes, {} are left)", self.pos, left.len())),
            }),
        }
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, IndexError> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, IndexError> {
        let low = self.u32(what)?;
        Ok(u64::from(low) | u64::from(self.u32(what)?) << 32)
    }

    /// A string's bytes; whether they are UTF-8 is for the caller to check.
    pub fn raw_str(&mut self, what: &str) -> Result<&'a [u8], IndexError> {
        let n = self.u64(what)?;
        self.take(n, what)
    }

    pub fn str(&mut self, what: &str) -> Result<&'a str, IndexError> {
        let at = self.pos;
        std::str::from_utf8(self.raw_str(what)?).map_err(|_| invalid(&format!("{what} at byte {at} is not UTF-8")))
    }

    /// Passes over a value of any type.
    fn skip_value(&mut self, kind: u32, key: &str) -> Result<(), IndexError> {
        match kind {
            STRING => {
                self.raw_str(key)?;
            }
            ARRAY => {
                let (item, n) = (self.u32(key)?, self.u64(key)?);
                if item == STRING {
                    // Each step takes 8 bytes or more, so the end of the file bounds a hostile count.
                    for _ in 0..n {
                        self.raw_str(key)?;
                    }
                } else {
                    let bytes = n.checked_mul(scalar_size(item, key)?);
                    ensure!(bytes.is_some(), "the array {key:?} has {n} elements");
                    self.take(bytes.unwrap_or(u64::MAX), key)?;
                }
            }
            _ => {
                self.take(scalar_size(kind, key)?, key)?;
            }
        }
        Ok(())
    }
}

fn scalar_size(kind: u32, key: &str) -> Result<u64, IndexError> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        U32 | I32 | F32 => Ok(4),
        U64 | 11 | 12 => Ok(8),
        _ => Err(invalid(&format!("the key {key:?} has the unknown or nested value type {kind}"))),
    }
}

/// Fixed first fields of a GGUF file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub n_tensor: u64,
    pub n_kv: u64,
}

/// Where the first key starts.
pub(super) const KEYS_START: usize = 24;

pub(super) fn counts(bytes: &[u8]) -> Result<Counts, IndexError> {
    // Fewer than four bytes that agree so far are a cut file, not a foreign one.
    let n = bytes.len().min(4);
    if bytes[..n] != b"GGUF"[..n] {
        return Err(IndexError::NotGguf);
    }
    let mut cursor = Cursor::new(bytes, 0);
    cursor.take(4, "the magic")?;
    let version = cursor.u32("the GGUF version")?;
    ensure!(version == VERSION, "its GGUF version is {version}, not {VERSION} (or its byte order is another)");
    Ok(Counts { n_tensor: cursor.u64("the tensor count")?, n_kv: cursor.u64("the key count")? })
}

/// One key and where its value lies.
#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub key: &'a str,
    pub kind: u32,
    pub value: Range<usize>,
}

/// Reads one key and passes over its value.
pub(super) fn entry<'a>(cursor: &mut Cursor<'a>) -> Result<Entry<'a>, IndexError> {
    let key = cursor.str("a key")?;
    let kind = cursor.u32(key)?;
    let start = cursor.pos;
    cursor.skip_value(kind, key)?;
    Ok(Entry { key, kind, value: start..cursor.pos })
}

/// One tensor's entry; `ne` past `n_dims` is 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Info<'a> {
    pub name: &'a str,
    pub n_dims: u32,
    pub ne: [u64; 4],
    pub kind: u32,
    /// From the start of the data.
    pub offset: u64,
}

pub(super) fn info<'a>(cursor: &mut Cursor<'a>) -> Result<Info<'a>, IndexError> {
    let name = cursor.str("a tensor name")?;
    let n_dims = cursor.u32(name)?;
    ensure!((1..=4).contains(&n_dims), "the tensor {name:?} has {n_dims} dimensions");
    let mut ne = [1; 4];
    for n in &mut ne[..n_dims as usize] {
        *n = cursor.u64(name)?;
    }
    Ok(Info { name, n_dims, ne, kind: cursor.u32(name)?, offset: cursor.u64(name)? })
}

/// Bytes of a tensor; None where the product overflows.
pub(super) fn tensor_bytes(ne: &[u64], kind: Type) -> Option<u64> {
    ne.iter().try_fold(kind.size(), |product, n| product.checked_mul(*n))
}

/// Builds a header: counts, keys, tensor entries, padding. Deterministic.
pub(super) struct Writer {
    pub bytes: Vec<u8>,
    n_kv: u64,
    n_tensor: u64,
}

impl Writer {
    pub fn new() -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 16]);
        Writer { bytes, n_kv: 0, n_tensor: 0 }
    }

    fn put_str(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.put_str(key);
        self.bytes.extend(kind.to_le_bytes());
        self.n_kv += 1;
    }

    pub fn str(&mut self, key: &str, value: &str) {
        self.key(key, STRING);
        self.put_str(value);
    }

    /// A number of type `kind`, given as its bytes.
    pub fn scalar<const N: usize>(&mut self, key: &str, kind: u32, value: [u8; N]) {
        self.key(key, kind);
        self.bytes.extend(value);
    }

    pub fn array<T: bytemuck::NoUninit>(&mut self, key: &str, kind: u32, values: &[T]) {
        self.key(key, ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        self.bytes.extend(bytemuck::cast_slice::<T, u8>(values));
    }

    pub fn str_array<'s>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'s str>) {
        self.key(key, ARRAY);
        self.bytes.extend(STRING.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| self.put_str(value));
    }

    pub fn tensor(&mut self, name: &str, ne: &[u64], kind: Type, offset: u64) {
        self.put_str(name);
        self.bytes.extend((ne.len() as u32).to_le_bytes());
        ne.iter().for_each(|n| self.bytes.extend(n.to_le_bytes()));
        self.bytes.extend((kind as u32).to_le_bytes());
        self.bytes.extend(offset.to_le_bytes());
        self.n_tensor += 1;
    }

    /// Fills in the counts and pads to the start of the data.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[8..16].copy_from_slice(&self.n_tensor.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&self.n_kv.to_le_bytes());
        pad(&mut self.bytes);
        self.bytes
    }
}

/// Zeros up to the next multiple of the alignment.
pub(super) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}
