//! What the program is linked with, as build.rs says.

use std::fs;

use crate::support::*;

#[test]
fn unwinder_is_linked_in() {
    if option_env!("UNWINDER_IS_LINKED_IN").is_none() {
        return skip("the unwinder is linked in", "libgcc_eh.a and glibc");
    }
    let (front, backend) = (Endpoint::new(Family::Tcp), echo_backend(Family::Tcp));
    let proxy = Launch::new(OURS).arg(&backend.target).listener(&front).start();
    assert_echoes(&mut front.connect());
    let maps = fs::read_to_string(format!("/proc/{}/maps", proxy.pid())).unwrap();
    assert!(maps.contains("libc.so") && !maps.contains("libgcc_s"), "{maps}");
}
