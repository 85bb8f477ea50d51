//! Control messages, as the kernel reads and writes them: cmsg(3).
//!
//! Each begins with a header, `struct cmsghdr` in linux/socket.h: its length with the header
//! (`size_t`), its level and its type (`int`). C libraries declare the length in other ways.

/// The level and the type of a control message.
pub type ControlKind = (i32, i32);

/// Bytes of control messages, with the alignment of their header.
#[derive(Clone, Copy)]
#[repr(align(8))]
pub struct Control<const LEN: usize>(pub [u8; LEN]);

/// Returns the room that a control message with `len` bytes takes (`CMSG_SPACE`).
pub const fn space(len: usize) -> usize {
    HEADER + align(len)
}

/// Returns the kind of the first control message, its data, and what follows it.
pub fn next(control: &[u8]) -> Option<(ControlKind, &[u8], &[u8])> {
    let (len, rest) = control.split_first_chunk()?;
    let (level, rest) = rest.split_first_chunk()?;
    let (kind, _) = rest.split_first_chunk()?;
    let len = usize::from_ne_bytes(*len);
    let kind = (i32::from_ne_bytes(*level), i32::from_ne_bytes(*kind));
    let data = control.get(HEADER..len)?;
    Some((kind, data, control.get(align(len)..).unwrap_or(&[])))
}

/// Writes a control message at `at`, where there is room for it, and moves `at` behind it.
pub fn push(control: &mut [u8], at: &mut usize, (level, kind): ControlKind, data: &[u8]) {
    let len = HEADER + data.len();
    let room = &mut control[*at..*at + align(len)];
    room.fill(0);
    let (header, rest) = room.split_at_mut(HEADER);
    let (of_len, of_kind) = header.split_at_mut(size_of::<usize>());
    let (of_level, of_kind) = of_kind.split_at_mut(size_of::<i32>());
    of_len.copy_from_slice(&len.to_ne_bytes());
    of_level.copy_from_slice(&level.to_ne_bytes());
    of_kind.copy_from_slice(&kind.to_ne_bytes());
    rest[..data.len()].copy_from_slice(data);
    *at += align(len);
}

/// The length of a header. It is a multiple of the alignment.
const HEADER: usize = size_of::<usize>() + 2 * size_of::<i32>();

const fn align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}
