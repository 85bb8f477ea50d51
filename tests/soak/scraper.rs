//! A load with a scraper beside it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::load::{Failures, Load, Totals};
use crate::stop::Stop;
use crate::support::*;
use crate::traffic::Traffic;

pub struct Scraped<'a> {
    pub traffic: &'a Traffic,
    pub address: SocketAddr,
}

impl Scraped<'_> {
    /// Scrapes until the phase ends. What counts events never counts backwards.
    fn scrape(&self) {
        let mut last = BTreeMap::new();
        while !self.traffic.stop.wait(Duration::from_millis(10)) {
            let text = scrape(self.address);
            for (series, now) in counters(&text) {
                let before = last.insert(series.to_string(), now).unwrap_or(0.0);
                if now < before {
                    self.traffic.failures.add(format!("{series} falls from {before} to {now}"));
                }
            }
        }
    }
}

/// The series that count events.
fn counters(text: &str) -> impl Iterator<Item = (&str, f64)> {
    let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let is_counter = |series: &str| {
        let name = series.split('{').next().unwrap();
        ["_total", "_count", "_bucket"].iter().any(|end| name.ends_with(end))
    };
    lines
        .filter_map(move |(series, value)| Some((series, value.parse().ok()?)))
        .filter(move |(series, _)| is_counter(series))
}

/// The connections that the proxy says are open.
pub fn open_connections(address: SocketAddr) -> usize {
    let text = scrape(address);
    let lines = text.lines().filter(|line| line.starts_with("socket_proxyd_connections_open{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as usize).sum()
}

impl Load for Scraped<'_> {
    fn stop(&self) -> &Stop {
        &self.traffic.stop
    }

    fn failures(&self) -> &Failures {
        &self.traffic.failures
    }

    fn warm_up(&self) {
        self.traffic.warm_up();
    }

    fn run_phase(&self, seed: u64) {
        thread::scope(|scope| {
            scope.spawn(|| self.scrape());
            self.traffic.run_phase(seed);
        });
    }

    fn run_calm_phase(&self, seed: u64) {
        self.traffic.run_calm_phase(seed);
    }

    fn totals(&self) -> Totals {
        self.traffic.totals()
    }
}
