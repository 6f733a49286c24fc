//! The status file: totals as one line of JSON, for whoever started the host (`sqz run`). Written from the computing thread,
//! so it takes no thread and no signal of the host's; an idle host leaves the file as its last graph did.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::runtime::{stats, Snapshot};
use super::stats::{log, Stats};

/// Least time between two writes.
const INTERVAL: Duration = Duration::from_millis(500);
/// A longer pause between two graphs ends a generation: its time is not decoding.
const PAUSE: Duration = Duration::from_secs(2);
/// Most sparse rows per attention node of a decode graph; more are a prompt.
const DECODE_ROWS: f64 = 16.0;

/// Sparse decode speed of the generation that runs, or ran last.
#[derive(Default)]
struct Speed {
    last: Option<Instant>,
    rows: u64,
    nodes: u64,
    tokens: f64,
    seconds: f64,
}

impl Speed {
    /// `totals` are those after a graph that ended at `now`; an index has `n_layer` layers.
    fn graph(&mut self, totals: &Stats, n_layer: usize, now: Instant) {
        // the totals may have been reset
        let rows = totals.rows_sparse.saturating_sub(self.rows) as f64;
        let nodes = totals.nodes_sparse.saturating_sub(self.nodes) as f64;
        (self.rows, self.nodes) = (totals.rows_sparse, totals.nodes_sparse);
        let gap = self.last.replace(now).map_or(PAUSE, |last| now.saturating_duration_since(last));
        if gap >= PAUSE || rows == 0.0 || rows > nodes * DECODE_ROWS {
            // what was measured is kept until the next generation has begun
            if rows > 0.0 {
                (self.tokens, self.seconds) = (0.0, 0.0);
            }
            return;
        }
        // a pass may come in several graphs: rows per layer count tokens whatever their number
        self.tokens += rows / n_layer.max(1) as f64;
        self.seconds += gap.as_secs_f64();
    }

    fn per_second(&self) -> f64 {
        if self.seconds > 0.0 {
            self.tokens / self.seconds
        } else {
            0.0
        }
    }
}

#[derive(Default)]
struct Writer {
    speed: Speed,
    last_write: Option<Instant>,
    /// Bindings made and dropped, as last written.
    bindings: (u64, u64),
    failed: bool,
}

static WRITER: Mutex<Option<Writer>> = Mutex::new(None);

/// Counts a graph that has just been computed and, where half a second has passed or a binding has changed, writes the file. Does nothing without
/// `Config::status_path`.
pub fn graph_done(snapshot: &Snapshot) {
    let Some(path) = &snapshot.config.status_path else { return };
    let totals = stats();
    let n_layer = snapshot.indexes.iter().map(|l| l.matcher.index.shapes().len()).max().unwrap_or(0);
    let mut guard = WRITER.lock().unwrap_or_else(|e| e.into_inner());
    let writer = guard.get_or_insert_default();
    let now = Instant::now();
    writer.speed.graph(&totals, n_layer, now);
    // a short answer may be over within the interval: its binding is written even so
    let changed = writer.bindings != (totals.bound, totals.unbound);
    if changed || writer.last_write.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL) {
        writer.write(path, &totals, now);
    }
}

/// Writes the file now: the last backend is freed.
pub fn finish(snapshot: &Snapshot) {
    let Some(path) = &snapshot.config.status_path else { return };
    let totals = stats();
    WRITER.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default().write(path, &totals, Instant::now());
}

impl Writer {
    fn write(&mut self, path: &Path, totals: &Stats, now: Instant) {
        self.last_write = Some(now);
        self.bindings = (totals.bound, totals.unbound);
        if self.failed {
            return;
        }
        // a reader sees the old line or the new one; a device or a pipe stays what it is
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let line = render(totals, self.speed.per_second());
        let written = match crate::index::is_special(path) {
            true => {
                std::fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(line.as_bytes()))
            }
            false => std::fs::write(&part, line).and_then(|()| std::fs::rename(&part, path)),
        };
        if let Err(error) = written {
            self.failed = true;
            log(format_args!("the status file {} cannot be written ({error}); it is left alone", path.display()));
        }
    }
}

fn render(totals: &Stats, tokens_per_second: f64) -> String {
    let mut dense = String::new();
    for (reason, n) in &totals.nodes_dense {
        let comma = if dense.is_empty() { "" } else { "," };
        // reasons are names of ours, without quotes or backslashes
        let _ = write!(dense, "{comma}\"{reason}\":{n}");
    }
    format!(
        "{{\"pid\":{},\"graphs\":{},\"nodes_sparse\":{},\"nodes_forced\":{},\"nodes_dense\":{{{dense}}},\"rows_sparse\":{},\
         \"kept_share\":{:.4},\"bound\":{},\"unbound\":{},\"bound_now\":{},\"decode_tokens_per_second\":{:.2}}}\n",
        std::process::id(),
        totals.graphs,
        totals.nodes_sparse,
        totals.nodes_forced,
        totals.rows_sparse,
        totals.kept_share,
        totals.bound,
        totals.unbound,
        totals.bound.saturating_sub(totals.unbound),
        tokens_per_second,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(nodes: u64, rows: u64) -> Stats {
        Stats { nodes_sparse: nodes, rows_sparse: rows, ..Stats::default() }
    }

    #[test]
    fn decode_graphs_are_timed_and_prompts_and_pauses_are_not() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut speed = Speed::default();
        speed.graph(&totals(30, 30 * 40), 30, at(0));
        assert_eq!(speed.per_second(), 0.0, "a prompt");
        // two graphs per token, two sequences
        for i in 0..20 {
            speed.graph(&totals(30 + 15 * (i + 1), 1200 + 30 * (i + 1)), 30, at(10 * (i + 1)));
        }
        assert!((speed.per_second() - 100.0).abs() < 0.1, "{}", speed.per_second());
        speed.graph(&totals(330, 1800), 30, at(60_000));
        assert!((speed.per_second() - 100.0).abs() < 0.1, "a dense graph after a pause");
        speed.graph(&totals(360, 1830), 30, at(120_000));
        assert_eq!(speed.per_second(), 0.0, "another generation");
        speed.graph(&totals(390, 1860), 30, at(120_100));
        assert!((speed.per_second() - 10.0).abs() < 0.1);
    }

    #[test]
    fn the_line_is_json_with_every_reason() {
        let mut totals = Stats { graphs: 3, bound: 2, unbound: 1, ..totals(30, 60) };
        totals.nodes_dense.insert("unbound", 4);
        totals.nodes_dense.insert("type", 5);
        let line = render(&totals, 61.25);
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
        for part in ["\"nodes_dense\":{\"type\":5,\"unbound\":4}", "\"bound_now\":1", "\"nodes_sparse\":30,", ":61.25}"]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn the_file_is_replaced_and_a_bad_place_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status");
        let mut writer = Writer::default();
        for nodes in [1, 2] {
            writer.write(&path, &totals(nodes, nodes), Instant::now());
            assert!(std::fs::read_to_string(&path).unwrap().contains(&format!("\"nodes_sparse\":{nodes},")));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        writer.write(&folder.path().join("none/status"), &totals(3, 3), Instant::now());
        assert!(writer.failed);
    }

    #[test]
    #[cfg(unix)]
    fn what_is_no_file_keeps_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut writer = Writer::default();
        writer.write(&path, &totals(1, 1), Instant::now());
        assert!(writer.failed, "a socket cannot be opened");
        assert!(crate::index::is_special(&path));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
