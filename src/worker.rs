//! The event loops, and which of them a connection lives on.
//!
//! The main thread's loop accepts, and is the first to serve. With `--threads=` above one a client
//! goes to the loop with the fewest connections; a thread is started for the first one that finds
//! all loops at work. A connection stays on its loop from its dial to its end: its buffer, pipes
//! and timers are the loop's own, so that no byte meets a lock or a line of memory that
//! another thread writes.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::runtime::{Builder, LocalRuntime};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use crate::address::Address;
use crate::admission::Permit;
use crate::connection::{Client, Place, Plan, Returning, Route, resume, serve};
use crate::handover::Handover;
use crate::hold::Hold;
use crate::ledger::Kept;
use crate::listen::{Entrance, Newcomer};
use crate::logging::{RateLimit, in_words};
use crate::socket::{Family, Socket};
use crate::statistics::{Seat, Seats};

/// Shorter than the connect timeout by default.
const TIMER_AHEAD: Duration = Duration::from_secs(5);

/// How long to do with the threads there are, after the system refused one.
const SCARCE: Duration = Duration::from_secs(10);

static UNWATCHED: RateLimit = RateLimit::new(1, Duration::from_secs(60));
static NO_THREAD: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// An event loop for the thread that asks for it.
///
/// # Errors
/// epoll_create1(2)'s, eventfd(2)'s and the like.
pub fn event_loop() -> io::Result<LocalRuntime> {
    Builder::new_current_thread().enable_all().build_local(Default::default())
}

/// Starts a thread with an event loop for this life, and waits until it has it.
///
/// # Errors
/// clone(2)'s, and those of [`event_loop`].
pub fn start_thread(
    name: &str,
    life: impl AsyncFnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (made, is_made) = sync_channel(1);
    let live = move || {
        let event_loop = match event_loop() {
            Ok(event_loop) => event_loop,
            Err(error) => return drop(made.send(Err(error))),
        };
        let _ = made.send(Ok(()));
        event_loop.block_on(life());
    };
    let handle = thread::Builder::new().name(name.into()).spawn(live)?;
    is_made.recv().map_err(|_| io::Error::other("it has panicked"))??;
    Ok(handle)
}

/// All event loops.
#[derive(Debug)]
pub struct Workers {
    plan: Plan,
    /// The main thread's.
    here: Worker,
    /// Connections on it.
    here_seats: Seats,
    threads: RefCell<Vec<Thread>>,
    threads_max: usize,
    scarce_until: Cell<Option<Instant>>,
}

impl Workers {
    /// At most `count` loops, of which the calling one is the first.
    pub fn new(plan: Plan, count: NonZeroUsize) -> Self {
        Self {
            here: Worker::start(&plan),
            here_seats: Seats::default(),
            plan,
            threads: RefCell::default(),
            threads_max: count.get() - 1,
            scarce_until: Cell::new(None),
        }
    }

    /// Where clients of the main thread's loop are held, which COMMAND's life needs as well; it has
    /// one backend.
    pub fn hold(&self) -> &Rc<Hold> {
        self.here.route.backends[0].hold()
    }

    /// What all connections have in common.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes delivered so far, on all loops.
    pub fn carried(&self) -> u64 {
        self.plan.loops.carried().into_iter().flatten().sum()
    }

    /// Gives somebody who was admitted, and is for that backend of the plan, to the loop with the
    /// fewest connections.
    pub fn serve(&self, newcomer: Newcomer, permit: Permit, backend: usize) {
        let Newcomer { fd, family, address, entrance, entered, reserved, kept } = newcomer;
        self.place(|seat| {
            let place = Place { entered, seat, permit, reserved };
            Arrival::Client(ArrivingClient { fd, family, address, entrance, backend, place, kept })
        });
    }

    /// Gives a connection that was stored to the loop with the fewest.
    pub fn resume(&self, returning: impl FnOnce(Seat) -> Returning) {
        self.place(|seat| Arrival::Returning(Box::new(returning(seat))));
    }

    fn place(&self, arrival: impl FnOnce(Seat) -> Arrival) {
        let mut threads = self.threads.borrow_mut();
        let Some(index) = self.choose(&mut threads) else {
            return self.here.serve(arrival(self.here_seats.take()));
        };
        let thread = &threads[index];
        let arrival = arrival(thread.seats.take());
        if let Err(unsent) = thread.arrivals.send(arrival) {
            // Its event loop has panicked, which was said.
            threads.remove(index);
            let mut arrival = unsent.0;
            if let Some(place) = arrival.place() {
                place.seat = self.here_seats.take();
            }
            self.here.serve(arrival);
        }
    }

    /// Asks all connections how they are.
    pub fn ask(&self) {
        self.here.route.orders.ask();
        for thread in self.threads.borrow().iter() {
            // If it has ended, there are none.
            let _ = thread.arrivals.send(Arrival::Question);
        }
    }

    /// Has all connections leave, and stores them.
    pub async fn leave(&self, handover: &Handover) {
        handover.tell_threads();
        self.threads.take().into_iter().for_each(Thread::end);
        self.here.leave(handover).await;
    }

    /// The thread for the next connection; `None` is the main one, which is first among equals.
    fn choose(&self, threads: &mut Vec<Thread>) -> Option<usize> {
        let here = self.here_seats.taken();
        let loads = threads.iter().map(|thread| thread.seats.taken());
        let least = loads.enumerate().min_by_key(|(_, connections)| *connections);
        let (index, elsewhere) = least.unwrap_or((0, usize::MAX));
        if here > 0
            && elsewhere > 0
            && threads.len() < self.threads_max
            && let Some(thread) = self.start(threads.len())
        {
            threads.push(thread);
            return Some(threads.len() - 1);
        }
        (elsewhere < here).then_some(index)
    }

    /// Starts another thread beside `running` ones, if the system lets us.
    fn start(&self, running: usize) -> Option<Thread> {
        if self.scarce_until.get().is_some_and(|until| Instant::now() < until) {
            return None;
        }
        match Thread::start(self.plan.clone()) {
            Ok(thread) => Some(thread),
            Err(error) => {
                self.scarce_until.set(Some(Instant::now() + SCARCE));
                if let Some(suppressed) = NO_THREAD.pass() {
                    tracing::error!(
                        "Failed to start a thread, serving with {}: {}{suppressed}",
                        1 + running,
                        in_words(&error)
                    );
                }
                None
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.threads.take().into_iter().for_each(Thread::end);
    }
}

/// What is on the way to an event loop.
#[derive(Debug)]
enum Arrival {
    Client(ArrivingClient),
    Returning(Box<Returning>),
    /// How its connections are.
    Question,
}

#[derive(Debug)]
struct ArrivingClient {
    fd: OwnedFd,
    family: Family,
    address: Address,
    entrance: Arc<Entrance>,
    backend: usize,
    place: Place,
    kept: Option<Kept>,
}

impl Arrival {
    fn place(&mut self) -> Option<&mut Place> {
        match self {
            Self::Client(client) => Some(&mut client.place),
            Self::Returning(returning) => Some(&mut returning.place),
            Self::Question => None,
        }
    }
}

/// An event loop's own side: it never leaves its thread.
#[derive(Debug)]
struct Worker {
    route: Rc<Route>,
    arrived: Rc<Notify>,
}

impl Worker {
    fn start(plan: &Plan) -> Self {
        let arrived = Rc::new(Notify::new());
        spawn_local(keep_a_timer(Rc::clone(&arrived)));
        let route = Rc::new(Route::new(plan));
        if let Some(watch) = &route.watch {
            spawn_local(Rc::clone(watch).look());
        }
        Self { route, arrived }
    }

    fn serve(&self, arrival: Arrival) {
        let arriving = match arrival {
            Arrival::Client(client) => client,
            Arrival::Question => return self.route.orders.ask(),
            Arrival::Returning(returning) => {
                spawn_local(resume(*returning, Rc::clone(&self.route)));
                return;
            }
        };
        let ArrivingClient { fd, family, address, entrance, backend, place, kept } = arriving;
        let socket = match Socket::register(fd, family) {
            Ok(socket) => socket,
            Err(error) => {
                if let Some(suppressed) = UNWATCHED.pass() {
                    let error = in_words(&error);
                    tracing::error!(
                        client = %address,
                        listener = %entrance,
                        "Failed to watch a connection, closing it: {error}{suppressed}"
                    );
                }
                return;
            }
        };
        self.arrived.notify_one();
        if kept.is_some() {
            socket.set_stored();
        }
        let client = Client { socket, address, entrance, backend, place, kept };
        spawn_local(serve(client, Rc::clone(&self.route)));
    }

    async fn leave(&self, handover: &Handover) {
        self.route.orders.leave().await;
        handover.store(self.route.left.take());
    }
}

/// Keeps a timer armed while clients come.
///
/// When a timer becomes the next to expire, tokio wakes its own event loop, which is a write to
/// an eventfd and an event to read. A connect(2) in progress arms one; with this one ahead of
/// it, it is never the next.
async fn keep_a_timer(arrived: Rc<Notify>) -> Infallible {
    loop {
        arrived.notified().await;
        sleep(TIMER_AHEAD).await;
    }
}

/// A thread with an event loop.
#[derive(Debug)]
struct Thread {
    /// Open for as long as the thread is to live.
    arrivals: UnboundedSender<Arrival>,
    /// Connections on it, those included that are on their way there.
    seats: Seats,
    handle: JoinHandle<()>,
}

impl Thread {
    /// Ends it, and resets the connections on it that were not told to leave.
    fn end(self) {
        drop(self.arrivals);
        // It has said what it had to say of a panic.
        let _ = self.handle.join();
    }

    /// Starts one, and waits until it has its event loop.
    fn start(plan: Plan) -> io::Result<Self> {
        // Not bounded here: whoever is sent has been admitted.
        let (arrivals, receiver) = unbounded_channel();
        let handle = start_thread("proxyd-worker", async move || live(&plan, receiver).await)?;
        Ok(Self { arrivals, seats: Seats::default(), handle })
    }
}

/// The life of a thread.
async fn live(plan: &Plan, mut arrivals: UnboundedReceiver<Arrival>) {
    let worker = Worker::start(plan);
    let _abort = plan.handover.as_ref().and_then(|it| it.abort_on_panic());
    while let Some(arrival) = arrivals.recv().await {
        worker.serve(arrival);
    }
    if let Some(handover) = plan.handover.as_ref().filter(|it| it.has_told_threads()) {
        worker.leave(handover).await;
    }
}
