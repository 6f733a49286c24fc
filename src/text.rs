//! Text that comes from files, made fit for a terminal, a log or an error.

#![forbid(unsafe_code)]

/// Characters that are kept.
const MOST: usize = 2000;

/// One line of bounded length: control characters, which could forge lines or drive a terminal, become `?`.
pub fn one_line(text: &str) -> String {
    let mut line: String = text.chars().take(MOST).map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_cannot_be_forged_and_end() {
        assert_eq!(one_line("a model"), "a model");
        assert_eq!(one_line("x\nsqueeze: fine\u{1b}[2J\u{7f}\u{9b}"), "x?squeeze: fine?[2J??");
        let long = one_line(&"\u{e9}".repeat(5000));
        assert_eq!(long.chars().count(), MOST + 3);
    }
}
