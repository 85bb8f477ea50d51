//! Escaping for `ExecStart=`, for other settings, for the name of a unit and for a shell.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Escapes a command line whose first word is the path of the program.
pub fn exec_line(words: &[impl AsRef<OsStr>]) -> String {
    let (program, arguments) = words.split_first().expect("a command line has a program");
    let mut line = vec![exec_program(program)];
    line.extend(exec_words(arguments));
    line.join(" ")
}

/// Escapes the first word of `ExecStart=`. systemd looks for specifiers in the path of a program,
/// and for no variable. (It replaces one in `argv[0]`, which no program here reads.)
pub fn exec_program(path: impl AsRef<OsStr>) -> String {
    quoted(path.as_ref(), &['%'])
}

pub fn exec_words(words: &[impl AsRef<OsStr>]) -> Vec<String> {
    words.iter().map(exec_word).collect()
}

/// Escapes a later word of `ExecStart=`: systemd.service(5) finds no quote, variable, specifier or
/// separator in it.
pub fn exec_word(word: impl AsRef<OsStr>) -> String {
    quoted(word.as_ref(), &['%', '$'])
}

/// Quotes a word where it needs that. A character in `doubled` stands for itself when it is
/// written twice.
fn quoted(word: &OsStr, doubled: &[char]) -> String {
    const PLAIN: &[u8] = b"-_./:=@,+[]%$~^!?&|<>(){}*";
    let word = word.as_bytes();
    let mut text = String::new();
    for chunk in word.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                _ if doubled.contains(&c) => text.extend([c, c]),
                '\\' | '"' => text.extend(['\\', c]),
                _ if c.is_ascii_control() || is_noncharacter(c) => {
                    text.extend(c.encode_utf8(&mut [0; 4]).bytes().map(hex));
                }
                _ => text.push(c),
            }
        }
        text.extend(chunk.invalid().iter().map(|byte| hex(*byte)));
    }
    let is_plain = word.iter().all(|byte| byte.is_ascii_alphanumeric() || PLAIN.contains(byte));
    if is_plain && !word.is_empty() { text } else { format!("\"{text}\"") }
}

/// Whether systemd refuses a unit with this character outside of comments: it takes U+FFFE, U+FFFF,
/// their like on the other planes, and U+FDD0 to U+FDEF for invalid UTF-8.
pub fn is_noncharacter(c: char) -> bool {
    matches!(u32::from(c), 0xfdd0..=0xfdef) || u32::from(c) & 0xfffe == 0xfffe
}

/// Escapes the value of a setting that knows no quotes: nothing in it is a specifier.
pub fn value(text: &str) -> String {
    text.replace('%', "%%")
}

/// Escapes the name of a unit without its suffix as systemctl(1) does: `/` becomes `-`, and what a
/// name cannot contain `\xNN`. An `@`, which would make the unit a template, is escaped as well.
///
/// (systemd-escape(1), which crates imitate, escapes `-` too.)
pub fn unit_name(name: &str) -> String {
    let escape = |(index, byte): (usize, u8)| match byte {
        b'/' => "-".into(),
        b'.' if index == 0 => hex(byte),
        _ if byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte) => char::from(byte).into(),
        _ => hex(byte),
    };
    name.bytes().enumerate().map(escape).collect()
}

/// Quotes the words of a command for a shell, on one line.
pub fn shell_words(words: impl IntoIterator<Item: AsRef<OsStr>>) -> String {
    words.into_iter().map(shell_word).collect::<Vec<_>>().join(" ")
}

/// Quotes a word for a shell, on one line.
pub fn shell_word(word: impl AsRef<OsStr>) -> String {
    const PLAIN: &[u8] = b"-_./:=@,+%";
    let word = word.as_ref().as_bytes();
    let is_plain = word.iter().all(|byte| byte.is_ascii_alphanumeric() || PLAIN.contains(byte));
    match std::str::from_utf8(word) {
        Ok(text) if is_plain && !text.is_empty() => text.into(),
        Ok(text) if !text.chars().any(char::is_control) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => format!("$'{}'", word.escape_ascii()),
    }
}

fn hex(byte: u8) -> String {
    format!("\\x{byte:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_exec_start() {
        for (word, written) in [
            ("plain-word_1.2/3:4=5", "plain-word_1.2/3:4=5"),
            ("", r#""""#),
            ("#no comment", r##""#no comment""##),
            ("two words", r#""two words""#),
            ("100%", "100%%"),
            ("$HOME", "$$HOME"),
            ("say \"it\"", r#""say \"it\"""#),
            ("it's", r#""it's""#),
            ("back\\slash", r#""back\\slash""#),
            (";", r#"";""#),
            ("a\nb\tc", r#""a\x0ab\x09c""#),
            ("\u{e4}", "\"\u{e4}\""),
            ("\u{fdcf}\u{fdd0}", "\"\u{fdcf}\\xef\\xb7\\x90\""),
            ("\u{fffff}", r#""\xf3\xbf\xbf\xbf""#),
        ] {
            assert_eq!(exec_word(word), written, "{word:?}");
        }
        assert_eq!(exec_word(OsStr::from_bytes(b"\xff")), r#""\xff""#);
        assert_eq!(exec_line(&["/opt/100%/$a b", "$HOME"]), "\"/opt/100%%/$a b\" $$HOME");
    }

    #[test]
    fn values_have_no_specifiers() {
        assert_eq!(value("/run/100%"), "/run/100%%");
    }

    #[test]
    fn names_of_units() {
        for (name, escaped) in [
            ("app", "app"),
            ("my-app_1.2", "my-app_1.2"),
            ("a b", "a\\x20b"),
            ("a/b", "a-b"),
            (".hidden", "\\x2ehidden"),
            ("app@1", "app\\x401"),
            ("100%", "100\\x25"),
            ("\u{e4}", "\\xc3\\xa4"),
        ] {
            assert_eq!(unit_name(name), escaped);
        }
    }

    #[test]
    fn words_of_a_shell() {
        for (word, written) in [
            (&b"--listen=[::1]:80"[..], "'--listen=[::1]:80'"),
            (b"plain", "plain"),
            (b"", "''"),
            (b"it's", r"'it'\''s'"),
            (b"a\nb'\xff", r"$'a\nb\'\xff'"),
        ] {
            assert_eq!(shell_word(OsStr::from_bytes(word)), written);
        }
    }
}
