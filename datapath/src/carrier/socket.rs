//! One UDP socket for all links of a node, with what Linux has against one system call a datagram.
//!
//! Datagrams of one size to one place leave in one call (UDP_SEGMENT), and those that came from one place arrive in one buffer
//! (UDP_GRO), many buffers in one call.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use bytes::BytesMut;
use quinn_proto::{EcnCodepoint, Transmit};
use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

/// Both buffers of the socket.
const BUFFER_BYTES: usize = 8 << 20;
/// One call takes so much from one place.
const READ_BYTES: usize = 64 << 10;
/// So many pieces in one call: no more than stays in a processor's cache until it is dealt with.
pub const PIECES: usize = 8;
/// The most that one call sends, and the most datagrams of it: the limits of Linux.
pub const SEND_BYTES: usize = 65_000;
/// See [`SEND_BYTES`].
pub const SEGMENTS: usize = 64;
/// The smallest datagram that QUIC allows for, and the largest that is worth its buffers.
const DATAGRAM_MIN: u16 = 1200;
const DATAGRAM_MAX: u16 = 16_000;
/// What a path that is not this host is trusted with, when the link to the next hop has more.
const PATH_MAX: u16 = 9_000;
/// Headers that are not ours: IPv4 or IPv6, and UDP.
const HEADERS_FOUR: u16 = 28;
const HEADERS_SIX: u16 = 48;

/// What came in one piece: datagrams of `stride` bytes, the last may be shorter.
pub struct Piece {
    /// Who sent it.
    pub from: SocketAddr,
    /// The bytes.
    pub bytes: BytesMut,
    /// Bytes of each datagram.
    pub stride: usize,
    /// What the network said of congestion.
    pub ecn: Option<EcnCodepoint>,
    /// The own address that it was sent to.
    pub to: Option<std::net::IpAddr>,
}

/// The socket.
pub struct Udp {
    socket: UdpSocket,
    state: UdpSocketState,
    buffers: Vec<BytesMut>,
    metas: Vec<RecvMeta>,
}

fn force(socket: &Socket, option: i32) {
    let size = BUFFER_BYTES as libc::c_int;
    // SAFETY: an open socket, and a value of the stated size that lives for the call. Who may not force it has what is allowed.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
}

impl Udp {
    /// Binds; an unspecified address of IPv6 hears IPv4 too.
    ///
    /// # Errors
    /// As socket(2), bind(2).
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
        force(&socket, libc::SO_RCVBUFFORCE);
        force(&socket, libc::SO_SNDBUFFORCE);
        socket.bind(&address.into())?;
        let socket = UdpSocket::from(socket);
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self {
            socket,
            state,
            buffers: (0..PIECES).map(|_| BytesMut::zeroed(READ_BYTES)).collect(),
            metas: vec![RecvMeta::default(); PIECES],
        })
    }

    /// The bound address.
    ///
    /// # Errors
    /// As getsockname(2).
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What to wait on.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// How an address of a peer looks in what this socket receives; `None`: it cannot be reached from here.
    #[must_use]
    pub fn seen(&self, peer: SocketAddr) -> Option<SocketAddr> {
        let is_six = self.address().ok()?.is_ipv6();
        match peer {
            SocketAddr::V4(v4) if is_six => Some((v4.ip().to_ipv6_mapped(), v4.port()).into()),
            SocketAddr::V6(_) if !is_six => None,
            _ => Some(peer),
        }
    }

    /// How many datagrams of a size one call may carry.
    #[must_use]
    pub fn segments(&self, size: u16) -> usize {
        let most = self.state.max_gso_segments().min(SEGMENTS);
        (SEND_BYTES / usize::from(size)).clamp(1, most.max(1))
    }

    /// Whether the kernel may cut datagrams to pieces.
    #[must_use]
    pub fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Sends; whether the kernel has taken it. What it refuses for another reason than room is lost, as on any network.
    pub fn send(&self, transmit: &Transmit, contents: &[u8]) -> bool {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.map(|ecn| match ecn {
                EcnCodepoint::Ect0 => quinn_udp::EcnCodepoint::Ect0,
                EcnCodepoint::Ect1 => quinn_udp::EcnCodepoint::Ect1,
                EcnCodepoint::Ce => quinn_udp::EcnCodepoint::Ce,
            }),
            contents,
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        self.state.send((&self.socket).into(), &transmit).is_ok()
    }

    /// Takes what has arrived, at most one call of it; returns how many pieces.
    pub fn receive(&mut self, mut take: impl FnMut(Piece)) -> usize {
        self.buffers.iter_mut().for_each(refill);
        let mut slices: Vec<IoSliceMut<'_>> = self
            .buffers
            .iter_mut()
            .map(|b| IoSliceMut::new(b))
            .collect();
        let received = self
            .state
            .recv((&self.socket).into(), &mut slices, &mut self.metas);
        // An ICMP answer to something sent earlier says nothing about who is next.
        let count = match received {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return 0,
            Err(_) => return 1,
        };
        for (meta, buffer) in self.metas.iter().zip(&mut self.buffers).take(count) {
            if meta.len == 0 {
                continue;
            }
            // A part of it that is kept keeps the whole buffer, so of a small one it is a copy that is given away.
            let bytes = if meta.len >= READ_BYTES / 2 {
                buffer.split_to(meta.len)
            } else {
                BytesMut::from(&buffer[..meta.len])
            };
            take(Piece {
                from: meta.addr,
                bytes,
                stride: meta.stride.max(1),
                ecn: meta.ecn.and_then(|e| EcnCodepoint::from_bits(e as u8)),
                to: meta.dst_ip,
            });
        }
        count
    }
}

/// Makes a buffer whole again: the same one, if nobody has a part of it any more.
fn refill(buffer: &mut BytesMut) {
    if buffer.len() == READ_BYTES {
        return;
    }
    buffer.clear();
    if buffer.try_reclaim(READ_BYTES) {
        // SAFETY: there is room for so many bytes, and all of it was made of zeros once and written to since then: it is made
        // here and in `bind` with this very size, and nothing else makes it larger.
        unsafe { buffer.set_len(READ_BYTES) };
    } else {
        *buffer = BytesMut::zeroed(READ_BYTES);
    }
}

/// The size of datagrams for a peer that nothing on the way needs to cut: by the next hop, as the kernel knows it.
#[must_use]
pub fn path_bytes(peer: SocketAddr) -> u16 {
    let is_own = match peer {
        SocketAddr::V4(v4) => v4.ip().is_loopback(),
        SocketAddr::V6(v6) => {
            v6.ip().is_loopback() || v6.ip().to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    };
    let most = if is_own { DATAGRAM_MAX } else { PATH_MAX };
    let headers = if peer.ip().to_canonical().is_ipv4() {
        HEADERS_FOUR
    } else {
        HEADERS_SIX
    };
    mtu(peer).map_or(DATAGRAM_MIN, |mtu| {
        mtu.saturating_sub(headers).clamp(DATAGRAM_MIN, most)
    })
}

fn mtu(peer: SocketAddr) -> Option<u16> {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let socket = Socket::new(Domain::for_address(peer), Type::DGRAM, None).ok()?;
    socket.connect(&peer.into()).ok()?;
    let (level, option) = match peer {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut size = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: an open socket, and room of the stated size that lives for the call.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw mut mtu).cast(),
            &raw mut size,
        )
    };
    (done == 0).then(|| u16::try_from(mtu).unwrap_or(u16::MAX))
}
