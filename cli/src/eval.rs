//! `sqz eval`: how far sparse answers are from dense ones. The reference is dense attention on the plugin's own kernels
//! (f32 sums); its greedy answer to each question is fed to every variant, and the logits are compared.

use std::path::PathBuf;

use anyhow::Result;
use ggml_squeeze::attention::Spread;
use ggml_squeeze::backend;
use ggml_squeeze::config::ModeSetting;
use serde::Serialize;

use crate::facts::{read_questions, Kind, Question};
use crate::llama::{Model, ModelArgs, Outputs};
use crate::metrics;
use crate::progress::Phase;
use crate::session::{share, Attention, Session, SpreadArg};

/// Options of `sqz eval`.
#[derive(Clone, Debug, clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The index
    #[arg(long, value_name = "FILE")]
    index: PathBuf,
    /// The prefix's state in a cache of these types, from sqz build [default: the prefix is computed]
    #[arg(long, value_name = "FILE")]
    state_file: Option<PathBuf>,
    /// Questions, from sqz facts
    #[arg(long, value_name = "FILE")]
    questions: PathBuf,
    /// Shares of the prefix keys
    #[arg(long, value_delimiter = ',', value_parser = share, default_value = "0.1,0.2,0.33,0.5,1")]
    budgets: Vec<f32>,
    /// Also threshold mode at these nominal shares
    #[arg(long, value_delimiter = ',', value_parser = share)]
    threshold: Vec<f32>,
    /// Also mass mode at these shares
    #[arg(long, value_delimiter = ',', value_parser = share)]
    mass: Vec<f32>,
    /// Spread bonus of every sparse variant
    #[arg(long, value_delimiter = ',', value_enum, default_value = "diag")]
    spread: Vec<SpreadArg>,
    /// Add the estimate of dropped clusters
    #[arg(long)]
    estimate: bool,
    /// Query tokens of a batch that share a selection, at most, of every sparse variant
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    tile: Vec<usize>,
    /// Feed answers token by token, as generation does, not in one batch
    #[arg(long)]
    stepwise: bool,
    /// Lines for every question
    #[arg(long)]
    each: bool,
    /// One JSON object on stdout instead of tables
    #[arg(long)]
    json: bool,
}

/// One way to compute attention.
struct Variant {
    label: String,
    attention: Attention,
}

fn variants(args: &EvalArgs) -> Vec<Variant> {
    let mut out = vec![
        Variant { label: "dense f32 again".into(), attention: Attention::Forced },
        Variant { label: "llama.cpp".into(), attention: Attention::Stock },
    ];
    let all = args.spread.iter().flat_map(|spread| args.tile.iter().map(|tile| (spread.value(), *tile)));
    for (spread, tile) in all {
        let suffix = match spread {
            Spread::Diag => "",
            Spread::Radius => " radius",
            Spread::None => " no spread",
        };
        let of_tile = if tile == 1 { String::new() } else { format!(" tile {tile}") };
        let modes = [
            args.budgets.iter().map(|b| (format!("budget {b}"), ModeSetting::Budget(*b))).collect::<Vec<_>>(),
            args.threshold.iter().map(|b| (format!("threshold {b}"), ModeSetting::Threshold(*b))).collect(),
            args.mass.iter().map(|m| (format!("mass {m}"), ModeSetting::Mass(*m))).collect(),
        ];
        out.extend(modes.into_iter().flatten().map(|(label, mode)| Variant {
            label: format!("{label}{suffix}{of_tile}"),
            attention: Attention::Sparse(mode, spread, tile),
        }));
    }
    out
}

/// A variant's result on one question.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub variant: String,
    /// Share of the prefix's keys kept: mean over tokens, layers and KV heads.
    pub kept: f64,
    /// Share of the prefix's attention mass on keys not kept, likewise; none of rows that share a selection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missed: Option<f64>,
    /// KL(dense || variant) of each answer token, nats.
    pub kl: Vec<f64>,
    /// Answer tokens whose most likely token is the dense one.
    pub same: usize,
    /// Greedy answer (facts only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right: Option<bool>,
}

/// All results of one question.
#[derive(Clone, Debug, Serialize)]
pub struct Answered {
    pub question: Question,
    pub dense_answer: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense_right: Option<bool>,
    pub outcomes: Vec<Outcome>,
}

/// One row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    pub variant: String,
    pub kept: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missed: Option<f64>,
    pub kl_mean: f64,
    pub kl_p95: f64,
    /// Percent.
    pub top1: f64,
    pub facts_right: usize,
    /// Questions all of whose tokens agree.
    pub same_text: usize,
}

#[derive(Serialize)]
struct Report<'a> {
    model: String,
    cache: String,
    index: String,
    n_prefix: usize,
    positions: usize,
    facts: usize,
    dense_facts_right: usize,
    variants: Vec<Summary>,
    questions: &'a [Answered],
}

fn is_right(question: &Question, answer: &str) -> Option<bool> {
    question.answer.as_ref().map(|a| answer.trim_start().starts_with(a.as_str()))
}

struct Runner<'a> {
    session: Session<'a>,
    model: &'a Model,
    args: &'a EvalArgs,
}

impl Runner<'_> {
    /// Tokens of a question as they follow the prefix.
    fn question_tokens(&self, prompt: &str) -> Result<Vec<i32>> {
        let prefix = &self.session.tokens;
        let whole = self.model.tokenise(&format!("{}{prompt}", self.model.text(prefix)), true)?;
        match whole.strip_prefix(prefix.as_slice()) {
            Some(rest) if !rest.is_empty() => Ok(rest.to_vec()),
            // Text with characters that do not survive the way back (chat markers): the prompt by itself.
            _ => self.model.tokenise(prompt, false),
        }
    }

    /// Continues greedily after `given` (all but its last token are in the cache) up to `n` tokens in all.
    fn generate(&mut self, mut given: Vec<i32>, n: usize) -> Result<Vec<i32>> {
        while given.len() < n && !self.model.is_end(given[given.len() - 1]) {
            self.session.context.decode(&given[given.len() - 1..], Outputs::Last)?;
            given.push(metrics::argmax(self.session.context.logits(0)?));
        }
        Ok(given)
    }

    /// The reference's own greedy answer.
    fn reference_answer(&mut self, question: &[i32], n: usize) -> Result<Vec<i32>> {
        Attention::Forced.apply(self.args.estimate, false);
        self.session.context.truncate(self.session.n_prefix)?;
        self.session.context.decode(question, Outputs::Last)?;
        let first = metrics::argmax(self.session.context.logits(question.len() - 1)?);
        let answer = self.generate(vec![first], n)?;
        Attention::Forced.check()?;
        Ok(answer)
    }

    /// Feeds question and answer; `see(i, logits)` gets the logits that predict answer token i.
    fn feed(&mut self, question: &[i32], answer: &[i32], mut see: impl FnMut(usize, &[f32])) -> Result<()> {
        let context = &mut self.session.context;
        context.truncate(self.session.n_prefix)?;
        if self.args.stepwise {
            context.decode(question, Outputs::Last)?;
            see(0, context.logits(question.len() - 1)?);
            for i in 1..answer.len() {
                context.decode(&answer[i - 1..i], Outputs::Last)?;
                see(i, context.logits(0)?);
            }
            return Ok(());
        }
        let batch = [question, &answer[..answer.len() - 1]].concat();
        context.decode(&batch, Outputs::From(question.len() - 1))?;
        for i in 0..answer.len() {
            see(i, context.logits(question.len() - 1 + i)?);
        }
        Ok(())
    }

    fn outcome(&mut self, v: &Variant, q: &Question, tokens: &[i32], answer: &[i32], dense: &[f32]) -> Result<Outcome> {
        let n_vocab = self.model.n_vocab();
        v.attention.apply(self.args.estimate, true);
        let (mut kl, mut choice) = (Vec::new(), Vec::new());
        self.feed(tokens, answer, |i, logits| {
            kl.push(metrics::kl(&dense[i * n_vocab..(i + 1) * n_vocab], logits));
            choice.push(metrics::argmax(logits));
        })?;
        v.attention.check()?;
        let (kept, missed) = match v.attention {
            Attention::Sparse(..) => (backend::stats().kept_share, backend::stats().missed_share),
            _ => (1.0, Some(0.0)),
        };
        let dense_choice = dense.chunks(n_vocab).map(metrics::argmax);
        let same = choice.iter().zip(dense_choice).filter(|(a, b)| *a == b).count();
        let mut text = None;
        if q.kind == Kind::Fact {
            let own = match choice.iter().zip(answer).position(|(a, b)| a != b) {
                None => answer.to_vec(),
                Some(i) => {
                    self.session.context.truncate(self.session.n_prefix + tokens.len() + i)?;
                    self.generate([&answer[..i], &choice[i..=i]].concat(), q.n_predict)?
                }
            };
            text = Some(self.model.text(&own));
        }
        let right = text.as_ref().and_then(|t| is_right(q, t));
        Ok(Outcome { variant: v.label.clone(), kept, missed, kl, same, answer: text, right })
    }

    fn ask(&mut self, variants: &[Variant], q: &Question) -> Result<Answered> {
        let tokens = self.question_tokens(&q.prompt)?;
        let answer = self.reference_answer(&tokens, q.n_predict)?;
        let mut dense = Vec::with_capacity(answer.len() * self.model.n_vocab());
        Attention::Forced.apply(self.args.estimate, false);
        self.feed(&tokens, &answer, |_, logits| dense.extend_from_slice(logits))?;
        Attention::Forced.check()?;
        let outcomes =
            variants.iter().map(|v| self.outcome(v, q, &tokens, &answer, &dense)).collect::<Result<Vec<_>>>()?;
        let dense_answer = self.model.text(&answer);
        Ok(Answered { dense_right: is_right(q, &dense_answer), question: q.clone(), dense_answer, outcomes })
    }
}

/// One row per variant, in the order of the first question.
pub fn summarise(answered: &[Answered]) -> Vec<Summary> {
    let labels = answered.first().map_or(&[][..], |a| &a.outcomes[..]);
    (0..labels.len())
        .map(|i| {
            let of: Vec<&Outcome> = answered.iter().map(|a| &a.outcomes[i]).collect();
            let kl: Vec<f64> = of.iter().flat_map(|o| o.kl.iter().copied()).collect();
            let kept: Vec<f64> = of.iter().map(|o| o.kept).collect();
            let missed: Vec<f64> = of.iter().filter_map(|o| o.missed).collect();
            Summary {
                variant: labels[i].variant.clone(),
                kept: metrics::mean(&kept),
                missed: (!missed.is_empty()).then(|| metrics::mean(&missed)),
                kl_mean: metrics::mean(&kl),
                kl_p95: metrics::quantile(&kl, 0.95),
                top1: 100.0 * of.iter().map(|o| o.same).sum::<usize>() as f64 / kl.len().max(1) as f64,
                facts_right: of.iter().filter(|o| o.right == Some(true)).count(),
                same_text: of.iter().filter(|o| o.same == o.kl.len()).count(),
            }
        })
        .collect()
}

fn table(rows: &[Summary], n_fact: usize, n_question: usize) -> String {
    let mut out = format!(
        "| {:<20} | {:>5} | {:>6} | {:>8} | {:>8} | {:>7} | facts right | same text |\n|{:-<22}|{:->7}|{:->8}|{:->10}|{:->10}|{:->9}|------------:|----------:|\n",
        "attention", "kept", "missed", "KL mean", "KL p95", "top-1 %", "", ":", ":", ":", ":", ":"
    );
    for r in rows {
        out += &format!(
            "| {:<20} | {:>5.3} | {:>6} | {:>8.5} | {:>8.5} | {:>7.2} | {:>11} | {:>9} |\n",
            r.variant,
            r.kept,
            r.missed.map_or("-".to_string(), |m| format!("{m:.4}")),
            r.kl_mean,
            r.kl_p95,
            r.top1,
            format!("{} of {n_fact}", r.facts_right),
            format!("{} of {n_question}", r.same_text)
        );
    }
    out
}

fn print_each(answered: &[Answered]) {
    for a in answered {
        let mark = |right: Option<bool>| right.map_or("", |r| if r { " right" } else { " wrong" });
        println!("{} {:?}", a.question.id, a.question.prompt);
        println!("  {:<20}{} {:?}", "dense f32", mark(a.dense_right), a.dense_answer);
        for o in &a.outcomes {
            let answer = o.answer.as_ref().map_or(String::new(), |t| format!(" {t:?}"));
            let (kl, n) = (metrics::mean(&o.kl), o.kl.len());
            println!(
                "  {:<20}{} KL {kl:.5}, same {} of {n}, kept {:.3}{answer}",
                o.variant,
                mark(o.right),
                o.same,
                o.kept
            );
        }
    }
    println!();
}

/// The command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let questions = read_questions(&args.questions)?;
    let model = Model::load_on(&args.model.model, &args.model.gpu)?;
    // Room for the longest question and answer: at most one token per byte.
    let slack = questions.iter().map(|q| q.prompt.len() + q.n_predict + 16).max().unwrap_or(0);
    let session = Session::open(&model, &args.model, &args.index, args.state_file.as_deref(), slack)?;
    let mut runner = Runner { session, model: &model, args };
    let variants = variants(args);
    let phase = Phase::new("eval", questions.len());
    let mut answered = Vec::new();
    for (i, q) in questions.iter().enumerate() {
        answered.push(runner.ask(&variants, q)?);
        phase.step(i + 1);
    }
    phase.end();
    let facts = questions.iter().filter(|q| q.kind == Kind::Fact).count();
    let dense_facts_right = answered.iter().filter(|a| a.dense_right == Some(true)).count();
    let positions = answered.iter().map(|a| a.outcomes[0].kl.len()).sum();
    let rows = summarise(&answered);
    if args.json {
        let report = Report {
            model: model.description(),
            cache: args.model.cache_types(),
            index: args.index.display().to_string(),
            n_prefix: runner.session.n_prefix,
            positions,
            facts,
            dense_facts_right,
            variants: rows,
            questions: &answered,
        };
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    if args.each {
        print_each(&answered);
    }
    println!(
        "{}, {} cache, prefix of {} tokens, {} questions, {positions} answer tokens; reference: dense f32, \
         {dense_facts_right} of {facts} facts right\n",
        model.description(),
        args.model.cache_types(),
        runner.session.n_prefix,
        questions.len()
    );
    print!("{}", table(&rows, facts, questions.len()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(answer: Option<&str>) -> Question {
        let (prompt, answer) = ("p".to_string(), answer.map(str::to_string));
        Question { id: "q".into(), kind: Kind::Fact, prompt, answer, depth: None, n_predict: 2 }
    }

    fn answered(kl: &[f64], same: usize, right: bool) -> Answered {
        let (variant, kl) = ("v".to_string(), kl.to_vec());
        let outcome = Outcome { variant, kept: 0.5, missed: Some(0.25), kl, same, answer: None, right: Some(right) };
        let (question, dense_answer) = (question(Some("X")), "X".to_string());
        Answered { question, dense_answer, dense_right: Some(true), outcomes: vec![outcome] }
    }

    #[test]
    fn a_fact_is_right_if_the_answer_begins_with_it() {
        let q = question(Some("Velnor"));
        assert_eq!(is_right(&q, " Velnor. The"), Some(true));
        assert_eq!(is_right(&q, " Vel"), Some(false));
        assert_eq!(is_right(&question(None), "x"), None);
    }

    #[test]
    fn positions_are_pooled_over_questions() {
        let rows = summarise(&[answered(&[0.0, 1.0], 1, true), answered(&[2.0, 5.0], 2, false)]);
        let expected = Summary {
            variant: "v".into(),
            kept: 0.5,
            missed: Some(0.25),
            kl_mean: 2.0,
            kl_p95: 5.0,
            top1: 75.0,
            facts_right: 1,
            same_text: 1,
        };
        assert_eq!(rows, [expected]);
        let text = table(&rows, 2, 2);
        assert!(text.contains("0.2500") && text.contains("2.00000") && text.contains("1 of 2"), "{text}");
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(widths.iter().all(|w| *w == widths[0]), "{text}");
    }
}
