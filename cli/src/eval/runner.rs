//! Asks questions behind one prefix, in every way to attend. The reference is dense attention on the plugin's own kernels (f32
//! sums); its greedy answer is fed to every variant in one batch, and the logits are compared.
//!
//! What is right is fed too, where it is one text: a token is said greedily, given all right ones before it, if its logit is the
//! largest. Up to its first mistake a generation would say the same, so whether an answer is right needs no generation. Answers
//! that can be right in several ways are generated from the first token on that differs from the dense answer.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::attention::rule::RuleSetting;
use ggml_squeeze::attention::{keys_of_share, Mode, Spread};
use ggml_squeeze::backend;
use ggml_squeeze::config::ModeSetting;
use ggml_squeeze::index::Index;

use super::allocate::by_layer;
use super::rules::bytes::Layer;
use super::rules::{Method, Shared, Sums, Working};
use super::source::{Prepared, Source};
use super::store::{LayerSums, Outcome, Reference};
use super::variant::{Amount, Baseline, Build, How, Kind, Sparse, Variant};
use super::EvalArgs;
use crate::llama::{Context, Model, Outputs};
use crate::metrics::{self, text};
use crate::session::{Attention, Session};
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
    fn is_text(&self) -> bool {
        matches!(self.question.want, Want::Text(_))
    }

    /// Has it a right answer that is fed?
    fn is_fed(&self) -> bool {
        matches!(self.question.want, Want::Parts(_) | Want::Text(_))
    }

    fn is_answer(&self, i: usize) -> bool {
        self.spans.iter().any(|s| s.contains(&i))
    }

    /// Share of the answers all of whose tokens are the most likely ones.
    fn share_right(&self, choice: &[i32]) -> f64 {
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

/// A variant on the prefix at hand.
struct Ready {
    attention: Attention,
    estimate: bool,
    working: Option<Arc<Working>>,
    method: Method,
    layers: HashMap<u32, Layer>,
}

/// The dense logits of a question, `[tokens][n_vocab]`.
#[derive(Default)]
pub struct Dense {
    answer: Vec<f32>,
    right: Vec<f32>,
}

pub struct Runner<'a> {
    session: Session<'a>,
    /// Without the prefix.
    short: Context<'a>,
    model: &'a Model,
    args: &'a EvalArgs,
    indexes: Vec<(Build, Arc<Index>)>,
    /// The one in force.
    present: usize,
    usual: Build,
    shared: Arc<Shared>,
    ready: HashMap<String, Arc<Ready>>,
}

impl<'a> Runner<'a> {
    /// `slack`: tokens of the longest question with its answer.
    pub fn open(
        args: &'a EvalArgs,
        model: &'a Model,
        prepared: &Prepared,
        usual: Build,
        slack: usize,
    ) -> Result<Runner<'a>> {
        let first = prepared.index(usual)?;
        let session = Session::open(model, &args.model, first, prepared.state.as_deref(), slack + 16)?;
        let open = |(build, path): &(Build, std::path::PathBuf)| -> Result<(Build, Arc<Index>)> {
            let index = Index::open(path).with_context(|| format!("cannot use the index {}", path.display()))?;
            Ok((*build, Arc::new(index)))
        };
        let mut indexes = prepared.indexes.iter().map(open).collect::<Result<Vec<_>>>()?;
        indexes.sort_by_key(|(build, _)| *build != usual);
        let short = Context::new(model, &args.model, slack + 16, None)?;
        let (shared, ready) = (Arc::default(), HashMap::new());
        Ok(Runner { session, short, model, args, indexes, present: 0, usual, shared, ready })
    }

    fn types(&self) -> [ggml_squeeze::attention::Element; 2] {
        [self.args.model.cache_type_k, self.args.model.cache_type_v]
    }

    fn layers(&self, index: &Index) -> HashMap<u32, Layer> {
        let layer = |number: u32| Some((number, Layer::new(index.meta(), &index.layer(number)?, self.types())));
        index.shapes().iter().filter_map(|shape| layer(shape.layer)).collect()
    }

    /// What the usual selection reads at a budget, or what is asked for, as a share of the prefix's bytes.
    fn bytes(&self, amount: Amount) -> f64 {
        match amount {
            Amount::Bytes(share) => share.into(),
            Amount::Nominal(share) | Amount::AsBudget(share) => {
                let index = &self.indexes[0].1;
                let keys = keys_of_share(share, index.meta().n_prefix(), index.meta().n_window as usize);
                let keys = keys.saturating_sub(index.meta().n_sink as usize);
                let usual = Sparse::usual(self.usual, self.args.spread[0], self.args.estimate);
                let method = Method::Index { spread: usual.spread(), estimate: usual.estimate };
                let layers = self.layers(index);
                let read = layers.values().map(|l| {
                    let clusters = l.n_cluster * keys / l.n_open().max(1);
                    l.read(method, keys, clusters, false)
                });
                read.sum::<f64>() / layers.values().map(Layer::dense).sum::<f64>()
            }
        }
    }

    /// The mode of a sparse variant: the setting of all layers, and those of layers that have their own.
    fn mode(&self, sparse: &Sparse, amount: Amount, index: &Index) -> (ModeSetting, Option<BTreeMap<u32, Mode>>) {
        let meta = index.meta();
        let (n_prefix, n_window) = (meta.n_prefix(), meta.n_window as usize);
        let shapes = index.shapes();
        let n_layer = shapes.len().max(1);
        let nominal = match amount {
            Amount::Nominal(x) => x,
            _ => {
                let method = Method::Index { spread: sparse.spread(), estimate: sparse.estimate };
                let layers = self.layers(index);
                let keys: f64 = layers.values().map(|l| l.keys(method, self.bytes(amount), 0.0) as f64).sum::<f64>();
                let share = (keys / n_layer as f64 + f64::from(meta.n_sink)) / (n_prefix - n_window) as f64;
                share.clamp(1e-4, 1.0) as f32
            }
        };
        let dense = shapes.iter().filter(|s| s.layer < sparse.dense_layers).count();
        // The others have what dense layers leave.
        let share = match (dense, amount) {
            (0, _) | (_, Amount::Nominal(_)) => nominal,
            _ => ((nominal * n_layer as f32 - dense as f32) / (n_layer - dense).max(1) as f32).max(1e-4),
        };
        let at_share = |kind: Kind| match (kind, amount) {
            (Kind::Budget, _) => ModeSetting::Budget(share),
            (Kind::Threshold, _) => ModeSetting::Threshold(share),
            (Kind::Mass, Amount::Nominal(x)) => ModeSetting::Mass(x),
            (Kind::Mass, _) => ModeSetting::Mass(super::allocate::mass_of_share(&meta.mass_targets, share)),
        };
        let own: BTreeMap<u32, Mode> = if sparse.per_layer {
            by_layer(index, share).into_iter().map(|(layer, b)| (layer, Mode::Budget(b))).collect()
        } else {
            BTreeMap::new()
        };
        let dense = (0..sparse.dense_layers).map(|layer| (layer, Mode::Budget(1.0)));
        let layers: BTreeMap<u32, Mode> = own.into_iter().chain(dense).collect();
        (at_share(sparse.kind), (!layers.is_empty()).then_some(layers))
    }

    fn ready(&mut self, variant: &Variant) -> Result<Arc<Ready>> {
        if let Some(ready) = self.ready.get(&variant.label) {
            return Ok(ready.clone());
        }
        let build = variant.build(self.usual);
        let number =
            self.indexes.iter().position(|(known, _)| *known == build).context("an index of this build was made")?;
        let index = self.indexes[number].1.clone();
        let layers = self.layers(&index);
        let stock = Method::Index { spread: Spread::None, estimate: false };
        let ready = match variant.how {
            How::Stock => Ready { attention: Attention::Stock, estimate: false, working: None, method: stock, layers },
            How::Sparse(sparse) => {
                let method = Method::Index { spread: sparse.spread(), estimate: sparse.estimate };
                let (mode, own) = self.mode(&sparse, variant.amount, &index);
                let attention = Attention::Sparse(mode, sparse.spread(), sparse.tile);
                let working = Working::new(method, 1.0, layers.clone(), self.shared.clone());
                let working = working.with(own, Some(sparse.alpha), sparse.floorless);
                Ready { attention, estimate: sparse.estimate, working: Some(Arc::new(working)), method, layers }
            }
            How::Baseline(baseline) => {
                let share = self.bytes(variant.amount);
                // Rows between anchors: those take half of the bytes at most.
                let tokens = (1.0 / share).ceil() as usize;
                let method = match baseline {
                    Baseline::All | Baseline::Reference | Baseline::Oracle => Method::Oracle,
                    Baseline::QuestHead => Method::BoundsHead,
                    Baseline::Quest => Method::Bounds,
                    Baseline::Pages => Method::Means,
                    Baseline::Window => Method::Window,
                    Baseline::Tokens => Method::Tokens(tokens),
                    Baseline::Recycled => Method::Recycled(2 * tokens),
                };
                let attention = Attention::Sparse(ModeSetting::Budget(1.0), Spread::None, 1);
                let working = Working::new(method, share, layers.clone(), self.shared.clone());
                Ready { attention, estimate: false, working: Some(Arc::new(working)), method, layers }
            }
        };
        let ready = Arc::new(ready);
        self.ready.insert(variant.label.clone(), ready.clone());
        Ok(ready)
    }

    /// Puts a way to attend in force.
    fn apply(&mut self, attention: Attention, ready: Option<(&Ready, Build)>) {
        if let Some((_, build)) = ready {
            let number = self.indexes.iter().position(|(known, _)| *known == build).unwrap_or(0);
            if number != self.present {
                backend::set_indexes(vec![self.indexes[number].1.clone()]);
                self.present = number;
            }
        }
        let (estimate, sparse) = (ready.is_some_and(|r| r.0.estimate), matches!(attention, Attention::Sparse(..)));
        attention.apply(estimate, sparse);
        let working = ready.and_then(|r| r.0.working.clone());
        backend::configure(|config| config.rule = working.map(|w| RuleSetting(w as Arc<_>)));
    }

    /// Decodes behind what is there, and tells the rule where that is.
    fn decode(&mut self, tokens: &[i32], outputs: Outputs, ready: Option<&Ready>) -> Result<()> {
        let first = self.session.context.n_past().saturating_sub(self.session.n_prefix);
        if let Some(working) = ready.and_then(|r| r.working.as_ref()) {
            working.begin(first, tokens.len());
        }
        self.session.context.decode(tokens, outputs)
    }

    /// Continues greedily after `given` (all but its last token are in the cache) up to `n` tokens in all.
    fn generate(&mut self, mut given: Vec<i32>, n: usize, ready: Option<&Ready>) -> Result<Vec<i32>> {
        while given.len() < n && !self.model.is_end(given[given.len() - 1]) {
            self.decode(&given[given.len() - 1..], Outputs::Last, ready)?;
            given.push(metrics::argmax(self.session.context.logits(0)?));
        }
        Ok(given)
    }

    /// Feeds question and answer; `see(i, logits)` gets the logits that predict answer token i.
    fn feed(
        &mut self,
        question: &[i32],
        answer: &[i32],
        ready: Option<&Ready>,
        mut see: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.session.context.truncate(self.session.n_prefix)?;
        let last = question.len() - 1;
        if self.args.stepwise {
            self.decode(question, Outputs::Last, ready)?;
            see(0, self.session.context.logits(last)?);
            for i in 1..answer.len() {
                self.decode(&answer[i - 1..i], Outputs::Last, ready)?;
                see(i, self.session.context.logits(0)?);
            }
            return Ok(());
        }
        let batch = [question, &answer[..answer.len() - 1]].concat();
        self.decode(&batch, Outputs::From(last), ready)?;
        for i in 0..answer.len() {
            see(i, self.session.context.logits(last + i)?);
        }
        Ok(())
    }

    /// Losses of what is right behind the question alone.
    fn short_losses(&mut self, asked: &Asked) -> Result<Vec<f64>> {
        Attention::Stock.apply(false, false);
        let start = self.model.tokenise("", true)?;
        let question = [&start[..], &asked.tokens].concat();
        let batch = [&question[..], &asked.right[..asked.right.len() - 1]].concat();
        self.short.truncate(0)?;
        self.short.decode(&batch, Outputs::From(question.len() - 1))?;
        let mut out = Vec::new();
        for i in (0..asked.right.len()).filter(|i| asked.is_answer(*i)) {
            out.push(metrics::loss(self.short.logits(question.len() - 1 + i)?, asked.right[i]));
        }
        Ok(out)
    }

    /// Dense attention's answer, with its logits. A reference that is known is not generated again.
    pub fn reference(&mut self, asked: &Asked, known: Option<&Reference>) -> Result<(Reference, Dense)> {
        self.apply(Attention::Forced, None);
        let mut out = known.cloned().unwrap_or_default();
        let mut dense = Dense::default();
        if !asked.is_text() {
            if known.is_none() {
                self.session.context.truncate(self.session.n_prefix)?;
                self.decode(&asked.tokens, Outputs::Last, None)?;
                let first = metrics::argmax(self.session.context.logits(asked.tokens.len() - 1)?);
                out.tokens = self.generate(vec![first], asked.question.n_predict, None)?;
                out.answer = self.model.text(&out.tokens);
                out.score = score(&asked.question.want, &out.answer);
            }
            self.feed(&asked.tokens, &out.tokens, None, |_, logits| dense.answer.extend_from_slice(logits))?;
        }
        if asked.is_fed() && !asked.right.is_empty() {
            self.feed(&asked.tokens, &asked.right, None, |_, logits| dense.right.extend_from_slice(logits))?;
            let rows = dense.right.chunks_exact(self.model.n_vocab());
            let choice: Vec<i32> = rows.clone().map(metrics::argmax).collect();
            let losses = rows.zip(&asked.right).enumerate().filter(|(i, _)| asked.is_answer(*i));
            out.losses = losses.map(|(_, (logits, token))| metrics::loss(logits, *token)).collect();
            out.score = (!asked.is_text()).then(|| asked.share_right(&choice));
        }
        Attention::Forced.check()?;
        if known.is_none() && asked.is_fed() && !asked.right.is_empty() {
            out.short_losses = self.short_losses(asked)?;
        }
        Ok((out, dense))
    }

    /// What a variant makes of a question.
    pub fn outcome(
        &mut self,
        variant: &Variant,
        asked: &Asked,
        reference: &Reference,
        dense: &Dense,
    ) -> Result<Outcome> {
        let (n_vocab, now) = (self.model.n_vocab(), self.ready(variant)?);
        let now = &*now;
        let ready = Some(now);
        self.apply(now.attention, Some((now, variant.build(self.usual))));
        let mut out = Outcome::default();
        let mut compare = |logits: &[f32], dense: &[f32], choice: &mut Vec<i32>| {
            out.kl.push(metrics::kl(dense, logits));
            let own = metrics::argmax(logits);
            out.same += usize::from(own == metrics::argmax(dense));
            choice.push(own);
        };
        let row = |dense: &'_ [f32], i: usize| -> Range<usize> {
            debug_assert!((i + 1) * n_vocab <= dense.len());
            i * n_vocab..(i + 1) * n_vocab
        };
        let (mut said, mut choice) = (Vec::new(), Vec::new());
        let mut losses = Vec::new();
        let begins_right = !asked.right.is_empty() && reference.tokens.starts_with(&asked.right);
        if !asked.is_text() {
            self.feed(&asked.tokens, &reference.tokens, ready, |i, logits| {
                compare(logits, &dense.answer[row(&dense.answer, i)], &mut said);
                if begins_right && i < asked.right.len() && asked.is_answer(i) {
                    losses.push(metrics::loss(logits, asked.right[i]));
                }
            })?;
        }
        if begins_right {
            choice = said[..asked.right.len()].to_vec();
        } else if asked.is_fed() && !asked.right.is_empty() {
            self.feed(&asked.tokens, &asked.right, ready, |i, logits| {
                if asked.is_answer(i) {
                    losses.push(metrics::loss(logits, asked.right[i]));
                }
                match asked.is_text() {
                    true => compare(logits, &dense.right[row(&dense.right, i)], &mut choice),
                    false => choice.push(metrics::argmax(logits)),
                }
            })?;
        }
        now.attention.check()?;
        self.read(now, &mut out)?;
        out.losses = losses;
        if asked.is_text() {
            return Ok(out);
        }
        if asked.is_fed() && !asked.right.is_empty() {
            out.score = Some(asked.share_right(&choice));
            // Right tokens, and the first wrong one.
            let wrong =
                choice.iter().zip(&asked.right).enumerate().position(|(i, (a, b))| asked.is_answer(i) && a != b);
            let shown = wrong.map_or(asked.right.clone(), |i| [&asked.right[..i], &choice[i..=i]].concat());
            out.answer = self.model.text(&shown);
            return Ok(out);
        }
        let own = match said.iter().zip(&reference.tokens).position(|(a, b)| a != b) {
            _ if asked.question.want == Want::Nothing => said,
            None => reference.tokens.clone(),
            Some(i) => {
                self.session.context.truncate(self.session.n_prefix + asked.tokens.len() + i)?;
                let given = [&reference.tokens[..i], &said[i..=i]].concat();
                self.generate(given, asked.question.n_predict, ready)?
            }
        };
        out.answer = self.model.text(&own);
        out.score = score(&asked.question.want, &out.answer);
        Ok(out)
    }

    /// What was read since the variant was put in force. Rows that a rule is not told of (on a GPU, or in tiles) are in the plugin's
    /// own counters alone.
    fn read(&self, ready: &Ready, out: &mut Outcome) -> Result<()> {
        let Attention::Sparse(_, _, tile) = ready.attention else {
            out.read = Sums { n: 1.0, kept: 1.0, bytes: 1.0, missed: 0.0 };
            return Ok(());
        };
        let layers = ready.working.as_ref().map(|w| w.take()).unwrap_or_default();
        if layers.is_empty() || tile > 1 {
            ensure!(
                matches!(ready.method, Method::Index { .. }),
                "baselines run on the CPU alone: give -ngl 0, or leave out --baselines"
            );
            let stats = backend::stats();
            let read = |l: &Layer| {
                let keys = stats.kept_share * (l.n_prefix - l.n_window) as f64 - l.n_sink as f64;
                let clusters = keys.max(0.0) / l.n_open().max(1) as f64 * l.n_cluster as f64;
                l.read(ready.method, keys.max(0.0) as usize, clusters as usize, false)
            };
            let dense: f64 = ready.layers.values().map(Layer::dense).sum();
            let bytes = ready.layers.values().map(read).sum::<f64>() / dense;
            out.read = Sums { n: 1.0, kept: stats.kept_share, bytes, missed: stats.missed_share.unwrap_or(0.0) };
            return Ok(());
        }
        let mut all = Sums::default();
        layers.values().for_each(|sums| all.add(sums));
        out.read = all.mean();
        out.layers = layers.into_iter().map(|(layer, sums)| LayerSums { layer, sums: sums.mean() }).collect();
        Ok(())
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
