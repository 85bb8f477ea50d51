//! Containers with a real systemd: an overlay of a root, a private network, a private /tmp and /run. They
//! end with this process.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use crate::support::*;

/// A booted container; killed when it is dropped.
pub(crate) struct Container {
    outermost: Child,
    /// The container's first process, as this namespace counts it.
    leader: u32,
    cgroups: [PathBuf; 3],
    reloading: Mutex<()>,
    _directory: TempDir,
    _root: Option<TempDir>,
}

/// Tests that run at a time.
const SLOTS: usize = 2;

/// Tests that share a container. The first of them boots it.
pub(crate) struct Suite {
    boot: fn() -> Container,
    container: Mutex<Option<Arc<Container>>>,
    turn: Mutex<()>,
}

/// A test and its name.
pub(crate) type Test = (&'static str, fn(&Container));

impl Suite {
    pub(crate) fn new(boot: fn() -> Container) -> Arc<Self> {
        Arc::new(Self { boot, container: Mutex::default(), turn: Mutex::default() })
    }

    /// Adds a test that may run beside another.
    pub(crate) fn beside(
        self: &Arc<Self>,
        trials: &mut Trials,
        name: impl Into<String>,
        test: impl FnOnce(&Container) + Send + 'static,
    ) {
        self.add(1, trials, name, test);
    }

    /// Adds tests that use the same names: one of them runs at a time.
    pub(crate) fn in_turn(self: &Arc<Self>, trials: &mut Trials, tests: &[Test]) {
        for &(name, test) in tests {
            let this = Arc::clone(self);
            trials.add(name, move || {
                let _turn = this.turn.lock().unwrap_or_else(PoisonError::into_inner);
                let _slot = Slots::take(1);
                test(&this.container());
            });
        }
    }

    /// Adds a test that measures the service manager: no other test runs beside it.
    pub(crate) fn alone(
        self: &Arc<Self>,
        trials: &mut Trials,
        name: impl Into<String>,
        test: impl FnOnce(&Container) + Send + 'static,
    ) {
        self.add(SLOTS, trials, name, test);
    }

    fn add(
        self: &Arc<Self>,
        slots: usize,
        trials: &mut Trials,
        name: impl Into<String>,
        test: impl FnOnce(&Container) + Send + 'static,
    ) {
        let this = Arc::clone(self);
        trials.add(name, move || {
            let _slots = Slots::take(slots);
            test(&this.container());
        });
    }

    fn container(&self) -> Arc<Container> {
        let mut container = self.container.lock().expect("the container has booted");
        Arc::clone(container.get_or_insert_with(|| Arc::new(on_a_lasting_thread(self.boot))))
    }

    /// Ends the container.
    pub(crate) fn end(&self) {
        drop(self.container.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Boots on a thread that lives as long as this process: a container ends with the thread that started
/// it.
fn on_a_lasting_thread(boot: fn() -> Container) -> Container {
    let (send, booted) = mpsc::channel();
    thread::spawn(move || {
        let _ = send.send(boot());
        loop {
            thread::park();
        }
    });
    booted.recv().expect("the container boots")
}

/// Runs the tests: each on a thread, which waits for its turn and its slot.
pub(crate) fn run(trials: Trials) -> ExitCode {
    let threads = trials.len();
    trials.run_on(threads)
}

/// Slots that a test has taken; free again when dropped.
struct Slots(usize);

static FREE: (Mutex<usize>, Condvar) = (Mutex::new(SLOTS), Condvar::new());

impl Slots {
    fn take(count: usize) -> Self {
        let free = FREE.0.lock().unwrap();
        let mut free = FREE.1.wait_while(free, |free| *free < count).unwrap();
        *free -= count;
        Self(count)
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        *FREE.0.lock().unwrap() += self.0;
        FREE.1.notify_all();
    }
}

/// Where systemd has cgroups: the unified hierarchy alone, or beside the older ones.
const HIERARCHIES: [&str; 3] =
    ["/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"];

/// Runs in a mount namespace of its own, so that no mount outlives it: $1 the empty directory, $2 its
/// name, $3 the root that it is an overlay of, the rest pairs of a file and the place it is copied to in the container.
const BOOT: &str = r#"
set -e
base=$1; name=$2; lower=$3; shift 3
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$base/upper,workdir=$base/work" "$base/root"
# What this machine has enabled does not start in the tests.
rm -rf "$base"/root/etc/systemd/system/*.wants
while [ $# -gt 0 ]; do
    mkdir -p "$base/root$(dirname "$2")"
    cp -a --remove-destination "$1" "$base/root$2"
    shift 2
done
[ ! -e /sys/fs/cgroup/cgroup.controllers ] || export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
# systemd-nspawn makes its cgroups below its own. Containers that share them kill each other's services.
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
    [ -e $hierarchy/cgroup.procs ] || continue
    mkdir "$hierarchy/$name"
    echo 0 >"$hierarchy/$name/cgroup.procs"
done
# Without --rlimit= the container has the kernel's limits, and systemd 247 raises none for its services.
exec systemd-nspawn -q -D "$base/root" -b --register=no --keep-unit --console=pipe -M "$name" \
    --private-network --tmpfs=/tmp --link-journal=no --rlimit=RLIMIT_NOFILE=1024:524288
"#;

impl Container {
    /// What a container needs and this machine lacks.
    pub(crate) fn missing() -> Option<&'static str> {
        if !rustix::process::geteuid().is_root() {
            return Some("root");
        }
        let nspawn = Command::new("systemd-nspawn").arg("--version").output();
        nspawn.is_err().then_some("systemd-nspawn (Debian: systemd-container)")
    }

    /// Boots an overlay of this machine's root with files copied in.
    pub(crate) fn boot(files: &[(PathBuf, String)]) -> Self {
        Self::boot_on(Path::new("/"), None, files)
    }

    /// Boots an overlay of `root`, which is kept until the container has ended.
    pub(crate) fn boot_in(root: TempDir, files: &[(PathBuf, String)]) -> Self {
        let path = root.path().to_path_buf();
        Self::boot_on(&path, Some(root), files)
    }

    fn boot_on(root: &Path, kept: Option<TempDir>, files: &[(PathBuf, String)]) -> Self {
        let directory = TempDir::new_in("/var/tmp").unwrap();
        let random = directory.path().file_name().unwrap().to_str().unwrap();
        let name = format!("socket-proxyd{}", random.replace('.', "-"));
        let cgroups = HIERARCHIES.map(|it| Path::new(it).join(&name));
        // Killing nspawn leaves the container behind. So both are in a PID namespace, whose end is
        // the end of all in it: when this thread dies, so does unshare, and with it its child, the
        // namespace's first process.
        let mut command = own_control_group("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]);
        command.args(["--kill-child", "--mount-proc", "/bin/sh", "-c", BOOT, "sh"]);
        command.arg(directory.path()).arg(name).arg(root);
        for (from, to) in files {
            command.arg(from).arg(to);
        }
        // The directory itself will lie below a mount that only the namespace sees.
        let log = directory.path().join("log");
        let file = File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut this = Self {
            outermost: command.spawn().unwrap(),
            leader: 0,
            cgroups,
            reloading: Mutex::default(),
            _directory: directory,
            _root: kept,
        };
        let deadline = Instant::now() + Duration::from_secs(120);
        let booted = poll_until(deadline, || {
            if let Some(status) = this.outermost.try_wait().unwrap() {
                let log = fs::read_to_string(&log).unwrap_or_default();
                panic!("the container did not boot, {status}: {log}");
            }
            let leader = child_of(child_of(this.outermost.id())?)?;
            let state = enter(leader).args(["systemctl", "is-system-running", "--wait"]).output();
            let state = String::from_utf8(state.ok()?.stdout).ok()?;
            ["running", "degraded"].contains(&state.trim()).then_some(leader)
        });
        this.leader = booted.unwrap_or_else(|| {
            panic!("systemd does not boot: {}", fs::read_to_string(&log).unwrap_or_default())
        });
        // Units listen on ports of the ephemeral range; no client gets them as its local port.
        this.inside(|| fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", "38000-39999"))
            .expect("ports can be reserved");
        this
    }

    /// The programs and their manuals.
    pub(crate) fn programs() -> Vec<(PathBuf, String)> {
        let root = Path::new(ROOT);
        let manual = |name| (root.join("man").join(name), format!("/usr/share/man/man8/{name}"));
        vec![
            (OURS.into(), "/usr/bin/socket-proxyd".into()),
            (UNIT_WRITER.into(), "/usr/bin/socket-proxyd-units".into()),
            manual("socket-proxyd.8"),
            manual("socket-proxyd-units.8"),
        ]
    }

    /// The programs, their manuals, and everything in units/ in its place.
    pub(crate) fn files() -> Vec<(PathBuf, String)> {
        let root = Path::new(ROOT);
        let mut files = Self::programs();
        for set in fs::read_dir(root.join("units")).unwrap() {
            for file in fs::read_dir(set.unwrap().path()).unwrap() {
                let file = file.unwrap().path();
                let name = file.file_name().unwrap().to_str().unwrap();
                let directory = match file.extension().and_then(|it| it.to_str()) {
                    Some("service" | "socket" | "d") => "/etc/systemd/system",
                    Some("toml") => "/etc/yaqd",
                    _ => "/usr/local/bin",
                };
                files.push((file.clone(), format!("{directory}/{name}")));
            }
        }
        files
    }

    /// Runs a command inside.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        enter(self.leader).args(words).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a command that has to succeed, and returns its standard output.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        let output = self.output(words);
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let journal = self.output(&["journalctl", "--no-pager", "-n", "30"]).stdout;
            let journal = String::from_utf8_lossy(&journal);
            panic!("{words:?}: {}, {stderr}\nThe journal's end:\n{journal}", output.status);
        }
        String::from_utf8(output.stdout).unwrap()
    }

    /// Writes a file inside.
    pub(crate) fn write(&self, path: &str, text: &str) {
        let mut command = enter(self.leader);
        command.args(["sh", "-c", "mkdir -p \"$(dirname \"$0\")\" && cat >\"$0\"", path]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{path}");
    }

    /// Writes units and starts the last one.
    pub(crate) fn start_units(&self, units: &[(&str, &str)]) {
        for (name, text) in units {
            self.write(&format!("/run/systemd/system/{name}"), text);
        }
        self.reload();
        if let Some((name, _)) = units.last() {
            self.run(&["systemctl", "start", name]);
        }
    }

    pub(crate) fn reload(&self) {
        let _reloading = self.not_reloading();
        self.run(&["systemctl", "daemon-reload"]);
    }

    /// While this is held, no other test reloads systemd. A reload makes systemd 252 forget that a stopping
    /// unit asked for more time.
    pub(crate) fn not_reloading(&self) -> MutexGuard<'_, ()> {
        self.reloading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version of systemd.
    fn version(&self) -> u32 {
        let printed = self.run(&["systemctl", "--version"]);
        printed.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Asserts that `systemd-analyze verify` prints nothing.
    pub(crate) fn verify(&self, unit: &str) {
        let output = self.output(&["systemd-analyze", "verify", unit]);
        let words = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        // Older ones do not look for a command without a path.
        if self.version() < 250 && words.contains("Command ip is not executable") {
            return;
        }
        assert_eq!(words, "", "{unit}");
        assert!(output.status.success());
    }

    /// Asserts that `systemd-analyze security` rates a service at most 1.5 of 10. Older ones have no threshold.
    pub(crate) fn weigh(&self, unit: &str) {
        if self.version() < 250 {
            return;
        }
        let analyze = ["systemd-analyze", "security", "--no-pager", "--threshold=15", unit];
        let output = self.output(&analyze);
        let table = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{unit}: {table}");
    }

    /// Properties of a unit.
    pub(crate) fn show(&self, unit: &str) -> HashMap<String, String> {
        let text = self.run(&["systemctl", "show", unit]);
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.into(), value.into())).collect()
    }

    /// Waits until a property of a unit is `value`.
    pub(crate) fn wait_for(&self, unit: &str, property: &str, value: &str) {
        let mut last = String::new();
        let reached = poll_until(Instant::now() + TIMEOUT, || {
            last = self.show(unit).remove(property).unwrap_or_default();
            (last == value).then_some(())
        });
        assert!(reached.is_some(), "{unit}: {property} is {last:?} and not {value:?}");
    }

    /// Waits until the status text of a service begins with `start`.
    pub(crate) fn wait_for_status(&self, unit: &str, start: &str) {
        let mut last = String::new();
        let reached = poll_until(Instant::now() + TIMEOUT, || {
            last = self.show(unit).remove("StatusText").unwrap_or_default();
            last.starts_with(start).then_some(())
        });
        assert!(reached.is_some(), "{unit}: the status is {last:?} and not {start:?}");
    }

    /// On-CPU time of the service manager so far.
    pub(crate) fn manager_cpu(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/schedstat", self.leader)).unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    }

    /// What a process inside holds, by its PID there.
    pub(crate) fn process(&self, pid: &str) -> Process {
        let descriptors = self.run(&["ls", &format!("/proc/{pid}/fd")]).lines().count();
        let status = self.run(&["cat", &format!("/proc/{pid}/status")]);
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.unwrap().trim().trim_end_matches(" kB").parse::<usize>().unwrap();
        Process { descriptors, resident }
    }

    /// Connects two containers by a network of their own. It ends with either of them.
    pub(crate) fn link(&self, address: &str, other: &Self, other_address: &str) {
        let peer = other.leader.to_string();
        let add = ["link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", &peer];
        for (container, words) in [
            (self, &add[..]),
            (self, &["addr", "add", address, "dev", "link0"]),
            (self, &["link", "set", "link0", "up"]),
            (other, &["addr", "add", other_address, "dev", "link0"]),
            (other, &["link", "set", "link0", "up"]),
        ] {
            let run = || Command::new("ip").args(words).output().unwrap();
            let output = container.inside(run);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// Makes a network namespace for clients, which a cable joins to the container's.
    pub(crate) fn clients(&self) -> NetworkNamespace {
        clients_of(self.leader)
    }

    /// Runs `work` on a thread whose sockets are the container's.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(self.leader, work)
    }
}

/// Descriptors, and resident memory in KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    pub(crate) descriptors: usize,
    pub(crate) resident: usize,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.outermost.kill();
        let _ = self.outermost.wait();
        // Only empty once all processes have ended.
        let remove = || {
            let words = ["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"];
            let _ = Command::new("find").args(&self.cgroups).args(words).output();
            self.cgroups.iter().all(|it| !it.exists()).then_some(())
        };
        poll_until(Instant::now() + TIMEOUT, remove);
    }
}

/// A command for a container that shares its control group with no other, which nspawn takes as it finds it.
/// Without a systemd there is one only inside the container.
fn own_control_group(program: &str) -> Command {
    if !Path::new("/run/systemd/system").exists() {
        return Command::new(program);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--scope", "--property=Delegate=yes", "--", program]);
    command
}

fn child_of(pid: u32) -> Option<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.trim().parse().ok()
}

fn enter(leader: u32) -> Command {
    let mut command = Command::new("nsenter");
    // The root, too: it is not that of the mount namespace when this runs in a chroot.
    command.args(["-t", &leader.to_string(), "-a", "--root", "--wd", "--"]);
    command
}
