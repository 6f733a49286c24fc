//! The attention call on arrays in a GPU's memory, put on a stream of a host without ggml.

use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::super::op::{AttendError, Node};
use super::super::runtime::{count, enter, snapshot, Scope, Snapshot};
use super::super::stats::Reason;
use super::launch::Launch;
use super::plan::Tally;
use super::planner::{Pause, Planned, Planner};
use crate::attention::cuda::{Buffer, Device, Error, Event, Stream, Workspace, MAX_PREFILL_ROWS};
use crate::attention::Problem;

/// Calls that are kept ready.
const CALLS_MAX: usize = 64;

/// A call that is ready to be put on the stream.
struct Ready {
    problem: Problem,
    /// The node's, and what its cache was verified under.
    node: (usize, u64),
    snapshot: Arc<Snapshot>,
    version: u64,
    launches: Vec<Launch>,
    tally: Option<Tally>,
    dense: Option<Reason>,
    /// What the kernels read and write.
    _held: (Vec<Buffer>, Arc<Workspace>),
    pause: Pause,
}

/// One stream of one GPU, as a context uses it.
pub struct Calls {
    ordinal: usize,
    stream: Stream,
    planner: Planner,
    ready: Vec<Ready>,
    dense_rows: Buffer,
    done: Event,
    scope: Arc<Scope>,
}

impl Calls {
    /// # Errors
    /// The GPU cannot be used.
    ///
    /// # Safety
    /// `raw` is null or a stream of the primary context of GPU `ordinal`, and outlives this.
    pub unsafe fn new(ordinal: usize, raw: CUstream, scope: &Arc<Scope>) -> Result<Calls, Error> {
        let gpu = Device::shared(ordinal)?;
        gpu.enter()?;
        Ok(Calls {
            ordinal,
            // SAFETY: by contract; null is the default stream.
            stream: unsafe { Stream::of_host(&gpu, raw) },
            ready: Vec::new(),
            dense_rows: Buffer::of(&gpu, "the rows of a call", &[-1i32; MAX_PREFILL_ROWS])?,
            done: Event::new(&gpu)?,
            scope: scope.clone(),
            planner: Planner::new(&gpu),
        })
    }

    /// Is it the one for this stream?
    pub fn is_of(&self, ordinal: usize, raw: CUstream) -> bool {
        self.ordinal == ordinal && self.stream.raw() == raw
    }

    /// Books what calls that are done have counted; `wait`: all of them.
    pub fn settle(&mut self, wait: bool) {
        if wait && self.planner.gpu.enter().and_then(|()| self.stream.synchronize()).is_err() {
            return;
        }
        let _entered = enter(&self.scope);
        count(|stats| {
            let tallies = self.ready.iter_mut().filter_map(|own| own.tally.as_mut());
            tallies.for_each(|tally| tally.settle(stats, false));
        });
    }

    /// Puts a call on the stream: sparse where the node's index fits it and its cache holds the prefix, dense else and without
    /// one. Waits for the device where a cache is new or may have changed.
    ///
    /// # Errors
    /// See [`AttendError`]; the output is then what it was, or written in part.
    ///
    /// # Safety
    /// The arrays are the GPU's memory, valid in all of their extents until the stream has come past the call.
    pub unsafe fn launch(&mut self, problem: &Problem, node: Option<Result<Node, Reason>>) -> Result<(), AttendError> {
        self.planner.gpu.enter()?;
        self.settle(false);
        let at = self.ready(problem, node)?;
        let own = &mut self.ready[at];
        if let Some(reason) = own.dense {
            let _entered = enter(&self.scope);
            count(|s| s.dense(reason));
        }
        for launch in &own.launches {
            // SAFETY: the contract; the workspace is used by one call after the other.
            unsafe { launch.start(&self.stream)? };
        }
        if let Some(tally) = &mut own.tally {
            // SAFETY: both live as long as the call is kept, which is dropped when the device is done with it.
            unsafe { tally.collect(&self.stream)? };
        }
        Ok(self.done.record(&self.stream)?)
    }

    /// The call's place among those kept.
    fn ready(&mut self, problem: &Problem, node: Option<Result<Node, Reason>>) -> Result<usize, AttendError> {
        let snapshot = {
            let _entered = enter(&self.scope);
            snapshot()
        };
        let number = match &node {
            Some(Ok(node)) => node.identity(),
            _ => (0, 0),
        };
        let mut before = None;
        let same = |own: &Ready| own.problem == *problem && own.node == number;
        if let Some(at) = self.ready.iter().position(same) {
            let own = &mut self.ready[at];
            let current = own.version == self.planner.places.version && Arc::ptr_eq(&own.snapshot, &snapshot);
            let settled = own.dense != Some(Reason::Stale) && own.tally.as_ref().is_none_or(|t| t.unbound == 0);
            if own.pause.lasts(settled) && current {
                return Ok(at);
            }
            before = Some(own.pause);
            self.drop_call(at)?;
        }
        if !self.planner.is_here(problem)? {
            let (got, want) = ("elsewhere".to_string(), "device memory of this GPU");
            return Err(Error::Unsupported { what: "the memory of an array", got, want }.into());
        }
        let mut dense = None;
        let mut planned = Planned::default();
        match node {
            Some(Ok(node)) => {
                planned = self.planner.plan(&[(0, node)], &self.stream)?;
                dense = planned.dense.pop();
            }
            Some(Err(reason)) => dense = Some(reason),
            None => {}
        }
        let Planned { launches, counted, n_row, rows, workspace, .. } = planned;
        let (launches, tally, workspace) = match workspace {
            Some(workspace) if !launches.is_empty() => {
                let tally = Tally::new(&self.planner.gpu, counted, n_row, Vec::new())?;
                let of = |(i, (_, mut launch)): (usize, (usize, Launch))| {
                    launch.count_at(tally.address(i));
                    launch
                };
                (launches.into_iter().enumerate().map(of).collect(), Some(tally), workspace)
            }
            _ => {
                let (launches, workspace) = self.planner.dense(problem, self.dense_rows.address())?;
                (launches, None, workspace)
            }
        };
        let version = self.planner.places.version;
        for old in (0..self.ready.len()).rev() {
            if self.ready[old].version != version {
                self.drop_call(old)?;
            }
        }
        if self.ready.len() == CALLS_MAX {
            self.drop_call(0)?;
        }
        let (pause, problem, held) = (Pause::after(before), *problem, (rows, workspace));
        self.ready.push(Ready { problem, node: number, snapshot, version, launches, tally, dense, _held: held, pause });
        Ok(self.ready.len() - 1)
    }

    /// Forgets a call once the device is done with all.
    fn drop_call(&mut self, at: usize) -> Result<(), Error> {
        if !self.done.is_past() {
            self.stream.synchronize()?;
        }
        self.settle(false);
        self.ready.remove(at);
        Ok(())
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.settle(true);
    }
}
