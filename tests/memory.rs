//! Memory that a file asks for, memory that is not there, and memory that stays: a hostile file takes no more than its own size allows,
//! large allocations that fail give errors, and 10,000 indexes come and go without a trace. One test: all watch the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use ggml_squeeze::backend::{attach, detach};
use ggml_squeeze::capi::sqz_status::{SQZ_ERROR_MEMORY, SQZ_OK};
use ggml_squeeze::capi::*;
use ggml_squeeze::index::sample::{add_coarse, fields, reseal, sample_parts};
use ggml_squeeze::index::{to_bytes, Index, IndexError};

/// Fails large requests from a given one on, as often as is asked for.
struct Failing;

/// Requests of at least so many bytes are large.
const LARGE: usize = 16 * 1024;
static UNTIL_FAILURE: AtomicUsize = AtomicUsize::new(usize::MAX);
static FAILURES: AtomicUsize = AtomicUsize::new(0);
/// Bytes in use, and the most that were.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn fails(bytes: usize) -> bool {
    if bytes < LARGE || UNTIL_FAILURE.load(Ordering::Relaxed) == usize::MAX {
        return false;
    }
    let fails = UNTIL_FAILURE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err();
    FAILURES.fetch_add(usize::from(fails), Ordering::Relaxed);
    fails
}

// SAFETY: the system's allocator, or null, which is how a failure is told.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if fails(layout.size()) {
            return null_mut();
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

/// Runs `work` with the `n`th large request and all later ones failing; how many failed.
fn without_memory<T>(n: usize, work: impl FnOnce() -> T) -> (T, usize) {
    FAILURES.store(0, Ordering::Relaxed);
    UNTIL_FAILURE.store(n, Ordering::Relaxed);
    let result = work();
    UNTIL_FAILURE.store(usize::MAX, Ordering::Relaxed);
    (result, FAILURES.load(Ordering::Relaxed))
}

/// Each large request of `work` fails in turn, until none is left; `refused` says whether a result is the error of that.
fn every_request_fails<T>(what: &str, work: impl Fn() -> T, refused: impl Fn(&T) -> bool) {
    for n in 0.. {
        let (result, failures) = without_memory(n, &work);
        if failures == 0 {
            assert!(n > 0 && !refused(&result), "{what} makes no large request");
            println!("{what}: {n} large requests, each failed once");
            return;
        }
        assert!(refused(&result), "{what}: request {n} failed unseen");
    }
}

/// Most bytes that `work` had in use beyond those before.
fn peak(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

fn is_memory<T>(result: &Result<T, IndexError>) -> bool {
    matches!(result, Err(IndexError::Memory { .. }))
}

/// Resident bytes of this process.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    4096 * pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
}

fn array<T>(data: &mut [T], kind: u32, ne: [i64; 3]) -> sqz_array {
    let (size, [a, b, c]) = (size_of::<T>(), ne.map(|n| n as usize));
    let nb = [size, size * a, size * a * b, size * a * b * c];
    sqz_array { data: data.as_mut_ptr().cast(), ne: [ne[0], ne[1], ne[2], 1], nb, kind, reserved: 0 }
}

/// One call of so many queries and threads, over a cache of other keys: verified, and dense.
fn attend(
    context: *const sqz_context,
    index: *const sqz_index,
    [k, v]: [&mut [u16]; 2],
    (n_query, n_threads): (i64, u32),
) -> sqz_status {
    // Not from the allocator.
    let (mut q, mut dst, n_kv) = ([0.5f32; 4 * 64 * 16], [0f32; 4 * 64 * 16], k.len() / 128);
    assert!(n_query <= 16);
    let call = sqz_attention {
        size: size_of::<sqz_attention>(),
        q: array(&mut q, SQZ_TYPE_F32, [64, n_query, 4]),
        k: array(k, SQZ_TYPE_F16, [64, n_kv as i64, 2]),
        v: array(v, SQZ_TYPE_F16, [64, n_kv as i64, 2]),
        mask: sqz_array { data: null_mut(), ne: [0; 4], nb: [0; 4], kind: 0, reserved: 0 },
        dst: array(&mut dst, SQZ_TYPE_F32, [64, 4, n_query]),
        sinks: null(),
        scale: 0.125,
        max_bias: 0.0,
        softcap: 0.0,
        layer: 0,
        index,
        n_threads,
        reserved: 0,
    };
    // SAFETY: the arrays have the extents stated.
    unsafe { sqz_attention_compute(context, &call, null_mut()) }
}

#[test]
fn memory_that_is_not_there_is_an_error_and_none_is_kept() {
    let mut parts = sample_parts(1, 6000, 2, 2, 64, 64, 300);
    add_coarse(&mut parts, 2, 150);
    let bytes = to_bytes(&parts).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();

    // The file once, its coarse centroids, and what is read at a time.
    let opened = peak(|| drop(Index::open(file.path()).unwrap()));
    println!("opening {} bytes takes {opened} at most", bytes.len());
    assert!(opened < bytes.len() * 5 / 4 + (1 << 19), "{opened} bytes for a file of {}", bytes.len());
    let little = to_bytes(&sample_parts(3, 200, 2, 2, 64, 64, 20)).unwrap();
    let mut most = 0;
    for range in fields(&little) {
        for value in [1 << 16, 1 << 31, 1 << 32, 1 << 40, i64::MAX as u64, u64::MAX] {
            for at in range.clone().step_by(4).take(12) {
                let mut forged = little.clone();
                let n = forged.len().min(at + 8) - at;
                forged[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
                reseal(&mut forged);
                most = most.max(peak(|| drop(Index::from_slice(&forged))));
            }
        }
    }
    println!("forged files of {} bytes take {most} at most", little.len());
    assert!(most < little.len() * 5 / 4 + (1 << 16), "{most} bytes for a file of {}", little.len());

    every_request_fails("opening a file", || Index::open(file.path()), is_memory);
    every_request_fails("opening memory", || Index::from_slice(&bytes), is_memory);
    let index = Arc::new(Index::open(file.path()).unwrap());
    let come_and_go = || {
        let attached = attach(&index);
        detach(&index);
        attached
    };
    every_request_fails("attaching", come_and_go, is_memory);

    let (mut context, mut handle) = (null_mut(), null_mut());
    // SAFETY: places for results; `bytes` is as long as stated.
    unsafe {
        assert_eq!(sqz_context_new(null(), &mut context), SQZ_OK);
        let (status, failures) =
            without_memory(0, || sqz_index_from_memory(bytes.as_ptr().cast(), bytes.len(), &mut handle));
        assert!(status == SQZ_ERROR_MEMORY && failures > 0 && handle.is_null());
        assert_eq!(sqz_index_from_memory(bytes.as_ptr().cast(), bytes.len(), &mut handle), SQZ_OK);
    }

    // Ten thousand times, with the memory of the first hundred to settle on.
    let small = to_bytes(&sample_parts(3, 200, 2, 2, 64, 64, 20)).unwrap();
    let cycle = || {
        let mut index = null_mut();
        // SAFETY: as above.
        unsafe { assert_eq!(sqz_index_from_memory(small.as_ptr().cast(), small.len(), &mut index), SQZ_OK) };
        for place in [context, null_mut()] {
            assert_eq!(sqz_attach(place, index), SQZ_OK);
            assert_eq!(sqz_detach(place, index), SQZ_OK);
        }
        assert_eq!(sqz_index_free(index), SQZ_OK);
    };
    let (mut k, mut v) = (vec![0x3000u16; 6100 * 128], vec![0x3400u16; 6100 * 128]);
    let (status, failures) = without_memory(0, || attend(context, null(), [&mut k, &mut v], (16, 8)));
    assert!(status == SQZ_ERROR_MEMORY && failures == 1, "{status:?}");
    assert_eq!(attend(context, null(), [&mut k, &mut v], (16, 8)), SQZ_OK);
    let mut call = || assert_eq!(attend(context, handle, [&mut k, &mut v], (1, 1)), SQZ_OK);
    (0..100).for_each(|_| cycle());
    (0..20).for_each(|_| call());
    let flat = |what: &str, n: usize, work: &mut dyn FnMut()| {
        let before = resident();
        (0..n).for_each(|_| work());
        let grown = resident().saturating_sub(before);
        println!("{n} times {what}: {} KiB more", grown / 1024);
        assert!(grown < 1 << 20, "{n} times {what}: {grown} bytes more");
    };
    flat("opened, attached, detached and closed", 10_000, &mut || cycle());
    flat("attention", 2_000, &mut call);
    assert_eq!((sqz_index_free(handle), sqz_context_free(context)), (SQZ_OK, SQZ_OK));
}
