//! The messages of the program: their form and their words.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// Each file's code, without comments and unit tests.
fn code() -> impl Iterator<Item = (PathBuf, String)> {
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).into_iter().map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]");
        let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
        (path, lines.collect::<Vec<_>>().join("\n").replace("'\"'", "''"))
    })
}

/// The string literals of a piece of code, with lines that go on joined.
fn literals(code: &str) -> Vec<String> {
    let mut literals = Vec::new();
    let mut rest = code;
    while let Some((_, literal)) = rest.split_once('"') {
        let mut text = String::new();
        let mut chars = literal.char_indices();
        let end = loop {
            match chars.next() {
                Some((at, '"')) => break at,
                Some((_, '\\')) => match chars.next() {
                    Some((at, '\n')) => {
                        let next = literal[at..].trim_start();
                        chars = literal.char_indices();
                        chars.nth(literal[..literal.len() - next.len()].chars().count() - 1);
                    }
                    escaped => text.extend(escaped.map(|(_, c)| c)),
                },
                Some((_, c)) => text.push(c),
                None => return literals,
            }
        };
        literals.push(text);
        rest = &literal[end + 1..];
    }
    literals
}

/// The texts of the log messages from level info on.
fn logged() -> Vec<String> {
    let macros = ["tracing::error!(", "tracing::warn!(", "tracing::info!(", "rate_limited!("];
    let of = |code: &str| -> Vec<String> {
        let calls = macros.iter().flat_map(|call| code.split(call).skip(1));
        calls.map(|call| literals(call).swap_remove(0)).collect()
    };
    code().flat_map(|(_, code)| of(&code)).collect()
}

/// Log messages, and whatever else reads as a sentence: errors at the start.
fn sentences() -> Vec<String> {
    let is_sentence = |text: &str| {
        text.starts_with(|c: char| c.is_uppercase())
            && text.contains(' ')
            && text.ends_with(['.', ')'])
    };
    let all = code().flat_map(|(_, code)| literals(&code));
    all.filter(|text| is_sentence(text)).chain(logged()).collect()
}

#[test]
fn log_messages_are_sentences() {
    let messages = logged();
    assert!(messages.len() > 40, "{messages:#?}");
    for message in messages {
        let begins = message.starts_with(|c: char| c.is_uppercase() || c == '{');
        // A line that is an error already, or that ends with a hint.
        let ends = message.ends_with(['.', '}']) || message.ends_with(".)");
        assert!(begins && ends, "{message:?}");
    }
}

#[test]
fn messages_use_plain_words() {
    // tests/layout.rs looks for the others.
    const WORDS: [&str; 4] = ["can't", "don't", "has to", "have to"];
    let sentences = sentences();
    assert!(sentences.len() > 80, "{sentences:#?}");
    for text in sentences {
        let words = format!(" {} ", text.to_lowercase().replace(['.', ',', ';', ':'], " "));
        let found = WORDS.iter().find(|word| words.contains(&format!(" {word} ")));
        assert_eq!(found, None, "{text:?}");
        for sentence in text.split(". ") {
            let words = sentence.split_whitespace().count();
            assert!(words <= 30, "{words} words: {sentence:?}");
        }
    }
}
