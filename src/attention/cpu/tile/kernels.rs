//! The inner loops of tiles. Query rows are lanes: a panel is two vectors of them, and every matrix of a panel is stored
//! `[n][LANES]`. So nothing is transposed but the queries, once, and no sum runs across lanes but those of the mean.
//! Where `lanes` are no more than one vector's, the second is left alone.

use super::vector::{self, on_path, Vector};

/// Lanes of a panel, at most.
pub(super) const MAX_LANES: usize = 32;

/// Where scores of clusters and sinks are in an array of them.
#[derive(Clone, Copy)]
pub(super) struct Scored<'a> {
    /// Keys per cluster; clusters come first.
    pub(super) count: &'a [f32],
    /// First sink, and how many.
    pub(super) sinks: (usize, usize),
}

/// A matrix as it lies in memory: row after row, or column after column.
#[derive(Clone, Copy)]
pub(super) enum Matrix {
    Rows { data: *const f32, step: usize },
    Columns { data: *const f32, step: usize },
}

/// Lanes of a path's panel.
#[inline(always)]
unsafe fn lanes_of<V: Vector>() -> usize {
    2 * V::WIDTH
}

on_path! {
    /// # Safety
    /// None needed but the path's features.
    lanes() -> usize, lanes_of
}

on_path! {
    /// `C = A B` or `C = C diag(factor) + A B`, with A `[m][k]` of that shape, B `[k][LANES]`, C `[m][LANES]` and factor
    /// `[LANES]`.
    ///
    /// # Safety
    /// The arrays are there; `m` is a multiple of 8.
    product(lanes: usize, a: Matrix, shape: (usize, usize), b: *const f32, factor: Option<&[f32]>, c: *mut f32), product_of
}

#[inline(always)]
unsafe fn product_of<V: Vector>(
    lanes: usize,
    a: Matrix,
    (m, k): (usize, usize),
    b: *const f32,
    factor: Option<&[f32]>,
    c: *mut f32,
) {
    // SAFETY: the same contract.
    unsafe {
        match (lanes <= V::WIDTH, V::ROWS) {
            (false, 4) => product_by::<V, 4, 2>(a, m, k, b, factor, c),
            (false, _) => product_by::<V, 8, 2>(a, m, k, b, factor, c),
            (true, _) => product_by::<V, 8, 1>(a, m, k, b, factor, c),
        }
    }
}

/// The same, M rows of C by N vectors at a time.
#[inline(always)]
unsafe fn product_by<V: Vector, const M: usize, const N: usize>(
    a: Matrix,
    m: usize,
    k: usize,
    b: *const f32,
    factor: Option<&[f32]>,
    c: *mut f32,
) {
    for i in (0..m).step_by(M) {
        // SAFETY: rows `i..i + M` are below `m`.
        unsafe {
            let c = c.add(i * 2 * V::WIDTH);
            match a {
                Matrix::Rows { data, step } => rows::<V, M, N, true>(data.add(i * step), step, k, b, factor, c),
                Matrix::Columns { data, step } => rows::<V, M, N, false>(data.add(i), step, k, b, factor, c),
            }
        }
    }
}

/// M rows of C, in registers over all of k.
#[inline(always)]
unsafe fn rows<V: Vector, const M: usize, const N: usize, const ALONG: bool>(
    a: *const f32,
    step: usize,
    k: usize,
    b: *const f32,
    factor: Option<&[f32]>,
    c: *mut f32,
) {
    let lanes = 2 * V::WIDTH;
    // SAFETY: the contract of `product`.
    unsafe {
        let mut acc = [[V::splat(0.0); N]; M];
        if let Some(f) = factor {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (n, acc) in acc.iter_mut().enumerate() {
                    *acc = V::load(c.add(r * lanes + n * V::WIDTH)).mul(V::load(f.as_ptr().add(n * V::WIDTH)));
                }
            }
        }
        for j in 0..k {
            let mut own = [V::splat(0.0); N];
            for (n, own) in own.iter_mut().enumerate() {
                *own = V::load(b.add(j * lanes + n * V::WIDTH));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let a = V::splat(a.add(if ALONG { r * step + j } else { j * step + r }).read());
                for (acc, b) in acc.iter_mut().zip(&own) {
                    *acc = acc.fma(a, *b);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                acc.store(c.add(r * lanes + n * V::WIDTH));
            }
        }
    }
}

on_path! {
    /// One step of the online softmax: raises the maxima `m` to those of the rows of `s`, `[n][LANES]`, makes weights of
    /// `s` and adds them to the sums `l`. `factor` is what the sums of values are to be multiplied by.
    ///
    /// # Safety
    /// The arrays are there; `m` starts at `f32::MIN`, not at -inf.
    softmax(lanes: usize, s: *mut f32, n: usize, m: &mut [f32], l: &mut [f32], factor: &mut [f32]), softmax_of
}

#[inline(always)]
unsafe fn softmax_of<V: Vector>(used: usize, s: *mut f32, n: usize, m: &mut [f32], l: &mut [f32], factor: &mut [f32]) {
    let lanes = 2 * V::WIDTH;
    // SAFETY: the contract.
    unsafe {
        for half in (0..used).step_by(V::WIDTH) {
            let s = s.add(half);
            let old = V::load(m.as_ptr().add(half));
            let mut top = old;
            for i in 0..n {
                top = V::load(s.add(i * lanes)).max(top);
            }
            let f = old.sub(top).exp();
            let mut sum = V::load(l.as_ptr().add(half)).mul(f);
            for i in 0..n {
                let at = s.add(i * lanes);
                let weight = V::load(at).sub(top).exp();
                weight.store(at);
                sum = sum.add(weight);
            }
            top.store(m.as_mut_ptr().add(half));
            sum.store(l.as_mut_ptr().add(half));
            f.store(factor.as_mut_ptr().add(half));
        }
    }
}

on_path! {
    /// Adds a mask, `[n][LANES]`, to scores; a masked score is -inf whatever it was.
    ///
    /// # Safety
    /// The arrays are there.
    add_mask(s: *mut f32, mask: *const f32, n: usize), add_mask_of
}

#[inline(always)]
unsafe fn add_mask_of<V: Vector>(s: *mut f32, mask: *const f32, n: usize) {
    for i in (0..n * 2 * V::WIDTH).step_by(V::WIDTH) {
        // SAFETY: the contract.
        unsafe { V::load(s.add(i)).masked(V::load(mask.add(i))).store(s.add(i)) };
    }
}

on_path! {
    /// `s = s factor` with -inf for what is not finite, over n rows.
    ///
    /// # Safety
    /// The array is there.
    scale_finite(s: *mut f32, n: usize, factor: f32), scale_finite_of
}

#[inline(always)]
unsafe fn scale_finite_of<V: Vector>(s: *mut f32, n: usize, factor: f32) {
    for i in (0..n * 2 * V::WIDTH).step_by(V::WIDTH) {
        // SAFETY: the contract.
        unsafe { V::load(s.add(i)).mul(V::splat(factor)).finite().store(s.add(i)) };
    }
}

on_path! {
    /// Adds one number to each row.
    ///
    /// # Safety
    /// `s` holds a row of lanes for each number.
    add_per_row(s: *mut f32, numbers: &[f32]), add_per_row_of
}

#[inline(always)]
unsafe fn add_per_row_of<V: Vector>(s: *mut f32, numbers: &[f32]) {
    for (i, x) in numbers.iter().enumerate() {
        for half in [0, V::WIDTH] {
            // SAFETY: the contract.
            unsafe {
                let at = s.add(i * 2 * V::WIDTH + half);
                V::load(at).add(V::splat(*x)).store(at);
            }
        }
    }
}

on_path! {
    /// `y += alpha norm r` with a norm per lane and an r per row, -inf for what is not finite.
    ///
    /// # Safety
    /// `y` holds a row for each radius, `norm` a number for each lane.
    add_radius(y: *mut f32, norm: &[f32], radii: &[f32], alpha: f32), add_radius_of
}

#[inline(always)]
unsafe fn add_radius_of<V: Vector>(y: *mut f32, norm: &[f32], radii: &[f32], alpha: f32) {
    for (i, r) in radii.iter().enumerate() {
        for half in [0, V::WIDTH] {
            // SAFETY: the contract.
            unsafe {
                let at = y.add(i * 2 * V::WIDTH + half);
                let norm = V::load(norm.as_ptr().add(half));
                V::load(at).fma(norm, V::splat(alpha * r)).finite().store(at);
            }
        }
    }
}

on_path! {
    /// `y += alpha sqrt(sum scale)` with a scale per row, -inf for what is not finite.
    ///
    /// # Safety
    /// `y` and `sums` hold a row for each scale.
    add_spread(y: *mut f32, sums: *const f32, scales: &[f32], alpha: f32), add_spread_of
}

#[inline(always)]
unsafe fn add_spread_of<V: Vector>(y: *mut f32, sums: *const f32, scales: &[f32], alpha: f32) {
    for (i, scale) in scales.iter().enumerate() {
        for half in [0, V::WIDTH] {
            // SAFETY: the contract.
            unsafe {
                let i = i * 2 * V::WIDTH + half;
                let width = V::load(sums.add(i)).mul(V::splat(*scale)).sqrt();
                V::load(y.add(i)).fma(V::splat(alpha), width).finite().store(y.add(i));
            }
        }
    }
}

/// Sums across N vectors of each row times factors: of clusters to `out`, of all sinks together.
#[inline(always)]
unsafe fn sums<V: Vector, const N: usize, const SQUARE: bool>(
    y: *const f32,
    scored: Scored<'_>,
    factors: &[f32; MAX_LANES],
    out: &mut [f32],
) -> f32 {
    let (stride, (first, n_sink)) = (2 * V::WIDTH, scored.sinks);
    // SAFETY: the contract of `probabilities`.
    unsafe {
        let mut sinks = V::splat(0.0);
        for i in (0..out.len()).chain(first..first + n_sink) {
            let mut sum = V::splat(0.0);
            for n in 0..N {
                let x = V::load(y.add(i * stride + n * V::WIDTH)).mul(V::load(factors.as_ptr().add(n * V::WIDTH)));
                sum = if SQUARE { sum.fma(x, x) } else { sum.add(x) };
            }
            match out.get_mut(i) {
                Some(out) => *out = sum.sum(),
                None => sinks = sinks.add(sum),
            }
        }
        sinks.sum()
    }
}

on_path! {
    /// Sums over the first `lanes` lanes of the probabilities per key that scores give, times `factor`, or of the squares
    /// of those: to `out`, one for each cluster; returns that of all sinks. The scores are spent.
    ///
    /// # Safety
    /// `y` holds what `scored` says; `lanes <= LANES`; `out` is as long as the counts.
    probabilities(y: *mut f32, scored: Scored<'_>, lanes: usize, factor: f32, square: bool, out: &mut [f32]) -> f32,
    probabilities_of
}

#[inline(always)]
unsafe fn probabilities_of<V: Vector>(
    y: *mut f32,
    scored: Scored<'_>,
    lanes: usize,
    factor: f32,
    square: bool,
    out: &mut [f32],
) -> f32 {
    let stride = 2 * V::WIDTH;
    let Scored { count, sinks: (first, n_sink) } = scored;
    // SAFETY: the contract.
    unsafe {
        let mut inverse = [0.0f32; MAX_LANES];
        for half in (0..lanes).step_by(V::WIDTH) {
            let y = y.add(half);
            // Not -inf: where every score is -inf, each weight shall be 0, not NaN.
            let mut top = V::splat(f32::MIN);
            for i in (0..count.len()).chain(first..first + n_sink) {
                top = V::load(y.add(i * stride)).max(top);
            }
            let mut total = V::splat(0.0);
            for (i, n) in count.iter().enumerate() {
                let at = y.add(i * stride);
                let weight = V::load(at).sub(top).exp();
                weight.store(at);
                total = total.fma(V::splat(*n), weight);
            }
            for i in first..first + n_sink {
                let at = y.add(i * stride);
                let weight = V::load(at).sub(top).exp();
                weight.store(at);
                total = total.add(weight);
            }
            total.store(inverse.as_mut_ptr().add(half));
        }
        for (lane, x) in inverse.iter_mut().enumerate() {
            *x = if lane < lanes && *x > 0.0 { factor / *x } else { 0.0 };
        }
        match (lanes <= V::WIDTH, square) {
            (true, false) => sums::<V, 1, false>(y, scored, &inverse, out),
            (true, true) => sums::<V, 1, true>(y, scored, &inverse, out),
            (false, false) => sums::<V, 2, false>(y, scored, &inverse, out),
            (false, true) => sums::<V, 2, true>(y, scored, &inverse, out),
        }
    }
}
