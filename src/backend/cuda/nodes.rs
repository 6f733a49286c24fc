//! Graphs with nodes of the attention op ([`super::super::op`]), which the stock CUDA backend does not know: each is computed by
//! our kernels, or (what of it is dense) by the stock backend as the FLASH_ATTN_EXT node that it would otherwise be.

use std::sync::Arc;

use ggml_sys as sys;

use super::super::op::{self, Node};
use super::super::runtime::{count, enter, snapshot, Scope, Snapshot};
use super::super::stats::{log, Reason};
use super::super::tensor::Tensor;
use super::plan::{Failure, Left, Plan, Tally};
use super::planner::{Pause, Planned};
use super::stock::Stock;
use super::survey;
use super::{Instance, Ready};
use crate::attention::cuda::{Buffer, Error};
use crate::attention::Problem;

/// Planned graphs that are kept.
const GRAPHS_MAX: usize = 8;

/// What a plan is made for: place in the graph, call, and what the node's caches are verified under.
type Asked = (usize, Option<Problem>, usize, u64);

/// A planned graph.
pub(super) struct NodeGraph {
    uid: u64,
    n_node: usize,
    asked: Vec<Asked>,
    snapshot: Arc<Snapshot>,
    version: u64,
    plan: Plan,
    /// Which binding each row has; read by the plan's kernels.
    _rows: Vec<Buffer>,
    scope: Arc<Scope>,
    /// Of nodes that the stock backend computes.
    dense: Vec<Reason>,
    pause: Pause,
}

/// A graph's list of nodes in which the stock backend's stand for ours.
struct Substituted {
    // boxed: the list holds their addresses
    #[allow(clippy::vec_box)]
    _stock: Vec<Box<sys::ggml_tensor>>,
    list: Vec<*mut sys::ggml_tensor>,
}

fn asked(found: &[(usize, Node)]) -> Vec<Asked> {
    let of = |(at, node): &(usize, Node)| {
        let (state, generation) = node.identity();
        (*at, node.problem.ok(), state, generation)
    };
    found.iter().map(of).collect()
}

/// The nodes of the attention op in a graph, by their places.
///
/// # Safety
/// The graph is live, and so are the contexts of such nodes.
unsafe fn find(graph: *const sys::ggml_cgraph) -> Vec<(usize, Node)> {
    // SAFETY: the contract.
    unsafe {
        let nodes = std::slice::from_raw_parts((*graph).nodes, (*graph).n_nodes.max(0) as usize);
        let own = nodes.iter().enumerate().filter(|(_, node)| op::is_node(&***node));
        own.filter_map(|(at, node)| Some((at, op::node(Tensor::new(*node)?)?))).collect()
    }
}

/// # Safety
/// As for `find`, which has found them there.
unsafe fn substitute(graph: *const sys::ggml_cgraph, found: &[(usize, Node)]) -> Substituted {
    // SAFETY: the contract.
    let nodes = unsafe { std::slice::from_raw_parts((*graph).nodes, (*graph).n_nodes.max(0) as usize) };
    let (mut stock, mut list) = (Vec::new(), nodes.to_vec());
    for (at, _) in found {
        // SAFETY: a live node.
        let Some(own) = op::stock_node(unsafe { &*nodes[*at] }) else { continue };
        let mut own = Box::new(own);
        list[*at] = &mut *own;
        stock.push(own);
    }
    Substituted { _stock: stock, list }
}

impl Instance {
    /// Computes a graph with nodes of the attention op; `None` where it has none.
    ///
    /// # Safety
    /// As ggml calls a backend, and the contexts of such nodes live.
    pub(super) unsafe fn compute_nodes(
        &mut self,
        graph: *mut sys::ggml_cgraph,
        stock: &Stock<'_>,
        snapshot: &Arc<Snapshot>,
    ) -> Option<sys::ggml_status> {
        // SAFETY: the contract.
        let (found, mut ours) = unsafe { (find(graph), *graph) };
        if found.is_empty() {
            return None;
        }
        // SAFETY: as above.
        let mut substituted = unsafe { substitute(graph, &found) };
        ours.nodes = substituted.list.as_mut_ptr();
        ours.uid = 0;
        let Some(ready) = self.ready(stock, snapshot) else {
            for (_, node) in &found {
                let _entered = enter(&node.scope);
                count(|s| s.dense(Reason::Kernel));
            }
            return Some(stock.compute(&mut ours));
        };
        // SAFETY: a live graph.
        let uid = unsafe { (*graph).uid };
        Some(ready.nodes(&mut ours, uid, &found, stock))
    }
}

impl Ready {
    fn nodes(
        &mut self,
        graph: &mut sys::ggml_cgraph,
        uid: u64,
        found: &[(usize, Node)],
        stock: &Stock<'_>,
    ) -> sys::ggml_status {
        if self.bindings.drop_all(&self.snapshot.clone(), "a graph of another kind is computed") {
            self.graphs.clear();
        }
        let planned = self.gpu.enter().and_then(|()| self.node_graph(graph, uid, found, stock));
        let at = match planned {
            Ok(at) => at,
            Err(error) => {
                self.node_graphs.clear();
                self.say(&error);
                return stock.compute(graph);
            }
        };
        let own = &mut self.node_graphs[at];
        {
            let _entered = enter(&own.scope);
            count(|s| own.dense.iter().for_each(|reason| s.dense(*reason)));
        }
        match own.plan.run(graph, stock, &mut self.lanes) {
            Ok(None) => sys::GGML_STATUS_SUCCESS,
            Err(Failure::Stock(code)) => code,
            Ok(Some(Left { error, n_node })) => {
                {
                    let _entered = enter(&own.scope);
                    count(|s| (0..n_node).for_each(|_| s.dense(Reason::Kernel)));
                }
                self.node_graphs.clear();
                self.say(&error);
                sys::GGML_STATUS_SUCCESS
            }
            Err(Failure::Ours(error)) => {
                log(format_args!("{error}; the graph's result is refused (GGML_STATUS_FAILED)"));
                self.node_graphs.clear();
                sys::GGML_STATUS_FAILED
            }
        }
    }

    /// Books what such graphs have counted.
    pub(super) fn settle_nodes(&mut self) {
        for own in &mut self.node_graphs {
            let _entered = enter(&own.scope);
            if let Some(tally) = &mut own.plan.tally {
                count(|s| tally.settle(s, false));
            }
        }
    }

    /// The plan of a graph: one that is known, or a new one.
    fn node_graph(
        &mut self,
        graph: &sys::ggml_cgraph,
        uid: u64,
        found: &[(usize, Node)],
        stock: &Stock<'_>,
    ) -> Result<usize, Error> {
        self.settle_nodes();
        let (asked, n_node, scope) = (asked(found), graph.n_nodes.max(0) as usize, found[0].1.scope.clone());
        let snapshot = {
            let _entered = enter(&scope);
            snapshot()
        };
        let mut before = None;
        let same = |own: &NodeGraph| own.uid == uid && own.n_node == n_node && own.asked == asked;
        if let Some(at) = self.node_graphs.iter().position(same) {
            let own = &mut self.node_graphs[at];
            let is_current = own.version == self.planner.places.version && Arc::ptr_eq(&own.snapshot, &snapshot);
            let settled =
                own.dense.iter().all(|r| *r != Reason::Stale) && own.plan.tally.as_ref().is_none_or(|t| t.unbound == 0);
            if own.pause.lasts(settled) && is_current {
                return Ok(at);
            }
            before = Some(own.pause);
            self.node_graphs.remove(at);
        }
        // SAFETY: ggml hands us a live graph, in whose list our own tensors stand for some.
        let list = unsafe { std::slice::from_raw_parts(graph.nodes, n_node) };
        // SAFETY: as above.
        let tensors: Vec<Tensor> = list.iter().filter_map(|t| unsafe { Tensor::new(*t) }).collect();
        let capture = uid != 0 && survey::can_be_captured(&tensors);
        self.lanes.follow(stock)?;
        let Planned { launches, counted, n_row, dense, rows, workspace } =
            self.planner.plan(found, &self.lanes.stream)?;
        let mut plan = Plan::default();
        if !launches.is_empty() {
            let tally = Tally::new(&self.gpu, counted, n_row, Vec::new())?;
            let steps = launches.into_iter().enumerate();
            let steps = steps.map(|(i, (at, launch))| (at, launch.step(tally.address(i)))).collect();
            plan = Plan { tally: Some(tally), ..Plan::of(steps, n_node, capture, workspace) };
        }
        let version = self.planner.places.version;
        self.node_graphs.retain(|own| own.version == version);
        if self.node_graphs.len() == GRAPHS_MAX {
            self.node_graphs.remove(0);
        }
        let pause = Pause::after(before);
        let own = NodeGraph { uid, n_node, asked, snapshot, version, plan, _rows: rows, scope, dense, pause };
        self.node_graphs.push(own);
        Ok(self.node_graphs.len() - 1)
    }
}
