//! LongBench's record format: `context`, `input`, `answers`, `dataset` (<https://github.com/THUDM/LongBench>). The prompts are our own
//! and short, and answers are not cut or classified by data set, so scores compare ways to attend, not models on a leader board.

use std::path::Path;

use anyhow::{ensure, Context as _, Result};
use serde::Deserialize;

use crate::build_cmd::read_text;
use crate::tasks::{Metric, Question, Want};

/// One line of a data set.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Record {
    pub context: String,
    #[serde(default)]
    pub input: String,
    pub answers: Vec<String>,
    #[serde(default)]
    pub dataset: String,
    #[serde(default, rename = "_id")]
    pub id: Option<String>,
}

/// What kind of question a data set has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// A question about the context.
    Answer,
    /// The context is to be summarised, under a question or none.
    Summary,
    /// Examples, then one that lacks its answer.
    Example,
    /// Code that goes on.
    Code,
}

/// Form, metric, and tokens to generate, by LongBench's name of a data set; any other is answered by F1.
fn rules(dataset: &str) -> (Form, Metric, usize) {
    match dataset.trim_end_matches("_e") {
        "gov_report" | "multi_news" | "vcsum" => (Form::Summary, Metric::RougeL, 512),
        "qmsum" => (Form::Summary, Metric::RougeL, 512),
        "samsum" => (Form::Example, Metric::RougeL, 128),
        "dureader" => (Form::Answer, Metric::RougeL, 128),
        "trec" | "lsht" => (Form::Example, Metric::Exact, 64),
        "triviaqa" => (Form::Example, Metric::F1, 32),
        "passage_retrieval_en" | "passage_retrieval_zh" | "passage_count" => (Form::Answer, Metric::Exact, 32),
        "lcc" | "repobench-p" => (Form::Code, Metric::Edit, 64),
        "narrativeqa" | "qasper" => (Form::Answer, Metric::F1, 128),
        "multifieldqa_en" | "multifieldqa_zh" => (Form::Answer, Metric::F1, 64),
        _ => (Form::Answer, Metric::F1, 32),
    }
}

impl Record {
    /// What comes before the question.
    pub fn prefix(&self) -> String {
        match rules(&self.dataset).0 {
            Form::Code => self.context.clone(),
            _ => format!("{}\n", self.context.trim_end()),
        }
    }

    /// The question, as number `i` of its file.
    pub fn question(&self, i: usize) -> Question {
        let (form, metric, n_predict) = rules(&self.dataset);
        let input = self.input.trim();
        let prompt = match form {
            Form::Answer if input.is_empty() => "\nAnswer:".to_string(),
            Form::Answer => format!("\nQuestion: {input}\nAnswer (a few words):"),
            Form::Summary if input.is_empty() => "\nA short summary of the text above:".to_string(),
            Form::Summary => format!("\nQuestion: {input}\nAnswer in a few sentences:"),
            Form::Example => format!("\n{input}"),
            Form::Code => self.input.clone(),
        };
        Question {
            id: self.id.clone().unwrap_or_else(|| format!("{}-{:03}", self.task(), i + 1)),
            task: self.task(),
            // A prompt of nothing cannot be fed: the code goes on with a new line.
            prompt: if prompt.is_empty() { "\n".to_string() } else { prompt },
            want: Want::Metric(metric, self.answers.clone()),
            depth: None,
            n_predict,
        }
    }

    fn task(&self) -> String {
        if self.dataset.is_empty() {
            "records".to_string()
        } else {
            self.dataset.clone()
        }
    }
}

/// Reads a file of records.
///
/// # Errors
/// A line is none, or has no answers.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(i, line): (usize, &str)| -> Result<Record> {
        let record: Record = serde_json::from_str(line)
            .with_context(|| format!("{} line {} is no record of LongBench", path.display(), i + 1))?;
        ensure!(!record.answers.is_empty(), "{} line {} has no answers", path.display(), i + 1);
        Ok(record)
    };
    lines.map(record).collect()
}

/// A text of at most `limit` tokens: of a longer one the middle is left out, as LongBench does.
pub fn cut(
    text: &str,
    limit: usize,
    tokenise: &dyn Fn(&str) -> Result<Vec<i32>>,
    detokenise: &dyn Fn(&[i32]) -> String,
) -> Result<String> {
    let tokens = tokenise(text)?;
    if tokens.len() <= limit {
        return Ok(text.to_string());
    }
    let half = limit / 2;
    Ok(format!("{}{}", detokenise(&tokens[..half]), detokenise(&tokens[tokens.len() - half..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"input": "Who?", "context": "C one.\n\n", "answers": ["A", "B"], "length": 3, "dataset": "qasper", "language": "en", "all_classes": null, "_id": "x1"}
{"input": "", "context": "C two.", "answers": ["S"], "dataset": "gov_report"}

{"input": "def f(", "context": "import a\n", "answers": ["x):"], "dataset": "lcc_e", "_id": "x3"}"#;

    #[test]
    fn records_become_questions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("l.jsonl");
        std::fs::write(&path, LINES).unwrap();
        let records = read(&path).unwrap();
        let asked: Vec<Question> = records.iter().enumerate().map(|(i, r)| r.question(i)).collect();
        assert_eq!((asked[0].id.as_str(), asked[1].id.as_str()), ("x1", "gov_report-002"));
        assert_eq!(asked[0].want, Want::Metric(Metric::F1, vec!["A".into(), "B".into()]));
        assert_eq!(asked[1].want, Want::Metric(Metric::RougeL, vec!["S".into()]));
        assert_eq!(asked[2].want, Want::Metric(Metric::Edit, vec!["x):".into()]));
        assert!(asked[0].prompt.contains("Who?") && asked[2].prompt == "def f(");
        assert_eq!((records[0].prefix(), records[2].prefix()), ("C one.\n".into(), "import a\n".into()));
        assert_eq!(asked.iter().map(|q| q.n_predict).collect::<Vec<_>>(), [128, 512, 64]);
    }

    #[test]
    fn what_is_no_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("l.jsonl");
        for (line, said) in [("{}", "line 1 is no record"), (r#"{"context": "c", "answers": []}"#, "no answers")] {
            std::fs::write(&path, line).unwrap();
            assert!(format!("{:#}", read(&path).unwrap_err()).contains(said));
        }
    }

    #[test]
    fn the_middle_of_a_long_text_is_left_out() {
        let bytes = |t: &str| Ok(t.bytes().map(i32::from).collect());
        let text = |t: &[i32]| t.iter().map(|b| *b as u8 as char).collect();
        assert_eq!(cut("abcdefgh", 4, &bytes, &text).unwrap(), "abgh");
        assert_eq!(cut("abcd", 4, &bytes, &text).unwrap(), "abcd");
    }
}
