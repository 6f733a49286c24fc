//! The CPU path against the oracle on random calls.

mod attend_case;

use attend_case::check::{check, close};
use attend_case::{decode, encode, Case, Spec, LAYER};
use ggml_squeeze::attention::cpu::{self, Memory, Options, Path, Plan, Schedule, Unsupported};
use ggml_squeeze::attention::{keys_of_share, oracle, Call, Element, Mode, Rotation, Row, Selection, Spread};
use ggml_squeeze::hadamard;
use proptest::prelude::*;

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        (0.0f32..0.9).prop_map(Mode::Budget),
        Just(Mode::Budget(1.0)),
        (1e-4f32..1e-2, 0.0f32..0.3).prop_map(|(threshold, floor)| Mode::Threshold { threshold, floor }),
        (0.1f32..0.99).prop_map(Mode::Mass),
    ]
}

fn specs() -> impl Strategy<Value = Spec> {
    let dims = || prop::sample::select(vec![64usize, 72, 80, 96, 128, 192, 256]);
    let shape = (dims(), dims(), 1usize..=16, 1usize..=3, 1usize..=8, 1usize..=2);
    let prefix = (60usize..220, 0usize..12, 0usize..24, 0usize..60, 1usize..24, 0.0f32..1.2);
    let spread = prop::sample::select(vec![Spread::None, Spread::Radius, Spread::Diag]);
    let select = (modes(), spread, any::<bool>());
    let flavour = (any::<[bool; 4]>(), prop::sample::select(vec![0.0f32, 0.0, 30.0]));
    let cache = (types(), types(), 0usize..9, 0usize..9);
    let tile = prop::sample::select(vec![1usize, 2, 3, 5, 16, 64]);
    (any::<u64>(), shape, prefix, select, flavour, cache, tile).prop_map(spec_of)
}

type Drawn = (
    u64,
    (usize, usize, usize, usize, usize, usize),
    (usize, usize, usize, usize, usize, f32),
    (Mode, Spread, bool),
    ([bool; 4], f32),
    (Element, Element, usize, usize),
    usize,
);

fn spec_of((seed, shape, prefix, select, (flags, softcap), (k_type, v_type, k, v), tile): Drawn) -> Spec {
    let whole = |size: usize, element: Element| if size.is_multiple_of(element.block()) { size } else { 96 };
    let (dk, dv) = (whole(shape.0, k_type), whole(shape.1, v_type));
    // Every second cache is plain; the largest blocks are those that divide the head size.
    let block =
        |n: usize, size: usize| if n.is_multiple_of(2) { 0 } else { 1 << (n.min(size.trailing_zeros() as usize)) };
    Spec {
        seed,
        dk,
        dv,
        group: shape.2,
        n_head_kv: shape.3,
        n_query: shape.4,
        n_stream: shape.5,
        n_prefix: prefix.0,
        n_sink: prefix.1,
        n_window: prefix.2,
        n_other: prefix.3,
        n_cluster: prefix.4,
        n_coarse: if seed % 3 == 0 { prefix.4 / 4 } else { 0 },
        coarse_streams: usize::MAX,
        lopsided: false,
        sparse: prefix.5,
        mask: flags[0],
        mask_per_head: flags[1],
        sinks: flags[2],
        head_major: flags[3],
        contiguous: seed % 4 == 0,
        gap: (seed % 5 * 8) as usize,
        softcap,
        max_bias: 0.0,
        plain_mask: false,
        selection: Selection { mode: select.0, spread: select.1, alpha: 2.0, estimate: select.2, coarse_share: 1.0 },
        k_type,
        v_type,
        rotation: Rotation { k: block(k, dk), v: block(v, dv) },
        tile,
    }
}

fn types() -> impl Strategy<Value = Element> {
    prop::sample::select(Element::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn calls_of_every_kind_agree_with_the_oracle(spec in specs(), planned in 1usize..5, nth in 1usize..5) {
        check(&spec, planned, nth);
    }

    #[test]
    fn forced_plans_are_dense_attention(spec in specs(), alibi in any::<bool>(), nth in 1usize..4) {
        let spec = Spec { sparse: 0.0, max_bias: if alibi { 8.0 } else { 0.0 }, ..spec };
        let mut case = Case::new(&spec);
        let want = oracle::run(&case.call);
        let plan = Plan::forced(case.call.problem, 2, &mut Memory::default()).unwrap();
        close(&case.run(&plan, nth), &want, "forced");
        prop_assert_eq!(plan.kept().count, 0);
    }

    #[test]
    fn budget_1_is_dense_attention(spec in specs(), nth in 1usize..4) {
        let spec = Spec { sparse: 1.0, plain_mask: true, mask_per_head: false, ..spec };
        let spec = Spec { selection: Selection { mode: Mode::Budget(1.0), ..spec.selection }, ..spec };
        let mut case = Case::new(&spec);
        let plan = case.plan(nth, Options::default()).unwrap();
        let got = case.run(&plan, nth);
        prop_assert_eq!(plan.kept().share_sum, plan.kept().count as f64);
        let mut dense = case.call.clone();
        dense.rows = vec![Row::Dense; dense.rows.len()].into();
        close(&got, &oracle::run(&dense), "budget 1");
    }
}

#[test]
fn many_rows_over_many_cells() {
    let spec = Spec { n_query: 40, n_prefix: 900, n_other: 200, n_cluster: 45, sparse: 0.7, ..Spec::base() };
    check(&spec, 3, 2);
    check(&Spec { n_query: 1, dk: 128, dv: 128, group: 7, seed: 5, ..spec }, 8, 4);
}

#[test]
fn tiles_of_every_size_over_many_cells() {
    let spec = Spec { n_query: 70, n_prefix: 700, n_other: 200, n_cluster: 70, sparse: 0.95, ..Spec::base() };
    for (tile, group) in [(2, 1), (7, 3), (16, 7), (64, 2)] {
        check(&Spec { tile, group, ..spec.clone() }, 3, 2);
    }
}

/// Rows of a tile with a mask each: what one sees is hidden from the next, and is not a number.
#[test]
fn a_value_that_is_not_finite_reaches_only_the_rows_that_see_it() {
    for per_head in [false, true] {
        let spec = Spec { n_query: 5, n_other: 30, tile: 5, sparse: 2.0, mask_per_head: per_head, ..Spec::base() };
        let mut case = Case::new(&spec);
        let n_kv = case.call.problem.k.ne[1];
        let cell = *case.call.bindings[0].always.last().unwrap() as usize;
        let row = case.k.len() / n_kv;
        case.k[cell * row..(cell + 1) * row].fill(0xff);
        case.v[cell * row..(cell + 1) * row].fill(0xff);
        for (i, mask) in case.mask.chunks_exact_mut(n_kv).enumerate() {
            mask[cell] = if i % 5 == 2 { half::f16::ZERO } else { half::f16::NEG_INFINITY };
        }
        let want = oracle::run(&case.call);
        let n_row = want.len() / 5;
        assert!(want.chunks(n_row).enumerate().all(|(i, out)| out.iter().all(|x| x.is_nan() == (i == 2))));
        let options =
            Path::available().into_iter().flat_map(|path| [Schedule::Split, Schedule::Fused].map(|s| (path, s)));
        for (path, schedule) in options {
            let plan = case.plan(2, Options { path: Some(path), schedule: Some(schedule) }).unwrap();
            let got = case.run(&plan, 2);
            for (i, (got, want)) in got.chunks(n_row).zip(want.chunks(n_row)).enumerate() {
                match i {
                    2 => assert!(got.iter().all(|x| x.is_nan())),
                    _ => close(got, want, &format!("row {i} on {}", path.name())),
                }
            }
        }
    }
}

#[test]
fn the_oracle_selects_once_per_tile_by_the_root_mean_square_of_the_rows() {
    let spec = Spec { n_query: 7, n_head_kv: 1, group: 1, sparse: 2.0, tile: 3, ..Spec::base() };
    let case = Case::new(&spec);
    assert_eq!(case.call.tiles.to_vec(), [0..2, 2..4, 4..7]);
    let alone = |row: usize| {
        let call = Call { tiles: Vec::new().into(), ..case.call.clone() };
        oracle::scores(&call, row, 0)
    };
    let of_tile = oracle::scores(&case.call, 5, 0);
    for i in 0..spec.n_cluster {
        let mean = (4..7).map(|row| alone(row).p[i].powi(2)).sum::<f64>() / 3.0;
        assert!((of_tile.p[i] - mean.sqrt()).abs() < 1e-15);
    }
    assert_eq!(of_tile.y, alone(5).y);
    assert_eq!(oracle::selection(&case.call, 4, 0), oracle::selection(&case.call, 6, 0));
    assert_ne!(oracle::scores(&case.call, 1, 0).p, of_tile.p);
}

#[test]
fn the_oracle_gives_the_mean_for_a_zero_query() {
    let spec = Spec { n_query: 1, n_head_kv: 1, group: 1, sparse: 0.0, mask: false, n_other: 0, ..Spec::base() };
    let mut case = Case::new(&spec);
    case.q.fill(0.0);
    case.call.problem.q.data = case.q.as_mut_ptr().cast();
    for (d, got) in oracle::run(&case.call).into_iter().enumerate() {
        let v = case.v.chunks_exact(2).skip(d).step_by(spec.dv);
        let sum: f64 = v.map(|v| half::f16::from_le_bytes([v[0], v[1]]).to_f64()).sum();
        let mean = sum / spec.n_prefix as f64;
        assert!((got - mean).abs() < 1e-12, "dimension {d}: {got} is not the mean {mean}");
    }
}

#[test]
fn the_estimate_of_every_cluster_is_close_to_dense_where_clusters_are_tight() {
    // One key per cluster: a dropped cluster's estimate is its key's own term, up to the rounding of the centroid.
    let spec = Spec { n_prefix: 120, n_sink: 2, n_window: 18, n_cluster: 100, plain_mask: true, ..Spec::base() };
    let selection =
        Selection { mode: Mode::Budget(0.1), spread: Spread::None, alpha: 0.0, estimate: true, coarse_share: 1.0 };
    let case = Case::new(&Spec { selection, ..spec.clone() });
    let dense = oracle::run(&Case::new(&Spec { sparse: 0.0, ..spec }).call);
    let largest = |got: &[f64]| got.iter().zip(&dense).fold(0.0f64, |m, (g, w)| m.max((g - w).abs()));
    let with = largest(&oracle::run(&case.call));
    let mut call = case.call.clone();
    call.selection.estimate = false;
    let without = largest(&oracle::run(&call));
    assert!(with < 1e-3 && without > 10.0 * with, "error {with} with the estimate, {without} without");
}

#[test]
fn every_pair_of_types_agrees_with_the_oracle() {
    for (n, (k_type, v_type)) in Element::ALL.iter().flat_map(|k| Element::ALL.map(|v| (*k, v))).enumerate() {
        let (dk, dv) = ([64, 128, 96][n % 3], [128, 64][n % 2]);
        let rotation = Rotation { k: [0, 32, 64][n % 3] * (dk % 64 == 0) as usize, v: [64, 0, 16][n % 3] };
        let selection = Selection { estimate: n % 2 == 0, ..Spec::base().selection };
        let spec =
            Spec { seed: n as u64, dk, dv, group: 1 + n % 9, k_type, v_type, rotation, selection, ..Spec::base() };
        check(&spec, 2, 2);
    }
}

#[test]
fn a_rotated_cache_gives_the_rotated_output_of_the_plain_one() {
    let selection = Selection { estimate: true, ..Spec::base().selection };
    let (k_type, v_type) = (Element::F32, Element::F32);
    let plain = Spec { dk: 128, dv: 96, k_type, v_type, selection, mask: false, ..Spec::base() };
    let rotation = Rotation { k: 128, v: 32 };
    let (plain, mut rotated) = (Case::new(&plain), Case::new(&Spec { rotation, ..plain }));
    rotated.q.copy_from_slice(&plain.q);
    rotated.q.chunks_exact_mut(128).for_each(|q| hadamard::rotate(q, rotation.k));
    let mut want: Vec<f32> = oracle::run(&plain.call).into_iter().map(|x| x as f32).collect();
    want.chunks_exact_mut(96).for_each(|out| hadamard::rotate(out, rotation.v));
    for (i, (got, want)) in oracle::run(&rotated.call).iter().zip(&want).enumerate() {
        assert!((got - *want as f64).abs() < 1e-4, "element {i} is {got}, the plain call's is {want}");
    }
    for (row, h) in (0..2).flat_map(|row| (0..2).map(move |h| (row, h))) {
        assert_eq!(oracle::selection(&rotated.call, row, h), oracle::selection(&plain.call, row, h));
    }
}

#[test]
fn the_oracle_reads_quantised_blocks_as_ggml_lays_them_out() {
    // One visible cell: the output is its value. d is 0.5 in the first block and -2 in the second.
    let low = |i: usize| (i as u8) | (15 - i as u8) << 4;
    let mut q4_0 = vec![0x00, 0x38];
    q4_0.extend((0..16).map(low));
    q4_0.extend([0x00, 0xc0]);
    q4_0.extend([0xf0; 16]);
    let nibbles = (0..16).chain((0..16).rev()).map(|n| 0.5 * (n as f64 - 8.0));
    let q4_0_values: Vec<f64> = nibbles.chain([16.0; 16]).chain([-14.0; 16]).collect();
    let mut q8_0 = vec![0x00, 0x38];
    q8_0.extend((0..32).map(|i| (i * 8 - 128) as u8));
    q8_0.extend([0x00, 0xc0]);
    q8_0.extend([0x81; 32]);
    let q8_0_values: Vec<f64> = (0..32).map(|i| 4.0 * i as f64 - 64.0).chain([254.0; 32]).collect();
    for (v_type, bytes, want) in [(Element::Q4_0, q4_0, q4_0_values), (Element::Q8_0, q8_0, q8_0_values)] {
        let spec = Spec { n_query: 1, n_head_kv: 1, group: 1, n_other: 0, sparse: 0.0, v_type, ..Spec::base() };
        let mut case = Case::new(&spec);
        case.mask.fill(half::f16::NEG_INFINITY);
        case.mask[5] = half::f16::ZERO;
        case.v[5 * bytes.len()..6 * bytes.len()].copy_from_slice(&bytes);
        assert_eq!(oracle::run(&case.call), want, "{v_type:?}");
        let as_f32: Vec<f32> = want.iter().map(|x| *x as f32).collect();
        assert_eq!(decode(v_type, &bytes), as_f32);
        let mut again = Vec::new();
        encode(v_type, &as_f32, &mut again);
        assert_eq!(decode(v_type, &again).len(), 64);
    }
}

#[test]
fn a_fully_masked_row_is_zero_and_every_output_is_written() {
    for sinks in [false, true] {
        let mut case = Case::new(&Spec { sparse: 0.0, sinks, ..Spec::base() });
        case.mask.fill(half::f16::NEG_INFINITY);
        case.call.problem.mask.as_mut().unwrap().data = case.mask.as_mut_ptr().cast();
        case.v.fill(0xff);
        case.call.problem.v.data = case.v.as_mut_ptr();
        let plan = case.plan(2, Options::default()).unwrap();
        assert!(case.run(&plan, 2).iter().all(|x| *x == 0.0), "sinks: {sinks}");
    }
}

#[test]
fn a_query_that_is_not_finite_neither_hangs_nor_crashes() {
    for value in [f32::NAN, f32::INFINITY, 1e38] {
        let mut case = Case::new(&Spec::base());
        case.q.fill(value);
        case.call.problem.q.data = case.q.as_mut_ptr().cast();
        for schedule in [Schedule::Split, Schedule::Fused] {
            let plan = case.plan(2, Options { path: None, schedule: Some(schedule) }).unwrap();
            case.run(&plan, 2);
            let kept = plan.kept();
            assert!(kept.share_sum / kept.count as f64 >= 0.2 - 1e-9, "the budget is filled all the same");
        }
    }
}

#[test]
#[allow(clippy::single_range_in_vec_init)]
fn calls_that_do_not_fit_are_refused_with_the_reason() {
    let case = Case::new(&Spec::base());
    let refused = |change: &dyn Fn(&mut Call)| {
        let mut call = case.call.clone();
        change(&mut call);
        Plan::new(call, 2, &mut Memory::default()).map(|_| ()).unwrap_err()
    };
    assert_eq!(refused(&|c| c.layer = 0), Unsupported::NoLayer { layer: 0 });
    assert_eq!(refused(&|c| c.problem.max_bias = 8.0), Unsupported::Alibi { max_bias: "8".into() });
    assert_eq!(refused(&|c| c.problem.q.ne[0] = 60), Unsupported::HeadDim { what: "key", size: 60 });
    assert_eq!(refused(&|c| c.problem.v.ne[0] = 512), Unsupported::HeadDim { what: "value", size: 512 });
    assert_eq!(refused(&|c| c.problem.k.nb[0] = 4), Unsupported::Stride { what: "k", step: 4, want: 2 });
    let q8_0 = |c: &mut Call| (c.problem.k_type, c.problem.k.nb[0]) = (Element::Q8_0, 34);
    assert_eq!(refused(&|c| c.problem.v_type = Element::F32), Unsupported::Stride { what: "v", step: 2, want: 4 });
    assert_eq!(refused(&|c| c.problem.k_type = Element::Q4_0), Unsupported::Stride { what: "k", step: 2, want: 18 });
    let partial = refused(&|c| (q8_0(c), c.problem.q.ne[0] = 72, c.problem.k.ne[0] = 72).2);
    assert_eq!(partial, Unsupported::Block { what: "key", size: 72, element: "q8_0", block: 32 });
    for block in [3, 24, 128] {
        let rotated = refused(&|c| c.rotation.k = block);
        assert_eq!(rotated, Unsupported::Rotation { what: "K", block, size: 64 });
        let rotated = refused(&|c| c.rotation.v = block);
        assert_eq!(rotated, Unsupported::Rotation { what: "V", block, size: 64 });
    }
    assert_eq!(refused(&|c| c.rows = vec![Row::Dense].into()), Unsupported::Rows { got: 1, want: 2 });
    assert_eq!(refused(&|c| c.rows = vec![Row::Sparse(9); 2].into()), Unsupported::NoBinding { got: 9, n: 1 });
    for (tiles, tile) in [(vec![0..3], 0), (vec![0..2, 0..2], 1), (vec![1..1], 0), (vec![0..1], 0)] {
        assert_eq!(refused(&|c| c.tiles = tiles.clone().into()), Unsupported::Tile { tile });
    }
    let half = refused(&|c| (c.rows, c.tiles) = (vec![Row::Sparse(0), Row::Dense].into(), vec![0..2].into()));
    assert_eq!(half, Unsupported::Tile { tile: 0 });
    let one_head = refused(&|c| {
        c.problem.k.ne[2] = 1;
        c.problem.v.ne[2] = 1;
    });
    assert_eq!(one_head, Unsupported::Index { what: "KV heads", index: 2, call: 1 });
    let short = refused(&|c| {
        let mut b = c.bindings[0].clone();
        b.cells = b.cells[1..].into();
        c.bindings = vec![b].into();
    });
    assert_eq!(short, Unsupported::Binding { what: "prefix cells", got: 299, want: 300 });
    let masked = refused(&|c| c.problem.mask.as_mut().unwrap().ne[0] = 7);
    assert!(masked.to_string().contains("mask has 7 elements"), "{masked}");
}

#[test]
fn the_path_has_a_name() {
    assert_eq!(cpu::path(), Path::detect().name());
}

#[test]
fn the_oracle_opens_the_best_coarse_clusters_up_to_their_share() {
    let base = Spec { n_prefix: 2000, n_cluster: 100, n_coarse: 20, lopsided: true, ..Spec::base() };
    for (seed, share) in [0.05f32, 0.3, 0.7, 0.99999, 1.0].into_iter().enumerate() {
        let selection = Selection { mode: Mode::Budget(0.1), coarse_share: share, ..base.selection };
        let mut case = Case::new(&Spec { seed: seed as u64, selection, ..base.clone() });
        let view = case.call.bindings[0].index.layer(LAYER).unwrap();
        let (bounds, before) = (view.head_coarse_offsets(1), view.head_coarse_keys(1));
        let keys = |j: u32| before[j as usize + 1] - before[j as usize];
        let opened = oracle::opened(&case.call, 0, 1);
        let kept = oracle::selection(&case.call, 0, 1);
        let p = oracle::coarse_scores(&case.call, 0, 1);
        match &opened {
            None => assert_eq!(share, 1.0),
            Some(opened) => {
                // Without the last one they fall short of the larger of both shares.
                let target = keys_of_share(share.max(0.1), 2000, base.n_window) - base.n_sink;
                let all: usize = opened.iter().map(|j| keys(*j) as usize).sum();
                let last = opened.iter().min_by(|a, b| p[**a as usize].total_cmp(&p[**b as usize])).unwrap();
                assert!(all >= target && all - (keys(*last) as usize) < target, "{share}");
                let closed = (0..20).filter(|j| !opened.contains(j));
                closed.for_each(|j| assert!(p[j as usize] <= p[*last as usize]));
                let inside =
                    |i: u32| opened.iter().any(|j| (bounds[*j as usize]..bounds[*j as usize + 1]).contains(&i));
                kept.iter().for_each(|i| assert!(inside(*i), "cluster {i} was not looked into"));
            }
        }
        if share > 0.99 {
            case.call.selection.coarse_share = 1.0;
            assert_eq!(oracle::selection(&case.call, 0, 1), kept);
        }
    }
}
