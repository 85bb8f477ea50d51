//! Parsers for option values, and checks of what systemd and the hardened units allow.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::config::listen_address::{ListenAddress, ListenPlace};
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::socket::address::{Address, SocketKind};
use crate::unit_writer::escape::{is_noncharacter, unit_name};

/// Parses NAME.
pub fn name(text: &str) -> Result<String, String> {
    if !(1..=NAME_MAX).contains(&unit_name(text).len()) {
        return Err(format!("it must have 1 to {NAME_MAX} bytes when escaped"));
    }
    if unit_name(text).starts_with('-') {
        return Err("the names of its units would begin with a dash".into());
    }
    if let Some(suffix) = [".service", ".socket"].iter().find(|suffix| text.ends_with(**suffix)) {
        return Err(format!("write it without {suffix}"));
    }
    check_value(text)?;
    Ok(text.into())
}

/// Parses an address for `ListenStream=` or `ListenDatagram=`, in the forms that mean the same to
/// systemd.
pub fn listen(text: &str) -> Result<ListenAddress, String> {
    let mut listen = ListenAddress::parse(text)?;
    let text = &*listen.place.to_string();
    if let ListenPlace::Host(host) = &mut listen.place {
        let is_link_local = |address: SocketAddr| match address {
            SocketAddr::V6(address) => address.ip().is_unicast_link_local(),
            SocketAddr::V4(_) => false,
        };
        refuse_if(&[(
            host.host.contains('%') || host.literal().is_some_and(is_link_local),
            "it is of one interface; write [::]:PORT, and BindToDevice= in a drop-in",
        )])?;
        let literal = host.literal().ok_or("a socket unit takes no names, write IP:PORT")?;
        host.host = literal.ip().to_string();
    }
    refuse_if(&[
        (address(&listen).port() == Some(0), "clients could not know the port"),
        (Path::new(text) == Path::new("/"), "that is a directory"),
        (
            text.starts_with('/') && text.split('/').any(|part| part == ".."),
            "systemd takes no .. in it",
        ),
        (
            text.starts_with('@') && text.len() > ABSTRACT_MAX,
            "systemd takes at most 106 bytes after the @",
        ),
    ])?;
    check_value(text)?;
    Ok(listen)
}

/// Parses a [`listen`] address at which Prometheus can connect.
pub fn metrics(text: &str) -> Result<ListenAddress, String> {
    let listen = listen(text)?;
    let is_vsock = matches!(listen.place, ListenPlace::Address(Address::Vsock { .. }));
    let is_datagram = listen.kind == SocketKind::Datagram;
    refuse_if(&[(is_vsock || is_datagram, "it must be a TCP or Unix socket")])?;
    Ok(listen)
}

/// Parses the part of `--target=` that matters before ExecStart= is written.
pub fn target(text: &str) -> Result<String, String> {
    refuse_if(&[
        (text.starts_with('-'), "it begins with a dash, as an option does"),
        (text.chars().any(char::is_control), "control characters are not allowed"),
    ])?;
    Ok(text.into())
}

pub fn service(text: &str) -> Result<String, String> {
    let stem = text.strip_suffix(".service").unwrap_or(text);
    let (_, suffix) = stem.rsplit_once('.').unwrap_or_default();
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.:\\@".contains(c);
    let is_other_type = OTHER_UNIT_TYPES.split(' ').any(|other| other == suffix);
    refuse_if(&[
        (stem.is_empty() || is_other_type, "it must be the name of a .service unit"),
        (!stem.chars().all(is_allowed), "no unit has such a name; see systemd-escape(1)"),
        (stem.starts_with('-'), "it begins with a dash, as an option of systemctl(1) does"),
        (stem.starts_with('@'), "it begins with an @"),
        (stem.ends_with('@'), "a template has no process; name an instance of it"),
    ])?;
    Ok(format!("{stem}.service"))
}

/// Parses a time span. A bare number gets a unit. Of other spans only the white space changes.
pub fn idle(text: &str) -> Result<String, String> {
    let span: TimeSpan = text.parse()?;
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let is_number = words.bytes().all(|byte| byte.is_ascii_digit());
    Ok(if is_number { span.to_string() } else { words })
}

/// Parses the name of a user or a group.
pub fn account(text: &str) -> Result<String, String> {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_name = text.starts_with(is_first) && text.chars().all(is_allowed);
    refuse_if(&[
        (text == "root", "the units drop root's privileges; leave this option out"),
        (!is_name, "that is not the name of an account"),
    ])?;
    Ok(text.into())
}

/// Checks that COMMAND can create the Unix socket of `target`: in its own /tmp, or in the directory
/// below /run that is the unit's `RuntimeDirectory=`.
pub fn check_socket(target: &Target, name: &str) -> Result<(), String> {
    let Some(path) = socket_path(target) else { return Ok(()) };
    let own = unit_name(name);
    let is_own = path.parent() == Some(&Path::new("/run").join(&own))
        && !SYSTEM_DIRECTORIES.contains(&&*own)
        // RuntimeDirectory= interprets these two.
        && !own.contains([':', '\\']);
    if is_own || is_below(path, &TEMPORARY) {
        return Ok(());
    }
    Err(format!(
        "Invalid --target={target}: COMMAND cannot create a socket there. (Write /run/{own}/SOCKET, whose \
         directory systemd creates, and a NAME that is a plain word and not a directory of the system.)"
    ))
}

/// Checks that the unit can see the program of a command; `origin` precedes it in ExecStart=.
pub fn check_program(origin: &str, words: &[OsString]) -> Result<(), String> {
    let program = words.first().map(OsString::as_os_str).unwrap_or_default();
    let path = Path::new(program);
    let is_relative = program.as_bytes().contains(&b'/') && path.is_relative();
    refuse_if(&[
        (program.is_empty(), "it is empty"),
        (is_relative, "the service starts in /, write an absolute path"),
        (
            is_hidden(path),
            "the service cannot see /home, /root and /tmp; put it in /usr/local or /opt",
        ),
    ])
    .map_err(|why| format!("Invalid {origin}{program:?}: {why}."))
}

/// Checks that text can be the whole value of a setting that knows no quotes.
pub fn check_value(text: &str) -> Result<(), String> {
    let is_changed = text.trim() != text || text.ends_with('\\');
    refuse_if(&[
        (text.chars().any(char::is_control), "control characters are not allowed"),
        (
            text.chars().any(is_noncharacter),
            "noncharacters of Unicode, such as U+FFFF, are not allowed",
        ),
        (is_changed, "white space around it and a backslash at its end are not allowed"),
    ])
}

/// Returns the reason of the first condition that is true, as an error.
pub fn refuse_if(reasons: &[(bool, &str)]) -> Result<(), String> {
    let found = reasons.iter().find(|(is_true, _)| *is_true);
    found.map_or(Ok(()), |(_, reason)| Err((*reason).into()))
}

/// Returns the address of the socket that systemd opens.
pub fn address(listen: &ListenAddress) -> Address {
    match &listen.place {
        ListenPlace::Any(port) => Address::Inet((Ipv6Addr::UNSPECIFIED, *port).into()),
        ListenPlace::Host(host) => host.literal().map_or(Address::Unnamed, Address::Inet),
        ListenPlace::Address(address) => address.clone(),
    }
}

/// Whether an IP address is of this machine only.
pub fn is_local(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    ip.is_loopback() || ip.is_unspecified()
}

/// Returns the path of a target that is a Unix socket in the file system.
pub fn socket_path(target: &Target) -> Option<&Path> {
    match target {
        Target::Address(address) => address.path(),
        Target::Name(_) => None,
    }
}

/// Whether a hardened service cannot see a file.
pub fn is_hidden(path: &Path) -> bool {
    is_below(path, &HOMES) || is_below(path, &TEMPORARY)
}

/// Whether systemd loads a unit that executes a program with this path. It refuses special
/// characters even if they are escaped. Since systemd 262 those of patterns are among them, and
/// bytes that are not UTF-8. At the beginning some characters are prefixes (systemd.service(5)).
pub fn can_be_in_exec_start(program: &OsStr) -> bool {
    let is_special = |c: char| c.is_ascii_control() || is_noncharacter(c) || "\"'\\*?[".contains(c);
    let is_prefix = |c: char| "@-:+!|".contains(c);
    program.to_str().is_some_and(|it| !it.contains(is_special) && !it.starts_with(is_prefix))
}

pub fn is_below(path: &Path, directories: &[&str]) -> bool {
    directories.iter().any(|directory| path.starts_with(directory))
}

/// The name of the loopback addresses.
pub const LOCALHOST: &str = "localhost";

/// Directories in which systemd looks for an administrator's units.
pub const UNIT_DIRECTORIES: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// Directories that are empty for a service with `ProtectHome=yes`.
pub const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];

/// Directories of which each service with `PrivateTmp=yes` has its own, and so each dynamic user.
pub const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];

/// Directories below /run that belong to other programs.
const SYSTEM_DIRECTORIES: [&str; 6] = ["systemd", "user", "dbus", "lock", "log", "udev"];

const OTHER_UNIT_TYPES: &str = "socket target timer path mount automount slice scope device swap";

/// The longest name of a unit, systemd.unit(5), without what is added to NAME.
const NAME_MAX: usize = 255 - "-proxy.service.d".len();

/// The longest abstract name that systemd listens on, with its @: a byte shorter than the kernel's
/// limit.
const ABSTRACT_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_systemd_refuses() {
        for allowed in ["/usr/bin/a", "/a b/50%/$HOME/\u{e4}", "name"] {
            assert!(can_be_in_exec_start(allowed.as_ref()), "{allowed}");
        }
        for refused in ["'", "\"", "\\", "\n", "\x7f", "*", "?", "[", "\u{ffff}"] {
            assert!(!can_be_in_exec_start(format!("/opt/{refused}/a").as_ref()), "{refused:?}");
        }
        assert!(!can_be_in_exec_start(OsStr::from_bytes(b"/opt/\xff")));
        assert!(!can_be_in_exec_start("-name".as_ref()));
    }

    #[test]
    fn a_bare_number_gets_a_unit_whatever_white_space_is_around_it() {
        for (text, written) in
            [("5", "5s"), (" 5\r", "5s"), ("1min \t 5", "1min 5"), ("infinity", "infinity")]
        {
            assert_eq!(idle(text).as_deref(), Ok(written), "{text:?}");
        }
    }

    #[test]
    fn values_survive_without_quotes() {
        assert_eq!(check_value("/run/with space, 100%"), Ok(()));
        for text in ["a\nb", " a", "a ", "a\\", "a\u{ffff}b"] {
            assert!(check_value(text).is_err(), "{text:?}");
        }
    }
}
