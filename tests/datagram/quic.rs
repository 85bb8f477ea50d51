//! QUIC over the proxy: 50 MB each way, and explicit congestion notification.
//!
//! A QUIC peer stops to use ECN when its marks do not arrive (RFC 9000, 13.4.2). quinn says so in
//! its log.

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::pem::PemObject;
use quinn::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use quinn::{ClientConfig, Endpoint, ServerConfig};
use tempfile::TempDir;
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::peers::*;
use crate::support::*;

const SIZE: usize = 50_000_000;

#[test]
fn quic_carries_50_mb_each_way_with_ecn() {
    let log = EcnLog::start();
    let certificate = Certificate::new();
    let bytes = random_bytes(9, SIZE);
    let sum = sha256(&bytes);
    let run = |front: Kind, relay: &dyn Fn(SocketAddr) -> (SocketAddr, Option<Proxy>)| {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(async {
            let server = certificate.server(front);
            let (address, proxy) = relay(server.local_addr().unwrap());
            let served = tokio::spawn(serve(server));
            let echoed = ask(certificate.client(address), address, &bytes);
            let echoed = timeout(Duration::from_secs(120), echoed).await.expect("it ends");
            assert_eq!(echoed.len(), SIZE);
            assert_eq!(sha256(&echoed), sum);
            if let Some(proxy) = proxy {
                assert_eq!(proxy.sessions(), 1);
                proxy.assert_adds_up();
            }
            served.abort();
        });
    };
    for kind in [Kind::Udp, Kind::Udp6] {
        run(kind, &|server| {
            let proxy = Proxy::start(kind, &server.to_string(), &[]);
            (proxy.front.address.as_socket().unwrap(), Some(proxy))
        });
        assert_eq!(log.take(), [""; 0], "ECN does not pass: {kind}");
    }
    // The log tells: a relay that knows nothing of ECN.
    run(Kind::Udp, &|server| (plain_relay(server), None));
    assert!(!log.take().is_empty(), "nothing is logged without ECN");
}

/// Sends back what comes on the first stream.
async fn serve(server: Endpoint) {
    let connection = server.accept().await.unwrap().await.unwrap();
    let (mut send, mut receive) = connection.accept_bi().await.unwrap();
    let mut buffer = vec![0; 64 * 1024];
    while let Some(length) = receive.read(&mut buffer).await.unwrap() {
        send.write_all(&buffer[..length]).await.unwrap();
    }
    send.finish().unwrap();
    connection.closed().await;
}

async fn ask(client: Endpoint, address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let connection = client.connect(address, "localhost").unwrap().await.unwrap();
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let sent = async {
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
    };
    let (_, echoed) = tokio::join!(sent, receive.read_to_end(SIZE));
    connection.close(0_u32.into(), b"done");
    echoed.unwrap()
}

/// Carries the datagrams of one client, by two sockets of std.
fn plain_relay(server: SocketAddr) -> SocketAddr {
    let [front, back] = [(); 2].map(|()| Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap()));
    let address = front.local_addr().unwrap();
    back.connect(server).unwrap();
    let carry = |from: Arc<UdpSocket>, to: Arc<UdpSocket>, is_front: bool| {
        thread::spawn(move || {
            let mut buffer = [0; 65_535];
            while let Ok((length, sender)) = from.recv_from(&mut buffer) {
                if is_front && from.peer_addr().is_err() {
                    from.connect(sender).unwrap();
                }
                let _ = to.send(&buffer[..length]);
            }
        });
    };
    carry(Arc::clone(&front), Arc::clone(&back), true);
    carry(back, front, false);
    address
}

struct Certificate {
    directory: TempDir,
}

impl Certificate {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        // Debian 11's own configuration would add a second basicConstraints.
        let own = "[req]\ndistinguished_name = name\n[name]\n";
        fs::write(directory.path().join("req.cnf"), own).unwrap();
        let words = "req -config req.cnf -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
                     -subj /CN=localhost -addext subjectAltName=DNS:localhost \
                     -addext basicConstraints=critical,CA:FALSE -keyout key.pem -out cert.pem";
        let mut command = Command::new("openssl");
        command.args(words.split_whitespace()).current_dir(directory.path());
        let output = command.output().expect("this test needs openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { directory }
    }

    fn chain(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_file(self.directory.path().join("cert.pem")).unwrap()
    }

    fn server(&self, kind: Kind) -> Endpoint {
        let key = PrivateKeyDer::from_pem_file(self.directory.path().join("key.pem")).unwrap();
        let config = ServerConfig::with_single_cert(vec![self.chain()], key).unwrap();
        let address = if kind == Kind::Udp6 { "[::1]:0" } else { "127.0.0.1:0" };
        Endpoint::server(config, address.parse().unwrap()).unwrap()
    }

    fn client(&self, to: SocketAddr) -> Endpoint {
        let mut roots = RootCertStore::empty();
        roots.add(self.chain()).unwrap();
        let address = if to.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" };
        let mut client = Endpoint::client(address.parse().unwrap()).unwrap();
        let config = ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
        client.set_default_client_config(config);
        client
    }
}

fn sha256(bytes: &[u8]) -> String {
    let mut command = Command::new("sha256sum");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

/// What quinn logs of ECN.
#[derive(Clone, Default)]
struct EcnLog(Arc<Mutex<Vec<String>>>);

impl EcnLog {
    fn start() -> Self {
        let log = Self::default();
        tracing::subscriber::set_global_default(log.clone()).unwrap();
        log
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{value:?} ");
    }
}

impl Subscriber for EcnLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("quinn") && *metadata.level() <= tracing::Level::DEBUG
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        if text.0.contains("ECN") {
            self.0.lock().unwrap().push(text.0);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
