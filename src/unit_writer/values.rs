//! What each option of `socket-proxyd-units` may be given, and what is wrong with it, in words.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::socket::address::Address;
use crate::socket::host_port::Port;
use crate::unit_writer::escape::{check_value, unit_name};

/// The name of this program.
pub const PROGRAM: &str = "socket-proxyd-units";

/// Where systemd looks for an administrator's units.
pub const UNIT_DIRECTORIES: [&str; 2] = ["/etc/systemd/system", "/run/systemd/system"];

/// Below these a service with `ProtectHome=yes` finds nothing.
pub const HOMES: [&str; 3] = ["/home", "/root", "/run/user"];

/// Each service with `PrivateTmp=yes` has its own of these, and a dynamic user always has.
pub const TEMPORARY: [&str; 2] = ["/tmp", "/var/tmp"];

/// A TARGET, which the proxy reads.
pub fn target(text: &str) -> Result<OsString, String> {
    if text.starts_with('-') {
        return Err("it begins with a dash, as an option does".into());
    }
    Ok(text.into())
}

/// Where a socket that systemd opens is.
pub fn address(listen: &ListenAddress) -> Address {
    match listen {
        ListenAddress::Any(port) => Address::Inet((std::net::Ipv6Addr::UNSPECIFIED, *port).into()),
        ListenAddress::Host(host) => host.literal().map_or(Address::Unix(None), Address::Inet),
        ListenAddress::Unix(name) => Address::Unix(Some(Box::new(name.clone()))),
        ListenAddress::Vsock(address) => address.clone(),
    }
}

/// An address for `ListenStream=`, and as systemd reads it: `08080` and `::1:80` are addresses only here.
pub fn listen(text: &str) -> Result<(ListenAddress, String), String> {
    let address = ListenAddress::parse(OsStr::new(text))?;
    if let ListenAddress::Host(host) = &address
        && (host.literal().is_none() || matches!(host.port, Port::Service(_)))
    {
        return Err("ListenStream= takes no names, write IP:PORT".into());
    }
    let port = match &address {
        ListenAddress::Any(port) => Some(*port),
        ListenAddress::Host(host) => host.literal().map(|address| address.port()),
        _ => None,
    };
    if port == Some(0) {
        return Err("nobody would know the port".into());
    }
    check_value(text)?;
    let written = match &address {
        ListenAddress::Any(port) => port.to_string(),
        // The name of an interface is the administrator's.
        ListenAddress::Host(host) if !text.contains('%') => {
            host.literal().map_or_else(|| text.into(), |address| address.to_string())
        }
        ListenAddress::Unix(name) if name.path() == Some(Path::new("/")) => {
            return Err("that is a directory".into());
        }
        ListenAddress::Vsock(address) => address.to_string(),
        _ => text.into(),
    };
    Ok((address, written))
}

/// The same for scrapers, which speak no vsock.
pub fn metrics(text: &str) -> Result<(ListenAddress, String), String> {
    match listen(text)? {
        (ListenAddress::Vsock(_), _) => Err("it has to be TCP or a Unix socket".into()),
        address => Ok(address),
    }
}

pub fn service(text: &str) -> Result<String, String> {
    const OTHERS: [&str; 10] = [
        ".socket",
        ".target",
        ".timer",
        ".path",
        ".mount",
        ".automount",
        ".slice",
        ".scope",
        ".device",
        ".swap",
    ];
    let stem = text.strip_suffix(".service").unwrap_or(text);
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.:\\@".contains(c);
    if stem.is_empty() || OTHERS.iter().any(|it| stem.ends_with(it)) {
        return Err("it has to be the name of a .service unit".into());
    }
    if !stem.chars().all(is_name) {
        return Err("no unit has such a name; see systemd-escape(1)".into());
    }
    if stem.starts_with('-') {
        return Err("it begins with a dash, as an option of systemctl(1) does".into());
    }
    if stem.ends_with('@') {
        return Err("a template has no process; name an instance of it".into());
    }
    Ok(format!("{stem}.service"))
}

pub fn idle(text: &str) -> Result<String, String> {
    let Some(span) = TimeSpan::parse(text) else {
        return Err("it has to be a time span (30s, 5min 20s, infinity)".into());
    };
    // Without what a unit could not say, and not without a unit.
    let words: Vec<_> = text.split_whitespace().collect();
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    Ok(if is_number { span.to_string() } else { words.join(" ") })
}

pub fn account(text: &str) -> Result<String, String> {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text == "root" {
        return Err("root's rights are what no unit here has; leave it out".into());
    }
    if !text.starts_with(is_first) || !text.chars().all(is_name) {
        return Err("that is no name of an account".into());
    }
    Ok(text.into())
}

/// A Unix socket that COMMAND is to make: there is one directory where it can, beside its own /tmp.
pub fn check_socket(target: &Target, name: &str) -> Result<(), String> {
    let Target::Address(Address::Unix(Some(socket))) = target else { return Ok(()) };
    let Some(path) = socket.path() else { return Ok(()) };
    let own = unit_name(name);
    let is_own = path.parent() == Some(&Path::new("/run").join(&own));
    let is_taken = ["systemd", "user", "dbus", "lock", "log", "udev"].contains(&&*own);
    // RuntimeDirectory= has a meaning for a colon, and another one for a backslash.
    let is_plain = !own.contains([':', '\\']);
    if is_own && !is_taken && is_plain
        || TEMPORARY.iter().any(|directory| path.starts_with(directory))
    {
        return Ok(());
    }
    Err(format!(
        "Invalid --target={target}: COMMAND can make no socket there; write /run/{own}/SOCKET, whose \
         directory is made for it, and as NAME a plain word that is no directory of the system's."
    ))
}

pub fn check_command(words: &[OsString]) -> Result<(), String> {
    let Some(program) = words.first().filter(|program| !program.is_empty()) else {
        return Err("There is no COMMAND after --.".into());
    };
    let path = Path::new(program);
    let refused = |why: &str| Err(format!("Invalid COMMAND {program:?}: {why}."));
    if program.as_bytes().contains(&b'/') && path.is_relative() {
        return refused("a service starts in /, write its whole path");
    }
    if HOMES.iter().chain(&TEMPORARY).any(|directory| path.starts_with(directory)) {
        return refused(
            "the service sees no home, and a /tmp of its own; put it in /usr/local or /opt",
        );
    }
    Ok(())
}
