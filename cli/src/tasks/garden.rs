//! Where things are planted: sentences at depths spread over a text, each in front of a paragraph, sentence or line.

use anyhow::{ensure, Result};

use super::needles::Key;
use super::{Document, Question, Task, Want, N_PREDICT};
use crate::facts::Random;

/// Something that is put into the text, without a line end.
struct Plant {
    text: String,
    /// Wanted depth, as a share.
    depth: f64,
}

/// Number of something planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted(usize);

/// What is planted and asked so far.
pub struct Garden {
    pub random: Random,
    /// Keys that two tasks share.
    pub keys: Option<Vec<Key>>,
    /// The whole text, so that a name in it is not used for something else.
    text: String,
    plants: Vec<Plant>,
    questions: Vec<(Question, Option<Planted>)>,
}

impl Garden {
    pub fn new(seed: u64, text: &str) -> Garden {
        Garden {
            random: Random::new(seed),
            keys: None,
            text: text.to_string(),
            plants: Vec::new(),
            questions: Vec::new(),
        }
    }

    /// Is this word nowhere in the text?
    pub fn is_new(&self, word: &str) -> bool {
        !self.text.contains(word)
    }

    /// Plants texts at depths spread evenly over the text, in an order by chance.
    pub fn plant(&mut self, texts: Vec<String>) -> Vec<Planted> {
        let n = texts.len();
        let mut depths: Vec<f64> = (0..n).map(|i| (i as f64 + self.random.share()) / n as f64).collect();
        self.random.shuffle(&mut depths);
        self.plant_at(texts.into_iter().zip(depths).collect())
    }

    /// The same at given depths.
    pub fn plant_at(&mut self, plants: Vec<(String, f64)>) -> Vec<Planted> {
        let first = self.plants.len();
        self.plants.extend(plants.into_iter().map(|(text, depth)| Plant { text, depth }));
        (first..self.plants.len()).map(Planted).collect()
    }

    pub fn ask(&mut self, task: Task, prompt: String, want: Want, about: Option<Planted>) {
        self.ask_long(task, prompt, want, about, N_PREDICT);
    }

    pub fn ask_long(&mut self, task: Task, prompt: String, want: Want, about: Option<Planted>, n_predict: usize) {
        let n = self.questions.iter().filter(|(q, _)| q.task == task.name()).count();
        let id = format!("{}-{:02}", task.name(), n + 1);
        let question = Question { id, task: task.name().to_string(), prompt, want, depth: None, n_predict };
        self.questions.push((question, about));
    }

    /// Sets where the last question's answer stands, as a share of the text in which things are planted.
    pub fn about(&mut self, depth: f64) {
        self.questions.iter_mut().last().into_iter().for_each(|(q, _)| q.depth = Some(depth));
    }

    pub fn n_planted(&self) -> usize {
        self.plants.len()
    }

    /// All that is planted, as text.
    pub fn planted(&self) -> String {
        self.plants.iter().map(|p| format!("{}\n\n", p.text)).collect()
    }

    /// The text with everything in it.
    pub fn document(self, base: &str) -> Result<Document> {
        let places = boundaries(base, self.plants.len());
        ensure!(
            !places.is_empty() || self.plants.is_empty(),
            "the text has no paragraphs, sentences or lines between which something could be planted"
        );
        let mut order: Vec<(usize, usize)> = self
            .plants
            .iter()
            .enumerate()
            .map(|(i, plant)| {
                let wanted = (base.len() as f64 * plant.depth) as usize;
                (places.iter().copied().min_by_key(|p| p.abs_diff(wanted)).unwrap_or(0), i)
            })
            .collect();
        let depth = |i: usize| self.plants[i].depth;
        order.sort_by(|a, b| a.0.cmp(&b.0).then(depth(a.1).total_cmp(&depth(b.1))).then(a.1.cmp(&b.1)));
        let (mut text, mut from) = (String::with_capacity(base.len() * 2), 0);
        let mut at = vec![0; self.plants.len()];
        for (place, i) in order {
            text.push_str(&base[from..place]);
            from = place;
            at[i] = text.len();
            let before = &base.as_bytes()[..place];
            let end = ["\n\n", "\n"].into_iter().find(|e| before.ends_with(e.as_bytes())).unwrap_or(" ");
            // What has lines of its own stands on lines of its own.
            let own = if self.plants[i].text.contains('\n') || end != " " { "\n\n" } else { " " };
            if own != end && end == " " {
                text.push_str(own);
                at[i] = text.len();
            }
            text.push_str(&self.plants[i].text);
            text.push_str(if own == " " { " " } else { own });
        }
        text.push_str(&base[from..]);
        let n = text.len() as f64;
        let with_depth = |(q, about): (Question, Option<Planted>)| match about {
            Some(Planted(i)) => Question { depth: Some(at[i] as f64 / n), ..q },
            None => q,
        };
        let questions = self.questions.into_iter().map(with_depth).collect();
        Ok(Document { text, questions })
    }
}

/// Places between paragraphs; where they are few for `n` things also between sentences, or else lines.
pub fn boundaries(text: &str, n: usize) -> Vec<usize> {
    let behind = |ends: &[&str]| -> Vec<usize> {
        let all = ends.iter().flat_map(|end| text.match_indices(end).map(|(i, _)| i + end.len()));
        let mut places: Vec<usize> = all.filter(|p| *p < text.len() && !text[*p..].starts_with(['\n', ' '])).collect();
        places.sort_unstable();
        places.dedup();
        places
    };
    let kinds = [&["\n\n"][..], &["\n\n", ". ", ".\n"], &["\n\n", ". ", "\n"]].map(behind);
    let enough = kinds.iter().position(|places| places.len() > 4 && places.len() * 3 > n).unwrap_or(2);
    kinds.into_iter().nth(enough).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_stand_between_paragraphs_or_else_sentences_or_lines() {
        let paragraphs = "One two.\n\n".repeat(10);
        assert_eq!(boundaries(&paragraphs, 10).len(), 9);
        let sentences = "One two. ".repeat(10);
        assert_eq!(boundaries(&sentences, 10).len(), 9);
        let lines = "one two\n".repeat(10);
        assert_eq!(boundaries(&lines, 10).len(), 9);
        assert!(boundaries("one", 10).is_empty());
    }

    #[test]
    fn planting_keeps_the_rest() {
        for base in ["A b.\n\n".repeat(20), "A b. ".repeat(20), "a b\n".repeat(20)] {
            let mut garden = Garden::new(1, &base);
            garden.plant((0..7).map(|i| format!("Thing {i} is here.")).collect());
            garden.plant(vec!["def f():\n    pass".to_string()]);
            let made = garden.document(&base).unwrap();
            for i in 0..7 {
                assert_eq!(made.text.matches(&format!("Thing {i} is here.")).count(), 1);
            }
            assert!(made.text.contains("\ndef f():\n    pass\n"), "{}", made.text);
            assert!(made.text.ends_with(&base[base.len() - 5..]));
            let left: String = made.text.split_whitespace().filter(|w| ["A", "a", "b", "b."].contains(w)).collect();
            assert_eq!(left, base.split_whitespace().collect::<String>());
        }
    }
}
