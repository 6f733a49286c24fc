//! The ways to attend that one run compares, from the options: budgets, thresholds and masses as they are named, and what is tried
//! or compared at as many bytes.

use anyhow::{bail, ensure, Context as _, Result};
use ggml_squeeze::attention::Spread;
use ggml_squeeze::config::{DEFAULT_TILE, SPREAD_ALPHA};
use serde::{Deserialize, Serialize};

use super::EvalArgs;
use crate::session::SpreadArg;

/// What an index of the prefix is made with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Build {
    pub sinks: u32,
    pub clusters: f32,
    pub seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Budget,
    Threshold,
    Mass,
}

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Amount {
    /// The mode's own number.
    Nominal(f32),
    /// A share of the bytes of the prefix's K and V.
    Bytes(f32),
    /// As many bytes as the index's usual selection reads at this budget.
    AsBudget(f32),
}

/// The index's selection with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sparse {
    pub kind: Kind,
    pub spread: SpreadArg,
    pub alpha: f32,
    pub estimate: bool,
    pub tile: usize,
    /// First layers with a budget of 1.
    pub dense_layers: u32,
    /// Budgets by layer, by what the calibration says that they are worth.
    pub per_layer: bool,
    /// Thresholds have no floor.
    pub floorless: bool,
    pub build: Build,
}

impl Sparse {
    pub fn usual(build: Build, spread: SpreadArg, estimate: bool) -> Sparse {
        Sparse {
            kind: Kind::Budget,
            spread,
            alpha: SPREAD_ALPHA,
            estimate,
            tile: DEFAULT_TILE,
            dense_layers: 0,
            per_layer: false,
            floorless: false,
            build,
        }
    }

    pub fn spread(&self) -> Spread {
        self.spread.value()
    }

    /// The same with one setting changed, as `--try` names it.
    fn changed(mut self, change: &str) -> Result<Sparse> {
        let (name, value) = change.split_once('=').unwrap_or((change, ""));
        let number =
            || value.parse::<f32>().ok().filter(|x| x.is_finite() && *x >= 0.0).context("give a number behind it");
        match (name, value) {
            ("spread", "none") => self.spread = SpreadArg::None,
            ("spread", "radius") => self.spread = SpreadArg::Radius,
            ("spread", "diag") => self.spread = SpreadArg::Diag,
            ("mode", "budget") => self.kind = Kind::Budget,
            ("mode", "threshold") => self.kind = Kind::Threshold,
            ("mode", "mass") => self.kind = Kind::Mass,
            ("alpha", _) => self.alpha = number()?,
            ("sinks", _) => self.build.sinks = number()? as u32,
            ("clusters", _) => self.build.clusters = number()?,
            ("seed", _) => self.build.seed = number()? as u64,
            ("dense-layers", _) => self.dense_layers = number()? as u32,
            ("estimate", "") => self.estimate = true,
            ("per-layer", "") => self.per_layer = true,
            ("no-floor", "") => self.floorless = true,
            _ => bail!(
                "known are spread=none|radius|diag, mode=budget|threshold|mass, alpha=N, sinks=N, clusters=SHARE, seed=N, \
                 dense-layers=N, estimate, per-layer, no-floor; several with a + between them"
            ),
        }
        ensure!(!self.per_layer || self.kind == Kind::Budget, "budgets of layers need mode=budget");
        Ok(self)
    }
}

/// A rule that the index's selection is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// All of them
    All,
    /// The keys of the largest attention mass: what no rule that reads so little can know
    Oracle,
    /// Quest's bounds of pages of 16 keys, each query head its own pages
    QuestHead,
    /// The same, one choice per KV head
    Quest,
    /// Means of pages of 20 keys
    Pages,
    /// Sinks and the last keys (StreamingLLM)
    Window,
    /// The paper's reference code: one threshold, no pinned sinks, no floor, no spread, no estimate
    Reference,
    /// Exact scores of all keys at every n-th token (TokenSelect's idea)
    Tokens,
    /// Dense attention at every n-th token, its best keys at others (Recycled Attention's idea)
    Recycled,
}

impl Baseline {
    const EACH: [Baseline; 8] = [
        Baseline::Oracle,
        Baseline::QuestHead,
        Baseline::Quest,
        Baseline::Pages,
        Baseline::Window,
        Baseline::Reference,
        Baseline::Tokens,
        Baseline::Recycled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Baseline::All => "all",
            Baseline::Oracle => "oracle keys",
            Baseline::QuestHead => "Quest, per head",
            Baseline::Quest => "Quest, group mean",
            Baseline::Pages => "page means",
            Baseline::Window => "window and sinks",
            Baseline::Reference => "reference rule",
            Baseline::Tokens => "token scores, reused",
            Baseline::Recycled => "recycled",
        }
    }
}

/// What `--try all` stands for.
const TRIES: [&str; 14] = [
    "spread=none",
    "spread=radius",
    "alpha=1",
    "alpha=3",
    "mode=threshold",
    "mode=mass",
    "dense-layers=1",
    "dense-layers=2",
    "sinks=4",
    "sinks=64",
    "clusters=0.1",
    "estimate",
    "per-layer",
    "seed=1",
];

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// llama.cpp's own kernels.
    Stock,
    Sparse(Sparse),
    Baseline(Baseline),
}

/// One way to attend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    pub label: String,
    /// Variants of a series differ in how much they read, and are one line of a plot.
    pub series: String,
    pub how: How,
    pub amount: Amount,
}

impl Variant {
    /// Is it a calibrated mode that is to read so many bytes?
    pub fn is_solved(&self) -> bool {
        let calibrated = matches!(self.how, How::Sparse(s) if s.kind != Kind::Budget);
        calibrated && !matches!(self.amount, Amount::Nominal(_))
    }

    /// What index it needs.
    pub fn build(&self, usual: Build) -> Build {
        match self.how {
            How::Sparse(sparse) => sparse.build,
            _ => usual,
        }
    }
}

/// The variants that the options name, in the order of the table.
///
/// # Errors
/// A `--try` is none.
pub fn variants(args: &EvalArgs) -> Result<Vec<Variant>> {
    let build = Build { sinks: args.cluster.sinks, clusters: args.cluster.clusters, seed: args.cluster.seed };
    let mut out = Vec::new();
    if args.stock {
        let name = || "llama.cpp".to_string();
        out.push(Variant { label: name(), series: name(), how: How::Stock, amount: Amount::Nominal(1.0) });
    }
    let usual = Sparse::usual(build, args.spread[0], args.estimate);
    for (spread, tile) in args.spread.iter().flat_map(|spread| args.tile.iter().map(move |tile| (*spread, *tile))) {
        let of_spread = match spread {
            SpreadArg::Diag => "",
            SpreadArg::Radius => " radius",
            SpreadArg::None => " no spread",
        };
        let of_tile = if tile == 1 { String::new() } else { format!(" tile {tile}") };
        let mut add = |kind: Kind, name: &str, amount: Amount, number: f32, unit: &str| {
            let sparse = Sparse { kind, tile, ..Sparse::usual(build, spread, args.estimate) };
            let series = format!("{name}{of_spread}{of_tile}");
            let label = format!("{name} {number}{unit}{of_spread}{of_tile}");
            out.push(Variant { label, series, how: How::Sparse(sparse), amount });
        };
        args.budgets().into_iter().for_each(|b| add(Kind::Budget, "budget", Amount::Nominal(b), b, ""));
        args.bytes.iter().for_each(|b| add(Kind::Budget, "budget", Amount::Bytes(*b), *b, " of bytes"));
        args.threshold.iter().for_each(|b| add(Kind::Threshold, "threshold", Amount::Nominal(*b), *b, ""));
        args.mass.iter().for_each(|m| add(Kind::Mass, "mass", Amount::Nominal(*m), *m, ""));
    }
    let amounts: Vec<Amount> = args
        .budgets()
        .into_iter()
        .filter(|b| *b < 1.0)
        .map(Amount::AsBudget)
        .chain(args.bytes.iter().map(|b| Amount::Bytes(*b)))
        .collect();
    let labelled = |series: &str, how: How| -> Vec<Variant> {
        let of = |amount: &Amount| Variant {
            label: match amount {
                Amount::AsBudget(b) => format!("{series}, as budget {b}"),
                Amount::Bytes(b) | Amount::Nominal(b) => format!("{series}, {b} of bytes"),
            },
            series: series.to_string(),
            how,
            amount: *amount,
        };
        amounts.iter().map(of).collect()
    };
    let tries = args.tries.iter().flat_map(|t| if t == "all" { TRIES.to_vec() } else { vec![t.as_str()] });
    for named in tries {
        let change = |sparse: Sparse, change: &str| sparse.changed(change);
        let sparse =
            named.split('+').try_fold(usual, change).with_context(|| format!("--try {named} cannot be used"))?;
        out.extend(labelled(named, How::Sparse(sparse)));
    }
    let each = args.baselines.iter().flat_map(|b| if *b == Baseline::All { Baseline::EACH.to_vec() } else { vec![*b] });
    for baseline in each {
        let how = match baseline {
            Baseline::Reference => How::Sparse(Sparse {
                kind: Kind::Threshold,
                spread: SpreadArg::None,
                floorless: true,
                estimate: false,
                build: Build { sinks: 0, ..build },
                ..usual
            }),
            other => How::Baseline(other),
        };
        out.extend(labelled(baseline.name(), how));
    }
    let mut labels: Vec<&str> = out.iter().map(|v| v.label.as_str()).collect();
    labels.sort_unstable();
    let twice = labels.windows(2).find(|pair| pair[0] == pair[1]);
    ensure!(twice.is_none(), "{} is named twice: leave one out", twice.map_or("", |pair| pair[0]));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        eval: EvalArgs,
    }

    fn of(given: &[&str]) -> Result<Vec<Variant>> {
        variants(&Cli::parse_from([&["eval", "-m", "m"][..], given].concat()).eval)
    }

    fn labels(given: &[&str]) -> Vec<String> {
        of(given).unwrap().into_iter().map(|v| v.label).collect()
    }

    #[test]
    fn budgets_are_the_default_and_bytes_take_their_place() {
        assert_eq!(labels(&[]), ["budget 0.1", "budget 0.2", "budget 0.33", "budget 0.5", "budget 1"]);
        assert_eq!(labels(&["--bytes", "0.125"]), ["budget 0.125 of bytes"]);
        assert_eq!(labels(&["--budgets", "0.2", "--bytes", "0.2", "--mass", "0.9", "--stock"]).len(), 4);
    }

    #[test]
    fn what_is_tried_changes_one_thing_at_as_many_bytes() {
        let all = of(&["--budgets", "0.2,1", "--try", "sinks=4,spread=none+alpha=1", "--baselines", "reference,quest"])
            .unwrap();
        let named: Vec<&str> = all.iter().skip(2).map(|v| v.label.as_str()).collect();
        assert_eq!(
            named,
            [
                "sinks=4, as budget 0.2",
                "spread=none+alpha=1, as budget 0.2",
                "reference rule, as budget 0.2",
                "Quest, group mean, as budget 0.2"
            ]
        );
        let How::Sparse(usual) = all[0].how else { panic!("{:?}", all[0]) };
        let build = Build { sinks: 4, ..usual.build };
        assert_eq!(all[2].how, How::Sparse(Sparse { build, ..usual }));
        assert_eq!(all[3].how, How::Sparse(Sparse { spread: SpreadArg::None, alpha: 1.0, ..usual }));
        assert_eq!(all[5].how, How::Baseline(Baseline::Quest));
        assert!(all.iter().skip(2).all(|v| v.amount == Amount::AsBudget(0.2)));
        let How::Sparse(reference) = all[4].how else { panic!("{:?}", all[4]) };
        assert!(reference.floorless && reference.build.sinks == 0 && reference.kind == Kind::Threshold);
    }

    #[test]
    fn every_named_try_and_baseline_is_one() {
        let all = of(&["--bytes", "0.2", "--try", "all", "--baselines", "all"]).unwrap();
        assert_eq!(all.len(), 1 + TRIES.len() + Baseline::EACH.len());
        let error = |given: &str| format!("{:#}", of(&["--try", given]).unwrap_err());
        assert!(error("speed").contains("known are") && error("alpha=x").contains("number"));
        assert!(format!("{:#}", of(&["--budgets", "0.2,0.2"]).unwrap_err()).contains("twice"));
    }
}
