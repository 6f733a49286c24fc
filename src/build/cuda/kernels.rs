//! The kernels of K-means, loaded.

use std::sync::Arc;

use cudarc::driver::sys::CUfunction;

use crate::attention::cuda::*;

/// Kernels of one head size.
pub(super) struct OfSize {
    pub unit: CUfunction,
    pub values: CUfunction,
    pub assign: CUfunction,
    pub begin: CUfunction,
    pub update: CUfunction,
    pub near: CUfunction,
    pub summary: CUfunction,
    pub mean_values: CUfunction,
}

/// All of them.
pub(super) struct Kernels {
    pub tiles: CUfunction,
    pub count: CUfunction,
    pub scan: CUfunction,
    pub scatter: CUfunction,
    pub start: CUfunction,
    pub repair: CUfunction,
    sizes: Vec<(usize, OfSize)>,
    _modules: [Module; 6],
}

impl Kernels {
    pub fn new(device: &Arc<Device>) -> Result<Kernels, Error> {
        let module = |image| Module::new(device, image);
        let modules = [
            module(KMEANS_UNIT)?,
            module(KMEANS_ASSIGN)?,
            module(KMEANS_SORT)?,
            module(KMEANS_REPAIR)?,
            module(KMEANS_CENTRE)?,
            module(KMEANS_SUMMARY)?,
        ];
        let [unit, assign, sort, repair, centre, summary] = &modules;
        let of_size = |d: usize| {
            let of = |module: &Module, name: &str| module.function(&format!("kmeans_{name}_{d}"));
            let kernels = OfSize {
                unit: of(unit, "unit")?,
                values: of(unit, "values")?,
                assign: of(assign, "assign")?,
                begin: of(centre, "begin")?,
                update: of(centre, "update")?,
                near: of(centre, "near")?,
                summary: of(summary, "summary")?,
                mean_values: of(summary, "mean_values")?,
            };
            Ok((d, kernels))
        };
        Ok(Kernels {
            tiles: assign.function("kmeans_tiles")?,
            count: sort.function("kmeans_count")?,
            scan: sort.function("kmeans_scan")?,
            scatter: sort.function("kmeans_scatter")?,
            start: sort.function("kmeans_start")?,
            repair: repair.function("kmeans_repair")?,
            sizes: HEAD_DIMS.into_iter().map(of_size).collect::<Result<_, Error>>()?,
            _modules: modules,
        })
    }

    pub fn of_size(&self, d: usize) -> Option<&OfSize> {
        self.sizes.iter().find(|s| s.0 == d).map(|s| &s.1)
    }
}
