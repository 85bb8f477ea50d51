//! The HTTP server of `--metrics=`, on a thread of its own, so that no scraper delays a client.
//!
//! A slow scraper cannot exhaust the exporter. At most [`SCRAPERS_MAX`] requests are served at once; a further one
//! replaces the oldest request of the address that has the most. A finished response waits until its scraper
//! has read it, at most [`UNACKED_MAX`] of them: the kernel would keep a response that is only closed for
//! minutes. A request must complete within two seconds, or it is reset. hyper reads at most
//! [`REQUEST_MAX`] bytes of it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{poll_fn, ready};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::registry::Registry;
use rustix::io::Errno;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::{AbortHandle, JoinSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::listen_address::MetricsAddress;
use crate::limits::descriptors::{SCRAPERS_MAX, UNACKED_MAX};
use crate::listen::activation::{PassedFd, take_matching};
use crate::listen::bind::open;
use crate::listen::listener::{ACCEPT_PAUSE, Listener, is_peer_error};
use crate::listen::stored::SocketFile;
use crate::logging::{RateLimit, os_message};
use crate::runtime;
use crate::runtime::start_thread;
use crate::socket::Family;
use crate::socket::address::Address;
use crate::socket::sys::register;
use crate::socket::sys::{accept, outq_len};

/// For one of them, from accept to close.
const REQUEST_TIME: Duration = Duration::from_secs(2);

/// Scrapers that are accepted between two pauses: what a flood may cost is bounded. However many addresses
/// it comes from, a place lasts for 64 ms, and a faster flood waits in the kernel, with the requests of
/// others, which are answered as soon as they are accepted.
const BURST: usize = 4;
const BURST_PAUSE: Duration = Duration::from_millis(1);

/// Bytes of a request; hyper's least.
const REQUEST_MAX: usize = 8192;

/// Bytes of an answer that are the kernel's at a time; it takes twice that.
const SEND_BUFFER: usize = 32 * 1024;

/// Turns of the event loop in which a request that is there is read, and its answer written.
const TURNS: usize = 4;

/// Between two looks whether all was taken.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

static ACCEPT_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// Where scrapers come in. When this is dropped, its socket files go.
#[derive(Debug)]
pub struct Exporter {
    listeners: Vec<(OwnedFd, Family)>,
    _files: Vec<SocketFile>,
}

impl Exporter {
    /// Opens the sockets, or takes them out of those that were passed.
    ///
    /// # Errors
    /// What is wrong, in words that follow the option.
    pub async fn open(
        address: &MetricsAddress,
        inherited: &mut Vec<PassedFd>,
    ) -> Result<Self, String> {
        let listeners = match address {
            MetricsAddress::Open(address) => open(address, &mut Vec::new()).await?,
            MetricsAddress::Passed(name) => {
                let passed = take_matching(inherited, |it| it.name == *name).into_iter();
                let listeners = passed.map(Listener::adopt).collect::<Result<Vec<_>, _>>()?;
                if listeners.is_empty() {
                    // The metrics are missing, and clients are served all the same.
                    tracing::warn!(
                        "--metrics={address}: no socket of that name was passed in, there are no \
                         metrics. (Does its .socket unit run, and has it FileDescriptorName=?)"
                    );
                }
                listeners
            }
        };
        let (mut parts, mut files) = (Vec::new(), Vec::new());
        for listener in listeners {
            let name = listener.to_string();
            let (fd, family, file) = listener.into_parts();
            if family == Family::Vsock {
                return Err(format!("{name} has to be TCP or a Unix socket."));
            }
            tracing::info!("Metrics on {name}.");
            parts.push((fd, family));
            files.extend(file);
        }
        Ok(Self { listeners: parts, _files: files })
    }

    /// Answers scrapers from now on, until the process ends.
    ///
    /// # Errors
    /// When there is no thread for it, or no event loop.
    pub fn serve(&mut self, registry: Registry) -> io::Result<()> {
        let listeners = std::mem::take(&mut self.listeners);
        if listeners.is_empty() {
            return Ok(());
        }
        start_thread("proxyd-metrics", async move || live(listeners, registry).await).map(drop)
    }
}

/// The life of the thread.
async fn live(listeners: Vec<(OwnedFd, Family)>, registry: Registry) {
    let scrapers = Rc::new(Scrapers {
        registry,
        active: TaskSet::new(SCRAPERS_MAX),
        draining: TaskSet::new(UNACKED_MAX),
    });
    let mut accepting = JoinSet::new();
    for (fd, family) in listeners {
        accepting.spawn_local(admit(fd, family, Rc::clone(&scrapers)));
    }
    while let Some(ended) = accepting.join_next().await {
        let why = match ended {
            Ok(Err(error)) => os_message(&error),
            Err(panic) => panic.to_string(),
        };
        tracing::error!("Failed to listen for scrapers: {why}");
    }
}

/// Lets scrapers in at one socket, until it breaks. A panic costs the scraper that it met.
async fn admit(fd: OwnedFd, family: Family, scrapers: Rc<Scrapers>) -> io::Result<Infallible> {
    let listener = register(fd, Interest::READABLE)?;
    let accept = async || loop {
        let mut ready = listener.readable().await?;
        match accept(&listener) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            accepted => {
                let (fd, address) = accepted?;
                return io::Result::Ok((fd, Peer::of(&Address::from_sockaddr(&address))));
            }
        }
    };
    loop {
        let admitted = if family == Family::Tcp {
            let accept = async || {
                let (fd, peer) = accept().await?;
                Ok((TcpStream::from_std(fd.into())?, peer))
            };
            runtime::catch_panic(scrapers.admit(accept)).await
        } else {
            let accept = async || {
                let (fd, peer) = accept().await?;
                Ok((UnixStream::from_std(fd.into())?, peer))
            };
            runtime::catch_panic(scrapers.admit(accept)).await
        };
        match admitted {
            Some(broken) => return broken,
            None => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// A scraper's socket.
trait Stream: AsyncRead + AsyncWrite + AsFd + Unpin + 'static {
    /// Waits until a byte has come, or the end.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

impl Stream for TcpStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }
}

impl Stream for UnixStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }
}

/// As many as may be somewhere at a time. One more takes the place of the first of the peer that has the
/// most, so that a flood from one peer is in its own way only.
#[derive(Debug)]
struct TaskSet {
    taken: RefCell<VecDeque<(Peer, AbortHandle)>>,
    max: usize,
}

/// What scrapers have in common that one machine can make in any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Peer {
    /// An IPv4 address, as IPv6 has it, or the 64 bits of an IPv6 address that a network has.
    Network(u128),
    /// This machine, by a Unix socket.
    Local,
}

impl Peer {
    fn of(address: &Address) -> Self {
        let Address::Inet(address) = address else { return Self::Local };
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => Self::Network(ip.to_ipv6_mapped().into()),
            IpAddr::V6(ip) => Self::Network(u128::from(ip) >> 64 << 64),
        }
    }
}

impl TaskSet {
    fn new(max: usize) -> Self {
        Self { taken: RefCell::default(), max }
    }

    fn take(&self, peer: Peer, task: AbortHandle) {
        let mut taken = self.taken.borrow_mut();
        taken.retain(|(_, task)| !task.is_finished());
        taken.push_back((peer, task));
        if taken.len() > self.max {
            let mut counts = HashMap::new();
            taken.iter().for_each(|(peer, _)| *counts.entry(*peer).or_insert(0) += 1);
            // The oldest one of all peers that have as many.
            let most = counts.values().max().copied();
            let first = taken.iter().position(|(peer, _)| counts.get(peer).copied() == most);
            if let Some((_, task)) = first.and_then(|first| taken.remove(first)) {
                task.abort();
            }
        }
    }
}

/// Those who ask, and what they ask for.
struct Scrapers {
    registry: Registry,
    /// Those who have not been answered.
    active: TaskSet,
    /// Those whose answer is the kernel's, and not yet theirs.
    draining: TaskSet,
}

impl Scrapers {
    async fn admit<S: Stream>(
        self: &Rc<Self>,
        accept: impl AsyncFn() -> io::Result<(S, Peer)>,
    ) -> io::Result<Infallible> {
        let mut in_burst = 0;
        loop {
            match accept().await {
                Ok((stream, peer)) => {
                    // Not on the listener, which may be somebody's after us. Dropped, it is reset.
                    let socket = SockRef::from(&stream);
                    let _ = socket.set_send_buffer_size(SEND_BUFFER);
                    let _ = socket.set_linger(Some(Duration::ZERO));
                    let this = Rc::clone(self);
                    let deadline = Instant::now() + REQUEST_TIME;
                    let serve = async move {
                        if let Ok(stream) = timeout_at(deadline, this.serve(stream)).await {
                            let taken = async move { timeout_at(deadline, taken(stream)).await };
                            this.draining.take(peer, spawn_local(taken).abort_handle());
                        }
                    };
                    self.active.take(peer, spawn_local(serve).abort_handle());
                    // Whoever was queued has asked already: time for the answer, before the next comes.
                    for _ in 0..TURNS {
                        yield_now().await;
                    }
                }
                Err(error) if Errno::from_io_error(&error).is_some_and(is_peer_error) => {}
                Err(error) => {
                    if let Some(suppressed) = ACCEPT_FAILED.pass() {
                        let error = os_message(&error);
                        tracing::warn!(
                            "Failed to accept a scraper, trying again: {error}{suppressed}"
                        );
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
            in_burst = (in_burst + 1) % BURST;
            if in_burst == 0 {
                sleep(BURST_PAUSE).await;
            }
        }
    }

    /// Answers one request, if only that it is none.
    async fn serve<S: Stream>(&self, stream: S) -> S {
        // A scraper that says nothing takes up none of hyper's buffers.
        let _ = poll_fn(|cx| stream.poll_readable(cx)).await;
        let answer = service_fn(|request| ready(Ok::<_, Infallible>(self.answer(&request))));
        let mut http = http1::Builder::new();
        // One who stays would have a place that others need.
        // A scraper may end its side after the request: it still waits for the answer.
        http.keep_alive(false).half_close(true).max_buf_size(REQUEST_MAX);
        let mut connection = http.serve_connection(TokioIo::new(stream), answer);
        if let Err(error) = poll_fn(|cx| connection.poll_without_shutdown(cx)).await {
            tracing::debug!("A scraper was not served: {error}");
        }
        connection.into_parts().io.into_inner()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<String> {
        let text = |status, text: &str| {
            let mut response = Response::new(text.to_string());
            *response.status_mut() = status;
            response
        };
        if request.uri().path() != "/metrics" {
            return text(StatusCode::NOT_FOUND, "The metrics are at /metrics.\n");
        }
        if ![Method::GET, Method::HEAD].contains(request.method()) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let mut response = Response::new(String::new());
        let body = response.body_mut();
        let (format, encoded) = if accepts_openmetrics(request.headers()) {
            (OPENMETRICS, text::encode(body, &self.registry))
        } else {
            (prometheus_text::CONTENT_TYPE, prometheus_text::encode(body, &self.registry))
        };
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format));
        if encoded.is_err() {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        response
    }
}

/// Waits until a scraper has taken its answer: it closes then, having been told to, or has only said
/// that it asks nothing more.
async fn taken(mut stream: impl AsyncRead + AsyncWrite + AsFd + Unpin) {
    let mut rest = [0; 512];
    let mut said = 0;
    if stream.shutdown().await.is_err() {
        return;
    }
    while let Ok(bytes @ 1..) = stream.read(&mut rest).await {
        said += bytes;
        if said > REQUEST_MAX {
            return;
        }
    }
    while outq_len(&stream) > 0 {
        sleep(LOOK_AGAIN).await;
    }
}

/// Whether the client lists OpenMetrics in `Accept:`, with a weight above 0.
fn accepts_openmetrics(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        let format = parts.next().unwrap_or_default();
        let mut weights = parts.filter_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
        format.eq_ignore_ascii_case("application/openmetrics-text") && weights.all(|q| q > 0.0)
    })
}

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openmetrics_is_for_clients_that_accept_it() {
        let accepts = |accept| {
            let accept = HeaderValue::from_static(accept);
            accepts_openmetrics(&HeaderMap::from_iter([(ACCEPT, accept)]))
        };
        assert!(accepts(
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
        ));
        for accept in ["*/*", "", "application/openmetrics-text;q=0, text/plain"] {
            assert!(!accepts(accept), "{accept}");
        }
    }
}
