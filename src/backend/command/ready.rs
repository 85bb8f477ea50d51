//! `READY=1` from COMMAND, on a `NOTIFY_SOCKET` of its own (sd_notify(3)).
//!
//! The socket is a file and not an abstract name, so that COMMAND finds it from another network
//! namespace and can pass it into a container. Anybody may send to it; who is listened to is told
//! by the kernel's word on the sender (`SO_PASSCRED`), not by file modes: COMMAND may change users.

use std::convert::Infallible;
use std::env;
use std::fs::{self, Permissions};
use std::io::{self, IoSliceMut};
use std::iter;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use rustix::process::{Pid, Uid};
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::logging::{RateLimit, os_message};
use crate::socket::sys::register;

/// Ancestors that are asked for; a chain of processes is no longer.
const ANCESTORS_MAX: usize = 64;

/// Longer than any notification that is meant for us.
const MESSAGE_MAX: usize = 4096;

/// Messages between two pauses, which bound what a flood of them may cost.
const BURST: usize = 8;
const BURST_PAUSE: Duration = Duration::from_millis(1);

/// Within one second: users whose messages are looked into apart from all others', messages of one
/// user, and processes that are known to be none of COMMAND's.
const USERS_MAX: usize = 8;
const LOOKUPS_MAX: usize = 10;
const STRANGERS_MAX: usize = 64;

static STRANGERS: RateLimit = RateLimit::new(1, Duration::from_secs(60));

/// The directory in which a socket is made for each run of COMMAND.
#[derive(Debug)]
pub struct NotifyPlace(PathBuf);

impl NotifyPlace {
    /// The unit's runtime directory, the user's, or the one for temporary files. A socket is made there to
    /// see that one can be.
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
        let this = Self(parent);
        this.open().map(drop)?;
        Ok(this)
    }

    /// Makes a socket for a run.
    ///
    /// # Errors
    /// One line on what is wrong with the directory.
    pub fn open(&self) -> Result<NotifySocket, String> {
        NotifySocket::open_in(&self.0).map_err(|error| {
            let error = os_message(&error);
            format!(
                "Failed to open a socket for --ready=notify in {}: {error}; RuntimeDirectory= in \
                 the unit gives it a place.",
                self.0.display()
            )
        })
    }
}

/// Removes the socket that `$NOTIFY_SOCKET` names, and its directory, when the proxy that has made them
/// is gone.
pub fn remove_left_behind() {
    if let Some(path) = env::var_os("NOTIFY_SOCKET").map(PathBuf::from) {
        // Whatever fails, the proxy may have removed it.
        let _ = fs::remove_file(&path);
        let _ = path.parent().map(fs::remove_dir);
    }
}

/// The socket that a run of COMMAND notifies; its file goes with it.
///
/// It is read for as long as it is there ([`NotifySocket::receive_loop`]), ready or not: sd_notify(3) waits
/// when ten messages are queued, and systemd-notify(1) until the descriptor of its last is closed.
#[derive(Debug)]
pub struct NotifySocket {
    io: AsyncFd<OwnedFd>,
    /// Who is listened to. While that is open, messages stay queued: COMMAND may be quicker than
    /// the news of its start.
    tree: watch::Sender<Option<ProcessTree>>,
    /// Whether they have said that they are ready.
    ready: watch::Sender<bool>,
    path: PathBuf,
    _directory: TempDir,
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
        Ok(Self {
            io: register(socket.into(), Interest::READABLE)?,
            tree: watch::Sender::default(),
            ready: watch::Sender::default(),
            path,
            _directory: directory,
        })
    }

    /// For `$NOTIFY_SOCKET`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for `READY=1` from one of `tree`.
    pub async fn ready(&self, tree: ProcessTree) {
        self.tree.send_replace(Some(tree));
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Takes what comes, for ever.
    pub async fn receive_loop(&self) -> Infallible {
        let mut tree = self.tree.subscribe();
        let (mut lookups, mut in_burst) = (Lookups::default(), 0);
        loop {
            in_burst = (in_burst + 1) % BURST;
            if in_burst == 0 {
                sleep(BURST_PAUSE).await;
            }
            let mut readable = self.io.readable().await.expect("the event loop runs");
            if tree.wait_for(Option::is_some).await.is_err() {
                std::future::pending().await
            }
            match self.receive(&mut lookups) {
                Ok(true) => {
                    self.ready.send_replace(true);
                }
                Ok(false) => {}
                // Whatever else it is, another message makes another edge.
                Err(_) => readable.clear_ready(),
            }
        }
    }

    /// Takes a message; whether it is a `READY=1` that counts. Judged while its descriptors are
    /// open, since its sender may live no longer than those of its `BARRIER=1`.
    fn receive(&self, lookups: &mut Lookups) -> Result<bool, Errno> {
        let mut text = [0; MESSAGE_MAX];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut text)];
        let received = recvmsg(&self.io, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut sender = None;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
                RecvAncillaryMessage::ScmRights(passed) => descriptors.extend(passed),
                _ => {}
            }
        }
        let mut lines = text[..received.bytes].split(|&byte| byte == b'\n');
        let says_news = lines.any(|line| line == b"READY=1") && !*self.ready.borrow();
        let Some((tree, sender)) = self.tree.borrow().zip(sender).filter(|_| says_news) else {
            return Ok(false);
        };
        if !lookups.may_look(sender.pid, sender.uid, tree) {
            return Ok(false);
        }
        let is_ours = tree.has_or_warn(sender.pid);
        if !is_ours {
            lookups.note_stranger(sender.pid);
        }
        Ok(is_ours)
    }
}

/// Lookups of senders within the current second. Each costs up to [`ANCESTORS_MAX`] reads of /proc.
///
/// Any user may send `READY=1` at any rate. Within a second a process that is known as a stranger is not
/// looked up again, and a user has [`LOOKUPS_MAX`] lookups. So a flood costs little, and COMMAND, which
/// may have changed its user, is heard beside it.
#[derive(Debug, Default)]
struct Lookups {
    since: Option<Instant>,
    /// Lookups of each user's messages, and of all others'.
    users: Vec<(Uid, usize)>,
    others: usize,
    strangers: Vec<Pid>,
}

impl Lookups {
    fn may_look(&mut self, process: Pid, user: Uid, tree: ProcessTree) -> bool {
        let now = Instant::now();
        if self.since.is_none_or(|since| now - since >= Duration::from_secs(1)) {
            *self = Self { since: Some(now), ..Self::default() };
        }
        if self.strangers.contains(&process) {
            return false;
        }
        let known = self.users.iter().position(|(it, _)| *it == user);
        let lookups = match known {
            Some(index) => &mut self.users[index].1,
            // COMMAND's user is never one of the others, however many there are.
            None if self.users.len() < USERS_MAX || tree.is_of(user) => {
                self.users.push((user, 0));
                let last = self.users.len() - 1;
                &mut self.users[last].1
            }
            None => &mut self.others,
        };
        *lookups += 1;
        *lookups <= LOOKUPS_MAX
    }

    fn note_stranger(&mut self, process: Pid) {
        if self.strangers.len() < STRANGERS_MAX {
            self.strangers.push(process);
        }
    }
}

/// The processes that speak for COMMAND.
///
/// A control group would do inside a unit; outside of one the whole session is in it.
#[derive(Clone, Copy, Debug)]
pub struct ProcessTree {
    /// COMMAND's process group.
    pub group: Pid,
    /// The subreaper above it: whoever COMMAND has started, in whatever session, descends from it.
    pub guard: Pid,
}

impl ProcessTree {
    /// Whether COMMAND, or the guard, runs as this user.
    fn is_of(self, user: Uid) -> bool {
        [self.group, self.guard].into_iter().any(|process| {
            let directory = fs::metadata(format!("/proc/{}", process.as_raw_nonzero()));
            directory.is_ok_and(|it| it.uid() == user.as_raw())
        })
    }

    fn has_or_warn(self, sender: Pid) -> bool {
        let has = self.has(sender);
        if !has {
            if let Some(suppressed) = STRANGERS.pass() {
                let sender = sender.as_raw_nonzero();
                tracing::warn!(
                    "Ignoring READY=1 of process {sender}, it is not COMMAND's.{suppressed}"
                );
            }
        }
        has
    }

    fn has(self, process: Pid) -> bool {
        let group = Some(self.group);
        proc_stat(process).is_some_and(|it| it.group == group)
            || iter::successors(Some(process), |process| proc_stat(*process)?.parent)
                .take(ANCESTORS_MAX)
                .any(|ancestor| ancestor == self.guard)
    }
}

/// Where a process stands; `None` is outside of this PID namespace.
struct ProcStat {
    parent: Option<Pid>,
    group: Option<Pid>,
}

/// proc_pid_stat(5): the fourth and the fifth field; the second is a name in parentheses, of any
/// characters.
fn proc_stat(process: Pid) -> Option<ProcStat> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut pids = fields.split_whitespace().skip(1).map(|pid| Pid::from_raw(pid.parse().ok()?));
    Some(ProcStat { parent: pids.next()?, group: pids.next()? })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn who_descends_from_the_guard_or_is_of_the_group_is_of_the_family() {
        let start = || -> Child {
            Command::new("cat").stdin(Stdio::piped()).process_group(0).spawn().unwrap()
        };
        let mut children = [start(), start()];
        let us = rustix::process::getpid();
        let [one, other] = [&children[0], &children[1]].map(Pid::from_child);
        assert!(ProcessTree { group: other, guard: us }.has(one), "our child");
        assert!(!ProcessTree { group: other, guard: other }.has(one), "not its sibling's");
        assert!(!ProcessTree { group: one, guard: one }.has(us), "not its parent");
        assert!(ProcessTree { group: one, guard: other }.has(one), "of the group");
        for child in &mut children {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert!(!ProcessTree { group: other, guard: us }.has(one), "gone");
    }
}
