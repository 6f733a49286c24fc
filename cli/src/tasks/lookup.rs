//! Look-ups by name: functions of a program, and pairs in JSON.

use super::garden::Garden;
use super::vocabulary::{KEYS, NOUNS, PARAMETERS, VALUES, VERBS};
use super::{Part, Task, Want};

/// Pairs of a block.
const BLOCK: usize = 6;

/// Functions of two parameters; parameters and body are asked for by name.
pub fn code(garden: &mut Garden, count: usize) {
    let (mut verbs, mut nouns) = (VERBS, NOUNS);
    garden.random.shuffle(&mut verbs);
    garden.random.shuffle(&mut nouns);
    let mut functions = Vec::new();
    for (verb, noun) in verbs.into_iter().zip(nouns).take(count) {
        let mut parameters = PARAMETERS;
        garden.random.shuffle(&mut parameters);
        let (a, b, n) = (parameters[0], parameters[1], 11 + garden.random.below(88));
        functions.push((format!("def {verb}_{noun}("), format!("{a}, {b})"), format!(" {a} * {n} + {b}")));
    }
    const BETWEEN: &str = ":\n    return";
    let texts = functions.iter().map(|(name, parameters, body)| format!("{name}{parameters}{BETWEEN}{body}")).collect();
    let planted = garden.plant(texts);
    for ((name, parameters, body), at) in functions.into_iter().zip(planted) {
        let first = Part { given: String::new(), answer: parameters };
        let second = Part { given: BETWEEN.to_string(), answer: body };
        garden.ask(Task::Code, format!("\n{name}"), Want::Parts(vec![first, second]), Some(at));
    }
}

/// Blocks of pairs. All keys are there, whatever the number of questions.
pub fn pairs(garden: &mut Garden, count: usize) {
    let (mut keys, mut values) = (KEYS, VALUES);
    garden.random.shuffle(&mut keys);
    garden.random.shuffle(&mut values);
    let line = |i: usize| format!("\"{}\": \"{}\"", keys[i], values[i]);
    let blocks = (0..keys.len()).step_by(BLOCK).map(|first| {
        let lines: Vec<String> = (first..(first + BLOCK).min(keys.len())).map(|i| format!("  {}", line(i))).collect();
        format!("{{\n{}\n}}", lines.join(",\n"))
    });
    let planted = garden.plant(blocks.collect());
    for i in 0..count {
        // Without the quotation mark behind it, which is one token with what follows.
        let want = Want::Parts(vec![Part { given: String::new(), answer: format!(" \"{}", values[i]) }]);
        garden.ask(Task::Pairs, format!("\n  \"{}\":", keys[i]), want, Some(planted[i / BLOCK]));
    }
}
