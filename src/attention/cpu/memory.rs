//! All pointer arithmetic of the CPU path: scratch memory and its partition, and addresses inside the call's arrays.

use std::marker::PhantomData;
use std::sync::Arc;

use super::kernels::BLOCK;
use super::{Path, Unsupported};
use crate::attention::{Array, Call, Problem};

/// A cache line, so that no two threads' areas share one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

/// Scratch memory of plans that never run at the same time, as those of one graph: used again by each, it stays in cache,
/// and no plan pays for fresh pages.
#[derive(Default)]
pub struct Memory {
    last: Option<Arc<Workspace>>,
}

impl Memory {
    /// At least so many bytes. Plans made earlier keep what they have.
    ///
    /// # Errors
    /// `Memory`: the system has no more.
    pub(super) fn take(&mut self, bytes: usize) -> Result<Arc<Workspace>, Unsupported> {
        match &self.last {
            Some(last) if last.lines.len() * 64 >= bytes => Ok(last.clone()),
            _ => Ok(self.last.insert(Arc::new(Workspace::new(bytes)?)).clone()),
        }
    }
}

/// Scratch memory; its contents at first are whatever the last plan left.
pub(super) struct Workspace {
    lines: Vec<Line>,
    base: *mut u8,
}

// SAFETY: `base` points into `lines`, which moves along; who writes where is settled by the plan's tasks.
unsafe impl Send for Workspace {}
// SAFETY: as above.
unsafe impl Sync for Workspace {}

impl Workspace {
    fn new(bytes: usize) -> Result<Workspace, Unsupported> {
        let mut lines = Vec::new();
        lines.try_reserve_exact(bytes.div_ceil(64)).map_err(|_| Unsupported::Memory { bytes })?;
        lines.resize(bytes.div_ceil(64), Line([0; 64]));
        let base = lines.as_mut_ptr().cast();
        Ok(Workspace { lines, base })
    }

    /// # Safety
    /// `at + n * size_of::<T>()` lies inside the workspace, `at` is aligned for T, any bits are a T, and nobody else
    /// uses that part while the result lives.
    pub(super) unsafe fn slice<'a, T>(&self, at: usize, n: usize) -> &'a mut [T] {
        debug_assert!(at + n * size_of::<T>() <= self.lines.len() * 64 && at.is_multiple_of(align_of::<T>()));
        // SAFETY: the contract.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at).cast(), n) }
    }

    /// # Safety
    /// As for `slice`, but others may read that part too.
    pub(super) unsafe fn shared<'a, T>(&self, at: usize, n: usize) -> &'a [T] {
        debug_assert!(at + n * size_of::<T>() <= self.lines.len() * 64 && at.is_multiple_of(align_of::<T>()));
        // SAFETY: the contract.
        unsafe { std::slice::from_raw_parts(self.base.add(at).cast(), n) }
    }
}

/// Hands out consecutive areas, each on its own cache lines.
#[derive(Default)]
pub(super) struct Carver {
    pub(super) bytes: usize,
}

impl Carver {
    pub(super) fn area<T>(&mut self, n: usize) -> usize {
        let at = self.bytes;
        self.bytes += (n * size_of::<T>()).next_multiple_of(64);
        at
    }
}

/// Where the parts of one selection's memory are: scores, and the kept clusters.
pub(super) struct SpaceLayout {
    /// Clusters, sinks and prefix tokens of the largest binding.
    n_cluster: usize,
    n_sink: usize,
    x: usize,
    y: usize,
    sink: usize,
    count: usize,
    mean: usize,
    mass: usize,
    kept: usize,
    cells: usize,
    lengths: usize,
    pub(super) bytes: usize,
}

impl SpaceLayout {
    pub(super) fn new(group: usize, n_cluster: usize, n_sink: usize, n_prefix: usize) -> SpaceLayout {
        let mut c = Carver::default();
        SpaceLayout {
            n_cluster,
            n_sink,
            x: c.area::<f32>(group * n_cluster),
            y: c.area::<f32>(group * n_cluster),
            sink: c.area::<f32>(group * n_sink),
            count: c.area::<f32>(n_cluster),
            mean: c.area::<f32>(n_cluster),
            mass: c.area::<f32>(n_cluster),
            kept: c.area::<u32>(n_cluster),
            cells: c.area::<u32>(n_prefix),
            lengths: c.area::<u32>(2),
            bytes: c.bytes,
        }
    }
}

/// Memory of the selection for one (row, KV head). Each accessor's contract: the part lies within the layout's counts
/// and nobody else uses it meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Space<'a> {
    pub(super) memory: &'a Workspace,
    pub(super) layout: &'a SpaceLayout,
    pub(super) at: usize,
}

macro_rules! part {
    ($(#[$doc:meta])* $name:ident: $t:ty) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// See `Space`.
        pub(super) unsafe fn $name(self, n: usize) -> &'a mut [$t] {
            // SAFETY: the caller's contract.
            unsafe { self.memory.slice(self.at + self.layout.$name, n) }
        }
    };
}

impl<'a> Space<'a> {
    /// Plain logits of clusters `from..from + n` of one head of the group.
    ///
    /// # Safety
    /// See `Space`.
    pub(super) unsafe fn x(self, g: usize, from: usize, n: usize) -> &'a mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { self.memory.slice(self.at + self.layout.x + 4 * (g * self.layout.n_cluster + from), n) }
    }
    /// Selection scores, likewise.
    ///
    /// # Safety
    /// See `Space`.
    pub(super) unsafe fn y(self, g: usize, from: usize, n: usize) -> &'a mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { self.memory.slice(self.at + self.layout.y + 4 * (g * self.layout.n_cluster + from), n) }
    }
    /// Logits of the sinks for one head of the group.
    ///
    /// # Safety
    /// See `Space`.
    pub(super) unsafe fn sink(self, g: usize, n: usize) -> &'a mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { self.memory.slice(self.at + self.layout.sink + 4 * g * self.layout.n_sink, n) }
    }
    /// Kept clusters ascending, and the cells of their keys.
    ///
    /// # Safety
    /// The selection is complete and nobody writes it.
    pub(super) unsafe fn chosen(self) -> (&'a [u32], &'a [u32]) {
        let (m, l, at) = (self.memory, self.layout, self.at);
        // SAFETY: the caller's contract.
        unsafe {
            let [n_kept, n_cell] = m.shared::<[u32; 2]>(at + l.lengths, 1)[0];
            (m.shared(at + l.kept, n_kept as usize), m.shared(at + l.cells, n_cell as usize))
        }
    }
    part!(/** Keys per cluster. */ count: f32);
    part!(/** Mean probability per key over the group. */ mean: f32);
    part!(/** Mean estimated mass per key over the group, in mass mode. */ mass: f32);
    part!(/** Kept clusters, ascending. */ kept: u32);
    part!(/** Cells of their keys. */ cells: u32);
    part!(/** How many clusters are kept, and how many cells. */ lengths: u32);
}

/// One thread's own memory.
pub(super) struct ScratchLayout {
    group: usize,
    dk: usize,
    q: usize,
    plain: usize,
    q2: usize,
    s: usize,
    s2: usize,
    state: usize,
    pub(super) bytes: usize,
}

pub(super) struct Scratch<'a> {
    /// `[G][dk]`, the queries times the call's scale.
    pub(super) q: &'a mut [f32],
    /// `[G][dk]`, the same in the index's basis, where the call's is another.
    pub(super) plain: &'a mut [f32],
    /// `[G][dk]`, the squares of those.
    pub(super) q2: &'a mut [f32],
    /// `[G][BLOCK]`.
    pub(super) s: &'a mut [f32],
    pub(super) s2: &'a mut [f32],
}

impl ScratchLayout {
    pub(super) fn new(group: usize, dk: usize, dv: usize) -> ScratchLayout {
        let mut c = Carver::default();
        ScratchLayout {
            group,
            dk,
            q: c.area::<f32>(group * dk),
            plain: c.area::<f32>(group * dk),
            q2: c.area::<f32>(group * dk),
            s: c.area::<f32>(group * BLOCK),
            s2: c.area::<f32>(group * BLOCK),
            state: c.area::<f32>(group * (dv + 2)),
            bytes: c.bytes,
        }
    }

    /// Scratch of the thread whose area starts at `at`, and the place of its state.
    ///
    /// # Safety
    /// The area is inside `memory` and no other use of it is alive.
    pub(super) unsafe fn open<'a>(&self, memory: &'a Workspace, at: usize) -> (Scratch<'a>, usize) {
        // SAFETY: the caller's contract; the parts do not overlap.
        let part = |from: usize, n: usize| unsafe { memory.slice(at + from, n) };
        let scratch = Scratch {
            q: part(self.q, self.group * self.dk),
            plain: part(self.plain, self.group * self.dk),
            q2: part(self.q2, self.group * self.dk),
            s: part(self.s, self.group * BLOCK),
            s2: part(self.s2, self.group * BLOCK),
        };
        (scratch, at + self.state)
    }
}

/// Rows of one head of a K, V or mask array: an address and a step.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    base: *const u8,
    step: usize,
    life: PhantomData<&'a u8>,
}

impl Rows<'_> {
    /// Rows packed at `base`.
    pub(super) fn packed(base: *const u8, step: usize) -> Self {
        Rows { base, step, life: PhantomData }
    }
    /// Address of row i; nothing is read.
    #[inline]
    pub(super) fn get(&self, i: usize) -> *const u8 {
        self.base.wrapping_add(i * self.step)
    }
    /// Bits of element i of the row at `base`, if elements have 16 bits.
    ///
    /// # Safety
    /// The element is inside the array.
    #[inline]
    pub(super) unsafe fn bits(&self, i: usize) -> u16 {
        // SAFETY: the contract.
        unsafe { self.base.add(2 * i).cast::<u16>().read_unaligned() }
    }
}

/// One (row, KV head) of a call.
#[derive(Clone, Copy)]
pub(super) struct Pair<'a> {
    pub(super) call: &'a Call,
    pub(super) row: usize,
    pub(super) head_kv: usize,
    pub(super) path: Path,
}

impl<'a> Pair<'a> {
    pub(super) fn problem(&self) -> &'a Problem {
        &self.call.problem
    }

    fn stream_query(&self) -> (usize, usize) {
        let n_query = self.problem().q.ne[1];
        (self.row / n_query, self.row % n_query)
    }

    /// First query head of the group.
    pub(super) fn first_head(&self) -> usize {
        self.head_kv * self.problem().n_group()
    }

    /// Copies the group's queries, times the call's scale, to `out` (`[G][dk]`).
    pub(super) fn load_query(&self, out: &mut [f32]) {
        let p = self.problem();
        let (stream, query) = self.stream_query();
        for (g, out) in out.chunks_exact_mut(p.q.ne[0]).enumerate() {
            let from = address(&p.q, [query, self.first_head() + g, stream]).cast::<f32>();
            for (d, out) in out.iter_mut().enumerate() {
                // SAFETY: the plan checked the shape; dimension 0 is contiguous.
                *out = p.scale * unsafe { from.add(d).read_unaligned() };
            }
        }
    }

    /// K rows of the KV head.
    pub(super) fn keys(&self) -> Rows<'a> {
        self.cache(&self.problem().k)
    }

    /// V rows of the KV head.
    pub(super) fn values(&self) -> Rows<'a> {
        self.cache(&self.problem().v)
    }

    fn cache(&self, a: &Array) -> Rows<'a> {
        let stream = self.stream_query().0 / (self.problem().q.ne[3] / a.ne[3]);
        Rows::packed(address(a, [0, self.head_kv, stream]), a.nb[1])
    }

    /// The row's mask for head g of the group.
    pub(super) fn mask(&self, g: usize) -> Option<Rows<'a>> {
        let (stream, query) = self.stream_query();
        let m = self.problem().mask.as_ref()?;
        let at = [query, (self.first_head() + g) % m.ne[2], stream % m.ne[3]];
        Some(Rows::packed(address(m, at), m.nb[1]))
    }

    /// ggml's attention sink of head g of the group; -inf without.
    pub(super) fn sink(&self, g: usize) -> f32 {
        match self.problem().sinks {
            None => f32::NEG_INFINITY,
            // SAFETY: the maker of the call vouches for `n_head` floats.
            Some(s) => unsafe { s.add(self.first_head() + g).read_unaligned() },
        }
    }

    /// Output of head g of the group.
    ///
    /// # Safety
    /// One task at a time writes a (row, KV head).
    pub(super) unsafe fn store(&self, g: usize, values: &[f32], factor: f32) {
        let (stream, query) = self.stream_query();
        let to = address(&self.problem().dst, [self.first_head() + g, query, stream]).cast::<f32>();
        for (d, v) in values.iter().enumerate() {
            // SAFETY: the plan checked the shape; dimension 0 is contiguous.
            unsafe { to.add(d).write_unaligned(v * factor) };
        }
    }
}

/// Address of element 0 at the given place in dimensions 1 to 3.
pub(super) fn address(a: &Array, at: [usize; 3]) -> *mut u8 {
    a.data.wrapping_add(at[0] * a.nb[1] + at[1] * a.nb[2] + at[2] * a.nb[3])
}
