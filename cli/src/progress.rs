//! Progress on stderr: a bar with the time left on a terminal, else one plain line per step.

use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressState, ProgressStyle};

/// Parts of a step that a bar can show.
const FINE: u64 = 1000;

/// One phase of `total` steps.
pub struct Phase {
    name: &'static str,
    total: usize,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl Phase {
    pub fn new(name: &'static str, total: usize) -> Phase {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix:>8} {msg} [{bar:36}] {elapsed} left {left}")
                .expect("the template is a constant")
                .with_key("left", |state: &ProgressState, out: &mut dyn Write| {
                    // Before the first step is done there is nothing to estimate from.
                    let left = HumanDuration(state.eta());
                    let _ = if state.pos() == 0 { out.write_char('?') } else { write!(out, "{left:#}") };
                });
            let bar = ProgressBar::new(total as u64 * FINE).with_style(style.progress_chars("=> ")).with_prefix(name);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let phase = Phase { name, total, start: Instant::now(), bar };
        if let Some(bar) = &phase.bar {
            bar.set_message(phase.count(0));
        }
        phase
    }

    fn count(&self, done: usize) -> String {
        let width = self.total.to_string().len();
        format!("[{done:width$}/{:width$}]", self.total)
    }

    /// `part` (0 to 1) of the step after the first `done` ones is ready.
    pub fn part(&self, done: usize, part: f32) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64 * FINE + (part.clamp(0.0, 1.0) * FINE as f32) as u64);
        }
    }

    /// The first `done` steps are ready.
    pub fn step(&self, done: usize) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(self.count(done));
                bar.set_position(done as u64 * FINE);
            }
            None => eprintln!("{} {} {:.1} s", self.count(done), self.name, self.start.elapsed().as_secs_f64()),
        }
    }

    /// Seconds it took.
    pub fn end(self) -> f64 {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.start.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_aligned() {
        let phase = Phase { name: "cluster", total: 30, start: Instant::now(), bar: None };
        assert_eq!(phase.count(2), "[ 2/30]");
        assert_eq!(phase.count(30), "[30/30]");
    }
}
