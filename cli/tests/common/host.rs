//! Programs of the unmodified llama.cpp that serve: started with or without the plugin, asked over HTTP, read by their log.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{json, Value};

/// Time for a model to load, or for an answer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// One program at a time: two that spin on the same cores slow each other down tenfold.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The plugin's variables for one index.
pub fn squeeze(index: &Path, budget: &str) -> Vec<(String, String)> {
    let index = index.to_str().unwrap().to_string();
    let set = [
        ("GGML_BACKEND_PATH", super::plugin()),
        ("GGML_SQUEEZE_INDEX", index),
        ("GGML_SQUEEZE_BUDGET", budget.to_string()),
        ("GGML_SQUEEZE_MIN_PREFIX", "0".to_string()),
        ("GGML_SQUEEZE_LOG", "2".to_string()),
    ];
    set.map(|(name, value)| (name.to_string(), value)).to_vec()
}

/// A running program; killed on drop.
pub struct Host {
    child: Child,
    log: PathBuf,
}

impl Host {
    pub fn start(program: &str, args: &[&str], variables: &[(String, String)], log: &Path) -> Host {
        let file = File::create(log).unwrap();
        let mut command = Command::new(super::llama_bin().join(program));
        command.args(args).envs(variables.iter().cloned()).stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}: run scripts/llama.sh (make test does)"));
        Host { child, log: log.to_path_buf() }
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap()).into_owned()
    }

    /// Waits until `ready`; panics with the log if the program ends before.
    pub fn wait(&mut self, ready: impl Fn(&Host) -> bool) {
        let begin = Instant::now();
        while !ready(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended with {ended:?}:\n{}", self.log());
            assert!(begin.elapsed() < PATIENCE, "not ready:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Asks the program to end and returns its whole log.
    pub fn stop(mut self) -> String {
        let asked = Command::new("kill").arg("-TERM").arg(self.child.id().to_string()).status().unwrap();
        assert!(asked.success());
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < PATIENCE, "does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "ended with {status}:\n{log}");
        log
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the plugin said of one graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    pub rows: u64,
    pub sparse_rows: u64,
    pub sparse_nodes: u64,
    /// The rest of the line: nodes by reason.
    pub dense: String,
}

/// The plugin's lines about graphs.
pub fn graphs(log: &str) -> Vec<Graph> {
    let line = |line: &str| {
        let rest = line.strip_prefix("squeeze: graph of ")?;
        let (rows, rest) = rest.split_once(" query rows: sparse ")?;
        let (nodes, rest) = rest.split_once(" nodes with ")?;
        let (sparse_rows, dense) = rest.split_once(" rows").unwrap();
        let number = |text: &str| text.parse().unwrap();
        let dense = dense.trim_start_matches(", ").to_string();
        Some(Graph { rows: number(rows), sparse_rows: number(sparse_rows), sparse_nodes: number(nodes), dense })
    };
    log.lines().filter_map(line).collect()
}

/// An answer of llama-server, and what the plugin said while it was made.
#[derive(Clone, Debug)]
pub struct Answer {
    pub content: String,
    /// Tokens of the prompt that were computed, and that were in the cache.
    pub prompt_n: u64,
    pub cache_n: u64,
    pub graphs: Vec<Graph>,
    /// The log while the answer was made.
    pub log: String,
    pub reply: Value,
}

impl Answer {
    /// Every graph was dense. There was at least one.
    pub fn dense(&self) -> bool {
        !self.graphs.is_empty() && self.graphs.iter().all(|g| g.sparse_nodes == 0)
    }

    /// Every graph was sparse, in all its rows.
    pub fn sparse(&self) -> bool {
        !self.graphs.is_empty() && self.graphs.iter().all(|g| g.sparse_nodes > 0 && g.sparse_rows == g.rows)
    }
}

/// A llama-server.
pub struct Server {
    host: Host,
    port: u16,
}

impl Server {
    /// Starts it on a free port, with two threads, and waits for the model.
    pub fn start(model: &Path, args: &[&str], variables: &[(String, String)], log: &Path) -> Server {
        let port = free_port();
        let (text, model) = (port.to_string(), model.to_str().unwrap());
        let common = ["-m", model, "--port", &text, "-t", "2", "-fit", "off", "--no-ui", "--host", "127.0.0.1"];
        let all: Vec<&str> = common.iter().chain(args).copied().collect();
        let mut host = Host::start("llama-server", &all, variables, log);
        host.wait(|_| http(port, "GET", "/health", "").is_ok_and(|(code, _)| code == 200));
        Server { host, port }
    }

    pub fn log(&self) -> String {
        self.host.log()
    }

    pub fn stop(self) -> String {
        self.host.stop()
    }

    /// POST with a JSON reply; panics with the log where the server refuses.
    pub fn post(&self, path: &str, body: &Value) -> Value {
        let (code, reply) =
            http(self.port, "POST", path, &body.to_string()).unwrap_or_else(|e| panic!("{path}: {e}\n{}", self.log()));
        assert_eq!(code, 200, "{path}: {reply}\n{}", self.log());
        serde_json::from_str(&reply).unwrap_or_else(|e| panic!("{path}: {e}: {reply}"))
    }

    /// A completion, greedy, of exactly `n` tokens; `more` adds to the request.
    pub fn ask(&self, prompt: &str, n: usize, more: &Value) -> Answer {
        let mut body = json!({"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": true, "seed": 1});
        let fields = body.as_object_mut().unwrap();
        fields.extend(more.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
        let mark = self.log().len();
        let reply = self.post("/completion", &body);
        let log = self.log().split_off(mark);
        let timing = |name: &str| reply["timings"][name].as_u64().unwrap();
        Answer {
            content: reply["content"].as_str().unwrap().to_string(),
            prompt_n: timing("prompt_n"),
            cache_n: timing("cache_n"),
            graphs: graphs(&log),
            log,
            reply,
        }
    }

    /// The same in one slot.
    pub fn ask_slot(&self, slot: usize, prompt: &str, n: usize) -> Answer {
        self.ask(prompt, n, &json!({ "id_slot": slot }))
    }

    /// Saves, restores or erases a slot; returns the reply.
    pub fn slot(&self, slot: usize, action: &str, file: &str) -> Value {
        self.post(&format!("/slots/{slot}?action={action}"), &json!({ "filename": file }))
    }
}

/// One request; status and body.
fn http(port: u16, method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    // HTTP/1.0 with a closed connection: the body comes whole, without chunks
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let reply = String::from_utf8_lossy(&bytes);
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    let code = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Ok((code, body.to_string()))
}
