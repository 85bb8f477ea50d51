//! What the process gives up before it serves: privileges that it might gain, files, and TCP ports.
//!
//! Not with COMMAND, which would inherit all of it. Files and ports not where names are looked up either:
//! whatever modules the system has for that read and connect as they like. And not below a filter of
//! system calls: a unit's may kill for one that it does not know, and there is no way to ask it.
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
use crate::open::ListenAddress;
use crate::scrape::MetricsAddress;
use crate::target::Target;

/// The file rights that are taken away: all that this version knows. Later ones, such as connecting to
/// Unix sockets, would have to be given back.
const FILES: ABI = ABI::V5;

/// Gives up what the configuration has no need of; before any thread starts.
pub fn enter(config: &Config) {
    if config.application.is_some() {
        return;
    }
    if let Err(error) = set_no_new_privs(true) {
        tracing::debug!("Failed to set PR_SET_NO_NEW_PRIVS, ignoring: {error}");
    }
    let Some(ports) = ports(config) else { return };
    if secure_computing_mode() != Ok(SecureComputingMode::Disabled) {
        return;
    }
    match restrict(config, &ports) {
        Ok(RestrictionStatus {
            landlock: LandlockStatus::Available { effective_abi, .. }, ..
        }) if effective_abi >= ABI::V4 => {}
        Ok(RestrictionStatus { landlock: LandlockStatus::Available { .. }, .. }) => {
            tracing::debug!("Landlock of this kernel knows no TCP ports, all can be connected to.");
        }
        Ok(_) => {
            tracing::debug!("There is no Landlock, files and TCP ports are not restricted.");
        }
        Err(error) => {
            tracing::debug!("Failed to restrict files and TCP ports, ignoring: {error}");
        }
    }
}

/// The TCP ports that it connects to; none if names are looked up.
fn ports(config: &Config) -> Option<Vec<u16>> {
    let is_name = |address: &ListenAddress| match address {
        ListenAddress::Host(host) => host.literal().is_none(),
        _ => false,
    };
    if opened(config).any(is_name) {
        return None;
    }
    let ports = config.targets.iter().map(|target| match target {
        Target::Name(_) => None,
        Target::Address(address) => Some(address.port()),
    });
    Some(ports.collect::<Option<Vec<_>>>()?.into_iter().flatten().collect())
}

/// What it listens on itself.
fn opened(config: &Config) -> impl Iterator<Item = &ListenAddress> {
    let metrics = match &config.metrics {
        Some(MetricsAddress::Open(address)) => Some(address),
        _ => None,
    };
    config.listen.iter().chain(metrics)
}

fn restrict(config: &Config, ports: &[u16]) -> Result<RestrictionStatus, RulesetError> {
    let mut files = AccessFs::from_all(FILES);
    if config.handover.is_some() {
        // The socket file of the process before this one, wherever that listened.
        files.remove(AccessFs::RemoveFile);
    }
    let rules = Ruleset::default().handle_access(files)?.handle_access(AccessNet::ConnectTcp)?;
    let mut rules = rules.create()?;
    // How many descriptors are open.
    rules = allow(rules, Path::new("/proc/self/fd"), AccessFs::ReadDir.into())?;
    for address in opened(config) {
        if let ListenAddress::Unix(name) = address
            && let Some(directory) = name.path().and_then(Path::parent)
        {
            let socket = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
            rules = allow(rules, directory, socket & files)?;
        }
    }
    for port in ports {
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
        Ok(directory) => rules.add_rule(PathBeneath::new(directory, access)),
        Err(_) => Ok(rules),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Request;

    #[test]
    fn only_ports_that_are_needed() {
        let needs = |args: &[&str]| {
            let args = std::iter::once("socket-proxyd").chain(args.iter().copied());
            match Config::parse(args.map(Into::into)).unwrap() {
                Request::Serve(config) => ports(&config),
                Request::Print(_) => unreachable!(),
            }
        };
        assert_eq!(needs(&["/run/a"]), Some(vec![]));
        assert_eq!(needs(&["--listen=80", "127.0.0.1:80"]), Some(vec![80]));
        assert_eq!(needs(&["a=[::1]:80", "b=/x", "c=127.0.0.1:81"]), Some(vec![80, 81]));
        assert_eq!(needs(&["localhost:80"]), None);
        assert_eq!(needs(&["--metrics=localhost:1", "127.0.0.1:80"]), None);
        assert_eq!(needs(&["127.0.0.1:http"]), None);
        assert_eq!(needs(&["--listen=localhost:1", "127.0.0.1:80"]), None);
    }
}
