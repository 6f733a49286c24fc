//! What is done with one graph of a CUDA backend, and how it is put on streams: eagerly, part by part, or as one captured graph.

use std::ops::Range;
use std::sync::Arc;

use ggml_sys as sys;

use super::super::stats::{log, Reason, Stats};
use super::launch::Launch;
use super::stock::{Mark, Stock};
use crate::attention::cuda::{
    Attention, Buffer, Device, Error, Event, Executable, Mapped, Prefill, RowMap, Stream, Workspace,
};

/// A part of a graph, in its order.
pub enum Step {
    /// Nodes that the stock backend computes.
    Stock(Range<usize>),
    /// An attention node on our kernels.
    Attend(Vec<Launch>),
    /// Zeros in place of attention: what it would cost if it were free (bench).
    Zero { at: u64, bytes: usize },
}

/// What a binding's kept keys are a share of.
#[derive(Clone, Copy)]
pub struct Share {
    pub n_sink: usize,
    /// P - W.
    pub n_key: usize,
}

/// An attention node as it is counted: groups of rows that select for themselves or, in a prefill, of tiles.
pub struct Counted {
    pub groups: Vec<usize>,
    pub n_head_kv: usize,
    pub tiles: bool,
    /// That of all its bindings; none: they are the graph's.
    pub share: Option<Share>,
}

impl Counted {
    fn entries(&self) -> usize {
        self.groups.iter().sum::<usize>() * self.n_head_kv
    }
}

/// What select leaves of each attention node, brought to the host after the graph.
pub struct Tally {
    device: Buffer,
    host: Mapped,
    nodes: Vec<Counted>,
    shares: Vec<Share>,
    n_row: usize,
    done: Event,
    pending: bool,
    /// Nodes that had no sparse row the last time.
    pub unbound: usize,
}

impl Tally {
    /// For nodes of `n_row` query rows.
    ///
    /// # Errors
    /// Memory is short.
    pub fn new(device: &Arc<Device>, nodes: Vec<Counted>, n_row: usize, shares: Vec<Share>) -> Result<Tally, Error> {
        let words: usize = nodes.iter().map(|node| node.entries() * Attention::WORK_WORDS).sum();
        Ok(Tally {
            device: Buffer::new(device, "the counts of a graph", 4 * words)?,
            host: Mapped::new(device, words)?,
            n_row,
            nodes,
            shares,
            done: Event::new(device)?,
            pending: false,
            unbound: 0,
        })
    }

    /// Where node `i` leaves its counts.
    pub fn address(&self, i: usize) -> u64 {
        let before: usize = self.nodes[..i].iter().map(|node| node.entries() * Attention::WORK_WORDS).sum();
        self.device.address() + 4 * before as u64
    }

    /// Brings the counts to the host, after what is on the stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// This lives until the stream has come so far.
    pub unsafe fn collect(&mut self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: of one size; the rest is the caller's contract.
        unsafe { stream.copy_out(&self.host, self.device.address())? };
        self.done.record(stream)?;
        self.pending = true;
        Ok(())
    }

    /// Adds what a graph that is done has left, once.
    pub fn settle(&mut self, stats: &mut Stats, log_graph: bool) {
        if !self.pending || !self.done.is_past() {
            return;
        }
        self.pending = false;
        self.unbound = 0;
        let before = log_graph.then(|| stats.clone());
        let mut at = 0;
        for node in &self.nodes {
            let (mut rows, mut sum, mut n) = (0, 0.0, 0);
            // Pairs are ordered by KV head, then by row or tile.
            let pairs = node.groups.iter().flat_map(|n| (0..n * node.n_head_kv).map(move |pair| pair < *n));
            for is_first_head in pairs {
                let words = std::array::from_fn(|i| self.host.get(at + i));
                let (bound, n_key, own_rows) = match node.tiles {
                    true => Prefill::counts(&words),
                    false => {
                        let (bound, n_key) = Attention::counts(&words);
                        (bound, n_key, 1)
                    }
                };
                at += Attention::WORK_WORDS;
                let share_of = |b| node.share.or_else(|| self.shares.get(b).copied());
                let Some(share) = bound.and_then(share_of) else { continue };
                let own_rows = own_rows as u64;
                rows += if is_first_head { own_rows } else { 0 };
                sum += own_rows as f64 * (share.n_sink + n_key) as f64 / share.n_key.max(1) as f64;
                n += own_rows;
            }
            match rows {
                0 => {
                    self.unbound += 1;
                    stats.dense(Reason::Unbound);
                }
                _ => stats.nodes_sparse += 1,
            }
            stats.rows_sparse += rows;
            stats.add_kept(sum, n);
        }
        if let Some(before) = before {
            log(stats.graph_line(&before, self.n_row));
        }
    }
}

/// A planned graph.
#[derive(Default)]
pub struct Plan {
    /// Checks bindings and says which row has which; none where nothing is bound.
    pub map: Option<RowMap>,
    /// Empty: the stock backend computes the graph as it is.
    pub steps: Vec<Step>,
    pub tally: Option<Tally>,
    /// Keeps what the launches use.
    pub _workspace: Option<Arc<Workspace>>,
    pub can_be_captured: bool,
    pub captured: Option<Executable>,
    /// Times that it was run on our streams.
    pub runs: u32,
}

/// The streams that a plan runs on.
pub struct Lanes {
    pub stream: Stream,
    pub from_stock: Event,
    pub to_stock: Event,
    pub mark: Mark,
    /// A capture has failed: it is not tried again.
    pub eager: bool,
}

impl Lanes {
    pub fn new(device: &Arc<Device>) -> Result<Lanes, Error> {
        Ok(Lanes {
            stream: Stream::new(device)?,
            from_stock: Event::new(device)?,
            to_stock: Event::new(device)?,
            mark: Mark::default(),
            eager: false,
        })
    }

    /// Ours goes on after the stock backend.
    pub fn follow(&self, stock: &Stock<'_>) -> Result<(), Error> {
        stock.record(&self.from_stock);
        self.stream.wait_for(&self.from_stock)
    }

    /// The stock backend goes on after ours.
    pub fn lead(&self, stock: &Stock<'_>) -> Result<(), Error> {
        self.to_stock.record(&self.stream)?;
        stock.wait(&self.to_stock);
        Ok(())
    }
}

/// Why a graph was not computed.
pub enum Failure {
    /// The stock backend's own status.
    Stock(sys::ggml_status),
    /// The device does not finish what was put on it: what is there is not known.
    Ours(Error),
}

/// Why the steps of a graph ended early.
enum Halt {
    Stock(sys::ggml_status),
    /// Nodes from `next` on are left.
    Ours {
        next: usize,
        error: Error,
    },
}

fn ours(next: usize) -> impl Fn(Error) -> Halt {
    move |error| Halt::Ours { next, error }
}

/// One graph of a host.
struct Graph<'a> {
    raw: *mut sys::ggml_cgraph,
    own: sys::ggml_cgraph,
    nodes: &'a [*mut sys::ggml_tensor],
    stock: &'a Stock<'a>,
}

/// What a run was left to the stock backend for: our error, and how many attention nodes.
pub struct Left {
    pub error: Error,
    pub n_node: usize,
}

impl Plan {
    /// A plan in which `own` (by node) replaces nodes, and the stock backend computes the others.
    pub fn of(
        own: Vec<(usize, Step)>,
        n_node: usize,
        can_be_captured: bool,
        workspace: Option<Arc<Workspace>>,
    ) -> Plan {
        let mut steps = Vec::new();
        let mut next = 0;
        for (node, step) in own {
            if node > next {
                steps.push(Step::Stock(next..node));
            }
            steps.push(step);
            next = node + 1;
        }
        if !steps.is_empty() && next < n_node {
            steps.push(Step::Stock(next..n_node));
        }
        Plan { steps, _workspace: workspace, can_be_captured, ..Plan::default() }
    }

    /// Had no row of the last run a binding, or can none have one now? Then the stock backend computes the graph: its results
    /// are the ones without an index. Looked at again after each run.
    pub fn is_idle(&self) -> bool {
        self.map.as_ref().is_some_and(|map| map.n_sparse() == 0)
    }

    /// Attention nodes that sparse rows would be in.
    pub fn n_attended(&self) -> usize {
        self.tally.as_ref().map_or(0, |t| t.nodes.len())
    }

    /// Puts the graph on the streams. Waits for nothing, unless something of ours cannot be put there: what is left of the
    /// graph is the stock backend's then.
    pub fn run(
        &mut self,
        raw: *mut sys::ggml_cgraph,
        stock: &Stock<'_>,
        lanes: &mut Lanes,
    ) -> Result<Option<Left>, Failure> {
        // SAFETY: ggml hands us a live graph with n_nodes nodes.
        let graph = unsafe {
            let own = *raw;
            Graph { raw, own, nodes: std::slice::from_raw_parts(own.nodes, own.n_nodes.max(0) as usize), stock }
        };
        match self.put(&graph, lanes) {
            Ok(()) => Ok(None),
            Err(Halt::Stock(code)) => Err(Failure::Stock(code)),
            Err(Halt::Ours { next, error }) => {
                // Of what is on our stream nothing may come after what follows.
                lanes.stream.synchronize().map_err(Failure::Ours)?;
                let code = match &graph.nodes[next..] {
                    [] => sys::GGML_STATUS_SUCCESS,
                    _ if next == 0 => stock.compute(raw),
                    left => stock.part(&graph.own, left, &mut lanes.mark),
                };
                match code {
                    sys::GGML_STATUS_SUCCESS => Ok(Some(Left { error, n_node: self.n_own(next) })),
                    code => Err(Failure::Stock(code)),
                }
            }
        }
    }

    /// Our steps from this node on. Those of an idle plan are counted already.
    fn n_own(&self, next: usize) -> usize {
        let (mut node, mut n) = (0, 0);
        if self.is_idle() {
            return 0;
        }
        for step in &self.steps {
            match step {
                Step::Stock(range) => node = range.end,
                _ => {
                    n += usize::from(node >= next);
                    node += 1;
                }
            }
        }
        n
    }

    fn put(&mut self, graph: &Graph<'_>, lanes: &mut Lanes) -> Result<(), Halt> {
        let stock = graph.stock;
        if self.map.is_none() && self.steps.is_empty() {
            return status(stock.compute(graph.raw));
        }
        lanes.follow(stock).map_err(ours(0))?;
        if self.steps.is_empty() || self.is_idle() {
            self.check(lanes).and_then(|()| lanes.lead(stock)).map_err(ours(0))?;
            return status(stock.compute(graph.raw));
        }
        self.runs += 1;
        if self.runs > 1 && self.captured.is_none() && self.can_be_captured && !lanes.eager {
            match self.capture(graph, lanes) {
                Ok(captured) => self.captured = Some(captured),
                Err(Halt::Ours { error, .. }) => {
                    lanes.eager = true;
                    log(format_args!("{error}; graphs are computed part by part from now on"));
                }
                Err(halt) => return Err(halt),
            }
        }
        match &self.captured {
            // SAFETY: the graph has the same number as the one that was captured, hence the same tensors; all else is kept by
            // the plan and the bindings, without which it is dropped.
            Some(captured) => unsafe { captured.launch(&lanes.stream) }.map_err(ours(0))?,
            None => self.body(graph, lanes)?,
        }
        let all = graph.nodes.len();
        if let Some(tally) = &mut self.tally {
            tally.done.record(&lanes.stream).map_err(ours(all))?;
            tally.pending = true;
        }
        lanes.lead(stock).map_err(ours(all))
    }

    fn check(&self, lanes: &Lanes) -> Result<(), Error> {
        match &self.map {
            // SAFETY: inputs and caches of the graph at hand, bindings that are alive.
            Some(map) => unsafe { map.launch(&lanes.stream) },
            None => Ok(()),
        }
    }

    /// Everything, from our stream and back to it.
    fn body(&self, graph: &Graph<'_>, lanes: &mut Lanes) -> Result<(), Halt> {
        let (nodes, stock) = (graph.nodes, graph.stock);
        self.check(lanes).map_err(ours(0))?;
        let mut next = 0;
        for step in &self.steps {
            match step {
                Step::Stock(range) => {
                    status(stock.part(&graph.own, &nodes[range.clone()], &mut lanes.mark))?;
                    next = range.end;
                }
                own => {
                    let done = lanes.follow(stock).and_then(|()| own.start(&lanes.stream));
                    done.and_then(|()| lanes.lead(stock)).map_err(ours(next))?;
                    next += 1;
                }
            }
        }
        lanes.follow(stock).map_err(ours(next))?;
        if let Some(tally) = &self.tally {
            // SAFETY: of one size; both live as long as the plan.
            unsafe { lanes.stream.copy_out(&tally.host, tally.device.address()) }.map_err(ours(next))?;
        }
        Ok(())
    }

    fn capture(&self, graph: &Graph<'_>, lanes: &mut Lanes) -> Result<Executable, Halt> {
        lanes.stream.begin_capture().map_err(ours(0))?;
        // The stock backend's stream is drawn in by the first event that it waits for.
        let done = lanes.lead(graph.stock).map_err(ours(0)).and_then(|()| self.body(graph, lanes));
        let captured = lanes.stream.end_capture();
        done?;
        captured.map_err(ours(0))
    }
}

impl Step {
    /// Puts what is ours on a stream.
    fn start(&self, stream: &Stream) -> Result<(), Error> {
        match self {
            Step::Stock(_) => Ok(()),
            // SAFETY: tensors of the graph at hand; the workspace is used by one call after the other.
            Step::Attend(launches) => launches.iter().try_for_each(|launch| unsafe { launch.start(stream) }),
            // SAFETY: the node's own output.
            Step::Zero { at, bytes } => unsafe { stream.zero(*at, *bytes) },
        }
    }
}

fn status(code: sys::ggml_status) -> Result<(), Halt> {
    match code {
        sys::GGML_STATUS_SUCCESS => Ok(()),
        code => Err(Halt::Stock(code)),
    }
}
