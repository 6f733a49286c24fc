//! The callback on made-up tensors, without ggml: threads that come late, and kernels that panic.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;

use super::*;
use crate::attention::{oracle, Call, Mode, Rotation, Row, Selection, Spread};
use crate::backend::runtime::{configure, stats};
use crate::index::sample::sample_parts;
use crate::index::to_bytes;

/// Panics as often as a test wants it.
pub(super) fn fail(panics: &AtomicUsize) {
    if panics.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
        panic!("as a test wants it");
    }
}

const D: usize = 64;
const N_KV: usize = 300;

/// Two KV heads, four query heads, one query. The index is of other keys.
struct Case {
    context: OpContext,
    node: Box<sys::ggml_tensor>,
    // boxed: the node holds their addresses
    #[allow(clippy::vec_box)]
    _sources: Vec<Box<sys::ggml_tensor>>,
    _data: Vec<Vec<u8>>,
    state: *const State,
}

fn tensor(kind: sys::ggml_type, element: usize, ne: [usize; 4], data: &mut [u8]) -> Box<sys::ggml_tensor> {
    // SAFETY: plain numbers and pointers, for all of which zero is a value.
    let mut t: Box<sys::ggml_tensor> = Box::new(unsafe { std::mem::zeroed() });
    t.type_ = kind;
    t.ne = ne.map(|n| n as i64);
    t.nb = [element, element * ne[0], element * ne[0] * ne[1], element * ne[0] * ne[1] * ne[2]];
    t.data = data.as_mut_ptr().cast();
    t
}

impl Case {
    fn new() -> Case {
        let parts = sample_parts(1, 200, 1, 2, D, D, 6);
        let index = Arc::new(Index::from_bytes(to_bytes(&parts).unwrap()).unwrap());
        let scope = Arc::<Scope>::default();
        let entered = enter(&scope);
        configure(|c| c.min_prefix = Some(0));
        drop(entered);
        let context = OpContext::new(scope, OpOptions::default());
        let mut seed = 3;
        let mut unit = || (crate::random::split_mix(&mut seed) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let mut q: Vec<u8> = (0..4 * D).flat_map(|_| (3.0 * unit()).to_le_bytes()).collect();
        let mut halves =
            || -> Vec<u8> { (0..2 * N_KV * D).flat_map(|_| f16::from_f32(unit()).to_le_bytes()).collect() };
        let (mut k, mut v, mut out) = (halves(), halves(), vec![0xffu8; 4 * 4 * D]);
        let mut sources = vec![
            tensor(sys::GGML_TYPE_F32, 4, [D, 1, 4, 1], &mut q),
            tensor(sys::GGML_TYPE_F16, 2, [D, N_KV, 2, 1], &mut k),
            tensor(sys::GGML_TYPE_F16, 2, [D, N_KV, 2, 1], &mut v),
        ];
        let mut node = tensor(sys::GGML_TYPE_F32, 4, [D, 4, 1, 1], &mut out);
        node.src.iter_mut().zip(&mut sources).for_each(|(to, source)| *to = &mut **source);
        set_numbers(&mut node, [0.125, 0.0, 0.0]);
        let state = context.state(&index, 0);
        Case { context, node, _sources: sources, _data: vec![q, k, v, out], state }
    }

    fn output(&self) -> Vec<f32> {
        // SAFETY: the node's own output.
        unsafe { std::slice::from_raw_parts(self.node.data.cast::<f32>(), 4 * D) }.to_vec()
    }

    /// Computes the node on threads that come one after the other, `pause` apart.
    fn run(&mut self, nth: usize, pause: std::time::Duration) -> Vec<f32> {
        let (node, state) = (&raw mut *self.node as usize, self.state as usize);
        std::thread::scope(|scope| {
            for ith in 0..nth {
                std::thread::sleep(pause);
                // SAFETY: as ggml calls it.
                scope.spawn(move || unsafe { run_node(node as *mut _, ith as i32, nth as i32, state as *mut _) });
            }
        });
        self.output()
    }

    fn dense(&self) -> Vec<f64> {
        // SAFETY: a live tensor.
        let node = unsafe { Tensor::new(&*self.node) }.unwrap();
        let problem = Inputs::of(node).unwrap().problem(node.array(), numbers(node)).unwrap();
        let selection =
            Selection { mode: Mode::Budget(1.0), spread: Spread::None, alpha: 0.0, estimate: false, coarse_share: 1.0 };
        let (rows, tiles, bindings) = ([Row::Dense].into(), Vec::new().into(), Vec::new().into());
        oracle::run(&Call { problem, layer: 0, rows, tiles, bindings, selection, rotation: Rotation::default() })
    }

    fn is_dense(&self, got: &[f32]) -> bool {
        got.iter().zip(self.dense()).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5)
    }

    fn n_dense(&self) -> u64 {
        let _entered = enter(&self.context.shared.scope);
        stats().nodes_dense.values().sum()
    }
}

#[test]
fn threads_may_come_late() {
    let mut case = Case::new();
    for (i, nth) in [1, 2, 5, 3].into_iter().enumerate() {
        let got = case.run(nth, std::time::Duration::from_millis(5));
        assert!(case.is_dense(&got), "{nth} threads");
        assert_eq!(case.n_dense(), i as u64 + 1);
    }
    let got = case.run(4, std::time::Duration::ZERO);
    assert!(case.is_dense(&got));
    // a computation leaves its memory to the next, and nothing else
    assert_eq!((lock(&case.context.shared.memory).len(), case.context.n_kept()), (1, (1, 1)));
}

#[test]
fn after_a_panic_the_node_is_dense_and_after_another_it_is_nan() {
    let mut case = Case::new();
    let nth = 3;
    for panics in 1..=nth {
        case.context.shared.panics.store(panics, Ordering::Relaxed);
        let got = case.run(nth, std::time::Duration::ZERO);
        assert!(case.is_dense(&got), "{panics} threads panicked");
    }
    case.context.shared.panics.store(nth + 1, Ordering::Relaxed);
    assert!(case.run(nth, std::time::Duration::ZERO).iter().all(|x| x.is_nan()));
    // and it is as ever
    let got = case.run(nth, std::time::Duration::ZERO);
    assert!(case.is_dense(&got));
}
