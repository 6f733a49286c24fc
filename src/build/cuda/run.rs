//! The steps of K-means, put on a stream for a batch of heads: what `topdown` and `kmeans` do on the CPU.

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUfunction};

use super::kernels::{Kernels, OfSize};
use super::params::*;
use super::workspace::Workspace;
use crate::attention::cuda::{Device, Error};
use crate::build::topdown::{REFINEMENTS, SAMPLE};

/// What a batch's kernels are launched with.
pub(super) struct Run<'a> {
    pub device: &'a Device,
    pub kernels: &'a Kernels,
    pub keys: &'a OfSize,
    pub values: &'a OfSize,
    pub workspace: &'a Workspace,
    pub stream: sys::CUstream,
    pub iterations: u32,
    /// One group, which is compared with all fine clusters.
    pub base: Kmeans,
}

impl Run<'_> {
    /// Unit keys, and a look at every row: tokens of the first broken key and value, if there are any.
    pub fn prepare(&self) -> Result<[Option<usize>; 2], Error> {
        self.fill(self.base.broken, u32::MAX, 2)?;
        self.fill(self.base.products, 0, 2 * self.base.n_head as usize)?;
        let of_tokens = |function| self.warps(function, self.base.n_prefix, &self.base);
        of_tokens(self.keys.unit)?;
        of_tokens(self.values.values)?;
        let mut broken = [0u32; 2];
        self.workspace.buffer.read_to(self.workspace.at.broken, &mut broken)?;
        Ok(broken.map(|token| (token != u32::MAX).then_some(token as usize)))
    }

    /// Clusters in one level.
    pub fn flat(&self) -> Result<(), Error> {
        self.iterate(&self.base, 0)
    }

    /// The coarse level: K-means on a sample at even distances, then one assignment of all keys. Which coarse clusters are around
    /// one is left too.
    pub fn coarse(&self) -> Result<(), Error> {
        let (n, n_coarse) = (self.base.n_row, self.workspace.shape.n_coarse as u32);
        let coarse = Kmeans {
            n_cluster: n_coarse,
            n_point: n.min(n_coarse.saturating_mul(SAMPLE as u32)),
            direction: self.workspace.address(self.workspace.at.coarse_direction),
            ..self.base
        };
        self.iterate(&coarse, 0)?;
        // Coarse clusters become the groups of the fine level.
        let all = Kmeans { n_point: n, ..coarse };
        self.tiles(&all)?;
        self.assign(&all, 0)?;
        self.sort(&Kmeans { start: self.workspace.address(self.workspace.at.group_start), ..all })?;
        let near = Kmeans { near: self.workspace.address(self.workspace.at.near), ..coarse };
        self.launch(self.keys.near, [n_coarse, coarse.n_head, 1], NEAR_THREADS, &near)
    }

    /// Fine clusters `bounds[j]..bounds[j + 1]` out of each coarse one on its own; then assignments of every key to the fine
    /// clusters of the coarse ones around its own.
    pub fn fine(&self) -> Result<(), Error> {
        let address = |at| self.workspace.address(at);
        let at = &self.workspace.at;
        let groups = Kmeans {
            n_group: self.workspace.shape.n_coarse as u32,
            bounds: address(at.bounds),
            group_start: address(at.group_start),
            ..self.base
        };
        self.iterate(&groups, groups.order)?;
        let around = Kmeans { near: address(at.near), nested: 1, ..groups };
        for _ in 0..REFINEMENTS {
            self.warps(self.keys.update, groups.n_cluster, &groups)?;
            self.tiles(&around)?;
            self.assign(&around, groups.order)?;
            self.sort(&self.base)?;
        }
        Ok(())
    }

    /// What the index stores.
    pub fn summarise(&self) -> Result<(), Error> {
        self.warps(self.keys.summary, self.base.n_cluster, &self.base)?;
        self.warps(self.values.mean_values, self.base.n_cluster, &self.base)
    }

    /// Waits for all that was launched.
    pub fn finish(&self) -> Result<(), Error> {
        // SAFETY: a stream that lives.
        unsafe { result::stream::synchronize(self.stream) }.map_err(Error::driver("finish its work"))
    }

    /// K-means of each group of `points` (0: at even distances) on its own.
    fn iterate(&self, level: &Kmeans, points: u64) -> Result<(), Error> {
        self.tiles(&Kmeans { times: self.iterations, ..*level })?;
        self.warps(self.keys.begin, level.n_cluster, &Kmeans { order: points, ..*level })?;
        for i in 0..self.iterations {
            if i > 0 {
                self.warps(self.keys.update, level.n_cluster, level)?;
            }
            self.assign(level, points)?;
            self.sort(level)?;
        }
        Ok(())
    }

    fn tiles(&self, level: &Kmeans) -> Result<(), Error> {
        self.launch(self.kernels.tiles, [level.n_head, 1, 1], HEAD_THREADS, level)
    }

    fn assign(&self, level: &Kmeans, points: u64) -> Result<(), Error> {
        let tiles = level.n_point.div_ceil(POINTS as u32) + level.n_group;
        let level = Kmeans { order: points, ..*level };
        self.launch(self.keys.assign, [tiles, level.n_head, 1], ASSIGN_THREADS, &level)
    }

    /// Points in the order of their clusters, none of which is left empty.
    fn sort(&self, level: &Kmeans) -> Result<(), Error> {
        self.order(level, false)?;
        self.launch(self.kernels.repair, [level.n_group, level.n_head, 1], THREADS, level)?;
        self.order(level, true)
    }

    fn order(&self, level: &Kmeans, again: bool) -> Result<(), Error> {
        let bits = u32::BITS - (level.n_cluster - 1).leading_zeros();
        let passes = bits.div_ceil(DIGIT_BITS as u32).max(1);
        let n_chunk = level.n_point.div_ceil(CHUNK as u32);
        let spare = self.workspace.address(self.workspace.at.spare);
        let mut pass = Kmeans { again: again.into(), n_chunk, from: 0, ..*level };
        for i in 0..passes {
            pass.shift = i * DIGIT_BITS as u32;
            // The last one ends in `order`.
            pass.to = if (passes - i) % 2 == 1 { level.order } else { spare };
            let chunks = [n_chunk, level.n_head, 1];
            self.launch(self.kernels.count, chunks, THREADS, &pass)?;
            self.launch(self.kernels.scan, [level.n_head, 1, 1], HEAD_THREADS, &pass)?;
            self.launch(self.kernels.scatter, chunks, THREADS, &pass)?;
            pass.from = pass.to;
        }
        let blocks = level.n_point.div_ceil(THREADS as u32);
        self.launch(self.kernels.start, [blocks, level.n_head, 1], THREADS, &pass)
    }

    /// A kernel with a warp for each of `n` things per head.
    fn warps(&self, function: CUfunction, n: u32, parameters: &Kmeans) -> Result<(), Error> {
        let blocks = n.div_ceil(THREADS as u32 / 32);
        self.launch(function, [blocks, parameters.n_head, 1], THREADS, parameters)
    }

    fn launch(&self, function: CUfunction, grid: [u32; 3], threads: usize, p: &Kmeans) -> Result<(), Error> {
        // SAFETY: all of these kernels take one `Kmeans`; its addresses are the workspace's, or those of the cache, which the
        // caller of `Clusterer` answers for.
        unsafe { self.device.start(function, grid, [threads, 1], p, false, self.stream) }
    }

    fn fill(&self, at: u64, word: u32, n: usize) -> Result<(), Error> {
        // SAFETY: an area of the workspace with so many words.
        unsafe { sys::cuMemsetD32Async(at, word, n, self.stream) }.result().map_err(Error::driver("set memory"))
    }
}
