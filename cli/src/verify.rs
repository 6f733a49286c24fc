//! Whether an index fits a model file: `sqz inspect --verify -m MODEL`.

use anyhow::Result;
use ggml_squeeze::index::{IndexMeta, ModelFile};
use serde::Serialize;

use crate::inspect::{clean, table};
use crate::llama::Model;

/// One property, as the index and as the model has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    pub what: &'static str,
    pub index: String,
    pub model: String,
    pub fits: bool,
}

impl Check {
    fn same(what: &'static str, index: impl ToString, model: impl ToString) -> Check {
        let (index, model) = (index.to_string(), model.to_string());
        Check { fits: index == model, what, index, model }
    }
}

/// Compares what an index says of its model with a model: the weights by their fingerprint, and RoPE as the model has it
/// without options (an index built under `--rope-...` fits programs started with the same ones).
///
/// # Errors
/// The model file cannot be read.
pub fn checks(meta: &IndexMeta, model: &Model) -> Result<Vec<Check>> {
    let hex = |bytes: &[u8]| bytes[..8].iter().map(|b| format!("{b:02x}")).collect::<String>();
    let of_file = ModelFile::read(model.path())?.id.fingerprint;
    let highest = meta.tokens.iter().copied().max().unwrap_or(0);
    Ok(vec![
        Check::same("architecture", &meta.model.architecture, model.meta("general.architecture").unwrap_or_default()),
        Check::same("layers", meta.n_layer, model.n_layer()),
        Check {
            what: "token ids",
            index: format!("up to {highest}"),
            model: format!("below {}", model.n_vocab()),
            fits: (highest as usize) < model.n_vocab(),
        },
        Check {
            what: "weights",
            index: hex(&meta.model.fingerprint),
            model: hex(&of_file),
            fits: meta.model.fingerprint == of_file,
        },
        Check::same("RoPE type", meta.rope.kind, model.rope_type()),
        Check::same("RoPE base", meta.rope.freq_base, model.rope_freq_base()),
        Check::same("RoPE scale", meta.rope.freq_scale, model.rope_freq_scale()),
    ])
}

/// The checks as a table for people, and what follows from them.
pub fn render(checks: &[Check]) -> String {
    let verdict = |fits: bool| if fits { "yes" } else { "NO" }.to_string();
    let row = |c: &Check| vec![c.what.to_string(), clean(&c.index), clean(&c.model), verdict(c.fits)];
    let head = ["", "index", "model", "fits"].map(String::from);
    let advice = match checks.iter().all(|c| c.fits) {
        true => "the index fits this model",
        false => {
            "the index does not fit: a program with this model finds no binding and stays dense. Where RoPE alone differs, start it \
             with the RoPE options that the index was built with; else build an index with this model"
        }
    };
    format!("\nfit\n{}{advice}\n", table(&head, checks.iter().map(row).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let mut checks = vec![Check::same("layers", 30, 30), Check::same("RoPE base", 10000.0f32, 10000.0f32)];
        assert!(render(&checks).ends_with("the index fits this model\n"));
        checks.push(Check::same("architecture", "llama", "qwen2\u{1b}"));
        let text = render(&checks);
        assert!(text.contains("does not fit") && text.contains(" NO |") && !text.contains('\u{1b}'), "{text}");
    }
}
