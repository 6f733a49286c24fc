//! Any bytes as an index: as they are, and with checksums made to agree, so that what lies behind the checksums is reached.

#![no_main]

use ggml_squeeze::index::sample::{owned, reseal, touch};
use ggml_squeeze::index::{to_bytes, Index};
use libfuzzer_sys::fuzz_target;

fn open(bytes: &[u8]) {
    if let Ok(index) = Index::from_slice(bytes) {
        touch(&index);
        // What is accepted obeys every rule: the writer, which checks owned parts, takes it too, byte for byte.
        assert!(to_bytes(&owned(&index)).expect("the reader took it") == bytes);
    }
}

fuzz_target!(|bytes: &[u8]| {
    open(bytes);
    let mut sealed = bytes.to_vec();
    if reseal(&mut sealed) {
        open(&sealed);
    }
});
