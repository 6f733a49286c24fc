//! Tests of the file format. `Forge` takes a file apart and puts it together with lies in it.

mod damage;
mod hostile;
mod parts;
mod round_trip;

use super::gguf::{self, Cursor};
use super::sample::{add_coarse, reseal, sample_parts};
use super::seal::Frame;
use super::*;

/// A file of a few KB: two layers with a coarse level, a probe, a dense layer.
fn small() -> IndexParts {
    let mut parts = sample_parts(7, 24, 2, 2, 4, 3, 5);
    add_coarse(&mut parts, 8, 2);
    parts
}

fn open(bytes: &[u8]) -> Result<Index, IndexError> {
    Index::from_bytes(bytes.to_vec())
}

/// The text of `Invalid`; anything else fails the test.
#[track_caller]
fn invalid<T: std::fmt::Debug>(result: Result<T, IndexError>) -> String {
    match result {
        Err(IndexError::Invalid { what }) => what,
        other => panic!("expected Invalid, got {other:?}"),
    }
}

#[derive(Clone)]
struct Tensor {
    name: String,
    ne: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// A GGUF file in pieces, each of which a test may falsify.
#[derive(Clone)]
struct Forge {
    n_kv: u64,
    n_tensor: u64,
    /// Key, value type, raw value.
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<Tensor>,
    data: Vec<u8>,
}

impl Forge {
    fn new(bytes: &[u8]) -> Forge {
        let frame = Frame::read(bytes).unwrap();
        let mut cursor = Cursor::new(bytes, gguf::KEYS_START);
        let mut key = || {
            let entry = gguf::entry(&mut cursor).unwrap();
            (entry.key.to_string(), entry.kind, bytes[entry.value].to_vec())
        };
        let keys = (0..frame.counts.n_kv).map(|_| key()).collect();
        let mut cursor = Cursor::new(bytes, frame.infos);
        let mut tensor = || {
            let info = gguf::info(&mut cursor).unwrap();
            let ne = info.ne[..info.n_dims as usize].to_vec();
            Tensor { name: info.name.into(), ne, kind: info.kind, offset: info.offset }
        };
        let tensors = (0..frame.counts.n_tensor).map(|_| tensor()).collect();
        let data = bytes[frame.data..].to_vec();
        Forge { n_kv: frame.counts.n_kv, n_tensor: frame.counts.n_tensor, keys, tensors, data }
    }

    fn key(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.keys.iter_mut().find(|(key, ..)| key == name).unwrap().2
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Where a tensor's data start in `data`.
    fn at(&mut self, name: &str) -> usize {
        self.tensor(name).offset as usize
    }

    /// The file, with checksums that agree wherever its header can still be walked.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        let str = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        bytes.extend(gguf::VERSION.to_le_bytes());
        bytes.extend(self.n_tensor.to_le_bytes());
        bytes.extend(self.n_kv.to_le_bytes());
        for (key, kind, value) in &self.keys {
            str(&mut bytes, key);
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        for tensor in &self.tensors {
            str(&mut bytes, &tensor.name);
            bytes.extend((tensor.ne.len() as u32).to_le_bytes());
            tensor.ne.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes.extend(tensor.kind.to_le_bytes());
            bytes.extend(tensor.offset.to_le_bytes());
        }
        gguf::pad(&mut bytes);
        bytes.extend(&self.data);
        reseal(&mut bytes);
        bytes
    }

    fn open(&self) -> Result<Index, IndexError> {
        Index::from_bytes(self.bytes())
    }
}

#[test]
fn an_unchanged_forgery_is_the_same_file() {
    let bytes = to_bytes(&small()).unwrap();
    assert_eq!(Forge::new(&bytes).bytes(), bytes);
}
