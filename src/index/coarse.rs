//! Centroids of coarse clusters. They follow from what a file holds, so it does not hold them.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::error::reserved;
use super::types::LayerView;
use super::IndexError;

impl LayerView<'_> {
    /// Centroids of the coarse clusters, `[n_head_kv][Cc][head_dim_k]`: means of the centroids of their fine clusters, weighted by
    /// keys. Empty without a coarse level.
    ///
    /// # Panics
    /// Where offsets or lengths break a rule of [`LayerParts`](super::LayerParts).
    pub fn coarse_means(&self) -> Vec<f16> {
        (0..self.shape.n_head_kv as usize).flat_map(|head| self.head_coarse_means(head)).collect()
    }

    /// The same, where there may be no memory for them.
    pub(super) fn try_coarse_means(&self) -> Result<Vec<f16>, IndexError> {
        let [dim, coarse, heads] =
            [self.shape.head_dim_k, self.shape.n_coarse, self.shape.n_head_kv].map(|n| n as usize);
        let mut means = reserved(heads * coarse * dim)?;
        means.resize(heads * coarse * dim, f16::ZERO);
        if coarse > 0 {
            let of_heads = means.chunks_exact_mut(coarse * dim).enumerate();
            of_heads.for_each(|(head_kv, means)| self.fill_coarse_means(head_kv, means));
        }
        Ok(means)
    }

    /// The part of one KV head.
    pub(crate) fn head_coarse_means(&self, head_kv: usize) -> Vec<f16> {
        let mut means = vec![f16::ZERO; self.shape.n_coarse as usize * self.shape.head_dim_k as usize];
        if !means.is_empty() {
            self.fill_coarse_means(head_kv, &mut means);
        }
        means
    }

    fn fill_coarse_means(&self, head_kv: usize, means: &mut [f16]) {
        let [dim, fine] = [self.shape.head_dim_k, self.shape.n_cluster].map(|n| n as usize);
        let offsets = self.head_offsets(head_kv);
        let (mut row, mut sum) = (vec![0.0f32; dim], vec![0.0f64; dim]);
        for (mean, run) in means.chunks_exact_mut(dim).zip(self.head_coarse_offsets(head_kv).windows(2)) {
            let run = run[0] as usize..run[1] as usize;
            let n = f64::from(offsets[run.end] - offsets[run.start]);
            sum.fill(0.0);
            for i in run {
                self.centroids[(head_kv * fine + i) * dim..][..dim].convert_to_f32_slice(&mut row);
                let weight = f64::from(offsets[i + 1] - offsets[i]);
                sum.iter_mut().zip(&row).for_each(|(s, x)| *s += weight * f64::from(*x));
            }
            // By way of F32: from F64, `half` does not round alike on every machine.
            row.iter_mut().zip(&sum).for_each(|(x, s)| *x = (s / n) as f32);
            mean.convert_from_f32_slice(&row);
        }
    }
}
