//! The blocks of README.md and docs/recipes.md, as they are printed.

use std::fs;
use std::path::Path;

use crate::container::Container;
use crate::support::*;

/// A section of a document, or all of it.
pub(crate) struct Section {
    text: String,
}

impl Section {
    /// Reads a document of the checkout.
    pub(crate) fn document(path: &str) -> Self {
        Self { text: fs::read_to_string(Path::new(ROOT).join(path)).unwrap() }
    }

    /// Returns the part below a heading, `## Title` or `### Title`, up to the next heading.
    pub(crate) fn below(&self, heading: &str) -> Self {
        let start = format!("\n{heading}\n");
        let (_, text) = self.text.split_once(&start).unwrap_or_else(|| panic!("no {heading}"));
        let text = text.split("\n## ").next().unwrap();
        Self { text: text.split("\n### ").next().unwrap().into() }
    }

    /// Returns the section with other words.
    pub(crate) fn replacing(&self, from: &str, to: &str) -> Self {
        Self { text: self.text.replace(from, to) }
    }

    /// Returns the headings below the title.
    pub(crate) fn headings(&self) -> Vec<String> {
        let lines = self.text.lines();
        lines
            .filter(|line| line.starts_with("## ") || line.starts_with("### "))
            .map(String::from)
            .collect()
    }

    /// Returns the lines that say how a recipe is tested.
    pub(crate) fn marks(&self) -> Vec<String> {
        let is_mark = |line: &&str| {
            ["Run by the tests: ", "Not run here: "].iter().any(|it| line.starts_with(it))
        };
        self.text.lines().filter(is_mark).map(String::from).collect()
    }

    /// Returns the fenced blocks in this language.
    pub(crate) fn blocks(&self, language: &str) -> Vec<String> {
        let start = format!("```{language}\n");
        let blocks = self.text.split(&start).skip(1);
        blocks.map(|block| block.split_once("```").unwrap().0.into()).collect()
    }

    /// Returns the `code` in the text that begins with `start`.
    pub(crate) fn inline(&self, start: &str) -> String {
        let (_, code) = self.text.split_once(&format!("`{start}")).expect(start);
        format!("{start}{}", code.split('`').next().unwrap())
    }

    /// Returns the files of the blocks: each begins with a comment that is its path.
    pub(crate) fn files(&self) -> Vec<(String, String)> {
        let mut files: Vec<(String, String)> = Vec::new();
        for block in self.text.split("\n```").skip(1).step_by(2) {
            let mut is_file = false;
            for line in block.lines().skip(1) {
                let path = line.strip_prefix("# ").filter(|path| path.starts_with(['/', '~']));
                if let Some(path) = path {
                    is_file = true;
                    files.push((path.into(), String::new()));
                } else if is_file {
                    let text = &mut files.last_mut().unwrap().1;
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        files
    }

    /// Returns the files of the blocks that have this suffix.
    pub(crate) fn names(&self, suffix: &str) -> Vec<String> {
        let files = self.files().into_iter().filter(|(path, _)| path.ends_with(suffix));
        files.map(|(path, _)| path.rsplit_once('/').unwrap().1.into()).collect()
    }

    /// Writes the files and reloads systemd. Only idle times differ from what is printed: all are 2 seconds.
    pub(crate) fn write(&self, container: &Container) {
        for (path, text) in self.files() {
            let text = text.replace("idle-time=10min", "idle-time=2s");
            let text = text.replace("idle-time=1min", "idle-time=1s");
            container.write(&path, &text.replace("idle-time=30min", "idle-time=2s"));
        }
        container.reload();
    }

    /// Runs the commands of the sh blocks.
    pub(crate) fn run(&self, container: &Container) {
        for block in self.blocks("sh") {
            let _reloading = container.not_reloading();
            container.run(&["sh", "-exc", &block]);
        }
    }
}
