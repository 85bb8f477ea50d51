//! Transfers with urgent data at random places.

use std::io::{self, Write};
use std::net::Shutdown;
use std::sync::Mutex;
use std::thread;

use socket2::{Domain, Socket, Type};

use crate::support::*;

/// Transfers at a time.
const AT_A_TIME: usize = 4;

/// Bytes as they are sent: pieces, of which some are urgent in their last byte.
fn pieces(seed: u64) -> Vec<(Vec<u8>, bool)> {
    let dice = random_bytes(seed, 64);
    // Small ones arrive together, large ones are bulk.
    let sizes = [1, 40, 3_000, 100_000, 300_000];
    let piece = |index: usize| {
        let size = sizes[dice[index] as usize % sizes.len()] + usize::from(dice[index + 16]);
        (random_bytes(seed + index as u64, size), dice[index + 32] % 2 == 0)
    };
    (0..2 + dice[63] as usize % 5).map(piece).collect()
}

fn send(mut socket: &Socket, pieces: &[(Vec<u8>, bool)]) -> io::Result<()> {
    for (bytes, is_urgent) in pieces {
        if *is_urgent {
            let (last, rest) = bytes.split_last().unwrap();
            socket.write_all(rest)?;
            socket.send_out_of_band(&[*last])?;
        } else {
            socket.write_all(bytes)?;
        }
    }
    socket.shutdown(Shutdown::Write)
}

/// Whether a Unix socket has urgent data (Linux 5.15).
pub fn unix_has_urgent_data() -> bool {
    let (one, _other) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
    one.send_out_of_band(b"!").is_ok()
}

/// How received bytes differ from those sent.
fn difference(expected: &[u8], received: &[u8]) -> String {
    let same = expected.iter().zip(received).take_while(|(one, other)| one == other).count();
    format!("{} of {} bytes, the first {same} as sent", received.len(), expected.len())
}

/// Runs transfers from clients or to them, a few at a time, until one arrives otherwise than it was sent.
/// Returns the differences.
pub fn carry(
    front: &Endpoint,
    backend: &Endpoint,
    from_client: bool,
    seeds: std::ops::Range<usize>,
) -> Vec<String> {
    let failures = Mutex::new(Vec::new());
    for seed in seeds.step_by(AT_A_TIME) {
        let transfer = |one| {
            let (near, far) = (front.connect(), backend.accept());
            let (from, to) = if from_client { (near, far) } else { (far, near) };
            (from, to, pieces((seed + one) as u64 * 100))
        };
        let transfers: Vec<_> = (0..AT_A_TIME).map(transfer).collect();
        thread::scope(|scope| {
            let mut receivers = Vec::new();
            for (from, to, pieces) in &transfers {
                scope.spawn(|| {
                    if let Err(error) = send(from, pieces) {
                        failures.lock().unwrap().push(format!("sending fails: {error}"));
                    }
                });
                receivers.push(scope.spawn(|| {
                    let (received, end) = read_all(&mut to.try_clone().unwrap());
                    let sent: Vec<u8> =
                        pieces.iter().flat_map(|(bytes, _)| bytes).copied().collect();
                    if received != sent || end.is_err() {
                        let difference = difference(&sent, &received);
                        failures.lock().unwrap().push(format!("{difference}, {end:?}"));
                    }
                }));
            }
            // Those panic to which no end comes in time.
            for ended in receivers.into_iter().map(|receiver| receiver.join()) {
                if ended.is_err() {
                    failures.lock().unwrap().push("no end came".into());
                }
            }
        });
        if !failures.lock().unwrap().is_empty() {
            break;
        }
    }
    failures.into_inner().unwrap()
}
