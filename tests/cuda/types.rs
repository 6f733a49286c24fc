//! K and V of every type and head size, in the plain basis and in that of a quantised cache.

use super::*;
use ggml_squeeze::attention::cuda::HEAD_SIZES;
use half::bf16;

pub const TYPES: [Element; 4] = [Element::F16, Element::BF16, Element::Q8_0, Element::Q4_0];

/// A type, or F16 where heads are not whole blocks of it.
pub fn whole(element: Element, d: usize) -> Element {
    if d.is_multiple_of(element.block()) {
        element
    } else {
        Element::F16
    }
}

/// 0, or a power of two that divides a head.
pub fn block(n: usize, d: usize) -> usize {
    match n {
        0 => 0,
        n => 1 << n.min(d.trailing_zeros() as usize),
    }
}

/// Each pair of types at each pair of sizes that it fits.
pub fn every_pair() -> impl Iterator<Item = ((usize, usize), [Element; 2])> {
    let types = || TYPES.into_iter().flat_map(|k| TYPES.map(|v| [k, v]));
    let all = HEAD_SIZES.into_iter().flat_map(move |sizes| types().map(move |pair| (sizes, pair)));
    all.filter(|((dk, dv), [k, v])| whole(*k, *dk) == *k && whole(*v, *dv) == *v)
}

prop_compose! {
    fn specs_of_every_type()(
        spec in specs(),
        sizes in prop::sample::select(HEAD_SIZES.to_vec()),
        k_type in prop::sample::select(TYPES.to_vec()),
        v_type in prop::sample::select(TYPES.to_vec()),
        same in any::<bool>(),
        k_turned in prop_oneof![Just(0usize), Just(8), 0usize..9],
        v_turned in prop_oneof![Just(0usize), Just(6), 0usize..9],
        n_coarse in prop_oneof![Just(0usize), Just(10)],
    ) -> Spec {
        let (dk, dv) = sizes;
        let v_type = if same { k_type } else { v_type };
        let rotation = Rotation { k: block(k_turned, dk), v: block(v_turned, dv) };
        let selection = Selection { coarse_share: if n_coarse > 0 { 0.4 } else { 1.0 }, ..spec.selection };
        // Smaller than those of one type: the oracle is slow.
        let n_prefix = spec.n_prefix.min(700);
        let n_cluster = spec.n_cluster.min(n_prefix - spec.n_sink - spec.n_window);
        Spec {
            dk, dv, k_type: whole(k_type, dk), v_type: whole(v_type, dv), rotation, n_coarse, selection, n_prefix, n_cluster,
            ..spec
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn calls_of_every_type_and_size_agree_with_the_oracle(spec in specs_of_every_type()) {
        if let Some(device) = gpu() {
            check(&device, &spec);
        }
    }
}

/// Every kernel at least once, whatever the property tests draw: each pair of types at each pair of sizes, small and large groups.
#[test]
fn every_pair_of_types_at_every_size_agrees_with_the_oracle() {
    let Some(device) = gpu() else { return };
    for (seed, ((dk, dv), [k_type, v_type])) in (1usize..).zip(every_pair()) {
        let group = [1, 4, 11][seed % 3];
        let turned = |element: Element, n, d| if element.block() > 1 { block(n, d) } else { 0 };
        let rotation = Rotation { k: turned(k_type, 8, dk), v: turned(v_type, 6, dv) };
        let selection = Selection { estimate: seed % 2 == 0, mode: Mode::Budget(0.2), ..Spec::base().selection };
        let head_major = seed % 5 == 0;
        let spec =
            Spec { seed: seed as u64, dk, dv, k_type, v_type, group, rotation, selection, head_major, ..Spec::base() };
        check(&device, &spec);
    }
}

#[test]
fn long_prefixes_of_quantised_rows_agree_with_the_oracle() {
    let Some(device) = gpu() else { return };
    let base =
        Spec { n_query: 1, dk: 128, dv: 128, n_prefix: 20000, n_sink: 16, n_window: 100, n_other: 100, ..Spec::base() };
    for (n, (k_type, v_type)) in
        [(Element::Q8_0, Element::Q8_0), (Element::Q4_0, Element::Q4_0), (Element::BF16, Element::BF16)]
            .into_iter()
            .enumerate()
    {
        for (n_cluster, group, n_head_kv) in [(1000, 1, 4), (990, 7, 2)] {
            let selection = Selection { mode: Mode::Budget(0.1), ..base.selection };
            let rotation = if k_type.block() > 1 { Rotation { k: 128, v: 64 } } else { Rotation::default() };
            let spec = Spec {
                seed: n as u64,
                n_cluster,
                group,
                n_head_kv,
                selection,
                k_type,
                v_type,
                rotation,
                ..base.clone()
            };
            check(&device, &spec);
        }
    }
}

/// Multiplies each number that is one.
fn scale_up(rows: &mut [u8], factor: f32) {
    for pair in rows.chunks_exact_mut(2) {
        let x = bf16::from_le_bytes([pair[0], pair[1]]).to_f32();
        pair.copy_from_slice(&bf16::from_f32(factor * x).to_le_bytes());
    }
}

#[test]
fn bf16_beyond_the_range_of_f16_is_attended_exactly() {
    let Some(device) = gpu() else { return };
    for (seed, (dk, dv)) in HEAD_SIZES.into_iter().enumerate() {
        let (k_type, v_type) = (Element::BF16, Element::BF16);
        let spec = Spec { seed: seed as u64, sparse: 0.0, dk, dv, k_type, v_type, ..Spec::base() };
        let mut case = Case::new(&spec);
        // Keys of 10^5, values of 10^6.
        scale_up(&mut case.k, (1u32 << 15) as f32);
        scale_up(&mut case.v, (1u32 << 20) as f32);
        case.call.problem.k.data = case.k.as_mut_ptr();
        case.call.problem.v.data = case.v.as_mut_ptr();
        case.call.problem.scale /= (1u32 << 15) as f32;
        let gpu = OnGpu::new(&device, &case);
        gpu.with(|attention, _| gpu.launch(attention));
        let e = error(&gpu.output(), &oracle::run(&case.call));
        assert!(e <= 2e-3, "relative error {e} at {dk} and {dv}");
    }
}

#[test]
fn budget_1_of_a_quantised_cache_is_dense_attention() {
    let Some(device) = gpu() else { return };
    let selection = Selection { mode: Mode::Budget(1.0), ..Spec::base().selection };
    for (seed, element) in TYPES.into_iter().enumerate() {
        let rotation = if element.block() > 1 { Rotation { k: 128, v: 64 } } else { Rotation::default() };
        let spec = Spec {
            seed: seed as u64,
            n_prefix: 3000,
            n_cluster: 150,
            plain_mask: true,
            dk: 128,
            dv: 128,
            k_type: element,
            v_type: element,
            rotation,
            selection,
            ..Spec::base()
        };
        let case = Case::new(&spec);
        let mut dense = case.call.clone();
        dense.rows = vec![Row::Dense; dense.rows.len()].into();
        let gpu = OnGpu::new(&device, &case);
        gpu.with(|attention, _| gpu.launch(attention));
        let e = error(&gpu.output(), &oracle::run(&dense));
        assert!(e <= allowed(&case.call.problem), "relative error {e} of {}", element.name());
    }
}

#[test]
fn rows_that_do_not_lie_as_the_kernels_read_them_are_refused() {
    let Some(device) = gpu() else { return };
    let (k_type, v_type) = (Element::Q8_0, Element::Q8_0);
    let case = Case::new(&Spec { dk: 128, dv: 128, k_type, v_type, ..Spec::base() });
    let mut gpu = OnGpu::new(&device, &case);
    gpu.problem.k.nb[1] += 2;
    let bounds: Vec<&Bound> = gpu.bounds.iter().collect();
    let (problem, rotation, selection) = (gpu.problem, gpu.rotation, gpu.selection);
    let rows = gpu.rows.address();
    let call = Call { problem, rotation, layer: LAYER, selection, rows, seen: false, bounds: &bounds, first_stream: 0 };
    let refused = Workspace::for_calls(&device, &[&call]).err().expect("rows at 8 n + 2");
    let got = "rows of k not on multiples of 8 bytes".into();
    let want = "rows side by side, from a multiple of 16 bytes on";
    assert_eq!(refused, Error::Unsupported { what: "the alignment of a tensor", got, want });
}

#[test]
fn dense_rows_may_have_alibi() {
    let Some(device) = gpu() else { return };
    for (seed, ((dk, dv), group)) in HEAD_SIZES.into_iter().zip([1, 3, 4, 6, 9, 12, 2, 16, 5]).enumerate() {
        let element = whole(TYPES[seed % 4], dk.min(dv));
        let (k_type, v_type, max_bias) = (element, element, 8.0);
        let spec = Spec { seed: seed as u64, sparse: 0.0, dk, dv, group, k_type, v_type, max_bias, ..Spec::base() };
        let case = Case::new(&spec);
        let gpu = OnGpu::new(&device, &case);
        let (problem, rotation, selection) = (gpu.problem, gpu.rotation, gpu.selection);
        let rows = gpu.rows.address();
        let call = Call { problem, rotation, layer: LAYER, selection, rows, seen: false, bounds: &[], first_stream: 0 };
        let workspace = Workspace::for_calls(&device, &[&call]).unwrap();
        gpu.launch(&Attention::new(&device, &call, &workspace).unwrap());
        let e = error(&gpu.output(), &oracle::run(&case.call));
        assert!(e <= allowed(&problem), "relative error {e}: {spec:?}");
        let bounds: Vec<&Bound> = gpu.bounds.iter().collect();
        let refused = Workspace::for_calls(&device, &[&Call { bounds: &bounds, ..call }]).err();
        assert!(matches!(refused, Some(Error::Unsupported { what: "ALiBi's max_bias", .. })), "{refused:?}");
    }
}
