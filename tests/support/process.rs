//! The program under test: how it is started, and what it writes.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{Endpoint, FakeSystemd, TIMEOUT, poll_until};

/// A program that is started with sockets, as systemd does it.
pub struct Launch {
    program: PathBuf,
    args: Vec<String>,
    /// Names and sockets to pass.
    sockets: Vec<(String, OwnedFd)>,
    env: Vec<(&'static str, String)>,
    before_exec: String,
    hosts: Option<PathBuf>,
    exec: String,
    /// The directory of a copy of the program.
    copy: Option<TempDir>,
    signals: Vec<&'static str>,
    read_stderr: bool,
}

impl Launch {
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            sockets: Vec::new(),
            env: Vec::new(),
            before_exec: "export LISTEN_PID=$$".into(),
            hosts: None,
            exec: "exec".into(),
            copy: None,
            signals: Vec::new(),
            read_stderr: true,
        }
    }

    pub fn arg(mut self, arg: impl ToString) -> Self {
        self.args.push(arg.to_string());
        self
    }

    pub fn args<T: ToString>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.to_string()));
        self
    }

    pub fn env(mut self, name: &'static str, value: impl ToString) -> Self {
        self.env.push((name, value.to_string()));
        self
    }

    /// Passes a socket.
    pub fn socket(self, socket: &impl AsFd) -> Self {
        self.named_socket("front", socket)
    }

    /// Passes a socket whose name matters. Only [`Launch::stored_by`] passes names.
    pub fn named_socket(mut self, name: &str, socket: &impl AsFd) -> Self {
        self.sockets.push((name.into(), socket.as_fd().try_clone_to_owned().unwrap()));
        self
    }

    pub fn listener(self, endpoint: &Endpoint) -> Self {
        self.socket(&endpoint.socket)
    }

    /// Sends notifications to a fake systemd.
    pub fn notify(self, systemd: &FakeSystemd) -> Self {
        self.env("NOTIFY_SOCKET", systemd.path.display())
    }

    /// Notifies a fake systemd and passes what its store holds, behind the listeners so far.
    pub fn stored_by(self, systemd: &FakeSystemd) -> Self {
        let stored = systemd.fd_store.stored();
        let launch = stored
            .iter()
            .fold(self.notify(systemd), |launch, (name, fd)| launch.named_socket(name, fd));
        let names: Vec<_> = launch.sockets.iter().map(|(name, _)| &**name).collect();
        let names = names.join(":");
        launch.env("LISTEN_FDNAMES", names)
    }

    /// Sets both limits on descriptors.
    pub fn descriptors(mut self, limit: usize) -> Self {
        self.before_exec = format!("ulimit -n {limit} && {}", self.before_exec);
        self
    }

    /// Starts the program as systemd does.
    pub fn under_systemd(mut self) -> Self {
        self.before_exec = format!("export SYSTEMD_EXEC_PID=$$ && {}", self.before_exec);
        self
    }

    /// Lets the program write no file (RLIMIT_FSIZE).
    pub fn without_files(mut self) -> Self {
        self.before_exec = format!("ulimit -f 0 && {}", self.before_exec);
        self
    }

    /// Runs the program as nobody; needs root.
    pub fn unprivileged(self) -> Self {
        self.user(65_534)
    }

    /// Runs the program as a user without privileges, and without a name; needs root.
    pub fn user(self, id: u32) -> Self {
        self.user_with(id, "")
    }

    /// Runs the program as nobody, with CAP_NET_RAW as AmbientCapabilities= gives it; needs root.
    pub fn with_net_raw(self) -> Self {
        self.user_with(65_534, "--inh-caps=-all,+net_raw --ambient-caps=-all,+net_raw")
    }

    /// Runs a copy of the program: the user may not enter each directory above the checkout.
    fn user_with(mut self, id: u32, capabilities: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let copy = directory.path().join("program");
        fs::copy(&self.program, &copy).unwrap();
        for path in [directory.path(), &copy] {
            fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        (self.program, self.copy) = (copy, Some(directory));
        self.exec = format!("exec setpriv --reuid {id} --regid {id} --clear-groups {capabilities}");
        self
    }

    /// Sets the soft limit on descriptors, below the hard one.
    pub fn soft_descriptors(mut self, limit: usize) -> Self {
        self.before_exec = format!("ulimit -S -n {limit} && {}", self.before_exec);
        self
    }

    /// Passes sockets that are meant for another process.
    pub fn other_pid(mut self) -> Self {
        self.before_exec = "export LISTEN_PID=1".into();
        self
    }

    /// Gives the program an /etc/hosts of its own, in a mount namespace; needs root.
    pub fn hosts(mut self, hosts: PathBuf) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        self.hosts = Some(hosts);
        self
    }

    /// Starts the program with signals ignored or blocked: an option of env(1), such as
    /// `--ignore-signal=HUP`. Otherwise they are as by default, whatever runs the tests.
    pub fn signals(mut self, option: &'static str) -> Self {
        self.signals.push(option);
        self
    }

    /// Leaves standard error unread.
    pub fn stderr_unread(mut self) -> Self {
        self.read_stderr = false;
        self
    }

    pub fn start(self) -> Running {
        // The shell knows its pid before it becomes the program.
        let signals = format!("env --default-signal {}", self.signals.join(" "));
        let script = format!("{} && {} {signals} \"$0\" \"$@\"", self.before_exec, self.exec);
        let mut command = match &self.hosts {
            None => {
                let mut command = Command::new("/bin/sh");
                command.arg("-c").arg(script);
                command
            }
            // Together or not at all: the mount is for the namespace.
            Some(hosts) => {
                let mount = format!("mount --bind {} /etc/hosts", hosts.display());
                let mut command = Command::new("unshare");
                command.args(["--mount", "/bin/sh", "-c"]);
                command.arg(format!("{mount} && {script}"));
                command
            }
        };
        command.arg(&self.program).args(&self.args);
        for name in ["NOTIFY_SOCKET", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID", "WATCHDOG_USEC"] {
            command.env_remove(name);
        }
        if !self.sockets.is_empty() {
            command.env("LISTEN_FDS", self.sockets.len().to_string());
        }
        command.envs(self.env);
        let mappings = self.sockets.into_iter().zip(3..);
        let mappings = mappings.map(|((_, parent_fd), child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = Lines::default();
        let stderr = child.stderr.take().unwrap();
        let unread = if self.read_stderr {
            lines.collect(stderr);
            None
        } else {
            Some(stderr)
        };
        Running { child, lines, unread_stderr: unread, copy: self.copy }
    }
}

/// A started program; killed when it is dropped.
pub struct Running {
    pub child: Child,
    pub lines: Lines,
    pub unread_stderr: Option<ChildStderr>,
    /// The directory of the program, if it is a copy.
    pub copy: Option<TempDir>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Stops all threads until SIGCONT. The signal alone may leave one running for a while.
    pub fn suspend(&self) {
        self.signal(rustix::process::Signal::STOP);
        // A traced thread stops as `t`.
        let is_stopped = || self.are_all("Tt").then_some(());
        poll_until(Instant::now() + TIMEOUT, is_stopped).expect("the program stops");
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        poll_until(deadline, || self.child.try_wait().unwrap()).expect("the program exits")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The number of open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Memory in KiB.
    pub fn resident(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The number of open ends of pipes, the inherited ones included.
    pub fn pipes(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let links = links.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("pipe:")).count()
    }

    /// Whether all threads sleep.
    pub fn is_asleep(&self) -> bool {
        self.are_all("S")
    }

    /// Whether all threads are in one of these states, which proc_pid_stat(5) names by a letter.
    fn are_all(&self, states: &str) -> bool {
        let is_one = |stat: &String| {
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with(|it| states.contains(it)))
        };
        self.tasks("stat").iter().all(is_one)
    }

    /// The number of event loops beside the main thread's.
    pub fn workers(&self) -> usize {
        self.tasks("comm").iter().filter(|name| *name == "proxyd-worker\n").count()
    }

    /// A file of each thread's.
    fn tasks(&self, file: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        // One may end in between.
        tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join(file)).ok()).collect()
    }

    /// On-CPU time of all threads so far.
    pub fn cpu(&self) -> Duration {
        let tasks = self.tasks("schedstat");
        let nanos = tasks.iter().filter_map(|text| text.split(' ').next()?.parse::<u64>().ok());
        Duration::from_nanos(nanos.sum())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end, without sockets.
pub fn run(program: &PathBuf, args: &[&str]) -> (Option<i32>, String, String) {
    let mut running = Launch::new(program).args(args).start();
    let status = running.wait();
    let mut stdout = String::new();
    running.child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    (status.code(), stdout, running.lines.all())
}

/// Lines that a program has written to standard error.
#[derive(Clone, Default)]
pub struct Lines(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    pub fn collect(&self, stderr: impl Read + Send + 'static) {
        let this = self.clone();
        thread::spawn(move || {
            let (state, changed) = &*this.0;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                state.lock().unwrap().lines.push(line);
                changed.notify_all();
            }
            state.lock().unwrap().ended = true;
            changed.notify_all();
        });
    }

    /// Waits for a line that contains `text`.
    pub fn wait_for(&self, text: &str) -> String {
        self.wait_for_line(text, |line| line.contains(text))
    }

    /// Waits for a line that `matches`; `text` describes it.
    pub fn wait_for_line(&self, text: &str, matches: impl Fn(&str) -> bool) -> String {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(line) = state.lines.iter().find(|line| matches(line)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!state.ended && !left.is_zero(), "no line with {text:?} in {:?}", state.lines);
            state = changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Everything, once the program has closed its standard error.
    pub fn all(&self) -> String {
        let (state, changed) = &*self.0;
        let state = state.lock().unwrap();
        let state = changed.wait_timeout_while(state, TIMEOUT, |state| !state.ended).unwrap().0;
        state.lines.join("\n")
    }

    pub fn count(&self, text: &str) -> usize {
        self.0.0.lock().unwrap().lines.iter().filter(|line| line.contains(text)).count()
    }
}

/// Thousands of clients and their backends are this process's descriptors, too.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    setrlimit(Resource::Nofile, raised).unwrap();
}
