//! Calls of the attention op on one GPU: which of them are sparse, and what is launched for them.

use std::sync::Arc;

use super::super::op::Node;
use super::super::runtime::{enter, selection, snapshot, Snapshot};
use super::super::stats::Reason;
use super::launch::{cut, dense_call, prefill, Launch};
use super::make::min_prefix_of;
use super::places::Places;
use super::plan::{Counted, Share};
use crate::attention::cuda::{
    self, Attention, Bound, Buffer, Call, Device, Error, Prefill, Stream, Workspace, MAX_PREFILL_ROWS, MAX_ROWS,
};
use crate::attention::{Problem, Rotation};

/// What is known and held on one GPU.
pub struct Planner {
    pub gpu: Arc<Device>,
    pub places: Places,
    /// Shared by all plans that it is large enough for.
    pub(super) workspace: Option<Arc<Workspace>>,
}

/// Runs after which a plan whose caches do not hold their prefix is looked at again, at most.
const LONGEST_PAUSE: u32 = 64;

/// Runs until a plan is made anew, where something of it was not settled: twice as many each time.
#[derive(Clone, Copy)]
pub(super) struct Pause {
    due: u32,
    length: u32,
}

impl Pause {
    /// That of a new plan; `before`: of the one that it takes the place of.
    pub(super) fn after(before: Option<Pause>) -> Pause {
        let length = before.map_or(1, |p| (2 * p.length).min(LONGEST_PAUSE));
        Pause { due: length, length }
    }

    /// Before a run: may the plan be used as it is?
    pub(super) fn lasts(&mut self, settled: bool) -> bool {
        self.due = if settled { self.length } else { self.due.saturating_sub(1) };
        settled || self.due > 0
    }
}

/// A node whose cache is known.
struct Taken<'a> {
    at: usize,
    node: &'a Node,
    problem: Problem,
    snapshot: Arc<Snapshot>,
}

/// What computes the sparse ones of some nodes, and what it reads of ours.
#[derive(Default)]
pub struct Planned {
    /// By the node's place.
    pub launches: Vec<(usize, Launch)>,
    pub counted: Vec<Counted>,
    /// Query rows of the first.
    pub n_row: usize,
    /// Why the others are dense.
    pub dense: Vec<Reason>,
    pub rows: Vec<Buffer>,
    pub workspace: Option<Arc<Workspace>>,
}

impl Planner {
    /// For a GPU of which nothing is known.
    pub fn new(gpu: &Arc<Device>) -> Planner {
        Planner { gpu: gpu.clone(), places: Places::default(), workspace: None }
    }

    /// Why a node is dense whatever its cache holds, if so.
    fn refused(&self, node: &Node, snapshot: &Snapshot) -> Result<Problem, Reason> {
        let (p, config) = (node.problem?, &snapshot.config);
        let (n_prefix, n_row) = (node.index.meta().n_prefix(), p.n_row());
        if n_prefix < config.min_prefix.unwrap_or_else(|| min_prefix_of(&node.index)) {
            return Err(Reason::Short);
        }
        if n_row > MAX_ROWS && (config.tile < 2 || n_row > MAX_PREFILL_ROWS) {
            return Err(Reason::Prefill);
        }
        if p.k.ne[3] != p.v.ne[3] || p.q.ne[3] % p.k.ne[3] != 0 {
            return Err(Reason::Shape);
        }
        Ok(p)
    }

    /// Are a call's arrays in this GPU's memory?
    pub(super) fn is_here(&self, p: &Problem) -> Result<bool, Error> {
        let arrays = [Some(p.q), Some(p.k), Some(p.v), Some(p.dst), p.mask];
        cuda::is_on(&self.gpu, arrays.iter().flatten().map(|array| array.data as u64))
    }

    /// Plans nodes by their places in a graph. Waits for the device where a cache is new.
    ///
    /// # Errors
    /// The driver refuses, or memory is short.
    pub fn plan(&mut self, found: &[(usize, Node)], stream: &Stream) -> Result<Planned, Error> {
        let mut planned = Planned::default();
        let mut taken = Vec::new();
        for (at, node) in found {
            let snapshot = {
                let _entered = enter(&node.scope);
                snapshot()
            };
            if snapshot.config.disable || snapshot.config.force {
                continue;
            }
            match self.refused(node, &snapshot) {
                Ok(problem) if !self.is_here(&problem)? => planned.dense.push(Reason::Type),
                Ok(problem) => match self.places.learn(node, &problem, &self.gpu, stream) {
                    Ok(()) => taken.push(Taken { at: *at, node, problem, snapshot }),
                    Err(Error::Unsupported { .. }) => planned.dense.push(Reason::Kernel),
                    Err(error) => return Err(error),
                },
                Err(reason) => planned.dense.push(reason),
            }
        }
        let places = std::mem::take(&mut self.places);
        let made = self.launches(&places, &taken, &mut planned);
        self.places = places;
        made.map(|()| planned)
    }

    /// Plans the nodes whose caches hold their prefix.
    fn launches(&mut self, places: &Places, taken: &[Taken<'_>], planned: &mut Planned) -> Result<(), Error> {
        let mut bound = Vec::new();
        for own in taken {
            let (streams, bounds): (Vec<usize>, Vec<&Bound>) =
                places.bounds(own.node, &own.problem).into_iter().unzip();
            if bounds.is_empty() {
                planned.dense.push(Reason::Stale);
                continue;
            }
            let p = &own.problem;
            let stream_of = |row: usize| row / p.q.ne[1] / (p.q.ne[3] / p.k.ne[3]);
            let row = |row| streams.iter().position(|s| *s == stream_of(row)).map_or(-1, |i| i as i32);
            let rows: Vec<i32> = (0..p.n_row()).map(row).collect();
            planned.rows.push(Buffer::of(&self.gpu, "the rows of a graph", &rows)?);
            bound.push((own, bounds, planned.rows[planned.rows.len() - 1].address()));
        }
        let mut calls = Vec::new();
        let mut bytes = 0;
        for (own, bounds, rows) in &bound {
            let call = Call {
                problem: own.problem,
                rotation: Rotation::default(),
                layer: own.node.layer,
                selection: selection(&own.snapshot.config, own.node.index.meta()),
                rows: *rows,
                seen: false,
                bounds,
                first_stream: 0,
            };
            let many = prefill(&call, own.snapshot.config.tile);
            let needed = match &many {
                Some(many) => Prefill::bytes_for(&self.gpu, many),
                None => Workspace::bytes_for(&self.gpu, &[&call]),
            };
            match needed {
                Ok(needed) => {
                    bytes = bytes.max(needed);
                    calls.push((own, call, many));
                }
                Err(Error::Unsupported { .. }) => planned.dense.push(Reason::Kernel),
                Err(error) => return Err(error),
            }
        }
        if calls.is_empty() {
            return Ok(());
        }
        let workspace = self.workspace(bytes)?;
        for (own, call, many) in &calls {
            let launch = Launch::new(&self.gpu, call, many.as_ref(), &workspace)?;
            let meta = own.node.index.meta();
            let share = Share { n_sink: meta.n_sink as usize, n_key: meta.n_prefix() - meta.n_window as usize };
            planned.counted.push(launch.counted(own.problem.n_row(), own.problem.k.ne[2], Some(share)));
            planned.launches.push((own.at, launch));
        }
        planned.n_row = calls[0].0.problem.n_row();
        planned.workspace = Some(workspace);
        Ok(())
    }

    /// A workspace of so many bytes at least.
    pub(super) fn workspace(&mut self, bytes: usize) -> Result<Arc<Workspace>, Error> {
        match &self.workspace {
            Some(workspace) if workspace.bytes() >= bytes => Ok(workspace.clone()),
            _ => Ok(self.workspace.insert(Arc::new(Workspace::of_bytes(&self.gpu, bytes)?)).clone()),
        }
    }

    /// What computes a call over every visible cell; `rows`: device address of a -1 for each of its query rows.
    ///
    /// # Errors
    /// The kernels do not take it, or memory is short.
    pub fn dense(&mut self, problem: &Problem, rows: u64) -> Result<(Vec<Launch>, Arc<Workspace>), Error> {
        let whole = dense_call(problem, rows);
        let many = prefill(&whole, 1).and_then(|many| Some((Prefill::bytes_for(&self.gpu, &many).ok()?, many)));
        if let Some((bytes, many)) = many {
            let workspace = self.workspace(bytes)?;
            return Ok((vec![Launch::Prefill(Box::new(Prefill::new(&self.gpu, &many, &workspace)?))], workspace));
        }
        let parts: Vec<Call<'_>> = cut(problem).into_iter().map(|part| dense_call(&part, rows)).collect();
        let workspace = self.workspace(Workspace::bytes_for(&self.gpu, &parts.iter().collect::<Vec<_>>())?)?;
        let launch = |call| Ok(Launch::Decode(Box::new(Attention::new(&self.gpu, call, &workspace)?)));
        Ok((parts.iter().map(launch).collect::<Result<_, Error>>()?, workspace))
    }
}
