//! What connections share: all of them, and those of one event loop.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::backend::Backend;
use crate::backend::connect::Connector;
use crate::backend::lifecycle::Lifecycle;
use crate::backend::prober::SharedProber;
use crate::backend::readiness::Readiness;
use crate::backend::wait::BackendWait;
use crate::config::timespan::TimeSpan;
use crate::counters::{ByteCounters, LoopCounters, Loops};
use crate::forward::loop_buffers::LoopBuffers;
use crate::forward::pipe::PipeLimits;
use crate::forward::registry::Registry;
use crate::handover::{Detached, Handover};
use crate::limits::passed::PassedRoom;
use crate::socket::proxy_protocol::ProxyProtocol;

/// What all connections share, on whatever event loop.
#[derive(Clone, Debug)]
pub struct Settings {
    pub backends: Vec<BackendSetup>,
    /// `--backend-wait=`: how long a client waits for its backend; zero means no wait.
    pub backend_wait: TimeSpan,
    /// `Some` if the proxy starts its one backend.
    pub lifecycle: Option<Arc<Lifecycle>>,
    /// The PROXY header that the backends expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// `--connection-idle-time=`.
    pub connection_idle_time: TimeSpan,
    /// Pipes for each event loop.
    pub pipes: PipeLimits,
    /// Room for descriptors that Unix peers pass to each other.
    pub passed: PassedRoom,
    /// Where connections are stored, with `--handover=`.
    pub handover: Option<Arc<Handover>>,
    /// Counters of all event loops.
    pub loops: Arc<Loops>,
}

/// How one backend is reached.
#[derive(Clone, Debug)]
pub struct BackendSetup {
    /// Connects to a backend that is up.
    pub connector: Connector,
    /// The prober of `--backend-wait=`, common to all event loops.
    pub prober: SharedProber,
    /// Those for clients with an IP address that the backend sees, IPv4 first.
    pub probers_by_family: [SharedProber; 2],
    /// Whether the backend is ready, with `--ready=http:` or `--ready=exec:`.
    pub readiness: Option<Arc<Readiness>>,
    /// What sessions notify when they find the backend up, if only datagrams lead to it.
    pub datagrams_only: Option<Arc<Notify>>,
    /// The same, if COMMAND is ready then.
    pub found_up: Option<Arc<Notify>>,
}

/// What the connections of one event loop share.
#[derive(Debug)]
pub struct LoopContext {
    pub backends: Vec<Backend>,
    /// The PROXY header that the backends expect.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The forwarder's buffer and pipes.
    pub shared: Rc<LoopBuffers>,
    /// The connections, which are asked to detach or to report, and are closed when they are idle.
    pub registry: Rc<Registry>,
    /// Detached connections that are not stored yet.
    pub detached: RefCell<Vec<Detached>>,
    counters: Vec<Arc<ByteCounters>>,
}

impl LoopContext {
    pub fn new(settings: &Settings) -> Self {
        let LoopCounters { bytes, pipes } = settings.loops.add(settings.backends.len());
        let wait = settings.backend_wait;
        let backend = |setup: &BackendSetup| {
            let BackendSetup { connector, prober, probers_by_family, .. } = setup.clone();
            let backend_wait = |connector: Connector, prober: SharedProber| {
                let BackendSetup { readiness, datagrams_only, .. } = setup.clone();
                Rc::new(BackendWait::new(connector, wait, prober, readiness, datagrams_only))
            };
            let by_family = connector.by_family().map(|[ipv4, ipv6]| {
                let [prober4, prober6] = probers_by_family;
                [backend_wait(ipv4, prober4), backend_wait(ipv6, prober6)]
            });
            let lifecycle = settings.lifecycle.clone();
            Backend { backend_wait: backend_wait(connector, prober), by_family, lifecycle }
        };
        Self {
            backends: settings.backends.iter().map(backend).collect(),
            proxy_protocol: settings.proxy_protocol,
            shared: Rc::new(LoopBuffers::new(settings.pipes, pipes, settings.passed.clone())),
            registry: Rc::new(Registry::new(settings.connection_idle_time.finite())),
            detached: RefCell::default(),
            counters: bytes,
        }
    }

    /// Returns the byte counters of a backend; `None` stands for all that are no longer configured.
    pub fn byte_counters(&self, backend: Option<usize>) -> Arc<ByteCounters> {
        Arc::clone(&self.counters[backend.unwrap_or(self.backends.len())])
    }
}
