//! The stamp at the head of each generated file. It later tells whether the file was generated, and
//! whether it has been edited since.

use std::hash::Hasher;

use fnv::FnvHasher;

/// Puts the stamp in front of a file's text: the command that asked for the file, and where
/// settings of the administrator's own belong; `unit` is the unit that they are for.
pub fn stamp(unit: &str, command_line: &str, text: &str) -> String {
    let head = format!(
        "{MARK}, with this command:\n\
         #   {command_line}\n\
         # Put your own settings into a drop-in (systemctl edit {unit}): once this file is edited,\n\
         # socket-proxyd-units no longer updates it.\n"
    );
    let checksum = checksum_line(&[&*head, text].concat());
    [&*head, &*checksum, text].concat()
}

/// Where a file comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Written by this program, and unchanged since.
    Generated,
    /// Written by this program, and edited since.
    Modified,
    /// Not written by this program.
    Foreign,
}

impl Origin {
    pub fn of(text: &str) -> Self {
        let lines = text.split_inclusive('\n');
        let (checksum, rest): (Vec<_>, Vec<_>) = lines.partition(|it| it.starts_with(CHECKSUM));
        match text.starts_with(MARK) {
            true if checksum.concat() == checksum_line(&rest.concat()) => Self::Generated,
            true => Self::Modified,
            false => Self::Foreign,
        }
    }
}

fn checksum_line(text: &str) -> String {
    // FNV-1a detects accidental changes, which is all that a stamp is for.
    let mut hasher = FnvHasher::default();
    hasher.write(text.as_bytes());
    format!("{CHECKSUM}{:016x}\n", hasher.finish())
}

/// What every generated file begins with.
const MARK: &str = "# Written by socket-proxyd-units";

const CHECKSUM: &str = "# Checksum: ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_detected() {
        let text = stamp("a.socket", "socket-proxyd-units a", "[Socket]\nListenStream=1\n");
        assert_eq!(Origin::of(&text), Origin::Generated);
        assert_eq!(Origin::of(&text.replace("=1", "=2")), Origin::Modified);
        assert_eq!(Origin::of(&format!("{text}#\n")), Origin::Modified);
        assert_eq!(Origin::of("[Socket]\n"), Origin::Foreign);
        // FNV-1a's published values: a stamp stays valid in later versions.
        assert_eq!(checksum_line(""), "# Checksum: cbf29ce484222325\n");
        assert_eq!(checksum_line("a"), "# Checksum: af63dc4c8601ec8c\n");
    }
}
