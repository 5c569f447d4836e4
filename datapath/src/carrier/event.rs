//! What the thread of the carrier tells, and what it is told.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;

use super::lane::{Lane, Moved};

/// Who has ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The peer's link, with a reason of links.
    ByLink,
    /// The peer's QUIC.
    ByPeer,
    /// The own QUIC: a broken rule, a refused certificate, nobody there.
    Here,
}

/// What has happened; connections by their numbers.
pub enum Event {
    /// Somebody calls from there; nothing is known of it.
    Called(u64, SocketAddr),
    /// Who was called has answered.
    Heard(u64),
    /// The handshake is complete, and the peer was judged.
    Opened(u64),
    /// Bytes of a stream of the peer.
    Data {
        /// The connection.
        connection: u64,
        /// The stream, from 0.
        stream: u64,
        /// The bytes.
        bytes: Vec<u8>,
        /// Whether the stream ends with them.
        end: bool,
        /// What the lane had moved when they came.
        moved: Moved,
        /// Where what waits is counted.
        lane: Arc<Lane>,
    },
    /// A ping of the owner has arrived.
    Echo(u64, u64),
    /// The lane has moved so much in all.
    Moved(u64, Moved),
    /// The switch has refused a batch of the peer: the rule.
    Broken(u64, String),
    /// The peer has given up a stream of either side.
    GivenUp(u64, u64),
    /// A connection has ended.
    Ended {
        /// The connection.
        connection: u64,
        /// By whom.
        ending: Ending,
        /// The code on the wire; 0 if there was none.
        code: u64,
        /// What was said, of the peer perhaps.
        text: String,
        /// What the lane has moved in all.
        moved: Moved,
    },
}

/// What the owner wants done.
pub enum Command {
    /// Calls whoever is there; the connection has this number.
    Dial(u64, SocketAddr),
    /// Appends bytes to an own stream.
    Write {
        /// The connection.
        connection: u64,
        /// The stream, from 0.
        stream: u64,
        /// The bytes.
        data: Bytes,
        /// Whether the stream ends with them.
        end: bool,
    },
    /// Tries a connection: its number, that of the try, and whether it is urgent.
    Ping(u64, u64, bool),
    /// What was given of the messages is dealt with.
    Proceed(u64),
    /// Everything that a lane receives is to be told.
    ReportAll(u64),
    /// Ends a connection.
    Cut {
        /// The connection.
        connection: u64,
        /// The reason.
        code: u32,
        /// The same in words.
        text: Bytes,
    },
    /// Presents other certificates from now on: a chain and its key.
    Renew(Vec<Vec<u8>>, Vec<u8>),
    /// Ends the thread behind what was said before.
    Stop,
    /// Ends the thread without a word.
    Kill,
}
