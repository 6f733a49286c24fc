//! Pairs whose cells a rule chooses: what the rule sees, and exact attention over its choice. For evaluations, so it allocates.

use std::ops::Range;

use super::attend::{attend, attend_head, Cells, Part, State};
use super::kernels::{cap, decode, dots, BLOCK};
use super::lookup::Lookup;
use super::measure::Mass;
use super::memory::{Pair, Scratch};
use crate::attention::rule::{Choice, Place, Rule, Seen, Sight};

/// One sparse pair, as a rule sees it.
pub(super) struct Ruled<'a>(pub(super) Lookup<'a>);

impl Sight for Ruled<'_> {
    fn place(&self) -> Place {
        let (pair, tokens) = (&self.0.pair, self.clustered());
        Place {
            layer: pair.call.layer,
            row: pair.row,
            head_kv: pair.head_kv,
            n_group: pair.problem().n_group(),
            head_dim: pair.problem().q.ne[0],
            first: tokens.start,
            end: tokens.end,
        }
    }

    fn query(&self, row: usize) -> Vec<f32> {
        let p = self.0.pair.problem();
        let mut q = vec![0.0; p.n_group() * p.q.ne[0]];
        Pair { row, ..self.0.pair }.load_query(&mut q);
        q
    }

    fn keys(&self) -> Vec<f32> {
        let (p, path, cells) = (self.0.pair.problem(), self.0.pair.path, self.cells(self.clustered()));
        let d = p.q.ne[0];
        let mut out = vec![0.0; cells.len() * d];
        for (cells, out) in cells.chunks(BLOCK).zip(out.chunks_mut(BLOCK * d)) {
            let rows: Vec<*const u8> = cells.iter().map(|cell| self.key(*cell)).collect();
            // SAFETY: the rows are in the cache and have `d` elements; `out` has room for them.
            unsafe { decode(path, p.k_type.into(), &rows, d, out) };
        }
        out
    }

    fn scores(&self, row: usize, n: usize) -> Vec<f32> {
        self.scores_of(row, &self.cells(0..n.min(self.clustered().end)))
    }
}

impl<'a> Ruled<'a> {
    fn clustered(&self) -> Range<usize> {
        let meta = self.0.binding.index.meta();
        meta.n_sink as usize..meta.n_prefix() - meta.n_window as usize
    }

    fn cells(&self, tokens: Range<usize>) -> Vec<u32> {
        self.0.binding.cells[tokens].to_vec()
    }

    /// A cell outside the cache cannot be; reading the last one instead keeps a wrong binding harmless.
    fn key(&self, cell: u32) -> *const u8 {
        self.0.pair.keys().get((cell as usize).min(self.0.pair.problem().k.ne[1] - 1))
    }

    /// `[G][cells.len()]`: scores as the softmax gets them.
    fn scores_of(&self, row: usize, cells: &[u32]) -> Vec<f32> {
        let (p, path) = (self.0.pair.problem(), self.0.pair.path);
        let (n, group, q) = (cells.len(), p.n_group(), self.query(row));
        let (mut out, mut s) = (vec![0.0; group * n], vec![0.0; group * BLOCK]);
        for (at, cells) in cells.chunks(BLOCK).enumerate() {
            let tile = cells.len().next_multiple_of(4);
            let rows: Vec<*const u8> = (0..tile).map(|j| self.key(cells[j.min(cells.len() - 1)])).collect();
            // SAFETY: the rows are in the cache.
            unsafe { dots(path, p.k_type.into(), &q, p.q.ne[0], &rows, &[], &mut s) };
            for g in 0..group {
                let s = &mut s[g * BLOCK..g * BLOCK + cells.len()];
                if p.softcap != 0.0 {
                    cap(path, s, p.softcap);
                }
                out[g * n + at * BLOCK..][..cells.len()].copy_from_slice(s);
            }
        }
        out
    }

    /// Attends to the sinks, the tail and what a rule has chosen, into an empty state, and tells the rule. Returns the number of
    /// clustered keys of at least one head, and what is missed if that is `measured`.
    ///
    /// # Safety
    /// The call's arrays are as it says, and `scratch.q` holds the queries.
    pub(super) unsafe fn attend(
        &self,
        rule: &dyn Rule,
        choice: Choice,
        measured: bool,
        scratch: &mut Scratch<'_>,
        state: &mut State<'_>,
    ) -> (usize, Option<f64>) {
        let (lookup, pair, tokens) = (self.0, self.0.pair, self.clustered());
        let group = pair.problem().n_group();
        let mut lists = match choice {
            Choice::Group(list) => vec![list],
            Choice::Heads(lists) => lists,
        };
        for list in &mut lists {
            list.retain(|token| tokens.contains(&(*token as usize)));
            list.sort_unstable();
            list.dedup();
        }
        // A head without a list attends to sinks and tail.
        let none = Vec::new();
        let shared = lists.len() == 1;
        let list_of = |g: usize| lists.get(if shared { 0 } else { g }).unwrap_or(&none);
        let n_kv = pair.problem().k.ne[1];
        let cells_of = |list: &[u32]| -> Vec<u32> {
            let cells = list.iter().map(|token| lookup.binding.cells[*token as usize]);
            cells.filter(|cell| (*cell as usize) < n_kv).collect()
        };
        for g in 0..if shared { 1 } else { group } {
            let cells = cells_of(list_of(g));
            let cells = Cells::Listed { lookup, kept: &[], cells: &cells };
            let all = Part { own: 0..cells.len(), ahead: 0..0 };
            // SAFETY: the contract.
            match shared {
                true => unsafe { attend(&pair, &cells, all, scratch, state) },
                false => unsafe { attend_head(&pair, g, &cells, all, scratch, state) },
            }
        }
        let mut union = vec![false; tokens.len()];
        lists.iter().flatten().for_each(|token| union[*token as usize - tokens.start] = true);
        let keys = union.iter().filter(|kept| **kept).count();
        let missed = measured.then(|| {
            let n = tokens.end;
            let scores = self.scores(pair.row, n);
            let share = |g: usize| {
                let (mut near, mut far) = (Mass::NONE, Mass::NONE);
                let (sinks, clustered) = scores[g * n..(g + 1) * n].split_at(tokens.start);
                sinks.iter().for_each(|s| near.add(*s));
                let mut list = list_of(g).iter().copied().peekable();
                for (token, s) in tokens.clone().zip(clustered) {
                    let kept = list.next_if_eq(&(token as u32)).is_some();
                    if kept { &mut near } else { &mut far }.add(*s);
                }
                far.share_beside(near)
            };
            (0..group).map(share).sum::<f64>() / group as f64
        });
        let Place { layer, row, head_kv, .. } = self.place();
        rule.attended(&Seen { layer, row, head_kv, keys, clusters: 0, missed });
        (keys, missed)
    }
}
