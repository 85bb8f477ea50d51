//! What `socket-proxyd-units` writes, file by file. golden/ has a directory for each case, with the
//! arguments in `arguments`, a word a line. `UPDATE=1` writes the expected files again. In a real systemd
//! they are verified by tests/systemd/manuals.rs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::{Builder, TempDir};

use crate::support::*;

const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/packaging/golden");

fn write(arguments: &[&str]) -> Output {
    Command::new(UNIT_WRITER).args(arguments).output().unwrap()
}

/// All files below a directory, by their relative names.
fn files(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name: PathBuf = path.file_name().unwrap().into();
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(below, text)| (name.join(below), text)));
        } else {
            // The path that a package installs.
            let text = fs::read_to_string(&path).unwrap().replace(OURS, "/usr/bin/socket-proxyd");
            let mut lines = text.split_inclusive('\n');
            // The checksum is that of the text with the other path.
            let text = lines.by_ref().filter(|line| !line.starts_with("# Checksum: ")).collect();
            all.insert(name, text);
        }
    }
    all
}

#[test]
fn writes_the_golden_units() {
    let mut cases = 0;
    for case in fs::read_dir(CASES).unwrap() {
        let case = case.unwrap().path();
        let arguments = fs::read_to_string(case.join("arguments")).unwrap();
        let directory = TempDir::new().unwrap();
        let write_to = format!("--write={}", directory.path().display());
        let arguments: Vec<_> = std::iter::once(&*write_to).chain(arguments.lines()).collect();
        let output = write(&arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let written = files(directory.path());
        if std::env::var_os("UPDATE").is_some() {
            for (name, text) in &written {
                let path = case.join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        let mut expected = files(&case);
        expected.remove(Path::new("arguments"));
        assert_eq!(written, expected, "{}", case.display());
        cases += 1;
    }
    assert!(cases >= 8);
}

#[test]
fn prints_units_without_write() {
    let output = write(&["--listen=8080", "--target=/run/a.sock", "it's"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("# /etc/systemd/system/it\\x27s-proxy.socket\n# Written by"),
        "{text}"
    );
    assert!(text.contains("\n\n# /etc/systemd/system/it\\x27s-proxy.service\n"), "{text}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr, "Next: run the same command with --write, as root.\n");
}

#[test]
fn reports_what_it_wrote_and_refuses_foreign_files() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().display();
    let arguments = ["--listen=8080", "--target=/run/a.sock", &format!("--write={path}"), "app"];
    let printed = |arguments: &[&str]| {
        let output = write(arguments);
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        (output.status.code(), stdout, stderr)
    };
    let next = format!(
        "Next: cp -r {path}/app-proxy.socket {path}/app-proxy.service /etc/systemd/system && systemctl \
         enable --now app-proxy.socket\n"
    );
    let wrote =
        |what| format!("{what} {path}/app-proxy.socket\n{what} {path}/app-proxy.service\n{next}");
    assert_eq!(printed(&arguments), (Some(0), wrote("Wrote"), String::new()));
    assert_eq!(printed(&arguments), (Some(0), wrote("Unchanged"), String::new()));
    fs::write(directory.path().join("app-proxy.service"), "[Service]\n").unwrap();
    let theirs = format!(
        "Failed to replace {path}/app-proxy.service: this program did not write it; nothing was written. \
         (--force replaces it.)\n"
    );
    assert_eq!(printed(&arguments), (Some(1), String::new(), theirs));
    let (code, stdout, _) = printed(&[&arguments[..], &["--force"]].concat());
    assert_eq!(code, Some(0));
    let again = "systemctl daemon-reload && systemctl enable app-proxy.socket && systemctl stop \
                 app-proxy.service && systemctl restart app-proxy.socket\n";
    assert!(stdout.contains("Replaced") && stdout.ends_with(again), "{stdout}");
    let with_service = [&arguments[..], &["--service=app"]].concat();
    let (_, stdout, _) = printed(&with_service);
    assert!(stdout.contains(" && systemctl disable --now app.service && "), "{stdout}");
    let (_, stdout, _) = printed(&arguments);
    let left = format!("Removed {path}/app.service.d/app-proxy.conf\n");
    assert!(stdout.contains(&left), "{stdout}");
    let lost = "\napp.service has no proxy any more: clients do not start it, and it does not stop by itself. \
                (systemctl stop app.service, or systemctl enable --now app.service)\nNext: ";
    assert!(stdout.contains(lost), "{stdout}");
    printed(&with_service);
    let (_, stdout, _) = printed(&[&arguments[..], &["--service=app2"]].concat());
    assert!(stdout.contains(lost) && stdout.contains("disable --now app2.service"), "{stdout}");
    let (code, _, stderr) = printed(&[&arguments[..], &["--", "/nowhere/prog"]].concat());
    assert_eq!(code, Some(1), "COMMAND cannot create that socket: {stderr}");
    let with_command = ["--listen=1", "--target=127.0.0.1:2", "b", "--", "/nowhere/prog"];
    let (code, _, stderr) = printed(&with_command);
    let note = "Note: Failed to execute COMMAND \"/nowhere/prog\": No such file or directory.\n";
    assert!(code == Some(0) && stderr.ends_with(note), "{stderr}");
    let with_start_command = ["--listen=1", "--target=/a", "--start-command=/nowhere/prog x", "b"];
    let (code, _, stderr) = printed(&with_start_command);
    let note =
        "Note: Failed to execute --start-command=\"/nowhere/prog\": No such file or directory.\n";
    assert!(code == Some(0) && stderr.ends_with(note), "{stderr}");

    let (code, _, stderr) = printed(&["--listen=1", "--target=/tmp/a", "app"]);
    let why = "Invalid --target=/tmp/a: a dynamic user has a /tmp of its own; add --user=, or have the \
               backend listen elsewhere.\n";
    assert_eq!((code, &*stderr), (Some(1), why));
    let (_, stdout, _) = printed(&["--version"]);
    assert!(stdout.starts_with("socket-proxyd-units "), "{stdout}");
}

#[test]
fn exec_start_is_the_program_beside_this_one_if_a_service_can_execute_it() {
    let visible = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let is_hidden = ["/home", "/root", "/tmp", "/var/tmp"].iter().any(|it| visible.starts_with(it));
    let visible = if is_hidden { Path::new("/dev/shm") } else { visible };
    let plain = TempDir::new_in(visible).unwrap();
    let special = Builder::new().prefix("it's").tempdir_in(visible).unwrap();
    let hidden = TempDir::new_in("/tmp").unwrap();
    let beside = format!("{}/socket-proxyd", plain.path().display());
    for (directory, program) in [
        (plain.path(), &*beside),
        (special.path(), "/usr/bin/socket-proxyd"),
        (hidden.path(), "/usr/bin/socket-proxyd"),
    ] {
        let unit_writer = directory.join("socket-proxyd-units");
        fs::copy(UNIT_WRITER, &unit_writer).unwrap();
        fs::copy(OURS, directory.join("socket-proxyd")).unwrap();
        let arguments = ["--listen=1", "--target=/a", "app"];
        let output = Command::new(unit_writer).args(arguments).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!("\nExecStart={program} ")), "{text}");
    }
}

/// The section REMOVING THE UNITS is about a NAME and a service `app`.
#[test]
fn manual_says_how_to_remove_each_file() {
    let manual = fs::read_to_string(Path::new(ROOT).join("man/socket-proxyd-units.8")).unwrap();
    let (_, section) = manual.split_once("\n.SH \"REMOVING THE UNITS\"\n").unwrap();
    let section = section.split("\n.SH ").next().unwrap().replace("\\-", "-");
    for option in ["--metrics=9464", "--service=app"] {
        let directory = TempDir::new().unwrap();
        let write_to = format!("--write={}", directory.path().display());
        assert!(write(&["--listen=1", "--target=/a", option, &write_to, "app"]).status.success());
        let written = files(directory.path());
        assert_eq!(written.len(), 3);
        for file in written.keys().map(|file| file.to_str().unwrap()) {
            let is_named = file.starts_with("app-proxy.") || section.contains(file);
            assert!(is_named, "{file} is not in {section}");
        }
    }
    assert!(section.contains("/etc/systemd/system/app-proxy.*"), "{section}");
}
