//! Units to files: all of them or none, and never over what somebody else has written.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::logging::in_words;
use crate::units::text::{MARK, UnitFile};

/// What was at a file's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing.
    Nothing,
    /// The same.
    Same,
    /// Something else.
    Other,
}

/// Writes them; what was there before, file by file.
///
/// # Errors
/// One line that names the file.
pub(crate) fn write(
    files: &[UnitFile],
    directory: &Path,
    force: bool,
) -> Result<Vec<Before>, String> {
    // All of them are looked at before one is written.
    let before = files.iter().map(|file| look(file, directory, force));
    let before = before.collect::<Result<Vec<_>, _>>()?;
    for (file, before) in files.iter().zip(&before) {
        if *before != Before::Same {
            let path = directory.join(&file.path);
            replace(&path, &file.text).map_err(|error| {
                let hint = match error.kind() {
                    ErrorKind::PermissionDenied => " (Run it as root.)",
                    _ => "",
                };
                format!("Failed to write {}: {}.{hint}", path.display(), in_words(&error))
            })?;
        }
    }
    Ok(before)
}

fn look(file: &UnitFile, directory: &Path, force: bool) -> Result<Before, String> {
    let path = directory.join(&file.path);
    // A link is somebody's: systemctl mask makes one.
    let is_file = match fs::symlink_metadata(&path) {
        Ok(metadata) => metadata.is_file(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Before::Nothing),
        Err(error) => {
            return Err(format!("Failed to look at {}: {}.", path.display(), in_words(&error)));
        }
    };
    let text = if is_file { fs::read(&path).unwrap_or_default() } else { Vec::new() };
    if text == file.text.as_bytes() {
        return Ok(Before::Same);
    }
    if !force && !text.starts_with(MARK.as_bytes()) {
        return Err(format!(
            "{} is there, and not written by this program; nothing was written. (--force replaces it.)",
            path.display()
        ));
    }
    Ok(Before::Other)
}

/// A reader finds the old file or the new one, and never a part.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(directory)?;
    let mut file = NamedTempFile::with_prefix_in(".#", directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_else_has_written_stays() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| UnitFile {
            path: name.into(),
            text: format!("{MARK}\n{text}"),
        };
        let files = [file("a.socket", "1"), file("b.service.d/c.conf", "2")];
        let write = |files: &[UnitFile], force| write(files, directory.path(), force);
        assert_eq!(write(&files, false), Ok(vec![Before::Nothing; 2]));
        assert_eq!(write(&files, false), Ok(vec![Before::Same; 2]));
        let changed = [file("a.socket", "3"), file("b.service.d/c.conf", "2")];
        assert_eq!(write(&changed, false), Ok(vec![Before::Other, Before::Same]));
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("a.socket"), changed[0].text);
        let mode = fs::metadata(directory.path().join("a.socket")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);

        fs::write(directory.path().join("b.service.d/c.conf"), "theirs").unwrap();
        let error = write(&files, false).unwrap_err();
        assert!(error.contains("c.conf is there, and not written by this program"), "{error}");
        assert_eq!(read("a.socket"), changed[0].text, "none or all");
        assert_eq!(write(&files, true), Ok(vec![Before::Other; 2]));
        assert_eq!(read("b.service.d/c.conf"), files[1].text);

        // As systemctl mask does.
        let masked = directory.path().join("a.socket");
        fs::remove_file(&masked).unwrap();
        std::os::unix::fs::symlink("/dev/null", &masked).unwrap();
        assert!(write(&files, false).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "nothing else is left");
    }
}
