//! What is known of the caches that the nodes of one layer read: whether they hold the prefix.
//!
//! A cache that is new is verified in full: the means of its rows over every cluster of every KV head against those of the
//! index. Digests of the rows of all clustered tokens are kept then. Later runs compare the digests of the last clustered
//! token and of some others in turn; one that differs makes the run dense, and the next one verifies in full.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use super::{lock, OpOptions, State};
use crate::attention::cpu::Guard;
use crate::attention::{Array, Problem};

/// Of one task.
const CLUSTERS: usize = 16;
const TOKENS: usize = 16;

/// Where K and V of a stream lie, and how.
type Key = [usize; 8];

pub(super) struct Place {
    key: Key,
    /// Of each clustered token.
    digests: Arc<[AtomicU64]>,
    /// Did it hold the prefix when it was last verified in full? None: it is to be.
    holds: Option<bool>,
    /// Next clustered token to compare.
    next: usize,
}

/// How one stream is checked in one run.
pub(super) struct Check {
    pub stream: usize,
    key: Key,
    digests: Arc<[AtomicU64]>,
    /// What was known before; None: everything is verified.
    known: Option<bool>,
    differs: AtomicBool,
}

/// A part of a check. Tokens are counted from the first clustered one.
pub(super) enum Task {
    /// Are the means of these clusters of this KV head the index's?
    Means(usize, usize, Range<usize>),
    /// Keep the digests of these tokens.
    Note(usize, Range<usize>),
    /// Are the digests of these tokens those kept?
    Compare(usize, Range<usize>),
}

fn key(p: &Problem, stream: usize) -> Key {
    let at = |a: &Array| a.data as usize + stream / (p.q.ne[3] / a.ne[3]) * a.nb[3];
    [at(&p.k), at(&p.v), p.k.nb[1], p.k.nb[2], p.v.nb[1], p.v.nb[2], p.k_type as usize, p.v_type as usize]
}

fn chunks(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size).map(move |from| from..(from + size).min(n))
}

impl State {
    /// Clustered tokens.
    fn n_clustered(&self) -> usize {
        self.index.meta().n_clustered()
    }

    /// Begins a check of each of the `streams`.
    pub(super) fn checks(&self, problem: &Problem, streams: &[usize]) -> (Vec<Check>, Vec<Task>) {
        let (n, OpOptions { round, max_places, .. }) = (self.n_clustered(), self.shared.options);
        let (mut checks, mut tasks) = (Vec::new(), Vec::new());
        let mut places = lock(&self.places);
        for &stream in streams {
            let key = key(problem, stream);
            // the one used last is the last
            let known = places.iter().position(|place| place.key == key).map(|at| places.remove(at));
            let mut place = known.unwrap_or_else(|| Place {
                key,
                digests: (0..n).map(|_| AtomicU64::new(0)).collect(),
                holds: None,
                next: 0,
            });
            let number = checks.len();
            match place.holds {
                None => {
                    let shape = self.index.layer(self.layer).map(|layer| layer.shape);
                    let (heads, clusters) = shape.map_or((0, 0), |s| (s.n_head_kv as usize, s.n_cluster as usize));
                    let means = (0..heads).flat_map(|h| chunks(clusters, CLUSTERS).map(move |c| (h, c)));
                    tasks.extend(means.map(|(h, c)| Task::Means(number, h, c)));
                    tasks.extend(chunks(n, TOKENS).map(|tokens| Task::Note(number, tokens)));
                }
                Some(_) => {
                    let size = n.div_ceil(round.max(1));
                    let sample = place.next..(place.next + size).min(n);
                    place.next = sample.end % n;
                    // an edit of a text changes all that is behind it
                    tasks.push(Task::Compare(number, n - 1..n));
                    let parts =
                        chunks(sample.len(), TOKENS).map(|part| sample.start + part.start..sample.start + part.end);
                    tasks.extend(parts.map(|tokens| Task::Compare(number, tokens)));
                }
            }
            let (digests, known, differs) = (place.digests.clone(), place.holds, AtomicBool::new(false));
            checks.push(Check { stream, key, digests, known, differs });
            places.push(place);
        }
        let n_old = places.len().saturating_sub(max_places.max(streams.len()));
        places.drain(..n_old);
        (checks, tasks)
    }

    /// Does a part of the checks.
    ///
    /// # Safety
    /// K and V of the problem can be read, and it has passed what `Guard` wants.
    pub(super) unsafe fn check(&self, problem: &Problem, checks: &[Check], task: &Task) {
        let (Task::Means(number, ..) | Task::Note(number, ..) | Task::Compare(number, ..)) = task;
        let check = &checks[*number];
        let Some(view) = self.index.layer(self.layer) else { return };
        let guard = Guard::new(problem, view, check.stream, self.shared.options.tolerance);
        let n_sink = self.index.meta().n_sink as usize;
        // SAFETY: the contract.
        let digest = |token: usize| unsafe { guard.digest(n_sink + token) };
        let agrees = match task {
            // Once it is known to differ the rest is of no interest.
            Task::Means(..) | Task::Compare(..) if check.differs.load(Ordering::Relaxed) => true,
            // SAFETY: the contract.
            Task::Means(_, head_kv, clusters) => unsafe { guard.agrees(*head_kv, clusters.clone()) },
            Task::Note(_, tokens) => {
                tokens.clone().for_each(|t| check.digests[t].store(digest(t), Ordering::Relaxed));
                true
            }
            Task::Compare(_, tokens) => tokens.clone().all(|t| check.digests[t].load(Ordering::Relaxed) == digest(t)),
        };
        if !agrees {
            check.differs.store(true, Ordering::Relaxed);
        }
    }

    /// Ends a check, once all of its tasks are done: does the stream hold the prefix? And did it before, if that was known?
    pub(super) fn conclude(&self, check: &Check) -> (bool, Option<bool>) {
        let same = !check.differs.load(Ordering::Relaxed);
        let holds = match check.known {
            None => Some(same),
            Some(before) => same.then_some(before),
        };
        // It may have had to make room.
        if let Some(place) = lock(&self.places).iter_mut().find(|place| place.key == check.key) {
            place.holds = holds;
        }
        (holds == Some(true), check.known)
    }
}
