//! `sqz build`: a text and a model become an index, and llama.cpp's own state files of the prefix.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::backend::{Capture, DenseLayers};
use ggml_squeeze::build::{self, Assembly, BuiltLayer, LayerCapture, Settings};
use ggml_squeeze::config::DEFAULT_MIN_PREFIX;
use ggml_squeeze::index::{self, BuildSettings, IndexMeta, IndexParts, ModelFile, Rope, SketchParts};

use crate::gpu::Clustering;
use crate::llama::{Context, Model, ModelArgs};
use crate::progress::Phase;
use crate::tokens::{self, Chat};

/// Options of `sqz build`.
#[derive(Clone, Debug, clap::Args)]
pub struct BuildArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text of the prefix
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub files: OutputArgs,
    /// How prompts begin with the text
    #[arg(long, value_enum, default_value_t = Chat::Raw)]
    pub chat: Chat,
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// What is written.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct OutputArgs {
    /// The index to write (*.sqz.gguf)
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Also write the prefix's state for llama-completion --prompt-cache
    #[arg(long, value_name = "FILE")]
    pub state_file: Option<PathBuf>,
    /// Also write the prefix's state for llama-server's slot restore (--slot-save-path)
    #[arg(long, value_name = "FILE")]
    pub slot_file: Option<PathBuf>,
}

impl OutputArgs {
    /// Finds out before the long work whether the files can be written.
    pub(crate) fn check(&self) -> Result<()> {
        let paths = [Some(&self.output), self.state_file.as_ref(), self.slot_file.as_ref()];
        paths.into_iter().flatten().try_for_each(|path| check_writable(path))
    }

    /// Writes the state files that are asked for. The cells stay in memory until something is written over them, so this may come
    /// before K and V are read.
    pub(crate) fn save_states(&self, context: &mut Context, tokens: &[i32]) -> Result<()> {
        if let Some(path) = &self.slot_file {
            context.save_slot(path, tokens)?;
        }
        if let Some(path) = &self.state_file {
            context.save_prompt_cache(path, tokens)?;
        }
        Ok(())
    }
}

/// How the keys are clustered.
#[derive(Clone, Debug, clap::Args)]
pub struct ClusterArgs {
    /// Clusters as a share of the clustered keys
    #[arg(long, value_name = "SHARE", default_value_t = Settings::default().cluster_share)]
    pub clusters: f32,
    /// First tokens, always attended
    #[arg(long, value_name = "N", default_value_t = Settings::default().n_sink)]
    pub sinks: u32,
    /// Last tokens, always attended; their queries calibrate
    #[arg(long, value_name = "N", default_value_t = Settings::default().n_window)]
    pub window: u32,
    /// Seed of the clustering
    #[arg(long, value_name = "N", default_value_t = Settings::default().seed)]
    pub seed: u64,
}

impl ClusterArgs {
    /// What the clustering takes.
    ///
    /// # Errors
    /// A value is out of range.
    pub fn settings(&self, n_threads: usize) -> Result<Settings> {
        ensure!(self.clusters > 0.0 && self.clusters <= 1.0, "--clusters {} is no share: give 0.05", self.clusters);
        ensure!(self.window > 0, "--window 0 leaves no queries to calibrate with: give 100");
        Ok(Settings {
            n_sink: self.sinks,
            n_window: self.window,
            cluster_share: self.clusters,
            seed: self.seed,
            n_threads,
            ..Settings::default()
        })
    }
}

/// What was made, and what it cost.
pub struct Report {
    pub n_prefix: usize,
    pub n_indexed: usize,
    pub dense_layers: DenseLayers,
    pub bytes: u64,
    /// K and V of the prefix in the indexed layers, were they F16.
    pub cache_bytes: u64,
    pub seconds: [f64; 2],
    /// Largest relative error of the captured attention over the indexed layers.
    pub capture_error: f32,
}

/// The command.
pub fn run(args: &BuildArgs) -> Result<()> {
    let report = make(args)?;
    tell(&args.files.output, &report);
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1048576.0
}

/// Says what was made.
pub(crate) fn tell(output: &Path, r: &Report) {
    for (layer, why) in &r.dense_layers {
        eprintln!("layer {layer} stays dense: {why}");
    }
    eprintln!(
        "{}: {} tokens, {} layers indexed, {} dense, {:.1} MiB ({:.1} % of the {:.1} MiB of their K and V in F16); capture checked to {:.1e}; prefill {:.1} s, clustering {:.1} s, peak memory {}",
        output.display(),
        r.n_prefix,
        r.n_indexed,
        r.dense_layers.len(),
        mib(r.bytes),
        100.0 * r.bytes as f64 / r.cache_bytes as f64,
        mib(r.cache_bytes),
        r.capture_error,
        r.seconds[0],
        r.seconds[1],
        peak_memory().map_or("unknown".into(), |b| format!("{:.0} MiB", mib(b))),
    );
    if r.n_prefix < DEFAULT_MIN_PREFIX {
        eprintln!(
            "note: below {DEFAULT_MIN_PREFIX} tokens attention stays dense; set GGML_SQUEEZE_MIN_PREFIX={} to use this index",
            r.n_prefix
        );
    }
}

/// Builds the index and the state files.
pub fn make(args: &BuildArgs) -> Result<Report> {
    args.cluster.settings(args.model.n_threads())?;
    make_of(args, &read_text(&args.file)?)
}

/// The same of a text that was read before; `args.file` is named in messages only.
pub fn make_of(args: &BuildArgs, text: &str) -> Result<Report> {
    let settings = args.cluster.settings(args.model.n_threads())?;
    args.files.check()?;
    let model = Model::load_on(&args.model.model, &args.model.gpu)?;
    let tokens = tokens::prefix(&model, text, args.chat, settings.n_threads)
        .with_context(|| format!("cannot make a prefix of {}", args.file.display()))?;
    let least = (settings.n_sink + settings.n_window) as usize + 2;
    ensure!(
        tokens.len() >= least,
        "{} has {} tokens, too short: the first {} and the last {} are never clustered, so {least} are needed (from {} on an \
         index pays); give a longer text, or lower --sinks and --window",
        args.file.display(),
        tokens.len(),
        settings.n_sink,
        settings.n_window,
        DEFAULT_MIN_PREFIX,
    );
    check_lengths(&model, &args.file, &tokens)?;

    let capture = Capture::new(tokens.len(), settings.n_window as usize);
    let mut context = Context::new(&model, &args.model, tokens.len(), Some(capture))?;
    let prefill = prefill(&mut context, &tokens)?;
    args.files.save_states(&mut context, &tokens)?;

    let mut index = Assembly::new(meta(&model, &args.model, args.chat, &settings, tokens)?, &settings);
    let capture = &*context.capture().context("the context was made with a capture")?;
    let mut clustering = Clustering::new(&settings);
    let mut make = |layer: &LayerCapture, first: bool, phase: &Phase, i: usize| -> Result<Made> {
        let rows = capture.device_rows(layer.layer);
        let made = clustering.layer(layer, rows, &|part| phase.part(i, part))?;
        Ok(Made::Layer(Box::new(made), if first { Some(build::sketch(layer)?) } else { None }))
    };
    let (seconds, capture_error) = cluster(capture, &mut index, &mut make)?;
    let on_gpu = clustering.on_gpu();
    drop(context);
    let parts = index.finish()?;
    if on_gpu > 0 {
        eprintln!("{on_gpu} of {} layers were clustered on the GPU", parts.layers.len());
    }
    let bytes = index::write(&args.files.output, &parts)?;
    Ok(report(parts, bytes, [prefill, seconds], capture_error))
}

/// Whether the model can tell its layers apart at this length.
///
/// # Errors
/// The prefix is no longer than a sliding window.
pub(crate) fn check_lengths(model: &Model, file: &Path, tokens: &[i32]) -> Result<()> {
    // Masks show which layers slide only where the window has moved on; those layers have a cache, hence cells, of their own.
    ensure!(
        tokens.len() > model.n_swa(),
        "{} has {} tokens, and this model's layers with a sliding window of {} tokens see all of them: they cannot be told from \
         the layers to index; give a longer text",
        file.display(),
        tokens.len(),
        model.n_swa(),
    );
    if tokens.len() > model.n_ctx_train() {
        eprintln!("warning: {} tokens, but the model was trained on {}", tokens.len(), model.n_ctx_train());
    }
    Ok(())
}

/// Fewer tokens in a graph than this take a kernel of llama.cpp on the CPU that sums values in F16, too coarse
/// to check a capture by.
const LEAST_UBATCH: usize = 64;

/// Decodes what is missing of the prefix, under the context's capture; the seconds it took.
pub(crate) fn prefill(context: &mut Context, tokens: &[i32]) -> Result<f64> {
    let tokens = &tokens[context.n_past()..];
    let (n, n_ubatch) = (tokens.len(), context.n_ubatch());
    let n_graph = n.div_ceil(n_ubatch);
    // Equal parts where the last one would be too small.
    let size = if (1..LEAST_UBATCH).contains(&(n % n_ubatch)) { n.div_ceil(n_graph) } else { n_ubatch };
    let phase = Phase::new("prefill", n_graph);
    for (i, part) in tokens.chunks(size).enumerate() {
        context.prefill(part, |_| phase.step(i + 1))?;
        if i == 0 {
            // One graph tells whether there is anything to index: say so now, not after minutes.
            context.capture().map_or(Ok(()), |capture| capture.finish().map(drop))?;
        }
    }
    Ok(phase.end())
}

/// What became of a layer that could be captured.
pub(crate) enum Made {
    /// Its clusters, and the sketch where it is the first.
    Layer(Box<BuiltLayer>, Option<SketchParts>),
    /// It stays dense, for this reason.
    Dense(String),
}

/// Makes the index's part of a layer: whether it is the first that is indexed, and its number among the layers.
pub(crate) type Make<'a> = dyn FnMut(&LayerCapture, bool, &Phase, usize) -> Result<Made> + 'a;

pub(crate) fn report(parts: IndexParts, bytes: u64, seconds: [f64; 2], capture_error: f32) -> Report {
    Report {
        n_prefix: parts.meta.n_prefix(),
        n_indexed: parts.layers.len(),
        cache_bytes: parts.layers.iter().map(|l| l.shape.cache_bytes(parts.meta.n_prefix())).sum(),
        dense_layers: parts.meta.dense_layers,
        bytes,
        seconds,
        capture_error,
    }
}

/// Indexes every layer that can be, one at a time; returns seconds and the largest capture error.
pub(crate) fn cluster(capture: &Capture, index: &mut Assembly, make: &mut Make) -> Result<(f64, f32)> {
    let (good, dense) = capture.finish()?;
    dense.into_iter().for_each(|(number, why)| index.dense(number, why));
    let phase = Phase::new("cluster", good.len());
    let mut worst = 0.0f32;
    for (i, &number) in good.iter().enumerate() {
        let (layer, error): (LayerCapture, f32) = match capture.read(number) {
            Ok(read) => read,
            Err(why) => {
                index.dense(number, why);
                continue;
            }
        };
        worst = worst.max(error);
        let made = make(&layer, index.is_empty(), &phase, i);
        match made.with_context(|| format!("cannot index layer {number}"))? {
            Made::Layer(made, Some(sketch)) => {
                let margin = index.begin(&layer, *made, sketch)?;
                let [k, v] = index::tolerances(number, margin.tolerance().unwrap_or_default());
                let most = if margin.is_later { "most " } else { "" };
                eprintln!(
                    "sketch of layer {number}: {most}tokens at least {:.3} apart, {most}positions {:.3}; rows may be {k:.3} off in K, \
                     {v:.3} in V",
                    margin.nearest_token, margin.nearest_position
                );
            }
            Made::Layer(made, None) => index.add(&layer, *made)?,
            Made::Dense(why) => {
                index.dense(number, why);
                continue;
            }
        }
        phase.step(i + 1);
    }
    Ok((phase.end(), worst))
}

pub(crate) fn meta(
    model: &Model,
    args: &ModelArgs,
    chat: Chat,
    settings: &Settings,
    tokens: Vec<i32>,
) -> Result<IndexMeta> {
    Ok(IndexMeta {
        model: ModelFile::read(model.path())?.id,
        rope: Rope {
            kind: model.rope_type(),
            freq_base: args.rope.rope_freq_base.unwrap_or(model.rope_freq_base()),
            freq_scale: args.rope.freq_scale().unwrap_or(model.rope_freq_scale()),
        },
        n_layer: model.n_layer(),
        tokens,
        n_sink: settings.n_sink,
        n_window: settings.n_window,
        build: BuildSettings {
            seed: settings.seed,
            iterations: settings.iterations,
            cluster_share: settings.cluster_share,
            chat: chat.name().to_string(),
            cache_types: [args.cache_type_k, args.cache_type_v].map(|e| e.name().to_string()),
            builder: format!("sqz {}", env!("CARGO_PKG_VERSION")),
        },
        calibration: Vec::new(),
        mass_targets: Vec::new(),
        dense_layers: Vec::new(),
        synthetic: false,
    })
}

/// A text file.
///
/// # Errors
/// It cannot be read or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    String::from_utf8(bytes)
        .with_context(|| format!("{} is not UTF-8: convert it first (iconv -t UTF-8)", path.display()))
}

/// Finds out before the long work whether `path` can be written. What is there stays as it is.
fn check_writable(path: &Path) -> Result<()> {
    let existed = path.exists();
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("cannot write {}: choose another place for it", path.display()))?;
    if !existed {
        std::fs::remove_file(path).with_context(|| format!("cannot remove the trial file {}", path.display()))?;
    }
    Ok(())
}

/// Peak resident bytes of this process (VmHWM).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_tried_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        std::fs::write(&old, "kept").unwrap();
        check_writable(&new).unwrap();
        check_writable(&old).unwrap();
        assert!(!new.exists());
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
        let error = format!("{:#}", check_writable(&dir.path().join("none/x")).unwrap_err());
        assert!(error.contains("none/x"), "{error}");
        assert!(check_writable(dir.path()).is_err());
    }

    #[test]
    fn bad_shares_are_refused() {
        let args = |clusters| ClusterArgs { clusters, sinks: 16, window: 100, seed: 0 };
        assert!(args(0.05).settings(1).is_ok());
        for clusters in [0.0, -1.0, 1.5, f32::NAN] {
            assert!(args(clusters).settings(1).is_err());
        }
    }

    #[test]
    fn peak_memory_is_more_than_a_mebibyte() {
        assert!(peak_memory().unwrap() > 1 << 20);
    }
}
