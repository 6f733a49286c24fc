//! The description of an attention call (shapes, strides, masks, cell maps, selection) against the f64 oracle, on every code path and
//! schedule of this machine. Descriptions that do not fit together are refused, and selections beyond all sense neither crash nor
//! hang.

#![no_main]

#[path = "../../tests/attend_case/mod.rs"]
mod attend_case;

use arbitrary::Arbitrary;
use attend_case::check::check;
use attend_case::{Case, Spec};
use ggml_squeeze::attention::cpu::{Memory, Options, Path, Plan, Schedule};
use ggml_squeeze::attention::{Array, Call, Element, Mode, Rotation, Row, Selection, Spread};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    seed: u64,
    dk: u8,
    dv: u8,
    group: u8,
    heads: u8,
    n_query: u8,
    n_stream: u8,
    n_prefix: u8,
    n_sink: u8,
    n_window: u8,
    n_other: u8,
    n_cluster: u8,
    n_coarse: u8,
    sparse: u8,
    softcap: u8,
    tile: u8,
    k_type: u8,
    v_type: u8,
    rotation: [u8; 2],
    mode: u8,
    share: u8,
    spread: u8,
    estimate: bool,
    lopsided: bool,
    mask: bool,
    mask_per_head: bool,
    plain_mask: bool,
    sinks: bool,
    contiguous: bool,
    head_major: bool,
    gap: u8,
    threads: u8,
    planned: u8,
    wild: Option<Wild>,
    broken: Vec<Broken>,
}

/// A selection that no setting gives.
#[derive(Arbitrary, Debug)]
struct Wild {
    mode: u8,
    share: f32,
    floor: f32,
    alpha: f32,
    coarse_share: f32,
    query: f32,
}

/// A number of the call that is another.
#[derive(Arbitrary, Debug)]
enum Broken {
    Extent { array: u8, dim: u8, value: u32 },
    Stride { array: u8, dim: u8, value: u32 },
    Types(u8, u8),
    Rows(u8),
    Row(u8, u32),
    Tile(u8, u8),
    Rotation(u8, u8),
    Layer(u32),
    Cells(u8),
    Alibi,
}

fn of(x: u8, least: usize, most: usize) -> usize {
    least + x as usize % (most - least + 1)
}

impl Input {
    fn spec(&self) -> Spec {
        let element = |x: u8| Element::ALL[x as usize % Element::ALL.len()];
        let (k_type, v_type) = (element(self.k_type), element(self.v_type));
        let dim = |x: u8, e: Element| if e.block() > 1 { 32 * of(x, 2, 8) } else { 8 * of(x, 8, 32) };
        let (dk, dv) = (dim(self.dk, k_type), dim(self.dv, v_type));
        // Powers of two that divide the head size, or none.
        let block = |x: u8, d: usize| Some(1 << (x % 9)).filter(|b| *b > 1 && d % b == 0).unwrap_or(0);
        let (n_sink, n_window) = (of(self.n_sink, 0, 8), of(self.n_window, 0, 12));
        let n_prefix = n_sink + n_window + of(self.n_prefix, 1, 200);
        let share = self.share as f32 / 255.0;
        let mode = match self.mode % 4 {
            0 => Mode::Budget(share),
            1 => Mode::Budget(1.0),
            2 => Mode::Threshold { threshold: share * share * 0.02, floor: share / 4.0 },
            _ => Mode::Mass(share),
        };
        let spread = [Spread::None, Spread::Radius, Spread::Diag][self.spread as usize % 3];
        Spec {
            seed: self.seed,
            dk,
            dv,
            group: of(self.group, 1, 9),
            n_head_kv: of(self.heads, 1, 3),
            n_query: of(self.n_query, 1, 24),
            n_stream: of(self.n_stream, 1, 2),
            n_prefix,
            n_sink,
            n_window,
            n_other: of(self.n_other, 0, 60),
            n_cluster: of(self.n_cluster, 1, n_prefix - n_sink - n_window),
            n_coarse: of(self.n_coarse, 0, 5),
            lopsided: self.lopsided,
            sparse: self.sparse as f32 / 200.0,
            mask: self.mask,
            mask_per_head: self.mask_per_head,
            softcap: if self.softcap % 3 == 0 { of(self.softcap, 1, 40) as f32 } else { 0.0 },
            sinks: self.sinks,
            selection: Selection { mode, spread, alpha: 2.0, estimate: self.estimate, coarse_share: 1.0 },
            contiguous: self.contiguous,
            head_major: self.head_major,
            plain_mask: self.plain_mask,
            k_type,
            v_type,
            rotation: Rotation { k: block(self.rotation[0], dk), v: block(self.rotation[1], dv) },
            tile: of(self.tile, 1, 16),
            gap: 4 * of(self.gap, 0, 20),
            ..Spec::base()
        }
    }
}

impl Broken {
    fn apply(&self, call: &mut Call) {
        let p = &mut call.problem;
        fn array(p: &mut ggml_squeeze::attention::Problem, i: u8) -> Option<&mut Array> {
            match i % 5 {
                0 => Some(&mut p.q),
                1 => Some(&mut p.k),
                2 => Some(&mut p.v),
                3 => Some(&mut p.dst),
                _ => p.mask.as_mut(),
            }
        }
        let element = |x: u8| Element::ALL[x as usize % Element::ALL.len()];
        match *self {
            Broken::Extent { array: i, dim, value } => {
                if let Some(a) = array(p, i) {
                    a.ne[dim as usize % 4] = value as usize % 1000;
                }
            }
            Broken::Stride { array: i, dim, value } => {
                if let Some(a) = array(p, i) {
                    a.nb[dim as usize % 4] = value as usize;
                }
            }
            Broken::Types(k, v) => (p.k_type, p.v_type) = (element(k), element(v)),
            Broken::Rows(n) => call.rows = call.rows.iter().copied().cycle().take(n as usize).collect(),
            Broken::Row(at, binding) => {
                let mut rows = call.rows.to_vec();
                let n = rows.len().max(1);
                if let Some(row) = rows.get_mut(at as usize % n) {
                    *row = Row::Sparse(binding);
                }
                call.rows = rows.into();
            }
            Broken::Tile(start, end) => {
                let more = call.tiles.iter().cloned().chain([start as usize..end as usize]);
                call.tiles = more.collect();
            }
            Broken::Rotation(k, v) => call.rotation = Rotation { k: k as usize, v: v as usize },
            Broken::Layer(layer) => call.layer = layer,
            Broken::Cells(n) => {
                let mut all = call.bindings.to_vec();
                all.iter_mut().for_each(|b| b.cells = b.cells.iter().copied().take(n as usize).collect());
                call.bindings = all.into();
            }
            Broken::Alibi => p.max_bias = 8.0,
        }
    }
}

impl Wild {
    fn run(&self, spec: &Spec) {
        let mode = match self.mode % 3 {
            0 => Mode::Budget(self.share),
            1 => Mode::Threshold { threshold: self.share, floor: self.floor },
            _ => Mode::Mass(self.share),
        };
        let Wild { alpha, coarse_share, .. } = *self;
        let mut case = Case::new(spec);
        case.call.selection = Selection { mode, alpha, coarse_share, ..spec.selection };
        case.q.iter_mut().step_by(3).for_each(|q| *q = self.query);
        for (path, schedule) in
            Path::available().into_iter().flat_map(|p| [Schedule::Split, Schedule::Fused].map(|s| (p, s)))
        {
            let plan = case.plan(2, Options { path: Some(path), schedule: Some(schedule) }).expect("it fits");
            case.run(&plan, 2);
        }
    }
}

fuzz_target!(|input: Input| {
    let spec = input.spec();
    if let Some(wild) = &input.wild {
        wild.run(&spec);
    } else if input.broken.is_empty() {
        check(&spec, of(input.planned, 1, 5), of(input.threads, 1, 3));
    } else {
        let case = Case::new(&spec);
        let mut call = case.call.clone();
        input.broken.iter().for_each(|broken| broken.apply(&mut call));
        // The arrays may now reach beyond their memory: the plan is made, and not run.
        let _ = Plan::new(call, of(input.planned, 1, 5), &mut Memory::default());
    }
});
