//! The CPU path against the oracle, on one call.

use ggml_squeeze::attention::cpu::{self, Options, Path, Schedule};
use ggml_squeeze::attention::{oracle, Call, Mode, Row};

use super::{Case, Spec, LAYER};

pub fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (*g as f64 - w).abs();
        assert!(error <= 1e-5 * (1.0 + w.abs()), "{what}: element {i} is {g}, the oracle has {w}");
    }
}

/// The selection equals the oracle's, but for ties that f32 cannot tell apart.
pub fn same_selection(call: &Call, row: usize, head_kv: usize, got: &[u32]) {
    let want = oracle::selection(call, row, head_kv);
    if got == want {
        return;
    }
    let Row::Sparse(n) = call.rows[row] else { panic!("row {row} is dense") };
    let view = call.bindings[n as usize].index.layer(LAYER).unwrap();
    let offsets = view.head_offsets(head_kv);
    let scores = oracle::scores(call, row, head_kv);
    let p = |i: &u32| scores.p[*i as usize];
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-4 * a.abs().max(b.abs());
    let last = want.iter().map(p).fold(f64::INFINITY, f64::min);
    let first = (0..scores.p.len() as u32).filter(|i| !want.contains(i)).map(|i| p(&i)).fold(0.0, f64::max);
    let size = |i: &u32| (offsets[*i as usize + 1] - offsets[*i as usize]) as f64;
    let mass: f64 = scores.sink_share + want.iter().map(|i| size(i) * p(i)).sum::<f64>();
    let at_a_step = match call.selection.mode {
        Mode::Budget(_) => false,
        Mode::Threshold { threshold, .. } => near(last, threshold as f64) || near(first, threshold as f64),
        Mode::Mass(m) => {
            let worst = want.iter().min_by(|a, b| p(a).total_cmp(&p(b))).map_or(0.0, |i| size(i) * p(i));
            (mass - m as f64).abs() < 1e-5 || (mass - worst - m as f64).abs() < 1e-5
        }
    };
    for i in 0..scores.p.len() as u32 {
        if got.contains(&i) != want.contains(&i) {
            let tie = near(p(&i), last) && near(p(&i), first);
            let step = at_a_step && (near(p(&i), last) || near(p(&i), first));
            assert!(tie || step, "cluster {i} (p {}) of row {row}, cut between {last} and {first}", p(&i));
        }
    }
}

/// Every path, schedule and number of threads gives what the oracle gives for the plan's own selection.
pub fn check(spec: &Spec, planned: usize, nth: usize) {
    let mut case = Case::new(spec);
    for path in Path::available() {
        let options = |schedule| Options { path: Some(path), schedule: Some(schedule) };
        let plan = case.plan(planned, options(Schedule::Split)).unwrap().measured();
        let split = case.run(&plan, nth);
        let call = &case.call;
        let (mut shares, mut missed) = ((0.0, 0), (0.0, 0));
        for (row, kind) in call.rows.iter().enumerate() {
            let Row::Sparse(n) = kind else { continue };
            let index = &call.bindings[*n as usize].index;
            for h in 0..spec.n_head_kv {
                let kept = plan.selected(row, h).unwrap();
                same_selection(call, row, h, &kept);
                let view = index.layer(LAYER).unwrap();
                let o = view.head_offsets(h);
                let keys: u32 = kept.iter().map(|i| o[*i as usize + 1] - o[*i as usize]).sum();
                shares.0 += (spec.n_sink as f64 + keys as f64) / (spec.n_prefix - spec.n_window) as f64;
                shares.1 += 1;
                if call.tile_of(row).len() == 1 {
                    missed = (missed.0 + oracle::missed(call, row, h, &kept), missed.1 + 1);
                }
            }
        }
        let same = |got: cpu::Kept, missed: (f64, u64)| {
            assert!((got.share_sum - shares.0).abs() < 1e-9 && got.count == shares.1);
            assert!((got.missed_sum - missed.0).abs() < 1e-4 * (1 + missed.1) as f64, "{got:?}, not {missed:?}");
            assert_eq!(got.missed_count, missed.1);
        };
        same(plan.kept(), missed);
        let want = oracle::run_with(call, &|row, h| plan.selected(row, h).unwrap());
        close(&split, &want, &format!("split on {}", path.name()));
        assert_eq!(case.run(&plan, nth + 1), split, "a second run of the same plan");

        let plan = case.plan(planned, options(Schedule::Fused)).unwrap();
        let fused = case.run(&plan, nth);
        close(&fused, &want, &format!("fused on {}", path.name()));
        same(plan.kept(), (0.0, 0));
        let plan = plan.measured();
        assert_eq!(case.run(&plan, nth), fused, "measuring changes nothing");
        same(plan.kept(), missed);
    }
}
