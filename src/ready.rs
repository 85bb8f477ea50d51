//! `READY=1` from COMMAND, on a `NOTIFY_SOCKET` of its own (sd_notify(3)).
//!
//! The socket is a file and not an abstract name, so that COMMAND finds it from another network
//! namespace and can pass it into a container. Anybody may send to it; who is listened to is told
//! by the kernel's word on the sender (`SO_PASSCRED`), not by file modes: COMMAND may change users.

#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::env;
use std::fs::{self, Permissions};
use std::io::{self, IoSliceMut};
use std::iter;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg, sockopt};
use rustix::process::Pid;
use tempfile::TempDir;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::logging::{RateLimit, in_words};
use crate::socket::register;

/// Ancestors that are asked for; a chain of processes is no longer.
const GENERATIONS_MAX: usize = 64;

/// Longer than any notification that is meant for us.
const MESSAGE_MAX: usize = 4096;

static STRANGERS: RateLimit = RateLimit::new(1, std::time::Duration::from_secs(60));

/// How COMMAND is known to be ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// TARGET answers.
    Connect,
    /// It sends `READY=1`.
    Notify,
}

impl Ready {
    /// Reads the value of `--ready=`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "connect" => Some(Self::Connect),
            "notify" => Some(Self::Notify),
            _ => None,
        }
    }
}

/// The socket COMMAND notifies; its file goes with it.
///
/// It is read for as long as it is there ([`NotifySocket::hear`]), ready or not: sd_notify(3) waits
/// when ten messages are queued, and systemd-notify(1) until the descriptor of its last is closed.
#[derive(Debug)]
pub struct NotifySocket {
    io: AsyncFd<OwnedFd>,
    /// Who is listened to. While that is open, messages stay queued: COMMAND may be quicker than
    /// the news of its start.
    family: watch::Sender<Option<Family>>,
    /// Whether they have said that they are ready.
    ready: watch::Sender<bool>,
    path: PathBuf,
    _directory: TempDir,
}

impl NotifySocket {
    /// Makes one, in the unit's runtime directory, the user's, or the one for temporary files.
    ///
    /// # Errors
    /// One line on what is wrong with the directory.
    pub fn open() -> Result<Self, String> {
        let runtime = env::var_os("RUNTIME_DIRECTORY").and_then(|directories| {
            let first = env::split_paths(&directories).next();
            first.filter(|first| !first.as_os_str().is_empty())
        });
        let parent = runtime
            .or_else(|| env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from))
            .filter(|parent| parent.is_absolute())
            .unwrap_or_else(env::temp_dir);
        Self::open_in(&parent).map_err(|error| {
            let error = in_words(&error);
            format!(
                "Failed to open a socket for --ready=notify in {}: {error}; RuntimeDirectory= in \
                 the unit gives it a place.",
                parent.display()
            )
        })
    }

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
            family: watch::Sender::default(),
            ready: watch::Sender::default(),
            path,
            _directory: directory,
        })
    }

    /// For `$NOTIFY_SOCKET`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets who ran before, and what they have sent.
    pub fn forget(&self) {
        self.family.send_replace(None);
        self.ready.send_replace(false);
        while self.receive().is_ok() {}
    }

    /// Waits for `READY=1` from one of `family`.
    pub async fn ready(&self, family: Family) {
        self.family.send_replace(Some(family));
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    /// Takes what comes, for ever.
    pub async fn hear(&self) -> Infallible {
        let mut family = self.family.subscribe();
        loop {
            let mut readable = self.io.readable().await.expect("the event loop runs");
            if family.wait_for(Option::is_some).await.is_err() {
                std::future::pending().await
            }
            match self.receive() {
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
    fn receive(&self) -> Result<bool, Errno> {
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
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.pid),
                RecvAncillaryMessage::ScmRights(passed) => descriptors.extend(passed),
                _ => {}
            }
        }
        let mut lines = text[..received.bytes].split(|&byte| byte == b'\n');
        Ok(lines.any(|line| line == b"READY=1")
            && self.family.borrow().is_some_and(|family| family.has_or_warn(sender)))
    }
}

/// The processes that speak for COMMAND.
///
/// A control group would do inside a unit; outside of one the whole session is in it.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// COMMAND's process group.
    pub group: Pid,
    /// The subreaper above it: whoever COMMAND has started, in whatever session, descends from it.
    pub guard: Pid,
}

impl Family {
    fn has_or_warn(self, sender: Option<Pid>) -> bool {
        let has = sender.is_some_and(|sender| self.has(sender));
        if !has && let Some(suppressed) = STRANGERS.pass() {
            let sender = sender.map_or(0, |sender| sender.as_raw_nonzero().get());
            tracing::warn!(
                "Ignoring READY=1 of process {sender}, it is not COMMAND's.{suppressed}"
            );
        }
        has
    }

    fn has(self, process: Pid) -> bool {
        let group = Some(self.group);
        relations(process).is_some_and(|it| it.group == group)
            || iter::successors(Some(process), |process| relations(*process)?.parent)
                .take(GENERATIONS_MAX)
                .any(|ancestor| ancestor == self.guard)
    }
}

/// Where a process stands; `None` is outside of this PID namespace.
struct Relations {
    parent: Option<Pid>,
    group: Option<Pid>,
}

/// proc_pid_stat(5): the fourth and the fifth field; the second is a name in parentheses, of any
/// characters.
fn relations(process: Pid) -> Option<Relations> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut pids = fields.split_whitespace().skip(1).map(|pid| Pid::from_raw(pid.parse().ok()?));
    Some(Relations { parent: pids.next()?, group: pids.next()? })
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
        assert!(Family { group: other, guard: us }.has(one), "our child");
        assert!(!Family { group: other, guard: other }.has(one), "not its sibling's");
        assert!(!Family { group: one, guard: one }.has(us), "not its parent");
        assert!(Family { group: one, guard: other }.has(one), "of the group");
        for child in &mut children {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert!(!Family { group: other, guard: us }.has(one), "gone");
    }
}
