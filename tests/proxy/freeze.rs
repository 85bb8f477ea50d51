//! --freeze-idle-time= and --min-run-time=: COMMAND's processes are stopped where they are, and go on
//! for the next client.

use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::application::{Service, ask, is_running, wait_for_end};
use crate::support::*;

/// State and CPU time in clock ticks of a process: proc_pid_stat(5).
fn stat(pid: Pid) -> (String, u64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let [user, system] = [11, 12].map(|index: usize| fields[index].parse::<u64>().unwrap());
    (fields[0].into(), user + system)
}

fn wait_until_frozen(pid: Pid) {
    let is_frozen = || (stat(pid).0 == "T").then_some(());
    poll_until(Instant::now() + TIMEOUT, is_frozen).expect("the process is frozen");
}

#[test]
fn frozen_command_costs_nothing_and_answers_at_once() {
    let _turn = measuring();
    // Children that never rest: one in COMMAND's group, one in a session of its own.
    let script = "while :; do :; done & echo busy $! >>\"$3\"
        setsid sh -c 'echo busy $$ >>\"$0\"; while :; do :; done' \"$3\" &
        exec perl \"$1\" \"$2\" \"$3\"";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--freeze-idle-time=300ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let first = service.pid();
    let both = || Some(service.logged_pids("busy")).filter(|busy| busy.len() == 2);
    let mut all = poll_until(Instant::now() + TIMEOUT, both).expect("both children run");
    all.push(first);
    all.iter().for_each(|pid| wait_until_frozen(*pid));
    service.proxy.lines.wait_for("Freezing sh, no connection for 300ms.");
    let before: Vec<_> = all.iter().map(|pid| stat(*pid)).collect();
    pause(Duration::from_secs(5));
    let after: Vec<_> = all.iter().map(|pid| stat(*pid)).collect();
    assert_eq!(before, after, "no CPU time in 5 s");

    let start = Instant::now();
    assert_eq!(service.pid(), first, "it was not started again");
    let took = start.elapsed();
    assert!(took < Duration::from_millis(300), "{took:?}");
    service.proxy.lines.wait_for("Thawing sh for a client.");
    let busy = all[0];
    let runs = || (stat(busy).1 > after[0].1).then_some(());
    poll_until(Instant::now() + TIMEOUT, runs).expect("the children go on");
    wait_until_frozen(first);
}

/// The number of exit(2), which ends one thread.
const EXIT: u32 = if cfg!(target_arch = "x86_64") { 60 } else { 93 };

#[test]
fn process_without_its_main_thread_is_frozen() {
    let script = format!(
        "perl -Mthreads -e 'threads->create(sub {{ 1 while 1 }}); syscall {EXIT}, 0' &
        echo busy $! >>\"$3\"; exec perl \"$@\""
    );
    let program = ["sh", "-c", &script, "sh", APP];
    let options = ["--freeze-idle-time=300ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let app = service.pid();
    let busy = service.wait_for_pid("busy");
    let has_ended = || (stat(busy).0 == "Z").then_some(());
    poll_until(Instant::now() + TIMEOUT, has_ended).expect("the main thread has ended");
    wait_until_frozen(app);
    // Children are stopped after their parents.
    let used = || {
        let before = stat(busy);
        pause(Duration::from_secs(1));
        (stat(busy) == before).then_some(before)
    };
    let before = poll_until(Instant::now() + TIMEOUT, used).expect("no CPU time in a second");
    assert_eq!(service.pid(), app);
    let runs = || (stat(busy).1 > before.1).then_some(());
    poll_until(Instant::now() + TIMEOUT, runs).expect("it goes on");
}

#[test]
fn process_that_was_stopped_before_stays_stopped() {
    let script = "sleep 600 & kill -STOP $!; echo held $! >>\"$3\"; exec perl \"$@\"";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--freeze-idle-time=100ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let app = service.pid();
    let held = service.wait_for_pid("held");
    wait_until_frozen(app);
    assert_eq!(service.pid(), app, "thawed");
    assert_eq!(stat(held).0, "T");
}

#[test]
fn thawed_command_answers_as_soon_as_a_running_one() {
    let _turn = measuring();
    let service = Service::start(Family::Tcp, &["--freeze-idle-time=50ms"], &[]);
    let app = service.pid();
    let answer = || {
        let start = Instant::now();
        assert_eq!(service.pid(), app);
        start.elapsed()
    };
    let mut times = [(); 20].map(|()| {
        wait_until_frozen(app);
        [answer(), answer()]
    });
    let [thawed, running] = [0, 1].map(|index| {
        times.sort_by_key(|pair| pair[index]);
        times[10][index]
    });
    // Within 10 ms, three times as much beside other tests.
    let most = running + Duration::from_millis(30);
    assert!(thawed < most, "thawed {thawed:?}, running {running:?}");
    println!("thawed {thawed:?}, running {running:?}");
}

#[test]
fn request_at_the_moment_of_freezing_is_served() {
    let service = Service::start(Family::Tcp, &["--freeze-idle-time=5ms"], &[]);
    let first = service.pid();
    let mut random = 1_u64;
    for _ in 0..1000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        pause(Duration::from_micros((random >> 33) % 10_000));
        assert_eq!(service.pid(), first);
    }
    assert!(service.proxy.lines.count("Thawing perl") > 0);
}

#[test]
fn frozen_command_ends_with_the_proxy() {
    for signal in [Signal::KILL, Signal::TERM] {
        let settings = ["stray=1"];
        let mut service = Service::start(Family::Tcp, &["--freeze-idle-time=100ms"], &settings);
        let all = [service.pid(), service.wait_for_pid("stray")];
        all.iter().for_each(|pid| wait_until_frozen(*pid));
        service.proxy.signal(signal);
        for pid in &all {
            let took = wait_for_end(*pid);
            assert!(took < Duration::from_secs(5), "{signal:?}: gone after {took:?}");
        }
        assert_eq!(service.logged_pids("asked"), [all[0]], "it was asked to stop");
        if signal == Signal::TERM {
            assert_eq!(service.proxy.wait().code(), Some(0));
        }
    }
}

#[test]
fn frozen_command_is_stopped_and_its_death_is_noticed() {
    let options = ["--freeze-idle-time=200ms", "--stop-idle-time=1s"];
    let service = Service::start(Family::Unix, &options, &[]);
    let first = service.pid();
    let start = Instant::now();
    wait_until_frozen(first);
    assert!(start.elapsed() < Duration::from_millis(900));
    let took = wait_for_end(first);
    // Freezing has not set the clock back.
    assert!(took < Duration::from_millis(1500), "stopped after {took:?}");
    let second = service.pid();
    assert_ne!(second, first);
    wait_until_frozen(second);
    kill_process(second, Signal::KILL).unwrap();
    service.proxy.lines.wait_for("(signal: 9 (SIGKILL))");
    assert_ne!(service.pid(), second);
}

#[test]
fn status_says_frozen() {
    let systemd = FakeSystemd::with_fd_store(0);
    let options = ["--freeze-idle-time=300ms"];
    let launch = |launch: Launch| launch.notify(&systemd);
    let service = Service::start_as(Family::Tcp, &options, &["perl", APP], &[], launch);
    service.pid();
    while !systemd.next().ends_with("; perl frozen") {}
    let mut client = service.connect();
    ask(&mut client, "pid");
    while !systemd.next().ends_with("; perl running") {}
}

#[test]
fn busy_command_is_neither_frozen_nor_stopped() {
    for ready in ["--ready=connect", "--ready=notify"] {
        let options =
            ["--busy=notify", ready, "--freeze-idle-time=200ms", "--stop-idle-time=600ms"];
        let settings = if ready == "--ready=notify" { &["ready=0.1"][..] } else { &[] };
        let service = Service::start(Family::Tcp, &options, settings);
        let app = service.pid();
        assert_eq!(ask(&mut service.connect(), "busy 1"), "sent");
        assert_eq!(ask(&mut service.connect(), "busy 1"), "sent", "once more is no second use");
        pause(Duration::from_millis(1200));
        assert_ne!(stat(app).0, "T", "busy");
        let start = Instant::now();
        assert_eq!(ask(&mut service.connect(), "busy 0"), "sent");
        wait_until_frozen(app);
        wait_for_end(app);
        assert!(start.elapsed() >= Duration::from_millis(550));
        assert_ne!(service.pid(), app);
    }
}

#[test]
fn systemd_notify_says_busy() {
    let script = "systemd-notify X_SOCKET_PROXYD_BUSY=1 && exec perl \"$@\"";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--busy=notify", "--stop-idle-time=300ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    let app = service.pid();
    pause(Duration::from_secs(1));
    assert!(is_running(app), "busy since its start");
}

#[test]
fn each_message_of_a_busy_command_counts() {
    let options = ["--busy=notify", "--freeze-idle-time=300ms"];
    let service = Service::start(Family::Tcp, &options, &[]);
    let app = service.pid();
    let mut client = service.connect();
    for round in 0..20 {
        assert_eq!(ask(&mut client, &format!("busy {}", (round + 1) % 2)), "sent");
    }
    assert_eq!(ask(&mut client, "busy 1"), "sent");
    drop(client);
    pause(Duration::from_secs(1));
    assert_ne!(stat(app).0, "T", "busy");
    assert_eq!(ask(&mut service.connect(), "busy 0"), "sent");
    wait_until_frozen(app);
}

#[test]
fn parent_that_waits_for_stopped_children_goes_on() {
    if !is_root_for("runuser") {
        return;
    }
    let script = "exec runuser -u root -- perl \"$@\"";
    let program = ["sh", "-c", script, "sh", APP];
    let options = ["--freeze-idle-time=100ms"];
    let service = Service::start_as(Family::Tcp, &options, &program, &[], |launch| launch);
    for _ in 0..10 {
        let app = service.pid();
        wait_until_frozen(app);
        let mut client = service.connect();
        assert_eq!(crate::application::pid(&mut client), app);
        for guard in service.guards() {
            let children = fs::read_to_string(format!("/proc/{guard}/task/{guard}/children"));
            let parent: i32 = children.unwrap().trim().parse().unwrap();
            // Its children go on before it does.
            let runs = || (stat(Pid::from_raw(parent).unwrap()).0 != "T").then_some(());
            poll_until(Instant::now() + TIMEOUT, runs).expect("the parent goes on");
        }
    }
}

#[test]
fn drain_does_not_wait_for_a_busy_command() {
    let options = ["--busy=notify", "--drain-time=1min"];
    let mut service = Service::start(Family::Tcp, &options, &[]);
    assert_eq!(ask(&mut service.connect(), "busy 1"), "sent");
    let start = Instant::now();
    service.proxy.signal(Signal::TERM);
    assert_eq!(service.proxy.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn busy_command_that_ends_is_not_busy() {
    let options = ["--busy=notify", "--exit-idle-time=500ms"];
    let mut service = Service::start(Family::Tcp, &options, &[]);
    let app = service.pid();
    assert_eq!(ask(&mut service.connect(), "busy 1"), "sent");
    pause(Duration::from_millis(800));
    assert!(service.proxy.is_running());
    kill_process(app, Signal::KILL).unwrap();
    assert_eq!(service.proxy.wait().code(), Some(0));
}

#[test]
fn min_run_time_holds_freezing_and_stopping_back() {
    let options = ["--freeze-idle-time=100ms", "--stop-idle-time=200ms", "--min-run-time=2s"];
    let service = Service::start(Family::Tcp, &options, &[]);
    let start = Instant::now();
    let app = service.pid();
    pause(Duration::from_millis(1200));
    assert_ne!(stat(app).0, "T", "it is not frozen");
    wait_for_end(app);
    let took = start.elapsed();
    assert!(took > Duration::from_millis(1900) && took < Duration::from_secs(6), "{took:?}");
    assert_ne!(service.pid(), app);
    // But not SIGTERM.
    let app = service.pid();
    service.proxy.signal(Signal::TERM);
    let took = wait_for_end(app);
    assert!(took < Duration::from_millis(1900), "{took:?}");
    assert!(!is_running(app));
}
