//! How a sample of each row for datagrams is taken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::clock;
use crate::contender::Contender;
use crate::datagrams::{self, Askers, Filler};
use crate::load::Stats;
use crate::process::tree;
use crate::stage::{Effort, Meter, Sample, Stage, durations, latency};

impl Stage {
    pub(crate) fn datagrams(
        &self,
        contender: &Contender,
        size: usize,
        sessions: usize,
        effort: Effort,
    ) -> Sample {
        let backend = datagrams::backend();
        let running = self.start(contender, &address_of(&backend).into());
        let front = running.front.as_socket().expect("an address");
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| datagrams::echo(&backend, &is_over));
            let mut askers = Askers::new(front, sessions, size);
            askers.begin();
            askers.run(clock::after(effort.seconds * 0.3));
            askers.stats = Stats::new();
            let meter = Meter::start(&running);
            askers.run(clock::after(effort.seconds));
            let sample = meter.sample(askers.stats.done as f64, askers.stats.failures);
            is_over.store(true, Ordering::Relaxed);
            Sample { latency: latency(&askers.stats), ..sample }
        })
    }

    pub(crate) fn datagrams_up(
        &self,
        contender: &Contender,
        segments: usize,
        effort: Effort,
    ) -> Sample {
        let backend = datagrams::backend();
        let running = self.start(contender, &address_of(&backend).into());
        let front = running.front.as_socket().expect("an address");
        let (counted, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| datagrams::count(&backend, &counted, &is_over));
            let mut filler = Filler::new(front, segments, &counted);
            filler.run(clock::after(effort.seconds * 0.3));
            let (before, early) = (counted.load(Ordering::Acquire), filler.failures);
            let meter = Meter::start(&running);
            filler.run(clock::after(effort.seconds));
            let datagrams = counted.load(Ordering::Acquire) - before;
            let sample = meter.sample(datagrams as f64, filler.failures - early);
            is_over.store(true, Ordering::Relaxed);
            sample
        })
    }

    /// Each client but the first comes when the application has ended.
    pub(crate) fn datagram_cold_start(&self, contender: &Contender, effort: Effort) -> Sample {
        let target = address_of(&datagrams::backend()).into();
        let contender = contender.with_application("--stop-idle-time=20ms", self.back, &target);
        let running = self.start(&contender, &target);
        let front = running.front.as_socket().expect("an address");
        let proxy = running.pid().expect("a process");
        let (mut times, mut failures) = (Vec::new(), 0);
        for client in 0..=effort.starts {
            let begin = clock::now();
            let mut asker = Askers::new(front, 1, 64);
            match asker.ask_once(10) {
                false => failures += 1,
                true if client == 0 => {}
                true => times.push(clock::now() - begin),
            }
            let deadline = clock::after(10.0);
            while tree(proxy).len() > 1 && clock::now() < deadline {
                thread::yield_now();
            }
        }
        durations(times, failures)
    }
}

fn address_of(socket: &std::net::UdpSocket) -> std::net::SocketAddr {
    socket.local_addr().expect("an address")
}
