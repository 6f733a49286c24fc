//! The inner loops of every path of this machine: against written-out blocks, exact functions and the scalar path.

use half::{bf16, f16};

use super::*;

const SOURCES: [Source; 6] = [Source::F32, Source::F16, Source::BF16, Source::Q8_0, Source::Q4_0, Source::U8];

/// Numbers over a range, none of them round, and their number no multiple of 16.
fn numbers(from: f32, to: f32) -> Vec<f32> {
    let n = 20_003;
    (0..n).map(|i| from + (to - from) * (i as f32 + 0.37) / n as f32).collect()
}

fn largest_error(got: &[f32], want: impl Iterator<Item = f64>) -> f64 {
    got.iter().zip(want).fold(0.0, |m, (g, w)| m.max((*g as f64 - w).abs() / w.abs().max(1e-30)))
}

fn row_bytes(source: Source, d: usize) -> usize {
    match source {
        Source::F32 => 4 * d,
        Source::F16 | Source::BF16 => 2 * d,
        Source::Q8_0 => 34 * d / 32,
        Source::Q4_0 => 18 * d / 32,
        Source::U8 => d,
    }
}

/// A row of 64 elements with values that were worked out by hand, and those values.
fn known(source: Source) -> (Vec<u8>, Vec<f32>) {
    let ramp: Vec<f32> = (0..64).map(|i| (i as f32 - 31.0) * 0.5).collect();
    match source {
        Source::F32 => (ramp.iter().flat_map(|x| x.to_le_bytes()).collect(), ramp),
        Source::F16 => (ramp.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(), ramp),
        Source::BF16 => (ramp.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(), ramp),
        Source::U8 => ((0..64).map(|i| i * 4).collect(), (0..64).map(|i| i as f32 * 4.0).collect()),
        Source::Q8_0 => {
            // d = 0.5 (0x3800), q = -128, -120, ...; d = -2 (0xc000), q = 0, 1, ...
            let mut bytes = vec![0x00, 0x38];
            bytes.extend((0..32).map(|i| (i * 8 - 128) as u8));
            bytes.extend([0x00, 0xc0]);
            bytes.extend(0..32);
            let first = (0..32).map(|i| 4.0 * i as f32 - 64.0);
            (bytes, first.chain((0..32).map(|i| -2.0 * i as f32)).collect())
        }
        Source::Q4_0 => {
            // d = 0.5: byte i is i in the low half and 15 - i in the high one; d = 2^-24, the smallest there is: 0x8f.
            let mut bytes = vec![0x00, 0x38];
            bytes.extend((0..16u8).map(|i| i | (15 - i) << 4));
            bytes.extend([0x01, 0x00]);
            bytes.extend([0x8f; 16]);
            let tiny = 2.0f32.powi(-24);
            let low = (0..16).map(|i| 0.5 * (i as f32 - 8.0));
            let high = (0..16).map(|i| 0.5 * (7.0 - i as f32));
            (bytes, low.chain(high).chain([7.0 * tiny; 16]).chain([0.0; 16]).collect())
        }
    }
}

#[test]
fn every_type_is_decoded_as_its_layout_says() {
    for (path, source) in Path::available().into_iter().flat_map(|p| SOURCES.map(|s| (p, s))) {
        let (row, want) = known(source);
        assert_eq!(row.len(), row_bytes(source, 64));
        let rows = [row.as_ptr(); 4];
        let mut acc = vec![0.0; 64];
        let p = [&[0.0, 0.0, 1.0, 0.0][..], &[0.0; BLOCK - 4]].concat();
        // SAFETY: four rows of 64 elements, one head.
        unsafe { accumulate(path, source, &p, 64, &rows, &[], &mut acc) };
        assert_eq!(acc, want, "{source:?} on {}", path.name());
        let mut decoded = vec![f32::NAN; 4 * 64];
        // SAFETY: four rows of 64 elements.
        unsafe { decode(path, source, &rows, 64, &mut decoded) };
        assert!(decoded.chunks(64).all(|row| row == want), "{source:?} on {}", path.name());
        for (i, want) in want.iter().enumerate() {
            let mut q = vec![0.0; 64];
            q[i] = 1.0;
            let mut out = [f32::NAN; BLOCK];
            // SAFETY: as above.
            unsafe { dots(path, source, &q, 64, &rows, &[], &mut out) };
            assert_eq!(out[..4], [*want; 4], "element {i} of {source:?} on {}", path.name());
        }
    }
}

#[test]
fn dots_and_sums_of_every_shape_are_those_of_the_scalar_path() {
    let random = |n: usize, seed: usize| -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    };
    for (source, d) in SOURCES.into_iter().flat_map(|s| [64, 72, 80, 88, 96, 128, 256].map(|d| (s, d))) {
        if matches!(source, Source::Q8_0 | Source::Q4_0) && d % 32 != 0 {
            continue;
        }
        let bytes = row_bytes(source, d);
        // Rows end where the allocation ends, so that a read too far is one that tools can see.
        let mut data: Vec<u8> = (0..BLOCK * bytes).map(|i| (i * 31 % 251) as u8).collect();
        match source {
            Source::F32 => data.chunks_exact_mut(4).for_each(|c| c[3] = 0x3f),
            Source::F16 | Source::BF16 => data.chunks_exact_mut(2).for_each(|c| c[1] = 0x38 | c[1] & 0x83),
            Source::Q8_0 => data.chunks_exact_mut(34).for_each(|c| c[1] = 0x24),
            Source::Q4_0 => data.chunks_exact_mut(18).for_each(|c| c[1] = 0x24),
            Source::U8 => {}
        }
        let rows: Vec<*const u8> = data.chunks_exact(bytes).map(|row| row.as_ptr()).collect();
        for heads in 1..=16 {
            for n in [4, 12, 32] {
                let (q, p) = (random(heads * d, heads), random(heads * BLOCK, n));
                let run = |path| {
                    let (mut out, mut acc) = (vec![0.0; heads * BLOCK], random(heads * d, 5));
                    // SAFETY: rows of `d` elements, and buffers for that many heads.
                    unsafe {
                        dots(path, source, &q, d, &rows[..n], &rows[n..], &mut out);
                        accumulate(path, source, &p, d, &rows[..n], &rows[n..], &mut acc);
                    }
                    let mut decoded = vec![0.0; n * d];
                    // SAFETY: as above.
                    unsafe { decode(path, source, &rows[..n], d, &mut decoded) };
                    (out, acc, decoded)
                };
                let want = run(Path::Scalar);
                for path in Path::available() {
                    let got = run(path);
                    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-5 * (1.0 + b.abs());
                    let what = format!("{source:?}, d {d}, {heads} heads, {n} rows on {}", path.name());
                    let scale = if source == Source::U8 { 256.0 } else { 1.0 };
                    let scaled = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| x / scale).collect() };
                    assert!(scaled(&got.0).iter().zip(&scaled(&want.0)).all(near), "dots of {what}");
                    assert!(got.2 == want.2, "rows of {what}");
                    assert!(scaled(&got.1).iter().zip(&scaled(&want.1)).all(near), "sums of {what}");
                }
            }
        }
    }
}

#[test]
fn elementwise_functions_are_exact_to_f32() {
    for path in Path::available() {
        let x = numbers(-87.0, 5.0);
        let mut y = x.clone();
        let sum = exp_sum(path, &mut y, 5.0) as f64;
        let exact = || x.iter().map(|x| (*x as f64 - 5.0).exp()).map(|e| if e < 1.2e-38 { 0.0 } else { e });
        let offset = x.iter().position(|x| *x - 5.0 > -87.0).unwrap();
        assert!(offset < x.len() / 10);
        assert!(largest_error(&y[offset..], x[offset..].iter().map(|x| ((x - 5.0) as f64).exp())) < 3e-7);
        assert!((sum / exact().sum::<f64>() - 1.0).abs() < 2e-5);

        let x = numbers(-12.0, 12.0);
        let mut y = x.clone();
        cap(path, &mut y, 30.0);
        assert!(largest_error(&y, x.iter().map(|x| 30.0 * (*x as f64).tanh())) < 6e-7);

        let (a, b) = (numbers(0.0, 1.0), numbers(2.0, 3.0));
        let want: f64 = a.iter().zip(&b).map(|(a, b)| *a as f64 * *b as f64).sum();
        assert!((weighted_sum(path, &a, &b) as f64 / want - 1.0).abs() < 2e-5);
        let mut sum = a.clone();
        add_scaled(path, &mut sum, &b, 0.5);
        assert!(largest_error(&sum, a.iter().zip(&b).map(|(a, b)| *a as f64 + 0.5 * *b as f64)) < 2e-7);
    }
}

#[test]
fn edges_of_exp_and_max_are_those_of_the_scalar_path() {
    let edges = [f32::NEG_INFINITY, -1e30, -200.0, 0.0, -0.0, f32::NAN, -3.0, -87.0, -1.0];
    let mut b = edges;
    exp_sum(Path::Scalar, &mut b, 0.0);
    for path in Path::available() {
        let mut a = edges;
        exp_sum(path, &mut a, 0.0);
        assert_eq!(max(path, &edges), max(Path::Scalar, &edges));
        assert_eq!(max(path, &edges[..5]), 0.0);
        assert_eq!(max(path, &[]), f32::NEG_INFINITY);
        for (a, b) in a.iter().zip(b) {
            assert!(a.is_nan() == b.is_nan() && (a.is_nan() || (a - b).abs() <= 2e-7 * b), "{a} and {b}");
        }
    }
}
