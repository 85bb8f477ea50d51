//! Where clients come from: listeners, passed by systemd or opened here, or the one connection that
//! was passed instead of them.

pub mod accepted;
pub mod bind;
pub mod listener;
pub mod stored;
#[expect(unsafe_code, reason = "it takes ownership of descriptors by number")]
pub mod activation;

use std::rc::Rc;

use crate::config::listen_address::ListenAddress;
use crate::config::target::Target;
use crate::listen::accepted::AcceptedSocket;
use crate::listen::activation::PassedFd;
use crate::listen::bind::open;
use crate::listen::listener::Listener;
use crate::listen::stored::StoredListener;
use crate::socket::Keepalive;
use crate::socket::address::SocketLabel;

/// What was passed or opened.
#[derive(Debug)]
pub enum Sources {
    /// At least one.
    Listeners(Vec<Rc<Listener>>),
    /// Somebody who has come in already.
    Connection(AcceptedSocket),
    /// None, and none is needed: what there is to serve was stored.
    Stored,
}

impl Sources {
    /// Takes what was passed, or opens what is asked for, unless the process before this one had.
    ///
    /// # Errors
    /// One line on what is missing, or can't be used.
    pub async fn gather(
        addresses: &[ListenAddress],
        inherited: Vec<PassedFd>,
        stored: &mut Vec<StoredListener>,
        has_connections: bool,
    ) -> Result<Self, String> {
        match (addresses.is_empty(), inherited.is_empty()) {
            (true, true) if has_connections => Ok(Self::Stored),
            (true, true) => {
                Err("Didn't get any sockets passed in. (Start it from a .socket unit, \
                                 or open one with --listen=ADDRESS.)"
                    .into())
            }
            (false, false) => {
                Err("Got sockets passed in and --listen= as well; one of them has to go.".into())
            }
            (true, false) => Self::adopt(inherited),
            (false, true) => {
                let mut listeners = Vec::new();
                for address in addresses {
                    for listener in open(address, stored).await? {
                        tracing::info!("Listening on {listener}.");
                        listeners.push(Rc::new(listener));
                    }
                }
                // What is not asked for any more.
                stored.drain(..).for_each(StoredListener::close);
                Ok(Self::Listeners(listeners))
            }
        }
    }

    fn adopt(mut inherited: Vec<PassedFd>) -> Result<Self, String> {
        match inherited.iter().position(AcceptedSocket::is_connected) {
            None => {
                let listeners = inherited.into_iter().map(|it| Listener::adopt(it).map(Rc::new));
                listeners.collect::<Result<_, _>>().map(Self::Listeners)
            }
            Some(index) if inherited.len() == 1 => {
                AcceptedSocket::adopt(inherited.remove(index)).map(Self::Connection)
            }
            Some(index) => Err(format!(
                "Passed in socket {} is connected, and has to be the only one. (It serves one \
                 connection with Accept=yes, and all with Accept=no.)",
                inherited[index].name
            )),
        }
    }

    /// Each as selectors know it.
    pub fn identities(&self) -> Vec<&SocketLabel> {
        match self {
            Self::Listeners(listeners) => listeners.iter().map(|it| it.identity()).collect(),
            Self::Connection(connection) => vec![connection.identity()],
            Self::Stored => Vec::new(),
        }
    }

    /// Has TCP clients probed.
    pub fn keep_alive(&self, keepalive: Keepalive) {
        match self {
            Self::Listeners(listeners) => {
                listeners.iter().for_each(|listener| listener.keep_alive(keepalive));
            }
            Self::Connection(connection) => connection.keep_alive(keepalive),
            Self::Stored => {}
        }
    }
}

/// COMMAND can't serve an address that we have taken. (A passed socket may be of another network
/// namespace, and then it can.)
pub fn check_command_target(
    target: &Target,
    listeners: &[(Rc<Listener>, usize)],
) -> Result<(), String> {
    let Target::Address(address) = target else { return Ok(()) };
    match listeners.iter().find(|(listener, _)| listener.identity().address.accepts(address)) {
        Some((listener, _)) => Err(format!(
            "--listen={listener} takes the address of TARGET {target}; let COMMAND listen on \
             another."
        )),
        None => Ok(()),
    }
}

/// Nobody is carried back to where they came in.
pub fn check_no_loop(listener: &Listener, target: &Target) -> Result<(), String> {
    match target {
        Target::Address(address) if listener.identity().address.accepts(address) => Err(format!(
            "--listen={listener} leads to itself, TARGET {target}; let the backend listen on another \
             address."
        )),
        _ => Ok(()),
    }
}
