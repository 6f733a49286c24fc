//! Squeezed Attention (arXiv 2411.09688) as a ggml backend plugin.
//!
//! Data flows one way: `index` <- `build`; `index` -> `attention` -> `backend` -> `capi`. `attention` knows nothing of
//! ggml; `backend` holds no arithmetic.

pub mod attention;
pub mod backend;
pub mod build;
pub mod capi;
pub mod config;
pub mod hadamard;
pub mod index;
pub mod random;
