//! Scrapers of metrics as they should not be: one that says a byte and no more, and 200 that ask and
//! never read, again every second; and an honest one, which has to be answered.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

const NEVER_READ: usize = 200;
const EVERY: Duration = Duration::from_secs(1);

/// What Prometheus gives a scrape by default.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that wait to be read: fewer than an answer has, and more.
const SMALL: usize = 2304;
const LARGE: usize = 128 * 1024;

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

/// All of them, until this is dropped.
pub(crate) struct Scrapers {
    is_over: Arc<AtomicBool>,
    failures: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Scrapers {
    pub(crate) fn start(address: SocketAddr) -> Self {
        let (is_over, failures) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (its_end, its_failures) = (Arc::clone(&is_over), Arc::clone(&failures));
        let thread = thread::spawn(move || {
            // It may not listen yet.
            while !its_end.load(Ordering::Relaxed) && TcpStream::connect(address).is_err() {
                thread::yield_now();
            }
            while !its_end.load(Ordering::Relaxed) {
                let slow = ask(address, &REQUEST[..1], SMALL);
                let never_read: Vec<_> =
                    (0..NEVER_READ).map(|_| ask(address, REQUEST, SMALL)).collect();
                if !is_answered(address) {
                    its_failures.fetch_add(1, Ordering::Relaxed);
                }
                thread::park_timeout(EVERY);
                drop((slow, never_read));
            }
        });
        Self { is_over, failures, thread: Some(thread) }
    }

    /// How often the honest one was not answered.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}

impl Drop for Scrapers {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn ask(address: SocketAddr, request: &[u8], buffer: usize) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    socket.set_recv_buffer_size(buffer).ok()?;
    socket.connect_timeout(&address.into(), PATIENCE).ok()?;
    let mut stream = TcpStream::from(socket);
    // A scraper that had to give way is reset.
    let _ = stream.write_all(request);
    Some(stream)
}

fn is_answered(address: SocketAddr) -> bool {
    let mut answer = String::new();
    let read = ask(address, REQUEST, LARGE).is_some_and(|mut stream| {
        let _ = stream.set_read_timeout(Some(PATIENCE));
        stream.read_to_string(&mut answer).is_ok()
    });
    read && answer.starts_with("HTTP/1.1 200")
}
