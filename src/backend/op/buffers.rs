//! The same attention call on plain buffers, for hosts without ggml: on threads of ours.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUstream;
use rayon::ThreadPool;

use super::run::Run;
use super::{lock, sparse_at_all, OpContext};
use crate::attention::cpu::{check_problem, Kept, Plan, Unsupported};
use crate::attention::{cuda, Problem};
use crate::backend::cuda::Calls;
use crate::backend::runtime::{count, enter};
use crate::index::Index;

/// Threads of the last number that was asked for.
#[derive(Default)]
pub(super) struct Pool(Mutex<Option<Arc<ThreadPool>>>);

impl Pool {
    fn of(&self, n_threads: usize) -> Result<Arc<ThreadPool>, AttendError> {
        let mut pool = lock(&self.0);
        if let Some(pool) = pool.as_ref().filter(|pool| pool.current_num_threads() == n_threads) {
            return Ok(pool.clone());
        }
        let made = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .thread_name(|i| format!("squeeze-attend-{i}"))
            .build()
            .map_err(|e| AttendError::Threads { n_threads, reason: e.to_string() })?;
        Ok(pool.insert(Arc::new(made)).clone())
    }
}

/// Why a call was not computed.
#[derive(Debug, thiserror::Error)]
pub enum AttendError {
    #[error("{0}")]
    Unsupported(#[from] Unsupported),
    #[error("could not start {n_threads} threads ({reason}): ask for fewer")]
    Threads { n_threads: usize, reason: String },
    #[error("a kernel panicked, please report it: the output holds no result")]
    Panic,
    #[error("{0}")]
    Gpu(#[from] cuda::Error),
}

/// What was computed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Attended {
    /// Query rows that were sparse.
    pub rows_sparse: usize,
    /// Of those rows and their KV heads.
    pub kept: Kept,
}

impl OpContext {
    /// Computes a call: sparse where layer `layer` of the index fits it and K and V hold the prefix in cells 0 to P of each
    /// stream, as in a node of [`attn_ext`](super::attn_ext), dense else and without an index.
    ///
    /// # Errors
    /// See [`AttendError`]; before `Panic` nothing was written.
    ///
    /// # Safety
    /// The problem's arrays are valid in all of their extents, and are not changed by others during the call.
    pub unsafe fn attend(
        &self,
        problem: Problem,
        index: Option<(&Arc<Index>, u32)>,
        n_threads: usize,
    ) -> Result<Attended, AttendError> {
        check_problem(&problem)?;
        let n_threads = n_threads.max(1);
        let fits = index.map(|(index, layer)| sparse_at_all(&problem, index, layer).map(|()| self.state(index, layer)));
        match fits {
            Some(Ok(state)) => {
                // SAFETY: states live as long as their context, unless they are released, which must not be now.
                let state = unsafe { &*state };
                let (run, begun) = (Run::default(), AtomicBool::new(false));
                // SAFETY: the contract; each thread is here once.
                self.on_threads(
                    n_threads,
                    &|ith, nth| unsafe {
                        let first = !begun.swap(true, Ordering::AcqRel);
                        state.work(&run, &|| problem, first, ith, nth);
                    },
                    &|| run.fail(),
                )?;
                let (rows_sparse, kept) = self.shared.finish(&run).ok_or(AttendError::Panic)?;
                Ok(Attended { rows_sparse, kept })
            }
            other => {
                if let Some(Err(reason)) = other {
                    let _entered = enter(&self.shared.scope);
                    count(|s| s.dense(reason));
                }
                let mut memory = lock(&self.shared.memory).pop().unwrap_or_default();
                let plan = Plan::forced(problem, n_threads, &mut memory)?;
                let panicked = AtomicBool::new(false);
                // SAFETY: the contract; each thread is here once.
                let run = &|ith, nth| unsafe { plan.run(ith, nth) };
                self.on_threads(n_threads, run, &|| panicked.store(true, Ordering::Relaxed))?;
                lock(&self.shared.memory).push(memory);
                match panicked.into_inner() {
                    true => Err(AttendError::Panic),
                    false => Ok(Attended::default()),
                }
            }
        }
    }

    /// The same over arrays in the memory of GPU `ordinal`, put on a stream; it waits only where a cache is new or may have
    /// changed. What was sparse is counted once the GPU is done.
    ///
    /// # Errors
    /// See [`AttendError`]; the output is then what it was, or written in part.
    ///
    /// # Safety
    /// `stream` is null or a stream of the GPU's primary context, and lives as long as this; the problem's arrays are the GPU's
    /// memory, valid in all of their extents until the stream has come past the call.
    pub unsafe fn launch(
        &self,
        problem: Problem,
        index: Option<(&Arc<Index>, u32)>,
        ordinal: usize,
        stream: CUstream,
    ) -> Result<(), AttendError> {
        let node = index.map(|(index, layer)| {
            // SAFETY: states live as long as their context, unless they are released, which must not be now.
            sparse_at_all(&problem, index, layer).map(|()| unsafe { (*self.state(index, layer)).node(Ok(problem)) })
        });
        let mut calls = lock(&self.calls);
        let known = calls.iter().position(|own| own.is_of(ordinal, stream));
        let at = match known {
            Some(at) => at,
            None => {
                // SAFETY: the contract.
                calls.push(unsafe { Calls::new(ordinal, stream, &self.shared.scope)? });
                calls.len() - 1
            }
        };
        // SAFETY: the contract.
        unsafe { calls[at].launch(&problem, node) }
    }

    /// Counts what calls on GPUs did; waits for them.
    pub fn settle(&self) {
        lock(&self.calls).iter_mut().for_each(|own| own.settle(true));
    }

    /// Calls `work` once on each of `n` threads, at the same time as far as the machine allows.
    fn on_threads(
        &self,
        n: usize,
        work: &(dyn Fn(usize, usize) + Sync),
        panicked: &(dyn Fn() + Sync),
    ) -> Result<(), AttendError> {
        let run = |ith: usize| {
            if catch_unwind(AssertUnwindSafe(|| work(ith, n))).is_err() {
                panicked();
            }
        };
        match n {
            1 => run(0),
            _ => {
                self.shared.pool.of(n)?.broadcast(|thread| run(thread.index()));
            }
        }
        Ok(())
    }
}
