//! What is done on a GPU, with every call of the CUDA driver failing in turn: the caller gets an error that says what could not be done,
//! nothing panics, all that was made is given back, and the next attempt works. The driver is made up (`device_faults/driver.c`): device
//! memory is host memory and kernels do nothing, so that this runs on machines without a GPU. What kernels compute is not looked at.

mod attend_case;
#[path = "device_faults/control.rs"]
mod control;

use std::sync::Arc;

use attend_case::{Case, Spec, LAYER};
use control::{run_with, Driver, MADE_UP};
use ggml_squeeze::attention::cuda::{
    Attention, Bound, Buffer, Call, Device, DeviceRows, Error, Event, Mapped, Masks, Prefill, PrefillCall, Resident,
    RowMap, RowNumbers, Stream, Watched, Workspace,
};
use ggml_squeeze::attention::{Array, Element, Problem, Rotation};
use ggml_squeeze::backend::{self, OpContext, OpOptions, Scope, Stats};
use ggml_squeeze::build::cuda::{Clusterer, DeviceLayer};
use ggml_squeeze::build::{BuildError, Settings};
use half::f16;

#[test]
fn every_driver_call_may_fail() {
    if ggml_squeeze::attention::cuda::missing().is_some() {
        println!("skipped: this build has no CUDA kernels");
        return;
    }
    let out = run_with(MADE_UP, "with_the_made_up_driver");
    assert_eq!(out.matches("failing calls").count(), 6, "{out}");
}

/// In the text of an error that came once more, when nothing failed.
const AGAIN: &str = "and again:";

/// What the driver is asked to do.
struct Attacks(Driver);

impl Attacks {
    /// `job` with each of its driver calls failing alone, then with all failing from one on.
    fn attack(&self, name: &str, job: &dyn Fn() -> Result<(), String>) {
        self.0.fail(0, 0, false);
        let before = self.0.live();
        job().unwrap_or_else(|error| panic!("{name} without a failing call: {error}"));
        let n = self.0.calls();
        assert_eq!(self.0.live(), before, "{name} leaves nothing");
        let (mut told, mut fine) = (0, 0);
        // out of memory; launch failed
        for code in [2, 719] {
            for at in 1..=n {
                self.0.fail(at, code, false);
                let before = self.0.live();
                match job() {
                    Ok(()) => fine += 1,
                    Err(error) => {
                        assert!(
                            error.contains("made up") || error.contains("memory") || error.contains("driver"),
                            "{name}, call {at}, {}: {error}",
                            self.0.failed()
                        );
                        assert!(!error.contains(AGAIN), "{name}, call {at}, {}: {error}", self.0.failed());
                        told += 1;
                    }
                }
                // To a context that cannot be made current nothing can be given back.
                if self.0.failed() == "cuCtxSetCurrent" {
                    continue;
                }
                let left = self.0.live() - before;
                assert_eq!(left, 0, "{name}, call {at} of {n}, {}, answers {code}: something is left", self.0.failed());
            }
        }
        for at in 1..=n {
            // A device that is lost: nothing can be given back to it any more.
            self.0.fail(at, 719, true);
            let _ = job();
        }
        self.0.fail(0, 0, false);
        let before = self.0.live();
        job().unwrap_or_else(|error| panic!("{name} after all that: {error}"));
        assert_eq!(self.0.live(), before, "{name} leaves nothing after all that");
        // What gives back, and questions with a default, may fail unnoticed; most calls may not.
        assert!(told > fine, "{name}: {told} errors, {fine} unnoticed");
        println!("{name}: {n} failing calls, {told} errors in two rounds, {fine} without consequence");
    }
}

/// The arrays of a case in made-up device memory.
struct Arrays {
    problem: Problem,
    _all: Vec<Buffer>,
}

/// The same with bindings and rows.
struct Tied {
    arrays: Arrays,
    rows: Buffer,
    bounds: Vec<Bound>,
}

impl Arrays {
    fn new(device: &Arc<Device>, case: &Case) -> Result<Arrays, Error> {
        let of = |bytes: &[u8]| Buffer::of(device, "a test", bytes);
        let (q, k, v) = (of(bytemuck::cast_slice(&case.q))?, of(&case.k)?, of(&case.v)?);
        let mask = of(bytemuck::cast_slice(&case.mask))?;
        let dst = of(bytemuck::cast_slice(&case.dst))?;
        let at = |a: Array, buffer: &Buffer| Array { data: buffer.address() as *mut u8, ..a };
        let p = &case.call.problem;
        let problem = Problem {
            q: at(p.q, &q),
            k: at(p.k, &k),
            v: at(p.v, &v),
            mask: p.mask.map(|m| at(m, &mask)),
            dst: at(p.dst, &dst),
            ..*p
        };
        Ok(Arrays { problem, _all: vec![q, k, v, mask, dst] })
    }
}

impl Tied {
    fn new(device: &Arc<Device>, case: &Case) -> Result<Tied, Error> {
        let p = &case.call.problem;
        let arrays = Arrays::new(device, case)?;
        let bound = |b: &ggml_squeeze::attention::Binding| {
            let mut bound = Bound::new(Resident::of(&b.index, device, 0)?, &b.cells, p.k.ne[1], 0)?;
            // two heads of keys and of values, F16
            bound.guard(LAYER, b.cells[0], &vec![0; 2 * p.k.ne[2] * (p.k.ne[0] + p.v.ne[0])])?;
            bound.holds()?;
            Ok(bound)
        };
        let bounds = case.call.bindings.iter().map(bound).collect::<Result<_, Error>>()?;
        let rows = Buffer::of(device, "rows", &vec![0i32; case.call.rows.len()])?;
        Ok(Tied { arrays, rows, bounds })
    }

    fn with(&self, case: &Case, then: impl FnOnce(Call<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let bounds: Vec<&Bound> = self.bounds.iter().collect();
        let (problem, selection, rows) = (self.arrays.problem, case.call.selection, self.rows.address());
        let rotation = Rotation::default();
        then(Call { problem, rotation, layer: LAYER, selection, rows, seen: false, bounds: &bounds, first_stream: 0 })
    }
}

/// A decode call: launched, captured and replayed.
fn decode(case: &Case) -> Result<(), Error> {
    let device = Device::shared(Device::with_bus_id("0000:01:00.0").unwrap_or(0))?;
    let (stream, event) = (Stream::new(&device)?, Event::new(&device)?);
    let tied = Tied::new(&device, case)?;
    let counts = Mapped::new(&device, 8)?;
    tied.with(case, |call| {
        let workspace = Workspace::for_calls(&device, &[&call])?;
        let mut attention = Attention::new(&device, &call, &workspace)?;
        attention.count_at(counts.address(0));
        // SAFETY: everything lives until the end of this function, and made-up kernels do nothing.
        unsafe {
            attention.launch(stream.raw())?;
            event.record(&stream)?;
            stream.wait_for(&event)?;
            stream.synchronize()?;
            stream.begin_capture()?;
            let put = attention.launch(stream.raw());
            let graph = stream.end_capture()?;
            put?;
            graph.launch(&stream)?;
        }
        stream.synchronize()
    })
}

/// A prefill in tiles.
fn prefill(case: &Case) -> Result<(), Error> {
    let device = Device::new(0)?;
    let stream = Stream::new(&device)?;
    let tied = Tied::new(&device, case)?;
    tied.with(case, |call| {
        let call = PrefillCall { call, tile: 16, portable: false, slots: 0 };
        let workspace = Workspace::of_bytes(&device, Prefill::bytes_for(&device, &call)?)?;
        let prefill = Prefill::new(&device, &call, &workspace)?;
        // SAFETY: as above.
        unsafe { prefill.launch(stream.raw())? };
        stream.synchronize()
    })
}

/// A host's own calls: a cache that is verified, bound and launched, and launched again. After an error the same context must
/// do it all.
fn calls(case: &Case) -> Result<Stats, String> {
    let scope = Arc::<Scope>::default();
    let _entered = backend::enter(&scope);
    backend::configure(|c| c.min_prefix = Some(0));
    let text = |e: Error| e.to_string();
    let device = Device::shared(0).map_err(text)?;
    let arrays = Arrays::new(&device, case).map_err(text)?;
    let context = OpContext::new(scope, OpOptions::default());
    let index = Some((&case.call.bindings[0].index, LAYER));
    let launch = || {
        // SAFETY: the arrays live until the end of this function; null is the default stream.
        let one = || unsafe { context.launch(arrays.problem, index, 0, std::ptr::null_mut()) };
        one().and_then(|()| one()).map_err(|e| e.to_string())
    };
    let first = launch();
    if let Err(error) = &first {
        launch().map_err(|again| format!("{error}; {AGAIN} {again}"))?;
    }
    context.settle();
    first.map(|()| backend::stats())
}

/// What is done once per graph: rows and their bindings.
fn rows(case: &Case) -> Result<(), Error> {
    let device = Device::new(0)?;
    let stream = Stream::new(&device)?;
    let b = &case.call.bindings[0];
    let n_cell = case.call.problem.k.ne[1];
    let bound = Bound::new(Resident::of(&b.index, &device, 0)?, &b.cells, n_cell, 0)?;
    let mut watched = Watched::new(bound, &b.cells, n_cell)?;
    let cache = Buffer::of(&device, "a test", &vec![f16::ONE; 2 * n_cell * 24])?;
    let half = |i: usize| (cache.address() + (i * n_cell * 48) as u64, 48, 24);
    let cache_rows = DeviceRows { k: half(0), v: half(1), types: [Element::F16; 2], n_cell };
    let (mask, numbers) = (vec![f16::ZERO; 2 * n_cell], [1i64, 2]);
    let (mask, numbers) = (Buffer::of(&device, "a test", &mask)?, Buffer::of(&device, "a test", &numbers)?);
    // SAFETY: rows of `cache`; as above.
    unsafe {
        watched.guard(cache_rows, b.cells[0] as usize, &stream)?;
        let nb = [2, 2 * n_cell, 4 * n_cell, 4 * n_cell];
        let mask = Array { data: mask.address() as *mut u8, ne: [n_cell, 2, 1, 1], nb };
        let masks = Masks { mask, n_query: 2, n_stream: 1, k_streams: 1, first_stream: 0, n_kv: n_cell };
        let written = [RowNumbers { address: numbers.address(), n: 2, wide: true }];
        let map = RowMap::new(&device, Some(&masks), &[(&watched, true)], 1, &written)?;
        map.launch(&stream)?;
        let mut out = [0i32; 2];
        stream.read(map.rows(), &mut out)
    }
}

fn index(n: usize, n_coarse: Option<u32>) -> Result<(), BuildError> {
    let failed = |e: Error| BuildError::Device { reason: e.to_string() };
    let device = Device::new(0).map_err(failed)?;
    let settings = Settings { n_window: 20, n_coarse, n_threads: 1, ..Settings::default() };
    let rows = vec![f16::ONE; n * 2 * 64];
    let k = Buffer::of(&device, "a test", &rows).map_err(failed)?;
    let cells: Vec<u32> = (0..n as u32).collect();
    let mut clusterer = Clusterer::new(&device, &cells, &settings)?;
    let array = Array { data: k.address() as *mut u8, ne: [64, n, 2, 1], nb: [2, 256, 128, 256 * n] };
    let q = vec![1.0; 20 * 2 * 64];
    let layer = DeviceLayer { layer: 0, n_group: 1, scale: 0.125, k: array, v: array, q: &q };
    // SAFETY: the cache lives; as above.
    unsafe { clusterer.index_layer(&layer, &rows, &|_| ()) }.map(|_| ())
}

#[test]
#[ignore = "a part of every_driver_call_may_fail"]
fn with_the_made_up_driver() {
    let Some(driver) = Driver::of_process() else { return };
    let driver = Attacks(driver);
    let text = |e: Error| e.to_string();
    let case = Case::new(&Spec { n_prefix: 200, ..Spec::base() });
    driver.attack("decode", &|| decode(&case).map_err(text));
    driver.attack("rows", &|| rows(&case).map_err(text));
    let own = Case::new(&Spec { contiguous: true, n_other: 0, plain_mask: true, ..Spec::base() });
    let stats = calls(&own).unwrap();
    assert_eq!((stats.bound, stats.nodes_dense.len()), (1, 0), "{stats:?}");
    driver.attack("calls", &|| calls(&own).map(|_| ()));
    let many = Case::new(&Spec { n_query: 40, n_prefix: 200, plain_mask: true, ..Spec::base() });
    driver.attack("prefill", &|| prefill(&many).map_err(text));
    driver.attack("clustering", &|| index(400, Some(0)).map_err(|e| e.to_string()));
    driver.attack("clustering from the top down", &|| index(400, Some(8)).map_err(|e| e.to_string()));
}
