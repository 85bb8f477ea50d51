//! `--ready=http:PATH`: the backend is ready when it answers a request with 2xx or 3xx.

use std::error::Error;
use std::io;
use std::pin::pin;

use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, join};
use tokio::net::TcpStream;

use crate::config::target::Target;
use crate::logging::os_message;
use crate::socket::Socket;
use crate::socket::address::Address;

/// Asks the backend once, with `header` ahead of the request.
///
/// # Errors
/// The status that the backend answered with, or why there is none.
pub async fn probe(
    socket: Socket,
    header: &[u8],
    target: &Target,
    path: &Uri,
) -> Result<(), String> {
    let host = match target {
        Target::Name(_) | Target::Address(Address::Inet(_)) => target.to_string(),
        // No other address is valid in a URL.
        Target::Address(_) => "localhost".into(),
    };
    // tokio's TcpStream makes the same system calls for other stream sockets.
    let open = || TcpStream::from_std(socket.release()?.into());
    let mut stream = open().map_err(|error| os_message(&error))?;
    stream.write_all(header).await.map_err(|error| os_message(&error))?;
    let (reader, writer) = stream.split();
    ask(join(reader.take(ANSWER_MAX as u64), writer), host, path).await
}

/// Sends the request, and reads the answer.
///
/// # Errors
/// As those of [`probe`].
pub async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    host: String,
    path: &Uri,
) -> Result<(), String> {
    let request = Request::get(path).header(HOST, host).header(CONNECTION, "close");
    let request = request.body(String::new()).map_err(|error| error.to_string())?;
    let mut http = http1::Builder::new();
    http.max_buf_size(ANSWER_MAX).max_headers(HEADERS_MAX).title_case_headers(true);
    let (mut sender, connection) = http.handshake(TokioIo::new(stream)).await.map_err(reason)?;
    let mut answer = pin!(sender.send_request(request));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // The connection has ended, and with it `answer`.
        _ = connection => answer.await,
    };
    let status = answer.map_err(reason)?.status();
    if status.is_success() || status.is_redirection() { Ok(()) } else { Err(status.to_string()) }
}

/// Returns why there is no answer. An error of the socket says more than hyper's.
fn reason(error: hyper::Error) -> String {
    let io_error = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    io_error.map_or_else(|| error.to_string(), os_message)
}

/// Headers of an answer: more do not fit into it.
const HEADERS_MAX: usize = ANSWER_MAX / 4;

/// Bytes of an answer that are read.
const ANSWER_MAX: usize = 16 * 1024;
