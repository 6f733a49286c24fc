//! Takes what an index is made of out of a running llama.cpp: while the prefix is decoded, an eval callback looks at every
//! attention op (mask, the queries of the last tokens); afterwards K and V are read from the cache, layer by layer.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_void, CStr};

use anyhow::{bail, Result};
use ggml_squeeze::attention::{Array, Element};
use ggml_squeeze::backend::{is_quantised, Row};
use ggml_squeeze::build::{cache_blocks, LayerCapture};
use ggml_squeeze::hadamard::rotate;
use half::f16;
use llama_cpp_sys_2 as sys;

use crate::llama::element_of;

/// Relative error above which captured K, Q and V are taken to be something else than the op's. Half precision sums in
/// llama.cpp's kernels stay near 0.002; a wrong layout is at 1.
const VERIFY_TOLERANCE: f32 = 0.02;
/// The same of a quantised K cache, where llama.cpp's kernel rounds the queries to Q8_0 too.
const VERIFY_TOLERANCE_QUANTISED: f32 = 0.1;
/// Heads per layer that are checked so.
const VERIFY_HEADS: usize = 4;

/// Layers with a cache that are not indexed, and why.
pub type DenseLayers = Vec<(u32, String)>;

/// Where the rows of K or V of a layer lie in the cache.
struct Rows {
    /// The cache's own tensor; lives as long as the context.
    root: *const sys::ggml_tensor,
    offset: usize,
    cell_bytes: usize,
    head_bytes: usize,
    head_dim: usize,
    n_head: usize,
    element: Element,
}

struct Layer {
    k: Rows,
    v: Rows,
    n_head: usize,
    scale: f32,
    softcap: f32,
    sinks: Vec<f32>,
    /// `[W][n_head][head_dim_k]`.
    q: Vec<f32>,
    /// Output of the last prefix token, `[n_head][head_dim_v]`.
    last_output: Vec<f32>,
    /// Why the layer is not indexed.
    dense: Option<String>,
}

/// State of the callback.
pub struct Capture {
    n_prefix: usize,
    n_window: usize,
    /// Position of the first token of the graph that runs, and the number of its tokens.
    first: usize,
    n: usize,
    /// Verdict on each mask of that graph, by address: None if row t shows exactly the cells 0..=t.
    masks: HashMap<usize, Option<String>>,
    layers: BTreeMap<u32, Layer>,
    /// Attention ops seen, whether of a layer with a cache or not.
    n_op: usize,
    /// Nothing is looked at any more, and graphs are computed in one go again.
    ended: bool,
}

/// The scheduler's callback; `user` is a `Capture`.
///
/// # Safety
/// Called by llama.cpp during a decode, with a live tensor and the pointer given at context creation.
pub unsafe extern "C" fn on_eval(t: *mut sys::ggml_tensor, ask: bool, user: *mut c_void) -> bool {
    // SAFETY: see above; nobody else uses the capture during a decode.
    let (t, capture) = unsafe { (&*t, &mut *user.cast::<Capture>()) };
    if t.op != sys::GGML_OP_FLASH_ATTN_EXT || capture.ended {
        return !ask;
    }
    if !ask {
        // SAFETY: the op has just been computed, so it and its sources hold their values.
        unsafe { capture.see(t) };
    }
    true
}

/// All bytes of a tensor, wherever it lies.
unsafe fn bytes_of(t: &sys::ggml_tensor) -> Vec<u8> {
    // SAFETY: the caller has a live tensor with data.
    unsafe {
        let mut out = vec![0u8; sys::ggml_nbytes(t)];
        sys::ggml_backend_tensor_get(t, out.as_mut_ptr().cast(), 0, out.len());
        out
    }
}

fn f32_at(bytes: &[u8], offset: usize) -> f32 {
    f32::from_le_bytes([bytes[offset], bytes[offset + 1], bytes[offset + 2], bytes[offset + 3]])
}

/// Name of the tensor at the root of a chain of views.
unsafe fn root_of(mut t: *const sys::ggml_tensor) -> (*const sys::ggml_tensor, String) {
    // SAFETY: views point to live tensors, and names are NUL-terminated.
    unsafe {
        while !(*t).view_src.is_null() {
            t = (*t).view_src;
        }
        (t, CStr::from_ptr((*t).name.as_ptr()).to_string_lossy().into_owned())
    }
}

fn rows(root: *const sys::ggml_tensor, view: &sys::ggml_tensor, element: Option<Element>) -> Rows {
    Rows {
        root,
        offset: view.view_offs,
        cell_bytes: view.nb[1],
        head_bytes: view.nb[2],
        head_dim: view.ne[0] as usize,
        n_head: view.ne[2] as usize,
        // a layer of another type is not read
        element: element.unwrap_or(Element::F16),
    }
}

impl Capture {
    pub fn new(n_prefix: usize, n_window: usize) -> Capture {
        let (masks, layers) = (HashMap::new(), BTreeMap::new());
        Capture { n_prefix, n_window, first: 0, n: 0, masks, layers, n_op: 0, ended: false }
    }

    /// From here on graphs run as without a capture; what was seen is kept.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Called before each graph: which tokens it has.
    pub fn begin(&mut self, first: usize, n: usize) {
        (self.first, self.n) = (first, n);
        self.masks.clear();
    }

    /// Checks a mask `[n_kv, >= n]`: row t must show exactly the cells 0..=first + t, so that cell = token.
    unsafe fn check_mask(&mut self, mask: *const sys::ggml_tensor) -> Option<String> {
        if mask.is_null() {
            return Some("no mask".into());
        }
        if let Some(known) = self.masks.get(&(mask as usize)) {
            return known.clone();
        }
        // SAFETY: the caller has just seen the op that reads it.
        let (m, bytes) = unsafe { (&*mask, bytes_of(&*mask)) };
        let verdict =
            if m.type_ != sys::GGML_TYPE_F16 || m.ne[1] < self.n as i64 || m.nb[0] != 2 || m.ne[2] * m.ne[3] != 1 {
                Some("a mask of unknown form".to_string())
            } else {
                (0..self.n).find_map(|t| {
                    let shown = self.first + t + 1;
                    let visible =
                        |c: usize| bytes[t * m.nb[1] + c * 2] == 0 && bytes[t * m.nb[1] + c * 2 + 1] & 0x7f == 0;
                    let seen = (0..m.ne[0] as usize).filter(|&c| visible(c)).count();
                    let exact = seen == shown && (0..shown).all(visible);
                    let why = || format!("token {} sees {seen} of {shown} tokens (sliding window)", shown - 1);
                    (!exact).then(why)
                })
            };
        self.masks.insert(mask as usize, verdict.clone());
        verdict
    }

    unsafe fn see(&mut self, op: &sys::ggml_tensor) {
        self.n_op += 1;
        // SAFETY: FLASH_ATTN_EXT always has Q, K and V.
        let (q, k, v) = unsafe { (&*op.src[0], &*op.src[1], &*op.src[2]) };
        // SAFETY: live tensors.
        let ((k_root, k_name), (v_root, v_name)) = unsafe { (root_of(k), root_of(v)) };
        let Some(number) = k_name.strip_prefix("cache_k_l").and_then(|n| n.parse::<u32>().ok()) else { return };
        // SAFETY: the mask is a source of the op.
        let mask_problem = unsafe { self.check_mask(op.src[3]) };
        let param = |i: usize| f32::from_bits(op.op_params[i] as u32);
        let (k_type, v_type) = (element_of(k.type_), element_of(v.type_));
        let (dims, n_head) = ((q.ne[0] as usize, v.ne[0] as usize), q.ne[2] as usize);
        let (n_prefix, n_window) = (self.n_prefix, self.n_window);
        let layer = self.layers.entry(number).or_insert_with(|| Layer {
            k: rows(k_root, k, k_type),
            v: rows(v_root, v, v_type),
            n_head,
            scale: param(0),
            softcap: param(2),
            sinks: Vec::new(),
            q: vec![0.0; n_window * n_head * dims.0],
            last_output: Vec::new(),
            dense: None,
        });
        let problem = if v_name != format!("cache_v_l{number}") {
            Some(format!("its values are not in a cache of their own ({v_name}; MLA)"))
        } else if k_type.is_none() || v_type.is_none() {
            Some("its K or V cache has a type that the plugin does not know".to_string())
        } else if v.nb[0] != layer.v.element.block_bytes() || k.nb[0] != layer.k.element.block_bytes() {
            Some("its V cache is transposed".to_string())
        } else if param(1) != 0.0 {
            Some("ALiBi".to_string())
        } else if q.type_ != sys::GGML_TYPE_F32 || op.type_ != sys::GGML_TYPE_F32 || q.ne[3] != 1 || k.ne[3] != 1 {
            Some("its queries have an unknown form".to_string())
        } else if k.ne[2] != v.ne[2] || n_head % k.ne[2] as usize != 0 || q.ne[1] != self.n as i64 {
            Some("its heads or tokens do not match".to_string())
        } else {
            mask_problem
        };
        if problem.is_some() && layer.dense.is_none() {
            layer.dense = problem;
        }
        let window = n_prefix - n_window;
        if layer.dense.is_some() || self.first + self.n <= window {
            return;
        }
        // SAFETY: Q, the attention sinks and the output are live F32 tensors.
        let (q_bytes, out) = unsafe { (bytes_of(q), bytes_of(op)) };
        for t in 0..self.n {
            let token = self.first + t;
            if token < window || token >= n_prefix {
                continue;
            }
            for h in 0..n_head {
                for d in 0..dims.0 {
                    layer.q[((token - window) * n_head + h) * dims.0 + d] =
                        f32_at(&q_bytes, d * q.nb[0] + t * q.nb[1] + h * q.nb[2]);
                }
            }
            if token + 1 == n_prefix {
                let at = |h: usize, d: usize| f32_at(&out, d * op.nb[0] + h * op.nb[1] + t * op.nb[2]);
                layer.last_output = (0..n_head * dims.1).map(|i| at(i / dims.1, i % dims.1)).collect();
                if !op.src[4].is_null() {
                    // SAFETY: as above.
                    let sinks = unsafe { bytes_of(&*op.src[4]) };
                    layer.sinks = (0..n_head).map(|h| f32_at(&sinks, h * 4)).collect();
                }
            }
        }
    }

    /// After the prefix: numbers of the layers that can be indexed, and the others with the reason.
    ///
    /// # Errors
    /// No attention op was seen at all, or none reads a cache, or no layer is left.
    pub fn finish(&self) -> Result<(Vec<u32>, DenseLayers)> {
        if self.n_op == 0 {
            bail!(
                "flash attention is off or not supported by this model: no FLASH_ATTN_EXT op ran, and there is nothing to \
                 make faster. Use -fa on (or auto); a model that llama.cpp runs without flash attention cannot be indexed"
            );
        }
        let dense: DenseLayers = self.layers.iter().filter_map(|(n, l)| l.dense.clone().map(|why| (*n, why))).collect();
        let good: Vec<u32> = self.layers.iter().filter(|(_, l)| l.dense.is_none()).map(|(n, _)| *n).collect();
        if good.is_empty() {
            match dense.first() {
                Some((n, why)) => bail!("no layer of this model can be indexed; layer {n}: {why}"),
                None => bail!(
                    "no attention op of this model reads a KV cache (a recurrent or encoder model, or a cache of type f32, which \
                     llama.cpp turns to F16 in every graph: use f16)"
                ),
            }
        }
        Ok((good, dense))
    }

    /// Reads K and V of an indexable layer out of the cache (the context must be alive) and checks them: attention of the
    /// last token over them must give what the op gave. The relative error comes back too.
    pub fn read(&self, number: u32) -> Result<(LayerCapture, f32), String> {
        let layer = &self.layers[&number];
        let blocks = cache_blocks(layer.k.head_dim as u32, layer.v.head_dim as u32);
        let block = |element, block: u32| if is_quantised(element) { block as usize } else { 0 };
        let (k_block, v_block) = (block(layer.k.element, blocks.0), block(layer.v.element, blocks.1));
        // SAFETY: the cache belongs to the context, which owns this capture and is idle.
        let (k, v) = unsafe { (self.read_rows(&layer.k, k_block), self.read_rows(&layer.v, v_block)) };
        // llama.cpp turns queries as it turns keys, and turns the output back behind the op
        let (mut q, mut last_output) = (layer.q.clone(), layer.last_output.clone());
        rotate(&mut q, k_block);
        rotate(&mut last_output, v_block);
        let capture = LayerCapture {
            layer: number,
            n_head_kv: layer.k.n_head as u32,
            n_group: (layer.n_head / layer.k.n_head) as u32,
            head_dim_k: layer.k.head_dim as u32,
            head_dim_v: layer.v.head_dim as u32,
            scale: layer.scale,
            k,
            v,
            q,
        };
        let dv = layer.v.head_dim;
        let error = (0..layer.n_head)
            .step_by(layer.n_head.div_ceil(VERIFY_HEADS))
            .map(|h| {
                let seen = last_output.get(h * dv..(h + 1) * dv).unwrap_or_default();
                relative_error(&attend_last(&capture, layer, h), seen)
            })
            .fold(0.0, f32::max);
        let tolerance = if is_quantised(layer.k.element) { VERIFY_TOLERANCE_QUANTISED } else { VERIFY_TOLERANCE };
        if error <= tolerance {
            Ok((capture, error))
        } else {
            Err(format!("its captured K, Q and V do not give the op's output (relative error {error:.3})"))
        }
    }

    /// Where an indexable layer's F16 K and V are, prefix token t in cell t, if not in memory of the host.
    pub fn device_rows(&self, number: u32) -> Option<[Array; 2]> {
        let layer = self.layers.get(&number)?;
        // SAFETY: the cache's tensors belong to the context, which owns this capture.
        unsafe { Some([self.device_array(&layer.k)?, self.device_array(&layer.v)?]) }
    }

    /// # Safety
    /// The cache is alive.
    unsafe fn device_array(&self, r: &Rows) -> Option<Array> {
        // SAFETY: by contract; an allocated tensor has a buffer.
        let (root, is_host) = unsafe { (&*r.root, sys::ggml_backend_buffer_is_host((*r.root).buffer)) };
        (!is_host && r.element == Element::F16).then(|| Array {
            data: root.data.cast::<u8>().wrapping_add(r.offset),
            ne: [r.head_dim, self.n_prefix, r.n_head, 1],
            nb: [2, r.cell_bytes, r.head_bytes, self.n_prefix * r.cell_bytes],
        })
    }

    /// `[P][n_head][head_dim]`, in the plain basis: `block` is that of the rows.
    unsafe fn read_rows(&self, r: &Rows, block: usize) -> Vec<f16> {
        let mut bytes = vec![0u8; self.n_prefix * r.cell_bytes];
        let size = r.element.row_bytes(r.head_dim);
        let last = (self.n_prefix - 1) * r.cell_bytes + (r.n_head - 1) * r.head_bytes + size;
        // SAFETY: cells 0..P of the view that the op used; `last` bytes are no more than the tensor has from there.
        unsafe { sys::ggml_backend_tensor_get(r.root, bytes.as_mut_ptr().cast(), r.offset, last) };
        let mut out = Vec::with_capacity(self.n_prefix * r.n_head * r.head_dim);
        let mut plain = vec![0.0; r.head_dim];
        for cell in 0..self.n_prefix {
            for head in 0..r.n_head {
                let at = cell * r.cell_bytes + head * r.head_bytes;
                Row { bytes: &bytes[at..at + size], element: r.element }.decode(0, &mut plain);
                rotate(&mut plain, block);
                out.extend(plain.iter().map(|x| f16::from_f32(*x)));
            }
        }
        out
    }
}

/// Exact attention of one head of the last prefix token over the captured keys and values, `[head_dim_v]`.
fn attend_last(c: &LayerCapture, layer: &Layer, head: usize) -> Vec<f32> {
    let (dk, dv, n_kv) = (c.head_dim_k as usize, c.head_dim_v as usize, c.n_head_kv as usize);
    let (kv, n_prefix) = (head / c.n_group as usize, c.k.len() / (n_kv * dk));
    let q = &c.q[c.q.len() - (layer.n_head - head) * dk..][..dk];
    let score = |t: usize| {
        let k = &c.k[(t * n_kv + kv) * dk..][..dk];
        let dot: f32 = q.iter().zip(k).map(|(a, b)| a * b.to_f32()).sum();
        match layer.softcap {
            cap if cap > 0.0 => cap * (dot * c.scale / cap).tanh(),
            _ => dot * c.scale,
        }
    };
    let scores: Vec<f32> = (0..n_prefix).map(score).collect();
    let sink = layer.sinks.get(head).copied().unwrap_or(f32::NEG_INFINITY);
    let max = scores.iter().copied().fold(sink, f32::max);
    let mut sum = f64::from((sink - max).exp());
    let mut acc = vec![0.0f64; dv];
    for (t, s) in scores.iter().enumerate() {
        let p = f64::from((s - max).exp());
        sum += p;
        let v = &c.v[(t * n_kv + kv) * dv..][..dv];
        acc.iter_mut().zip(v).for_each(|(a, x)| *a += p * x.to_f64());
    }
    acc.iter().map(|a| (a / sum) as f32).collect()
}

/// |a - b| / |b|, infinite if the shapes differ or something is not a number.
fn relative_error(a: &[f32], b: &[f32]) -> f32 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(x, y)| square(x - y)).sum();
    let norm: f64 = b.iter().map(|y| square(*y)).sum();
    let error = (difference / norm.max(1e-30)).sqrt() as f32;
    if a.len() != b.len() || error.is_nan() {
        return f32::INFINITY;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error_tells_equal_scaled_and_broken() {
        assert_eq!(relative_error(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert!((relative_error(&[3.3, 4.4], &[3.0, 4.0]) - 0.1).abs() < 1e-6);
        assert_eq!(relative_error(&[3.0], &[3.0, 4.0]), f32::INFINITY);
        assert_eq!(relative_error(&[f32::NAN, 4.0], &[3.0, 4.0]), f32::INFINITY);
    }

    #[test]
    fn nothing_captured_is_an_error_that_names_the_remedy() {
        let error = Capture::new(1000, 100).finish().unwrap_err().to_string();
        assert!(error.contains("-fa on"), "{error}");
    }
}
