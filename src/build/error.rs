//! What can go wrong while an index is built, in sentences that name the remedy.

/// Error of the offline half.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BuildError {
    /// Nothing is left to cluster between the sinks and the window.
    #[error(
        "the prefix has {n_prefix} tokens, but an index needs at least {needed} (the sinks at its start, the window at \
         its end and one key between them): give a longer text, or a smaller window"
    )]
    TooShort { n_prefix: usize, needed: usize },

    #[error(
        "layer {layer}: the {what} of token {token} holds an infinity or a NaN: the model or its cache is broken there; \
         capture with an F16 cache, and check that the model answers sensibly without an index"
    )]
    NonFinite { layer: u32, what: &'static str, token: usize },

    #[error("layer {layer}: {what} has {found} elements where {expected} belong: the capture does not fit its shape")]
    Shape { layer: u32, what: &'static str, found: usize, expected: String },

    #[error("build setting {name} = {value} cannot be used: give {wanted}")]
    Setting { name: &'static str, value: String, wanted: &'static str },

    #[error("could not start {n_threads} worker threads ({reason}): ask for fewer")]
    Threads { n_threads: usize, reason: String },
}
