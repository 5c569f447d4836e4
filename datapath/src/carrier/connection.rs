//! One connection: the own streams of a link, its lane, and what is told of it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{
    Connection, ConnectionError, ConnectionHandle, Dir, Event as QuicEvent, Side, StreamEvent,
    StreamId, VarInt, WriteError,
};

use super::congestion::Arrivals;
use super::event::{Ending, Event};
use super::frame::DATA;
use super::incoming::Incoming;
use super::lane::Lane;

/// Bytes of a batch that is asked for.
const BATCH_BYTES: usize = 64 << 10;
/// Batches taken before what they are is sent, so that the peer has something to do meanwhile.
const BATCHES: usize = 4;

/// How long keys are used at most (case 17): one that is found out tells so much. QUIC changes them sooner after many packets,
/// and beats make an idle link look at this too.
const KEYS: Duration = Duration::from_secs(3600);

/// Bytes for one stream that QUIC has not taken.
#[derive(Default)]
struct Outgoing {
    queue: VecDeque<Bytes>,
    has_ended: bool,
}

/// A connection of the carrier.
pub struct Link {
    /// What QUIC knows of it.
    pub quic: Connection,
    /// Its place at the endpoint.
    pub handle: ConnectionHandle,
    /// Its number for the owner.
    pub number: u64,
    /// What is shared with the owner.
    pub lane: Arc<Lane>,
    /// Whether the peer has answered.
    pub is_heard: bool,
    /// Whether the handshake is complete.
    pub is_open: bool,
    /// Whether the owner has cut it or was told of the end.
    pub is_over: bool,
    /// When QUIC wants to be called.
    pub timeout: Option<Instant>,
    arrivals: Arc<Arrivals>,
    outgoing: HashMap<u64, Outgoing>,
    opened: u64,
    /// What the peer sends.
    pub incoming: Incoming,
    pings: VecDeque<(u64, Instant)>,
    keys_since: Instant,
}

impl Link {
    /// One that has just begun.
    #[must_use]
    pub fn new(
        quic: Connection,
        handle: ConnectionHandle,
        number: u64,
        arrivals: Arc<Arrivals>,
        report: u64,
    ) -> Self {
        let lane: Arc<Lane> = Arc::default();
        let incoming = Incoming::new(number, lane.clone(), report);
        Self {
            quic,
            handle,
            number,
            lane,
            is_heard: false,
            is_open: false,
            is_over: false,
            timeout: None,
            arrivals,
            outgoing: HashMap::new(),
            opened: 0,
            incoming,
            pings: VecDeque::new(),
            keys_since: Instant::now(),
        }
    }

    // ---- what the owner asks ---------------------------------------------------------------------------------------

    /// Appends bytes to an own stream.
    pub fn write(&mut self, stream: u64, data: Bytes, end: bool) {
        if self.is_over {
            return;
        }
        let out = self.outgoing.entry(stream).or_default();
        if !data.is_empty() {
            out.queue.push_back(data);
        }
        out.has_ended |= end;
        self.flush(stream);
    }

    /// Tries the connection. `is_urgent`: a packet goes whatever waits for confirmation.
    pub fn ping(&mut self, number: u64, is_urgent: bool, now: Instant) {
        if is_urgent {
            self.arrivals.spare(2 * u64::from(self.quic.current_mtu()));
        }
        self.quic.ping();
        self.pings.push_back((number, now));
    }

    /// Ends it, and tells the peer why.
    pub fn cut(&mut self, code: u32, text: Bytes, now: Instant) {
        if !self.is_over {
            self.is_over = true;
            self.lane.detach();
            self.quic.close(now, VarInt::from_u32(code), text);
        }
    }

    // ---- what QUIC tells -------------------------------------------------------------------------------------------

    /// Does what follows from what has come, and takes batches of the lane; more is to be done if it returns true.
    pub fn serve(&mut self, events: &mut Vec<Event>) -> bool {
        while let Some(event) = self.quic.poll() {
            match event {
                QuicEvent::Connected => {
                    self.is_open = true;
                    events.push(Event::Opened(self.number));
                }
                QuicEvent::ConnectionLost { reason } => self.end(&reason, events),
                QuicEvent::Stream(event) => self.take(event, events),
                QuicEvent::HandshakeDataReady
                | QuicEvent::DatagramReceived
                | QuicEvent::DatagramsUnblocked => {}
            }
        }
        if self.is_over {
            return false;
        }
        while let Some((number, when)) = self.pings.front().copied()
            && self.arrivals.reach(when)
        {
            self.pings.pop_front();
            events.push(Event::Echo(self.number, number));
        }
        if self.is_open {
            if self.keys_since.elapsed() >= KEYS {
                self.keys_since = Instant::now();
                self.quic.force_key_update();
            }
            self.incoming.read(&mut self.quic, events);
            return !self.is_over && self.pump();
        }
        false
    }

    /// Whether there is something to do although nothing has come.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let has_batch = || self.lane.is_ready() && self.has_room();
        self.is_open && !self.is_over && (self.incoming.is_ready() || has_batch())
    }

    fn take(&mut self, event: StreamEvent, events: &mut Vec<Event>) {
        match event {
            StreamEvent::Opened { dir } => {
                while let Some(id) = self.quic.streams().accept(dir) {
                    self.incoming.note(id.index());
                }
            }
            StreamEvent::Readable { id } => {
                self.incoming.note(id.index());
            }
            StreamEvent::Writable { id } => self.flush(id.index()),
            StreamEvent::Available { .. } => {
                let mut waiting: Vec<u64> = self.outgoing.keys().copied().collect();
                waiting.sort_unstable();
                for stream in waiting {
                    self.flush(stream);
                }
            }
            StreamEvent::Finished { .. } => {}
            StreamEvent::Stopped { id, .. } => {
                events.push(Event::GivenUp(self.number, id.index()));
            }
        }
    }

    /// QUIC has ended the connection.
    fn end(&mut self, reason: &ConnectionError, events: &mut Vec<Event>) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        self.lane.detach();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (ending, code, text) = match reason {
            ConnectionError::ApplicationClosed(close) => {
                let code = close.error_code.into_inner();
                (Ending::ByLink, code, text(&close.reason))
            }
            ConnectionError::ConnectionClosed(close) => {
                (Ending::ByPeer, close.error_code.into(), text(&close.reason))
            }
            ConnectionError::TransportError(error) => {
                (Ending::Here, error.code.into(), error.reason.clone())
            }
            other => (Ending::Here, 0, other.to_string()),
        };
        events.push(Event::Ended {
            connection: self.number,
            ending,
            code,
            text,
            moved: self.lane.moved(),
        });
    }

    // ---- writing ---------------------------------------------------------------------------------------------------

    /// Gives QUIC what waits for a stream, as far as it takes it.
    fn flush(&mut self, stream: u64) {
        while self.opened <= stream {
            let Some(id) = self.quic.streams().open(Dir::Uni) else {
                return;
            };
            if id.index() < DATA {
                // Credits and answers overtake what they make room for.
                let _ = self.quic.send_stream(id).set_priority(1);
            }
            self.opened += 1;
        }
        let id = StreamId::new(self.quic.side(), Dir::Uni, stream);
        let Some(out) = self.outgoing.get_mut(&stream) else {
            return;
        };
        let mut sending = self.quic.send_stream(id);
        while let Some(front) = out.queue.front_mut() {
            match sending.write_chunks(std::slice::from_mut(front)) {
                Ok(_) if front.is_empty() => {
                    out.queue.pop_front();
                }
                Ok(_) | Err(WriteError::Blocked) => return,
                Err(WriteError::Stopped(_) | WriteError::ClosedStream) => {
                    // The owner hears of it by its own event.
                    out.queue.clear();
                }
            }
        }
        if out.has_ended {
            let _ = sending.finish();
            self.outgoing.remove(&stream);
        }
    }

    fn has_room(&self) -> bool {
        self.outgoing
            .get(&DATA)
            .is_none_or(|out| out.queue.is_empty())
    }

    /// Takes some batches of the lane; whether there may be more to be taken now.
    fn pump(&mut self) -> bool {
        for _ in 0..BATCHES {
            if !self.lane.is_ready() || !self.has_room() {
                return false;
            }
            let batch = self.lane.take(BATCH_BYTES);
            if batch.is_empty() {
                return false;
            }
            let out = self.outgoing.entry(DATA).or_default();
            out.queue.extend(batch);
            self.flush(DATA);
        }
        self.lane.is_ready() && self.has_room()
    }
}

/// The part that a connection has in its handshake.
#[must_use]
pub fn is_dialed(quic: &Connection) -> bool {
    quic.side() == Side::Client
}
