//! The command line of the proxy.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::config::client_set::ClientSet;
use crate::config::listen_address::{ListenAddress, ListenPlace};
use crate::config::options::Arguments;
use crate::config::parser::Request;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::config::timespan::TimeSpan;
use crate::config::{Config, check};
use crate::fuzz::{assert_is_message, words};
use crate::socket::address::{Address, SocketLabel};

/// A command line is accepted with values inside their limits, or refused with a message.
pub fn command_line(bytes: &[u8]) {
    let mut line = vec![OsString::from("socket-proxyd")];
    line.extend(words(bytes));
    let has_double_dash = line.iter().any(|word| word == "--");
    let arguments = match Arguments::read(line) {
        Ok(Request::Run(arguments)) => arguments,
        Ok(Request::Print(text)) => return assert!(text.ends_with('\n')),
        Err(message) => return assert_is_message(&message),
    };
    let targets = match check(&arguments) {
        Ok(targets) => targets,
        Err(message) => return assert_is_message(&message),
    };
    let Config { targets, command, backend_wait, times, args, .. } =
        Config::new(arguments, targets);
    assert!(targets.iter().count() > 0);
    assert!(!args.connect_timeout.is_zero() && !args.connection_idle_time.is_zero());
    assert!(args.session_idle_time > Duration::ZERO);
    assert!((1..=256).contains(&args.threads.get()));
    assert!(
        times.freeze_idle == TimeSpan::INFINITY
            || times.freeze_idle < times.stop_idle.min(args.exit_idle_time)
    );
    for (origin, words) in args.programs() {
        assert!(!words[0].is_empty(), "{origin}");
    }
    if command.is_some() {
        assert!(has_double_dash && matches!(targets, Targets::One(_)));
        assert!(!backend_wait.is_zero());
    }
}

/// Targets that are printed are read as the same ones. The order of the sockets has no influence
/// on the target of each. Behind an empty word the words are sockets.
pub fn selectors(bytes: &[u8]) {
    let words = words(bytes);
    let mut parts = words.split(|word| word.is_empty());
    let targets = match Targets::parse(parts.next().unwrap_or_default()) {
        Ok(targets) => targets,
        Err(message) => return assert_is_message(&message),
    };
    let is_kind = |target: &Target| match target {
        Target::Name(name) => ["udp", "dgram"].contains(&&*name.host),
        Target::Address(_) => false,
    };
    // Printed with a port, such a host would be a kind of socket.
    if targets.iter().any(is_kind) {
        return;
    }
    let printed = targets.to_words();
    let again = Targets::parse(&printed).unwrap_or_else(|why| panic!("{printed:?}: {why}"));
    assert_eq!(again.to_words(), printed);
    let sockets: Vec<_> = parts.flatten().filter_map(|word| label(word)).collect();
    let labels: Vec<_> = sockets.iter().collect();
    let reversed: Vec<_> = sockets.iter().rev().collect();
    assert_eq!(targets.resembles_selector(&labels), targets.resembles_selector(&reversed));
    match targets.assign(&labels) {
        Ok(assigned) => {
            assert_eq!(assigned.len(), sockets.len());
            assert!(assigned.iter().all(|index| *index < targets.iter().count()));
            let mut others = targets.assign(&reversed).unwrap();
            others.reverse();
            assert_eq!(others, assigned);
        }
        Err(message) => assert_is_message(&message),
    }
}

/// Returns a socket that has the word as its address, and as its name.
fn label(word: &OsStr) -> Option<SocketLabel> {
    let ListenAddress { kind, place } = ListenAddress::parse(word).ok()?;
    let address = match place {
        ListenPlace::Any(port) => Address::Inet((Ipv6Addr::UNSPECIFIED, port).into()),
        ListenPlace::Host(host) => Address::Inet(host.literal()?),
        ListenPlace::Address(address) => address,
    };
    Some(SocketLabel { name: word.to_str().map(String::from), kind, address })
}

/// A set of clients contains each address that it names.
pub fn passive_from(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let set: ClientSet = match text.parse() {
        Ok(set) => set,
        Err(message) => return assert_is_message(&message),
    };
    let mut has_unix = false;
    for word in text.split(',') {
        has_unix |= word == "unix";
        let (address, prefix) = word.split_once('/').unwrap_or((word, "128"));
        let Ok(ip) = address.parse::<IpAddr>() else { continue };
        // A wider network of IPv6 has no IPv4 addresses.
        let is_mapped = ip.to_canonical() != ip;
        if !is_mapped || prefix.parse::<u8>().is_ok_and(|prefix| prefix >= 96) {
            assert!(set.contains(&Address::Inet(SocketAddr::new(ip, 1))), "{ip}");
        }
    }
    assert_eq!(set.contains(&Address::Unnamed), has_unix);
    assert!(!set.contains(&Address::Vsock { cid: 2, port: 1 }));
}
