//! The GPU that tests run on.

use std::sync::{Arc, OnceLock};

use ggml_squeeze::attention::cuda::Device;

/// A test that gets none has said why and is skipped.
pub fn device() -> Option<Arc<Device>> {
    static GPU: OnceLock<Option<Arc<Device>>> = OnceLock::new();
    GPU.get_or_init(|| {
        if !cfg!(feature = "gpu-tests") {
            eprintln!("skipped: built without --features gpu-tests");
            return None;
        }
        Device::new(0).map_err(|error| eprintln!("skipped: {error}")).ok()
    })
    .clone()
}
