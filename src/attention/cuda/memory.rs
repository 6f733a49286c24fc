//! Device memory with an owner.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{Device, Error};

/// A piece of device memory, freed when dropped.
pub struct Buffer {
    device: Arc<Device>,
    at: sys::CUdeviceptr,
    bytes: usize,
}

impl Buffer {
    /// `bytes` of device memory with unknown contents; `what` names it in an error.
    ///
    /// # Errors
    /// There is not enough, or the driver refuses.
    pub fn new(device: &Arc<Device>, what: &'static str, bytes: usize) -> Result<Buffer, Error> {
        device.enter()?;
        // SAFETY: freed in drop.
        let at = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Error::Memory { what, bytes, free: result::mem_get_info().map_or(0, |info| info.0) }
            }
            _ => Error::driver("allocate memory")(e),
        })?;
        Ok(Buffer { device: device.clone(), at, bytes })
    }

    /// A copy of host data. Waits for the copy.
    ///
    /// # Errors
    /// As for `new`.
    pub fn of<T: bytemuck::NoUninit>(device: &Arc<Device>, what: &'static str, data: &[T]) -> Result<Buffer, Error> {
        let buffer = Buffer::new(device, what, size_of_val(data))?;
        buffer.write(0, data)?;
        Ok(buffer)
    }

    /// Copies host data to byte `at`. Waits for the copy.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Panics
    /// The data do not fit.
    pub fn write<T: bytemuck::NoUninit>(&self, at: usize, data: &[T]) -> Result<(), Error> {
        assert!(at + size_of_val(data) <= self.bytes, "a write past the end of device memory");
        self.device.enter()?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the buffer; the driver copies before it returns.
        unsafe { result::memcpy_htod_sync(self.at + at as u64, data) }.map_err(Error::driver("copy to the device"))?;
        // The copy may have got no further than a buffer of the driver's, and other streams do not wait for it.
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(std::ptr::null_mut()) }.map_err(Error::driver("copy to the device"))
    }

    /// Copies `n` elements from byte `at` to the host, after everything that the device was asked to do.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Panics
    /// There are not so many.
    pub fn read<T: bytemuck::AnyBitPattern>(&self, at: usize, n: usize) -> Result<Vec<T>, Error> {
        let mut out = vec![<T as bytemuck::Zeroable>::zeroed(); n];
        self.read_to(at, &mut out)?;
        Ok(out)
    }

    /// The same, to memory of the caller's.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Panics
    /// There are not so many.
    pub fn read_to<T: bytemuck::AnyBitPattern>(&self, at: usize, out: &mut [T]) -> Result<(), Error> {
        assert!(at + size_of_val(out) <= self.bytes, "a read past the end of device memory");
        self.device.enter()?;
        result::ctx::synchronize().map_err(Error::driver("finish its work"))?;
        if out.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the buffer; any bits are a T.
        unsafe { result::memcpy_dtoh_sync(out, self.at + at as u64) }.map_err(Error::driver("copy from the device"))
    }

    /// Device address.
    pub fn address(&self) -> u64 {
        self.at
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU that it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours. cuMemFree waits for kernels that may still use it.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

/// Host memory that the GPU copies to by itself, at the full rate of the bus.
pub(crate) struct Pinned {
    device: Arc<Device>,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` of zeros.
    ///
    /// # Errors
    /// The driver refuses.
    pub(crate) fn new(device: &Arc<Device>, bytes: usize) -> Result<Pinned, Error> {
        device.enter()?;
        // SAFETY: freed in drop.
        let at =
            unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(Error::driver("lock host memory"))?.cast::<u8>();
        // SAFETY: just allocated with that many bytes.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Pinned { device: device.clone(), at, bytes })
    }

    /// Copies from byte `at` of a buffer on until this is full. Waits for all work of the device and for the copy.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Panics
    /// There is not so much.
    pub(crate) fn fill(&mut self, from: &Buffer, at: usize) -> Result<(), Error> {
        // SAFETY: ours, initialised, and borrowed exclusively.
        from.read_to(at, unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) })
    }

    /// What it holds.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: ours and initialised.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

/// Are all of these addresses in that GPU's memory?
///
/// # Errors
/// The driver refuses.
pub fn is_on(device: &Device, addresses: impl IntoIterator<Item = u64>) -> Result<bool, Error> {
    use sys::CUpointer_attribute as A;
    device.enter()?;
    for address in addresses {
        let (mut kind, mut ordinal) = (0u32, -1i32);
        for (to, attribute) in [
            ((&raw mut kind).cast(), A::CU_POINTER_ATTRIBUTE_MEMORY_TYPE),
            ((&raw mut ordinal).cast(), A::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL),
        ] {
            // SAFETY: each attribute is one number of this size.
            match unsafe { sys::cuPointerGetAttribute(to, attribute, address) } {
                // An address that the driver does not know: the host's.
                sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Ok(false),
                code => code.result().map_err(Error::driver("tell where memory is"))?,
            }
        }
        if kind != sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32 || ordinal != device.ordinal() as i32 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Lays out consecutive areas, each on a multiple of 256 bytes.
#[derive(Default)]
pub(crate) struct Carver {
    pub(crate) bytes: usize,
}

impl Carver {
    pub(crate) fn area<T>(&mut self, n: usize) -> usize {
        let at = self.bytes;
        self.bytes = (at + n * size_of::<T>()).next_multiple_of(256);
        at
    }
}
