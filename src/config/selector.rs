//! Which socket leads to which backend: one TARGET for all of them, or `SELECTOR=TARGET` for each.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;

use crate::config::target::Target;
use crate::socket::address::{Address, DatagramKind, SocketKind, SocketLabel, canonical};

/// The longest `FileDescriptorName=`, systemd.socket(5).
const NAME_MAX: usize = 255;

/// Sockets that a message lists.
const LISTED_MAX: usize = 16;

/// The backends that the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// All sockets lead to this one.
    One(Target),
    /// Each socket leads to the target of the selector that selects it.
    Selected(Vec<Selection>),
}

/// `SELECTOR=TARGET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    selector: Selector,
    target: Target,
}

/// Which sockets are selected.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Selector {
    /// `udp:` or `dgram:`, if only such sockets are selected.
    kind: Option<DatagramKind>,
    by: Criterion,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Criterion {
    /// `FileDescriptorName=`, or by default the socket unit's name.
    Name(String),
    /// `:PORT`, on any address.
    Port(u16),
    /// The address that the socket listens on.
    Address(Address),
}

impl Targets {
    /// Parses the arguments that are not options, at least one. A single `/path` or `@name` is a
    /// TARGET whatever it contains, as for systemd-socket-proxyd.
    ///
    /// # Errors
    /// One line about the first argument that is neither a TARGET nor SELECTOR=TARGET.
    pub fn parse(arguments: &[OsString]) -> Result<Self, String> {
        match arguments {
            [single] if is_unix(single) || !single.as_bytes().contains(&b'=') => {
                let target = Target::parse(single).map(Self::One);
                return target.map_err(|error| format!("Invalid target {single:?}: {error}."));
            }
            _ => {}
        }
        if !arguments.iter().any(|argument| argument.as_bytes().contains(&b'=')) {
            return Err("Too many parameters. (Put -- in front of a COMMAND, or write \
                        SELECTOR=TARGET for each socket.)"
                .into());
        }
        let selections = arguments.iter().map(|argument| Selection::parse(argument));
        selections.collect::<Result<_, _>>().map(Self::Selected)
    }

    /// Returns the targets in the order of the command line.
    pub fn iter(&self) -> impl Iterator<Item = &Target> {
        let (one, selected) = match self {
            Self::One(target) => (Some(target), &[][..]),
            Self::Selected(selections) => (None, &selections[..]),
        };
        one.into_iter().chain(selected.iter().map(|selection| &selection.target))
    }

    /// Returns the words that [`Targets::parse`] reads as these targets.
    #[cfg(any(test, fuzzing))]
    pub fn to_words(&self) -> Vec<OsString> {
        match self {
            Self::One(target) => vec![target.to_os_string()],
            Self::Selected(selections) => selections.iter().map(Selection::to_os_string).collect(),
        }
    }

    /// Returns the single TARGET if it begins with the address of a socket and a `=`: perhaps
    /// SELECTOR=TARGET was meant.
    pub fn resembles_selector(&self, sockets: &[&SocketLabel]) -> Option<&Target> {
        let Self::One(target) = self else { return None };
        let text = target.to_string();
        let is_selector = |socket: &&SocketLabel| {
            text.strip_prefix(&socket.address.to_string()).is_some_and(|rest| rest.starts_with('='))
        };
        sockets.iter().any(is_selector).then_some(target)
    }

    /// Returns the index of each socket's target in [`Targets::iter`].
    ///
    /// # Errors
    /// One line that lists the sockets, when no selector or several select a socket, or when a
    /// selector selects none.
    pub fn assign(&self, sockets: &[&SocketLabel]) -> Result<Vec<usize>, String> {
        let Self::Selected(selections) = self else {
            return Ok(vec![0; sockets.len()]);
        };
        let refused = |why: String| {
            let mut listed: Vec<_> =
                sockets.iter().take(LISTED_MAX).map(|socket| socket.to_string()).collect();
            if sockets.len() > LISTED_MAX {
                listed.push(format!("and {} more", sockets.len() - LISTED_MAX));
            }
            format!("{why} The sockets are: {}.", listed.join(", "))
        };
        for (index, Selection { selector, .. }) in selections.iter().enumerate() {
            if selections[..index].iter().any(|earlier| earlier.selector == *selector) {
                return Err(refused(format!("Selector {selector}= is given twice.")));
            }
            if !sockets.iter().any(|socket| selector.selects(socket)) {
                let hint = selector.by.hint();
                return Err(refused(format!("Selector {selector}= selects no socket{hint}.")));
            }
        }
        let assign = |socket: &&SocketLabel| {
            let selects = |selection: &Selection| selection.selector.selects(socket);
            // `udp::443=` is more particular than `:443=`.
            let has_kind = |selection: &Selection| selection.selector.kind.is_some();
            let by_kind = selections.iter().any(|it| has_kind(it) && selects(it));
            let mut all = selections.iter().enumerate();
            let mut next = || all.find(|(_, it)| selects(it) && (has_kind(it) || !by_kind));
            match (next(), next()) {
                (Some((index, _)), None) => Ok(index),
                (Some((_, first)), Some((_, second))) => Err(refused(format!(
                    "Both {}= and {}= select the socket {socket}.",
                    first.selector, second.selector
                ))),
                (None, _) => Err(refused(format!("No selector selects the socket {socket}."))),
            }
        };
        sockets.iter().map(assign).collect()
    }
}

/// Whether systemd-socket-proxyd takes the argument for a TARGET, whatever else it contains.
fn is_unix(argument: &OsStr) -> bool {
    matches!(argument.as_bytes(), [b'/' | b'@', ..])
}

impl Selection {
    /// Parses `SELECTOR=TARGET`. Names and paths may contain a `=`, hosts do not: the first `=`
    /// that a valid TARGET follows separates the two.
    fn parse(argument: &OsStr) -> Result<Self, String> {
        let bytes = argument.as_bytes();
        let mut splits =
            bytes.iter().enumerate().filter(|(_, byte)| **byte == b'=').map(|(at, _)| {
                let (selector, target) = (&bytes[..at], &bytes[at + 1..]);
                (OsStr::from_bytes(selector), Target::parse(OsStr::from_bytes(target)))
            });
        let Some((selector, target)) = splits.next() else {
            return Err(format!(
                "Too many parameters. ({argument:?} needs a selector, as in :80={}.)",
                argument.to_string_lossy()
            ));
        };
        let (selector, target) = match target {
            Ok(target) => (selector, target),
            // If none is valid, the error after the first `=` is the likeliest mistake.
            Err(error) => splits
                .find_map(|(selector, target)| Some((selector, target.ok()?)))
                .ok_or_else(|| format!("Invalid target in {argument:?}: {error}."))?,
        };
        let selector = Selector::parse(selector)
            .map_err(|error| format!("Invalid selector in {argument:?}: {error}."))?;
        Ok(Self { selector, target })
    }
}

#[cfg(any(test, fuzzing))]
impl Selection {
    fn to_os_string(&self) -> OsString {
        let mut text = OsString::from(self.selector.prefix());
        match &self.selector.by {
            Criterion::Address(address) => {
                text.push(Target::Address(address.clone()).to_os_string());
            }
            Criterion::Name(name) => text.push(name),
            Criterion::Port(port) => text.push(format!(":{port}")),
        }
        text.push("=");
        text.push(self.target.to_os_string());
        text
    }
}

impl Selector {
    fn parse(text: &OsStr) -> Result<Self, String> {
        let (kind, text) = SocketKind::split(text);
        let by = Criterion::parse(text)?;
        let is_inet = matches!(by, Criterion::Port(_) | Criterion::Address(Address::Inet(_)));
        match (kind, &by) {
            (Some(DatagramKind::Unix), _) if is_inet => {
                Err("dgram: stands before a Unix socket; UDP is udp:".into())
            }
            (Some(DatagramKind::Udp), Criterion::Address(_)) if !is_inet => {
                Err("udp: stands before a port or an address; a Unix socket is dgram:".into())
            }
            _ => Ok(Self { kind, by }),
        }
    }

    fn prefix(&self) -> &'static str {
        let kind = self.kind.map_or(SocketKind::Stream, |_| SocketKind::Datagram);
        kind.prefix(self.kind == Some(DatagramKind::Unix))
    }

    fn selects(&self, socket: &SocketLabel) -> bool {
        let is_inet = matches!(socket.address, Address::Inet(_));
        let is_kind = match self.kind {
            None => true,
            Some(DatagramKind::Udp) => socket.kind == SocketKind::Datagram && is_inet,
            Some(DatagramKind::Unix) => socket.kind == SocketKind::Datagram && !is_inet,
        };
        is_kind && self.by.selects(socket)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix())?;
        match &self.by {
            Criterion::Name(name) => f.write_str(name),
            Criterion::Port(port) => write!(f, ":{port}"),
            Criterion::Address(address) => address.fmt(f),
        }
    }
}

impl Criterion {
    fn parse(text: &OsStr) -> Result<Self, String> {
        if let Some(address) = Address::parse(text)? {
            return Ok(Self::Address(address));
        }
        let text = text.to_str().ok_or("only a path can have other bytes than UTF-8")?;
        if let Some(port) = text.strip_prefix(':') {
            let number = port.parse().ok().filter(|_| !port.starts_with('+'));
            return number.map(Self::Port).ok_or_else(|| format!("\"{port}\" is not a port"));
        }
        if text.contains(':') {
            let address: SocketAddr = text.parse().map_err(|_| {
                format!("\"{text}\" is not an address with a port; of any address it is :PORT")
            })?;
            // An IPv4-mapped IPv6 address is the IPv4 address.
            return Ok(Self::Address(Address::Inet(canonical(address))));
        }
        if text.is_empty() {
            return Err("it is empty".into());
        }
        if text.len() > NAME_MAX || !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err("it is neither an address nor a FileDescriptorName=".into());
        }
        Ok(Self::Name(text.into()))
    }

    /// Returns what the selector looked for, and what may have been meant.
    fn hint(&self) -> String {
        match self {
            Self::Name(name) if name.bytes().all(|byte| byte.is_ascii_digit()) => {
                format!(" of that name (a port is :{name}=)")
            }
            Self::Name(_) => " of that name".into(),
            _ => String::new(),
        }
    }

    fn selects(&self, socket: &SocketLabel) -> bool {
        match (self, &socket.address) {
            (Self::Name(name), _) => socket.name.as_ref() == Some(name),
            (Self::Port(port), Address::Inet(address)) => address.port() == *port,
            (Self::Port(_), _) => false,
            (Self::Address(Address::Inet(wanted)), Address::Inet(address)) => {
                let address = canonical(*address);
                // Without an interface, a selector selects a link-local address on each.
                *wanted == address || *wanted == SocketAddr::new(address.ip(), address.port())
            }
            (Self::Address(wanted), address) => wanted == address,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Targets, String> {
        let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
        Targets::parse(&arguments)
    }

    /// The parts of one argument among several.
    fn split(argument: &str) -> Result<(String, String), String> {
        match parse(&[argument, "other=/other"])? {
            Targets::Selected(selections) => {
                let Selection { selector, target } = &selections[0];
                Ok((selector.to_string(), target.to_string()))
            }
            Targets::One(target) => panic!("{target}"),
        }
    }

    #[test]
    fn a_lone_word_is_what_it_is_upstream() {
        for lone in ["/run/a=b.sock", "@a=b", "/run/a=/run/b", "localhost:80"] {
            let one = Targets::One(Target::parse(OsStr::new(lone)).unwrap());
            assert_eq!(parse(&[lone]), Ok(one));
        }
        assert!(matches!(parse(&["web=localhost"]), Ok(Targets::Selected(_))));
        assert!(matches!(parse(&[":80=/run/a"]), Ok(Targets::Selected(_))));
    }

    #[test]
    fn selectors_and_targets_come_apart() {
        for (argument, selector, target) in [
            ("web=localhost:80", "web", "localhost:80"),
            ("a.socket=@b", "a.socket", "@b"),
            (":443=[::1]:80", ":443", "[::1]:80"),
            ("127.0.0.1:80=vsock:3:80", "127.0.0.1:80", "vsock:3:80"),
            ("[::]:80=host", "[::]:80", "host:80"),
            ("vsock::80=/a", "vsock::80", "/a"),
            ("/run/a.sock=/run/b.sock", "/run/a.sock", "/run/b.sock"),
            ("@a=@b", "@a", "@b"),
            ("web=/run/a=b.sock", "web", "/run/a=b.sock"),
            ("/run/a=b.sock=/run/c.sock", "/run/a=b.sock", "/run/c.sock"),
            ("a=b=localhost:80", "a=b", "localhost:80"),
        ] {
            assert_eq!(split(argument), Ok((selector.into(), target.into())), "{argument}");
        }
    }

    #[test]
    fn what_can_be_known_to_be_wrong_is_refused() {
        for (argument, why) in [
            ("=/a", "Invalid selector in \"=/a\": it is empty."),
            (":http=/a", "Invalid selector in \":http=/a\": \"http\" is not a port."),
            (":+80=/a", "Invalid selector in \":+80=/a\": \"+80\" is not a port."),
            (
                "host:80=/a",
                "Invalid selector in \"host:80=/a\": \"host:80\" is not an address with a port; of any \
                 address it is :PORT.",
            ),
            ("web=", "Invalid target in \"web=\": the host is empty."),
            (
                "web=:80",
                "Invalid target in \"web=:80\": the host is empty; for a port of this machine write \
                 127.0.0.1:80.",
            ),
        ] {
            assert_eq!(parse(&[argument, "b=/b"]), Err(why.into()));
        }
        assert!(parse(&["a=/a", "/b"]).unwrap_err().starts_with("Too many parameters. "));
        assert!(parse(&["a", "b"]).unwrap_err().starts_with("Too many parameters. "));
    }

    fn sockets() -> Vec<SocketLabel> {
        let inet = |text: &str| Address::Inet(text.parse().unwrap());
        let path = Address::Path("/run/a.sock".into());
        [
            (Some("web"), inet("[::]:443")),
            (Some("web"), inet("127.0.0.1:80")),
            (Some("api"), path),
            (None, inet("[fe80::1%2]:80")),
            (Some("vm"), Address::Vsock { cid: u32::MAX, port: 7 }),
        ]
        .map(|(name, address)| SocketLabel {
            name: name.map(String::from),
            kind: SocketKind::Stream,
            address,
        })
        .into()
    }

    fn assign(arguments: &[&str]) -> Result<Vec<usize>, String> {
        let sockets = sockets();
        parse(arguments).unwrap().assign(&sockets.iter().collect::<Vec<_>>())
    }

    #[test]
    fn each_socket_gets_its_target() {
        assert_eq!(assign(&["/one"]), Ok(vec![0; 5]));
        assert_eq!(
            assign(&["web=/w", "/run/a.sock=/a", "[fe80::1]:80=/f", "vsock::7=/v"]),
            Ok(vec![0, 0, 1, 2, 3])
        );
        assert_eq!(
            assign(&[
                "vm=/v",
                ":443=/s",
                "[::ffff:127.0.0.1]:80=/p",
                "api=/a",
                "[fe80::1%2]:80=/f"
            ]),
            Ok(vec![1, 2, 3, 4, 0])
        );
    }

    #[test]
    fn a_list_has_an_end() {
        let sockets: Vec<_> = (0..100).map(|_| sockets().remove(0)).collect();
        let error = parse(&["a=/a"]).unwrap().assign(&sockets.iter().collect::<Vec<_>>());
        assert!(error.unwrap_err().ends_with(", web ([::]:443), and 84 more."));
    }

    #[test]
    fn what_does_not_fit_is_said_with_all_sockets() {
        const ALL: &str = "The sockets are: web ([::]:443), web (127.0.0.1:80), \
                           api (/run/a.sock), [fe80::1%2]:80, vm (vsock::7).";
        for (arguments, why) in [
            (&["web=/w", "api=/a"][..], "No selector selects the socket [fe80::1%2]:80."),
            (&["web=/w", ":80=/p"], "Both web= and :80= select the socket web (127.0.0.1:80)."),
            (&["web=/w", "db=/d"], "Selector db= selects no socket of that name."),
            (&["80=/w", "db=/d"], "Selector 80= selects no socket of that name (a port is :80=)."),
            (&["[fe80::1%3]:80=/w", "db=/d"], "Selector [fe80::1%3]:80= selects no socket."),
            (&["web=/w", "web=/x"], "Selector web= is given twice."),
            (&[":80=/w", ":080=/x"], "Selector :80= is given twice."),
            (
                &["127.0.0.1:80=/w", "[::ffff:127.0.0.1]:80=/x"],
                "Selector 127.0.0.1:80= is given twice.",
            ),
        ] {
            assert_eq!(assign(arguments), Err(format!("{why} {ALL}")));
        }
    }
}
