//! llama-server: where it listens, when it is ready, and the restored prefix in its slots. Nothing here stops the server: a
//! restore that fails is one line, and the first question of a slot is prefilled as ever.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use serde_json::{json, Value};

use super::args::{self, Child};

const POLL: Duration = Duration::from_millis(100);
/// A state of gigabytes may come from a slow disk.
const ANSWER: Duration = Duration::from_secs(600);

#[derive(Clone, Debug, PartialEq)]
enum Address {
    Tcp(String, u16),
    #[cfg(unix)]
    Unix(PathBuf),
}

/// A server as its command line describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    address: Address,
    prefix: String,
    key: Option<String>,
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Server {
    /// Reads host, port and key.
    ///
    /// # Errors
    /// The server cannot be reached as it is told to listen.
    pub fn of(child: &Child) -> Result<Server> {
        ensure!(
            child.raw(&args::SSL_KEY).is_none(),
            "a server with TLS cannot be reached by sqz run: let a proxy do TLS (leave out --ssl-key-file)"
        );
        let hosts = child.text(&args::HOST).unwrap_or_else(|| "127.0.0.1".into());
        let host = hosts.split(',').map(str::trim).find(|h| !h.is_empty()).unwrap_or("127.0.0.1");
        let port = child.number::<u16>(&args::PORT)?.unwrap_or(8080);
        let address = if host.ends_with(".sock") {
            Address::Unix(host.into())
        } else {
            ensure!(port != 0, "--port 0 lets the server choose a port that sqz run cannot know: name one");
            let host = match host {
                "0.0.0.0" => "127.0.0.1",
                "::" => "::1",
                host => host,
            };
            Address::Tcp(host.to_string(), port)
        };
        Ok(Server { address, prefix: child.text(&args::API_PREFIX).unwrap_or_default(), key: key(child)? })
    }

    /// Host and port, for messages.
    pub fn name(&self) -> String {
        match &self.address {
            Address::Tcp(host, port) if host.contains(':') => format!("[{host}]:{port}"),
            Address::Tcp(host, port) => format!("{host}:{port}"),
            Address::Unix(path) => path.display().to_string(),
        }
    }

    fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match &self.address {
            Address::Tcp(host, port) => {
                let found = (host.as_str(), *port).to_socket_addrs()?.next();
                let address = found.ok_or_else(|| std::io::Error::other("the host has no address"))?;
                let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
                stream.set_read_timeout(Some(ANSWER))?;
                Box::new(stream)
            }
            Address::Unix(path) => {
                let stream = std::os::unix::net::UnixStream::connect(path)?;
                stream.set_read_timeout(Some(ANSWER))?;
                Box::new(stream)
            }
        })
    }

    /// Does anybody listen there already?
    pub fn taken(&self) -> bool {
        self.connect().is_ok()
    }

    /// Status and body of one request.
    fn request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
        let mut stream = self.connect()?;
        let key = self.key.as_ref().map_or(String::new(), |k| format!("Authorization: Bearer {k}\r\n"));
        // HTTP/1.0: the answer is not chunked and the connection ends with it
        let head = format!(
            "{method} {}{path} HTTP/1.0\r\nHost: {}\r\n{key}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.prefix,
            self.name(),
            body.len(),
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        parse(&answer)
    }

    /// Waits until the model is loaded; false where `stop` came first.
    fn ready(&self, stop: &AtomicBool) -> bool {
        while !stop.load(Ordering::Relaxed) {
            if self.request("GET", "/health", "").is_ok_and(|(code, _)| code == 200) {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }

    /// Waits for the server, restores `file` (a name in its --slot-save-path) into its slots, and says so on stderr.
    pub fn restore(&self, file: &str, n_prefix: usize, stop: &AtomicBool) {
        if !self.ready(stop) {
            return;
        }
        let start = Instant::now();
        match self.restore_slots(file, n_prefix) {
            _ if stop.load(Ordering::Relaxed) => {}
            Ok((done, all)) => eprintln!(
                "restored the prefix ({n_prefix} tokens) into {done} of {all} slots of {} in {:.1} s",
                self.name(),
                start.elapsed().as_secs_f64()
            ),
            Err(why) => {
                eprintln!("warning: {why:#}; the server goes on and prefills with the first question of a slot")
            }
        }
    }

    fn restore_slots(&self, file: &str, n_prefix: usize) -> Result<(usize, usize)> {
        let (code, props) = self.request("GET", "/props", "").context("the server's slots cannot be listed")?;
        ensure!(code == 200, "the server's slots cannot be listed: {}", message(code, &props));
        let props: Value = serde_json::from_str(&props).context("the server's /props is not JSON")?;
        let number = |value: &Value| value.as_u64().map(|n| n as usize);
        let slots = number(&props["total_slots"]).context("the server's /props names no total_slots")?;
        let n_ctx =
            number(&props["default_generation_settings"]["n_ctx"]).context("the server's /props names no n_ctx")?;
        ensure!(n_prefix < n_ctx, "a slot has room for {n_ctx} tokens and the prefix has {n_prefix}: raise -c");
        let wanted = slots_that_fit(slots, n_ctx, n_prefix);
        for slot in 0..wanted {
            let body = json!({ "filename": file }).to_string();
            let (code, answer) = self
                .request("POST", &format!("/slots/{slot}?action=restore"), &body)
                .with_context(|| format!("slot {slot} cannot be restored"))?;
            ensure!(code == 200, "slot {slot} cannot be restored: {}", message(code, &answer));
        }
        Ok((wanted, slots))
    }
}

/// Lets all slots share one pool of cells, as llama-server does by itself without -np: a state that was saved from one
/// pool fits no other layout. Returns why it cannot be.
pub fn share_cells(child: &mut Child) -> Result<Option<String>> {
    if child.number::<i32>(&args::PARALLEL)?.is_none_or(|n| n <= 1) || child.has(&["-kvu", "--kv-unified"]) {
        return Ok(None);
    }
    if child.has(&["-no-kvu", "--no-kv-unified"]) {
        return Ok(Some("-no-kvu gives every slot cells of its own".to_string()));
    }
    eprintln!("note: -kvu is added: the slots share the cells of -c, as the saved prefix needs it");
    child.args.push("-kvu".into());
    Ok(None)
}

/// How many slots of one pool of cells get the prefix: a quarter of the cells stays free for questions.
fn slots_that_fit(slots: usize, n_ctx: usize, n_prefix: usize) -> usize {
    slots.min(n_ctx * 3 / 4 / n_prefix.max(1)).max(1)
}

fn key(child: &Child) -> Result<Option<String>> {
    if let Some(keys) = child.text(&args::API_KEY) {
        return Ok(keys.split(',').map(str::trim).find(|k| !k.is_empty()).map(str::to_string));
    }
    let Some(file) = child.path(&args::API_KEY_FILE) else { return Ok(None) };
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read the keys in {}", file.display()))?;
    Ok(text.lines().find(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_string))
}

fn parse(answer: &[u8]) -> Result<(u16, String)> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { bail!("the answer is no HTTP") };
    let code = head.split(' ').nth(1).and_then(|c| c.parse().ok()).context("the answer is no HTTP")?;
    Ok((code, body.to_string()))
}

/// What the server says is wrong.
fn message(code: u16, body: &str) -> String {
    let parsed: Option<Value> = serde_json::from_str(body).ok();
    let text = parsed.as_ref().and_then(|v| v["error"]["message"].as_str());
    format!("the server answers {code}: {}", text.unwrap_or("no reason given"))
}

/// Puts `state` where the server's --slot-save-path is: its own folder, unless the user has named one, which gets a link.
/// Returns the name to restore.
///
/// # Errors
/// The link cannot be made.
pub fn provide_slot_file(child: &mut Child, state: &Path, key: &str) -> Result<(String, Option<Link>)> {
    if let Some(folder) = child.path(&args::SLOT_PATH) {
        let name = format!("squeeze-{}-{}.slot", &key[..16.min(key.len())], std::process::id());
        let link = folder.join(&name);
        std::os::unix::fs::symlink(state, &link)
            .with_context(|| format!("cannot put the prefix's state into --slot-save-path {}", folder.display()))?;
        return Ok((name, Some(Link(link))));
    }
    let folder = state.parent().context("the state has no folder")?;
    let name = state.file_name().context("the state has no name")?.to_string_lossy().into_owned();
    child.push("--slot-save-path", folder);
    Ok((name, None))
}

/// A link in a folder of the user's, removed at the end.
#[derive(Debug)]
pub struct Link(PathBuf);

impl Drop for Link {
    fn drop(&mut self) {
        // it may be gone with its folder
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn server(line: &str) -> Result<Server> {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Server::of(&Child::new(&words).unwrap())
    }

    #[test]
    fn the_command_line_tells_where_it_listens() {
        let s = server("llama-server").unwrap();
        assert_eq!(s.name(), "127.0.0.1:8080");
        let s = server("llama-server --host 0.0.0.0 --port 81 --api-key a,b --api-prefix /x").unwrap();
        assert_eq!(s.name(), "127.0.0.1:81");
        assert_eq!((s.key.as_deref(), s.prefix.as_str()), (Some("a"), "/x"));
        assert_eq!(server("llama-server --host ::,1.2.3.4").unwrap().name(), "[::1]:8080");
        assert_eq!(server("llama-server --host /run/x.sock").unwrap().address, Address::Unix("/run/x.sock".into()));
        assert!(server("llama-server --port 0").is_err());
        assert!(server("llama-server --ssl-key-file k").is_err());
    }

    #[test]
    fn slots_share_their_cells() {
        for (line, added, refused) in [
            ("llama-server", false, false),
            ("llama-server -np 1", false, false),
            ("llama-server -np 2 -kvu", false, false),
            ("llama-server -np 2", true, false),
            ("llama-server -np 2 -no-kvu", false, true),
        ] {
            let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let mut child = Child::new(&words).unwrap();
            assert_eq!(share_cells(&mut child).unwrap().is_some(), refused, "{line}");
            assert_eq!(child.args.len() == words.len(), added, "{line}");
        }
    }

    #[test]
    fn a_quarter_of_a_shared_pool_stays_free() {
        assert_eq!(slots_that_fit(4, 32768, 6500), 3);
        assert_eq!(slots_that_fit(4, 8192, 6500), 1);
        assert_eq!(slots_that_fit(4, 131072, 6500), 4);
    }

    #[test]
    fn answers_are_read() {
        let (code, body) =
            parse(b"HTTP/1.1 400 Bad Request\r\nX: y\r\n\r\n{\"error\":{\"message\":\"no room\"}}").unwrap();
        assert_eq!(message(code, &body), "the server answers 400: no room");
        assert!(parse(b"SSH-2.0").is_err());
        assert!(message(500, "<html>").contains("no reason"));
    }

    #[test]
    fn a_folder_of_the_user_gets_a_link_for_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("slots/prefix.slot");
        std::fs::create_dir(folder.path().join("slots")).unwrap();
        std::fs::create_dir(folder.path().join("user")).unwrap();
        std::fs::write(&state, "x").unwrap();
        let mut child = Child::new(&["llama-server".into()]).unwrap();
        let (name, link) = provide_slot_file(&mut child, &state, "k").unwrap();
        assert!(
            link.is_none()
                && name == "prefix.slot"
                && child.path(&args::SLOT_PATH) == Some(folder.path().join("slots"))
        );
        let user = folder.path().join("user");
        let mut child = Child::new(&["llama-server".into(), "--slot-save-path".into(), user.clone().into()]).unwrap();
        let (name, link) = provide_slot_file(&mut child, &state, "0123456789abcdef0").unwrap();
        assert_eq!(std::fs::read_to_string(user.join(&name)).unwrap(), "x");
        drop(link);
        assert_eq!(std::fs::read_dir(&user).unwrap().count(), 0);
    }
}
