//! Scores of answers in words: the metrics of question answering, summaries and code completion, each from 0 to 1.

use std::collections::HashMap;

use rapidfuzz::distance::{indel, lcs_seq};

/// Words of a text as question answering compares them (SQuAD): lower case, no punctuation, no articles. A character of Chinese or
/// Japanese is a word.
fn words(text: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut Vec<String>| {
        if !word.is_empty() && !["a", "an", "the"].contains(&word.as_str()) {
            out.push(word.clone());
        }
        word.clear();
    };
    for c in text.to_lowercase().chars() {
        let alone = matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}');
        if alone || c.is_whitespace() {
            flush(&mut word, &mut out);
        }
        if alone {
            out.push(c.to_string());
        } else if c.is_alphanumeric() {
            word.push(c);
        }
    }
    flush(&mut word, &mut out);
    out
}

/// Harmonic mean of precision and recall of `hits` common parts.
fn harmonic(hits: usize, answer: usize, right: usize) -> f64 {
    if hits == 0 {
        return 0.0;
    }
    2.0 * hits as f64 / (answer + right) as f64
}

/// F1 over the words of both, in any order. Two texts without words agree.
pub fn f1(answer: &str, right: &str) -> f64 {
    let (answer, right) = (words(answer), words(right));
    if answer.is_empty() && right.is_empty() {
        return 1.0;
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    right.iter().for_each(|w| *left.entry(w).or_default() += 1);
    let hits = answer
        .iter()
        .filter(|w| left.get_mut(w.as_str()).is_some_and(|n| std::mem::replace(n, n.saturating_sub(1)) > 0));
    harmonic(hits.count(), answer.len(), right.len())
}

/// ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, each text one sequence.
pub fn rouge_l(answer: &str, right: &str) -> f64 {
    let (answer, right) = (words(answer), words(right));
    let mut numbers: HashMap<String, u32> = HashMap::new();
    let mut number = |w: String| {
        let next = numbers.len() as u32;
        *numbers.entry(w).or_insert(next)
    };
    let answer: Vec<u32> = answer.into_iter().map(&mut number).collect();
    let right: Vec<u32> = right.into_iter().map(&mut number).collect();
    harmonic(lcs_seq::similarity(answer.iter().copied(), right.iter().copied()), answer.len(), right.len())
}

/// 1 where the words of the answer's first line begin with those of the right answer.
pub fn exact(answer: &str, right: &str) -> f64 {
    let (answer, right) = (words(answer.trim_start().lines().next().unwrap_or("")), words(right));
    f64::from(answer.starts_with(&right))
}

/// Edit similarity of the answer's first line that is no comment: 1 - (insertions + deletions) / characters of both.
pub fn edit(answer: &str, right: &str) -> f64 {
    let is_code =
        |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with(['#', '`']) && !line.contains("//");
    let line = answer.lines().find(is_code).unwrap_or("");
    indel::normalized_similarity(line.trim().chars(), right.trim().chars())
}

/// Share of words that are in the answer.
pub fn share_of_words(answer: &str, wanted: &[String]) -> f64 {
    let said = words(answer);
    let hits = wanted.iter().filter(|w| said.contains(&w.to_lowercase())).count();
    hits as f64 / wanted.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a}, not {b}");
    }

    #[test]
    fn f1_by_hand() {
        // Common: cat, sat; 3 words said (the article is none), 4 right ones.
        near(f1("The cat sat down.", "a cat sat on mats"), 2.0 * 2.0 / 7.0);
        near(f1("Paris", "paris!"), 1.0);
        near(f1("yes yes", "yes"), 2.0 / 3.0);
        near(f1("", "x"), 0.0);
        near(f1("the", "a"), 1.0);
    }

    #[test]
    fn rouge_l_by_hand() {
        // Lin's example: police killed the gunman / police kill the gunman; articles are no words here.
        near(rouge_l("police kill the gunman", "police killed the gunman"), 2.0 * 2.0 / 6.0);
        near(rouge_l("gunman kill police", "police killed gunman"), 2.0 * 1.0 / 6.0);
        near(rouge_l("a b c d e", "b d x"), 2.0 * 2.0 / 7.0);
        near(rouge_l("", "x"), 0.0);
    }

    #[test]
    fn exact_is_about_the_first_line() {
        near(exact(" Paragraph 12, I think", "Paragraph 12"), 1.0);
        near(exact("Paragraph 120", "Paragraph 12"), 0.0);
        near(exact("no\nParagraph 12", "Paragraph 12"), 0.0);
    }

    #[test]
    fn edit_similarity_by_hand() {
        // kitten and sitting: longest common subsequence ittn, so 2 * 4 / 13.
        near(edit("# a comment\nkitten\nmore", "sitting"), 8.0 / 13.0);
        near(edit("return x", "return x"), 1.0);
        near(edit("", "x"), 0.0);
    }

    #[test]
    fn characters_of_chinese_are_words() {
        near(f1("\u{4e2d}\u{56fd}", "\u{4e2d}\u{6587}"), 0.5);
    }

    #[test]
    fn words_found() {
        near(share_of_words(" soap, Rope and soap.", &["soap".into(), "rope".into(), "ink".into()]), 2.0 / 3.0);
    }
}
