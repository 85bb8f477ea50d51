//! A proxy that is to have units, and what of it can't be had together.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::config::listen_address::ListenAddress;
use crate::config::selector::Targets;
use crate::config::target::Target;
use crate::socket::address::SocketLabel;
use crate::unit_writer::arguments::Arguments;
use crate::unit_writer::escape::{shell_word, unit_name};
use crate::unit_writer::values::{PROGRAM, address, check_command, check_socket};

/// The longest name of a unit, systemd.unit(5), without what is added here.
const NAME_MAX: usize = 255 - "-proxy.service.d".len();

/// A proxy that is to have units, checked.
#[derive(Debug)]
pub struct Plan {
    /// As it was given.
    pub name: String,
    /// The name of its units, without suffixes.
    pub unit: String,
    /// `ListenStream=`, one each.
    pub listen: Vec<String>,
    /// The arguments behind the proxy's options.
    pub target_words: Vec<OsString>,
    /// The backends.
    pub targets: Vec<Target>,
    /// What they start.
    pub starts: OnFirstClient,
    pub idle: Option<String>,
    pub user: Option<String>,
    pub group: Option<String>,
    /// `ListenStream=` for scrapers.
    pub metrics: Option<String>,
}

impl Plan {
    /// Checks what only all of it together can tell.
    ///
    /// # Errors
    /// One line on what is wrong.
    pub fn new(arguments: Arguments) -> Result<Self, String> {
        let name = match &arguments.names[..] {
            [] => return Err("There is no NAME for the units. (See --help.)".into()),
            [name] => name.to_str().ok_or("NAME has to be UTF-8.")?.to_string(),
            [_, another, ..] => {
                return Err(format!(
                    "There is another word after NAME: {another:?}. (Put -- in front of a COMMAND, and \
                     write a relative directory as --write=DIR.)"
                ));
            }
        };
        let unit = unit_name(&name);
        if name.is_empty() || unit.len() > NAME_MAX {
            return Err(format!("Invalid NAME {name:?}: it has to have 1 to {NAME_MAX} bytes."));
        }
        if let Some(suffix) = [".service", ".socket"].iter().find(|it| name.ends_with(**it)) {
            return Err(format!("Invalid NAME {name:?}: write it without {suffix}."));
        }
        let unit = format!("{unit}-proxy");
        if arguments.listen.is_empty() {
            return Err("There is no --listen=, where clients come in; see --help.".into());
        }
        if arguments.targets.is_empty() {
            return Err("There is no --target=, where connections go; see --help.".into());
        }
        let is_selected = |target: &OsString| target.as_bytes().contains(&b'=');
        if arguments.targets.len() > 1 && !arguments.targets.iter().any(is_selected) {
            return Err(
                "There are several --target= options; write SELECTOR=TARGET in each, as in \
                        --target=:8080=127.0.0.1:3000."
                    .into(),
            );
        }
        let targets = Targets::parse(&arguments.targets)?;
        check_assignment(&arguments, &targets, &unit)?;
        let starts = match (arguments.service, arguments.command) {
            (Some(_), Some(_)) => {
                return Err(
                    "--service= cannot be combined with COMMAND: one of them is what the proxy \
                            starts."
                        .into(),
                );
            }
            (Some(service), None) if service == format!("{unit}.service") => {
                return Err(format!("--service={service} is the proxy's own name."));
            }
            (Some(service), None) => OnFirstClient::Service(service),
            (None, Some(words)) => {
                let Targets::One(target) = &targets else {
                    return Err("A COMMAND serves one --target=, without a selector.".into());
                };
                check_command(&words)?;
                check_socket(target, &name)?;
                OnFirstClient::Command(words)
            }
            (None, None) => OnFirstClient::Nothing,
        };
        if arguments.metrics.is_some()
            && arguments.idle.is_some()
            && matches!(starts, OnFirstClient::Nothing)
        {
            return Err("--idle= can't be had with the --metrics= of a bridge: whoever scrapes would start it \
                        again, and its counters with it."
                .into());
        }
        if arguments.metrics.is_some() && matches!(starts, OnFirstClient::Service(_)) {
            return Err("--metrics= can't be had with --service=: whoever scrapes would start the service. \
                        (Give the proxy its own --metrics= in ExecStart=, which answers while it runs.)"
                .into());
        }
        Ok(Self {
            name,
            unit,
            listen: arguments.listen.into_iter().map(|(_, text)| text).collect(),
            targets: targets.iter().cloned().collect(),
            target_words: arguments.targets,
            starts,
            idle: arguments.idle,
            user: arguments.user,
            group: arguments.group,
            metrics: arguments.metrics.map(|(_, text)| text),
        })
    }

    /// The command line that asks for them, for a shell.
    pub fn command_line(&self) -> String {
        let mut words = Vec::new();
        let mut option = |name: &str, value: &OsStr| {
            let mut word = OsString::from(format!("--{name}="));
            word.push(value);
            words.push(word);
        };
        for listen in &self.listen {
            option("listen", OsStr::new(listen));
        }
        self.target_words.iter().for_each(|target| option("target", target));
        if let OnFirstClient::Service(service) = &self.starts {
            option("service", OsStr::new(service));
        }
        for (name, value) in [
            ("idle", &self.idle),
            ("user", &self.user),
            ("group", &self.group),
            ("metrics", &self.metrics),
        ] {
            if let Some(value) = value {
                option(name, OsStr::new(value));
            }
        }
        words.push(OsString::from(&self.name));
        if let OnFirstClient::Command(command) = &self.starts {
            words.push("--".into());
            words.extend(command.iter().cloned());
        }
        let mut line = PROGRAM.to_string();
        for word in words {
            line.push(' ');
            line.push_str(&shell_word(word));
        }
        line
    }
}

/// What the first client starts.
#[derive(Debug)]
pub enum OnFirstClient {
    /// Only the proxy.
    Nothing,
    /// A service that exists.
    Service(String),
    /// A program.
    Command(Vec<OsString>),
}

/// That each socket has its backend: as the proxy does at its start, and in its words.
fn check_assignment(arguments: &Arguments, targets: &Targets, unit: &str) -> Result<(), String> {
    let name = Some(format!("{unit}.socket"));
    let identities: Vec<_> = arguments
        .listen
        .iter()
        .map(|(listen, _)| SocketLabel { name: name.clone(), address: address(listen) })
        .collect();
    let scrapers = arguments.metrics.iter().map(|(listen, _)| listen);
    let all: Vec<_> = arguments.listen.iter().map(|(listen, _)| listen).chain(scrapers).collect();
    for (index, listen) in all.iter().enumerate() {
        if all[..index].contains(listen) {
            return Err(format!("The address {listen} is given twice."));
        }
    }
    let backends = targets.assign(&identities.iter().collect::<Vec<_>>())?;
    let leads_back = |option: &str, listen: &ListenAddress, backend: usize| {
        let Some(Target::Address(target)) = targets.iter().nth(backend) else { return Ok(()) };
        if address(listen).accepts(target) {
            return Err(format!(
                "--{option}={listen} is what --target={target} leads to; let the backend listen on \
                 another address."
            ));
        }
        Ok(())
    };
    for ((listen, _), backend) in arguments.listen.iter().zip(backends) {
        leads_back("listen", listen, backend)?;
    }
    if let Some((listen, _)) = &arguments.metrics {
        let mut all = 0..targets.iter().count();
        all.try_for_each(|backend| leads_back("metrics", listen, backend))?;
        let at = address(listen);
        let mut listeners = identities.iter().map(|identity| &identity.address);
        if listeners.any(|it| it.accepts(&at) || at.accepts(it)) {
            return Err(format!("--metrics={listen} is an address that clients know already."));
        }
    }
    Ok(())
}
