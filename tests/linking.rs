//! What the program is linked with, as build.rs says.

mod support;

use std::env;
use std::fs;
use std::process::Command;

use support::*;

#[test]
fn the_unwinder_is_linked_in() {
    let answer = Command::new("cc").arg("-print-file-name=libgcc_eh.a").output();
    if !answer.is_ok_and(|answer| answer.stdout.starts_with(b"/")) {
        eprintln!("SKIPPED: the unwinder: the compiler has no libgcc_eh.a");
        assert!(env::var_os("CI").is_none());
        return;
    }
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(env!("CARGO_BIN_EXE_socket-proxyd"))
        .arg(&backend.target)
        .listener(&front)
        .start();
    echoes(&mut front.connect());
    let maps = fs::read_to_string(format!("/proc/{}/maps", proxy.pid())).unwrap();
    assert!(maps.contains("libc.so") && !maps.contains("libgcc_s"), "{maps}");
}
