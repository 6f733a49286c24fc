//! Counters of what the plugin did, and its log lines.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::io::Write;
use std::sync::RwLock;

use crate::text::one_line;

/// Why an attention node stayed dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The op does not read a llama.cpp KV cache.
    NoCache,
    /// The layer is not in the index (sliding window, recurrent, MLA).
    Layer,
    /// K or V is not F32, F16, BF16, Q8_0 or Q4_0, or a tensor is not in host memory.
    Type,
    /// A quantised cache in the plain basis (LLAMA_ATTN_ROT_DISABLE), where no index is looked for.
    Basis,
    /// ALiBi.
    Alibi,
    /// Shapes differ from the index's.
    Shape,
    /// The mask is computed in the graph or has a form that rows cannot be read from.
    Mask,
    /// No row sees the whole prefix of an index.
    Unbound,
    /// K or V does not hold the prefix where the attention op of a host's own graph wants it.
    Stale,
    /// The prefix is shorter than sparse attention is worth.
    Short,
    /// So many rows on a GPU that they would visit more cells, each by itself, than a dense kernel does for all of them.
    Rows,
    /// More than 16 query rows on a GPU where tiles are off, or more than the CUDA kernels take at all.
    Prefill,
    /// Head size or strides that our kernels do not take.
    Kernel,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::NoCache => "no cache",
            Reason::Layer => "layer not indexed",
            Reason::Type => "type",
            Reason::Basis => "quantised without rotation",
            Reason::Alibi => "alibi",
            Reason::Shape => "shape",
            Reason::Mask => "mask",
            Reason::Unbound => "unbound",
            Reason::Stale => "stale",
            Reason::Short => "short prefix",
            Reason::Rows => "many rows",
            Reason::Prefill => "prefill",
            Reason::Kernel => "kernel",
        }
    }
}

/// Totals since the start or the last reset.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Graphs that were looked at (an index or FORCE was in force).
    pub graphs: u64,
    /// Attention nodes with at least one sparse row.
    pub nodes_sparse: u64,
    /// Attention nodes that ran on our kernels because of FORCE.
    pub nodes_forced: u64,
    /// Attention nodes left to the stock kernel, by reason.
    pub nodes_dense: BTreeMap<&'static str, u64>,
    /// Query rows (per node) that were sparse.
    pub rows_sparse: u64,
    /// Mean over sparse rows and KV heads of the kept share of the prefix keys; 0 before the first.
    pub kept_share: f64,
    /// Mean over sparse rows and KV heads of the share of the prefix's attention mass on keys not kept; None unless measured.
    pub missed_share: Option<f64>,
    /// Times an index was bound to cells, and times a binding was dropped.
    pub bound: u64,
    pub unbound: u64,
    pub(crate) kept_sum: f64,
    pub(crate) kept_count: u64,
    pub(crate) missed_sum: f64,
    pub(crate) missed_count: u64,
}

impl Stats {
    pub(crate) fn add_kept(&mut self, share_sum: f64, count: u64) {
        self.kept_sum += share_sum;
        self.kept_count += count;
        if self.kept_count > 0 {
            self.kept_share = self.kept_sum / self.kept_count as f64;
        }
    }

    pub(crate) fn add_missed(&mut self, share_sum: f64, count: u64) {
        self.missed_sum += share_sum;
        self.missed_count += count;
        self.missed_share = (self.missed_count > 0).then(|| self.missed_sum / self.missed_count as f64);
    }

    pub(crate) fn dense(&mut self, reason: Reason) {
        *self.nodes_dense.entry(reason.name()).or_default() += 1;
    }

    /// Nodes and rows counted since `before`, as the line of one graph with `n_row` query rows says it.
    pub(crate) fn graph_line(&self, before: &Stats, n_row: usize) -> String {
        let sparse = self.nodes_sparse.saturating_sub(before.nodes_sparse);
        let rows = self.rows_sparse.saturating_sub(before.rows_sparse);
        let since = |name: &str, n: u64| n.saturating_sub(before.nodes_dense.get(name).copied().unwrap_or(0));
        let dense = self.nodes_dense.iter().map(|(name, n)| (name, since(name, *n))).filter(|(_, n)| *n > 0);
        let dense: String = dense.map(|(name, n)| format!(", {name}: {n} nodes")).collect();
        let of = rows.checked_div(sparse).unwrap_or(0);
        format!("graph of {n_row} query rows: sparse {sparse} nodes with {of} rows{dense}")
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dense: u64 = self.nodes_dense.values().sum();
        write!(f, "forced {} nodes, sparse {} nodes", self.nodes_forced, self.nodes_sparse)?;
        if self.kept_count > 0 {
            write!(f, " (kept share {:.3})", self.kept_share)?;
        }
        write!(f, ", dense {dense} nodes")?;
        if dense > 0 {
            let reasons: Vec<String> = self.nodes_dense.iter().map(|(name, n)| format!("{name}: {n}")).collect();
            write!(f, " ({})", reasons.join(", "))?;
        }
        write!(f, ", {} graphs, bound {} times, dropped {} times", self.graphs, self.bound, self.unbound)
    }
}

/// Takes the lines that would go to stderr.
pub type LogSink = Box<dyn Fn(&CStr) + Send + Sync>;

static SINK: RwLock<Option<LogSink>> = RwLock::new(None);

/// Where lines go from now on; none: to stderr.
pub fn set_log(sink: Option<LogSink>) {
    *SINK.write().unwrap_or_else(|e| e.into_inner()) = sink;
}

/// One line for people, on stderr (or where the host wants it) in one piece: the host's own threads write there too.
pub(crate) fn log(text: impl fmt::Display) {
    // names in it may come from files
    let line = one_line(&format!("squeeze: {text}"));
    if let Some(sink) = &*SINK.read().unwrap_or_else(|e| e.into_inner()) {
        sink(&CString::new(line).unwrap_or_default());
        return;
    }
    // nobody is left to tell when stderr is gone
    let _ = std::io::stderr().write_all((line + "\n").as_bytes());
}
