//! What computes an attention node: one call of the kernels, or several, each put on a stream as it is.

use std::sync::Arc;

use super::plan::{Counted, Share, Step};
use crate::attention::cuda::{
    Attention, Call, Device, Error, Prefill, PrefillCall, Stream, Visible, Workspace, MAX_ROWS,
};
use crate::attention::{Array, Mode, Problem, Rotation, Selection, Spread};

/// What computes an attention node.
pub(super) enum Launch {
    Decode(Box<Attention>),
    Prefill(Box<Prefill>),
}

impl Launch {
    /// `many`: the call, if it is a prefill.
    pub(super) fn new(
        gpu: &Arc<Device>,
        call: &Call<'_>,
        many: Option<&PrefillCall<'_>>,
        workspace: &Workspace,
    ) -> Result<Launch, Error> {
        Ok(match many {
            Some(many) => Launch::Prefill(Box::new(Prefill::new(gpu, many, workspace)?)),
            None => Launch::Decode(Box::new(Attention::new(gpu, call, workspace)?)),
        })
    }

    /// `share`: what a binding's kept keys are a share of, where the graph's bindings are not all nodes'.
    pub(super) fn counted(&self, n_row: usize, n_head_kv: usize, share: Option<Share>) -> Counted {
        match self {
            Launch::Decode(_) => Counted { groups: vec![n_row], n_head_kv, tiles: false, share },
            Launch::Prefill(prefill) => Counted { groups: prefill.slots(), n_head_kv, tiles: true, share },
        }
    }

    /// From now on the counts go to this device address.
    pub(super) fn count_at(&mut self, counts: u64) {
        match self {
            Launch::Decode(attention) => attention.count_at(counts),
            Launch::Prefill(prefill) => prefill.count_at(counts),
        }
    }

    /// From now on rows attend the cells that a map has listed for them; a prefill looks at the masks itself.
    pub(super) fn attend_listed(&mut self, visible: Visible) {
        if let Launch::Decode(attention) = self {
            attention.attend_listed(visible);
        }
    }

    pub(super) fn step(mut self, counts: u64) -> Step {
        self.count_at(counts);
        Step::Attend(vec![self])
    }

    /// Puts the call on a stream.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// As for `Attention::launch`.
    pub(super) unsafe fn start(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: the same contract.
        unsafe {
            match self {
                Launch::Decode(attention) => attention.launch_after_others(stream.raw()),
                Launch::Prefill(prefill) => prefill.launch(stream.raw()),
            }
        }
    }
}

/// Is it more than decode, and in how large tiles?
pub(super) fn prefill<'a>(call: &Call<'a>, tile: usize) -> Option<PrefillCall<'a>> {
    let many = call.problem.n_row() > MAX_ROWS;
    many.then_some(PrefillCall { call: *call, tile, portable: false, slots: 0 })
}

/// One stream's rows `first..first + n` of a call.
fn rows_of(p: &Problem, stream: usize, first: usize, n: usize) -> Problem {
    let at = |a: &Array, bytes: usize, ne1: Option<usize>| {
        let [n0, n1, n2, _] = a.ne;
        Array { data: a.data.wrapping_add(bytes), ne: [n0, ne1.unwrap_or(n1), n2, 1], nb: a.nb }
    };
    let share = |a: &Array| stream / (p.q.ne[3] / a.ne[3].max(1)).max(1);
    let mask = p.mask.as_ref().map(|m| {
        let bytes = first * m.nb[1] + stream % m.ne[3].max(1) * m.nb[3];
        at(m, bytes, Some(m.ne[1].saturating_sub(first)))
    });
    let mut dst = at(&p.dst, first * p.dst.nb[2] + stream * p.dst.nb[3], None);
    dst.ne[2] = n;
    Problem {
        q: at(&p.q, first * p.q.nb[1] + stream * p.q.nb[3], Some(n)),
        k: at(&p.k, share(&p.k) * p.k.nb[3], None),
        v: at(&p.v, share(&p.v) * p.v.nb[3], None),
        mask,
        dst,
        ..*p
    }
}

/// A call of any number of rows as calls of at most 16.
pub(super) fn cut(p: &Problem) -> Vec<Problem> {
    if p.n_row() <= MAX_ROWS {
        return vec![*p];
    }
    let n_query = p.q.ne[1];
    let firsts = |stream| (0..n_query).step_by(MAX_ROWS).map(move |first| (stream, first));
    (0..p.q.ne[3]).flat_map(firsts).map(|(s, first)| rows_of(p, s, first, MAX_ROWS.min(n_query - first))).collect()
}

/// A call without bindings.
pub(super) fn dense_call(problem: &Problem, rows: u64) -> Call<'static> {
    let mode = Mode::Budget(1.0);
    let selection = Selection { mode, spread: Spread::None, alpha: 0.0, estimate: false, coarse_share: 1.0 };
    let rotation = Rotation::default();
    Call { problem: *problem, rotation, layer: 0, selection, rows, seen: true, bounds: &[], first_stream: 0 }
}
