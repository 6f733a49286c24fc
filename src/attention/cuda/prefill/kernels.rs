//! The kernels of a prefill on one GPU.

use std::ffi::{c_int, CString};

use cudarc::driver::{result, sys};

use super::super::Error;
use super::params::{Path, HOPPER, PORTABLE};
use super::DIMS;

/// A kernel with what it takes of a block's shared memory, and how many of its blocks the whole GPU runs at once.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub function: sys::CUfunction,
    pub bytes: usize,
    pub blocks: usize,
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// Kernels of one head size on one path; `None`: blocks of this GPU do not have the shared memory.
pub(super) struct PathKernels {
    pub path: Path,
    pub attend: Option<Kernel>,
    /// Without and with the spread by dimension: sums, squares, mass.
    pub lookup: [[Option<Kernel>; 3]; 2],
}

pub(super) struct HeadKernels {
    pub check: sys::CUfunction,
    pub merge: sys::CUfunction,
    /// The one for every GPU, and the one for this GPU's architecture where there is one.
    pub paths: Vec<PathKernels>,
}

/// All of them.
pub(in super::super) struct Kernels {
    pub(super) plan: sys::CUfunction,
    pub(super) seen: sys::CUfunction,
    pub(super) share: sys::CUfunction,
    pub(super) heads: [HeadKernels; DIMS.len()],
}

/// A kernel of a module; `None` where the build has none of that name.
fn find(module: sys::CUmodule, name: &str) -> Result<Option<sys::CUfunction>, Error> {
    let name = CString::new(name).expect("names have no zero");
    // SAFETY: a module that is loaded.
    match unsafe { result::module::get_function(module, name) } {
        Ok(function) => Ok(Some(function)),
        Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_FOUND => Ok(None),
        Err(e) => Err(Error::driver("find a kernel")(e)),
    }
}

fn must(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, Error> {
    let missing = || Error::Driver { what: "find a kernel", code: name.to_string() };
    find(module, name)?.ok_or_else(missing)
}

fn kernel(function: sys::CUfunction, threads: usize, bytes: usize, n_sm: usize) -> Result<Option<Kernel>, Error> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a function just found; a number that is too large is refused.
    if unsafe { sys::cuFuncSetAttribute(function, attribute, bytes as c_int) }.result().is_err() {
        return Ok(None);
    }
    // SAFETY: as above.
    let per_sm = unsafe { result::occupancy::max_active_block_per_multiprocessor(function, threads as c_int, bytes) }
        .map_err(Error::driver("tell a kernel's occupancy"))?;
    Ok((per_sm > 0).then_some(Kernel { function, bytes, blocks: n_sm * per_sm as usize }))
}

impl Kernels {
    /// From modules that are loaded, for a GPU of so many multiprocessors.
    ///
    /// # Errors
    /// A kernel is missing, or the driver refuses.
    pub(in super::super) fn new([plan, lookup, attend]: [sys::CUmodule; 3], n_sm: usize) -> Result<Kernels, Error> {
        let path = |path: Path, d: usize| -> Result<Option<PathKernels>, Error> {
            let Some(found) = find(attend, &format!("prefill_attend_{d}{}", path.suffix))? else { return Ok(None) };
            let mut own = PathKernels {
                attend: kernel(found, path.attend_threads, path.attend_bytes(d), n_sm)?,
                lookup: [[None; 3]; 2],
                path,
            };
            for (diag, kinds) in own.lookup.iter_mut().enumerate() {
                for (to, kind) in kinds.iter_mut().zip(["sums", "squares", "mass"]) {
                    let spread = ["", "_diag"][diag];
                    let found = must(lookup, &format!("prefill_lookup_{d}{spread}{}_{kind}", path.suffix))?;
                    let bytes = path.lookup_bytes(d, diag == 1, kind == "mass");
                    *to = kernel(found, path.lookup_threads, bytes, n_sm)?;
                }
            }
            Ok(Some(own))
        };
        let head = |d: usize| -> Result<HeadKernels, Error> {
            let paths = [path(PORTABLE, d)?, path(HOPPER, d)?];
            Ok(HeadKernels {
                check: must(plan, &format!("prefill_check_{d}"))?,
                merge: must(attend, &format!("prefill_merge_{d}"))?,
                paths: paths.into_iter().flatten().collect(),
            })
        };
        Ok(Kernels {
            plan: must(plan, "prefill_plan")?,
            seen: must(plan, "prefill_seen")?,
            share: must(plan, "prefill_share")?,
            heads: [head(DIMS[0])?, head(DIMS[1])?],
        })
    }
}
