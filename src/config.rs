//! Settings of the plugin, from the environment (`GGML_SQUEEZE_*`) or from a host in the same process.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::attention::rule::RuleSetting;
use crate::attention::Spread;

/// On the CPU, prefixes shorter than this stay dense: the shortest that decoding was measured with, where it is still a little
/// faster than dense (docs/benchmarks.md).
pub const DEFAULT_MIN_PREFIX: usize = 512;
pub const DEFAULT_BUDGET: f32 = 0.2;
/// Query tokens of a prefill that share a selection, at most. Each has its own: tiles of 4 doubled the KL divergence where it
/// was measured, tiles of 32 raised it ninefold (docs/quality.md).
pub const DEFAULT_TILE: usize = 1;
/// Weight of the spread bonus.
pub const SPREAD_ALPHA: f32 = 2.0;
/// Threshold mode keeps at least this share of the keys of every KV head.
pub const THRESHOLD_FLOOR: f32 = 0.05;

/// Selection mode as a user states it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ModeSetting {
    /// Share of the prefix keys, per token and KV head.
    Budget(f32),
    /// The index's calibrated global threshold for this nominal share.
    Threshold(f32),
    /// Calibrated share of the prefix's attention mass.
    Mass(f32),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub index_paths: Vec<PathBuf>,
    pub mode: ModeSetting,
    pub spread: Spread,
    pub estimate: bool,
    /// Prefixes shorter than this stay dense; none: than is worth it where it was measured.
    pub min_prefix: Option<usize>,
    /// Consecutive query tokens of a prefill that share a selection, at most; 1: each has its own.
    pub tile: usize,
    /// Leave stock devices alone and register named ones (SQZ-CPU).
    pub devices: bool,
    /// Run every supported attention node on our kernels with a trivial index at budget 1 (conformance).
    pub force: bool,
    /// Pass every graph through.
    pub disable: bool,
    /// 0 quiet (problems only), 1 bindings and totals, 2 also a line per graph.
    pub log: u32,
    /// Write totals to this file, as one line of JSON, while graphs are computed.
    pub status_path: Option<PathBuf>,
    /// Take synthetic indexes too: their clusters are made up, for speed figures (`sqz bench --synthetic-index`).
    pub synthetic: bool,
    /// Write zeros instead of attention: measures the ceiling. Never from the environment.
    pub attention_free: bool,
    /// Measure the attention mass that selections miss, at the cost of dense attention. Never from the environment.
    pub measure: bool,
    /// Another rule on the CPU than the index's selection, for evaluations. Never from the environment.
    #[doc(hidden)]
    pub rule: Option<RuleSetting>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            index_paths: Vec::new(),
            mode: ModeSetting::Budget(DEFAULT_BUDGET),
            spread: Spread::Diag,
            estimate: false,
            min_prefix: None,
            tile: DEFAULT_TILE,
            devices: false,
            force: false,
            disable: false,
            log: 0,
            status_path: None,
            synthetic: false,
            attention_free: false,
            measure: false,
            rule: None,
        }
    }
}

impl Config {
    /// The shortest prefix that is sparse on the CPU.
    pub fn min_prefix_cpu(&self) -> usize {
        self.min_prefix.unwrap_or(DEFAULT_MIN_PREFIX)
    }

    /// Reads `GGML_SQUEEZE_*` through `get` (`std::env::var` in production). A value that cannot be used is named in the
    /// returned messages and its default stays: a plugin must not stop its host.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> (Config, Vec<String>) {
        let mut config = Config::default();
        let mut problems = Vec::new();
        let var = |name: &str| get(&format!("GGML_SQUEEZE_{name}")).filter(|v| !v.is_empty());
        if let Some(paths) = var("INDEX") {
            config.index_paths = paths.split(':').filter(|p| !p.is_empty()).map(PathBuf::from).collect();
        }
        config.status_path = var("STATUS").map(PathBuf::from);
        let mut share = |name: &str| -> Option<f32> {
            let text = var(name)?;
            match text.parse::<f32>() {
                Ok(x) if x > 0.0 && x <= 1.0 => Some(x),
                _ => {
                    problems.push(format!("GGML_SQUEEZE_{name}={text} is ignored: give a share above 0 and at most 1"));
                    None
                }
            }
        };
        let (budget, threshold, mass) = (share("BUDGET"), share("THRESHOLD"), share("MASS"));
        let given =
            [budget.map(ModeSetting::Budget), threshold.map(ModeSetting::Threshold), mass.map(ModeSetting::Mass)];
        let given: Vec<ModeSetting> = given.into_iter().flatten().collect();
        if let Some(mode) = given.first() {
            config.mode = *mode;
        }
        if given.len() > 1 {
            problems.push(format!(
                "GGML_SQUEEZE_BUDGET, _THRESHOLD and _MASS exclude each other: {:?} is used",
                config.mode
            ));
        }
        match var("SPREAD").as_deref() {
            None | Some("diag") => {}
            Some("radius") => config.spread = Spread::Radius,
            Some("none") => config.spread = Spread::None,
            Some(other) => {
                problems.push(format!("GGML_SQUEEZE_SPREAD={other} is ignored: give diag, radius or none"));
            }
        }
        if let Some(text) = var("MIN_PREFIX") {
            match text.parse() {
                Ok(n) => config.min_prefix = Some(n),
                Err(_) => problems.push(format!("GGML_SQUEEZE_MIN_PREFIX={text} is ignored: give a number of tokens")),
            }
        }
        if let Some(text) = var("TILE") {
            match text.parse() {
                Ok(n) if n > 0 => config.tile = n,
                _ => problems.push(format!("GGML_SQUEEZE_TILE={text} is ignored: give a number of tokens above 0")),
            }
        }
        if let Some(text) = var("LOG") {
            match text.parse() {
                Ok(n) => config.log = n,
                Err(_) => problems.push(format!("GGML_SQUEEZE_LOG={text} is ignored: give 0, 1 or 2")),
            }
        }
        let mut flag = |name: &str, value: &mut bool| match var(name).as_deref() {
            None => {}
            Some("0") => *value = false,
            Some("1") => *value = true,
            Some(other) => problems.push(format!("GGML_SQUEEZE_{name}={other} is ignored: give 0 or 1")),
        };
        flag("ESTIMATE", &mut config.estimate);
        flag("DEVICES", &mut config.devices);
        flag("FORCE", &mut config.force);
        flag("DISABLE", &mut config.disable);
        flag("SYNTHETIC", &mut config.synthetic);
        (config, problems)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Config, Vec<String>) {
        Config::from_env(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn an_empty_environment_gives_the_defaults() {
        assert_eq!(read(&[]), (Config::default(), Vec::new()));
    }

    #[test]
    fn every_variable_is_read() {
        let (config, problems) = read(&[
            ("GGML_SQUEEZE_INDEX", "a.sqz.gguf:b.sqz.gguf"),
            ("GGML_SQUEEZE_MASS", "0.9"),
            ("GGML_SQUEEZE_SPREAD", "radius"),
            ("GGML_SQUEEZE_ESTIMATE", "1"),
            ("GGML_SQUEEZE_MIN_PREFIX", "0"),
            ("GGML_SQUEEZE_TILE", "16"),
            ("GGML_SQUEEZE_DEVICES", "1"),
            ("GGML_SQUEEZE_FORCE", "1"),
            ("GGML_SQUEEZE_DISABLE", "1"),
            ("GGML_SQUEEZE_SYNTHETIC", "1"),
            ("GGML_SQUEEZE_LOG", "1"),
            ("GGML_SQUEEZE_STATUS", "status.json"),
        ]);
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(config.index_paths, ["a.sqz.gguf", "b.sqz.gguf"].map(PathBuf::from));
        assert_eq!(config.status_path, Some(PathBuf::from("status.json")));
        assert_eq!((config.mode, config.spread), (ModeSetting::Mass(0.9), Spread::Radius));
        assert_eq!((config.min_prefix, config.tile, config.log), (Some(0), 16, 1));
        assert!(config.estimate && config.devices && config.force && config.disable && config.synthetic);
    }

    #[test]
    fn unusable_values_are_named_and_ignored() {
        let names = ["BUDGET", "THRESHOLD", "SPREAD", "MIN_PREFIX", "TILE", "LOG", "FORCE"];
        for name in names {
            let key = format!("GGML_SQUEEZE_{name}");
            let (config, problems) = read(&[(&key, "-7x")]);
            assert_eq!(config, Config::default());
            assert!(problems.len() == 1 && problems[0].contains(&key), "{problems:?}");
        }
        let (config, problems) = read(&[("GGML_SQUEEZE_BUDGET", "0.1"), ("GGML_SQUEEZE_MASS", "0.5")]);
        assert_eq!(config.mode, ModeSetting::Budget(0.1));
        assert_eq!(problems.len(), 1);
    }
}
