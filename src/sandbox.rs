//! What the process gives up before it serves: privileges that it might gain, files, and TCP ports.
//!
//! Not with COMMAND, which would inherit all of it. What the kernel can't enforce is said and left; what
//! Landlock does not know (Unix sockets, addresses, UDP) is for the unit to forbid.

#![forbid(unsafe_code)]

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
};

use crate::cli::Config;
use crate::open::ListenAddress;
use crate::target::{Port, Target};

/// The file rights that are taken away: all that this version knows. Later ones, such as connecting to
/// Unix sockets, would have to be given back.
const FILES: ABI = ABI::V5;

/// Where getaddrinfo(3) and its modules look: configuration, which is replaced as it likes, and libraries.
const FOR_NAMES: [&str; 6] = ["/etc", "/run", "/usr", "/lib", "/lib64", "/var/lib"];

/// DNS over TCP, for answers that are too long for UDP.
const DNS: u16 = 53;

/// What the process still may.
#[derive(Debug, PartialEq, Eq)]
struct Needs {
    /// Files to look names up.
    names: bool,
    /// Ports to connect to; none is all of them.
    ports: Option<Vec<u16>>,
}

/// Gives up what the configuration has no need of; before any thread starts.
pub fn enter(config: &Config) {
    if config.application.is_some() {
        return;
    }
    match restrict(&Needs::of(config), &config.listen) {
        Ok(RestrictionStatus {
            landlock: LandlockStatus::Available { effective_abi, .. }, ..
        }) if effective_abi >= ABI::V4 => {}
        Ok(RestrictionStatus { landlock: LandlockStatus::Available { .. }, .. }) => {
            tracing::info!("Landlock of this kernel knows no TCP ports, all can be connected to.");
        }
        Ok(_) => {
            tracing::info!("This kernel has no Landlock, files and TCP ports are not restricted.")
        }
        Err(error) => {
            tracing::info!("Failed to restrict files and TCP ports, ignoring: {error}.");
        }
    }
}

impl Needs {
    fn of(config: &Config) -> Self {
        let is_named = |target: &Target| matches!(target, Target::Name(_));
        let listens_by_name = config
            .listen
            .iter()
            .any(|it| matches!(it, ListenAddress::Host(host) if host.literal().is_none()));
        let names = listens_by_name || config.targets.iter().any(is_named);
        let ports = config.targets.iter().map(|target| match target {
            Target::Name(name) => match name.port {
                Port::Number(port) => Some(vec![port]),
                // It may be another at each connection.
                Port::Service(_) => None,
            },
            Target::Address(address) => Some(address.port().into_iter().collect()),
        });
        let ports = ports
            .collect::<Option<Vec<_>>>()
            .map(|ports| ports.into_iter().flatten().chain(names.then_some(DNS)).collect());
        Self { names, ports }
    }
}

fn restrict(needs: &Needs, listen: &[ListenAddress]) -> Result<RestrictionStatus, RulesetError> {
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(FILES))?;
    if needs.ports.is_some() {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut rules = rules.create()?;
    // How many descriptors are open.
    rules = allow(rules, Path::new("/proc/self/fd"), AccessFs::ReadDir.into())?;
    if needs.names {
        for path in FOR_NAMES {
            rules = allow(rules, Path::new(path), AccessFs::ReadFile | AccessFs::ReadDir)?;
        }
    }
    for address in listen {
        if let ListenAddress::Unix(name) = address
            && let Some(directory) = name.path().and_then(Path::parent)
        {
            let socket = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
            rules = allow(rules, directory, socket)?;
        }
    }
    for port in needs.ports.iter().flatten() {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    // It sets PR_SET_NO_NEW_PRIVS as well, whatever the kernel knows of the rest.
    rules.restrict_self()
}

/// Allows something below a directory, if that is there.
fn allow(
    rules: landlock::RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<landlock::RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(directory) => rules.add_rule(PathBeneath::new(directory, access)),
        Err(_) => Ok(rules),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Request;

    fn needs(args: &[&str]) -> Needs {
        let args = std::iter::once("socket-proxyd").chain(args.iter().copied());
        match Config::parse(args.map(Into::into)).unwrap() {
            Request::Serve(config) => Needs::of(&config),
            Request::Print(_) => unreachable!(),
        }
    }

    #[test]
    fn only_what_is_needed() {
        let ports = |ports: &[u16]| Some(ports.to_vec());
        assert_eq!(needs(&["/run/a"]), Needs { names: false, ports: ports(&[]) });
        assert_eq!(needs(&["127.0.0.1:80"]), Needs { names: false, ports: ports(&[80]) });
        assert_eq!(needs(&["a=[::1]:80", "b=/x"]), Needs { names: false, ports: ports(&[80]) });
        assert_eq!(needs(&["localhost:80"]), Needs { names: true, ports: ports(&[80, DNS]) });
        assert_eq!(needs(&["127.0.0.1:http"]), Needs { names: true, ports: None });
        let listen = needs(&["--listen=localhost:1", "127.0.0.1:80"]);
        assert_eq!(listen, Needs { names: true, ports: ports(&[80, DNS]) });
    }
}
