//! getopt_long(3)'s manners, which upstream's users know: what a word of the command line means, and
//! the words in which a wrong one is refused.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};

use clap_lex::{ArgCursor, RawArgs};

/// systemd-socket-proxyd's own options; a prefix that is unambiguous among these means the same
/// here, whatever options are added beside them.
const UPSTREAM_OPTIONS: [&str; 5] =
    ["connections-max", "exit-idle-time", "proxy-protocol", "help", "version"];

/// Options of one letter, and their names.
const LETTERS: [(char, &str); 2] = [('c', "connections-max"), ('h', "help")];

/// An option.
#[derive(Debug)]
pub(crate) struct Known<S> {
    /// Its whole name.
    pub(crate) name: &'static str,
    /// What becomes of its value; none if it has no value.
    pub(crate) set: Option<S>,
}

/// What the command line consists of.
#[derive(Debug)]
pub(crate) enum Word<'a, S> {
    /// An option without a value.
    Flag(&'a Known<S>),
    /// An option with its value.
    Value(&'a S, OsString),
    /// What is no option.
    Argument(OsString),
    /// What follows the `--` after an argument.
    Command(Vec<OsString>),
}

/// A command line, word by word.
#[derive(Debug)]
pub(crate) struct Words<'a, S> {
    known: &'a [Known<S>],
    raw: RawArgs,
    cursor: ArgCursor,
    had_argument: bool,
    /// A `--` has ended the options, as ever; after an argument it begins COMMAND.
    options_ended: bool,
}

impl<'a, S> Words<'a, S> {
    /// Those of `args`, the program's name first, by the options that are `known`.
    pub(crate) fn new(known: &'a [Known<S>], args: impl IntoIterator<Item = OsString>) -> Self {
        let raw = RawArgs::new(args);
        let mut cursor = raw.cursor();
        raw.next_os(&mut cursor);
        Self { known, raw, cursor, had_argument: false, options_ended: false }
    }

    /// The next one.
    ///
    /// # Errors
    /// getopt's words for an option that is not known, or whose value is missing or too much.
    pub(crate) fn next(&mut self) -> Result<Option<Word<'a, S>>, String> {
        let Some(word) = self.raw.next(&mut self.cursor) else { return Ok(None) };
        if word.is_escape() {
            if self.had_argument || self.options_ended {
                let rest = self.raw.remaining(&mut self.cursor);
                return Ok(Some(Word::Command(rest.map(OsString::from).collect())));
            }
            self.options_ended = true;
            return self.next();
        }
        if self.options_ended {
            return Ok(Some(Word::Argument(word.to_value_os().into())));
        }
        if let Some((name, value)) = word.to_long() {
            let known = self.by_name(name)?;
            let Some(set) = &known.set else {
                return match value {
                    None => Ok(Some(Word::Flag(known))),
                    Some(_) => Err(refused(&format!(
                        "option '--{}' doesn't allow an argument",
                        known.name
                    ))),
                };
            };
            let value = value.map(OsString::from);
            return self.with_value(known, set, value).map(Some);
        }
        if let Some(mut letters) = word.to_short() {
            let letter = letters.next_flag().and_then(Result::ok);
            let name = LETTERS.iter().find(|(known, _)| Some(*known) == letter);
            let known = name.and_then(|(_, name)| self.known.iter().find(|it| it.name == *name));
            let Some(known) = known else {
                return Err(refused(&format!("unrecognized option '{}'", word.display())));
            };
            let value = letters.next_value_os().map(OsString::from);
            return match &known.set {
                Some(set) => self.with_value(known, set, value).map(Some),
                None => Ok(Some(Word::Flag(known))),
            };
        }
        // A lone dash is no option either.
        self.had_argument = true;
        Ok(Some(Word::Argument(word.to_value_os().into())))
    }

    /// The value that is attached to an option, or else the next word, whatever it is.
    fn with_value(
        &mut self,
        known: &'a Known<S>,
        set: &'a S,
        attached: Option<OsString>,
    ) -> Result<Word<'a, S>, String> {
        let value = attached.or_else(|| self.raw.next_os(&mut self.cursor).map(OsString::from));
        let value = value
            .ok_or_else(|| refused(&format!("option '--{}' requires an argument", known.name)))?;
        Ok(Word::Value(set, value))
    }

    /// The option of a name, the upstream one that a prefix means, or else the only one of ours.
    fn by_name(&self, name: Result<&str, &OsStr>) -> Result<&'a Known<S>, String> {
        let unknown =
            |name: &OsStr| refused(&format!("unrecognized option '--{}'", name.display()));
        let name = name.map_err(unknown)?;
        if let Some(known) = self.known.iter().find(|known| known.name == name) {
            return Ok(known);
        }
        let meant = |known: &&&Known<S>| known.name.starts_with(name);
        let upstreams = self.known.iter().filter(|known| UPSTREAM_OPTIONS.contains(&known.name));
        let upstreams: Vec<_> = upstreams.filter(|known| meant(&known)).collect();
        let ours: Vec<_> = self.known.iter().filter(|known| meant(&known)).collect();
        match (&upstreams[..], &ours[..]) {
            ([only], _) | (_, [only]) => Ok(only),
            (_, []) => Err(unknown(OsStr::new(name))),
            (_, several) => {
                let names: Vec<_> = several.iter().map(|it| format!("'--{}'", it.name)).collect();
                let names = names.join(" ");
                Err(refused(&format!("option '--{name}' is ambiguous; possibilities: {names}")))
            }
        }
    }
}

/// As getopt_long(3) says it.
fn refused(why: &str) -> String {
    format!("socket-proxyd: {why}")
}
