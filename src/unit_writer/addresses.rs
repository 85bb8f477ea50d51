//! The addresses of sockets and targets, checked together.

use std::net::IpAddr;

use crate::config::listen_address::ListenAddress;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::socket::address::{Address, SocketKind, SocketLabel};
use crate::unit_writer::options::UnitArguments;
use crate::unit_writer::values::{LOCALHOST, address, is_local};

/// Checks that each socket leads to one target, and that no target leads back to a socket.
pub fn check_addresses(
    arguments: &UnitArguments,
    targets: &Targets,
    unit: &str,
) -> Result<(), String> {
    let all: Vec<_> = arguments.listen.iter().chain(&arguments.metrics).collect();
    if let Some(at) = (1..all.len()).find(|&at| all[..at].contains(&all[at])) {
        return Err(format!("The address {} is given twice.", all[at]));
    }
    for (at, listen) in arguments.listen.iter().enumerate() {
        let overlaps = |other: &&ListenAddress| {
            other.kind == listen.kind && overlap(&address(listen), &address(other))
        };
        if let Some(other) = arguments.listen[..at].iter().find(overlaps) {
            return Err(format!("--listen={listen} overlaps with --listen={other}."));
        }
    }
    let name = Some(format!("{unit}.socket"));
    let label = |listen: &ListenAddress| SocketLabel {
        name: name.clone(),
        kind: listen.kind,
        address: address(listen),
    };
    let labels: Vec<_> = arguments.listen.iter().map(label).collect();
    // The proxy checks this at its start, in the same words.
    let assigned = targets.assign(&labels.iter().collect::<Vec<_>>())?;
    let targets: Vec<_> = targets.iter().collect();
    let clients = arguments.listen.iter().zip(assigned.iter().map(|&index| targets[index]));
    let clients = clients.map(|(listen, target)| ("listen", listen, target));
    let metrics = arguments.metrics.iter();
    let scrapes = metrics.flat_map(|listen| targets.iter().map(move |it| ("metrics", listen, *it)));
    for (option, listen, target) in clients.chain(scrapes) {
        if matches!(target, Target::Address(target) if address(listen).accepts(target)) {
            return Err(format!(
                "--{option}={listen} is the address of --target={target}; let the backend listen on \
                 another address."
            ));
        }
        let is_vsock = matches!(target, Target::Address(Address::Vsock { .. }));
        if is_vsock && listen.kind == SocketKind::Datagram {
            return Err(format!(
                "--{option}={listen} cannot lead to {target}: vsock has streams only."
            ));
        }
    }
    if let Some(metrics) = &arguments.metrics {
        let (at, mut listeners) = (address(metrics), labels.iter());
        if listeners.any(|it| it.kind == SocketKind::Stream && overlap(&it.address, &at)) {
            return Err(format!("--metrics={metrics} overlaps with a --listen= address."));
        }
    }
    Ok(())
}

/// Whether systemd cannot listen on both. `[::]` is for IPv4 as well.
fn overlap(one: &Address, other: &Address) -> bool {
    let (Address::Inet(one), Address::Inet(other)) = (one, other) else { return one == other };
    let (ip, other_ip) = (one.ip().to_canonical(), other.ip().to_canonical());
    let includes = |ip: IpAddr, other: IpAddr| {
        ip == other || (ip.is_unspecified() && (ip.is_ipv6() || other.is_ipv4()))
    };
    one.port() == other.port() && (includes(ip, other_ip) || includes(other_ip, ip))
}

/// Checks that a target is in a network namespace that has only lo.
pub fn check_isolated(target: &Target) -> Result<(), String> {
    let is_inside = match target {
        Target::Address(Address::Inet(address)) => is_local(address.ip()),
        Target::Address(address) => !matches!(address, Address::Vsock { .. }),
        // The port may be a name.
        Target::Name(name) => {
            name.host == LOCALHOST || name.host.parse::<IpAddr>().is_ok_and(is_local)
        }
    };
    match is_inside {
        true => Ok(()),
        false => Err(format!(
            "--isolate: the target {target} is outside the namespace. (Write 127.0.0.1, ::1, localhost or a \
             Unix socket.)"
        )),
    }
}
