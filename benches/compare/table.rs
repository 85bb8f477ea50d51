//! Tables, as text, Markdown and HTML.

/// A table whose columns appear as cells for them are added.
pub(crate) struct Table {
    title: String,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), columns: Vec::new(), rows: Vec::new() }
    }

    /// Adds a row of cells, each with the name of its column; a row without cells is left out.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        cells: impl IntoIterator<Item = (String, String)>,
    ) {
        let mut row = vec![name.into()];
        for (column, cell) in cells {
            let at = self.columns.iter().position(|it| *it == column).unwrap_or_else(|| {
                self.columns.push(column);
                self.columns.len() - 1
            });
            row.resize(row.len().max(at + 2), MISSING.into());
            row[at + 1] = cell;
        }
        if row.len() > 1 {
            self.rows.push(row);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn text(&self) -> String {
        let lines: Vec<_> = self.lines().collect();
        let width = |column: usize| {
            let widths = lines.iter().map(|line| line[column].chars().count());
            widths.max().unwrap_or(0).max(if column == 0 { 26 } else { 9 })
        };
        let mut text = String::new();
        for line in &lines {
            text.push_str(&format!("  {:1$}", line[0], width(0)));
            for (column, cell) in line.iter().enumerate().skip(1) {
                text.push_str(&format!("  {cell:>0$}", width(column)));
            }
            text.push('\n');
        }
        text
    }

    pub(crate) fn html(&self) -> String {
        let mut html = String::from("<table>");
        for line in self.lines() {
            html.push_str(&format!("<tr><td>{}</td></tr>\n", line.join("</td><td>")));
        }
        html.push_str("</table>\n");
        html
    }

    fn markdown(&self) -> String {
        let mut lines: Vec<_> =
            self.lines().map(|line| format!("| {} |\n", line.join(" | "))).collect();
        lines.insert(1, format!("|{}\n", "---|".repeat(self.columns.len() + 1)));
        lines.concat()
    }

    /// The head and the rows, all of one length.
    fn lines(&self) -> impl Iterator<Item = Vec<String>> {
        let head = [self.title.clone()].into_iter().chain(self.columns.iter().cloned()).collect();
        let all = [head].into_iter().chain(self.rows.iter().cloned());
        all.map(|mut line: Vec<String>| {
            line.resize(self.columns.len() + 1, MISSING.into());
            line
        })
    }
}

const MISSING: &str = "-";

/// Replaces the tables of a Markdown page that have the titles of these, and adds the others at its end.
pub(crate) fn refill(page: &str, tables: &[Table]) -> String {
    let mut page = page.to_string();
    for table in tables {
        let head = format!("| {} |", table.title);
        let mut found = page.match_indices(&head).map(|(at, _)| at);
        let start = found.find(|at| *at == 0 || page[..*at].ends_with('\n'));
        match start {
            Some(start) => {
                let end = page[start..].find("\n\n").map_or(page.len(), |at| start + at + 1);
                page.replace_range(start..end, &table.markdown());
            }
            None if page.is_empty() => page = table.markdown(),
            None => page.push_str(&format!("\n{}", table.markdown())),
        }
    }
    page
}

/// Writes a whole number with its thousands apart.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let first = digits.len() % 3;
    let mut text = digits[..first].to_string();
    for (at, digit) in digits[first..].chars().enumerate() {
        if at % 3 == 0 && !text.is_empty() {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
