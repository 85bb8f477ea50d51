//! What the program is linked with, as build.rs says.

use std::fs;
use std::process::Command;

use crate::support::*;

#[test]
fn unwinder_is_linked_in() {
    let answer = Command::new("cc").arg("-print-file-name=libgcc_eh.a").output();
    if !answer.is_ok_and(|answer| answer.stdout.starts_with(b"/")) {
        return skip("the unwinder is linked in", "libgcc_eh.a");
    }
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
    assert_echoes(&mut front.connect());
    let maps = fs::read_to_string(format!("/proc/{}/maps", proxy.pid())).unwrap();
    assert!(maps.contains("libc.so") && !maps.contains("libgcc_s"), "{maps}");
}
