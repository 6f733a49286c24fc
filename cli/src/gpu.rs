//! Clusters the layers of a build where their cache is: on the GPU, or on the CPU.

use std::sync::Arc;

use ggml_squeeze::attention::cuda::{is_on, Device};
use ggml_squeeze::attention::Array;
use ggml_squeeze::build::cuda::{Clusterer, DeviceLayer};
use ggml_squeeze::build::{self, BuildError, BuiltLayer, LayerCapture, Settings};

/// Makes layers of an index, one after the other.
pub struct Clustering<'a> {
    settings: &'a Settings,
    /// One per GPU that layers were found on.
    clusterers: Vec<(Arc<Device>, Clusterer)>,
    /// A GPU could not be used, and that was said: the others stay with the CPU.
    on_cpu: bool,
    on_gpu: usize,
}

impl<'a> Clustering<'a> {
    pub fn new(settings: &'a Settings) -> Clustering<'a> {
        Clustering { settings, clusterers: Vec::new(), on_cpu: false, on_gpu: 0 }
    }

    /// Layers that were clustered on a GPU.
    pub fn on_gpu(&self) -> usize {
        self.on_gpu
    }

    /// One layer. `rows`: its K and V if they are in a GPU's memory, prefix token t in cell t.
    ///
    /// # Errors
    /// As `build::index_layer`. What only a GPU cannot do is done on the CPU instead.
    pub fn layer(
        &mut self,
        capture: &LayerCapture,
        rows: Option<[Array; 2]>,
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<BuiltLayer, BuildError> {
        if let (Some(rows), false) = (rows, self.on_cpu) {
            match self.layer_on_gpu(capture, rows, progress) {
                Ok(Some(built)) => {
                    self.on_gpu += 1;
                    return Ok(built);
                }
                Ok(None) => {}
                Err(
                    error @ (BuildError::Device { .. }
                    | BuildError::DeviceMemory { .. }
                    | BuildError::DeviceShape { .. }),
                ) => {
                    self.on_cpu = true;
                    eprintln!("note: {error}: that is done now");
                }
                Err(error) => return Err(error),
            }
        }
        build::index_layer(capture, self.settings, progress)
    }

    fn layer_on_gpu(
        &mut self,
        capture: &LayerCapture,
        [k, v]: [Array; 2],
        progress: &(dyn Fn(f32) + Sync),
    ) -> Result<Option<BuiltLayer>, BuildError> {
        let Some(clusterer) = self.clusterer(&k, capture)? else { return Ok(None) };
        let layer =
            DeviceLayer { layer: capture.layer, n_group: capture.n_group, scale: capture.scale, k, v, q: &capture.q };
        // SAFETY: rows of the context's cache, which is alive and idle.
        unsafe { clusterer.index_layer(&layer, &capture.k, progress) }.map(Some)
    }

    /// That of the GPU which K is on, made at first need.
    fn clusterer(&mut self, k: &Array, capture: &LayerCapture) -> Result<Option<&mut Clusterer>, BuildError> {
        // One that cannot tell cannot cluster either.
        let is_there = |device: &Device| is_on(device, [k.data as u64]).unwrap_or(false);
        if let Some(found) = self.clusterers.iter().position(|(device, _)| is_there(device)) {
            return Ok(Some(&mut self.clusterers[found].1));
        }
        // Without kernels or a driver there is nothing to say: the CPU does it.
        let Ok(n) = Device::count() else { return Ok(None) };
        for ordinal in 0..n {
            let Ok(device) = Device::shared(ordinal) else { continue };
            if is_there(&device) {
                let n_prefix = capture.k.len() / (capture.n_head_kv * capture.head_dim_k).max(1) as usize;
                let cells: Vec<u32> = (0..n_prefix as u32).collect();
                let clusterer = Clusterer::new(&device, &cells, self.settings)?;
                self.clusterers.push((device, clusterer));
                return Ok(self.clusterers.last_mut().map(|c| &mut c.1));
            }
        }
        Ok(None)
    }
}
