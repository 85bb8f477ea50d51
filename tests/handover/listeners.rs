//! Listeners between two processes: passed by systemd, or opened by `--listen=` and stored.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV6, TcpStream};
use std::path::Path;

use rustix::net::netdevice::name_to_index;
use rustix::process::Signal;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::support::*;
use crate::{End, MODES, Mode};

pub(crate) fn register(trials: &mut Trials) {
    for mode in MODES {
        trials.add(
            format!("a waiting client stays with the listener of its family, {mode}"),
            move || waiting_client_stays_with_its_listener(mode),
        );
        for family in [Family::Tcp, Family::Unix] {
            trials.add(
            format!("new clients wait at a listener of --listen= between two processes, {mode}, {family}"),
            move || new_clients_wait_between_processes(mode, family),
        );
            trials.add(
                format!("a failed start leaves connections and listeners stored, {mode}, {family}"),
                move || failed_start_leaves_the_store(mode, family),
            );
        }
        trials.add(
            format!("a listener is reused when its address is spelled differently, {mode}"),
            move || address_is_spelled_differently(mode),
        );
    }
    for mode in MODES {
        trials.add(
            format!("a link-local listener is not reused for another interface, {mode}"),
            move || link_local_listener_keeps_its_interface(mode),
        );
        trials.add(
            format!("a waiting client stays with the listener of its interface, {mode}"),
            move || waiting_client_stays_with_its_interface(mode),
        );
        trials.add(
            format!("a start that fails leaves the stored listeners and their clients, {mode}"),
            move || failed_start_leaves_listeners(mode),
        );
        trials.add(
            format!("port 0 does not take the stored listener of another --listen=, {mode}"),
            move || port_0_comes_last(mode),
        );
        for family in [Family::Tcp, Family::Unix] {
            trials.add(
                format!("--metrics= can have the address of a stored listener, {mode}, {family}"),
                move || metrics_take_the_address(mode, family),
            );
        }
    }
    trials.add(
        "an unknown stored descriptor is not taken for a listener",
        unknown_descriptor_is_not_a_listener,
    );
}

fn waiting_client_stays_with_its_listener(Mode { handover, end }: Mode) {
    let wildcard = |address: &str, domain| -> io::Result<Socket> {
        let address: SocketAddr = address.parse().unwrap();
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(16)?;
        Ok(socket)
    };
    // A connection of another test may have the port on an IPv4 address: then the next is tried.
    let pair = || {
        let six = wildcard("[::]:0", Domain::IPV6).unwrap();
        let port = six.local_addr().unwrap().as_socket().unwrap().port();
        Some((six, wildcard(&format!("0.0.0.0:{port}"), Domain::IPV4).ok()?, port))
    };
    let (six, four, port) = (0..100).find_map(|_| pair()).expect("a port is free in both families");
    let backends = [free_port(), free_port()];
    let systemd = FakeSystemd::with_fd_store(8);
    let launch = || {
        let launch = Launch::new(OURS).socket(&six).socket(&four);
        let handover = format!("--handover={handover}");
        let launch = launch.args([&*handover, "--backend-wait=1min"]);
        let launch = launch.arg(format!("[::]:{port}=127.0.0.1:{}", backends[0]));
        let launch = launch.arg(format!("0.0.0.0:{port}=127.0.0.1:{}", backends[1]));
        let running = launch.stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = launch();
    let clients = [format!("[::1]:{port}"), format!("127.0.0.1:{port}")].map(|address| {
        let client = connect(&address.parse::<SocketAddr>().unwrap().into());
        (&client).write_all(address.as_bytes()).unwrap();
        proxy.lines.wait_for(&format!(
            "Failed to connect to remote host: 127.0.0.1:{}",
            backends[usize::from(address.starts_with('1'))]
        ));
        (client, address)
    });
    proxy.signal(if end == End::Stopped { Signal::TERM } else { Signal::KILL });
    proxy.wait();
    proxy = launch();
    proxy.lines.wait_for("Recovered connections: 2.");
    proxy.signal(Signal::USR1);
    for (client, listener, backend) in
        [("[::1]", "[::]", backends[0]), ("127.0.0.1", "0.0.0.0", backends[1])]
    {
        let line = proxy.lines.wait_for(&format!("yet (client {client}"));
        assert!(line.contains(&format!("({listener}:{port})")), "{line}");
        assert!(line.ends_with(&format!(", backend 127.0.0.1:{backend}).")), "{line}");
    }
    for ((mut client, address), port) in clients.into_iter().zip(backends) {
        let backend = Endpoint::tcp(&format!("127.0.0.1:{port}"), 16);
        let mut served = backend.accept();
        let mut read = vec![0; address.len()];
        served.read_exact(&mut read).unwrap();
        assert_eq!(String::from_utf8(read).unwrap(), address);
        assert_forwards(&mut served, &mut client);
    }
}

fn new_clients_wait_between_processes(Mode { handover, end }: Mode, family: Family) {
    let backend = Endpoint::new(Family::Tcp);
    let directory = tempfile::TempDir::new().unwrap();
    let (listen, address) = free_address(family, &directory);
    let arguments =
        [format!("--handover={handover}"), format!("--listen={listen}"), backend.target.clone()];
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = || Launch::new(OURS).args(&arguments).stored_by(&systemd).start();
    let mut proxy = launch();
    systemd.wait_for("READY=1");
    let (mut client, mut served) = (connect(&address), backend.accept());
    assert_forwards(&mut client, &mut served);
    for _ in 0..3 {
        match end {
            End::Stopped => proxy.signal(Signal::TERM),
            End::Killed => proxy.signal(Signal::KILL),
        }
        proxy.wait();
        let log = proxy.lines.all();
        assert!(!log.contains("Failed to restore"), "{log}");
        let mut new_client = connect(&address);
        new_client.write_all(b"hello").unwrap();
        proxy = launch();
        let mut served_too = backend.accept();
        served_too.read_exact(&mut [0; 5]).unwrap();
        assert_forwards(&mut client, &mut served);
        systemd.wait_for("READY=1");
    }
    assert_eq!(systemd.fd_store.names().len(), 2, "nothing but the queue");
    proxy.signal(Signal::TERM);
    proxy.wait();
    let log = proxy.lines.all();
    assert!(!log.contains("Failed to restore"), "{log}");
    // The service is stopped, and started again later: until then the socket file stays.
    systemd.fd_store.clear();
    assert!(address.as_pathname().is_none_or(Path::exists));
    let _proxy = launch();
    systemd.wait_for("READY=1");
    let (mut client, mut served) = (connect(&address), backend.accept());
    assert_forwards(&mut client, &mut served);
}

fn failed_start_leaves_the_store(Mode { handover, end }: Mode, family: Family) {
    let backend = Endpoint::new(Family::Tcp);
    let directory = tempfile::TempDir::new().unwrap();
    let (listen, address) = free_address(family, &directory);
    let handover = format!("--handover={handover}");
    let listen = format!("--listen={listen}");
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = |arguments: &[&str]| Launch::new(OURS).args(arguments).stored_by(&systemd).start();
    let right = [&*handover, &listen, &backend.target];
    let mut proxy = launch(&right);
    systemd.wait_for("READY=1");
    let established = || {
        let (mut client, mut served) = (connect(&address), backend.accept());
        assert_forwards(&mut client, &mut served);
        (client, served)
    };
    let (mut client, mut served) = established();
    stop(&mut proxy, end);
    // The selector selects no socket.
    for _ in 0..5 {
        let wrong = [&*handover, &listen, "other=/nowhere"];
        assert_eq!(launch(&wrong).wait().code(), Some(1));
    }
    let mut new_client = connect(&address);
    new_client.write_all(b"hello").unwrap();
    let mut proxy = launch(&right);
    let mut new_clients_backend = backend.accept();
    new_clients_backend.read_exact(&mut [0; 5]).unwrap();
    assert_forwards(&mut client, &mut served);
    assert_forwards(&mut served, &mut client);
    // Then the service is not started again.
    stop(&mut proxy, end);
    assert_eq!(launch(&[&handover, &listen, "other=/nowhere"]).wait().code(), Some(1));
    systemd.fd_store.clear();
    assert!(is_reset(&read_all(&mut served).1));
}

/// An address for --listen=, and the same for a client.
fn free_address(family: Family, directory: &tempfile::TempDir) -> (String, SockAddr) {
    let path = directory.path().join("socket");
    match family {
        Family::Tcp => {
            let address = format!("127.0.0.1:{}", free_port());
            (address.clone(), address.parse::<SocketAddr>().unwrap().into())
        }
        Family::Unix => (path.display().to_string(), SockAddr::unix(&path).unwrap()),
    }
}

fn stop(proxy: &mut Running, end: End) {
    proxy.signal(if end == End::Stopped { Signal::TERM } else { Signal::KILL });
    proxy.wait();
}

fn address_is_spelled_differently(Mode { handover, end }: Mode) {
    let backend = Endpoint::new(Family::Unix);
    let port = free_port();
    let handover = format!("--handover={handover}");
    let systemd = FakeSystemd::with_fd_store(4);
    let launch = |handover: &str, listen: &str| {
        let arguments = [handover, &format!("--listen={listen}"), &backend.target];
        let running = Launch::new(OURS).args(arguments).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let address = SocketAddr::from(([127, 0, 0, 1], port)).into();
    let mut proxy = launch(&handover, &format!("127.0.0.1:{port}"));
    let (mut client, mut served) = (connect(&address), backend.accept());
    assert_forwards(&mut client, &mut served);
    for listen in [format!("{port}"), format!("localhost:{port}"), format!("127.0.0.1:{port}")] {
        stop(&mut proxy, end);
        proxy = launch(&handover, &listen);
        assert_forwards(&mut client, &mut served);
        let (mut new_client, mut new_clients_backend) = (connect(&address), backend.accept());
        assert_forwards(&mut new_client, &mut new_clients_backend);
    }
    // Without the option the address is free at once.
    stop(&mut proxy, end);
    let _proxy = launch("--handover=never", &format!("127.0.0.1:{port}"));
    assert!(is_reset(&read_all(&mut client).1));
    let (mut new_client, mut new_clients_backend) = (connect(&address), backend.accept());
    assert_forwards(&mut new_client, &mut new_clients_backend);
}

fn unknown_descriptor_is_not_a_listener() {
    let backend = echo_backend(Family::Unix);
    let systemd = FakeSystemd::with_fd_store(8);
    systemd.fd_store.put("config", tempfile::tempfile().unwrap());
    let listen = format!("127.0.0.1:{}", free_port());
    let launch = Launch::new(OURS).args([
        "--handover=crash",
        &format!("--listen={listen}"),
        &backend.target,
    ]);
    let proxy = launch.stored_by(&systemd).start();
    proxy.lines.wait_for("not listening sockets: config.");
    systemd.wait_for("READY=1");
    assert_echoes(&mut connect(&listen.parse::<SocketAddr>().unwrap().into()));
}

fn failed_start_leaves_listeners(Mode { handover, end }: Mode) {
    let (systemd, backend) = (FakeSystemd::with_fd_store(8), Endpoint::new(Family::Unix));
    let port = free_port();
    let target = format!(":{port}={}", backend.target);
    let launch = |listen: String| {
        let launch = Launch::new(OURS).args([&format!("--handover={handover}"), &listen, &target]);
        launch.stored_by(&systemd).start()
    };
    let mut proxy = launch(format!("--listen=127.0.0.1:{port}"));
    systemd.wait_for("READY=1");
    stop(&mut proxy, end);
    let mut client = connect(&SocketAddr::from(([127, 0, 0, 1], port)).into());
    // The selector names a port that is not listened on any more.
    assert!(!launch(format!("--listen=127.0.0.1:{}", free_port())).wait().success());
    let _proxy = launch(format!("--listen=127.0.0.1:{port}"));
    assert_forwards(&mut client, &mut backend.accept());
}

fn port_0_comes_last(Mode { handover, end }: Mode) {
    let (systemd, backend) = (FakeSystemd::with_fd_store(8), Endpoint::new(Family::Unix));
    let fixed = format!("--listen=127.0.0.1:{}", free_port());
    let launch = |listen: &[&str]| {
        let launch = Launch::new(OURS).arg(format!("--handover={handover}")).args(listen);
        let running = launch.arg(&backend.target).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = launch(&[&fixed]);
    stop(&mut proxy, end);
    let _proxy = launch(&["--listen=127.0.0.1:0", &fixed]);
}

fn metrics_take_the_address(Mode { handover, end }: Mode, family: Family) {
    let (systemd, backend) = (FakeSystemd::with_fd_store(8), Endpoint::new(Family::Unix));
    let directory = tempfile::tempdir().unwrap();
    let (first, first_address) = free_address(Family::Tcp, &directory);
    let (second, second_address) = free_address(family, &directory);
    let launch = |option: &str| {
        let options = [format!("--listen={first}"), format!("--{option}={second}")];
        let launch = Launch::new(OURS).arg(format!("--handover={handover}")).args(options);
        let running = launch.arg(&backend.target).stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = launch("listen");
    for _ in 0..2 {
        stop(&mut proxy, end);
        proxy = launch("metrics");
        let mut scraper = connect(&second_address);
        scraper.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let text = read_all(&mut scraper).0;
        assert!(String::from_utf8_lossy(&text).contains("socket_proxyd_build_info"));
        assert_forwards(&mut connect(&first_address), &mut backend.accept());
    }
    stop(&mut proxy, End::Stopped);
    assert!(!Path::new(&second).exists());
}

fn link_local_listener_keeps_its_interface(Mode { handover, end }: Mode) {
    if !is_root_for("link-local listeners") {
        return;
    }
    let home = NetworkNamespace::new();
    for name in ["east", "west"] {
        home.run(&format!("ip link add {name} type veth peer name {name}-peer"));
        home.run(&format!("ip link set {name}-peer up"));
        home.run(&format!("ip link set {name} up"));
        home.run(&format!("ip address add fe80::1/64 dev {name} nodad"));
    }
    home.run("ip link set lo up");
    home.inside(|| {
        let (systemd, backend) = (FakeSystemd::with_fd_store(8), Endpoint::new(Family::Unix));
        let launch = |listen: &[&str]| {
            let launch = Launch::new(OURS).arg(format!("--handover={handover}")).args(listen);
            let running = launch.arg(&backend.target).stored_by(&systemd).start();
            systemd.wait_for("READY=1");
            running
        };
        let mut proxy = launch(&["--listen=[fe80::1%east]:4000", "--listen=[fe80::1%west]:4000"]);
        stop(&mut proxy, end);
        let _proxy = launch(&["--listen=[fe80::1%west]:4000"]);
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        let index = |name: &str| name_to_index(&socket, name).unwrap();
        let address = |name| SocketAddrV6::new("fe80::1".parse().unwrap(), 4000, 0, index(name));
        assert_forwards(
            &mut connect(&SocketAddr::V6(address("west")).into()),
            &mut backend.accept(),
        );
        let refused = TcpStream::connect(address("east")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}

fn waiting_client_stays_with_its_interface(Mode { handover, end }: Mode) {
    if !is_root_for("listeners of an interface") {
        return;
    }
    let (home, outside) = (NetworkNamespace::new(), NetworkNamespace::new());
    home.run(&format!("ip link add here type veth peer name there netns {}", outside.pid()));
    home.run("ip address add 192.0.2.1/24 dev here");
    home.run("ip link set here up");
    home.run("ip link set lo up");
    outside.run("ip address add 192.0.2.2/24 dev there");
    outside.run("ip link set there up");
    let listeners = home.inside(|| {
        [("lo", "lo"), ("here", "outside")].map(|(interface, name)| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind_device(Some(interface.as_bytes())).unwrap();
            socket.bind(&SocketAddr::from(([0, 0, 0, 0], 4000)).into()).unwrap();
            socket.listen(16).unwrap();
            (name, socket)
        })
    });
    let systemd = FakeSystemd::with_fd_store(8);
    let directory = tempfile::TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let launch = || {
        let launch = listeners.iter().fold(Launch::new(OURS), |launch, (name, socket)| {
            launch.named_socket(name, socket).arg(format!("{name}={}", path(name).display()))
        });
        let launch = launch.arg(format!("--handover={handover}")).arg("--backend-wait=1min");
        let running = launch.stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        running
    };
    let mut proxy = launch();
    let address = SocketAddr::from(([192, 0, 2, 1], 4000)).into();
    let mut client = outside.inside(|| connect(&address));
    client.write_all(b"hello").unwrap();
    proxy.lines.wait_for("Failed to connect to remote host");
    stop(&mut proxy, end);
    let proxy = launch();
    proxy.lines.wait_for("Recovered connections: 1.");
    let backends = ["lo", "outside"].map(|name| Endpoint::unix(&path(name), 16));
    let mut served = backends[1].accept();
    let mut read = [0; 5];
    served.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");
}
