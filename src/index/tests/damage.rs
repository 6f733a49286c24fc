//! Files that were cut, changed, or never were an index.

use super::*;

#[test]
fn every_shorter_file_is_refused() {
    let bytes = to_bytes(&small()).unwrap();
    for n in 0..bytes.len() {
        match open(&bytes[..n]) {
            Err(IndexError::Truncated { .. }) => {}
            other => panic!("{n} of {} bytes: {other:?}", bytes.len()),
        }
    }
}

#[test]
fn every_longer_file_is_refused() {
    let bytes = to_bytes(&small()).unwrap();
    for n in [1, 7, 32, 4096] {
        let what = invalid(open(&[bytes.clone(), vec![0; n]].concat()));
        assert!(what.contains("follow the last tensor"), "{what}");
    }
}

#[test]
fn every_changed_byte_is_noticed() {
    let mut bytes = to_bytes(&small()).unwrap();
    for i in 0..bytes.len() {
        for mask in [0x01, 0x80, 0xff] {
            bytes[i] ^= mask;
            assert!(open(&bytes).is_err(), "byte {i} of {}, mask {mask:#x}", bytes.len());
            bytes[i] ^= mask;
        }
    }
    open(&bytes).unwrap();
}

#[test]
fn a_changed_tensor_is_named() {
    let bytes = to_bytes(&small()).unwrap();
    let mut forge = Forge::new(&bytes);
    let at = bytes.len() - forge.data.len() + forge.at("blk.1.mean_values");
    let mut changed = bytes.clone();
    changed[at] ^= 1;
    match open(&changed) {
        Err(IndexError::Checksum { tensor }) => assert_eq!(tensor, "blk.1.mean_values"),
        other => panic!("{other:?}"),
    }
    let at = bytes.windows(6).position(|w| w == b"Sample").unwrap();
    changed.clone_from(&bytes);
    changed[at] ^= 1;
    match open(&changed) {
        Err(IndexError::Checksum { tensor }) => assert_eq!(tensor, "the header"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_format_version_is_refused_by_its_number() {
    for other in [FORMAT_VERSION - 1, FORMAT_VERSION + 1] {
        let mut forge = Forge::new(&to_bytes(&small()).unwrap());
        forge.key("squeeze.version").copy_from_slice(&other.to_le_bytes());
        // Another version may have other keys, and other checksums.
        forge.keys.push(("squeeze.later".into(), gguf::U32, vec![0; 4]));
        forge.n_kv += 1;
        let error = forge.open().unwrap_err();
        assert!(matches!(error, IndexError::Version { found } if found == other), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("format version {other}")) && text.contains("sqz build"), "{text}");
    }
}

#[test]
fn another_gguf_version_or_byte_order_is_refused() {
    let bytes = to_bytes(&small()).unwrap();
    for version in [1u32, 2, 4, 3 << 24] {
        let mut changed = bytes.clone();
        changed[4..8].copy_from_slice(&version.to_le_bytes());
        let what = invalid(open(&changed));
        assert!(what.contains("GGUF version"), "{what}");
    }
}

/// A GGUF as a model is: other keys, a vocabulary with text that is not UTF-8, one tensor.
fn model(general_type: Option<&str>) -> Vec<u8> {
    let mut writer = gguf::Writer::new();
    writer.str("general.architecture", "llama");
    if let Some(kind) = general_type {
        writer.str("general.type", kind);
    }
    writer.scalar("llama.block_count", gguf::U32, 1u32.to_le_bytes());
    writer.scalar("tokenizer.ggml.add_bos_token", 7, [1]);
    writer.str_array("tokenizer.ggml.tokens", ["a", "b", "<0xFF>"].into_iter());
    writer.array("tokenizer.ggml.scores", gguf::F32, &[0.0f32, 1.0, 2.0]);
    writer.tensor("token_embd.weight", &[4, 2], gguf::Type::F32, 0);
    let mut bytes = writer.finish();
    let at = bytes.windows(6).position(|w| w == b"<0xFF>").unwrap();
    bytes[at] = 0xff;
    bytes.extend([0; 32]);
    bytes
}

#[test]
fn a_model_is_no_index() {
    for (kind, expected) in [(Some("model"), "model"), (None, ""), (Some("adapter"), "adapter")] {
        match open(&model(kind)) {
            Err(IndexError::NotAnIndex(found)) => assert_eq!(found, expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_synthetic_index_is_opened_only_on_purpose() {
    let mut parts = small();
    parts.meta.synthetic = true;
    let bytes = to_bytes(&parts).unwrap();
    assert!(matches!(open(&bytes), Err(IndexError::Synthetic)));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    assert!(matches!(Index::open(file.path()), Err(IndexError::Synthetic)));
    assert_eq!(*Index::open_any(file.path()).unwrap().meta(), parts.meta);
    // the mark is under the seal: it cannot be taken off unseen
    let at = bytes.windows(10).position(|w| w == b"-synthetic").unwrap();
    let mut forged = bytes.clone();
    forged[at..at + 10].copy_from_slice(b"_synthetic");
    assert!(matches!(open(&forged), Err(IndexError::NotAnIndex(_))));
}

#[test]
fn other_files_are_not_gguf() {
    for text in ["hello, world, this is a text", "GGML", "x", "\u{7f}ELF"] {
        let error = open(text.as_bytes()).unwrap_err();
        assert!(matches!(error, IndexError::NotGguf), "{text}: {error:?}");
    }
    assert!(matches!(open(b""), Err(IndexError::Truncated { .. })));
}

#[test]
fn an_empty_file_is_cut_off() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Index::open(file.path()).unwrap_err();
    assert!(matches!(error, IndexError::Truncated { .. }), "{error:?}");
}
