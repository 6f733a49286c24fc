//! A layer 0 with rotary positions: the sketch must part tokens, neighbours, and positions that one frequency confuses.

use super::super::tests::{capture, gaussian, settings};
use super::*;

const HEADS: usize = 2;
const DIM: usize = 64;

/// A cache whose V depends on the token and whose K is the token's, rotated by its position (pairs i, i + 32).
fn rotary(tokens: &[i32]) -> LayerCapture {
    let row = HEADS * DIM;
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for (p, &t) in tokens.iter().enumerate() {
        let key = gaussian(row, t as u64);
        v.extend(gaussian(row, t as u64 ^ (1 << 40)));
        let mut turned = vec![0.0; row];
        for h in 0..HEADS {
            for i in 0..DIM / 2 {
                let angle = p as f64 * 10000f64.powf(-2.0 * i as f64 / DIM as f64);
                let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
                let (a, b) = (h * DIM + i, h * DIM + i + DIM / 2);
                turned[a] = key[a] * cos - key[b] * sin;
                turned[b] = key[a] * sin + key[b] * cos;
            }
        }
        k.extend(turned);
    }
    let half = |x: Vec<f32>| x.into_iter().map(f16::from_f32).collect();
    LayerCapture {
        layer: 0,
        n_head_kv: HEADS as u32,
        n_group: 1,
        head_dim_k: DIM as u32,
        head_dim_v: DIM as u32,
        scale: 0.125,
        k: half(k),
        v: half(v),
        q: Vec::new(),
    }
}

/// 3000 tokens of 300 kinds, frequent ones and rare ones.
fn text() -> Vec<i32> {
    let mut state = 5;
    let mut draw = || (split_mix(&mut state) % 300) as i32;
    (0..3000).map(|_| draw().min(draw())).collect()
}

#[test]
fn tokens_and_positions_are_told_apart() {
    let tokens = text();
    let sketch = sketch(&rotary(&tokens)).unwrap();
    assert_eq!((sketch.k_dims.len(), sketch.v_dims.len()), (DIMS, DIMS));
    assert!(sketch.k_dims.windows(2).chain(sketch.v_dims.windows(2)).all(|w| w[0] < w[1]));
    let margin = sketch_margin(&sketch, &tokens);
    assert!(margin.nearest_token > 0.3, "{margin:?}");
    assert!(margin.nearest_position > 0.15, "{margin:?}");
}

#[test]
fn a_neighbour_and_an_alias_are_other_positions() {
    // 44 and 710 are nearly whole turns of the fastest frequency. The elements are chosen on ordinary text, and then
    // have to part copies of one token at just these distances.
    let tokens = text();
    let dims = sketch(&rotary(&tokens)).unwrap().k_dims;
    for lag in [1, 2, 44, 710] {
        let same = rotary(&vec![7; lag + 1]);
        let k = take(&same.k, HEADS * DIM, &dims);
        let table = Table::new(&k, dims.len());
        let distance = table.distance(0, lag as u32);
        assert!(distance > 0.2, "lag {lag}: {distance}");
    }
}

#[test]
fn stored_elements_are_the_raw_ones() {
    let c = rotary(&text()[..50]);
    let sketch = sketch(&c).unwrap();
    for p in 0..50 {
        for j in 0..DIMS {
            assert_eq!(sketch.k[p * DIMS + j], c.k[p * 128 + sketch.k_dims[j] as usize]);
            assert_eq!(sketch.v[p * DIMS + j], c.v[p * 128 + sketch.v_dims[j] as usize]);
        }
    }
}

#[test]
fn blocks_are_those_of_llama_cpp() {
    let cases = [(64, 64), (128, 128), (192, 64), (256, 256), (80, 0), (96, 0), (32, 0), (320, 64)];
    for (dim, k) in cases {
        assert_eq!(cache_blocks(dim, dim), (k, if dim % 64 == 0 { 64 } else { 0 }));
    }
}

#[test]
fn peaks_are_the_largest_elements_after_the_transform() {
    let c = rotary(&text()[..30]);
    let s = sketch(&c).unwrap();
    assert_eq!((s.k_block, s.v_block, s.k_peaks.len()), (64, 64, 30 * 4));
    let mut row: Vec<f32> = c.k[7 * 128..8 * 128].iter().map(|x| x.to_f32()).collect();
    rotate(&mut row, 64);
    for (run, peak) in row.chunks(32).zip(&s.k_peaks[7 * 4..]) {
        let largest = run.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!((peak.to_f32() - largest).abs() <= largest / 2048.0);
    }
    // Plain heads: the raw elements. 24 runs of 32 are thinned out to 8.
    let mut c = capture(5, 1, 32, 1, 3);
    let s = sketch(&c).unwrap();
    assert_eq!((s.k_block, s.v_block, s.k_peaks.len()), (0, 0, 5 * 8));
    let largest = |run: &[f16]| run.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max);
    assert_eq!(s.k_peaks[1].to_f32(), largest(&c.k[3 * 32..4 * 32]));
    // What does not fit half precision stays finite.
    c.k.fill(f16::MAX);
    (c.n_head_kv, c.head_dim_k, c.k) = (1, 768, c.k);
    c.v.truncate(5 * 20);
    assert!(sketch(&c).unwrap().k_peaks.iter().all(|x| x.is_finite()));
}

#[test]
fn elements_that_never_change_are_not_chosen() {
    let mut c = LayerCapture { layer: 0, ..capture(200, 1, 1, 1, 3) };
    for p in 0..200 {
        c.k[p * 24..p * 24 + 8].fill(f16::from_f32(30.0));
        c.v[p * 20..p * 20 + 4].fill(f16::from_f32(30.0));
    }
    let sketch = sketch(&c).unwrap();
    assert!(sketch.k_dims.iter().all(|&d| d >= 8), "{:?}", sketch.k_dims);
    assert!(sketch.v_dims.iter().all(|&d| d >= 4), "{:?}", sketch.v_dims);
}

#[test]
fn narrow_rows_and_single_tokens_work() {
    let mut c = rotary(&[1]);
    assert_eq!(sketch(&c).unwrap().k.len(), DIMS);
    (c.n_head_kv, c.head_dim_k, c.head_dim_v) = (1, 3, 2);
    c.k.truncate(3);
    c.v.truncate(2);
    let s = sketch(&c).unwrap();
    assert_eq!((&s.k_dims[..], &s.v_dims[..]), (&[0, 1, 2][..], &[0, 1][..]));
    let margin = sketch_margin(&s, &[1]);
    assert_eq!(margin, SketchMargin { nearest_token: f32::INFINITY, nearest_position: f32::INFINITY, is_later: false });
    c.k.clear();
    c.v.clear();
    assert_eq!(sketch(&c).unwrap_err(), BuildError::TooShort { n_prefix: 0, needed: 1 });
}

#[test]
fn margins_are_the_smallest_distances() {
    let tokens: Vec<i32> = text()[..400].to_vec();
    let sketch = sketch(&rotary(&tokens)).unwrap();
    let margin = sketch_margin(&sketch, &tokens);
    let (k, v) = (Table::new(&sketch.k, DIMS), Table::new(&sketch.v, DIMS));
    let (mut token, mut position) = (f32::INFINITY, f32::INFINITY);
    for a in 0..400u32 {
        for b in 0..a {
            if tokens[a as usize] == tokens[b as usize] {
                position = position.min(k.distance(a, b));
            } else {
                token = token.min(v.distance(a, b));
            }
        }
    }
    assert_eq!((margin.nearest_token, margin.nearest_position), (token, position));
}

#[test]
fn a_position_is_told_by_value_too_where_values_depend_on_it() {
    // one token, keys that never change: only V parts the positions, as it may behind layer 0
    let mut c = LayerCapture { layer: 5, ..rotary(&[1, 2, 3]) };
    let row = HEADS * DIM;
    let first = c.k[..row].to_vec();
    c.k.chunks_exact_mut(row).for_each(|k| k.copy_from_slice(&first));
    let s = sketch(&c).unwrap();
    assert_eq!((s.k_dims.len(), s.v_dims.len()), (DIMS_LATER, DIMS_LATER));
    assert!(sketch_margin(&s, &[1, 1, 1]).nearest_position > 0.3);
}

#[test]
fn the_margin_of_a_later_layer_is_what_most_tokens_have() {
    let tokens: Vec<i32> = text()[..400].to_vec();
    let capture = LayerCapture { layer: 5, ..rotary(&tokens) };
    let s = sketch(&capture).unwrap();
    let (k, v) = (Table::new(&s.k, DIMS_LATER), Table::new(&s.v, DIMS_LATER));
    let nearest = |a: usize, same: bool| {
        let b = (0..400).filter(|b| *b != a && (tokens[a] == tokens[*b]) == same);
        let of = |b: usize| match (a as u32, b as u32) {
            (a, b) if same => v.distance(a, b).max(2.0 * k.distance(a, b)),
            (a, b) => v.distance(a, b),
        };
        b.map(of).fold(f32::INFINITY, f32::min)
    };
    let margin = sketch_margin(&s, &tokens);
    assert!(margin.is_later && margin.nearest_token > 2.0 * LATER_TOLERANCE, "{margin:?}");
    for (got, same, share) in [(margin.nearest_token, false, 100), (margin.nearest_position, true, 10)] {
        let all: Vec<f32> = (0..400).map(|a| nearest(a, same)).filter(|x| x.is_finite()).collect();
        let (below, up_to) = (all.iter().filter(|x| **x < got).count(), all.iter().filter(|x| **x <= got).count());
        assert!(below <= all.len() / share && up_to > all.len() / share, "{below} and {up_to} of {}", all.len());
    }
    // Two rows that are alike are no reason to refuse, twenty are.
    let alike = |n: usize| {
        let mut c = LayerCapture { layer: 5, ..rotary(&tokens) };
        let row = HEADS * DIM;
        for (p, v) in c.v.chunks_exact_mut(row).enumerate() {
            v.copy_from_slice(&gaussian(row, p as u64).into_iter().map(f16::from_f32).collect::<Vec<_>>());
        }
        for p in (0..2 * n).step_by(2).filter(|p| tokens[*p] != tokens[p + 1]) {
            c.v.copy_within(p * row..(p + 1) * row, (p + 1) * row);
        }
        sketch_margin(&sketch(&c).unwrap(), &tokens).tolerance()
    };
    assert_eq!((alike(1), alike(10)), (Some(LATER_TOLERANCE), None));
}

#[test]
fn what_is_too_near_for_the_tolerance_is_refused() {
    let of = |nearest_token, nearest_position, is_later| {
        SketchMargin { nearest_token, nearest_position, is_later }.tolerance()
    };
    assert_eq!(of(0.06, 0.06, false), Some(SKETCH_TOLERANCE));
    assert_eq!((of(0.05, 1.0, false), of(1.0, 0.05, false)), (None, None));
    assert_eq!(of(0.2, 0.2, true), Some(LATER_TOLERANCE));
    assert_eq!((of(0.19, 1.0, true), of(1.0, 0.19, true)), (None, None));
}

#[test]
fn a_distance_is_relative_to_the_row_but_never_to_a_tiny_one() {
    let half = |x: [f32; 6]| x.map(f16::from_f32);
    // Rows (3, 4), (3, 3) and (0, 0): norms 5, 4.24 and 0.
    let table = Table::new(&half([3.0, 4.0, 3.0, 3.0, 0.0, 0.0]), 2);
    assert!((table.distance(0, 1) - 0.2).abs() < 1e-6);
    assert!((table.distance(2, 0) - 1.0).abs() < 1e-6);
    let far = Table::new(&half([100.0, 0.0, 0.01, 0.0, 0.0, 0.0]), 2);
    assert!(far.distance(1, 2) < 1e-3);
    // A sketch without any signal tells nothing apart.
    assert_eq!(Table::new(&half([0.0; 6]), 2).distance(0, 1), 0.0);
}

#[test]
fn probes_are_rows_of_spread_tokens() {
    let tokens = probe_tokens(1000, &settings(16, 100));
    assert_eq!(tokens, [16 + 221 - 1, 16 + 442 - 1, 16 + 663 - 1, 899]);
    assert_eq!(probe_tokens(19, &settings(10, 6)), [10, 11, 12]);
    assert_eq!(probe_tokens(10, &settings(10, 6)), []);
    let c = capture(30, 1, 2, 1, 1);
    let p = probe(&c, &[3, 29]);
    assert_eq!((p.layer, &p.tokens[..]), (5, &[3, 29][..]));
    assert_eq!(p.k[..48], c.k[3 * 48..4 * 48]);
    assert_eq!(p.k[48..], c.k[29 * 48..]);
}
