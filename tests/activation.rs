//! Passed descriptors are taken, and their variables are removed. In a process of its own, since the
//! environment belongs to the process.

mod support;

use std::env;
use std::process::Command;

use socket_proxyd::testing::take_passed_fds;
use support::*;

const CHILD: &str = "ACTIVATION_TEST_CHILD";

fn main() {
    if env::var_os(CHILD).is_some() {
        return child();
    }
    let fronts = [Endpoint::new(Family::Tcp), Endpoint::new(Family::Unix)];
    let mut launch = Launch::new(env::current_exe().unwrap()).env(CHILD, 1);
    for front in &fronts {
        launch = launch.listener(front);
    }
    let mut child = launch.env("LISTEN_FDNAMES", "first:").start();
    let status = child.wait();
    assert!(status.success(), "{}", child.lines.all());
    println!("1 passed, 0 failed");
}

fn child() {
    // SAFETY: there is no other thread yet, and no other code uses the descriptors.
    let inherited = unsafe { take_passed_fds() }.unwrap();
    let names: Vec<_> = inherited.iter().map(|inherited| &*inherited.name).collect();
    assert_eq!(names, ["first", "unknown"]);
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        assert!(env::var_os(name).is_none(), "{name} stayed");
    }
    let open = "exec 2>/dev/null; test -e /proc/self/fd/3 || test -e /proc/self/fd/4";
    let inherited_on = Command::new("/bin/sh").args(["-c", open]).status().unwrap();
    assert!(!inherited_on.success(), "a child has the sockets, too");
}
