//! Cache tensors of the layers that graphs have shown.

#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::rows::CacheRows;
use super::tensor::{cache_rows, Half, Tensor};

/// Lowest and deepest layer of the caches that a graph shows.
pub fn ends(seen: &[(u32, Half, Tensor)]) -> Option<(u32, u32)> {
    let layers = || seen.iter().map(|s| s.0);
    Some((layers().min()?, layers().max()?))
}

/// K and V of each layer, as the present pass has them.
#[derive(Default)]
pub struct Layers {
    tensors: HashMap<u32, (Option<Tensor>, Option<Tensor>)>,
    deepest: u32,
}

impl Layers {
    /// Forgets cache tensors of an earlier pass (their memory may be gone). `lowest` is the lowest layer of the graph at hand:
    /// with an eval callback a pass comes in several graphs, in layer order.
    pub fn begin(&mut self, lowest: u32) {
        if lowest < self.deepest || self.tensors.len() <= 1 {
            self.tensors.clear();
            self.deepest = 0;
        }
    }

    pub fn see(&mut self, layer: u32, k: Option<Tensor>, v: Option<Tensor>) {
        let entry = self.tensors.entry(layer).or_default();
        entry.0 = k.or(entry.0);
        entry.1 = v.or(entry.1);
        self.deepest = self.deepest.max(layer);
    }

    /// Rows of a layer and stream; `None` where they are not known.
    pub fn rows(&self, layer: u32, stream: usize) -> Option<CacheRows> {
        let (Some(k), Some(v)) = *self.tensors.get(&layer)? else { return None };
        cache_rows(k, v, stream)
    }
}
