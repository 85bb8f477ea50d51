//! Datagrams in batches: recvmmsg(2), sendmmsg(2), and the control messages of ip(7), ipv6(7) and
//! udp(7).
//!
//! What the kernel received as one buffer of equal
//! segments (UDP_GRO) stays one buffer, and can be sent as one (UDP_SEGMENT).

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::slice;

use rustix::io::Errno;
use socket2::SockAddr;

use crate::socket::control::{self, Control, ControlKind};
use crate::socket::sys::{last_errno, setsockopt};

/// Messages of one system call.
pub const BATCH: usize = 32;

/// The longest UDP datagram, and the longest buffer of segments.
pub const UDP_MAX: usize = 65_536;

/// The longest Unix datagram that is received: more than a sender's buffer holds by default
/// (`net.core.wmem_default`).
pub const UNIX_MAX: usize = 262_144;

/// Bytes of control messages: an address (40), the type of service twice (48), a segment size (24),
/// and what other options of a passed socket may add.
const CONTROL_MAX: usize = 256;

/// The address of this machine that a datagram was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    pub ip: IpAddr,
    /// The interface of a link-local address, or 0.
    pub interface: u32,
}

/// A received message.
#[derive(Debug)]
pub struct ReceivedMessage<'a> {
    pub bytes: &'a [u8],
    /// The sender's address as the kernel writes it, empty for a Unix socket without a name.
    pub name: &'a [u8],
    /// Whether the datagram was longer than the buffer, and is cut.
    pub is_truncated: bool,
    /// The length of each datagram but the last, if these are several.
    pub segment: Option<usize>,
    /// The type of service or the traffic class, with the ECN bits (RFC 3168).
    pub tos: u8,
    /// Where the datagram was sent, if the socket was asked for that.
    pub local: Option<LocalAddress>,
}

/// A message to be sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outgoing<'a> {
    /// The bytes, in two parts.
    pub parts: [&'a [u8]; 2],
    /// The receiver's address as the kernel writes it; empty on a connected socket.
    pub name: &'a [u8],
    /// The length of each datagram but the last, if these are several.
    pub segment: Option<usize>,
    pub tos: u8,
    /// The address that the datagram comes from.
    pub source: Option<LocalAddress>,
    /// Whether the receiver has an IPv4 address, `::ffff:a.b.c.d` included.
    pub is_ipv4: bool,
}

/// Asks for what [`ReceivedMessage`] has of a UDP socket. `wants_local` is true for a socket whose
/// address is unspecified.
pub fn set_options(fd: impl AsFd, is_ipv6: bool, wants_local: bool) {
    // What the kernel does not have is not passed on.
    let set = |level, name| drop(setsockopt(&fd, level, name, 1));
    set(libc::SOL_UDP, libc::UDP_GRO);
    // An IPv6 socket may receive IPv4 datagrams.
    set(libc::IPPROTO_IP, libc::IP_RECVTOS);
    if is_ipv6 {
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS);
    }
    if wants_local && is_ipv6 {
        set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO);
    } else if wants_local {
        set(libc::IPPROTO_IP, libc::IP_PKTINFO);
    }
}

/// Decides whether a UDP socket receives several datagrams in one buffer.
pub fn set_gro(fd: impl AsFd, is_on: bool) {
    let _ = setsockopt(fd, libc::SOL_UDP, libc::UDP_GRO, i32::from(is_on));
}

/// Returns an address that the kernel wrote.
pub fn to_sockaddr(name: &[u8]) -> SockAddr {
    // SAFETY: all-zero is a valid `sockaddr_storage`, into which at most its length is copied.
    unsafe {
        let mut storage: socket2::SockAddrStorage = mem::zeroed();
        let length = name.len().min(size_of_val(&storage));
        ptr::copy_nonoverlapping(name.as_ptr(), (&raw mut storage).cast(), length);
        SockAddr::new(storage, length as libc::socklen_t)
    }
}

/// A name of up to 111 bytes: see [`accept`](super::sys::accept).
type Name = libc::sockaddr_storage;

/// Memory for a batch of received messages.
///
/// Pages that no datagram has reached take no memory.
pub struct ReceiveBuffer {
    memory: Box<[u8]>,
    slot_len: usize,
    names: Box<[Name]>,
    controls: Box<[Control<CONTROL_MAX>]>,
    /// Point into the three above, which never move.
    _iovecs: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl ReceiveBuffer {
    /// Creates a buffer for datagrams of up to `slot_len` bytes.
    pub fn new(slot_len: usize) -> Self {
        let mut memory = vec![0; slot_len * BATCH].into_boxed_slice();
        // SAFETY: these types consist of integers and pointers, for which all-zero is valid.
        let (name, iovec, header): (Name, libc::iovec, libc::mmsghdr) = unsafe { mem::zeroed() };
        let mut names = vec![name; BATCH].into_boxed_slice();
        let mut controls = vec![Control([0; CONTROL_MAX]); BATCH].into_boxed_slice();
        let mut iovecs = vec![iovec; BATCH].into_boxed_slice();
        let mut headers = vec![header; BATCH].into_boxed_slice();
        let slots = memory.chunks_exact_mut(slot_len).zip(&mut names).zip(&mut controls);
        let slots = slots.zip(&mut iovecs).zip(&mut headers);
        for ((((bytes, name), control), iovec), header) in slots {
            iovec.iov_base = bytes.as_mut_ptr().cast();
            iovec.iov_len = slot_len;
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = (&raw mut *name).cast();
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
        }
        Self { memory, slot_len, names, controls, _iovecs: iovecs, headers }
    }

    /// Receives what is queued into the slots from `first` on. Returns the number of messages.
    ///
    /// `wants_control` is false for a Unix socket: descriptors that come with a datagram would be
    /// opened here. Without room for them the kernel discards them.
    ///
    /// # Errors
    /// Those of recvmmsg(2).
    pub fn receive(
        &mut self,
        fd: impl AsFd,
        first: usize,
        wants_control: bool,
    ) -> Result<usize, Errno> {
        let headers = &mut self.headers[first..];
        for header in headers.iter_mut() {
            header.msg_hdr.msg_namelen = size_of::<Name>() as libc::socklen_t;
            // The type of the length differs between C libraries, here and below.
            header.msg_hdr.msg_controllen = if wants_control { CONTROL_MAX as _ } else { 0 };
        }
        let (fd, count) = (fd.as_fd().as_raw_fd(), headers.len() as u32);
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the headers point to memory of the given lengths, which `self` owns.
        let received =
            unsafe { libc::recvmmsg(fd, headers.as_mut_ptr(), count, flags as _, ptr::null_mut()) };
        usize::try_from(received).map_err(|_| last_errno())
    }

    /// Returns the message in a slot that [`ReceiveBuffer::receive`] has filled.
    pub fn message(&self, slot: usize) -> ReceivedMessage<'_> {
        let header = &self.headers[slot];
        let start = slot * self.slot_len;
        let len = (header.msg_len as usize).min(self.slot_len);
        let name_len = (header.msg_hdr.msg_namelen as usize).min(size_of::<Name>());
        // SAFETY: the kernel has written `name_len` bytes to this slot's name. Any bytes are
        // valid.
        let name = unsafe { slice::from_raw_parts((&raw const self.names[slot]).cast(), name_len) };
        let mut received = ReceivedMessage {
            bytes: &self.memory[start..start + len],
            // The kernel gives a Unix sender without a name no address, or only a family.
            name: if name.len() > size_of::<libc::sa_family_t>() { name } else { &[] },
            is_truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            segment: None,
            tos: 0,
            local: None,
        };
        #[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
        let control_len = (header.msg_hdr.msg_controllen as usize).min(CONTROL_MAX);
        received.read_controls(&self.controls[slot].0[..control_len]);
        received
    }
}

impl ReceivedMessage<'_> {
    /// Reads control messages, each with a header.
    pub fn read_controls(&mut self, mut control: &[u8]) {
        while let Some((kind, data, rest)) = control::next(control) {
            self.read_control(kind, data);
            control = rest;
        }
    }

    fn read_control(&mut self, kind: ControlKind, data: &[u8]) {
        let int = || data.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
        match kind {
            (libc::IPPROTO_IP, libc::IP_TOS) => self.tos = data.first().copied().unwrap_or(0),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => self.tos = int() as u8,
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let segment = int() as usize;
                self.segment = (0 < segment && segment < self.bytes.len()).then_some(segment);
            }
            // struct in_pktinfo: the interface, the local address, the destination.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                let local = data.get(4..8).and_then(<[u8]>::first_chunk::<4>);
                self.local =
                    local.map(|it| LocalAddress { ip: Ipv4Addr::from(*it).into(), interface: 0 });
            }
            // struct in6_pktinfo: the destination, the interface.
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                let (Some(ip), Some(interface)) = (data.first_chunk::<16>(), data.get(16..20))
                else {
                    return;
                };
                let ip = Ipv6Addr::from(*ip);
                let interface = interface.first_chunk().map_or(0, |it| u32::from_ne_bytes(*it));
                let interface = if ip.is_unicast_link_local() { interface } else { 0 };
                self.local =
                    (!ip.is_multicast()).then_some(LocalAddress { ip: ip.into(), interface });
            }
            _ => {}
        }
    }

    /// Returns the single datagrams.
    pub fn segments(&self) -> impl Iterator<Item = &[u8]> {
        // chunks() yields nothing for a datagram of 0 bytes.
        let empty = self.bytes.is_empty().then_some(self.bytes);
        empty.into_iter().chain(self.bytes.chunks(self.segment.unwrap_or(usize::MAX).max(1)))
    }

    /// Returns the number of datagrams.
    pub fn count(&self) -> usize {
        self.segment.map_or(1, |segment| self.bytes.len().div_ceil(segment))
    }
}

/// Memory for the headers of a batch that is sent.
pub struct SendBuffer {
    controls: Box<[Control<CONTROL_MAX>]>,
    iovecs: Box<[[libc::iovec; 2]]>,
    headers: Box<[libc::mmsghdr]>,
}

impl SendBuffer {
    pub fn new() -> Self {
        // SAFETY: these types consist of integers and pointers, for which all-zero is valid.
        let (iovecs, header): ([libc::iovec; 2], libc::mmsghdr) = unsafe { mem::zeroed() };
        Self {
            controls: vec![Control([0; CONTROL_MAX]); BATCH].into_boxed_slice(),
            iovecs: vec![iovecs; BATCH].into_boxed_slice(),
            headers: vec![header; BATCH].into_boxed_slice(),
        }
    }

    /// Sends up to [`BATCH`] of `count` messages, without waiting. Returns how many were sent, at
    /// least one.
    ///
    /// # Errors
    /// Those of sendmmsg(2) for the first message.
    pub fn send<'a>(
        &mut self,
        fd: impl AsFd,
        count: usize,
        message: impl Fn(usize) -> Outgoing<'a>,
    ) -> Result<usize, Errno> {
        let count = count.min(BATCH);
        for slot in 0..count {
            self.set(slot, &message(slot));
        }
        let (fd, flags) = (fd.as_fd().as_raw_fd(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL);
        // SAFETY: the headers point to control messages and vectors of `self`, and to bytes and
        // names that live for 'a. The kernel only reads them.
        let sent =
            unsafe { libc::sendmmsg(fd, self.headers.as_mut_ptr(), count as u32, flags as _) };
        usize::try_from(sent).map_err(|_| last_errno())
    }

    fn set(&mut self, slot: usize, message: &Outgoing<'_>) {
        let iovecs = &mut self.iovecs[slot];
        for (iovec, part) in iovecs.iter_mut().zip(message.parts) {
            iovec.iov_base = part.as_ptr().cast_mut().cast();
            iovec.iov_len = part.len();
        }
        let control = &mut self.controls[slot];
        let control_len = message.write_control(control);
        let header = &mut self.headers[slot].msg_hdr;
        let has_second = !message.parts[1].is_empty();
        (header.msg_iov, header.msg_iovlen) = (iovecs.as_mut_ptr(), if has_second { 2 } else { 1 });
        let name = message.name;
        header.msg_namelen = name.len() as libc::socklen_t;
        header.msg_name =
            if name.is_empty() { ptr::null_mut() } else { name.as_ptr().cast_mut().cast() };
        header.msg_controllen = control_len as _;
        header.msg_control =
            if control_len == 0 { ptr::null_mut() } else { control.0.as_mut_ptr().cast() };
    }
}

impl Outgoing<'_> {
    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    /// Whether the first part stands in front of each datagram.
    pub fn has_header(&self) -> bool {
        !self.parts[1].is_empty()
    }

    /// Returns the number of datagrams.
    pub fn datagrams(&self) -> usize {
        let payload = self.parts[usize::from(self.has_header())];
        self.segment.map_or(1, |segment| payload.len().div_ceil(segment))
    }

    /// Returns one of the datagrams.
    pub fn datagram(&self, index: usize) -> Self {
        let Some(segment) = self.segment else { return *self };
        let mut datagram = Self { segment: None, ..*self };
        let payload = &mut datagram.parts[usize::from(self.has_header())];
        *payload = payload.chunks(segment).nth(index).unwrap_or(&[]);
        datagram
    }

    /// Writes the control messages. Returns their length.
    fn write_control(&self, control: &mut Control<CONTROL_MAX>) -> usize {
        let mut len = 0;
        if self.tos != 0 {
            let kind = match self.is_ipv4 {
                true => (libc::IPPROTO_IP, libc::IP_TOS),
                false => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            control::push(&mut control.0, &mut len, kind, &i32::from(self.tos).to_ne_bytes());
        }
        if let Some(segment) = self.segment {
            let kind = (libc::SOL_UDP, libc::UDP_SEGMENT);
            control::push(&mut control.0, &mut len, kind, &(segment as u16).to_ne_bytes());
        }
        if let Some(LocalAddress { ip, interface }) = self.source {
            match ip {
                IpAddr::V4(ip) => {
                    let mut info = [0; 12];
                    info[4..8].copy_from_slice(&ip.octets());
                    control::push(
                        &mut control.0,
                        &mut len,
                        (libc::IPPROTO_IP, libc::IP_PKTINFO),
                        &info,
                    );
                }
                IpAddr::V6(ip) => {
                    let mut info = [0; 20];
                    info[..16].copy_from_slice(&ip.octets());
                    info[16..].copy_from_slice(&interface.to_ne_bytes());
                    let kind = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
                    control::push(&mut control.0, &mut len, kind, &info);
                }
            }
        }
        len
    }
}
