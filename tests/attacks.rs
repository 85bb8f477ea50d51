//! docs/attacks.md: each row names a test that is there.

use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn each_row_has_a_test() {
    let page = fs::read_to_string(Path::new(ROOT).join("docs/attacks.md")).unwrap();
    let mut rows = 0;
    for row in page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| tried")) {
        let test = row.split(" | ").nth(1).and_then(|it| it.strip_prefix('`')?.strip_suffix('`'));
        let (file, name) =
            test.and_then(|it| it.split_once(": ")).unwrap_or_else(|| panic!("{row}"));
        let file = match file.strip_prefix("src/") {
            Some(_) => file.to_string(),
            None => format!("tests/{file}.rs"),
        };
        let text = fs::read_to_string(Path::new(ROOT).join(&file)).expect(&file);
        // A name that ends in a comma goes on with the combination.
        let forms = [format!("fn {name}()"), format!("\"{name}\""), format!("\"{name}, ")];
        let is_there = forms.iter().any(|form| text.contains(form));
        assert!(is_there, "{file} has no test {name:?}");
        rows += 1;
    }
    assert!(rows > 40, "{rows} rows");
}
