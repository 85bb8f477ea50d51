//! Words as they stand in a unit file (systemd.unit(5), systemd.service(5)), in its name, and in a shell.

use std::fmt::Write;

/// A word of `ExecStart=`: nothing in it is a quote, a variable, a specifier or a separator.
pub fn exec_word(word: &[u8]) -> String {
    let is_plain =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=@,+[]%$~^!?&|<>(){}*".contains(byte);
    let is_quoted = word.is_empty() || !word.iter().all(is_plain);
    let mut text = String::new();
    for chunk in word.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '%' => text.push_str("%%"),
                '$' => text.push_str("$$"),
                '\\' | '"' => text.extend(['\\', c]),
                c if c.is_ascii_control() => hex(&mut text, c as u8),
                c => text.push(c),
            }
        }
        chunk.invalid().iter().for_each(|byte| hex(&mut text, *byte));
    }
    if is_quoted { format!("\"{text}\"") } else { text }
}

/// Whether this can be the whole value of a setting that knows no quotes.
///
/// # Errors
/// What can't be written there, in words.
pub fn check_value(text: &str) -> Result<(), String> {
    if text.chars().any(char::is_control) {
        return Err("it has a control character, which no unit can say".into());
    }
    if text.trim() != text || text.ends_with('\\') {
        return Err("it begins or ends with what a unit drops there".into());
    }
    Ok(())
}

/// Such a value, in which nothing is a specifier.
pub fn value(text: &str) -> String {
    text.replace('%', "%%")
}

/// The name of a unit without its suffix, as systemctl(1) makes it of whatever it is given: `/` becomes
/// `-`, and what can't be in a name `\xNN`. An `@` can be in one, and would make it a template's.
pub fn unit_name(name: &str) -> String {
    let mut escaped = String::new();
    for (index, byte) in name.bytes().enumerate() {
        match byte {
            b'/' => escaped.push('-'),
            b'.' if index == 0 => hex(&mut escaped, byte),
            b'-' | b'_' | b'.' | b':' | b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => {
                escaped.push(byte.into());
            }
            byte => hex(&mut escaped, byte),
        }
    }
    escaped
}

/// A word for a shell to read, on one line.
pub fn shell_word(word: &[u8]) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_./:=@,+%".contains(byte);
    if !word.is_empty() && word.iter().all(is_plain) {
        return String::from_utf8_lossy(word).into();
    }
    match std::str::from_utf8(word) {
        Ok(text) if !text.chars().any(char::is_control) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        _ => {
            let mut text = "$'".to_string();
            for byte in word {
                match byte {
                    b'\'' | b'\\' => text.extend(['\\', char::from(*byte)]),
                    b' '..=b'~' => text.push(char::from(*byte)),
                    byte => hex(&mut text, *byte),
                }
            }
            text.push('\'');
            text
        }
    }
}

fn hex(text: &mut String, byte: u8) {
    // A String takes whatever is written.
    let _ = write!(text, "\\x{byte:02x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command() {
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
        ] {
            assert_eq!(exec_word(word.as_bytes()), written, "{word:?}");
        }
        assert_eq!(exec_word(b"\xff"), r#""\xff""#);
    }

    #[test]
    fn whole_values() {
        assert_eq!(value("/run/100%"), "/run/100%%");
        assert_eq!(check_value("/run/with space, 100%"), Ok(()));
        for text in ["a\nb", " a", "a ", "a\\"] {
            assert!(check_value(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names() {
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
            (b"a\nb'\xff", r"$'a\x0ab\'\xff'"),
        ] {
            assert_eq!(shell_word(word), written);
        }
    }
}
