//! Reading ggml tensors: op kinds, cache roots, arrays for `attention`. The one place that names ggml's numbers.

use std::ffi::CStr;

use ggml_sys as sys;

use super::rows::{CacheRows, Rows};
use super::stats::Reason;
use crate::attention::{Array, Element, Problem};

/// A tensor of the graph being computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tensor(*const sys::ggml_tensor);

/// K or V half of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    K,
    V,
}

// SAFETY: an address that ggml shares between its threads too; what is read through it is not changed while a graph is
// being decided on.
unsafe impl Send for Tensor {}

impl Tensor {
    /// # Safety
    /// `raw` is null or a live tensor, for as long as the value and all it leads to are used.
    pub unsafe fn new(raw: *const sys::ggml_tensor) -> Option<Tensor> {
        (!raw.is_null()).then_some(Tensor(raw))
    }

    pub fn raw(&self) -> &sys::ggml_tensor {
        // SAFETY: live by the contract of `new`.
        unsafe { &*self.0 }
    }

    pub fn address(&self) -> usize {
        self.0 as usize
    }

    pub fn src(&self, i: usize) -> Option<Tensor> {
        // SAFETY: sources of a live node are live while its graph is computed.
        unsafe { Tensor::new(self.raw().src[i]) }
    }

    /// The tensor whose memory this one is a view of (itself if none).
    pub fn root(&self) -> Tensor {
        let mut t = *self;
        // SAFETY: view sources of a live tensor are live.
        while let Some(next) = unsafe { Tensor::new(t.raw().view_src) } {
            t = next;
        }
        t
    }

    pub fn ne(&self) -> [usize; 4] {
        self.raw().ne.map(|n| n.max(0) as usize)
    }

    pub fn is_flash_attention(&self) -> bool {
        self.raw().op == sys::GGML_OP_FLASH_ATTN_EXT
    }

    pub fn is_set_rows(&self) -> bool {
        self.raw().op == sys::GGML_OP_SET_ROWS
    }

    pub fn is_leaf(&self) -> bool {
        self.raw().op == sys::GGML_OP_NONE
    }

    /// Computes nothing: a view of memory in another shape.
    pub fn is_alias(&self) -> bool {
        let op = self.raw().op;
        op == sys::GGML_OP_NONE
            || op == sys::GGML_OP_VIEW
            || op == sys::GGML_OP_PERMUTE
            || op == sys::GGML_OP_RESHAPE
            || op == sys::GGML_OP_TRANSPOSE
    }

    /// Type of K or V; `None` for one that we do not compute with.
    pub fn element(&self) -> Option<Element> {
        element_of(self.raw().type_)
    }

    pub fn is_f16(&self) -> bool {
        self.raw().type_ == sys::GGML_TYPE_F16
    }

    pub fn is_f32(&self) -> bool {
        self.raw().type_ == sys::GGML_TYPE_F32
    }

    pub fn is_i64(&self) -> bool {
        self.raw().type_ == sys::GGML_TYPE_I64
    }

    pub fn is_i32(&self) -> bool {
        self.raw().type_ == sys::GGML_TYPE_I32
    }

    pub fn has_data(&self) -> bool {
        !self.raw().data.is_null()
    }

    /// Layer and half if this is a llama.cpp cache tensor (`cache_k_l7`).
    pub fn cache_layer(&self) -> Option<(u32, Half)> {
        // SAFETY: ggml keeps names terminated inside their 64 bytes.
        let name = unsafe { CStr::from_ptr(self.raw().name.as_ptr()) }.to_str().ok()?;
        let (half, layer) = match name.strip_prefix("cache_k_l") {
            Some(layer) => (Half::K, layer),
            None => (Half::V, name.strip_prefix("cache_v_l")?),
        };
        Some((layer.parse().ok()?, half))
    }

    pub fn array(&self) -> Array {
        Array { data: self.raw().data.cast(), ne: self.ne(), nb: self.raw().nb }
    }

    /// Bytes from the start of `root` to the start of this view.
    pub fn offset_in(&self, root: Tensor) -> usize {
        (self.raw().data as usize).wrapping_sub(root.raw().data as usize)
    }

    /// Numbers of an I64 or I32 vector in host memory.
    pub fn indices(&self) -> Option<Vec<i64>> {
        let n = self.ne();
        if !self.has_data() || n[1] * n[2] * n[3] != 1 {
            return None;
        }
        // SAFETY: a contiguous host vector of n[0] numbers of this type (checked), filled before the graph is computed.
        unsafe {
            if self.is_i64() {
                Some(std::slice::from_raw_parts(self.raw().data.cast::<i64>(), n[0]).to_vec())
            } else if self.is_i32() {
                let numbers = std::slice::from_raw_parts(self.raw().data.cast::<i32>(), n[0]);
                Some(numbers.iter().map(|&x| x as i64).collect())
            } else {
                None
            }
        }
    }
}

/// The element type that ggml has under a number; `None` for one that we do not compute with.
pub fn element_of(number: sys::ggml_type) -> Option<Element> {
    match number {
        sys::GGML_TYPE_F32 => Some(Element::F32),
        sys::GGML_TYPE_F16 => Some(Element::F16),
        sys::GGML_TYPE_BF16 => Some(Element::BF16),
        sys::GGML_TYPE_Q8_0 => Some(Element::Q8_0),
        sys::GGML_TYPE_Q4_0 => Some(Element::Q4_0),
        _ => None,
    }
}

/// Rows of one stream of a layer's cache; `None` where it is not rows of a known type in memory.
pub fn cache_rows(k_root: Tensor, v_root: Tensor, stream: usize) -> Option<CacheRows> {
    let (k, v) = (half_rows(k_root, stream)?, half_rows(v_root, stream)?);
    let n_cell = k_root.ne()[1];
    (n_cell == v_root.ne()[1]).then_some(CacheRows { k, v, n_cell })
}

fn half_rows(root: Tensor, stream: usize) -> Option<Rows> {
    let element = root.element()?;
    let (ne, nb) = (root.ne(), root.raw().nb);
    let rows = nb[0] == element.block_bytes() && ne[0] % element.block() == 0 && ne[3] == 1 && stream < ne[2];
    if !rows || !root.has_data() {
        return None;
    }
    let data = root.raw().data.cast::<u8>().wrapping_add(stream * nb[2]);
    Some(Rows { data, stride: nb[1], len: ne[0], element, compact: None })
}

/// Tensors of an attention call.
#[derive(Clone, Copy)]
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub mask: Option<Tensor>,
    pub sinks: Option<Tensor>,
}

impl Inputs {
    /// Sources of an attention node, in ggml's order.
    pub fn of(node: Tensor) -> Option<Inputs> {
        let (q, k, v) = (node.src(0)?, node.src(1)?, node.src(2)?);
        Some(Inputs { q, k, v, mask: node.src(3), sinks: node.src(4) })
    }

    /// The call, with its numbers (scale, max_bias, softcap) as ggml's op has them. The tensors need no data yet.
    pub fn problem(self, dst: Array, [scale, max_bias, softcap]: [f32; 3]) -> Result<Problem, Reason> {
        let Inputs { q, k, v, mask, sinks } = self;
        let (Some(k_type), Some(v_type)) = (k.element(), v.element()) else { return Err(Reason::Type) };
        let plain_sinks = sinks.is_none_or(|s| s.is_f32() && s.raw().nb[0] == 4);
        if !(q.is_f32() && mask.is_none_or(|m| m.is_f16()) && plain_sinks) {
            return Err(Reason::Type);
        }
        Ok(Problem {
            q: q.array(),
            k: k.array(),
            v: v.array(),
            k_type,
            v_type,
            mask: mask.map(|m| m.array()),
            sinks: sinks.map(|s| s.raw().data.cast::<f32>() as *const f32),
            dst,
            scale: if softcap == 0.0 { scale } else { scale / softcap },
            max_bias,
            softcap,
        })
    }

    pub fn have_data(self) -> bool {
        [Some(self.q), Some(self.k), Some(self.v), self.mask, self.sinks].iter().flatten().all(Tensor::has_data)
    }
}

/// The call that a FLASH_ATTN_EXT node describes.
pub fn problem(node: Tensor) -> Result<Problem, Reason> {
    let inputs = Inputs::of(node).ok_or(Reason::Shape)?;
    if !(node.is_f32() && node.has_data() && inputs.have_data()) {
        return Err(Reason::Type);
    }
    // op_params of the op: scale, max_bias, logit_softcap as f32
    inputs.problem(node.array(), [0, 1, 2].map(|i| f32::from_bits(node.raw().op_params[i] as u32)))
}
