//! Attention on an NVIDIA GPU inside an unmodified llama.cpp: what a patched CUDA backend does with each graph.
//!
//! `survey` reads a graph, `bindings` knows which cells hold which index, `plan` puts a graph on streams, `stock` calls the
//! backend's own functions. Which row is sparse is decided on the device in every graph; the host decides only what is
//! launched, and waits for the device only where a new graph may bring a new binding.

mod bindings;
mod calls;
mod launch;
mod make;
mod nodes;
mod places;
mod plan;
mod planner;
mod seen;
mod stock;
mod survey;

use std::sync::Arc;

use ggml_sys as sys;

use self::bindings::Bindings;
pub use self::calls::Calls;
use self::nodes::NodeGraph;
use self::plan::{Failure, Lanes, Left, Plan};
use self::planner::Planner;
pub use self::stock::Stock;
use self::survey::Survey;
use super::layers::Layers;
use super::op;
use super::runtime::{count, Snapshot};
use super::stats::{log, Reason};
use super::tensor::Tensor;
use crate::attention::cuda::{Buffer, Device, Error, MAX_PREFILL_ROWS};

/// Planned graphs that are kept.
const GRAPHS_MAX: usize = 8;

/// State of one backend instance.
pub struct Instance {
    ordinal: Result<usize, String>,
    state: State,
}

enum State {
    New,
    /// Said why; everything is left to the stock backend.
    Refused,
    Ready(Box<Ready>),
}

/// A planned graph by its number.
struct Known {
    uid: u64,
    /// Lowest and deepest layer whose cache it has.
    layers: Option<(u32, u32)>,
    plan: Plan,
    /// Has it attention nodes? What is counted of them in each run: those left to the stock backend, and those forced.
    attends: bool,
    dense: Vec<Reason>,
    forced: u64,
}

struct Ready {
    gpu: Arc<Device>,
    lanes: Lanes,
    layers: Layers,
    bindings: Bindings,
    /// Settings that the plans are made under.
    snapshot: Arc<Snapshot>,
    graphs: Vec<Known>,
    /// Of graphs with nodes of the attention op, and the caches that these read.
    node_graphs: Vec<NodeGraph>,
    planner: Planner,
    /// Rows of a call without bindings: all dense.
    dense_rows: Buffer,
    said: Option<Error>,
}

impl Known {
    /// Has it rows that could be sparse if more were bound?
    fn may_bind(&self) -> bool {
        match &self.plan.map {
            Some(map) if self.plan.n_attended() > 0 => map.n_sparse() < map.n_row(),
            _ => self.dense.contains(&Reason::Unbound),
        }
    }
}

impl Instance {
    /// For a backend of the GPU with this PCI bus id.
    pub fn new(pci_bus_id: &str) -> Instance {
        Instance { ordinal: Device::with_bus_id(pci_bus_id).map_err(|e| e.to_string()), state: State::New }
    }

    /// Computes a graph, with what is bound computed sparse.
    pub fn compute(
        &mut self,
        graph: *mut sys::ggml_cgraph,
        stock: &Stock<'_>,
        snapshot: &Arc<Snapshot>,
    ) -> sys::ggml_status {
        if op::is_in_use() {
            // SAFETY: ggml hands us a live graph; contexts outlive the graphs with their nodes.
            if let Some(status) = unsafe { self.compute_nodes(graph, stock, snapshot) } {
                return status;
            }
        }
        let config = &snapshot.config;
        let wanted = config.force || config.attention_free || !snapshot.indexes.is_empty();
        if config.disable || !wanted {
            if let State::Ready(ready) = &mut self.state {
                // Writes pass unseen from here on: bindings must be found anew.
                ready.forget();
            }
            return stock.compute(graph);
        }
        let Some(ready) = self.ready(stock, snapshot) else { return stock.compute(graph) };
        ready.compute(graph, stock, snapshot)
    }

    /// Books what the last graphs have counted; waits for them.
    pub fn settle(&mut self) {
        if let State::Ready(ready) = &mut self.state {
            if ready.gpu.enter().is_ok() && ready.lanes.stream.synchronize().is_ok() {
                ready.settle();
            }
        }
    }

    /// Leaves everything to the stock backend from now on.
    pub fn abandon(&mut self) {
        self.state = State::Refused;
    }

    /// The GPU's part, made at first need.
    fn ready(&mut self, stock: &Stock<'_>, snapshot: &Arc<Snapshot>) -> Option<&mut Ready> {
        if matches!(self.state, State::New) {
            let made = match (&self.ordinal, stock.is_complete()) {
                (Ok(ordinal), true) => Ready::new(*ordinal, snapshot).map_err(|e| e.to_string()),
                (Ok(_), false) => Err("this CUDA backend has no events".to_string()),
                (Err(error), _) => Err(error.clone()),
            };
            self.state = match made {
                Ok(ready) => State::Ready(Box::new(ready)),
                Err(error) => {
                    log(format_args!("{error}; attention on this GPU stays llama.cpp's"));
                    State::Refused
                }
            };
        }
        match &mut self.state {
            State::Ready(ready) => Some(ready),
            _ => None,
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.settle();
    }
}

impl Ready {
    fn new(ordinal: usize, snapshot: &Arc<Snapshot>) -> Result<Ready, Error> {
        let gpu = Device::shared(ordinal)?;
        gpu.enter()?;
        Ok(Ready {
            lanes: Lanes::new(&gpu)?,
            layers: Layers::default(),
            bindings: Bindings::default(),
            snapshot: snapshot.clone(),
            graphs: Vec::new(),
            node_graphs: Vec::new(),
            planner: Planner::new(&gpu),
            dense_rows: Buffer::of(&gpu, "the rows of a graph", &[-1i32; MAX_PREFILL_ROWS])?,
            said: None,
            gpu,
        })
    }

    /// Says what cannot be done, not again and again.
    fn say(&mut self, error: &Error) {
        if self.said.as_ref() != Some(error) {
            log(format_args!("{error}; attention on {} stays llama.cpp's for now", self.gpu.name()));
            self.said = Some(error.clone());
        }
    }

    fn forget(&mut self) {
        if self.gpu.enter().is_ok() {
            self.settle();
        }
        self.graphs.clear();
        self.node_graphs.clear();
        self.bindings.all.clear();
    }

    /// Books what graphs that are done have counted.
    fn settle(&mut self) {
        let log_graph = self.snapshot.config.log > 1;
        count(|stats| {
            let tallies = self.graphs.iter_mut().filter_map(|g| g.plan.tally.as_mut());
            tallies.for_each(|tally| tally.settle(stats, log_graph));
        });
        self.settle_nodes();
    }

    fn compute(
        &mut self,
        graph: *mut sys::ggml_cgraph,
        stock: &Stock<'_>,
        snapshot: &Arc<Snapshot>,
    ) -> sys::ggml_status {
        let known = match self.gpu.enter().and_then(|()| self.plan(graph, stock, snapshot)) {
            Ok(Some(known)) => known,
            Ok(None) => return stock.compute(graph),
            Err(error) => {
                // Nothing of the graph has been computed yet.
                self.give_up(snapshot);
                self.say(&error);
                return stock.compute(graph);
            }
        };
        match self.graphs[known].plan.run(graph, stock, &mut self.lanes) {
            Ok(None) => sys::GGML_STATUS_SUCCESS,
            Err(Failure::Stock(code)) => code,
            // Its rows may not have been checked against what it writes.
            Ok(Some(Left { error, n_node })) => {
                count(|s| (0..n_node).for_each(|_| s.dense(Reason::Kernel)));
                self.give_up(snapshot);
                self.say(&error);
                sys::GGML_STATUS_SUCCESS
            }
            Err(Failure::Ours(error)) => {
                log(format_args!("{error}; the graph's result is refused (GGML_STATUS_FAILED)"));
                self.give_up(snapshot);
                sys::GGML_STATUS_FAILED
            }
        }
    }

    /// After a failure: memory that is short now is not asked for with every token.
    fn give_up(&mut self, snapshot: &Snapshot) {
        self.graphs.clear();
        self.bindings.give_up(snapshot);
    }

    /// The plan of a graph; `None`: there is nothing of ours in it.
    fn plan(
        &mut self,
        graph: *mut sys::ggml_cgraph,
        stock: &Stock<'_>,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Option<usize>, Error> {
        self.settle();
        if !Arc::ptr_eq(&self.snapshot, snapshot) {
            self.snapshot = snapshot.clone();
            self.graphs.clear();
        }
        if self.bindings.follow(snapshot) | self.bindings.drop_ended(snapshot) {
            self.graphs.clear();
        }
        // SAFETY: ggml hands us a live graph with n_nodes live nodes.
        let (uid, nodes) = unsafe {
            let nodes = std::slice::from_raw_parts((*graph).nodes, (*graph).n_nodes.max(0) as usize);
            ((*graph).uid, nodes.iter().filter_map(|&n| Tensor::new(n)))
        };
        let known = self.graphs.iter().position(|g| uid != 0 && g.uid == uid);
        if let Some(at) = known {
            self.bindings.enter(self.graphs[at].layers);
            if !(self.graphs[at].may_bind() && self.bindings.wants_search()) {
                return Ok(Some(self.book(at)));
            }
        }
        let nodes: Vec<Tensor> = nodes.collect();
        let survey = Survey::of(&nodes, snapshot, &mut self.layers);
        if known.is_none() {
            self.bindings.enter(survey.layers);
        }
        if let Some(at) = known {
            if !self.search_again(&survey, stock, snapshot)? {
                return Ok(Some(self.book(at)));
            }
        }
        if survey.opaque && self.bindings.drop_all(snapshot, "the cache is rewritten as a whole") {
            self.graphs.clear();
        }
        let attends = !(survey.sites.is_empty() && survey.dense.is_empty());
        if !attends && (survey.written.is_empty() || self.bindings.all.is_empty()) {
            return Ok(None);
        }
        let (plan, dense, forced) = self.make(&survey, nodes.len(), stock, snapshot)?;
        if self.graphs.len() == GRAPHS_MAX {
            self.graphs.remove(0);
        }
        self.graphs.push(Known { uid, layers: survey.layers, plan, attends, dense, forced });
        Ok(Some(self.book(self.graphs.len() - 1)))
    }

    /// Counts a graph that is about to run, and makes it the last to be forgotten: its new place.
    fn book(&mut self, at: usize) -> usize {
        let known = self.graphs.remove(at);
        count(|s| {
            s.graphs += u64::from(known.attends);
            s.nodes_forced += known.forced;
            known.dense.iter().for_each(|reason| s.dense(*reason));
            if known.plan.is_idle() {
                (0..known.plan.n_attended()).for_each(|_| s.dense(Reason::Unbound));
            }
        });
        self.graphs.push(known);
        self.graphs.len() - 1
    }
}

#[cfg(test)]
mod tests;
