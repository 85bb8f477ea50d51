//! What the process gives up before it serves: privileges that it might gain, files, and TCP ports.
//!
//! Not with COMMAND, which would inherit all of it. Where names are looked up, files can still be read,
//! by whatever modules the system has for that: any list of them would be wrong as soon as
//! /etc/resolv.conf is replaced by another file; and TCP ports are only given up if the modules are such
//! that need no others. Nothing but privileges is given up below a filter of system calls: a unit's may
//! kill for one that it does not know, and there is no way to ask it.
//!
//! What Landlock does not know (Unix sockets, addresses, UDP) is for the unit to forbid.

#![forbid(unsafe_code)]

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
};
use rustix::thread::{SecureComputingMode, secure_computing_mode, set_no_new_privs};

use crate::cli::Config;
use crate::open::{ListenAddress, MetricsAddress};
use crate::target::{Port, Target};

/// The file rights that are taken away: all that this version knows. Later ones, such as connecting to
/// Unix sockets, would have to be given back.
const FILES: ABI = ABI::V5;

/// Modules of nsswitch.conf(5) that connect to nothing but Unix sockets and DNS servers.
const MODULES: [&str; 11] = [
    "files",
    "dns",
    "resolve",
    "myhostname",
    "mymachines",
    "mdns",
    "mdns_minimal",
    "mdns4",
    "mdns4_minimal",
    "sss",
    "libvirt",
];

/// Where DNS servers answer by TCP.
const DNS: u16 = 53;

/// What is needed of files and TCP ports.
#[derive(Debug, PartialEq, Eq)]
struct Needs {
    /// Reading whatever is there.
    reads: bool,
    /// These ports, unless it is any.
    ports: Option<Vec<u16>>,
}

/// Gives up what the configuration has no need of; before any thread starts. What can't be given up is
/// logged at level debug.
pub fn enter(config: &Config) {
    if config.application.is_some() {
        tracing::debug!("Not restricting privileges, files and TCP ports: COMMAND would be, too.");
        return;
    }
    if let Err(error) = set_no_new_privs(true) {
        tracing::debug!("Failed to set PR_SET_NO_NEW_PRIVS, ignoring: {error}");
    }
    if secure_computing_mode() != Ok(SecureComputingMode::Disabled) {
        tracing::debug!(
            "Not restricting files and TCP ports: there is a filter of system calls, as of most of systemd's \
             hardening, which might kill for Landlock's."
        );
        return;
    }
    let needs = needs(config, || std::fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default());
    if needs.reads {
        tracing::debug!("Not restricting which files are read: names are looked up.");
    }
    if needs.ports.is_none() {
        tracing::debug!(
            "Not restricting TCP ports: a target's is a name, or nsswitch.conf has a module for hosts \
             that may need others."
        );
    }
    match restrict(config, &needs) {
        Ok(RestrictionStatus {
            landlock: LandlockStatus::Available { effective_abi, .. }, ..
        }) if effective_abi >= ABI::V4 || needs.ports.is_none() => {}
        Ok(RestrictionStatus { landlock: LandlockStatus::Available { .. }, .. }) => {
            tracing::debug!("Not restricting TCP ports: Landlock of this kernel knows none.");
        }
        Ok(_) => {
            tracing::debug!("Not restricting files and TCP ports: this kernel has no Landlock.");
        }
        Err(error) => {
            tracing::debug!("Failed to restrict files and TCP ports, ignoring: {error}");
        }
    }
}

/// What is needed; `nsswitch` has the system's configuration, for where names are looked up.
fn needs(config: &Config, nsswitch: impl FnOnce() -> String) -> Needs {
    let is_name = |address: &ListenAddress| match address {
        ListenAddress::Host(host) => host.literal().is_none(),
        _ => false,
    };
    let port = |target: &Target| match target {
        Target::Address(address) => address.port().map(Some),
        Target::Name(name) => match name.port {
            Port::Number(port) => Some(Some(port)),
            Port::Service(_) => Some(None),
        },
    };
    let ports: Option<Vec<_>> = config.targets.iter().filter_map(port).collect();
    let by_name = |target: &Target| matches!(target, Target::Name(_));
    if !opened(config).any(is_name) && !config.targets.iter().any(by_name) {
        return Needs { reads: false, ports };
    }
    let nsswitch = nsswitch();
    let hosts = nsswitch.lines().find_map(|line| line.trim_start().strip_prefix("hosts:"));
    // What stands in brackets is what to do about an answer.
    let modules = hosts.unwrap_or("dns files").split('#').next().unwrap_or_default();
    let mut modules =
        modules.split_whitespace().filter(|word| !word.starts_with('[') && !word.ends_with(']'));
    let with_dns = |mut ports: Vec<u16>| {
        ports.push(DNS);
        ports
    };
    let are_known = modules.all(|module| MODULES.contains(&module));
    Needs { reads: true, ports: ports.map(with_dns).filter(|_| are_known) }
}

/// What it listens on itself.
fn opened(config: &Config) -> impl Iterator<Item = &ListenAddress> {
    let metrics = match &config.metrics {
        Some(MetricsAddress::Open(address)) => Some(address),
        _ => None,
    };
    config.listen.iter().chain(metrics)
}

fn restrict(config: &Config, needs: &Needs) -> Result<RestrictionStatus, RulesetError> {
    let mut files = AccessFs::from_all(FILES);
    if needs.reads {
        files.remove(AccessFs::ReadFile | AccessFs::ReadDir);
    }
    if config.handover.is_some() {
        // The socket file of the process before this one, wherever that listened.
        files.remove(AccessFs::RemoveFile);
    }
    let mut rules = Ruleset::default().handle_access(files)?;
    if needs.ports.is_some() {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut rules = rules.create()?;
    // How many descriptors are open.
    rules = allow(rules, Path::new("/proc/self/fd"), files & AccessFs::ReadDir)?;
    for address in opened(config) {
        if let ListenAddress::Unix(name) = address
            && let Some(directory) = name.path().and_then(Path::parent)
        {
            let socket = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
            rules = allow(rules, directory, socket & files)?;
        }
    }
    for port in needs.ports.iter().flatten() {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    rules.restrict_self()
}

/// Allows something below a directory, if that is there.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        _ if access.is_empty() => Ok(rules),
        Ok(directory) => rules.add_rule(PathBeneath::new(directory, access)),
        Err(_) => Ok(rules),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Request;

    fn needs(args: &[&str], nsswitch: &str) -> Needs {
        let args = std::iter::once("socket-proxyd").chain(args.iter().copied());
        match Config::parse(args.map(Into::into)).unwrap() {
            Request::Serve(config) => super::needs(&config, || nsswitch.into()),
            Request::Print(_) => unreachable!(),
        }
    }

    #[test]
    fn only_ports_that_are_needed() {
        let ports = |args: &[&str]| {
            let Needs { reads, ports } = needs(args, "hosts: none of these is asked for");
            assert!(!reads);
            ports
        };
        assert_eq!(ports(&["/run/a"]), Some(vec![]));
        assert_eq!(ports(&["--listen=80", "127.0.0.1:80"]), Some(vec![80]));
        assert_eq!(ports(&["a=[::1]:80", "b=/x", "c=127.0.0.1:81"]), Some(vec![80, 81]));
    }

    #[test]
    fn and_those_of_dns_where_names_are_looked_up() {
        for (nsswitch, ports) in [
            ("", Some(vec![80, 53])),
            (
                "passwd: nis\nhosts: files mdns4_minimal [NOTFOUND=return] dns # ldap\n",
                Some(vec![80, 53]),
            ),
            ("hosts: files nis dns\n", None),
        ] {
            let expected = Needs { reads: true, ports };
            assert_eq!(needs(&["localhost:80"], nsswitch), expected, "{nsswitch}");
            assert_eq!(needs(&["--listen=localhost:1", "127.0.0.1:80"], nsswitch), expected);
            assert_eq!(needs(&["--metrics=localhost:1", "127.0.0.1:80"], nsswitch), expected);
        }
        assert_eq!(needs(&["127.0.0.1:http"], "").ports, None);
    }
}
