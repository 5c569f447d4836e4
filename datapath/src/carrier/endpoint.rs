//! All connections of a node: QUIC without IO, with settings of links.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quinn_proto::{
    ClientConfig, ConnectionHandle, DatagramEvent, Endpoint as Quic, EndpointConfig, Incoming,
    MtuDiscoveryConfig, ServerConfig, Transmit, TransportConfig, VarInt,
};

use super::congestion::{Arrivals, Factory};
use super::connection::Link;
use super::event::{Ending, Event};
use super::lane::{Lane, Moved};
use super::socket::{Piece, path_bytes};
use super::tls::{Caller, Trust};

/// Flow control of QUIC: above what credits allow for, so that it never is what holds up (link/transport.py).
const CONNECTION_BYTES: u32 = 16 << 20;
const STREAM_BYTES: u32 = 8 << 20;
/// What is sent and not yet confirmed, and what waits to be sent.
const SEND_BYTES: u64 = 4 << 20;
/// Streams that a peer may have open: all channels, and bodies (link/settings.py).
const STREAMS: u32 = 128;
/// What comes of a handshake in no order: all certificates that may be presented (link/handshake.py).
const HANDSHAKE_BYTES: usize = 2 * 16 * 1024;
/// Handshakes of clients that may be under way. Beyond the first number an address must be proved first (Retry), beyond the
/// second nobody is heard. The third is the share of one host, so that none keeps all others out.
const PENDING_PROVEN: usize = 32;
const PENDING: usize = 256;
const PENDING_OF_HOST: usize = 64;

/// What the owner of the carrier chooses.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// A connection ends when nothing comes for so long.
    pub idle: Duration,
    /// The owner is told of what a lane has received after so much, in cost: a part of the window.
    pub report: u64,
}

/// What the owner shares of each connection that there is, by its number.
pub type Lanes = Mutex<HashMap<u64, Arc<Lane>>>;

/// The connections.
pub struct Endpoint {
    quic: Quic,
    trust: Trust,
    settings: Settings,
    numbers: Arc<AtomicU64>,
    lanes: Arc<Lanes>,
    /// Each connection by its place.
    pub links: HashMap<ConnectionHandle, Link>,
    /// The place of each by its number.
    pub places: HashMap<u64, ConnectionHandle>,
    /// Connections in the order in which their timers are due.
    timers: BTreeSet<(Instant, usize)>,
    /// Connections with something to be done.
    pub touched: BTreeSet<usize>,
    base: Instant,
}

fn server(trust: &Trust, caller: Caller, transport: Arc<TransportConfig>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::with_crypto(trust.server(caller));
    config.transport_config(transport);
    Arc::new(config)
}

/// Nobody: what an endpoint has for datagrams of which it knows nothing yet.
fn nobody() -> Caller {
    Caller {
        connection: 0,
        address: ([0, 0, 0, 0], 0).into(),
        is_dialed: false,
    }
}

impl Endpoint {
    /// One without connections. `numbers` gives each connection its number.
    #[must_use]
    pub fn new(
        trust: Trust,
        settings: Settings,
        may_fragment: bool,
        numbers: Arc<AtomicU64>,
        lanes: Arc<Lanes>,
    ) -> Self {
        let mut config = EndpointConfig::default();
        config.supported_versions(vec![1]);
        // Peers may send what fits through the way, which is more than the default where that is wide.
        let _ = config.max_udp_payload_size(65_527);
        let first = server(&trust, nobody(), Arc::default());
        Self {
            quic: Quic::new(Arc::new(config), Some(first), !may_fragment, None),
            trust,
            settings,
            numbers,
            lanes,
            links: HashMap::new(),
            places: HashMap::new(),
            timers: BTreeSet::new(),
            touched: BTreeSet::new(),
            base: Instant::now(),
        }
    }

    /// Presents other certificates from the next connection on.
    ///
    /// # Errors
    /// The key is none that can sign.
    pub fn renew(&mut self, chain: Vec<Vec<u8>>, key: Vec<u8>) -> Result<(), String> {
        self.trust = self.trust.renew(chain, key)?;
        let first = server(&self.trust, nobody(), Arc::default());
        self.quic.set_server_config(Some(first));
        Ok(())
    }

    fn transport(&self, peer: SocketAddr, arrivals: &Arc<Arrivals>) -> Arc<TransportConfig> {
        let bytes = path_bytes(peer);
        let mut ways = MtuDiscoveryConfig::default();
        ways.upper_bound(bytes);
        let mut config = TransportConfig::default();
        config
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .max_concurrent_uni_streams(VarInt::from_u32(STREAMS))
            .max_idle_timeout(self.settings.idle.try_into().ok())
            .stream_receive_window(VarInt::from_u32(STREAM_BYTES))
            .receive_window(VarInt::from_u32(CONNECTION_BYTES))
            .send_window(SEND_BYTES)
            .initial_mtu(bytes)
            .mtu_discovery_config(Some(ways))
            .crypto_buffer_size(HANDSHAKE_BYTES)
            .datagram_receive_buffer_size(None)
            .allow_spin(false)
            .congestion_controller_factory(Arc::new(Factory(arrivals.clone())));
        Arc::new(config)
    }

    // ---- connections come and go -----------------------------------------------------------------------------------

    /// Calls whoever is there.
    pub fn dial(&mut self, number: u64, peer: SocketAddr, now: Instant, events: &mut Vec<Event>) {
        let caller = Caller {
            connection: number,
            address: peer,
            is_dialed: true,
        };
        let arrivals = Arc::new(Arrivals::new(self.base));
        let mut config = ClientConfig::new(self.trust.client(caller));
        config.version(1);
        config.transport_config(self.transport(peer, &arrivals));
        // Names are in certificates, and judged by others; this one is not even sent.
        match self.quic.connect(now, config, peer, "afbus") {
            Ok((handle, quic)) => self.keep(Link::new(
                quic,
                handle,
                number,
                arrivals,
                self.settings.report,
            )),
            Err(error) => events.push(Event::Ended {
                connection: number,
                ending: Ending::Here,
                code: 0,
                text: error.to_string(),
                moved: Moved::default(),
            }),
        }
    }

    fn keep(&mut self, link: Link) {
        self.touched.insert(link.handle.0);
        super::lock(&self.lanes).insert(link.number, link.lane.clone());
        self.places.insert(link.number, link.handle);
        self.links.insert(link.handle, link);
    }

    /// Handshakes of clients that are under way: all, and those of one host.
    fn pending(&self, host: IpAddr) -> (usize, usize) {
        let all = self.links.values().filter(|l| {
            !l.is_over && l.quic.is_handshaking() && !super::connection::is_dialed(&l.quic)
        });
        all.fold((0, 0), |(all, here), l| {
            let is_here = l.quic.remote_address().ip() == host;
            (all + 1, here + usize::from(is_here))
        })
    }

    fn accept(
        &mut self,
        incoming: Incoming,
        now: Instant,
        out: &mut Vec<u8>,
        events: &mut Vec<Event>,
    ) -> Option<Transmit> {
        let peer = incoming.remote_address();
        let (pending, here) = self.pending(peer.ip());
        if pending >= PENDING || here >= PENDING_OF_HOST {
            self.quic.ignore(incoming);
            return None;
        }
        if pending >= PENDING_PROVEN && incoming.may_retry() {
            return self.quic.retry(incoming, out).ok();
        }
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let caller = Caller {
            connection: number,
            address: peer,
            is_dialed: false,
        };
        let arrivals = Arc::new(Arrivals::new(self.base));
        let config = server(&self.trust, caller, self.transport(peer, &arrivals));
        match self.quic.accept(incoming, now, out, Some(config)) {
            Ok((handle, quic)) => {
                events.push(Event::Called(number, peer));
                self.keep(Link::new(
                    quic,
                    handle,
                    number,
                    arrivals,
                    self.settings.report,
                ));
                None
            }
            Err(error) => error.response,
        }
    }

    // ---- what arrives ----------------------------------------------------------------------------------------------

    /// Takes datagrams; `answer` sends what answers those that belong to no connection.
    pub fn receive(
        &mut self,
        piece: Piece,
        now: Instant,
        events: &mut Vec<Event>,
        mut answer: impl FnMut(&Transmit, &[u8]),
    ) {
        let mut rest = piece.bytes;
        while !rest.is_empty() {
            let datagram = rest.split_to(piece.stride.min(rest.len()));
            let mut out = Vec::new();
            let event = self
                .quic
                .handle(now, piece.from, piece.to, piece.ecn, datagram, &mut out);
            let transmit = match event {
                Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                    if let Some(link) = self.links.get_mut(&handle) {
                        if !std::mem::replace(&mut link.is_heard, true)
                            && super::connection::is_dialed(&link.quic)
                        {
                            events.push(Event::Heard(link.number));
                        }
                        link.quic.handle_event(event);
                        self.touched.insert(handle.0);
                    }
                    None
                }
                Some(DatagramEvent::NewConnection(incoming)) => {
                    self.accept(incoming, now, &mut out, events)
                }
                Some(DatagramEvent::Response(transmit)) => Some(transmit),
                None => None,
            };
            if let Some(transmit) = transmit {
                answer(&transmit, &out[..transmit.size]);
            }
        }
    }

    /// Passes on what connections and the endpoint want of each other; forgets a connection that is no more.
    pub fn settle(&mut self, handle: ConnectionHandle) {
        let Some(link) = self.links.get_mut(&handle) else {
            return;
        };
        let mut is_drained = false;
        while let Some(event) = link.quic.poll_endpoint_events() {
            is_drained |= event.is_drained();
            if let Some(event) = self.quic.handle_event(handle, event) {
                link.quic.handle_event(event);
            }
        }
        if is_drained {
            if let Some(when) = link.timeout.take() {
                self.timers.remove(&(when, handle.0));
            }
            link.lane.detach();
            super::lock(&self.lanes).remove(&link.number);
            self.places.remove(&link.number);
            self.links.remove(&handle);
        }
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    /// Learns when a connection wants to be called next.
    pub fn arm(&mut self, handle: ConnectionHandle) {
        let Some(link) = self.links.get_mut(&handle) else {
            return;
        };
        let timeout = link.quic.poll_timeout();
        if timeout == link.timeout {
            return;
        }
        if let Some(old) = link.timeout {
            self.timers.remove(&(old, handle.0));
        }
        if let Some(new) = timeout {
            self.timers.insert((new, handle.0));
        }
        link.timeout = timeout;
    }

    /// When the next timer is due.
    #[must_use]
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(when, _)| *when)
    }

    /// Calls connections whose timers are due.
    pub fn handle_timers(&mut self, now: Instant) {
        while let Some((when, place)) = self.timers.first().copied()
            && when <= now
        {
            self.timers.remove(&(when, place));
            if let Some(link) = self.links.get_mut(&ConnectionHandle(place)) {
                link.timeout = None;
                link.quic.handle_timeout(now);
                self.touched.insert(place);
            }
        }
    }
}
