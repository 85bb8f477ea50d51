//! docs/attacks.md and docs/promises.md: each row names a test that is there.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect(path)
}

/// The cells of each row of a page's tables, without the headings.
fn rows(page: &str) -> Vec<Vec<String>> {
    let text = read(page);
    let lines = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let rows = lines.map(|line| line.split(" | ").map(String::from).collect::<Vec<_>>());
    rows.filter(|row| !row.contains(&"test".to_string())).collect()
}

/// Checks that a cell names a test: a file below tests/, or of src/, and a name in it.
fn assert_is_test(cell: &str) {
    let test = cell.strip_prefix('`').and_then(|it| it.strip_suffix('`')?.split_once(": "));
    let (file, name) = test.unwrap_or_else(|| panic!("{cell:?} is not a test"));
    let text = match file.starts_with("src/") {
        true => read(file),
        false => read(&format!("tests/{file}.rs")),
    };
    // A name that ends in a comma goes on with the combination.
    let forms = [format!("fn {name}()"), format!("\"{name}\""), format!("\"{name}, ")];
    let is_there = forms.iter().any(|form| text.contains(form));
    assert!(is_there, "{file} has no test {name:?}");
}

#[test]
fn each_attack_has_a_test() {
    let rows = rows("docs/attacks.md");
    assert!(rows.len() > 40, "{} rows", rows.len());
    for row in rows {
        assert_is_test(&row[1]);
    }
}

#[test]
fn each_promise_of_the_manuals_has_a_test() {
    let rows = rows("docs/promises.md");
    assert!(rows.len() > 200, "{} rows", rows.len());
    let manuals = ["man/socket-proxyd.8", "man/socket-proxyd-units.8"].map(read).concat();
    let manuals = manuals.replace("\\-", "-");
    for row in rows {
        let [promise, place, test] = &row[..] else { panic!("{row:?}") };
        assert!(manuals.contains(place.as_str()), "{promise}: no {place:?} in the manuals");
        assert_is_test(test);
    }
}
