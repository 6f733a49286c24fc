//! `sqz run`: index and state from a cache, made where they are missing; then the user's own llama.cpp program as our child,
//! with the plugin.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::attention::Element;
use ggml_squeeze::config::{Config, DEFAULT_MIN_PREFIX};
use ggml_squeeze::index::ModelFile;

use crate::build_cmd::{self, BuildArgs, ClusterArgs, OutputArgs};

use crate::llama::{self, Flash, Model, ModelArgs};
use crate::session::share;
use crate::tokens::Chat;

pub mod args;
pub mod cache;
#[allow(unsafe_code)]
mod child;
mod prompt;
mod server;
mod status;

use args::{Child, Kind};
use cache::{Cache, Entry, Key, Maker, Manifest, State};

/// Options of `sqz run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Model file (GGUF); the program gets it too
    #[arg(short, long, value_name = "FILE")]
    pub model: PathBuf,
    /// The text of the prefix
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// How prompts begin with the text [default: system for llama-server and llama-cli, else raw]
    #[arg(long, value_enum)]
    pub chat: Option<Chat>,
    /// Share of the prefix keys attended [default: GGML_SQUEEZE_BUDGET, else 0.2]
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub budget: Option<f32>,
    /// Folder of indexes and states [default: $SQZ_CACHE, $XDG_CACHE_HOME/ggml-squeeze, ~/.cache/ggml-squeeze]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// The plugin [default: libggml-squeeze.so beside sqz]
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// Print the plugin's status every N seconds (SIGUSR1 prints it once)
    #[arg(long, value_name = "N", value_parser = seconds)]
    pub status: Option<f64>,
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// llama-server, llama-completion, llama-cli or another program, with its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if (0.1..=86400.0).contains(&n) => Ok(n),
        _ => Err("give a number of seconds, 0.1 at least".to_string()),
    }
}

/// The plugin that lies beside this program.
///
/// # Errors
/// There is none.
pub fn find_plugin(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        return path.canonicalize().with_context(|| format!("cannot find the plugin {}", path.display()));
    }
    let program = std::env::current_exe().context("cannot find this program's own folder")?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    for name in ["libggml-squeeze.so", "libggml_squeeze.so", "../lib/libggml-squeeze.so"] {
        if let Ok(path) = folder.join(name).canonicalize() {
            return Ok(path);
        }
    }
    bail!("there is no libggml-squeeze.so in {}: run 'make plugin', or name it with --plugin", folder.display())
}

/// Builds through libllama.
struct Builder<'a> {
    build: BuildArgs,
    text: &'a str,
    verbose: bool,
}

impl Builder<'_> {
    fn start(&self) -> Result<()> {
        static STARTED: AtomicBool = AtomicBool::new(false);
        if STARTED.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        llama::start(self.verbose)
    }
}

impl Maker for Builder<'_> {
    fn build(&mut self, index: &Path, state: Option<(State, &Path)>) -> Result<()> {
        self.start()?;
        eprintln!("indexing {} for {}: once", self.build.file.display(), self.build.model.model.display());
        let (slot_file, state_file) = match state {
            Some((State::Slot, path)) => (Some(path.to_path_buf()), None),
            Some((State::PromptCache, path)) => (None, Some(path.to_path_buf())),
            None => (None, None),
        };
        self.build.files = OutputArgs { output: index.to_path_buf(), state_file, slot_file };
        let report = build_cmd::make_of(&self.build, self.text)?;
        for (layer, why) in &report.dense_layers {
            eprintln!("layer {layer} stays dense: {why}");
        }
        eprintln!(
            "indexed {} tokens in {} layers: {:.1} MiB, prefill {:.1} s, clustering {:.1} s",
            report.n_prefix,
            report.n_indexed,
            report.bytes as f64 / 1048576.0,
            report.seconds[0],
            report.seconds[1],
        );
        Ok(())
    }

    fn convert(&mut self, n_prefix: usize, from: &Path, to: State, path: &Path) -> Result<()> {
        self.start()?;
        let model = Model::load_on(&self.build.model.model, &self.build.model.gpu)?;
        let mut context = llama::Context::for_states(&model, &self.build.model, n_prefix)?;
        let tokens = context.load_state(from)?;
        let present = context.n_past().min(tokens.len());
        context.prefill(&tokens[present..], |_| {})?;
        match to {
            State::Slot => context.save_slot(path, &tokens),
            State::PromptCache => context.save_prompt_cache(path, &tokens),
        }
    }
}

/// Everything that shapes index and state.
fn key(build: &BuildArgs, text: &str) -> Result<Key> {
    let settings = build.cluster.settings(1)?;
    let model = &build.model;
    std::fs::File::open(&model.model).with_context(|| format!("cannot read the model {}", model.model.display()))?;
    let mut key = Key::new();
    // the model's file holds vocabulary and template: with them and the rules of this version the text gives the tokens
    key.add("model", ModelFile::read(&model.model)?.id.fingerprint);
    key.add("text", text);
    key.add("chat", build.chat.name());
    key.add("settings", format!("{:?}", (settings.n_sink, settings.n_window, settings.iterations, settings.seed)));
    key.add("clusters", settings.cluster_share.to_le_bytes());
    key.add("rope", format!("{:?}", model.rope));
    key.add("swa_full", [u8::from(model.swa_full)]);
    key.add("cache", model.cache_types());
    Ok(key)
}

/// What `sqz build` would be told for this program.
fn build_args(args: &RunArgs, child: &Child, chat: Chat) -> Result<BuildArgs> {
    // with a type that the plugin does not know all is dense, whatever the index (`no_state` says so)
    let [cache_type_k, cache_type_v] = child.cache_types().unwrap_or([Element::F16; 2]);
    Ok(BuildArgs {
        model: ModelArgs {
            model: args.model.clone(),
            ctx_size: None,
            batch_size: 2048,
            ubatch_size: child.number(&args::UBATCH)?.filter(|&n| n > 0).unwrap_or(512),
            threads: child.number::<i64>(&args::THREADS)?.and_then(|n| u32::try_from(n).ok()).filter(|&n| n > 0),
            flash_attn: Flash::Auto,
            cache_type_k,
            cache_type_v,
            gpu: child.gpu(),
            rope: child.rope()?,
            swa_full: child.swa_full(),
        },
        file: args.file.clone(),
        files: OutputArgs::default(),
        chat,
        cluster: args.cluster.clone(),
    })
}

/// The state that the program can restore, if any.
fn state_for(child: &mut Child) -> Result<Option<State>> {
    let state = match child.kind {
        Kind::Server => State::Slot,
        Kind::Completion if child.raw(&args::PROMPT_CACHE).is_none() => State::PromptCache,
        Kind::Cli => {
            eprintln!("note: llama-cli cannot restore a saved prefix: its first answer computes it, once per start");
            return Ok(None);
        }
        _ => return Ok(None),
    };
    if let Some(why) = child.no_state() {
        eprintln!(
            "warning: {why}; no saved prefix is restored, and the index may not bind (attention stays dense then)"
        );
        return Ok(None);
    }
    if state == State::Slot {
        if let Some(why) = server::share_cells(child)? {
            eprintln!("warning: {why}; no saved prefix is restored: the first question of a slot prefills it");
            return Ok(None);
        }
    }
    Ok(Some(state))
}

fn check_context(child: &Child, entry: &Entry) -> Result<()> {
    if let Some(n_ctx) = child.number::<i64>(&args::CTX)?.filter(|&n| n > 0) {
        ensure!(
            entry.n_prefix < n_ctx as usize,
            "-c {n_ctx} is too small for the prefix of {} tokens and a question: raise it",
            entry.n_prefix
        );
    }
    let (config, _) = Config::from_env(|name| std::env::var(name).ok());
    if entry.n_prefix < config.min_prefix_cpu() {
        eprintln!(
            "note: below {} tokens attention stays dense (by default from {DEFAULT_MIN_PREFIX} on an index pays); set \
             GGML_SQUEEZE_MIN_PREFIX={} to use this one",
            config.min_prefix_cpu(),
            entry.n_prefix
        );
    }
    Ok(())
}

/// The command; returns the exit code of the program.
///
/// # Errors
/// Something is missing or does not fit, before the program is started.
pub fn run(args: &RunArgs, verbose: bool) -> Result<u8> {
    let plugin = find_plugin(args.plugin.as_deref())?;
    let mut child = Child::new(&args.program)?;
    let chat = args.chat.unwrap_or(match child.kind {
        Kind::Server | Kind::Cli => Chat::System,
        Kind::Completion | Kind::Other => Chat::Raw,
    });
    if child.kind != Kind::Other {
        child.set_model(&args.model)?;
    }
    if child.text(&args::FLASH).is_some_and(|v| ["off", "0", "false", "disabled"].contains(&v.as_str())) {
        bail!("without flash attention (-fa off) the index cannot be used: leave -fa out");
    }
    prompt::check(&child, chat)?;
    let template =
        [&args::TEMPLATE, &args::TEMPLATE_FILE].iter().any(|o| child.raw(o).is_some()) || child.has(&["--no-jinja"]);
    if chat != Chat::Raw && template {
        eprintln!(
            "warning: the index is made with the model's own chat template; under another one attention stays dense"
        );
    }
    let server = (child.kind == Kind::Server).then(|| server::Server::of(&child)).transpose()?;
    let free = || match &server {
        Some(s) if s.taken() => bail!("{} is in use by another program: give llama-server another --port", s.name()),
        _ => Ok(()),
    };
    free()?;

    let text = build_cmd::read_text(&args.file)?;
    let root = match &args.cache_dir {
        Some(folder) => folder.clone(),
        None => cache::default_folder(|name| std::env::var_os(name))?,
    };
    let cache = Cache::open(root)?;
    let build = build_args(args, &child, chat)?;
    let name = key(&build, &text)?.name();
    let about = Manifest {
        model: args.model.display().to_string(),
        text: args.file.display().to_string(),
        chat: chat.name().to_string(),
        ..Manifest::default()
    };
    let state = state_for(&mut child)?;
    let entry = cache.entry(&name, about, state, &mut Builder { build, text: &text, verbose })?;
    if !entry.built {
        eprintln!("using the index {}", entry.index_path.display());
    }
    check_context(&child, &entry)?;

    let scratch = cache.scratch()?;
    prompt::put(&mut child, &text, chat, scratch.path())?;
    drop(text);
    let mut slot = None;
    match state {
        Some(State::Slot) => {
            slot = Some(server::provide_slot_file(&mut child, &State::Slot.path(&entry.folder), &name)?);
        }
        Some(State::PromptCache) => {
            child.push("--prompt-cache", State::PromptCache.path(&entry.folder));
            child.args.push("--prompt-cache-ro".into());
        }
        None => {}
    }
    free()?;

    let status_file = scratch.path().join("status.json");
    let mut command = Command::new(&child.program);
    command.args(&child.args);
    command.env("GGML_BACKEND_PATH", &plugin);
    command.env("GGML_SQUEEZE_INDEX", &entry.index_path);
    command.env("GGML_SQUEEZE_STATUS", &status_file);
    if let Some(budget) = args.budget {
        command.env("GGML_SQUEEZE_BUDGET", budget.to_string());
        command.env_remove("GGML_SQUEEZE_THRESHOLD").env_remove("GGML_SQUEEZE_MASS");
    }
    let stop = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        let running = child::start(command)?;
        if let (Some(server), Some((file, _))) = (&server, &slot) {
            let (stop, n_prefix) = (&stop, entry.n_prefix);
            scope.spawn(move || server.restore(file, n_prefix, stop));
        }
        let ended = running.wait(&status_file, args.status.map(Duration::from_secs_f64));
        stop.store(true, Ordering::Relaxed);
        ended
    })?;
    if args.status.is_some() {
        eprintln!("{}", status::line(&status_file));
    }
    Ok(child::exit_code(status))
}
