//! The cache folder: one entry for each prefix of each model, made once. An entry is built in a scratch folder and renamed
//! when it is whole, under a lock that the system drops with its process: two runs build once, and a killed run leaves
//! nothing but a scratch folder that the next one sweeps away.
//!
//! ```text
//! CACHE/<key>/        index, states, entry.json
//! CACHE/<key>.lock    held while the entry is checked, built or changed
//! CACHE/tmp/          scratch folders, each with a lock of its owner
//! ```

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context as _, Result};
use ggml_squeeze::build::BUILD_VERSION;
use ggml_squeeze::index::{Index, FORMAT_VERSION};
use rustix::fs::{flock, FlockOperation};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const INDEX: &str = "prefix.sqz.gguf";
const MANIFEST: &str = "entry.json";
/// In a folder of its own, which a server may be given to save slots in.
const SLOT: &str = "slots/prefix.slot";
const PROMPT_CACHE: &str = "prompt-cache.state";

/// Everything that an entry depends on, in a fixed order.
pub struct Key(Sha256);

impl Key {
    pub fn new() -> Key {
        let mut key = Key(Sha256::new());
        key.add("format", FORMAT_VERSION.to_le_bytes());
        key.add("sqz", env!("CARGO_PKG_VERSION"));
        key.add("builder", BUILD_VERSION.to_le_bytes());
        key
    }

    pub fn add(&mut self, what: &str, value: impl AsRef<[u8]>) {
        for part in [what.as_bytes(), value.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
    }

    /// Name of the entry.
    pub fn name(self) -> String {
        self.0.finalize()[..16].iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl Default for Key {
    fn default() -> Key {
        Key::new()
    }
}

/// A state file that a program restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// llama-server's.
    Slot,
    /// llama-completion's.
    PromptCache,
}

impl State {
    /// Its place in an entry.
    pub fn path(self, folder: &Path) -> PathBuf {
        folder.join(match self {
            State::Slot => SLOT,
            State::PromptCache => PROMPT_CACHE,
        })
    }

    fn other(self) -> State {
        match self {
            State::Slot => State::PromptCache,
            State::PromptCache => State::Slot,
        }
    }
}

/// What an entry is of, for people, and the sizes of its states.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub model: String,
    pub text: String,
    pub chat: String,
    pub slot_bytes: Option<u64>,
    pub prompt_cache_bytes: Option<u64>,
}

impl Manifest {
    fn size(&mut self, state: State) -> &mut Option<u64> {
        match state {
            State::Slot => &mut self.slot_bytes,
            State::PromptCache => &mut self.prompt_cache_bytes,
        }
    }
}

/// A whole entry.
pub struct Entry {
    pub folder: PathBuf,
    pub index_path: PathBuf,
    pub n_prefix: usize,
    pub n_layer: usize,
    /// False where it was there already.
    pub built: bool,
}

/// How an entry comes to be. Paths are in a scratch folder.
pub trait Maker {
    /// Writes the index and, if wanted, one state.
    fn build(&mut self, index: &Path, state: Option<(State, &Path)>) -> Result<()>;
    /// Writes a state of `n_prefix` tokens out of the other kind of state.
    fn convert(&mut self, n_prefix: usize, from: &Path, to: State, path: &Path) -> Result<()>;
}

/// The folder.
pub struct Cache {
    root: PathBuf,
}

/// The folder that is used where none is named: `$SQZ_CACHE`, `$XDG_CACHE_HOME/ggml-squeeze` or `~/.cache/ggml-squeeze`.
///
/// # Errors
/// There is no home.
pub fn default_folder(env: impl Fn(&str) -> Option<std::ffi::OsString>) -> Result<PathBuf> {
    let var = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("SQZ_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("ggml-squeeze")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/ggml-squeeze")))
        .context("there is no home folder to keep a cache in: name one with --cache-dir")
}

/// A folder of one run, removed with it. Its lock tells other runs that it is in use.
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // what cannot be removed now is swept by a later run
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn open_lock(path: &Path) -> Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock {}", path.display()))
}

/// Takes the lock, waiting for another holder; `waits` is called before the wait.
fn lock(path: &Path, waits: impl FnOnce()) -> Result<File> {
    let file = open_lock(path)?;
    if try_lock(&file) {
        return Ok(file);
    }
    waits();
    loop {
        match flock(file.as_fd(), FlockOperation::LockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }
}

fn try_lock(file: &File) -> bool {
    flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive).is_ok()
}

impl Cache {
    /// Makes the folder if it is missing, and sweeps what killed runs have left.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn open(root: PathBuf) -> Result<Cache> {
        let tmp = root.join("tmp");
        std::fs::create_dir_all(&tmp).with_context(|| {
            format!("cannot make the cache folder {}: name another with --cache-dir", root.display())
        })?;
        let root = root.canonicalize().with_context(|| format!("cannot find the cache folder {}", root.display()))?;
        ensure!(
            !root.as_os_str().as_encoded_bytes().contains(&b':'),
            "the cache folder {} has a colon in its name, which separates index files: name another with --cache-dir",
            root.display()
        );
        let cache = Cache { root };
        cache.sweep()?;
        Ok(cache)
    }

    fn tmp_lock(&self) -> Result<File> {
        lock(&self.root.join("tmp.lock"), || ())
    }

    fn sweep(&self) -> Result<()> {
        let _guard = self.tmp_lock()?;
        let tmp = self.root.join("tmp");
        let folders = std::fs::read_dir(&tmp).with_context(|| format!("cannot list {}", tmp.display()))?;
        for folder in folders.flatten() {
            let dead = File::open(folder.path().join("lock")).map_or(true, |f| try_lock(&f));
            if dead {
                // another user's, perhaps: no reason to stop
                let _ = std::fs::remove_dir_all(folder.path());
            }
        }
        Ok(())
    }

    /// A scratch folder of this run.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn scratch(&self) -> Result<Scratch> {
        let _guard = self.tmp_lock()?;
        let tmp = self.root.join("tmp");
        let name = |i: u32| tmp.join(format!("{}-{i}", std::process::id()));
        // a number can be taken: processes of several containers share numbers
        let path = (0..).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(u32::MAX));
        let made = || -> Result<File> {
            std::fs::create_dir(&path)?;
            let lock = open_lock(&path.join("lock"))?;
            ensure!(try_lock(&lock), "it is locked by another process");
            Ok(lock)
        };
        let lock = made().with_context(|| format!("cannot make the folder {}", path.display()))?;
        Ok(Scratch { path, _lock: lock })
    }

    /// The entry of this name, checked; built, or given the state that it lacks, where needed.
    ///
    /// # Errors
    /// `maker` fails, or the folder cannot be written.
    pub fn entry(&self, name: &str, about: Manifest, state: Option<State>, maker: &mut dyn Maker) -> Result<Entry> {
        let _guard = lock(&self.root.join(format!("{name}.lock")), || {
            eprintln!("another sqz run is building this index: waiting for it");
        })?;
        let folder = self.root.join(name);
        let mut built = false;
        let (index, manifest) = match self.check(&folder) {
            Ok(found) => found,
            Err(why) => {
                if folder.exists() {
                    eprintln!("the cached index {} cannot be used and is built again: {why:#}", folder.display());
                }
                built = true;
                self.build(&folder, about, state, maker)?;
                self.check(&folder).context("the index that was just built cannot be used")?
            }
        };
        if let Some(state) = state {
            self.provide(&folder, (&index, manifest), state, maker)?;
        }
        Ok(Entry {
            index_path: folder.join(INDEX),
            n_prefix: index.meta().n_prefix(),
            n_layer: index.shapes().len(),
            folder,
            built,
        })
    }

    fn check(&self, folder: &Path) -> Result<(Index, Manifest)> {
        let manifest = std::fs::read(folder.join(MANIFEST)).context("its description is missing")?;
        let mut manifest: Manifest = serde_json::from_slice(&manifest).context("its description is damaged")?;
        let index = Index::open(&folder.join(INDEX))?;
        for state in [State::Slot, State::PromptCache] {
            if let Some(expected) = *manifest.size(state) {
                let path = state.path(folder);
                let found = std::fs::metadata(&path).map_or(0, |m| m.len());
                ensure!(found == expected, "{} has {found} bytes instead of {expected}", path.display());
            }
        }
        Ok((index, manifest))
    }

    fn build(&self, folder: &Path, mut about: Manifest, state: Option<State>, maker: &mut dyn Maker) -> Result<()> {
        let scratch = self.scratch()?;
        let new = scratch.path().join("entry");
        std::fs::create_dir_all(new.join("slots")).with_context(|| format!("cannot make {}", new.display()))?;
        let state_path = state.map(|s| (s, s.path(&new)));
        maker.build(&new.join(INDEX), state_path.as_ref().map(|(s, p)| (*s, p.as_path())))?;
        if let Some((state, path)) = &state_path {
            *about.size(*state) = Some(durable(path)?);
        }
        durable(&new.join(INDEX))?;
        write_manifest(&new, &about)?;
        if folder.exists() {
            std::fs::rename(folder, scratch.path().join("old"))
                .with_context(|| format!("cannot move {} away", folder.display()))?;
        }
        std::fs::rename(&new, folder).with_context(|| format!("cannot move the new index to {}", folder.display()))
    }

    /// Makes a state that the entry lacks out of the other, or else all of it again.
    fn provide(
        &self,
        folder: &Path,
        (index, mut manifest): (&Index, Manifest),
        state: State,
        maker: &mut dyn Maker,
    ) -> Result<()> {
        if manifest.size(state).is_some() {
            return Ok(());
        }
        if manifest.size(state.other()).is_none() {
            let about = Manifest { slot_bytes: None, prompt_cache_bytes: None, ..manifest };
            return self.build(folder, about, Some(state), maker);
        }
        let scratch = self.scratch()?;
        let made = scratch.path().join("state");
        maker.convert(index.meta().n_prefix(), &state.other().path(folder), state, &made)?;
        *manifest.size(state) = Some(durable(&made)?);
        let place = state.path(folder);
        std::fs::rename(&made, &place).with_context(|| format!("cannot move the new state to {}", place.display()))?;
        let description = scratch.path().join("description");
        std::fs::create_dir(&description).with_context(|| format!("cannot make {}", description.display()))?;
        write_manifest(&description, &manifest)?;
        std::fs::rename(description.join(MANIFEST), folder.join(MANIFEST))
            .with_context(|| format!("cannot replace the description in {}", folder.display()))
    }
}

/// Bytes of a file, all of them on the disk.
fn durable(path: &Path) -> Result<u64> {
    let sync = || -> std::io::Result<u64> {
        let file = File::open(path)?;
        file.sync_all()?;
        Ok(file.metadata()?.len())
    };
    sync().with_context(|| format!("cannot finish {}", path.display()))
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> Result<()> {
    let path = folder.join(MANIFEST);
    let text = serde_json::to_string_pretty(manifest)?;
    std::fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    durable(&path).map(|_| ())
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
