//! Who asks for the metrics: HTTP on a thread of its own, so that no scraper is in a client's way.
//!
//! Nobody can hold on to it: four are served at a time, the next one takes the place of the one who has
//! been there longest, newcomers come one a millisecond, and all is over after two seconds. So 200 that
//! never say anything don't keep a well-behaved one waiting. (hyper reads what they say, and at most
//! [`BUFFER_MAX`] of it.)

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net as unix;
use std::rc::Rc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::{AbortHandle, JoinSet, spawn_local};
use tokio::time::{sleep, timeout};

use crate::activation::Inherited;
use crate::exposition::Form;
use crate::listen::{Listener, SocketFile};
use crate::logging::{RateLimit, in_words};
use crate::metrics::Metrics;
use crate::open::{ListenAddress, open};
use crate::socket::Family;
use crate::worker::start_thread;

/// Scrapers that are served at a time.
pub const SCRAPERS_MAX: usize = 4;

/// For one of them, from accept to close.
const REQUEST_TIME: Duration = Duration::from_secs(2);

/// Between two newcomers: what a flood of them may cost.
const ACCEPT_PAUSE: Duration = Duration::from_millis(1);

/// After accept(2) found the system short of something.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(200);

/// Bytes of a request; hyper's least.
const BUFFER_MAX: usize = 8192;

static ACCEPT_FAILED: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// The value of `--metrics=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddress {
    /// To be opened.
    Open(ListenAddress),
    /// Passed by systemd, with this `FileDescriptorName=`.
    Passed(String),
}

impl MetricsAddress {
    /// Reads `fd:NAME`, or what `--listen=` takes, but vsock, which no scraper speaks.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        match text.as_bytes().strip_prefix(b"fd:") {
            Some(b"") => Err("fd: stands before the FileDescriptorName= of a passed socket".into()),
            Some(name) => Ok(Self::Passed(String::from_utf8_lossy(name).into())),
            None => match ListenAddress::parse(text)? {
                ListenAddress::Vsock(_) => Err("it has to be TCP or a Unix socket".into()),
                address => Ok(Self::Open(address)),
            },
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(address) => address.fmt(f),
            Self::Passed(name) => write!(f, "fd:{name}"),
        }
    }
}

/// Where scrapers come in. When this is dropped, its socket files go.
#[derive(Debug)]
pub struct Scrapes {
    doors: Vec<(OwnedFd, Family)>,
    _files: Vec<SocketFile>,
}

impl Scrapes {
    /// Opens the sockets, or takes them out of those that were passed.
    ///
    /// # Errors
    /// One line that names the option.
    pub async fn open(
        address: &MetricsAddress,
        inherited: &mut Vec<Inherited>,
    ) -> Result<Self, String> {
        let listeners = match address {
            MetricsAddress::Open(address) => open(address, &mut Vec::new()).await?,
            MetricsAddress::Passed(name) => {
                let passed = inherited.extract_if(.., |it| it.name == *name);
                let listeners = passed.map(Listener::adopt).collect::<Result<Vec<_>, _>>()?;
                if listeners.is_empty() {
                    return Err("no socket of that name was passed in. (Write \
                                FileDescriptorName= in its .socket unit.)"
                        .into());
                }
                listeners
            }
        };
        let (mut doors, mut files) = (Vec::new(), Vec::new());
        for listener in listeners {
            let name = listener.to_string();
            let (fd, family, file) = listener.into_parts();
            if family == Family::Vsock {
                return Err(format!("{name} has to be TCP or a Unix socket."));
            }
            tracing::info!("Metrics on {name}.");
            doors.push((fd, family));
            files.extend(file);
        }
        Ok(Self { doors, _files: files })
    }

    /// How many sockets there are.
    pub fn sockets(&self) -> usize {
        self.doors.len()
    }

    /// Answers scrapers from now on, until the process ends.
    ///
    /// # Errors
    /// When there is no thread for it, or no event loop.
    pub fn serve(&mut self, metrics: Metrics) -> io::Result<()> {
        let doors = std::mem::take(&mut self.doors);
        start_thread("proxyd-metrics", async move || live(doors, metrics).await).map(drop)
    }
}

/// The life of the thread.
async fn live(doors: Vec<(OwnedFd, Family)>, metrics: Metrics) {
    let desk = Rc::new(Desk { metrics, served: RefCell::default() });
    let mut accepting = JoinSet::new();
    for (fd, family) in doors {
        accepting.spawn_local(admit(fd, family, Rc::clone(&desk)));
    }
    while let Some(ended) = accepting.join_next().await {
        if let Ok(Err(error)) = ended {
            tracing::error!("Failed to listen for scrapers: {}", in_words(&error));
        }
    }
}

/// Lets scrapers in at one socket, until it breaks.
async fn admit(fd: OwnedFd, family: Family, desk: Rc<Desk>) -> io::Result<Infallible> {
    if family == Family::Tcp {
        let listener = TcpListener::from_std(net::TcpListener::from(fd))?;
        loop {
            desk.take(listener.accept().await.map(|(stream, _)| stream)).await;
        }
    }
    let listener = UnixListener::from_std(unix::UnixListener::from(fd))?;
    loop {
        desk.take(listener.accept().await.map(|(stream, _)| stream)).await;
    }
}

/// Where they are served.
struct Desk {
    metrics: Metrics,
    /// The one who has been there longest is the first.
    served: RefCell<VecDeque<AbortHandle>>,
}

impl Desk {
    /// Begins to serve a newcomer, and waits for the time of the next.
    async fn take<S>(self: &Rc<Self>, newcomer: io::Result<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let stream = match newcomer {
            Ok(stream) => stream,
            Err(error) => {
                if let Some(suppressed) = ACCEPT_FAILED.pass() {
                    let error = in_words(&error);
                    tracing::warn!("Failed to accept a scraper, trying again: {error}{suppressed}");
                }
                return sleep(SHORTAGE_PAUSE).await;
            }
        };
        {
            let mut served = self.served.borrow_mut();
            served.retain(|scraper| !scraper.is_finished());
            if served.len() >= SCRAPERS_MAX
                && let Some(longest) = served.pop_front()
            {
                longest.abort();
            }
            let desk = Rc::clone(self);
            let serve = async move { timeout(REQUEST_TIME, desk.serve(stream)).await };
            served.push_back(spawn_local(serve).abort_handle());
        }
        sleep(ACCEPT_PAUSE).await;
    }

    async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let answer = service_fn(async |request| Ok::<_, Infallible>(self.answer(&request)));
        let mut http = http1::Builder::new();
        // One who stays would have a place that others need.
        http.keep_alive(false).max_buf_size(BUFFER_MAX);
        if let Err(error) = http.serve_connection(TokioIo::new(stream), answer).await {
            tracing::debug!("A scraper was not served: {error}");
        }
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
        let accept = request.headers().get_all(ACCEPT).iter();
        let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
        let form = Form::accepted(&accept.join(","));
        let mut response = Response::new(self.metrics.render(form));
        let kind = HeaderValue::from_static(form.content_type());
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    }
}
