//! The HTTP server of `--metrics=`. It runs on a thread of its own, so that no scraper delays a
//! client.
//!
//! A slow scraper cannot exhaust the exporter. At most [`SCRAPERS_MAX`] requests are open at once;
//! a further request replaces the oldest of the source that has the most. A request lasts at most
//! two seconds from accept to close. That includes the time in which its response waits in the
//! kernel to be read: a socket that is only closed would keep a response in memory for minutes.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::ready;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::{prometheus_text, text};
use prometheus_client::registry::Registry;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::{sleep, timeout};

use crate::config::listen_address::ListenAddress;
use crate::limits::descriptors::{FdBudget, SCRAPERS_MAX};
use crate::listen::accepted::Accepted;
use crate::listen::activation::PassedFd;
use crate::listen::bind;
use crate::listen::listener::{ACCEPT_PAUSE, Listener};
use crate::listen::stored::{SocketFile, StoredListener};
use crate::logging::os_message;
use crate::runtime::{catch_panic, start_thread};
use crate::socket::address::{Address, Source};
use crate::socket::sys::outq_len;

/// The sockets of `--metrics=`. Their socket files are removed when this is dropped.
#[derive(Debug, Default)]
pub struct Exporter {
    sockets: Vec<OwnedFd>,
    files: Vec<SocketFile>,
}

impl Exporter {
    /// Opens the sockets. A listener of the previous process that has the address is taken out of
    /// `stored`.
    ///
    /// # Errors
    /// What is wrong, in words that follow the option.
    pub async fn open(
        address: &ListenAddress,
        stored: &mut Vec<StoredListener>,
    ) -> Result<Self, String> {
        let mut none = Vec::new();
        // Port 0 would take any listener, to which clients of the proxy may still come.
        let stored = if address.has_any_port() { &mut none } else { stored };
        let opened = bind::open(address, stored).await?.into_iter();
        let listeners = opened.map(|(fd, file)| Listener::from_fd(fd, None, file));
        Self::new(listeners.collect::<Result<_, _>>().map_err(|error| os_message(&error))?)
    }

    /// Uses the sockets that systemd passed under `name`.
    ///
    /// # Errors
    /// What is wrong, in words that follow the option.
    pub fn from_passed(name: &str, sockets: Vec<PassedFd>) -> Result<Self, String> {
        if sockets.is_empty() {
            // The proxy works without metrics.
            tracing::warn!(
                "Failed to serve --metrics=fd:{name}: systemd passed no socket of that name. (Its \
                 .socket unit must be active and set FileDescriptorName=.)"
            );
        }
        let listeners = sockets.into_iter().map(Listener::from_passed);
        Self::new(listeners.collect::<Result<_, _>>()?)
    }

    fn new(listeners: Vec<Listener>) -> Result<Self, String> {
        let mut exporter = Self::default();
        for listener in listeners {
            if let Address::Vsock { .. } = listener.label.address {
                return Err(format!("{listener} must be a TCP or Unix socket."));
            }
            tracing::info!("Serving metrics on {listener}.");
            let (socket, file) = listener.into_parts();
            exporter.sockets.push(socket);
            exporter.files.extend(file);
        }
        Ok(exporter)
    }

    /// Starts the thread that answers scrapers until the process ends.
    ///
    /// # Errors
    /// Those of [`start_thread`].
    pub fn serve(&mut self, registry: Registry) -> io::Result<()> {
        let sockets = std::mem::take(&mut self.sockets);
        if sockets.is_empty() {
            return Ok(());
        }
        start_thread("proxyd-metrics", async move || run(sockets, registry).await)?;
        // A file of the previous process stays for the next one if the start fails.
        self.files.iter().for_each(|file| file.unlinks_on_drop.set(true));
        Ok(())
    }
}

/// Runs the accept loops of all sockets.
async fn run(sockets: Vec<OwnedFd>, registry: Registry) {
    let scrapers = Rc::new(Scrapers { registry, requests: RefCell::default() });
    let mut accepting = JoinSet::new();
    for socket in sockets {
        accepting.spawn_local(accept_loop(socket, Rc::clone(&scrapers)));
    }
    while let Some(ended) = accepting.join_next().await {
        if let Ok(Err(error)) = ended {
            tracing::error!("Failed to accept scrapers: {}.", os_message(&error));
        }
    }
}

/// Accepts scrapers at one socket until it breaks. A panic costs the scraper that met it.
async fn accept_loop(socket: OwnedFd, scrapers: Rc<Scrapers>) -> io::Result<Infallible> {
    let listener = Listener::from_fd(socket, None, None)?;
    // The limit on requests limits the descriptors as well.
    let unlimited = FdBudget::new(usize::MAX, usize::MAX);
    loop {
        for _ in 0..BURST {
            match catch_panic(listener.accept(&unlimited, || false)).await {
                Some(accepted) => scrapers.admit(accepted?),
                None => sleep(ACCEPT_PAUSE).await,
            }
        }
        sleep(BURST_PAUSE).await;
    }
}

/// What the requests of all sockets share.
struct Scrapers {
    registry: Registry,
    /// The open requests, from the oldest to the newest, each with its source. A Unix client has
    /// none.
    requests: RefCell<VecDeque<(Option<Source>, AbortHandle)>>,
}

impl Scrapers {
    /// Starts a request. At the limit another request gives way to it.
    fn admit(self: &Rc<Self>, accepted: Accepted) {
        let (source, this) = (accepted.client.source(), Rc::clone(self));
        let request = timeout(REQUEST_TIME, async move { this.serve(accepted.socket).await });
        let request = spawn_local(request).abort_handle();
        let mut requests = self.requests.borrow_mut();
        requests.retain(|(_, request)| !request.is_finished());
        requests.push_back((source, request));
        if requests.len() > SCRAPERS_MAX {
            let mut counts = HashMap::new();
            requests.iter().for_each(|(source, _)| *counts.entry(*source).or_insert(0) += 1);
            let most = counts.values().max();
            let oldest = requests.iter().position(|(source, _)| counts.get(source) == most);
            if let Some((_, request)) = oldest.and_then(|oldest| requests.remove(oldest)) {
                request.abort();
            }
        }
    }

    /// Answers one request, valid or not, and waits until the scraper has its response.
    async fn serve(&self, socket: OwnedFd) -> io::Result<()> {
        let options = SockRef::from(&socket);
        let _ = options.set_send_buffer_size(SEND_BUFFER);
        // A request that is given up is reset. Set here and not on the listener, which other
        // processes may share.
        let _ = options.set_linger(Some(Duration::ZERO));
        // tokio's TcpStream makes the same system calls for a Unix socket.
        let mut stream = TcpStream::from_std(socket.into())?;
        // hyper allocates its buffers when it is first polled; a silent scraper needs none.
        stream.readable().await?;
        if let Err(error) = self.answer(&mut stream).await {
            tracing::debug!("Failed to serve a scraper: {error}.");
        }
        drain(&mut stream).await
    }

    /// Reads a request and writes the response.
    async fn answer(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
    ) -> Result<(), hyper::Error> {
        let mut http = http1::Builder::new();
        // A scraper that half-closes after its request still waits for the response.
        http.keep_alive(false).half_close(true).max_buf_size(REQUEST_MAX);
        let service = service_fn(|request| ready(Ok::<_, Infallible>(self.respond(&request))));
        http.serve_connection(TokioIo::new(stream), service).await
    }

    fn respond(&self, request: &Request<Incoming>) -> Response<String> {
        let mut response = Response::new(String::new());
        match (request.method(), request.uri().path()) {
            (&Method::GET | &Method::HEAD, "/metrics") => {
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
            }
            (_, "/metrics") => {
                *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
                response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            _ => {
                *response.status_mut() = StatusCode::NOT_FOUND;
                *response.body_mut() = "The metrics are at /metrics.\n".into();
            }
        }
        response
    }
}

/// Answers one request as the server does.
#[cfg(any(test, fuzzing))]
pub async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin) -> Result<(), hyper::Error> {
    Scrapers { registry: Registry::default(), requests: RefCell::default() }.answer(stream).await
}

/// Waits until the scraper's kernel has acknowledged the response.
async fn drain(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    // The scraper closes once it has read the response, or it half-closes before.
    let mut rest = (&mut *stream).take(REQUEST_MAX as u64);
    while rest.read(&mut [0; 512]).await? > 0 {}
    while outq_len(&*stream) > 0 {
        sleep(ACK_INTERVAL).await;
    }
    Ok(())
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

/// The time of a request, from accept to close.
const REQUEST_TIME: Duration = Duration::from_secs(2);

/// The largest request in bytes; hyper allows no less.
const REQUEST_MAX: usize = 8192;

/// Bytes of a response that the kernel holds at a time; it doubles the value.
const SEND_BUFFER: usize = 32 * 1024;

/// Scrapers accepted between two pauses. A flood from any number of addresses then costs a bounded
/// amount of CPU, and leaves each request 64 ms before it gives way. A faster flood waits in the
/// kernel.
const BURST: usize = 4;
const BURST_PAUSE: Duration = Duration::from_millis(1);

/// How often to look whether the scraper has acknowledged everything. It has its response by then.
const ACK_INTERVAL: Duration = Duration::from_millis(50);

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
