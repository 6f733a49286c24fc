//! Calls of many rows against the oracle: tiles, their selections, their attention, and the rows that are dense among them.

use ggml_squeeze::attention::cuda::{Prefill, PrefillCall, Tile, HEAD_SIZES, TILE_RUN};
use ggml_squeeze::attention::cut;

use super::types::{block, every_pair, whole, TYPES};
use super::*;

/// A call with masks as llama.cpp makes them.
#[derive(Clone, Debug)]
struct Many {
    spec: Spec,
    tile: usize,
    /// Rows of each stream that do not see one cell of the prefix.
    blind: Vec<usize>,
    /// Rows of each stream with which another sequence begins.
    breaks: Vec<usize>,
    checked: bool,
    portable: bool,
    slots: usize,
}

impl Many {
    fn base() -> Many {
        let spec = Spec { n_query: 60, n_prefix: 500, n_cluster: 30, n_other: 120, plain_mask: true, ..Spec::base() };
        Many { spec, tile: 16, blind: vec![], breaks: vec![], checked: false, portable: false, slots: 0 }
    }

    /// Each row sees the cells of its own and of earlier rows of its sequence, beside the prefix and cells that all see.
    fn case(&self) -> Case {
        let mut case = Case::new(&self.spec);
        let p = case.call.problem;
        let (n_kv, n_query, n_stream) = (p.k.ne[1], p.q.ne[1], p.q.ne[3]);
        if !self.spec.mask {
            return case;
        }
        let mut rows = case.call.rows.to_vec();
        let r = &mut Random(self.spec.seed ^ 77);
        for stream in 0..n_stream {
            let b = case.call.bindings[stream].clone();
            let tail = b.always[b.index.meta().n_sink as usize..].iter().copied().filter(|c| !b.cells.contains(c));
            let first = stream * n_query * n_kv;
            let seen: Vec<usize> = tail.map(|c| c as usize).filter(|c| case.mask[first + c] == f16::ZERO).collect();
            // Two thirds of what is no longer hidden are cells of rows.
            let own = &seen[..(seen.len() * 2 / 3).min(n_query)];
            let bias: Vec<f16> =
                own.iter().map(|_| f16::from_f32(if r.below(3) > 0 { 0.0 } else { -1.5 * r.unit() })).collect();
            for query in 0..n_query {
                let start = self.breaks.iter().copied().filter(|at| *at <= query).max().unwrap_or(0);
                let row = &mut case.mask[first + query * n_kv..first + (query + 1) * n_kv];
                for (i, cell) in own.iter().enumerate() {
                    row[*cell] = if (start..=query).contains(&i) { bias[i] } else { f16::NEG_INFINITY };
                }
                if self.blind.contains(&query) {
                    row[b.cells[r.below(b.cells.len())] as usize] = f16::NEG_INFINITY;
                    rows[stream * n_query + query] = Row::Dense;
                }
            }
        }
        case.call.rows = rows.into();
        case
    }
}

/// The tiles that the rows should make, in order: of rows with a binding.
fn tiles_of(case: &Case, tile: usize) -> Vec<Tile> {
    let p = &case.call.problem;
    let (n_kv, n_query) = (p.k.ne[1], p.q.ne[1]);
    let shown = |m: &f16| m.to_bits() & 0x7fff == 0;
    let seen = |row: usize| &case.mask[row * n_kv..(row + 1) * n_kv];
    let follows = |row: usize| {
        let both = || seen(row - 1).iter().zip(seen(row));
        !row.is_multiple_of(n_query)
            && case.call.rows[row - 1] == case.call.rows[row]
            && (p.mask.is_none() || both().all(|(before, own)| shown(own) || !shown(before)))
    };
    let mut tiles = Vec::new();
    let mut row = 0;
    while row < p.n_row() {
        let Row::Sparse(b) = case.call.rows[row] else {
            row += 1;
            continue;
        };
        let start = row;
        row += 1;
        while row < p.n_row() && follows(row) {
            row += 1;
        }
        let mut cuts = vec![start];
        match row - start >= TILE_RUN && tile > 1 {
            true => {
                let n = (row - 1 - start).div_ceil(tile);
                cuts.extend((1..=n).map(|i| start + (row - 1 - start) * i / n));
                let shared: Vec<_> = cut(start..row - 1, tile).collect();
                let wide = cuts.windows(2).filter(|w| w[1] - w[0] > 1).map(|w| w[0]..w[1]);
                assert_eq!(shared, wide.collect::<Vec<_>>(), "the rule of the CPU");
            }
            false => cuts.extend(start + 1..row),
        }
        cuts.push(row);
        tiles.extend(cuts.windows(2).map(|w| Tile { bound: Some(b as usize), rows: (w[0]..w[1]).collect() }));
    }
    tiles
}

fn with<T>(gpu: &OnGpu, many: &Many, then: impl FnOnce(&Prefill, &Workspace) -> T) -> T {
    let bounds: Vec<&Bound> = gpu.bounds.iter().collect();
    let (problem, selection) = (gpu.problem, gpu.selection);
    let Many { tile, checked: seen, portable, slots, .. } = *many;
    let (rotation, rows) = (gpu.rotation, gpu.rows.address());
    let call = Call { problem, rotation, layer: LAYER, selection, rows, seen, bounds: &bounds, first_stream: 0 };
    let call = PrefillCall { call, tile, portable, slots };
    let bytes = Prefill::bytes_for(&gpu.device, &call).unwrap();
    assert!(bytes <= 256 << 20);
    let workspace = Workspace::of_bytes(&gpu.device, bytes).unwrap();
    then(&Prefill::new(&gpu.device, &call, &workspace).unwrap(), &workspace)
}

fn launch(gpu: &OnGpu, prefill: &Prefill) -> Vec<f32> {
    gpu.dst.write(0, &vec![f32::NAN; gpu.dst.bytes() / 4]).unwrap();
    // SAFETY: everything lives in `gpu`.
    unsafe { prefill.launch(gpu.stream) }.unwrap();
    gpu.output()
}

/// The tiles that the device has made, which must be the expected ones as far as there is room; the call with them.
fn with_tiles(
    case: &Case,
    many: &Many,
    prefill: &Prefill,
    workspace: &Workspace,
) -> (Vec<Option<Tile>>, attention::Call) {
    let n_slot: usize = prefill.slots().iter().sum();
    let all = prefill.tiles(workspace).unwrap();
    let (own, dense) = all.split_at(n_slot);
    let mut want = tiles_of(case, many.tile);
    want.truncate(n_slot);
    assert_eq!(own.iter().flatten().cloned().collect::<Vec<_>>(), want, "{many:?}");
    let n_query = case.call.problem.q.ne[1];
    let mut rows = vec![Row::Dense; case.call.rows.len()];
    let mut found: Vec<usize> = want.iter().chain(dense.iter().flatten()).flat_map(|t| t.rows.clone()).collect();
    for tile in &want {
        tile.rows.iter().for_each(|r| rows[*r] = case.call.rows[*r]);
    }
    for tile in dense.iter().flatten() {
        assert!(tile.bound.is_none() && tile.rows.iter().all(|r| r / n_query == tile.rows[0] / n_query));
    }
    found.sort_unstable();
    assert!(found.into_iter().eq(0..rows.len()), "every row is in one tile: {many:?}");
    let shared = want.iter().filter(|t| t.rows.len() > 1).map(|t| t.rows[0]..t.rows[0] + t.rows.len());
    let call = attention::Call { rows: rows.into(), tiles: shared.collect(), ..case.call.clone() };
    (own.to_vec(), call)
}

/// One part: selections are compared too.
fn check(device: &Arc<Device>, many: &Many) {
    let case = many.case();
    let gpu = OnGpu::new(device, &case);
    if !many.checked {
        // The device sees for itself which rows are blind.
        let all: Vec<i32> = (0..case.call.rows.len()).map(|r| (r / case.call.problem.q.ne[1]) as i32).collect();
        let given = numbers(&case.call.rows);
        let blind = |r: usize| many.blind.contains(&(r % case.call.problem.q.ne[1]));
        let own: Vec<i32> =
            (0..all.len()).map(|r| if blind(r) && many.spec.mask { all[r] } else { given[r] }).collect();
        gpu.rows.write(0, &own).unwrap();
    }
    with(&gpu, many, |prefill, workspace| {
        let got = launch(&gpu, prefill);
        let (tiles, call) = with_tiles(&case, many, prefill, workspace);
        let p = &call.problem;
        let mut kept = std::collections::HashMap::new();
        for (slot, tile) in tiles.iter().enumerate() {
            let Some(Tile { bound: Some(b), rows }) = tile else { continue };
            let view = call.bindings[*b].index.layer(LAYER).unwrap();
            let n_cluster = view.shape.n_cluster as usize;
            for head_kv in 0..p.k.ne[2] {
                let want = oracle::scores(&call, rows[0], head_kv).p;
                let means = prefill.means(workspace, slot, head_kv, rows.len(), n_cluster).unwrap();
                for (got, want) in means.iter().zip(&want) {
                    let near = (got - want).abs() <= 0.02 * want.abs() + 1e-12;
                    assert!(near, "a mean of {got}, the oracle has {want}: {many:?}");
                }
                let (first, n) = prefill.kept(workspace, slot, head_kv).unwrap().expect("a tile with a binding");
                let own = clusters(&case, rows[0], head_kv, &first);
                let offsets = view.head_offsets(head_kv);
                assert_eq!(own.iter().map(|i| offsets[*i as usize + 1] - offsets[*i as usize]).sum::<u32>(), n);
                same_choice(&format!("{many:?}"), &own, &oracle::selection(&call, rows[0], head_kv), &want);
                rows.iter().for_each(|row| _ = kept.insert((*row, head_kv), own.clone()));
            }
        }
        let e = error(&got, &oracle::run_with(&call, &|row, head_kv| kept[&(row, head_kv)].clone()));
        assert!(e <= allowed(p), "relative error {e}: {many:?}");
        assert_eq!(bits(&launch(&gpu, prefill)), bits(&got), "a second run differs: {many:?}");
    });
}

prop_compose! {
    fn calls()(
        seed in any::<u64>(),
        sizes in prop_oneof![Just((64usize, 64usize)), Just((128, 128)), prop::sample::select(HEAD_SIZES.to_vec())],
        types in prop_oneof![Just([Element::F16; 2]), prop::sample::select(TYPES.to_vec()).prop_map(|t| [t; 2]),
            prop::array::uniform2(prop::sample::select(TYPES.to_vec()))],
        turned in prop_oneof![Just(0usize), Just(8), 2usize..9],
        group in prop_oneof![1usize..17, Just(1), Just(4)],
        n_head_kv in 1usize..3,
        n_query in prop_oneof![17usize..60, 60usize..200],
        n_stream in 1usize..3,
        n_prefix in 60usize..1000,
        n_sink in 0usize..20,
        n_window in 0usize..30,
        n_other in 0usize..200,
        cluster_share in 0.0f64..1.0,
        tile in prop_oneof![Just(2usize), Just(16), Just(64), Just(128), Just(500), 3usize..100],
        blind in prop::collection::vec(0usize..200, 0..4),
        breaks in prop::collection::vec(0usize..200, 0..3),
        flags in prop::array::uniform6(any::<bool>()),
        softcap in prop_oneof![Just(0.0f32), Just(0.0), Just(20.0)],
        share in prop_oneof![Just(0.05f32), Just(0.1), Just(0.2), Just(0.5), Just(1.0), 0.05f32..1.0],
        mode in 0usize..3,
        spread in prop_oneof![Just(Spread::None), Just(Spread::Radius), Just(Spread::Diag)],
    ) -> Many {
        let [mask, sinks, head_major, contiguous, portable, checked] = flags;
        let mode = match mode {
            0 => Mode::Budget(share),
            1 => Mode::Threshold { threshold: 2e-3 * share, floor: 0.05 },
            _ => Mode::Mass(share),
        };
        let n_cluster = 1 + (((n_prefix - n_sink - n_window - 1) as f64) * cluster_share.powi(3)) as usize;
        // The oracle is slow.
        let n_query = n_query.min(1 + 1200 / (group * n_head_kv)).max(17);
        let (dk, dv) = sizes;
        let [k_type, v_type] = [whole(types[0], dk), whole(types[1], dv)];
        let rotation = Rotation { k: block(turned, dk), v: block(turned, dv) };
        let spec = Spec {
            seed, dk, dv, k_type, v_type, rotation, group, n_head_kv, n_query, n_stream, n_prefix, n_sink, n_window, n_other, n_cluster,
            softcap, sinks, head_major, contiguous, plain_mask: true, mask: mask || !blind.is_empty(),
            selection: Selection { mode, spread, alpha: 2.0, estimate: false, coarse_share: 1.0 },
            ..Spec::base()
        };
        Many { spec, tile, blind, breaks, checked, portable, slots: 0 }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn prefills_of_every_kind_agree_with_the_oracle(many in calls()) {
        if let Some(device) = gpu() {
            check(&device, &many);
        }
    }
}

#[test]
fn a_plain_prefill_agrees_with_the_oracle_on_either_path() {
    let Some(device) = gpu() else { return };
    for portable in [true, false] {
        for (d, spread) in [(64, Spread::None), (64, Spread::Diag), (128, Spread::Radius), (128, Spread::Diag)] {
            let base = Many { portable, ..Many::base() };
            let selection = Selection { spread, ..base.spec.selection };
            check(&device, &Many { spec: Spec { dk: d, dv: d, group: 1, selection, ..base.spec.clone() }, ..base });
        }
    }
}

/// Every kernel at least once, whatever the property tests draw.
#[test]
fn prefills_of_every_type_and_size_agree_with_the_oracle() {
    let Some(device) = gpu() else { return };
    for (seed, ((dk, dv), [k_type, v_type])) in (1usize..).zip(every_pair()) {
        let base = Many::base();
        let turned = |element: Element, d| if element.block() > 1 { block(8, d) } else { 0 };
        let rotation = Rotation { k: turned(k_type, dk), v: turned(v_type, dv) };
        let spread = [Spread::Diag, Spread::Radius][seed % 2];
        let mode = [Mode::Budget(0.2), Mode::Mass(0.5)][seed / 2 % 2];
        let selection = Selection { mode, spread, ..base.spec.selection };
        let (head_major, group) = (seed % 3 == 0, [1, 4, 3][seed % 3]);
        let spec =
            Spec { seed: seed as u64, dk, dv, k_type, v_type, rotation, selection, head_major, group, ..base.spec };
        check(&device, &Many { spec, ..base });
    }
}

#[test]
fn long_lists_of_keys_are_cut_among_blocks_and_put_together() {
    let Some(device) = gpu() else { return };
    for (portable, element) in [(true, Element::F16), (false, Element::F16), (false, Element::Q8_0)] {
        let spec = Spec {
            k_type: element,
            v_type: element,
            n_query: 40,
            group: 2,
            n_head_kv: 1,
            dk: 128,
            dv: 128,
            n_prefix: 12000,
            n_sink: 16,
            n_window: 100,
            n_cluster: 590,
            n_other: 200,
            plain_mask: true,
            ..Spec::base()
        };
        for share in [0.1, 1.0] {
            let selection = Selection { mode: Mode::Budget(share), ..spec.selection };
            check(&device, &Many { spec: Spec { selection, ..spec.clone() }, tile: 100, portable, ..Many::base() });
        }
    }
}

#[test]
fn budget_1_of_a_prefill_is_dense_attention() {
    let Some(device) = gpu() else { return };
    let mut many = Many::base();
    many.spec.selection.mode = Mode::Budget(1.0);
    let case = many.case();
    let mut dense = case.call.clone();
    dense.rows = vec![Row::Dense; dense.rows.len()].into();
    let gpu = OnGpu::new(&device, &case);
    let e = error(&with(&gpu, &many, |prefill, _| launch(&gpu, prefill)), &oracle::run(&dense));
    assert!(e <= 2e-3, "relative error {e}");
}

#[test]
fn rows_without_bindings_are_dense() {
    let Some(device) = gpu() else { return };
    for (portable, mask) in [(true, true), (false, true), (false, false)] {
        let base = Many { portable, ..Many::base() };
        let many = Many { spec: Spec { mask, sparse: 0.0, n_stream: 2, group: 5, sinks: true, ..base.spec }, ..base };
        let case = many.case();
        let mut gpu = OnGpu::new(&device, &case);
        gpu.bounds.clear();
        let e = error(&with(&gpu, &many, |prefill, _| launch(&gpu, prefill)), &oracle::run(&case.call));
        assert!(e <= 2e-3, "relative error {e}: {many:?}");
    }
}

#[test]
fn a_prefill_in_parts_is_the_prefill() {
    let Some(device) = gpu() else { return };
    let base = Many { blind: vec![7, 40], ..Many::base() };
    let many = Many { spec: Spec { n_query: 90, n_stream: 2, ..base.spec }, tile: 8, ..base };
    let case = many.case();
    let gpu = OnGpu::new(&device, &case);
    let whole = with(&gpu, &many, |prefill, _| {
        assert_eq!(prefill.slots().len(), 1);
        launch(&gpu, prefill)
    });
    for slots in [1, 5, 16] {
        let parts = with(&gpu, &Many { slots, ..many.clone() }, |prefill, _| {
            assert!(prefill.slots().len() > 1 && prefill.slots().iter().all(|n| *n <= slots));
            launch(&gpu, prefill)
        });
        // Sums are cut at other places.
        let want: Vec<f64> = whole.iter().map(|x| f64::from(*x)).collect();
        assert!(error(&parts, &want) <= 1e-3, "{slots} tiles at a time");
    }
}

#[test]
fn a_changed_guard_makes_a_prefill_dense() {
    let Some(device) = gpu() else { return };
    let many = Many::base();
    let case = many.case();
    let mut gpu = OnGpu::new(&device, &case);
    let p = case.call.problem;
    let cell = case.call.bindings[0].cells[479];
    let row = |head: usize| {
        let at = cell as usize * p.k.nb[1] + head * p.k.nb[2];
        case.k[at..at + 2 * p.k.ne[0]].to_vec()
    };
    let rows: Vec<u8> = (0..p.k.ne[2]).flat_map(row).collect();
    gpu.bounds[0].guard(LAYER, cell, &rows).unwrap();
    with(&gpu, &many, |prefill, workspace| {
        launch(&gpu, prefill);
        assert!(prefill.tiles(workspace).unwrap()[0].is_some() && gpu.bounds[0].holds().unwrap());
        let mut k = case.k.clone();
        k[cell as usize * p.k.nb[1] + p.k.nb[2] + 5] ^= 1;
        gpu.k.write(0, &k).unwrap();
        let got = launch(&gpu, prefill);
        let n_slot: usize = prefill.slots().iter().sum();
        assert!(prefill.tiles(workspace).unwrap()[..n_slot].iter().all(Option::is_none));
        let mut dense = case.call.clone();
        dense.rows = vec![Row::Dense; dense.rows.len()].into();
        let e = error(&got, &oracle::run(&dense));
        assert!(e <= 2e-3 && !gpu.bounds[0].holds().unwrap(), "relative error {e}");
    });
}

#[test]
fn a_captured_prefill_is_right_on_replay_with_other_data() {
    let Some(device) = gpu_alone() else { return };
    let many = Many { spec: Spec { n_stream: 2, group: 4, ..Many::base().spec }, ..Many::base() };
    let case = many.case();
    let gpu = OnGpu::new(&device, &case);
    with(&gpu, &many, |prefill, workspace| {
        // SAFETY: everything lives in `gpu`.
        let graph = Graph::of(&gpu, &|stream| unsafe { prefill.launch(stream) }.unwrap());
        for seed in 10..13u64 {
            let mut r = Random(seed);
            // Other queries, and other rows that are dense.
            let other = Many { blind: vec![r.below(60), r.below(60)], breaks: vec![r.below(60)], ..many.clone() };
            let mut case = other.case();
            case.q.iter_mut().for_each(|q| *q = 1.5 * r.normal());
            gpu.q.write(0, &case.q).unwrap();
            gpu.mask.as_ref().unwrap().write(0, &case.mask).unwrap();
            let replayed = graph.replay(&gpu);
            assert_eq!(bits(&replayed), bits(&launch(&gpu, prefill)));
            let (_, call) = with_tiles(&case, &other, prefill, workspace);
            let e = error(&replayed, &oracle::run(&call));
            // The oracle's own selection may differ at the cut.
            assert!(e <= 2e-2, "relative error {e}");
        }
    });
}

#[test]
fn prefills_that_do_not_fit_are_refused_with_the_reason() {
    let Some(device) = gpu() else { return };
    let many = Many::base();
    let case = many.case();
    let gpu = OnGpu::new(&device, &case);
    let bounds: Vec<&Bound> = gpu.bounds.iter().collect();
    let selection = Selection { estimate: true, ..gpu.selection };
    let (problem, rotation) = (gpu.problem, Rotation::default());
    let call =
        Call { problem, rotation, layer: LAYER, selection, rows: 0, seen: false, bounds: &bounds, first_stream: 0 };
    let refused = |call: PrefillCall<'_>| Prefill::bytes_for(&device, &call).expect_err("it does not fit").to_string();
    let call = PrefillCall { call, tile: 16, portable: false, slots: 0 };
    assert!(refused(call).contains("the estimate is on"));
    let plain = Call { selection: gpu.selection, ..call.call };
    assert!(refused(PrefillCall { call: plain, tile: 0, ..call }).contains("the rows of a tile is 0"));
    let q = Array { ne: [64, 8193, 6, 1], ..gpu.problem.q };
    let long = Call { problem: Problem { q, ..gpu.problem }, ..plain };
    assert!(refused(PrefillCall { call: long, ..call }).contains("8193"));
}
