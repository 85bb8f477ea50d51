//! `make install`, and what the shells make of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::*;

const PROGRAMS: [(&str, &str); 2] = [(OURS, "socket-proxyd"), (UNIT_WRITER, "socket-proxyd-units")];

/// Installs the tested programs into a new directory.
fn install() -> TempDir {
    let (built, installed) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let release = built.path().join("release");
    fs::create_dir(&release).unwrap();
    for (program, name) in PROGRAMS {
        fs::copy(program, release.join(name)).unwrap();
    }
    // With a umask that hides files from other users.
    let status = Command::new("sh")
        .args([
            "-c",
            "umask 077 && exec make \"$@\"",
            "sh",
            "-s",
            "-C",
            ROOT,
            "install",
            "PREFIX=/usr",
        ])
        .arg(format!("TARGET={}", built.path().display()))
        .arg(format!("DESTDIR={}", installed.path().display()))
        .status();
    assert!(status.unwrap().success());
    installed
}

/// All files below a directory, as seen from there.
fn files(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut rest = vec![directory.to_path_buf()];
    while let Some(path) = rest.pop() {
        if path.is_dir() {
            rest.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            found.insert(path.strip_prefix(directory).unwrap().display().to_string());
        }
    }
    found
}

#[test]
fn installs_programs_manuals_completions_and_examples() {
    let installed = install();
    let there = files(installed.path());
    let mut expected: BTreeSet<String> = BTreeSet::new();
    for (_, program) in PROGRAMS {
        expected.extend([
            format!("usr/bin/{program}"),
            format!("usr/share/man/man8/{program}.8"),
            format!("usr/share/bash-completion/completions/{program}"),
            format!("usr/share/zsh/vendor-completions/_{program}"),
            format!("usr/share/fish/vendor_completions.d/{program}.fish"),
        ]);
    }
    let doc = "usr/share/doc/socket-proxyd";
    let texts = ["README.md", "CHANGELOG.md", "BENCHMARKS.md", "LICENSE-MIT", "LICENSE-APACHE"];
    expected.extend(texts.map(|text| format!("{doc}/{text}")));
    expected
        .extend(["grafana.json", "recipes.md", "nixos.nix"].map(|text| format!("{doc}/{text}")));
    let units = files(&Path::new(ROOT).join("units"));
    expected.extend(units.iter().map(|unit| format!("{doc}/examples/{unit}")));
    assert_eq!(there, expected);
    use std::os::unix::fs::PermissionsExt;
    for file in &there {
        let mode = fs::metadata(installed.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o444, 0o444, "{file} is readable by all users: {mode:o}");
    }
    for (_, program) in PROGRAMS {
        let program = installed.path().join("usr/bin").join(program);
        assert!(Command::new(program).arg("--version").status().unwrap().success());
    }
}

/// Whether a shell or its completion is installed.
fn is_installed(path: &str) -> bool {
    let is_installed = PathBuf::from(path).exists();
    if !is_installed {
        skip("completions", path);
    }
    is_installed
}

#[test]
fn bash_completes() {
    if !is_installed("/usr/share/bash-completion/bash_completion") {
        return;
    }
    // As readline calls it: the words, the one under the cursor, then COMPREPLY.
    let complete = |words: &str| {
        let split = words.replace(':', " : ").replace('=', " = ");
        let program = words.split(' ').next().unwrap();
        let function = format!("_{}", program.replace('-', "__"));
        let script = format!(
            ". /usr/share/bash-completion/bash_completion\n. {ROOT}/completions/{program}.bash\n\
             COMP_LINE='{words}'; COMP_POINT=${{#COMP_LINE}}; eval \"COMP_WORDS=({split})\"\n\
             COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_TYPE=9; compopt() {{ :; }}\n\
             {function} {program} \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
        );
        let output = Command::new("bash").args(["--norc", "-c", &script]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.is_empty(), "{words}: {stderr}");
        String::from_utf8(output.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(complete("socket-proxyd --hand"), "--handover");
    assert_eq!(complete("socket-proxyd --handover cr"), "crash");
    assert_eq!(
        complete("socket-proxyd --connect"),
        "--connections-max --connections-max-per-source --connect-timeout --connection-idle-time"
    );
    assert_eq!(complete("socket-proxyd-units --wr"), "--write");
}

#[test]
fn fish_completes() {
    if !is_installed("/usr/bin/fish") {
        return;
    }
    let complete = |words: &str| {
        let program = words.split(' ').next().unwrap();
        let script = format!("source {ROOT}/completions/{program}.fish; complete -C '{words}'");
        let output = Command::new("fish").args(["--no-config", "-c", &script]).output().unwrap();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let handover = complete("socket-proxyd --hand");
    assert!(handover.starts_with("--handover\tKeep connections"), "{handover}");
    assert!(complete("socket-proxyd --overflow=w").starts_with("--overflow=wait\t"));
    assert!(complete("socket-proxyd-units --fo").starts_with("--force\tReplace files"));
}

#[test]
fn zsh_loads_the_completions() {
    if !is_installed("/usr/bin/zsh") {
        return;
    }
    let script = format!(
        "fpath=({ROOT}/completions $fpath); autoload -Uz compinit; compinit -u -D\n\
         for program in socket-proxyd socket-proxyd-units; do\n\
         [[ $_comps[$program] == _$program ]] && autoload +X _$program || exit 1\ndone"
    );
    let output = Command::new("zsh").args(["-f", "-c", &script]).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.is_empty(), "{printed}");
}

/// `make demo`, with the tested program instead of a release build.
#[test]
fn demo_answers_a_request() {
    let built = TempDir::new().unwrap();
    fs::create_dir(built.path().join("release")).unwrap();
    std::os::unix::fs::symlink(OURS, built.path().join("release/socket-proxyd")).unwrap();
    let target = format!("TARGET={}", built.path().display());
    let words = ["-s", "-C", ROOT, "demo", "CARGO=true", &target];
    let output = Command::new("make").args(words).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("Hello over a Unix socket.\n"), "{printed}");
    assert!(printed.contains("1000 requests, each a connection of its own: "), "{printed}");
}
