//! The unit writer: what it writes is read back as the words that were given.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::config::listen_address::ListenPlace;
use crate::config::parser::Request;
use crate::fuzz::{assert_is_message, words};
use crate::socket::address::Address;
use crate::unit_writer::escape;
use crate::unit_writer::options::UnitArguments;
use crate::unit_writer::plan::{Plan, proxy_words};
use crate::unit_writer::render::{UnitFile, files};
use crate::unit_writer::stamp::Origin;
use crate::unit_writer::values::address;

/// The settings of a unit in their order, each a name and a value.
pub type UnitSettings = Vec<(String, Vec<u8>)>;

/// How systemd reads units. `fuzz/` has one that calls systemd's own code.
pub struct UnitReader {
    pub settings: fn(&str) -> UnitSettings,
    /// Returns the words of a command as it is executed.
    pub exec_words: fn(&[u8]) -> Vec<Vec<u8>>,
    /// Returns a value without quotes, after its specifiers.
    pub expanded: fn(&[u8]) -> Vec<u8>,
    /// Returns the `sockaddr` of a listening address.
    pub sockaddr: Option<SockaddrReader>,
    /// Whether a unit can have this name.
    pub is_unit_name: fn(&str) -> bool,
}

/// Reads only what the unit writer writes.
pub const PLAIN: UnitReader = UnitReader {
    settings,
    exec_words: unquoted,
    expanded,
    sockaddr: None,
    is_unit_name: |name| name.len() <= 255 && !name.contains(['/', ' ']),
};

/// Returns `None` if systemd refuses the address.
pub type SockaddrReader = fn(&[u8]) -> Option<Vec<u8>>;

const PROGRAM: &str = "/usr/bin/socket-proxyd";

/// Words that are escaped are read as the same words.
pub fn exec_words(bytes: &[u8], reader: &UnitReader) {
    let mut words = words(bytes);
    words.insert(0, "/opt/$HOME/100%/program".into());
    let line = escape::exec_line(&words);
    assert!(!line.bytes().any(|byte| byte.is_ascii_control()), "{line:?}");
    let read = (reader.exec_words)(line.as_bytes());
    let given: Vec<_> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
    assert_eq!(read, given, "{line}");
}

/// systemd reads the units as they were asked for. The command in a unit's first lines writes the
/// same units.
pub fn unit_writer(bytes: &[u8], reader: &UnitReader) {
    let Some(plan) = plan(words(bytes)) else { return };
    let units = files(&plan, Path::new(PROGRAM));
    for UnitFile { path, text } in &units {
        assert_eq!(Origin::of(text), Origin::Generated);
        assert!(!text.bytes().any(|byte| byte.is_ascii_control() && byte != b'\n'), "{text:?}");
        assert!(path.iter().all(|part| part != ".." && !part.is_empty()), "{path:?}");
        let name = path.file_name().and_then(OsStr::to_str).unwrap();
        assert!(name.ends_with(".conf") || (reader.is_unit_name)(name), "{name}");
        let settings = (reader.settings)(text);
        assert_eq!(settings, (PLAIN.settings)(text), "{text}");
        check_service(&plan, &settings, text, reader);
    }
    check_sockets(&plan, &(reader.settings)(&units[0].text), reader);
    let command = units[0].text.lines().nth(1).and_then(|it| it.strip_prefix("#   ")).unwrap();
    // shlex does not read $'...'.
    if !command.contains("$'") {
        let words = shlex::split(command).unwrap();
        let again = plan_of(words.into_iter().map(OsString::from).collect()).expect(command);
        assert_eq!(files(&again, Path::new(PROGRAM)), units);
    }
}

/// Reads the arguments, without the program.
fn plan(words: Vec<OsString>) -> Option<Plan> {
    let program = OsString::from("socket-proxyd-units");
    match plan_of([program].into_iter().chain(words).collect()) {
        Ok(plan) => Some(plan),
        Err(message) => {
            assert_is_message(&message);
            None
        }
    }
}

fn plan_of(words: Vec<OsString>) -> Result<Plan, String> {
    match UnitArguments::read(words)? {
        Request::Run(arguments) => Plan::new(arguments),
        Request::Print(text) => Err(text),
    }
}

fn check_service(plan: &Plan, settings: &[(String, Vec<u8>)], text: &str, reader: &UnitReader) {
    let bytes = |words: Vec<OsString>| words.into_iter().map(OsString::into_vec);
    let arguments = &plan.arguments;
    for (name, value) in settings {
        let read = (reader.expanded)(value);
        match &**name {
            "ExecStart" => {
                let given = [PROGRAM.into()].into_iter().chain(bytes(proxy_words(arguments)));
                assert_eq!((reader.exec_words)(value), given.collect::<Vec<_>>(), "{text}");
            }
            "Description" => {
                let read = String::from_utf8(read).unwrap();
                assert!(read.contains(plan.name.trim()), "{text}");
            }
            "User" => assert_eq!(Some(&*read), arguments.user.as_deref().map(str::as_bytes)),
            "RuntimeDirectory" => {
                let directory = plan.runtime_directory().unwrap();
                assert_eq!(Path::new("/run").join(OsStr::from_bytes(&read)), directory);
            }
            _ => assert!(!read.is_empty() || value.is_empty(), "{name}"),
        }
    }
    let stop = text.lines().find_map(|line| line.strip_prefix("#ExecStopPost="));
    if let Some(line) = stop {
        let words = plan.proxy.stop_command.as_ref().unwrap().words.clone();
        assert_eq!((reader.exec_words)(line.as_bytes()), bytes(words).collect::<Vec<_>>());
    }
}

/// Checks that systemd opens the sockets that were asked for.
fn check_sockets(plan: &Plan, settings: &[(String, Vec<u8>)], reader: &UnitReader) {
    let values = settings.iter().filter(|(name, _)| name.starts_with("Listen"));
    let values: Vec<_> = values.map(|(_, value)| (reader.expanded)(value)).collect();
    assert_eq!(values.len(), plan.arguments.listen.len());
    let Some(sockaddr) = reader.sockaddr else { return };
    for (value, listen) in values.iter().zip(&plan.arguments.listen) {
        let read = sockaddr(value).unwrap_or_else(|| panic!("systemd refuses {listen}"));
        let read = crate::datagram::session::address_of(&read);
        match (&listen.place, &read) {
            // Without IPv6 systemd takes the address of IPv4.
            (ListenPlace::Any(port), Address::Inet(read)) => assert_eq!(read.port(), *port),
            _ => assert_eq!(address(listen), read, "{listen}"),
        }
    }
}

fn settings(text: &str) -> UnitSettings {
    let mut settings = Vec::new();
    let text = text.replace("\\\n", " ");
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', '['])) {
        assert!(!line.contains(escape::is_noncharacter), "systemd refuses {line}");
        let (name, value) = line.split_once('=').expect(line);
        settings.push((name.into(), value.trim_matches([' ', '\t']).into()));
    }
    settings
}

fn expanded(value: &[u8]) -> Vec<u8> {
    single(value, b'%')
}

/// Replaces two of a byte by one, and asserts that there is none alone.
fn single(value: &[u8], sign: u8) -> Vec<u8> {
    let mut read = Vec::new();
    let mut rest = value.iter();
    while let Some(byte) = rest.next() {
        read.push(*byte);
        assert!(*byte != sign || rest.next() == Some(&sign), "{}", value.escape_ascii());
    }
    read
}

fn unquoted(line: &[u8]) -> Vec<Vec<u8>> {
    let (mut words, mut word, mut is_quoted) = (Vec::new(), None, false);
    let mut rest = line.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b' ' if !is_quoted => words.extend(word.take()),
            b'"' => {
                is_quoted = !is_quoted;
                word.get_or_insert_with(Vec::new);
            }
            b'\\' => {
                let escaped = match rest.next() {
                    Some(b'x') => {
                        let digits = [*rest.next().unwrap(), *rest.next().unwrap()];
                        let digits = std::str::from_utf8(&digits).unwrap();
                        u8::from_str_radix(digits, 16).unwrap()
                    }
                    escaped => *escaped.unwrap(),
                };
                word.get_or_insert_with(Vec::new).push(escaped);
            }
            _ => word.get_or_insert_with(Vec::new).push(*byte),
        }
    }
    assert!(!is_quoted);
    words.extend(word);
    let read = |(index, word): (usize, &Vec<u8>)| match index {
        // The path of the program, in which systemd looks for no variable.
        0 => single(word, b'%'),
        _ => single(&single(word, b'%'), b'$'),
    };
    words.iter().enumerate().map(read).collect()
}
