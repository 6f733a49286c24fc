//! Variable tracking and common words, of the RULER families.

use super::garden::Garden;
use super::vocabulary::{GOODS, OWNERS, STARS};
use super::{Part, Task, Want};

/// Variables of a chain; the first one has a number.
const N_HOP: usize = 3;
/// Frequent words of a list and their number, and the words that are there once.
const N_FREQUENT: usize = 3;
const TIMES: usize = 6;
const N_RARE: usize = 12;
/// Words of the list that are given.
const N_GIVEN: usize = 4;
/// Tokens in which a model may name the frequent words.
const WORDS_TOKENS: usize = 24;

/// Chains `VAR a = 417`, `VAR b = a`, `VAR c = b` in the order of the text, followed from the end: each hop is given before
/// the next one is asked for.
pub fn variable(garden: &mut Garden, count: usize) {
    let mut stars = STARS;
    garden.random.shuffle(&mut stars);
    let mut numbers: Vec<usize> = (100..1000).collect();
    garden.random.shuffle(&mut numbers);
    for (chain, number) in stars.chunks_exact(N_HOP).zip(numbers).take(count) {
        let said = |i: usize| if i == 0 { number.to_string() } else { chain[i - 1].to_string() };
        let mut depths: Vec<f64> = (0..N_HOP).map(|i| (i as f64 + garden.random.share()) / N_HOP as f64).collect();
        depths.sort_by(f64::total_cmp);
        let lines = (0..N_HOP).map(|i| (format!("VAR {} = {}", chain[i], said(i)), depths[i])).collect();
        let planted = garden.plant_at(lines);
        let cue = |i: usize| format!("\nVAR {} =", chain[i]);
        let part = |i: usize| Part {
            given: if i + 1 == N_HOP { String::new() } else { cue(i) },
            answer: format!(" {}", said(i)),
        };
        let parts = (0..N_HOP).rev().map(part).collect();
        garden.ask(Task::Variable, cue(N_HOP - 1), Want::Parts(parts), planted.last().copied());
    }
}

/// Lists in which some words stand often; a list is asked to go on behind its first words.
pub fn words(garden: &mut Garden, count: usize) {
    let mut owners = OWNERS;
    garden.random.shuffle(&mut owners);
    let (mut lists, mut frequent, mut beginnings) = (Vec::new(), Vec::new(), Vec::new());
    for owner in &owners[..count] {
        let mut goods = GOODS;
        garden.random.shuffle(&mut goods);
        let (often, rest) = goods.split_at(N_FREQUENT);
        let mut list: Vec<&str> =
            often.iter().flat_map(|word| [*word; TIMES]).chain(rest[..N_RARE].iter().copied()).collect();
        garden.random.shuffle(&mut list);
        beginnings.push(list[..N_GIVEN].join(", "));
        lists.push(format!("Shopping list of {owner}: {}.", list.join(", ")));
        frequent.push(often.iter().map(|word| word.to_string()).collect::<Vec<_>>());
    }
    let planted = garden.plant(lists);
    for (((owner, words), at), given) in owners.iter().zip(frequent).zip(planted).zip(beginnings) {
        let prompt = format!("\nShopping list of {owner}: {given},");
        garden.ask_long(Task::Words, prompt, Want::Words(words), Some(at), WORDS_TOKENS);
    }
}
