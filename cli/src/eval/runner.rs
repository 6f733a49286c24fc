//! Asks questions behind one prefix, in every way to attend. The reference is dense attention on the plugin's own kernels (f32
//! sums); its greedy answer is fed to every variant in one batch, and the logits are compared.
//!
//! What is right is fed too, where it is one text: a token is said greedily, given all right ones before it, if its logit is the
//! largest. Up to its first mistake a generation would say the same, so whether an answer is right needs no generation. Answers
//! that can be right in several ways are generated from the first token on that differs from the dense answer.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::attention::rule::RuleSetting;
use ggml_squeeze::attention::{keys_of_share, Mode, Spread};
use ggml_squeeze::backend;
use ggml_squeeze::config::{ModeSetting, THRESHOLD_FLOOR};
use ggml_squeeze::index::Index;

use super::allocate::by_layer;
use super::asked::{score, Asked};
use super::rules::bytes::Layer;
use super::rules::{Method, Shared, Sums, Working};
use super::solve::solve;
use super::source::Prepared;
use super::store::{LayerSums, Outcome, Reference};
use super::variant::{Amount, Baseline, Build, How, Kind, Sparse, Variant};
use super::EvalArgs;
use crate::llama::{Context, Model, Outputs};
use crate::metrics;
use crate::session::{Attention, Session};
use crate::tasks::Want;

/// A variant on the prefix at hand.
struct Ready {
    attention: Attention,
    estimate: bool,
    working: Option<Arc<Working>>,
    method: Method,
    layers: HashMap<u32, Layer>,
}

/// A calibrated mode by its number: the logarithm of a threshold, or that of minus the logarithm of what mass mode leaves out.
fn solved_mode(sparse: &Sparse, x: f64, share: f32) -> Mode {
    match sparse.kind {
        Kind::Mass => Mode::Mass((1.0 - (-x.exp()).exp()).clamp(0.0, 1.0) as f32),
        _ if sparse.floorless => Mode::Threshold { threshold: x.exp() as f32, floor: 0.0 },
        _ => Mode::Threshold { threshold: x.exp() as f32, floor: THRESHOLD_FLOOR.min(share / 2.0) },
    }
}

/// Where to look for that number first: by the index's table.
fn start_of(sparse: &Sparse, index: &Index, share: f32) -> f64 {
    let meta = index.meta();
    let far = |kept: f32| (kept - share).abs();
    let x = match sparse.kind {
        Kind::Mass => {
            let row = meta.mass_targets.iter().min_by(|a, b| far(a.kept).total_cmp(&far(b.kept)));
            row.map(|row| (-f64::from(1.0 - row.target).max(1e-6).ln()).max(1e-6).ln())
        }
        _ => {
            let row = meta.calibration.iter().min_by(|a, b| far(a.budget).total_cmp(&far(b.budget)));
            row.map(|row| f64::from(row.threshold.max(1e-9)).ln())
        }
    };
    x.unwrap_or(if sparse.kind == Kind::Mass { 1.0 } else { -8.0 })
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
    /// Numbers of calibrated modes, by label.
    solved: HashMap<String, f64>,
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
        let (shared, ready, solved) = (Arc::default(), HashMap::new(), HashMap::new());
        Ok(Runner { session, short, model, args, indexes, present: 0, usual, shared, ready, solved })
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

    /// Share of the `P - W` keys, sinks counted, that a sparse variant keeps on average.
    fn share(&self, sparse: &Sparse, amount: Amount, index: &Index) -> f32 {
        if let Amount::Nominal(share) = amount {
            return share;
        }
        let (meta, n_layer) = (index.meta(), index.shapes().len().max(1) as f64);
        let method = Method::Index { spread: sparse.spread(), estimate: sparse.estimate };
        let keys = self.layers(index).values().map(|l| l.keys(method, self.bytes(amount), 0.0) as f64).sum::<f64>();
        let share = (keys / n_layer + f64::from(meta.n_sink)) / (meta.n_prefix() - meta.n_window as usize) as f64;
        share.clamp(1e-4, 1.0) as f32
    }

    /// The mode of a sparse variant: the setting of all layers, and those of layers that have their own.
    fn mode(&self, label: &str, sparse: &Sparse, amount: Amount, index: &Index) -> (ModeSetting, BTreeMap<u32, Mode>) {
        let (shapes, share) = (index.shapes(), self.share(sparse, amount, index));
        let is_dense = |layer: u32| layer < sparse.dense_layers;
        let (n_layer, dense) = (shapes.len().max(1), shapes.iter().filter(|s| is_dense(s.layer)).count());
        // The others have what dense layers leave.
        let share = match (dense, amount) {
            (0, _) | (_, Amount::Nominal(_)) => share,
            _ => ((share * n_layer as f32 - dense as f32) / (n_layer - dense).max(1) as f32).max(1e-4),
        };
        let mut own = BTreeMap::new();
        if sparse.per_layer {
            own.extend(by_layer(index, share).into_iter().map(|(layer, b)| (layer, Mode::Budget(b))));
        }
        if let Some(x) = self.solved.get(label) {
            own.extend(shapes.iter().map(|s| (s.layer, solved_mode(sparse, *x, share))));
        }
        own.extend((0..sparse.dense_layers).map(|layer| (layer, Mode::Budget(1.0))));
        let setting = match sparse.kind {
            Kind::Budget => ModeSetting::Budget(share),
            Kind::Threshold => ModeSetting::Threshold(share),
            Kind::Mass => ModeSetting::Mass(share),
        };
        (setting, own)
    }

    /// Finds the number of a calibrated mode at which `probe`, fed behind the prefix, reads as much as it is to; or takes the one that
    /// is known.
    pub fn solve(&mut self, variant: &Variant, probe: &[i32], known: Option<f64>) -> Result<f64> {
        let How::Sparse(sparse) = variant.how else { bail!("{} has no calibrated mode", variant.label) };
        let build = variant.build(self.usual);
        let index = self.indexes[self.number(build)?].1.clone();
        let wanted = self.share(&sparse, variant.amount, &index);
        let x = match known {
            Some(x) => x,
            None => {
                let start = start_of(&sparse, &index, wanted);
                solve(start, wanted.into(), sparse.kind == Kind::Mass, &mut |x| {
                    self.solved.insert(variant.label.clone(), x);
                    self.ready.remove(&variant.label);
                    let ready = self.ready(variant)?;
                    self.apply(ready.attention, Some((&ready, build)), false)?;
                    self.session.context.truncate(self.session.n_prefix)?;
                    self.decode(probe, Outputs::Last, Some(&ready))?;
                    ready.attention.check()?;
                    let mut out = Outcome::default();
                    self.read(&ready, &mut out)?;
                    Ok(out.read.kept)
                })?
            }
        };
        self.solved.insert(variant.label.clone(), x);
        self.ready.remove(&variant.label);
        Ok(x)
    }

    fn number(&self, build: Build) -> Result<usize> {
        self.indexes.iter().position(|(known, _)| *known == build).context("an index of this build was made")
    }

    fn ready(&mut self, variant: &Variant) -> Result<Arc<Ready>> {
        if let Some(ready) = self.ready.get(&variant.label) {
            return Ok(ready.clone());
        }
        let build = variant.build(self.usual);
        let number = self.number(build)?;
        let index = self.indexes[number].1.clone();
        let layers = self.layers(&index);
        let stock = Method::Index { spread: Spread::None, estimate: false };
        let ready = match variant.how {
            How::Stock => Ready { attention: Attention::Stock, estimate: false, working: None, method: stock, layers },
            How::Sparse(sparse) => {
                let method = Method::Index { spread: sparse.spread(), estimate: sparse.estimate };
                let (mode, own) = self.mode(&variant.label, &sparse, variant.amount, &index);
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
    fn apply(&mut self, attention: Attention, ready: Option<(&Ready, Build)>, measure: bool) -> Result<()> {
        if let Some((_, build)) = ready {
            let number = self.indexes.iter().position(|(known, _)| *known == build).unwrap_or(0);
            if number != self.present {
                backend::set_indexes(vec![self.indexes[number].1.clone()])?;
                self.present = number;
            }
        }
        attention.apply(ready.is_some_and(|r| r.0.estimate), measure);
        let working = ready.and_then(|r| r.0.working.clone());
        // What a generation read is not counted.
        working.iter().for_each(|w| drop(w.take()));
        backend::configure(|config| config.rule = working.map(|w| RuleSetting(w as Arc<_>)));
        Ok(())
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

    /// Feeds question and answer; `see(i, logits)` gets the logits that predict answer token i. With `first`, the logits behind the
    /// question, that is in the cache already.
    fn feed(
        &mut self,
        question: &[i32],
        answer: &[i32],
        ready: Option<&Ready>,
        first: Option<&[f32]>,
        mut see: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let given = &answer[..answer.len() - 1];
        let fed = if let Some(first) = first {
            self.session.context.truncate(self.session.n_prefix + question.len())?;
            see(0, first);
            0
        } else {
            self.session.context.truncate(self.session.n_prefix)?;
            question.len()
        };
        let batch = [&question[..fed], given].concat();
        if batch.is_empty() {
            return Ok(());
        }
        if self.args.stepwise {
            if fed > 0 {
                self.decode(question, Outputs::Last, ready)?;
                see(0, self.session.context.logits(fed - 1)?);
            }
            for (i, token) in given.iter().enumerate() {
                self.decode(std::slice::from_ref(token), Outputs::Last, ready)?;
                see(i + 1, self.session.context.logits(0)?);
            }
            return Ok(());
        }
        self.decode(&batch, Outputs::From(fed.saturating_sub(1)), ready)?;
        // The row of token j of the batch predicts token j + 1 - fed of the answer.
        for row in fed.saturating_sub(1)..batch.len() {
            see(row + 1 - fed, self.session.context.logits(row)?);
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
        self.apply(Attention::Forced, None, false)?;
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
            self.feed(&asked.tokens, &out.tokens, None, None, |_, logits| dense.answer.extend_from_slice(logits))?;
        }
        if asked.is_fed() {
            let behind = dense.answer.get(..self.model.n_vocab()).map(<[f32]>::to_vec);
            let right = &mut dense.right;
            self.feed(&asked.tokens, &asked.right, None, behind.as_deref(), |_, logits| {
                right.extend_from_slice(logits)
            })?;
            let rows = dense.right.chunks_exact(self.model.n_vocab());
            let choice: Vec<i32> = rows.clone().map(metrics::argmax).collect();
            let losses = rows.zip(&asked.right).enumerate().filter(|(i, _)| asked.is_answer(*i));
            out.losses = losses.map(|(_, (logits, token))| metrics::loss(logits, *token)).collect();
            out.score = (!asked.is_text()).then(|| asked.share_right(&choice));
        }
        Attention::Forced.check()?;
        if known.is_none() && asked.is_fed() {
            out.short_losses = self.short_losses(asked)?;
        }
        Ok((out, dense))
    }

    /// What a variant makes of a question; `recall`: what it misses is measured too.
    pub fn outcome(
        &mut self,
        variant: &Variant,
        asked: &Asked,
        reference: &Reference,
        dense: &Dense,
        recall: bool,
    ) -> Result<Outcome> {
        let (n_vocab, now) = (self.model.n_vocab(), self.ready(variant)?);
        let now = &*now;
        let ready = Some(now);
        self.apply(now.attention, Some((now, variant.build(self.usual))), recall)?;
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
        let (mut said, mut choice, mut behind) = (Vec::new(), Vec::new(), None);
        let mut losses = Vec::new();
        let begins_right = asked.is_fed() && reference.tokens.starts_with(&asked.right);
        if !asked.is_text() {
            self.feed(&asked.tokens, &reference.tokens, ready, None, |i, logits| {
                if i == 0 {
                    behind = Some(logits.to_vec());
                }
                compare(logits, &dense.answer[row(&dense.answer, i)], &mut said);
                if begins_right && i < asked.right.len() && asked.is_answer(i) {
                    losses.push(metrics::loss(logits, asked.right[i]));
                }
            })?;
        }
        if begins_right {
            choice = said[..asked.right.len()].to_vec();
        } else if asked.is_fed() {
            self.feed(&asked.tokens, &asked.right, ready, behind.as_deref(), |i, logits| {
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
        if asked.is_fed() {
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
            out.read = Sums { n: 1.0, kept: 1.0, bytes: 1.0, missed: 0.0, measured: 1.0 };
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
            let missed = stats.missed_share;
            let measured = f64::from(u8::from(missed.is_some()));
            out.read = Sums { n: 1.0, kept: stats.kept_share, bytes, missed: missed.unwrap_or(0.0), measured };
            return Ok(());
        }
        let mut all = Sums::default();
        layers.values().for_each(|sums| all.add(sums));
        out.read = all.mean();
        out.layers = layers.into_iter().map(|(layer, sums)| LayerSums { layer, sums: sums.mean() }).collect();
        Ok(())
    }
}
