//! What backends that compute one model's layers in turn tell each other. Layers may be split over several GPUs, or over the CPU and a
//! GPU: then one backend has the layer whose rows name the tokens, and others have layers that are probed. The first claims cells for an
//! index, each compares the probed rows that it has, and all bind those cells once every probe has agreed.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::index::Index;

/// Claims that a backend remembers to have looked at.
const LOOKED_MAX: usize = 16;

/// Cells that hold an index's prefix by the rows that name its tokens.
pub struct Claim {
    number: u64,
    pub index: Arc<Index>,
    pub stream: usize,
    pub cells: Arc<[u32]>,
    /// Probed layers that agree.
    agreed: Mutex<Vec<u32>>,
    refused: AtomicBool,
}

impl Claim {
    fn new(index: &Arc<Index>, stream: usize, cells: &Arc<[u32]>) -> Claim {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Claim {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            index: index.clone(),
            stream,
            cells: cells.clone(),
            agreed: Mutex::default(),
            refused: AtomicBool::new(false),
        }
    }

    fn is_of(&self, index: &Arc<Index>, stream: usize, cells: &[u32]) -> bool {
        Arc::ptr_eq(&self.index, index) && self.stream == stream && *self.cells == *cells
    }

    /// The probed rows of these layers agree.
    fn agree(&self, layers: impl Iterator<Item = u32>) {
        self.agreed.lock().unwrap_or_else(|e| e.into_inner()).extend(layers);
    }

    /// Probed rows differ: whoever has bound the cells lets go of them.
    fn refuse(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    pub fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Has every probe agreed, and none differed?
    fn is_complete(&self) -> bool {
        let agreed = self.agreed.lock().unwrap_or_else(|e| e.into_inner());
        !self.is_refused() && self.index.probes().iter().all(|probe| agreed.contains(&probe.layer))
    }
}

/// The pass that this thread is in.
#[derive(Default)]
struct Pass {
    deepest: Option<u32>,
    claims: Vec<Arc<Claim>>,
}

thread_local! {
    static PASS: RefCell<Pass> = RefCell::default();
}

/// Claims of the backends that have computed earlier layers in this pass.
pub fn claims() -> Vec<Arc<Claim>> {
    PASS.with_borrow(|pass| pass.claims.clone())
}

/// What becomes of cells that hold an index's tokens.
pub enum Verdict {
    /// Every probe agrees; the claim, where other backends have layers of the index.
    Bind(Option<Arc<Claim>>),
    /// Other backends have yet to compare theirs.
    Wait,
    /// Probed rows differ.
    Refuse,
}

/// One backend's part.
#[derive(Default)]
pub struct Member {
    /// What it has claimed in this pass, and complete claims of its last one.
    claimed: Vec<Arc<Claim>>,
    earlier: Vec<Arc<Claim>>,
    /// Others' claims by number, and whether they were complete.
    looked: Vec<(u64, bool)>,
}

impl Member {
    /// A graph with the caches of these layers (lowest, deepest) is next, under these bindings' claims. ggml computes the parts of
    /// a graph in one thread, in layer order: a graph that does not go on behind the last one begins a pass, in which nothing of
    /// the one before is known.
    pub fn enter<'a>(&mut self, layers: Option<(u32, u32)>, bound: impl Iterator<Item = &'a Arc<Claim>>) {
        let Some((lowest, deepest)) = layers else { return };
        self.earlier = std::mem::take(&mut self.claimed);
        self.earlier.retain(|claim| claim.is_complete());
        self.claimed.extend(bound.cloned());
        PASS.with_borrow_mut(|pass| {
            if pass.deepest.is_some_and(|before| lowest <= before) {
                pass.claims.clear();
            }
            pass.deepest = Some(deepest);
            pass.claims.extend(self.claimed.iter().cloned());
        });
    }

    /// Is there a claim that was not looked at as it is now, or one of its own that all agree on by now?
    pub fn has_news(&self) -> bool {
        let own = |claim: &Arc<Claim>| self.claimed.iter().any(|own| Arc::ptr_eq(own, claim));
        let seen = |claim: &Arc<Claim>| own(claim) || self.looked.contains(&(claim.number, claim.is_complete()));
        !self.earlier.iter().all(own) || PASS.with_borrow(|pass| !pass.claims.iter().all(seen))
    }

    /// Another's claim is being looked at.
    pub fn look(&mut self, claim: &Claim) {
        let own = (claim.number, claim.is_complete());
        if !self.looked.contains(&own) {
            self.looked.truncate(LOOKED_MAX - 1);
            self.looked.insert(0, own);
        }
    }

    /// For cells that this backend has found or, under `claim`, another one. `is_here`: has it that layer's rows? `agree`: do those of
    /// the probed layers that it has?
    pub fn judge(
        &mut self,
        claim: Option<Arc<Claim>>,
        (index, stream, cells): (&Arc<Index>, usize, &Arc<[u32]>),
        is_here: &dyn Fn(u32) -> bool,
        agree: bool,
    ) -> Verdict {
        let probes: Vec<u32> = index.probes().iter().map(|probe| probe.layer).collect();
        // Other backends have the rest, or nobody (an eval callback, layers split over servers).
        let all_here = || index.shapes().iter().map(|s| s.layer).chain(probes.iter().copied()).all(is_here);
        let claim = match claim {
            None if all_here() => None,
            claim => Some(claim.unwrap_or_else(|| self.claim(index, stream, cells))),
        };
        match &claim {
            Some(claim) if agree => claim.agree(probes.into_iter().filter(|layer| is_here(*layer))),
            Some(claim) => claim.refuse(),
            None => {}
        }
        match claim {
            _ if !agree => Verdict::Refuse,
            Some(claim) if !claim.is_complete() => Verdict::Wait,
            claim => Verdict::Bind(claim),
        }
    }

    /// Claims cells: a new claim, unless all have agreed on the same one in the last pass.
    fn claim(&mut self, index: &Arc<Index>, stream: usize, cells: &Arc<[u32]>) -> Arc<Claim> {
        let same = |claim: &&Arc<Claim>| claim.is_of(index, stream, cells);
        if let Some(own) = self.claimed.iter().find(same) {
            return own.clone();
        }
        let before = self.earlier.iter().find(same);
        let own = before.cloned().unwrap_or_else(|| Arc::new(Claim::new(index, stream, cells)));
        self.claimed.push(own.clone());
        PASS.with_borrow_mut(|pass| pass.claims.push(own.clone()));
        own
    }
}

#[cfg(test)]
mod tests {
    use super::super::binding::tests::{Prefix, N_PREFIX};
    use super::*;

    fn index() -> Arc<Index> {
        Prefix::new(1, N_PREFIX, 64).matcher.index.clone()
    }

    /// A pass by two backends, the first of which has found the prefix in these cells: its claim, and those that the second sees.
    fn pass(members: &mut [Member; 2], index: &Arc<Index>, cells: &[u32]) -> (Arc<Claim>, Vec<Arc<Claim>>) {
        let nothing = || std::iter::empty::<&Arc<Claim>>();
        members[0].enter(Some((0, 3)), nothing());
        let own = members[0].claim(index, 0, &cells.into());
        members[1].enter(Some((4, 7)), nothing());
        (own, claims())
    }

    fn agree(claim: &Claim) {
        claim.agree(claim.index.probes().iter().map(|p| p.layer));
    }

    #[test]
    fn a_claim_is_complete_once_every_probe_has_agreed() {
        let index = index();
        let layers: Vec<u32> = index.probes().iter().map(|p| p.layer).collect();
        assert!(!layers.is_empty());
        let claim = Claim::new(&index, 0, &vec![1, 2].into());
        for layer in layers {
            assert!(!claim.is_complete());
            claim.agree([layer].into_iter());
        }
        assert!(claim.is_complete());
        claim.refuse();
        assert!(!claim.is_complete() && claim.is_refused());
    }

    #[test]
    fn what_all_agree_on_is_known_to_the_first_in_the_next_pass_alone() {
        let (index, mut members) = (index(), <[Member; 2]>::default());
        let (first, seen) = pass(&mut members, &index, &[4, 5]);
        assert!(seen.len() == 1 && Arc::ptr_eq(&seen[0], &first) && members[1].has_news());
        members[1].look(&seen[0]);
        assert!(!members[1].has_news());
        agree(&seen[0]);
        assert!(members[1].has_news(), "it is complete now");
        let (second, _) = pass(&mut members, &index, &[4, 5]);
        assert!(Arc::ptr_eq(&first, &second));
        // Other cells are another claim, and what was not claimed again is forgotten.
        let (third, _) = pass(&mut members, &index, &[4, 6]);
        assert!(!third.is_complete());
        let (fourth, _) = pass(&mut members, &index, &[4, 5]);
        assert!(!fourth.is_complete());
        agree(&fourth);
        members[0].enter(Some((0, 3)), std::iter::empty());
        assert!(members[0].has_news());
        let (fifth, _) = pass(&mut members, &index, &[4, 5]);
        assert!(!fifth.is_complete(), "a pass without it lies between");
    }

    #[test]
    fn claims_end_with_their_pass() {
        let (index, mut members) = (index(), <[Member; 2]>::default());
        let (own, _) = pass(&mut members, &index, &[4, 5]);
        for layers in [(4, 7), (0, 7), (7, 7)] {
            pass(&mut members, &index, &[4, 5]);
            members[1].enter(Some(layers), std::iter::empty());
            assert!(claims().is_empty(), "{layers:?} does not go on behind 7");
        }
        pass(&mut members, &index, &[4, 5]);
        members[1].enter(None, std::iter::empty());
        assert_eq!(claims().len(), 1, "a graph without a cache is a part of any pass");
        std::thread::spawn(|| assert!(claims().is_empty())).join().unwrap();
        // Those of bindings are told in every pass.
        members[0].enter(Some((0, 3)), [own.clone()].iter());
        members[1].enter(Some((4, 7)), std::iter::empty());
        assert!(claims().iter().any(|claim| Arc::ptr_eq(claim, &own)));
    }
}
