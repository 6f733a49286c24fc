//! llama.cpp's RPC: the plugin in the process of a ggml-rpc-server serves a client that knows nothing of it.

mod common;

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use common::host::{free_port, graphs, squeeze, turn, Host};
use common::{build, llama_bin, model, stderr, text};

/// llama-completion's answer: computed on the server at this port, weights, cache and all, or here (0).
fn ask(port: u16, prompt: &Path, variables: &[(String, String)]) -> String {
    let server = format!("127.0.0.1:{port}");
    let model = model();
    let args = ["-m", model.to_str().unwrap(), "-f", prompt.to_str().unwrap(), "-n", "12", "--temp", "0", "-no-cnv"];
    let mut command = Command::new(llama_bin().join("llama-completion"));
    command.args(args).args(["--no-display-prompt", "-t", "2", "-fit", "off", "-c", "1024"]);
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    // A server has no repacked weights, so here there shall be none: their kernels (AMX, for one) round otherwise.
    match port {
        0 => command.arg("--no-repack"),
        _ => command.args(["--rpc", &server, "-ngl", "99"]),
    };
    let run = command.output().unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Starts a server with these variables, asks once or twice and returns the answers and the server's log.
fn served(folder: &Path, prompt: &Path, variables: &[(String, String)], times: usize) -> (Vec<String>, String) {
    let port = free_port();
    let args = ["-H", "127.0.0.1", "-p", &port.to_string(), "-t", "2"];
    let mut host = Host::start("ggml-rpc-server", &args, variables, &folder.join("rpc.log"));
    host.wait(|_| TcpStream::connect(("127.0.0.1", port)).is_ok());
    let answers = (0..times).map(|_| ask(port, prompt, &[])).collect();
    (answers, host.log())
}

#[test]
fn a_client_without_the_plugin_is_served_from_an_index() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let index = build(folder.path(), &text(1500), &[]);
    let prompt = folder.path().join("prefix-and-question.txt");
    std::fs::write(&prompt, format!("{}\nIn short, the cells", text(1500))).unwrap();
    let (stock, _) = served(folder.path(), &prompt, &[], 1);
    assert_eq!(stock[0], ask(0, &prompt, &[]), "the server without the plugin");

    // all keys: the answer of the plugin on this machine (stock llama.cpp accumulates V in F16, so its may differ); the server
    // serves one client after another, each with a cache of its own
    let local = ask(0, &prompt, &squeeze(&index, "1"));
    let (all, log) = served(folder.path(), &prompt, &squeeze(&index, "1"), 2);
    assert_eq!(all, [local.clone(), local], "{log}");
    assert_eq!(log.matches(" is bound: ").count(), 2, "{log}");

    // a fifth of the keys: every token behind the prompt
    let (answers, log) = served(folder.path(), &prompt, &squeeze(&index, "0.2"), 1);
    assert!(answers[0].len() > 10, "{answers:?}");
    assert_eq!(answers[0], ask(0, &prompt, &squeeze(&index, "0.2")), "{log}");
    let decoded: Vec<_> = graphs(&log).into_iter().filter(|g| g.rows == 1).collect();
    assert!(decoded.len() >= 10 && decoded.iter().all(|g| g.sparse_nodes == 30), "{log}");
}
