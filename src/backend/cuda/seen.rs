//! What a query row sees of a cache, as its mask shows it.

use std::ops::Range;

use half::f16;

use super::super::graph::shown;

/// Elements of a mask that are looked at together.
const STEP: usize = 32;

/// A query row of the graph at hand.
pub struct Seen {
    pub stream: usize,
    /// Visible cells, ascending.
    runs: Vec<Range<u32>>,
}

/// Cells in any order, as runs of consecutive ones.
pub fn runs_of(cells: impl IntoIterator<Item = u32>) -> Vec<Range<u32>> {
    let mut runs: Vec<Range<u32>> = Vec::new();
    for cell in cells {
        match runs.last_mut() {
            Some(run) if run.end == cell => run.end += 1,
            _ => runs.push(cell..cell + 1),
        }
    }
    runs
}

impl Seen {
    /// A row with this mask, an element for each cell of its stream.
    pub fn of(stream: usize, mask: &[f16]) -> Seen {
        let is_shown = |m: &f16| shown(m.to_bits());
        let n_shown = |from: usize| {
            // One question for all of a step.
            let whole = |step: &&[f16]| shown(step.iter().fold(0, |any, m| any | m.to_bits()));
            let steps: usize = mask[from..].chunks(STEP).take_while(whole).map(<[f16]>::len).sum();
            steps + mask[from + steps..].iter().take_while(|m| is_shown(m)).count()
        };
        let (mut runs, mut at) = (Vec::new(), 0);
        while let Some(more) = mask[at..].iter().position(is_shown) {
            let start = at + more;
            at = start + n_shown(start);
            runs.push(start as u32..at as u32);
        }
        Seen { stream, runs }
    }

    pub fn n_cell(&self) -> usize {
        self.runs.iter().map(ExactSizeIterator::len).sum()
    }

    /// One past the last visible cell.
    pub fn end(&self) -> usize {
        self.runs.last().map_or(0, |run| run.end as usize)
    }

    pub fn cells(&self) -> Vec<u32> {
        self.runs.iter().cloned().flatten().collect()
    }

    /// Does the row see every cell of these runs?
    pub fn all(&self, wanted: &[Range<u32>]) -> bool {
        wanted.iter().all(|own| {
            let at = self.runs.partition_point(|run| run.end <= own.start);
            self.runs.get(at).is_some_and(|run| run.start <= own.start && own.end <= run.end)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(cells: &[u32], n: usize) -> Seen {
        let mut mask = vec![f16::NEG_INFINITY; n];
        cells.iter().for_each(|c| mask[*c as usize] = if c % 2 == 0 { f16::ZERO } else { f16::NEG_ZERO });
        Seen::of(3, &mask)
    }

    #[test]
    fn a_row_sees_cells_with_or_without_gaps() {
        let row = seen(&[1, 2, 3, 5, 6, 9, 10, 11], 12);
        let all = |cells: &[u32]| row.all(&runs_of(cells.iter().copied()));
        assert!(all(&[]) && all(&[1, 2, 3]) && all(&[9, 10, 11]) && all(&[11]) && all(&[6, 2, 9]));
        assert!(!all(&[3, 4, 5]) && !all(&[0, 1]) && !all(&[10, 11, 12]) && !all(&[4]) && !all(&[5, 6, 7, 8, 9]));
        assert!(!all(&[2, 4]) && !all(&[12, 1]));
    }

    #[test]
    fn a_mask_is_read_to_the_cell() {
        // Runs that begin and end at every place of a step.
        for (start, len) in (0..70).flat_map(|start| (0..70).map(move |len| (start, len))) {
            let cells: Vec<u32> = (start..start + len).chain(150..151).collect();
            let row = seen(&cells, 200);
            assert_eq!((row.cells(), row.n_cell(), row.end()), (cells, len as usize + 1, 151), "{start}, {len}");
        }
        let none = seen(&[], 64);
        assert_eq!((none.n_cell(), none.end(), none.stream), (0, 0, 3));
        assert_eq!(seen(&(0..64).collect::<Vec<_>>(), 64).runs, runs_of(0..64));
    }
}
