//! What is done with one graph of a CUDA backend, and how it is put on streams: eagerly, part by part, or as one captured graph.

use std::ops::Range;
use std::sync::Arc;

use ggml_sys as sys;

use super::super::stats::{log, Reason, Stats};
use super::stock::{Mark, Stock};
use crate::attention::cuda::{
    Attention, Buffer, Device, Error, Event, Executable, Mapped, Prefill, RowMap, Stream, Workspace,
};

/// A part of a graph, in its order.
pub enum Step {
    /// Nodes that the stock backend computes.
    Stock(Range<usize>),
    /// An attention node on our kernels: launches for up to 16 rows each.
    Attend(Vec<Attention>),
    /// One of many rows.
    Prefill(Box<Prefill>),
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
    Ours(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Ours(error)
    }
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

    /// Puts the graph on the streams. Waits for nothing.
    pub fn run(&mut self, graph: *mut sys::ggml_cgraph, stock: &Stock<'_>, lanes: &mut Lanes) -> Result<(), Failure> {
        // SAFETY: ggml hands us a live graph with n_nodes nodes.
        let (own, nodes) = unsafe {
            let own = *graph;
            (own, std::slice::from_raw_parts(own.nodes, own.n_nodes.max(0) as usize))
        };
        if self.map.is_none() && self.steps.is_empty() {
            return status(stock.compute(graph));
        }
        lanes.follow(stock)?;
        if self.steps.is_empty() || self.is_idle() {
            self.check(lanes)?;
            lanes.lead(stock)?;
            return status(stock.compute(graph));
        }
        self.runs += 1;
        if self.runs > 1 && self.captured.is_none() && self.can_be_captured && !lanes.eager {
            match self.capture(&own, nodes, stock, lanes) {
                Ok(captured) => self.captured = Some(captured),
                Err(Failure::Stock(code)) => return Err(Failure::Stock(code)),
                Err(Failure::Ours(error)) => {
                    lanes.eager = true;
                    log(format_args!("{error}; graphs are computed part by part from now on"));
                }
            }
        }
        match &self.captured {
            // SAFETY: the graph has the same number as the one that was captured, hence the same tensors; all else is kept by
            // the plan and the bindings, without which it is dropped.
            Some(captured) => unsafe { captured.launch(&lanes.stream)? },
            None => self.body(&own, nodes, stock, lanes)?,
        }
        if let Some(tally) = &mut self.tally {
            tally.done.record(&lanes.stream)?;
            tally.pending = true;
        }
        lanes.lead(stock)?;
        Ok(())
    }

    fn check(&self, lanes: &Lanes) -> Result<(), Error> {
        match &self.map {
            // SAFETY: inputs and caches of the graph at hand, bindings that are alive.
            Some(map) => unsafe { map.launch(&lanes.stream) },
            None => Ok(()),
        }
    }

    /// Everything, from our stream and back to it.
    fn body(
        &self,
        graph: &sys::ggml_cgraph,
        nodes: &[*mut sys::ggml_tensor],
        stock: &Stock<'_>,
        lanes: &mut Lanes,
    ) -> Result<(), Failure> {
        self.check(lanes)?;
        for step in &self.steps {
            match step {
                Step::Stock(range) => status(stock.part(graph, &nodes[range.clone()], &mut lanes.mark))?,
                Step::Attend(launches) => {
                    lanes.follow(stock)?;
                    for attention in launches {
                        // SAFETY: tensors of the graph at hand; the workspace is used by one call after the other.
                        unsafe { attention.launch_after_others(lanes.stream.raw())? };
                    }
                    lanes.lead(stock)?;
                }
                Step::Prefill(prefill) => {
                    lanes.follow(stock)?;
                    // SAFETY: as above.
                    unsafe { prefill.launch(lanes.stream.raw())? };
                    lanes.lead(stock)?;
                }
                Step::Zero { at, bytes } => {
                    lanes.follow(stock)?;
                    // SAFETY: the node's own output.
                    unsafe { lanes.stream.zero(*at, *bytes)? };
                    lanes.lead(stock)?;
                }
            }
        }
        lanes.follow(stock)?;
        if let Some(tally) = &self.tally {
            // SAFETY: of one size; both live as long as the plan.
            unsafe { lanes.stream.copy_out(&tally.host, tally.device.address())? };
        }
        Ok(())
    }

    fn capture(
        &self,
        graph: &sys::ggml_cgraph,
        nodes: &[*mut sys::ggml_tensor],
        stock: &Stock<'_>,
        lanes: &mut Lanes,
    ) -> Result<Executable, Failure> {
        lanes.stream.begin_capture()?;
        // The stock backend's stream is drawn in by the first event that it waits for.
        let done = lanes.lead(stock).map_err(Failure::from).and_then(|()| self.body(graph, nodes, stock, lanes));
        let captured = lanes.stream.end_capture();
        done?;
        Ok(captured?)
    }
}

fn status(code: sys::ggml_status) -> Result<(), Failure> {
    match code {
        sys::GGML_STATUS_SUCCESS => Ok(()),
        code => Err(Failure::Stock(code)),
    }
}
