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

    /// An index is safe only where the sketch tells every two tokens and positions of the prefix apart.
    #[error(
        "layer {layer} cannot tell all tokens and positions of this text apart (nearest {nearest_token:.3} and \
         {nearest_position:.3} of a row's norm), so an index could be used on another text: attention stays dense for this \
         model and text"
    )]
    NotTold { layer: u32, nearest_token: f32, nearest_position: f32 },

    #[error("layer {layer} comes after layer {before}: add each layer once, the lowest first")]
    Order { layer: u32, before: u32 },

    #[error("no layer of this model can be indexed: {why}")]
    NoLayer { why: String },

    /// An index cannot be extended to a text that does not begin with its own.
    #[error(
        "the text does not continue the old prefix: it has {n_new} tokens, the old one {n_old}, and they part at token {token}: \
         give text that continues the old one, or build a new index"
    )]
    NotContinued { token: usize, n_old: usize, n_new: usize },

    /// An index cannot be extended under other conditions than it was built.
    #[error(
        "{what} of the old index: {old}; here: {new}: extend it with the same model and settings, or build a new index"
    )]
    Differs { what: &'static str, old: String, new: String },

    /// Only where clustering runs on a GPU, as the next two.
    #[error(
        "layer {layer}: clustering one KV head takes {bytes} bytes of GPU memory, {free} are free: free some (a smaller context, \
         fewer layers on the GPU, no other program), or cluster on the CPU"
    )]
    DeviceMemory { layer: u32, bytes: usize, free: usize },

    #[error("layer {layer}: {what} is {got}, clustering on a GPU takes {wanted}: cluster on the CPU")]
    DeviceShape { layer: u32, what: &'static str, got: String, wanted: &'static str },

    #[error("clustering on the GPU failed: {reason}; cluster on the CPU")]
    Device { reason: String },

    #[error("could not start {n_threads} worker threads ({reason}): ask for fewer")]
    Threads { n_threads: usize, reason: String },
}
