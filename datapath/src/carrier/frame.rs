//! Frames on the stream of messages, as far as a lane needs them (link/frame.py has all of them).
//!
//! ```text
//! 0   u8      kind: 2 a message, 3 a destination is needed no more
//! 1   u8 x 3  zero
//! 4   u32     length of what follows the header
//! 8   u64     destination
//! 16  the bytes                                                 all little endian
//! ```

/// The stream of messages, behind those of control and tables.
pub const DATA: u64 = 2;
/// Bytes in front of each content.
pub const HEADER: usize = 16;
/// The destination of batches of records (node/peers.py).
pub const BATCHES: u64 = 0;
/// The longest message that is received (link/settings.py); whatever is longer, the core of the link judges.
const MESSAGE_BYTES: usize = 1 << 20;
const MESSAGE: u8 = 2;
const FORGET: u8 = 3;

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A batch of records, of this many bytes behind its header.
    Batch(usize),
    /// Another frame: how many bytes it has with its header.
    Other(usize),
    /// Nobody knows yet.
    Unknown,
    /// No frame that is expected here: the core of the link says why.
    Strange,
}

/// The header of a batch.
#[must_use]
pub fn header(len: usize) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0] = MESSAGE;
    header[4..8].copy_from_slice(&(len as u32).to_le_bytes());
    header[8..].copy_from_slice(&BATCHES.to_le_bytes());
    header
}

/// Says what comes next.
#[must_use]
pub fn next(bytes: &[u8]) -> Next {
    let Some(head) = bytes.first_chunk::<HEADER>() else {
        return Next::Unknown;
    };
    let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    let destination = u64::from_le_bytes([
        head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15],
    ]);
    match head[0] {
        _ if head[1..4] != [0; 3] || len > MESSAGE_BYTES => Next::Strange,
        MESSAGE if destination == BATCHES => Next::Batch(len),
        MESSAGE => Next::Other(HEADER + len),
        FORGET if len == 0 => Next::Other(HEADER),
        _ => Next::Strange,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_what_follows() {
        assert_eq!(next(&header(7)), Next::Batch(7));
        assert_eq!(next(&header(7)[..15]), Next::Unknown);
        let mut other = header(7);
        other[8] = 1;
        assert_eq!(next(&other), Next::Other(23));
        let mut forget = header(0);
        forget[0] = 3;
        assert_eq!(next(&forget), Next::Other(16));
        forget[4] = 1;
        assert_eq!(next(&forget), Next::Strange);
        assert_eq!(next(&header(MESSAGE_BYTES + 1)), Next::Strange);
        assert_eq!(
            next(&[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Next::Strange
        );
        assert_eq!(next(&[1; 16]), Next::Strange);
    }
}
