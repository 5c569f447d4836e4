//! A trunk: another node as the switch sees it, with one ordered lane of records in each direction.
//!
//! Everything that must keep order between two nodes goes through the lane: messages, what is missing, what nobody will read.
//! How its batches of bytes travel is not decided here, and who may do what neither.
//!
//! ```text
//! endpoint -> destination (credit) -> records 1, 2, 3.. -> batch ~~> records -> sender -> endpoint's ring, or held for it
//!                   ^------------------------- credit, confirmation <~~--------------------------------'
//! ```
//!
//! The switch gives a seat to the trunk (which hears multicasts), to each destination there (where senders wait), and to each
//! sender from there (whose shares, gaps and requests are those of any sender).

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

use crate::carrier::LaneBell;
use crate::endpoint::{Charge, Ref};
use crate::frame::RxHeader;
use crate::trunk_in::Inbound;
use crate::trunk_out::Outbound;
use crate::trunk_wire::To;

/// What an endpoint without rings stands for. The first number is the place of the trunk, the second says who is meant there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remote {
    /// All subscribers of a node.
    Trunk(usize),
    /// An address there.
    Destination(usize, u32),
    /// An endpoint there that sends, as its node calls it.
    Sender(usize, u64),
}

/// What Python must know of a trunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEvent {
    /// There is something to be sent: `take_batch` until it returns nothing.
    Ready(u64),
    /// Messages of an endpoint of this node that were accepted will be read by nobody.
    Unread {
        /// The endpoint.
        endpoint: u64,
        /// First number.
        first: u64,
        /// Last number.
        last: u64,
        /// How many of these.
        count: u64,
        /// Why.
        errno: u32,
        /// Where they were sent; empty: to several addresses.
        address: Box<[u8]>,
    },
    /// Nobody knows whether messages of an endpoint of this node arrived (D21).
    Unknown {
        /// The endpoint.
        endpoint: u64,
        /// First number.
        first: u64,
        /// Last number.
        last: u64,
        /// How many of these.
        count: u64,
        /// The node they were sent to.
        trunk: u64,
    },
    /// The body of a message is to be carried to a node, which says when it has all of it; then the message follows.
    Body {
        /// The node.
        trunk: u64,
        /// Names the body.
        ticket: u32,
        /// Its size in bytes.
        size: u32,
    },
    /// Bytes of the other agent, in order with its messages.
    Signal(u64, Box<[u8]>),
    /// A message was refused whose source nobody of that node owns.
    Source(u64, Box<[u8]>),
    /// An endpoint of this node may not send to an address; told once of each.
    Denied(u64, Box<[u8]>),
    /// The peer takes so little that what it must be told has no room any more: the lane has to begin anew.
    Choked(u64),
}

/// A message that was accepted, and waits until its body is at the other node.
pub struct Parked {
    /// For whom.
    pub to: To,
    /// As receivers here would read it.
    pub header: RxHeader,
    /// The source.
    pub src: Box<[u8]>,
    /// The destination.
    pub dst: Box<[u8]>,
    /// Who pays.
    pub charge: Charge,
    /// The most that its record may cost.
    pub cost: u64,
    /// How long a reply is waited for, if one is expected.
    pub deadline_ms: Option<u32>,
    /// The body.
    pub body: OwnedFd,
}

/// Another node.
pub struct Trunk {
    /// The number by which Python knows it.
    pub id: u64,
    /// Its seat in the switch.
    pub me: Ref,
    /// Its name.
    pub node: Box<[u8]>,
    /// Senders are told EHOSTDOWN.
    pub is_down: bool,
    /// To it.
    pub out: Outbound,
    /// From it.
    pub inn: Inbound,
    /// Python carries large bodies there; otherwise messages with such bodies are refused.
    pub carries_bodies: bool,
    /// Seats of senders of its former lanes, of whom messages may lie unread.
    pub former: Vec<Ref>,
    /// Messages whose bodies are on their way, by ticket.
    pub parked: BTreeMap<u32, Parked>,
    /// Bytes of the agent that go behind messages of senders that are gone: behind all with tickets up to this one.
    pub late: VecDeque<(u32, Box<[u8]>)>,
    /// The ticket that was given last; none is given twice.
    pub last_ticket: u32,
    /// Destinations for which somebody waits.
    pub waiting: Vec<Ref>,
    /// Whoever takes batches knows that there is something to be sent.
    pub is_told: bool,
    /// What is rung for that; without it, Python is told.
    pub bell: Option<Arc<LaneBell>>,
    /// Python knows that it is choked.
    pub is_choke_told: bool,
    /// Messages that were refused because of their source.
    pub forged: u64,
}

impl Trunk {
    /// A node to which nothing was sent, and from which nothing came.
    #[must_use]
    pub fn new(id: u64, me: Ref, node: &[u8]) -> Self {
        Self {
            id,
            me,
            node: node.into(),
            is_down: false,
            out: Outbound::default(),
            inn: Inbound::default(),
            carries_bodies: false,
            former: Vec::new(),
            parked: BTreeMap::new(),
            late: VecDeque::new(),
            last_ticket: 0,
            waiting: Vec::new(),
            is_told: false,
            bell: None,
            is_choke_told: false,
            forged: 0,
        }
    }

    /// Whether there is something that cannot wait for a batch that goes anyway.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.out.is_choked() && (self.out.has_more() || self.inn.is_urgent())
    }

    /// Whether nothing is to be sent or confirmed, and nobody waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        // As long as the node is away, what is missing there can wait.
        self.out.is_idle(self.is_down)
            && !self.inn.owes()
            && self.waiting.is_empty()
            && self.parked.is_empty()
    }

    /// Counters for people, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("sent", self.out.last()),
            ("confirmed", self.out.confirmed()),
            ("received", self.inn.received()),
            ("unconfirmed_bytes", self.out.bytes()),
            ("held_bytes", self.inn.held),
            ("destinations", self.out.destination_count() as u64),
            ("senders", self.out.sender_count() as u64),
            ("waiting", self.waiting.len() as u64),
            ("parked", self.parked.len() as u64),
            ("forged", self.forged),
        ]
    }

    /// The next batch: at most so many bytes, but for one record; empty when there is nothing to be said.
    pub fn take_batch(&mut self, max_bytes: usize) -> Vec<u8> {
        self.take_batch_behind(0, max_bytes).concat()
    }

    /// The same behind so many bytes for whoever carries it, in parts of which the first has these.
    pub fn take_batch_behind(&mut self, room: usize, max_bytes: usize) -> Vec<Bytes> {
        if self.out.is_choked() || !(self.out.has_more() || self.inn.owes()) {
            self.is_told = false;
            return Vec::new();
        }
        let credits = self.inn.take();
        let batch = self
            .out
            .take(room, self.inn.received(), &credits, max_bytes);
        self.is_told = self.has_more();
        batch
    }
}

/// The block of a unique or provisional address of a cluster, `BLOCK.NUMBER` or `@BLOCK.NUMBER`.
#[must_use]
pub fn block_of(address: &[u8]) -> Option<u64> {
    let address = address.strip_prefix(b"@").unwrap_or(address);
    let dot = address.iter().position(|b| *b == b'.')?;
    let block = number(&address[..dot])?;
    number(&address[dot + 1..]).map(|_| block)
}

/// A number from 1 in its only decimal form.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || digits[0] == b'0' || digits.len() > 19 {
        return None;
    }
    digits.iter().try_fold(0u64, |all, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        all.checked_mul(10)?.checked_add(digit)
    })
}
