//! `sqz`: builds, inspects, runs and measures ggml-squeeze indexes. Data on stdout, messages on stderr.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use sqz::{bench, build_cmd, eval, extend_cmd, facts, info, inspect, llama, pages, random_model, run};

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
    /// Index a text that grew, out of the index of its beginning
    Extend(extend_cmd::ExtendArgs),
    /// Start llama-server or another llama.cpp program with an index, made first where it is missing
    Run(run::RunArgs),
    /// Show what an index holds
    Inspect(inspect::InspectArgs),
    /// Plant facts into a text and write the questions that ask for them
    Facts(facts::FactsArgs),
    /// Measure how far sparse answers are from dense ones
    Eval(Box<eval::EvalArgs>),
    /// Measure speed, dense and sparse, in one process
    Bench(bench::BenchArgs),
    /// Write a model of random weights, for `bench --synthetic-index`
    #[command(hide = true)]
    RandomModel(random_model::RandomModelArgs),
    /// Write the man pages and the completions of bash, zsh and fish
    #[command(hide = true)]
    Pages(pages::PagesArgs),
    /// Show versions, devices, kernels and defaults
    Info(info::InfoArgs),
}

impl Command {
    fn run(self, verbose: bool) -> anyhow::Result<ExitCode> {
        let start = || llama::start(verbose);
        match self {
            Command::Run(args) => return run::run(&args, verbose).map(ExitCode::from),
            Command::Inspect(args) if args.model.is_some() => start().and_then(|()| inspect::run(args)),
            Command::Inspect(args) => inspect::run(args),
            Command::Build(args) => start().and_then(|()| build_cmd::run(&args)),
            Command::Extend(args) => start().and_then(|()| extend_cmd::run(&args)),
            Command::Facts(args) => start().and_then(|()| facts::run(&args)),
            Command::Eval(args) => start().and_then(|()| eval::run(&args)),
            Command::Bench(args) => start().and_then(|()| bench::run(&args)),
            Command::RandomModel(args) => random_model::run(&args),
            Command::Pages(args) => pages::run(&args, Cli::command()),
            Command::Info(args) => start().and_then(|()| info::run(&args)),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Our own arguments, with llama.cpp's short options of several letters as long ones; those of a program behind `--` stay as
/// they are.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut ours = true;
    given
        .map(|arg| {
            ours &= arg != "--";
            let long = arg.to_str().filter(|_| ours).and_then(llama::long_option);
            long.map_or(arg, |name| format!("--{name}").into())
        })
        .collect()
}

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    match cli.command.run(cli.verbose) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn llama_cpp_short_options_are_understood() {
        let given =
            ["sqz", "build", "-m", "m", "-f", "t", "-o", "o", "-ub", "64", "-fa", "on", "-t", "3", "-ctk", "q8_0"];
        let parse = |given: &[&str]| Cli::try_parse_from(arguments(given.iter().map(OsString::from)));
        let Command::Build(build) = parse(&given).unwrap().command else { panic!("not build") };
        assert_eq!((build.model.ubatch_size, build.model.threads), (64, Some(3)));
        assert_eq!(build.model.flash_attn, llama::Flash::On);
        assert_eq!(build.model.cache_types(), "q8_0/f16");
        let wrong = parse(&[&given[..], &["-ctv", "q5_1"]].concat()).err().unwrap().to_string();
        assert!(wrong.contains("f32, f16, bf16, q8_0, q4_0"), "{wrong}");
    }

    #[test]
    fn every_command_names_llama_cpps_short_options_in_its_help() {
        let mut command = Cli::command();
        command.build();
        let mut seen = 0;
        for option in command.get_subcommands().flat_map(|c| c.get_arguments()) {
            let short = llama::SHORT_OPTIONS.iter().find(|(_, long)| option.get_long() == Some(*long));
            let Some((short, long)) = short else { continue };
            let help = option.get_help().map(|h| h.to_string()).unwrap_or_default();
            assert!(help.contains(&format!("({short})")), "--{long}: {help}");
            seen += 1;
        }
        assert!(seen >= 4 * llama::SHORT_OPTIONS.len(), "build, extend, eval and bench have all of them: {seen}");
    }

    #[test]
    fn the_programs_own_options_stay_as_they_are() {
        let given = ["sqz", "run", "-m", "m", "-f", "t", "--", "llama-server", "-ub", "64", "-fa", "on", "-v"];
        let cli = Cli::try_parse_from(arguments(given.into_iter().map(OsString::from))).unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.program, ["llama-server", "-ub", "64", "-fa", "on", "-v"]);
        assert!(!cli.verbose);
    }
}
