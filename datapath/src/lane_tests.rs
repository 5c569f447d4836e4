//! Tests of lanes without threads: the switch, and clients with both ends of theirs.

use super::*;
use crate::client::{self, Outgoing, Rx, Tx};
use crate::destinations::{Route, Taken};
use crate::frame::{MESSAGE, NOTICE};
use crate::ring::{Consumer, Producer};
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

#[path = "arena_tests.rs"]
mod arena;

pub(super) const BUS: u32 = 1;
const RX: usize = 1 << 16;

pub(super) struct Client {
    pub(super) tx: Tx,
    pub(super) rx: Rx,
    memory: Arc<Segment>,
}

pub(super) struct World {
    pub(super) switch: Switch,
    pub(super) now: Instant,
    clients: BTreeMap<u64, Client>,
}

/// What is to be read of each sender by each receiver: sources and numbers.
type Expected = BTreeMap<(u64, u64), VecDeque<(Vec<u8>, u64)>>;

pub(super) fn route<'a>(kind: u8, src: &'a str, dst: &'a str) -> Route<'a> {
    (kind, src.as_bytes(), dst.as_bytes())
}

/// What a client received: kind, source, body, number.
pub(super) type Got = (u8, Vec<u8>, Vec<u8>, u64);

impl World {
    /// A bus with lanes, its master (endpoint 1, `master`), and endpoints 2 to `n` with the addresses `1.N` and `aka.N`.
    pub(super) fn with(n: u64, quota: Quota) -> Self {
        let mut switch = Switch::new(quota);
        switch.add_bus(BUS, 512, [7; 16]);
        switch.bus_mut(BUS).unwrap().has_lanes = true;
        let mut world = Self {
            switch,
            now: Instant::now(),
            clients: BTreeMap::new(),
        };
        for id in 1..=n {
            world.open(id);
        }
        let master = world.switch.find(1);
        world.switch.set_master(BUS, master);
        assert!(world.switch.own(1, b"master"));
        for id in 2..=n {
            for name in ["1", "aka"] {
                assert!(world.switch.own(id, format!("{name}.{id}").as_bytes()));
            }
        }
        world
    }

    fn open(&mut self, id: u64) {
        let (pid, uid) = (id as u32, 1000 + id as u32);
        let credentials = Credentials { pid, uid, gid: 7 };
        let ident = format!("ident {id}").into_bytes();
        let who = (self.switch).add_endpoint(id, id as u32, credentials, ident.into());
        assert!(self.switch.attach(id, BUS));
        let e = self.switch.endpoint_mut(id).unwrap();
        e.send_grants.push(SendGrant {
            id: 0,
            bits: Bits::zero(512).unwrap(),
            terms: None,
        });
        let (tx, _) = Segment::create(1 << 17).unwrap();
        let (rx, _) = Segment::create(RX).unwrap();
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
        let line = Arc::new(line);
        let client = Client {
            tx: Tx::new(tx.clone(), line.clone()),
            rx: Rx::new(rx, line),
            memory: tx,
        };
        self.clients.insert(id, client);
    }

    pub(super) fn client(&mut self, id: u64) -> &mut Client {
        self.clients.get_mut(&id).unwrap()
    }

    /// Serves what was published, and what was said on lines.
    pub(super) fn serve(&mut self) {
        let all: Vec<u64> = self.clients.keys().copied().collect();
        for id in all {
            if let Some(who) = self.switch.find(id) {
                self.switch.kicked(who);
            }
        }
        while self.switch.round(self.now) > 0 {}
    }

    /// Sends by the switch; the verdict.
    pub(super) fn send(
        &mut self,
        from: u64,
        kind: u8,
        (src, dst): (&str, &str),
        body: &[u8],
        serial: u64,
    ) -> i32 {
        let flags = if serial > 0 { EXPECT_REPLY } else { 0 };
        let header = TxHeader {
            kind,
            flags,
            serial,
            deadline_ms: 1000,
            body_len: body.len() as u32,
            ..TxHeader::default()
        };
        let message = Outgoing {
            header,
            src: src.as_bytes(),
            dst: dst.as_bytes(),
            body: &[body],
        };
        let tx = &mut self.client(from).tx;
        let (pos, end) = tx.put(&message).unwrap();
        assert!(tx.publish());
        self.serve();
        let tx = &mut self.client(from).tx;
        assert!(tx.settled(end).unwrap());
        let verdict = tx.verdict(pos);
        if verdict == OK && serial == 0 {
            tx.went_by_switch(route(kind, src, dst), 1, body.len() as u64);
        }
        verdict
    }

    /// Sends as a client does: on the lane, if there is one or one is granted, else by the switch.
    pub(super) fn tell(&mut self, from: u64, src: &str, dst: &str, body: &[u8]) -> i32 {
        self.say(from, route(UNICAST, src, dst), body)
    }

    /// The same to any destination.
    pub(super) fn say(&mut self, from: u64, (kind, src, dst): Route<'_>, body: &[u8]) -> i32 {
        loop {
            let tx = &mut self.client(from).tx;
            let (_, taken) = tx.send_on_lane((kind, src, dst), 0, &[&[body]]);
            match taken {
                Taken::Yes => return OK,
                Taken::No if tx.must_ask_for_lane((kind, src, dst)) => {
                    if !self.ask_for(from, (kind, src, dst)) {
                        break;
                    }
                }
                Taken::No | Taken::Full => break,
                Taken::Unknown => panic!("nobody died"),
            }
        }
        let texts = [src, dst].map(|text| str::from_utf8(text).unwrap());
        self.send(from, kind, (texts[0], texts[1]), body, 0)
    }

    fn ask(&mut self, from: u64, src: &str, dst: &str) -> bool {
        self.ask_for(from, route(UNICAST, src, dst))
    }

    pub(super) fn ask_for(&mut self, from: u64, route: Route<'_>) -> bool {
        let tx = &mut self.client(from).tx;
        let question = tx.ask_for_lane(route).unwrap();
        let question = question.expect("room for a question");
        self.serve();
        let tx = &mut self.client(from).tx;
        assert!(tx.settled(question.end).unwrap());
        let granted = tx.verdict(question.pos) == OK;
        if granted {
            tx.take_lane(route, question);
        }
        granted
    }

    /// Receives one record.
    pub(super) fn read(&mut self, id: u64) -> Option<Got> {
        let rx = &mut self.client(id).rx;
        let Some(record) = rx.peek().unwrap() else {
            rx.settle();
            return None;
        };
        let again = rx.peek().unwrap().unwrap();
        assert_eq!((record.lane, record.pos), (again.lane, again.pos));
        let h = record.header;
        let memory = rx.memory(&record);
        let mut body = vec![0; h.body_len as usize];
        memory.copy_body_out(record.body, record.in_arena, &mut body);
        let src = rx.writer(&record).map_or_else(
            || {
                let mut src = vec![0; h.src_len.into()];
                rx.memory(&record)
                    .copy_out(record.pos + RX_HEADER, &mut src);
                src
            },
            |writer| writer.src.to_vec(),
        );
        rx.take(&record, false);
        rx.settle();
        Some((h.kind, src, body, h.seq))
    }

    pub(super) fn bodies(&mut self, id: u64) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some((kind, _, body, _)) = self.read(id) {
            assert_eq!(kind, MESSAGE);
            all.push(body);
        }
        all
    }

    pub(super) fn count(&self, id: u64, name: &str) -> u64 {
        let counters = self.switch.counters(id).unwrap();
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }

    pub(super) fn lanes(&self) -> u64 {
        let ids = self
            .clients
            .keys()
            .filter(|id| self.switch.find(**id).is_some());
        ids.map(|id| self.count(*id, "lanes_out")).sum()
    }

    pub(super) fn subscribe(
        &mut self,
        id: u64,
        number: u64,
        topic: &str,
        overflow: Overflow,
    ) -> bool {
        let bus = self.switch.bus_mut(BUS).unwrap();
        let (bits, terms) = bus.required(topic.as_bytes()).unwrap();
        self.switch
            .subscribe(id, number, bits, Some(terms), overflow)
    }

    /// Two endpoints with a lane from the first to the second, on which one message lies.
    fn with_lane(quota: Quota) -> Self {
        let mut world = Self::with(4, quota);
        assert_eq!(world.tell(2, "", "1.3", b"first"), OK);
        assert_eq!(world.tell(2, "", "1.3", b"second"), OK);
        assert_eq!(world.lanes(), 1);
        world
    }

    /// What endpoint 2 can write of its lane.
    fn lane_memory(&mut self) -> Arc<Segment> {
        let tx = &mut self.client(2).tx;
        tx.lane_data(route(UNICAST, "", "1.3")).unwrap()
    }
}

#[test]
fn d11_the_second_message_goes_on_a_lane_and_the_switch_sees_none_of_them() {
    let mut w = World::with_lane(Quota::default());
    for n in 0..100u8 {
        assert_eq!(w.tell(2, "", "1.3", &[n]), OK);
    }
    assert_eq!(w.switch.endpoint(2).unwrap().stats.sent, 1, "by the switch");
    assert_eq!(w.count(2, "sent"), 102);
    assert_eq!(w.count(3, "received"), 102);
    let mut seen = 0;
    while let Some((kind, src, _, seq)) = w.read(3) {
        seen += 1;
        assert_eq!((kind, &src[..], seq), (MESSAGE, &b"1.2"[..], seen));
    }
    assert_eq!(seen, 102);
    // What the switch numbers next goes on from there.
    assert_eq!(w.send(2, UNICAST, ("", "1.4"), b"x", 0), OK);
    assert_eq!(w.read(4).unwrap().3, 103);
}

#[test]
fn d11_two_lanes_of_one_sender_are_read_in_its_order() {
    let mut w = World::with_lane(Quota::default());
    let mut expected = vec![b"first".to_vec(), b"second".to_vec()];
    for n in 0..100u8 {
        // What goes by the switch at first, to another address of the same receiver, closes the one lane; then both have one.
        let dst = ["1.3", "aka.3"][usize::from(n % 3 == 0)];
        assert_eq!(w.tell(2, "", dst, &[n]), OK);
        expected.push(vec![n]);
        assert!(n < 20 || w.lanes() == 2, "{n}");
        if n == 50 {
            // What lies in both is read up to here, and then more of each.
            for body in expected.drain(..30) {
                assert_eq!(w.read(3).unwrap().2, body);
            }
        }
    }
    assert_eq!(w.bodies(3), expected);
    // One of them is closed, and the other is not: what is in both is still in order.
    assert_eq!(w.tell(2, "", "1.3", b"x"), OK);
    assert_eq!(w.tell(2, "", "aka.3", b"y"), OK);
    assert_eq!(w.tell(2, "", "1.3", b"z"), OK);
    assert!(!w.ask(2, "", "aka.3"), "there is one");
    assert_eq!(w.lanes(), 1);
    assert_eq!(w.bodies(3), [b"x".to_vec(), b"y".to_vec(), b"z".to_vec()]);
}

#[test]
fn d11_a_lane_that_is_new_is_found_before_what_is_newer_is_read() {
    let mut w = World::with_lane(Quota::default());
    for _ in 0..1000 {
        w.bodies(3);
        assert_eq!(w.tell(2, "", "1.3", b"x"), OK);
        assert_eq!(w.tell(2, "", "aka.3", b"x"), OK);
    }
    w.switch
        .close_lane(w.switch.lanes.open.keys().max().copied().unwrap(), None);
    w.switch.publish();
    w.bodies(3);
    // The word of the new lane stands behind much of another sender.
    for n in 0..5u8 {
        assert_eq!(w.send(4, UNICAST, ("", "1.3"), &[n], 0), OK);
    }
    for n in 10..30u8 {
        let dst = ["aka.3", "1.3"][usize::from(n % 2)];
        assert_eq!(w.tell(2, "", dst, &[n]), OK);
    }
    assert_eq!(w.lanes(), 2);
    // The older one ends, and its end is behind the beginning of the newer one; and a third begins.
    let older = *w.switch.lanes.open.keys().min().unwrap();
    w.switch.close_lane(older, None);

    assert_eq!(w.tell(2, "", "aka.3", &[30]), OK);

    assert_eq!(w.tell(2, "", "1.3", &[31]), OK);
    assert_eq!(w.lanes(), 2, "a third");
    let mut seen = Vec::new();
    while let Some((_, src, body, _)) = w.read(3) {
        if src != b"1.4" {
            seen.push(body[0]);
        }
    }
    assert_eq!(seen, Vec::from_iter(10..32u8));
}

#[test]
fn d13_what_comes_by_the_switch_beside_a_lane_is_shown_at_once() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.bodies(3).len(), 2);
    assert_eq!(w.send(4, UNICAST, ("", "1.3"), b"of another", 0), OK);
    assert_eq!(w.bodies(3), [b"of another".to_vec()]);
}

#[test]
fn d17_credentials_are_those_of_the_agent() {
    let mut w = World::with(3, Quota::default());
    w.switch.endpoint_mut(3).unwrap().wants_ident = true;
    for body in [b"a", b"b"] {
        assert_eq!(w.tell(2, "aka.2", "1.3", body), OK);
    }
    assert!(w.read(3).is_some());
    let rx = &mut w.client(3).rx;
    let record = rx.peek().unwrap().unwrap();
    assert!(record.lane > 0);
    let h = record.header;
    assert_eq!((h.pid, h.uid, h.gid), (2, 1002, 7));
    let writer = rx.writer(&record).unwrap();
    assert_eq!((&*writer.src, &*writer.dst), (&b"aka.2"[..], &b"1.3"[..]));
    assert_eq!(&*writer.ident, b"ident 2");
    // Who asks for them later has no lane that does not tell them.
    w.switch.close_lanes(3, Side::In);
    assert_eq!(w.lanes(), 0);
}

#[test]
fn d11_what_needs_the_switch_has_no_lane() {
    let mut w = World::with(4, Quota::default());
    let ask = |w: &mut World, src: &str, dst: &str| w.ask(2, src, dst);
    assert!(!ask(&mut w, "", "nobody"), "an address that nobody owns");
    assert!(!ask(&mut w, "1.3", "1.3"), "a source of somebody else");
    assert!(!ask(&mut w, "", "1.2"), "itself");
    assert!(!ask(&mut w, "", ""), "the kernel");
    w.switch.bus_mut(BUS).unwrap().has_lanes = false;
    assert!(!ask(&mut w, "", "1.3"), "a bus of total order");
    w.switch.bus_mut(BUS).unwrap().has_lanes = true;
    let four = w.switch.find(4).unwrap();
    w.switch.bus_mut(BUS).unwrap().monitors.push(four);
    assert!(!ask(&mut w, "", "1.3"), "a monitor");
    w.switch.bus_mut(BUS).unwrap().monitors.clear();
    assert!(w.switch.set_reach(2, &["other.*"]));
    assert!(!ask(&mut w, "", "1.3"), "a policy");
    assert!(w.switch.set_reach(2, &["1.3"]));
    assert!(ask(&mut w, "", "1.3"));
    assert!(w.switch.set_reach(2, &["1.4"]));
    assert_eq!(w.lanes(), 0, "and a policy that was changed");
    w.switch.endpoint_mut(2).unwrap().silent = true;
    assert!(!ask(&mut w, "", "1.4"), "who was told to be silent");
    assert!(w.bodies(3).is_empty());
}

#[test]
fn d18_a_lane_is_charged_to_its_sender() {
    let mut w = World::with_lane(Quota::default());
    let used = w.switch.account(2);
    assert!(used.bytes >= RX as u64 / 4 && used.messages >= RX as u64 / 4 / 24);
    w.switch.close_lanes(2, Side::Out);
    assert_eq!(w.bodies(3).len(), 2);
    w.serve();
    assert!(!w.switch.over_quota(2, 1 << 29, 0, 0), "it is looked again");
    assert!(w.switch.over_quota(2, u64::MAX / 2, 0, 0));
    assert_eq!(w.switch.account(2), Account::default());
    let mut w = World::with(
        3,
        Quota {
            messages: 100,
            ..Quota::default()
        },
    );
    assert!(!w.ask(2, "", "1.3"), "more than it may have unread");
}

#[test]
fn d5_d7_a_lane_is_closed_before_an_address_is_taken() {
    let mut w = World::with_lane(Quota::default());
    assert!(w.switch.disown(3, b"1.3"));
    assert_eq!(w.lanes(), 0);
    assert_eq!(w.tell(2, "", "1.3", b"third"), -libc::EHOSTUNREACH);
    assert_eq!(w.bodies(3), [b"first".to_vec(), b"second".to_vec()]);
    let mut w = World::with_lane(Quota::default());
    assert!(w.switch.disown(2, b"1.2") && w.switch.disown(2, b"aka.2"));
    assert_eq!(w.tell(2, "", "1.3", b"third"), -libc::EHOSTUNREACH);
    assert_eq!(w.bodies(3).len(), 2);
}

#[test]
fn d15_a_notice_comes_behind_what_its_subject_has_sent() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    assert!(w.switch.remove_endpoint(2, w.now).is_empty());
    w.switch.notify(&[3], b"killed");
    let kinds: Vec<_> = std::iter::from_fn(|| w.read(3))
        .map(|g| (g.0, g.2))
        .collect();
    let expected = [
        (MESSAGE, b"first".to_vec()),
        (MESSAGE, b"second".to_vec()),
        (MESSAGE, b"third".to_vec()),
        (NOTICE, b"killed".to_vec()),
    ];
    assert_eq!(kinds, expected);
}

#[test]
fn d20_what_a_receiver_leaves_unread_is_told() {
    let mut w = World::with_lane(Quota::default());
    for n in 0..10u8 {
        assert_eq!(w.tell(2, "", "1.3", &[n]), OK);
    }
    for _ in 0..3 {
        w.read(3).unwrap();
    }
    assert_eq!(w.switch.remove_endpoint(3, w.now), [(2, 4, 12, 9)]);
    assert_eq!(w.tell(2, "", "1.3", b"late"), -libc::EHOSTUNREACH);
    // In the ring and on a lane: one row.
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.switch.remove_endpoint(3, w.now), [(2, 1, 2, 2)]);
}

#[test]
fn case5_a_sender_that_writes_on_is_not_read() {
    let mut w = World::with_lane(Quota::default());
    let memory = w.lane_memory();
    w.switch.close_lanes(2, Side::Out);
    let head = memory.head().load(Ordering::Relaxed);
    let mut record = [0u8; 32];
    record[0] = 32;
    memory.copy_in(head, &record);
    memory.head().store(head + 32, Ordering::Release);
    assert_eq!(w.send(2, UNICAST, ("", "1.3"), b"third", 0), OK);
    assert_eq!(w.bodies(3).len(), 3);
}

#[test]
fn case5_a_sender_that_takes_back_its_head_holds_up_nobody() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.bodies(3).len(), 2);
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    let memory = w.lane_memory();
    // The agent is told a lie, or the reader is.
    memory.head().store(1 << 20, Ordering::Relaxed);
    w.switch.close_lanes(2, Side::Out);
    memory.head().store(8, Ordering::Relaxed);
    assert_eq!(w.send(4, UNICAST, ("", "1.3"), b"of another", 0), OK);
    assert_eq!(w.bodies(3), [b"of another".to_vec()]);
}

#[test]
fn case5_a_lane_that_is_spoilt_is_given_up_and_nothing_else() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.bodies(3).len(), 2);
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    let memory = w.lane_memory();
    let tail = w.switch.lanes.only().1.readers[0]
        .cursor
        .tail()
        .load(Ordering::Relaxed);
    memory.copy_in(tail, &[3, 0, 0, 0]);
    assert!(w.bodies(3).is_empty());
    w.serve();
    assert_eq!((w.lanes(), w.switch.take_events()), (0, vec![]));
    assert_eq!(
        w.switch.take_unread_on_lanes(),
        [],
        "nobody can tell what it was"
    );
    assert_eq!(w.tell(2, "", "1.3", b"fourth"), OK);
    assert_eq!(w.bodies(3), [b"fourth".to_vec()]);
}

#[test]
fn d20_a_lane_that_its_receiver_cannot_read_is_told_of() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    let number = w.switch.lanes.only().0;
    let three = w.switch.find(3).unwrap();
    let io = w.switch.get_mut(three).unwrap().io.as_mut().unwrap();
    io.lane_calls.push((line::LANE_SPOILT, number));
    w.serve();
    assert_eq!(w.switch.take_unread_on_lanes(), [(2, 3, 2, 3, 2)]);
    // Nobody can say so of the lane of another.
    let mut w = World::with_lane(Quota::default());
    let number = w.switch.lanes.only().0;
    for id in [2, 4] {
        let who = w.switch.find(id).unwrap();
        let io = w.switch.get_mut(who).unwrap().io.as_mut().unwrap();
        io.lane_calls.push((line::LANE_SPOILT, number));
    }
    w.serve();
    assert_eq!(w.lanes(), 1);
}

#[test]
fn d12_a_full_lane_is_for_the_switch_to_judge() {
    let mut w = World::with_lane(Quota::default());
    let mut sent = 2;
    while w.tell(2, "", "1.3", &[0; 1000]) == OK {
        sent += 1;
        assert!(sent < 1000);
    }
    assert!(sent > RX / 2 / 1100, "the lane, and then the ring");
    assert_eq!(w.bodies(3).len(), sent);
}

#[test]
fn d12_nobody_waits_for_room_in_a_lane_that_is_closed() {
    let mut w = World::with_lane(Quota::default());
    let body: &[&[u8]] = &[&[0; 1000]];
    while matches!(
        w.client(2)
            .tx
            .send_on_lane((UNICAST, b"", b"1.3"), 0, &[body])
            .1,
        Taken::Yes
    ) {}
    let taken = w
        .client(2)
        .tx
        .send_on_lane((UNICAST, b"", b"1.3"), 0, &[body])
        .1;
    assert!(matches!(taken, Taken::Full));
    w.switch.close_lanes(3, Side::In);
    let taken = w
        .client(2)
        .tx
        .send_on_lane((UNICAST, b"", b"1.3"), 0, &[body])
        .1;
    assert!(matches!(taken, Taken::No));
    // Who has not read what came before is given no new one.
    assert_eq!(w.send(2, UNICAST, ("", "1.3"), &[0; 20_000], 0), OK);
    assert!(!w.ask(2, "", "1.3"));
    assert!(w.bodies(3).len() > 10 && w.ask(2, "", "1.3"));
}

#[test]
fn d11_nothing_goes_through_an_idle_lane_and_it_is_taken_back() {
    let mut w = World::with_lane(Quota::default());
    for (seconds, left) in [(11, 1), (22, 0)] {
        let at = w.switch.next_timer().unwrap();
        w.now += Duration::from_secs(11);
        assert!(at <= w.now, "after {seconds} s");
        w.switch.handle_timer(w.now);
        assert_eq!(w.lanes(), left);
    }
    assert_eq!(
        w.switch.next_timer(),
        None,
        "and nobody wakes for it any more"
    );
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    assert_eq!(w.bodies(3).len(), 3);
}

#[test]
fn d16_what_was_written_is_read_when_the_agent_is_gone() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    w.switch = Switch::default();
    assert_eq!(w.read(3).unwrap().2, b"first");
    w.client(3).rx.look().unwrap();
    assert_eq!(w.bodies(3).len(), 2);
    w.client(3).rx.look().unwrap();
    assert!(w.client(3).rx.is_hung_up());
    // The sender has not noticed yet. What it writes now would be read by nobody, so it is not accepted.
    let tx = &mut w.client(2).tx;
    let (count, taken) = tx.send_on_lane((UNICAST, b"", b"1.3"), 0, &[&[b"fourth"]]);
    assert!(count == 0 && matches!(taken, Taken::No));
    assert!(w.bodies(3).is_empty());
}

#[test]
fn d18_nobody_has_lanes_without_end() {
    let mut w = World::with(70, Quota::default());
    let granted = (3..=70).filter(|n| w.ask(2, "", &format!("1.{n}"))).count();
    assert_eq!(granted, 64);
    w.switch.close_lanes(2, Side::Out);
    let again = (0..200).filter(|_| {
        w.switch.close_lanes(2, Side::Out);
        w.ask(2, "", "1.3")
    });
    assert!(again.count() <= 64, "128 questions a second");
    w.now += Duration::from_secs(2);
    assert!(w.ask(2, "", "1.4"));
}

/// What multicasts are about: nobody but the sender is left out of what two others hear.
const TOPICS: [&str; 3] = ["a.x", "a.y", "b"];

#[derive(Debug, Clone)]
enum Step {
    /// From, source, destination, bytes.
    Tell(u64, u8, u64, u8, usize),
    /// From, topic.
    Cast(u64, u8),
    /// Who begins to hear a topic, or no longer does.
    Hear(u64, u8),
    Request(u64, u64),
    Read(u64, u8),
    Close(u64),
    Loan(u64),
    Poll(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let who = || 2u64..=4;
    prop_oneof![
        12 => (who(), 0u8..3, who(), 0u8..2, 8usize..1500).prop_map(|(a, s, b, d, n)| Step::Tell(a, s, b, d, n)),
        6 => (who(), 0u8..3).prop_map(|(a, t)| Step::Cast(a, t)),
        1 => (who(), 0u8..3).prop_map(|(a, t)| Step::Hear(a, t)),
        1 => (who(), who()).prop_map(|(a, b)| Step::Request(a, b)),
        8 => (who(), 1u8..20).prop_map(|(a, n)| Step::Read(a, n)),
        1 => who().prop_map(Step::Close),
        2 => who().prop_map(Step::Loan),
        2 => who().prop_map(Step::Poll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever goes which way: each receiver reads of each sender what was accepted, in its order, once, from the right source.
    #[test]
    fn d11_d13_both_ways_are_one_queue_for_each_sender(steps in prop::collection::vec(step(), 1..300)) {
        let mut w = World::with(4, Quota::default());
        let mut heard = [vec![], vec![], vec![]];
        for (topic, who) in heard.iter_mut().enumerate() {
            for id in (2..=4u64).filter(|id| *id as usize != topic + 2) {
                prop_assert!(w.subscribe(id, 10 * topic as u64 + id, TOPICS[topic], Overflow::Block(1000)));
                who.push(id);
            }
        }
        let mut expected = Expected::new();
        let mut loans: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        let mut number = 0u64;
        let read = |w: &mut World, id: u64, expected: &mut Expected| {
            let Some((kind, src, body, seq)) = w.read(id) else { return Ok(false) };
            prop_assert_eq!(kind, MESSAGE);
            let text = String::from_utf8(src.clone()).unwrap();
            let from: u64 = text.rsplit('.').next().unwrap().parse().unwrap();
            let (want_src, want) = expected.get_mut(&(from, id)).and_then(VecDeque::pop_front).expect("a message that was sent");
            prop_assert_eq!(&body[..8], want.to_le_bytes());
            prop_assert_eq!(src, want_src);
            prop_assert!(seq > 0);
            Ok(true)
        };
        for step in steps {
            number += 1;
            let mut body = number.to_le_bytes().to_vec();
            match step {
                Step::Tell(from, src, to, dst, bytes) => {
                    body.resize(bytes, 0);
                    let source = ["".to_owned(), format!("1.{from}"), format!("aka.{from}")][usize::from(src)].clone();
                    let dst = [format!("1.{to}"), format!("aka.{to}")][usize::from(dst)].clone();
                    match w.tell(from, &source, &dst, &body) {
                        OK => {
                            let shown = if source.is_empty() { format!("1.{from}") } else { source };
                            expected.entry((from, to)).or_default().push_back((shown.into_bytes(), number));
                        }
                        verdict => prop_assert_eq!(verdict, -libc::EAGAIN),
                    }
                }
                Step::Cast(from, topic) => match w.say(from, route(TERMS, "", TOPICS[usize::from(topic)]), &body) {
                    OK => for to in 2..=4 {
                        if heard[usize::from(topic)].contains(&to) {
                            expected.entry((from, to)).or_default().push_back((format!("1.{from}").into_bytes(), number));
                        }
                    },
                    verdict => prop_assert_eq!(verdict, -libc::EAGAIN),
                },
                Step::Hear(id, topic) => {
                    let (who, name) = (&mut heard[usize::from(topic)], TOPICS[usize::from(topic)]);
                    let match_number = 10 * u64::from(topic) + id;
                    if who.contains(&id) {
                        who.retain(|one| *one != id);
                        prop_assert!(w.switch.unsubscribe(id, match_number));
                    } else {
                        who.push(id);
                        prop_assert!(w.subscribe(id, match_number, name, Overflow::Block(1000)));
                    }
                }
                Step::Request(from, to) => match w.send(from, UNICAST, ("", &format!("1.{to}")), &body, number) {
                    OK => expected.entry((from, to)).or_default().push_back((format!("1.{from}").into_bytes(), number)),
                    verdict => prop_assert_eq!(verdict, -libc::EAGAIN),
                },
                Step::Read(id, count) => for _ in 0..count {
                    if !read(&mut w, id, &mut expected)? { break }
                },
                Step::Close(id) => w.switch.close_lanes(id, Side::Both),
                Step::Loan(id) => {
                    // One is lent, and those lent before come back, the newest first.
                    let rx = &mut w.client(id).rx;
                    let out = loans.entry(id).or_default();
                    while let Some((lane, end)) = out.pop() { rx.give_back(lane, end) }
                    if let Some(record) = rx.peek().unwrap() {
                        let mut seen = [0; 8];
                        rx.memory(&record).copy_out(record.body, &mut seen);
                        let end = rx.take(&record, true);
                        out.push((record.lane, end));
                        let found = expected.iter_mut().find(|((_, to), queue)| {
                            *to == id && queue.front().is_some_and(|(_, n)| n.to_le_bytes() == seen)
                        });
                        prop_assert!(found.is_some());
                        found.unwrap().1.pop_front();
                    }
                    rx.settle();
                }
                Step::Poll(id) => {
                    w.client(id).rx.arm().unwrap();
                    w.serve();
                    // Whatever waits makes the line readable.
                    let rx = &mut w.client(id).rx;
                    if rx.peek().unwrap().is_some() {
                        prop_assert!(rx.is_readable());
                    }
                }
            }
        }
        for id in 2..=4 {
            for (lane, end) in loans.remove(&id).unwrap_or_default() {
                w.client(id).rx.give_back(lane, end);
            }
        }
        for _ in 0..3 {
            for id in 2..=4 {
                while read(&mut w, id, &mut expected)? {}
            }
            w.serve();
        }
        prop_assert!(expected.values().all(VecDeque::is_empty), "{:?}", expected);
        let sent: u64 = (2..=4).map(|id| w.count(id, "sent")).sum();
        let last: u64 = (2..=4).map(|id| w.clients[&id].memory.seq().load(Ordering::Relaxed)).sum();
        prop_assert_eq!(sent, last, "numbers without holes");
        w.switch.close_lanes(2, Side::Both);
        w.switch.close_lanes(3, Side::Both);
        for id in 2..=4 {
            prop_assert!(w.read(id).is_none());
        }
        w.serve();
        for id in 2..=4u32 {
            w.switch.over_quota(id, u64::MAX / 2, 0, 0);
            prop_assert_eq!(w.switch.account(id), Account::default());
        }
    }
}

#[test]
fn d13_the_line_of_a_reader_that_is_polled_tells_of_lanes() {
    let mut w = World::with_lane(Quota::default());
    let client::Waited::Ready = w.client(3).rx.sleep(Some(Instant::now())).unwrap() else {
        panic!("two messages wait");
    };
    assert_eq!(w.bodies(3).len(), 2);
    w.client(3).rx.arm().unwrap();
    assert!(!w.client(3).rx.is_readable());
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    w.serve();
    assert!(w.client(3).rx.is_readable());
    assert_eq!(w.bodies(3).len(), 1);
}

#[test]
fn case5_a_reader_cannot_make_its_sender_wait_at_the_bell() {
    let mut w = World::with_lane(Quota::default());
    let (fds, _) = w.client(3).rx.fds().unwrap();
    let bell = fds.last().unwrap().as_raw_fd();
    // SAFETY: plain calls on an open descriptor, with bytes that live for the call.
    unsafe {
        libc::fcntl(bell, libc::F_SETFL, 0);
        let full = (u64::MAX - 1).to_ne_bytes();
        libc::write(bell, full.as_ptr().cast(), full.len());
    }
    let cursor = &w.switch.lanes.only().1.readers[0].cursor;
    cursor
        .reader_sleeps()
        .store(crate::lane_out::ASLEEP, Ordering::Relaxed);
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = done.send(w.tell(2, "", "1.3", b"third"));
    });
    assert_eq!(is_done.recv_timeout(Duration::from_secs(30)), Ok(OK));
}

#[test]
fn d8_who_reads_no_more_cannot_see_what_is_sent_later() {
    let mut w = World::with_lane(Quota::default());
    let data = w.lane_memory();
    w.switch.close_lanes(3, Side::In);
    let end = data.head().load(Ordering::Relaxed);
    assert_eq!(w.tell(2, "", "1.3", b"a secret"), OK);
    let mut seen = [0u8; 64];
    data.copy_out(end, &mut seen);
    assert_eq!(
        seen, [0; 64],
        "nothing was put there, not even for a moment"
    );
}

#[test]
fn d16_a_lane_that_the_agent_was_closing_when_it_died_is_read() {
    let mut w = World::with_lane(Quota::default());
    w.bodies(3);
    assert_eq!(w.tell(2, "", "1.3", b"third"), OK);
    let gate = w.switch.lanes.only().1.board.gate();
    gate.state.store(1, Ordering::Relaxed);
    assert_eq!(w.read(3), None, "whether it counts is about to be said");
    w.switch = Switch::default();
    assert_eq!(w.bodies(3), [b"third".to_vec()]);
    let rx = &mut w.client(3).rx;
    assert_eq!(rx.sleep(Some(Instant::now())), Ok(client::Waited::Gone));
}

#[test]
fn case5_nobody_waits_for_a_record_that_goes_beyond_the_end() {
    let mut w = World::with_lane(Quota::default());
    w.bodies(3);
    let data = w.lane_memory();
    let head = data.head().load(Ordering::Relaxed);
    data.put_words(head, [48, 3, 0]);
    data.head().store(head + 8, Ordering::Release);
    assert_eq!(
        w.switch.lanes.only().1.board.gate().close(data.head()),
        head + 8
    );
    data.head().store(head + 48, Ordering::Release);
    w.switch = Switch::default();
    assert_eq!(w.read(3), None);
    let rx = &mut w.client(3).rx;
    rx.look().unwrap();
    assert_eq!(rx.sleep(Some(Instant::now())), Ok(client::Waited::Gone));
}
