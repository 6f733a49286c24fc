//! `sqz run` with the unmodified llama-completion and llama-server: what is cached and when it is not, what passes through to
//! and from the program, and that its answers are sparse without a second prefill.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{model, own_lines, plugin, program, stderr, text};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};

/// A cache, and a text of about 200 tokens.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("text.txt"), text(900)).unwrap();
        Place { folder }
    }

    fn text(&self) -> PathBuf {
        self.folder.path().join("text.txt")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// Names of the entries in the cache.
    fn entries(&self) -> Vec<PathBuf> {
        let all = std::fs::read_dir(self.cache()).unwrap().map(|e| e.unwrap().path());
        all.filter(|p| p.is_dir() && !p.ends_with("tmp")).collect()
    }

    fn scratch(&self) -> usize {
        std::fs::read_dir(self.cache().join("tmp")).unwrap().count()
    }

    fn command(&self, options: &[&str], program: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sqz"));
        command.arg("run").arg("-m").arg(model()).arg("-f").arg(self.text());
        command.arg("--cache-dir").arg(self.cache());
        if !options.contains(&"--plugin") {
            command.arg("--plugin").arg(plugin());
        }
        command.args(options).arg("--").args(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("GGML_") || name.to_string_lossy().starts_with("LLAMA_") {
                command.env_remove(name);
            }
        }
        command.env("GGML_SQUEEZE_MIN_PREFIX", "0");
        command
    }

    fn run(&self, options: &[&str], program: &[&str]) -> Output {
        self.command(options, program).output().unwrap()
    }

    /// llama-completion's answer to a question on the text.
    fn complete(&self, more: &[&str]) -> Output {
        let completion = program("llama-completion");
        let mut args = vec![completion.to_str().unwrap(), "-p", " The reason is", "-n", "8", "--temp", "0", "-t", "2"];
        args.push("--no-display-prompt");
        args.extend(more);
        self.run(&["--status", "600"], &args)
    }

    fn spawn(&self, options: &[&str], program: &[&str]) -> Running {
        let mut child = self.command(options, program).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let copy = said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut text = copy.lock().unwrap();
                text.push_str(&line);
                text.push('\n');
            }
        });
        Running { child, said }
    }
}

/// A `sqz run` that goes on, and what it and its program have said.
struct Running {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Running {
    fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    fn wait_for(&self, words: &str) {
        let start = Instant::now();
        while !self.said().contains(words) {
            assert!(start.elapsed() < Duration::from_secs(300), "'{words}' never came: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sparse nodes of the last status line.
fn sparse(said: &str) -> u64 {
    let status = own_lines(said).rfind(|l| l.starts_with("squeeze: bound"));
    let line = status.unwrap_or_else(|| panic!("no status in {said}"));
    let at = line.find("sparse ").unwrap() + 7;
    line[at..].split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_text_is_indexed_once_and_again_when_something_changes() {
    let place = Place::new();
    let cold = place.complete(&[]);
    let said = stderr(&cold);
    assert!(cold.status.success() && said.contains("indexing") && said.contains("session file matches"), "{said}");
    assert!(sparse(&said) > 30, "{said}");
    let warm = place.complete(&[]);
    let said = stderr(&warm);
    assert!(warm.status.success() && !said.contains("indexing") && said.contains("using the index"), "{said}");
    assert!(said.contains("session file matches") && sparse(&said) > 30, "{said}");
    assert!(!warm.stdout.is_empty() && warm.stdout == cold.stdout, "another answer from the cache");
    assert_eq!((place.entries().len(), place.scratch()), (1, 0));

    // a cached file that is damaged
    let index = place.entries()[0].join("prefix.sqz.gguf");
    let good = std::fs::read(&index).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    std::fs::write(&index, &bad).unwrap();
    let said = stderr(&place.run(&[], &["true"]));
    assert!(said.contains("built again") && said.contains("checksum"), "{said}");
    assert!(std::fs::read(&index).unwrap() == good, "the new index differs from the first one");

    // everything that shapes an index makes another entry; what does not, none
    let count = |options: &[&str], program: &[&str]| {
        let run = place.run(options, program);
        assert!(run.status.success(), "{}", stderr(&run));
        place.entries().len()
    };
    // a program that takes llama.cpp's options and does nothing
    let idle = place.folder.path().join("llama-idle");
    std::os::unix::fs::symlink("/bin/true", &idle).unwrap();
    let idle = idle.to_str().unwrap();
    assert_eq!(count(&["--budget", "0.5"], &[idle, "-t", "1"]), 1);
    assert_eq!(count(&["--seed", "1"], &["true"]), 2);
    assert_eq!(count(&["--chat", "system"], &["true"]), 3);
    assert_eq!(count(&[], &[idle, "--rope-freq-base", "20000"]), 4);
    assert_eq!(count(&[], &[idle, "-ctk", "f16"]), 4);
    assert_eq!(count(&[], &[idle, "-ctk", "bf16"]), 5);
    std::fs::write(place.text(), text(901)).unwrap();
    assert_eq!(count(&[], &["true"]), 6);
}

#[test]
fn mistakes_are_named_before_anything_is_built() {
    let place = Place::new();
    let other = place.text();
    let completion = program("llama-completion");
    let (completion, other) = (completion.to_str().unwrap(), other.to_str().unwrap());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let cases: [(&[&str], &[&str], &str); 9] = [
        (&[], &[completion, "-m", other], "leave out the one after --"),
        (&[], &[completion, "-fa", "off"], "-fa off"),
        (&["--plugin", "none.so"], &["true"], "none.so"),
        (&["--budget", "2"], &["true"], "share"),
        (&[], &["llama-server", "--port", &port], "in use"),
        (&[], &["llama-server", "--port", "0"], "--port 0"),
        (&["--chat", "raw"], &["llama-cli", "-p", "x"], "--chat raw does not fit"),
        (&["--chat", "user"], &["llama-cli"], "-p or -f"),
        (&[], &["llama-cli", "--server-base", "http://127.0.0.1:1"], "--server-base"),
    ];
    for (options, program, words) in cases {
        let run = place.run(options, program);
        assert!(!run.status.success() && stderr(&run).contains(words), "{words}: {}", stderr(&run));
    }
    assert!(!place.cache().exists());
}

#[test]
fn signals_and_exit_codes_pass_through() {
    let place = Place::new();
    assert_eq!(place.run(&[], &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(place.run(&[], &["sh", "-c", "kill -KILL $$"]).status.code(), Some(137));
    let missing = place.run(&[], &["no-such-program"]);
    assert!(stderr(&missing).contains("cannot start no-such-program"), "{}", stderr(&missing));

    let trap =
        "trap 'exit 9' TERM; trap 'exit 10' INT; trap 'exit 11' HUP; echo ready >&2; while :; do sleep 0.05; done";
    for (signal, code) in [(Signal::TERM, 9), (Signal::INT, 10), (Signal::HUP, 11)] {
        let mut run = place.spawn(&[], &["sh", "-c", trap]);
        run.wait_for("ready");
        run.signal(Signal::USR1);
        run.wait_for("squeeze: no graph");
        run.signal(signal);
        assert_eq!(run.end().code(), Some(code), "{}", run.said());
    }
    assert_eq!(place.scratch(), 0);

    // sqz itself is killed: the program is told to end
    let note = place.folder.path().join("note");
    let script =
        format!("trap 'echo ended > {}; exit' TERM; echo ready >&2; while :; do sleep 0.05; done", note.display());
    let mut run = place.spawn(&[], &["sh", "-c", &script]);
    run.wait_for("ready");
    run.signal(Signal::KILL);
    assert_eq!(run.end().signal(), Some(9));
    let start = Instant::now();
    while !note.exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "the program went on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn two_runs_build_once_and_a_killed_one_leaves_nothing() {
    let place = Place::new();
    let mut killed = place.spawn(&[], &["true"]);
    killed.wait_for("indexing");
    killed.signal(Signal::KILL);
    killed.end();
    assert_eq!((place.entries().len(), place.scratch()), (0, 1), "{}", killed.said());

    let mut both = [place.spawn(&[], &["true"]), place.spawn(&[], &["true"])];
    let codes = both.each_mut().map(|run| run.end().code());
    assert_eq!(codes, [Some(0), Some(0)], "{}\n{}", both[0].said(), both[1].said());
    for run in &both {
        let start = Instant::now();
        while !(run.said().contains("using the index") || run.said().contains("indexed ")) {
            assert!(start.elapsed() < Duration::from_secs(10), "{}", run.said());
        }
    }
    let built = both.iter().filter(|run| run.said().contains("indexing")).count();
    assert_eq!((built, place.entries().len(), place.scratch()), (1, 1, 0));
}

fn request(port: u16, path: &str, body: &Value) -> Value {
    let body = body.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head =
        format!("POST {path} HTTP/1.0\r\nAuthorization: Bearer secret\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{answer}");
    serde_json::from_str(body).unwrap()
}

fn chat(port: u16, system: &str, question: &str) -> Value {
    let messages = json!([{ "role": "system", "content": system }, { "role": "user", "content": question }]);
    let body = json!({ "messages": messages, "max_tokens": 4, "temperature": 0 });
    request(port, "/v1/chat/completions", &body)["timings"].clone()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Two questions whose prefix is not evaluated again, a third for the status line, and an orderly end.
fn answers_from_restored_slots(run: &mut Running, port: u16, text: &str) {
    for question in ["What is a cell?", "Why does a token match?"] {
        let timings = chat(port, text, question);
        let (cached, new) = (timings["cache_n"].as_u64().unwrap(), timings["prompt_n"].as_u64().unwrap());
        assert!(cached > 150 && new < 40, "the prefix was evaluated again: {timings}");
    }
    // the status file is at most half a second old
    std::thread::sleep(Duration::from_millis(600));
    chat(port, text, "And then?");
    run.signal(Signal::USR1);
    run.wait_for("squeeze: bound 1 slot");
    assert!(sparse(&run.said()) >= 2 * 30, "{}", run.said());
    run.signal(Signal::TERM);
    assert_eq!(run.end().code(), Some(0), "{}", run.said());
}

#[test]
fn a_server_answers_from_restored_slots() {
    let place = Place::new();
    let port = free_port();
    let (server, number) = (program("llama-server"), port.to_string());
    let mut args = vec![server.to_str().unwrap(), "-c", "2048", "-t", "2", "--port", &number, "--api-key", "secret"];
    let text = std::fs::read_to_string(place.text()).unwrap();
    {
        let mut run = place.spawn(&[], &args);
        run.wait_for(" of 4 slots");
        answers_from_restored_slots(&mut run, port, &text);
    }

    // another number of slots, and a folder of the user's
    let slots = place.folder.path().join("user");
    std::fs::create_dir(&slots).unwrap();
    args.extend(["-np", "2", "--slot-save-path", slots.to_str().unwrap()]);
    let mut run = place.spawn(&[], &args);
    run.wait_for("into 2 of 2 slots");
    assert!(run.said().contains("using the index"), "{}", run.said());
    assert!(chat(port, &text, "What is a cell?")["prompt_n"].as_u64().unwrap() < 40);
    run.signal(Signal::TERM);
    run.end();
    assert_eq!(std::fs::read_dir(&slots).unwrap().count(), 0);

    // what cannot be restored is said
    let small = place.run(&[], &[args[0], "-c", "64", "--port", &number]);
    assert!(!small.status.success() && stderr(&small).contains("-c 64 is too small"), "{}", stderr(&small));
    let apart = place.run(&[], &["llama-server", "-np", "2", "-no-kvu", "--port", &number]);
    assert!(stderr(&apart).contains("-no-kvu gives every slot"), "{}", stderr(&apart));

    // the other kind of state comes out of the cached one
    let completion = program("llama-completion");
    let more = ["-p", "What is a cell?", "-n", "8", "--temp", "0", "-t", "2", "-st"];
    let args: Vec<&str> = [completion.to_str().unwrap()].into_iter().chain(more).collect();
    let run = place.run(&["--chat", "system", "--status", "600"], &args);
    let said = stderr(&run);
    assert!(run.status.success() && said.contains("using the index"), "{said}");
    assert!(said.contains("session file matches") && sparse(&said) > 30, "{said}");
    assert_eq!(place.entries().len(), 1);
}

/// The slots are restored in a quantised cache too, from a state of its own; llama-completion gets its state out of that one.
#[test]
fn a_quantised_cache_is_restored_and_sparse() {
    let place = Place::new();
    let port = free_port();
    let (server, number) = (program("llama-server"), port.to_string());
    let types = ["-ctk", "q8_0", "--cache-type-v", "q8_0"];
    let args = [server.to_str().unwrap(), "-c", "2048", "-t", "2", "--port", &number, "--api-key", "secret"];
    let text = std::fs::read_to_string(place.text()).unwrap();
    let mut run = place.spawn(&[], &[&args[..], &types].concat());
    run.wait_for(" of 4 slots");
    answers_from_restored_slots(&mut run, port, &text);

    let completion = program("llama-completion");
    let more = ["-p", "What is a cell?", "-n", "8", "--temp", "0", "-t", "2", "-st"];
    let run = place
        .run(&["--chat", "system", "--status", "600"], &[&[completion.to_str().unwrap()], &more[..], &types].concat());
    let said = stderr(&run);
    assert!(run.status.success() && said.contains("using the index"), "{said}");
    assert!(said.contains("session file matches") && sparse(&said) > 30, "{said}");

    // f16 and q8_0 are entries of their own; a type that the plugin does not know is named
    let idle = place.folder.path().join("llama-idle");
    std::os::unix::fs::symlink("/bin/true", &idle).unwrap();
    assert!(place.run(&["--chat", "system"], &[idle.to_str().unwrap()]).status.success());
    assert_eq!(place.entries().len(), 2);
    let odd = place.run(&[], &["llama-server", "-ctk", "q5_1", "--port", &number]);
    assert!(stderr(&odd).contains("-ctk q5_1: no cache type that can be indexed"), "{}", stderr(&odd));
}

/// llama-cli is a chat client with a server in its own process, which takes no saved state: it computes the prefix with its
/// first answer, and everything behind that graph is sparse.
#[test]
fn llama_cli_computes_the_prefix_once_and_is_sparse_behind_it() {
    let place = Place::new();
    let cli = program("llama-cli");
    let args = [cli.to_str().unwrap(), "-c", "1024", "-n", "8", "--temp", "0", "-t", "2"];
    let once = [&args[..], &["-p", "What is a cell?", "-st"]].concat();
    for chat in ["system", "user"] {
        let run = place.run(&["--chat", chat, "--status", "600"], &once);
        let said = stderr(&run);
        assert!(run.status.success() && said.contains("llama-cli cannot restore a saved prefix"), "{said}");
        // 8 tokens, the first of them from the graph of the prefix
        assert!(sparse(&said) >= 5 * 30, "{chat}: {said}");
        assert!(said.contains("bound 1 slot"), "{chat}: {said}");
    }

    // questions that are typed: the second one finds the prefix in its cells, and its own rows are sparse too
    let rows = |said: &str| -> Vec<(u64, u64)> {
        let of = |l: &str| {
            let (all, rest) = l.strip_prefix("squeeze: graph of ")?.split_once(" query rows: sparse ")?;
            Some((all.parse().unwrap(), rest.split(' ').nth(3)?.parse().unwrap()))
        };
        said.lines().filter_map(of).collect()
    };
    let mut command = place.command(&[], &args);
    command.env("GGML_SQUEEZE_LOG", "2").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"What is a cell?\nWhy does a token match?\n/exit\n").unwrap();
    let run = child.wait_with_output().unwrap();
    let rows = rows(&stderr(&run));
    // warm-up graphs come first
    let prefix = rows.iter().position(|(all, _)| *all > 150).unwrap_or_else(|| panic!("{}", stderr(&run)));
    assert!(run.status.success() && rows[prefix].1 == 0, "{rows:?}: {}", stderr(&run));
    let question = rows[prefix + 1..].iter().find(|(all, _)| *all > 1);
    let question = question.unwrap_or_else(|| panic!("one question only: {rows:?}"));
    assert!(question.0 < 60 && question.0 == question.1, "the prefix was evaluated again, or densely: {rows:?}");
}

#[test]
fn a_template_is_rendered_as_the_server_does_it() {
    // SmolLM2's template puts a system message of its own in front of a user message that comes first
    let place = Place::new();
    let port = free_port();
    let (server, number) = (program("llama-server"), port.to_string());
    let mut run =
        place.spawn(&["--chat", "user"], &[server.to_str().unwrap(), "-c", "1024", "-t", "2", "--port", &number]);
    run.wait_for(" of 4 slots");
    let text = std::fs::read_to_string(place.text()).unwrap();
    let messages = json!([{ "role": "user", "content": text + "\nWhat is a cell?" }]);
    let body = json!({ "messages": messages, "max_tokens": 4, "temperature": 0 });
    let timings = request(port, "/v1/chat/completions", &body)["timings"].clone();
    assert!(timings["cache_n"].as_u64().unwrap() > 150 && timings["prompt_n"].as_u64().unwrap() < 40, "{timings}");
    run.signal(Signal::USR1);
    run.wait_for("squeeze: bound 1 slot");
    assert!(sparse(&run.said()) > 0, "{}", run.said());
    run.signal(Signal::TERM);
    run.end();
}

#[test]
fn info_says_what_there_is() {
    let run = common::sqz(&["info", "--json"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let info: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(info["version"], env!("CARGO_PKG_VERSION"));
    assert!(info["ggml_version"].as_str().unwrap().starts_with("0."));
    assert!(info["devices"].as_array().unwrap().iter().any(|d| d["name"] == "CPU"));
    assert!(Path::new(info["plugin"].as_str().unwrap()).is_file());
    let lines = common::sqz(&["info"]);
    assert!(String::from_utf8(lines.stdout).unwrap().lines().any(|l| l.starts_with("CPU path")));
}
