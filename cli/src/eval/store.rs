//! Results as they come, one JSON object per line, so that an interrupted run goes on where it was.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::rules::Sums;

/// Version of what is stored: results of another one are measured again.
const VERSION: u32 = 1;

/// A key of everything that a result depends on.
pub fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    hash.update(VERSION.to_le_bytes());
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
}

/// What dense attention answers, in f32 on the plugin's kernels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reference {
    /// Its greedy answer, which all variants are fed; empty where the text itself is.
    pub tokens: Vec<i32>,
    pub answer: String,
    /// Loss of each token of what is right, in nats, behind the prefix and behind the question alone.
    pub losses: Vec<f64>,
    pub short_losses: Vec<f64>,
    pub score: Option<f64>,
}

/// One layer's part of what was read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerSums {
    pub layer: u32,
    #[serde(flatten)]
    pub sums: Sums,
}

/// A variant's result on one question.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// KL(dense || variant) of each answer token, nats.
    pub kl: Vec<f64>,
    /// Answer tokens whose most likely token is the dense one.
    pub same: usize,
    /// Loss of each token of what is right, nats.
    pub losses: Vec<f64>,
    pub score: Option<f64>,
    pub answer: String,
    /// Means over rows, layers and KV heads; `n` pairs.
    pub read: Sums,
    pub layers: Vec<LayerSums>,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Reference { key: String, result: Reference },
    Outcome { key: String, result: Outcome },
    Setting { key: String, result: f64 },
}

/// The results of earlier runs, and the file that new ones go to.
#[derive(Default)]
pub struct Store {
    file: Option<(PathBuf, File)>,
    references: HashMap<String, Reference>,
    outcomes: HashMap<String, Outcome>,
    settings: HashMap<String, f64>,
}

impl Store {
    /// Reads what is there; without a path results are kept in memory alone. A line that was cut off by an interruption is removed.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: Option<&Path>, fresh: bool) -> Result<Store> {
        let mut store = Store::default();
        let Some(path) = path else { return Ok(store) };
        let context = || format!("cannot use {} for results", path.display());
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(fresh).open(path).with_context(context)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(context)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        for line in bytes[..whole].split(|b| *b == b'\n') {
            // A line of another version is no result of this one.
            match serde_json::from_slice(line) {
                Ok(Line::Reference { key, result }) => drop(store.references.insert(key, result)),
                Ok(Line::Outcome { key, result }) => drop(store.outcomes.insert(key, result)),
                Ok(Line::Setting { key, result }) => drop(store.settings.insert(key, result)),
                Err(_) => {}
            }
        }
        file.set_len(whole as u64).with_context(context)?;
        file.seek(SeekFrom::End(0)).with_context(context)?;
        store.file = Some((path.to_path_buf(), file));
        Ok(store)
    }

    fn write(&mut self, line: &Line) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let text = serde_json::to_string(line)? + "\n";
            file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    pub fn reference(&self, key: &str) -> Option<&Reference> {
        self.references.get(key)
    }

    pub fn outcome(&self, key: &str) -> Option<&Outcome> {
        self.outcomes.get(key)
    }

    /// A calibrated mode's setting.
    pub fn setting(&self, key: &str) -> Option<f64> {
        self.settings.get(key).copied()
    }

    pub fn add_setting(&mut self, key: &str, result: f64) -> Result<()> {
        self.write(&Line::Setting { key: key.to_string(), result })?;
        self.settings.insert(key.to_string(), result);
        Ok(())
    }

    pub fn add_reference(&mut self, key: &str, result: Reference) -> Result<()> {
        self.write(&Line::Reference { key: key.to_string(), result: result.clone() })?;
        self.references.insert(key.to_string(), result);
        Ok(())
    }

    pub fn add_outcome(&mut self, key: &str, result: Outcome) -> Result<()> {
        self.write(&Line::Outcome { key: key.to_string(), result: result.clone() })?;
        self.outcomes.insert(key.to_string(), result);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_there_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.jsonl");
        let outcome =
            Outcome { kl: vec![0.1, 1e-300], score: Some(0.5), answer: "a\n\"b".into(), ..Outcome::default() };
        let reference = Reference { tokens: vec![1, 2], losses: vec![0.25], ..Reference::default() };
        {
            let mut store = Store::open(Some(&path), false).unwrap();
            store.add_reference("q", reference.clone()).unwrap();
            store.add_outcome("a", outcome.clone()).unwrap();
            store.add_setting("s", -3.25).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"outcome\":{\"key\":\"b\",\"res"].concat()).unwrap();
        let mut store = Store::open(Some(&path), false).unwrap();
        assert_eq!((store.reference("q"), store.outcome("a")), (Some(&reference), Some(&outcome)));
        assert_eq!((store.outcome("b"), store.setting("s")), (None, Some(-3.25)));
        store.add_outcome("b", outcome.clone()).unwrap();
        let store = Store::open(Some(&path), false).unwrap();
        assert_eq!(store.outcome("b"), Some(&outcome));
        assert_eq!(std::fs::read(&path).unwrap()[..whole.len()], whole);
        assert_eq!(Store::open(Some(&path), true).unwrap().outcome("b"), None);
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["ab", ""]), key(&["a", "b"]));
        assert_eq!(key(&[]).len(), 32);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let error = Store::open(Some(Path::new("/none/r.jsonl")), false).err().unwrap();
        assert!(format!("{error:#}").contains("/none/r.jsonl"));
    }
}
