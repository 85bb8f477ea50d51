//! The event loops, and which of them a connection gets.
//!
//! The main thread's loop accepts, and is the first to serve. With `--threads=` above one a
//! connection goes to the loop with the fewest connections. The first connection that finds all
//! loops busy starts a thread. A connection stays on its loop from connect to close. Its buffer,
//! pipes and timers belong to the loop, so that no byte meets a lock or a cache line that another
//! thread writes.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};

use crate::backend::wait::BackendWait;
use crate::connection::{LoopContext, Restored, Settings, forget, resume, serve};
use crate::counters::Gauge;
use crate::handover::Handover;
use crate::handover::journal::JournalEntry;
use crate::listen::accepted::Accepted;
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::runtime::start_thread;

/// All event loops.
#[derive(Debug)]
pub struct EventLoops {
    pub settings: Settings,
    /// The main thread's event loop.
    main_loop: EventLoop,
    /// Connections on the main thread's event loop.
    pub main_load: Gauge,
    threads: RefCell<Vec<Thread>>,
    threads_max: usize,
    /// When to start a thread again, after the system refused one.
    retry_at: Cell<Option<Instant>>,
}

impl EventLoops {
    /// Creates at most `count` event loops. The calling thread's is the first.
    pub fn new(settings: Settings, count: NonZeroUsize) -> Self {
        Self {
            main_loop: EventLoop::start(&settings),
            main_load: Gauge::default(),
            settings,
            threads: RefCell::default(),
            threads_max: count.get() - 1,
            retry_at: Cell::new(None),
        }
    }

    /// Returns where clients of the main thread's loop wait for the first backend, the only one
    /// that the proxy may start.
    pub fn backend_wait(&self) -> &Rc<BackendWait> {
        &self.main_loop.context.backends[0].backend_wait
    }

    /// Returns the bytes delivered on all event loops.
    pub fn delivered(&self) -> u64 {
        self.settings.loops.delivered().into_iter().flatten().sum()
    }

    /// Dispatches a connection that leads to `backend` of the settings.
    pub fn serve(&self, accepted: Accepted, backend: usize, entry: Option<JournalEntry>) {
        self.dispatch(LoopMessage::Accepted(accepted, backend, entry));
    }

    /// Dispatches a stored connection.
    pub fn resume(&self, restored: Restored) {
        self.dispatch(LoopMessage::Restored(Box::new(restored)));
    }

    /// Sends a message to the event loop with the fewest connections.
    fn dispatch(&self, mut message: LoopMessage) {
        let mut threads = self.threads.borrow_mut();
        if let Some(index) = self.pick_thread(&mut threads) {
            let thread = &threads[index];
            message.count_on(&thread.load);
            match thread.messages.send(message) {
                Ok(()) => return,
                Err(unsent) => {
                    // The thread has panicked, which was logged.
                    threads.remove(index);
                    message = unsent.0;
                }
            }
        }
        message.count_on(&self.main_load);
        self.main_loop.serve(message);
    }

    /// Asks all connections to report their progress.
    pub fn request_reports(&self) {
        self.send_to_all(|| LoopMessage::Report);
    }

    /// Resets all passive connections.
    pub fn reset_passive(&self) {
        self.send_to_all(|| LoopMessage::ResetPassive);
    }

    fn send_to_all(&self, message: fn() -> LoopMessage) {
        self.main_loop.serve(message());
        for thread in self.threads.borrow().iter() {
            // A thread that has ended has no connections.
            let _ = thread.messages.send(message());
        }
    }

    /// Detaches all connections, and stores them.
    pub async fn detach_all(&self, handover: &Handover) {
        for thread in self.threads.take() {
            thread.detaches.store(true, Ordering::Relaxed);
            thread.end();
        }
        self.main_loop.detach_all(handover).await;
    }

    /// Returns the index of the thread for the next connection, or `None` for the main thread,
    /// which is preferred among equals.
    fn pick_thread(&self, threads: &mut Vec<Thread>) -> Option<usize> {
        let main_loop = self.main_load.taken();
        let loads = threads.iter().map(|thread| thread.load.taken());
        let least = loads.enumerate().min_by_key(|(_, connections)| *connections);
        let (index, elsewhere) = least.unwrap_or((0, usize::MAX));
        if main_loop > 0 && elsewhere > 0 && threads.len() < self.threads_max {
            if let Some(thread) = self.start(threads.len()) {
                threads.push(thread);
                return Some(threads.len() - 1);
            }
        }
        (elsewhere < main_loop).then_some(index)
    }

    /// Starts a thread beside the `running` ones.
    fn start(&self, running: usize) -> Option<Thread> {
        if self.retry_at.get().is_some_and(|until| Instant::now() < until) {
            return None;
        }
        match Thread::start(self.settings.clone()) {
            Ok(thread) => Some(thread),
            Err(error) => {
                self.retry_at.set(Some(Instant::now() + RETRY_AFTER));
                rate_limited!(
                    NO_THREAD,
                    error,
                    "Failed to start a thread, serving with {}: {}. (Raise TasksMax=.)",
                    1 + running,
                    os_message(&error)
                );
                None
            }
        }
    }
}

impl Drop for EventLoops {
    fn drop(&mut self) {
        self.threads.take().into_iter().for_each(Thread::end);
    }
}

/// What an event loop is sent.
#[derive(Debug)]
enum LoopMessage {
    /// A connection, its backend, and its stored form.
    Accepted(Accepted, usize, Option<JournalEntry>),
    Restored(Box<Restored>),
    /// All connections are to report their progress.
    Report,
    /// All passive connections are to be reset.
    ResetPassive,
}

impl LoopMessage {
    fn count_on(&mut self, event_loop: &Gauge) {
        let slot = match self {
            Self::Accepted(accepted, ..) => &mut accepted.slot,
            Self::Restored(restored) => &mut restored.slot,
            Self::Report | Self::ResetPassive => return,
        };
        slot.event_loop = Some(event_loop.take());
    }
}

/// The part of an event loop that never leaves its thread.
#[derive(Debug)]
struct EventLoop {
    context: Rc<LoopContext>,
    /// A client was accepted.
    arrived: Rc<Notify>,
}

impl EventLoop {
    fn start(settings: &Settings) -> Self {
        let arrived = Rc::new(Notify::new());
        spawn_local(keep_timer_armed(Rc::clone(&arrived)));
        let context = Rc::new(LoopContext::new(settings));
        spawn_local(Rc::clone(&context.registry).sweep());
        Self { context, arrived }
    }

    fn serve(&self, message: LoopMessage) {
        let context = Rc::clone(&self.context);
        match message {
            LoopMessage::Report => self.context.registry.request_reports(),
            LoopMessage::ResetPassive => self.context.registry.reset_passive(),
            LoopMessage::Restored(restored) => drop(spawn_local(resume(*restored, context))),
            LoopMessage::Accepted(accepted, backend, entry) => {
                let Some(accepted) = accepted.register() else { return forget(entry) };
                self.arrived.notify_one();
                spawn_local(serve(accepted, backend, entry, context));
            }
        }
    }

    async fn detach_all(&self, handover: &Handover) {
        self.context.registry.detach_all().await;
        handover.store(self.context.detached.take());
    }
}

/// Keeps a timer armed while clients are accepted.
///
/// When a new timer is the earliest, tokio wakes its own event loop: a write to an eventfd and an
/// event to read. A connect(2) in progress has a timer. This timer is always earlier, so a connect
/// costs no such write.
async fn keep_timer_armed(arrived: Rc<Notify>) -> Infallible {
    loop {
        arrived.notified().await;
        sleep(TIMER_AHEAD).await;
    }
}

/// A thread with an event loop.
#[derive(Debug)]
struct Thread {
    /// Dropping this ends the thread.
    messages: UnboundedSender<LoopMessage>,
    /// Connections on the thread, and those sent to it.
    load: Gauge,
    /// Whether the thread stores its connections at its end.
    detaches: Arc<AtomicBool>,
    handle: JoinHandle<()>,
}

impl Thread {
    /// Ends the thread. Its connections are reset, unless it `detaches` them.
    fn end(self) {
        drop(self.messages);
        // A panic was logged.
        let _ = self.handle.join();
    }

    /// Starts a thread, and waits until it has its event loop.
    fn start(settings: Settings) -> io::Result<Self> {
        // Not bounded: the connection limit bounds what is sent.
        let (messages, receiver) = unbounded_channel();
        let detaches = Arc::new(AtomicBool::new(false));
        let at_end = Arc::clone(&detaches);
        let run = async move || run(&settings, receiver, &at_end).await;
        let handle = start_thread("proxyd-worker", run)?;
        Ok(Self { messages, load: Gauge::default(), detaches, handle })
    }
}

/// Runs on a thread until [`Thread::end`].
async fn run(
    settings: &Settings,
    mut messages: UnboundedReceiver<LoopMessage>,
    detaches: &AtomicBool,
) {
    let event_loop = EventLoop::start(settings);
    let _abort = settings.handover.as_ref().and_then(|handover| handover.abort_on_panic());
    while let Some(message) = messages.recv().await {
        event_loop.serve(message);
    }
    if let Some(handover) = settings.handover.as_ref().filter(|_| detaches.load(Ordering::Relaxed))
    {
        event_loop.detach_all(handover).await;
    }
}

/// When the timer that is kept armed expires: before the default connect timeout.
const TIMER_AHEAD: Duration = Duration::from_secs(5);

/// How long the running threads serve alone, after the system refused one.
const RETRY_AFTER: Duration = Duration::from_secs(10);

static NO_THREAD: RateLimit = RateLimit::new(1, Duration::from_secs(60));
