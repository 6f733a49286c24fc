//! A question in tokens: what is fed, which of it are answers, and how an answer scores.

use std::ops::Range;

use anyhow::{ensure, Result};

use super::source::Source;
use crate::llama::Model;
use crate::metrics::text;
use crate::tasks::{Metric, Question, Want};

/// A question in tokens.
pub struct Asked {
    pub question: Question,
    /// What follows the prefix up to the answer.
    pub tokens: Vec<i32>,
    /// What is right, if it is one text, with what is given between answers.
    pub right: Vec<i32>,
    /// Answers in it.
    pub spans: Vec<Range<usize>>,
}

impl Asked {
    /// # Errors
    /// The prompt has no tokens.
    pub fn new(model: &Model, source: &Source, question: &Question) -> Result<Asked> {
        let mut whole = format!("{}{}", source.text, question.prompt);
        let mut spans: Vec<Range<usize>> = Vec::new();
        let mut add = |whole: &mut String, given: &str, answer: &str| {
            whole.push_str(given);
            spans.push(whole.len()..whole.len() + answer.len());
            whole.push_str(answer);
        };
        match &question.want {
            Want::Parts(parts) => parts.iter().for_each(|p| add(&mut whole, &p.given, &p.answer)),
            Want::Text(text) => add(&mut whole, "", text),
            _ => {}
        }
        let tokens = model.tokenise(&whole, true)?;
        let rest = match tokens.strip_prefix(source.tokens.as_slice()) {
            Some(rest) => rest.to_vec(),
            // Text with characters that do not survive the way back (chat markers): what follows by itself.
            None => model.tokenise(&whole[source.text.len()..], false)?,
        };
        ensure!(!rest.is_empty(), "question {} has no tokens", question.id);
        // Bytes from the start of each token to the end: the way there and back may add or take a space at the very start.
        let length = |n: usize| model.text(&rest[..n]).len();
        let total = length(rest.len());
        let to_end: Vec<usize> = (0..=rest.len()).map(|n| total - length(n).min(total)).collect();
        let tokens_of = |span: &Range<usize>| {
            let (from, to) = (whole.len() - span.start, whole.len() - span.end);
            let first = (0..rest.len()).find(|i| to_end[i + 1] < from).unwrap_or(rest.len());
            let end = (first..rest.len()).find(|i| to_end[*i] <= to).unwrap_or(rest.len());
            first..end
        };
        let spans: Vec<Range<usize>> = spans.iter().map(tokens_of).filter(|s| !s.is_empty()).collect();
        let start = spans.first().map_or(rest.len(), |s| s.start).max(1);
        let end = spans.last().map_or(start, |s| s.end);
        Ok(Asked {
            question: question.clone(),
            tokens: rest[..start].to_vec(),
            right: rest[start..end.max(start)].to_vec(),
            spans: spans.into_iter().map(|s| s.start.max(start) - start..s.end.max(start) - start).collect(),
        })
    }

    /// Cells that it needs.
    pub fn n_token(&self) -> usize {
        self.tokens.len() + self.right.len().max(self.question.n_predict)
    }

    /// Is the text itself fed, not an answer?
    pub fn is_text(&self) -> bool {
        matches!(self.question.want, Want::Text(_))
    }

    /// Has it a right answer that is fed?
    pub fn is_fed(&self) -> bool {
        !self.right.is_empty()
    }

    pub fn is_answer(&self, i: usize) -> bool {
        self.spans.iter().any(|s| s.contains(&i))
    }

    /// Share of the answers all of whose tokens are the most likely ones.
    pub fn share_right(&self, choice: &[i32]) -> f64 {
        let right = self.spans.iter().filter(|s| choice[(*s).clone()] == self.right[(*s).clone()]).count();
        right as f64 / self.spans.len().max(1) as f64
    }
}

/// The score of an answer in words; none for what is fed.
pub fn score(want: &Want, answer: &str) -> Option<f64> {
    match want {
        Want::Nothing | Want::Text(_) | Want::Parts(_) => None,
        Want::OneOf(right) => Some(f64::from(right.iter().any(|r| answer.trim_start().starts_with(r.trim_start())))),
        Want::Words(words) => Some(text::share_of_words(answer, words)),
        Want::Metric(metric, right) => {
            let of = match metric {
                Metric::F1 => text::f1,
                Metric::RougeL => text::rouge_l,
                Metric::Exact => text::exact,
                Metric::Edit => text::edit,
            };
            right.iter().map(|r| of(answer, r)).max_by(f64::total_cmp)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_scored_as_the_question_wants() {
        let words = |w: &[&str]| w.iter().map(|w| w.to_string()).collect::<Vec<_>>();
        let of = |want: Want, answer: &str| score(&want, answer);
        assert_eq!(of(Want::OneOf(words(&[" figs", " rice"])), " rice.\nIn"), Some(1.0));
        assert_eq!(of(Want::OneOf(words(&[" figs"])), " rice and figs"), Some(0.0));
        assert_eq!(of(Want::Words(words(&["soap", "ink"])), " ink, ink"), Some(0.5));
        assert_eq!(of(Want::Metric(Metric::F1, words(&["red fox", "dog"])), " a dog"), Some(1.0));
        assert_eq!(of(Want::Metric(Metric::Exact, words(&["x"])), "y"), Some(0.0));
        assert_eq!(of(Want::Nothing, "x"), None);
    }

    #[test]
    fn answers_between_what_is_given_count_one_by_one() {
        let question = Question {
            id: "q".into(),
            task: "t".into(),
            prompt: "p".into(),
            want: Want::Parts(Vec::new()),
            depth: None,
            n_predict: 4,
        };
        let asked = Asked { question, tokens: vec![9], right: vec![1, 2, 3, 4, 5], spans: vec![0..2, 3..5] };
        assert_eq!(asked.share_right(&[1, 2, 0, 4, 5]), 1.0);
        assert_eq!(asked.share_right(&[1, 0, 3, 4, 5]), 0.5);
        assert_eq!(asked.share_right(&[0, 0, 0, 0, 0]), 0.0);
        assert_eq!((asked.is_answer(2), asked.is_answer(4), asked.n_token()), (false, true, 6));
    }
}
