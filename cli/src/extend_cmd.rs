//! `sqz extend`: an index and a text that goes on where its own ended become an index of the longer text, at the cost of the new
//! part.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context as _, Result};
use clap::ValueEnum;
use ggml_squeeze::backend::Capture;
use ggml_squeeze::build::{self, Assembly, LayerCapture, Settings};
use ggml_squeeze::index::{self, Index};

use crate::build_cmd::{self, Made, OutputArgs, Report};
use crate::llama::{Context, Model, ModelArgs};
use crate::progress::Phase;
use crate::tokens::{self, Chat};

/// Options of `sqz extend`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExtendArgs {
    /// The index to extend (*.sqz.gguf); its settings hold
    #[arg(value_name = "OLD")]
    pub old: PathBuf,
    #[command(flatten)]
    pub model: ModelArgs,
    /// The whole longer text: the old one with more behind it
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub files: OutputArgs,
    /// State of the old prefix, from `sqz build --state-file` or `--slot-file`: only the new part is computed
    #[arg(long, value_name = "FILE")]
    pub old_state: Option<PathBuf>,
}

/// The command.
pub fn run(args: &ExtendArgs) -> Result<()> {
    let old = Index::open(&args.old).with_context(|| format!("cannot use the index {}", args.old.display()))?;
    let report = make(args, &old)?;
    eprintln!("{} tokens, {} of them new", report.n_prefix, report.n_prefix - old.meta().n_prefix());
    build_cmd::tell(&args.files.output, &report);
    Ok(())
}

/// Extends `old` and writes the state files.
///
/// # Errors
/// The text does not continue that of `old`, model, settings or state are others, or a file cannot be read or written.
pub fn make(args: &ExtendArgs, old: &Index) -> Result<Report> {
    args.files.check()?;
    let text = build_cmd::read_text(&args.file)?;
    let model = Model::load_on(&args.model.model, &args.model.gpu)?;
    let settings = Settings::of_index(old.meta(), args.model.n_threads());
    let name = &old.meta().build.chat;
    let chat = Chat::from_str(name, false).map_err(|_| anyhow::anyhow!("the index was made with --chat {name}"))?;
    let tokens = tokens::prefix(&model, &text, chat, settings.n_threads)
        .with_context(|| format!("cannot make a prefix of {}", args.file.display()))?;
    let meta = build_cmd::meta(&model, &args.model, chat, &settings, tokens)?;
    build::check_extension(old.meta(), &meta).with_context(|| {
        format!("cannot extend {} by {} (-f takes the whole longer text)", args.old.display(), args.file.display())
    })?;
    let tokens = &meta.tokens;
    build_cmd::check_lengths(&model, &args.file, tokens)?;

    let capture = Capture::new(tokens.len(), settings.n_window as usize);
    let mut context = Context::new(&model, &args.model, tokens.len(), Some(capture))?;
    if let Some(path) = &args.old_state {
        restore(&mut context, path, old, tokens.len() - settings.n_window as usize)?;
    } else {
        eprintln!("no --old-state: the old part is computed again");
    }
    let prefill = build_cmd::prefill(&mut context, tokens)?;
    args.files.save_states(&mut context, tokens)?;

    let mut index = Assembly::new(meta, &settings);
    let capture = context.capture().context("the context was made with a capture")?;
    let mut make = |layer: &LayerCapture, first: bool, phase: &Phase, i: usize| -> Result<Made> {
        let number = layer.layer;
        let Some(view) = old.layer(number) else {
            let why = old.meta().dense_layers.iter().find(|(n, _)| *n == number).map(|(_, why)| why.clone());
            return Ok(Made::Dense(why.unwrap_or_else(|| "not in the index that was extended".into())));
        };
        let made = build::extend_layer(&view, layer, &settings, &|part| phase.part(i, part))?;
        let mut sketch = None;
        if first {
            ensure!(
                number == old.sketch().layer,
                "layer {}, which tells the prefix's tokens apart, can no longer be indexed: build a new index",
                old.sketch().layer
            );
            sketch = Some(build::extend_sketch(&old.sketch(), layer)?);
        }
        Ok(Made::Layer(Box::new(made), sketch))
    };
    let (seconds, capture_error) = build_cmd::cluster(capture, &mut index, &mut make)?;
    drop(context);
    let parts = index.finish()?;
    let bytes = index::write(&args.files.output, &parts)?;
    Ok(build_cmd::report(parts, bytes, [prefill, seconds], capture_error))
}

/// Restores the state of the old prefix, cut back to `most` tokens: the queries of the new window must be computed.
fn restore(context: &mut Context, path: &Path, old: &Index, most: usize) -> Result<()> {
    let restored = context.load_state(path)?;
    ensure!(
        restored == old.meta().tokens,
        "{} holds another prefix ({} tokens) than the index ({}): make both in one run of sqz build --state-file",
        path.display(),
        restored.len(),
        old.meta().n_prefix()
    );
    if context.n_past() > most {
        context.truncate(most)?;
    }
    Ok(())
}
