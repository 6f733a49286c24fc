//! Calls with a coarse level: fine clusters are scored in opened coarse clusters alone.

use super::*;
use ggml_squeeze::index::LayerParts;

prop_compose! {
    fn specs_with_a_level()(
        spec in specs(),
        part in 0.0f64..1.0,
        kind in 0usize..4,
        coarse_share in prop_oneof![Just(0.01f32), Just(0.1), Just(0.3), Just(0.6), Just(0.95), 0.01f32..1.0],
        coarse_streams in prop_oneof![Just(usize::MAX), Just(1)],
    ) -> Spec {
        // One for all, one for each, one that holds half, and any number.
        let n_coarse = match kind {
            0 => 1,
            1 => usize::MAX,
            _ => 1 + (part * part * spec.n_cluster as f64) as usize,
        };
        let selection = Selection { coarse_share, ..spec.selection };
        Spec { n_coarse, coarse_streams, lopsided: kind == 2, selection, ..spec }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn calls_with_a_coarse_level_agree_with_the_oracle(spec in specs_with_a_level()) {
        if let Some(device) = gpu() {
            check(&device, &spec);
        }
    }
}

#[test]
fn long_prefixes_with_lopsided_levels_agree_with_the_oracle() {
    let Some(device) = gpu() else { return };
    let base =
        Spec { n_query: 1, dk: 128, dv: 128, n_prefix: 20000, n_sink: 16, n_window: 100, n_other: 100, ..Spec::base() };
    for (n_cluster, n_coarse, lopsided, group, n_head_kv) in [
        (1000, 200, false, 1, 4),
        (1000, 200, true, 4, 1),
        (9000, 50, false, 1, 1),
        (9000, 9000, false, 2, 1),
        (12000, 3, true, 1, 1),
    ] {
        for (budget, coarse_share) in [(0.01, 0.02), (0.1, 0.3), (0.1, 0.9), (0.3, 0.1)] {
            let selection = Selection { mode: Mode::Budget(budget), coarse_share, ..base.selection };
            let seed = n_cluster as u64 + n_coarse as u64;
            check(&device, &Spec { seed, n_cluster, n_coarse, lopsided, group, n_head_kv, selection, ..base.clone() });
        }
    }
}

/// Output, and kept clusters of the first row and KV head.
fn outcome(device: &Arc<Device>, case: &Case) -> (Vec<u32>, Vec<u32>) {
    let gpu = OnGpu::new(device, case);
    gpu.with(|attention, workspace| {
        gpu.launch(attention);
        let (first, _) = attention.kept(workspace, 0, 0).unwrap().expect("a sparse row");
        (bits(&gpu.output()), first)
    })
}

#[test]
fn with_every_coarse_cluster_opened_the_result_is_that_of_no_level() {
    let Some(device) = gpu() else { return };
    for (seed, mode) in
        [Mode::Budget(0.2), Mode::Mass(0.6), Mode::Threshold { threshold: 1e-4, floor: 0.05 }].into_iter().enumerate()
    {
        for spread in [Spread::Diag, Spread::Radius] {
            let selection = Selection { mode, spread, estimate: true, ..Spec::base().selection };
            let spec =
                Spec { seed: seed as u64, n_prefix: 3000, n_cluster: 150, n_coarse: 30, selection, ..Spec::base() };
            let mut case = Case::new(&spec);
            let flat = outcome(&device, &case);
            // Rounds to every key: all are opened, one after the other.
            case.call.selection.coarse_share = 0.99999;
            assert_eq!(oracle::opened(&case.call, 0, 0).unwrap().len(), 30);
            assert_eq!(outcome(&device, &case), flat);
            case.parts[0].layers[0].shape.n_coarse = 0;
            case.parts[0].layers[0].coarse_offsets.clear();
            case.parts[0].layers[0].coarse_centroids.clear();
            rebind(&mut case);
            case.call.selection.coarse_share = 0.1;
            assert_eq!(outcome(&device, &case), flat);
        }
    }
}

/// Sets the centroids of coarse cluster j's fine ones to what cancels out, of either sign: the coarse centroid is exactly 0.
fn cancel_out(layer: &mut LayerParts, h: usize, j: usize, sign: f32) {
    let (n_cluster, d) = (layer.shape.n_cluster as usize, layer.shape.head_dim_k as usize);
    let run = layer.view().head_coarse_offsets(h)[j] as usize..layer.view().head_coarse_offsets(h)[j + 1] as usize;
    let offsets = layer.view().head_offsets(h);
    let size = |i: usize| (offsets[i + 1] - offsets[i]) as f32;
    let pair = |i: usize| if i + 1 < run.end { [size(i + 1), -size(i)] } else { [0.0; 2] };
    let elements: Vec<f32> = run.clone().step_by(2).flat_map(pair).take(run.len()).collect();
    for (i, x) in run.zip(elements) {
        layer.centroids[(h * n_cluster + i) * d..][..d].fill(f16::from_f32(sign * x / 4.0));
    }
    layer.coarse_centroids = layer.view().coarse_means();
}

fn rebind(case: &mut Case) {
    let mut bindings = case.call.bindings.to_vec();
    bindings[0].index = attend_case::index_of(case.parts[0].clone());
    case.call.bindings = bindings.into();
}

#[test]
fn fine_clusters_of_dropped_coarse_ones_are_never_read() {
    let Some(device) = gpu() else { return };
    for (spread, estimate) in [(Spread::Radius, false), (Spread::Diag, true)] {
        let selection = Selection { mode: Mode::Budget(0.1), spread, alpha: 2.0, estimate, coarse_share: 0.3 };
        let spec =
            Spec { n_query: 1, n_prefix: 6000, n_cluster: 300, n_coarse: 60, mask: false, selection, ..Spec::base() };
        let mut case = Case::new(&spec);
        for (h, j) in (0..2).flat_map(|h| (0..60).step_by(2).map(move |j| (h, j))) {
            cancel_out(&mut case.parts[0].layers[0], h, j, 1.0);
        }
        rebind(&mut case);
        let gpu = OnGpu::new(&device, &case);
        let (opened, got) = gpu.with(|attention, workspace| {
            gpu.launch(attention);
            let opened = [0, 1].map(|h| attention.opened(workspace, 0, h).unwrap().expect("a coarse level"));
            (opened, bits(&gpu.output()))
        });
        let layer = &mut case.parts[0].layers[0];
        let (coarse_centroids, mut n_turned) = (layer.coarse_centroids.clone(), 0);
        for (h, opened) in opened.iter().enumerate() {
            let bounds = layer.view().head_coarse_offsets(h).to_vec();
            for (j, run) in bounds.windows(2).enumerate().filter(|(_, run)| !opened.contains(&run[0])) {
                // Whoever read these would keep the clusters, or see them in the mean.
                for at in h * 300 + run[0] as usize..h * 300 + run[1] as usize {
                    layer.mean_values[64 * at..64 * at + 64].fill(f16::MAX);
                    layer.variances[64 * at..64 * at + 64].fill(255);
                    layer.variance_scales[at] = 1e9;
                    layer.radii[at] = 1e9;
                }
                if j % 2 == 0 {
                    cancel_out(layer, h, j, -1.0);
                    n_turned += run[1] - run[0];
                }
            }
        }
        assert!(n_turned > 100, "centroids of {n_turned} of 600 clusters were changed");
        assert_eq!(layer.coarse_centroids, coarse_centroids);
        rebind(&mut case);
        assert_eq!(outcome(&device, &case).0, got);
        // All of them read: the poison is one.
        case.call.selection.coarse_share = 1.0;
        assert_ne!(outcome(&device, &case).0, got);
    }
}

#[test]
fn a_captured_call_with_a_level_is_right_on_replay_with_other_data() {
    let Some(device) = gpu_alone() else { return };
    let selection = Selection { coarse_share: 0.4, ..Spec::base().selection };
    let spec = Spec { n_query: 3, n_prefix: 2000, n_cluster: 200, n_coarse: 20, group: 4, selection, ..Spec::base() };
    let mut case = Case::new(&spec);
    let gpu = OnGpu::new(&device, &case);
    gpu.with(|attention, workspace| {
        let graph = Graph::new(&gpu, attention);
        for seed in 10..13 {
            let mut r = Random(seed);
            case.q.iter_mut().for_each(|q| *q = 1.5 * r.normal());
            case.call.problem.q.data = case.q.as_mut_ptr().cast();
            gpu.q.write(0, &case.q).unwrap();
            let replayed = graph.replay(&gpu);
            gpu.launch(attention);
            assert_eq!(bits(&replayed), bits(&gpu.output()));
            let want =
                oracle::run_among(&case.call, &|row, head_kv| chosen(&case, attention, workspace, row, head_kv).0);
            let e = error(&replayed, &want);
            assert!(e <= 2e-3, "relative error {e}");
        }
    });
}
