//! Small enough for Miri (scripts/sanitize.sh miri), which checks every access: index views, the C ABI's structures and handles,
//! and the pointer arithmetic of the attention path, on the scalar code that Miri can run.

mod attend_case;

use std::ffi::{CStr, CString};
use std::ptr::{null, null_mut};

use attend_case::check::check;
use attend_case::Spec;
use ggml_squeeze::attention::{Element, Mode, Rotation, Selection};
use ggml_squeeze::capi::sqz_status::*;
use ggml_squeeze::capi::*;
use ggml_squeeze::index::sample::{add_coarse, fields, owned, reseal, sample_parts, touch};
use ggml_squeeze::index::{to_bytes, Index};

fn bytes() -> Vec<u8> {
    let mut parts = sample_parts(7, 24, 2, 2, 4, 3, 5);
    add_coarse(&mut parts, 8, 2);
    to_bytes(&parts).unwrap()
}

#[test]
fn index_views() {
    let bytes = bytes();
    let index = Index::from_slice(&bytes).unwrap();
    touch(&index);
    assert!(to_bytes(&owned(&index)).unwrap() == bytes);
    // Memory that is aligned to nothing, and a file.
    let shifted: Vec<u8> = [0xff].into_iter().chain(bytes.iter().copied()).collect();
    touch(&Index::from_slice(&shifted[1..]).unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    touch(&Index::open(file.path()).unwrap());
    // One lie in each field.
    for range in fields(&bytes).into_iter().filter(|range| !range.is_empty()).step_by(4) {
        let mut forged = bytes.clone();
        forged[range.start] ^= 0x41;
        reseal(&mut forged);
        if let Ok(index) = Index::from_slice(&forged) {
            touch(&index);
        }
    }
}

#[test]
fn attention_over_small_caches() {
    let small = Spec {
        n_prefix: 14,
        n_sink: 2,
        n_window: 3,
        n_other: 5,
        n_cluster: 4,
        group: 2,
        n_head_kv: 1,
        dk: 64,
        dv: 64,
        ..Spec::base()
    };
    check(&small, 2, 2);
    let selection = Selection { mode: Mode::Mass(0.7), estimate: true, ..small.selection };
    let rotation = Rotation { k: 64, v: 32 };
    let (k_type, v_type) = (Element::Q8_0, Element::Q4_0);
    check(&Spec { selection, rotation, k_type, v_type, n_query: 4, tile: 4, gap: 4, ..small }, 1, 2);
}

#[test]
fn the_c_abi() {
    let bytes = bytes();
    // SAFETY: places for results, whole structures, memory as long as stated.
    unsafe {
        let mut index = null_mut();
        assert_eq!(sqz_index_from_memory(bytes.as_ptr().cast(), bytes.len(), &mut index), SQZ_OK);
        let (mut tokens, mut n) = (null(), 0);
        assert_eq!(sqz_index_get_tokens(index, &mut tokens, &mut n), SQZ_OK);
        assert!(std::slice::from_raw_parts(tokens, n).iter().all(|t| *t >= 0) && n == 24);
        let mut layer: sqz_layer_info = std::mem::zeroed();
        layer.size = size_of::<sqz_layer_info>();
        assert_eq!(sqz_index_get_layer(index, 1, &mut layer), SQZ_OK);
        assert_eq!((layer.layer, layer.head_dim_v), (1, 3));
        layer.size = 12;
        assert_eq!(sqz_index_get_layer(index, 1, &mut layer), SQZ_ERROR_SIZE);
        let mut info: sqz_index_info = std::mem::zeroed();
        info.size = size_of::<sqz_index_info>();
        assert_eq!(sqz_index_get_info(index, &mut info), SQZ_OK);
        assert_eq!(CStr::from_ptr(info.model_name).to_str(), Ok("Sample"));

        let mut context = null_mut();
        let config = sqz_config { share: 0.5, ..sqz_config_default() };
        assert_eq!(sqz_context_new(&config, &mut context), SQZ_OK);
        assert_eq!(sqz_attach(context, index), SQZ_OK);
        assert_eq!(sqz_index_free(index), SQZ_OK);
        assert_eq!(sqz_index_free(index), SQZ_ERROR_HANDLE);
        assert_eq!(sqz_detach(context, context.cast()), SQZ_ERROR_HANDLE);
        let mut stats = sqz_stats::default();
        assert_eq!(sqz_get_stats(context, &mut stats), SQZ_OK);
        assert_eq!(sqz_context_free(context), SQZ_OK);

        let path = CString::new("/nowhere/x.sqz.gguf").unwrap();
        assert_eq!(sqz_index_open(path.as_ptr(), &mut index), SQZ_ERROR_IO);
        assert!(index.is_null() && CStr::from_ptr(sqz_last_error()).to_str().unwrap().contains("/nowhere/x.sqz.gguf"));
    }
}
