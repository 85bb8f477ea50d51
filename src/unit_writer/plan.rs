//! The arguments checked together. What is wrong with a single value is found by its parser in
//! `values.rs`.

use std::ffi::OsString;
use std::iter;
use std::path::Path;

use crate::config::check;
use crate::config::options::Arguments;
use crate::config::parser::Request;
use crate::config::target::Target;
use crate::config::values::SourceMode;
use crate::unit_writer::addresses::{check_addresses, check_isolated};
use crate::unit_writer::escape::unit_name;
use crate::unit_writer::options::UnitArguments;
use crate::unit_writer::values::{
    TEMPORARY, check_program, check_socket, is_below, refuse_if, socket_path,
};

/// Checked arguments, and what follows from them.
#[derive(Debug)]
pub struct Plan {
    pub arguments: UnitArguments,
    pub name: String,
    /// The name of the proxy's units, without a suffix.
    pub unit: String,
    pub targets: Vec<Target>,
    /// What the proxy reads in ExecStart=.
    pub proxy: Arguments,
}

impl Plan {
    /// Checks the arguments together.
    ///
    /// # Errors
    /// One line on what is wrong.
    pub fn new(arguments: UnitArguments) -> Result<Self, String> {
        let [name] = &arguments.names[..] else {
            return Err(MANY_NAMES.into());
        };
        let is_selected = |target: &String| target.contains('=');
        let unit = format!("{}-proxy", unit_name(name));
        refuse_if(&[
            (
                arguments.targets.len() > 1 && !arguments.targets.iter().any(is_selected),
                "There are several --target= options; write SELECTOR=TARGET in each, as in \
                 --target=:8080=127.0.0.1:3000.",
            ),
            (
                arguments.service == Some(format!("{unit}.service")),
                "--service= cannot be the proxy's own unit.",
            ),
            (
                arguments.metrics.is_some()
                    && arguments.idle_time().is_some()
                    && arguments.exits_when_idle(),
                "--metrics= cannot be combined with --idle= without a COMMAND or a --stop-command=: each \
                 scrape would start the proxy again, with its counters at zero.",
            ),
            (
                arguments.passive_from.is_some() && arguments.service.is_some(),
                "--passive-from= cannot be combined with --service=: systemd starts the proxy, and with \
                 it the service, for passive clients as well. (Write --start-command= instead.)",
            ),
            (
                arguments.isolate && arguments.service.is_none() && arguments.command.is_none(),
                "--isolate needs a --service= or a COMMAND, which shares the proxy's network.",
            ),
        ])?;
        let proxy = proxy(&arguments)?;
        refuse_if(&[(
            proxy.source == SourceMode::Client && !arguments.isolate,
            "--source=client needs --isolate. (For a backend with the network of the host, copy the units of \
             the set source-client.)",
        )])?;
        let targets = check(&proxy)?;
        check_addresses(&arguments, &targets, &unit)?;
        if arguments.isolate {
            targets.iter().try_for_each(check_isolated)?;
        }
        for (origin, words) in proxy.programs() {
            check_program(origin, words)?;
        }
        let targets: Vec<_> = targets.iter().cloned().collect();
        if arguments.command.is_some() {
            targets.iter().try_for_each(|target| check_socket(target, name))?;
        }
        let is_hidden = |path: &&Path| is_below(path, &TEMPORARY);
        match targets.iter().filter_map(socket_path).find(is_hidden) {
            Some(path) if arguments.user.is_none() && arguments.command.is_none() => Err(format!(
                "Invalid --target={}: a dynamic user has a /tmp of its own; add --user=, or have the \
                 backend listen elsewhere.",
                path.display()
            )),
            _ => Ok(Self { name: name.clone(), unit, targets, proxy, arguments }),
        }
    }

    pub fn service(&self) -> String {
        format!("{}.service", self.unit)
    }

    pub fn socket(&self) -> String {
        format!("{}.socket", self.unit)
    }

    /// Returns the name of the socket unit for Prometheus, whether or not there is one.
    pub fn metrics_socket(&self) -> String {
        format!("{}-metrics.socket", unit_name(&self.name))
    }

    /// Returns the names of the socket units.
    pub fn sockets(&self) -> Vec<String> {
        let metrics = self.arguments.metrics.as_ref().map(|_| self.metrics_socket());
        iter::once(self.socket()).chain(metrics).collect()
    }

    /// Whether the backend sees the addresses of clients.
    pub fn shows_clients(&self) -> bool {
        self.proxy.source == SourceMode::Client
    }

    /// Returns the directory below /run in which COMMAND creates its socket, and which systemd
    /// creates and removes with the unit.
    pub fn runtime_directory(&self) -> Option<&Path> {
        self.arguments.command.as_ref()?;
        let directory = self.targets.iter().find_map(socket_path)?.parent()?;
        directory.starts_with("/run").then_some(directory)
    }
}

/// Returns the command line of the proxy, without the program.
pub fn proxy_words(arguments: &UnitArguments) -> Vec<OsString> {
    let mut words = Vec::new();
    words.extend(arguments.derived_options().into_iter().map(OsString::from));
    words.extend(arguments.passed_options().into_iter().map(OsString::from));
    words.extend(arguments.targets.iter().map(OsString::from));
    if let Some(command) = &arguments.command {
        words.push("--".into());
        words.extend_from_slice(command);
    }
    words
}

/// Reads the command line of the proxy as the proxy does.
fn proxy(arguments: &UnitArguments) -> Result<Arguments, String> {
    let words = iter::once(OsString::from("socket-proxyd")).chain(proxy_words(arguments));
    match Arguments::read(words)? {
        Request::Run(proxy) => Ok(proxy),
        Request::Print(text) => Err(text),
    }
}

const MANY_NAMES: &str = "There is more than one NAME. (Put -- in front of a COMMAND, and write a \
                          relative directory as --write=DIR.)";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit_writer::options::tests::parse;

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table of command lines")]
    fn rejects_what_cannot_work() {
        let plan = |line: &str| Plan::new(parse(line)?);
        let good = "--listen=8080 --target=127.0.0.1:3000 app";
        assert!(plan(good).is_ok());
        let abstract_name =
            |bytes: usize| format!("--listen=@{} --target=/a app", "x".repeat(bytes));
        assert!(plan(&abstract_name(106)).is_ok());
        assert!(plan(&abstract_name(107)).unwrap_err().ends_with("at most 106 bytes after the @"));
        for (line, error) in [
            (
                "app",
                "the following required arguments were not provided: --listen <ADDRESS> --target <TARGET>",
            ),
            (
                "--listen=8080 app",
                "the following required arguments were not provided: --target <TARGET>",
            ),
            (
                "--listen=8080 --target=/a",
                "the following required arguments were not provided: <NAME>...",
            ),
            (
                "--listen=8080 --target=/a app other",
                "There is more than one NAME. (Put -- in front of a COMMAND, and write a relative directory as --write=DIR.)",
            ),
            (
                "--listen=localhost:80 --target=/a app",
                "invalid value 'localhost:80' for '--listen <ADDRESS>': a socket unit takes no names, write IP:PORT",
            ),
            (
                "--listen=[fe80::1%2]:80 --target=/a app",
                "invalid value '[fe80::1%2]:80' for '--listen <ADDRESS>': it is of one interface; write [::]:PORT, and BindToDevice= in a drop-in",
            ),
            (
                "--listen=1 --target=/a\u{1} app",
                "invalid value '/a' for '--target <TARGET>': control characters are not allowed",
            ),
            (
                "--listen=8080 --target=80 app",
                "Invalid target \"80\": that is a port; for a port of this machine write 127.0.0.1:80.",
            ),
            (
                "--listen=8080 --listen=127.0.0.1:8080 --target=/a app",
                "--listen=127.0.0.1:8080 overlaps with --listen=8080.",
            ),
            (
                "--listen=8080 --listen=192.0.2.1:8080 --target=/a app",
                "--listen=192.0.2.1:8080 overlaps with --listen=8080.",
            ),
            (
                "--listen=0.0.0.0:8080 --listen=8080 --target=/a app",
                "--listen=8080 overlaps with --listen=0.0.0.0:8080.",
            ),
            (
                "--listen=8080 --target=/a /x",
                "invalid value '/x' for '<NAME>...': the names of its units would begin with a dash",
            ),
            (
                "--listen=8080 --target=/a app.service",
                "invalid value 'app.service' for '<NAME>...': write it without .service",
            ),
            (
                "--listen=1 --target=/a --service=a.socket app",
                "invalid value 'a.socket' for '--service <UNIT>': it must be the name of a .service unit",
            ),
            (
                "--listen=/ --target=/a app",
                "invalid value '/' for '--listen <ADDRESS>': that is a directory",
            ),
            (
                "--listen=1 --target=-x:80 app",
                "invalid value '-x:80' for '--target <TARGET>': it begins with a dash, as an option does",
            ),
            (
                "--listen=1 --target=/a --service=-x app",
                "invalid value '-x' for '--service <UNIT>': it begins with a dash, as an option of systemctl(1) does",
            ),
            (
                "--listen=/run/../a --target=/a app",
                "invalid value '/run/../a' for '--listen <ADDRESS>': systemd takes no .. in it",
            ),
            (
                "--listen=1 --target=/a --service=@x app",
                "invalid value '@x' for '--service <UNIT>': it begins with an @",
            ),
            (
                "--listen=1 --target=/a --service=a@ app",
                "invalid value 'a@' for '--service <UNIT>': a template has no process; name an instance of it",
            ),
            (
                "--listen=1 --target=/a --service=app-proxy app",
                "--service= cannot be the proxy's own unit.",
            ),
            (
                "--listen=1 --target=/a --service=a app -- /bin/b",
                "the argument '--service <UNIT>' cannot be used with '[COMMAND]...'",
            ),
            (
                "--listen=1 --target=/a app -- ./b",
                "Invalid COMMAND \"./b\": the service starts in /, write an absolute path.",
            ),
            (
                "--listen=1 --target=/a --idle=x app",
                "invalid value 'x' for '--idle <TIME>': it is not a time span (30s, 5min 20s, infinity)",
            ),
            (
                "--listen=1 --target=/a --user=-x app",
                "invalid value '-x' for '--user <USER>': that is not the name of an account",
            ),
            (
                "--listen=1 --target=/a --force app",
                "the following required arguments were not provided: --write[=<DIR>]",
            ),
            (
                "--listen=1 --target=/a --target=/b app",
                "There are several --target= options; write SELECTOR=TARGET in each, as in --target=:8080=127.0.0.1:3000.",
            ),
            (
                "--listen=1 --listen=2 --target=:1=/a app",
                "No selector selects the socket app-proxy.socket ([::]:2). The sockets are: app-proxy.socket ([::]:1), app-proxy.socket ([::]:2).",
            ),
            (
                "--listen=1 --target=/a -- /bin/b",
                "the following required arguments were not provided: <NAME>...",
            ),
            (
                "--listen=1 --target=/a --write= app",
                "a value is required for '--write[=<DIR>]' but none was supplied",
            ),
            (
                "--listen=1 --target=/a --service=a --service=b app",
                "the argument '--service <UNIT>' cannot be used multiple times",
            ),
            (
                "--listen=0 --target=/a app",
                "invalid value '0' for '--listen <ADDRESS>': clients could not know the port",
            ),
            ("--listen=1 --listen=1 --target=/a app", "The address 1 is given twice."),
            ("--listen=1 --metrics=1 --target=/a app", "The address 1 is given twice."),
            (
                "--listen=80 --target=127.0.0.1:80 app",
                "--listen=80 is the address of --target=127.0.0.1:80; let the backend listen on another address.",
            ),
            (
                "--listen=1 --target=/a --user=root app",
                "invalid value 'root' for '--user <USER>': the units drop root's privileges; leave this option out",
            ),
            (
                "--listen=1 --target=/a app -- /home/me/b",
                "Invalid COMMAND \"/home/me/b\": the service cannot see /home, /root and /tmp; put it in /usr/local or /opt.",
            ),
            (
                "--listen=1 --target=/run/app.sock app -- /bin/b",
                "Invalid --target=/run/app.sock: COMMAND cannot create a socket there. (Write /run/app/SOCKET, whose directory systemd creates, and a NAME that is a plain word and not a directory of the system.)",
            ),
            (
                "--listen=1 --target=/run/user/app.sock user -- /bin/b",
                "Invalid --target=/run/user/app.sock: COMMAND cannot create a socket there. (Write /run/user/SOCKET, whose directory systemd creates, and a NAME that is a plain word and not a directory of the system.)",
            ),
            (
                "--listen=1 --target=127.0.0.1:2 --metrics=2 app",
                "--metrics=2 is the address of --target=127.0.0.1:2; let the backend listen on another address.",
            ),
            (
                "--listen=1 --target=/a --metrics=127.0.0.1:1 app",
                "--metrics=127.0.0.1:1 overlaps with a --listen= address.",
            ),
            (
                "--listen=1 --target=/a --metrics=vsock::1 app",
                "invalid value 'vsock::1' for '--metrics <ADDRESS>': it must be a TCP or Unix socket",
            ),
            (
                "--listen=1 --target=/a --metrics=2 --idle=1min app",
                "--metrics= cannot be combined with --idle= without a COMMAND or a --stop-command=: each scrape would start the proxy again, with its counters at zero.",
            ),
            (
                "--listen=1 --target=/a --write=a --write=b app",
                "the argument '--write[=<DIR>]' cannot be used multiple times",
            ),
            (
                "--listen=1 --target=/a --metrics=2 --service=b app",
                "the argument '--metrics <ADDRESS>' cannot be used with '--service <UNIT>'",
            ),
            (
                "--listen=1 --target=/a --service=b --start-command=x app",
                "the argument '--service <UNIT>' cannot be used with '--start-command <LINE>'",
            ),
            (
                "--listen=1 --target=/a --service=b --passive-from=unix app",
                "--passive-from= cannot be combined with --service=: systemd starts the proxy, and with it the service, for passive clients as well. (Write --start-command= instead.)",
            ),
            (
                "--listen=1 --target=127.0.0.1:2 --isolate app",
                "--isolate needs a --service= or a COMMAND, which shares the proxy's network.",
            ),
            (
                "--listen=1 --target=127.0.0.1:2 --service=b --source=client app",
                "--source=client needs --isolate. (For a backend with the network of the host, copy the units of the set source-client.)",
            ),
            (
                "--listen=1 --target=192.0.2.1:2 --service=b --isolate app",
                "--isolate: the target 192.0.2.1:2 is outside the namespace. (Write 127.0.0.1, ::1, localhost or a Unix socket.)",
            ),
            (
                "--listen=1 --target=db.example:2 --service=b --isolate app",
                "--isolate: the target db.example:2 is outside the namespace. (Write 127.0.0.1, ::1, localhost or a Unix socket.)",
            ),
            (
                "--listen=1 --target=/a --start-command=x app -- /bin/b",
                "--start-command= cannot be combined with COMMAND, which the proxy starts itself.",
            ),
            (
                "--listen=1 --target=/a --stop-command=x app",
                "--stop-command= needs a --start-command=.",
            ),
            (
                "--listen=1 --target=/a --start-command=' app",
                "invalid value ''' for '--start-command <LINE>': a quote is not closed, or the line ends in a backslash",
            ),
            (
                "--listen=1 --target=/a --start-command=./x app",
                "Invalid --start-command=\"./x\": the service starts in /, write an absolute path.",
            ),
            (
                "--listen=1 --target=/a --start-command=x --stop-command=/home/x app",
                "Invalid --stop-command=\"/home/x\": the service cannot see /home, /root and /tmp; put it in /usr/local or /opt.",
            ),
            (
                "--listen=1 --target=/a --ready=exec:/tmp/x app",
                "Invalid --ready=exec:\"/tmp/x\": the service cannot see /home, /root and /tmp; put it in /usr/local or /opt.",
            ),
            (
                "--listen=1 --listen=2 --target=:1=/a --target=:2=/b --start-command=x app",
                "--start-command= serves one TARGET. (Run a proxy for each.)",
            ),
            (
                "--listen=1 --target=:1=/a app -- /bin/b",
                "SELECTOR=TARGET cannot be combined with COMMAND, which serves one TARGET. (Write TARGET -- COMMAND [ARG...].)",
            ),
            (
                "--listen=1 --target=/a --metrics=2 --idle=1min --start-command=x app",
                "--metrics= cannot be combined with --idle= without a COMMAND or a --stop-command=: each scrape would start the proxy again, with its counters at zero.",
            ),
            (
                "--listen=1 --target=/a --ready=notify app",
                "--ready=notify needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
            ),
            (
                "--listen=1 --target=/a --ready=http:x app",
                "invalid value 'http:x' for '--ready <MODE>': PATH must begin with /",
            ),
            (
                "--listen=1 --target=/a --freeze-idle-time=1 app",
                "--freeze-idle-time= needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
            ),
            (
                "--listen=1 --target=/run/app/a --freeze-idle-time=5s --idle=5 app -- /bin/b",
                "--freeze-idle-time= must be less than --stop-idle-time= and --exit-idle-time=, or COMMAND stops before it is frozen.",
            ),
            (
                "--listen=1 --target=/a --busy=notify app",
                "--busy=notify needs a COMMAND. (Write TARGET -- COMMAND [ARG...].)",
            ),
            (
                "--listen=1 --target=/a --min-run-time=1 app",
                "--min-run-time= needs a COMMAND or a --start-command=.",
            ),
            (
                "--listen=1 --target=/a --wake-on=x app",
                "invalid value 'x' for '--wake-on <connect|data>' [possible values: connect, data]",
            ),
            (
                "--listen=1 --target=/a --passive-from=x app",
                "invalid value 'x' for '--passive-from <NET[,NET...]>': \"x\" is not an address, a network (10.0.0.0/8) or unix",
            ),
            (
                "--listen=1 --target=/a --connections-max-per-source=0 app",
                "invalid value '0' for '--connections-max-per-source <N>': Connection limit is too low.",
            ),
            ("--listen=1 --target=/a app --", "There is no COMMAND after --."),
            ("--frob app", "unexpected argument '--frob' found"),
            ("--force=1 app", "unexpected value '1' for '--force' found; no more were expected"),
        ] {
            assert_eq!(plan(line).unwrap_err(), error, "{line}");
        }
    }
}
