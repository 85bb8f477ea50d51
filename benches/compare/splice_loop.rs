//! The least that carries a stream. Each connection has two threads, one for each direction. Each
//! thread moves bytes by a blocking splice(2) into a pipe, and one out of it. There is no limit, no
//! time limit and no reset, so this is a floor for the rows with one connection, and not a proxy.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::thread;

use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};
use socket2::{Domain, SockAddr, Socket, Type};

/// Bytes of a pipe, the most that a user may have by default (pipe-max-size in pipe(7)).
const PIPE: usize = 1024 * 1024;

/// Carries what comes to `front` to `target`, until the process is ended.
pub(crate) fn serve(front: &SockAddr, target: &SockAddr) -> io::Result<()> {
    let listener = Socket::new(front.domain(), Type::STREAM, None)?;
    listener.bind(front)?;
    listener.listen(16)?;
    loop {
        let client = listener.accept()?.0;
        let backend = Socket::new(target.domain(), Type::STREAM, None)?;
        backend.connect(target)?;
        for socket in [&client, &backend] {
            if socket.domain()? != Domain::UNIX {
                socket.set_tcp_nodelay(true)?;
            }
        }
        let (client, backend) = (Arc::new(client), Arc::new(backend));
        for (from, to) in [(Arc::clone(&client), Arc::clone(&backend)), (backend, client)] {
            thread::spawn(move || carry(&from, &to));
        }
    }
}

fn carry(from: &Socket, to: &Socket) -> io::Result<()> {
    let (read, write) = pipe()?;
    fcntl_setpipe_size(&write, PIPE)?;
    loop {
        let mut filled = splice(from, None, &write, None, PIPE, SpliceFlags::MOVE)?;
        if filled == 0 {
            return to.shutdown(Shutdown::Write);
        }
        while filled > 0 {
            filled -= splice(&read, None, to, None, filled, SpliceFlags::MOVE)?;
        }
    }
}
