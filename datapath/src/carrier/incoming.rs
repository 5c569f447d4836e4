//! What a peer sends on its streams, and where it goes.
//!
//! The bytes of all streams go to the owner of the link as they come, but for the stream of messages. That is cut into frames:
//! batches of records go to the switch if one is attached, whatever else goes to the owner, and then the stream stands still
//! until the owner has dealt with it. So it is certain what came before a switch was attached, and what behind.
//!
//! Invariant: what waits for the owner is bounded, for no more is read before the owner has taken what was read earlier.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use quinn_proto::{Connection, Dir, ReadError, StreamId};

use super::event::Event;
use super::frame::{self, DATA, HEADER, Next};
use super::lane::Lane;

/// What may wait for the owner of the link.
const WAITING: usize = 4 << 20;
/// Bytes that are read of the stream of messages before they are dealt with.
const READ_BYTES: usize = 256 << 10;

/// How the stream of messages is read.
#[derive(PartialEq, Eq)]
enum Reading {
    Frames,
    /// The owner has something to deal with.
    Held,
    /// What came is no frame: the owner gets it as it is, and ends the link.
    Raw,
}

/// The receiving half of one connection.
pub struct Incoming {
    number: u64,
    lane: Arc<Lane>,
    readable: BTreeSet<u64>,
    reading: Reading,
    held: Vec<u8>,
    /// How much of it is dealt with.
    done: usize,
    /// The owner is told of what the lane has received after so much, in cost.
    report: u64,
    reported: u64,
    reports_all: bool,
}

impl Incoming {
    /// Nothing has come. Of what the lane receives the owner is told after every `report`.
    #[must_use]
    pub fn new(number: u64, lane: Arc<Lane>, report: u64) -> Self {
        Self {
            number,
            lane,
            readable: BTreeSet::new(),
            reading: Reading::Frames,
            held: Vec::new(),
            done: 0,
            report,
            reported: 0,
            reports_all: false,
        }
    }

    /// Something may be on a stream.
    pub fn note(&mut self, stream: u64) {
        self.readable.insert(stream);
    }

    /// The owner has dealt with what it was given of the messages.
    pub fn proceed(&mut self) {
        if self.reading == Reading::Held {
            self.reading = Reading::Frames;
            self.readable.insert(DATA);
        }
    }

    /// The owner wants to know of everything that comes from now on.
    pub fn report_all(&mut self, events: &mut Vec<Event>) {
        self.reports_all = true;
        self.report(events);
    }

    fn is_full(&self) -> bool {
        self.lane.waiting.load(Ordering::SeqCst) >= WAITING
    }

    /// Whether there is something to read although nothing has come.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let is_held = self.reading == Reading::Held;
        let mut streams = self.readable.iter();
        streams.any(|stream| *stream != DATA || !is_held) && !self.is_full()
    }

    /// Reads what has come.
    pub fn read(&mut self, quic: &mut Connection, events: &mut Vec<Event>) {
        for stream in std::mem::take(&mut self.readable) {
            if self.is_full() || stream == DATA && self.reading == Reading::Held {
                self.readable.insert(stream);
            } else if stream == DATA && self.reading == Reading::Frames {
                self.read_frames(quic, events);
            } else {
                self.read_bytes(quic, stream, events);
            }
        }
    }

    /// Gives all bytes of a stream to the owner.
    fn read_bytes(&mut self, quic: &mut Connection, stream: u64, events: &mut Vec<Event>) {
        let mut bytes = Vec::new();
        match take(quic, stream, WAITING, &mut bytes) {
            Took::Some | Took::Nothing => {}
            Took::Most => self.note(stream),
            Took::End => return self.give(stream, bytes, true, events),
            Took::Reset => {
                events.push(Event::GivenUp(self.number, stream));
                return;
            }
        }
        self.give(stream, bytes, false, events);
    }

    fn give(&mut self, stream: u64, bytes: Vec<u8>, end: bool, events: &mut Vec<Event>) {
        if bytes.is_empty() && !end {
            return;
        }
        self.lane.wait(bytes.len());
        let moved = self.lane.moved();
        self.reported = moved.received_cost;
        events.push(Event::Data {
            connection: self.number,
            stream,
            bytes,
            end,
            moved,
            lane: self.lane.clone(),
        });
    }

    fn read_frames(&mut self, quic: &mut Connection, events: &mut Vec<Event>) {
        loop {
            self.cut_frames(events);
            if self.reading != Reading::Frames {
                // What is left is read when the owner says so, or as it is.
                self.note(DATA);
                return;
            }
            match take(quic, DATA, READ_BYTES, &mut self.held) {
                Took::Some | Took::Most => {}
                Took::Nothing => return,
                Took::End => {
                    self.cut_frames(events);
                    self.reading = Reading::Raw;
                    let rest = std::mem::take(&mut self.held).split_off(self.done);
                    self.done = 0;
                    return self.give(DATA, rest, true, events);
                }
                Took::Reset => {
                    events.push(Event::GivenUp(self.number, DATA));
                    return;
                }
            }
        }
    }

    /// Deals with the frames that are whole.
    fn cut_frames(&mut self, events: &mut Vec<Event>) {
        let held = std::mem::take(&mut self.held);
        let mut at = self.done;
        // Frames for the owner, from here on.
        let mut begin = at;
        while self.reading == Reading::Frames {
            match frame::next(&held[at..]) {
                Next::Batch(len) if at + HEADER + len <= held.len() => {
                    let batch = &held[at + HEADER..at + HEADER + len];
                    if begin == at
                        && let Some(taken) = self.lane.give(batch)
                    {
                        begin += HEADER + len;
                        if let Err(broken) = taken {
                            self.lane.detach();
                            self.reading = Reading::Held;
                            events.push(Event::Broken(self.number, broken.to_string()));
                        }
                    }
                    at += HEADER + len;
                }
                Next::Other(len) if at + len <= held.len() => {
                    at += len;
                    self.reading = Reading::Held;
                }
                Next::Strange => {
                    at = held.len();
                    self.reading = Reading::Raw;
                }
                _ => break,
            }
        }
        if begin < at {
            if self.reading == Reading::Frames {
                // Whoever is attached next must not get what stands behind these first.
                self.reading = Reading::Held;
            }
            self.give(DATA, held[begin..at].to_vec(), false, events);
        }
        self.held = held;
        self.done = at;
        if self.done == self.held.len() {
            self.held.clear();
            self.done = 0;
        } else if self.done >= READ_BYTES {
            // Now and then, so that most bytes stay where they are.
            self.held.drain(..self.done);
            self.done = 0;
        }
        self.report(events);
    }

    fn report(&mut self, events: &mut Vec<Event>) {
        let moved = self.lane.moved();
        let news = moved.received_cost - self.reported;
        if news >= self.report || self.reports_all && news > 0 {
            self.reported = moved.received_cost;
            events.push(Event::Moved(self.number, moved));
        }
    }
}

/// What came of reading.
enum Took {
    /// All that there is for now.
    Some,
    /// As much as was asked for.
    Most,
    /// There is nothing.
    Nothing,
    /// The rest of the stream.
    End,
    /// The peer has given it up.
    Reset,
}

/// Appends what has come on a stream of the peer, at most so much.
fn take(quic: &mut Connection, stream: u64, most: usize, into: &mut Vec<u8>) -> Took {
    let id = StreamId::new(!quic.side(), Dir::Uni, stream);
    let before = into.len();
    let mut receiving = quic.recv_stream(id);
    let Ok(mut chunks) = receiving.read(true) else {
        return Took::Nothing;
    };
    let took = loop {
        let left = most - (into.len() - before);
        if left == 0 {
            break Took::Most;
        }
        match chunks.next(left) {
            Ok(Some(chunk)) => into.extend_from_slice(&chunk.bytes),
            Ok(None) => break Took::End,
            Err(ReadError::Blocked) if into.len() == before => break Took::Nothing,
            Err(ReadError::Blocked) => break Took::Some,
            Err(ReadError::Reset(_)) => break Took::Reset,
        }
    };
    let _ = chunks.finalize();
    took
}
