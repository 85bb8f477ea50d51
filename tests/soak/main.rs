//! A soak: each mode under mixed traffic, of which every byte is checked, with kills and restarts at
//! random moments. What the proxy holds at the end must be what it held after the first minute.
//!
//! `make soak` gives each mode 20 minutes (SOAK_SECONDS), and `cargo test` a few seconds. The seed is
//! printed, and SOAK_SEED sets it. The last lines are a table of figures.

mod datagrams;
mod ends;
mod load;
mod measures;
mod modes;
mod passing;
mod scraper;
mod script;
mod served;
mod stop;
mod subjects;
mod traffic;

#[allow(dead_code, reason = "of the other suite's application, only how it is started")]
#[path = "../proxy/application.rs"]
mod application;
#[allow(dead_code, reason = "of the other suite's peers, only the sockets")]
#[path = "../datagram/peers.rs"]
mod peers;
#[path = "../support/mod.rs"]
mod support;

use std::env;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use measures::{Row, table};
use modes::Course;
use support::stream::finds_what_is_wrong;
use support::*;

type Mode = fn(Course) -> Row;

fn main() -> ExitCode {
    let words: Vec<_> = env::args().collect();
    if words.get(1).is_some_and(|word| word == served::WORD) {
        served::serve(&words[2], &words[3]);
    }
    raise_descriptor_limit();
    let course = Course::from_env();
    println!("SOAK_SECONDS={} SOAK_SEED={}", course.time.as_secs(), course.seed);
    let modes: [(&str, Mode); 11] = [
        ("plain", modes::plain),
        ("threads", modes::threads),
        ("restart", modes::restart),
        ("crash_without_kills", modes::crash_without_kills),
        ("crash", modes::crash),
        ("on_demand", modes::on_demand),
        ("datagrams", modes::datagrams),
        ("datagrams_and_kills", modes::datagrams_and_kills),
        ("metrics", modes::metrics),
        ("descriptors", modes::descriptors),
        ("descriptors_and_restarts", modes::descriptors_and_restarts),
    ];
    let rows: Arc<Mutex<Vec<Row>>> = Arc::default();
    let mut trials = Trials::default();
    for (name, mode) in modes {
        let rows = Arc::clone(&rows);
        trials.add(name, move || {
            let row = mode(course);
            rows.lock().unwrap().push(row);
        });
    }
    trials.add("a lost, doubled or foreign byte is found", finds_what_is_wrong);
    let code = trials.run_on(2);
    println!("{}", table(&rows.lock().unwrap()));
    code
}
