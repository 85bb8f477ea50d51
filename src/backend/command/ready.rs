//! `--ready=notify`: `READY=1` from COMMAND, on a `NOTIFY_SOCKET` of its own (sd_notify(3)).
//!
//! The socket is a file and not an abstract name, so that COMMAND finds it from another network
//! namespace and can pass it into a container. Every process may send to it. The kernel tells the
//! sender (`SO_PASSCRED`), and only messages of COMMAND's processes count. File modes could not
//! tell: COMMAND may change its user.

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
use crate::logging::{RateLimit, os_message, rate_limited};
use crate::socket::sys::register;

/// The directory that has a socket for each run of COMMAND.
#[derive(Debug)]
pub struct NotifyPlace(PathBuf);

impl NotifyPlace {
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
                "Failed to open a socket for --ready=notify in {}: {}; RuntimeDirectory= in the unit \
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
/// From [`NotifySocket::ready`] on a task reads the socket for as long as it exists, before and
/// after `READY=1`: sd_notify(3) blocks when ten messages are queued, and systemd-notify(1) until
/// the descriptor of its last message is closed.
#[derive(Debug)]
pub struct NotifySocket {
    io: Rc<AsyncFd<OwnedFd>>,
    path: PathBuf,
    _directory: TempDir,
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
        Ok(Self { io, path, _directory: directory, receiver: JoinSet::new() })
    }

    /// Returns the value for `$NOTIFY_SOCKET`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for `READY=1` from a process of `tree`. Messages stay queued until then: COMMAND may
    /// send `READY=1` before the guard's report of its start arrives.
    pub async fn ready(&mut self, tree: ProcessTree) {
        let (sender, mut ready) = watch::channel(false);
        self.receiver.spawn_local(Receiver { io: Rc::clone(&self.io), tree, ready: sender }.run());
        let _ = ready.wait_for(|ready| *ready).await;
    }
}

/// The task that reads a [`NotifySocket`].
struct Receiver {
    io: Rc<AsyncFd<OwnedFd>>,
    /// The processes whose messages count.
    tree: ProcessTree,
    ready: watch::Sender<bool>,
}

impl Receiver {
    async fn run(self) -> Infallible {
        let (mut lookups, mut in_burst) = (Lookups::default(), 0);
        loop {
            in_burst = (in_burst + 1) % BURST;
            if in_burst == 0 {
                sleep(BURST_PAUSE).await;
            }
            let mut readable = self.io.readable().await.expect("the event loop runs");
            match self.receive(&mut lookups) {
                Ok(true) => drop(self.ready.send_replace(true)),
                Ok(false) => {}
                // EAGAIN, or an error that the next message's edge will show again.
                Err(_) => readable.clear_ready(),
            }
        }
    }

    /// Receives a message. Returns whether it is a `READY=1` that counts.
    ///
    /// The sender is looked up before the message's descriptors are closed: with `BARRIER=1` it may
    /// exit as soon as they are.
    fn receive(&self, lookups: &mut Lookups) -> Result<bool, Errno> {
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
        let mut lines = text[..received.bytes].split(|&byte| byte == b'\n');
        let is_news = lines.any(|line| line == b"READY=1") && !*self.ready.borrow();
        let sender = sender.filter(|_| is_news);
        Ok(sender.is_some_and(|sender| lookups.look_up(sender.pid, sender.uid, self.tree)))
    }
}

/// Lookups of senders within the current second. Each costs up to
/// [`ANCESTORS_MAX`](super::process_tree::ANCESTORS_MAX) reads of /proc.
///
/// Any user may send `READY=1` at any rate. Within a second a known stranger is not looked up
/// again, and each user has [`LOOKUPS_MAX`] lookups. So a flood costs little. COMMAND, which may
/// have changed its user, is still heard during the flood.
#[derive(Debug, Default)]
struct Lookups {
    since: Option<Instant>,
    /// The lookups for each user.
    users: HashMap<Uid, usize>,
    /// The lookups for all further users together.
    other_users: usize,
    /// Processes that are not COMMAND's.
    strangers: Vec<Pid>,
}

impl Lookups {
    /// Looks a sender up. Returns whether it is one of COMMAND's processes.
    fn look_up(&mut self, process: Pid, user: Uid, tree: ProcessTree) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now - since >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), ..Self::default() };
        }
        if self.strangers.contains(&process) {
            return false;
        }
        // COMMAND's user always has a count of its own, however many other users send.
        let has_own_count =
            self.users.contains_key(&user) || self.users.len() < USERS_MAX || tree.has_user(user);
        let lookups = match has_own_count {
            true => self.users.entry(user).or_default(),
            false => &mut self.other_users,
        };
        *lookups += 1;
        if *lookups > LOOKUPS_MAX {
            return false;
        }
        let is_ours = tree.has(process);
        if !is_ours {
            if self.strangers.len() < STRANGERS_MAX {
                self.strangers.push(process);
            }
            rate_limited!(
                STRANGERS,
                warn,
                "Ignoring READY=1 of process {}, which does not belong to COMMAND.",
                process.as_raw_nonzero()
            );
        }
        is_ours
    }
}

/// The bytes of a message that are read. COMMAND's notifications are shorter.
const MESSAGE_MAX: usize = 4096;

/// Messages between two pauses, which limit the cost of a flood.
const BURST: usize = 8;
const BURST_PAUSE: Duration = Duration::from_millis(1);

/// Limits for one second: users with a count of their own, lookups for each count, and known
/// strangers.
const USERS_MAX: usize = 8;
const LOOKUPS_MAX: usize = 10;
const STRANGERS_MAX: usize = 64;

static STRANGERS: RateLimit = RateLimit::new(1, Duration::from_secs(60));
