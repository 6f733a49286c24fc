//! `sqz`: builds, inspects and measures ggml-squeeze indexes. Data on stdout, messages on stderr.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use sqz::{bench, build_cmd, eval, facts, inspect, llama};

#[derive(Parser)]
#[command(name = "sqz", version, about, arg_required_else_help = true)]
struct Cli {
    /// Show llama.cpp's own messages
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Index a text that prompts begin with
    Build(build_cmd::BuildArgs),
    /// Show what an index holds
    Inspect(inspect::InspectArgs),
    /// Plant facts into a text and write the questions that ask for them
    Facts(facts::FactsArgs),
    /// Measure how far sparse answers are from dense ones
    Eval(eval::EvalArgs),
    /// Measure speed, dense and sparse, in one process
    Bench(bench::BenchArgs),
}

/// llama.cpp's short options of several letters, as long ones.
fn long_option(arg: OsString) -> OsString {
    match arg.to_str() {
        Some("-ub") => "--ubatch-size".into(),
        Some("-fa") => "--flash-attn".into(),
        _ => arg,
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(std::env::args_os().map(long_option));
    let run = || match cli.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Build(args) => llama::start(cli.verbose).and_then(|()| build_cmd::run(&args)),
        Command::Facts(args) => llama::start(cli.verbose).and_then(|()| facts::run(&args)),
        Command::Eval(args) => llama::start(cli.verbose).and_then(|()| eval::run(&args)),
        Command::Bench(args) => llama::start(cli.verbose).and_then(|()| bench::run(&args)),
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn llama_cpp_short_options_are_understood() {
        let given = ["sqz", "build", "-m", "m", "-f", "t", "-o", "o", "-ub", "64", "-fa", "on", "-t", "3"];
        let cli = Cli::try_parse_from(given.map(|a| long_option(a.into()))).unwrap();
        let Command::Build(build) = cli.command else { panic!("not build") };
        assert_eq!((build.model.ubatch_size, build.model.threads), (64, Some(3)));
        assert_eq!(build.model.flash_attn, llama::Flash::On);
    }
}
