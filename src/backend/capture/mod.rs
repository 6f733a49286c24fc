//! Takes what an index is made of out of a running llama.cpp: while the prefix is decoded, an eval callback looks at every
//! attention op (mask, the queries of the last tokens); afterwards K and V are read from the cache, layer by layer.

mod verify;

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;

use ggml_sys as sys;
use ggml_sys::Api;
use half::f16;
use rayon::prelude::*;

use super::rows::{is_quantised, Row};
use super::tensor::element_of;
use crate::attention::{Array, Element};
use crate::build::{cache_blocks, LayerCapture};
use crate::hadamard::rotate;
use crate::index::Rope;
use verify::{tolerance, Seen};

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
    /// As its keys were turned; none where no such op was seen before it.
    rope: Option<Rope>,
    sinks: Vec<f32>,
    /// `[W][n_head][head_dim_k]`.
    q: Vec<f32>,
    /// Output of the last prefix token, `[n_head][head_dim_v]`, and the query rows of its op.
    last_output: Vec<f32>,
    last_rows: usize,
    /// Why the layer is not indexed.
    dense: Option<String>,
}

/// The prefix's tokens, and how far graphs have come with them: for hosts that do not say which tokens a graph has.
struct Follow {
    tokens: Vec<i32>,
    /// Tokens in graphs that are done.
    done: usize,
    /// The table that token embeddings are taken from, once it was seen: it marks the begin of a graph.
    table: usize,
    /// Has an attention op of the present graph been seen?
    attended: bool,
}

/// What was seen of a prefix so far; the scheduler's callback hands it every tensor.
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
    /// The last one seen.
    rope: Option<Rope>,
    /// Nothing is looked at any more, and graphs are computed in one go again.
    ended: bool,
    follow: Option<Follow>,
    problem: Option<CaptureError>,
}

/// What keeps a prefix from being captured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    #[error("{0}")]
    Host(String),
    #[error(
        "flash attention is off or not supported by this model: no FLASH_ATTN_EXT op ran, and there is nothing to make faster. \
         Use -fa on (or auto); a model that llama.cpp runs without flash attention cannot be indexed"
    )]
    NoFlashAttention,
    #[error("no layer of this model can be indexed; layer {layer}: {why}")]
    NoLayer { layer: u32, why: String },
    #[error(
        "no attention op of this model reads a KV cache (a recurrent or encoder model, or a cache of type f32, which llama.cpp \
         turns to F16 in every graph: use f16)"
    )]
    NoCache,
    #[error(
        "{seen} of the {n_prefix} tokens of the prefix were decoded: decode them all, from position 0 on, in order, as one \
         sequence that is alone in the cache, then build"
    )]
    Unseen { seen: usize, n_prefix: usize },
}

// SAFETY: addresses of a context's cache, followed only while the owner promises that the context is alive and idle.
unsafe impl Send for Capture {}

/// All bytes of a plain tensor from its first to its last element, wherever it lies.
///
/// # Safety
/// `t` is live, has data, and is no view whose steps go backwards.
unsafe fn bytes_of(t: &sys::ggml_tensor, api: &Api) -> Vec<u8> {
    // SAFETY: a type of a live tensor.
    let size = unsafe { (api.ggml_type_size)(t.type_) };
    let steps = t.ne.iter().zip(t.nb).map(|(n, nb)| (*n as usize).saturating_sub(1) * nb);
    let mut out = vec![0u8; size + steps.sum::<usize>()];
    // SAFETY: by contract; no more than the tensor has.
    unsafe { (api.ggml_backend_tensor_get)(t, out.as_mut_ptr().cast(), 0, out.len()) };
    out
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

/// Does the tensor look up the embeddings of a batch's tokens?
fn is_token_lookup(t: &sys::ggml_tensor) -> bool {
    if t.op != sys::GGML_OP_GET_ROWS || t.src[1].is_null() {
        return false;
    }
    // SAFETY: a source of a live tensor; names are NUL-terminated. A scheduler's copy has the name within its own.
    let (ids, name) = unsafe { (&*t.src[1], CStr::from_ptr((*t.src[1]).name.as_ptr())) };
    let vector = ids.type_ == sys::GGML_TYPE_I32 && ids.nb[0] == 4 && ids.ne[1..].iter().all(|n| *n == 1);
    vector && name.to_string_lossy().contains("inp_tokens")
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
    /// For a host that calls [`Capture::begin`] before each graph.
    pub fn new(n_prefix: usize, n_window: usize) -> Capture {
        let (masks, layers) = (HashMap::new(), BTreeMap::new());
        let (first, n, n_op, rope, ended) = (0, 0, 0, None, false);
        Capture { n_prefix, n_window, first, n, masks, layers, n_op, rope, ended, follow: None, problem: None }
    }

    /// For any host: which tokens a graph has is read from the graph. Others than the next ones of the prefix are not looked at,
    /// its first ones begin anew.
    pub fn following(tokens: Vec<i32>, n_window: usize) -> Capture {
        let n_prefix = tokens.len();
        let follow = Some(Follow { tokens, done: 0, table: 0, attended: false });
        Capture { follow, ..Capture::new(n_prefix, n_window) }
    }

    /// What llama.cpp's scheduler asks of an eval callback: with `ask`, whether the tensor is of interest; without, it has just
    /// been computed, and the answer is whether to go on.
    ///
    /// # Safety
    /// `t` is a live tensor of the graph that is being computed, and without `ask` its data are there.
    pub unsafe fn on_eval(&mut self, t: *const sys::ggml_tensor, ask: bool) -> bool {
        // SAFETY: live by contract.
        let Some(t) = (unsafe { t.as_ref() }) else { return true };
        if t.op == sys::GGML_OP_ROPE && ask && !self.ended {
            // op_params of the op: mode at 2; base and factor of the frequency at 5 and 6
            let float = |i: usize| f32::from_bits(t.op_params[i] as u32);
            self.rope = Some(Rope { kind: t.op_params[2], freq_base: float(5), freq_scale: float(6) });
        }
        let begins = self.follow.is_some() && is_token_lookup(t);
        if self.ended || !(begins || t.op == sys::GGML_OP_FLASH_ATTN_EXT) {
            return !ask;
        }
        if !ask {
            match Api::of_process() {
                // SAFETY: the op has just been computed, so it and its sources hold their values.
                Ok(api) => unsafe {
                    if begins {
                        self.follow(t, api);
                    } else {
                        self.see(t, api);
                    }
                },
                Err(error) => {
                    self.problem = Some(CaptureError::Host(error));
                    self.ended = true;
                }
            }
        }
        true
    }

    /// Learns from the look-up of token embeddings which tokens the graph has.
    unsafe fn follow(&mut self, lookup: &sys::ggml_tensor, api: &Api) {
        let Some(follow) = &mut self.follow else { return };
        if follow.table == 0 {
            follow.table = lookup.src[0] as usize;
        }
        if follow.table != lookup.src[0] as usize {
            return;
        }
        if std::mem::take(&mut follow.attended) {
            follow.done = self.first + self.n;
        }
        if follow.done >= self.n_prefix {
            self.ended = true;
            return;
        }
        // SAFETY: the numbers that were looked up, an I32 vector.
        let bytes = unsafe { bytes_of(&*lookup.src[1], api) };
        let ids: Vec<i32> = bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let fits = |from: usize| follow.tokens[from..].iter().zip(&ids).all(|(a, b)| a == b);
        let (first, n) = match (fits(follow.done), fits(0)) {
            (true, _) => (follow.done, ids.len()),
            (false, true) => (0, ids.len()),
            (false, false) => (follow.done, 0),
        };
        if first == 0 {
            self.layers.clear();
            follow.done = 0;
        }
        self.begin(first, n);
    }

    /// Prefix tokens that were seen, in order, from the first on.
    fn n_seen(&self) -> usize {
        (self.first + self.n).min(self.n_prefix)
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
    unsafe fn check_mask(&mut self, mask: *const sys::ggml_tensor, api: &Api) -> Option<String> {
        if mask.is_null() {
            return Some("no mask".into());
        }
        if let Some(known) = self.masks.get(&(mask as usize)) {
            return known.clone();
        }
        // SAFETY: the caller has just seen the op that reads it.
        let (m, bytes) = unsafe { (&*mask, bytes_of(&*mask, api)) };
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

    unsafe fn see(&mut self, op: &sys::ggml_tensor, api: &Api) {
        self.n_op += 1;
        if let Some(follow) = &mut self.follow {
            if self.n == 0 {
                return;
            }
            follow.attended = true;
        }
        // SAFETY: FLASH_ATTN_EXT always has Q, K and V.
        let (q, k, v) = unsafe { (&*op.src[0], &*op.src[1], &*op.src[2]) };
        // SAFETY: live tensors.
        let ((k_root, k_name), (v_root, v_name)) = unsafe { (root_of(k), root_of(v)) };
        let Some(number) = k_name.strip_prefix("cache_k_l").and_then(|n| n.parse::<u32>().ok()) else { return };
        // SAFETY: the mask is a source of the op.
        let mask_problem = unsafe { self.check_mask(op.src[3], api) };
        let param = |i: usize| f32::from_bits(op.op_params[i] as u32);
        let (k_type, v_type) = (element_of(k.type_), element_of(v.type_));
        let (dims, n_head) = ((q.ne[0] as usize, v.ne[0] as usize), q.ne[2] as usize);
        let (n_prefix, n_window, rope) = (self.n_prefix, self.n_window, self.rope);
        let layer = self.layers.entry(number).or_insert_with(|| Layer {
            k: rows(k_root, k, k_type),
            v: rows(v_root, v, v_type),
            n_head,
            scale: param(0),
            softcap: param(2),
            rope,
            sinks: Vec::new(),
            q: vec![0.0; n_window * n_head * dims.0],
            last_output: Vec::new(),
            last_rows: 0,
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
        let (q_bytes, out) = unsafe { (bytes_of(q, api), bytes_of(op, api)) };
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
                layer.last_rows = self.n;
                layer.last_output = (0..n_head * dims.1).map(|i| at(i / dims.1, i % dims.1)).collect();
                if !op.src[4].is_null() {
                    // SAFETY: as above.
                    let sinks = unsafe { bytes_of(&*op.src[4], api) };
                    layer.sinks = (0..n_head).map(|h| f32_at(&sinks, h * 4)).collect();
                }
            }
        }
    }

    /// After the prefix: numbers of the layers that can be indexed, and the others with the reason.
    ///
    /// # Errors
    /// No attention op was seen at all, or none reads a cache, or no layer is left, or (where graphs are followed) not all of
    /// the prefix was seen.
    pub fn finish(&self) -> Result<(Vec<u32>, DenseLayers), CaptureError> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone());
        }
        if self.n_op == 0 {
            return Err(CaptureError::NoFlashAttention);
        }
        if self.follow.is_some() && self.n_seen() < self.n_prefix {
            return Err(CaptureError::Unseen { seen: self.n_seen(), n_prefix: self.n_prefix });
        }
        let dense: DenseLayers = self.layers.iter().filter_map(|(n, l)| l.dense.clone().map(|why| (*n, why))).collect();
        let good: Vec<u32> = self.layers.iter().filter(|(_, l)| l.dense.is_none()).map(|(n, _)| *n).collect();
        if good.is_empty() {
            return Err(match dense.into_iter().next() {
                Some((layer, why)) => CaptureError::NoLayer { layer, why },
                None => CaptureError::NoCache,
            });
        }
        Ok((good, dense))
    }

    /// Reads K and V of an indexable layer out of the cache (the context must be alive) and checks them: attention of the
    /// last token over them must give what the op gave. The relative error comes back too.
    pub fn read(&self, number: u32) -> Result<(LayerCapture, f32), String> {
        let api = Api::of_process()?;
        let layer = self.layers.get(&number).ok_or("it was not seen")?;
        let blocks = cache_blocks(layer.k.head_dim as u32, layer.v.head_dim as u32);
        let block = |element, block: u32| if is_quantised(element) { block as usize } else { 0 };
        let (k_block, v_block) = (block(layer.k.element, blocks.0), block(layer.v.element, blocks.1));
        // SAFETY: the cache belongs to the context, which owns this capture and is idle.
        let (k, v) = unsafe { (self.read_rows(&layer.k, k_block, api), self.read_rows(&layer.v, v_block, api)) };
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
        let sinks = &layer.sinks;
        let seen = Seen { n_head: layer.n_head, softcap: layer.softcap, sinks, output: &last_output };
        let error = seen.error(&capture);
        if error <= tolerance(layer.last_rows) {
            Ok((capture, error))
        } else {
            Err(format!("its captured K, Q and V do not give the op's output (relative error {error:.3})"))
        }
    }

    /// RoPE of a layer's keys, and the types of its K and V cache.
    pub fn settings(&self, number: u32) -> Option<(Option<Rope>, [Element; 2])> {
        self.layers.get(&number).map(|l| (l.rope, [l.k.element, l.v.element]))
    }

    /// Where an indexable layer's F16 K and V are, prefix token t in cell t, if not in memory of the host.
    pub fn device_rows(&self, number: u32) -> Option<[Array; 2]> {
        let (api, layer) = (Api::of_process().ok()?, self.layers.get(&number)?);
        // SAFETY: the cache's tensors belong to the context, which is alive.
        unsafe { Some([self.device_array(&layer.k, api)?, self.device_array(&layer.v, api)?]) }
    }

    /// # Safety
    /// The cache is alive.
    unsafe fn device_array(&self, r: &Rows, api: &Api) -> Option<Array> {
        // SAFETY: by contract; an allocated tensor has a buffer.
        let (root, is_host) = unsafe { (&*r.root, (api.ggml_backend_buffer_is_host)((*r.root).buffer)) };
        (!is_host && r.element == Element::F16).then(|| Array {
            data: root.data.cast::<u8>().wrapping_add(r.offset),
            ne: [r.head_dim, self.n_prefix, r.n_head, 1],
            nb: [2, r.cell_bytes, r.head_bytes, self.n_prefix * r.cell_bytes],
        })
    }

    /// `[P][n_head][head_dim]`, in the plain basis: `block` is that of the rows.
    unsafe fn read_rows(&self, r: &Rows, block: usize, api: &Api) -> Vec<f16> {
        let size = r.element.row_bytes(r.head_dim);
        let last = (self.n_prefix - 1) * r.cell_bytes + (r.n_head - 1) * r.head_bytes + size;
        let mut out = vec![f16::ZERO; self.n_prefix * r.n_head * r.head_dim];
        let plain = r.element == Element::F16 && block == 0;
        let packed = r.head_bytes == size && r.cell_bytes == r.n_head * size;
        if plain && packed && cfg!(target_endian = "little") {
            // SAFETY: cells 0..P of the view that the op used, which are packed; `last` bytes are no more than the tensor has from there.
            unsafe { (api.ggml_backend_tensor_get)(r.root, out.as_mut_ptr().cast(), r.offset, last) };
            return out;
        }
        let mut bytes = vec![0u8; last];
        // SAFETY: as above.
        unsafe { (api.ggml_backend_tensor_get)(r.root, bytes.as_mut_ptr().cast(), r.offset, last) };
        let (element, head_dim, cell_bytes, head_bytes) = (r.element, r.head_dim, r.cell_bytes, r.head_bytes);
        out.par_chunks_exact_mut(r.n_head * head_dim).enumerate().for_each(|(cell, rows)| {
            let mut numbers = vec![0.0; head_dim];
            for (head, to) in rows.chunks_exact_mut(head_dim).enumerate() {
                let at = cell * cell_bytes + head * head_bytes;
                let row = &bytes[at..at + size];
                if plain {
                    to.iter_mut().zip(row.chunks_exact(2)).for_each(|(x, b)| *x = f16::from_le_bytes([b[0], b[1]]));
                    continue;
                }
                Row { bytes: row, element, compact: None }.decode(0, &mut numbers);
                rotate(&mut numbers, block);
                to.iter_mut().zip(&numbers).for_each(|(x, n)| *x = f16::from_f32(*n));
            }
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_captured_is_an_error_that_names_the_remedy() {
        let error = Capture::new(1000, 100).finish().unwrap_err().to_string();
        assert!(error.contains("-fa on"), "{error}");
        let error = Capture::following(vec![1; 1000], 100).finish().unwrap_err();
        assert_eq!(error, CaptureError::NoFlashAttention);
    }
}
