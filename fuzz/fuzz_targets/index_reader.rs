//! Any bytes as an index: as they are, with checksums made to agree (so that what lies behind the checksums is reached), and
//! taken as edits of a valid file (so that no corpus is needed to get past the first bytes).

#![no_main]

use std::sync::OnceLock;

use ggml_squeeze::index::sample::{add_coarse, reseal, sample_parts, touch};
use ggml_squeeze::index::{to_bytes, Index};
use libfuzzer_sys::fuzz_target;

fn valid() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let mut parts = sample_parts(7, 24, 2, 2, 4, 3, 5);
        add_coarse(&mut parts, 8, 2);
        to_bytes(&parts).expect("the sample is valid")
    })
}

fn open(bytes: Vec<u8>) {
    if let Ok(index) = Index::from_bytes(bytes) {
        touch(&index);
    }
}

fuzz_target!(|bytes: &[u8]| {
    open(bytes.to_vec());
    let mut edited = valid().to_vec();
    for edit in bytes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % edited.len();
        edited[at] = edit[2];
    }
    for mut sealed in [bytes.to_vec(), edited] {
        if reseal(&mut sealed) {
            open(sealed);
        }
    }
});
