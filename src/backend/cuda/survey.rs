//! What a graph of a CUDA backend does to the KV cache and where it attends, read once per graph.

#![forbid(unsafe_code)]

use ggml_sys as sys;

use super::super::layers::{ends, Layers};
use super::super::runtime::Snapshot;
use super::super::stats::Reason;
use super::super::tensor::{problem, Half, Tensor};
use crate::attention::cuda::{RowNumbers, MAX_WRITTEN};
use crate::attention::{Element, Problem};

/// An attention node.
pub struct Site {
    /// Place in the graph's list of nodes.
    pub node: usize,
    pub problem: Problem,
    /// Layer in the model; none: K is not a KV cache's.
    pub layer: Option<u32>,
    /// First stream of the cache that K shows.
    pub first_stream: usize,
    /// The mask is there before the graph runs.
    pub mask_is_input: bool,
}

/// A graph as far as it concerns us.
#[derive(Default)]
pub struct Survey {
    pub sites: Vec<Site>,
    /// Attention nodes that are none of ours, whatever is bound.
    pub dense: Vec<Reason>,
    pub written: Vec<RowNumbers>,
    /// Lowest and deepest layer whose cache it has.
    pub layers: Option<(u32, u32)>,
    /// An indexed layer's cache is written where it cannot be seen.
    pub opaque: bool,
    /// Every node is one that a captured graph may hold.
    pub can_be_captured: bool,
}

/// Does the stock backend wait for the device in this node? It does where it sorts tokens by experts on the host. Said of more
/// nodes than it is true for: such a graph is not captured, which costs a few microseconds per layer.
fn may_wait(node: &Tensor) -> bool {
    if node.raw().op != sys::GGML_OP_MUL_MAT_ID {
        return false;
    }
    let plain = |t: Tensor| t.is_f32() || matches!(t.element(), Some(Element::F16 | Element::BF16));
    node.ne()[2] > 1 || node.src(0).is_none_or(plain)
}

/// Is every node one that a captured graph may hold?
pub fn can_be_captured(nodes: &[Tensor]) -> bool {
    !nodes.iter().any(may_wait)
}

impl Survey {
    /// Reads a graph's nodes; `layers` learns the cache tensors.
    pub fn of(nodes: &[Tensor], snapshot: &Snapshot, layers: &mut Layers) -> Survey {
        let mut survey = Survey { can_be_captured: can_be_captured(nodes), ..Survey::default() };
        let mut seen = Vec::new();
        let indexed = |layer: u32| snapshot.indexes.iter().any(|l| l.matcher.index.layer(layer).is_some());
        for (at, node) in nodes.iter().enumerate() {
            if node.is_flash_attention() {
                for root in [node.src(1), node.src(2)].into_iter().flatten().map(|t| t.root()) {
                    seen.extend(root.cache_layer().map(|(layer, half)| (layer, half, root)));
                }
                survey.attention(at, *node);
            } else if !node.is_alias() {
                let root = node.root();
                let Some((layer, half)) = root.cache_layer() else { continue };
                seen.push((layer, half, root));
                if indexed(layer) {
                    survey.write(node, half);
                }
            }
        }
        survey.layers = ends(&seen);
        if let Some((lowest, _)) = survey.layers {
            layers.begin(lowest);
        }
        for (layer, half, root) in seen {
            let (k, v) = if half == Half::K { (Some(root), None) } else { (None, Some(root)) };
            layers.see(layer, k, v);
        }
        survey
    }

    fn attention(&mut self, at: usize, node: Tensor) {
        let (problem, k) = match (problem(node), node.src(1)) {
            (Ok(problem), Some(k)) => (problem, k),
            (Err(reason), _) => return self.dense.push(reason),
            (_, None) => return self.dense.push(Reason::Shape),
        };
        let root = k.root();
        let layer = root.cache_layer().filter(|(_, half)| *half == Half::K).map(|(layer, _)| layer);
        let first_stream = k.offset_in(root) / root.raw().nb[2].max(1);
        let mask_is_input = node.src(3).is_some_and(|m| m.is_leaf());
        self.sites.push(Site { node: at, problem, layer, first_stream, mask_is_input });
    }

    fn write(&mut self, node: &Tensor, half: Half) {
        // V rows go where K rows go.
        if half == Half::V && node.is_set_rows() {
            return;
        }
        let numbers = if node.is_set_rows() { node.src(1).filter(Tensor::is_leaf) } else { None };
        let vector = numbers.filter(|t| {
            let n = t.ne();
            let step = if t.is_i64() { 8 } else { 4 };
            (t.is_i64() || t.is_i32()) && t.has_data() && n[1] * n[2] * n[3] == 1 && t.raw().nb[0] == step
        });
        let Some(t) = vector else {
            self.opaque = true;
            return;
        };
        let own = RowNumbers { address: t.raw().data as u64, n: t.ne()[0], wide: t.is_i64() };
        if !self.written.contains(&own) {
            self.written.push(own);
        }
        self.opaque |= self.written.len() > MAX_WRITTEN;
    }
}
