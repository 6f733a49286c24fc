//! Tasks whose answers are known by construction: what they ask for is planted into one text, so that all of them share one prefix
//! and one index, and every question follows it. Everything comes from the text, the sizes and a seed; no model is asked.
//!
//! Prompts are beginnings that the text continues, so that a small model which was never taught to answer can be measured too.

mod garden;
mod lookup;
mod needles;
mod text;
mod tracking;
mod vocabulary;

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use garden::Garden;

/// The built-in text: Jane Austen, Northanger Abbey (1817), in the public domain.
pub const BUILT_IN: &str = include_str!("../../data/northanger-abbey.txt");
/// Tokens that a model answers with, where a task does not say otherwise.
pub const N_PREDICT: usize = 16;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// One sentence about each of several people (RULER: single needle)
    Single,
    /// One of many sentences that differ in key and value alone (multi-key)
    Key,
    /// Three of those in a row (multi-query)
    Query,
    /// All values of a key that has three (multi-value)
    Value,
    /// A chain of variables, hop by hop (variable tracking)
    Variable,
    /// The frequent words of a list (common words)
    Words,
    /// How a sentence of the text goes on
    Quote,
    /// Parameters and body of a function
    Code,
    /// The value of a key in JSON
    Pairs,
    /// How the text goes on behind the prefix: no score, divergence and perplexity alone
    Text,
}

impl Task {
    pub const ALL: [Task; 10] = [
        Task::Single,
        Task::Key,
        Task::Query,
        Task::Value,
        Task::Variable,
        Task::Words,
        Task::Quote,
        Task::Code,
        Task::Pairs,
        Task::Text,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Task::Single => "single",
            Task::Key => "key",
            Task::Query => "query",
            Task::Value => "value",
            Task::Variable => "variable",
            Task::Words => "words",
            Task::Quote => "quote",
            Task::Code => "code",
            Task::Pairs => "pairs",
            Task::Text => "text",
        }
    }
}

/// Text that is given, and what a right model says next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub given: String,
    pub answer: String,
}

/// How an answer is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    F1,
    RougeL,
    Exact,
    Edit,
}

/// What the right answer is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Want {
    /// There is none: distributions are compared.
    Nothing,
    /// The prompt goes on with these, one after the other; the score is the share of answers said greedily, each given all that
    /// is right before it.
    Parts(Vec<Part>),
    /// The answer begins with one of these.
    OneOf(Vec<String>),
    /// The score is the share of these words that are in the answer.
    Words(Vec<String>),
    /// The text goes on like this: perplexity.
    Text(String),
    /// The best of a metric over several right answers.
    Metric(Metric, Vec<String>),
}

/// One question behind a prefix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Question {
    pub id: String,
    /// Name of its task, or of its data set.
    pub task: String,
    pub prompt: String,
    pub want: Want,
    /// Where in the prefix what is asked for stands, as a share.
    pub depth: Option<f64>,
    /// Tokens to generate.
    pub n_predict: usize,
}

/// A prefix with its questions.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub text: String,
    pub questions: Vec<Question>,
}

/// Settings of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Size {
    /// Tokens of the text with all that is planted, about.
    pub n_token: usize,
    /// Questions of each task.
    pub count: usize,
    pub seed: u64,
}

/// Plants the tasks into the beginning of `text`. `n_token` counts the tokens of a text.
///
/// # Errors
/// The text is too short, what is planted would be more than half of it, or a task has no room for so many questions.
pub fn document(text: &str, tasks: &[Task], size: &Size, n_token: &dyn Fn(&str) -> Result<usize>) -> Result<Document> {
    ensure!(!tasks.is_empty(), "no task is named: give some of {}", Task::ALL.map(Task::name).join(", "));
    let most = vocabulary::MOST;
    ensure!((1..=most).contains(&size.count), "{} questions of each task: give 1 to {most}", size.count);
    let mut garden = Garden::new(size.seed, text);
    for task in Task::ALL.into_iter().filter(|task| tasks.contains(task)) {
        match task {
            Task::Single => needles::single(&mut garden, size.count)?,
            Task::Key => needles::key(&mut garden, size.count),
            Task::Query => needles::query(&mut garden, size.count),
            Task::Value => needles::value(&mut garden, size.count),
            Task::Variable => tracking::variable(&mut garden, size.count),
            Task::Words => tracking::words(&mut garden, size.count),
            Task::Code => lookup::code(&mut garden, size.count),
            Task::Pairs => lookup::pairs(&mut garden, size.count),
            // These two are about the text itself.
            Task::Quote | Task::Text => {}
        }
    }
    let planted: String = garden.planted();
    let n_planted = n_token(&planted)?;
    ensure!(
        n_planted * 2 <= size.n_token,
        "what the tasks plant is {n_planted} tokens, more than half of {}: raise --tokens, lower --count, or name fewer \
         --tasks",
        size.n_token
    );
    let (base, rest) = cut(text, size.n_token - n_planted, n_token)?;
    if tasks.contains(&Task::Quote) {
        text::quote(&mut garden, base, size.count)?;
    }
    if tasks.contains(&Task::Text) {
        text::follow(&mut garden, rest, size.count);
    }
    garden.document(base)
}

/// The beginning of a text that has about so many tokens, up to the end of a paragraph or line where there is one near, and the rest.
fn cut<'a>(text: &'a str, wanted: usize, n_token: &dyn Fn(&str) -> Result<usize>) -> Result<(&'a str, &'a str)> {
    let floor = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    // No token is longer than 64 bytes on average, so this is enough text and tokenising stays quick.
    let (mut low, mut high) = (0, floor(text.len().min(wanted.saturating_mul(64))));
    let whole = n_token(&text[..high])?;
    ensure!(whole >= wanted, "the text has {whole} tokens, {wanted} are needed: give a longer one, or lower --tokens");
    while high - low > 64 {
        let middle = floor((low + high) / 2);
        match n_token(&text[..middle])? > wanted {
            true => high = middle,
            false => low = middle,
        }
    }
    let end = ["\n\n", "\n", " "].iter().find_map(|end| {
        let at = text[..low].rfind(end)? + end.len();
        (low - at < 2048.min(low / 4)).then_some(at)
    });
    Ok(text.split_at(end.unwrap_or(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words as tokens.
    fn count(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn made(tasks: &[Task], seed: u64) -> Document {
        document(BUILT_IN, tasks, &Size { n_token: 6000, count: 12, seed }, &count).unwrap()
    }

    #[test]
    fn every_task_asks_as_often_as_it_is_told_and_the_size_is_kept() {
        let made = made(&Task::ALL, 1);
        let n = count(&made.text).unwrap();
        assert!((5600..=6100).contains(&n), "{n} words");
        for task in Task::ALL {
            let own = made.questions.iter().filter(|q| q.task == task.name()).count();
            assert_eq!(own, 12, "{}", task.name());
        }
        let mut ids: Vec<&str> = made.questions.iter().map(|q| q.id.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 120);
    }

    #[test]
    fn the_seed_alone_decides() {
        assert_eq!(made(&Task::ALL, 1), made(&Task::ALL, 1));
        let (one, two) = (made(&Task::ALL, 1), made(&Task::ALL, 2));
        assert!(one.text != two.text && one.questions != two.questions);
    }

    /// What is asked for stands in the text, as the prompt and the answer say it.
    #[test]
    fn answers_are_in_the_text() {
        for seed in 0..5 {
            let made = made(&Task::ALL, seed);
            for q in &made.questions {
                match (&q.want, q.task.as_str()) {
                    (Want::Parts(parts), task) => {
                        let mut before = q.prompt.clone();
                        for part in parts {
                            before += &part.given;
                            // The line that the answer ends.
                            let cue = match task {
                                "quote" => &before,
                                _ => before.rsplit('\n').next().unwrap(),
                            };
                            let said = format!("{}{}", cue.trim_start_matches('\n'), part.answer);
                            assert_eq!(made.text.matches(&said).count(), 1, "{}: {said:?}", q.id);
                            before += &part.answer;
                        }
                    }
                    (Want::OneOf(values), _) => {
                        let cue = q.prompt.rsplit('\n').next().unwrap();
                        for value in values {
                            assert_eq!(made.text.matches(&format!("{cue}{value}.")).count(), 1, "{}: {value}", q.id);
                        }
                        assert_eq!(made.text.matches(&format!("{cue} ")).count(), 3, "{}", q.id);
                    }
                    (Want::Words(words), _) => {
                        let list = &made.text[made.text.find(q.prompt.trim_start()).unwrap()..];
                        let list = &list[..list.find('\n').unwrap()];
                        let times = |w: &str| list.split([' ', ',', '.', ':']).filter(|x| *x == w).count();
                        assert!(words.iter().all(|w| times(w) >= 5), "{words:?} in {list}");
                        let all = list.split([' ', ',', '.', ':']).filter(|w| !w.is_empty());
                        assert_eq!(all.filter(|w| times(w) >= 5 && !words.contains(&w.to_string())).count(), 0);
                    }
                    (Want::Text(text), _) => {
                        let whole = format!("{}{text}", q.prompt);
                        assert!(BUILT_IN.contains(&whole) && !made.text.contains(&whole), "{}", q.id);
                    }
                    (want, task) => panic!("{task}: {want:?}"),
                }
            }
        }
    }

    #[test]
    fn without_what_was_planted_the_text_is_as_it_was() {
        let plain = made(&[Task::Quote, Task::Text], 1);
        assert!(BUILT_IN.starts_with(&plain.text));
        assert!(plain.questions.iter().all(|q| q.task == "text" || q.depth.is_some()));
    }

    #[test]
    fn depths_are_where_things_stand() {
        let made = made(&Task::ALL, 3);
        for q in made.questions.iter().filter(|q| q.task == "key") {
            let at = made.text.find(q.prompt.trim()).unwrap() as f64 / made.text.len() as f64;
            assert!((q.depth.unwrap() - at).abs() < 0.01, "{}: {:?}, not {at}", q.id, q.depth);
        }
        let depths: Vec<f64> = made.questions.iter().filter_map(|q| q.depth).collect();
        assert!(depths.iter().any(|d| *d < 0.15) && depths.iter().any(|d| *d > 0.85));
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let refused = |text: &str, n_token, count_each| {
            let size = Size { n_token, count: count_each, seed: 1 };
            format!("{:#}", document(text, &Task::ALL, &size, &count).unwrap_err())
        };
        assert!(refused(BUILT_IN, 700, 12).contains("--tokens"));
        assert!(refused("too short", 6000, 12).contains("longer"));
        assert!(refused(BUILT_IN, 6000, 99).contains("give 1 to"));
    }
}
