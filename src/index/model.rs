//! What an index says of the model that it was made with, read from the model's GGUF file.

use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::bytes::regular;
use super::error::reserved;
use super::gguf::{self, Cursor, Entry};
use super::{IndexError, ModelId};

const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 64 * 1024;
/// Read at first; the metadata of most models with a vocabulary take a few MiB.
const FIRST_BYTES: u64 = 1 << 22;
/// More metadata are no model's.
const MOST_METADATA: u64 = 1 << 30;

/// Why a model file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("cannot read the model {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is not a GGUF file that a model could be read from ({what}): give the model that llama.cpp loads", path.display())]
    NotGguf { path: PathBuf, what: String },
}

/// The parts of a model file that an index is held against.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFile {
    pub id: ModelId,
    /// Layers (`<architecture>.block_count`); 0 where the file does not say.
    pub n_layer: u32,
    /// RoPE base frequency; none where the file leaves it to llama.cpp.
    pub rope_freq_base: Option<f32>,
}

impl ModelFile {
    /// Reads a model's metadata and a sample of its weights. Of a split model, the first file alone.
    ///
    /// The fingerprint is the SHA-256 over the file's size, everything in front of the tensor data, and 64 KiB at each of 64
    /// evenly spread places of the data.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn read(path: &Path) -> Result<ModelFile, ModelError> {
        let io = |source| ModelError::Io { path: path.to_path_buf(), source };
        let (mut file, size) = regular(path).map_err(io)?;
        let (mut model, data) = match metadata(&mut file, size).map_err(io)? {
            Ok(found) => found,
            Err(error) => {
                let what = match error {
                    IndexError::NotGguf => "its first bytes are not `GGUF`".to_string(),
                    IndexError::Truncated { at } => format!("it is cut off at {at}"),
                    IndexError::Invalid { what } => what,
                    other => other.to_string(),
                };
                return Err(ModelError::NotGguf { path: path.to_path_buf(), what });
            }
        };
        model.id.fingerprint = sample(&mut file, size, data).map_err(io)?;
        Ok(model)
    }

    /// What the first bytes of a file of `size` bytes say, but for the fingerprint, and where its tensor data begin.
    fn parse(bytes: &[u8], size: u64) -> Result<(ModelFile, u64), IndexError> {
        let counts = gguf::counts(bytes)?;
        let mut cursor = Cursor::new(bytes, gguf::KEYS_START);
        let mut file = ModelFile {
            id: ModelId { architecture: String::new(), name: String::new(), fingerprint: [0; 32] },
            n_layer: 0,
            rope_freq_base: None,
        };
        let mut alignment = gguf::ALIGNMENT as u64;
        for _ in 0..counts.n_kv {
            let entry = gguf::entry(&mut cursor)?;
            let value = &bytes[entry.value.clone()];
            match entry.key {
                "general.architecture" => file.id.architecture = text(&entry, value),
                "general.name" => file.id.name = text(&entry, value),
                "general.alignment" => alignment = number(&entry, value).map_or(alignment, u64::from),
                key if key.ends_with(".block_count") => file.n_layer = number(&entry, value).unwrap_or(0),
                key if key.ends_with(".rope.freq_base") && entry.kind == gguf::F32 => {
                    file.rope_freq_base = four(value).map(f32::from_le_bytes);
                }
                _ => {}
            }
        }
        for _ in 0..counts.n_tensor {
            gguf::info(&mut cursor)?;
        }
        let data = (cursor.pos as u64).checked_next_multiple_of(alignment.max(1)).unwrap_or(size);
        Ok((file, data.min(size)))
    }
}

/// Reads as much of the file as its metadata take. The outer error: the file cannot be read; the inner one: it is no model.
fn metadata(file: &mut (impl Read + Seek), size: u64) -> io::Result<Result<(ModelFile, u64), IndexError>> {
    let mut wanted = FIRST_BYTES;
    loop {
        let n = wanted.min(size);
        let mut bytes = match reserved(n as usize) {
            Ok(bytes) => bytes,
            Err(error) => return Ok(Err(error)),
        };
        file.rewind()?;
        file.take(n).read_to_end(&mut bytes)?;
        match ModelFile::parse(&bytes, size) {
            Err(IndexError::Truncated { .. }) if wanted < size.min(MOST_METADATA) => wanted *= 4,
            other => return Ok(other),
        }
    }
}

fn text(entry: &Entry, value: &[u8]) -> String {
    match entry.kind {
        gguf::STRING => String::from_utf8_lossy(&value[8..]).into_owned(),
        _ => String::new(),
    }
}

fn four(value: &[u8]) -> Option<[u8; 4]> {
    value.try_into().ok()
}

fn number(entry: &Entry, value: &[u8]) -> Option<u32> {
    (entry.kind == gguf::U32).then(|| four(value).map(u32::from_le_bytes)).flatten()
}

/// `data`: where the tensor data begin.
fn sample(file: &mut (impl Read + Seek), size: u64, data: u64) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(size.to_le_bytes());
    let mut buffer = vec![0; SAMPLE_BYTES as usize];
    let mut take = |from: u64, n: u64| -> io::Result<()> {
        file.seek(io::SeekFrom::Start(from))?;
        let mut left = (from + n).min(size) - from;
        while left > 0 {
            let part = &mut buffer[..left.min(SAMPLE_BYTES) as usize];
            file.read_exact(part)?;
            hash.update(&*part);
            left -= part.len() as u64;
        }
        Ok(())
    };
    take(0, data)?;
    let room = (size - data).saturating_sub(SAMPLE_BYTES);
    for i in 0..SAMPLES {
        take(data + (room as u128 * i as u128 / (SAMPLES - 1) as u128) as u64, SAMPLE_BYTES)?;
    }
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(weights: &[u8]) -> Vec<u8> {
        let mut file = gguf::Writer::new();
        file.str("general.architecture", "llama");
        file.str("general.name", "A Model");
        file.scalar("llama.block_count", gguf::U32, 7u32.to_le_bytes());
        file.scalar("llama.rope.freq_base", gguf::F32, 5e5f32.to_le_bytes());
        file.str_array("tokenizer.ggml.tokens", ["a", "b"].into_iter());
        file.tensor("w", &[weights.len() as u64], gguf::Type::I8, 0);
        let mut bytes = file.finish();
        bytes.extend(weights);
        bytes
    }

    #[test]
    fn what_the_file_says_is_found() {
        let (file, data) = ModelFile::parse(&model(&[1; 100]), 1000).unwrap();
        assert_eq!(data, model(&[]).len() as u64);
        assert_eq!((file.id.architecture.as_str(), file.id.name.as_str()), ("llama", "A Model"));
        assert_eq!((file.n_layer, file.rope_freq_base), (7, Some(5e5)));
    }

    #[test]
    fn metadata_sampled_data_and_size_count() {
        let sample = |bytes: &[u8], data| sample(&mut io::Cursor::new(bytes), bytes.len() as u64, data).unwrap();
        let bytes = vec![7u8; 9_000_000];
        let base = sample(&bytes, 1000);
        assert_eq!(base, sample(&bytes, 1000));
        for at in [0, 999, 1000, 8_999_999] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(base, sample(&other, 1000), "byte {at}");
        }
        assert_ne!(base, sample(&bytes[..8_999_999], 1000));
        assert_ne!(sample(&[1, 2, 3], 2), sample(&[1, 2, 4], 2), "smaller than a sample");
    }

    #[test]
    fn metadata_of_any_length_are_read() {
        let token = "x".repeat(1000);
        let mut file = gguf::Writer::new();
        file.str("general.architecture", "llama");
        file.str_array("tokenizer.ggml.tokens", (0..20_000).map(|_| token.as_str()));
        file.scalar("llama.block_count", gguf::U32, 9u32.to_le_bytes());
        let mut bytes = file.finish();
        assert!(bytes.len() as u64 > 4 * FIRST_BYTES);
        bytes.extend([1; 1000]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(ModelFile::read(file.path()).unwrap().n_layer, 9);
    }

    #[test]
    fn a_file_that_is_none_or_cut_is_named() {
        let whole = model(&[1; 100]);
        let read = |bytes: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            let error = ModelFile::read(file.path()).unwrap_err().to_string();
            assert!(error.contains(&file.path().display().to_string()), "{error}");
            error
        };
        assert!(read(b"not a model").contains("GGUF"));
        for n in 4..whole.len() - 128 {
            assert!(read(&whole[..n]).contains("cut off"), "{n}");
        }
        let missing = ModelFile::read(Path::new("/nowhere/m.gguf")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/m.gguf"), "{missing}");
    }
}
