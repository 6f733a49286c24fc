//! ggml as the plugin sees it: the structures it reads and patches (bindgen, committed), and the few functions it calls,
//! looked up by name in the running process. Nothing here links with ggml: the host brings its own copy.
//!
//! ggml's internal headers promise nothing from one version to the next, so the bindings hold for ggml 0.26 alone:
//! [`Api::check`] refuses any other.

#[allow(non_camel_case_types, non_snake_case, non_upper_case_globals, clippy::all)]
#[rustfmt::skip]
mod bindings;
mod resolve;

pub use bindings::*;
pub use resolve::Api;
