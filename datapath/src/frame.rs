//! The records of the rings, as docs/internals.md draws them: little endian, header first, sections padded to 8.
//!
//! Invariants:
//! 1. A header is decoded from a private copy; what it says about lengths is checked against the record's length before use.
//! 2. Encoding and decoding agree for every field (tested by property).

use crate::ring::{Violation, padded};

/// Bytes of a TX header.
pub const TX_HEADER: u64 = 40;
/// Offset of the status word in a TX record.
pub const TX_STATUS: u64 = 8;
/// Bytes of an RX header.
pub const RX_HEADER: u64 = 64;
/// The longest address, in bytes.
pub const ADDRESS_BYTES: usize = 256;

/// TX kind: to one address.
pub const UNICAST: u8 = 1;
/// TX kind: to a multicast address given as bits.
pub const RAW: u8 = 2;
/// TX kind: to a multicast address given as terms.
pub const TERMS: u8 = 3;

/// TX kind: not a message, but the wish for a lane from a source to a destination.
pub const LANE: u8 = 4;
/// Bytes of its body: those of the ring of the lane, u64, and the kind of the destination, u8, padded.
pub const LANE_BODY: u32 = 16;

/// TX flag: not delivered if the record before it was refused.
pub const CHAIN: u8 = 1;
/// TX flag: a reply is expected.
pub const EXPECT_REPLY: u8 = 2;
/// TX and RX flag: the body is a sealed memfd, the last of the descriptors.
pub const BODY_IN_MEMFD: u8 = 4;

/// RX kind: a message.
pub const MESSAGE: u8 = 1;
/// RX kind: messages were missed.
pub const GAP: u8 = 2;
/// RX kind: a message of the agent itself.
pub const NOTICE: u8 = 3;
/// RX kind: an expected reply will not come.
pub const NO_REPLY: u8 = 4;

/// RX kind: a lane begins here. For the client's end, never for its application.
pub const LANE_OPEN: u8 = 5;
/// Bytes of its body, each a u64: number of the lane, number of its sender, bytes of its ring, which of its readers this one is.
pub const LANE_OPEN_BYTES: u32 = 32;
/// RX kind: a lane ended, and what it had is older than what follows here.
pub const LANE_CLOSE: u8 = 6;

/// RX flag: was sent to a multicast address.
pub const MULTICAST: u8 = 1;
/// RX flag: a monitor's copy.
pub const MONITOR: u8 = 2;
/// RX flag: descriptors were lost on the way.
pub const FDS_LOST: u8 = 8;

/// RX flag: the destination is packed terms, not bits.
pub const BY_TERMS: u8 = 16;

/// Header of a record from a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxHeader {
    /// Bytes of the record without the last padding.
    pub len: u32,
    /// `UNICAST`, `RAW`, `TERMS` or `LANE`.
    pub kind: u8,
    /// Flags of a TX record.
    pub flags: u8,
    /// Descriptors ahead on the line.
    pub fds: u8,
    /// Life of an expected reply.
    pub deadline_ms: u32,
    /// Number of the request.
    pub serial: u64,
    /// Number answered.
    pub reply_to: u64,
    /// Bytes of the source address.
    pub src_len: u16,
    /// Bytes of the destination.
    pub dst_len: u16,
    /// Bytes of the body.
    pub body_len: u32,
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}
fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

impl TxHeader {
    /// Offset of the destination in the record.
    #[must_use]
    pub fn dst_at(&self) -> u64 {
        TX_HEADER + padded(u64::from(self.src_len))
    }

    /// Offset of the body in the record.
    #[must_use]
    pub fn body_at(&self) -> u64 {
        self.dst_at() + padded(u64::from(self.dst_len))
    }

    /// Fills in `len` from the lengths of the sections.
    #[must_use]
    pub fn sized(mut self) -> Self {
        self.len = (self.body_at() + u64::from(self.body_len)) as u32;
        self
    }

    /// Whether it is a message to one endpoint that has nothing but a body: from the default source, without request numbers and
    /// descriptors.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.kind == UNICAST
            && self.flags & !CHAIN == 0
            && (self.fds, self.src_len) == (0, 0)
            && (self.serial, self.reply_to) == (0, 0)
    }

    /// The header as bytes, with status pending.
    #[must_use]
    pub fn encode(&self) -> [u8; TX_HEADER as usize] {
        let mut b = [0u8; TX_HEADER as usize];
        b[0..4].copy_from_slice(&self.len.to_le_bytes());
        b[4..8].copy_from_slice(&[self.kind, self.flags, self.fds, 0]);
        b[12..16].copy_from_slice(&self.deadline_ms.to_le_bytes());
        b[16..24].copy_from_slice(&self.serial.to_le_bytes());
        b[24..32].copy_from_slice(&self.reply_to.to_le_bytes());
        b[32..34].copy_from_slice(&self.src_len.to_le_bytes());
        b[34..36].copy_from_slice(&self.dst_len.to_le_bytes());
        b[36..40].copy_from_slice(&self.body_len.to_le_bytes());
        b
    }

    /// Reads a private copy of a header; `len` is the length that the ring has checked.
    ///
    /// # Errors
    /// [`Violation`] when the fields contradict each other.
    pub fn decode(b: &[u8; TX_HEADER as usize], len: u32) -> Result<Self, Violation> {
        let h = Self {
            len,
            kind: b[4],
            flags: b[5],
            fds: b[6],
            deadline_ms: u32_at(b, 12),
            serial: u64_at(b, 16),
            reply_to: u64_at(b, 24),
            src_len: u16_at(b, 32),
            dst_len: u16_at(b, 34),
            body_len: u32_at(b, 36),
        };
        if u32_at(b, 0) != len {
            return Err(Violation("record changed its length"));
        }
        if !(UNICAST..=LANE).contains(&h.kind) {
            return Err(Violation("unknown kind of record"));
        }
        if h.kind == LANE && (h.fds != 2 || h.body_len != LANE_BODY || h.flags != 0) {
            return Err(Violation("a lane that has nowhere to go"));
        }
        if usize::from(h.src_len) > ADDRESS_BYTES {
            return Err(Violation("source longer than an address"));
        }
        if h.flags & BODY_IN_MEMFD == 0 {
            if h.body_at() + u64::from(h.body_len) != u64::from(len) {
                return Err(Violation("sections do not fill the record"));
            }
        } else if h.body_at() != u64::from(len) || h.fds == 0 {
            return Err(Violation("a body in a memfd without one"));
        }
        Ok(h)
    }
}

/// Header of a record to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RxHeader {
    /// Bytes of the record without the last padding.
    pub len: u32,
    /// `MESSAGE`, `GAP`, `NOTICE`, `NO_REPLY`, `LANE_OPEN` or `LANE_CLOSE`.
    pub kind: u8,
    /// Flags of an RX record.
    pub flags: u8,
    /// Descriptors ahead on the line.
    pub fds: u8,
    /// Number of the message at its sender.
    pub seq: u64,
    /// Number of the request.
    pub serial: u64,
    /// Number answered.
    pub reply_to: u64,
    /// Process of the sender.
    pub pid: u32,
    /// User of the sender.
    pub uid: u32,
    /// Group of the sender.
    pub gid: u32,
    /// Bytes of the source.
    pub src_len: u16,
    /// Bytes of the destination.
    pub dst_len: u16,
    /// Bytes of the identity.
    pub ident_len: u16,
    /// Bytes of the control items.
    pub ctl_len: u32,
    /// Bytes of the body.
    pub body_len: u32,
}

impl RxHeader {
    /// Offset of the destination.
    #[must_use]
    pub fn dst_at(&self) -> u64 {
        RX_HEADER + padded(u64::from(self.src_len))
    }
    /// Offset of the identity.
    #[must_use]
    pub fn ident_at(&self) -> u64 {
        self.dst_at() + padded(u64::from(self.dst_len))
    }
    /// Offset of the control items.
    #[must_use]
    pub fn ctl_at(&self) -> u64 {
        self.ident_at() + padded(u64::from(self.ident_len))
    }
    /// Offset of the body.
    #[must_use]
    pub fn body_at(&self) -> u64 {
        self.ctl_at() + padded(u64::from(self.ctl_len))
    }

    /// Fills in `len` from the lengths of the sections.
    #[must_use]
    pub fn sized(mut self) -> Self {
        let body = if self.flags & BODY_IN_MEMFD == 0 {
            u64::from(self.body_len)
        } else {
            0
        };
        self.len = (self.body_at() + body) as u32;
        self
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; RX_HEADER as usize] {
        let mut b = [0u8; RX_HEADER as usize];
        b[0..4].copy_from_slice(&self.len.to_le_bytes());
        b[4..8].copy_from_slice(&[self.kind, self.flags, self.fds, 0]);
        b[8..16].copy_from_slice(&self.seq.to_le_bytes());
        b[16..24].copy_from_slice(&self.serial.to_le_bytes());
        b[24..32].copy_from_slice(&self.reply_to.to_le_bytes());
        b[32..36].copy_from_slice(&self.pid.to_le_bytes());
        b[36..40].copy_from_slice(&self.uid.to_le_bytes());
        b[40..44].copy_from_slice(&self.gid.to_le_bytes());
        b[44..46].copy_from_slice(&self.src_len.to_le_bytes());
        b[46..48].copy_from_slice(&self.dst_len.to_le_bytes());
        b[48..50].copy_from_slice(&self.ident_len.to_le_bytes());
        b[52..56].copy_from_slice(&self.ctl_len.to_le_bytes());
        b[56..60].copy_from_slice(&self.body_len.to_le_bytes());
        b
    }

    /// Reads a private copy of a header; `len` is the length that the ring has checked.
    ///
    /// # Errors
    /// [`Violation`] when the fields contradict each other.
    pub fn decode(b: &[u8; RX_HEADER as usize], len: u32) -> Result<Self, Violation> {
        let h = Self {
            len,
            kind: b[4],
            flags: b[5],
            fds: b[6],
            seq: u64_at(b, 8),
            serial: u64_at(b, 16),
            reply_to: u64_at(b, 24),
            pid: u32_at(b, 32),
            uid: u32_at(b, 36),
            gid: u32_at(b, 40),
            src_len: u16_at(b, 44),
            dst_len: u16_at(b, 46),
            ident_len: u16_at(b, 48),
            ctl_len: u32_at(b, 52),
            body_len: u32_at(b, 56),
        };
        if u64::from(h.sized().len) != u64::from(len) || h.body_at() > u64::from(len) {
            return Err(Violation("sections do not fill the record"));
        }
        Ok(h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn d1_tx_header_round_trip(kind in 1u8..=3, flags in 0u8..4, fds in 0u8..17, ms in any::<u32>(), serial in any::<u64>(),
                                   reply in any::<u64>(), src in 0u16..=256, dst in 0u16..2000, body in 0u32..70_000) {
            let h = TxHeader { len: 0, kind, flags, fds, deadline_ms: ms, serial, reply_to: reply, src_len: src, dst_len: dst, body_len: body }.sized();
            prop_assert_eq!(TxHeader::decode(&h.encode(), h.len), Ok(h));
        }

        #[test]
        fn case5_tx_header_of_garbage_never_points_outside(bytes in prop::array::uniform32(any::<u8>()), rest in any::<u64>(), len in 40u32..100_000) {
            let mut b = [0u8; 40];
            b[..32].copy_from_slice(&bytes);
            b[32..].copy_from_slice(&rest.to_le_bytes());
            b[..4].copy_from_slice(&len.to_le_bytes());
            if let Ok(h) = TxHeader::decode(&b, len) {
                let inline = if h.flags & BODY_IN_MEMFD == 0 { u64::from(h.body_len) } else { 0 };
                prop_assert!(h.body_at() + inline <= u64::from(len));
            }
        }

        #[test]
        fn d1_rx_header_round_trip(kind in 1u8..=4, flags in 0u8..16, seq in any::<u64>(), pid in any::<u32>(), src in 0u16..=256,
                                   dst in 0u16..2000, ident in 0u16..500, ctl in 0u32..3000, body in 0u32..70_000) {
            let h = RxHeader { kind, flags, seq, pid, src_len: src, dst_len: dst, ident_len: ident, ctl_len: ctl, body_len: body, ..RxHeader::default() }.sized();
            prop_assert_eq!(RxHeader::decode(&h.encode(), h.len), Ok(h));
        }
    }
}
