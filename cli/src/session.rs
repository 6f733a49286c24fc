//! A model with its plugin, an index and the restored prefix, in one process: what `eval` and `bench` measure on.

use std::path::Path;
use std::sync::Arc;

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::attention::Spread;
use ggml_squeeze::backend;
use ggml_squeeze::config::{Config, ModeSetting};
use ggml_squeeze::index::Index;
use serde::{Deserialize, Serialize};

use crate::llama::{Context, Model, ModelArgs};
use crate::progress::Phase;

/// How attention is computed for a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Attention {
    /// llama.cpp's own kernels.
    Stock,
    /// Every op on our kernels with all keys: sums in f32.
    Forced,
    /// None at all: what the rest of the model costs.
    Free,
    /// With so many query tokens of a prefill sharing a selection, at most.
    Sparse(ModeSetting, Spread, usize),
}

impl Attention {
    /// Puts it in force from the next graph on and sets the counters to zero. `measure`: also the attention mass that sparse
    /// attention misses, which takes time.
    pub fn apply(self, estimate: bool, measure: bool) {
        backend::configure(|config: &mut Config| {
            config.disable = self == Attention::Stock;
            config.force = self == Attention::Forced;
            config.attention_free = self == Attention::Free;
            config.estimate = estimate;
            config.measure = measure;
            if let Attention::Sparse(mode, spread, tile) = self {
                config.mode = mode;
                config.spread = spread;
                config.tile = tile;
            }
        });
        backend::reset_stats();
    }

    /// Fails unless the counters since `apply` show that this is what ran.
    pub fn check(self) -> Result<()> {
        let stats = backend::stats();
        let reasons: Vec<String> = stats.nodes_dense.iter().map(|(why, n)| format!("{why}: {n}")).collect();
        let reasons = if reasons.is_empty() { "no reason counted".to_string() } else { reasons.join(", ") };
        match self {
            Attention::Sparse(..) => ensure!(
                stats.nodes_sparse > 0 && stats.nodes_forced == 0,
                "the index was not used, so nothing sparse was measured ({reasons}): was it made from this model and state?"
            ),
            Attention::Forced => ensure!(
                stats.nodes_forced > 0 && stats.nodes_sparse == 0,
                "the dense reference did not run on the plugin's kernels ({reasons})"
            ),
            Attention::Stock => ensure!(stats.nodes_sparse + stats.nodes_forced == 0, "the plugin was not passive"),
            Attention::Free => {}
        }
        Ok(())
    }
}

/// Spread by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpreadArg {
    None,
    Radius,
    Diag,
}

impl SpreadArg {
    pub fn value(self) -> Spread {
        match self {
            SpreadArg::None => Spread::None,
            SpreadArg::Radius => Spread::Radius,
            SpreadArg::Diag => Spread::Diag,
        }
    }
}

/// A share above 0 and at most 1, for clap.
pub fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if x > 0.0 && x <= 1.0 => Ok(x),
        _ => Err("give a share above 0 and at most 1".to_string()),
    }
}

/// The plugin is registered, the prefix is in the cache.
pub struct Session<'m> {
    pub context: Context<'m>,
    pub n_prefix: usize,
    pub tokens: Vec<i32>,
}

impl<'m> Session<'m> {
    /// Restores `state` into a context with room for `slack` more tokens, or computes the prefix where there is none; with the
    /// index loaded and nothing sparse yet.
    ///
    /// # Errors
    /// A file cannot be used, or index and state are of different prefixes.
    pub fn open(
        model: &'m Model,
        args: &ModelArgs,
        index: &Path,
        state: Option<&Path>,
        slack: usize,
    ) -> Result<Session<'m>> {
        let index = Index::open(index).with_context(|| format!("cannot use the index {}", index.display()))?;
        let tokens = index.meta().tokens.clone();
        let config = Config { disable: true, min_prefix: Some(0), ..Config::default() };
        if let Err(error) = backend::register(config) {
            anyhow::bail!("the plugin cannot be used with this llama.cpp: {error}");
        }
        backend::set_indexes(vec![Arc::new(index)])?;
        let mut context = Context::new(model, args, tokens.len() + slack, None)?;
        if let Some(state) = state {
            let restored = context.load_state(state).with_context(|| {
                let types = args.cache_types();
                format!("no {types} cache can be restored; without --state-file the prefix is computed in one")
            })?;
            ensure!(
                restored == tokens,
                "{} holds another prefix ({} tokens) than the index ({}): make both in one run of sqz build --state-file",
                state.display(),
                restored.len(),
                tokens.len()
            );
        } else {
            eprintln!("no --state-file: the prefix is computed in a {} cache", args.cache_types());
        }
        let present = context.n_past();
        if present < tokens.len() {
            let n_ubatch = context.n_ubatch();
            let phase = state.is_none().then(|| Phase::new("prefill", tokens.len().div_ceil(n_ubatch)));
            context.prefill(&tokens[present..], |n| {
                phase.iter().for_each(|p| p.step(n.div_ceil(n_ubatch)));
            })?;
            phase.map(Phase::end);
        }
        Ok(Session { context, n_prefix: tokens.len(), tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_between_zero_and_one() {
        assert_eq!(share("0.2"), Ok(0.2));
        assert_eq!(share("1"), Ok(1.0));
        for bad in ["0", "-0.1", "1.01", "x", "NaN", ""] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }
}
