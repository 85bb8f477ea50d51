//! A proxy as a process of its own, in the thread of its simulation.

use std::ffi::{OsStr, OsString};
use std::mem::ManuallyDrop;
use std::time::Duration;

use socket_proxyd::testing::{
    Config, Notifier, PassedFd, Request, Signals, StartGuard, start_and_serve,
};
use tokio::runtime::{Builder, LocalRuntime};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{JoinHandle, yield_now};
use tokio::time::sleep;

use crate::descriptors::{ABOVE, first, is_open};
use crate::syscalls::Faults;

pub struct Process {
    /// Not dropped when the simulation fails: then the program would end all of it.
    runtime: ManuallyDrop<LocalRuntime>,
    service: JoinHandle<Result<(), String>>,
    terminate: UnboundedSender<()>,
    pub faults: Faults,
}

impl Process {
    /// Starts a proxy with these arguments and sockets.
    pub fn start(
        arguments: &[String],
        passed: impl FnOnce() -> Vec<PassedFd>,
        notify: &OsStr,
        start_guard: StartGuard,
        mut faults: Faults,
    ) -> Self {
        let arguments = std::iter::once("socket-proxyd").chain(arguments.iter().map(|it| &**it));
        let Request::Run(config) = Config::parse(arguments.map(OsString::from)).unwrap() else {
            panic!("{:?} runs nothing", "--help");
        };
        let runtime = event_loop();
        faults.kept = (first()..ABOVE).filter(|fd| is_open(*fd)).collect();
        let (terminate, receiver) = unbounded_channel();
        let (signals, notifier) = (Signals::simulated(receiver), Notifier::to(notify).unwrap());
        let service =
            runtime.spawn_local(start_and_serve(config, passed(), signals, notifier, start_guard));
        let runtime = ManuallyDrop::new(runtime);
        Self { runtime, service, terminate, faults }
    }

    /// Lets it run for some turns of its event loop, without any time.
    pub fn step(&mut self, turns: u64) {
        let turns = async {
            for _ in 0..turns {
                yield_now().await;
            }
        };
        self.faults.apply(|| self.runtime.block_on(turns));
    }

    /// Lets time pass: all that happens in it happens at once.
    pub fn pass(&mut self, time: Duration) {
        self.faults.apply(|| self.runtime.block_on(async { sleep(time).await }));
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.terminate.send(()).unwrap();
    }

    pub fn has_ended(&self) -> bool {
        self.service.is_finished()
    }

    /// Takes what has ended out of the way. Returns the result of the service.
    pub fn exit(self) -> (Result<(), String>, Faults) {
        let Self { runtime, service, mut faults, .. } = self;
        let result = runtime.block_on(service).unwrap();
        faults.apply(|| drop(ManuallyDrop::into_inner(runtime)));
        (result, faults)
    }

    /// Sends SIGKILL, unless that is done.
    pub fn kill(self) -> Faults {
        let Self { runtime, service, mut faults, .. } = self;
        if !faults.is_killed {
            faults.kill();
        }
        faults.apply(|| drop((service, ManuallyDrop::into_inner(runtime))));
        (faults.is_killed, faults.kill_in) = (false, None);
        faults
    }
}

/// Returns an event loop with its clock stopped, which goes on to the next timer when nothing else
/// happens.
pub fn event_loop() -> LocalRuntime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().start_paused(true).build_local(Default::default()).unwrap()
}
