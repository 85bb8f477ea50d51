//! `--ready=notify` and `--busy=notify`: `READY=1` and [`BUSY`] from COMMAND, on a `NOTIFY_SOCKET`
//! of its own (sd_notify(3)).
//!
//! The socket is a file and not an abstract name, so that COMMAND finds it from another network
//! namespace and can pass it into a container. Every process may send to it. The kernel tells the
//! sender (`SO_PASSCRED`), and only messages of COMMAND's processes count. File modes could not
//! tell: COMMAND may change its user. A sender that has exited is judged by its user.

use std::collections::HashMap;
use std::convert::Infallible;
use std::env;
use std::fs::{self, Permissions};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use rustix::process::{Pid, Uid};
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::backend::command::process_tree::ProcessTree;
use crate::limits::idle_clock::{IdleClock, InUse};
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::socket::sys::register;

/// The directory that has a socket for each run of COMMAND.
#[derive(Debug)]
pub struct NotifyDirectory(PathBuf);

impl NotifyDirectory {
    /// Finds the unit's runtime directory, the user's, or the one for temporary files, and checks
    /// that a socket can be made there.
    ///
    /// # Errors
    /// One line on what is wrong with the directory.
    pub fn find() -> Result<Self, String> {
        let runtime = env::var_os("RUNTIME_DIRECTORY").and_then(|directories| {
            let first = env::split_paths(&directories).next();
            first.filter(|first| !first.as_os_str().is_empty())
        });
        let parent = runtime
            .or_else(|| env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
            .filter(|parent| parent.is_absolute())
            .unwrap_or_else(env::temp_dir);
        let place = Self(parent);
        place.open()?;
        Ok(place)
    }

    /// Makes the socket of one run.
    ///
    /// # Errors
    /// One line on what is wrong with the directory.
    pub fn open(&self) -> Result<NotifySocket, String> {
        NotifySocket::open_in(&self.0).map_err(|error| {
            format!(
                "Failed to open a socket for --ready=notify or --busy=notify in {}: {}; RuntimeDirectory= in the unit \
                 gives it a place.",
                self.0.display(),
                os_message(&error)
            )
        })
    }
}

/// Removes the socket that `$NOTIFY_SOCKET` names, and its directory. The guard does this for a
/// proxy that was killed.
pub fn remove_left_behind() {
    if let Some(path) = env::var_os("NOTIFY_SOCKET").map(PathBuf::from) {
        // ENOENT: the proxy has removed it.
        let _ = fs::remove_file(&path);
        let _ = path.parent().map(fs::remove_dir);
    }
}

/// The socket that one run of COMMAND notifies. Dropping it removes the file.
///
/// From [`NotifySocket::listen`] on a task reads the socket for as long as it exists, also after
/// `READY=1`. Otherwise sd_notify(3) would block once ten messages are queued, and
/// systemd-notify(1) until the descriptor of its last message is closed.
#[derive(Debug)]
pub struct NotifySocket {
    io: Rc<AsyncFd<OwnedFd>>,
    path: PathBuf,
    _directory: TempDir,
    ready: watch::Sender<bool>,
    receiver: JoinSet<Infallible>,
}

impl NotifySocket {
    fn open_in(parent: &Path) -> io::Result<Self> {
        let mut directory = tempfile::Builder::new();
        let directory = directory.prefix("socket-proxyd-").tempdir_in(parent)?;
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        fs::set_permissions(directory.path(), Permissions::from_mode(0o711))?;
        sockopt::set_socket_passcred(&socket, true)?;
        socket.set_nonblocking(true)?;
        let io = Rc::new(register(socket.into(), Interest::READABLE)?);
        let (ready, receiver) = (watch::Sender::new(false), JoinSet::new());
        Ok(Self { io, path, _directory: directory, ready, receiver })
    }

    /// Returns the value for `$NOTIFY_SOCKET`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Listens to the processes of `tree` from now on. Earlier messages are still queued: COMMAND
    /// may send `READY=1` before the guard's report of its start arrives. With a `clock`, COMMAND
    /// is in use while it says that it is busy.
    pub fn listen(&mut self, tree: ProcessTree, clock: Option<IdleClock>) {
        let (io, ready) = (Rc::clone(&self.io), self.ready.clone());
        self.receiver.spawn_local(Receiver { io, tree, ready, clock, busy: None }.run());
    }

    /// Waits for `READY=1`.
    pub async fn ready(&self) {
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }
}

/// The task that reads a [`NotifySocket`].
struct Receiver {
    io: Rc<AsyncFd<OwnedFd>>,
    /// The processes whose messages count.
    tree: ProcessTree,
    ready: watch::Sender<bool>,
    clock: Option<IdleClock>,
    /// Held while COMMAND is busy.
    busy: Option<InUse>,
}

impl Receiver {
    async fn run(mut self) -> Infallible {
        let (mut lookups, mut in_burst) = (Lookups::default(), 0);
        loop {
            in_burst = (in_burst + 1) % BURST;
            if in_burst == 0 {
                sleep(BURST_PAUSE).await;
            }
            let io = Rc::clone(&self.io);
            let mut readable = io.readable().await.expect("the event loop runs");
            // EAGAIN, or an error that the next message's edge will show again.
            if self.receive(&mut lookups).is_err() {
                readable.clear_ready();
            }
        }
    }

    /// Receives a message, and does what it says if it counts.
    ///
    /// The sender is looked up before the message's descriptors are closed: with `BARRIER=1` it may
    /// exit as soon as they are.
    fn receive(&mut self, lookups: &mut Lookups) -> Result<(), Errno> {
        let mut text = [0; MESSAGE_MAX];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut text)];
        let received = recvmsg(&*self.io, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let (mut sender, mut descriptors) = (None, Vec::new());
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
                RecvAncillaryMessage::ScmRights(passed) => descriptors.extend(passed),
                _ => {}
            }
        }
        let notification = Notification::parse(&text[..received.bytes]);
        let is_ready = !*self.ready.borrow() && notification.is_ready;
        let changes = self.clock.is_some() && notification.busy != Some(self.busy.is_some());
        let busy = notification.busy.filter(|_| changes);
        let sender = sender.filter(|_| is_ready || busy.is_some());
        if !sender.is_some_and(|sender| lookups.look_up(sender.pid, sender.uid, self.tree)) {
            return Ok(());
        }
        if is_ready {
            self.ready.send_replace(true);
        }
        if let Some(is_busy) = busy {
            self.busy = self.clock.as_ref().filter(|_| is_busy).map(IdleClock::begin_work);
        }
        Ok(())
    }
}

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// Whether the message has the line `READY=1`.
    pub is_ready: bool,
    /// Whether COMMAND is busy, by the last line that says so.
    pub busy: Option<bool>,
}

impl Notification {
    pub fn parse(text: &[u8]) -> Self {
        let lines = || text.split(|&byte| byte == b'\n');
        let busy = match lines().filter_map(|line| line.strip_prefix(BUSY)).next_back() {
            Some(b"1") => Some(true),
            Some(b"0") => Some(false),
            _ => None,
        };
        Self { is_ready: lines().any(|line| line == b"READY=1"), busy }
    }
}

/// Lookups of senders within the current second. Each costs up to
/// [`ANCESTORS_MAX`](super::process_tree::ANCESTORS_MAX) reads of /proc.
///
/// Any user may send messages at any rate. Within a second a known process is not looked up again,
/// and each user may cause [`LOOKUPS_MAX`] lookups of processes that are not COMMAND's. So a flood
/// costs little. COMMAND, which may have changed its user, is still heard during the flood.
#[derive(Debug, Default)]
struct Lookups {
    since: Option<Instant>,
    /// The lookups for each user.
    users: HashMap<Uid, usize>,
    /// The lookups for all further users together.
    other_users: usize,
    /// Processes that were looked up, and whether they are COMMAND's.
    known: Vec<(Pid, bool)>,
}

impl Lookups {
    /// Looks a sender up. Returns whether it is one of COMMAND's processes.
    fn look_up(&mut self, process: Pid, user: Uid, tree: ProcessTree) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now - since >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), ..Self::default() };
        }
        if let Some((_, is_ours)) = self.known.iter().find(|(known, _)| *known == process) {
            return *is_ours;
        }
        // COMMAND's user always has a count of its own, however many other users send.
        let has_own_count =
            self.users.contains_key(&user) || self.users.len() < USERS_MAX || tree.has_user(user);
        let lookups = match has_own_count {
            true => self.users.entry(user).or_default(),
            false => &mut self.other_users,
        };
        if *lookups == LOOKUPS_MAX {
            return false;
        }
        let is_ours = tree.has(process) || tree.may_have_had(process, user);
        // COMMAND's own processes are not limited: each of its messages counts.
        *lookups += usize::from(!is_ours);
        if self.known.len() < KNOWN_MAX {
            self.known.push((process, is_ours));
        }
        if !is_ours {
            rate_limited!(
                STRANGERS,
                warn,
                "Ignoring a notification of process {}, which does not belong to COMMAND.",
                process.as_raw_nonzero()
            );
        }
        is_ours
    }
}

/// COMMAND is busy, with the value 1, or no longer, with 0. systemd ignores names of this form.
pub const BUSY: &[u8] = b"X_SOCKET_PROXYD_BUSY=";

/// The bytes of a message that are read. COMMAND's notifications are shorter.
const MESSAGE_MAX: usize = 4096;

/// Messages between two pauses, which limit the cost of a flood.
const BURST: usize = 8;
const BURST_PAUSE: Duration = Duration::from_millis(1);

/// Limits for one second: users with a count of their own, lookups for each count, and known
/// processes.
const USERS_MAX: usize = 8;
const LOOKUPS_MAX: usize = 10;
const KNOWN_MAX: usize = 64;

static STRANGERS: RateLimit = RateLimit::new(1, Duration::from_secs(60));

#[cfg(test)]
mod tests {
    use rustix::process::{geteuid, getpid};
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_causes_few_lookups_and_command_is_heard() {
        // COMMAND is of our user. Linux has no process with such a number, as if it had ended.
        let tree = ProcessTree { group: getpid(), guard: getpid() };
        let ended = |number| Pid::from_raw(i32::MAX - number).unwrap();
        let stranger = |number| Uid::from_raw(geteuid().as_raw() + 1 + number);
        let (mut lookups, mut processes) = (Lookups::default(), (0..).map(ended));
        for user in 0..20 {
            for process in processes.by_ref().take(2 * LOOKUPS_MAX) {
                assert!(!lookups.look_up(process, stranger(user), tree));
            }
        }
        assert_eq!(lookups.users.len(), USERS_MAX);
        assert!(lookups.users.values().all(|count| *count == LOOKUPS_MAX));
        assert_eq!((lookups.other_users, lookups.known.len()), (LOOKUPS_MAX, KNOWN_MAX));
        for process in processes.by_ref().take(2 * LOOKUPS_MAX) {
            assert!(lookups.look_up(process, geteuid(), tree), "COMMAND's own are not limited");
        }
        assert_eq!(lookups.users[&geteuid()], 0);

        advance(Duration::from_secs(1)).await;
        for _ in 0..3 {
            assert!(!lookups.look_up(ended(0), stranger(0), tree));
        }
        assert_eq!((lookups.users[&stranger(0)], lookups.known.len()), (1, 1), "looked up once");
    }
}
