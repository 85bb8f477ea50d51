//! The application of COMMAND: this program with other arguments, which serves the backend's half of
//! the traffic.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use crate::application::Service;
use crate::stop::Stop;
use crate::support::pause;
use crate::support::stream::Random;
use crate::traffic::{Cuts, Traffic};

/// The first argument.
pub const WORD: &str = "application";

/// Serves at a port until a signal ends it. The log gets a line when it starts, and one for each failure.
pub fn serve(port: &str, log: &str) -> ! {
    let note = |line: String| {
        let mut file = OpenOptions::new().append(true).open(log).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    };
    note(format!("started {}", std::process::id()));
    // As applications are: it listens some time after its start.
    let mut random = Random::new(u64::from(std::process::id()));
    pause(Duration::from_millis(random.below(300)));
    let traffic = Arc::new(Traffic::new(0, Vec::new(), &[], Cuts::Application));
    traffic.serve(TcpListener::bind(format!("127.0.0.1:{port}")).unwrap().into());
    let mut noted = 0;
    loop {
        Stop::default().wait(Duration::from_millis(50));
        for failure in traffic.failures.all().drain(noted..) {
            note(format!("failed {failure}"));
            noted += 1;
        }
    }
}

/// What applications have logged.
pub fn failures(service: &Service) -> Vec<String> {
    let log = fs::read_to_string(service.directory.path().join("log")).unwrap();
    log.lines().filter_map(|line| line.strip_prefix("failed ")).map(String::from).collect()
}
