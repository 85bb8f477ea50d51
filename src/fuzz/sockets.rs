//! Addresses as text and as the kernel writes them, control messages, and the keys of sessions.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;

use ppp::{v1, v2};

use crate::config::listen_address::{ListenAddress, ListenPlace, MetricsAddress};
use crate::config::target::Target;
use crate::datagram::begin::{KEY_MAX, session_key};
use crate::datagram::session::address_of;
use crate::fuzz::assert_is_message;
use crate::socket::address::{Address, canonical};
use crate::socket::control;
use crate::socket::host_port::HostPort;
use crate::socket::mmsg::{LocalAddress, Outgoing, ReceivedMessage};
use crate::socket::proxy_protocol::{ProxyProtocol, datagram_header};

/// Targets and the addresses of listeners that are printed are read as the same ones.
pub fn addresses(bytes: &[u8]) {
    // No argument contains NUL.
    if bytes.contains(&0) {
        return;
    }
    let text = OsStr::from_bytes(bytes);
    match Target::parse(text) {
        // Printed with a port, such a host would be a kind of socket.
        Ok(Target::Name(HostPort { host, .. })) if ["udp", "dgram"].contains(&&*host) => {}
        Ok(target) => {
            let printed = target.to_os_string();
            let again = Target::parse(&printed).unwrap_or_else(|why| panic!("{printed:?}: {why}"));
            match (&target, &again) {
                (Target::Address(Address::Inet(one)), Target::Address(Address::Inet(other))) => {
                    assert_eq!(canonical(*one), *other);
                }
                _ => assert_eq!(target, again),
            }
            match &target {
                Target::Address(address) => assert_is_sockaddr(address),
                Target::Name(name) => assert_is_host_port(name),
            }
        }
        Err(message) => assert_is_message(&message),
    }
    match ListenAddress::parse(text) {
        Ok(listen) => {
            if let ListenPlace::Host(host) = &listen.place {
                assert_is_host_port(host);
            }
            if let ListenPlace::Address(address) = &listen.place {
                assert_is_sockaddr(address);
            }
            if text.to_str().is_some() {
                assert_eq!(ListenAddress::parse(listen.to_string()), Ok(listen));
            }
        }
        Err(message) => assert_is_message(&message),
    }
    match MetricsAddress::parse(text) {
        Ok(address) if text.to_str().is_some() => {
            assert_eq!(MetricsAddress::parse(address.to_string()), Ok(address));
        }
        Ok(_) => {}
        Err(message) => assert_is_message(&message),
    }
}

fn assert_is_host_port(name: &HostPort) {
    assert!(!name.host.is_empty() && !name.port.is_empty());
    assert!(!name.host.contains(char::is_whitespace) && !name.host.contains(['/', '=']));
    let number = name.port.parse::<u32>();
    assert!(number.is_err() || number.is_ok_and(|port| port <= 65_535), "{name}");
}

/// Asserts that the kernel takes the address, and gives it back.
fn assert_is_sockaddr(address: &Address) {
    assert_eq!(&Address::from_sockaddr(&address.to_sockaddr().unwrap()), address);
}

/// An address of the kernel, of any length, prints and fits into a PROXY header and a key.
pub fn socket_address(bytes: &[u8]) {
    let address = address_of(bytes);
    // The kernel ends each path with a NUL, and no path of the kernel is empty.
    let path = address.path().map(|path| path.as_os_str().as_bytes());
    let is_strange = path.is_some_and(|path| path.is_empty() || path.contains(&0));
    assert!(!address.to_string().is_empty() || is_strange);
    match address.to_sockaddr() {
        Ok(sockaddr) if !is_strange => assert_eq!(Address::from_sockaddr(&sockaddr), address),
        Ok(_) => {}
        Err(_) => assert!(address.is_unix()),
    }
    assert_eq!(address.accepts(&address), address != Address::Unnamed);
    assert!(address.in_other_family().is_none_or(|it| it.port() == address.port()));
    assert_eq!(address.source().is_some(), address.port().is_some());
    assert_eq!(address.covers(&address), address.is_unspecified());
    let listener = Address::Inet((Ipv6Addr::LOCALHOST, 80).into());
    for (client, listener) in [(&address, &listener), (&listener, &address), (&address, &address)] {
        let header = ProxyProtocol::V1.header(client, listener);
        assert!(header.len() <= 107 && header.ends_with(b"\r\n"));
        let text = std::str::from_utf8(&header).unwrap();
        v1::Header::try_from(text).unwrap();
        for header in
            [ProxyProtocol::V2.header(client, listener), datagram_header(client, listener)]
        {
            assert!(header.len() <= 232);
            assert_eq!(v2::Header::try_from(&header[..]).unwrap().len(), header.len());
        }
    }
    let name = &bytes[..bytes.len().min(size_of::<socket2::SockAddrStorage>())];
    let local = Some(LocalAddress { ip: Ipv6Addr::LOCALHOST.into(), interface: 1 });
    let mut space = [0; KEY_MAX];
    assert!(session_key(&mut space, usize::MAX, name, local).ends_with(name));
}

/// Two clients, or two addresses that a client sends to, never have one key.
pub fn session_keys(bytes: &[u8]) {
    let half = bytes.len() / 2;
    let [one, other] = [&bytes[..half], &bytes[half..]].map(client_of);
    let (Some(one), Some(other)) = (one, other) else { return };
    let mut spaces = [[0; KEY_MAX]; 2];
    let [first, second] = &mut spaces;
    let keys = [(first, one), (second, other)]
        .map(|(space, (listener, name, local))| session_key(space, listener, name, local));
    assert_eq!(keys[0] == keys[1], one == other);
}

/// Returns a listener, a client and the address that it sends to. All datagrams of a listener have
/// such an address, of one family, or none has.
fn client_of(bytes: &[u8]) -> Option<(usize, &[u8], Option<LocalAddress>)> {
    let (&[listener, interface], rest) = bytes.split_first_chunk()?;
    let (local, name) = match listener % 3 {
        0 => (None, rest),
        1 => {
            let (ip, name) = rest.split_first_chunk::<4>()?;
            (Some(IpAddr::from(Ipv4Addr::from(*ip))), name)
        }
        _ => {
            let (ip, name) = rest.split_first_chunk::<16>()?;
            (Some(IpAddr::from(Ipv6Addr::from(*ip))), name)
        }
    };
    let local = local.map(|ip| LocalAddress { ip, interface: interface.into() });
    let name = &name[..name.len().min(size_of::<socket2::SockAddrStorage>())];
    Some((listener.into(), name, local))
}

/// Control messages that are read and written again are the same. Datagrams that are cut at a
/// length have the same bytes as before. The first byte is the length of the datagrams.
pub fn control_messages(bytes: &[u8]) {
    let Some((len, rest)) = bytes.split_first() else { return };
    let (payload, controls) = rest.split_at(rest.len().min(usize::from(*len)));
    let messages = all_controls(controls);
    let mut written = vec![0; messages.iter().map(|(_, data)| control::space(data.len())).sum()];
    let mut at = 0;
    for (kind, data) in &messages {
        control::push(&mut written, &mut at, *kind, data);
    }
    assert_eq!(at, written.len());
    assert_eq!(all_controls(&written), messages);

    let mut received = ReceivedMessage {
        bytes: payload,
        name: &[],
        is_truncated: false,
        segment: None,
        tos: 0,
        local: None,
    };
    received.read_controls(controls);
    let segments: Vec<_> = received.segments().collect();
    assert_eq!(segments.len(), received.count());
    assert_eq!(segments.concat(), payload);
    assert!(received.local.is_none_or(|local| local.interface == 0 || local.ip.is_ipv6()));
    for parts in [[payload, &[]], [b"header", payload]] {
        // With nothing behind it the header is a datagram.
        if payload.is_empty() {
            continue;
        }
        let outgoing = Outgoing { parts, segment: received.segment, ..Outgoing::default() };
        assert_eq!(outgoing.datagrams(), segments.len());
        for (index, segment) in segments.iter().enumerate() {
            let datagram = outgoing.datagram(index);
            let header = if datagram.has_header() { &b"header"[..] } else { b"" };
            assert_eq!(datagram.parts.concat(), [header, segment].concat());
            assert_eq!((datagram.segment, datagram.len()), (None, header.len() + segment.len()));
        }
    }
}

fn all_controls(mut rest: &[u8]) -> Vec<(control::ControlKind, &[u8])> {
    let mut messages = Vec::new();
    while let Some((kind, data, behind)) = control::next(rest) {
        assert!(behind.len() < rest.len());
        messages.push((kind, data));
        rest = behind;
    }
    messages
}
