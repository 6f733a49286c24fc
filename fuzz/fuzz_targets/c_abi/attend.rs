//! The attention call of the C ABI: arrays of any shape that lie inside their memory, on the CPU and on a GPU.

use std::ptr::{null, null_mut};

use arbitrary::Arbitrary;
use ggml_squeeze::capi::sqz_status::*;
use ggml_squeeze::capi::*;

use super::{room, Handles, Kind, D, GROUP, HEADS, P};

#[derive(Arbitrary, Debug)]
pub struct Call {
    n_threads: u32,
    layer: u8,
    mask: bool,
    sinks: bool,
    edits: Vec<Edit>,
}

#[derive(Arbitrary, Debug)]
enum Edit {
    Extent(u8, u8, i64),
    Stride(u8, u8, u32),
    Kind(u8, u8),
    Null(u8),
    Shift(u8, u8),
    Number(u8, f32),
    Size(u16),
}

/// Buffers of the attention call.
struct Buffers {
    q: Vec<f32>,
    k: Vec<u16>,
    v: Vec<u16>,
    dst: Vec<f32>,
    mask: Vec<u16>,
    sinks: Vec<f32>,
}

const N_KV: usize = P + 4;

impl Buffers {
    fn new() -> Buffers {
        let n = N_KV * HEADS * D;
        let half = |i: usize| 0x3000 + (i * 7919 % 0x0c00) as u16;
        Buffers {
            q: vec![0.25; HEADS * GROUP * D],
            k: (0..n).map(half).collect(),
            v: (0..n).map(|i| half(i + 13)).collect(),
            dst: vec![0.0; HEADS * GROUP * D],
            mask: vec![0; N_KV],
            sinks: vec![0.5; HEADS * GROUP],
        }
    }
}

fn array<T>(data: &mut [T], kind: u32, ne: [i64; 3], nb: [usize; 3]) -> sqz_array {
    let size = size_of::<T>();
    let nb = [size, nb[0], nb[1], nb[2]];
    sqz_array { data: data.as_mut_ptr().cast(), ne: [ne[0], ne[1], ne[2], 1], nb, kind, reserved: 0 }
}

/// Whether an array stays inside `bytes` bytes from its data on, or is one that must be refused before it is read.
fn inside(a: &sqz_array, shift: usize, bytes: usize) -> bool {
    let (block, size) = match a.kind {
        SQZ_TYPE_F32 => (1, 4),
        SQZ_TYPE_F16 | SQZ_TYPE_BF16 => (1, 2),
        SQZ_TYPE_Q8_0 => (32, 34),
        SQZ_TYPE_Q4_0 => (32, 18),
        _ => return true,
    };
    if a.data.is_null() || a.ne.iter().any(|n| *n < 1) {
        return true;
    }
    let first = (a.ne[0] as u128).div_ceil(block) * size;
    let rest = a.ne.iter().zip(a.nb).skip(1).map(|(n, nb)| (*n as u128 - 1) * nb as u128);
    let end = first + rest.sum::<u128>() + shift as u128;
    // What is larger than memory can be is refused by its numbers alone.
    end <= bytes as u128 || end > isize::MAX as u128
}

/// One call on the CPU and on a GPU. A GPU that is there refuses it too: the arrays are the host's.
pub fn attend(handles: &Handles, context: *mut sqz_context, index: *mut sqz_index, call: &Call) {
    let mut b = Buffers::new();
    let (d, n) = (D as i64, N_KV as i64);
    let row = 2 * HEADS * D;
    let mut c = sqz_attention {
        size: size_of::<sqz_attention>(),
        q: array(&mut b.q, SQZ_TYPE_F32, [d, 1, (HEADS * GROUP) as i64], [4 * D; 3]),
        k: array(&mut b.k, SQZ_TYPE_F16, [d, n, HEADS as i64], [row, 2 * D, row * N_KV]),
        v: array(&mut b.v, SQZ_TYPE_F16, [d, n, HEADS as i64], [row, 2 * D, row * N_KV]),
        mask: array(&mut b.mask, SQZ_TYPE_F16, [n, 1, 1], [2 * N_KV; 3]),
        dst: array(
            &mut b.dst,
            SQZ_TYPE_F32,
            [d, (HEADS * GROUP) as i64, 1],
            [4 * D, 4 * D * HEADS * GROUP, 4 * D * HEADS * GROUP],
        ),
        sinks: if call.sinks { b.sinks.as_ptr() } else { null() },
        scale: 0.125,
        max_bias: 0.0,
        softcap: 0.0,
        layer: (call.layer % 3).into(),
        index,
        n_threads: match call.n_threads {
            n @ 0..=3 => n,
            n if n > 1024 => n,
            n => n % 3 + 1,
        },
        reserved: 0,
    };
    if !call.mask {
        c.mask.data = null_mut();
    }
    let room_of = [4 * b.q.len(), 2 * b.k.len(), 2 * b.v.len(), 2 * b.mask.len(), 4 * b.dst.len()];
    let mut shifts = [0usize; 5];
    let mut heads_change = false;
    for edit in &call.edits {
        let arrays = [&mut c.q, &mut c.k, &mut c.v, &mut c.mask, &mut c.dst];
        let pick = |i: u8| arrays.into_iter().nth(i as usize % 5).expect("there are five");
        match *edit {
            Edit::Extent(i, dim, n) => {
                heads_change = true;
                pick(i).ne[dim as usize % 4] = if n % 3 == 0 { n } else { n % 300 };
            }
            Edit::Stride(i, dim, n) => pick(i).nb[dim as usize % 4] = n as usize,
            Edit::Kind(i, kind) => pick(i).kind = kind.into(),
            Edit::Null(i) => pick(i).data = null_mut(),
            Edit::Shift(i, n) => {
                let a = pick(i);
                if !a.data.is_null() {
                    shifts[i as usize % 5] += n as usize;
                    a.data = a.data.cast::<u8>().wrapping_add(n as usize).cast();
                }
            }
            Edit::Number(i, x) => {
                *[&mut c.scale, &mut c.max_bias, &mut c.softcap].into_iter().nth(i as usize % 3).unwrap() = x
            }
            Edit::Size(n) => c.size = n as usize,
        }
    }
    let whole = [&c.q, &c.k, &c.v, &c.mask, &c.dst];
    if !whole.iter().zip(room_of).zip(shifts).all(|((a, bytes), shift)| inside(a, shift, bytes)) {
        return;
    }
    // The sinks have an element for each query head, which the call's own numbers give.
    if heads_change && c.q.ne[2] > (HEADS * GROUP) as i64 {
        c.sinks = null();
    }
    let room = room(c, c.size.min(8191) as u16, 0);
    let device = i32::from(call.layer) / 3 - 1;
    // SAFETY: as below; none is read here.
    let launched = unsafe { sqz_attention_launch(context, (&raw const *room).cast(), device, null_mut()) };
    assert_ne!(launched, SQZ_OK);
    assert!(b.dst.iter().all(|x| *x == 0.0));
    if index.is_null() || handles.is(index, Kind::Index) {
        handles.expect(context, Kind::Context, launched, false);
    }
    let mut result = sqz_attention_result { size: size_of::<sqz_attention_result>(), rows_sparse: 0, kept_share: 0.0 };
    // SAFETY: the arrays are inside their memory, or refused before they are read.
    let status = unsafe { sqz_attention_compute(context, (&raw const *room).cast(), &mut result) };
    if index.is_null() || handles.is(index, Kind::Index) {
        handles.expect(context, Kind::Context, status, false);
    }
    if call.edits.is_empty() && handles.is(context, Kind::Context) && c.n_threads <= 1024 {
        match index.is_null() || handles.is(index, Kind::Index) {
            true => assert_eq!(status, SQZ_OK),
            false => assert_eq!(status, SQZ_ERROR_HANDLE),
        }
        if status == SQZ_OK {
            // The cache is not the one that the index is of: dense.
            assert_eq!(result.rows_sparse, 0);
            assert!(b.dst.iter().all(|x| x.is_finite() && *x != 0.0));
        }
    }
}
