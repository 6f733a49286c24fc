//! What an index holds: owned parts (made by `build`, eaten by the writer) and borrowed views (given by the reader,
//! eaten by `attention`). Knows nothing of files, ggml or kernels.

use half::f16;

/// Version of the file layout; a reader refuses any other.
pub const FORMAT_VERSION: u32 = 5;

/// Largest relative distance (L2, in units of the row's norm, at least a quarter of the usual norm) between a prefix token's
/// sketch and the cache row that is taken for it. Two tokens or positions of a prefix must be at least twice as far apart.
pub const SKETCH_TOLERANCE: f32 = 0.03;

/// The same where the sketch is of a later layer than 0, whose rows carry the rounding of the layers below: of V rows. K rows
/// may be half as far away.
pub const LATER_TOLERANCE: f32 = 0.2;

/// No index may ask for more: with a tolerance near 1 it could be bound to any text.
pub const MAX_SKETCH_TOLERANCE: f32 = 0.1;

/// Distances of K and of V rows that a sketch of that layer and tolerance takes for rounding.
pub fn tolerances(layer: u32, tolerance: f32) -> [f32; 2] {
    [if layer == 0 { tolerance } else { tolerance / 2.0 }, tolerance]
}

/// Most elements of K, and of V, that a sketch keeps per token.
pub const MAX_SKETCH: u32 = 64;

/// Elements that one peak of a sketch stands for: ggml's quantised cache types have one scale per so many.
pub const PEAK_RUN: usize = 32;

/// The run of `PEAK_RUN` elements, out of the `n_run` of a row, that peak `i` of `n_peak` belongs to: spread evenly.
pub fn peak_run(i: usize, n_peak: usize, n_run: usize) -> usize {
    i * n_run / n_peak.max(1)
}

/// Which model the index was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    pub architecture: String,
    pub name: String,
    /// SHA-256 over the GGUF's metadata and a sample of its tensor data; identifies weights and quantisation.
    pub fingerprint: [u8; 32],
}

/// RoPE settings in force when the keys were captured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// `llama_rope_type`.
    pub kind: i32,
    pub freq_base: f32,
    pub freq_scale: f32,
}

/// How the index was built.
#[derive(Clone, Debug, PartialEq)]
pub struct BuildSettings {
    pub seed: u64,
    pub iterations: u32,
    /// Fine clusters as a share of the clustered keys (0.05).
    pub cluster_share: f32,
    /// `raw`, `system` or `user`.
    pub chat: String,
    /// Types of the K and V cache that keys and values were captured from, by ggml's names.
    pub cache_types: [String; 2],
    /// Version of the program that wrote the file.
    pub builder: String,
}

/// One row of the calibration table: what a nominal share does on the window's queries. Masses are exact: of all sinks and
/// clustered keys, without a soft-cap.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Nominal share of the prefix keys.
    pub budget: f32,
    /// T: clusters whose group-mean probability per key is at least this are kept.
    pub threshold: f32,
    /// Share of the keys that T really keeps, mean over layers, KV heads and queries.
    pub kept: f32,
    /// Share of the prefix's attention mass on them, likewise.
    pub mass: f32,
    /// Of each KV head of each indexed layer, in the order of `IndexParts::layers`.
    pub heads: Vec<HeadShares>,
}

/// What one KV head does at a nominal share, mean over the window's queries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadShares {
    /// Share of the keys kept in threshold mode.
    pub kept: f32,
    /// Share of the attention mass on them.
    pub mass: f32,
    /// Share of the attention mass on the keys kept in budget mode.
    pub budget_mass: f32,
}

/// One row of mass mode's table: the estimate to stop at, so that on the window's queries the kept keys hold a share of
/// the attention mass, on average over layers, KV heads and queries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MassTarget {
    /// The true share, above 0 and below 1.
    pub mass: f32,
    /// The estimated one.
    pub target: f32,
    /// Share of the keys kept.
    pub kept: f32,
}

/// Everything about an index that is not a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexMeta {
    pub model: ModelId,
    pub rope: Rope,
    /// Number of layers of the model (indexed or not).
    pub n_layer: u32,
    /// Token ids of the prefix; their number is P.
    pub tokens: Vec<i32>,
    /// S: first tokens of the prefix, never clustered.
    pub n_sink: u32,
    /// W: last tokens of the prefix, never clustered, part of the tail online.
    pub n_window: u32,
    pub build: BuildSettings,
    /// Ascending by budget.
    pub calibration: Vec<Calibration>,
    /// Ascending by mass.
    pub mass_targets: Vec<MassTarget>,
    /// Layers that have a KV cache but stay dense, with the reason, for people.
    pub dense_layers: Vec<(u32, String)>,
    /// Its clusters are made up: good for speed figures, and for nothing else. The file then has a `general.type` of its own.
    pub synthetic: bool,
}

impl IndexMeta {
    /// P.
    pub fn n_prefix(&self) -> usize {
        self.tokens.len()
    }
    /// N = P - S - W, the clustered keys per layer and KV head.
    pub fn n_clustered(&self) -> usize {
        self.tokens.len() - self.n_sink as usize - self.n_window as usize
    }
}

/// Shape of one indexed layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerShape {
    /// Layer number in the model (`cache_k_l<layer>`).
    pub layer: u32,
    pub n_head_kv: u32,
    /// Query heads per KV head.
    pub n_group: u32,
    pub head_dim_k: u32,
    pub head_dim_v: u32,
    /// C, fine clusters per KV head.
    pub n_cluster: u32,
    /// Coarse clusters per KV head; 0: the index has no hierarchy.
    pub n_coarse: u32,
    /// Softmax scale of the attention op.
    pub scale: f32,
}

impl LayerShape {
    /// Bytes of K and V of this layer for `n_prefix` tokens in an F16 cache: what an index's size is measured against.
    pub fn cache_bytes(&self, n_prefix: usize) -> u64 {
        let row = u64::from(self.n_head_kv) * (u64::from(self.head_dim_k) + u64::from(self.head_dim_v));
        2 * row * n_prefix as u64
    }
}

/// One indexed layer, owned. Row-major, KV head outermost.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerParts {
    pub shape: LayerShape,
    /// `[n_head_kv][C][head_dim_k]`, mean of the raw keys.
    pub centroids: Vec<f16>,
    /// `[n_head_kv][C][head_dim_v]`, mean of the values.
    pub mean_values: Vec<f16>,
    /// `[n_head_kv][C][head_dim_k]`: variance of dimension d is `variances * variance_scales`.
    pub variances: Vec<u8>,
    /// `[n_head_kv][C]`.
    pub variance_scales: Vec<f32>,
    /// `[n_head_kv][C]`: square root of the mean over dimensions of the variance.
    pub radii: Vec<f32>,
    /// `[n_head_kv][C + 1]`: members of cluster i are `offsets[i]..offsets[i + 1]`; strictly increasing, from 0 to N.
    pub offsets: Vec<u32>,
    /// `[n_head_kv][N]`: token numbers in the prefix, a permutation of `S..P-W`, ascending inside a cluster.
    pub members: Vec<u32>,
    /// `[n_head_kv][Cc][head_dim_k]`: [`LayerView::coarse_means`] of the rest, which no file holds; empty without hierarchy.
    pub coarse_centroids: Vec<f16>,
    /// `[n_head_kv][Cc + 1]`: fine clusters of coarse cluster i; strictly increasing, from 0 to C; empty without hierarchy.
    pub coarse_offsets: Vec<u32>,
}

/// Fingerprint of every prefix token in the cache: some raw elements of its K and V row in one layer, and for quantised
/// caches, whose elements are too coarse to tell tokens apart, some peaks.
///
/// A peak is the largest magnitude in a run of 32 elements ([`peak_run`]) of the row in the basis of a quantised cache: each
/// block of `k_block` or `v_block` elements multiplied by the Hadamard matrix. The scale of a quantised run gives it exactly.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SketchParts {
    pub layer: u32,
    /// Largest relative distance of elements that is taken for rounding, see [`tolerances`]: above 0, at most
    /// [`MAX_SKETCH_TOLERANCE`] or, in a later layer, [`LATER_TOLERANCE`].
    pub tolerance: f32,
    /// Elements of the whole K row (`n_head_kv * head_dim_k`) that are kept, ascending.
    pub k_dims: Vec<u32>,
    pub v_dims: Vec<u32>,
    /// `[P][k_dims.len()]`.
    pub k: Vec<f16>,
    /// `[P][v_dims.len()]`.
    pub v: Vec<f16>,
    /// Elements that llama.cpp mixes with each other before it quantises a K row: a power of two that divides the head size;
    /// 0: it mixes none.
    pub k_block: u32,
    pub v_block: u32,
    /// `[P][n]`, at least one per token, at most one per run.
    pub k_peaks: Vec<f16>,
    pub v_peaks: Vec<f16>,
}

/// Whole raw K rows of later layers, compared with a tolerance: another model, a LoRA or a control vector shows here.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeParts {
    pub layer: u32,
    pub tokens: Vec<u32>,
    /// `[tokens.len()][n_head_kv * head_dim_k]`.
    pub k: Vec<f16>,
}

/// A whole index, owned: what `build` makes and `write` stores.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexParts {
    pub meta: IndexMeta,
    /// Ascending by layer number.
    pub layers: Vec<LayerParts>,
    pub sketch: SketchParts,
    pub probes: Vec<ProbeParts>,
}

/// Member list in the smallest type that fits.
#[derive(Clone, Copy, Debug)]
pub enum Members<'a> {
    U16(&'a [u16]),
    U32(&'a [u32]),
}

impl<'a> Members<'a> {
    #[inline]
    pub fn get(&self, i: usize) -> u32 {
        match self {
            Members::U16(m) => m[i] as u32,
            Members::U32(m) => m[i],
        }
    }
    pub fn len(&self) -> usize {
        match self {
            Members::U16(m) => m.len(),
            Members::U32(m) => m.len(),
        }
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Members `range` alone.
    pub fn part(&self, range: std::ops::Range<usize>) -> Members<'a> {
        match self {
            Members::U16(m) => Members::U16(&m[range]),
            Members::U32(m) => Members::U32(&m[range]),
        }
    }
    /// Address of member i, for a prefetch; i need not be one.
    #[inline]
    pub fn address(&self, i: usize) -> *const u8 {
        match self {
            Members::U16(m) => m.as_ptr().wrapping_add(i).cast(),
            Members::U32(m) => m.as_ptr().wrapping_add(i).cast(),
        }
    }
}

/// One indexed layer, borrowed from an open index. Layouts as in [`LayerParts`]; every invariant there holds.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    pub shape: LayerShape,
    pub centroids: &'a [f16],
    pub mean_values: &'a [f16],
    pub variances: &'a [u8],
    pub variance_scales: &'a [f32],
    pub radii: &'a [f32],
    pub offsets: &'a [u32],
    pub members: Members<'a>,
    pub coarse_centroids: &'a [f16],
    pub coarse_offsets: &'a [u32],
}

impl<'a> LayerView<'a> {
    /// Offsets of one KV head, `C + 1` numbers.
    #[inline]
    pub fn head_offsets(&self, head_kv: usize) -> &'a [u32] {
        let n = self.shape.n_cluster as usize + 1;
        &self.offsets[head_kv * n..(head_kv + 1) * n]
    }
    /// Fine clusters' bounds of one KV head's coarse clusters, `Cc + 1` numbers. There must be a coarse level.
    #[inline]
    pub fn head_coarse_offsets(&self, head_kv: usize) -> &'a [u32] {
        let n = self.shape.n_coarse as usize + 1;
        &self.coarse_offsets[head_kv * n..(head_kv + 1) * n]
    }
    /// Keys before each of one KV head's coarse clusters, `Cc + 1` numbers. There must be a coarse level.
    pub fn head_coarse_keys(&self, head_kv: usize) -> Vec<u32> {
        let offsets = self.head_offsets(head_kv);
        self.head_coarse_offsets(head_kv).iter().map(|i| offsets[*i as usize]).collect()
    }
    /// N, clustered keys per KV head.
    #[inline]
    pub fn n_clustered(&self) -> usize {
        self.members.len() / self.shape.n_head_kv as usize
    }
    /// Members of one KV head's clusters.
    #[inline]
    pub fn head_members(&self, head_kv: usize) -> Members<'a> {
        let n = self.n_clustered();
        self.members.part(head_kv * n..(head_kv + 1) * n)
    }
    /// Token number of the `j`th member slot of one KV head.
    #[inline]
    pub fn member(&self, head_kv: usize, j: usize) -> u32 {
        self.members.get(head_kv * self.n_clustered() + j)
    }
}

/// Sketch, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct SketchView<'a> {
    pub layer: u32,
    pub tolerance: f32,
    pub k_dims: &'a [u32],
    pub v_dims: &'a [u32],
    pub k: &'a [f16],
    pub v: &'a [f16],
    pub k_block: u32,
    pub v_block: u32,
    pub k_peaks: &'a [f16],
    pub v_peaks: &'a [f16],
}

/// Probe rows, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct ProbeView<'a> {
    pub layer: u32,
    pub tokens: &'a [u32],
    pub k: &'a [f16],
}

impl SketchParts {
    /// The same sketch as a view.
    pub fn view(&self) -> SketchView<'_> {
        SketchView {
            layer: self.layer,
            tolerance: self.tolerance,
            k_dims: &self.k_dims,
            v_dims: &self.v_dims,
            k: &self.k,
            v: &self.v,
            k_block: self.k_block,
            v_block: self.v_block,
            k_peaks: &self.k_peaks,
            v_peaks: &self.v_peaks,
        }
    }
}

impl LayerParts {
    /// The same layer as a view (members as 32 bit), so that `build` and tests can use what reads views.
    pub fn view(&self) -> LayerView<'_> {
        LayerView {
            shape: self.shape,
            centroids: &self.centroids,
            mean_values: &self.mean_values,
            variances: &self.variances,
            variance_scales: &self.variance_scales,
            radii: &self.radii,
            offsets: &self.offsets,
            members: Members::U32(&self.members),
            coarse_centroids: &self.coarse_centroids,
            coarse_offsets: &self.coarse_offsets,
        }
    }
}
