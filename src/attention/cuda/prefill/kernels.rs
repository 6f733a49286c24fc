//! The kernels of a prefill on one GPU: those that all calls share, and those for some types and head sizes, loaded when a call first
//! wants them.

use std::ffi::{c_int, CString};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::super::device::*;
use super::super::params::HEAD_DIMS_V;
use super::super::{Device, Error, HEAD_SIZES};
use super::params::{portable_attend, LookupPath, HOPPER_ATTEND, HOPPER_LOOKUP, PORTABLE_LOOKUP};
use crate::attention::{Element, Problem};

/// Files of lookup by head size of the keys.
const LOOKUPS: [(usize, &[u8]); 7] = [
    (64, PREFILL_LOOKUP_64),
    (80, PREFILL_LOOKUP_80),
    (96, PREFILL_LOOKUP_96),
    (112, PREFILL_LOOKUP_112),
    (128, PREFILL_LOOKUP_128),
    (192, PREFILL_LOOKUP_192),
    (256, PREFILL_LOOKUP_256),
];

/// Files of attend, as `HEAD_SIZES`.
const ATTENDS: [&[u8]; HEAD_SIZES.len()] = [
    PREFILL_ATTEND_64_64,
    PREFILL_ATTEND_80_80,
    PREFILL_ATTEND_96_64,
    PREFILL_ATTEND_96_96,
    PREFILL_ATTEND_112_112,
    PREFILL_ATTEND_128_128,
    PREFILL_ATTEND_192_128,
    PREFILL_ATTEND_192_192,
    PREFILL_ATTEND_256_256,
];

/// A kernel with its threads, what it takes of a block's shared memory, and how many of its blocks the whole GPU runs at once.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub function: Function,
    pub threads: usize,
    pub bytes: usize,
    pub blocks: usize,
}

/// Lookup without and with the spread by dimension: sums, squares, mass. `None`: blocks of this GPU do not have the shared memory.
type Passes = [[Option<Kernel>; 3]; 2];

#[derive(Clone, Copy)]
pub(super) struct Lookup {
    dk: usize,
    pub sinks: Function,
    pub portable: Passes,
    /// For this GPU's architecture alone, where there are such.
    pub own: Option<Passes>,
}

/// Attend of the head sizes, for every type; and for F16 on this GPU's architecture alone, where there is such.
#[derive(Clone, Copy)]
pub(super) struct Attend {
    sizes: (usize, usize),
    f16: bool,
    pub portable: Option<Kernel>,
    pub own: Option<Kernel>,
}

/// All of them.
pub(in super::super) struct Kernels {
    pub(super) check: Function,
    pub(super) plan: Function,
    pub(super) seen: Function,
    pub(super) share: Function,
    /// By `HEAD_DIMS_V`.
    merge: [Function; HEAD_DIMS_V.len()],
    lookups: Mutex<Vec<Lookup>>,
    attends: Mutex<Vec<Attend>>,
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

fn kernel(device: &Device, function: sys::CUfunction, threads: usize, bytes: usize) -> Result<Option<Kernel>, Error> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a function just found; a number that is too large is refused.
    if unsafe { sys::cuFuncSetAttribute(function, attribute, bytes as c_int) }.result().is_err() {
        return Ok(None);
    }
    let blocks = device.blocks(function, threads, bytes)?;
    Ok((blocks > 0).then_some(Kernel { function: Function(function), threads, bytes, blocks }))
}

impl Kernels {
    /// Those that all calls share.
    ///
    /// # Errors
    /// A kernel is missing, or the driver refuses.
    pub(in super::super) fn new(device: &Device) -> Result<Kernels, Error> {
        let [plan, merge] = device.load_all([PREFILL_PLAN, PREFILL_MERGE])?;
        let of = |name: &str| Ok(Function(function(plan, name)?));
        let mut merges = [Function(std::ptr::null_mut()); HEAD_DIMS_V.len()];
        for (to, d) in merges.iter_mut().zip(HEAD_DIMS_V) {
            *to = Function(function(merge, &format!("prefill_merge_{d}"))?);
        }
        Ok(Kernels {
            check: of("prefill_check")?,
            plan: of("prefill_plan")?,
            seen: of("prefill_seen")?,
            share: of("prefill_share")?,
            merge: merges,
            lookups: Mutex::default(),
            attends: Mutex::default(),
        })
    }

    /// The merge kernel for values of a head size.
    pub(super) fn merge_for(&self, dv: usize) -> Function {
        self.merge[HEAD_DIMS_V.iter().position(|d| *d == dv).expect("checked before")]
    }

    /// For keys of a head size that there are kernels for. Not while a graph is captured.
    ///
    /// # Errors
    /// A kernel is missing, or the driver refuses.
    pub(super) fn lookup(&self, device: &Device, dk: usize) -> Result<Lookup, Error> {
        let mut all = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.iter().find(|l| l.dk == dk) {
            return Ok(*found);
        }
        let image = LOOKUPS.iter().find(|l| l.0 == dk).expect("checked before").1;
        let module = device.load(image)?;
        let passes = |path: LookupPath| -> Result<Option<Passes>, Error> {
            let mut of: Passes = [[None; 3]; 2];
            for (diag, kinds) in of.iter_mut().enumerate() {
                for (to, kind) in kinds.iter_mut().zip(["sums", "squares", "mass"]) {
                    let name = format!("prefill_lookup_{dk}{}{}_{kind}", ["", "_diag"][diag], path.suffix);
                    let Some(found) = find(module, &name)? else { return Ok(None) };
                    *to = kernel(device, found, path.threads, path.bytes(dk, diag == 1, kind == "mass"))?;
                }
            }
            Ok(Some(of))
        };
        let Some(portable) = passes(PORTABLE_LOOKUP)? else {
            return Err(Error::Driver { what: "find a kernel", code: format!("prefill_lookup_{dk}") });
        };
        let sinks = Function(function(module, &format!("prefill_sinks_{dk}"))?);
        let made = Lookup { dk, sinks, portable, own: passes(HOPPER_LOOKUP)? };
        all.push(made);
        Ok(made)
    }

    /// For the types and head sizes of a problem that there are kernels for. Not while a graph is captured.
    ///
    /// # Errors
    /// As for `lookup`.
    pub(super) fn attend(&self, device: &Device, p: &Problem) -> Result<Attend, Error> {
        let (sizes, f16) = ((p.k.ne[0], p.v.ne[0]), [p.k_type, p.v_type] == [Element::F16; 2]);
        let mut all = self.attends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.iter().find(|a| (a.sizes, a.f16) == (sizes, f16)) {
            return Ok(*found);
        }
        let (dk, dv) = sizes;
        let at = HEAD_SIZES.iter().position(|known| *known == sizes).expect("checked before");
        let path = portable_attend(dk, dv);
        let (module, own_module) = match f16 && dk == dv {
            true => device.load_all([ATTENDS[at], PREFILL_ATTEND]).map(|[module, own]| (module, Some(own)))?,
            false => (device.load(ATTENDS[at])?, None),
        };
        let found = function(module, &format!("prefill_attend_{dk}_{dv}"))?;
        let portable = kernel(device, found, path.threads, path.bytes(dk, dv))?;
        let own = own_module.map(|own| find(own, &format!("prefill_attend_{dk}"))).transpose()?.flatten();
        let (threads, bytes) = (HOPPER_ATTEND.threads, HOPPER_ATTEND.bytes(dk, dv));
        let own = own.map(|own| kernel(device, own, threads, bytes)).transpose()?.flatten();
        let made = Attend { sizes, f16, portable, own };
        all.push(made);
        Ok(made)
    }
}
