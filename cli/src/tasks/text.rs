//! Tasks about the text itself: quotes of it, and how it goes on.

use anyhow::{ensure, Result};

use super::garden::{boundaries, Garden};
use super::{Part, Task, Want};

/// Words of a quote that are given, and that are asked for.
const GIVEN_WORDS: usize = 14;
const ASKED_WORDS: usize = 6;
/// Bytes of the text behind the prefix that one question is about, and those of them that are given.
const FOLLOW_BYTES: usize = 480;
const FOLLOW_GIVEN: usize = 120;

/// End of the first `n` words of a text; none where it has fewer.
fn words_end(text: &str, n: usize) -> Option<usize> {
    let mut words = text.split_whitespace();
    let word = words.nth(n - 1)?;
    Some(word.as_ptr() as usize - text.as_ptr() as usize + word.len())
}

/// Sentences of the text that nothing is planted into, once each in it, at depths spread evenly.
///
/// # Errors
/// There are too few.
pub fn quote(garden: &mut Garden, base: &str, count: usize) -> Result<()> {
    // Nothing is planted elsewhere.
    let places = boundaries(base, garden.n_planted());
    let ends = places.iter().copied().skip(1).chain([base.len()]);
    let fits = |(start, end): (usize, usize)| {
        let part = &base[start..end];
        let given = words_end(part, GIVEN_WORDS)?;
        let asked = words_end(part, GIVEN_WORDS + ASKED_WORDS)?;
        let quote = &part[..asked];
        let usable = quote.is_ascii() && base.matches(quote).count() == 1;
        usable.then(|| (start, part[..given].to_string(), part[given..asked].to_string()))
    };
    let mut quotes: Vec<_> = places.iter().copied().zip(ends).filter_map(fits).collect();
    ensure!(
        quotes.len() >= count,
        "the text has {} sentences that can be quoted, {count} are wanted: lower --count, or leave out --tasks quote",
        quotes.len()
    );
    for i in 0..count {
        let wanted = (base.len() as f64 * (i as f64 + garden.random.share()) / count as f64) as usize;
        let nearest = (0..quotes.len()).min_by_key(|j| quotes[*j].0.abs_diff(wanted)).unwrap_or(0);
        let (start, given, answer) = quotes.remove(nearest);
        let want = Want::Parts(vec![Part { given: String::new(), answer }]);
        garden.ask(Task::Quote, format!("\n{given}"), want, None);
        garden.about(start as f64 / base.len() as f64);
    }
    Ok(())
}

/// Pieces of what follows the prefix in its text; fewer where it ends.
pub fn follow(garden: &mut Garden, rest: &str, count: usize) {
    let space = |at: usize| rest.as_bytes()[at..].iter().position(u8::is_ascii_whitespace).map(|n| at + n);
    let mut from = 0;
    for _ in 0..count {
        let (given, end) = (from + FOLLOW_GIVEN, from + FOLLOW_BYTES);
        if end >= rest.len() {
            return;
        }
        let (Some(given), Some(end)) = (space(given), space(end)) else { return };
        let want = Want::Text(rest[given..end].to_string());
        garden.ask(Task::Text, rest[from..given].to_string(), want, None);
        from = end;
    }
}
