//! Caches that do not hold the prefix, or no longer: dense, bit for bit.

use std::sync::Arc;

use ggml_squeeze::attention::Element;
use ggml_squeeze::backend::{OpContext, OpOptions, Scope};

use super::host::*;
use super::{booked, close, Booked, BUDGET};

const STALE: Booked = Booked::Dense("stale");
const SPARSE: Booked = Booked::Sparse(2);

/// A case whose graph has been computed once.
struct Ready {
    data: Data,
    scope: Arc<Scope>,
    backend: Backend,
    context: OpContext,
    graph: Graph,
}

impl Ready {
    /// `edit` is done before the first run; gives what was booked of that.
    fn new(spec: &Spec, options: OpOptions, edit: impl FnOnce(&mut Data)) -> (Ready, Booked) {
        let mut data = Data::new(spec);
        let index = data.index();
        edit(&mut data);
        let (scope, backend) = (scope(BUDGET), Backend::new(2));
        let context = OpContext::new(scope.clone(), options);
        let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
        let got = graph.run(&backend);
        let first = booked(&take_stats(&scope));
        if !got.iter().any(|x| x.is_nan()) {
            close(&got, &graph.expected(&data, &index, BUDGET, first != STALE), 1e-5, "first run");
        }
        (Ready { data, scope, backend, context, graph }, first)
    }

    fn dense(&self) -> Vec<f32> {
        change(&self.scope, |c| c.disable = true);
        let dense = self.graph.run(&self.backend);
        take_stats(&self.scope);
        change(&self.scope, |c| c.disable = false);
        dense
    }

    /// Runs, and says what was booked.
    fn run(&self) -> Booked {
        let got = self.graph.run(&self.backend);
        let how = booked(&take_stats(&self.scope));
        // the same bits as dense attention, which sparse attention has not
        let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
        assert_eq!(bits(got) == bits(self.dense()), how == STALE);
        how
    }

    fn rewrite(&self, edit: impl FnOnce(&mut Data)) {
        let mut data = self.data.clone();
        edit(&mut data);
        self.graph.set(&data);
    }
}

#[test]
fn a_prefix_that_is_another_from_the_start_is_dense() {
    type Edit = (&'static str, fn(&mut Data));
    let edits: [Edit; 7] = [
        ("one key", |d| d.k.row(0, 200, 1).iter_mut().for_each(|x| *x = -*x)),
        ("one value", |d| d.v.row(0, 201, 0).iter_mut().for_each(|x| *x = 1.0 - *x)),
        ("the last clustered key", |d| d.k.row(0, 379, 0).fill(0.3)),
        ("a NaN", |d| d.k.row(0, 120, 0).fill(f32::NAN)),
        ("all keys", |d| d.k.data.reverse()),
        ("all values", |d| d.v.data.iter_mut().for_each(|x| *x *= 1.5)),
        ("shifted by a cell", |d| {
            let row = d.k.d * d.k.heads;
            d.k.data.rotate_right(row);
        }),
    ];
    for element in [Element::F16, Element::F32, Element::BF16, Element::Q8_0] {
        let spec = Spec { k_type: element, v_type: element, ..Spec::default() };
        for (what, edit) in edits {
            let (ready, first) = Ready::new(&spec, OpOptions::default(), edit);
            assert_eq!([first, ready.run()], [STALE, STALE], "{what} in {element:?}");
        }
        // of what is attended to in any case nothing is asked
        for (what, cell) in [("a sink", 2), ("the window", 385), ("the tail", 430)] {
            let (ready, first) = Ready::new(&spec, OpOptions::default(), |d| d.k.row(0, cell, 0).fill(0.5));
            assert_eq!([first, ready.run()], [SPARSE, SPARSE], "{what} in {element:?}");
        }
    }
}

#[test]
fn every_type_of_cache_of_the_same_prefix_is_taken() {
    for k_type in Element::ALL {
        for v_type in Element::ALL {
            let (ready, first) = Ready::new(&Spec { k_type, v_type, ..Spec::default() }, OpOptions::default(), |_| ());
            assert_eq!([first, ready.run()], [SPARSE, SPARSE], "{k_type:?} {v_type:?}");
        }
    }
}

#[test]
fn an_index_of_another_text_is_dense() {
    let (data, scope, backend) = (Data::new(&Spec::default()), scope(BUDGET), Backend::new(2));
    let foreign = Data::new(&Spec { seed: 2, ..Spec::default() }).index();
    let context = op_context(&scope);
    let graph = Graph::new(&backend, &data, Node::Ours(&context, &foreign));
    for _ in 0..3 {
        close(&graph.run(&backend), &graph.expected(&data, &foreign, BUDGET, false), 1e-5, "a foreign index");
        assert_eq!(booked(&take_stats(&scope)), STALE);
    }
}

#[test]
fn an_edit_of_a_verified_prefix_is_found() {
    let options = OpOptions { round: 40, ..OpOptions::default() };
    let (ready, first) = Ready::new(&Spec::default(), options, |_| ());
    assert_eq!([first, ready.run()], [SPARSE, SPARSE]);

    // the last clustered token: at once, however small the edit; then all is verified, and within rounding it is the prefix
    ready.rewrite(|d| d.k.row(0, 379, 1)[63] += 0.02);
    assert_eq!([ready.run(), ready.run()], [STALE, SPARSE]);
    ready.rewrite(|d| d.v.row(0, 379, 0).fill(0.3));
    assert_eq!([ready.run(), ready.run(), ready.run()], [STALE, STALE, STALE]);

    ready.rewrite(|d| d.k.data.reverse());
    assert_eq!([ready.run(), ready.run(), ready.run()], [STALE, STALE, STALE]);
    ready.rewrite(|_| ());
    assert_eq!([ready.run(), ready.run()], [STALE, SPARSE]);

    // one key in the middle
    ready.rewrite(|d| d.k.row(0, 200, 0).fill(0.25));
    let edited = (1..=40).find(|_| {
        ready.graph.run(&ready.backend);
        booked(&take_stats(&ready.scope)) == STALE
    });
    assert!(edited.is_some(), "an edited key was not found in a round");
    assert_eq!(ready.run(), STALE);
    ready.rewrite(|_| ());
    ready.context.forget();
    assert_eq!(ready.run(), SPARSE);
}

#[test]
fn with_all_verified_an_edit_is_found_at_once() {
    let options = OpOptions { round: 1, ..OpOptions::default() };
    let (ready, first) = Ready::new(&Spec::default(), options, |_| ());
    assert_eq!([first, ready.run()], [SPARSE, SPARSE]);
    for cell in [4, 90, 200, 379] {
        ready.rewrite(|d| d.v.row(0, cell, 0).fill(0.25));
        assert_eq!([ready.run(), ready.run()], [STALE, STALE], "cell {cell}");
        ready.rewrite(|_| ());
        assert_eq!([ready.run(), ready.run()], [STALE, SPARSE], "cell {cell}");
    }
}

#[test]
fn a_stream_with_another_content_is_dense_alone() {
    let mut data = Data::new(&Spec { n_stream: 2, ..Spec::default() });
    let (index, scope, backend) = (data.index(), scope(BUDGET), Backend::new(2));
    data.k.row(1, 200, 0).fill(0.7);
    let context = op_context(&scope);
    let graph = Graph::new(&backend, &data, Node::Ours(&context, &index));
    data.sees[2..].fill(false);
    for _ in 0..2 {
        close(&graph.run(&backend), &graph.expected(&data, &index, BUDGET, true), 1e-5, "two streams");
        assert_eq!(booked(&take_stats(&scope)), SPARSE);
    }
    assert_eq!(context.n_kept(), (1, 2));
}
