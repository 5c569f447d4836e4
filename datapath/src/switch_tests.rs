//! Tests of the switch without threads: clients that write and read rings, and a switch that is driven round by round.

use super::*;
use crate::bus::Overflow;
use crate::frame::{GAP, TERMS};
use crate::memory::{BODY_SEALS, memfd, seal};
use crate::ring::{Consumer, Producer};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

pub(super) const BUS: u32 = 1;
pub(super) const SMALL: usize = 4096;

/// One client.
pub(super) struct Peer {
    pub(super) who: Ref,
    pub(super) tx: Producer<Arc<Segment>>,
    pub(super) rx: Consumer<Arc<Segment>>,
    pub(super) line: OwnedFd,
}

/// A record to be sent.
#[derive(Debug, Clone, Default)]
pub(super) struct Tx {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) fds: u8,
    pub(super) deadline_ms: u32,
    pub(super) serial: u64,
    pub(super) reply_to: u64,
    pub(super) src: Vec<u8>,
    pub(super) dst: Vec<u8>,
    pub(super) body: Vec<u8>,
    /// Length of a body in a memfd.
    pub(super) outside: u32,
}

pub(super) fn to(dst: &str, body: &[u8]) -> Tx {
    Tx {
        kind: UNICAST,
        dst: dst.into(),
        body: body.into(),
        ..Tx::default()
    }
}

pub(super) fn cast(topic: &str, body: &[u8]) -> Tx {
    Tx {
        kind: TERMS,
        ..to(topic, body)
    }
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Got {
    pub(super) h: RxHeader,
    pub(super) src: Vec<u8>,
    pub(super) dst: Vec<u8>,
    pub(super) ident: Vec<u8>,
    pub(super) body: Vec<u8>,
}

impl Got {
    /// First, last, count and reason of a gap.
    pub(super) fn gap(&self) -> (u64, u64, u64, u32) {
        assert_eq!(self.h.kind, GAP);
        let at = |n: usize| u64::from_le_bytes(self.body[n..n + 8].try_into().unwrap());
        let reason = u32::from_le_bytes(self.body[24..28].try_into().unwrap());
        (at(0), at(8), at(16), reason)
    }
}

/// `[principal, node, pid, uid, gid]` in msgpack.
pub(super) fn ident_of(id: u64, node: &str) -> Vec<u8> {
    let mut ident = vec![0x95];
    for text in [&format!("uid:{id}"), node] {
        ident.push(0xa0 | text.len() as u8);
        ident.extend_from_slice(text.as_bytes());
    }
    ident.extend_from_slice(&[id as u8, 0xcd, 3, 0xe8, 7]);
    ident
}

pub(super) struct Bench {
    pub(super) switch: Switch,
    pub(super) now: Instant,
    pub(super) peers: BTreeMap<u64, Peer>,
    /// Name of the node in identities as agents make them; empty for plain ones.
    pub(super) node: &'static str,
}

impl Bench {
    pub(super) fn new(quota: Quota) -> Self {
        let mut switch = Switch::new(quota);
        switch.add_bus(BUS, 512, [7; 16]);
        Self {
            switch,
            now: Instant::now(),
            peers: BTreeMap::new(),
            node: "",
        }
    }

    /// A bus with its master (endpoint 1, `master`) and endpoints 2 to `n`, each with the address `1.N`.
    pub(super) fn with(n: u64) -> Self {
        let mut bench = Self::new(Quota::default());
        bench.open(1, 1 << 16);
        let master = bench.switch.find(1);
        bench.switch.bus_mut(BUS).unwrap().master = master;
        assert!(bench.switch.own(1, b"master"));
        for id in 2..=n {
            bench.open(id, SMALL);
            bench.join(id);
        }
        bench
    }

    pub(super) fn add(&mut self, id: u64) -> Ref {
        let credentials = Credentials {
            pid: id as u32,
            uid: 1000 + id as u32,
            gid: 7,
        };
        let ident = if self.node.is_empty() {
            format!("ident {id}").into_bytes()
        } else {
            ident_of(id, self.node)
        };
        let who = self
            .switch
            .add_endpoint(id, id as u32, credentials, ident.into());
        assert!(self.switch.attach(id, BUS));
        self.switch
            .endpoint_mut(id)
            .unwrap()
            .send_grants
            .push(SendGrant {
                id: 0,
                bits: Bits::zero(512).unwrap(),
                terms: None,
            });
        who
    }

    pub(super) fn connect(&mut self, id: u64, rx_bytes: usize) {
        let who = self.switch.find(id).unwrap();
        let (tx, _) = Segment::create(1 << 17).unwrap();
        let (rx, _) = Segment::create(rx_bytes).unwrap();
        let (ours, line) = line::pair().unwrap();
        let io = Io {
            tx: Consumer::new(tx.clone()),
            rx: Producer::new(rx.clone()),
            line: ours,
            fds: VecDeque::new(),
            dirty: false,
            lane_calls: Vec::new(),
        };
        self.switch.connect(who, io);
        let peer = Peer {
            who,
            tx: Producer::new(tx),
            rx: Consumer::new(rx),
            line,
        };
        self.peers.insert(id, peer);
    }

    pub(super) fn open(&mut self, id: u64, rx_bytes: usize) {
        self.add(id);
        self.connect(id, rx_bytes);
    }

    pub(super) fn join(&mut self, id: u64) {
        assert!(self.switch.own(id, format!("1.{id}").as_bytes()));
    }

    pub(super) fn subscribe(&mut self, id: u64, number: u64, topic: &str, overflow: Overflow) {
        let bus = self.switch.bus_mut(BUS).unwrap();
        let (bits, terms) = bus.required(topic.as_bytes()).unwrap();
        assert!(
            self.switch
                .subscribe(id, number, bits, Some(terms), overflow)
        );
    }

    /// Writes a record and shows it to the switch, which does not look yet. Returns where its verdict will be.
    pub(super) fn publish(&mut self, id: u64, tx: &Tx) -> u64 {
        let peer = self.peers.get_mut(&id).unwrap();
        let inside = tx.flags & BODY_IN_MEMFD == 0;
        let body_len = if inside {
            tx.body.len() as u32
        } else {
            tx.outside
        };
        let mut header = TxHeader {
            kind: tx.kind,
            flags: tx.flags,
            fds: tx.fds,
            deadline_ms: tx.deadline_ms,
            serial: tx.serial,
            reply_to: tx.reply_to,
            src_len: tx.src.len() as u16,
            dst_len: tx.dst.len() as u16,
            body_len,
            ..TxHeader::default()
        }
        .sized();
        if !inside {
            header.len -= body_len;
        }
        let pos = peer
            .tx
            .reserve(header.len.into())
            .unwrap()
            .expect("room for a record");
        let memory = peer.tx.memory();
        memory.copy_in(pos, &header.encode());
        memory.copy_in(pos + TX_HEADER, &tx.src);
        memory.copy_in(pos + header.dst_at(), &tx.dst);
        memory.copy_in(pos + header.body_at(), &tx.body);
        peer.tx.publish();
        if peer.tx.must_wake() {
            line::send(peer.line.as_fd(), &[line::KICK], &[]).unwrap();
            self.switch.kicked(peer.who);
        }
        pos
    }

    pub(super) fn verdict(&self, id: u64, pos: u64) -> i32 {
        let memory = self.peers[&id].tx.memory();
        memory.word_at(pos + TX_STATUS).load(Ordering::Relaxed) as i32
    }

    pub(super) fn round(&mut self) {
        self.switch.round(self.now);
    }

    pub(super) fn send(&mut self, id: u64, tx: &Tx) -> i32 {
        let pos = self.publish(id, tx);
        self.round();
        let verdict = self.verdict(id, pos);
        assert_ne!(verdict, 0, "a verdict on every record");
        verdict
    }

    /// Sends until the verdict is not `OK`; returns that, and how many were taken.
    pub(super) fn fill(&mut self, id: u64, tx: &Tx) -> (i32, u64) {
        for n in 0..10_000 {
            let verdict = self.send(id, tx);
            if verdict != OK {
                return (verdict, n);
            }
        }
        panic!("never full");
    }

    pub(super) fn read_up_to(&mut self, id: u64, most: usize) -> Vec<Got> {
        let Some(peer) = self.peers.get_mut(&id) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        while all.len() < most
            && let Some((pos, len)) = peer.rx.peek(RX_HEADER as u32).unwrap()
        {
            let mut raw = [0; RX_HEADER as usize];
            let memory = peer.rx.memory();
            memory.copy_out(pos, &mut raw);
            let h = RxHeader::decode(&raw, len).unwrap();
            let take = |at: u64, len: usize| {
                let mut bytes = vec![0; len];
                memory.copy_out(pos + at, &mut bytes);
                bytes
            };
            let inside = h.flags & BODY_IN_MEMFD == 0;
            all.push(Got {
                src: take(RX_HEADER, h.src_len.into()),
                dst: take(h.dst_at(), h.dst_len.into()),
                ident: take(h.ident_at(), h.ident_len.into()),
                body: take(h.body_at(), if inside { h.body_len as usize } else { 0 }),
                h,
            });
            peer.rx.advance(len);
        }
        if !all.is_empty() {
            let end = peer.rx.position();
            peer.rx.release(end);
            if peer.rx.must_wake() {
                let who = peer.who;
                self.switch.kicked(who);
            }
        }
        all
    }

    /// Reads until nothing more comes.
    pub(super) fn read(&mut self, id: u64) -> Vec<Got> {
        let mut all = Vec::new();
        loop {
            let some = self.read_up_to(id, usize::MAX);
            if some.is_empty() {
                return all;
            }
            all.extend(some);
        }
    }

    pub(super) fn room(&self, id: u64) -> u32 {
        self.peers[&id].tx.memory().room().load(Ordering::Relaxed)
    }

    pub(super) fn writable(&self, id: u64) -> bool {
        let mut entry = libc::pollfd {
            fd: self.peers[&id].line.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one entry that lives for the call.
        unsafe { libc::poll(&raw mut entry, 1, 0) };
        entry.revents & libc::POLLOUT != 0
    }

    pub(super) fn packet(&mut self, id: u64, bytes: &[u8], fds: &[RawFd]) {
        let peer = &self.peers[&id];
        line::send(peer.line.as_fd(), bytes, fds).unwrap();
        let who = peer.who;
        self.switch.kicked(who);
    }

    /// What comes on the line of an endpoint.
    pub(super) fn packets(&self, id: u64) -> Vec<line::Packet> {
        std::iter::from_fn(|| line::receive(self.peers[&id].line.as_fd())).collect()
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.switch.handle_timer(self.now);
    }

    pub(super) fn account(&mut self, id: u64) -> Account {
        for id in self.peers.keys().copied().collect::<Vec<_>>() {
            if let Some(who) = self.switch.find(id) {
                self.switch.reclaim(who);
            }
        }
        self.switch.account(id as u32)
    }
}

pub(super) fn bodies(got: &[Got]) -> Vec<&[u8]> {
    got.iter().map(|g| &g.body[..]).collect()
}

// ---- verdicts --------------------------------------------------------------------------------------------------------

#[test]
fn d7_who_has_not_joined_reaches_only_the_master() {
    let mut b = Bench::with(2);
    b.open(3, SMALL);
    assert_eq!(b.send(3, &to("1.2", b"x")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(3, &to("nobody", b"x")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(3, &cast("a", b"x")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(3, &to("master", b"x")), OK);
    let got = b.read(1);
    assert_eq!((&got[0].src[..], got.len()), (&b"@3"[..], 1));
    // Only the master can answer there, and nobody without a bus can send at all.
    assert_eq!(b.send(2, &to("@3", b"y")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(1, &to("@3", b"y")), OK);
    assert_eq!(b.send(1, &to("@4", b"y")), -libc::EHOSTUNREACH);
    assert_eq!(bodies(&b.read(3)), [b"y"]);
    b.switch.endpoint_mut(2).unwrap().bus = None;
    assert_eq!(b.send(2, &to("1.2", b"x")), -libc::EHOSTUNREACH);
}

#[test]
fn d7_unknown_names_go_to_the_master_and_dead_numbers_nowhere() {
    let mut b = Bench::with(3);
    assert_eq!(b.send(2, &to("org.name", b"x")), OK);
    let got = b.read(1);
    assert_eq!(
        (&got[0].src[..], &got[0].dst[..]),
        (&b"1.2"[..], &b"org.name"[..])
    );
    assert_eq!(b.send(2, &to("1.9", b"x")), -libc::EHOSTUNREACH);
    b.switch.remove_endpoint(3, b.now);
    assert_eq!(b.send(2, &to("1.3", b"x")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(1, &to("org.name", b"x")), -libc::EHOSTUNREACH);
    b.switch.remove_endpoint(1, b.now);
    assert_eq!(b.send(2, &to("org.name", b"x")), -libc::EHOSTDOWN);
    // Who asks to be let in is told the same, and no more than before of others (D16).
    b.open(4, SMALL);
    assert_eq!(b.send(4, &to("master", b"x")), -libc::EHOSTDOWN);
    assert_eq!(b.send(4, &to("1.2", b"x")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(4, &to("1.3", b"x")), -libc::EHOSTUNREACH);
}

#[test]
fn d6_the_source_is_stamped() {
    let mut b = Bench::with(3);
    assert!(b.switch.own(2, b"org.two"));
    assert!(!b.switch.own(3, b"org.two"));
    let named = |src: &str| Tx {
        src: src.into(),
        ..to("1.3", b"x")
    };
    assert_eq!(b.send(2, &named("")), OK);
    assert_eq!(b.send(2, &named("org.two")), OK);
    for other in ["1.3", "org.other", "@2", "\0"] {
        assert_eq!(b.send(2, &named(other)), -libc::EADDRNOTAVAIL, "{other}");
    }
    assert!(b.switch.disown(2, b"org.two") && !b.switch.disown(2, b"org.two"));
    assert_eq!(b.send(2, &named("org.two")), -libc::EADDRNOTAVAIL);
    assert_eq!(b.send(2, &to("", b"x")), -libc::EDESTADDRREQ);
    b.switch.endpoint_mut(3).unwrap().wants_ident = true;
    assert_eq!(b.send(2, &named("")), OK);
    let got = b.read(3);
    let stamps: Vec<_> = got
        .iter()
        .map(|g| (&g.src[..], g.h.pid, g.h.uid, g.h.gid, g.h.seq))
        .collect();
    let want = [(&b"1.2"[..], 1), (b"org.two", 2), (b"1.2", 3)];
    assert_eq!(stamps, want.map(|(src, seq)| (src, 2, 1002, 7, seq)));
    assert_eq!(
        (&got[0].ident[..], &got[2].ident[..]),
        (&b""[..], &b"ident 2"[..])
    );
}

#[test]
fn d7_what_is_too_long_or_wrong_is_refused() {
    let mut b = Bench::with(3);
    assert_eq!(b.send(2, &to("1.3", &[0; SMALL])), -libc::EMSGSIZE);
    assert_eq!(b.send(2, &to(&"n".repeat(257), b"")), -libc::ENAMETOOLONG);
    assert_eq!(b.send(2, &cast("a..b", b"")), -libc::EINVAL);
    let raw = |bytes: usize| Tx {
        kind: RAW,
        dst: vec![1; bytes],
        ..Tx::default()
    };
    assert_eq!(b.send(2, &raw(64)), OK);
    for bytes in [0, 63, 128, 256] {
        assert_eq!(b.send(2, &raw(bytes)), -libc::EDOM);
    }
    b.switch.endpoint_mut(2).unwrap().silent = true;
    assert_eq!(b.send(2, &to("1.3", b"")), -libc::EPIPE);
    assert!(b.read(3).is_empty());
}

#[test]
fn d9_multicasts_need_a_grant() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    let (bits, terms) = b.switch.bus_mut(BUS).unwrap().required(b"a.b").unwrap();
    let grant = |bits, terms| SendGrant { id: 1, bits, terms };
    b.switch.endpoint_mut(2).unwrap().send_grants = vec![grant(bits.clone(), Some(terms))];
    assert_eq!(b.send(2, &cast("a", b"")), -libc::EPERM);
    assert_eq!(b.send(2, &cast("a.b.c", b"")), OK);
    // Raw bits are judged by the bits alone. With too many of them they are for those who may send anything.
    let raw = |dst: Vec<u8>| Tx {
        kind: RAW,
        dst,
        ..Tx::default()
    };
    // They carry no prefixes of a topic, so nobody here hears them.
    assert_eq!(b.send(2, &raw(bits.to_bytes())), OK);
    assert_eq!(b.send(2, &raw(vec![0xff; 64])), -libc::EPERM);
    b.switch.endpoint_mut(2).unwrap().send_grants = Vec::new();
    assert_eq!(b.send(2, &cast("a.b", b"")), -libc::EPERM);
    assert_eq!(b.send(1, &raw(vec![0xff; 64])), OK);
    assert_eq!(b.read(3).len(), 2);
}

#[test]
fn d7_a_chain_breaks_at_the_first_refusal() {
    let mut b = Bench::with(3);
    let chained = |tx: Tx| Tx { flags: CHAIN, ..tx };
    let all = [
        chained(to("1.3", b"0")),
        to("1.9", b"1"),
        chained(to("1.3", b"2")),
        chained(to("1.3", b"3")),
        to("1.3", b"4"),
        chained(to("1.3", b"5")),
    ];
    let places: Vec<u64> = all.iter().map(|tx| b.publish(2, tx)).collect();
    b.round();
    let verdicts: Vec<i32> = places.iter().map(|pos| b.verdict(2, *pos)).collect();
    let (no, off) = (-libc::EHOSTUNREACH, -libc::ECANCELED);
    assert_eq!(verdicts, [OK, no, off, off, OK, OK]);
    assert_eq!(bodies(&b.read(3)), [b"0", b"4", b"5"]);
}

// ---- room ------------------------------------------------------------------------------------------------------------

#[test]
fn d12_a_full_receiver_is_eagain_and_room_is_told() {
    let mut b = Bench::with(4);
    let message = to("1.3", &[1; 200]);
    let (verdict, taken) = b.fill(2, &message);
    assert_eq!(verdict, -libc::EAGAIN);
    let seq = b.switch.endpoint(2).unwrap().seq;
    assert_eq!(seq, taken, "a refused message has no number");
    // Half of the ring is left for others (D18).
    assert_eq!(b.send(4, &message), OK);
    let (verdict, _) = b.fill(4, &message);
    assert_eq!(verdict, -libc::EAGAIN);
    let rooms = (b.room(2), b.room(4));
    assert_eq!(b.read_up_to(3, 1).len(), 1);
    assert_eq!(
        (b.room(2), b.room(4)),
        rooms,
        "one message is too little to wake everybody"
    );
    let rest = b.read(3);
    assert_eq!(
        rest.len() as u64 + 1,
        seq + b.switch.endpoint(4).unwrap().seq
    );
    assert_eq!((b.room(2), b.room(4)), (rooms.0 + 1, rooms.1 + 1));
    assert_eq!(b.send(2, &message), OK);
}

#[test]
fn case2_who_waits_for_an_endpoint_that_goes_is_told() {
    let mut b = Bench::with(3);
    assert_eq!(b.fill(2, &to("1.3", &[1; 200])).0, -libc::EAGAIN);
    let room = b.room(2);
    b.switch.remove_endpoint(3, b.now);
    assert_eq!(b.room(2), room + 1);
    assert_eq!(b.send(2, &to("1.3", b"")), -libc::EHOSTUNREACH);
    assert_eq!(b.account(2), Account::default());
    assert!(!b.switch.endpoint(2).unwrap().waiting);
}

#[test]
fn d12_who_waits_for_a_name_that_moves_is_told() {
    let mut b = Bench::with(4);
    b.switch.own(3, b"name");
    assert_eq!(b.fill(2, &to("name", &[1; 200])).0, -libc::EAGAIN);
    let room = b.room(2);
    b.switch.disown(3, b"name");
    b.switch.own(4, b"name");
    assert_eq!(b.room(2), room + 1);
    assert_eq!(b.send(2, &to("name", b"")), OK);
}

#[test]
fn d12_who_waits_for_the_master_is_told_when_the_name_gets_an_owner() {
    let mut b = Bench::with(3);
    let message = to("name", &[1; 2000]);
    assert_eq!(b.fill(2, &message).0, -libc::EAGAIN);
    let room = b.room(2);
    b.switch.own(3, b"name");
    assert_eq!(b.room(2), room + 1);
    assert_eq!(b.send(2, &message), OK);
    assert_eq!(b.read(3).len(), 1);
}

#[test]
fn d12_who_waits_for_a_master_that_is_replaced_is_told() {
    let mut b = Bench::with(3);
    assert_eq!(b.fill(2, &to("name", &[1; 2000])).0, -libc::EAGAIN);
    let room = b.room(2);
    let heir = b.switch.find(3);
    assert!(b.switch.set_master(BUS, heir) && !b.switch.set_master(BUS + 1, heir));
    assert_eq!(b.room(2), room + 1);
    assert_eq!(b.send(2, &to("name", b"")), OK);
    assert_eq!(b.read(3).len(), 1);
}

#[test]
fn d12_who_waits_for_what_does_not_hold_any_more_is_told() {
    let changes: [fn(&mut Bench); 4] = [
        |b| assert!(b.switch.unsubscribe(3, 1)),
        |b| {
            assert!(b.switch.unsubscribe(3, 1));
            b.subscribe(3, 2, "a", Overflow::Gap);
        },
        |b| {
            // mov r0, 0; exit
            let nothing = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
            assert!(b.switch.set_filter(3, Some(Filter::new(&nothing).unwrap())));
        },
        |b| assert!(b.switch.forbid_send(2, 0)),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut b = Bench::with(3);
        b.subscribe(3, 1, "a", Overflow::Block(60_000));
        let message = cast("a", &[1; 200]);
        assert_eq!(b.fill(2, &message).0, -libc::EAGAIN);
        let room = b.room(2);
        change(&mut b);
        assert_eq!(b.room(2), room + 1, "change {at}");
        let verdict = if at == 3 { -libc::EPERM } else { OK };
        assert_eq!(b.send(2, &message), verdict, "change {at}");
    }
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    assert!(!b.switch.unsubscribe(2, 1), "it is another's");
    assert!(!b.switch.unsubscribe(3, 2) && !b.switch.forbid_send(2, 9));
    assert!(!b.switch.unsubscribe(9, 1) && !b.switch.forbid_send(9, 0));
    assert!(!b.switch.set_filter(9, None));
}

#[test]
fn d16_an_endpoint_that_is_away_counts_as_full() {
    let mut b = Bench::with(2);
    b.add(3);
    b.join(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    assert_eq!(b.send(2, &to("1.3", b"x")), -libc::EAGAIN);
    assert_eq!(b.send(2, &cast("a", b"x")), OK);
    b.switch.notify(&[3], b"note");
    let room = b.room(2);
    b.connect(3, SMALL);
    assert_eq!(b.room(2), room + 1);
    let got = b.read(3);
    assert_eq!(
        (got[0].gap(), &got[1].body[..], got.len()),
        ((1, 1, 1, 1), &b"note"[..], 2)
    );
}

#[test]
fn d18_quotas_are_enforced_and_given_back() {
    let quota = Quota {
        bytes: 3000,
        messages: 8,
        fds: 2,
    };
    let mut b = Bench::new(quota);
    for id in 2..=4 {
        b.open(id, 1 << 16);
        b.join(id);
        b.subscribe(id, id, "a", Overflow::Gap);
    }
    assert_eq!(b.fill(2, &to("1.3", b"")), (-libc::EDQUOT, 8));
    assert_eq!(b.send(2, &cast("a", b"")), -libc::EDQUOT);
    b.read(3);
    b.pass(2);
    assert_eq!(b.fill(2, &to("1.3", &[0; 1000])), (-libc::EDQUOT, 2));
    b.read(3);
    b.pass(2);
    // A multicast costs as often as it is delivered: three copies of 1000 bytes are too much.
    assert_eq!(b.send(2, &cast("a", &[0; 1000])), -libc::EDQUOT);
    assert_eq!(b.send(2, &cast("a", &[0; 100])), OK);
    assert_eq!(b.switch.account(2).messages, 3);
    assert_eq!(
        b.send(3, &to("1.4", &[0; 100])),
        OK,
        "everybody has an account of its own"
    );
    let (x, _y) = line::pair().unwrap();
    let with_fd = Tx {
        fds: 1,
        ..to("1.3", b"")
    };
    for want in [OK, OK, -libc::EDQUOT] {
        b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
        assert_eq!(b.send(2, &with_fd), want);
    }
    for id in 2..=4 {
        b.read(id);
    }
    assert_eq!(
        (b.account(2), b.account(3)),
        (Account::default(), Account::default())
    );
}

#[test]
fn case7_a_stuck_subscriber_costs_one_gap_a_sender() {
    let mut b = Bench::with(5);
    for id in 3..=5 {
        b.subscribe(id, id, "a", Overflow::Gap);
    }
    for n in 0..2000u32 {
        assert_eq!(b.send(2, &cast("a", &n.to_le_bytes())), OK);
        assert_eq!(b.send(4, &cast("a.b", &n.to_le_bytes())), OK);
        assert_eq!(b.read(4).len(), 2);
        assert_eq!(b.read(5).len(), 2);
    }
    let stuck = b.switch.endpoint(3).unwrap();
    assert_eq!(stuck.backlog(), 2);
    let got = b.read(3);
    let gaps: Vec<_> = got.iter().filter(|g| g.h.kind == GAP).collect();
    let heard = got.len() as u64 - 2;
    assert_eq!(
        (gaps.len(), gaps[0].gap().2 + gaps[1].gap().2 + heard),
        (2, 4000)
    );
    assert!(gaps.iter().all(|g| g.gap().1 == 2000));
}

#[test]
fn d12_a_subscriber_may_make_senders_wait_for_a_while() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "a", Overflow::Block(50));
    b.subscribe(4, 2, "a", Overflow::Gap);
    let message = cast("a", &[1; 200]);
    let (verdict, taken) = b.fill(2, &message);
    assert_eq!(verdict, -libc::EAGAIN);
    assert_eq!(b.read(4).len() as u64, taken, "all or none");
    assert_eq!(
        b.switch.next_timer(),
        Some(b.now + Duration::from_millis(50))
    );
    let room = b.room(2);
    b.pass(49);
    assert_eq!((b.send(2, &message), b.room(2)), (-libc::EAGAIN, room));
    b.pass(1);
    assert_eq!((b.room(2), b.switch.next_timer()), (room + 1, None));
    // From now on nobody waits for it, until it has read. Who still has room there gets it (D18).
    assert_eq!(b.send(2, &message), OK);
    assert_eq!(b.send(2, &message), OK);
    assert_eq!(b.send(1, &message), OK);
    assert_eq!(b.send(2, &message), OK);
    assert_eq!(b.read(4).len(), 4);
    let got = b.read(3);
    let rest = &got[taken as usize..];
    assert_eq!(rest[0].gap(), (taken + 1, taken + 2, 2, 2));
    assert_eq!((rest[1].h.pid, rest[1].h.seq), (1, 1));
    assert_eq!(
        (rest[2].gap(), rest.len()),
        ((taken + 3, taken + 3, 1, 2), 3)
    );
    let (verdict, again) = b.fill(2, &message);
    assert_eq!((verdict, again), (-libc::EAGAIN, taken));
    b.read(4);
    // Room ends the wait as well.
    let room = b.room(2);
    b.read(3);
    assert_eq!(b.room(2), room + 1);
    assert_eq!(b.send(2, &message), OK);
    b.read(3);
    b.pass(50);
    assert_eq!(
        (b.switch.next_timer(), b.room(2)),
        (None, room + 1),
        "a timer of no use tells nobody"
    );
}

#[test]
fn d12_two_stuck_subscribers_are_waited_for_at_the_same_time() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "a", Overflow::Block(50));
    b.subscribe(4, 2, "a", Overflow::Block(40));
    let message = cast("a", &[1; 200]);
    assert_eq!(b.fill(2, &message).0, -libc::EAGAIN);
    b.pass(40);
    assert_eq!(b.send(2, &message), -libc::EAGAIN);
    b.pass(10);
    assert_eq!(b.send(2, &message), OK);
}

#[test]
fn d12_a_message_that_never_fits_is_a_gap_and_nobody_waits() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "a", Overflow::Block(1000));
    b.subscribe(4, 2, "a", Overflow::Conflate);
    assert_eq!(b.send(2, &cast("a", &[1; SMALL])), OK);
    assert_eq!(b.send(2, &cast("a", b"x")), OK);
    for id in 3..=4 {
        let got = b.read(id);
        assert_eq!((got[0].gap().0, &got[1].body[..]), (1, &b"x"[..]));
    }
}

#[test]
fn d12_conflated_streams_end_with_their_newest_message() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "", Overflow::Conflate);
    for n in 0..100u8 {
        for (id, topic) in [(2, "a"), (2, "b"), (4, "a")] {
            assert_eq!(b.send(id, &cast(topic, &[n; 100])), OK);
        }
    }
    assert!(b.account(2).messages <= 4 && b.account(2).bytes < 2000);
    let got = b.read(3);
    let last: Vec<_> = got.iter().rev().take(3).map(|g| g.body[0]).collect();
    assert_eq!((last, got.len()), (vec![99; 3], 6));
    assert_eq!(b.switch.endpoint(3).unwrap().stats.conflated, 3 * 98);
    // What is sent to it directly comes after what is held back.
    for n in 0..3u8 {
        assert_eq!(b.send(2, &cast("a", &[n])), OK);
    }
    assert_eq!(b.send(2, &to("1.3", b"u")), OK);
    assert!(
        b.switch
            .deliver(2, 3, b"1.2", b"1.3", b"", b"d", 0, 0, None, b.now)
    );
    assert_eq!(b.send(2, &cast("a", b"9")), OK);
    assert!(
        b.switch
            .deliver(2, 3, b"1.2", b"1.3", b"", b"e", 0, 0, None, b.now)
    );
    let got = b.read(3);
    assert_eq!(bodies(&got), [&[0][..], &[2], b"u", b"d", b"9", b"e"]);
    assert!(got.is_sorted_by_key(|g| g.h.seq));
    assert_eq!(b.account(2), Account::default());
}

#[test]
fn d12_what_is_held_back_is_bounded_and_given_back() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "", Overflow::Conflate);
    for n in 0..500 {
        assert_eq!(b.send(2, &cast(&format!("t{n}"), &[0; 500])), OK);
    }
    assert!(b.account(2).bytes <= 2 * SMALL as u64);
    assert!(b.switch.endpoint(3).unwrap().stats.missed > 400);
    b.switch.remove_endpoint(3, b.now);
    b.peers.remove(&3);
    assert_eq!(b.account(2), Account::default());
}

#[test]
fn d12_disconnect_cuts_off() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Disconnect);
    while !b.switch.has_events() {
        assert_eq!(b.send(2, &cast("a", &[0; 200])), OK);
    }
    assert_eq!(b.send(2, &cast("a", &[0; 200])), OK);
    assert_eq!(b.switch.take_events(), [Event::TooSlow(3)]);
    assert_eq!(b.send(2, &to("1.3", b"")), -libc::EHOSTUNREACH);
    b.switch.remove_endpoint(3, b.now);
    b.peers.remove(&3);
    assert_eq!(b.account(2), Account::default());
}

#[test]
fn d15_too_many_notices_cut_off() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    for _ in 0..MAX_BACKLOG + 100 {
        b.switch.notify(&[3], b"note");
    }
    assert_eq!(b.switch.take_events(), [Event::TooSlow(3)]);
    assert!(b.switch.endpoint(3).unwrap().backlog() <= MAX_BACKLOG);
}

// ---- order -----------------------------------------------------------------------------------------------------------

#[test]
fn d5_control_messages_keep_the_order_of_their_sender() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    let (_, taken) = b.fill(1, &to("1.3", &[0; 200]));
    assert_eq!(b.send(1, &cast("a", &[0; 200])), OK);
    assert!(
        b.switch
            .deliver(1, 3, b"master", b"1.3", b"ctl", b"d", 0, 0, None, b.now)
    );
    assert_eq!(b.send(1, &cast("a", &[0; 200])), OK);
    assert!(
        !b.switch
            .deliver(1, 3, b"master", b"1.3", b"", &[0; SMALL], 0, 0, None, b.now)
    );
    let got = b.read(3);
    let rest = &got[taken as usize..];
    assert_eq!(rest[0].gap().0, taken + 1);
    assert_eq!((rest[1].h.seq, rest[1].h.ctl_len), (taken + 2, 3));
    assert_eq!((rest[2].gap().0, rest.len()), (taken + 3, 3));
}

#[test]
fn d12_gaps_and_control_messages_that_wait_keep_their_order() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    let deliver = |b: &mut Bench| {
        let (switch, now) = (&mut b.switch, b.now);
        assert!(switch.deliver(1, 3, b"master", b"1.3", b"", &[0; 200], 0, 0, None, now));
    };
    while b.switch.endpoint(3).unwrap().backlog() == 0 {
        deliver(&mut b);
    }
    let first = b.switch.endpoint(1).unwrap().seq + 1;
    for _ in 0..3 {
        assert_eq!(b.send(1, &cast("a", &[0; 200])), OK);
        assert_eq!(b.send(1, &cast("a", &[0; 200])), OK);
        deliver(&mut b);
    }
    let got = b.read(3);
    let numbers: Vec<_> = got
        .iter()
        .map(|g| match g.h.kind {
            GAP => (g.gap().0, g.gap().1),
            _ => (g.h.seq, g.h.seq),
        })
        .filter(|(from, _)| *from >= first)
        .map(|(from, last)| (from - first, last - first))
        .collect();
    assert_eq!(numbers, [(0, 1), (2, 2), (3, 4), (5, 5), (6, 7), (8, 8)]);
}

#[test]
fn d20_unread_messages_are_told() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "a", Overflow::Gap);
    for tx in [
        to("1.3", b"1"),
        to("1.3", b"2"),
        cast("a", b"3"),
        to("1.3", b"4"),
    ] {
        assert_eq!(b.send(2, &tx), OK);
    }
    assert_eq!(b.send(4, &to("1.3", b"1")), OK);
    b.read_up_to(3, 1);
    // Even what only waits for room.
    b.fill(4, &to("1.3", &[0; 200]));
    let seq = b.switch.endpoint(4).unwrap().seq;
    while b.switch.endpoint(3).unwrap().backlog() == 0 {
        assert!(
            b.switch
                .deliver(1, 3, b"master", b"1.3", b"", &[0; 200], 0, 0, None, b.now)
        );
    }
    let master = b.switch.endpoint(1).unwrap().seq;
    // What it has published is sent before it goes.
    b.publish(3, &to("1.2", b"bye"));
    let unread = b.switch.remove_endpoint(3, b.now);
    b.peers.remove(&3);
    assert_eq!(
        unread,
        [(1, 1, master, master), (2, 2, 4, 2), (4, 1, seq, seq)]
    );
    assert_eq!(bodies(&b.read(2)), [b"bye"]);
    assert_eq!(
        (b.account(2), b.account(4)),
        (Account::default(), Account::default())
    );
}

#[test]
fn d19_monitors_see_all_and_cost_nobody() {
    let mut b = Bench::with(4);
    let monitor = b.switch.find(4).unwrap();
    b.switch.bus_mut(BUS).unwrap().monitors.push(monitor);
    b.subscribe(3, 1, "a", Overflow::Gap);
    assert_eq!(b.send(2, &to("1.3", b"1")), OK);
    assert_eq!(b.send(2, &to("1.9", b"2")), -libc::EHOSTUNREACH);
    assert_eq!(b.send(2, &cast("a", b"3")), OK);
    assert_eq!(b.send(2, &cast("nobody", b"4")), OK);
    b.read(3);
    assert_eq!(b.account(2), Account::default());
    let got = b.read(4);
    assert_eq!(bodies(&got), [b"1", b"3", b"4"]);
    assert!(got.iter().all(|g| g.h.flags & MONITOR != 0));
    // A monitor that does not read misses, and is told; nobody waits for it.
    for _ in 0..100 {
        assert_eq!(b.send(2, &to("1.3", &[0; 200])), OK);
        b.read(3);
    }
    let got = b.read(4);
    let (first, last, count, _) = got.last().unwrap().gap();
    assert_eq!(
        (first, last, count),
        (got.len() as u64 + 3, 103, 104 - (got.len() as u64 + 3))
    );
}

// ---- requests --------------------------------------------------------------------------------------------------------

fn request(serial: u64, deadline_ms: u32) -> Tx {
    Tx {
        flags: EXPECT_REPLY,
        serial,
        deadline_ms,
        ..to("1.3", b"")
    }
}

#[test]
fn d18_requests_are_bounded_and_forgotten_when_their_time_is_over() {
    let mut b = Bench::with(3);
    for serial in 1..=u64::from(MAX_REQUESTS) {
        assert_eq!(b.send(2, &request(serial, 1000)), OK);
        b.read(3);
    }
    assert_eq!(b.send(2, &request(9999, 1000)), -libc::EDQUOT);
    assert_eq!(b.send(2, &to("1.3", b"")), OK, "who asks nothing may go on");
    b.pass(500);
    assert_eq!(b.send(2, &request(9999, 1000)), -libc::EDQUOT);
    b.pass(500);
    assert_eq!(b.send(2, &request(9999, 1000)), OK);
    assert_eq!(b.switch.endpoint(2).unwrap().requests, 1);
}

#[test]
fn d18_an_answer_closes_its_request_once() {
    let mut b = Bench::with(3);
    let open = |b: &Bench| b.switch.endpoint(2).unwrap().requests;
    assert_eq!(b.send(2, &request(0, 1000)), OK);
    assert_eq!(open(&b), 0, "nothing could answer it");
    assert_eq!(b.send(2, &request(5, 1000)), OK);
    assert_eq!(b.send(2, &request(5, 1000)), OK);
    assert_eq!(open(&b), 1);
    let answer = Tx {
        reply_to: 5,
        ..to("1.2", b"")
    };
    assert_eq!(b.send(3, &answer), OK);
    assert_eq!(b.send(3, &answer), OK);
    assert_eq!(open(&b), 0);
    // Whoever asked and is gone leaves nothing behind that grows.
    for id in 10..300 {
        b.open(id, SMALL);
        b.join(id);
        assert_eq!(b.send(id, &request(1, u32::MAX)), OK);
        b.read(3);
        b.switch.remove_endpoint(id, b.now);
        b.peers.remove(&id);
    }
    assert!(b.switch.endpoint(3).unwrap().unanswered.len() <= 64);
}

#[test]
fn d20_who_waits_for_an_answer_is_told_that_it_will_not_come() {
    let mut b = Bench::with(3);
    assert_eq!(b.send(2, &request(7, 1000)), OK);
    b.switch.remove_endpoint(3, b.now);
    let got = b.read(2);
    assert_eq!(
        (got[0].h.kind, got[0].h.reply_to, &got[0].src[..]),
        (NO_REPLY, 7, &b"1.3"[..])
    );
    assert_eq!(b.switch.endpoint(2).unwrap().requests, 0);
}

// ---- descriptors and the line ----------------------------------------------------------------------------------------

#[test]
fn case9_descriptors_travel_and_are_counted() {
    let mut b = Bench::with(3);
    let (x, y) = line::pair().unwrap();
    let message = |fds: u8| Tx {
        fds,
        ..to("1.3", b"x")
    };
    b.packet(2, &[line::FDS], &[x.as_raw_fd(), y.as_raw_fd()]);
    assert_eq!(b.send(2, &message(2)), OK);
    assert_eq!(b.account(2).fds, 2);
    assert_eq!(b.read(3)[0].h.fds, 2);
    let came: usize = b.packets(3).iter().map(|p| p.fds.len()).sum();
    assert_eq!((came, b.account(2).fds), (2, 0));
    // Not to many at once (D7).
    b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
    let multicast = Tx {
        fds: 1,
        ..cast("a", b"x")
    };
    assert_eq!(b.send(2, &multicast), -libc::EOPNOTSUPP);
    // The refused ones are closed: the next message has its own.
    b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
    assert_eq!(b.send(2, &message(1)), OK);
}

#[test]
fn case9_descriptors_that_do_not_come_or_are_too_many_cut_off() {
    for fds in [1, 18, 28, 255] {
        let mut b = Bench::with(3);
        let (x, _y) = line::pair().unwrap();
        if fds == 18 {
            // More than a line ever carries, sent by hand.
            let all = vec![x.as_raw_fd(); 18];
            assert_eq!(raw_fds(&b.peers[&2].line, &all), 1);
            b.switch.kicked(b.peers[&2].who);
        }
        let message = Tx {
            fds,
            ..to("1.3", b"x")
        };
        let pos = b.publish(2, &message);
        b.round();
        assert_eq!(b.verdict(2, pos), 0);
        assert!(
            matches!(b.switch.take_events()[..], [Event::Violated(2, _)]),
            "{fds}"
        );
        assert_eq!(b.send(3, &to("1.3", b"x")), OK, "nobody else notices");
    }
}

/// Sends descriptors without the limit of [`line::send`].
fn raw_fds(line: &OwnedFd, fds: &[RawFd]) -> isize {
    let mut control = [0u64; 64];
    let bytes = size_of_val(fds) as u32;
    let mut byte = [line::FDS];
    let mut iov = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // SAFETY: all pointers point to locals that live for the call; the control buffer has 512 bytes.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        let cmsg = libc::CMSG_FIRSTHDR(&raw const msg);
        (*cmsg).cmsg_level = libc::SOL_SOCKET;
        (*cmsg).cmsg_type = libc::SCM_RIGHTS;
        (*cmsg).cmsg_len = libc::CMSG_LEN(bytes) as _;
        let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
        for (i, fd) in fds.iter().enumerate() {
            data.add(i).write_unaligned(*fd);
        }
        libc::sendmsg(line.as_raw_fd(), &raw const msg, libc::MSG_NOSIGNAL)
    }
}

#[test]
fn case9_descriptors_without_messages_stay_few() {
    let mut b = Bench::with(3);
    let (x, _y) = line::pair().unwrap();
    let own = |b: &Bench| b.switch.endpoint(2).unwrap().io.as_ref().unwrap().fds.len();
    for _ in 0..20 {
        b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
    }
    assert!(own(&b) <= 8);
    // The records that they belong to get them all the same, each its own.
    let message = Tx {
        fds: 1,
        ..to("1.3", b"x")
    };
    for _ in 0..20 {
        assert_eq!(b.send(2, &message), OK);
        b.read(3);
    }
    assert_eq!(
        (
            own(&b),
            b.packets(3).iter().filter(|p| p.fds.len() == 1).count()
        ),
        (0, 20)
    );
    assert!(!b.switch.has_events());
}

#[test]
fn d14_memfds_must_be_sealed() {
    let mut b = Bench::with(3);
    b.subscribe(3, 1, "a", Overflow::Gap);
    let fd = memfd(c"body").unwrap();
    // SAFETY: plain call on our own descriptor.
    unsafe { libc::ftruncate(fd.as_raw_fd(), 100_000) };
    let body = |tx: Tx, outside| Tx {
        flags: BODY_IN_MEMFD,
        fds: 1,
        outside,
        ..tx
    };
    let mut send = |tx: &Tx| {
        b.packet(2, &[line::FDS], &[fd.as_raw_fd()]);
        b.send(2, tx)
    };
    let plain = Tx {
        fds: 1,
        ..to("1.3", b"")
    };
    assert_eq!(send(&plain), -libc::EOPNOTSUPP);
    assert_eq!(send(&body(to("1.3", b""), 100_000)), -libc::EOPNOTSUPP);
    seal(fd.as_fd(), BODY_SEALS).unwrap();
    assert_eq!(send(&plain), OK);
    assert_eq!(send(&body(to("1.3", b""), 100_001)), -libc::EOPNOTSUPP);
    assert_eq!(send(&body(to("1.3", b""), 17 << 20)), -libc::EMSGSIZE);
    assert_eq!(send(&body(to("1.3", b""), 100_000)), OK);
    assert_eq!(send(&body(cast("a", b""), 100_000)), OK);
    let got = b.read(3);
    let lengths: Vec<_> = got.iter().map(|g| (g.h.fds, g.h.body_len)).collect();
    assert_eq!(lengths, [(1, 0), (1, 100_000), (1, 100_000)]);
    assert_eq!(b.account(2), Account::default());
}

#[test]
fn d12_padding_takes_pollout_away_until_there_is_room() {
    let mut b = Bench::with(4);
    let message = to("1.3", &[1; 200]);
    // Others fill the ring, so that it is not a matter of shares.
    b.fill(4, &message);
    b.fill(1, &message);
    while b.send(2, &message) == OK {}
    b.packets(2);
    assert!(b.writable(2));
    b.packet(2, &[line::BLOCK; 64 << 10], &[]);
    assert!(!b.writable(2) && b.packets(2).is_empty());
    // What lies behind the padding still has its effect: kicks, wishes to be woken, descriptors.
    b.packet(2, &[line::KICK], &[]);
    b.packet(2, &[line::PING], &[]);
    assert!(b.packets(2).iter().any(|p| p.kind == line::WAKE));
    assert!(!b.writable(2));
    let room = b.room(2);
    b.read(3);
    assert_eq!(b.room(2), room + 1);
    assert!(b.writable(2));
    // Padding that comes too late is read at once.
    b.packet(2, &[line::BLOCK; 64 << 10], &[]);
    assert!(b.writable(2));
    // Descriptors behind padding are found, even if that brings POLLOUT back too early.
    b.fill(4, &message);
    while b.send(2, &message) == OK {}
    b.packet(2, &[line::BLOCK; 64 << 10], &[]);
    assert!(!b.writable(2));
    let (x, _y) = line::pair().unwrap();
    b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
    let other = Tx {
        fds: 1,
        ..to("1.4", b"")
    };
    assert_eq!(b.send(2, &other), OK);
    assert_eq!(b.packets(4).iter().map(|p| p.fds.len()).sum::<usize>(), 1);
}

#[test]
fn d12_a_line_without_room_is_tried_again() {
    let mut b = Bench::with(3);
    let (x, _y) = line::pair().unwrap();
    let message = Tx {
        fds: 1,
        ..to("1.3", b"")
    };
    // The receiver reads its ring, but not its line.
    let send = |b: &mut Bench| {
        b.packet(2, &[line::FDS], &[x.as_raw_fd()]);
        b.send(2, &message)
    };
    let verdict = (0..5000).find_map(|_| {
        b.read(3);
        let verdict = send(&mut b);
        (verdict != OK).then_some(verdict)
    });
    // The first time it may have been told at once, as there was room in the ring.
    let again = send(&mut b);
    let line_full = again == -libc::EAGAIN;
    // Where few descriptors may be in flight, that is the first limit to be met.
    assert!(verdict == Some(again) && (line_full || again == -libc::EDQUOT));
    if line_full {
        let room = b.room(2);
        b.packets(3);
        b.pass(10);
        assert_eq!(b.room(2), room + 1);
        assert_eq!(send(&mut b), OK);
    }
}

#[test]
fn case5_strange_packets_and_records_cut_off_only_their_sender() {
    let mut b = Bench::with(3);
    b.packet(2, b"?", &[]);
    assert!(matches!(
        b.switch.take_events()[..],
        [Event::Violated(2, _)]
    ));
    assert_eq!(b.send(3, &to("1.2", b"")), -libc::EHOSTUNREACH);
    let mut b = Bench::with(3);
    let peer = b.peers.get_mut(&2).unwrap();
    let pos = peer.tx.reserve(64).unwrap().unwrap();
    peer.tx.memory().copy_in(pos, &[0xff; 64]);
    peer.tx.publish();
    b.round();
    assert!(matches!(
        b.switch.take_events()[..],
        [Event::Violated(2, _)]
    ));
    // A reader that claims to have read what it was not sent.
    b.peers[&3]
        .rx
        .memory()
        .tail()
        .store(1 << 40, Ordering::Relaxed);
    b.switch.kicked(b.peers[&3].who);
    assert!(matches!(
        b.switch.take_events()[..],
        [Event::Violated(3, _)]
    ));
    assert_eq!(b.send(1, &to("master", b"")), OK);
    b.switch.remove_endpoint(2, b.now);
    b.switch.remove_endpoint(3, b.now);
}

#[test]
fn r22_a_silent_endpoint_sleeps_and_is_woken_by_a_kick() {
    let mut b = Bench::with(2);
    assert_eq!(b.switch.doze(0), 0);
    assert!(!b.switch.has_active());
    assert_eq!(b.send(2, &to("1.2", b"x")), OK);
    assert!(b.switch.has_active());
    assert_eq!(bodies(&b.read(2)), [b"x"]);
    // With something unread in its TX ring it does not fall asleep.
    b.switch.doze(0);
    b.peers.get_mut(&2).unwrap().tx.must_wake();
    b.switch.activate(b.peers[&2].who);
    b.publish(2, &to("1.2", b"y"));
    assert_eq!(b.switch.doze(0), 1);
}

#[test]
fn case7_a_flood_of_kicks_keeps_nobody_else_waiting() {
    let mut b = Bench::with(3);
    for _ in 0..270 {
        if line::send(b.peers[&2].line.as_fd(), &[line::KICK], &[]).is_err() {
            break;
        }
    }
    b.switch.kicked(b.peers[&2].who);
    if b.switch.endpoint(2).unwrap().stopped == Stop::Turn {
        assert!(b.switch.doze(0) > 0, "no event will come for what is left");
        b.round();
    }
    assert_eq!(b.switch.endpoint(2).unwrap().stopped, Stop::Empty);
    assert_eq!(b.switch.doze(0), 0);
}

#[test]
fn r17_filters_choose_among_multicasts() {
    let mut b = Bench::with(4);
    b.subscribe(3, 1, "a", Overflow::Gap);
    b.subscribe(4, 2, "a", Overflow::Gap);
    // r2 = body[0]; pass when it is 7
    let program = [
        [0x71, 0x12, 0, 0, 0, 0, 0, 0],
        [0xb7, 0, 0, 0, 0, 0, 0, 0],
        [0x55, 2, 1, 0, 7, 0, 0, 0],
        [0xb7, 0, 0, 0, 1, 0, 0, 0],
        [0x95, 0, 0, 0, 0, 0, 0, 0],
    ];
    assert!(
        b.switch
            .set_filter(3, Some(Filter::new(&program.concat()).unwrap()))
    );
    for n in [6u8, 7, 8] {
        assert_eq!(b.send(2, &cast("a", &[n])), OK);
    }
    assert_eq!((bodies(&b.read(3)), b.read(4).len()), (vec![&[7][..]], 3));
    assert!(b.switch.set_filter(3, None));
    assert_eq!(b.send(2, &cast("a", &[9])), OK);
    assert_eq!(b.read(3).len(), 1);
}

// ---- against a slow and obvious model --------------------------------------------------------------------------------

mod model {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const TOPICS: [&str; 4] = ["a", "a.b", "a.b.c", "b"];
    const WISHES: [&str; 4] = ["", "a", "a.b", "b"];
    const NAMES: [&str; 3] = ["name.x", "name.y", "name.z"];
    const MONITOR_ID: u64 = 1000;
    const MASTER_ID: u64 = 1;

    /// What a record is, before anybody has decided on it.
    #[derive(Debug, Clone)]
    struct Post {
        from: usize,
        dst: Dst,
        size: usize,
        chain: bool,
    }

    #[derive(Debug, Clone, Copy)]
    enum Dst {
        /// The unique address of an endpoint, which may be gone.
        Unique(u64),
        Name(usize),
        Topic(usize),
    }

    #[derive(Debug, Clone)]
    enum Op {
        Open {
            big: bool,
            joined: bool,
            connected: bool,
        },
        Connect(usize),
        Close(usize),
        Own(usize, usize),
        Disown(usize, usize),
        Subscribe(usize, usize, Option<u32>),
        Unsubscribe(usize),
        Post(Vec<Post>),
        Read(usize, usize),
        Pass(u64),
        Doze,
    }

    fn post() -> impl Strategy<Value = Post> {
        let dst = prop_oneof![
            3 => (1u64..12).prop_map(Dst::Unique),
            1 => (0usize..NAMES.len()).prop_map(Dst::Name),
            4 => (0usize..TOPICS.len()).prop_map(Dst::Topic),
        ];
        let size = prop_oneof![4 => 0usize..64, 3 => 200usize..900, 1 => 1500usize..5000];
        (any::<usize>(), dst, size, any::<u8>()).prop_map(|(from, dst, size, chain)| Post {
            from,
            dst,
            size,
            chain: chain % 8 == 0,
        })
    }

    fn op() -> impl Strategy<Value = Op> {
        let who = any::<usize>;
        prop_oneof![
            2 => (any::<bool>(), 0u8..5, 0u8..5).prop_map(|(big, j, c)| Op::Open { big, joined: j > 0, connected: c > 0 }),
            1 => who().prop_map(Op::Connect),
            1 => who().prop_map(Op::Close),
            1 => (who(), 0usize..NAMES.len()).prop_map(|(a, b)| Op::Own(a, b)),
            1 => (who(), 0usize..NAMES.len()).prop_map(|(a, b)| Op::Disown(a, b)),
            3 => (who(), 0usize..WISHES.len(), prop::option::weighted(0.25, prop::sample::select(vec![0u32, 5, 20])))
                .prop_map(|(a, b, c)| Op::Subscribe(a, b, c)),
            1 => who().prop_map(Op::Unsubscribe),
            12 => prop::collection::vec(post(), 1..6).prop_map(Op::Post),
            5 => (who(), 1usize..12).prop_map(|(a, b)| Op::Read(a, b)),
            1 => (1u64..10).prop_map(Op::Pass),
            1 => Just(Op::Doze),
        ]
    }

    /// A message that an endpoint is to get, in the order in which all get theirs.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Due {
        from: u64,
        seq: u64,
        src: Vec<u8>,
        dst: Vec<u8>,
        body: Vec<u8>,
        multicast: bool,
    }

    #[derive(Debug, Default)]
    struct Member {
        joined: bool,
        /// Number, topic, and whether senders wait.
        wishes: Vec<(u64, &'static str, bool)>,
        due: VecDeque<Due>,
        seq: u64,
        /// Its last record was refused.
        broken: bool,
    }

    struct World {
        b: Bench,
        members: BTreeMap<u64, Member>,
        names: BTreeMap<&'static str, u64>,
        next_id: u64,
        next_match: u64,
        stamp: u32,
        quotas: bool,
    }

    fn hears(wish: &str, topic: &str) -> bool {
        wish.is_empty() || topic == wish || topic.starts_with(&format!("{wish}."))
    }

    impl World {
        fn new(quota: Quota, quotas: bool) -> Self {
            let mut b = Bench::new(quota);
            b.open(MONITOR_ID, 1 << 20);
            let monitor = b.switch.find(MONITOR_ID).unwrap();
            b.switch.bus_mut(BUS).unwrap().monitors.push(monitor);
            let mut world = Self {
                b,
                members: BTreeMap::new(),
                names: BTreeMap::new(),
                next_id: 1,
                next_match: 1,
                stamp: 0,
                quotas,
            };
            world.open(false, true, true);
            let master = world.b.switch.find(MASTER_ID);
            world.b.switch.bus_mut(BUS).unwrap().master = master;
            world
        }

        fn open(&mut self, big: bool, joined: bool, connected: bool) {
            let id = self.next_id;
            self.next_id += 1;
            self.b.add(id);
            if joined {
                self.b.join(id);
            }
            self.members.insert(
                id,
                Member {
                    joined,
                    ..Member::default()
                },
            );
            if connected {
                self.b.connect(id, if big { 2 * SMALL } else { SMALL });
            }
        }

        fn pick(&self, n: usize) -> u64 {
            *self.members.keys().nth(n % self.members.len()).unwrap()
        }

        /// Who gets a message, or why nobody does.
        fn receivers(&self, from: u64, dst: Dst) -> Result<Vec<u64>, i32> {
            let sender = &self.members[&from];
            match dst {
                Dst::Topic(_) if !sender.joined => Err(libc::EHOSTUNREACH),
                Dst::Topic(topic) => Ok(self
                    .members
                    .iter()
                    .filter(|(_, m)| m.wishes.iter().any(|w| hears(w.1, TOPICS[topic])))
                    .map(|(id, _)| *id)
                    .collect()),
                Dst::Unique(id) => match self.members.get(&id) {
                    Some(to) if to.joined && (sender.joined || id == MASTER_ID) => Ok(vec![id]),
                    _ => Err(libc::EHOSTUNREACH),
                },
                Dst::Name(name) => match self.names.get(NAMES[name]) {
                    Some(owner) if sender.joined || *owner == MASTER_ID => Ok(vec![*owner]),
                    None if sender.joined && from != MASTER_ID => Ok(vec![MASTER_ID]),
                    _ => Err(libc::EHOSTUNREACH),
                },
            }
        }

        fn ring(&self, id: u64) -> Option<u64> {
            self.b.peers.get(&id).map(|p| p.rx.memory().size())
        }

        fn post(&mut self, posts: &[Post]) {
            let mut places = Vec::new();
            for post in posts {
                let from = self.pick(post.from);
                if !self.b.peers.contains_key(&from) {
                    continue;
                }
                self.stamp += 1;
                let mut body = self.stamp.to_le_bytes().to_vec();
                body.resize(body.len() + post.size, self.stamp as u8);
                let flags = if post.chain { CHAIN } else { 0 };
                let tx = match post.dst {
                    Dst::Unique(id) => to(&format!("1.{id}"), &body),
                    Dst::Name(name) => to(NAMES[name], &body),
                    Dst::Topic(topic) => cast(TOPICS[topic], &body),
                };
                let tx = Tx { flags, ..tx };
                let place = self.b.publish(from, &tx);
                places.push((from, place, post.clone(), tx));
            }
            self.b.round();
            // In the order of each sender: is the verdict one that can be?
            let mut accepted: BTreeMap<u64, VecDeque<(Tx, Dst)>> = BTreeMap::new();
            let mut broken: BTreeMap<u64, bool> = BTreeMap::new();
            for (from, place, post, tx) in places {
                let verdict = self.b.verdict(from, place);
                let after_refusal =
                    post.chain && *broken.get(&from).unwrap_or(&self.members[&from].broken);
                self.check_verdict(from, &post, &tx, verdict, after_refusal);
                broken.insert(from, verdict != OK);
                if verdict == OK {
                    accepted.entry(from).or_default().push_back((tx, post.dst));
                }
            }
            for (from, broken) in broken {
                self.members.get_mut(&from).unwrap().broken = broken;
            }
            // The monitor saw in which order they were accepted.
            for got in self.b.read(MONITOR_ID) {
                let from = u64::from(got.h.pid);
                let (tx, dst) = accepted.get_mut(&from).unwrap().pop_front().unwrap();
                let member = self.members.get_mut(&from).unwrap();
                member.seq += 1;
                assert_eq!(
                    (&got.dst, &got.body, got.h.seq),
                    (&tx.dst, &tx.body, member.seq)
                );
                let src = if member.joined {
                    format!("1.{from}")
                } else {
                    format!("@{from}")
                };
                let due = Due {
                    from,
                    seq: got.h.seq,
                    src: src.into(),
                    dst: tx.dst,
                    body: tx.body,
                    multicast: tx.kind != UNICAST,
                };
                for to in self.receivers(from, dst).unwrap() {
                    self.members
                        .get_mut(&to)
                        .unwrap()
                        .due
                        .push_back(due.clone());
                }
            }
            assert!(
                accepted.values().all(VecDeque::is_empty),
                "the monitor saw all that was accepted"
            );
        }

        fn check_verdict(
            &self,
            from: u64,
            post: &Post,
            tx: &Tx,
            verdict: i32,
            after_refusal: bool,
        ) {
            if after_refusal {
                assert_eq!(verdict, -libc::ECANCELED);
                return;
            }
            let receivers = match self.receivers(from, post.dst) {
                Err(errno) => {
                    assert_eq!(verdict, -errno, "{post:?}");
                    return;
                }
                Ok(receivers) => receivers,
            };
            if self.quotas && verdict == -libc::EDQUOT {
                return;
            }
            if tx.kind == UNICAST {
                let src = if self.members[&from].joined {
                    "1."
                } else {
                    "@"
                };
                let parts = [
                    src.len() + from.to_string().len(),
                    tx.dst.len(),
                    tx.body.len(),
                ];
                let len: u64 = RX_HEADER + parts.iter().map(|n| padded(*n as u64)).sum::<u64>();
                let can_be = match self.ring(receivers[0]) {
                    Some(size) if len > size => vec![-libc::EMSGSIZE],
                    None => vec![-libc::EAGAIN],
                    _ => vec![OK, -libc::EAGAIN],
                };
                assert!(
                    can_be.contains(&verdict),
                    "{verdict} for {post:?}, not {can_be:?}"
                );
                return;
            }
            let Dst::Topic(topic) = post.dst else {
                unreachable!()
            };
            let waits = receivers.iter().any(|to| {
                let mut wishes = self.members[to].wishes.iter();
                wishes.any(|w| w.2 && hears(w.1, TOPICS[topic]))
            });
            assert!(
                verdict == OK || (waits && verdict == -libc::EAGAIN),
                "{verdict} for {post:?}"
            );
        }

        /// Reads some, and checks that it is what was due.
        fn read(&mut self, id: u64, most: usize) -> usize {
            let got = self.b.read_up_to(id, most);
            let member = self.members.get_mut(&id).unwrap();
            for got in &got {
                if got.h.kind == GAP {
                    let (first, last, count, reason) = got.gap();
                    assert!(reason == 1 || reason == 2);
                    let missed = |d: &Due| d.src == got.src && (first..=last).contains(&d.seq);
                    let seqs: Vec<u64> = member
                        .due
                        .iter()
                        .filter(|d| missed(d))
                        .map(|d| d.seq)
                        .collect();
                    assert_eq!(
                        (seqs.first(), seqs.last(), seqs.len() as u64),
                        (Some(&first), Some(&last), count),
                        "a gap covers exactly what was missed"
                    );
                    assert!(
                        member.due.iter().all(|d| d.multicast || !missed(d)),
                        "unicasts are never missed"
                    );
                    member.due.retain(|d| !missed(d));
                    continue;
                }
                assert_eq!(got.h.flags & MONITOR, 0);
                let due = member
                    .due
                    .pop_front()
                    .expect("nothing comes that was not sent");
                let h = &got.h;
                assert_eq!(
                    (h.pid, h.uid, h.seq, h.flags & MULTICAST != 0),
                    (
                        due.from as u32,
                        1000 + due.from as u32,
                        due.seq,
                        due.multicast
                    )
                );
                assert_eq!(
                    (&got.src, &got.dst, &got.body),
                    (&due.src, &due.dst, &due.body)
                );
            }
            got.len()
        }

        fn close(&mut self, id: u64) {
            let member = self.members.remove(&id).unwrap();
            self.names.retain(|_, owner| *owner != id);
            let mut told: BTreeMap<u64, (u64, u64, u64)> = BTreeMap::new();
            for due in member.due.iter().filter(|d| !d.multicast) {
                let one = told.entry(due.from).or_insert((due.seq, due.seq, 0));
                one.1 = due.seq;
                one.2 += 1;
            }
            // Nobody is told who is gone.
            told.retain(|from, _| self.members.contains_key(from));
            let mut unread = self.b.switch.remove_endpoint(id, self.b.now);
            self.b.peers.remove(&id);
            unread.sort_unstable();
            let told: Vec<_> = told
                .into_iter()
                .map(|(from, (a, b, n))| (from, a, b, n))
                .collect();
            assert_eq!(unread, told, "unread messages are told");
        }

        fn step(&mut self, op: &Op) {
            match op {
                Op::Open {
                    big,
                    joined,
                    connected,
                } => {
                    if self.members.len() < 7 {
                        self.open(*big, *joined, *connected);
                    }
                }
                Op::Connect(n) => {
                    let id = self.pick(*n);
                    if !self.b.peers.contains_key(&id) {
                        self.b.connect(id, SMALL);
                    }
                }
                Op::Close(n) => {
                    let id = self.pick(*n);
                    if id != MASTER_ID {
                        self.close(id);
                    }
                }
                Op::Own(n, name) => {
                    let id = self.pick(*n);
                    if self.members[&id].joined {
                        let free = self
                            .names
                            .get(NAMES[*name])
                            .is_none_or(|owner| *owner == id);
                        assert_eq!(self.b.switch.own(id, NAMES[*name].as_bytes()), free);
                        self.names.entry(NAMES[*name]).or_insert(id);
                    }
                }
                Op::Disown(n, name) => {
                    let id = self.pick(*n);
                    let owned = self.names.get(NAMES[*name]) == Some(&id);
                    assert_eq!(self.b.switch.disown(id, NAMES[*name].as_bytes()), owned);
                    if owned {
                        self.names.remove(NAMES[*name]);
                    }
                }
                Op::Subscribe(n, wish, block) => {
                    let (id, number) = (self.pick(*n), self.next_match);
                    self.next_match += 1;
                    let overflow = block.map_or(Overflow::Gap, Overflow::Block);
                    self.b.subscribe(id, number, WISHES[*wish], overflow);
                    let member = self.members.get_mut(&id).unwrap();
                    member.wishes.push((number, WISHES[*wish], block.is_some()));
                }
                Op::Unsubscribe(n) => {
                    let id = self.pick(*n);
                    if let Some((number, ..)) = self.members.get_mut(&id).unwrap().wishes.pop() {
                        assert!(self.b.switch.bus_mut(BUS).unwrap().unsubscribe(number));
                    }
                }
                Op::Post(posts) => self.post(posts),
                Op::Read(n, most) => {
                    let id = self.pick(*n);
                    self.read(id, *most);
                }
                Op::Pass(ms) => self.b.pass(*ms),
                Op::Doze => {
                    self.b.switch.doze(0);
                }
            }
            assert!(!self.b.switch.has_events(), "nobody is cut off");
        }

        /// Everything is read in the end; nothing is owed then, nobody waits, and nothing is charged.
        fn end(&mut self) {
            let ids: Vec<u64> = self.members.keys().copied().collect();
            for id in &ids {
                if !self.b.peers.contains_key(id) {
                    self.b.connect(*id, SMALL);
                }
                while self.read(*id, 3) > 0 {}
            }
            self.b.pass(1000);
            for id in &ids {
                let e = self.b.switch.endpoint(*id).unwrap();
                assert!(
                    self.members[id].due.is_empty(),
                    "{:?}",
                    self.members[id].due
                );
                assert!(!e.waiting, "endpoint {id} was never told to try again");
                assert_eq!((e.waiters.len(), e.backlog()), (0, 0));
            }
            for id in 1..self.next_id {
                assert_eq!(self.b.account(id), Account::default());
            }
            assert_eq!(self.b.switch.next_timer(), None);
            for id in ids {
                self.close(id);
            }
        }
    }

    fn play(quota: Quota, quotas: bool, ops: &[Op]) {
        let mut world = World::new(quota, quotas);
        for op in ops {
            world.step(op);
        }
        world.end();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn d11_d12_r22_every_message_comes_once_in_order_or_is_in_a_gap(ops in prop::collection::vec(op(), 1..120)) {
            play(Quota::default(), false, &ops);
        }

        #[test]
        fn d18_quotas_change_nothing_but_verdicts(ops in prop::collection::vec(op(), 1..120)) {
            let quota = Quota { bytes: 6000, messages: 12, fds: 0 };
            play(quota, true, &ops);
        }

        /// Conflation: what comes is in order, each stream ends with its newest message, unicasts are all there.
        #[test]
        fn d12_conflated_streams_are_in_order_and_end_with_the_newest(
            ops in prop::collection::vec((0u8..4, 0usize..4, 0usize..300), 1..200), size in 12u32..14,
        ) {
            let mut b = Bench::with(4);
            b.open(9, 1 << size);
            b.join(9);
            b.subscribe(9, 1, "", Overflow::Conflate);
            let mut newest: BTreeMap<(u64, Vec<u8>), u64> = BTreeMap::new();
            let mut unicasts: BTreeSet<(u64, u64)> = BTreeSet::new();
            let mut got = Vec::new();
            for (kind, n, size) in ops {
                let from = 2 + n as u64 % 3;
                let tx = match kind {
                    0 | 1 => cast(TOPICS[n], &vec![0; size]),
                    2 => to("1.9", &vec![0; size]),
                    _ => {
                        got.extend(b.read_up_to(9, 1 + n));
                        continue;
                    }
                };
                let verdict = b.send(from, &tx);
                let seq = b.switch.endpoint(from).unwrap().seq;
                if tx.kind == UNICAST {
                    prop_assert!(verdict == OK || verdict == -libc::EAGAIN);
                    if verdict == OK {
                        unicasts.insert((from, seq));
                    }
                } else {
                    prop_assert_eq!(verdict, OK);
                    newest.insert((from, tx.dst), seq);
                }
            }
            got.extend(b.read(9));
            let mut last: BTreeMap<u64, u64> = BTreeMap::new();
            for g in &got {
                prop_assert_eq!(g.h.kind, MESSAGE);
                let from = u64::from(g.h.pid);
                let before = last.insert(from, g.h.seq).unwrap_or(0);
                prop_assert!(before < g.h.seq, "{} after {before} from {from}", g.h.seq);
                unicasts.remove(&(from, g.h.seq));
                if newest.get(&(from, g.dst.clone())) == Some(&g.h.seq) {
                    newest.remove(&(from, g.dst.clone()));
                }
            }
            prop_assert!(newest.is_empty() && unicasts.is_empty(), "{newest:?} {unicasts:?}");
            for id in 2..=4 {
                prop_assert_eq!(b.account(id), Account::default());
            }
        }
    }
}

#[test]
#[ignore = "prints figures, checks nothing"]
fn figures_of_the_fast_path() {
    let time = |n: u32, b: &mut Bench, tx: &Tx, readers: std::ops::Range<u64>| {
        (0..200)
            .map(|_| {
                for _ in 0..n {
                    b.publish(2, tx);
                }
                let start = Instant::now();
                b.round();
                let took = start.elapsed().as_nanos() as f64 / f64::from(n);
                for id in readers.clone() {
                    b.read(id);
                }
                took
            })
            .fold(f64::MAX, f64::min)
    };
    let mut b = Bench::with(10);
    for id in 2..=10 {
        b.connect(id, 1 << 20);
    }
    let one = time(250, &mut b, &to("1.3", &[0; 64]), 3..4);
    for id in 3..=10 {
        b.subscribe(id, id, "bench", Overflow::Block(1000));
    }
    let eight = time(250, &mut b, &cast("bench", &[0; 64]), 3..11);
    println!(
        "64 bytes to one: {one:.0} ns; to eight: {:.0} ns each",
        eight / 8.0
    );
}
