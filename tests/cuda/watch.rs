//! The check of sampled rows: a changed cell is found, and the call that finds it is dense.

use super::*;

/// Rows that all calls of a binding check one after the other.
const SAMPLE: usize = 64;

/// Flips a bit of a cell's row in every head of K or V.
fn flip(cache: &mut [u8], a: &Array, cell: u32) {
    (0..a.ne[2]).for_each(|head| cache[cell as usize * a.nb[1] + head * a.nb[2] + 3] ^= 1);
}

fn watched(device: &Arc<Device>, case: &Case) -> OnGpu {
    let mut gpu = OnGpu::new(device, case);
    let (k, v, stream) = (gpu.problem.k, gpu.problem.v, gpu.stream);
    let types = [gpu.problem.k_type, gpu.problem.v_type];
    for bound in &mut gpu.bounds {
        // SAFETY: everything lives in `gpu`.
        unsafe { bound.watch(LAYER, &k, &v, types, stream) }.unwrap();
    }
    gpu
}

#[test]
fn a_changed_cell_is_found_in_time_and_makes_that_call_dense() {
    let Some(device) = gpu() else { return };
    use Element::{BF16, F16, Q4_0, Q8_0};
    for (n, (d, [k_type, v_type], in_values, token, coarse_share)) in [
        (64, [F16, F16], false, 400, 1.0),
        (128, [F16, F16], true, 777, 1.0),
        (128, [F16, F16], false, 0, 0.5),
        (64, [F16, F16], true, 999, 0.5),
        (128, [Q8_0, Q8_0], false, 400, 1.0),
        (96, [Q8_0, Q4_0], true, 777, 1.0),
        (64, [Q4_0, Q8_0], false, 0, 0.5),
        (80, [BF16, F16], true, 999, 0.5),
    ]
    .into_iter()
    .enumerate()
    {
        let selection = Selection { coarse_share, ..Spec::base().selection };
        let spec = Spec {
            seed: n as u64,
            dk: d,
            dv: d,
            n_head_kv: 3,
            n_prefix: 1000,
            n_cluster: 50,
            n_coarse: 10,
            n_stream: 2,
            n_query: 1,
            mask: n % 2 == 0,
            plain_mask: true,
            k_type,
            v_type,
            selection,
            ..Spec::base()
        };
        let mut case = Case::new(&spec);
        let gpu = watched(&device, &case);
        gpu.with(|attention, workspace| {
            // Unchanged rows: a whole round and more finds nothing.
            for _ in 0..2 * 1000usize.div_ceil(SAMPLE) {
                gpu.launch(attention);
            }
            assert!(gpu.bounds.iter().all(|b| b.holds().unwrap()));
            let cell = case.call.bindings[0].cells[token];
            let p = case.call.problem;
            match in_values {
                true => flip(&mut case.v, &p.v, cell),
                false => flip(&mut case.k, &p.k, cell),
            }
            gpu.k.write(0, &case.k).unwrap();
            gpu._others[0].write(0, &case.v).unwrap();
            let found = (0..1000usize.div_ceil(SAMPLE)).find(|_| {
                gpu.launch(attention);
                attention.kept(workspace, 0, 0).unwrap().is_none()
            });
            assert!(found.is_some(), "token {token} was not looked at in time");
            assert!(!gpu.bounds[0].holds().unwrap());
            // The other stream's copy is as it was.
            assert!(gpu.bounds[1].holds().unwrap() && attention.kept(workspace, 1, 0).unwrap().is_some());
            let mut call = case.call.clone();
            call.rows = vec![Row::Dense, Row::Sparse(1)].into();
            let want = oracle::run_among(&call, &|row, head_kv| chosen(&case, attention, workspace, row, head_kv).0);
            let e = error(&gpu.output(), &want);
            assert!(e <= allowed(&p), "relative error {e}");
        });
    }
}

#[test]
fn each_replay_of_a_captured_call_checks_the_next_rows() {
    let Some(device) = gpu_alone() else { return };
    let case = Case::new(&Spec { n_query: 1, mask: false, n_prefix: 640, n_cluster: 32, ..Spec::base() });
    let p = case.call.problem;
    for token in (0..640).step_by(49) {
        let gpu = watched(&device, &case);
        gpu.with(|attention, workspace| {
            let graph = Graph::new(&gpu, attention);
            let mut k = case.k.clone();
            flip(&mut k, &p.k, case.call.bindings[0].cells[token]);
            // The rows were noted before.
            assert!(gpu.bounds[0].holds().unwrap());
            gpu.k.write(0, &k).unwrap();
            let found = (0..640 / SAMPLE).find(|_| {
                graph.replay(&gpu);
                attention.kept(workspace, 0, 0).unwrap().is_none()
            });
            // Each of 8 parts of the prefix goes on by 8 tokens per call; a layer begins at 8 times its number.
            let place = (token % 80 + 80 - 8 * LAYER as usize) % 80;
            assert_eq!(found, Some(place / 8), "token {token}");
        });
    }
}
