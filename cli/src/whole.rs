//! Files that others write for us (llama.cpp's states) get their name only when they are whole and on the disk.

#![forbid(unsafe_code)]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{ensure, Context as _, Result};

/// Has `write` make a file beside `path`, and puts it in its place. `write` says how many bytes it has written at least. After an
/// error, or if this process is killed, what had the name before has it still. A device or a pipe is written to as it is.
///
/// # Errors
/// Those of `write`; the folder cannot be written; the disk is full.
pub fn write_whole(path: &Path, write: impl FnOnce(&Path) -> Result<u64>) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return write(path).map(drop);
    }
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = || format!("cannot write {}", path.display());
    let mut named = tempfile::Builder::new();
    // As any new file: what the umask leaves of it.
    named.prefix(".sqz-").suffix(".tmp").permissions(Permissions::from_mode(0o666));
    let file = named.tempfile_in(folder).with_context(cannot)?;
    let written = write(file.path())?;
    let size = file.as_file().metadata().with_context(cannot)?.len();
    // llama.cpp does not look whether the end of a file went to the disk.
    ensure!(size >= written, "{}: {size} of {written} bytes are there: is the disk full?", cannot());
    file.as_file().sync_all().with_context(cannot)?;
    file.persist(path).map_err(|error| error.error).with_context(cannot)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_file_stays_until_the_new_one_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let names = || std::fs::read_dir(folder.path()).unwrap().count();
        let put = |text: &'static str, n: u64| {
            write_whole(&path, |to| {
                std::fs::write(to, text)?;
                Ok(n)
            })
        };
        put("old", 3).unwrap();
        let why = format!("{:#}", put("new", 4).unwrap_err());
        assert!(why.contains("3 of 4 bytes") && why.contains("state"), "{why}");
        write_whole(&path, |_| anyhow::bail!("refused")).unwrap_err();
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), names()), ("old", 1));
        put("new", 3).unwrap();
        assert_eq!((std::fs::read_to_string(&path).unwrap().as_str(), names()), ("new", 1));
        assert!(write_whole(&folder.path().join("none/x"), |_| Ok(0)).is_err());
        write_whole(Path::new("/dev/null"), |to| {
            std::fs::write(to, "x")?;
            Ok(1)
        })
        .unwrap();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    }
}
