//! What needs no ggml.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Panics as often as a test wants it.
pub(super) fn fail(panics: &AtomicUsize) {
    if panics.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
        panic!("as a test wants it");
    }
}
