//! Another rule in the place of an index's selection, for evaluations that compare rules: what it sees of a call, what it may
//! choose, what it is told. The plugin's settings have none, and the CUDA path knows none.

use std::fmt;
use std::sync::Arc;

use super::Selection;

/// Decides, for every sparse row and KV head, what of the prefix is attended to. Called by several threads at once, in any order
/// of rows and KV heads.
pub trait Rule: Send + Sync {
    /// How clusters of a layer are selected where `choose` leaves that to the index.
    fn selection(&self, layer: u32, usual: Selection) -> Selection {
        let _ = layer;
        usual
    }

    /// What is attended to beside the sinks and the tail; `None`: the clusters that the index selects.
    fn choose(&self, sight: &dyn Sight) -> Option<Choice> {
        let _ = sight;
        None
    }

    /// Told once for each sparse row and KV head.
    fn attended(&self, seen: &Seen) {
        let _ = seen;
    }
}

/// Tokens of the prefix, each once, in any order. Those that are no clustered tokens are left out.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// The same for all query heads of the group.
    Group(Vec<u32>),
    /// Of each query head of the group.
    Heads(Vec<Vec<u32>>),
}

/// Which pair it is, and the sizes around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub layer: u32,
    /// Query row of the call.
    pub row: usize,
    pub head_kv: usize,
    /// Query heads per KV head.
    pub n_group: usize,
    pub head_dim: usize,
    /// The clustered tokens are `first..end`: S and P - W.
    pub first: usize,
    pub end: usize,
}

/// What a rule may look at: one sparse row and KV head of a call.
pub trait Sight {
    fn place(&self) -> Place;

    /// `[G][head_dim]`: queries of a row of the same stream times the scale of the scores, in the basis of the cache.
    fn query(&self, row: usize) -> Vec<f32>;

    /// `[N][head_dim]`: the clustered keys by token, in the basis of the cache.
    fn keys(&self) -> Vec<f32>;

    /// `[G][n]`: scores of the prefix's first `n` keys, at most `end`, for the queries of a row, as the softmax gets them.
    fn scores(&self, row: usize, n: usize) -> Vec<f32>;
}

/// What one sparse row and KV head attended to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    pub layer: u32,
    pub row: usize,
    pub head_kv: usize,
    /// Clustered keys that at least one head of the group attended to.
    pub keys: usize,
    /// Clusters that the index kept; 0 where the rule chose.
    pub clusters: usize,
    /// Share of the attention mass of sinks and clustered keys that was missed, mean over the group; where it is measured.
    pub missed: Option<f64>,
}

/// A rule as a setting.
#[derive(Clone)]
pub struct RuleSetting(pub Arc<dyn Rule>);

impl PartialEq for RuleSetting {
    fn eq(&self, other: &RuleSetting) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.0), Arc::as_ptr(&other.0))
    }
}

impl fmt::Debug for RuleSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a rule")
    }
}
