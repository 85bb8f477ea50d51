//! Control messages: cmsg(3).

use std::mem::{self, MaybeUninit};
use std::ptr;

/// The level and the type of a control message.
pub type ControlKind = (i32, i32);

/// Bytes of control messages, with the alignment of their header.
#[derive(Clone, Copy)]
#[repr(align(8))]
pub struct Control<const LEN: usize>(pub [u8; LEN]);

/// Returns the room that a control message of `len` bytes takes: cmsg(3), `CMSG_SPACE`.
pub const fn space(len: usize) -> usize {
    align(HEADER) + align(len)
}

/// Returns the kind of the first control message, its data, and what follows it.
pub fn next(control: &[u8]) -> Option<(ControlKind, &[u8], &[u8])> {
    let mut header = MaybeUninit::<libc::cmsghdr>::uninit();
    let bytes = control.get(..HEADER)?;
    // SAFETY: the bytes are as many as a header has, and any bytes are a valid header.
    let header = unsafe {
        ptr::copy_nonoverlapping(bytes.as_ptr(), header.as_mut_ptr().cast(), HEADER);
        header.assume_init()
    };
    let len = header.cmsg_len as usize;
    let data = control.get(align(HEADER)..len)?;
    Some(((header.cmsg_level, header.cmsg_type), data, control.get(align(len)..).unwrap_or(&[])))
}

/// Writes a control message at `at`, where there is room for it, and moves `at` behind it.
pub fn push(control: &mut [u8], at: &mut usize, (level, kind): ControlKind, data: &[u8]) {
    let len = align(HEADER) + data.len();
    // SAFETY: all-zero is a valid header. Of some C libraries it has padding.
    let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
    header.cmsg_len = len as _;
    (header.cmsg_level, header.cmsg_type) = (level, kind);
    let room = &mut control[*at..*at + align(len)];
    room.fill(0);
    // SAFETY: `room` has at least the length of a header.
    unsafe { ptr::copy_nonoverlapping((&raw const header).cast(), room.as_mut_ptr(), HEADER) };
    room[align(HEADER)..len].copy_from_slice(data);
    *at += align(len);
}

/// The length of a control message's header: cmsg(3), `CMSG_LEN(0)`.
const HEADER: usize = size_of::<libc::cmsghdr>();

const fn align(len: usize) -> usize {
    len.next_multiple_of(size_of::<usize>())
}
