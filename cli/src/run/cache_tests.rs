use super::*;
use ggml_squeeze::index::sample::sample_parts;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Writes a small index and states of a few bytes; counts.
#[derive(Default)]
struct Fake {
    builds: usize,
    converts: usize,
    fail: bool,
}

impl Maker for Fake {
    fn build(&mut self, index: &Path, state: Option<(State, &Path)>) -> Result<()> {
        self.builds += 1;
        if let Some((_, path)) = state {
            std::fs::write(path, "state")?;
        }
        ensure!(!self.fail, "refused");
        ggml_squeeze::index::write(index, &sample_parts(1, 200, 2, 3, 64, 64, 4))?;
        Ok(())
    }

    fn convert(&mut self, _: usize, from: &Path, _: State, path: &Path) -> Result<()> {
        self.converts += 1;
        std::fs::copy(from, path)?;
        Ok(())
    }
}

fn about() -> Manifest {
    Manifest { model: "m".into(), text: "t".into(), chat: "raw".into(), ..Manifest::default() }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_entry_is_built_once_and_states_are_added() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path().join("c")).unwrap();
    let mut fake = Fake::default();
    let entry = cache.entry("a", about(), Some(State::Slot), &mut fake).unwrap();
    assert!(entry.built && entry.n_prefix == 200 && entry.index_path.is_file());
    let entry = cache.entry("a", about(), Some(State::Slot), &mut fake).unwrap();
    assert!(!entry.built);
    assert_eq!((fake.builds, fake.converts), (1, 0));
    cache.entry("a", about(), Some(State::PromptCache), &mut fake).unwrap();
    assert_eq!((fake.builds, fake.converts), (1, 1));
    assert!(State::PromptCache.path(&entry.folder).is_file());
    cache.entry("a", about(), None, &mut fake).unwrap();
    assert_eq!((fake.builds, fake.converts), (1, 1));
    // an index without any state
    cache.entry("b", about(), None, &mut fake).unwrap();
    cache.entry("b", about(), Some(State::Slot), &mut fake).unwrap();
    assert_eq!((fake.builds, fake.converts), (3, 1));
    assert!(names(&folder.path().join("c/tmp")).is_empty());
}

#[test]
fn what_is_damaged_is_built_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path().to_path_buf()).unwrap();
    let mut fake = Fake::default();
    for (n, damage) in ["index", "state", "manifest", "no manifest"].into_iter().enumerate() {
        let entry = cache.entry("a", about(), Some(State::Slot), &mut fake).unwrap();
        assert_eq!(fake.builds, n + 1, "before {damage}");
        let manifest = entry.folder.join(MANIFEST);
        match damage {
            "index" => {
                let mut bytes = std::fs::read(&entry.index_path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                std::fs::write(&entry.index_path, bytes).unwrap();
            }
            "state" => std::fs::write(State::Slot.path(&entry.folder), "sta").unwrap(),
            "manifest" => std::fs::write(&manifest, "{").unwrap(),
            _ => std::fs::remove_file(&manifest).unwrap(),
        }
        assert!(cache.entry("a", about(), Some(State::Slot), &mut fake).unwrap().built, "{damage}");
    }
    assert!(names(&folder.path().join("tmp")).is_empty());
}

#[test]
fn a_failed_build_leaves_nothing_and_dead_scratch_is_swept() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path().to_path_buf()).unwrap();
    let mut fake = Fake { fail: true, ..Fake::default() };
    assert!(cache.entry("a", about(), Some(State::Slot), &mut fake).is_err());
    assert_eq!(names(folder.path()), ["a.lock", "tmp", "tmp.lock"]);
    assert!(names(&folder.path().join("tmp")).is_empty());

    let alive = cache.scratch().unwrap();
    let dead = folder.path().join("tmp/1-0/entry");
    std::fs::create_dir_all(&dead).unwrap();
    std::fs::write(folder.path().join("tmp/1-0/lock"), "").unwrap();
    Cache::open(folder.path().to_path_buf()).unwrap();
    assert!(!dead.exists() && alive.path().is_dir());
    drop(alive);
    assert!(names(&folder.path().join("tmp")).is_empty());
}

#[test]
fn many_at_once_build_once() {
    let folder = tempfile::tempdir().unwrap();
    let builds = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = Cache::open(folder.path().to_path_buf()).unwrap();
                let mut fake = Fake::default();
                cache.entry("a", about(), Some(State::Slot), &mut fake).unwrap();
                builds.fetch_add(fake.builds, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(builds.into_inner(), 1);
}

#[test]
fn keys_tell_every_part_apart() {
    let key = |parts: &[(&str, &str)]| {
        let mut key = Key::new();
        parts.iter().for_each(|(what, value)| key.add(what, value));
        key.name()
    };
    let base = key(&[("text", "ab"), ("chat", "raw")]);
    assert_eq!(base, key(&[("text", "ab"), ("chat", "raw")]));
    assert_eq!(base.len(), 32);
    for other in
        [&[("text", "abc"), ("chat", "raw")], &[("text", "ab"), ("chat", "user")], &[("text", "a"), ("bchat", "raw")]]
    {
        assert_ne!(base, key(other));
    }
}

#[test]
fn the_folder_is_named_by_the_environment() {
    let env = |pairs: &'static [(&str, &str)]| {
        default_folder(move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
    };
    let all = &[("SQZ_CACHE", "/s"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
    assert_eq!(env(all).unwrap(), PathBuf::from("/s"));
    assert_eq!(env(&[("SQZ_CACHE", ""), ("XDG_CACHE_HOME", "/x")]).unwrap(), PathBuf::from("/x/ggml-squeeze"));
    assert_eq!(env(&[("HOME", "/h")]).unwrap(), PathBuf::from("/h/.cache/ggml-squeeze"));
    assert!(env(&[]).is_err());
}
