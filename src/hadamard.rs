//! Products with the orthonormal Hadamard matrix in Sylvester's order, the basis of llama.cpp's quantised caches.

#![forbid(unsafe_code)]

/// Multiplies each run of `block` elements by the matrix, in place: `2^(-n/2) (-1)^popcount(i & j)` at `(i, j)` for a
/// block of `2^n`. Applied twice it gives back what was there, but for rounding. A block of 0 leaves all as it is; so does
/// one that is no power of two. Elements beyond the last whole block stay as they are.
pub fn rotate(x: &mut [f32], block: usize) {
    if !block.is_power_of_two() {
        return;
    }
    let factor = (1.0 / block as f64).sqrt() as f32;
    for x in x.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for pair in x.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Whether `block` is one that rotations of rows of `size` elements may have: 0, or a power of two that divides it.
pub fn fits(block: usize, size: usize) -> bool {
    block == 0 || (block.is_power_of_two() && size.is_multiple_of(block))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_is_the_product_with_the_matrix() {
        for block in [1usize, 2, 8, 64, 128] {
            let x: Vec<f32> = (0..2 * block).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut y = x.clone();
            rotate(&mut y, block);
            for (i, y) in y.iter().enumerate() {
                let (from, i) = (i / block * block, i % block);
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let want: f64 = (0..block).map(|j| sign(j) * x[from + j] as f64).sum::<f64>() / (block as f64).sqrt();
                assert!((*y as f64 - want).abs() < 1e-6, "block {block}, row {i}");
            }
            rotate(&mut y, block);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-6));
        }
    }

    #[test]
    fn blocks_that_are_no_power_of_two_change_nothing() {
        for block in [0, 3, 48] {
            let mut x = vec![1.0, 2.0, 3.0];
            rotate(&mut x, block);
            assert_eq!(x, [1.0, 2.0, 3.0]);
        }
        assert!(fits(0, 72) && fits(8, 72) && !fits(16, 72) && !fits(24, 72));
    }
}
