//! Puts an index together of layers that come one after the other.

use super::sketch::{probe, probe_tokens, sketch_margin, SketchMargin};
use super::{calibrate, BuildError, BuiltLayer, LayerCapture, LayerScores, Settings, BUDGETS};
use crate::index::{IndexMeta, IndexParts, ProbeParts, SketchParts};

/// An index in the making.
pub struct Assembly {
    parts: IndexParts,
    scores: Vec<LayerScores>,
    probe_tokens: Vec<u32>,
    /// Of every layer but the first.
    probes: Vec<ProbeParts>,
}

impl Assembly {
    /// `meta` says everything but what the layers add: calibration and the layers that stay dense.
    pub fn new(meta: IndexMeta, settings: &Settings) -> Assembly {
        let probe_tokens = probe_tokens(meta.n_prefix(), settings);
        let parts = IndexParts { meta, layers: Vec::new(), sketch: SketchParts::default(), probes: Vec::new() };
        Assembly { parts, scores: Vec::new(), probe_tokens, probes: Vec::new() }
    }

    /// Is no layer there yet? The first one comes with the sketch.
    pub fn is_empty(&self) -> bool {
        self.parts.layers.is_empty()
    }

    pub fn meta_mut(&mut self) -> &mut IndexMeta {
        &mut self.parts.meta
    }

    /// Number of the highest layer that is indexed or known to stay dense.
    pub fn last_layer(&self) -> Option<u32> {
        let dense = self.parts.meta.dense_layers.iter().map(|(layer, _)| *layer);
        self.parts.layers.iter().map(|layer| layer.shape.layer).chain(dense).max()
    }

    /// Notes why a layer is not indexed.
    pub fn dense(&mut self, layer: u32, why: String) {
        self.parts.meta.dense_layers.push((layer, why));
    }

    /// Adds the first layer, the lowest: the one that the sketch is of. Tells how well that tells tokens apart.
    ///
    /// # Errors
    /// `NotTold`; `Order` where it is not the first.
    pub fn begin(
        &mut self,
        capture: &LayerCapture,
        made: BuiltLayer,
        sketch: SketchParts,
    ) -> Result<SketchMargin, BuildError> {
        if let Some(before) = self.parts.layers.last() {
            return Err(BuildError::Order { layer: capture.layer, before: before.shape.layer });
        }
        let margin = sketch_margin(&sketch, &self.parts.meta.tokens);
        let tolerance = margin.tolerance().ok_or(BuildError::NotTold {
            layer: sketch.layer,
            nearest_token: margin.nearest_token,
            nearest_position: margin.nearest_position,
        })?;
        self.parts.sketch = SketchParts { tolerance, ..sketch };
        self.push(made);
        Ok(margin)
    }

    /// Adds a later layer, in ascending order.
    ///
    /// # Errors
    /// `Order`.
    pub fn add(&mut self, capture: &LayerCapture, made: BuiltLayer) -> Result<(), BuildError> {
        match self.parts.layers.last().map(|before| before.shape.layer) {
            Some(before) if before < capture.layer => {}
            before => return Err(BuildError::Order { layer: capture.layer, before: before.unwrap_or(0) }),
        }
        self.probes.push(probe(capture, &self.probe_tokens));
        self.push(made);
        Ok(())
    }

    fn push(&mut self, made: BuiltLayer) {
        self.parts.layers.push(made.parts);
        self.scores.push(made.scores);
    }

    /// Calibrates, and keeps the probes of the middle and of the last layer.
    ///
    /// # Errors
    /// `NoLayer`.
    pub fn finish(mut self) -> Result<IndexParts, BuildError> {
        let meta = &mut self.parts.meta;
        meta.dense_layers.sort();
        let n = self.parts.layers.len();
        if n == 0 {
            let why: Vec<String> = meta.dense_layers.iter().map(|(n, why)| format!("layer {n}: {why}")).collect();
            return Err(BuildError::NoLayer { why: why.join("; ") });
        }
        let tables = calibrate(&self.scores, &BUDGETS);
        (meta.calibration, meta.mass_targets) = (tables.budgets, tables.masses);
        let probed = [n / 2, n - 1].map(|i| self.parts.layers[i].shape.layer);
        self.probes.retain(|probe| probed.contains(&probe.layer));
        self.parts.probes = self.probes;
        Ok(self.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::prefix;
    use super::super::{sketch, synthetic_layer, window_scores};
    use super::*;
    use crate::index::sample::sample_parts;
    use crate::index::{to_bytes, Index};

    /// All of a file, of the smallest model that is used much: 24 layers, 2 KV heads of size 64 (Qwen2.5-Coder-0.5B). The size
    /// follows from counts alone, so clusters may be made up.
    #[test]
    fn a_whole_index_is_small_beside_its_cache() {
        for n_prefix in [1000, 24974, 32767] {
            let settings = Settings { n_threads: 2, ..Settings::default() };
            let mut meta = sample_parts(1, n_prefix, 1, 1, 1, 1, 1).meta;
            (meta.n_sink, meta.n_window, meta.n_layer) = (settings.n_sink, settings.n_window, 24);
            meta.tokens = (0..n_prefix as i32).collect();
            meta.dense_layers.clear();
            let mut capture = prefix(n_prefix, 100, 2, 7, 64, 1);
            let mut layer = synthetic_layer(&capture, &settings).unwrap();
            layer.scores = window_scores(&layer.parts.view(), &capture.k, settings.n_sink as usize, &capture.q);
            let of = |number: u32| {
                let mut layer = layer.clone();
                layer.parts.shape.layer = number;
                layer
            };
            let mut assembly = Assembly::new(meta, &settings);
            capture.layer = 0;
            assembly.begin(&capture, of(0), sketch(&capture).unwrap()).unwrap();
            for number in 1..24 {
                capture.layer = number;
                assembly.add(&capture, of(number)).unwrap();
            }
            let index = Index::from_bytes(to_bytes(&assembly.finish().unwrap()).unwrap()).unwrap();
            assert_eq!(index.cache_bytes(), n_prefix as u64 * 24 * 2 * 2 * 64 * 2);
            let share = index.file_bytes() as f64 / index.cache_bytes() as f64;
            println!("{n_prefix} tokens: {} bytes, {:.2} % of the cache", index.file_bytes(), 100.0 * share);
            assert!(share <= 0.08, "{n_prefix} tokens: {:.2} %", 100.0 * share);
        }
    }
}
