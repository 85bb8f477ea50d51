//! Requests to the metrics server, and the answers of backends to `--ready=http:PATH`.

use std::future::Future;
use std::time::Duration;

use hyper::Uri;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, join};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::backend::readiness::http::ask;
use crate::fuzz::assert_is_message;
use crate::metrics::exporter::answer;

/// A request gets one whole response or none. 200 is for GET and HEAD.
pub fn metrics_request(bytes: &[u8]) {
    let mut output = Vec::new();
    let stream = join(bytes, &mut output);
    // An error ends the connection.
    drop(in_time(answer(stream)));
    if output.is_empty() {
        return;
    }
    let end = output.windows(4).position(|it| it == b"\r\n\r\n").expect("the head ends") + 4;
    let (head, body) = output.split_at(end);
    let head = std::str::from_utf8(head).unwrap();
    assert!(head.starts_with("HTTP/1.1 ") || head.starts_with("HTTP/1.0 "), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let request = bytes.trim_ascii_start();
    let is_head = request.starts_with(b"HEAD ");
    match &head[9..12] {
        "200" => assert!(is_head || request.starts_with(b"GET ")),
        "400" | "404" | "405" | "414" | "431" | "505" => {}
        _ => panic!("{head}"),
    }
    // The responses of hyper itself have no body.
    let length = length.map_or(0, |length| length.parse().unwrap());
    assert!(body.len() == length || (is_head && body.is_empty()), "{head}");
}

/// A backend is ready only after a status of 2xx or 3xx.
pub fn backend_answer(bytes: &[u8]) {
    let (mut backend, proxy) = duplex(64 * 1024);
    let answer = async move {
        let _ = backend.read(&mut [0; 1024]).await;
        let _ = backend.write_all(bytes).await;
    };
    let path = Uri::from_static("/health");
    let result = in_time(async { tokio::join!(ask(proxy, "localhost".into(), &path), answer).0 });
    match result {
        Ok(()) => {
            let mut words = bytes.split(|byte| b" \r\n".contains(byte));
            assert!(words.any(|word| matches!(word, [b'2' | b'3', _, _])));
        }
        Err(message) => assert_is_message(&message),
    }
}

/// Runs to the end, which needs no other process.
fn in_time<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().unwrap();
    }
    RUNTIME.with(|runtime| {
        runtime.block_on(async { timeout(Duration::from_secs(10), future).await.expect("it ends") })
    })
}
