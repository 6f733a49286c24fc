//! Identity of a model file: a hash that tells weights and quantisation apart without reading gigabytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use llama_cpp_sys_2 as sys;
use sha2::{Digest, Sha256};

const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 64 * 1024;

/// SHA-256 over the file's size, everything in front of the tensor data (header, metadata, tensor infos), and 64 KiB at
/// each of 64 evenly spread places of the tensor data. Of a split model, the first file alone.
pub fn of_model(path: &Path) -> Result<[u8; 32]> {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
    // SAFETY: the path is a C string; without allocation nothing but the metadata is read; freed at once.
    let data = unsafe {
        let gguf = sys::gguf_init_from_file(name.as_ptr(), params);
        ensure!(!gguf.is_null(), "{} is not a GGUF file", path.display());
        let offset = sys::gguf_get_data_offset(gguf);
        sys::gguf_free(gguf);
        offset as u64
    };
    let read = || -> std::io::Result<[u8; 32]> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        sample(&mut file, size, data.min(size))
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

fn sample(file: &mut (impl Read + Seek), size: u64, data: u64) -> std::io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(size.to_le_bytes());
    let mut take = |from: u64, n: u64| -> std::io::Result<()> {
        let mut buf = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.by_ref().take(n).read_to_end(&mut buf)?;
        hash.update(&buf);
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
    use std::io::Cursor;

    fn of(bytes: &[u8], data: u64) -> [u8; 32] {
        sample(&mut Cursor::new(bytes), bytes.len() as u64, data).unwrap()
    }

    #[test]
    fn metadata_sampled_data_and_size_count() {
        let bytes = vec![7u8; 9_000_000];
        let base = of(&bytes, 1000);
        assert_eq!(base, of(&bytes, 1000));
        for at in [0, 999, 1000, 8_999_999] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert_ne!(base, of(&other, 1000), "byte {at}");
        }
        assert_ne!(base, of(&bytes[..8_999_999], 1000));
    }

    #[test]
    fn a_file_smaller_than_a_sample_works() {
        assert_ne!(of(&[1, 2, 3], 2), of(&[1, 2, 4], 2));
    }
}
