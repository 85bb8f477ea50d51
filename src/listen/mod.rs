//! The sockets at which clients arrive: listeners, passed by systemd or opened here, or the one
//! connection that was passed instead of listeners.

pub mod passed_connection;
pub mod bind;
pub mod listener;
pub mod accepted;
pub mod stored;
#[expect(unsafe_code, reason = "it takes ownership of descriptors by number")]
pub mod activation;

use std::rc::Rc;

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::listen::activation::PassedFd;
use crate::listen::listener::Listener;
use crate::listen::passed_connection::PassedConnection;
use crate::listen::stored::StoredListener;
use crate::socket::Keepalive;
use crate::socket::address::SocketLabel;

/// The sockets at which clients arrive. Without any, the process serves only stored connections.
#[derive(Debug, Default)]
pub struct ClientSockets {
    pub listeners: Vec<Rc<Listener>>,
    /// The one connection that was accepted before the start, instead of listeners.
    pub connection: Option<PassedConnection>,
}

impl ClientSockets {
    /// Takes the passed sockets, or opens `addresses`, reusing listeners of the previous process.
    /// Those that are left in `stored` are no longer configured.
    ///
    /// # Errors
    /// A line for the log on a socket that is missing or not usable.
    pub async fn open(
        addresses: &[ListenAddress],
        passed: Vec<PassedFd>,
        stored: &mut Vec<StoredListener>,
        has_connections: bool,
    ) -> Result<Self, String> {
        match (addresses.is_empty(), passed.is_empty()) {
            (true, true) if has_connections => Ok(Self::default()),
            (true, true) => {
                Err("Didn't get any sockets passed in. (Start it from a .socket unit, \
                                 or open one with --listen=ADDRESS.)"
                    .into())
            }
            (false, false) => {
                Err("Got sockets passed in and --listen= as well. (Use only one of the two.)"
                    .into())
            }
            (true, false) => Self::from_passed(passed),
            (false, true) => {
                // Port 0 takes any stored listener, so the addresses that name one come first.
                let mut in_turn: Vec<_> = addresses.iter().enumerate().collect();
                in_turn.sort_by_key(|(_, address)| address.has_any_port());
                let mut opened = Vec::new();
                for (index, address) in in_turn {
                    for listener in bind::open(address, stored).await? {
                        tracing::info!("Listening on {listener}.");
                        opened.push((index, Rc::new(listener)));
                    }
                }
                opened.sort_by_key(|(index, _)| *index);
                let listeners = opened.into_iter().map(|(_, listener)| listener).collect();
                Ok(Self { listeners, connection: None })
            }
        }
    }

    fn from_passed(mut passed: Vec<PassedFd>) -> Result<Self, String> {
        match passed.iter().position(PassedConnection::is_connected) {
            None => {
                let listeners = passed.into_iter().map(Listener::from_passed);
                let listeners = listeners.map(|it| it.map(Rc::new)).collect::<Result<_, _>>()?;
                Ok(Self { listeners, connection: None })
            }
            Some(index) if passed.len() == 1 => {
                let connection = PassedConnection::from_passed(passed.remove(index))?;
                Ok(Self { listeners: Vec::new(), connection: Some(connection) })
            }
            Some(index) => Err(format!(
                "Passed in socket {} is connected, and must be the only one. (It serves one \
                 connection with Accept=yes, and all with Accept=no.)",
                passed[index].name
            )),
        }
    }

    /// Returns the labels by which selectors find the sockets.
    pub fn labels(&self) -> Vec<&SocketLabel> {
        let listeners = self.listeners.iter().map(|listener| &listener.label);
        listeners.chain(self.connection.iter().map(|connection| &connection.label)).collect()
    }

    /// Sends keepalive probes to TCP clients.
    pub fn set_keepalive(&self, keepalive: Keepalive) {
        self.listeners.iter().for_each(|listener| listener.set_keepalive(keepalive));
        self.connection.iter().for_each(|connection| connection.set_keepalive(keepalive));
    }
}

/// Refuses a target whose address an opened listener has taken: the listener would lead to itself,
/// or COMMAND could not listen there.
///
/// The check is not for passed listeners, which may belong to another network namespace.
pub fn check_no_loop(
    listener: &Listener,
    target: &Target,
    has_command: bool,
) -> Result<(), String> {
    match target {
        Target::Address(address) if listener.label.address.accepts(address) => {}
        _ => return Ok(()),
    }
    Err(match has_command {
        true => format!(
            "--listen={listener} takes the address of TARGET {target}. (Let COMMAND listen on another.)"
        ),
        false => format!(
            "--listen={listener} leads to itself, TARGET {target}. (Let the backend listen on another \
             address.)"
        ),
    })
}
