//! A prefix in a context, and an index of it whose clusters are made up: what `sqz bench --synthetic-index` measures on. The
//! index is a file like any other but for its mark, and binds by the rules of any other.

use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::backend::{self, Capture};
use ggml_squeeze::build::{self, Assembly, LayerCapture, Settings};
use ggml_squeeze::config::Config;
use ggml_squeeze::index::{self, IndexMeta};
use ggml_squeeze::random::split_mix;

use crate::build_cmd::{self, Made};
use crate::llama::{Context, Model, ModelArgs};
use crate::progress::Phase;
use crate::session::Session;
use crate::tokens::{self, Chat};

/// Tokens at the end of the prefix that are computed with attention: the window, and what makes up a graph with it.
const ATTENDED: usize = 1024;

/// The first `n` tokens of a text, repeated where it is too short; without `n` all of it once.
///
/// # Errors
/// The text has no tokens, or cannot be a prefix.
pub fn text(model: &Model, text: &str, n: Option<usize>, n_threads: usize) -> Result<Vec<i32>> {
    let tokens = tokens::prefix(model, text, Chat::Raw, n_threads)?;
    ensure!(!tokens.is_empty(), "the text has no tokens");
    let n = n.unwrap_or(tokens.len());
    Ok(tokens.into_iter().cycle().take(n).collect())
}

/// `n` tokens by chance.
pub fn by_chance(model: &Model, n: usize, seed: u64) -> Vec<i32> {
    let mut state = seed;
    (0..n).map(|_| (split_mix(&mut state) % model.n_vocab() as u64) as i32).collect()
}

/// What a synthetic index is made of.
pub struct Prefix {
    pub tokens: Vec<i32>,
    /// Most of it is computed without attention, which takes most of the time: of no account for tokens by chance, but not what
    /// another host would have in its cache.
    pub attention_free: bool,
}

fn compute(context: &mut Context<'_>, prefix: &Prefix) -> Result<()> {
    let tokens = &prefix.tokens;
    let free = if prefix.attention_free { tokens.len().saturating_sub(ATTENDED) } else { 0 };
    if free > 0 {
        let attend = |yes: bool| backend::configure(|config| (config.disable, config.attention_free) = (yes, !yes));
        let phase = Phase::new("prefill", free);
        attend(false);
        context.prefill(&tokens[..free], |done| phase.step(done))?;
        attend(true);
        phase.end();
    }
    build_cmd::prefill(context, tokens)?;
    Ok(())
}

/// Computes the prefix in a context with room for `slack` more tokens, writes its synthetic index to `file` and loads that.
///
/// # Errors
/// As `sqz build`: too few tokens, no layer that can be indexed, tokens that the sketch cannot tell apart.
pub fn open<'m>(
    model: &'m Model,
    args: &ModelArgs,
    prefix: Prefix,
    settings: &Settings,
    slack: usize,
    file: &Path,
) -> Result<Session<'m>> {
    let n = prefix.tokens.len();
    let least = (settings.n_sink + settings.n_window) as usize + 2;
    ensure!(n >= least, "a prefix of {n} tokens is too short for an index: give {least} or more (--depth)");
    let config = Config { disable: true, min_prefix: Some(0), synthetic: true, ..Config::default() };
    let register = |config: Config| {
        backend::register(config).map_err(|e| anyhow::anyhow!("the plugin cannot be used with this llama.cpp: {e}"))
    };
    // before the context: backends made earlier are not the plugin's
    register(config.clone())?;
    let capture = Capture::new(n, settings.n_window as usize);
    let mut context = Context::with_capture(model, args, n + slack, capture)?;
    compute(&mut context, &prefix)?;
    let meta = build_cmd::meta(model, args, Chat::Raw, settings, prefix.tokens.clone())?;
    let mut made = Assembly::new(IndexMeta { synthetic: true, ..meta }, settings);
    let capture = context.capture().context("the context was made with a capture")?;
    let mut make = |layer: &LayerCapture, first: bool, _: &Phase, _: usize| -> Result<Made> {
        let made = build::synthetic_layer(layer, settings)?;
        Ok(Made::Layer(Box::new(made), if first { Some(build::sketch(layer)?) } else { None }))
    };
    build_cmd::cluster(capture, &mut made, &mut make)?;
    index::write(file, &made.finish()?)?;
    // Graphs under a callback are new ones each time; those that are measured are not.
    drop(context);
    eprintln!("synthetic index: its clusters are made up, so speed is all that can be measured with it");
    register(Config { index_paths: vec![file.to_path_buf()], ..config })?;
    let mut context = Context::new(model, args, n + slack, None)?;
    compute(&mut context, &prefix)?;
    Ok(Session { context, n_prefix: n, tokens: prefix.tokens })
}
