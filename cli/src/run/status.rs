//! What the plugin says of itself, as one line for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Deserialize;

/// The plugin's status file (`GGML_SQUEEZE_STATUS`), as far as it is shown.
#[derive(Debug, Deserialize)]
struct Status {
    nodes_sparse: u64,
    nodes_dense: BTreeMap<String, u64>,
    kept_share: f64,
    bound_now: u64,
    decode_tokens_per_second: f64,
}

/// The line for a status file as it is now.
pub fn line(file: &Path) -> String {
    let Ok(text) = std::fs::read_to_string(file) else {
        return "squeeze: no graph was computed yet (or the program cannot load plugins: it needs GGML_BACKEND_DL)"
            .into();
    };
    match serde_json::from_str(&text) {
        Ok(status) => render(&status),
        Err(error) => format!("squeeze: the plugin's status cannot be read: {error}"),
    }
}

fn render(s: &Status) -> String {
    let plural = if s.bound_now == 1 { "" } else { "s" };
    let mut line = format!("squeeze: bound {} slot{plural}", s.bound_now);
    if s.nodes_sparse > 0 {
        let _ = write!(line, ", kept {:.3}", s.kept_share);
    }
    let _ = write!(line, ", sparse {} nodes, dense {}", s.nodes_sparse, s.nodes_dense.values().sum::<u64>());
    if !s.nodes_dense.is_empty() {
        let reasons: Vec<String> = s.nodes_dense.iter().map(|(why, n)| format!("{why}: {n}")).collect();
        let _ = write!(line, " ({})", reasons.join(", "));
    }
    if s.decode_tokens_per_second > 0.0 {
        let _ = write!(line, ", {:.1} t/s", s.decode_tokens_per_second);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_counts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("status");
        assert!(line(&file).contains("no graph"));
        let json = r#"{"pid":1,"graphs":9,"nodes_sparse":5130,"nodes_forced":0,"nodes_dense":{"unbound":90},"rows_sparse":1,
            "kept_share":0.2041,"bound":3,"unbound":1,"bound_now":2,"decode_tokens_per_second":61.21}"#;
        std::fs::write(&file, json).unwrap();
        assert_eq!(
            line(&file),
            "squeeze: bound 2 slots, kept 0.204, sparse 5130 nodes, dense 90 (unbound: 90), 61.2 t/s"
        );
        let idle = json
            .replace("5130", "0")
            .replace("\"unbound\":90", "")
            .replace("61.21", "0")
            .replace("_now\":2", "_now\":1");
        std::fs::write(&file, idle).unwrap();
        assert_eq!(line(&file), "squeeze: bound 1 slot, sparse 0 nodes, dense 0");
        std::fs::write(&file, "{").unwrap();
        assert!(line(&file).contains("cannot be read"));
    }
}
