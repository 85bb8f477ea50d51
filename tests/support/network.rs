//! Network namespaces.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Socket, Type};
use tokio::time::Instant;

use super::{TIMEOUT, poll_until};

/// A network namespace and the process that keeps it, which ends when this is dropped. Needs root.
pub struct NetworkNamespace {
    pub process: Child,
}

impl NetworkNamespace {
    pub fn new() -> Self {
        Self::start(&["cat"])
    }

    /// Starts a command in a network namespace of its own.
    pub fn start(words: &[&str]) -> Self {
        let mut command = Command::new("unshare");
        command.arg("--net").args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let process = command.spawn().unwrap();
        let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let has_moved = || {
            let its = network(&process.id().to_string());
            (its.is_some() && its != network("self")).then_some(())
        };
        poll_until(Instant::now() + TIMEOUT, has_moved).expect("unshare(1) makes a namespace");
        Self { process }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Runs a command in the namespace.
    pub fn run(&self, words: &str) {
        run_beside(self.pid(), words);
    }

    /// Runs `work` on a thread in the namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(self.pid(), work)
    }
}

impl Drop for NetworkNamespace {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a command in the network namespace of a process.
fn run_beside(pid: u32, words: &str) {
    let mut command = Command::new("nsenter");
    command.args(["--net", "--target", &pid.to_string()]).args(words.split(' '));
    assert!(command.status().unwrap().success(), "{words}");
}

/// The addresses of clients, IPv4 first.
pub const CLIENTS: [&str; 2] = ["203.0.113.7", "2001:db8:1::7"];

/// The addresses at which clients with a cable reach the host.
pub const HOST: [&str; 2] = ["203.0.113.1", "2001:db8:1::1"];

/// Makes a network namespace for clients. A cable joins it to that of a process, which is the host.
pub fn clients_of(host: u32) -> NetworkNamespace {
    let clients = NetworkNamespace::new();
    clients.run(&format!("ip link add cable type veth peer name cable netns {host}"));
    for (pid, [ipv4, ipv6]) in [(clients.pid(), CLIENTS), (host, HOST)] {
        run_beside(pid, "ip link set lo up");
        run_beside(pid, &format!("ip address add {ipv4}/24 dev cable"));
        run_beside(pid, &format!("ip address add {ipv6}/64 dev cable nodad"));
        run_beside(pid, "ip link set cable up");
    }
    clients
}

/// Clients with addresses that the machine of the proxy and its backend does not have.
pub struct ClientNetwork {
    pub clients: NetworkNamespace,
    /// Where the proxy and the backend run.
    pub host: NetworkNamespace,
    /// The addresses that clients connect to.
    front: [&'static str; 2],
    is_isolated: bool,
}

impl ClientNetwork {
    /// The host has only lo. The listening sockets are the clients' side's, as with systemd.
    pub fn isolated() -> Self {
        let [clients, host] = [(); 2].map(|()| NetworkNamespace::new());
        clients.run("ip link set lo up");
        clients.run(&format!("ip address add {}/32 dev lo", CLIENTS[0]));
        clients.run(&format!("ip address add {}/128 dev lo nodad", CLIENTS[1]));
        host.run("ip link set lo up");
        Self { clients, host, front: ["127.0.0.1", "::1"], is_isolated: true }
    }

    /// Makes every address local to the isolated host.
    pub fn add_any_ip(&self) {
        self.host.run("ip route add local 0.0.0.0/0 dev lo");
        self.host.run("ip -6 route add local ::/0 dev lo");
    }

    /// A cable joins the clients and the host, which has its own listening sockets.
    pub fn joined() -> Self {
        let host = NetworkNamespace::new();
        let clients = clients_of(host.pid());
        Self { clients, host, front: HOST, is_isolated: false }
    }

    /// Leads the answers of loopback addresses back to the host.
    pub fn add_rules(&self) {
        self.host.run("ip rule add from 127.0.0.0/8 iif lo table 123");
        self.host.run("ip route add local 0.0.0.0/0 dev lo table 123");
        self.host.run("ip -6 rule add from ::1 iif lo table 123");
        self.host.run("ip -6 route add local ::/0 dev lo table 123");
    }

    /// Runs `work` where the listening sockets are.
    pub fn at_front<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        if self.is_isolated { self.clients.inside(work) } else { self.host.inside(work) }
    }

    /// Connects a socket from one of [`CLIENTS`] to this port of the proxy's.
    pub fn client(&self, kind: Type, from: usize, port: u16) -> Socket {
        let address = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
        self.clients.inside(|| {
            let to = address(self.front[from], port);
            let socket = Socket::new(Domain::for_address(to), kind, None).unwrap();
            socket.bind(&address(CLIENTS[from], 0).into()).unwrap();
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
            socket.connect(&to.into()).unwrap();
            socket
        })
    }
}

/// Runs `work` on a thread in the network namespace of a process.
pub fn inside<T: Send>(pid: u32, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).unwrap();
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).unwrap();
            work()
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
