//! How a file that was written here is known again, and whether somebody has changed it since.

use std::hash::Hasher;

use fnv::FnvHasher;

/// What every file begins with that was written here.
const MARK: &str = "# Written by socket-proxyd-units";

const CHECKSUM: &str = "# Checksum: ";

/// Puts the mark in front of a unit: by what it was asked for, and where own settings belong.
pub fn mark(unit: &str, command_line: &str, text: &str) -> String {
    let rest = format!(
        "#   {command_line}\n\
         # Put your own settings into a drop-in (systemctl edit {unit}): once this file is edited,\n\
         # socket-proxyd-units no longer updates it.\n\
         {text}"
    );
    let first = format!("{MARK}, with this command:\n");
    let checksum = checksum(&format!("{first}{rest}"));
    format!("{first}{CHECKSUM}{checksum:016x}\n{rest}")
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was written here, and is as it was.
    Generated,
    /// It was written here, and somebody has changed it.
    Modified,
    /// Somebody else's.
    Foreign,
}

impl Origin {
    /// Looks at a file's text.
    pub fn of(text: &str) -> Self {
        if !text.starts_with(MARK) {
            return Self::Foreign;
        }
        let is_checksum = |line: &&str| line.starts_with(CHECKSUM);
        let found = text.lines().find(is_checksum).and_then(|line| line.strip_prefix(CHECKSUM));
        let rest: String = text.split_inclusive('\n').filter(|line| !is_checksum(line)).collect();
        match found.and_then(|found| u64::from_str_radix(found, 16).ok()) {
            Some(found) if found == checksum(&rest) => Self::Generated,
            _ => Self::Modified,
        }
    }
}

/// FNV-1a detects accidental changes, which is all that a stamp is for.
fn checksum(text: &str) -> u64 {
    let mut hasher = FnvHasher::default();
    hasher.write(text.as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_noticed() {
        let text = mark("a.socket", "socket-proxyd-units a", "[Socket]\nListenStream=1\n");
        assert_eq!(Origin::of(&text), Origin::Generated);
        assert_eq!(Origin::of(&text.replace("=1", "=2")), Origin::Modified);
        assert_eq!(Origin::of(&format!("{text}#\n")), Origin::Modified);
        assert_eq!(Origin::of("[Socket]\n"), Origin::Foreign);
        assert_eq!(checksum(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(checksum("a"), 0xaf63_dc4c_8601_ec8c, "as its authors have it");
    }
}
