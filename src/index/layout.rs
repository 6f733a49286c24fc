//! Which tensors a file holds, in which order, of which shape: all of it follows from the header.

use super::gguf::Type;
use super::types::{IndexMeta, LayerShape};

/// Shape of the sketch.
#[derive(Clone, Copy, Debug)]
pub(super) struct SketchShape {
    pub layer: u32,
    pub tolerance: f32,
    pub n_k: u32,
    pub n_v: u32,
    pub k_block: u32,
    pub v_block: u32,
    pub n_k_peak: u32,
    pub n_v_peak: u32,
}

/// Shape of the probe of one layer: `n_token` rows of `row` elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProbeShape {
    pub layer: u32,
    pub n_token: u32,
    pub row: u32,
}

/// Everything in the file that is not tensor data.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub meta: IndexMeta,
    pub shapes: Vec<LayerShape>,
    pub sketch: SketchShape,
    pub probes: Vec<ProbeShape>,
}

/// One tensor; dimension 0 is innermost, as in ggml.
pub(super) struct Spec {
    pub name: String,
    ne: [u64; 3],
    n_dims: usize,
    pub kind: Type,
}

impl Spec {
    fn new<const N: usize>(name: String, kind: Type, dims: [u64; N]) -> Spec {
        let mut ne = [1; 3];
        ne[..N].copy_from_slice(&dims);
        Spec { name, ne, n_dims: N, kind }
    }

    pub fn ne(&self) -> &[u64] {
        &self.ne[..self.n_dims]
    }

    /// Elements; None where the product overflows.
    pub fn len(&self) -> Option<u64> {
        self.ne().iter().try_fold(1u64, |product, n| product.checked_mul(*n))
    }
}

/// Tensors of one layer without a coarse level, which adds one.
pub(super) const LAYER_TENSORS: usize = 7;
pub(super) const SKETCH_TENSORS: usize = 6;
pub(super) const PROBE_TENSORS: usize = 2;

pub(super) fn layer_tensors(shape: &LayerShape) -> usize {
    LAYER_TENSORS + usize::from(shape.n_coarse > 0)
}

/// Members of this prefix are stored in 16 bits.
pub(super) fn narrow(meta: &IndexMeta) -> bool {
    meta.n_prefix() <= i16::MAX as usize
}

impl Header {
    pub fn n_tensors(&self) -> usize {
        self.shapes.iter().map(layer_tensors).sum::<usize>() + SKETCH_TENSORS + PROBE_TENSORS * self.probes.len()
    }

    /// The tensors in file order: layers, sketch, probes. Lazy, so that a hostile header costs no memory. Call it with a
    /// header that `validate::header` has passed.
    pub fn specs(&self) -> impl Iterator<Item = Spec> + '_ {
        let layers = self.shapes.iter().flat_map(|shape| self.layer_specs(shape));
        layers.chain(self.sketch_specs()).chain(self.probes.iter().flat_map(probe_specs))
    }

    fn layer_specs(&self, shape: &LayerShape) -> impl Iterator<Item = Spec> {
        let [heads, dk, dv] = [shape.n_head_kv, shape.head_dim_k, shape.head_dim_v].map(u64::from);
        let [fine, coarse] = [shape.n_cluster, shape.n_coarse].map(u64::from);
        let layer = shape.layer;
        let name = |what: &str| format!("blk.{layer}.{what}");
        let members = if narrow(&self.meta) { Type::I16 } else { Type::I32 };
        let always = [
            Spec::new(name("centroids"), Type::F16, [dk, fine, heads]),
            Spec::new(name("mean_values"), Type::F16, [dv, fine, heads]),
            Spec::new(name("variances"), Type::I8, [dk, fine, heads]),
            Spec::new(name("variance_scales"), Type::F32, [fine, heads]),
            Spec::new(name("radii"), Type::F32, [fine, heads]),
            Spec::new(name("offsets"), Type::I32, [fine + 1, heads]),
            Spec::new(name("members"), members, [self.meta.n_clustered() as u64, heads]),
        ];
        let hierarchy = (coarse > 0).then(|| Spec::new(name("coarse_offsets"), Type::I32, [coarse + 1, heads]));
        always.into_iter().chain(hierarchy)
    }

    fn sketch_specs(&self) -> [Spec; SKETCH_TENSORS] {
        let SketchShape { n_k, n_v, n_k_peak, n_v_peak, .. } = self.sketch;
        let [n_k, n_v, n_k_peak, n_v_peak] = [n_k, n_v, n_k_peak, n_v_peak].map(u64::from);
        let n_prefix = self.meta.n_prefix() as u64;
        [
            Spec::new("sketch.k_dims".into(), Type::I32, [n_k]),
            Spec::new("sketch.v_dims".into(), Type::I32, [n_v]),
            Spec::new("sketch.k".into(), Type::F16, [n_k, n_prefix]),
            Spec::new("sketch.v".into(), Type::F16, [n_v, n_prefix]),
            Spec::new("sketch.k_peaks".into(), Type::F16, [n_k_peak, n_prefix]),
            Spec::new("sketch.v_peaks".into(), Type::F16, [n_v_peak, n_prefix]),
        ]
    }
}

fn probe_specs(probe: &ProbeShape) -> [Spec; PROBE_TENSORS] {
    let [n_token, row] = [probe.n_token, probe.row].map(u64::from);
    [
        Spec::new(format!("probe.{}.tokens", probe.layer), Type::I32, [n_token]),
        Spec::new(format!("probe.{}.k", probe.layer), Type::F16, [row, n_token]),
    ]
}
