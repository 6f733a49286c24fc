//! What tests on a GPU are told by the environment: a model and a text.

use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use ggml_squeeze::index::Index;
use sqz::build_cmd::{make, BuildArgs};

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    build: BuildArgs,
}

/// `sqz build` of this text.
pub fn build_of(model: &Path, text: &Path, output: &Path) -> BuildArgs {
    let [m, f, o] = [model, text, output].map(|path| path.to_str().unwrap());
    Args::parse_from(["sqz", "-m", m, "-f", f, "-o", o]).build
}

/// Of the model and the text in SQZ_MODEL and SQZ_TEXT.
pub fn build(output: &Path) -> BuildArgs {
    let [model, text] =
        ["SQZ_MODEL", "SQZ_TEXT"].map(|n| std::env::var(n).unwrap_or_else(|_| panic!("{n} is not set")));
    build_of(Path::new(&model), Path::new(&text), output)
}

/// Makes the index that `sqz build` is asked for.
pub fn index(build: &BuildArgs) -> Arc<Index> {
    make(build).unwrap();
    Arc::new(Index::open(&build.files.output).unwrap())
}
