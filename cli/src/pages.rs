//! `sqz pages`: man pages and shell completions, from the definitions of the options themselves. For packagers; hidden.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Command;
use clap_complete::Shell;

/// Options of `sqz pages`.
#[derive(clap::Args, Clone, Debug)]
pub struct PagesArgs {
    /// Folder to write to, `share` of an installation; what is missing of it is made
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// Where the completions of each shell lie below `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/sqz"),
    (Shell::Zsh, "zsh/site-functions/_sqz"),
    (Shell::Fish, "fish/vendor_completions.d/sqz.fish"),
];

/// Writes `man/man1/sqz*.1` and the completions of bash, zsh and fish below the folder.
///
/// # Errors
/// A folder or a file cannot be written.
pub fn run(args: &PagesArgs, command: Command) -> Result<()> {
    let mut command = public(command);
    let man = args.folder.join("man/man1");
    make(&man)?;
    clap_mangen::generate_to(command.clone(), &man)
        .with_context(|| format!("cannot write the man pages to {}", man.display()))?;
    for (shell, name) in COMPLETIONS {
        let path = args.folder.join(name);
        path.parent().map_or(Ok(()), make)?;
        let mut file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        clap_complete::generate(shell, &mut command, "sqz", &mut file);
    }
    Ok(())
}

/// The command without its hidden subcommands, which completions would offer.
fn public(whole: Command) -> Command {
    let shown = whole.get_subcommands().filter(|c| !c.is_hide_set()).cloned();
    Command::new("sqz")
        .version(env!("CARGO_PKG_VERSION"))
        .about(env!("CARGO_PKG_DESCRIPTION"))
        .args(whole.get_arguments().cloned())
        .subcommands(shown)
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
}
