//! The attention op of a host's own graph, on ggml's CPU backend: against the specification and against ggml's own op, with
//! caches that do not hold the prefix, computed again, rebuilt, on any number of threads. `gpu` does the same on a GPU, if asked to.

#[path = "../../../tests/device_faults/control.rs"]
mod control;
mod faults;
mod gpu;
mod host;
mod made_up;
mod stale;

use std::sync::Arc;

use ggml_squeeze::attention::Element;
use ggml_squeeze::backend::{OpContext, OpOptions, Source, Stats};
use host::*;
use llama_cpp_sys_2 as sys;
use proptest::prelude::*;

const BUDGET: f32 = 0.15;

fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (*g as f64 - w).abs();
        assert!(error <= tolerance * (1.0 + w.abs()), "{what}: element {i} is {g}, not {w}");
    }
}

/// What was booked of one node.
#[derive(Debug, PartialEq)]
enum Booked {
    Sparse(u64),
    Dense(&'static str),
}

fn booked(stats: &Stats) -> Booked {
    match (stats.nodes_sparse, stats.nodes_dense.iter().next()) {
        (1, None) => Booked::Sparse(stats.rows_sparse),
        (0, Some((reason, 1))) => Booked::Dense(reason),
        _ => panic!("one node was run, but: {stats:?}"),
    }
}

fn specs() -> impl Strategy<Value = Spec> {
    let dim = || prop::sample::select(vec![64usize, 72, 96, 128, 192, 256]);
    let element = || prop::sample::select(vec![Element::F16, Element::F16, Element::F32, Element::BF16, Element::Q8_0]);
    let masked = prop::sample::select(vec![Masked::No, Masked::Shared, Masked::Shared, Masked::PerHead, Masked::Open]);
    let shape = (dim(), dim(), 1usize..=8, 1usize..=3, 1usize..=4, 1usize..=2);
    let sizes = (60usize..400, 0usize..80, prop::sample::select(vec![0.0f32, 0.0, 20.0]));
    (any::<u64>(), shape, sizes, (element(), element()), masked, any::<bool>()).prop_map(
        |(seed, shape, (n_prefix, n_other, softcap), (k_type, v_type), masked, cell_major)| {
            let (dk, dv, group, n_head_kv, n_query, n_stream) = shape;
            let whole = |d: usize, t: Element| if d.is_multiple_of(t.block()) { d } else { 64 };
            let (dk, dv, n_kv) = (whole(dk, k_type), whole(dv, v_type), n_prefix + n_other);
            let shape = Spec { seed, dk, dv, group, n_head_kv, n_query, n_stream, ..Spec::default() };
            Spec { n_prefix, n_kv, k_type, v_type, softcap, masked, cell_major, ..shape }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_node_gives_what_the_specification_gives(
        spec in specs(),
        budget in prop::sample::select(vec![0.1f32, 0.3, 1.0]),
        n_threads in prop::sample::select(vec![1usize, 2, 5]),
    ) {
        let (data, scope, backend) = (Data::new(&spec), scope(budget), Backend::new(n_threads));
        let (index, context) = (data.index(), op_context(&scope));
        let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
        assert!(graph.is_custom());
        let n_seen = data.sees.iter().filter(|sees| **sees).count() as u64;
        let want = graph.expected(&data, &index, budget, true);
        for time in ["first", "second"] {
            close(&graph.run(&backend), &want, 1e-5, time);
            let stats = take_stats(&scope);
            if n_seen == 0 {
                assert_eq!(booked(&stats), Booked::Dense("unbound"));
                continue;
            }
            assert_eq!(booked(&stats), Booked::Sparse(n_seen), "{time}");
            // whole clusters are kept; the half key is what rounding to keys may take
            let least = budget as f64 - 0.5 / (spec.n_prefix - 20) as f64;
            assert!((least..1.0 + 1e-9).contains(&stats.kept_share), "{}", stats.kept_share);
        }
    }
}

#[test]
fn a_budget_of_one_is_flash_attention_but_for_rounding() {
    for (masked, softcap, element) in [
        (Masked::No, 0.0, Element::F16),
        (Masked::Shared, 0.0, Element::F16),
        (Masked::Shared, 30.0, Element::F32),
        (Masked::Open, 0.0, Element::Q8_0),
    ] {
        let spec =
            Spec { masked, softcap, k_type: element, v_type: element, n_query: 3, n_stream: 2, ..Spec::default() };
        let (data, scope, backend) = (Data::new(&spec), scope(1.0), Backend::new(2));
        let (index, context) = (data.index(), op_context(&scope));
        let ours = Graph::new(&backend, &data, Node::Ours(&context, &index)).run(&backend);
        let stock = Graph::new(&backend, &data, Node::Stock).run(&backend);
        let stock: Vec<f64> = stock.into_iter().map(f64::from).collect();
        // ggml rounds queries, and sums of F16 values, to half precision
        close(&ours, &stock, 5e-3, &format!("{spec:?}"));
        assert!(matches!(booked(&take_stats(&scope)), Booked::Sparse(_)), "{spec:?}");
    }
}

#[test]
fn a_graph_may_be_computed_again_on_other_data() {
    let spec = Spec { masked: Masked::Shared, n_query: 4, ..Spec::default() };
    let (mut data, scope, backend) = (Data::new(&spec), scope(BUDGET), Backend::new(2));
    let (index, context) = (data.index(), op_context(&scope));
    let mut graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
    let check = |graph: &Graph, data: &Data, what: &str| {
        close(&graph.run(&backend), &graph.expected(data, &index, BUDGET, true), 1e-5, what);
        assert!(matches!(booked(&take_stats(&scope)), Booked::Sparse(_)), "{what}");
    };
    check(&graph, &data, "first");
    let other = Data::new(&Spec { seed: 9, ..spec.clone() });
    (data.q, data.mask, data.sees) = (other.q, other.mask, other.sees);
    graph.set(&data);
    check(&graph, &data, "other queries and mask");
    // other caches with the same prefix
    let mut caches: Vec<Vec<u8>> = (0..3).map(|_| graph.k_bytes(&data.k)).collect();
    for (i, cache) in caches.iter_mut().enumerate() {
        graph.move_k(cache);
        check(&graph, &data, "another cache");
        assert_eq!(context.n_kept(), (1, i + 2));
    }
}

#[test]
fn no_more_caches_are_kept_than_wanted() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(2));
    let index = data.index();
    let context = OpContext::new(scope.clone(), OpOptions { max_places: 2, ..OpOptions::default() });
    let mut graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
    let mut caches: Vec<Vec<u8>> = (0..3).map(|_| graph.k_bytes(&data.k)).collect();
    for round in 0..3 {
        for cache in &mut caches {
            graph.move_k(cache);
            graph.run(&backend);
            assert_eq!(booked(&take_stats(&scope)), Booked::Sparse(2));
            assert!(context.n_kept().1 <= 2, "round {round}");
        }
    }
}

/// Bytes that the allocator has handed out.
fn allocated() -> usize {
    // SAFETY: no arguments.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

#[test]
#[ignore = "measures the memory of the process: alone, with --ignored"]
fn a_graph_rebuilt_a_thousand_times_takes_no_more_memory() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(2));
    let (index, context) = (data.index(), op_context(&scope));
    let round = |n: usize| {
        for _ in 0..n {
            Graph::new(&backend, &data, Node::Ours(&context, &index)).run(&backend);
        }
    };
    round(100);
    let before = allocated();
    round(1000);
    let grown = allocated().saturating_sub(before);
    assert!(grown < 256 << 10, "{grown} bytes more after a thousand graphs");
}

#[test]
fn a_graph_rebuilt_again_and_again_leaves_nothing_behind() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(2));
    let (index, context) = (data.index(), op_context(&scope));
    for _ in 0..1000 {
        Graph::new(&backend, &data, Node::Ours(&context, &index)).run(&backend);
    }
    let (states, places) = context.n_kept();
    assert!(states == 1 && places <= OpOptions::default().max_places, "{states} states, {places} places");
    assert_eq!(take_stats(&scope).nodes_sparse, 1000);
    // SAFETY: no graph is left.
    unsafe { context.release(&index) };
    assert_eq!(context.n_kept(), (0, 0));
    assert_eq!(Arc::strong_count(&index), 1);
}

#[test]
fn any_number_of_threads_computes_a_node() {
    let (data, scope) = (Data::new(&Spec { n_query: 3, ..Spec::default() }), scope(BUDGET));
    let (index, context) = (data.index(), op_context(&scope));
    for n_threads in [1, 2, 5] {
        let backend = Backend::new(n_threads);
        let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
        let want = graph.expected(&data, &index, BUDGET, true);
        for _ in 0..20 {
            close(&graph.run(&backend), &want, 1e-5, &format!("{n_threads} threads"));
        }
        assert_eq!(take_stats(&scope).nodes_sparse, 20);
    }
}

#[test]
fn graphs_of_one_context_may_run_side_by_side() {
    let (data, scope) = (Data::new(&Spec { n_head_kv: 3, ..Spec::default() }), scope(BUDGET));
    let (index, context) = (data.index(), op_context(&scope));
    std::thread::scope(|threads| {
        for i in 0..3 {
            let (data, index, context) = (&data, &index, &context);
            threads.spawn(move || {
                let backend = Backend::new(2);
                let mut own = data.clone();
                own.q.rotate_left(i * 7);
                let graph = Graph::new(&backend, &own, Node::Ours(context, index));
                let want = graph.expected(&own, index, BUDGET, true);
                (0..50).for_each(|_| close(&graph.run(&backend), &want, 1e-5, "beside others"));
            });
        }
    });
    assert_eq!(take_stats(&scope).nodes_sparse, 150);
}

#[test]
fn what_can_never_be_sparse_is_ggmls_own_node() {
    let base = Spec::default();
    let index = Data::new(&base).index();
    let check = |spec: Spec, layer: u32, max_bias: f32, types: Option<[sys::ggml_type; 2]>, reason: &'static str| {
        let (data, scope, backend) = (Data::new(&spec), scope(BUDGET), Backend::new(2));
        let context = op_context(&scope);
        let types = types.unwrap_or([spec.k_type, spec.v_type].map(type_of));
        let node = Node::Other(&context, &index, layer, max_bias);
        let graph = Graph::with_types(&backend, &data, node, types).expect("sound inputs");
        assert!(!graph.is_custom(), "{reason}");
        assert_eq!(booked(&take_stats(&scope)), Booked::Dense(reason));
        let got = graph.run(&backend);
        assert!(got.iter().all(|x| x.is_finite()));
        assert_eq!(context.n_kept(), (0, 0));
        if max_bias == 0.0 {
            let stock = Graph::with_types(&backend, &data, Node::Stock, types).expect("sound inputs");
            assert_eq!(got, stock.run(&backend), "{reason}");
        }
    };
    check(base.clone(), LAYER + 1, 0.0, None, "layer not indexed");
    check(base.clone(), LAYER, 8.0, None, "alibi");
    check(Spec { group: 2, ..base.clone() }, LAYER, 0.0, None, "shape");
    check(Spec { dv: 128, ..base.clone() }, LAYER, 0.0, None, "shape");
    check(Spec { dk: 32, dv: 32, ..base.clone() }, LAYER, 0.0, None, "kernel");
    check(base.clone(), LAYER, 0.0, Some([sys::GGML_TYPE_Q5_0, sys::GGML_TYPE_F16]), "type");
    check(Spec { n_prefix: 399, n_kv: 399, ..base.clone() }, LAYER, 0.0, None, "unbound");
}

#[test]
fn the_settings_of_the_scope_hold_from_the_next_run_on() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(2));
    let (index, context) = (data.index(), op_context(&scope));
    let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
    change(&scope, |c| c.min_prefix = Some(401));
    close(&graph.run(&backend), &graph.expected(&data, &index, BUDGET, false), 1e-5, "short");
    assert_eq!(booked(&take_stats(&scope)), Booked::Dense("short prefix"));
    change(&scope, |c| c.min_prefix = Some(400));
    graph.run(&backend);
    let stats = take_stats(&scope);
    assert_eq!(booked(&stats), Booked::Sparse(2));
    assert!(stats.kept_share < 0.35, "{}", stats.kept_share);
    change(&scope, |c| c.mode = ggml_squeeze::config::ModeSetting::Budget(0.6));
    close(&graph.run(&backend), &graph.expected(&data, &index, 0.6, true), 1e-5, "another budget");
    assert!(take_stats(&scope).kept_share >= 0.6);
    change(&scope, |c| c.force = true);
    graph.run(&backend);
    assert_eq!(take_stats(&scope).nodes_forced, 1);
}

#[test]
fn what_ggml_would_abort_for_is_an_error() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(1));
    let (index, context) = (data.index(), op_context(&scope));
    let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
    let params = sys::ggml_init_params { mem_size: 1 << 16, mem_buffer: std::ptr::null_mut(), no_alloc: true };
    // SAFETY: a context with room for all of these, freed at the end; nothing is computed.
    unsafe {
        let c = sys::ggml_init(params);
        let tensor = |kind, ne: [i64; 4]| sys::ggml_new_tensor_4d(c, kind, ne[0], ne[1], ne[2], ne[3]).cast();
        let (f32, f16, null) = (sys::GGML_TYPE_F32, sys::GGML_TYPE_F16, std::ptr::null_mut());
        let good = graph.source;
        let make = |source, max_bias| {
            ggml_squeeze::backend::attn_ext(&context, c.cast(), source, 0.1, max_bias, 0.0, &index, LAYER)
        };
        assert!(make(good, 0.0).is_ok());
        for (source, max_bias, what) in [
            (Source { q: null, ..good }, 0.0, "null"),
            (Source { q: tensor(f16, [64, 2, 6, 1]), ..good }, 0.0, "q must be F32"),
            (Source { k: tensor(f16, [72, 450, 2, 1]), ..good }, 0.0, "k has 72"),
            (Source { k: tensor(f16, [64, 450, 2, 2]), ..good }, 0.0, "k has 2"),
            (Source { v: tensor(f16, [64, 449, 2, 1]), ..good }, 0.0, "v has 449"),
            (Source { v: tensor(f16, [64, 450, 3, 1]), ..good }, 0.0, "v has 3"),
            (Source { q: tensor(f32, [64, 2, 5, 1]), ..good }, 0.0, "no multiple"),
            (
                Source { v: sys::ggml_transpose(c, tensor(f16, [450, 64, 2, 1]).cast()).cast(), ..good },
                0.0,
                "v is not contig",
            ),
            (Source { mask: tensor(f32, [450, 2, 1, 1]), ..good }, 0.0, "F16 and contiguous"),
            (Source { mask: tensor(f16, [449, 2, 1, 1]), ..good }, 0.0, "does not fit"),
            (Source { mask: tensor(f16, [450, 1, 1, 1]), ..good }, 0.0, "does not fit"),
            (Source { mask: tensor(f16, [450, 2, 4, 1]), ..good }, 0.0, "does not fit"),
            (Source { mask: null, ..good }, 8.0, "needs a mask"),
        ] {
            let error = make(source, max_bias).expect_err(what);
            assert!(error.contains(what), "{error}");
        }
        sys::ggml_free(c);
    }
}
