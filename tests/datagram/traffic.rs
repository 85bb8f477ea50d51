//! Random traffic of many clients.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::peers::*;
use crate::support::*;

/// Numbers that don't repeat soon.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn each_answer_goes_to_its_client_from_the_address_it_has_asked() {
    const CLIENTS: u64 = 200;
    const ROUNDS: u64 = 20;
    for back in KINDS {
        let backend = Peer::new(back);
        // The answer names what it answers.
        answer(&backend.socket, |mut datagram| {
            datagram.reverse();
            datagram
        });
        let front = Peer::udp("[::]:0");
        let port = front.port();
        // No session ends while a busy machine takes long.
        let options = ["--connections-max=1000", "--session-idle-time=1h"];
        let words = [&options[..], &[&backend.target]].concat();
        let proxy = Proxy::start_at(front, &words, |launch| launch);
        let addresses = ["127.0.0.1", "127.0.0.2", "127.3.2.1", "::1"];
        let run = |number: u64| {
            let mut random = Random((number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let ip = addresses[(number % 4) as usize].parse().unwrap();
            let client = client_of(SocketAddr::new(ip, port));
            let largest = if back == Kind::Udp6 && number % 4 == 3 { 65_527 } else { 65_507 };
            for round in 0..ROUNDS {
                let size = match random.below(4) {
                    0 => random.below(64),
                    1 => random.below(1500),
                    2 => random.below(largest + 1),
                    _ => [0, 1, 1472, largest][random.below(4) as usize],
                };
                let mut bytes = random_bytes(number << 32 | round, size as usize);
                // A queue may be full now and then. UDP promises no more. The next tries wait for longer: on a
                // busy machine, answers come late.
                let mut wait = Duration::from_millis(200);
                loop {
                    client.set_read_timeout(Some(wait)).unwrap();
                    client.send(&bytes).unwrap();
                    match receive_from(&client) {
                        Ok((mut answer, _)) => {
                            answer.reverse();
                            if answer == bytes {
                                break;
                            }
                            // The answer of an earlier try, which was late.
                            assert!(round > 0 || answer.is_empty(), "a stranger's answer");
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                            wait = (wait * 2).min(Duration::from_secs(1));
                        }
                    }
                }
                bytes.clear();
                pause(Duration::from_millis(random.below(5)));
            }
        };
        thread::scope(|scope| {
            let run = &run;
            (0..CLIENTS).for_each(|number| drop(scope.spawn(move || run(number))));
        });
        assert_eq!(proxy.sessions(), CLIENTS, "{back}");
        proxy.assert_adds_up();
        assert!(proxy.value("datagrams_delivered_total", &[]) >= 2 * CLIENTS * ROUNDS);
    }
}
