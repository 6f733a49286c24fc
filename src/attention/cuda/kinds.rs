//! Kernels for some types and head sizes of K and V: loaded into a GPU when a call first wants them, so that a host pays only for
//! what its models have.

use cudarc::driver::sys;

use super::device::*;
use super::params::{ATTEND_THREADS, LOOKUP_THREADS};
use super::{Device, Error, HEAD_SIZES};
use crate::attention::{Element, Problem, Rotation};

/// Sizes of K's and V's heads with kernels of their own for F16 without ALiBi.
const PLAIN: [usize; 2] = [64, 128];

/// Files of lookup by head size of the keys.
const LOOKUPS: [(usize, &[u8]); 7] = [
    (64, LOOKUP_64),
    (80, LOOKUP_80),
    (96, LOOKUP_96),
    (112, LOOKUP_112),
    (128, LOOKUP_128),
    (192, LOOKUP_192),
    (256, LOOKUP_256),
];

/// Files of attend, as `HEAD_SIZES`.
const ATTENDS: [&[u8]; HEAD_SIZES.len()] = [
    ATTEND_64_64,
    ATTEND_80_80,
    ATTEND_96_64,
    ATTEND_96_96,
    ATTEND_112_112,
    ATTEND_128_128,
    ATTEND_192_128,
    ATTEND_192_192,
    ATTEND_256_256,
];

/// Lookup without and with the spread by dimension: over all clusters, and over those of opened coarse ones. `blocks`: how many of
/// a kernel the whole GPU runs at once.
#[derive(Clone, Copy)]
pub(super) struct Lookup {
    plain: bool,
    dk: usize,
    pub flat: [Function; 2],
    pub flat_blocks: [usize; 2],
    pub opened: [Function; 2],
    pub opened_blocks: [usize; 2],
}

/// Attend for up to 8 and up to 16 heads of a group.
#[derive(Clone, Copy)]
pub(super) struct Attend {
    plain: bool,
    dk: usize,
    dv: usize,
    pub functions: [Function; 2],
    /// Dynamic shared memory that each may have, in bytes. That for F16 needs none.
    shared_max: [usize; 2],
}

impl Attend {
    /// Bytes of shared memory of a block, whose warps need `rows` bytes for K and V rows and `states` for what they computed.
    pub(super) fn shared(&self, wide: usize, rows: usize, states: usize) -> Result<usize, Error> {
        let bytes = if self.plain { 0 } else { rows.max(states) };
        match bytes <= self.shared_max[wide] {
            true => Ok(bytes),
            false => Err(Error::Unsupported {
                what: "the shared memory of a block",
                got: format!("{bytes} bytes"),
                want: "what this GPU has",
            }),
        }
    }
}

/// There are kernels for these types and head sizes.
///
/// # Errors
/// There are none.
pub(super) fn demand(p: &Problem) -> Result<(), Error> {
    let whole = |element: Element, d: usize| element != Element::F32 && d.is_multiple_of(element.block());
    let (dk, dv) = (p.k.ne[0], p.v.ne[0]);
    let exist = HEAD_SIZES.contains(&(dk, dv)) && whole(p.k_type, dk) && whole(p.v_type, dv);
    (exist && p.q.ne[0] == dk).then_some(()).ok_or_else(|| Error::Unsupported {
        what: "the types and head sizes of K and V",
        got: format!("{} of {dk} and {} of {dv}", p.k_type.name(), p.v_type.name()),
        want: "f16, bf16, q8_0 or q4_0 of 64, 80, 96, 112, 128, 192 or 256, 192 and 128, or 96 and 64",
    })
}

/// Bytes that rows of K or V must lie on multiples of: what is copied at a time.
pub(super) fn alignment(element: Element, d: usize) -> usize {
    1 << element.row_bytes(d).trailing_zeros().min(4)
}

fn is_plain(p: &Problem) -> bool {
    let f16 = [p.k_type, p.v_type] == [Element::F16; 2];
    f16 && p.k.ne[0] == p.v.ne[0] && PLAIN.contains(&p.k.ne[0]) && p.max_bias == 0.0
}

impl Device {
    /// The lookup kernels of a call that passes `demand`. Not while a graph is captured.
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn lookup(&self, p: &Problem, rotation: Rotation) -> Result<Lookup, Error> {
        let (plain, dk) = (is_plain(p) && rotation.k == 0, p.k.ne[0]);
        let mut all = self.lookups.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = all.iter().find(|l| l.plain == plain && l.dk == dk) {
            return Ok(*found);
        }
        let image = if plain { LOOKUP } else { LOOKUPS.iter().find(|l| l.0 == dk).expect("checked before").1 };
        let module = self.load(image)?;
        let name = if plain { format!("{dk}") } else { format!("any_{dk}") };
        let find = |kind: &str| -> Result<([Function; 2], [usize; 2]), Error> {
            let mut of = ([Function(std::ptr::null_mut()); 2], [0; 2]);
            for (i, diag) in ["", "_diag"].into_iter().enumerate() {
                of.0[i] = Function(function(module, &format!("lookup_{kind}{name}{diag}"))?);
                of.1[i] = self.blocks(of.0[i].0, LOOKUP_THREADS, 0)?;
            }
            Ok(of)
        };
        let ((flat, flat_blocks), (opened, opened_blocks)) = (find("")?, find("opened_")?);
        let made = Lookup { plain, dk, flat, flat_blocks, opened, opened_blocks };
        all.push(made);
        Ok(made)
    }

    /// The attend kernels of a call that passes `demand`. Not while a graph is captured.
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn attend(&self, p: &Problem) -> Result<Attend, Error> {
        let (plain, dk, dv) = (is_plain(p), p.k.ne[0], p.v.ne[0]);
        let mut all = self.attends.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = all.iter().find(|a| (a.plain, a.dk, a.dv) == (plain, dk, dv)) {
            return Ok(*found);
        }
        let at = HEAD_SIZES.iter().position(|sizes| *sizes == (dk, dv)).expect("checked before");
        let module = self.load(if plain { ATTEND } else { ATTENDS[at] })?;
        let name = if plain { format!("attend_{dk}") } else { format!("attend_any_{dk}_{dv}") };
        let mut made = Attend { plain, dk, dv, functions: [Function(std::ptr::null_mut()); 2], shared_max: [0; 2] };
        for wide in 0..2 {
            let found = function(module, &format!("{name}_{}", wide + 1))?;
            made.functions[wide] = Function(found);
            made.shared_max[wide] = if plain { 0 } else { self.allow_shared(found)? };
        }
        all.push(made);
        Ok(made)
    }

    /// Blocks of an attend kernel that the whole GPU runs at once.
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn attend_blocks(&self, kernel: Function, shared: usize) -> Result<usize, Error> {
        self.enter()?;
        self.blocks(kernel.0, ATTEND_THREADS, shared)
    }

    /// The merge kernel for values of a head size.
    pub(super) fn merge_for(&self, dv: usize) -> sys::CUfunction {
        let at = super::params::HEAD_DIMS_V.iter().position(|d| *d == dv).expect("checked before");
        self.merge[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_head_sizes_has_its_kernels() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let text = |name: String| std::fs::read_to_string(folder.join(&name)).expect(&name);
        for (dk, dv) in HEAD_SIZES {
            let attend = text(format!("attend_{dk}_{dv}.cu"));
            assert!([1, 2].iter().all(|nt| attend.contains(&format!("ATTEND_ANY({dk}, {dv}, {nt}, "))));
            assert!(text(format!("lookup_{dk}.cu")).contains(&format!("LOOKUP(any_{dk}_diag, {dk}, true, true, ")));
            assert!(LOOKUPS.iter().any(|l| l.0 == dk) && super::super::params::HEAD_DIMS_V.contains(&dv));
            assert!(text("merge.cu".into()).contains(&format!("MERGE({dv})")));
        }
    }

    #[test]
    fn rows_lie_on_what_is_copied_at_a_time() {
        let of = |element, sizes: &[usize]| sizes.iter().map(|d| alignment(element, *d)).collect::<Vec<_>>();
        assert_eq!(of(Element::F16, &[64, 80, 96, 112, 128, 256]), [16; 6]);
        assert_eq!(of(Element::Q8_0, &[64, 96, 128, 192, 256]), [4, 2, 8, 4, 16]);
        assert_eq!(of(Element::Q4_0, &[64, 96, 128, 192, 256]), [4, 2, 8, 4, 16]);
    }
}
