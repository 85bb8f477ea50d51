//! Messages of random sizes, some with descriptors, between Unix sockets.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::io::Errno;

use crate::ends::{Fault, Receiver, Sender};
use crate::support::descriptors::{files, pass, receive_passed};
use crate::support::pause;
use crate::support::stream::{Random, mix};

/// Messages of a seed: each with its bytes, and how many descriptors come with its first.
fn messages(seed: u64) -> Vec<(u64, u64)> {
    let mut dice = Random::new(mix(seed));
    let mut message = || {
        let largest = [1, 30, 300, 20_000][dice.below(4) as usize];
        let count = if dice.is_one_of(2) { dice.below(5) } else { 0 };
        (1 + dice.below(largest), count)
    };
    let first = message();
    let count = first.0 % 24;
    std::iter::once(first).chain((0..count).map(|_| message())).collect()
}

/// What is written into a file, so that the receiver knows it.
fn content(seed: u64, number: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(seed).to_le_bytes());
    bytes[8..].copy_from_slice(&number.to_le_bytes());
    bytes
}

pub fn send(out: &mut Sender<'_>, seed: u64) -> Result<(), Fault> {
    let mut number = 0;
    for (size, count) in messages(seed) {
        let mut bytes = vec![0; size as usize];
        out.stream.fill(&mut bytes);
        let files: Vec<OwnedFd> = files(count as usize)
            .into_iter()
            .map(|fd| {
                let file = File::from(fd);
                file.write_all_at(&content(seed, number), 0).unwrap();
                number += 1;
                file.into()
            })
            .collect();
        let (mut done, mut files) = (0, &files[..]);
        while done < bytes.len() {
            match pass(out.socket, &bytes[done..], files) {
                Ok(sent) => (done, files) = (done + sent, &[]),
                // The user has a limit of descriptors in flight.
                Err(Errno::TOOMANYREFS) => pause(Duration::from_millis(1)),
                Err(errno) => return Err(Fault::Cut(format!("send descriptors: {errno}"))),
            }
        }
    }
    Ok(())
}

pub fn receive(input: &mut Receiver<'_>, seed: u64) -> Result<(), Fault> {
    let mut dice = Random::new(!seed);
    let mut due = Vec::new();
    let mut end = 0;
    for (size, count) in messages(seed) {
        due.extend((0..count).map(|_| end));
        end += size;
    }
    let mut next = 0;
    loop {
        let position = input.stream.position();
        let cut = |text: &str| Fault::Cut(format!("{text} at byte {position} of {end}"));
        let most = 1 + dice.below(30_000) as usize;
        let (bytes, files) =
            receive_passed(input.socket, most).map_err(|errno| cut(&errno.to_string()))?;
        for file in files {
            let mut found = [0; 16];
            let read = File::from(file).read_exact_at(&mut found, 0);
            if read.is_err() || found != content(seed, next as u64) || next >= due.len() {
                let text = format!("descriptor {next} of {} is another one", due.len());
                return Err(Fault::Wrong(text));
            }
            if position > due[next] {
                let text = format!("descriptor {next} of byte {} is late, {position}", due[next]);
                return Err(Fault::Wrong(text));
            }
            next += 1;
        }
        if bytes.is_empty() {
            break;
        }
        input.check(&bytes)?;
    }
    match input.stream.position() {
        at if at < end => Err(Fault::Cut(format!("an early end at byte {at} of {end}"))),
        _ if next < due.len() => Err(Fault::Wrong(format!("{next} of {} descriptors", due.len()))),
        _ => Ok(()),
    }
}
