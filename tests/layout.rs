//! The layout that src/lib.rs promises: imports go one way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const SRC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");

/// The top-level modules, in the order of lib.rs.
fn modules() -> Vec<String> {
    let lib = fs::read_to_string(format!("{SRC}/lib.rs")).unwrap();
    let names = lib.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    names.map(String::from).collect()
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// Each file's module path, `handover::journal`, with the module paths that the file names.
fn imports() -> Vec<(String, BTreeSet<String>)> {
    let files = files(Path::new(SRC));
    let module = |path: &Path| {
        let path = path.strip_prefix(SRC).unwrap().with_extension("");
        let names: Vec<_> = path.iter().map(|name| name.to_str().unwrap()).collect();
        names.join("::").trim_end_matches("::mod").to_string()
    };
    let known: BTreeSet<_> = files.iter().map(|path| module(path)).collect();
    let named = |text: &str| -> BTreeSet<String> {
        // Unit tests may look anywhere.
        let text = text.split("#[cfg(test)]").next().unwrap_or(text);
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = code.collect::<Vec<_>>().join("\n");
        let mut named = BTreeSet::new();
        for (at, _) in code.match_indices("crate::") {
            let path = &code[at + "crate::".len()..];
            let end = path.find(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
            let mut path = path[..end.unwrap_or(path.len())].trim_end_matches(':');
            // The longest part of the path that is a file; what follows is an item in it.
            while !known.contains(path) {
                path = path.rsplit_once("::").map_or("", |(parent, _)| parent);
                if path.is_empty() {
                    break;
                }
            }
            named.extend((!path.is_empty()).then(|| path.to_string()));
        }
        named
    };
    let lib = ["lib", "main", "bin::socket-proxyd-units"];
    let read = |path: &Path| (module(path), named(&fs::read_to_string(path).unwrap()));
    files.iter().map(|path| read(path)).filter(|(it, _)| !lib.contains(&&**it)).collect()
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap()
}

#[test]
fn top_level_modules_import_only_those_below() {
    let order = modules();
    // The fuzz targets, which no program contains, stand above the others.
    let (first, others) = order.split_first().unwrap();
    assert_eq!(first, "fuzz");
    assert!(others.len() <= 16, "{} top-level modules", others.len());
    let place = |module: &str| order.iter().position(|it| it == top(module)).unwrap();
    let mut upward = Vec::new();
    for (module, named) in imports() {
        for other in named.iter().filter(|other| place(other) < place(&module)) {
            upward.push(format!("{module} imports {other}"));
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn files_of_a_folder_import_without_a_circle() {
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (module, named) in imports() {
        let inside = named.into_iter().filter(|other| top(other) == top(&module));
        let inside = inside.filter(|other| *other != module).collect();
        graph.insert(module, inside);
    }
    // What imports nothing that is left goes, until nothing goes any more.
    loop {
        let left: BTreeSet<_> = graph.keys().cloned().collect();
        graph.retain(|_, named| named.iter().any(|other| left.contains(other)));
        if graph.len() == left.len() {
            break;
        }
    }
    assert!(graph.is_empty(), "{graph:#?}");
}

/// Words for which the man pages and the RFCs have a better one, and types by private metaphors.
#[test]
fn source_tests_and_manuals_use_the_words_of_the_field() {
    const WORDS: [&str; 33] = [
        "who",
        "whoever",
        "somebody",
        "nobody",
        "newcomer",
        "newcomers",
        "anew",
        "in vain",
        "can't be had",
        "is said",
        "has to go",
        "dial",
        "dials",
        "dialled",
        "dialling",
        "dialer",
        "quiet",
        "the cap",
        "told to leave",
        "parcel",
        "ledger",
        "book",
        "roster",
        "presence",
        "entrance",
        "arriving",
        "returning",
        "remains",
        "outcome_of",
        "keeper",
        "seats",
        "survival",
        "admission",
    ];
    let mut found = Vec::new();
    for folder in ["src", "tests", "benches", "completions", "man"] {
        for path in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)) {
            if path.ends_with("tests/layout.rs") || path.ends_with("tests/documents.rs") {
                continue;
            }
            for (number, line) in fs::read_to_string(&path).unwrap_or_default().lines().enumerate()
            {
                let line = line.to_lowercase();
                let is_apart = |at: usize, word: &str| {
                    let is_letter = |c: char| c.is_alphanumeric() || c == '_';
                    !line[..at].ends_with(is_letter)
                        && !line[at + word.len()..].starts_with(is_letter)
                };
                // --kill-who= and --quiet are options of others, and nobody is an account.
                let line = line.replace("--kill-who", "").replace("--quiet", "");
                let is_account = |word: &str| word == "nobody" && folder != "src";
                for word in WORDS.iter().filter(|word| !is_account(word)) {
                    if line.match_indices(word).any(|(at, _)| is_apart(at, word)) {
                        found.push(format!("{}:{}: {word}", path.display(), number + 1));
                    }
                }
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn each_type_has_a_name_of_its_own() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files(Path::new(SRC)) {
        for line in fs::read_to_string(&path).unwrap().lines() {
            let words: Vec<_> =
                line.split_whitespace().filter(|word| !word.starts_with("pub")).collect();
            if let ["struct" | "enum" | "trait" | "type", name, ..] = words[..] {
                let name = name.split(|c: char| !c.is_alphanumeric()).next().unwrap();
                // Traits of std have these as associated types.
                if !["Err", "Error", "Target"].contains(&name) || !words.contains(&"=") {
                    places.entry(name.into()).or_default().push(path.display().to_string());
                }
            }
        }
    }
    places.retain(|_, places| places.len() > 1);
    assert!(places.is_empty(), "{places:#?}");
}

#[test]
fn comments_are_at_most_100_columns_wide() {
    let mut wide = Vec::new();
    for path in files(Path::new(SRC)) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().enumerate();
        let lines = lines.filter(|(_, line)| line.trim_start().starts_with("//"));
        for (number, _) in lines.filter(|(_, line)| line.chars().count() > 100) {
            wide.push(format!("{}:{}", path.display(), number + 1));
        }
    }
    assert!(wide.is_empty(), "{wide:#?}");
}
