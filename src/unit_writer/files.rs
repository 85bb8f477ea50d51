//! Plan to files: all of them or none, and never over what somebody else has written.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::logging::os_message;
use crate::unit_writer::render::UnitFile;
use crate::unit_writer::stamp::Origin;

/// What was in a file's place before it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    Missing,
    Identical,
    Different,
}

/// Where systemd looks for a unit, the first before the others ("System Unit Search Path" in
/// systemd.unit(5)).
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

/// Writes them; what was there before, file by file.
///
/// # Errors
/// One line that names the file.
pub fn write(files: &[UnitFile], directory: &Path, force: bool) -> Result<Vec<Existing>, String> {
    // Whatever can fail comes before the first of them is in its place.
    if !force {
        files.iter().try_for_each(|file| look_elsewhere(&file.path, directory, &SEARCH_PATH))?;
    }
    let before = files.iter().map(|file| look(&directory.join(&file.path), &file.text, force));
    let before = before.collect::<Result<Vec<_>, _>>()?;
    let mut prepared = Vec::new();
    for (file, before) in files.iter().zip(&before).filter(|(_, it)| **it != Existing::Identical) {
        let path = directory.join(&file.path);
        let new = prepare(&path, &file.text).map_err(|error| failed("write", &path, &error))?;
        prepared.push((new, path, *before));
    }
    for (new, path, before) in prepared {
        let placed = match before {
            Existing::Missing => new.persist_noclobber(&path),
            _ => new.persist(&path),
        };
        placed.map_err(|error| failed("write", &path, &error.error))?;
    }
    Ok(before)
}

/// What was written for the same proxy before, and is not needed any more.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Drop-ins beside other services than its own, which are gone now.
    pub removed: Vec<PathBuf>,
    /// Those that somebody has changed since.
    pub changed: Vec<PathBuf>,
    /// A socket unit for scrapers: disabled first, and then removed.
    pub metrics: Option<PathBuf>,
}

/// Looks for that, and removes what can be removed at once; `metrics` is the name that a socket unit for
/// scrapers has.
///
/// # Errors
/// One line that names the file.
pub fn clear(
    files: &[UnitFile],
    unit: &str,
    metrics: &str,
    directory: &Path,
) -> Result<Leftovers, String> {
    let mut left = Leftovers::default();
    let is_needed = |name: &Path| files.iter().any(|file| file.path == name);
    // A pipe or a device has no end.
    let is_file = |path: &Path| fs::symlink_metadata(path).is_ok_and(|it| it.is_file());
    let read = |path: &Path| is_file(path).then(|| fs::read_to_string(path).ok()).flatten();
    let origin = |path: &Path| read(path).map(|text| Origin::of(&text));
    let path = directory.join(metrics);
    if !is_needed(Path::new(metrics)) && !matches!(origin(&path), None | Some(Origin::Foreign)) {
        left.metrics = Some(path);
    }
    let entries = fs::read_dir(directory).map_err(|error| failed("list", directory, &error))?;
    for entry in entries.filter_map(Result::ok) {
        let name = PathBuf::from(entry.file_name()).join(format!("{unit}.conf"));
        let is_drop_in = entry.file_name().to_string_lossy().ends_with(".service.d");
        if !is_drop_in || is_needed(&name) {
            continue;
        }
        let path = directory.join(name);
        match origin(&path) {
            Some(Origin::Generated) => {
                fs::remove_file(&path).map_err(|error| failed("remove", &path, &error))?;
                // Others may have drop-ins there.
                let _ = fs::remove_dir(entry.path());
                left.removed.push(path);
            }
            Some(Origin::Modified) => left.changed.push(path),
            Some(Origin::Foreign) | None => {}
        }
    }
    Ok(left)
}

/// Looks whether a unit of that name in another directory of the search path would be overridden, or
/// would override what is written: `systemctl mask --runtime` makes one below /run.
fn look_elsewhere(name: &Path, directory: &Path, search_path: &[&str]) -> Result<(), String> {
    let Some(place) = search_path.iter().position(|it| Path::new(it) == directory) else {
        return Ok(());
    };
    for (index, other) in search_path.iter().enumerate().filter(|(index, _)| *index != place) {
        let path = Path::new(other).join(name);
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        let is_mask = fs::read_link(&path).is_ok_and(|to| to == Path::new("/dev/null"));
        let is_ours = metadata.is_file()
            && fs::read_to_string(&path).is_ok_and(|text| Origin::of(&text) != Origin::Foreign);
        let why = match () {
            () if is_mask => "is a mask (systemctl unmask, or unmask --runtime, removes it)",
            // The same directory by another name, or what was written there before.
            () if is_ours && index > place => continue,
            () if index > place => "is there, and would be overridden (--force does so)",
            () => "is there, and goes before what would be written",
        };
        return Err(format!("{} {why}; nothing was written.", path.display()));
    }
    Ok(())
}

fn look(path: &Path, text: &str, force: bool) -> Result<Existing, String> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Existing::Missing),
        Err(error) => return Err(failed("look at", path, &error)),
    };
    // A link is somebody's: systemctl mask makes one.
    let found = if metadata.is_file() { fs::read_to_string(path).ok() } else { None };
    let origin = found.as_deref().map_or(Origin::Foreign, Origin::of);
    let why = match origin {
        _ if metadata.is_dir() => "is a directory",
        _ if found.as_deref() == Some(text) => return Ok(Existing::Identical),
        _ if force => return Ok(Existing::Different),
        Origin::Generated => return Ok(Existing::Different),
        Origin::Modified => "has been changed since it was written",
        Origin::Foreign => "is there, and not written by this program",
    };
    let hint = if metadata.is_dir() { "" } else { " (--force replaces it.)" };
    Err(format!("{} {why}; nothing was written.{hint}", path.display()))
}

/// A file that only has to be named.
fn prepare(path: &Path, text: &str) -> io::Result<NamedTempFile> {
    let directory = path.parent().unwrap_or_else(|| Path::new("/"));
    if !directory.is_dir() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    }
    let mut file = NamedTempFile::with_prefix_in(".#", directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    Ok(file)
}

fn failed(what: &str, path: &Path, error: &io::Error) -> String {
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => " (Run it as root.)",
        _ => "",
    };
    format!("Failed to {what} {}: {}.{hint}", path.display(), os_message(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit_writer::stamp::stamp;

    #[test]
    fn what_somebody_else_has_written_stays() {
        let directory = tempfile::tempdir().unwrap();
        let file =
            |name: &str, text: &str| UnitFile { path: name.into(), text: stamp("a", "b", text) };
        let files = [file("a.socket", "1"), file("b.service.d/c.conf", "2")];
        let write = |files: &[UnitFile], force| write(files, directory.path(), force);
        assert_eq!(write(&files, false), Ok(vec![Existing::Missing; 2]));
        assert_eq!(write(&files, false), Ok(vec![Existing::Identical; 2]));
        let changed = [file("a.socket", "3"), file("b.service.d/c.conf", "2")];
        assert_eq!(write(&changed, false), Ok(vec![Existing::Different, Existing::Identical]));
        let path = |name: &str| directory.path().join(name);
        let read = |name: &str| fs::read_to_string(path(name)).unwrap();
        assert_eq!(read("a.socket"), changed[0].text);
        let mode = |name: &str| fs::metadata(path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("a.socket"), mode("b.service.d")), (0o644, 0o755));

        for (theirs, why) in [
            ("theirs".to_string(), "is there, and not written by this program"),
            (read("b.service.d/c.conf") + "# edited\n", "has been changed since it was written"),
        ] {
            fs::write(path("b.service.d/c.conf"), theirs).unwrap();
            let error = write(&files, false).unwrap_err();
            assert!(error.contains(&format!("c.conf {why}; nothing was written.")), "{error}");
            assert_eq!(read("a.socket"), changed[0].text, "none or all");
        }
        assert_eq!(write(&files, true), Ok(vec![Existing::Different; 2]));
        assert_eq!(read("b.service.d/c.conf"), files[1].text);

        // As systemctl mask does.
        fs::remove_file(path("a.socket")).unwrap();
        std::os::unix::fs::symlink("/dev/null", path("a.socket")).unwrap();
        assert!(write(&files, false).is_err());
        fs::remove_file(path("a.socket")).unwrap();
        fs::create_dir(path("a.socket")).unwrap();
        assert!(write(&files, true).is_err(), "no file can take its place");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn it_looks_where_systemd_looks() {
        let root = tempfile::tempdir().unwrap();
        let directories = ["etc", "run", "usr"].map(|name| root.path().join(name));
        directories.iter().for_each(|directory| fs::create_dir(directory).unwrap());
        let search_path = directories.each_ref().map(|directory| directory.to_str().unwrap());
        let name = Path::new("a.socket");
        let look = |directory: &Path| look_elsewhere(name, directory, &search_path);
        let [etc, run, usr] = &directories;
        assert_eq!(look(etc), Ok(()));
        std::os::unix::fs::symlink("/dev/null", run.join(name)).unwrap();
        assert!(look(etc).unwrap_err().contains("run/a.socket is a mask"));
        assert!(look(usr).unwrap_err().contains("run/a.socket is a mask"));
        assert_eq!(look(root.path()), Ok(()), "no directory of systemd's");
        fs::remove_file(run.join(name)).unwrap();
        fs::write(run.join(name), stamp("a", "b", "[Socket]\n")).unwrap();
        assert_eq!(look(etc), Ok(()), "it was written here");
        assert!(look(usr).unwrap_err().contains("run/a.socket is there, and goes before"));
        fs::write(run.join(name), "[Socket]\n").unwrap();
        assert!(look(etc).unwrap_err().contains("run/a.socket is there, and would be overridden"));
    }

    #[test]
    fn a_drop_in_that_is_not_needed_any_more_goes() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| UnitFile { path: name.into(), text: stamp("a", "b", "[Unit]\n") };
        let [old, new] = ["old.service.d/a.conf", "new.service.d/a.conf"].map(file);
        let (old, new) = ([old], [new]);
        write(&old, directory.path(), false).unwrap();
        fs::create_dir(directory.path().join("theirs.service.d")).unwrap();
        fs::write(directory.path().join("theirs.service.d/a.conf"), "theirs").unwrap();
        write(&new, directory.path(), false).unwrap();
        let clear = || clear(&new, "a", "a-metrics.socket", directory.path()).unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("pipe.service.d")).unwrap();
        let pipe = path("pipe.service.d/a.conf");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        let expected =
            Leftovers { removed: vec![path("old.service.d/a.conf")], ..Leftovers::default() };
        assert_eq!(clear(), expected);
        assert!(!directory.path().join("old.service.d").exists());
        assert!(directory.path().join("theirs.service.d/a.conf").exists());
        assert_eq!(clear(), Leftovers::default());
        let changed = stamp("a", "b", "[Unit]\n") + "# changed\n";
        fs::write(path("theirs.service.d/a.conf"), changed).unwrap();
        fs::write(path("a-metrics.socket"), stamp("a", "b", "[Socket]\n")).unwrap();
        let changed = vec![path("theirs.service.d/a.conf")];
        let metrics = Some(path("a-metrics.socket"));
        assert_eq!(clear(), Leftovers { removed: vec![], changed, metrics });
    }
}
