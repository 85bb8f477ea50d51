//! The other programs: where they are, their versions, and how each is configured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use socket2::SockAddr;

use crate::addresses::{Family, free_address, written};

pub(crate) const HAPROXY: &str = "/usr/sbin/haproxy";
pub(crate) const NGINX: &str = "/usr/sbin/nginx";
pub(crate) const SOCAT: &str = "/usr/bin/socat";

/// Appends the version that a program prints, of two parts at most.
pub(crate) fn with_version(name: &str, words: &[String], flag: &str) -> String {
    let output = Command::new(&words[0]).args(&words[1..]).arg(flag).output();
    let printed = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let printed = String::from_utf8_lossy(&printed);
    let mut parts = printed.split(|c: char| c.is_whitespace() || c == '/');
    match parts.find(|part| part.starts_with(|c: char| c.is_ascii_digit())) {
        Some(version) => {
            let parts: Vec<_> = version.split('.').take(2).collect();
            format!("{name} {}", parts.join("."))
        }
        None => name.into(),
    }
}

/// The newest systemd-socket-proxyd, where tests/root puts it: what its wrapper runs, so that no
/// shell is measured.
pub(crate) fn newest() -> Option<Vec<String>> {
    let default = "/opt/newest-original/systemd-socket-proxyd";
    let path = std::env::var_os("NEWEST_ORIGINAL").unwrap_or_else(|| default.into());
    let wrapper = fs::read_to_string(path).ok()?;
    let (_, words) = wrapper.split_once("exec ")?;
    let words = words.split_whitespace().filter(|word| *word != "\\" && *word != "\"$@\"");
    Some(words.map(String::from).collect())
}

type Words = (Vec<String>, SockAddr);

pub(crate) fn haproxy(front: Family, target: &SockAddr, directory: &Path) -> Words {
    let front_address = free_address(front, directory);
    let server = match target.as_socket() {
        Some(address) => address.to_string(),
        None => format!("unix@{}", written(target)),
    };
    let text = format!(
        "global\n  maxconn 4500\n  nbthread 1\n\
         defaults\n  mode tcp\n  option splice-auto\n  timeout connect 10s\n  timeout client 1h\n  \
         timeout server 1h\n\
         listen bench\n  bind {}\n  maxconn 4500\n  server target {server} maxconn 4500\n",
        match front {
            Family::Tcp | Family::Udp => written(&front_address),
            Family::Unix => format!("unix@{}", written(&front_address)),
        }
    );
    let file = configuration(directory, "haproxy.cfg", &text);
    ([HAPROXY, "-db", "-f", &file].map(String::from).to_vec(), front_address)
}

pub(crate) fn nginx(front: Family, target: &SockAddr, directory: &Path, half_close: bool) -> Words {
    let front_address = free_address(front, directory);
    let prefix = |family: Family, address: &SockAddr| match family {
        Family::Tcp | Family::Udp => written(address),
        Family::Unix => format!("unix:{}", written(address)),
    };
    let options = match front {
        Family::Udp => "udp".into(),
        _ => {
            let half_close = if half_close { "on" } else { "off" };
            format!("backlog=4096; tcp_nodelay on; proxy_half_close {half_close}")
        }
    };
    let target_family = if target.as_socket().is_some() { Family::Tcp } else { Family::Unix };
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n{user}\
         daemon off;\nworker_processes 1;\nworker_rlimit_nofile 20000;\n\
         pid {directory}/pid;\nerror_log /dev/null crit;\n\
         events {{ worker_connections {}; }}\n\
         stream {{ server {{ listen {} {options}; proxy_timeout 1h; proxy_pass {}; }} }}\n",
        if front == Family::Udp { 19_000 } else { 10_000 },
        prefix(front, &front_address),
        prefix(target_family, target),
        directory = directory.display(),
    );
    let file = configuration(directory, "nginx.conf", &text);
    let words = [NGINX, "-c", &file, "-e", "/dev/null"].map(String::from);
    (words.to_vec(), front_address)
}

pub(crate) fn socat(front: Family, target: &SockAddr, directory: &Path) -> Words {
    let front_address = free_address(front, directory);
    let listen = match front_address.as_socket() {
        Some(address) if front == Family::Udp => {
            format!("UDP4-LISTEN:{},bind=127.0.0.1,fork,reuseaddr", address.port())
        }
        Some(address) => {
            format!("TCP4-LISTEN:{},bind=127.0.0.1,fork,nodelay,backlog=4096", address.port())
        }
        None => format!("UNIX-LISTEN:{},fork,backlog=4096", written(&front_address)),
    };
    let connect = match target.as_socket() {
        Some(address) if front == Family::Udp => format!("UDP4:{address}"),
        Some(address) => format!("TCP4:{address},nodelay"),
        None => format!("UNIX-CONNECT:{}", written(target)),
    };
    ([SOCAT, &listen, &connect].map(String::from).to_vec(), front_address)
}

fn configuration(directory: &Path, name: &str, text: &str) -> String {
    let path: PathBuf = directory.join(name);
    fs::write(&path, text).expect("a directory of our own");
    path.display().to_string()
}
