//! The seam of evaluations: a rule sees the call's queries and keys as they are, attention over what it chooses is exact, and it
//! is told what was attended to and missed.

mod attend_case;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use attend_case::{decode, Case, Random, Spec, LAYER};
use ggml_squeeze::attention::cpu::{Memory, Plan};
use ggml_squeeze::attention::rule::{Choice, Place, Rule, Seen, Sight};
use ggml_squeeze::attention::{oracle, Array, Call, Element, Mode, Row, Selection};
use proptest::prelude::*;

/// What a rule saw of a pair.
struct View {
    place: Place,
    query: Vec<f32>,
    keys: Vec<f32>,
    scores: Vec<f32>,
}

/// Chooses tokens at random, of each pair its own.
struct Chance {
    share: f32,
    heads: bool,
    views: Mutex<BTreeMap<(usize, usize), View>>,
    seen: Mutex<BTreeMap<(usize, usize), Seen>>,
}

impl Chance {
    fn new(share: f32, heads: bool) -> Arc<Chance> {
        Arc::new(Chance { share, heads, views: Mutex::default(), seen: Mutex::default() })
    }

    fn list(&self, place: &Place, g: usize) -> Vec<u32> {
        let mut r = Random((place.row * 64 + place.head_kv * 16 + g) as u64 + 1);
        let mut list: Vec<u32> =
            (place.first..place.end).filter(|_| r.unit() < self.share).map(|token| token as u32).collect();
        // Sinks and the tail are attended to once whatever a rule says; so is a token that is named twice.
        list.extend([0, place.end as u32]);
        list.extend(list.first().copied());
        list
    }
}

impl Rule for Chance {
    fn choose(&self, sight: &dyn Sight) -> Option<Choice> {
        let place = sight.place();
        let (query, keys, scores) = (sight.query(place.row), sight.keys(), sight.scores(place.row, place.end));
        let of_sinks = sight.scores(place.row, place.first);
        assert!((0..place.n_group * place.first)
            .all(|i| { of_sinks[i] == scores[i / place.first * place.end + i % place.first] }));
        self.views.lock().unwrap().insert((place.row, place.head_kv), View { place, query, keys, scores });
        Some(match self.heads {
            true => Choice::Heads((0..place.n_group).map(|g| self.list(&place, g)).collect()),
            false => Choice::Group(self.list(&place, 0)),
        })
    }

    fn attended(&self, seen: &Seen) {
        assert!(self.seen.lock().unwrap().insert((seen.row, seen.head_kv), *seen).is_none(), "told twice");
    }
}

fn row_of(a: &Array, element: Element, at: [usize; 3]) -> Vec<f64> {
    let address = a.data.wrapping_add(at[0] * a.nb[1] + at[1] * a.nb[2] + at[2] * a.nb[3]);
    // SAFETY: a row of the case's own array.
    let bytes = unsafe { std::slice::from_raw_parts(address, element.row_bytes(a.ne[0])) };
    decode(element, bytes).into_iter().map(f64::from).collect()
}

fn query_of(call: &Call, row: usize, head: usize) -> Vec<f64> {
    let (p, n_query) = (&call.problem, call.problem.q.ne[1]);
    let q = row_of(&p.q, Element::F32, [row % n_query, head, row / n_query]);
    q.into_iter().map(|x| x * f64::from(p.scale)).collect()
}

fn score(call: &Call, q: &[f64], row: usize, head: usize, cell: usize) -> f64 {
    let p = &call.problem;
    let key = row_of(&p.k, p.k_type, [cell, head / p.n_group(), row / p.q.ne[1] / (p.q.ne[3] / p.k.ne[3])]);
    let s: f64 = q.iter().zip(key).map(|(a, b)| a * b).sum();
    if p.softcap == 0.0 {
        s
    } else {
        f64::from(p.softcap) * s.tanh()
    }
}

/// Softmax attention of a row and head over cells, by its definition, in f64; masked cells are left out.
fn attention(call: &Call, row: usize, head: usize, cells: &[u32]) -> Vec<f64> {
    let (p, q) = (&call.problem, query_of(call, row, head));
    let (stream, query) = (row / p.q.ne[1], row % p.q.ne[1]);
    let mut terms = Vec::new();
    for cell in cells {
        let cell = *cell as usize;
        let mask = p.mask.as_ref().map_or(0.0, |m| {
            let at = query * m.nb[1] + head % m.ne[2] * m.nb[2] + stream % m.ne[3] * m.nb[3];
            // SAFETY: an element of the case's own mask.
            unsafe { m.data.add(at).cast::<half::f16>().add(cell).read() }.to_f64()
        });
        if mask > f64::NEG_INFINITY {
            let value = row_of(&p.v, p.v_type, [cell, head / p.n_group(), stream / (p.q.ne[3] / p.v.ne[3])]);
            terms.push((score(call, &q, row, head, cell) + mask, value));
        }
    }
    let top = terms.iter().fold(f64::NEG_INFINITY, |m, t| m.max(t.0));
    let total: f64 = terms.iter().map(|t| (t.0 - top).exp()).sum();
    let sum = |d: usize| terms.iter().map(|(s, v)| (s - top).exp() * v[d]).sum::<f64>();
    (0..p.v.ne[0]).map(|d| if terms.is_empty() { 0.0 } else { sum(d) / total }).collect()
}

fn close(got: f32, want: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= 2e-5 * (1.0 + want.abs()), "{what}: {got}, not {want}");
}

fn check(spec: &Spec, share: f32, heads: bool) {
    let mut case = Case::new(spec);
    let rule = Chance::new(share, heads);
    let plan = Plan::ruled(case.call.clone(), 2, &mut Memory::default(), rule.clone()).unwrap().measured();
    let out = case.run(&plan, 2);
    let call = &case.call;
    let (p, group) = (&call.problem, spec.group);
    let (views, seen) = (rule.views.lock().unwrap(), rule.seen.lock().unwrap());
    let n_sparse = call.rows.iter().filter(|row| **row != Row::Dense).count();
    assert_eq!((views.len(), seen.len()), (n_sparse * spec.n_head_kv, n_sparse * spec.n_head_kv));
    let (mut share_sum, mut missed_sum) = (0.0, 0.0);
    for ((row, head_kv), view) in views.iter() {
        let Row::Sparse(n) = call.rows[*row] else { panic!("row {row} is dense") };
        let binding = &call.bindings[n as usize];
        let place = view.place;
        assert_eq!((place.row, place.head_kv, place.layer), (*row, *head_kv, LAYER));
        assert_eq!((place.first, place.end), (spec.n_sink, spec.n_prefix - spec.n_window));
        let (n_token, d) = (place.end - place.first, spec.dk);
        assert_eq!((view.query.len(), view.keys.len()), (group * d, n_token * d));
        assert_eq!(view.scores.len(), group * place.end);
        let (mut union, mut missed) = (vec![false; spec.n_prefix], 0.0);
        for g in 0..group {
            let head = head_kv * group + g;
            let q = query_of(call, *row, head);
            q.iter().zip(&view.query[g * d..]).for_each(|(want, got)| close(*got, *want, "query"));
            let list = rule.list(&place, if heads { g } else { 0 });
            let kept = |token: usize| list.contains(&(token as u32));
            let (mut near, mut far, mut cells) = (0.0, 0.0, binding.always.to_vec());
            for token in 0..place.first {
                let s = score(call, &q, *row, head, binding.cells[token] as usize);
                close(view.scores[g * place.end + token], s, "sink's score");
                near += s.exp();
            }
            for (token, taken) in union.iter_mut().enumerate().take(place.end).skip(place.first) {
                let cell = binding.cells[token];
                let s = score(call, &q, *row, head, cell as usize);
                close(view.scores[g * place.end + token], s, "score");
                if kept(token) {
                    near += s.exp();
                    cells.push(cell);
                    *taken = true;
                } else {
                    far += s.exp();
                }
                let key = row_of(&p.k, p.k_type, [cell as usize, *head_kv, row / spec.n_query]);
                let got = &view.keys[(token - place.first) * d..][..d];
                key.iter().zip(got).for_each(|(want, got)| close(*got, *want, "key"));
            }
            missed += far / (near + far) / group as f64;
            let want = attention(call, *row, head, &cells);
            let at = ((row / spec.n_query * spec.n_query + row % spec.n_query) * p.q.ne[2] + head) * spec.dv;
            want.iter().zip(&out[at..]).for_each(|(want, got)| close(*got, *want, "output"));
        }
        let told = seen[&(*row, *head_kv)];
        assert_eq!((told.keys, told.clusters), (union.iter().filter(|kept| **kept).count(), 0));
        assert!((told.missed.unwrap() - missed).abs() < 1e-4, "{told:?}, not {missed}");
        share_sum += (spec.n_sink + told.keys) as f64 / (spec.n_prefix - spec.n_window) as f64;
        missed_sum += missed;
    }
    let kept = plan.kept();
    assert!((kept.share_sum - share_sum).abs() < 1e-9 && (kept.missed_sum - missed_sum).abs() < 1e-3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn attention_over_a_choice_is_exact(
        seed in any::<u64>(),
        (group, n_head_kv, n_query) in (1usize..5, 1usize..3, 1usize..5),
        (n_prefix, n_sink, n_window) in (70usize..150, 0usize..9, 1usize..20),
        (share, sparse) in (0.0f32..1.0, 0.3f32..1.0),
        heads in any::<bool>(),
        softcap in prop::sample::select(vec![0.0f32, 30.0]),
        types in prop::sample::select(vec![(Element::F16, Element::F16), (Element::Q8_0, Element::F32)]),
        n_stream in 1usize..3,
    ) {
        let spec = Spec {
            seed, group, n_head_kv, n_query, n_prefix, n_sink, n_window, sparse, softcap, n_stream,
            k_type: types.0, v_type: types.1, ..Spec::base()
        };
        check(&spec, share, heads);
    }
}

/// Leaves the choice to the index, with another budget.
struct Budget(f32, Mutex<Vec<Seen>>);

impl Rule for Budget {
    fn selection(&self, layer: u32, usual: Selection) -> Selection {
        assert_eq!(layer, LAYER);
        Selection { mode: Mode::Budget(self.0), ..usual }
    }

    fn attended(&self, seen: &Seen) {
        self.1.lock().unwrap().push(*seen);
    }
}

#[test]
fn a_rule_may_change_the_selection_of_a_layer_and_is_told_what_it_kept() {
    let mut case = Case::new(&Spec::base());
    let rule = Arc::new(Budget(0.5, Mutex::default()));
    let plan = Plan::ruled(case.call.clone(), 2, &mut Memory::default(), rule.clone()).unwrap().measured();
    let out = case.run(&plan, 2);
    let mut call = case.call.clone();
    call.selection.mode = Mode::Budget(0.5);
    let want = oracle::run(&call);
    out.iter().zip(want).for_each(|(got, want)| close(*got, want, "output"));
    let seen = rule.1.lock().unwrap();
    assert_eq!(seen.len(), call.rows.len() * 2);
    for s in seen.iter() {
        let kept = oracle::selection(&call, s.row, s.head_kv);
        let view = call.bindings[0].index.layer(LAYER).unwrap();
        let offsets = view.head_offsets(s.head_kv);
        let keys: u32 = kept.iter().map(|i| offsets[*i as usize + 1] - offsets[*i as usize]).sum();
        assert_eq!((s.keys, s.clusters), (keys as usize, kept.len()));
        assert!((s.missed.unwrap() - oracle::missed(&call, s.row, s.head_kv, &kept)).abs() < 1e-4);
    }
}
