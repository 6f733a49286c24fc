//! The text in front of the question of llama-completion, or as system message of llama-completion and llama-cli.

use std::path::Path;

use anyhow::{bail, ensure, Context as _, Result};

use super::args::{self, Child, Kind};
use crate::build_cmd::read_text;
use crate::tokens::Chat;

/// What excludes a prefix, found before anything is built.
///
/// # Errors
/// llama-cli is to do what it cannot do with one.
pub fn check(child: &Child, chat: Chat) -> Result<()> {
    if child.kind != Kind::Cli {
        return Ok(());
    }
    ensure!(
        child.raw(&args::SERVER_BASE).is_none(),
        "with --server-base the answers come from another process, which has neither plugin nor index: start that \
         llama-server with sqz run, and llama-cli by itself with the text as -sysf"
    );
    ensure!(
        chat != Chat::Raw,
        "llama-cli puts every prompt into the chat template, where --chat raw does not fit: leave --chat out, or run \
         llama-completion"
    );
    ensure!(
        chat != Chat::User || child.raw(&args::PROMPT).is_some() || child.raw(&args::FILE).is_some(),
        "with --chat user the text and the question are one message: give llama-cli the question with -p or -f, or leave \
         --chat out and ask as often as you like"
    );
    Ok(())
}

/// Turns the question that the user gives (`-p` or `-f`) into text and question, in files of `folder`.
///
/// # Errors
/// A file cannot be read or written, or the user's options exclude what is needed.
pub fn put(child: &mut Child, text: &str, chat: Chat, folder: &Path) -> Result<()> {
    match (child.kind, chat) {
        (Kind::Completion, Chat::Raw) => {
            ensure!(
                !child.has(&["-cnv", "--conversation"]),
                "-cnv puts the prompt into a chat template, where --chat raw does not fit: give sqz run --chat user or system"
            );
            if !child.has(&["-no-cnv", "--no-conversation"]) {
                child.args.push("-no-cnv".into());
            }
            put_prompt(child, text, folder)
        }
        (Kind::Completion | Kind::Cli, Chat::User) => put_prompt(child, text, folder),
        (Kind::Completion | Kind::Cli, Chat::System) => {
            ensure!(
                child.raw(&args::SYSTEM).is_none() && child.raw(&args::SYSTEM_FILE).is_none(),
                "the text is the system message: leave -sys and -sysf out, or choose another --chat"
            );
            put_file(child, "-sysf", folder, "system.txt", text)
        }
        _ => Ok(()),
    }
}

fn put_prompt(child: &mut Child, text: &str, folder: &Path) -> Result<()> {
    if child.raw(&args::BINARY_FILE).is_some() {
        bail!("the text and a question of bytes (-bf) do not go together: give the question with -p or -f");
    }
    let question = match (child.text(&args::PROMPT), child.path(&args::FILE)) {
        (Some(_), Some(_)) => bail!("the question is given twice: with -p or -f, not both"),
        (Some(question), None) => question,
        (None, Some(file)) => {
            let mut question = read_text(&file)?;
            // as llama.cpp reads a prompt file
            if question.ends_with('\n') {
                question.pop();
            }
            question
        }
        (None, None) => String::new(),
    };
    // llama.cpp replaces \n, \\ and so on in every prompt, from a file too; the text must stay as it is
    let text = if child.has(&["--no-escape"]) { text.to_string() } else { text.replace('\\', "\\\\") };
    child.remove(&args::PROMPT);
    child.remove(&args::FILE);
    put_file(child, "-f", folder, "prompt.txt", &(text + &question))
}

fn put_file(child: &mut Child, option: &str, folder: &Path, name: &str, text: &str) -> Result<()> {
    let path = folder.join(name);
    // llama.cpp drops one line end at the end of a file
    std::fs::write(&path, format!("{text}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    child.push(option, path);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn case(line: &str, chat: Chat) -> Result<(Child, tempfile::TempDir)> {
        let folder = tempfile::tempdir().unwrap();
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let mut child = Child::new(&words)?;
        put(&mut child, "a\\n text\n", chat, folder.path())?;
        Ok((child, folder))
    }

    fn file(folder: &tempfile::TempDir, name: &str) -> String {
        std::fs::read_to_string(folder.path().join(name)).unwrap()
    }

    #[test]
    fn the_question_comes_behind_the_text() {
        let (child, folder) = case("llama-completion -p Why? -n 3", Chat::Raw).unwrap();
        assert_eq!(child.args[..4], ["-n", "3", "-no-cnv", "-f"]);
        assert_eq!(file(&folder, "prompt.txt"), "a\\\\n text\nWhy?\n");
        let (child, folder) = case("llama-completion --no-escape", Chat::User).unwrap();
        assert_eq!(file(&folder, "prompt.txt"), "a\\n text\n\n");
        assert!(!child.has(&["-no-cnv"]));
    }

    #[test]
    fn a_system_message_is_a_file_of_its_own() {
        for program in ["llama-completion", "llama-cli"] {
            let (child, folder) = case(&format!("{program} -p Why?"), Chat::System).unwrap();
            assert_eq!(child.text(&args::PROMPT).as_deref(), Some("Why?"));
            assert_eq!(file(&folder, "system.txt"), "a\\n text\n\n");
        }
        assert!(case("llama-cli -sys x", Chat::System).is_err());
    }

    #[test]
    fn other_programs_stay_as_they_are() {
        for (line, chat) in [("llama-server", Chat::System), ("./x -p y", Chat::User)] {
            let (child, _) = case(line, chat).unwrap();
            assert_eq!(child.args.len(), line.split(' ').count() - 1);
        }
    }

    #[test]
    fn llama_cli_takes_what_fits_its_chat_template() {
        let (child, folder) = case("llama-cli -p Why?", Chat::User).unwrap();
        assert_eq!(file(&folder, "prompt.txt"), "a\\\\n text\nWhy?\n");
        assert_eq!(child.args[..1], ["-f"]);
        for (line, chat, fits) in [
            ("llama-cli", Chat::System, true),
            ("llama-cli -f x", Chat::User, true),
            ("llama-cli", Chat::User, false),
            ("llama-cli -p x", Chat::Raw, false),
            ("llama-cli --server-base http://x", Chat::System, false),
            ("llama-completion", Chat::Raw, true),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(check(&Child::new(&words).unwrap(), chat).is_ok(), fits, "{line}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for line in ["llama-completion -p a -f b", "llama-completion -bf x", "llama-completion -cnv"] {
            assert!(case(line, Chat::Raw).is_err(), "{line}");
        }
    }
}
