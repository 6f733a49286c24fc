//! A file of kernels in a GPU's context.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::{Device, Error};

/// Loaded kernels, unloaded when dropped.
pub(crate) struct Module {
    device: Arc<Device>,
    module: sys::CUmodule,
}

impl Module {
    /// Loads one of the fatbins that are built in.
    ///
    /// # Errors
    /// The driver refuses.
    pub(crate) fn new(device: &Arc<Device>, image: &'static [u8]) -> Result<Module, Error> {
        device.enter()?;
        // SAFETY: a whole fatbin, built in.
        let module =
            unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(Error::driver("load the kernels"))?;
        Ok(Module { device: device.clone(), module })
    }

    /// A kernel of it, valid as long as the module.
    ///
    /// # Errors
    /// There is none of that name.
    pub(crate) fn function(&self, name: &str) -> Result<sys::CUfunction, Error> {
        let name = CString::new(name).expect("names have no zero");
        // SAFETY: a loaded module.
        unsafe { result::module::get_function(self.module, name) }.map_err(Error::driver("find a kernel"))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: ours; the owner has waited for what it launched. A failure at the process's end is of no interest.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}
