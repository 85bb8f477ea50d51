//! A scraper's side of `--metrics=`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::{Running, TIMEOUT};

/// Where a proxy with `--metrics=ADDRESS:0` serves them, from its log.
pub fn metrics_address(proxy: &Running) -> SocketAddr {
    let line = proxy.lines.wait_for("Serving metrics on ");
    let address = line.trim().trim_end_matches('.').rsplit(' ').next().unwrap();
    address.parse().unwrap()
}

pub fn scrape(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}
