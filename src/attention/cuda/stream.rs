//! A stream of our own beside the one of a backend, events that order the two, graphs captured on it, and host memory that
//! the device writes.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{Device, Error};

/// A stream of the primary context that waits for no other by itself.
pub struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
    is_ours: bool,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// # Errors
    /// The driver refuses.
    pub fn new(device: &Arc<Device>) -> Result<Stream, Error> {
        device.enter()?;
        let raw =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(Error::driver("make a stream"))?;
        Ok(Stream { device: device.clone(), raw, is_ours: true })
    }

    /// A stream of somebody else's.
    ///
    /// # Safety
    /// `raw` is a stream of the device's primary context and outlives this.
    pub unsafe fn of_host(device: &Arc<Device>, raw: sys::CUstream) -> Stream {
        Stream { device: device.clone(), raw, is_ours: false }
    }

    /// The driver's handle.
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// What is put on the stream from now on comes after the event.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }.map_err(Error::driver("wait for an event"))
    }

    /// Waits on the host for all that is on the stream.
    ///
    /// # Errors
    /// The driver refuses, or a kernel has failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: alive.
        unsafe { result::stream::synchronize(self.raw) }.map_err(Error::driver("finish its work"))
    }

    /// Copies `out.len()` elements from a device address, after what is on the stream. Waits for it.
    ///
    /// # Errors
    /// As for `synchronize`.
    ///
    /// # Safety
    /// `from` is device memory of that size.
    pub unsafe fn read<T: bytemuck::AnyBitPattern>(&self, from: u64, out: &mut [T]) -> Result<(), Error> {
        if out.is_empty() {
            return Ok(());
        }
        self.device.enter()?;
        // SAFETY: `out` has its length and outlives the copy, which is awaited; `from` by contract.
        unsafe { result::memcpy_dtoh_async(out, from, self.raw) }.map_err(Error::driver("copy from the device"))?;
        self.synchronize()
    }

    /// Copies `n` rows of `bytes` bytes from device memory, `step` bytes apart, to consecutive ones, after what is on the stream.
    /// Waits for it.
    ///
    /// # Errors
    /// As for `synchronize`.
    ///
    /// # Safety
    /// The rows are device memory.
    ///
    /// # Panics
    /// `out` is of another size.
    pub unsafe fn read_rows(&self, from: u64, step: usize, bytes: usize, out: &mut [u8]) -> Result<(), Error> {
        assert!(bytes > 0 && out.len().is_multiple_of(bytes), "whole rows");
        if out.is_empty() {
            return Ok(());
        }
        self.device.enter()?;
        let copy = sys::CUDA_MEMCPY2D_v2 {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: step,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: out.as_mut_ptr().cast(),
            dstDevice: 0,
            dstArray: std::ptr::null_mut(),
            dstPitch: bytes,
            WidthInBytes: bytes,
            Height: out.len() / bytes,
        };
        // SAFETY: `out` has room for all rows and outlives the copy, which is awaited; the rows by contract.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.raw) }.result().map_err(Error::driver("copy from the device"))?;
        self.synchronize()
    }

    /// Copies inside device memory, after what is on the stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// Both are device memory of that size, valid until the copy is done.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's contract.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.raw) }.map_err(Error::driver("copy memory"))
    }

    /// Copies device memory to host memory, after what is on the stream. Does not wait.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// `from` is device memory of `to`'s size; both are valid until the copy is done.
    pub unsafe fn copy_out(&self, to: &Mapped, from: u64) -> Result<(), Error> {
        // SAFETY: the caller's contract.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.at.cast(), from, 4 * to.len, self.raw) }
            .result()
            .map_err(Error::driver("copy from the device"))
    }

    /// Fills device memory with zeros, after what is on the stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// `at` is device memory of that size, valid until it is done.
    pub unsafe fn zero(&self, at: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's contract.
        unsafe { result::memset_d8_async(at, 0, bytes, self.raw) }.map_err(Error::driver("set memory"))
    }

    /// From now on work is written down instead of being done, here and on streams that wait for this one's events.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn begin_capture(&self) -> Result<(), Error> {
        // Other threads may allocate meanwhile, as ggml's own captures let them.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: alive.
        unsafe { result::stream::begin_capture(self.raw, mode) }.map_err(Error::driver("capture a stream"))
    }

    /// What was written down, ready to be launched. Every stream that was drawn in must have been waited for.
    ///
    /// # Errors
    /// Something on the streams cannot be captured; nothing is captured any more.
    pub fn end_capture(&self) -> Result<Executable, Error> {
        // SAFETY: alive and capturing; the graph is destroyed once, here.
        unsafe {
            let graph = result::stream::end_capture(self.raw).map_err(Error::driver("capture a graph"))?;
            if graph.is_null() {
                return Err(Error::Driver { what: "capture a graph", code: "there is none".into() });
            }
            let mut exec = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made.map_err(Error::driver("instantiate a graph"))?;
            Ok(Executable { device: self.device.clone(), raw: exec })
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_ours && self.device.enter().is_ok() {
            // SAFETY: ours; work on it is finished by the driver first.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point in a stream. The driver's events are the CUDA runtime's.
pub struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// # Errors
    /// The driver refuses.
    pub fn new(device: &Arc<Device>) -> Result<Event, Error> {
        device.enter()?;
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let raw = result::event::create(flags).map_err(Error::driver("make an event"))?;
        Ok(Event { device: device.clone(), raw })
    }

    /// The driver's handle.
    pub fn raw(&self) -> sys::CUevent {
        self.raw
    }

    /// Becomes the end of what is on the stream now.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both are alive.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(Error::driver("record an event"))
    }

    /// Has the device come past it? Does not wait.
    pub fn is_past(&self) -> bool {
        // SAFETY: alive.
        unsafe { result::event::query(self.raw) }.is_ok()
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// A captured graph.
pub struct Executable {
    device: Arc<Device>,
    raw: sys::CUgraphExec,
}

// SAFETY: a handle of the driver; launches are made by one thread at a time, its owner's.
unsafe impl Send for Executable {}

impl Executable {
    /// Puts the graph on a stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// Every address that was captured is still valid when it runs.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: alive; the rest is the caller's contract.
        unsafe { result::graph::launch(self.raw, stream.raw) }.map_err(Error::driver("launch a graph"))
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours; a running launch ends first.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

/// Page-locked host memory of 32-bit words that the device can write, zero at first.
pub struct Mapped {
    device: Arc<Device>,
    at: *mut u32,
    len: usize,
}

// SAFETY: memory of its own; reads are volatile, and what the device writes meanwhile are whole words.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// # Errors
    /// The driver refuses.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Mapped, Error> {
        device.enter()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: freed in drop.
        let at = unsafe { result::malloc_host(4 * len.max(1), flags) }.map_err(Error::driver("lock host memory"))?;
        // SAFETY: so many bytes were given.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, 4 * len.max(1)) };
        Ok(Mapped { device: device.clone(), at: at.cast(), len })
    }

    /// Where the device finds word `i`: with unified addresses, where the host does.
    pub fn address(&self, i: usize) -> u64 {
        debug_assert!(i < self.len);
        self.at as u64 + 4 * i as u64
    }

    /// Word `i` as the device has left it.
    ///
    /// # Panics
    /// There are not so many.
    pub fn get(&self, i: usize) -> u32 {
        assert!(i < self.len);
        // SAFETY: inside the memory.
        unsafe { self.at.add(i).read_volatile() }
    }

    /// Sets word `i`, before the device is told of it.
    ///
    /// # Panics
    /// There are not so many.
    pub fn set(&self, i: usize, value: u32) {
        assert!(i < self.len);
        // SAFETY: inside the memory.
        unsafe { self.at.add(i).write_volatile(value) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}
