//! The driver, opened at run time, and per GPU the primary context with the kernels loaded into it.

use std::ffi::{c_int, c_uint, c_void, CString};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use cudarc::driver::{result, sys, DriverError};

use super::kinds::{Attend, Lookup};
use super::{params, prefill, Error};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Oldest driver (CUDA version times 1000 and 10): programmatic launches, lazy loading.
const DRIVER_MIN: c_int = 12000;

impl Error {
    pub(crate) fn driver(what: &'static str) -> impl Fn(DriverError) -> Error {
        move |e| {
            let code = e.error_string().map_or_else(|_| format!("{:?}", e.0), |s| s.to_string_lossy().into_owned());
            Error::Driver { what, code }
        }
    }
}

const NONE: sys::CUfunction = std::ptr::null_mut();

/// A kernel.
#[derive(Clone, Copy)]
pub(super) struct Function(pub sys::CUfunction);

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A GPU with the kernels in its primary context, which is the CUDA runtime's, hence ggml's.
pub struct Device {
    ordinal: usize,
    cu: sys::CUdevice,
    context: sys::CUcontext,
    n_sm: usize,
    /// Shared memory that a block may have if it asks for it.
    shared_max: usize,
    modules: Mutex<Vec<sys::CUmodule>>,
    name: String,
    /// For each of `params::SELECT`: by keys, and by mass.
    pub(super) select: [[sys::CUfunction; 2]; params::SELECT.len()],
    pub(super) select_alone: [sys::CUfunction; params::SELECT_ALONE.len()],
    pub(super) select_coarse: [sys::CUfunction; params::SELECT_COARSE.len()],
    /// By keys, and by mass.
    pub(super) select_opened: [[sys::CUfunction; 2]; params::SELECT_OPENED.len()],
    pub(super) digest: sys::CUfunction,
    /// By `params::HEAD_DIMS_V`.
    pub(super) merge: [sys::CUfunction; params::HEAD_DIMS_V.len()],
    pub(super) rows_of: sys::CUfunction,
    pub(super) list_visible: sys::CUfunction,
    pub(super) gather: sys::CUfunction,
    /// Those of some types and head sizes, once a call has wanted them.
    pub(super) lookups: Mutex<Vec<Lookup>>,
    pub(super) attends: Mutex<Vec<Attend>>,
    /// By keys, and by mass.
    pub(super) select_tile: [[sys::CUfunction; 2]; params::SELECT_TILE.len()],
    /// What all prefills need, loaded at first need.
    prefill: OnceLock<prefill::Kernels>,
    /// Can a kernel start while the one before it ends? Those built for compute capability 9.0 and later do; PTX for 8.0 does
    /// not, whatever GPU it runs on.
    overlap: bool,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// A kernel of a module.
pub(super) fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, Error> {
    let name = CString::new(name).expect("names have no zero");
    // SAFETY: a module that is loaded.
    unsafe { result::module::get_function(module, name) }.map_err(Error::driver("find a kernel"))
}

impl Device {
    /// Number of GPUs; an error says why there can be none.
    ///
    /// # Errors
    /// No kernels are built in, there is no driver, or it is too old.
    pub fn count() -> Result<usize, Error> {
        if !MISSING.is_empty() {
            return Err(Error::NotBuilt { why: MISSING });
        }
        // SAFETY: asks the loader for libcuda, nothing more.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        result::init().map_err(Error::driver("start"))?;
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(Error::driver("tell its version"))?;
        if version < DRIVER_MIN {
            return Err(Error::OldDriver { found: format!("{}.{}", version / 1000, version % 1000 / 10) });
        }
        Ok(result::device::get_count().map_err(Error::driver("count devices"))? as usize)
    }

    /// Number of the GPU with this PCI bus id, as in `0000:1b:00.0`.
    ///
    /// # Errors
    /// As for `count`, or there is none.
    pub fn with_bus_id(id: &str) -> Result<usize, Error> {
        Device::count()?;
        let (id, mut ordinal) = (CString::new(id).unwrap_or_default(), 0);
        // SAFETY: a terminated string; writes one number.
        unsafe { sys::cuDeviceGetByPCIBusId(&mut ordinal, id.as_ptr()) }
            .result()
            .map_err(Error::driver("find the device of a backend"))?;
        Ok(ordinal as usize)
    }

    /// A GPU's name.
    ///
    /// # Errors
    /// There is no such GPU, or `count` has not found any.
    pub fn name_of(ordinal: usize) -> Result<String, Error> {
        let cu = result::device::get(ordinal as c_int).map_err(Error::driver("find the device"))?;
        result::device::get_name(cu).map_err(Error::driver("tell the device's name"))
    }

    /// The GPU with the kernels loaded, once for all that use it at a time.
    ///
    /// # Errors
    /// As for `new`.
    pub fn shared(ordinal: usize) -> Result<Arc<Device>, Error> {
        static DEVICES: Mutex<Vec<Weak<Device>>> = Mutex::new(Vec::new());
        let mut devices = DEVICES.lock().unwrap_or_else(|e| e.into_inner());
        devices.retain(|d| d.strong_count() > 0);
        if let Some(found) = devices.iter().filter_map(Weak::upgrade).find(|d| d.ordinal == ordinal) {
            return Ok(found);
        }
        let made = Device::new(ordinal)?;
        devices.push(Arc::downgrade(&made));
        Ok(made)
    }

    /// Loads the kernels into the primary context of a GPU and makes that current in this thread.
    ///
    /// # Errors
    /// As for `count`; the GPU is too old, or the driver refuses.
    pub fn new(ordinal: usize) -> Result<Arc<Device>, Error> {
        Device::count()?;
        let cu = result::device::get(ordinal as c_int).map_err(Error::driver("find the device"))?;
        // SAFETY: `cu` is a device; attributes are numbers.
        let attribute = |a| unsafe { result::device::get_attribute(cu, a) }.map_err(Error::driver("tell an attribute"));
        use sys::CUdevice_attribute as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(Error::OldDevice { ordinal, major, minor });
        }
        let n_sm = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_max = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let name = Device::name_of(ordinal)?;
        // SAFETY: `cu` is a device; released when the result is dropped.
        let context = unsafe { result::primary_ctx::retain(cu) }.map_err(Error::driver("open the context"))?;
        let mut device = Device {
            ordinal,
            cu,
            context,
            n_sm,
            shared_max,
            modules: Mutex::new(Vec::new()),
            name,
            select: [[NONE; 2]; params::SELECT.len()],
            select_alone: [NONE; params::SELECT_ALONE.len()],
            select_coarse: [NONE; params::SELECT_COARSE.len()],
            select_opened: [[NONE; 2]; params::SELECT_OPENED.len()],
            digest: NONE,
            merge: [NONE; params::HEAD_DIMS_V.len()],
            rows_of: NONE,
            list_visible: NONE,
            gather: NONE,
            lookups: Mutex::new(Vec::new()),
            attends: Mutex::new(Vec::new()),
            select_tile: [[NONE; 2]; params::SELECT_TILE.len()],
            prefill: OnceLock::new(),
            overlap: false,
        };
        device.enter()?;
        device.load_common()?;
        Ok(Arc::new(device))
    }

    /// Loads fatbins that are built in, all or none; they stay as long as the device.
    pub(super) fn load_all<const N: usize>(&self, images: [&'static [u8]; N]) -> Result<[sys::CUmodule; N], Error> {
        self.enter()?;
        let mut loaded = [std::ptr::null_mut(); N];
        for (i, image) in images.into_iter().enumerate() {
            // SAFETY: a whole fatbin, built in.
            match unsafe { result::module::load_data(image.as_ptr().cast()) } {
                Ok(module) => loaded[i] = module,
                Err(e) => {
                    // SAFETY: loaded above, and nothing is launched from them.
                    loaded[..i].iter().for_each(|module| _ = unsafe { result::module::unload(*module) });
                    return Err(Error::driver("load the kernels")(e));
                }
            }
        }
        self.modules.lock().unwrap_or_else(|e| e.into_inner()).extend(loaded);
        Ok(loaded)
    }

    /// One of them.
    pub(super) fn load(&self, image: &'static [u8]) -> Result<sys::CUmodule, Error> {
        self.load_all([image]).map(|[module]| module)
    }

    /// Blocks of a kernel that the whole GPU runs at once, with so many bytes of dynamic shared memory each.
    pub(super) fn blocks(&self, function: sys::CUfunction, threads: usize, shared: usize) -> Result<usize, Error> {
        // SAFETY: a function of a loaded module.
        let per_sm =
            unsafe { result::occupancy::max_active_block_per_multiprocessor(function, threads as c_int, shared) };
        Ok(self.n_sm * per_sm.map_err(Error::driver("tell a kernel's occupancy"))?.max(1) as usize)
    }

    /// Lets a kernel have as much dynamic shared memory as a block can: how much that is.
    pub(super) fn allow_shared(&self, function: sys::CUfunction) -> Result<usize, Error> {
        use sys::CUfunction_attribute as A;
        let mut fixed = 0;
        // SAFETY: writes one number about a function of a loaded module.
        unsafe { sys::cuFuncGetAttribute(&mut fixed, A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function) }
            .result()
            .map_err(Error::driver("tell a kernel's shared memory"))?;
        let most = self.shared_max.saturating_sub(fixed as usize);
        let attribute = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: sets one number of it.
        unsafe { sys::cuFuncSetAttribute(function, attribute, most as c_int) }
            .result()
            .map_err(Error::driver("give a kernel shared memory"))?;
        Ok(most)
    }

    /// What every call needs.
    fn load_common(&mut self) -> Result<(), Error> {
        let [digest, rows, select, merge] =
            [self.load(DIGEST)?, self.load(ROWS)?, self.load(SELECT)?, self.load(MERGE)?];
        self.digest = function(digest, "digest")?;
        [self.rows_of, self.list_visible, self.gather] =
            [function(rows, "rows_of")?, function(rows, "list_visible")?, function(rows, "gather")?];
        for (to, d) in self.merge.iter_mut().zip(params::HEAD_DIMS_V) {
            *to = function(merge, &format!("merge_{d}"))?;
        }
        let mut version = 0;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        // SAFETY: writes one number about a function just found.
        unsafe { sys::cuFuncGetAttribute(&mut version, attribute, self.digest) }
            .result()
            .map_err(Error::driver("tell a kernel's version"))?;
        self.overlap = version >= 90;
        let variant = |kind: &str, (each, threads)| {
            let name = format!("select{kind}_{each}_{threads}");
            Ok([function(select, &name)?, function(select, &format!("{name}_mass"))?])
        };
        for (to, of) in self.select.iter_mut().zip(params::SELECT) {
            *to = variant("", of)?;
        }
        for (to, (each, threads)) in self.select_alone.iter_mut().zip(params::SELECT_ALONE) {
            *to = function(select, &format!("select_alone_{each}_{threads}"))?;
        }
        for (to, (each, threads)) in self.select_coarse.iter_mut().zip(params::SELECT_COARSE) {
            *to = function(select, &format!("select_coarse_{each}_{threads}"))?;
        }
        for (to, of) in self.select_opened.iter_mut().zip(params::SELECT_OPENED) {
            *to = variant("_opened", of)?;
        }
        for (to, of) in self.select_tile.iter_mut().zip(params::SELECT_TILE) {
            *to = variant("_tile", of)?;
        }
        Ok(())
    }

    /// What all prefills need; when that cannot be loaded the next call tries again.
    ///
    /// # Errors
    /// They cannot be loaded.
    pub(super) fn prefill(&self) -> Result<&prefill::Kernels, Error> {
        if let Some(kernels) = self.prefill.get() {
            return Ok(kernels);
        }
        let made = prefill::Kernels::new(self)?;
        Ok(self.prefill.get_or_init(|| made))
    }

    /// Puts a kernel on a stream. `early`: it may start while the one before it ends, where the GPU can.
    ///
    /// # Safety
    /// The kernel takes one `P`; `stream` is one of the primary context; every address is valid when it runs.
    pub(crate) unsafe fn start<P>(
        &self,
        function: sys::CUfunction,
        grid: [u32; 3],
        threads: [usize; 2],
        parameters: &P,
        early: bool,
        stream: sys::CUstream,
    ) -> Result<(), Error> {
        // SAFETY: the same contract.
        unsafe { self.start_with(function, grid, threads, 0, parameters, early, stream) }
    }

    /// The same with dynamic shared memory, `shared` bytes per block.
    ///
    /// # Safety
    /// As for `start`; the kernel may have so much.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn start_with<P>(
        &self,
        function: sys::CUfunction,
        grid: [u32; 3],
        threads: [usize; 2],
        shared: usize,
        parameters: &P,
        early: bool,
        stream: sys::CUstream,
    ) -> Result<(), Error> {
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: threads[0] as c_uint,
            blockDimY: threads[1] as c_uint,
            blockDimZ: 1,
            sharedMemBytes: shared as c_uint,
            hStream: stream,
            attrs: &mut attribute,
            numAttrs: (early && self.overlap) as c_uint,
        };
        let mut arguments = [(&raw const *parameters).cast_mut().cast::<c_void>()];
        // SAFETY: the parameter is what the kernel takes and is copied by the call; the rest is the caller's contract.
        unsafe { sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(Error::driver("launch a kernel"))
    }

    /// Makes the primary context current in this thread.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn enter(&self) -> Result<(), Error> {
        // SAFETY: retained until drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(Error::driver("enter the context"))
    }

    /// Number of the GPU, as CUDA counts.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The GPU's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: ours, and nobody launches from them any more. A failure at the process's end is of no interest.
        unsafe {
            self.modules
                .get_mut()
                .unwrap_or_else(|e| e.into_inner())
                .iter()
                .for_each(|m| _ = result::module::unload(*m));
            let _ = result::primary_ctx::release(self.cu);
        }
    }
}
