//! Urgent data (`MSG_OOB` in send(2)) at random places: each byte arrives as a byte like any other, and no
//! transfer is cut.
//!
//! `TRANSFERS=3000 cargo test --test urgent` has that many for each pair of families.

use std::env;

use crate::support::*;

fn transfers(options: &[&str]) {
    let transfers: usize = env::var("TRANSFERS").map_or(240, |it| it.parse().unwrap());
    for (front_family, back_family) in PAIRS {
        let is_unix = [front_family, back_family].contains(&Family::Unix);
        if is_unix && !urgent::unix_has_urgent_data() {
            skip("urgent data of Unix sockets", "Linux 5.15");
            continue;
        }
        let (front, backend) = (Endpoint::new(front_family), Endpoint::new(back_family));
        let systemd = FakeSystemd::with_fd_store(8);
        let launch = Launch::new(OURS).args(options).arg(&backend.target).listener(&front);
        let _proxy = launch.stored_by(&systemd).start();
        systemd.wait_for("READY=1");
        let half = transfers / 2;
        for (from_client, seeds) in [(true, 0..half), (false, half..transfers)] {
            let failures = urgent::carry(&front, &backend, from_client, seeds);
            let pair = format!("{front_family:?} to {back_family:?}, from client: {from_client}");
            assert!(failures.is_empty(), "{pair}: {failures:?}");
        }
    }
}

#[test]
fn forwards_urgent_data() {
    transfers(&[]);
}

#[test]
fn forwards_urgent_data_in_crash_mode() {
    transfers(&["--handover=crash"]);
}
