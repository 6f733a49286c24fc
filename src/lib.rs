//! Squeezed Attention (arXiv 2411.09688) as a ggml backend plugin.
//!
//! Data flows one way: `index` <- `build`; `index` -> `attention` -> `backend` -> `capi`. `attention` knows nothing of
//! ggml; `backend` holds no arithmetic.

// Only what talks to ggml, to a GPU, to C or to the processor's vector units may; of that, files that need none forbid it.
#![deny(unsafe_code)]

pub mod attention;
#[allow(unsafe_code)]
pub mod backend;
pub mod build;
#[allow(unsafe_code)]
pub mod capi;
pub mod config;
pub mod hadamard;
pub mod index;
pub mod random;
pub(crate) mod text;
