//! What is asked behind which prefix: tasks made here, questions of `sqz facts`, or records of LongBench; and the indexes of a
//! prefix, made where they are missing.

use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::backend::Capture;
use ggml_squeeze::build::{self, Assembly, LayerCapture};
use ggml_squeeze::index::{self, Index};
use serde_json::Value;

use super::longbench::{self, Record};
use super::store::key;
use super::variant::Build;
use super::EvalArgs;
use crate::build_cmd::{self, read_text, ClusterArgs, Made};
use crate::facts;
use crate::gpu::Clustering;
use crate::llama::{Context, Model};
use crate::progress::Phase;
use crate::tasks::{self, Part, Question, Size, Want};
use crate::tokens::{self, Chat};

/// A prefix with its questions.
pub struct Source {
    pub name: String,
    pub tokens: Vec<i32>,
    /// The text whose beginning they are.
    pub text: String,
    pub questions: Vec<Question>,
    /// An index and a state that were given.
    pub given: Option<(PathBuf, Option<PathBuf>)>,
}

/// The questions of `sqz facts`.
fn of_facts(path: &Path) -> Result<Vec<Question>> {
    let question = |q: facts::Question| Question {
        task: format!("{:?}", q.kind).to_lowercase(),
        want: match q.answer {
            Some(answer) => Want::Parts(vec![Part { given: String::new(), answer: format!(" {answer}") }]),
            None => Want::Nothing,
        },
        id: q.id,
        prompt: q.prompt,
        depth: q.depth,
        n_predict: q.n_predict,
    };
    Ok(facts::read_questions(path)?.into_iter().map(question).collect())
}

fn source(args: &EvalArgs, model: &Model, name: &str, text: String, questions: Vec<Question>) -> Result<Source> {
    let tokens = tokens::prefix(model, &text, Chat::Raw, args.model.n_threads())
        .with_context(|| format!("cannot make a prefix of {name}"))?;
    Ok(Source { name: name.to_string(), tokens, text, questions, given: None })
}

/// All prefixes that the options name.
///
/// # Errors
/// A file cannot be read or used, or the options do not fit together.
pub fn sources(args: &EvalArgs, model: &Model) -> Result<Vec<Source>> {
    let name = |path: &Path| path.display().to_string();
    let Some(path) = &args.questions else {
        ensure!(
            args.index.is_none(),
            "--index needs the --questions that are asked behind it; tasks are planted into a text (-f)"
        );
        let (what, text) = match &args.file {
            Some(file) => (name(file), read_text(file)?),
            None => ("Northanger Abbey".to_string(), tasks::BUILT_IN.to_string()),
        };
        let chosen = if args.tasks.is_empty() { tasks::Task::ALL.to_vec() } else { args.tasks.clone() };
        let n_token = args.tokens.unwrap_or_else(|| default_tokens(model));
        let size = Size { n_token, count: args.count, seed: args.task_seed };
        let made = tasks::document(&text, &chosen, &size, &|t| Ok(model.tokenise(t, false)?.len()))
            .with_context(|| format!("no tasks can be made of {what}"))?;
        return Ok(vec![source(args, model, &what, made.text, made.questions)?]);
    };
    ensure!(args.tasks.is_empty(), "--tasks are made here, --questions come from a file: give one of them");
    let first: Value = serde_json::from_str(read_text(path)?.lines().find(|l| !l.trim().is_empty()).unwrap_or("{}"))
        .with_context(|| format!("{} has no JSON object in its first line", path.display()))?;
    if first.get("context").is_some() {
        ensure!(
            args.index.is_none() && args.file.is_none(),
            "records have their own context: leave out --index and -f"
        );
        let limit = args.tokens.unwrap_or_else(|| default_tokens(model));
        return records(args, model, &longbench::read(path)?, limit);
    }
    let questions = of_facts(path)?;
    match (&args.index, &args.file) {
        (Some(index), None) => {
            let opened = Index::open(index).with_context(|| format!("cannot use the index {}", index.display()))?;
            let tokens = opened.meta().tokens.clone();
            let text = model.text(&tokens);
            let given = Some((index.clone(), args.state_file.clone()));
            Ok(vec![Source { name: name(index), tokens, text, questions, given }])
        }
        (None, Some(file)) => Ok(vec![source(args, model, &name(file), read_text(file)?, questions)?]),
        _ => bail!(
            "behind what are the questions of {} asked? Give the text with -f, or its index with --index",
            path.display()
        ),
    }
}

/// What a model was trained on, less room for questions, and no more than what is quick.
fn default_tokens(model: &Model) -> usize {
    model.n_ctx_train().saturating_sub(1024).clamp(1024, 8192)
}

/// One prefix for each context, in the order of the file.
fn records(args: &EvalArgs, model: &Model, records: &[Record], limit: usize) -> Result<Vec<Source>> {
    let mut sources: Vec<(&str, Source)> = Vec::new();
    for (i, record) in records.iter().enumerate() {
        let question = record.question(i);
        if let Some((_, known)) = sources.iter_mut().find(|(context, _)| *context == record.context) {
            known.questions.push(question);
            continue;
        }
        let name = format!("record {}", i + 1);
        let text = longbench::cut(&record.prefix(), limit, &|t| model.tokenise(t, false), &|t| model.text(t))?;
        sources.push((&record.context, source(args, model, &name, text, vec![question])?));
    }
    Ok(sources.into_iter().map(|(_, source)| source).collect())
}

/// Files of a prefix: one index for each way to build it, and the state.
pub struct Prepared {
    pub indexes: Vec<(Build, PathBuf)>,
    pub state: Option<PathBuf>,
}

impl Prepared {
    pub fn index(&self, build: Build) -> Result<&Path> {
        let found = self.indexes.iter().find(|(known, _)| *known == build);
        Ok(&found.context("an index of this build was made")?.1)
    }

    /// Forgets them.
    pub fn remove(&self) {
        for path in self.indexes.iter().map(|i| &i.1).chain(&self.state) {
            // One that is left costs room and nothing else.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The files of a prefix in `folder`; those that are missing are made, with one prefill for all.
///
/// # Errors
/// As `sqz build`.
pub fn prepare(
    args: &EvalArgs,
    model: &Model,
    source: &Source,
    builds: &[Build],
    folder: &Path,
    of: &str,
) -> Result<Prepared> {
    if let Some((index, state)) = &source.given {
        let opened = Index::open(index).with_context(|| format!("cannot use the index {}", index.display()))?;
        let (meta, own) = (opened.meta(), builds[0]);
        let given = Build { sinks: meta.n_sink, clusters: meta.build.cluster_share, seed: meta.build.seed };
        ensure!(
            builds.iter().all(|build| *build == given || *build == own) && builds.len() == 1,
            "{} is one index, and other numbers of sinks, clusters or another seed need their own: give the text with -f",
            index.display()
        );
        return Ok(Prepared { indexes: vec![(own, index.clone())], state: state.clone() });
    }
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let path_of = |build: &Build| {
        let name = key(&[of, &serde_json::to_string(build).unwrap_or_default(), &args.cluster.window.to_string()]);
        (*build, folder.join(format!("{name}.sqz.gguf")))
    };
    let prepared = Prepared {
        indexes: builds.iter().map(path_of).collect(),
        state: Some(folder.join(format!("{}.state", key(&[of])))),
    };
    let state = prepared.state.as_deref().context("a state was named")?;
    let missing: Vec<&(Build, PathBuf)> =
        prepared.indexes.iter().filter(|(_, path)| !state.exists() || Index::open(path).is_err()).collect();
    if missing.is_empty() {
        return Ok(prepared);
    }
    let n = source.tokens.len();
    build_cmd::check_lengths(model, Path::new(&source.name), &source.tokens)?;
    let capture = Capture::new(n, args.cluster.window as usize);
    let mut context = Context::new(model, &args.model, n, Some(capture))?;
    build_cmd::prefill(&mut context, &source.tokens)?;
    let partial = state.with_extension("part");
    context.save_prompt_cache(&partial, &source.tokens)?;
    let capture = &*context.capture().context("the context was made with a capture")?;
    for (build, path) in missing {
        let cluster =
            ClusterArgs { sinks: build.sinks, clusters: build.clusters, seed: build.seed, ..args.cluster.clone() };
        let settings = cluster.settings(args.model.n_threads())?;
        let least = (settings.n_sink + settings.n_window) as usize + 2;
        ensure!(n >= least, "{} has {n} tokens, {least} are needed", source.name);
        let meta = build_cmd::meta(model, &args.model, Chat::Raw, &settings, source.tokens.clone())?;
        let mut made = Assembly::new(meta, &settings);
        let mut clustering = Clustering::new(&settings);
        let mut make = |layer: &LayerCapture, first: bool, phase: &Phase, i: usize| -> Result<Made> {
            let rows = capture.device_rows(layer.layer);
            let built = clustering.layer(layer, rows, &|part| phase.part(i, part))?;
            Ok(Made::Layer(Box::new(built), if first { Some(build::sketch(layer)?) } else { None }))
        };
        build_cmd::cluster(capture, &mut made, &mut make)?;
        index::write(path, &made.finish()?)?;
    }
    // The state is there once all indexes are.
    std::fs::rename(&partial, state).with_context(|| format!("cannot write {}", state.display()))?;
    Ok(prepared)
}
