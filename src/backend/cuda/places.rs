//! Caches in device memory that nodes of the attention op read: which of them hold the prefix of their index in cells 0 to P.
//!
//! A cache that is new is copied to the host, head by head, and verified there in full, as the op does on the CPU
//! (`super::super::op`). From then on the kernels watch it: the keys of the last clustered token in every call, all others in
//! turn. One that was found changed is verified again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rayon::prelude::*;

use super::super::op::Node;
use super::super::runtime::{count, enter};
use super::super::stats::log;
use crate::attention::cpu::Guard;
use crate::attention::cuda::{self, Bound, Device, Error, Resident, Stream};
use crate::attention::{Array, Element, Problem};

/// Clusters that a thread verifies at a time.
const CLUSTERS: usize = 16;
/// Cells for which a binding has room, in steps of so many.
const CELLS: usize = 4096;

/// Where K and V of a stream lie, and how.
type Key = [usize; 8];

struct Place {
    key: Key,
    /// The node's; dead when its context has dropped the index.
    generation: Weak<AtomicU64>,
    /// What it was when the cache was verified.
    verified: u64,
    layer: u32,
    n_cell: usize,
    /// None: the cache holds something else.
    bound: Option<Bound>,
    /// K and V of the last clustered token when it was verified.
    last: Vec<u8>,
}

/// All caches that are known on one GPU.
#[derive(Default)]
pub struct Places {
    all: Vec<Place>,
    /// Changes whenever a binding that a plan may use is dropped.
    pub version: u64,
}

/// K or V of one stream of a call.
struct Half<'a> {
    array: &'a Array,
    at: u64,
    /// Bytes of a row of one head.
    bytes: usize,
}

fn halves(p: &Problem, stream: usize) -> [Half<'_>; 2] {
    let half = |array, element: Element| {
        let array: &Array = array;
        Half { array, at: (array.data as usize + stream * array.nb[3]) as u64, bytes: element.row_bytes(array.ne[0]) }
    };
    [half(&p.k, p.k_type), half(&p.v, p.v_type)]
}

fn key(p: &Problem, stream: usize) -> Key {
    let [k, v] = halves(p, stream);
    let ([k1, k2], [v1, v2]) = ([p.k.nb[1], p.k.nb[2]], [p.v.nb[1], p.v.nb[2]]);
    [k.at as usize, v.at as usize, k1, k2, v1, v2, p.k_type as usize, p.v_type as usize]
}

/// Tokens up to the last clustered one.
fn clustered(node: &Node) -> usize {
    let meta = node.index.meta();
    meta.n_prefix() - meta.n_window as usize
}

/// The rows of one token in all heads, K's before V's.
fn rows_of(p: &Problem, stream: usize, token: usize, on: &Stream) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    for Half { array, at, bytes } in halves(p, stream) {
        let mut rows = vec![0; bytes * array.ne[2]];
        // SAFETY: a row of each head, of a token that has a cell.
        unsafe { on.read_rows(at + (token * array.nb[1]) as u64, array.nb[2], bytes, &mut rows)? };
        all.extend(rows);
    }
    Ok(all)
}

/// Does a stream of the call's cache hold the node's prefix? Waits for the device.
fn verify(node: &Node, p: &Problem, stream: usize, on: &Stream) -> Result<bool, Error> {
    let Some(view) = node.index.layer(node.layer) else { return Ok(false) };
    let (n, n_cluster) = (clustered(node), view.shape.n_cluster as usize);
    let own = halves(p, stream);
    let mut copies = own.each_ref().map(|half| vec![0u8; n * half.bytes]);
    for head in 0..p.k.ne[2] {
        for (half, copy) in own.iter().zip(&mut copies) {
            // SAFETY: the rows of the prefix in one head, inside the array's extents.
            unsafe { on.read_rows(half.at + (head * half.array.nb[2]) as u64, half.array.nb[1], half.bytes, copy)? };
        }
        // One head's rows stand for every head's.
        let [k, v] = [0, 1].map(|i| {
            let ([d, _, n_head, _], bytes) = (own[i].array.ne, own[i].bytes);
            Array { data: copies[i].as_ptr().cast_mut(), ne: [d, n, n_head, 1], nb: [own[i].array.nb[0], bytes, 0, 0] }
        });
        let [d, n_query, n_head, _] = p.q.ne;
        let q = Array { ne: [d, n_query, n_head, 1], ..p.q };
        let host = Problem { q, k, v, mask: None, sinks: None, ..*p };
        let guard = Guard::new(&host, view, 0, node.options.tolerance);
        let agrees = |part: Range<usize>| {
            // SAFETY: the copies, which have a row for every token that is in a cluster.
            unsafe { guard.agrees(head, part) }
        };
        let parts = (0..n_cluster.div_ceil(CLUSTERS)).into_par_iter();
        if !parts.map(|i| i * CLUSTERS..((i + 1) * CLUSTERS).min(n_cluster)).all(agrees) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Ties the index to the first cells of a cache that was verified.
fn bind(
    node: &Node,
    p: &Problem,
    stream: usize,
    n_cell: usize,
    last: &[u8],
    gpu: &Arc<Device>,
    on: &Stream,
) -> Result<Bound, Error> {
    let resident = Resident::of(&node.index, gpu, 0)?;
    let cells: Vec<u32> = (0..node.index.meta().n_prefix() as u32).collect();
    let mut bound = Bound::new(resident, &cells, n_cell, stream as u32)?;
    let keys = halves(p, stream)[0].bytes * p.k.ne[2];
    bound.guard(node.layer, clustered(node) as u32 - 1, &last[..keys])?;
    // SAFETY: a cache that lives while the graph is computed; it comes after all that has written to it.
    unsafe { bound.watch(node.layer, &p.k, &p.v, [p.k_type, p.v_type], on.raw())? };
    Ok(bound)
}

impl Place {
    fn is_of(&self, node: &Node, key: &Key) -> bool {
        self.layer == node.layer && self.key == *key && self.generation.as_ptr() == Arc::as_ptr(&node.generation)
    }
}

impl Places {
    fn find(&self, node: &Node, key: &Key) -> Option<usize> {
        self.all.iter().position(|place| place.is_of(node, key))
    }

    fn remove(&mut self, at: usize) -> Place {
        self.version += 1;
        self.all.remove(at)
    }

    /// Makes known whether the streams of a node's cache hold its prefix. Waits for the device where one is new or has changed.
    ///
    /// # Errors
    /// The driver refuses, memory is short, or the kernels do not take such rows.
    pub fn learn(&mut self, node: &Node, p: &Problem, gpu: &Arc<Device>, on: &Stream) -> Result<(), Error> {
        for dead in
            (0..self.all.len()).rev().filter(|i| self.all[*i].generation.strong_count() == 0).collect::<Vec<_>>()
        {
            self.remove(dead);
        }
        for stream in 0..p.k.ne[3] {
            let (key, generation) = (key(p, stream), node.generation.load(Ordering::Relaxed));
            let mut before = None;
            if let Some(at) = self.find(node, &key) {
                let place = &self.all[at];
                let fits = p.k.ne[1] <= place.n_cell && place.verified == generation;
                if fits && !self.has_changed(at, node, p, stream, on)? {
                    continue;
                }
                before = Some(self.remove(at).bound.is_some());
            }
            let last = rows_of(p, stream, clustered(node) - 1, on)?;
            // A cache that grows is verified anew whenever it has doubled.
            let n_cell = (2 * p.k.ne[1]).next_multiple_of(CELLS);
            let holds = verify(node, p, stream, on)?;
            let bound = holds.then(|| bind(node, p, stream, n_cell, &last, gpu, on)).transpose()?;
            {
                let _entered = enter(&node.scope);
                if holds != (before == Some(true)) {
                    count(|s| if holds { s.bound += 1 } else { s.unbound += 1 });
                }
                if !holds && before != Some(false) && super::super::runtime::snapshot().config.log > 0 {
                    let what = "K or V does not hold the prefix of the index in its first cells: dense";
                    log(format_args!(
                        "attention op of layer {}, stream {stream}, on {}: {what}",
                        node.layer,
                        gpu.name()
                    ));
                }
            }
            let (generation, verified) = (Arc::downgrade(&node.generation), generation);
            let layer = node.layer;
            self.all.push(Place { key, generation, verified, layer, n_cell, bound, last });
        }
        self.make_room(node, p.k.ne[3]);
        Ok(())
    }

    /// Is a cache no longer what it was when it was verified?
    fn has_changed(&self, at: usize, node: &Node, p: &Problem, stream: usize, on: &Stream) -> Result<bool, Error> {
        let place = &self.all[at];
        match &place.bound {
            Some(bound) => Ok(!bound.holds()?),
            None => Ok(rows_of(p, stream, clustered(node) - 1, on)? != place.last),
        }
    }

    /// Forgets the oldest caches of a layer where there are too many.
    fn make_room(&mut self, node: &Node, n_stream: usize) {
        let own = |place: &Place| place.generation.as_ptr() == Arc::as_ptr(&node.generation);
        let n = self.all.iter().filter(|place| own(place)).count();
        for _ in node.options.max_places.max(n_stream)..n {
            if let Some(oldest) = self.all.iter().position(own) {
                self.remove(oldest);
            }
        }
    }

    /// The bindings of a node's cache, at most as many as a call may have: stream of K, and binding.
    pub fn bounds<'a>(&'a self, node: &Node, p: &Problem) -> Vec<(usize, &'a Bound)> {
        let of = |stream| Some((stream, self.all[self.find(node, &key(p, stream))?].bound.as_ref()?));
        (0..p.k.ne[3]).filter_map(of).take(cuda::BOUND_MAX).collect()
    }
}
