//! Settings out of what an index's calibration says of its layers.

use ggml_squeeze::index::{Calibration, Index};

/// Step in which budgets are handed out.
const STEP: f32 = 0.005;
/// No layer has less.
const LEAST: f32 = 0.02;

/// A curve through points of rising x, straight between them, flat outside.
fn at(points: &[(f32, f32)], x: f32) -> f32 {
    match points.iter().position(|p| p.0 >= x) {
        None => points.last().map_or(0.0, |p| p.1),
        Some(0) => points[0].1,
        Some(i) => {
            let ((x0, y0), (x1, y1)) = (points[i - 1], points[i]);
            y0 + (y1 - y0) * (x - x0) / (x1 - x0).max(f32::EPSILON)
        }
    }
}

/// Budgets of curves of attention kept, mean `share`: every step goes to the curve that gains most by it.
fn allocate(curves: &[Vec<(f32, f32)>], share: f32) -> Vec<f32> {
    let mut budgets = vec![LEAST.min(share); curves.len()];
    let mut left = ((share * curves.len() as f32 - budgets.iter().sum::<f32>()) / STEP).round() as usize;
    while left > 0 {
        let gain = |i: usize| at(&curves[i], budgets[i] + STEP) - at(&curves[i], budgets[i]);
        let open = (0..curves.len()).filter(|i| budgets[*i] + STEP <= 1.0);
        let Some(best) = open.max_by(|a, b| gain(*a).total_cmp(&gain(*b)).then(b.cmp(a))) else { break };
        budgets[best] += STEP;
        left -= 1;
    }
    budgets
}

/// A budget for each indexed layer, mean `share`, so that on the window's queries most attention is kept.
pub fn by_layer(index: &Index, share: f32) -> Vec<(u32, f32)> {
    let mut first = 0;
    let curves: Vec<Vec<(f32, f32)>> = index
        .shapes()
        .iter()
        .map(|shape| {
            let heads = first..first + shape.n_head_kv as usize;
            first = heads.end;
            let mass = |row: &Calibration| {
                let own = row.heads.get(heads.clone()).unwrap_or(&[]);
                own.iter().map(|h| h.budget_mass).sum::<f32>() / own.len().max(1) as f32
            };
            let rows = index.meta().calibration.iter().map(|row| (row.budget, mass(row)));
            [(0.0, 0.0)].into_iter().chain(rows.filter(|p| p.0 < 1.0)).chain([(1.0, 1.0)]).collect()
        })
        .collect();
    index.shapes().iter().map(|s| s.layer).zip(allocate(&curves, share)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_go_where_they_gain_most() {
        // One layer has all at 0.1, the other gains evenly.
        let curves = [vec![(0.0, 0.0), (0.1, 0.9), (1.0, 1.0)], vec![(0.0, 0.0), (1.0, 1.0)]];
        let budgets = allocate(&curves, 0.3);
        assert!((budgets[0] - 0.1).abs() < 2.0 * STEP && (budgets[1] - 0.5).abs() < 2.0 * STEP, "{budgets:?}");
        assert!((budgets.iter().sum::<f32>() / 2.0 - 0.3).abs() < STEP);
        assert_eq!(allocate(&curves, 0.01), [0.01, 0.01]);
        assert!(allocate(&curves, 1.0).iter().all(|b| *b > 1.0 - 2.0 * STEP));
    }
}
