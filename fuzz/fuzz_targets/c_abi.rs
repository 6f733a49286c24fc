//! Sequences of calls of the C ABI with handles that are live, freed, of another type or invented, sizes and numbers out of range,
//! and arrays that are anywhere inside their memory. Every call must return, with the status that the handle asks for.

#![no_main]

#[path = "c_abi/attend.rs"]
mod attend;

use std::ffi::{c_char, c_void, CString};
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use attend::{attend, Call};
use ggml_squeeze::capi::sqz_status::*;
use ggml_squeeze::capi::*;
use ggml_squeeze::index::sample::{add_coarse, reseal, sample_parts};
use ggml_squeeze::index::to_bytes;
use libfuzzer_sys::fuzz_target;

/// What the index of this target is of.
const P: usize = 60;
const HEADS: usize = 2;
const GROUP: usize = 2;
const D: usize = 64;

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Handle(u8);

#[derive(Arbitrary, Debug)]
enum Op {
    Open(u8, bool),
    FromMemory { edits: Vec<(u16, u8)>, cut: u16, seal: bool, null: bool },
    IndexFree(Handle),
    Info(Handle, u16),
    Layer(Handle, u32, u16),
    Tokens(Handle, bool),
    Write(Handle, u8),
    Verify(Handle, u8),
    ContextNew(Config, bool),
    ContextFree(Handle),
    Enter(Handle),
    Configure(Handle, Config),
    Attach(Handle, Handle),
    Detach(Handle, Handle),
    Stats(Handle, u16),
    Reset(Handle),
    BuilderNew(Params, u8, bool),
    BuilderFree(Handle),
    Progress(Handle, u8),
    AddLayer(Handle, Layer),
    Build(Handle, bool),
    Model(Handle, u8),
    Eval(Handle, bool),
    Attend(Handle, Handle, Call),
    Forget(Handle),
    Op(Handle, Handle, i32),
    Text(i32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Config {
    size: u16,
    mode: u8,
    share: f32,
    spread: u8,
    estimate: u8,
    min_prefix: u32,
    tile: u32,
    disable: u8,
    tail: u8,
    sane: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Params {
    size: u16,
    n_sink: u8,
    n_window: u8,
    cluster_share: f32,
    iterations: u8,
    n_coarse: i8,
    n_threads: u32,
    n_layer: u8,
    sane: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Layer {
    size: u16,
    layer: u8,
    n_head_kv: u8,
    n_group: u8,
    dk: u8,
    dv: u8,
    scale: f32,
    null: u8,
    sane: bool,
}

/// Bytes that are as long as any size that a structure may claim.
#[repr(C, align(16))]
struct Room([u8; 8192]);

/// A structure at the start of a room, whose `size` says `size`, and whose later bytes are `tail`.
fn room<T: Copy>(value: T, size: u16, tail: u8) -> Box<Room> {
    let mut room = Box::new(Room([tail; 8192]));
    // SAFETY: every structure is smaller than the room and begins with its size.
    unsafe {
        (&raw mut *room).cast::<T>().write_unaligned(value);
        (&raw mut *room).cast::<usize>().write_unaligned(size as usize % 8192);
    }
    room
}

/// The structure's own size, mostly.
fn size_of_or<T>(sane: bool, size: u16) -> u16 {
    if sane {
        size_of::<T>() as u16
    } else {
        size
    }
}

struct Files {
    paths: Vec<CString>,
    index: Vec<u8>,
}

fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("squeeze-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for temporary files");
        let mut parts = sample_parts(3, P, 2, HEADS, D, D, 9);
        add_coarse(&mut parts, 3, 3);
        let index = to_bytes(&parts).expect("the sample is valid");
        let put = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).expect("the folder has room");
            path
        };
        let paths: Vec<PathBuf> = vec![
            put("whole.sqz.gguf", &index),
            put("cut.sqz.gguf", &index[..index.len() / 2]),
            put("empty", &[]),
            put("text", b"hello, world"),
            folder.clone(),
            folder.join("none/x"),
            folder.join("written.sqz.gguf"),
            PathBuf::from("/dev/null"),
        ];
        let c_path = |path: PathBuf| CString::new(path.into_os_string().into_encoded_bytes()).expect("no zero in it");
        Files { paths: paths.into_iter().map(c_path).collect(), index }
    })
}

fn path(i: u8) -> *const c_char {
    let paths = &files().paths;
    paths.get(i as usize % (paths.len() + 1)).map_or(null(), |path| path.as_ptr())
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Index,
    Context,
    Builder,
}

/// Every handle that there was.
#[derive(Default)]
struct Handles(Vec<(usize, Kind, bool)>);

impl Handles {
    fn get<T>(&self, handle: Handle) -> *mut T {
        let n = self.0.len();
        match handle.0 as usize {
            i if i < n => std::ptr::without_provenance_mut(self.0[i].0),
            i if i == n => null_mut(),
            i if i == n + 1 => std::ptr::without_provenance_mut(1 << 40 | i),
            i if n > 0 => std::ptr::without_provenance_mut(self.0[i % n].0),
            i => std::ptr::without_provenance_mut(i),
        }
    }

    fn is<T>(&self, handle: *const T, kind: Kind) -> bool {
        self.0.iter().any(|(number, k, live)| *number == handle.addr() && *k == kind && *live)
    }

    /// What a function that needs a handle of a kind must say of this one, if it gets as far: none is no error of the handle.
    fn expect<T>(&self, handle: *const T, kind: Kind, status: sqz_status, may_be_null: bool) {
        if handle.is_null() {
            assert!(may_be_null || status != SQZ_OK);
        } else if !self.is(handle, kind) {
            assert_ne!(status, SQZ_OK, "{handle:?} is no live {kind:?}");
        } else {
            assert_ne!(status, SQZ_ERROR_HANDLE, "{handle:?} is a live {kind:?}");
        }
    }

    fn add<T>(&mut self, status: sqz_status, made: *mut T, kind: Kind) {
        assert_eq!(status == SQZ_OK, !made.is_null());
        if status == SQZ_OK {
            self.0.push((made.addr(), kind, true));
        }
    }

    fn freed<T>(&mut self, status: sqz_status, handle: *const T, kind: Kind) {
        let live = self.is(handle, kind);
        assert_eq!(status == SQZ_OK, live || handle.is_null());
        self.0.iter_mut().filter(|(number, ..)| *number == handle.addr()).for_each(|h| h.2 &= !live);
    }
}

fn config(c: &Config) -> Box<Room> {
    let d = sqz_config_default();
    let value = match c.sane {
        true => sqz_config { share: 0.3, min_prefix: 0, mode: u32::from(c.mode % 3), ..d },
        false => sqz_config {
            mode: c.mode.into(),
            share: c.share,
            spread: c.spread.into(),
            estimate: c.estimate.into(),
            min_prefix: c.min_prefix,
            tile: c.tile,
            disable: c.disable.into(),
            ..d
        },
    };
    room(value, size_of_or::<sqz_config>(c.sane, c.size), c.tail)
}

unsafe extern "C" fn progress(share: f32, user_data: *mut c_void) -> bool {
    assert!((0.0..=1.0).contains(&share));
    !user_data.is_null()
}

/// SAFETY of the calls below: pointers are null or to memory as long as they say, by `room`; strings are terminated.
fn call(handles: &mut Handles, op: &Op) {
    match op {
        Op::Open(which, no_place) => {
            let mut out = null_mut();
            let place = if *no_place { null_mut() } else { &raw mut out };
            let status = unsafe { sqz_index_open(path(*which), place) };
            handles.add(status, out, Kind::Index);
        }
        Op::FromMemory { edits, cut, seal, null: no_data } => {
            let mut bytes = files().index.clone();
            let n = bytes.len();
            edits.iter().for_each(|(at, x)| bytes[*at as usize % n] = *x);
            bytes.truncate(n - (*cut as usize % n) * usize::from(cut % 5 == 1));
            if *seal {
                reseal(&mut bytes);
            }
            let data = if *no_data { null() } else { bytes.as_ptr() };
            let mut out = null_mut();
            let status = unsafe { sqz_index_from_memory(data.cast(), bytes.len(), &mut out) };
            handles.add(status, out, Kind::Index);
        }
        Op::IndexFree(h) => {
            let h = handles.get::<sqz_index>(*h);
            let status = sqz_index_free(h);
            handles.freed(status, h, Kind::Index);
        }
        Op::Info(h, size) => {
            let h = handles.get::<sqz_index>(*h);
            let mut out = room(0u64, *size, 0);
            let status = unsafe { sqz_index_get_info(h, (&raw mut *out).cast()) };
            handles.expect(h, Kind::Index, status, false);
        }
        Op::Layer(h, i, size) => {
            let h = handles.get::<sqz_index>(*h);
            let mut out = room(0u64, *size, 0);
            let status = unsafe { sqz_index_get_layer(h, *i, (&raw mut *out).cast()) };
            handles.expect(h, Kind::Index, status, false);
        }
        Op::Tokens(h, no_place) => {
            let h = handles.get::<sqz_index>(*h);
            let (mut data, mut n) = (null(), 0usize);
            let place = if *no_place { null_mut() } else { &raw mut n };
            let status = unsafe { sqz_index_get_tokens(h, &mut data, place) };
            handles.expect(h, Kind::Index, status, false);
            if status == SQZ_OK {
                let tokens = unsafe { std::slice::from_raw_parts(data, n) };
                assert!(tokens.iter().all(|t| *t >= 0));
            }
        }
        Op::Write(h, which) => {
            let h = handles.get::<sqz_index>(*h);
            // Not over the files that are read.
            let to = if which % 9 < 4 { path(6) } else { path(*which) };
            let status = unsafe { sqz_index_write(h, to) };
            handles.expect(h, Kind::Index, status, false);
        }
        Op::Verify(h, which) => {
            let h = handles.get::<sqz_index>(*h);
            let status = unsafe { sqz_index_verify(h, path(*which)) };
            handles.expect(h, Kind::Index, status, false);
        }
        Op::ContextNew(c, no_place) => {
            let mut out = null_mut();
            let place = if *no_place { null_mut() } else { &raw mut out };
            let status = unsafe { sqz_context_new((&raw const *config(c)).cast(), place) };
            handles.add(status, out, Kind::Context);
        }
        Op::ContextFree(h) => {
            let h = handles.get::<sqz_context>(*h);
            let status = sqz_context_free(h);
            handles.freed(status, h, Kind::Context);
        }
        Op::Enter(h) => {
            let h = handles.get::<sqz_context>(*h);
            handles.expect(h, Kind::Context, sqz_context_enter(h), true);
        }
        Op::Configure(h, c) => {
            let h = handles.get::<sqz_context>(*h);
            let status = unsafe { sqz_configure(h, (&raw const *config(c)).cast()) };
            handles.expect(h, Kind::Context, status, true);
        }
        Op::Attach(c, i) | Op::Detach(c, i) => {
            let (c, i) = (handles.get::<sqz_context>(*c), handles.get::<sqz_index>(*i));
            let status = if matches!(op, Op::Attach(..)) { sqz_attach(c, i) } else { sqz_detach(c, i) };
            if handles.is(i, Kind::Index) {
                handles.expect(c, Kind::Context, status, true);
            } else {
                assert_ne!(status, SQZ_OK);
            }
        }
        Op::Stats(h, size) => {
            let h = handles.get::<sqz_context>(*h);
            let mut out = room(0u64, *size, 0);
            let status = unsafe { sqz_get_stats(h, (&raw mut *out).cast()) };
            handles.expect(h, Kind::Context, status, true);
        }
        Op::Reset(h) => {
            let h = handles.get::<sqz_context>(*h);
            handles.expect(h, Kind::Context, sqz_reset_stats(h), true);
        }
        Op::BuilderNew(p, n, no_tokens) => {
            let d = sqz_builder_params_default();
            let value = match p.sane {
                true => sqz_builder_params { n_sink: 2, n_window: 5, iterations: 2, n_threads: 1, ..d },
                false => sqz_builder_params {
                    n_sink: p.n_sink.into(),
                    n_window: p.n_window.into(),
                    cluster_share: p.cluster_share,
                    iterations: p.iterations.into(),
                    n_coarse: p.n_coarse.into(),
                    // A few, or more than there may be.
                    n_threads: if p.n_threads > 1024 { p.n_threads } else { p.n_threads % 3 },
                    n_layer: p.n_layer.into(),
                    ..d
                },
            };
            let room = room(value, size_of_or::<sqz_builder_params>(p.sane, p.size), 0);
            let tokens: Vec<i32> = (0..*n as i32 % 70).collect();
            let data = if *no_tokens { null() } else { tokens.as_ptr() };
            let mut out = null_mut();
            let status = unsafe { sqz_builder_new((&raw const *room).cast(), data, tokens.len(), &mut out) };
            handles.add(status, out, Kind::Builder);
        }
        Op::BuilderFree(h) => {
            let h = handles.get::<sqz_builder>(*h);
            let status = sqz_builder_free(h);
            handles.freed(status, h, Kind::Builder);
        }
        Op::Progress(h, how) => {
            let h = handles.get::<sqz_builder>(*h);
            let data = if how % 2 == 0 { null_mut() } else { (&raw const *files()).cast_mut().cast() };
            let status = sqz_builder_set_progress(h, if how % 3 == 0 { None } else { Some(progress) }, data);
            handles.expect(h, Kind::Builder, status, false);
        }
        Op::AddLayer(h, l) => {
            let h = handles.get::<sqz_builder>(*h);
            let (heads, group, dk, dv) = match l.sane {
                true => (1, 2, 64, 64),
                false => (l.n_head_kv % 4, l.n_group % 4, l.dk % 80, l.dv % 80),
            };
            // For 70 tokens and 255 queries at most.
            let k: Vec<u16> = (0..70 * 4 * 80).map(|i| 0x3000 + (i * 7919u32 % 0x0c00) as u16).collect();
            let q = vec![0.5f32; 255 * 4 * 4 * 80];
            let value = sqz_layer {
                size: 0,
                layer: l.layer.into(),
                n_head_kv: heads.into(),
                n_group: group.into(),
                head_dim_k: dk.into(),
                head_dim_v: dv.into(),
                scale: if l.sane { 0.125 } else { l.scale },
                k: if l.null & 1 == 1 { null() } else { k.as_ptr().cast() },
                v: if l.null & 2 == 2 { null() } else { k.as_ptr().cast() },
                q: if l.null & 4 == 4 { null() } else { q.as_ptr() },
            };
            let room = room(value, size_of_or::<sqz_layer>(l.sane, l.size), 0);
            let status = unsafe { sqz_builder_add_layer(h, (&raw const *room).cast()) };
            handles.expect(h, Kind::Builder, status, false);
        }
        Op::Build(h, no_place) => {
            let h = handles.get::<sqz_builder>(*h);
            let mut out = null_mut();
            let place = if *no_place { null_mut() } else { &raw mut out };
            let status = unsafe { sqz_builder_build(h, place) };
            handles.expect(h, Kind::Builder, status, false);
            handles.add(status, out, Kind::Index);
        }
        Op::Model(h, which) => {
            let h = handles.get::<sqz_builder>(*h);
            let status = unsafe { sqz_builder_set_model(h, path(*which)) };
            handles.expect(h, Kind::Builder, status, false);
        }
        Op::Eval(h, ask) => {
            let h = handles.get::<sqz_builder>(*h);
            // A live builder needs a live tensor; without one every graph passes.
            if !handles.is(h, Kind::Builder) {
                assert_eq!(unsafe { sqz_builder_eval_callback(null_mut(), *ask, h.cast()) }, !ask);
            }
        }
        Op::Attend(c, i, call) => attend(handles, handles.get(*c), handles.get(*i), call),
        Op::Forget(h) => {
            let h = handles.get::<sqz_context>(*h);
            handles.expect(h, Kind::Context, sqz_attn_forget(h), false);
        }
        Op::Op(c, i, layer) => {
            let (c, i) = (handles.get(*c), handles.get(*i));
            let none = null_mut();
            assert!(unsafe { sqz_attn_ext(c, null_mut(), none, none, none, none, 1.0, 0.0, 0.0, i, *layer) }.is_null());
        }
        Op::Text(status) => assert!(!sqz_status_str(*status).is_null()),
    }
    assert!(!sqz_last_error().is_null());
}

fuzz_target!(|ops: Vec<Op>| {
    let mut handles = Handles::default();
    ops.iter().take(60).for_each(|op| call(&mut handles, op));
    // What is left of an input in the process would change the next one.
    assert_eq!(sqz_context_enter(null()), SQZ_OK);
    assert_eq!(unsafe { sqz_configure(null(), null()) }, SQZ_OK);
    let all = std::mem::take(&mut handles.0);
    for (number, ..) in all.iter().filter(|h| h.2 && h.1 == Kind::Index) {
        sqz_detach(null(), std::ptr::without_provenance(*number));
    }
    for (number, kind, _) in all.into_iter().filter(|h| h.2) {
        assert_eq!(
            match kind {
                Kind::Index => sqz_index_free(std::ptr::without_provenance_mut(number)),
                Kind::Context => sqz_context_free(std::ptr::without_provenance_mut(number)),
                Kind::Builder => sqz_builder_free(std::ptr::without_provenance_mut(number)),
            },
            SQZ_OK
        );
    }
});
