//! What a proxy costs: its CPU time per unit of work, ours beside the installed
//! systemd-socket-proxyd, in interleaved rounds; medians.
//!
//! `cargo bench` takes a minute; `cargo bench -- --quick` a second, and is there so that CI runs
//! this once.

#[path = "../tests/support/mod.rs"]
mod support;

use std::env;
use std::io::{Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use support::*;

/// A kind of work: how many units of it were done, by a client of a proxy.
type Work = fn(&Endpoint, usize) -> usize;

const WORK: [(&str, &str, usize, Work); 3] = [
    ("64 B round trips, 16 connections", "us/round trip", 20_000, round_trips),
    ("connect, 64 B, close", "us/connection", 2_000, short_connections),
    ("bulk, there and back", "us/MB", 1_000, bulk),
];

fn main() {
    let quick = env::args().any(|arg| arg == "--quick" || arg == "--test");
    let (rounds, share) = if quick { (1, 100) } else { (5, 1) };
    let programs: Vec<_> = [
        ("ours", env!("CARGO_BIN_EXE_socket-proxyd")),
        ("systemd-socket-proxyd", "/lib/systemd/systemd-socket-proxyd"),
    ]
    .into_iter()
    .filter(|(_, path)| Path::new(path).exists())
    .collect();
    for (front, back) in [(Family::Tcp, Family::Tcp), (Family::Tcp, Family::Unix)] {
        for (name, unit, amount, work) in WORK {
            println!("{name}, {front:?} to {back:?}");
            let mut costs = vec![Vec::new(); programs.len()];
            for _ in 0..rounds {
                for ((_, path), costs) in programs.iter().zip(&mut costs) {
                    costs.push(cost(path, front, back, amount / share, work));
                }
            }
            for ((program, _), mut costs) in programs.iter().zip(costs) {
                costs.sort();
                let micros = |cost: &Duration| cost.as_nanos() as f64 / 1000.0;
                let (median, low) = (micros(&costs[costs.len() / 2]), micros(&costs[0]));
                let high = micros(&costs[costs.len() - 1]);
                println!("  {program:24} {median:9.2} {unit}  ({low:.2} to {high:.2})");
            }
        }
    }
}

/// The proxy's CPU time per unit.
fn cost(program: &str, front: Family, back: Family, amount: usize, work: Work) -> Duration {
    let (front, backend) = (Endpoint::new(front), echo_backend(back));
    let proxy = Launch::new(program).arg(&backend.target).listener(&front).start();
    echoes(&mut front.connect());
    let before = proxy.cpu();
    let units = work(&front, amount);
    let spent = proxy.cpu() - before;
    spent / u32::try_from(units.max(1)).unwrap()
}

fn round_trips(front: &Endpoint, amount: usize) -> usize {
    const CONNECTIONS: usize = 16;
    let each = amount / CONNECTIONS;
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            let mut client = front.connect();
            scope.spawn(move || {
                let _ = client.set_tcp_nodelay(true);
                let mut answer = [0; 64];
                for _ in 0..each {
                    client.write_all(&[7; 64]).unwrap();
                    client.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, [7; 64]);
                }
            });
        }
    });
    each * CONNECTIONS
}

fn short_connections(front: &Endpoint, amount: usize) -> usize {
    for _ in 0..amount {
        let mut client = front.connect();
        exchange(&mut client, &[7; 64]).unwrap();
    }
    amount
}

/// The backend echoes, so that each byte goes both ways and is seen to arrive.
fn bulk(front: &Endpoint, megabytes: usize) -> usize {
    let client = front.connect();
    let mut writer = client.try_clone().unwrap();
    let mut reader = client;
    thread::scope(|scope| {
        scope.spawn(move || {
            let chunk = vec![7; 1_000_000];
            (0..megabytes).for_each(|_| writer.write_all(&chunk).unwrap());
        });
        let mut buffer = vec![0; 256 * 1024];
        let mut received = 0;
        while received < megabytes * 1_000_000 {
            let bytes = reader.read(&mut buffer).unwrap();
            assert!(bytes > 0, "the end came early");
            received += bytes;
        }
    });
    megabytes
}
