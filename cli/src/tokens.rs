//! Which tokens are the prefix: those that stay the same whatever is written after the text.

use anyhow::{ensure, Context as _, Result};

use crate::llama::{apply_template, Model};
use crate::template::Template;

/// How the text comes into the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Chat {
    /// The text as it is, for completion
    Raw,
    /// As system message, in the model's chat template
    System,
    /// As the start of the first user message, in the model's chat template
    User,
}

impl Chat {
    pub fn name(self) -> &'static str {
        match self {
            Chat::Raw => "raw",
            Chat::System => "system",
            Chat::User => "user",
        }
    }
}

/// What may follow. Byte-pair merges and pre-tokenisers look at letters, digits, spaces, line ends and punctuation
/// differently; each kind is here, alone and in front of others.
const CONTINUATIONS: &[&str] = &[
    "",
    "a",
    "e",
    "s",
    "t",
    "A",
    "S",
    "ing",
    "The",
    " the",
    " a",
    " A",
    "0",
    "1",
    "9",
    "42",
    " 7",
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\n\t",
    "\nThe",
    "\n- ",
    ".",
    ",",
    ";",
    ":",
    "!",
    "?",
    "'",
    "'s",
    "\"",
    "(",
    ")",
    "]",
    "}",
    "[",
    "{",
    "<",
    ">",
    "/",
    "//",
    "\\",
    "-",
    "--",
    "_",
    "=",
    "==",
    "*",
    "**",
    "#",
    "##",
    "|",
    "&",
    "@",
    "$",
    "%",
    "+",
    "~",
    "^",
    "`",
    "```",
    "...",
    ". ",
    ".\n",
    ", ",
    "):\n",
    "\u{e9}",
    "\u{201d}",
    "\u{4e2d}",
    "\u{1f600}",
    "\u{301}",
];

/// Length of the longest common start.
fn common(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// The whole prompts that may follow from the text, as strings.
fn prompts(model: &Model, text: &str, chat: Chat) -> Result<Vec<String>> {
    if chat == Chat::Raw {
        return Ok(CONTINUATIONS.iter().map(|c| format!("{text}{c}")).collect());
    }
    let source = model
        .chat_template()
        .with_context(|| format!("{} has no chat template: use --chat raw", model.path().display()))?;
    let (bos, eos, add_bos) = model.chat_tokens();
    let template = Template::new(&source.to_string_lossy(), &bos, &eos, add_bos);
    let own = template.and_then(|t| chats(text, chat, |messages| t.render(messages)));
    own.or_else(|why| {
        eprintln!(
            "warning: the model's chat template cannot be rendered here ({why:#}); llama.cpp's built-in form of it is used: \
             where llama-server's text differs, attention stays dense"
        );
        chats(text, chat, |messages| apply_template(&source, messages, true))
    })
}

/// One conversation for every continuation.
fn chats(text: &str, chat: Chat, render: impl Fn(&[(&str, &str)]) -> Result<String>) -> Result<Vec<String>> {
    CONTINUATIONS
        .iter()
        .map(|c| match chat {
            Chat::System => render(&[("system", text), ("user", c)]),
            _ => render(&[("user", &format!("{text}{c}"))]),
        })
        .collect()
}

/// Tokens of the prefix made from `text`.
///
/// # Errors
/// The model has no chat template that can be rendered, or the text is empty, or it is lost in the template.
pub fn prefix(model: &Model, text: &str, chat: Chat, n_threads: usize) -> Result<Vec<i32>> {
    ensure!(!text.trim().is_empty(), "the text is empty");
    let prompts = prompts(model, text, chat)?;
    let chunk = prompts.len().div_ceil(n_threads.max(1));
    let starts: Vec<Result<Vec<i32>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = prompts
            .chunks(chunk)
            .map(|part| scope.spawn(move || stable_start(part.iter().map(|p| model.tokenise(p, true)))))
            .collect();
        workers.into_iter().map(|w| w.join().expect("tokenising does not panic")).collect()
    });
    stable_start(starts.into_iter())
}

/// The longest common start of several token lists.
fn stable_start(mut lists: impl Iterator<Item = Result<Vec<i32>>>) -> Result<Vec<i32>> {
    let mut first = lists.next().unwrap_or_else(|| Ok(Vec::new()))?;
    for list in lists {
        let n = common(&first, &list?);
        first.truncate(n);
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stable_start_is_common_to_all() {
        let lists = [vec![1, 2, 3, 4], vec![1, 2, 3], vec![1, 2, 9, 4]];
        assert_eq!(stable_start(lists.into_iter().map(Ok)).unwrap(), [1, 2]);
        assert_eq!(stable_start(std::iter::empty()).unwrap(), Vec::<i32>::new());
    }

    #[test]
    fn continuations_are_distinct_and_of_every_kind() {
        let mut sorted = CONTINUATIONS.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), CONTINUATIONS.len());
        let kinds: [fn(char) -> bool; 5] = [
            char::is_alphabetic,
            char::is_numeric,
            char::is_whitespace,
            |c| c.is_ascii_punctuation(),
            |c| !c.is_ascii(),
        ];
        for kind in kinds {
            assert!(CONTINUATIONS.iter().any(|c| c.chars().next().is_some_and(kind)));
        }
    }
}
