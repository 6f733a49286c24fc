//! Needles of the RULER families: sentences that stand somewhere in the text, and beginnings of them as questions.

use anyhow::{ensure, Result};

use super::garden::{Garden, Planted};
use super::vocabulary::{ANIMALS, CITIES, PASSWORDS, PLANTS};
use super::{Part, Task, Want};
use crate::facts::{CUES, NAMES};

/// Values of a key with several.
const N_VALUE: usize = 3;
/// Keys asked for in a row.
const N_QUERY: usize = 3;

/// Key, value and place.
pub type Key = (String, &'static str, Planted);

/// One answer behind the prompt.
fn answer(text: &str) -> Want {
    Want::Parts(vec![Part { given: String::new(), answer: format!(" {text}") }])
}

/// Sentences that have nothing in common. There are no more of them than cues.
///
/// # Errors
/// The text has too many of the names.
pub fn single(garden: &mut Garden, count: usize) -> Result<()> {
    let mut names: Vec<&str> = NAMES.into_iter().filter(|name| garden.is_new(name)).collect();
    let mut cues = CUES;
    ensure!(
        names.len() >= cues.len(),
        "the text has too many of the names that needles are made of: give another text, or leave out --tasks single"
    );
    garden.random.shuffle(&mut names);
    garden.random.shuffle(&mut cues);
    let n = count.min(cues.len());
    let planted = garden.plant((0..n).map(|i| format!("{} {}.", cues[i], names[i])).collect());
    // Where more are wanted the first ones are asked for again, behind other words.
    for i in 0..count {
        let again = if i < n { "" } else { "\nAs was said before:" };
        garden.ask(Task::Single, format!("{again}\n{}", cues[i % n]), answer(names[i % n]), Some(planted[i % n]));
    }
    Ok(())
}

/// What is behind a key is found by the words in front of it, so what tells keys apart stands last.
fn cue(key: &str) -> String {
    format!("Password for {key}:")
}

/// Keys with their values and places. They are planted once, for both tasks that ask for them.
fn keys(garden: &mut Garden) -> Vec<Key> {
    if let Some(known) = &garden.keys {
        return known.clone();
    }
    let (mut cities, mut animals, mut passwords) = (CITIES, ANIMALS, PASSWORDS);
    garden.random.shuffle(&mut cities);
    garden.random.shuffle(&mut animals);
    garden.random.shuffle(&mut passwords);
    let names: Vec<String> = cities.iter().zip(animals).map(|(city, animal)| format!("{city} {animal}")).collect();
    let texts = names.iter().zip(passwords).map(|(name, p)| format!("{} {p}.", cue(name))).collect();
    let planted = garden.plant(texts);
    let keys: Vec<Key> = names.into_iter().zip(passwords).zip(planted).map(|((name, p), at)| (name, p, at)).collect();
    garden.keys = Some(keys.clone());
    keys
}

pub fn key(garden: &mut Garden, count: usize) {
    for (name, password, at) in keys(garden).into_iter().take(count) {
        garden.ask(Task::Key, format!("\n{}", cue(&name)), answer(password), Some(at));
    }
}

pub fn query(garden: &mut Garden, count: usize) {
    let keys = keys(garden);
    for _ in 0..count {
        let mut order: Vec<usize> = (0..keys.len()).collect();
        garden.random.shuffle(&mut order);
        let three: Vec<_> = order.iter().take(N_QUERY).map(|i| keys[*i].clone()).collect();
        let part = |(i, (name, password, _)): (usize, &Key)| Part {
            given: if i == 0 { String::new() } else { format!(".\n{}", cue(name)) },
            answer: format!(" {password}"),
        };
        let parts = three.iter().enumerate().map(part).collect();
        garden.ask(Task::Query, format!("\n{}", cue(&three[0].0)), Want::Parts(parts), Some(three[0].2));
    }
}

/// Each key is asked for with none, one and two of its values given.
pub fn value(garden: &mut Garden, count: usize) {
    let (mut cities, mut plants) = (CITIES, PLANTS);
    garden.random.shuffle(&mut cities);
    garden.random.shuffle(&mut plants);
    let n_key = count.div_ceil(N_VALUE);
    let values = |key: usize| &plants[key * N_VALUE..(key + 1) * N_VALUE];
    let cue = |key: usize| format!("{} exports", cities[key]);
    let sentence = |key: usize, value: &str| format!("{} {value}.", cue(key));
    let texts = (0..n_key).flat_map(|key| values(key).iter().map(move |v| (key, *v)));
    let planted = garden.plant(texts.map(|(key, v)| sentence(key, v)).collect());
    for i in 0..count {
        let (key, n_given) = (i / N_VALUE, i % N_VALUE);
        let (given, left) = values(key).split_at(n_given);
        let given: String = given.iter().map(|v| format!("\n{}", sentence(key, v))).collect();
        let left = left.iter().map(|v| format!(" {v}")).collect();
        garden.ask(
            Task::Value,
            format!("{given}\n{}", cue(key)),
            Want::OneOf(left),
            Some(planted[key * N_VALUE + n_given]),
        );
    }
}
