//! The C ABI from many threads at once: each sees its own errors, shared handles end once, attention calls share a context.

use std::ffi::CStr;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Barrier;

use ggml_squeeze::capi::sqz_status::*;
use ggml_squeeze::capi::*;
use ggml_squeeze::index::sample::sample_parts;
use ggml_squeeze::index::to_bytes;

const THREADS: usize = 4;
const ROUNDS: usize = 60;
const N_KV: usize = 220;

fn array<T>(data: *const T, kind: u32, ne: [i64; 3]) -> sqz_array {
    let (size, [a, b, c]) = (size_of::<T>(), ne.map(|n| n as usize));
    let nb = [size, size * a, size * a * b, size * a * b * c];
    sqz_array { data: data.cast_mut().cast(), ne: [ne[0], ne[1], ne[2], 1], nb, kind, reserved: 0 }
}

/// A dense call of two threads over shared keys; its result.
fn attend(context: usize, index: usize, k: &[u16], v: &[u16]) -> Vec<f32> {
    let (q, dst) = (vec![0.5f32; 4 * 64], vec![f32::NAN; 4 * 64]);
    let call = sqz_attention {
        size: size_of::<sqz_attention>(),
        q: array(q.as_ptr(), SQZ_TYPE_F32, [64, 1, 4]),
        k: array(k.as_ptr(), SQZ_TYPE_F16, [64, N_KV as i64, 2]),
        v: array(v.as_ptr(), SQZ_TYPE_F16, [64, N_KV as i64, 2]),
        mask: sqz_array { data: null_mut(), ne: [0; 4], nb: [0; 4], kind: 0, reserved: 0 },
        dst: array(dst.as_ptr(), SQZ_TYPE_F32, [64, 4, 1]),
        sinks: null(),
        scale: 0.125,
        max_bias: 0.0,
        softcap: 0.0,
        layer: 0,
        index: index as *const sqz_index,
        n_threads: 2,
        reserved: 0,
    };
    // SAFETY: the arrays have the extents stated; `dst` is written by this call alone.
    unsafe { assert_eq!(sqz_attention_compute(context as *const sqz_context, &call, null_mut()), SQZ_OK) };
    dst
}

#[test]
fn every_function_may_be_called_from_any_thread() {
    let bytes = to_bytes(&sample_parts(3, 200, 2, 2, 64, 64, 9)).unwrap();
    let (mut context, mut shared) = (null_mut(), null_mut());
    let config = sqz_config { min_prefix: 0, ..sqz_config_default() };
    // SAFETY: whole structures and places for results.
    unsafe {
        assert_eq!(sqz_context_new(&config, &mut context), SQZ_OK);
        assert_eq!(sqz_index_from_memory(bytes.as_ptr().cast(), bytes.len(), &mut shared), SQZ_OK);
    }
    let (context, shared) = (context as usize, shared as usize);
    let (k, v) = (vec![0x3000u16; 2 * N_KV * 64], vec![0x3400u16; 2 * N_KV * 64]);
    let expected = attend(context, shared, &k, &v);
    assert!(expected.iter().all(|x| x.is_finite()));
    let (freed, all_done) = (AtomicUsize::new(0), Barrier::new(THREADS));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (bytes, k, v, expected, freed, all_done) = (&bytes, &k, &v, &expected, &freed, &all_done);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let mut own = null_mut();
                    // SAFETY: as above.
                    unsafe {
                        assert_eq!(sqz_index_from_memory(bytes.as_ptr().cast(), bytes.len(), &mut own), SQZ_OK);
                        assert_eq!(sqz_configure(context as *const sqz_context, &config), SQZ_OK);
                    }
                    for place in [context as *const sqz_context, null()] {
                        assert_eq!(sqz_attach(place, own), SQZ_OK);
                        assert_eq!(sqz_attach(place, own), SQZ_ERROR_ATTACHED);
                    }
                    assert_eq!(attend(context, shared, k, v), *expected);
                    let mut stats = sqz_stats::default();
                    // SAFETY: as above.
                    unsafe { assert_eq!(sqz_get_stats(context as *const sqz_context, &mut stats), SQZ_OK) };
                    for place in [context as *const sqz_context, null()] {
                        assert_eq!(sqz_detach(place, own), SQZ_OK);
                    }
                    if round % 20 == thread {
                        assert_eq!(sqz_attn_forget(context as *const sqz_context), SQZ_OK);
                    }
                    // This thread's own last error, whatever the others have done since.
                    // SAFETY: as above.
                    unsafe { assert_ne!(sqz_index_get_layer(own, 70 + thread as u32, null_mut()), SQZ_OK) };
                    std::thread::yield_now();
                    // SAFETY: a terminated string of this thread.
                    let said = unsafe { CStr::from_ptr(sqz_last_error()) }.to_str().unwrap();
                    assert!(said.contains(&format!("layer {} ", 70 + thread)), "{said}");
                    assert_eq!(sqz_index_free(own), SQZ_OK);
                }
                // All free the shared handle; one of them does it.
                all_done.wait();
                freed.fetch_add(usize::from(sqz_index_free(shared as *mut sqz_index) == SQZ_OK), Ordering::Relaxed);
            });
        }
    });
    assert_eq!(freed.into_inner(), 1);
    assert_eq!(sqz_context_free(context as *mut sqz_context), SQZ_OK);
}
