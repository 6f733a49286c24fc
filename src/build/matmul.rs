//! Row-by-row dot products as a matrix product, on the calling thread alone.

/// `out[i][j] = a[i] . b[j]` for rows of `dim` elements: `a` is `[m][dim]`, `b` is `[n][dim]`, `out` is `[m][n]`.
///
/// The result of a call depends on its arguments alone (and on the instruction set of the machine).
///
/// # Panics
/// If `a` or `b` holds no whole number of rows, or `out` is not `m * n` long.
pub(super) fn dot_rows(a: &[f32], b: &[f32], dim: usize, out: &mut [f32]) {
    let (m, n) = (a.len() / dim, b.len() / dim);
    assert!(a.len() == m * dim && b.len() == n * dim && out.len() == m * n, "dot_rows: {m} x {n} x {dim}");
    let (row, columns) = (dim as isize, n as isize);
    // SAFETY: a is m rows of dim, b is n rows of dim (read as dim x n by its strides) and out is m rows of n, all
    // checked above; out is borrowed exclusively, so it overlaps neither. With beta = 0 out is written, never read.
    unsafe {
        matrixmultiply::sgemm(
            m,
            dim,
            n,
            1.0,
            a.as_ptr(),
            row,
            1,
            b.as_ptr(),
            1,
            row,
            0.0,
            out.as_mut_ptr(),
            columns,
            1,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_multiplied_with_rows() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [1.0, 0.0, -1.0, 2.0, 2.0, 2.0, 0.0, 1.0, 0.0];
        let mut out = [f32::NAN; 6];
        dot_rows(&a, &b, 3, &mut out);
        assert_eq!(out, [-2.0, 12.0, 2.0, -2.0, 30.0, 5.0]);
    }
}
