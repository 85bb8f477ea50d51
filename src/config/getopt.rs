//! getopt_long(3)'s rules, which upstream's users know: what a word of the command line means. A wrong
//! one is refused in the words of systemd 262, which reads its own by the same rules.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap_lex::{ArgCursor, RawArgs};

/// An option that is known.
#[derive(Debug)]
pub struct Known<S> {
    /// Its whole name.
    pub name: &'static str,
    /// Its name of one letter, if it has one.
    pub letter: Option<char>,
    /// Whether systemd-socket-proxyd has it: a prefix that is unambiguous among those means the same
    /// here, whatever options are added beside them.
    pub is_upstreams: bool,
    /// What it is for.
    pub meaning: Meaning<S>,
}

/// What an option is for.
#[derive(Debug)]
pub enum Meaning<S> {
    /// It has a value, of which this becomes something.
    Takes(S),
    /// It may have one: behind a `=`, or as the next word, if that is a path by its first letter.
    /// Without one it is empty.
    MayTakePath(S),
    /// It has none.
    Flag(S),
    /// It has none, and this is all that is asked for.
    Prints(&'static str),
}

/// What the command line consists of.
#[derive(Debug)]
pub enum Word<'a, S> {
    /// An option that asks for this text; nothing after it counts.
    Prints(&'static str),
    /// An option with its value.
    Value(&'a S, OsString),
    /// What is no option.
    Argument(OsString),
    /// What follows the `--` after an argument.
    Command(Vec<OsString>),
}

/// A command line, word by word.
#[derive(Debug)]
pub struct Words<'a, S> {
    program: &'static str,
    known: &'a [Known<S>],
    raw: RawArgs,
    cursor: ArgCursor,
    had_argument: bool,
    /// A `--` has ended the options, as ever; after an argument it begins COMMAND.
    options_ended: bool,
}

impl<'a, S> Words<'a, S> {
    /// Those of `args`, the program's name first, by the options that are `known`; `program` is what
    /// it is called in messages.
    pub fn new(
        program: &'static str,
        known: &'a [Known<S>],
        args: impl IntoIterator<Item = OsString>,
    ) -> Self {
        let raw = RawArgs::new(args);
        let mut cursor = raw.cursor();
        raw.next_os(&mut cursor);
        Self { program, known, raw, cursor, had_argument: false, options_ended: false }
    }

    /// The next one.
    ///
    /// # Errors
    /// An option that is not known, or whose value is missing or too much.
    pub fn next(&mut self) -> Result<Option<Word<'a, S>>, String> {
        let Some(word) = self.raw.next(&mut self.cursor) else { return Ok(None) };
        if word.is_escape() && self.had_argument {
            let rest = self.raw.remaining(&mut self.cursor);
            return Ok(Some(Word::Command(rest.map(OsString::from).collect())));
        }
        if word.is_escape() && !self.options_ended {
            self.options_ended = true;
            return self.next();
        }
        if !self.options_ended {
            if let Some((name, attached)) = word.to_long() {
                let (known, attached) = (self.by_name(name)?, attached.map(OsString::from));
                let takes_none = matches!(known.meaning, Meaning::Prints(_) | Meaning::Flag(_));
                if takes_none && attached.is_some() {
                    let name = known.name;
                    return Err(
                        self.refused(&format!("option '--{name}' doesn't allow an argument"))
                    );
                }
                return self.option(known, attached).map(Some);
            }
            if let Some(mut letters) = word.to_short() {
                // `-c5`; of `-c=5` the value is `=5`.
                let known = self.by_letter(letters.next_flag())?;
                let attached = letters.next_value_os().map(OsString::from);
                return self.option(known, attached).map(Some);
            }
        }
        self.had_argument = true;
        Ok(Some(Word::Argument(word.to_value_os().into())))
    }

    /// An option, with the value that is attached to it, or else the next word, whatever it is.
    fn option(
        &mut self,
        known: &'a Known<S>,
        attached: Option<OsString>,
    ) -> Result<Word<'a, S>, String> {
        let set = match &known.meaning {
            Meaning::Takes(set) => set,
            Meaning::MayTakePath(set) => {
                if attached.as_ref().is_some_and(|value| value.is_empty()) {
                    let name = known.name;
                    return Err(self.refused(&format!("option '--{name}=' has an empty argument")));
                }
                let next = self.raw.peek_os(&self.cursor).map(OsStr::as_bytes);
                let takes_next = attached.is_none() && matches!(next, Some([b'/' | b'.', ..]));
                let next = takes_next.then(|| self.raw.next_os(&mut self.cursor)).flatten();
                let value = attached.or_else(|| next.map(OsString::from));
                return Ok(Word::Value(set, value.unwrap_or_default()));
            }
            Meaning::Flag(set) => return Ok(Word::Value(set, OsString::new())),
            Meaning::Prints(text) => return Ok(Word::Prints(text)),
        };
        let value = attached.or_else(|| self.raw.next_os(&mut self.cursor).map(OsString::from));
        let missing = || self.refused(&format!("option '--{}' requires an argument", known.name));
        Ok(Word::Value(set, value.ok_or_else(missing)?))
    }

    fn by_letter(&self, letter: Option<Result<char, &OsStr>>) -> Result<&'a Known<S>, String> {
        let letter = letter.and_then(Result::ok).unwrap_or(char::REPLACEMENT_CHARACTER);
        let known = self.known.iter().find(|known| known.letter == Some(letter));
        known.ok_or_else(|| self.refused(&format!("unrecognized option '-{letter}'")))
    }

    /// The option of a name, the upstream one that a prefix means, or else the only one of all.
    fn by_name(&self, name: Result<&str, &OsStr>) -> Result<&'a Known<S>, String> {
        let unknown =
            |name: &OsStr| self.refused(&format!("unrecognized option '--{}'", name.display()));
        let name = name.map_err(unknown)?;
        if name.is_empty() {
            // It would be a prefix of every option.
            return Err(unknown(OsStr::new(name)));
        }
        if let Some(known) = self.known.iter().find(|known| known.name == name) {
            return Ok(known);
        }
        let all: Vec<_> = self.known.iter().filter(|known| known.name.starts_with(name)).collect();
        let upstreams: Vec<_> = all.iter().copied().filter(|known| known.is_upstreams).collect();
        match (&upstreams[..], &all[..]) {
            ([only], _) | (_, [only]) => Ok(only),
            (_, []) => Err(unknown(OsStr::new(name))),
            (_, several) => {
                let names: Vec<_> = several.iter().map(|it| format!("--{}", it.name)).collect();
                let names = names.join(", ");
                Err(self
                    .refused(&format!("option '--{name}' is ambiguous; possibilities: {names}")))
            }
        }
    }

    /// In the words of systemd 262.
    fn refused(&self, why: &str) -> String {
        format!("{}: {why}", self.program)
    }
}
