//! Real programs that pass descriptors, through the proxy: tmux, D-Bus, Wayland.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::support::*;

/// A proxy to a Unix socket, on which a program is going to listen.
struct Front {
    endpoint: Endpoint,
    /// Of the backend; its socket is `backend` here.
    directory: TempDir,
    proxy: Running,
}

impl Front {
    fn start() -> Self {
        let (endpoint, directory) = (Endpoint::new(Family::Unix), TempDir::new().unwrap());
        let target = directory.path().join("backend");
        let launch = Launch::new(OURS).arg("--backend-wait=20s").arg(target.display());
        let proxy = launch.listener(&endpoint).start();
        Self { endpoint, directory, proxy }
    }

    fn path(&self) -> &str {
        &self.endpoint.target
    }

    fn directory(&self) -> &str {
        self.directory.path().to_str().unwrap()
    }

    fn backend(&self) -> String {
        format!("{}/backend", self.directory())
    }
}

/// What a program prints, which must succeed.
fn output(program: &str, args: &[&str]) -> String {
    let (code, stdout, stderr) = run(&program.into(), args);
    assert_eq!(code, Some(0), "{program} {args:?}: {stdout}{stderr}");
    stdout
}

/// A terminal in which a program runs.
struct Terminal {
    master: OwnedFd,
    /// What the program has written since the last match.
    shown: String,
    program: Running,
}

impl Terminal {
    fn start(words: &[&str], size: (u16, u16)) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        set_size(&master, size);
        // It is the program's controlling terminal, which gets SIGWINCH.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).args(words).env("TERM", "xterm").env_remove("TMUX");
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
        let child = command.stderr(terminal).spawn().unwrap();
        let program = Running { child, lines: Lines::default(), unread_stderr: None, copy: None };
        Self { master, shown: String::new(), program }
    }

    fn resize(&self, size: (u16, u16)) {
        set_size(&self.master, size);
    }

    fn type_keys(&self, keys: &str) {
        assert_eq!(rustix::io::write(&self.master, keys.as_bytes()), Ok(keys.len()));
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut master = [PollFd::new(&self.master, PollFlags::IN)];
            let ready = poll(&mut master, Some(&left.try_into().unwrap())).unwrap();
            assert!(ready > 0, "no {text:?} in {:?}", self.shown);
            let mut buffer = [0; 4096];
            let bytes = rustix::io::read(&self.master, &mut buffer);
            let bytes = bytes.unwrap_or_else(|error| panic!("{error}: {:?}", self.shown));
            self.shown.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
        }
    }
}

fn set_size(terminal: &OwnedFd, (ws_col, ws_row): (u16, u16)) {
    let size = Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).unwrap();
}

/// A client passes its terminal to the server, which reads and writes there.
#[test]
fn tmux_attaches() {
    const TMUX: &str = "/usr/bin/tmux";
    if !are_installed_for("tmux_attaches", &[TMUX]) {
        return;
    }
    if output(TMUX, &["-V"]).starts_with("tmux 3.1") {
        return skip("tmux_attaches", "tmux -D, since 3.2");
    }
    let front = Front::start();
    let backend = front.backend();
    let server = Launch::new(TMUX).args(["-D", "-f", "/dev/null", "-S", &backend]);
    let _server = server.env("TMUX_TMPDIR", front.directory()).start();
    let session = ["-S", front.path(), "new-session", "-d", "-s", "work"];
    let shown = ["echo content-$((6 * 7)); exec cat", ";"];
    let size = "#{client_width}x#{client_height}";
    let status = ["set-option", "-g", "status-right", size];
    output(TMUX, &[&session[..], &shown, &status].concat());
    for is_detached_by_key in [true, false] {
        let attach = [TMUX, "-S", front.path(), "attach-session", "-t", "work"];
        let mut terminal = Terminal::start(&attach, (80, 24));
        terminal.wait_for("content-42");
        terminal.wait_for("80x24");
        terminal.type_keys("typed\n");
        terminal.wait_for("typed");
        terminal.resize((100, 30));
        terminal.wait_for("100x30");
        assert_eq!(output(TMUX, &["-S", &backend, "list-clients", "-F", size]), "100x30\n");
        if is_detached_by_key {
            terminal.type_keys("\u{2}d");
        } else {
            output(TMUX, &["-S", &backend, "detach-client", "-s", "work"]);
        }
        terminal.wait_for("[detached (from session work)]");
        assert!(terminal.program.wait().success());
        assert_eq!(output(TMUX, &["-S", &backend, "list-clients"]), "");
    }
    assert_eq!(front.proxy.lines.count("resetting"), 0);
}

/// A file goes from a client to a service and another one back, each over the proxy to the bus and
/// over the proxy again.
#[test]
fn dbus_passes_files_both_ways() {
    const DAEMON: &str = "/usr/bin/dbus-daemon";
    const PYTHON: &str = "/usr/bin/python3";
    const JEEPNEY: &str = "/usr/lib/python3/dist-packages/jeepney/fds.py";
    const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/proxy/bus.py");
    if !are_installed_for("dbus_passes_files_both_ways", &[DAEMON, PYTHON, JEEPNEY]) {
        return;
    }
    let front = Front::start();
    let config = format!("{}/config", front.directory());
    let text = format!(
        "<!DOCTYPE busconfig PUBLIC '-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN' \
         'http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd'>\n\
         <busconfig><type>session</type><listen>unix:path={}</listen><policy context='default'>\
         <allow send_destination='*'/><allow receive_sender='*'/><allow own='*'/></policy></busconfig>\n",
        front.backend()
    );
    fs::write(&config, text).unwrap();
    let daemon = Launch::new(DAEMON).args(["--nofork", "--nopidfile", "--config-file", &config]);
    let _daemon = daemon.start();
    let address = format!("unix:path={}", front.path());
    let service = Launch::new(PYTHON).args([SCRIPT, "serve", &address]).start();
    service.lines.wait_for("serving");
    for question in ["one", "two", "three"] {
        let answer = output(PYTHON, &[SCRIPT, "call", &address, question]);
        assert_eq!(answer, format!("an answer to {question}\n"));
    }
    assert_eq!(front.proxy.lines.count("resetting"), 0);
}

/// A client passes the memory that it draws in.
#[test]
fn wayland_client_shows_frames() {
    const WESTON: &str = "/usr/bin/weston";
    const CLIENT: &str = "/usr/bin/weston-simple-shm";
    if !are_installed_for("wayland_client_shows_frames", &[WESTON, CLIENT]) {
        return;
    }
    // Its simple client no longer knows the fullscreen shell, which the headless backend needs.
    let version = output(WESTON, &["--version"]);
    let major = version.split([' ', '.']).nth(1).and_then(|number| number.parse::<u32>().ok());
    if major.is_none_or(|major| major >= 14) {
        return skip("wayland_client_shows_frames", "weston before 14");
    }
    let front = Front::start();
    let weston = Launch::new(WESTON).args(["--backend=headless-backend.so", "--no-config"]);
    let weston = weston.args(["--socket=backend", "--shell=fullscreen-shell.so", "--idle-time=0"]);
    let _weston = weston.env("XDG_RUNTIME_DIR", front.directory()).start();
    let client = Launch::new(CLIENT).env("XDG_RUNTIME_DIR", front.directory());
    let client = client.env("WAYLAND_DISPLAY", front.path()).env("WAYLAND_DEBUG", "1");
    let mut client = client.start();
    client.lines.wait_for_line("a file passed", |line| {
        line.contains("create_pool(") && line.contains(", fd ")
    });
    // The compositor has taken the content of the file, and asks for the next frame.
    client.lines.wait_for_line("a frame shown", |line| {
        line.contains("wl_buffer") && line.ends_with(".release()")
    });
    client.lines.wait_for_line("a frame asked for", |line| {
        line.contains("] wl_callback") && line.contains(".done(") && !line.contains("done(0)")
    });
    client.signal(Signal::INT);
    assert!(client.wait().success(), "{}", client.lines.all());
    assert_eq!(front.proxy.lines.count("resetting"), 0);
}
