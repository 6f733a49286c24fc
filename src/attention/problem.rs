//! One description of an attention call, whatever the device: shapes, strides, mask, which rows are sparse and how
//! clusters are selected. Knows nothing of ggml.

use std::ops::Range;
use std::sync::Arc;

use crate::index::Index;

/// A 4-dimensional strided array in somebody else's memory, in ggml's order (dimension 0 innermost).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array {
    pub data: *mut u8,
    /// Elements per dimension.
    pub ne: [usize; 4],
    /// Bytes per step of a dimension; of a block in dimension 0 of a quantised type.
    pub nb: [usize; 4],
}

// SAFETY: a plain address and its shape; whoever dereferences it answers for the memory behind it.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

/// Element type of K or V, in ggml's layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Element {
    F32,
    F16,
    BF16,
    /// Blocks of 32: an F16 scale `d`, then 32 signed bytes `q`; the value is `d q`.
    Q8_0,
    /// Blocks of 32: an F16 scale `d`, then 16 bytes; low halves are elements 0 to 15, high halves 16 to 31; `d (q - 8)`.
    Q4_0,
}

impl Element {
    /// Every type.
    pub const ALL: [Element; 5] = [Element::F32, Element::F16, Element::BF16, Element::Q8_0, Element::Q4_0];

    /// Elements per block; 1 for plain numbers.
    pub const fn block(self) -> usize {
        match self {
            Element::F32 | Element::F16 | Element::BF16 => 1,
            Element::Q8_0 | Element::Q4_0 => 32,
        }
    }
    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
            Element::Q8_0 => 34,
            Element::Q4_0 => 18,
        }
    }
    /// Bytes of a row of `n` elements (a multiple of the block).
    pub const fn row_bytes(self, n: usize) -> usize {
        n / self.block() * self.block_bytes()
    }
    /// ggml's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
            Element::Q8_0 => "q8_0",
            Element::Q4_0 => "q4_0",
        }
    }
}

/// Basis of a cache: llama.cpp multiplies each block of this many elements of K (and Q) or of V by the orthonormal Hadamard
/// matrix (Sylvester's order, its own inverse) where the cache is quantised. 0: the plain basis, that of the index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    pub k: usize,
    pub v: usize,
}

/// One flash-attention call: `dst = softmax(softcap(scale * q k^T) + mask) v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    /// F32 `[head_dim_k, n_query, n_head, n_stream]`.
    pub q: Array,
    /// `k_type` `[head_dim_k, n_kv, n_head_kv, n_stream]`.
    pub k: Array,
    /// `v_type` `[head_dim_v, n_kv, n_head_kv, n_stream]`.
    pub v: Array,
    pub k_type: Element,
    pub v_type: Element,
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
    /// Until the estimated share of the prefix's mass (sinks counted, by the selection scores) reaches this. An index maps true
    /// shares to such estimates.
    Mass(f32),
}

/// How clusters are selected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Selection {
    pub mode: Mode,
    pub spread: Spread,
    /// `a`, the weight of the spread bonus (2).
    pub alpha: f32,
    /// Add `n_i exp(s q.c_i)` with the mean value for every dropped cluster (of those looked into, with a coarse level).
    pub estimate: bool,
    /// Coarse level: fine clusters are scored only in the best coarse clusters that hold this share of the `P - W` prefix keys
    /// (sinks counted), or the share of the budget or floor if that is more. At 1, or in a layer without a coarse level, in
    /// all of them. The CPU path always scores all.
    pub coarse_share: f32,
}

impl Selection {
    /// Share of the `P - W` prefix keys whose coarse clusters are looked into; 1 or more: there is no coarse step.
    pub fn opened_share(&self) -> f32 {
        match self.mode {
            Mode::Budget(share) => self.coarse_share.max(share),
            Mode::Threshold { floor, .. } => self.coarse_share.max(floor),
            Mode::Mass(_) => self.coarse_share,
        }
    }
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
    /// Basis of K, Q and V, that of the output being V's. Means something to sparse rows only.
    pub rotation: Rotation,
    /// Runs of two or more consecutive sparse rows of one stream and one binding that share a selection, ascending. A row
    /// in none of them selects for itself, as at decode.
    pub tiles: Arc<[Range<usize>]>,
}

impl Call {
    /// The rows that share a selection with a sparse row: its tile, or itself alone.
    pub fn tile_of(&self, row: usize) -> Range<usize> {
        self.tiles.iter().find(|tile| tile.contains(&row)).cloned().unwrap_or(row..row + 1)
    }
}

/// Runs of consecutive sparse rows of one stream and one binding, without those of one row.
pub fn runs(rows: &[Row], n_query: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (row, kind) in rows.iter().enumerate().filter(|(_, kind)| **kind != Row::Dense) {
        match runs.last_mut() {
            Some(run) if run.end == row && row % n_query.max(1) != 0 && rows[run.start] == *kind => run.end += 1,
            _ => runs.push(row..row + 1),
        }
    }
    runs.retain(|run| run.len() > 1);
    runs
}

/// Cuts a run into as few tiles of at most `tile` rows as there can be, of equal length but for one row. What would be a
/// tile of one row is left out.
pub fn cut(run: Range<usize>, tile: usize) -> impl Iterator<Item = Range<usize>> {
    let n = run.len().div_ceil(tile.max(1));
    let tiles = (0..n).map(move |i| run.start + run.len() * i / n..run.start + run.len() * (i + 1) / n);
    tiles.filter(|tile| tile.len() > 1)
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
