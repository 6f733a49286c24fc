//! The orthonormal Hadamard transform that llama.cpp applies to the rows of a quantised cache. Symmetric, so its own
//! inverse.

/// Multiplies each run of `block` numbers by the orthonormal Hadamard matrix in Sylvester's order, in place. Block 0 or 1
/// leaves `x` as it is, and so do numbers after the last whole block.
///
/// # Panics
/// In debug builds, where `block` is no power of two.
pub fn hadamard(x: &mut [f32], block: usize) {
    if block < 2 {
        return;
    }
    debug_assert!(block.is_power_of_two());
    let scale = 1.0 / (block as f32).sqrt();
    for run in x.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for pair in run.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        run.iter_mut().for_each(|value| *value *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_sylvesters_matrix() {
        // Element (i, j) is +-1 by the parity of the bits that i and j share.
        let n = 64;
        for j in 0..n {
            let mut x = vec![0.0; 2 * n];
            x[n + j] = 1.0;
            hadamard(&mut x, n);
            assert!(x[..n].iter().all(|value| *value == 0.0));
            for (i, value) in x[n..].iter().enumerate() {
                let sign = if (i & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                assert_eq!(*value, sign / 8.0);
            }
        }
    }

    #[test]
    fn it_is_its_own_inverse_and_block_0_does_nothing() {
        let x: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin()).collect();
        for block in [0, 1, 2, 64, 256] {
            let mut y = x.clone();
            hadamard(&mut y, block);
            assert_eq!(block < 2, y == x);
            hadamard(&mut y, block);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}
