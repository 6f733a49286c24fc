//! `sqz build` and `sqz run` on a disk that is full, and killed at any moment: under the final name there is the old file, the
//! whole new one or none, and the next run works.

mod common;

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{model, plugin, program, stderr, text};
use ggml_squeeze::index::Index;

fn build_args(folder: &Path, states: bool) -> Vec<String> {
    let input = folder.join("prefix.txt");
    std::fs::write(&input, text(1500)).unwrap();
    let place = |name: &str| folder.join("out").join(name).to_str().unwrap().to_string();
    std::fs::create_dir_all(folder.join("out")).unwrap();
    let mut args = vec!["build", "-m", model().to_str().unwrap(), "-t", "2", "-f", input.to_str().unwrap()]
        .into_iter()
        .map(String::from)
        .collect::<Vec<_>>();
    args.extend(["-o".to_string(), place("x.sqz.gguf")]);
    if states {
        args.extend(["--slot-file".to_string(), place("x.slot"), "--state-file".to_string(), place("x.state")]);
    }
    args
}

/// Names in a folder, and sizes.
fn files(folder: &Path) -> Vec<(String, u64)> {
    let entry = |e: std::io::Result<std::fs::DirEntry>| {
        let e = e.unwrap();
        (e.file_name().into_string().unwrap(), e.metadata().unwrap().len())
    };
    let mut all: Vec<_> = std::fs::read_dir(folder).unwrap().map(entry).collect();
    all.sort();
    all
}

/// Runs `sqz` in a shell that was told `setting` before.
fn limited(setting: &str, args: &[String]) -> Output {
    let script = format!("{setting} exec \"$@\"");
    let mut command = Command::new("bash");
    command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_sqz")]).args(args);
    command.output().unwrap()
}

#[test]
fn a_full_disk_leaves_no_half_file_and_the_old_one_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let args = build_args(folder.path(), true);
    let out = folder.path().join("out");
    // Files may have so many KiB: the shell's limit gives the same errors as a disk without room, to any user.
    let whole = limited("", &args);
    assert!(whole.status.success(), "{}", stderr(&whole));
    let sizes = files(&out);
    assert_eq!(sizes.len(), 3, "{sizes:?}");
    let kib = |name: &str| sizes.iter().find(|f| f.0 == name).unwrap().1 / 1024;
    let index = std::fs::read(out.join("x.sqz.gguf")).unwrap();

    // Room for the index but not for the states, which are larger; and for nothing.
    for limit in [kib("x.slot") - 1, kib("x.slot") / 2, kib("x.sqz.gguf") / 2, 1] {
        for old in [true, false] {
            std::fs::remove_dir_all(&out).unwrap();
            std::fs::create_dir(&out).unwrap();
            if old {
                for name in ["x.sqz.gguf", "x.slot", "x.state"] {
                    std::fs::write(out.join(name), "old").unwrap();
                }
            }
            let run = limited(&format!("trap '' XFSZ; ulimit -f {limit};"), &args);
            let said = stderr(&run);
            assert!(!run.status.success() && said.contains("cannot write"), "{limit} KiB: {said}");
            for (name, size) in files(&out) {
                let path = out.join(&name);
                match name.as_str() {
                    "x.sqz.gguf" => assert!(size == 3 || std::fs::read(path).unwrap() == index, "{limit} KiB: {size}"),
                    "x.slot" | "x.state" => assert!(size == 3 || size / 1024 == kib(&name), "{limit}: {name}, {size}"),
                    _ => panic!("{limit} KiB: {name} is left behind"),
                }
            }
            assert_eq!(files(&out).iter().filter(|f| f.1 == 3).count() > 0, old, "{limit} KiB: {:?}", files(&out));
        }
    }

    // The index alone, which is too large; then killed in the middle of writing it: SIGXFSZ.
    let args = build_args(folder.path(), false);
    for (setting, killed) in [("trap '' XFSZ;", false), ("", true)] {
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
        let run = limited(&format!("{setting} ulimit -c 0; ulimit -f {};", kib("x.sqz.gguf") / 2), &args);
        let left = files(&out);
        if killed {
            assert_eq!(run.status.signal(), Some(libc::SIGXFSZ), "{}", stderr(&run));
            assert!(left.len() == 1 && left[0].0.ends_with(".tmp"), "{left:?}");
        } else {
            assert!(!run.status.success() && stderr(&run).contains("x.sqz.gguf"), "{}", stderr(&run));
            assert!(left.is_empty(), "{left:?}");
        }
    }
    let again = limited("", &args);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(std::fs::read(out.join("x.sqz.gguf")).unwrap() == index);
}

/// A disk of its own that is really full, where this user may make one.
#[test]
fn a_real_disk_without_room_is_named_and_left_empty() {
    let folder = tempfile::tempdir().unwrap();
    let args = build_args(folder.path(), false);
    let out = folder.path().join("out");
    let mount = format!("mount -t tmpfs -o size=128k none {}", out.display());
    let own = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "bash", "-c", script, "bash", env!("CARGO_BIN_EXE_sqz")]);
        command.args(&args).output()
    };
    if !own(&mount).is_ok_and(|run| run.status.success()) {
        println!("skipped: this user cannot mount a small disk");
        return;
    }
    let run = own(&format!("{mount} && {{ \"$@\"; echo $?; ls -A {}; }}", out.display())).unwrap();
    let said = stderr(&run);
    assert_eq!(String::from_utf8_lossy(&run.stdout), "1\n", "{said}");
    assert!(said.contains("No space left on device") && said.contains("x.sqz.gguf"), "{said}");
}

/// How many runs are killed; all stages are met more than once with SQZ_THOROUGH.
fn kills() -> u32 {
    if std::env::var_os("SQZ_THOROUGH").is_some() {
        40
    } else {
        5
    }
}

/// Runs a program and kills it after `share` of `duration`, the time that such a run took last. One that ends sooner tells a better
/// duration, and is started again behind `prepare`. False if ten runs in a row were too fast.
fn killed_at(share: f64, duration: &mut Duration, prepare: &dyn Fn(), command: &dyn Fn() -> Command) -> bool {
    for _ in 0..10 {
        prepare();
        let begin = Instant::now();
        let mut command = command();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let moment = duration.mul_f64(share);
        let ended = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if begin.elapsed() >= moment => break None,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        if ended.is_none() {
            child.kill().unwrap();
            if child.wait().unwrap().signal() == Some(libc::SIGKILL) {
                return true;
            }
        }
        *duration = begin.elapsed().min(duration.mul_f64(0.9));
    }
    false
}

#[test]
fn a_build_killed_at_any_moment_leaves_a_whole_file_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let args = build_args(folder.path(), true);
    let out = folder.path().join("out");
    let sqz = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sqz"));
        command.args(&args);
        command
    };
    let begin = Instant::now();
    assert!(sqz().stderr(Stdio::null()).status().unwrap().success());
    let (mut duration, whole) = (begin.elapsed(), files(&out));
    let bytes = std::fs::read(out.join("x.sqz.gguf")).unwrap();
    let n = kills();
    let empty = || {
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
    };
    for i in 0..n {
        let share = (f64::from(i) + 0.5) / f64::from(n);
        assert!(killed_at(share, &mut duration, &empty, &sqz), "no build was still running at {share} of its time");
        for (name, size) in files(&out) {
            let of_whole = whole.iter().find(|f| f.0 == name);
            assert!(of_whole.is_some_and(|f| f.1 == size) || name.ends_with(".tmp"), "{name} has {size} bytes");
        }
        if let Ok(found) = std::fs::read(out.join("x.sqz.gguf")) {
            assert!(found == bytes);
        }
    }
    // The same folder, as the last kill left it.
    assert!(sqz().stderr(Stdio::null()).status().unwrap().success());
    assert!(std::fs::read(out.join("x.sqz.gguf")).unwrap() == bytes);
}

#[test]
fn a_run_killed_at_any_moment_is_started_again_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("prefix.txt");
    std::fs::write(&prefix, text(1500)).unwrap();
    let prompt = folder.path().join("prompt.txt");
    std::fs::write(&prompt, text(1500) + "\nIn short,").unwrap();
    let run = |cache: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sqz"));
        command.args(["run", "-m", model().to_str().unwrap(), "-f", prefix.to_str().unwrap()]);
        command.args(["--cache-dir", cache.to_str().unwrap(), "--plugin", &plugin(), "--"]);
        command.arg(program("llama-completion")).args(["-f", prompt.to_str().unwrap(), "-n", "12", "--temp", "0"]);
        command.args(["-no-cnv", "--no-display-prompt", "-t", "2"]);
        command.env("GGML_SQUEEZE_MIN_PREFIX", "0");
        command
    };
    let cache = |name: &str| -> PathBuf { folder.path().join(name) };
    let begin = Instant::now();
    let first = run(&cache("whole")).output().unwrap();
    // Of a run that builds, and of one that finds an index.
    let mut durations = [begin.elapsed(); 2];
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(first.stdout.len() > 10);

    let (n, killed) = (kills(), cache("killed"));
    for i in 0..n {
        let goes_on = i as usize % 2;
        let prepare = || {
            if goes_on == 0 {
                let _ = std::fs::remove_dir_all(&killed);
            }
        };
        let share = (f64::from(i) + 0.5) / f64::from(n);
        let hit = killed_at(share, &mut durations[goes_on], &prepare, &|| run(&killed));
        assert!(hit, "no run was still running at {share} of its time");
        for entry in std::fs::read_dir(&killed).into_iter().flatten().flatten() {
            // An entry that has its name is whole.
            let index = entry.path().join("prefix.sqz.gguf");
            assert!(!index.exists() || Index::open(&index).is_ok(), "{}", index.display());
        }
    }
    let last = run(&killed).output().unwrap();
    assert!(last.status.success(), "{}", stderr(&last));
    assert_eq!(last.stdout, first.stdout);
    assert!(files(&killed.join("tmp")).is_empty(), "scratch folders of killed runs are swept");
}
