//! COMMAND and the commands of options: an executable program and its arguments.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;

use crate::logging::os_message;

/// The search path without `$PATH`, as in execvp(3).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// At least the program.
    pub words: Vec<OsString>,
}

impl CommandLine {
    /// Splits the LINE of an option into words by quotes and backslashes, as a shell does.
    ///
    /// # Errors
    /// The reason, which follows the option and its value.
    pub fn split(line: &str) -> Result<Self, String> {
        let words =
            shlex::split(line).ok_or("a quote is not closed, or the line ends in a backslash")?;
        let words: Vec<_> = words.into_iter().map(OsString::from).collect();
        let has_program = words.first().is_some_and(|program| !program.is_empty());
        if has_program { Ok(Self { words }) } else { Err("it names no program".into()) }
    }
}

/// The program's file name, for messages.
impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = Path::new(&self.words[0]);
        program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().fmt(f)
    }
}

/// Checks that the program of a command exists and may be executed; `origin` is what precedes the
/// program in a command line.
///
/// # Errors
/// One line that names the program and the reason.
pub fn find_program(origin: &str, words: &[OsString]) -> Result<(), String> {
    let Some(program) = words.first().filter(|program| !program.is_empty()) else {
        return Err("There is no COMMAND after --. (Write TARGET -- COMMAND [ARG...].)".into());
    };
    search(program).map_err(|why| format!("Failed to execute {origin}{program:?}: {why}."))
}

/// Searches for a program as execvp(3) does. The error tells why it cannot be executed.
fn search(program: &OsStr) -> Result<(), String> {
    search_path(program).map_err(|errno| match errno {
        Errno::NOENT if program.as_encoded_bytes().contains(&b' ') => {
            "there is no such file; write each argument as a separate word".into()
        }
        Errno::NOENT if !has_slash(program) => "it is not in $PATH".into(),
        Errno::ISDIR => "it is a directory".into(),
        Errno::ACCESS => "it is not executable, or not for this user".into(),
        errno => os_message(&errno.into()),
    })
}

fn search_path(program: &OsStr) -> Result<(), Errno> {
    if has_slash(program) {
        return check(Path::new(program));
    }
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut worst = Errno::NOENT;
    for directory in env::split_paths(&path) {
        // An empty entry is the current directory.
        let candidate: PathBuf = Path::new(".").join(directory).join(program);
        match check(&candidate) {
            Ok(()) => return Ok(()),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => worst = errno,
        }
    }
    Err(worst)
}

fn check(path: &Path) -> Result<(), Errno> {
    if FileType::from_raw_mode(stat(path)?.st_mode).is_dir() {
        return Err(Errno::ISDIR);
    }
    // execve(2) checks the effective ids.
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn has_slash(program: &OsStr) -> bool {
    program.as_encoded_bytes().contains(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_must_exist_and_be_executable() {
        let find = |program: &str| find_program("COMMAND ", &[program.into()]);
        assert_eq!(find("sh"), Ok(()));
        assert_eq!(find("/bin/sh"), Ok(()));
        for (program, why) in [
            ("", "There is no COMMAND after --. (Write TARGET -- COMMAND [ARG...].)"),
            ("no-such-program", "\"no-such-program\": it is not in $PATH."),
            ("/bin/no-such-program", "No such file or directory."),
            ("/bin/sh -c true", "there is no such file; write each argument as a separate word."),
            ("/usr", "it is a directory."),
            ("/etc/passwd", "it is not executable, or not for this user."),
        ] {
            let error = find(program).unwrap_err();
            assert!(error.ends_with(why), "{program:?}: {error}");
        }
        assert!(find_program("COMMAND ", &[]).is_err());
    }

    #[test]
    fn messages_have_the_file_name() {
        assert_eq!(CommandLine::split("/bin/sh -c true").unwrap().to_string(), "sh");
    }

    #[test]
    fn lines_are_split_by_quotes_and_backslashes_only() {
        let split = |line: &str| CommandLine::split(line).map(|line| line.words);
        let words = split(r#"sh -c 'a "$b" %n' "c\"d"e f\ g # comment"#).unwrap();
        assert_eq!(words, ["sh", "-c", "a \"$b\" %n", "c\"de", "f g"]);
        assert_eq!(split("sh a#b '#c' ~ *").unwrap(), ["sh", "a#b", "#c", "~", "*"]);
        for (line, why) in [
            ("sh 'a", "a quote is not closed, or the line ends in a backslash"),
            ("sh a\\", "a quote is not closed, or the line ends in a backslash"),
            (" # sh", "it names no program"),
            ("'' sh", "it names no program"),
        ] {
            assert_eq!(split(line), Err(why.into()), "{line}");
        }
    }
}
