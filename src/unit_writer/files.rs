//! Writing the units: all files or none, and never over what another program or a person has
//! written.

use std::fs::{self, Metadata, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::logging::os_message;
use crate::unit_writer::render::UnitFile;
use crate::unit_writer::stamp::Origin;

/// What became of a file, as the report says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Wrote,
    Replaced,
    Unchanged,
    /// A generated drop-in of a service that the proxy does not start any more.
    Removed,
    /// Such a drop-in that has been edited.
    Kept,
    /// A socket unit for Prometheus that has to be disabled before it is removed.
    Obsolete,
}

pub type Changes = Vec<(Change, PathBuf)>;

/// Writes files.
///
/// # Errors
/// One line that names the file.
pub fn write(files: &[UnitFile], directory: &Path, force: bool) -> Result<Changes, String> {
    let (mut changes, mut prepared) = (Vec::new(), Vec::new());
    for file in files {
        if !force {
            check_search_path(&file.path, directory, &SEARCH_PATH)?;
        }
        let path = directory.join(&file.path);
        let change = examine(&path, &file.text, force)?;
        if change != Change::Unchanged {
            let new = prepare(&path, &file.text).map_err(|error| failed("write", &path, &error))?;
            prepared.push((new, change, path.clone()));
        }
        changes.push((change, path));
    }
    // Whatever is likely to fail has succeeded for all files.
    for (new, change, path) in prepared {
        let placed = match change {
            Change::Wrote => new.persist_noclobber(&path),
            _ => new.persist(&path),
        };
        placed.map_err(|error| failed("write", &path, &error.error))?;
    }
    Ok(changes)
}

/// Looks for generated files that the proxy `unit` no longer needs, and removes those that can be
/// removed at once.
///
/// # Errors
/// One line that names the file.
pub fn remove_leftovers(
    files: &[UnitFile],
    unit: &str,
    metrics_socket: &str,
    directory: &Path,
) -> Result<Changes, String> {
    let mut changes = Vec::new();
    let is_needed = |name: &Path| files.iter().any(|file| file.path == name);
    let path = directory.join(metrics_socket);
    if !is_needed(Path::new(metrics_socket)) && origin(&path) != Origin::Foreign {
        changes.push((Change::Obsolete, path));
    }
    let entries = fs::read_dir(directory).map_err(|error| failed("list", directory, &error))?;
    for entry in entries.filter_map(Result::ok) {
        let name = Path::new(&entry.file_name()).join(format!("{unit}.conf"));
        let is_drop_in = entry.file_name().to_string_lossy().ends_with(".service.d");
        let path = directory.join(&name);
        match origin(&path) {
            _ if !is_drop_in || is_needed(&name) => {}
            Origin::Generated => {
                fs::remove_file(&path).map_err(|error| failed("remove", &path, &error))?;
                // Fails if there are other drop-ins.
                let _ = fs::remove_dir(entry.path());
                changes.push((Change::Removed, path));
            }
            Origin::Modified => changes.push((Change::Kept, path)),
            Origin::Foreign => {}
        }
    }
    Ok(changes)
}

/// Checks that no unit of the same name in another directory overrides the new one or is overridden
/// by it. (`systemctl mask --runtime` creates one below /run.)
fn check_search_path(name: &Path, directory: &Path, search_path: &[&str]) -> Result<(), String> {
    let Some(place) = search_path.iter().position(|it| Path::new(it) == directory) else {
        return Ok(());
    };
    let is_mask = |path: &Path| fs::read_link(path).is_ok_and(|to| to == Path::new("/dev/null"));
    let paths = search_path.iter().map(|directory| Path::new(directory).join(name));
    for (index, path) in paths.enumerate().filter(|(index, _)| *index != place) {
        let why = match fs::symlink_metadata(&path) {
            Err(_) => continue,
            _ if is_mask(&path) => "is a mask (systemctl unmask, or unmask --runtime, removes it)",
            _ if index < place => "takes precedence",
            _ if origin(&path) == Origin::Foreign => "would be overridden (--force does so)",
            // It may be the same file: one directory can have two names.
            _ => continue,
        };
        let (name, path) = (name.display(), path.display());
        return Err(format!("Failed to write {name}: {path} {why}; nothing was written."));
    }
    Ok(())
}

fn examine(path: &Path, text: &str, force: bool) -> Result<Change, String> {
    let is_directory = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.is_dir(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Change::Wrote),
        Err(error) => return Err(failed("read", path, &error)),
    };
    let found = read(path);
    let why = match found.as_deref().map_or(Origin::Foreign, Origin::of) {
        _ if is_directory => "it is a directory",
        _ if found.as_deref() == Some(text) => return Ok(Change::Unchanged),
        Origin::Generated => return Ok(Change::Replaced),
        _ if force => return Ok(Change::Replaced),
        Origin::Modified => "it has been edited",
        Origin::Foreign => "this program did not write it",
    };
    let hint = if is_directory { "" } else { " (--force replaces it.)" };
    Err(format!("Failed to replace {}: {why}; nothing was written.{hint}", path.display()))
}

fn origin(path: &Path) -> Origin {
    read(path).map_or(Origin::Foreign, |text| Origin::of(&text))
}

/// Reads a regular file. A symbolic link is of other origin (`systemctl mask` creates one), and a
/// pipe or a device may have no end.
fn read(path: &Path) -> Option<String> {
    fs::symlink_metadata(path).ok().filter(Metadata::is_file)?;
    fs::read_to_string(path).ok()
}

/// Creates a temporary file beside `path` that only has to be renamed.
fn prepare(path: &Path, text: &str) -> io::Result<NamedTempFile> {
    let directory = path.parent().unwrap_or_else(|| Path::new("/"));
    if !directory.is_dir() {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    }
    let mut file = NamedTempFile::with_prefix_in(".#", directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> String {
    let is_denied = error.kind() == ErrorKind::PermissionDenied;
    let hint = if is_denied { " (Run it as root.)" } else { "" };
    format!("Failed to {what} {}: {}.{hint}", path.display(), os_message(error))
}

/// "System Unit Search Path" in systemd.unit(5), the directory that takes precedence first.
const SEARCH_PATH: [&str; 13] = [
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
    "/run/systemd/generator.late",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit_writer::stamp::stamp;

    #[test]
    fn edited_and_foreign_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let file =
            |name: &str, text: &str| UnitFile { path: name.into(), text: stamp("a", "b", text) };
        let files = [file("a.socket", "1"), file("b.service.d/c.conf", "2")];
        let write = |files: &[UnitFile], force| {
            let changes = write(files, directory.path(), force)?;
            Ok::<_, String>(changes.into_iter().map(|(change, _)| change).collect::<Vec<_>>())
        };
        assert_eq!(write(&files, false), Ok(vec![Change::Wrote; 2]));
        assert_eq!(write(&files, false), Ok(vec![Change::Unchanged; 2]));
        let changed = [file("a.socket", "3"), file("b.service.d/c.conf", "2")];
        assert_eq!(write(&changed, false), Ok(vec![Change::Replaced, Change::Unchanged]));
        let path = |name: &str| directory.path().join(name);
        let read = |name: &str| fs::read_to_string(path(name)).unwrap();
        assert_eq!(read("a.socket"), changed[0].text);
        let mode = |name: &str| fs::metadata(path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("a.socket"), mode("b.service.d")), (0o644, 0o755));

        for (theirs, why) in [
            ("theirs".to_string(), "this program did not write it"),
            (read("b.service.d/c.conf") + "# edited\n", "it has been edited"),
        ] {
            fs::write(path("b.service.d/c.conf"), theirs).unwrap();
            let error = write(&files, false).unwrap_err();
            assert!(error.contains(&format!("c.conf: {why}; nothing was written.")), "{error}");
            assert_eq!(read("a.socket"), changed[0].text, "none or all");
        }
        assert_eq!(write(&files, true), Ok(vec![Change::Replaced; 2]));
        assert_eq!(read("b.service.d/c.conf"), files[1].text);

        // systemctl mask creates such a link.
        fs::remove_file(path("a.socket")).unwrap();
        std::os::unix::fs::symlink("/dev/null", path("a.socket")).unwrap();
        assert!(write(&files, false).is_err());
        fs::remove_file(path("a.socket")).unwrap();
        fs::create_dir(path("a.socket")).unwrap();
        assert!(write(&files, true).is_err(), "no file can take its place");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn search_path_is_checked_as_systemd_reads_it() {
        let root = tempfile::tempdir().unwrap();
        let directories = ["etc", "run", "usr"].map(|name| root.path().join(name));
        directories.iter().for_each(|directory| fs::create_dir(directory).unwrap());
        let search_path = directories.each_ref().map(|directory| directory.to_str().unwrap());
        let name = Path::new("a.socket");
        let look = |directory: &Path| check_search_path(name, directory, &search_path);
        let [etc, run, usr] = &directories;
        assert_eq!(look(etc), Ok(()));
        std::os::unix::fs::symlink("/dev/null", run.join(name)).unwrap();
        assert!(look(etc).unwrap_err().contains("run/a.socket is a mask"));
        assert!(look(usr).unwrap_err().contains("run/a.socket is a mask"));
        assert_eq!(look(root.path()), Ok(()), "outside the search path");
        fs::remove_file(run.join(name)).unwrap();
        fs::write(run.join(name), stamp("a", "b", "[Socket]\n")).unwrap();
        assert_eq!(look(etc), Ok(()), "a generated file");
        assert!(look(usr).unwrap_err().contains("run/a.socket takes precedence"));
        fs::write(run.join(name), "[Socket]\n").unwrap();
        assert!(look(etc).unwrap_err().contains("run/a.socket would be overridden"));
    }

    #[test]
    fn leftover_drop_ins_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| UnitFile { path: name.into(), text: stamp("a", "b", "[Unit]\n") };
        let [old, new] = ["old.service.d/a.conf", "new.service.d/a.conf"].map(file);
        let (old, new) = ([old], [new]);
        write(&old, directory.path(), false).unwrap();
        fs::create_dir(directory.path().join("theirs.service.d")).unwrap();
        fs::write(directory.path().join("theirs.service.d/a.conf"), "theirs").unwrap();
        write(&new, directory.path(), false).unwrap();
        let clear = || remove_leftovers(&new, "a", "a-metrics.socket", directory.path()).unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("pipe.service.d")).unwrap();
        let pipe = path("pipe.service.d/a.conf");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let removed = path("old.service.d/a.conf");
        assert_eq!(clear(), [(Change::Removed, removed)]);
        assert!(!directory.path().join("old.service.d").exists());
        assert!(directory.path().join("theirs.service.d/a.conf").exists());
        assert_eq!(clear(), []);
        let edited = stamp("a", "b", "[Unit]\n") + "# edited\n";
        fs::write(path("theirs.service.d/a.conf"), edited).unwrap();
        fs::write(path("a-metrics.socket"), stamp("a", "b", "[Socket]\n")).unwrap();
        let obsolete = (Change::Obsolete, path("a-metrics.socket"));
        assert_eq!(clear(), [obsolete, (Change::Kept, path("theirs.service.d/a.conf"))]);
    }
}
