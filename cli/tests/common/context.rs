//! Contexts in the test's own process, with the plugin linked in.

use std::path::Path;

use ggml_squeeze::attention::Element;
use ggml_squeeze::backend;
use sqz::llama::{Context, Flash, GpuArgs, ModelArgs, Outputs, RopeArgs};
use sqz::metrics::kl;

pub fn args(model: &Path, ubatch_size: u32) -> ModelArgs {
    ModelArgs {
        model: model.to_path_buf(),
        ctx_size: None,
        batch_size: 512,
        ubatch_size,
        threads: Some(2),
        flash_attn: Flash::On,
        cache_type_k: Element::F16,
        cache_type_v: Element::F16,
        gpu: GpuArgs::default(),
        rope: RopeArgs::default(),
        swa_full: false,
    }
}

/// Decodes a question and takes it back; attention nodes that were sparse.
pub fn sparse_nodes(context: &mut Context, seq: i32, question: &[i32]) -> u64 {
    let n_past = context.n_past_in(seq);
    backend::reset_stats();
    context.decode_in(seq, question, Outputs::Last).unwrap();
    context.truncate_in(seq, n_past).unwrap();
    backend::stats().nodes_sparse
}

/// Number of prefixes with another token that are tried.
pub fn trials() -> usize {
    if std::env::var_os("SQZ_THOROUGH").is_some() {
        200
    } else {
        20
    }
}

/// KL divergence of each answer's distributions from the wanted ones', in nats: logits of a token after the other. What is no number
/// is infinitely far.
pub fn divergences(answer: &[Vec<f32>], want: &[Vec<f32>]) -> Vec<f64> {
    let is_whole = |row: &[f32]| row.iter().all(|x| x.is_finite());
    let of = |(own, want): (&Vec<f32>, &Vec<f32>)| match is_whole(own) && is_whole(want) {
        true => kl(want, own),
        false => f64::INFINITY,
    };
    answer.iter().zip(want).map(of).collect()
}
