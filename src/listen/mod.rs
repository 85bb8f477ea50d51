//! The sockets at which clients arrive: listeners, passed by systemd or opened here, or the one
//! connection that was passed instead of listeners. For datagrams a listener is a bound socket.

pub mod passed_connection;
pub mod bind;
pub mod listener;
pub mod datagram;
pub mod accepted;
pub mod stored;
#[expect(unsafe_code, reason = "it takes ownership of descriptors by number")]
pub mod activation;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::listen::activation::PassedFd;
use crate::listen::datagram::DatagramListener;
use crate::listen::listener::Listener;
use crate::listen::passed_connection::PassedConnection;
use crate::listen::stored::{SocketFile, StoredListener};
use crate::logging::os_message;
use crate::socket::Keepalive;
use crate::socket::address::{SocketKind, SocketLabel};

/// The sockets at which clients arrive. Without any, the process serves only stored connections.
#[derive(Debug, Default)]
pub struct ClientSockets {
    pub listeners: Vec<Rc<Listener>>,
    pub datagrams: Vec<DatagramListener>,
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
                    for socket in bind::open(address, stored).await? {
                        opened.push((index, address, socket));
                    }
                }
                opened.sort_by_key(|(index, ..)| *index);
                let mut sockets = Self::default();
                for (_, address, (fd, file)) in opened {
                    sockets.add(address.kind, fd, file).map_err(|error| {
                        format!("Failed to listen on {address}: {}.", os_message(&error))
                    })?;
                }
                Ok(sockets)
            }
        }
    }

    /// Adds a socket that was opened.
    fn add(&mut self, kind: SocketKind, fd: OwnedFd, file: Option<SocketFile>) -> io::Result<()> {
        match kind {
            SocketKind::Stream => {
                let listener = Listener::from_fd(fd, None, file)?;
                tracing::info!("Listening on {listener}.");
                self.listeners.push(Rc::new(listener));
            }
            SocketKind::Datagram => {
                let listener = DatagramListener::from_fd(fd, None, file)?;
                tracing::info!("Listening on {listener}.");
                self.datagrams.push(listener);
            }
        }
        Ok(())
    }

    fn from_passed(mut passed: Vec<PassedFd>) -> Result<Self, String> {
        match passed.iter().position(PassedConnection::is_connected) {
            None => {
                let (datagrams, streams): (Vec<_>, Vec<_>) =
                    passed.into_iter().partition(DatagramListener::is_datagram);
                let streams = streams.into_iter().map(|it| Listener::from_passed(it).map(Rc::new));
                let datagrams = datagrams.into_iter().map(DatagramListener::from_passed);
                Ok(Self {
                    listeners: streams.collect::<Result<_, _>>()?,
                    datagrams: datagrams.collect::<Result<_, _>>()?,
                    connection: None,
                })
            }
            Some(index) if passed.len() == 1 => {
                let connection = PassedConnection::from_passed(passed.remove(index))?;
                Ok(Self { connection: Some(connection), ..Self::default() })
            }
            Some(index) => Err(format!(
                "Passed in socket {} is connected, and must be the only one. (It serves one \
                 connection with Accept=yes, and all with Accept=no.)",
                passed[index].name
            )),
        }
    }

    /// Returns the labels by which selectors find the sockets: of the listeners, of the connection,
    /// and of the datagram sockets.
    pub fn labels(&self) -> Vec<&SocketLabel> {
        let listeners = self.listeners.iter().map(|listener| &listener.label);
        let connection = self.connection.iter().map(|connection| &connection.label);
        let datagrams = self.datagrams.iter().map(|listener| &listener.label);
        listeners.chain(connection).chain(datagrams).collect()
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
    listener: &SocketLabel,
    target: &Target,
    has_command: bool,
) -> Result<(), String> {
    match target {
        Target::Address(address) if listener.address.accepts(address) => {}
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
