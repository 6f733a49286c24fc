//! What results come to: means with intervals by variant and task.

use serde::Serialize;

use super::rules::Sums;
use super::store::{LayerSums, Outcome, Reference};
use super::variant::Variant;
use crate::metrics::bootstrap::{interval, Interval};
use crate::metrics::{mean, quantile};
use crate::tasks::Question;

/// LongPPL (Fang et al. 2024, arXiv 2410.23771): a token needs the long context if that lowers its loss by 2 nats or more, to 2 or
/// less.
const LONG_GAIN: f64 = 2.0;
const LONG_LOSS: f64 = 2.0;

/// A question with all its results, one for each variant.
pub struct Answered {
    pub question: Question,
    pub prefix: String,
    pub reference: Reference,
    pub outcomes: Vec<Outcome>,
}

/// Numbers of a variant over some questions.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Numbers {
    pub questions: usize,
    /// Shares of the prefix's keys and bytes, and of its attention mass on keys that were attended to.
    pub kept: f64,
    pub bytes: f64,
    pub recall: Option<f64>,
    /// Mean over tasks of the mean over questions, of the mean over answer tokens.
    pub kl: Interval,
    pub kl_p95: f64,
    /// Percent.
    pub top1: f64,
    /// Over the tokens of right answers; over those that need the prefix.
    pub perplexity: Option<f64>,
    pub long_perplexity: Option<f64>,
    pub long_tokens: usize,
    /// Mean over tasks, 0 to 1; and that of the difference to dense, paired.
    pub score: Option<Interval>,
    pub difference: Option<Interval>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskNumbers {
    pub task: String,
    #[serde(flatten)]
    pub numbers: Numbers,
}

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    pub variant: String,
    pub series: String,
    #[serde(flatten)]
    pub all: Numbers,
    pub tasks: Vec<TaskNumbers>,
    pub layers: Vec<LayerSums>,
}

/// Tokens of right answers that need the prefix.
fn needs(reference: &Reference) -> impl Iterator<Item = bool> + '_ {
    let pairs = reference.losses.iter().zip(&reference.short_losses);
    pairs.map(|(long, short)| short - long >= LONG_GAIN && *long <= LONG_LOSS)
}

fn perplexity(losses: &[f64]) -> Option<f64> {
    (!losses.is_empty()).then(|| mean(losses).exp())
}

/// Names of the tasks in the order of the questions.
pub fn tasks(answered: &[Answered]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for a in answered {
        if !out.contains(&a.question.task) {
            out.push(a.question.task.clone());
        }
    }
    out
}

/// One pair of results: dense attention's, and a variant's.
type Pair<'a> = (&'a Reference, &'a Outcome);

fn numbers(groups: &[Vec<Pair<'_>>]) -> Numbers {
    let all: Vec<Pair> = groups.iter().flatten().copied().collect();
    let of = |f: &dyn Fn(&Pair) -> Option<f64>| -> Vec<Vec<f64>> {
        groups.iter().map(|g| g.iter().filter_map(f).collect()).collect()
    };
    let read: Vec<&Sums> = all.iter().map(|(_, o)| &o.read).collect();
    let missed: Vec<f64> = read.iter().filter(|r| r.measured > 0.0).map(|r| r.missed).collect();
    let mean_of = |f: fn(&Sums) -> f64| mean(&read.iter().map(|r| f(r)).collect::<Vec<f64>>());
    let kl: Vec<f64> = all.iter().flat_map(|(_, o)| o.kl.iter().copied()).collect();
    let losses: Vec<f64> = all.iter().flat_map(|(_, o)| o.losses.iter().copied()).collect();
    let long: Vec<f64> = all
        .iter()
        .flat_map(|(r, o)| needs(r).zip(&o.losses).filter(|(needs, _)| *needs).map(|(_, loss)| *loss))
        .collect();
    Numbers {
        questions: all.len(),
        kept: mean_of(|r| r.kept),
        bytes: mean_of(|r| r.bytes),
        recall: (!missed.is_empty()).then(|| 1.0 - mean(&missed)),
        kl: interval(&of(&|(_, o)| (!o.kl.is_empty()).then(|| mean(&o.kl)))).unwrap_or_default(),
        kl_p95: quantile(&kl, 0.95),
        top1: 100.0 * all.iter().map(|(_, o)| o.same).sum::<usize>() as f64 / kl.len().max(1) as f64,
        perplexity: perplexity(&losses),
        long_perplexity: perplexity(&long),
        long_tokens: long.len(),
        score: interval(&of(&|(_, o)| o.score)),
        difference: interval(&of(&|(r, o)| Some(o.score? - r.score?))),
    }
}

fn row(variant: &str, series: &str, tasks: &[String], pairs: &[(&str, Pair<'_>)]) -> Row {
    let group = |task: &String| pairs.iter().filter(|p| p.0 == task).map(|p| p.1).collect::<Vec<Pair>>();
    let groups: Vec<Vec<Pair>> = tasks.iter().map(group).collect();
    let of = |(task, group): (&String, &Vec<Pair<'_>>)| TaskNumbers {
        task: task.clone(),
        numbers: numbers(std::slice::from_ref(group)),
    };
    let mut layers: Vec<LayerSums> = Vec::new();
    for layer in pairs.iter().flat_map(|p| &p.1 .1.layers) {
        // Each question weighs the same.
        let sums = Sums { n: 1.0, measured: layer.sums.measured.min(1.0), ..layer.sums };
        match layers.iter_mut().find(|l| l.layer == layer.layer) {
            Some(known) => known.sums.add(&sums),
            None => layers.push(LayerSums { layer: layer.layer, sums }),
        }
    }
    layers.iter_mut().for_each(|l| l.sums = l.sums.mean());
    Row {
        variant: variant.to_string(),
        series: series.to_string(),
        all: numbers(&groups),
        tasks: tasks.iter().zip(&groups).map(of).collect(),
        layers,
    }
}

/// A row for dense attention, then one for each variant.
pub fn rows(variants: &[Variant], answered: &[Answered]) -> Vec<Row> {
    let tasks = tasks(answered);
    let same = |a: &Answered| {
        // Text is fed itself, and has no answer.
        let n = a.outcomes.first().map_or(a.reference.tokens.len(), |o| o.kl.len());
        let read = Sums { n: 1.0, kept: 1.0, bytes: 1.0, missed: 0.0, measured: 1.0 };
        let (losses, score) = (a.reference.losses.clone(), a.reference.score);
        Outcome { kl: vec![0.0; n], same: n, losses, score, read, ..Outcome::default() }
    };
    let dense: Vec<Outcome> = answered.iter().map(same).collect();
    let pairs: Vec<(&str, Pair)> =
        answered.iter().zip(&dense).map(|(a, o)| (a.question.task.as_str(), (&a.reference, o))).collect();
    let mut out = vec![row("dense f32", "dense f32", &tasks, &pairs)];
    for (i, v) in variants.iter().enumerate() {
        let pairs: Vec<(&str, Pair)> =
            answered.iter().map(|a| (a.question.task.as_str(), (&a.reference, &a.outcomes[i]))).collect();
        out.push(row(&v.label, &v.series, &tasks, &pairs));
    }
    out
}

/// A number of so many digits behind the point, or a dash.
fn shown(x: Option<f64>, digits: usize) -> String {
    x.map_or("-".to_string(), |x| format!("{x:.digits$}"))
}

/// `+1.2 [-3.4, +5.6]`, in points.
fn shown_difference(i: Option<Interval>) -> String {
    i.map_or("-".to_string(), |i| format!("{:+.1} [{:+.1}, {:+.1}]", 100.0 * i.mean, 100.0 * i.low, 100.0 * i.high))
}

pub const HEAD: [&str; 11] = [
    "attention",
    "KV read",
    "kept",
    "recall",
    "KL mean",
    "KL p95",
    "top-1 %",
    "PPL",
    "LongPPL",
    "score",
    "difference [95 %]",
];

impl Numbers {
    /// Cells of the table behind the name.
    pub fn cells(&self) -> [String; 10] {
        [
            format!("{:.3}", self.bytes),
            format!("{:.3}", self.kept),
            shown(self.recall, 4),
            format!("{:.5}", self.kl.mean),
            format!("{:.5}", self.kl_p95),
            format!("{:.2}", self.top1),
            shown(self.perplexity, 3),
            shown(self.long_perplexity, 3),
            shown(self.score.map(|s| 100.0 * s.mean), 1),
            shown_difference(self.difference),
        ]
    }
}

/// The table of the console.
pub fn table(rows: &[Row]) -> String {
    let cells = |r: &Row| [vec![r.variant.clone()], r.all.cells().to_vec()].concat();
    let lines: Vec<Vec<String>> =
        [HEAD.map(str::to_string).to_vec()].into_iter().chain(rows.iter().map(cells)).collect();
    let width: Vec<usize> = (0..HEAD.len()).map(|c| lines.iter().map(|l| l[c].len()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        for (c, cell) in line.iter().enumerate() {
            out += &if c == 0 { format!("| {cell:<0$} ", width[c]) } else { format!("| {cell:>0$} ", width[c]) };
        }
        out += "|\n";
        if i == 0 {
            for (c, w) in width.iter().enumerate() {
                out += &format!("|{}{}", "-".repeat(w + 1), if c == 0 { '-' } else { ':' });
            }
            out += "|\n";
        }
    }
    out
}

#[cfg(test)]
pub mod sample {
    //! Results for tests of what is made of them.

    use super::*;
    use crate::eval::variant::{Amount, How};
    use crate::tasks::Want;

    pub fn variant(label: &str, series: &str) -> Variant {
        Variant { label: label.into(), series: series.into(), how: How::Stock, amount: Amount::Nominal(0.2) }
    }

    pub fn answered(id: &str, task: &str, dense: f64, scores: &[f64]) -> Answered {
        let question = Question {
            id: id.into(),
            task: task.into(),
            prompt: "\nWho <b>?".into(),
            want: Want::Nothing,
            depth: Some(0.5),
            n_predict: 2,
        };
        let reference = Reference {
            tokens: vec![1, 2],
            answer: " X & Y".into(),
            losses: vec![0.5, 1.0],
            short_losses: vec![5.0, 1.5],
            score: Some(dense),
        };
        let outcome = |(i, score): (usize, &f64)| Outcome {
            kl: vec![0.0, 0.25 * (i + 1) as f64],
            same: 1,
            losses: vec![1.0, 2.0],
            score: Some(*score),
            answer: "</script>".into(),
            read: Sums { n: 6.0, kept: 0.2, bytes: 0.25, missed: 0.1, measured: 6.0 },
            layers: vec![
                LayerSums { layer: 0, sums: Sums { n: 3.0, kept: 0.2, bytes: 0.25, missed: 0.15, measured: 3.0 } },
                LayerSums { layer: 4, sums: Sums { n: 3.0, kept: 0.2, bytes: 0.25, missed: 0.05, measured: 3.0 } },
            ],
        };
        let outcomes = scores.iter().enumerate().map(outcome).collect();
        Answered { question, prefix: "p".into(), reference, outcomes }
    }
}

#[cfg(test)]
mod tests {
    use super::sample::{answered, variant};
    use super::*;

    #[test]
    fn numbers_by_hand() {
        let all = [
            answered("a1", "a", 1.0, &[1.0, 0.0]),
            answered("a2", "a", 1.0, &[0.0, 0.0]),
            answered("b1", "b", 0.5, &[1.0, 0.5]),
        ];
        let rows = rows(&[variant("one", "s"), variant("two", "s")], &all);
        assert_eq!(rows.iter().map(|r| r.variant.as_str()).collect::<Vec<_>>(), ["dense f32", "one", "two"]);
        let (dense, one, two) = (&rows[0].all, &rows[1].all, &rows[2].all);
        assert_eq!((dense.kl.mean, dense.top1, dense.bytes, dense.recall), (0.0, 100.0, 1.0, Some(1.0)));
        assert!((dense.perplexity.unwrap() - 0.75f64.exp()).abs() < 1e-12);
        // Of each question the first token needs the prefix: 5 to 0.5; 1.5 to 1 is too little.
        assert!((dense.long_perplexity.unwrap() - 0.5f64.exp()).abs() < 1e-12 && dense.long_tokens == 3);
        assert!((one.perplexity.unwrap() - 1.5f64.exp()).abs() < 1e-12);
        assert!((one.long_perplexity.unwrap() - 1f64.exp()).abs() < 1e-12);
        assert!((one.kl.mean - 0.125).abs() < 1e-12 && (two.kl.mean - 0.25).abs() < 1e-12 && one.kl_p95 == 0.25);
        assert_eq!((one.top1, one.bytes, one.questions), (50.0, 0.25, 3));
        assert!((one.kept - 0.2).abs() < 1e-12);
        assert!((one.recall.unwrap() - 0.9).abs() < 1e-12);
        // Mean over tasks: (1/2 + 1) / 2, and the differences ((0 - 1) / 2 + 0.5) / 2.
        assert!((one.score.unwrap().mean - 0.75).abs() < 1e-12 && one.difference.unwrap().mean.abs() < 1e-12);
        assert!((two.difference.unwrap().mean + 0.5).abs() < 1e-12);
        assert_eq!(rows[1].tasks[0].numbers.score.unwrap().mean, 0.5);
        assert!((rows[1].layers[0].sums.missed - 0.15).abs() < 1e-12 && rows[1].layers[1].layer == 4);
        let text = table(&rows);
        assert!(text.contains("0.12500") && text.contains("75.0") && text.contains("-50.0 ["), "{text}");
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(widths.iter().all(|w| *w == widths[0]), "{text}");
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let mut bare = answered("a", "a", 0.0, &[0.0]);
        bare.reference = Reference::default();
        bare.outcomes[0].score = None;
        bare.outcomes[0].losses.clear();
        let rows = rows(&[variant("v", "v")], &[bare]);
        let cells = rows[1].all.cells();
        assert_eq!(cells[6..], ["-", "-", "-", "-"].map(str::to_string));
    }
}
