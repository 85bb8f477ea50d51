//! The life of a connection: dial, header, forward, outcome.

#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::address::Address;
use crate::admission::{Permit, Seat};
use crate::application::Application;
use crate::backend::Backend;
use crate::descriptors::Reserved;
use crate::dial::Dialer;
use crate::flow::{Carried, Shared};
use crate::forward::{Ending, Pair, Side};
use crate::hold::{Hold, Probing};
use crate::listen::Entrance;
use crate::logging::{RateLimit, in_words};
use crate::pipe::Limits;
use crate::proxy_header::ProxyProtocol;
use crate::quiet::Watch;
use crate::socket::Socket;
use crate::timespan::TimeSpan;

/// How long the last bytes of a Unix client that has closed wait for a backend.
const LAST_WORDS: Duration = Duration::from_millis(800);

static UNREACHABLE: RateLimit = RateLimit::new(10, Duration::from_secs(10));
static QUIET: RateLimit = RateLimit::new(10, Duration::from_secs(10));

/// What all connections have in common, wherever they live.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The ways to the backends.
    pub ways: Vec<Way>,
    /// How long a client is held until its backend is up; zero is not at all.
    pub backend_wait: TimeSpan,
    /// What serves the one backend, if that is ours to start.
    pub application: Option<Arc<Application>>,
    /// The header they expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How long a connection may carry nothing.
    pub connection_idle_time: TimeSpan,
    /// Pipes for each event loop.
    pub pipes: Limits,
}

/// The way to one backend.
#[derive(Clone, Debug)]
pub struct Way {
    /// To one that is up.
    pub dialer: Dialer,
    /// Who looks whether it is.
    pub probing: Probing,
}

/// What the connections of one event loop have in common.
#[derive(Debug)]
pub struct Route {
    /// The ways to the backends.
    pub backends: Vec<Backend>,
    /// The header they expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The forwarder's buffer and pipes.
    pub shared: Rc<Shared>,
    /// Who ends the quiet ones, if they are to be ended.
    pub watch: Option<Rc<Watch>>,
}

impl Route {
    /// The plan, for one event loop; `carried` counts its bytes.
    pub fn new(plan: &Plan, carried: Arc<Carried>) -> Self {
        let wait = plan.backend_wait;
        let backend = |Way { dialer, probing }: &Way| {
            let hold = Rc::new(Hold::new(dialer.clone(), wait, probing.clone()));
            Backend::new(hold, wait, plan.application.clone())
        };
        Self {
            backends: plan.ways.iter().map(backend).collect(),
            proxy_protocol: plan.proxy_protocol,
            shared: Rc::new(Shared::new(plan.pipes, carried)),
            watch: plan.connection_idle_time.finite().map(|time| Rc::new(Watch::new(time))),
        }
    }
}

/// Somebody who was accepted and admitted, on their event loop.
#[derive(Debug)]
pub struct Client {
    /// Where they are.
    pub socket: Socket,
    /// Who they are.
    pub address: Address,
    /// Where they came in.
    pub entrance: Arc<Entrance>,
    /// Which backend they are for.
    pub backend: usize,
    /// What they take up until the connection is over.
    pub place: Place,
}

/// What a connection takes up: given back when this is dropped, in this order.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not read")]
pub struct Place {
    pub(crate) entered: Seat,
    pub(crate) seat: Seat,
    // After the above: its end is what others look at those counts for.
    pub(crate) permit: Permit,
    // After the permit: with `--overflow=wait`, whoever is accepted for it is not to meet the cap.
    pub(crate) reserved: Reserved,
}

/// Serves a client until the connection is over, and logs how it was.
///
/// Dropped before that, it resets both sides.
pub fn serve(client: Client, route: Rc<Route>) -> impl Future<Output = ()> {
    let start = Instant::now();
    let Client { socket, address, entrance, backend, place } = client;
    // An async fn would keep its arguments twice, in each of thousands of connections.
    async move {
        let way = &route.backends[backend];
        let log = |outcome: &str, from_client: u64, from_backend: u64| {
            tracing::debug!(
                client = %address,
                listener = %entrance,
                backend = %way.target(),
                bytes_from_client = from_client,
                bytes_from_backend = from_backend,
                duration_usec = start.elapsed().as_micros() as u64,
                "{outcome}"
            );
        };
        // Boxed: what dialling needs is gone when the connection stands, which may be for days.
        let backend = match Box::pin(reach(&socket, way)).await {
            Reached::Backend(backend) => backend,
            Reached::Nobody(error) => {
                if let Some(suppressed) = UNREACHABLE.pass() {
                    tracing::warn!(
                        client = %address,
                        listener = %entrance,
                        backend = %way.target(),
                        "{error}{suppressed}"
                    );
                }
                socket.close();
                return log("Connection closed, there is no backend", 0, 0);
            }
            Reached::TooLate => return log("Connection closed, the client has left", 0, 0),
        };
        let header = match route.proxy_protocol {
            Some(version) => {
                let reached = socket.local_address();
                version.header(&address, &reached.unwrap_or(Address::Unix(None)))
            }
            None => Vec::new(),
        };
        tracing::debug!(client = %address, listener = %entrance, "Connection established");
        let (shared, watched) = (Rc::clone(&route.shared), route.watch.as_ref().map(Watch::join));
        let Ok(closed) = Pair::new(socket, backend, header, shared, watched).run().await else {
            return;
        };
        drop(place);
        if closed.end == Ending::Quiet
            && let Some(watch) = &route.watch
            && let Some(suppressed) = QUIET.pass()
        {
            tracing::info!(
                client = %address,
                listener = %entrance,
                backend = %way.target(),
                "Connection carried nothing for {}, closing it.{suppressed}",
                TimeSpan::new(watch.idle_time())
            );
        }
        log(&outcome(closed.end), closed.from_client, closed.from_backend);
    }
}

/// What came of dialling.
enum Reached {
    Backend(Socket),
    Nobody(String),
    TooLate,
}

/// Connects to the backend, unless the client leaves first.
async fn reach(client: &Socket, backend: &Backend) -> Reached {
    tokio::select! {
        biased;
        dialled = backend.connect() => dialled.map_or_else(Reached::Nobody, Reached::Backend),
        () = left(client, backend.holds()) => Reached::TooLate,
    }
}

/// Waits until the client of a dial has gone: reset, or a Unix client that closed. (A FIN says only
/// that it waits for its answer.) Its last bytes wait for the backend, but where clients are held,
/// which may be for long, not for long.
async fn left(client: &Socket, held: bool) {
    let gone = poll_fn(|cx| client.poll_hung_up(cx)).await.is_ok();
    let unread = client.has_unread();
    if !gone || (unread && !held) {
        std::future::pending().await
    }
    if unread {
        Box::pin(sleep(LAST_WORDS)).await;
    }
}

fn outcome(end: Ending) -> String {
    let (side, errno) = match end {
        Ending::Closed => return "Connection closed".into(),
        Ending::Quiet => return "Connection closed, it was idle".into(),
        Ending::Fault(Side::Client, errno) => ("client", errno),
        Ending::Fault(Side::Backend, errno) => ("backend", errno),
    };
    let words = in_words(&errno.into());
    format!("Connection ended by the {side}: {words}")
}
