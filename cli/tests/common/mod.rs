//! What the tests on a real model share: where it is, an index of a short text, a run of the unmodified llama.cpp.

#![allow(dead_code)]

pub mod context;
pub mod gpu;
pub mod host;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The checkout, for the text and for `target/`.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// SmolLM2-135M, as scripts/models.sh puts it.
pub fn model() -> PathBuf {
    model_file("smollm2-135m.gguf")
}

/// A model that scripts/models.sh fetches.
pub fn model_file(name: &str) -> PathBuf {
    let folder = std::env::var_os("SQZ_MODELS").map_or_else(|| target().join("models"), PathBuf::from);
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run scripts/models.sh (make test does)", path.display());
    path
}

/// A text, cut to `n` bytes. The tests' own file: what is bound in some of them depends on every token.
pub fn text(n: usize) -> String {
    let all = include_str!("text.txt").repeat(4);
    all[..all.char_indices().map(|(i, _)| i).find(|&i| i >= n).unwrap_or(all.len())].to_string()
}

pub fn sqz(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sqz")).args(args).output().unwrap()
}

/// The plugin's and the tool's own lines in what a program wrote, each of which may have come into the middle of one of the program's.
pub fn own_lines(said: &str) -> impl DoubleEndedIterator<Item = &str> {
    said.lines().filter_map(|line| line.find("squeeze: ").map(|at| &line[at..]))
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Builds an index of `text` in `folder`.
pub fn build(folder: &Path, text: &str, more: &[&str]) -> PathBuf {
    build_with(&model(), folder, text, more)
}

/// As `build`, with another model.
pub fn build_with(model: &Path, folder: &Path, text: &str, more: &[&str]) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    let (input, output) = (folder.join("prefix.txt"), folder.join("prefix.sqz.gguf"));
    std::fs::write(&input, text).unwrap();
    let mut args = vec!["build", "-m", model.to_str().unwrap(), "-f", input.to_str().unwrap()];
    args.extend(["-o", output.to_str().unwrap()]);
    args.extend(more);
    let run = sqz(&args);
    assert!(run.status.success(), "{}", stderr(&run));
    output
}

/// Folder of llama.cpp's programs.
pub fn llama_bin() -> PathBuf {
    std::env::var_os("SQZ_LLAMA_BIN").map_or_else(|| target().join("llama/bin"), PathBuf::from)
}

/// A program of the unmodified llama.cpp, as scripts/llama.sh builds it.
pub fn program(name: &str) -> PathBuf {
    let path = llama_bin().join(name);
    assert!(path.is_file(), "{} is missing: run scripts/llama.sh (make test does)", path.display());
    path
}

/// llama-completion of the unmodified llama.cpp on `prompt`, 12 tokens, with these variables set.
pub fn completion(prompt: &Path, variables: &[(&str, &str)]) -> Output {
    let model = model();
    let args = ["-m", model.to_str().unwrap(), "-f", prompt.to_str().unwrap(), "-n", "12", "--temp", "0", "-no-cnv"];
    let mut command = Command::new(program("llama-completion"));
    command.args(args).args(["--no-display-prompt", "-t", "2"]).envs(variables.iter().copied());
    command.output().unwrap_or_else(|e| panic!("llama-completion: {e}"))
}

pub fn plugin() -> String {
    let path = target().join("release/libggml-squeeze.so");
    assert!(path.is_file(), "{} is missing: run make plugin", path.display());
    path.to_str().unwrap().to_string()
}
