//! The line of an endpoint: a SOCK_SEQPACKET pair that carries wake-ups and the descriptors of messages.
//!
//! Invariants:
//! 1. Nothing here blocks, and nothing raises SIGPIPE.
//! 2. Every descriptor that arrives is owned at once, so none leaks whatever follows.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

/// Packet: look at my rings.
pub const KICK: u8 = b'k';
/// Packet: answer with a wake-up.
pub const PING: u8 = b'p';
/// Packet: padding that keeps POLLOUT away until it is read.
pub const BLOCK: u8 = b'b';
/// Packet: descriptors ride along.
pub const FDS: u8 = b'f';
/// Packet: wake up.
pub const WAKE: u8 = b'w';
/// Packet, with a number: wake this reader of this lane, see [`reader_of`].
pub const LANE_WAKE: u8 = b'l';
/// Packet, with a number: this lane cannot be read.
pub const LANE_SPOILT: u8 = b'x';

/// The most descriptors that one packet carries: those of a message and the memfd of its body.
pub const MAX_FDS: usize = 17;

/// The number that names a reader of a lane, by the numbers of both.
#[must_use]
pub const fn reader_of(lane: u64, reader: usize) -> u64 {
    lane | (reader as u64) << READER_SHIFT
}

/// The lane and the reader that such a number names.
#[must_use]
pub const fn lane_and_reader(number: u64) -> (u64, usize) {
    (
        number & ((1 << READER_SHIFT) - 1),
        (number >> READER_SHIFT) as usize,
    )
}

const READER_SHIFT: u32 = 48;

/// What came in one packet.
pub struct Packet {
    /// Its first byte; 0 for an empty one.
    pub kind: u8,
    /// The number behind it; 0 where there is none.
    pub number: u64,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
    /// Some descriptors were lost because this process has no room for them.
    pub lost: bool,
}

/// A pair of connected lines: the agent's end (non-blocking) and the client's.
///
/// # Errors
/// As socketpair(2).
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the array has room for two; on success both descriptors are new and ours.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

#[repr(align(8))]
struct Control([u8; 128]);

/// Sends one packet, with descriptors if there are any. Never blocks.
///
/// # Errors
/// As sendmsg(2): EAGAIN when the peer does not read, EPIPE when it is gone, ETOOMANYREFS when too many descriptors are in flight.
pub fn send(line: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    assert!(
        fds.len() <= MAX_FDS,
        "a packet carries at most {MAX_FDS} descriptors"
    );
    let mut control = Control([0; 128]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all pointers point to locals that live for the call; the control buffer has room for MAX_FDS descriptors
    // (CMSG_SPACE(17 * 4) is 88 bytes).
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        if !fds.is_empty() {
            let bytes_of_fds = size_of_val(fds) as u32;
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(bytes_of_fds) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&raw const msg);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(bytes_of_fds) as _;
            ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(cmsg),
                size_of_val(fds),
            );
        }
        if libc::sendmsg(
            line.as_raw_fd(),
            &raw const msg,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        ) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sends a packet with a number, waiting a little for room: only an agent that is stuck does not read it. Returns whether it went.
pub fn call(line: BorrowedFd<'_>, kind: u8, number: u64) -> bool {
    let mut packet = [0u8; 9];
    packet[0] = kind;
    packet[1..].copy_from_slice(&number.to_le_bytes());
    for _ in 0..1000 {
        match send(line, &packet, &[]) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result.is_ok(),
        }
    }
    false
}

/// Receives one packet, or `None` when there is none or the peer is gone. Never blocks.
#[must_use]
pub fn receive(line: BorrowedFd<'_>) -> Option<Packet> {
    let mut head = [0u8; 9];
    let mut control = Control([0; 128]);
    let mut iov = libc::iovec {
        iov_base: head.as_mut_ptr().cast(),
        iov_len: head.len(),
    };
    // SAFETY: all pointers point to locals that live for the call; what the kernel wrote is walked with its own macros
    // and each descriptor is taken exactly once.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.0.as_mut_ptr().cast();
        msg.msg_controllen = size_of::<Control>() as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let mut got = libc::recvmsg(line.as_raw_fd(), &raw mut msg, flags);
        if got < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECONNRESET) {
            // The peer is gone and had not read everything. That is said once, ahead of what it had sent.
            got = libc::recvmsg(line.as_raw_fd(), &raw mut msg, flags);
        }
        if got < 0 {
            return None;
        }
        let mut fds = Vec::new();
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const msg);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*cmsg).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                for i in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const msg, cmsg);
        }
        // An empty packet looks like the end of the line, but may bring descriptors: those are owned, and closed, in any case.
        if got == 0 && fds.is_empty() {
            return None;
        }
        Some(Packet {
            kind: head[0],
            number: head[1..]
                .iter()
                .rev()
                .fold(0, |n, b| n << 8 | u64::from(*b)),
            fds,
            lost: msg.msg_flags & libc::MSG_CTRUNC != 0,
        })
    }
}

/// The first byte of the next packet without taking it, or `None`.
#[must_use]
pub fn peek(line: BorrowedFd<'_>) -> Option<u8> {
    let mut byte = [0u8; 1];
    // SAFETY: the buffer has one byte. A plain recv with MSG_PEEK leaves descriptors where they are.
    let got = unsafe {
        libc::recv(
            line.as_raw_fd(),
            byte.as_mut_ptr().cast(),
            1,
            libc::MSG_PEEK | libc::MSG_DONTWAIT,
        )
    };
    (got > 0).then_some(byte[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn case9_descriptors_of_an_empty_packet_do_not_leak() {
        let (a, b) = pair().unwrap();
        let (x, y) = pair().unwrap();
        send(a.as_fd(), &[], &[x.as_raw_fd()]).unwrap();
        drop(x);
        let packet = receive(b.as_fd()).unwrap();
        assert_eq!((packet.kind, packet.fds.len()), (0, 1));
        drop(packet);
        assert_eq!(
            send(y.as_fd(), &[WAKE], &[]).unwrap_err().raw_os_error(),
            Some(libc::EPIPE),
            "the last copy is closed"
        );
    }

    #[test]
    fn d16_what_was_sent_can_be_read_when_the_peer_is_gone_without_reading() {
        let (a, b) = pair().unwrap();
        send(b.as_fd(), &[PING], &[]).unwrap();
        send(a.as_fd(), &[FDS], &[b.as_raw_fd()]).unwrap();
        drop(a);
        assert_eq!(receive(b.as_fd()).unwrap().fds.len(), 1);
        assert!(receive(b.as_fd()).is_none());
    }

    #[test]
    fn case9_descriptors_travel_and_are_owned() {
        let (a, b) = pair().unwrap();
        let (x, y) = pair().unwrap();
        send(a.as_fd(), &[KICK], &[]).unwrap();
        send(a.as_fd(), &[FDS, 2], &[x.as_raw_fd(), y.as_raw_fd()]).unwrap();
        assert_eq!(receive(b.as_fd()).unwrap().kind, KICK);
        assert_eq!(peek(b.as_fd()), Some(FDS));
        let packet = receive(b.as_fd()).unwrap();
        assert_eq!(
            (packet.kind, packet.fds.len(), packet.lost),
            (FDS, 2, false)
        );
        assert!(receive(b.as_fd()).is_none());
        drop(b);
        assert_eq!(
            send(a.as_fd(), &[WAKE], &[]).unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    }
}
