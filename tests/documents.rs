//! The documents, the manuals and `--help`: short sentences, the words of the field, and links that
//! lead somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "BENCHMARKS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/evidence.md",
    "docs/recipes.md",
];

const MANUALS: [&str; 2] = ["man/socket-proxyd.8", "man/socket-proxyd-units.8"];

const PROGRAMS: [&str; 2] =
    [env!("CARGO_BIN_EXE_socket-proxyd"), env!("CARGO_BIN_EXE_socket-proxyd-units")];

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The paragraphs and list items, each as one line, without code, tables, headings and HTML.
fn paragraphs(document: &str) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    for (number, part) in document.split("\n```").enumerate() {
        paragraphs.push(String::new());
        // Each second part is code.
        for line in part.lines().filter(|_| number % 2 == 0) {
            let is_text =
                !line.is_empty() && !line.starts_with(['|', '#', '<']) && !line.starts_with("    ");
            if !is_text || line.starts_with("- ") {
                paragraphs.push(String::new());
            }
            if is_text {
                let paragraph = paragraphs.last_mut().unwrap();
                paragraph.push_str(line);
                paragraph.push(' ');
            }
        }
    }
    paragraphs
}

/// The paragraphs of a manual, without examples and the tags of lists.
fn manual_paragraphs(manual: &str) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    let (mut is_example, mut is_tag) = (false, false);
    for line in manual.lines() {
        let (mut macro_name, mut words) = ("", line);
        if let Some(rest) = line.strip_prefix('.') {
            (macro_name, words) = rest.split_once(' ').unwrap_or((rest, ""));
        }
        is_example = macro_name == "nf" || is_example && macro_name != "fi";
        let breaks = ["PP", "TP", "IP", "SH", "SS", "RS", "RE", "TH", "br"].contains(&macro_name);
        if breaks || is_tag {
            paragraphs.push(String::new());
        }
        let is_text = !is_example && !breaks && !is_tag && macro_name != "fi";
        is_tag = macro_name == "TP";
        if is_text {
            // Macros of two letters join their words.
            let joined = if macro_name.len() == 2 { words.replace(' ', "") } else { words.into() };
            let paragraph = paragraphs.last_mut().unwrap();
            paragraph.push_str(&joined.replace('"', "").replace("\\", ""));
            paragraph.push(' ');
        }
    }
    paragraphs
}

/// The lines of a program's `--help`.
fn help_lines(program: &str) -> Vec<String> {
    let output = Command::new(program).arg("--help").output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect()
}

/// The paragraphs of all documents, manuals and help texts, each with its document.
fn all_paragraphs() -> impl Iterator<Item = (&'static str, String)> {
    let documents = DOCUMENTS.map(|path| (path, paragraphs(&read(path))));
    let manuals = MANUALS.map(|path| (path, manual_paragraphs(&read(path))));
    let help = PROGRAMS.map(|program| (program, help_lines(program)));
    let all = documents.into_iter().chain(manuals).chain(help);
    all.flat_map(|(path, all)| all.into_iter().map(move |paragraph| (path, paragraph)))
}

/// A paragraph's sentences. Code and the target of a link are no words of theirs.
fn sentences(paragraph: &str) -> Vec<String> {
    let mut plain = String::new();
    for (number, part) in paragraph.split('`').enumerate() {
        plain.push_str(if number % 2 == 0 { part } else { "CODE" });
    }
    while let Some((before, rest)) = plain.split_once("](") {
        plain = format!("{before}]{}", rest.split_once(')').map_or("", |(_, after)| after));
    }
    plain.split_inclusive(' ').fold(vec![String::new()], |mut sentences, word| {
        let ends = word.trim_end().ends_with(['.', '?', '!']);
        sentences.last_mut().unwrap().push_str(word);
        if ends {
            sentences.push(String::new());
        }
        sentences
    })
}

#[test]
fn sentences_are_short() {
    let words = |path| {
        let all = all_paragraphs().filter(|(it, _)| *it == path);
        all.map(|(_, it)| it.split_whitespace().count()).sum::<usize>()
    };
    assert!(words(MANUALS[0]) > 3000 && words(MANUALS[1]) > 500, "the manuals are read");
    assert!(PROGRAMS.into_iter().all(|program| words(program) > 100), "the help texts are read");
    let mut long = Vec::new();
    for (path, paragraph) in all_paragraphs() {
        let sentences = sentences(&paragraph).into_iter();
        let sentences = sentences.filter(|it| it.split_whitespace().count() > 30);
        long.extend(sentences.map(|it| format!("{path}: {it}")));
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn words_are_plain() {
    const WORDS: [&str; 11] = [
        "who",
        "whoever",
        "somebody",
        "nobody",
        "anybody",
        "newcomer",
        "anew",
        "in vain",
        "is said",
        "let alone",
        "has to go",
    ];
    for (path, paragraph) in all_paragraphs() {
        let text = sentences(&paragraph).concat().to_lowercase();
        let text = text.replace(|c: char| !c.is_alphanumeric() && c != '.', " ");
        let text = format!(" {} ", text.split_whitespace().collect::<Vec<_>>().join(" "));
        let found: Vec<_> = WORDS.iter().filter(|it| text.contains(&format!(" {it} "))).collect();
        assert!(found.is_empty(), "{path}: {found:?}");
    }
}

#[test]
fn readme_fits_on_a_page() {
    let readme = read("README.md");
    assert!(readme.lines().count() <= 160, "{} lines", readme.lines().count());
    let long: Vec<_> = readme.lines().filter(|line| line.chars().count() > 100).collect();
    assert!(long.is_empty(), "{long:#?}");
}

/// The anchors of a document, as GitHub makes them of headings.
fn anchors(path: &str) -> BTreeSet<String> {
    let text = read(path);
    let headings = text.lines().filter(|line| line.starts_with("##"));
    let anchor = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        words.chars().filter(|c| c.is_alphanumeric() || *c == '-').collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn links_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut dead = Vec::new();
    for document in DOCUMENTS {
        let text = read(document);
        // Pictures are looked at.
        let is_picture =
            |before: &str| before.rsplit('[').nth(1).is_some_and(|it| it.ends_with('!'));
        let links = text.match_indices("](").filter(|(at, _)| !is_picture(&text[..*at]));
        let links = links.map(|(at, _)| text[at + 2..].split(')').next().unwrap());
        for link in links.filter(|link| !link.starts_with("https://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => document.into(),
                path => Path::new(document).with_file_name(path).display().to_string(),
            };
            let is_dead = !root.join(&target).exists();
            if is_dead || !anchor.is_empty() && !anchors(&target).contains(anchor) {
                dead.push(format!("{document}: {link}"));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}
