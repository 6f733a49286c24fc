//! `sqz facts`: plants invented facts into a real text, at known depths, and writes the questions that ask for them, with
//! quotes and free continuations beside them. Everything follows from text and seed.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::random::split_mix;
use serde::{Deserialize, Serialize};

use crate::build_cmd::read_text;
use crate::llama::Model;

const N_FACT: usize = 14;
const FACT_TOKENS: usize = 20;
const FREE_TOKENS: usize = 64;
/// Depths of the facts, as shares of the text.
const DEPTHS: (f64, f64) = (0.04, 0.95);
const QUOTE_DEPTHS: [f64; 3] = [0.15, 0.45, 0.75];
const QUOTE_WORDS: usize = 14;

/// What facts begin with. Different from each other in every part: a model of 135M parameters mixes up facts of one pattern,
/// and what it cannot answer with dense attention tells nothing about sparse.
pub(crate) const CUES: [&str; N_FACT] = [
    "The cat of the archivist is named",
    "The lighthouse keeper wrote a long letter to",
    "The winner of the chess tournament was",
    "The bakery on the corner belongs to",
    "The violin teacher is married to",
    "The bridge over the river was designed by",
    "The oldest apple tree in the village was planted by",
    "The museum bought the golden mask from",
    "The captain of the whaling ship was called",
    "The astronomer named the new comet after",
    "The red barn was painted last summer by",
    "The secret door can only be opened by",
    "The queen sent seven horses to",
    "The recipe for the plum cake comes from",
];
/// Names that begin differently, so that a small model which knows one of them by its start knows which one it is.
pub(crate) const NAMES: [&str; 28] = [
    "Ambrose",
    "Barnaby",
    "Cordelia",
    "Drusilla",
    "Euphemia",
    "Fitzgerald",
    "Gulliver",
    "Hyacinth",
    "Ignatius",
    "Jocasta",
    "Kensington",
    "Leopold",
    "Marmaduke",
    "Nicodemus",
    "Ottoline",
    "Percival",
    "Quentin",
    "Rosalind",
    "Septimus",
    "Thaddeus",
    "Ulysses",
    "Valentina",
    "Winifred",
    "Xerxes",
    "Yolanda",
    "Zebedee",
    "Montague",
    "Sylvester",
];
const FREE: [&str; 5] = [
    "In short, the text above says that",
    "The most important rule is",
    "For example, consider the following",
    "There are two reasons for this. First,",
    "Once upon a time",
];

/// Options of `sqz facts`.
#[derive(Clone, Debug, clap::Args)]
pub struct FactsArgs {
    /// Model file, for its tokeniser
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Cut the text so that it has about this many tokens with the facts
    #[arg(long, value_name = "N")]
    tokens: usize,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The text with the facts
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The questions, one JSON object per line
    #[arg(long, value_name = "FILE")]
    questions: PathBuf,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Fact,
    Quote,
    Free,
}

/// One prompt that follows the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub id: String,
    pub kind: Kind,
    pub prompt: String,
    /// What the answer to a fact begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Where in the text it stands, as a share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Tokens to generate.
    pub n_predict: usize,
}

/// splitmix64: the same numbers wherever and whenever.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }
    /// In 0..1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
    fn next(&mut self) -> u64 {
        split_mix(&mut self.0)
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Places where a sentence can be put in: in front of a paragraph; in a text with few of them, of a line or a sentence.
fn boundaries(text: &str) -> Vec<usize> {
    let behind = |end: &str| -> Vec<usize> {
        let places = text.match_indices(end).map(|(i, _)| i + end.len());
        places.filter(|p| *p < text.len() && text.as_bytes()[*p] != b'\n').collect()
    };
    let kinds = [behind("\n\n"), behind("\n"), behind(". ")];
    kinds.into_iter().find(|places| places.len() > N_FACT * 2).unwrap_or_default()
}

/// The boundary nearest to a share of the text.
fn nearest(places: &[usize], len: usize, depth: f64) -> Option<usize> {
    let wanted = (len as f64 * depth) as usize;
    places.iter().copied().min_by_key(|p| p.abs_diff(wanted))
}

/// Plants the facts; returns the text and all questions.
///
/// # Errors
/// The text has too few lines or words.
pub fn plant(text: &str, seed: u64) -> Result<(String, Vec<Question>)> {
    let mut random = Random(seed);
    let mut cues = CUES;
    let mut names: Vec<&str> = NAMES.into_iter().filter(|n| !text.contains(n)).collect();
    ensure!(names.len() >= N_FACT, "the text has too many of the names that facts are made of: give another text");
    random.shuffle(&mut cues);
    random.shuffle(&mut names);
    let mut places = boundaries(text);
    let mut planted: Vec<(usize, String)> = Vec::new();
    let mut questions: Vec<Question> = Vec::new();
    for i in 0..N_FACT {
        let depth = DEPTHS.0 + (DEPTHS.1 - DEPTHS.0) * i as f64 / (N_FACT - 1) as f64;
        let place = nearest(&places, text.len(), depth).with_context(|| {
            format!("the text has too few lines or sentences for {N_FACT} facts: give a longer one")
        })?;
        places.retain(|p| *p != place);
        let (start, answer) = (cues[i], names[i]);
        let before = &text.as_bytes()[..place];
        let end = [&b"\n\n"[..], b"\n"].into_iter().find(|e| before.ends_with(e)).unwrap_or(b" ");
        planted.push((place, format!("{start} {answer}.{}", String::from_utf8_lossy(end))));
        questions.push(Question {
            id: format!("fact{:02}", i + 1),
            kind: Kind::Fact,
            prompt: format!("\n{start}"),
            answer: Some(answer.to_string()),
            depth: Some(place as f64 / text.len() as f64),
            n_predict: FACT_TOKENS,
        });
    }
    for (i, depth) in QUOTE_DEPTHS.into_iter().enumerate() {
        let place =
            nearest(&boundaries(text), text.len(), depth).context("the text has no line or sentence to quote")?;
        let words: Vec<&str> = text[place..].split_whitespace().take(QUOTE_WORDS).collect();
        ensure!(words.len() == QUOTE_WORDS, "the text is too short to quote {QUOTE_WORDS} words at {depth}");
        questions.push(Question {
            id: format!("quote{}", i + 1),
            kind: Kind::Quote,
            prompt: format!("\n{}", words.join(" ")),
            answer: None,
            depth: Some(place as f64 / text.len() as f64),
            n_predict: FREE_TOKENS,
        });
    }
    questions.extend(FREE.iter().enumerate().map(|(i, prompt)| Question {
        id: format!("free{}", i + 1),
        kind: Kind::Free,
        prompt: format!("\n{prompt}"),
        answer: None,
        depth: None,
        n_predict: FREE_TOKENS,
    }));
    planted.sort_by_key(|p| p.0);
    let (mut out, mut from) = (String::with_capacity(text.len() + 1024), 0);
    for (place, sentence) in &planted {
        out.push_str(&text[from..*place]);
        out.push_str(sentence);
        from = *place;
    }
    out.push_str(&text[from..]);
    Ok((out, questions))
}

/// Reads a questions file.
pub fn read_questions(path: &std::path::Path) -> Result<Vec<Question>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty());
    let questions: Vec<Question> = lines
        .map(|(i, l)| {
            serde_json::from_str(l).with_context(|| format!("{} line {} is no question", path.display(), i + 1))
        })
        .collect::<Result<_>>()?;
    ensure!(!questions.is_empty(), "{} has no questions: make some with sqz facts", path.display());
    let no_tokens = questions.iter().find(|q| q.n_predict == 0);
    ensure!(no_tokens.is_none(), "{}: n_predict must be at least 1", path.display());
    Ok(questions)
}

/// The command.
pub fn run(args: &FactsArgs) -> Result<()> {
    let text = read_text(&args.file)?;
    let model = Model::load(&args.model)?;
    // A sentence takes about 14 tokens.
    let wanted =
        args.tokens.checked_sub(N_FACT * 14).context("--tokens is too few for the facts alone: give 1024 or more")?;
    // No token is longer than 64 bytes on average, so this is enough text and tokenising stays quick.
    let enough = (0..=text.len().min(args.tokens * 64)).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    let tokens = model.tokenise(&text[..enough], false)?;
    ensure!(
        tokens.len() >= wanted,
        "{} has only {} tokens: give a longer text or lower --tokens",
        args.file.display(),
        tokens.len()
    );
    let cut = model.text(&tokens[..wanted]);
    let cut = cut.rfind('\n').map_or(cut.as_str(), |i| &cut[..=i]);
    let (planted, questions) = plant(cut, args.seed)?;
    std::fs::write(&args.output, &planted).with_context(|| format!("cannot write {}", args.output.display()))?;
    let write = || -> Result<()> {
        let mut out = std::io::BufWriter::new(std::fs::File::create(&args.questions)?);
        for q in &questions {
            writeln!(out, "{}", serde_json::to_string(q)?)?;
        }
        Ok(out.flush()?)
    };
    write().with_context(|| format!("cannot write {}", args.questions.display()))?;
    eprintln!(
        "{}: {} tokens with {N_FACT} facts; {}: {} questions",
        args.output.display(),
        model.tokenise(&planted, false)?.len(),
        args.questions.display(),
        questions.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(end: &str) -> String {
        (0..400)
            .map(|i| format!("Line {i} has some words and some more that are here to be quoted by nobody.{end}"))
            .collect()
    }

    fn text() -> String {
        text_of("\n")
    }

    #[test]
    fn facts_are_in_the_text_at_their_depths_and_the_rest_is_untouched() {
        for end in ["\n\n", "\n", " "] {
            check_planted(&text_of(end), end);
        }
    }

    fn check_planted(text: &str, end: &str) {
        let (planted, questions) = plant(text, 7).unwrap();
        let mut rest = planted.clone();
        for q in questions.iter().filter(|q| q.kind == Kind::Fact) {
            let sentence = format!("{} {}.", q.prompt.trim(), q.answer.as_ref().unwrap());
            let at = planted.find(&sentence).unwrap();
            assert_eq!(planted.matches(q.answer.as_ref().unwrap().as_str()).count(), 1);
            assert!((at as f64 / planted.len() as f64 - q.depth.unwrap()).abs() < 0.02);
            rest = rest.replacen(&format!("{sentence}{end}"), "", 1);
        }
        assert_eq!(rest, text);
        assert_eq!(questions.iter().map(|q| q.kind == Kind::Fact).filter(|f| *f).count(), 14);
        assert_eq!(questions.len(), 22);
        assert!(questions[0].depth.unwrap() < 0.06 && questions[13].depth.unwrap() > 0.93);
    }

    #[test]
    fn the_seed_alone_decides() {
        assert_eq!(plant(&text(), 1).unwrap(), plant(&text(), 1).unwrap());
        assert_ne!(plant(&text(), 1).unwrap().0, plant(&text(), 2).unwrap().0);
    }

    #[test]
    fn names_and_prompts_are_distinct() {
        let (_, questions) = plant(&text(), 3).unwrap();
        let mut prompts: Vec<&str> = questions.iter().map(|q| q.prompt.as_str()).collect();
        prompts.sort_unstable();
        prompts.dedup();
        assert_eq!(prompts.len(), 22);
    }

    #[test]
    fn a_question_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        let (_, questions) = plant(&text(), 3).unwrap();
        let lines: Vec<String> = questions.iter().map(|q| serde_json::to_string(q).unwrap()).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(read_questions(&path).unwrap(), questions);
        std::fs::write(&path, "nonsense").unwrap();
        assert!(format!("{:#}", read_questions(&path).unwrap_err()).contains("line 1"));
    }

    #[test]
    fn a_text_without_lines_is_refused() {
        assert!(plant("too short", 1).is_err());
    }
}
