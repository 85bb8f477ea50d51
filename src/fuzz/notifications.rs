//! Messages of COMMAND.

use crate::backend::command::notify_socket::{BUSY, Notification};

/// `READY=1` counts as a whole line, and the last line about being busy counts.
pub fn notification(bytes: &[u8]) {
    let Notification { is_ready, busy } = Notification::parse(bytes);
    let text = [b"\n", bytes, b"\n"].concat();
    let last = |line: &[u8]| text.windows(line.len()).rposition(|it| it == line);
    assert_eq!(is_ready, last(b"\nREADY=1\n").is_some());
    let start = [b"\n", BUSY].concat();
    let [yes, no] = [b"1\n", b"0\n"].map(|end| last(&[&start[..], end].concat()));
    match busy {
        Some(is_busy) => {
            let at = if is_busy { yes } else { no };
            assert!(at.is_some() && at == last(&start));
        }
        None => assert!(last(&start).is_none_or(|at| Some(at) != yes && Some(at) != no)),
    }
}
