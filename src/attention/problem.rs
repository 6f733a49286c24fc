//! One description of an attention call, whatever the device: shapes, strides, mask, which rows are sparse and how
//! clusters are selected. Knows nothing of ggml.

use std::sync::Arc;

use crate::index::Index;

/// A 4-dimensional strided array in somebody else's memory, in ggml's order (dimension 0 innermost).
#[derive(Clone, Copy, Debug)]
pub struct Array {
    pub data: *mut u8,
    /// Elements per dimension.
    pub ne: [usize; 4],
    /// Bytes per step of a dimension.
    pub nb: [usize; 4],
}

// SAFETY: a plain address and its shape; whoever dereferences it answers for the memory behind it.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

/// One flash-attention call: `dst = softmax(softcap(scale * q k^T) + mask) v`.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// F32 `[head_dim_k, n_query, n_head, n_stream]`.
    pub q: Array,
    /// F16 `[head_dim_k, n_kv, n_head_kv, n_stream]`.
    pub k: Array,
    /// F16 `[head_dim_v, n_kv, n_head_kv, n_stream]`.
    pub v: Array,
    /// F16 `[n_kv, >= n_query, 1 or n_head, 1 or n_stream]`, added to the scaled scores; broadcast over dims 2 and 3
    /// by index modulo its extent.
    pub mask: Option<Array>,
    /// F32 `[n_head]`, contiguous: one extra score per head that takes mass and gives nothing (ggml's attention sinks).
    pub sinks: Option<*const f32>,
    /// F32 `[head_dim_v, n_head, n_query, n_stream]`.
    pub dst: Array,
    pub scale: f32,
    /// ALiBi; 0 is none. Slope per head as in ggml: the mask is multiplied by it. Only dense rows may have it.
    pub max_bias: f32,
    /// `s = softcap * tanh(s / softcap)` before the mask; 0 is none. (`scale` is then already divided by it, as the op does.)
    pub softcap: f32,
}

// SAFETY: `sinks` is an address like those in `Array`.
unsafe impl Send for Problem {}
// SAFETY: as above.
unsafe impl Sync for Problem {}

/// Bonus for wide clusters in the selection score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    None,
    /// One number per cluster: `a s |q| r_i`.
    Radius,
    /// Per-dimension variances: `a s sqrt(sum_d q_d^2 var_id)`.
    Diag,
}

/// When to stop keeping clusters (best first).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Until this share of the `P - W` prefix keys is kept, the S sinks counted; at 1 every cluster.
    Budget(f32),
    /// Every cluster whose group-mean probability per key is at least `threshold`, and the best ones until `floor` of the
    /// `P - W` keys (sinks counted) is kept.
    Threshold { threshold: f32, floor: f32 },
    /// Until the estimated share of the prefix's mass (sinks counted) reaches this.
    Mass(f32),
}

/// How clusters are selected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Selection {
    pub mode: Mode,
    pub spread: Spread,
    /// `a`, the weight of the spread bonus (2).
    pub alpha: f32,
    /// Add `n_i exp(s q.c_i)` with the mean value for every dropped cluster.
    pub estimate: bool,
}

/// An index bound to cells of one cache stream.
#[derive(Clone)]
pub struct Binding {
    pub index: Arc<Index>,
    /// `[P]`: cell of each prefix token.
    pub cells: Arc<[u32]>,
    /// Cells always attended: the S sink cells first, then every cell below n_kv that is bound to no sink and no
    /// clustered token (the tail; includes the window's cells). Masked ones are skipped by the kernel.
    pub always: Arc<[u32]>,
}

/// How one query row (row = stream * n_query + query) is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Over every cell that its mask shows.
    Dense,
    /// Through binding number n of the call.
    Sparse(u32),
}

/// One attention call with its index bindings: what a plan is made of.
#[derive(Clone)]
pub struct Call {
    pub problem: Problem,
    /// Layer number in the model.
    pub layer: u32,
    /// `[n_stream * n_query]`.
    pub rows: Arc<[Row]>,
    pub bindings: Arc<[Binding]>,
    pub selection: Selection,
}

impl Problem {
    /// Query rows: `n_stream * n_query`.
    pub fn n_row(&self) -> usize {
        self.q.ne[1] * self.q.ne[3]
    }
    /// Query heads per KV head.
    pub fn n_group(&self) -> usize {
        self.q.ne[2] / self.k.ne[2]
    }
    /// Softmax scale of the plain logits: the soft-cap's division taken back.
    pub fn logit_scale(&self) -> f32 {
        if self.softcap == 0.0 {
            self.scale
        } else {
            self.scale * self.softcap
        }
    }
    /// ALiBi slope of one head; 1 without ALiBi.
    pub fn slope(&self, head: usize) -> f32 {
        if self.max_bias == 0.0 {
            return 1.0;
        }
        let below = 1usize << self.q.ne[2].ilog2();
        if head < below {
            (-self.max_bias / below as f32).exp2().powi(head as i32 + 1)
        } else {
            (-self.max_bias / 2.0 / below as f32).exp2().powi(2 * (head - below) as i32 + 1)
        }
    }
}

/// Keys that a share of the `P - W` prefix keys stands for, sinks included; every mode and every device rounds alike.
pub fn keys_of_share(share: f32, n_prefix: usize, n_window: usize) -> usize {
    (share as f64 * (n_prefix - n_window) as f64).round() as usize
}
