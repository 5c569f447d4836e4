//! Tests of trunks: two switches without threads, whose batches are passed by hand, lost, doubled and spoilt.

use super::tests::{BUS, Bench, Got, SMALL, Tx, bodies, cast, to};
use super::*;
use crate::bus::Overflow;
use crate::frame::GAP;
use crate::trunk_out::{DESTINATIONS, EGRESS_BYTES, FIRST_WINDOW, WINDOW};
use crate::trunk_wire::{BATCH_HEADER, Batch, Broken, Record};
use std::collections::BTreeMap;

/// Number of the bus in the cluster, and of each node.
const NUMBER: u32 = 77;
const A: u64 = 1;
const B: u64 = 2;

/// Two nodes: the master (endpoint 1) and endpoints 2, 3.. on A, endpoints 12, 13.. on B. Blocks bear the numbers of their nodes.
struct World {
    a: Bench,
    b: Bench,
    /// Largest batch.
    batch: usize,
}

impl World {
    fn new(on_a: u64, on_b: u64) -> Self {
        let node = |name: &'static str| {
            let mut bench = Bench::new(Quota::default());
            bench.node = name;
            assert!(bench.switch.set_bus_number(BUS, NUMBER));
            bench
        };
        let mut w = Self {
            a: node("a"),
            b: node("b"),
            batch: 64 << 10,
        };
        assert!(w.a.switch.add_trunk(B, b"b") && w.b.switch.add_trunk(A, b"a"));
        assert!(w.a.switch.route_block(B, Some(B)) && w.b.switch.route_block(A, Some(A)));
        assert!(w.a.switch.route_block(A, None) && w.b.switch.route_block(B, None));
        w.a.switch.trunk_mut(B).unwrap().carries_bodies = true;
        w.a.open(1, 1 << 16);
        let master = w.a.switch.find(1);
        assert!(w.a.switch.set_master(BUS, master));
        assert!(w.a.switch.own(1, b"master"));
        assert!(w.b.switch.set_master_away(BUS, Some((A, b"master"))));
        assert!(w.b.switch.route(BUS, b"master", Some(A)));
        for id in 2..2 + on_a {
            w.a.open(id, SMALL);
            assert!(w.a.switch.own(id, format!("1.{id}").as_bytes()));
        }
        for id in 12..12 + on_b {
            w.b.open(id, SMALL);
            assert!(w.b.switch.own(id, format!("2.{id}").as_bytes()));
        }
        w
    }

    /// A subscription of an endpoint of B, and the one of its node at A.
    fn subscribe_b(&mut self, id: u64, number: u64, topic: &str, overflow: Overflow) {
        self.b.subscribe(id, number, topic, overflow);
        let (bits, terms) = self
            .a
            .switch
            .bus_mut(BUS)
            .unwrap()
            .required(topic.as_bytes())
            .unwrap();
        assert!(
            self.a
                .switch
                .subscribe_trunk(B, BUS, number, bits, Some(terms))
        );
    }

    fn take_a(&mut self) -> Vec<u8> {
        let most = self.batch;
        self.a.switch.trunk_mut(B).unwrap().take_batch(most)
    }

    fn take_b(&mut self) -> Vec<u8> {
        let most = self.batch;
        self.b.switch.trunk_mut(A).unwrap().take_batch(most)
    }

    fn give_b(&mut self, batch: &[u8]) -> Result<(), Broken> {
        self.b.switch.inject(A, batch, self.b.now)
    }

    fn give_a(&mut self, batch: &[u8]) -> Result<(), Broken> {
        self.a.switch.inject(B, batch, self.a.now)
    }

    /// Carries everything, until nobody has anything to say.
    fn carry(&mut self) {
        loop {
            let (one, other) = (self.take_a(), self.take_b());
            if one.is_empty() && other.is_empty() {
                return;
            }
            if !one.is_empty() {
                self.give_b(&one).unwrap();
            }
            if !other.is_empty() {
                self.give_a(&other).unwrap();
            }
        }
    }

    /// The link was cut: whatever was on its way is lost, and both go on from what has come.
    fn cut(&mut self) {
        let at_b = self.b.switch.trunk(A).unwrap().inn.received();
        let at_a = self.a.switch.trunk(B).unwrap().inn.received();
        self.a.switch.rewind_trunk(B, at_b).unwrap();
        self.b.switch.rewind_trunk(A, at_a).unwrap();
    }

    fn is_quiet(&self) -> bool {
        self.a.switch.trunk(B).unwrap().is_idle() && self.b.switch.trunk(A).unwrap().is_idle()
    }
}

fn numbers(got: &[Got]) -> Vec<u64> {
    got.iter().map(|g| g.h.seq).collect()
}

fn request(dst: &str, serial: u64) -> Tx {
    Tx {
        flags: EXPECT_REPLY,
        serial,
        deadline_ms: 1000,
        ..to(dst, b"question")
    }
}

fn answer(dst: &str, reply_to: u64) -> Tx {
    Tx {
        reply_to,
        ..to(dst, b"answer")
    }
}

/// Endpoint, first, last, count, errno, address.
type Unread<'a> = (u64, u64, u64, u64, u32, &'a [u8]);

fn unread(events: &[LaneEvent]) -> Vec<Unread<'_>> {
    events
        .iter()
        .filter_map(|event| match event {
            LaneEvent::Unread {
                endpoint,
                first,
                last,
                count,
                errno,
                address,
            } => Some((*endpoint, *first, *last, *count, *errno, &**address)),
            _ => None,
        })
        .collect()
}

// ---- messages --------------------------------------------------------------------------------------------------------

#[test]
fn d11_unicasts_and_multicasts_of_a_sender_arrive_in_its_order() {
    let mut w = World::new(2, 2);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    w.subscribe_b(13, 2, "a", Overflow::Gap);
    assert!(w.b.switch.own(12, b"name") && w.a.switch.route(BUS, b"name", Some(B)));
    for n in 0..10u8 {
        assert_eq!(w.a.send(2, &cast("a", &[n, 0])), OK);
        assert_eq!(w.a.send(2, &to("2.12", &[n, 1])), OK);
        assert_eq!(w.a.send(2, &to("name", &[n, 2])), OK);
    }
    w.carry();
    let got = w.b.read(12);
    let want: Vec<Vec<u8>> = (0..10)
        .flat_map(|n| (0..3).map(move |k| vec![n, k]))
        .collect();
    assert_eq!(bodies(&got), want);
    assert_eq!(numbers(&got), (1..=30).collect::<Vec<_>>());
    assert!(got.iter().all(|g| g.src == b"1.2"));
    assert_eq!(got[2].dst, b"name");
    assert_eq!(
        w.b.read(13).len(),
        10,
        "one copy for the node, one for each subscriber"
    );
    let sent = w.a.switch.trunk(B).unwrap().out.bytes();
    assert_eq!(sent, w.a.switch.trunk(B).unwrap().out.bytes());
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    assert!(w.is_quiet());
}

#[test]
fn d17_a_remote_sender_has_no_local_credentials() {
    let mut w = World::new(1, 2);
    w.b.switch.endpoint_mut(13).unwrap().wants_ident = true;
    for dst in ["2.12", "2.13"] {
        assert_eq!(w.a.send(2, &to(dst, b"x")), OK);
    }
    w.carry();
    let (plain, with) = (w.b.read(12), w.b.read(13));
    assert_eq!(
        (plain[0].h.pid, plain[0].h.uid, plain[0].h.gid),
        (0, 65_534, 65_534)
    );
    assert!(plain[0].ident.is_empty());
    assert_eq!(with[0].ident, super::tests::ident_of(2, "a"));
}

#[test]
fn d7_errnos_across_nodes() {
    let mut w = World::new(1, 1);
    assert_eq!(
        w.a.send(2, &to("3.1", b"")),
        -libc::EHOSTUNREACH,
        "nobody's block"
    );
    assert_eq!(w.a.send(2, &to("2", b"")), -libc::EHOSTUNREACH);
    assert_eq!(
        w.a.send(2, &to("@2.12", b"")),
        -libc::EHOSTUNREACH,
        "not the master"
    );
    assert_eq!(w.a.send(2, &to("2.12", &[0; 60_000])), OK);
    assert_eq!(w.a.send(2, &to("2.12", &[0; 60_000])), OK);
    assert_eq!(
        w.b.send(12, &to("nobody", b"")),
        OK,
        "it goes to the master"
    );
    // A dead unique address is accepted once, and then known.
    assert_eq!(w.a.send(2, &to("2.99", b"")), OK);
    w.carry();
    let events = w.a.switch.take_lane_events();
    let want = [(2, 3, 3, 1, libc::EHOSTUNREACH as u32, &b"2.99"[..])];
    assert!(unread(&events).contains(&want[0]), "{events:?}");
    assert_eq!(w.a.send(2, &to("2.99", b"")), -libc::EHOSTUNREACH);
    w.b.open(99, SMALL);
    assert!(w.b.switch.own(99, b"2.99"));
    w.carry();
    assert_eq!(w.a.send(2, &to("2.99", b"")), OK, "it was nobody's yet");
    // Too large for the ring there.
    let unread = unread(&events);
    let too_big = unread.iter().filter(|u| u.4 == libc::EMSGSIZE as u32);
    assert_eq!(too_big.map(|u| u.3).sum::<u64>(), 2);
    // A node that is lost.
    assert!(w.a.switch.set_down(B, true));
    for dst in ["2.12", "2.13"] {
        assert_eq!(w.a.send(2, &to(dst, b"")), -libc::EHOSTDOWN);
    }
    assert!(w.a.switch.set_down(B, false));
    assert_eq!(w.a.send(2, &to("2.12", b"")), OK);
    assert!(w.b.switch.set_down(A, true));
    assert_eq!(w.b.send(12, &to("nobody", b"")), -libc::EHOSTDOWN);
    assert!(w.b.switch.set_master_away(BUS, None) && w.b.switch.route(BUS, b"master", None));
    assert_eq!(w.b.send(12, &to("master", b"")), -libc::EHOSTDOWN);
}

#[test]
fn d7_descriptors_do_not_travel() {
    let mut w = World::new(1, 1);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    let (file, _) = line::pair().unwrap();
    w.a.packet(2, &[line::FDS], &[file.as_raw_fd()]);
    let with = |tx: Tx| Tx { fds: 1, ..tx };
    assert_eq!(w.a.send(2, &with(to("2.12", b"x"))), -libc::EOPNOTSUPP);
    let memfd = sealed(&[0; 16]);
    w.a.packet(2, &[line::FDS], &[file.as_raw_fd(), memfd.as_raw_fd()]);
    let both = Tx {
        fds: 2,
        flags: BODY_IN_MEMFD,
        outside: 16,
        ..to("2.12", b"")
    };
    assert_eq!(w.a.send(2, &both), -libc::EOPNOTSUPP);
    w.a.switch.trunk_mut(B).unwrap().carries_bodies = false;
    for tx in [to("2.12", b""), cast("a", b"")] {
        assert_eq!(w.send_body(2, tx, &[0; 16]), -libc::EOPNOTSUPP);
    }
    w.carry();
    assert!(w.b.read(12).is_empty());
}

#[test]
fn r1_who_has_not_joined_talks_to_the_master_across() {
    let mut w = World::new(1, 1);
    w.b.add(20);
    let who = w.b.switch.find(20).unwrap();
    w.b.switch.set_provisional(20, b"@2.20");
    w.b.connect(20, SMALL);
    assert_eq!(w.b.send(20, &to("1.2", b"")), -libc::EHOSTUNREACH);
    assert_eq!(w.b.send(20, &to("nobody", b"")), -libc::EHOSTUNREACH);
    assert_eq!(w.b.send(20, &request("master", 5)), OK);
    w.carry();
    let got = w.a.read(1);
    assert_eq!(
        (&got[0].src[..], &got[0].dst[..], got[0].h.serial),
        (&b"@2.20"[..], &b"master"[..], 5)
    );
    assert_eq!(
        w.a.send(2, &answer("@2.20", 5)),
        -libc::EHOSTUNREACH,
        "only the master"
    );
    assert_eq!(w.a.send(1, &answer("@2.20", 5)), OK);
    w.carry();
    assert_eq!(bodies(&w.b.read(20)), [b"answer"]);
    assert_eq!(w.b.switch.get(who).unwrap().requests, 0);
    assert_eq!(
        w.a.switch
            .find(1)
            .and_then(|m| w.a.switch.get(m))
            .unwrap()
            .unanswered
            .len(),
        0
    );
}

#[test]
fn d5_control_items_come_behind_what_was_sent_before() {
    let mut w = World::new(1, 1);
    for n in 0..3 {
        assert_eq!(w.a.send(1, &to("2.12", &[n])), OK);
    }
    let now = w.a.now;
    let sent =
        w.a.switch
            .deliver_away(1, B, b"master", b"2.12", b"items   ", b"3", 0, 0, None, now);
    assert_eq!(sent, Ok(()));
    assert_eq!(w.a.send(1, &to("2.12", b"4")), OK);
    w.carry();
    let got = w.b.read(12);
    assert_eq!(numbers(&got), [1, 2, 3, 4, 5]);
    assert_eq!((got[3].h.ctl_len, &got[3].body[..]), (8, &b"3"[..]));
    let far =
        w.a.switch
            .deliver_away(1, 9, b"master", b"2.12", b"i", b"", 0, 0, None, now);
    assert_eq!(far, Err(libc::EHOSTUNREACH));
    // Items of whoever has not the master are a forgery.
    w.a.switch
        .deliver_away(2, B, b"1.2", b"2.12", b"items   ", b"", 0, 0, None, now)
        .unwrap();
    assert!(w.b.switch.set_master_away(BUS, None));
    let batch = w.take_a();
    assert!(matches!(w.give_b(&batch), Err(Broken::Forged(_))));
    assert!(w.b.read(12).is_empty());
}

#[test]
fn d7_names_without_an_owner_go_to_the_master_across() {
    let mut w = World::new(1, 2);
    assert_eq!(w.b.send(12, &to("org.name", b"1")), OK);
    w.carry();
    let got = w.a.read(1);
    assert_eq!(
        (&got[0].src[..], &got[0].dst[..]),
        (&b"2.12"[..], &b"org.name"[..])
    );
    // The name has gone while a message was on its way to it.
    assert!(w.b.switch.own(13, b"org.name") && w.a.switch.route(BUS, b"org.name", Some(B)));
    assert_eq!(w.a.send(2, &to("org.name", b"2")), OK);
    assert!(w.b.switch.disown(13, b"org.name"));
    w.carry();
    let events = w.a.switch.take_lane_events();
    assert_eq!(unread(&events)[0].4, libc::EHOSTUNREACH as u32);
    assert!(w.a.switch.route(BUS, b"org.name", None));
    assert_eq!(w.a.send(2, &to("org.name", b"3")), OK);
    assert_eq!(bodies(&w.a.read(1)), [b"3"]);
}

// ---- sources ---------------------------------------------------------------------------------------------------------

#[test]
fn d6_a_forged_source_is_refused() {
    // A owns block 1 only. What it says of others is refused, however it says it.
    let mut w = World::new(2, 2);
    for (src, is_fatal) in [
        ("2.12", true),
        ("3.1", true),
        ("@2.12", true),
        ("9.9", false),
        ("name.of.b", false),
    ] {
        let mut w = World::new(2, 2);
        assert!(w.b.switch.add_trunk(3, b"c") && w.b.switch.route_block(3, Some(3)));
        assert!(w.a.switch.own(2, src.as_bytes()), "the switch of A lies");
        assert!(w.b.switch.own(12, b"name.of.b"));
        let forged = Tx {
            src: src.into(),
            ..to("2.13", b"forged")
        };
        assert_eq!(w.a.send(2, &forged), OK);
        let batch = w.take_a();
        let taken = w.give_b(&batch);
        assert_eq!(
            matches!(taken, Err(Broken::Forged(_))),
            is_fatal,
            "{src}: {taken:?}"
        );
        assert!(w.b.read(13).is_empty());
        if !is_fatal {
            let event = LaneEvent::Source(A, src.as_bytes().into());
            assert!(w.b.switch.take_lane_events().contains(&event));
            w.carry();
            let events = w.a.switch.take_lane_events();
            assert_eq!(unread(&events)[0].4, libc::EADDRNOTAVAIL as u32);
            assert_eq!(w.a.send(3, &to("2.13", b"honest")), OK);
            w.carry();
            assert_eq!(bodies(&w.b.read(13)), [b"honest"]);
        }
    }
    // An identity of another node.
    w.a.node = "b";
    w.a.open(9, SMALL);
    assert!(w.a.switch.own(9, b"1.9"));
    assert_eq!(w.a.send(9, &to("2.12", b"x")), OK);
    let batch = w.take_a();
    assert!(matches!(w.give_b(&batch), Err(Broken::Forged(_))));
}

#[test]
fn d6_a_source_is_checked_again_when_the_table_changes() {
    let mut w = World::new(1, 1);
    assert!(w.a.switch.own(2, b"name"));
    assert!(w.b.switch.route(BUS, b"name", Some(A)));
    let named = Tx {
        src: b"name".into(),
        ..to("2.12", b"x")
    };
    assert_eq!(w.a.send(2, &named), OK);
    w.carry();
    assert_eq!(w.b.read(12).len(), 1);
    assert!(w.b.switch.route(BUS, b"name", None));
    assert_eq!(w.a.send(2, &named), OK);
    w.carry();
    assert!(w.b.read(12).is_empty());
    assert_eq!(unread(&w.a.switch.take_lane_events()).len(), 1);
}

// ---- room ------------------------------------------------------------------------------------------------------------

#[test]
fn d12_a_stalled_receiver_holds_up_nobody_else() {
    let mut w = World::new(2, 2);
    let message = to("2.12", &[1; 1000]);
    let mut taken = 0;
    loop {
        let verdict = w.a.send(2, &message);
        w.carry();
        if verdict == -libc::EAGAIN {
            break;
        }
        taken += 1;
        assert!(taken < 10_000, "never full");
    }
    let held = w.b.switch.trunk(A).unwrap().inn.held;
    assert!(held > 0 && held < FIRST_WINDOW, "{held} bytes are held");
    // The other sender has its share, and the other receiver all its own.
    assert_eq!(w.a.send(3, &message), OK);
    for n in 0..100u8 {
        assert_eq!(w.a.send(2, &to("2.13", &[n])), OK);
        w.carry();
        assert_eq!(bodies(&w.b.read(13)), [[n]]);
    }
    let room = w.a.room(2);
    let mut got = Vec::new();
    loop {
        let some = w.b.read_up_to(12, 1);
        if some.is_empty() {
            break;
        }
        got.extend(some);
        w.carry();
    }
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    assert_eq!(w.a.room(2), room + 1, "who waits is told once");
    assert_eq!(got.iter().filter(|g| g.src == b"1.2").count(), taken);
    assert_eq!(got.iter().filter(|g| g.src == b"1.3").count(), 1);
    assert_eq!(w.b.switch.trunk(A).unwrap().inn.held, 0);
    assert_eq!(w.a.send(2, &message), OK);
    assert_eq!(
        w.a.account(2).messages,
        1,
        "credit that came back is given back"
    );
}

#[test]
fn d12_a_receiver_that_is_away_gets_it_when_it_is_back() {
    let mut w = World::new(1, 0);
    w.b.add(12);
    assert!(w.b.switch.own(12, b"2.12"));
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    assert_eq!(w.a.send(2, &to("2.12", b"1")), OK);
    assert_eq!(w.a.send(2, &cast("a", b"2")), OK);
    assert_eq!(w.a.send(2, &to("2.12", &[3; 5000])), OK);
    assert_eq!(w.a.send(2, &to("2.12", b"4")), OK);
    w.carry();
    w.b.connect(12, SMALL);
    let got = w.b.read(12);
    assert_eq!(numbers(&got), [1, 2, 3, 4]);
    assert_eq!(
        got[2].gap(),
        (3, 3, 1, 1),
        "it does not fit into the ring that came"
    );
    w.carry();
    assert_eq!(
        unread(&w.a.switch.take_lane_events())[0].4,
        libc::EMSGSIZE as u32
    );
}

#[test]
fn d12_multicasts_behind_what_waits_stay_in_order_and_end_in_a_gap() {
    let mut w = World::new(1, 1);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    let big = to("2.12", &[1; 1500]);
    for _ in 0..4 {
        assert_eq!(w.a.send(2, &big), OK);
    }
    for _ in 0..1000 {
        assert_eq!(w.a.send(2, &cast("a", &[2; 1000])), OK);
        w.carry();
    }
    assert_eq!(w.a.send(2, &to("2.12", b"last")), OK);
    w.carry();
    let got = w.b.read(12);
    w.carry();
    let mut next = 1;
    for g in &got {
        if g.h.kind == GAP {
            let (first, last, count, reason) = g.gap();
            assert_eq!((first, count, reason), (next, last - first + 1, 1));
            next = last + 1;
        } else {
            assert_eq!(g.h.seq, next);
            next += 1;
        }
    }
    assert_eq!(next, 4 + 1000 + 1 + 1);
    let held = got.iter().filter(|g| g.body.len() == 1000).count();
    assert!((200..300).contains(&held), "{held} were held");
    assert_eq!(bodies(&got).last(), Some(&&b"last"[..]));
}

#[test]
fn d12_what_a_full_lane_drops_is_counted_exactly() {
    let mut w = World::new(2, 3);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    w.subscribe_b(13, 2, "b", Overflow::Gap);
    w.subscribe_b(14, 3, "a", Overflow::Gap);
    w.subscribe_b(14, 4, "b", Overflow::Gap);
    // The link is cut: nothing is taken. Every third message is for somebody else.
    let mut sent = BTreeMap::from([("a", Vec::new()), ("b", Vec::new())]);
    for n in 0..4000u64 {
        let topic = ["a", "b", "c"][n as usize % 3];
        assert_eq!(
            w.a.send(2, &cast(topic, &[0; 4096])),
            OK,
            "a multicast waits for nobody"
        );
        if let Some(numbers) = sent.get_mut(topic) {
            numbers.push(n + 1);
        }
    }
    assert!(w.a.switch.trunk(B).unwrap().out.bytes() <= EGRESS_BYTES);
    // A unicast waits behind the gap.
    assert_eq!(w.a.send(2, &to("2.12", &[0; 4096])), -libc::EAGAIN);
    let rooms = w.a.room(2);
    for id in 12..15 {
        w.b.connect(id, 1 << 24);
    }
    for _ in 0..300 {
        w.carry();
        w.b.pass(25);
    }
    assert_eq!(w.a.room(2), rooms + 1);
    assert_eq!(w.a.send(2, &to("2.12", b"x")), OK);
    w.carry();
    for (id, topics) in [(12, &["a"][..]), (13, &["b"]), (14, &["a", "b"])] {
        let want: Vec<u64> = {
            let mut all: Vec<u64> = topics.iter().flat_map(|t| sent[t].clone()).collect();
            all.sort_unstable();
            all
        };
        let got = w.b.read(id);
        let (gaps, rest): (Vec<_>, Vec<_>) = got.iter().partition(|g| g.h.kind == GAP);
        let casts: Vec<u64> = rest
            .iter()
            .filter(|g| g.h.flags & MULTICAST != 0)
            .map(|g| g.h.seq)
            .collect();
        let missed: Vec<u64> = want
            .iter()
            .copied()
            .filter(|n| !casts.contains(n))
            .collect();
        assert!(
            !missed.is_empty() && gaps.len() == 1,
            "{id}: {} missed, {} gaps, {} casts",
            missed.len(),
            gaps.len(),
            casts.len()
        );
        let told = gaps[0].gap();
        assert_eq!(
            told,
            (missed[0], *missed.last().unwrap(), missed.len() as u64, 1)
        );
        assert_eq!(casts.len() + missed.len(), want.len());
    }
}

#[test]
fn d12_more_streams_than_are_told_apart_become_one_gap() {
    let mut w = World::new(1, 2);
    w.subscribe_b(12, 1, "", Overflow::Gap);
    w.subscribe_b(13, 2, "x", Overflow::Gap);
    let (mut n, mut bytes) = (0, 0);
    loop {
        assert_eq!(w.a.send(2, &cast("full", &[0; 65_000])), OK);
        n += 1;
        let now = w.a.switch.trunk(B).unwrap().out.bytes();
        if std::mem::replace(&mut bytes, now) == now {
            break;
        }
    }
    let (before, topics) = (n, 100);
    for t in 0..topics {
        for _ in 0..3 {
            assert_eq!(w.a.send(2, &cast(&format!("topic.{t}"), &[0; 65_000])), OK);
            n += 1;
        }
    }
    for id in 12..14 {
        w.b.connect(id, 1 << 24);
    }
    w.carry();
    w.carry();
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    w.a.switch.handle_timer(w.a.now);
    w.carry();
    let got = w.b.read(12);
    let gaps: Vec<_> = got
        .iter()
        .filter(|g| g.h.kind == GAP)
        .map(Got::gap)
        .collect();
    assert_eq!(gaps[0].0, before);
    let last = gaps.last().unwrap();
    assert_eq!((last.1, last.2), (n, 0), "nobody knows how many");
    let other = w.b.read(13);
    assert_eq!(
        (other.len(), other[0].gap().2),
        (1, 0),
        "it may have been for this one too"
    );
}

#[test]
fn d12_senders_are_not_made_to_wait_by_subscribers_elsewhere() {
    let mut w = World::new(1, 2);
    w.subscribe_b(12, 1, "a", Overflow::Block(50));
    w.subscribe_b(13, 2, "a", Overflow::Conflate);
    for n in 0..600u64 {
        assert_eq!(w.a.send(2, &cast("a", &[0; 1000])), OK, "{n}");
        w.carry();
    }
    let got = w.b.read(12);
    let gap = got.last().unwrap().gap();
    assert_eq!(
        (gap.0, gap.1, gap.3),
        (got.len() as u64, 600, 2),
        "what was not held is told"
    );
    assert!(got.len() > 200);
    let newest = w.b.read(13);
    assert_eq!(newest.last().unwrap().h.seq, 600);
    assert!(newest.len() < 5);
}

#[test]
fn d12_disconnect_works_across() {
    let mut w = World::new(1, 1);
    w.subscribe_b(12, 1, "a", Overflow::Disconnect);
    for _ in 0..10 {
        assert_eq!(w.a.send(2, &cast("a", &[0; 1000])), OK);
    }
    w.carry();
    assert_eq!(w.b.switch.take_events(), [Event::TooSlow(12)]);
}

#[test]
fn d18_shares_of_a_destination_are_kept() {
    let mut w = World::new(2, 1);
    let message = to("2.12", &[1; 1000]);
    let (verdict, one) = w.a.fill(2, &message);
    assert_eq!(verdict, -libc::EAGAIN);
    let (verdict, two) = w.a.fill(3, &message);
    assert_eq!(verdict, -libc::EAGAIN);
    let most = FIRST_WINDOW / 1150;
    assert!((most / 2 - 10..=most / 2).contains(&one), "{one} of {most}");
    assert!(two >= most / 8, "{two} of {most}");
    assert_eq!(w.a.account(2).messages, one);
}

#[test]
fn d18_destinations_are_bounded_and_the_idle_ones_forgotten() {
    let mut w = World::new(1, 1);
    for n in 0..DESTINATIONS + 10 {
        let verdict = w.a.send(2, &to(&format!("2.{}", 1000 + n), b""));
        assert_eq!(verdict, OK, "{n}");
        if n % 64 == 0 {
            w.carry();
        }
    }
    w.carry();
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    assert!(w.a.switch.trunk(B).unwrap().out.destination_count() <= DESTINATIONS);
    // It was forgotten, so it is found out again.
    assert_eq!(w.a.send(2, &to("2.1000", b"")), OK);
    w.carry();
    assert_eq!(w.a.send(2, &to("2.1000", b"")), -libc::EHOSTUNREACH);
    let mut w = World::new(1, 1);
    for n in 0..DESTINATIONS {
        assert_eq!(w.a.send(2, &to(&format!("2.{}", 1000 + n), b"")), OK);
    }
    assert_eq!(w.a.send(2, &to("2.12", b"")), -libc::EDQUOT, "none is idle");
}

#[test]
fn d12_the_window_of_a_destination_grows_with_what_is_read() {
    let mut w = World::new(1, 2);
    let sent_to = |w: &mut World, dst: &str| {
        let mut sent = 0;
        while w.a.send(2, &to(dst, &[0; 3900])) == OK {
            sent += 1;
        }
        sent
    };
    // A sender has half of it at most: the next one finds room.
    let first = FIRST_WINDOW / 2 / 4100;
    assert!((first - 1..=first + 4).contains(&sent_to(&mut w, "2.12")));
    for _ in 0..40 {
        w.carry();
        w.b.read(13);
        sent_to(&mut w, "2.13");
    }
    let most = WINDOW / 2 / 4100;
    loop {
        w.carry();
        if w.b.read(13).is_empty() {
            break;
        }
    }
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    let grown = sent_to(&mut w, "2.13");
    assert!((most - 8..=most + 8).contains(&grown), "{grown} of {most}");
    assert!(
        sent_to(&mut w, "2.12") <= 1,
        "who reads nothing gets no more than what is in its ring"
    );
}

#[test]
fn d18_what_is_held_is_bounded() {
    let mut w = World::new(1, 1);
    // Many addresses of one receiver: each has a window of its own, together they have a limit.
    let names: Vec<String> = (0..600).map(|n| format!("name.{n}")).collect();
    for name in &names {
        assert!(w.b.switch.own(12, name.as_bytes()));
        assert!(w.a.switch.route(BUS, name.as_bytes(), Some(B)));
    }
    let mut sent = 0;
    for name in &names {
        while w.a.send(2, &to(name, &[0; 3900])) == OK {
            sent += 1;
        }
        w.carry();
        let held = w.b.switch.trunk(A).unwrap().inn.held;
        assert!(held <= 64 << 20, "{held}");
    }
    let refused: u64 = unread(&w.a.switch.take_lane_events())
        .iter()
        .map(|u| u.3)
        .sum();
    assert!(refused > 0, "what is too much is told");
    let mut got = 0;
    loop {
        let some = w.b.read(12).len() as u64;
        if some == 0 {
            break;
        }
        got += some;
        w.carry();
    }
    assert_eq!(got + refused, sent);
}

// ---- large bodies ----------------------------------------------------------------------------------------------------

/// A sealed memfd with these bytes.
fn sealed(bytes: &[u8]) -> OwnedFd {
    let fd = crate::memory::memfd(c"body").unwrap();
    std::io::Write::write_all(&mut std::fs::File::from(fd.try_clone().unwrap()), bytes).unwrap();
    crate::memory::seal(fd.as_fd(), BODY_SEALS).unwrap();
    fd
}

fn outside(tx: Tx, size: u32) -> Tx {
    Tx {
        fds: 1,
        flags: tx.flags | BODY_IN_MEMFD,
        outside: size,
        ..tx
    }
}

impl World {
    /// Publishes a message with a large body and returns its verdict.
    fn send_body(&mut self, id: u64, tx: Tx, body: &[u8]) -> i32 {
        let fd = sealed(body);
        self.a.packet(id, &[line::FDS], &[fd.as_raw_fd()]);
        self.a.send(id, &outside(tx, body.len() as u32))
    }

    /// Carries the bodies that wait at A, and says so. Returns their tickets.
    fn carry_bodies(&mut self) -> Vec<u32> {
        let events = self.a.switch.take_lane_events();
        let tickets = events.iter().filter_map(|event| match event {
            LaneEvent::Body {
                trunk: B,
                ticket,
                size,
            } => Some((*ticket, *size)),
            _ => None,
        });
        let tickets: Vec<(u32, u32)> = tickets.collect();
        for (ticket, size) in &tickets {
            let body = self.a.switch.parked_body(B, *ticket).unwrap();
            assert_eq!(file_size(body.as_fd()).unwrap(), u64::from(*size));
            assert!(self.b.switch.put_body(A, *ticket, body));
            self.a.switch.unpark(B, *ticket, None);
        }
        tickets.into_iter().map(|(ticket, _)| ticket).collect()
    }
}

/// What the memfd says that came with a message.
fn body_of(packets: &[line::Packet]) -> Vec<u8> {
    let fds = packets.iter().find(|p| p.kind == line::FDS).unwrap();
    let file = std::fs::File::from(fds.fds[0].try_clone().unwrap());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    bytes
}

#[test]
fn d14_a_large_body_goes_first_and_only_its_sender_waits() {
    let mut w = World::new(2, 2);
    assert_eq!(w.a.send(2, &to("2.12", b"before")), OK);
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100_000]), OK);
    let room = w.a.room(2);
    for dst in ["2.12", "2.13", "1.3"] {
        assert_eq!(w.a.send(2, &to(dst, b"behind")), -libc::EAGAIN);
    }
    assert_eq!(w.a.send(2, &cast("a", b"behind")), -libc::EAGAIN);
    let now = w.a.now;
    assert_eq!(w.a.send(3, &to("2.12", b"other")), OK);
    assert!(w.a.account(2).bytes > 100_000);
    w.carry();
    assert_eq!(bodies(&w.b.read(12)), [&b"before"[..], b"other"]);
    assert!(!w.a.switch.trunk(B).unwrap().is_idle());
    let control =
        w.a.switch
            .deliver_away(2, B, b"1.2", b"2.12", b"i", b"", 0, 0, None, now);
    assert_eq!(control, Err(libc::EAGAIN));
    assert_eq!(w.carry_bodies(), [1]);
    assert_eq!(w.a.room(2), room + 1);
    assert_eq!(w.a.send(2, &to("2.12", b"behind")), OK);
    w.carry();
    let got = w.b.read(12);
    assert_eq!(numbers(&got), [2, 3]);
    assert_eq!(
        (got[0].h.body_len, got[0].h.fds, got[0].h.flags),
        (100_000, 1, BODY_IN_MEMFD)
    );
    assert_eq!(body_of(&w.b.packets(12)), [7; 100_000]);
    assert!(w.b.switch.trunk(A).unwrap().inn.bodies.is_empty());
    w.carry();
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    assert_eq!(w.a.account(2), Account::default());
    assert!(w.a.switch.parked_body(B, 1).is_err());
    w.a.switch.unpark(B, 1, None);
}

#[test]
fn d14_a_large_body_is_multicast_to_nodes_and_here() {
    let mut w = World::new(2, 2);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    w.subscribe_b(13, 2, "a", Overflow::Gap);
    w.a.subscribe(3, 9, "a", Overflow::Gap);
    assert_eq!(w.send_body(2, cast("a", b""), &[8; 70_000]), OK);
    assert_eq!(body_of(&w.a.packets(3)), [8; 70_000]);
    w.carry_bodies();
    w.carry();
    for id in 12..14 {
        assert_eq!(w.b.read(id)[0].h.body_len, 70_000);
        assert_eq!(body_of(&w.b.packets(id)), [8; 70_000]);
    }
}

#[test]
fn d14_a_large_body_waits_for_room_there() {
    let mut w = World::new(1, 1);
    for _ in 0..4 {
        assert_eq!(w.a.send(2, &to("2.12", &[1; 1500])), OK);
    }
    assert_eq!(w.send_body(2, to("2.12", b""), &[9; 70_000]), OK);
    w.carry_bodies();
    assert_eq!(w.a.send(2, &to("2.12", b"last")), OK);
    w.carry();
    assert!(w.b.packets(12).iter().all(|p| p.kind != line::FDS));
    let got = w.b.read(12);
    assert_eq!(numbers(&got), [1, 2, 3, 4, 5, 6]);
    assert_eq!(got[4].h.body_len, 70_000);
    assert_eq!(body_of(&w.b.packets(12)), [9; 70_000]);
}

#[test]
fn d21_a_body_that_does_not_get_there_is_told() {
    let mut w = World::new(2, 1);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    let ask = Tx {
        flags: EXPECT_REPLY,
        serial: 5,
        deadline_ms: 1000,
        ..to("2.12", b"")
    };
    assert_eq!(w.send_body(2, ask, &[7; 100_000]), OK);
    assert_eq!(w.a.send(2, &to("2.12", b"behind")), -libc::EAGAIN);
    w.a.switch.unpark(B, 1, Some(libc::ENOSPC));
    let events = w.a.switch.take_lane_events();
    assert_eq!(
        unread(&events),
        [(2, 1, 1, 1, libc::ENOSPC as u32, &b"2.12"[..])]
    );
    assert_eq!(w.a.read(2)[0].h.kind, crate::frame::NO_REPLY);
    assert_eq!(w.a.send(2, &to("2.12", b"behind")), OK);
    assert_eq!(w.send_body(2, cast("a", b""), &[7; 100_000]), OK);
    w.a.switch.unpark(B, 2, Some(libc::ENOSPC));
    assert_eq!(w.a.send(2, &to("2.12", b"last")), OK);
    w.carry();
    let got = w.b.read(12);
    assert_eq!((got[1].gap(), got.len()), ((3, 3, 1, 1), 3));
    // A node that is lost meanwhile.
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100_000]), OK);
    w.a.switch.set_down(B, true);
    w.a.switch.restart_trunk(B);
    let events = w.a.switch.take_lane_events();
    assert!(unread(&events).contains(&(2, 5, 5, 1, libc::EHOSTDOWN as u32, &b"2.12"[..])));
    assert_eq!(w.a.send(2, &to("1.3", b"x")), OK);
    w.carry();
    assert_eq!(w.a.account(2).messages, 1);
}

#[test]
fn d20_what_waits_for_its_body_goes_although_its_sender_is_gone() {
    let mut w = World::new(1, 1);
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100_000]), OK);
    let now = w.a.now;
    w.a.switch.remove_endpoint(2, now);
    w.carry_bodies();
    w.carry();
    assert_eq!(w.b.read(12).len(), 1);
    assert_eq!(body_of(&w.b.packets(12)), [7; 100_000]);
    assert!(
        w.b.switch.trunk_mut(A).unwrap().inn.sender(1).is_err(),
        "and so is it there"
    );
}

#[test]
fn d15_a_notice_comes_behind_what_waits_for_its_body() {
    let mut w = World::new(2, 1);
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100_000]), OK);
    assert_eq!(w.send_body(3, to("2.12", b""), &[7; 100_000]), OK);
    w.a.switch.signal(B, b"who waits is there");
    let now = w.a.now;
    w.a.switch.remove_endpoint(2, now);
    w.a.switch.signal(B, b"2 has left");
    w.a.switch.signal(B, b"and so on");
    w.carry();
    let signals = |w: &mut World| -> Vec<_> {
        let events = w.b.switch.take_lane_events().into_iter();
        let texts = events.filter_map(|event| match event {
            LaneEvent::Signal(A, data) => Some(String::from_utf8(data.into()).unwrap()),
            _ => None,
        });
        texts.collect()
    };
    assert_eq!(signals(&mut w), ["who waits is there"]);
    w.a.switch.unpark(B, 1, Some(libc::EIO));
    w.carry();
    assert_eq!(signals(&mut w), ["2 has left", "and so on"]);
    assert_eq!(w.a.switch.trunk(B).unwrap().parked.len(), 1);
}

#[test]
fn case5_bodies_that_are_not_what_they_should_be() {
    let mut w = World::new(1, 1);
    assert!(w.b.switch.put_body(A, 7, sealed(b"x")));
    assert!(!w.b.switch.put_body(A, 7, sealed(b"x")), "there is one");
    assert!(
        !w.b.switch
            .put_body(A, 8, crate::memory::memfd(c"open").unwrap())
    );
    assert!(!w.b.switch.put_body(9, 8, sealed(b"x")));
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100]), OK);
    w.a.switch.unpark(B, 1, None);
    let batch = w.take_a();
    assert_eq!(
        w.give_b(&batch),
        Err(Broken::Malformed("a message whose body is not there"))
    );
    let mut w = World::new(1, 1);
    assert_eq!(w.send_body(2, to("2.12", b""), &[7; 100]), OK);
    assert!(w.b.switch.put_body(A, 1, sealed(b"short")));
    w.a.switch.unpark(B, 1, None);
    let batch = w.take_a();
    assert_eq!(
        w.give_b(&batch),
        Err(Broken::Malformed("a body of another size"))
    );
}

// ---- requests --------------------------------------------------------------------------------------------------------

#[test]
fn d18_a_request_is_answered_across() {
    let mut w = World::new(1, 1);
    assert_eq!(w.a.send(2, &request("2.12", 7)), OK);
    assert_eq!(w.a.switch.endpoint(2).unwrap().requests, 1);
    w.carry();
    let got = w.b.read(12);
    assert_eq!((got[0].h.serial, &got[0].src[..]), (7, &b"1.2"[..]));
    assert_eq!(w.b.switch.endpoint(12).unwrap().unanswered.len(), 1);
    assert_eq!(w.b.send(12, &answer("1.2", 7)), OK);
    assert!(w.b.switch.endpoint(12).unwrap().unanswered.is_empty());
    w.carry();
    let got = w.a.read(2);
    assert_eq!((got[0].h.reply_to, &got[0].body[..]), (7, &b"answer"[..]));
    assert_eq!(w.a.switch.endpoint(2).unwrap().requests, 0);
}

#[test]
fn d7_a_request_of_another_node_is_answered_once_whatever_the_patterns() {
    let mut w = World::new(1, 1);
    assert!(w.b.switch.set_reach::<&str>(12, &[]));
    assert_eq!(w.b.send(12, &to("1.2", b"")), -libc::EPERM);
    assert_eq!(w.b.send(12, &to("master", b"")), -libc::EPERM);
    assert_eq!(w.a.send(2, &request("2.12", 7)), OK);
    w.carry();
    assert_eq!(
        w.b.send(12, &answer("1.3", 7)),
        -libc::EPERM,
        "it did not ask"
    );
    assert_eq!(w.b.send(12, &answer("1.2", 7)), OK);
    assert_eq!(w.b.send(12, &answer("1.2", 7)), -libc::EPERM);
    w.carry();
    assert_eq!(bodies(&w.a.read(2)), [b"answer"]);
    assert!(w.a.read(1).is_empty());
}

#[test]
fn d20_who_is_asked_elsewhere_and_dies_is_told() {
    let mut w = World::new(1, 2);
    for (serial, dst) in [(1, "2.12"), (2, "2.13"), (3, "2.99")] {
        assert_eq!(w.a.send(2, &request(dst, serial)), OK);
    }
    w.carry();
    assert_eq!(w.a.read(2).len(), 1, "2.99 is nobody");
    assert_eq!(w.b.read(12).len(), 1);
    let now = w.b.now;
    assert!(w.b.switch.remove_endpoint(12, now).is_empty());
    w.carry();
    let got = w.a.read(2);
    assert_eq!(
        (got[0].h.kind, got[0].h.reply_to, &got[0].src[..]),
        (crate::frame::NO_REPLY, 1, &b"2.12"[..])
    );
    assert_eq!(
        w.a.send(2, &to("2.12", b"")),
        -libc::EHOSTUNREACH,
        "it is known to be dead"
    );
    // 2.13 has not answered when its node is lost.
    w.a.switch.restart_trunk(B);
    let got = w.a.read(2);
    assert_eq!(
        (got[0].h.kind, got[0].h.reply_to, &got[0].src[..]),
        (crate::frame::NO_REPLY, 2, &b"2.13"[..])
    );
    assert_eq!(w.a.switch.endpoint(2).unwrap().requests, 0);
}

#[test]
fn d20_messages_that_nobody_reads_are_told_across() {
    let mut w = World::new(1, 1);
    for _ in 0..3 {
        assert_eq!(w.a.send(2, &to("2.12", &[0; 100])), OK);
    }
    for _ in 0..5 {
        assert_eq!(w.a.send(2, &to("2.12", &[0; 3000])), OK);
    }
    w.carry();
    assert_eq!(w.b.read_up_to(12, 2).len(), 2);
    w.carry();
    let now = w.b.now;
    w.b.switch.remove_endpoint(12, now);
    assert_eq!(w.b.switch.trunk(A).unwrap().inn.held, 0);
    w.carry();
    let events = w.a.switch.take_lane_events();
    assert_eq!(
        unread(&events),
        [(2, 3, 8, 6, libc::EHOSTUNREACH as u32, &b"2.12"[..])]
    );
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    assert_eq!(w.a.account(2), Account::default());
}

#[test]
fn d15_notices_come_after_the_last_message_of_their_subject() {
    let mut w = World::new(1, 1);
    for _ in 0..5 {
        assert_eq!(w.a.send(2, &to("2.12", &[0; 1500])), OK);
    }
    w.a.switch.signal(B, b"2 has left");
    w.carry();
    let signal = LaneEvent::Signal(A, b"2 has left"[..].into());
    assert!(w.b.switch.take_lane_events().contains(&signal));
    w.b.switch.notify_behind(&[12], b"left", A);
    let got = w.b.read(12);
    let kinds: Vec<u8> = got.iter().map(|g| g.h.kind).collect();
    assert_eq!(kinds, [1, 1, 1, 1, 1, 3]);
    w.b.switch.notify_behind(&[12], b"at once", A);
    assert_eq!(bodies(&w.b.read(12)), [b"at once"]);
    assert!(!w.a.switch.signal(B, &vec![0; 1 << 20]));
}

#[test]
fn d19_monitors_see_what_comes_from_elsewhere() {
    let mut w = World::new(1, 2);
    let monitor = w.b.switch.find(13).unwrap();
    w.b.switch.bus_mut(BUS).unwrap().monitors.push(monitor);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    assert_eq!(w.a.send(2, &to("2.12", b"one")), OK);
    assert_eq!(w.a.send(2, &cast("a", b"all")), OK);
    w.carry();
    let got = w.b.read(13);
    assert_eq!(bodies(&got), [b"one", b"all"]);
    assert!(got.iter().all(|g| g.h.flags & MONITOR != 0));
}

// ---- cuts ------------------------------------------------------------------------------------------------------------

#[test]
fn d21_after_a_cut_nothing_is_lost_or_doubled() {
    let mut w = World::new(1, 1);
    w.batch = 300;
    for n in 0..20u8 {
        assert_eq!(w.a.send(2, &to("2.12", &[n])), OK);
    }
    let one = w.take_a();
    w.give_b(&one).unwrap();
    let lost = w.take_a();
    assert!(!lost.is_empty());
    w.cut();
    let again = w.take_a();
    assert_eq!(again, lost);
    w.give_b(&again).unwrap();
    // What comes twice is dropped, but for what is behind it.
    w.give_b(&again).unwrap();
    w.give_b(&one).unwrap();
    w.batch = 64 << 10;
    w.carry();
    let got = w.b.read(12);
    assert_eq!(numbers(&got), (1..=20).collect::<Vec<_>>());
    assert!(w.a.switch.rewind_trunk(B, 99).is_err(), "never sent");
    assert!(w.a.switch.rewind_trunk(B, 0).is_err(), "confirmed before");
}

#[test]
fn d21_records_out_of_order_are_refused() {
    let mut w = World::new(1, 1);
    w.batch = 1;
    for n in 0..3u8 {
        assert_eq!(w.a.send(2, &to("2.12", &[n])), OK);
    }
    let (one, two) = (w.take_a(), w.take_a());
    assert!(Batch::decode(&one).unwrap().count == 1);
    assert_eq!(
        w.give_b(&two),
        Err(Broken::Malformed("records are missing"))
    );
    w.give_b(&one).unwrap();
    w.give_b(&two).unwrap();
}

#[test]
fn d21_what_may_have_come_is_told_as_unknown() {
    let mut w = World::new(2, 1);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    assert_eq!(w.a.send(2, &to("2.12", b"read")), OK);
    w.carry();
    assert_eq!(w.b.read(12).len(), 1);
    w.b.pass(0);
    w.b.pass(25);
    w.carry();
    // Some are held there, some on their way, some have not been taken.
    for _ in 0..5 {
        assert_eq!(w.a.send(2, &to("2.12", &[0; 1500])), OK);
    }
    w.carry();
    assert_eq!(w.a.send(2, &cast("a", b"lost")), OK);
    assert_eq!(w.a.send(3, &to("2.12", b"lost")), OK);
    w.take_a();
    assert_eq!(w.a.send(2, &cast("a", b"lost")), OK);
    assert_eq!(w.a.send(3, &to("2.12", b"not taken")), OK);
    w.a.switch.restart_trunk(B);
    let events = w.a.switch.take_lane_events();
    assert_eq!(
        unread(&events),
        [(3, 2, 2, 1, libc::EHOSTDOWN as u32, &b"2.12"[..])]
    );
    let unknown: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            LaneEvent::Unknown {
                endpoint,
                first,
                last,
                count,
                trunk: B,
            } => Some((*endpoint, *first, *last, *count)),
            _ => None,
        })
        .collect();
    assert_eq!(unknown, [(2, 3, 6, 4), (3, 1, 1, 1)]);
    assert_eq!(w.a.account(2), Account::default());
    // The lane begins anew. What was held is delivered, and of the multicasts nobody knows.
    assert!(w.b.switch.hear_trunk(A, false));
    w.a.switch.set_down(B, false);
    assert_eq!(w.a.send(2, &to("2.12", b"new")), OK);
    w.carry();
    let got = w.b.read(12);
    assert_eq!(numbers(&got), [2, 3, 4, 5, 6, 8, 9]);
    assert_eq!(got[5].gap(), (7, 8, 0, 3));
    w.carry();
}

#[test]
fn d12_what_is_missing_is_told_although_its_sender_is_gone() {
    let mut w = World::new(2, 1);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    let now = w.a.now;
    assert_eq!(w.a.send(2, &cast("a", b"lost")), OK);
    assert_eq!(w.a.send(3, &cast("a", b"lost")), OK);
    w.a.switch.remove_endpoint(2, now);
    w.take_a();
    w.a.switch.remove_endpoint(3, now);
    // Lost again before anybody has heard of it.
    for _ in 0..2 {
        w.a.switch.restart_trunk(B);
        w.b.switch.hear_trunk(A, false);
        w.a.switch.set_down(B, false);
        w.take_a();
    }
    w.cut();
    w.carry();
    let mut got: Vec<_> = w.b.read(12).iter().map(Got::gap).collect();
    got.sort_unstable();
    assert_eq!(got, [(1, 1, 0, 3), (1, 1, 0, 3)]);
    w.b.pass(25);
    w.carry();
    assert!(w.is_quiet());
    assert_eq!(w.a.switch.trunk(B).unwrap().out.sender_count(), 0);
}

#[test]
fn d20_what_nobody_reads_is_told_although_the_lane_has_begun_anew() {
    for is_anew in [false, true] {
        let mut w = World::new(1, 2);
        assert_eq!(w.a.send(2, &to("2.12", b"unread")), OK);
        assert_eq!(w.a.send(2, &to("2.13", b"unread")), OK);
        w.carry();
        w.b.pass(25);
        w.carry();
        let now = w.b.now;
        // Reported, but that is lost; reported only when the sender counts anew.
        w.b.switch.remove_endpoint(12, now);
        w.take_b();
        w.a.switch.restart_trunk(B);
        w.b.switch.hear_trunk(A, is_anew);
        w.b.switch.remove_endpoint(13, now);
        w.b.switch.restart_trunk(A);
        w.a.switch.hear_trunk(B, false);
        w.a.switch.take_lane_events();
        w.carry();
        let events = w.a.switch.take_lane_events();
        let mut told: Vec<_> = unread(&events).iter().map(|u| (u.1, u.2, u.5)).collect();
        told.sort_unstable();
        if is_anew {
            assert!(told.is_empty(), "nobody is there who has sent it");
        } else {
            assert_eq!(told, [(1, 1, &b"2.12"[..]), (2, 2, &b"2.13"[..])]);
        }
    }
}

#[test]
fn d16_who_waits_for_a_node_that_is_lost_is_told() {
    let mut w = World::new(1, 1);
    assert_eq!(w.a.fill(2, &to("2.12", &[1; 1000])).0, -libc::EAGAIN);
    let room = w.a.room(2);
    w.a.switch.restart_trunk(B);
    w.a.switch.set_down(B, true);
    assert_eq!(w.a.room(2), room + 1);
    assert_eq!(w.a.send(2, &to("2.12", b"")), -libc::EHOSTDOWN);
    // Multicasts are gaps until it is back.
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    assert_eq!(w.a.send(2, &cast("a", b"")), OK);
    assert!(w.a.switch.trunk(B).unwrap().is_idle());
    w.a.switch.set_down(B, false);
    w.b.switch.hear_trunk(A, false);
    w.carry();
    assert_eq!(w.b.read(12)[0].gap().2, 1);
    assert!(w.a.switch.remove_trunk(B) && !w.a.switch.remove_trunk(B));
    assert_eq!(w.a.send(2, &to("2.12", b"")), -libc::EHOSTUNREACH);
    assert_eq!(w.a.send(2, &cast("a", b"")), OK);
}

#[test]
fn d21_a_dead_peer_that_must_be_told_too_much_is_choked() {
    let mut w = World::new(1, 1);
    let now = w.a.now;
    let body = vec![0; 60_000];
    let mut sent = 0;
    while w
        .a
        .switch
        .deliver_away(
            1,
            B,
            b"master",
            b"2.12",
            b"items   ",
            &body,
            0,
            0,
            None,
            now,
        )
        .is_ok()
    {
        sent += 1;
        assert!(sent < 1000, "without bound");
    }
    let events = w.a.switch.take_lane_events();
    assert_eq!(
        events
            .iter()
            .filter(|e| **e == LaneEvent::Choked(B))
            .count(),
        1
    );
    assert!(w.take_a().is_empty());
    assert_eq!(w.a.send(2, &to("2.12", b"")), -libc::EAGAIN);
    let room = w.a.room(2);
    w.a.switch.restart_trunk(B);
    assert_eq!(w.a.room(2), room + 1);
    assert_eq!(w.a.send(2, &to("2.12", b"")), OK);
    w.carry();
    assert_eq!(w.b.read(12).len(), 1);
}

// ---- what is wrong -----------------------------------------------------------------------------------------------------

#[test]
fn case5_what_a_switch_never_says_ends_the_link() {
    let mut w = World::new(1, 1);
    assert_eq!(w.a.send(2, &to("2.12", b"x")), OK);
    w.carry();
    let mut next = w.b.switch.trunk(A).unwrap().inn.received();
    let one = |record: &Record<'_>| {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        bytes
    };
    let mut refused = |w: &mut World, records: &[Record<'_>], rule: &str| {
        let bytes: Vec<u8> = records.iter().flat_map(one).collect();
        let mut batch = Batch::encode(0, next + 1, records.len() as u32, &[]);
        batch.extend_from_slice(&bytes);
        let broken = w.give_b(&batch).unwrap_err();
        assert_eq!(
            broken,
            Broken::Malformed(Box::leak(rule.to_owned().into_boxed_str()))
        );
        next = w.b.switch.trunk(A).unwrap().inn.received();
    };
    let address: &[u8] = b"2.12";
    let bus = NUMBER;
    refused(
        &mut w,
        &[Record::Open {
            destination: 9,
            bus,
            address,
        }],
        "destinations out of order",
    );
    refused(
        &mut w,
        &[Record::Open {
            destination: 2,
            bus,
            address,
        }],
        "a destination that is open already",
    );
    refused(
        &mut w,
        &[Record::Forget { destination: 9 }],
        "a destination that is not open",
    );
    refused(
        &mut w,
        &[Record::Gone { sender: 9 }],
        "a sender that was not named",
    );
    let ident = super::tests::ident_of(2, "a");
    let sender = |sender| Record::Sender {
        sender,
        bus,
        endpoint: 2,
        ident: &ident,
    };
    refused(&mut w, &[sender(1)], "senders out of order");
    let other = Record::Sender {
        sender: 2,
        bus: bus + 1,
        endpoint: 3,
        ident: &ident,
    };
    let message = crate::trunk_wire::Message {
        sender: 2,
        to: crate::trunk_wire::To::One(1),
        seq: 1,
        serial: 0,
        reply_to: 0,
        deadline_ms: None,
        src: b"1.2",
        dst: b"",
        ctl: b"",
        outside: None,
        body: b"x",
    };
    refused(
        &mut w,
        &[other, Record::Message(message)],
        "a destination on another bus",
    );
    let again = crate::trunk_wire::Message {
        sender: 1,
        ..message
    };
    refused(
        &mut w,
        &[Record::Message(again)],
        "messages of a sender out of order",
    );
    let nobody = crate::trunk_wire::Message {
        seq: 2,
        src: b"",
        ..message
    };
    refused(
        &mut w,
        &[
            sender(3),
            Record::Message(crate::trunk_wire::Message {
                sender: 3,
                ..nobody
            }),
        ],
        "a message without a source",
    );
    let large = vec![0; 200_000];
    let flood = |seq| {
        Record::Message(crate::trunk_wire::Message {
            sender: 1,
            src: b"",
            seq,
            body: &large,
            ..message
        })
    };
    let flood: Vec<_> = (9..=9 + WINDOW / 200_000).map(flood).collect();
    w.b.switch.endpoint_mut(12).unwrap().io = None;
    refused(&mut w, &flood, "more than the destination has credit for");
    let batch = Batch::encode(99, next + 1, 0, &[]);
    assert_eq!(
        w.give_b(&batch),
        Err(Broken::Malformed(
            "a record is confirmed that was never sent"
        ))
    );
    let batch = Batch::encode(0, next + 1, 0, &[(1, 1 << 40)]);
    assert_eq!(
        w.give_b(&batch),
        Err(Broken::Malformed("credit for what was never opened"))
    );
    let batch = Batch::encode(0, 1, 1, &[(1, WINDOW * 2)]);
    assert!(w.give_a(&batch).is_err());
    assert!(w.give_b(&[]).is_err() && w.give_b(&[0; BATCH_HEADER]).is_err());
    assert!(w.b.switch.inject(99, &[], w.b.now).is_err());
}

#[test]
fn case42_a_hundred_thousand_spoilt_batches_change_nothing_else() {
    let mut w = World::new(2, 3);
    w.subscribe_b(12, 1, "a", Overflow::Gap);
    let mut state = 0x5eed_u64;
    let mut dice = move |sides: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % sides
    };
    let edges = [0, 1, 0x7f, 0x80, 0xff];
    let (mut refused, mut said) = (0, 0);
    for round in 0..100_000u64 {
        if round % 500 == 0 {
            // Both begin anew now and then, or nothing would be taken any more.
            w.a.switch.restart_trunk(B);
            w.b.switch.hear_trunk(A, false);
            w.b.switch.restart_trunk(A);
            w.a.switch.hear_trunk(B, false);
        }
        match dice(4) {
            0 => w.a.send(2, &request("2.12", round + 1)),
            1 => w.a.send(3, &cast("a", &[0; 40])),
            2 => w.a.send(2, &to("2.999", b"x")),
            _ => w.a.send(3, &to("2.12", b"x")),
        };
        let mut batch = w.take_a();
        for _ in 0..dice(4) {
            let place = dice(batch.len().max(1) as u64) as usize;
            let value = edges[dice(5) as usize];
            match dice(6) {
                0 => batch.truncate(place),
                1 => batch.insert(place.min(batch.len()), value),
                _ => {
                    if let Some(byte) = batch.get_mut(place) {
                        *byte = if dice(2) == 0 { value } else { dice(256) as u8 };
                    }
                }
            }
        }
        refused += u32::from(w.give_b(&batch).is_err());
        w.b.read(12);
        w.b.read(14);
        let back = w.take_b();
        let _ = w.give_a(&back);
        w.a.read(2);
        w.a.switch.take_lane_events();
        said += w.b.switch.take_lane_events().len();
        if round % 1000 == 0 {
            assert_eq!(w.b.send(13, &to("2.14", &round.to_le_bytes())), OK);
            assert_eq!(bodies(&w.b.read(14)), [round.to_le_bytes()]);
        }
    }
    assert!(refused > 10_000, "{refused} were refused");
    assert!(said > 0 && w.b.switch.take_events().is_empty());
}

#[test]
fn d8_raw_bits_cross_as_they_are() {
    let mut w = World::new(1, 2);
    let mut bits = [0u8; 64];
    bits[3] = 0x11;
    let wish = Bits::from_bytes(&bits).unwrap();
    assert!(
        w.b.switch
            .subscribe(12, 1, wish.clone(), None, Overflow::Gap)
    );
    assert!(w.a.switch.subscribe_trunk(B, BUS, 1, wish, None));
    let raw = |bytes: &[u8]| Tx {
        kind: RAW,
        dst: bytes.into(),
        body: b"bits".into(),
        ..Tx::default()
    };
    bits[9] = 0xff;
    assert_eq!(w.a.send(2, &raw(&bits)), OK);
    bits[3] = 1;
    assert_eq!(w.a.send(2, &raw(&bits)), OK, "nobody wants this");
    assert_eq!(w.a.send(2, &raw(&bits[..32])), -libc::EDOM);
    w.carry();
    let got = w.b.read(12);
    assert_eq!(
        (bodies(&got), got[0].h.flags, got[0].dst.len()),
        (vec![&b"bits"[..]], MULTICAST, 64)
    );
}

mod model {
    use super::*;
    use crate::trunk_wire::{Message, To};
    use proptest::prelude::*;

    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..most)
    }

    prop_compose! {
        fn parts()(numbers in any::<[u32; 2]>(), seq in 1..u64::MAX, others in any::<[u64; 2]>(), deadline in any::<Option<u32>>(),
                   src in bytes(257), dst in bytes(257), ctl in bytes(300), body in bytes(2000), kind in 0..3u8)
                  -> ([u32; 2], u64, [u64; 2], Option<u32>, Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>, u8) {
            (numbers, seq, others, deadline, src, dst, ctl, body, kind)
        }
    }

    proptest! {
        #[test]
        fn d1_records_round_trip((numbers, seq, others, deadline, src, dst, ctl, body, kind) in parts()) {
            let is_one = kind == 0;
            let message = Message {
                sender: numbers[0],
                to: [To::One(numbers[1]), To::Bits, To::Terms][kind as usize],
                seq,
                serial: others[0],
                reply_to: others[1],
                deadline_ms: deadline.filter(|_| is_one),
                src: &src,
                dst: &dst,
                ctl: if is_one { &ctl } else { &[] },
                outside: None,
                body: &body,
            };
            let outside = Message {
                ctl: &[],
                outside: Some((numbers[0], numbers[1])),
                body: &[],
                ..message
            };
            let (first, last) = (seq.min(seq / 2 + 1), seq);
            let count = others[0] % (last - first + 1) + 1;
            let [bus, _] = numbers;
            let records = [
                Record::Message(message),
                Record::Message(outside),
                Record::Open { destination: bus, bus, address: &src },
                Record::Forget { destination: bus },
                Record::Sender { sender: bus, bus, endpoint: seq, ident: &ctl },
                Record::Gone { sender: bus },
                Record::Missed { sender: bus, to: To::Anything, first, last, count: 0, reason: 3, src: &src, dst: &[] },
                Record::Missed { sender: bus, to: To::Terms, first, last, count, reason: 1, src: &src, dst: b"a" },
                Record::Alive { is_alive: is_one, bus, address: &src },
                Record::Unread { endpoint: seq, first, last, count, errno: 5, address: &src },
                Record::NoReply { endpoint: seq, serial: others[0], address: &src },
                Record::Signal { data: &body },
            ];
            let mut out = Vec::new();
            for record in &records {
                record.encode(&mut out);
            }
            prop_assert_eq!(message.record_len(body.len()), crate::trunk_wire::cut(&out).unwrap().0.len());
            let mut rest = &out[..];
            for record in &records {
                let (decoded, behind) = Record::decode(rest).unwrap();
                prop_assert_eq!(decoded, *record);
                rest = behind;
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn case5_garbage_never_panics(garbage in bytes(400), at in any::<prop::sample::Index>(), flips in prop::collection::vec(any::<(u16, u8)>(), 1..8)) {
            let mut w = World::new(1, 1);
            w.subscribe_b(12, 1, "a", Overflow::Gap);
            let _ = w.give_b(&garbage);
            let mut batch = Batch::encode(0, 1, 1, &[]);
            batch.extend_from_slice(&garbage);
            let _ = w.give_b(&batch);
            // A true batch with a few bytes changed.
            w.a.send(2, &request("2.12", 1));
            w.a.send(2, &cast("a", b"all"));
            w.a.send(2, &to("2.99", b"x"));
            let mut batch = w.take_a();
            for (place, value) in &flips {
                let place = *place as usize % batch.len();
                batch[place] ^= value;
            }
            let _ = w.give_b(&batch);
            batch.truncate(at.index(batch.len()));
            let _ = w.give_b(&batch);
            let _ = w.give_a(&batch);
            let back = w.take_b();
            let _ = w.give_a(&back);
            w.b.read(12);
            w.a.read(2);
        }
    }

    /// Messages of endpoint 2: where, how large, and of what kind.
    fn message() -> impl Strategy<Value = (usize, usize, u8)> {
        // Most go where the one before went.
        (
            prop_oneof![6 => Just(0usize), 1 => 0..4usize],
            0..4000usize,
            prop_oneof![8 => Just(0u8), 1 => 0..6u8],
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// What goes out in one turn and comes in one batch is what goes and comes one by one: verdicts, records, charges, order.
        #[test]
        fn d21_messages_in_a_row_are_what_they_are_one_by_one(messages in prop::collection::vec(message(), 1..200), reads in any::<bool>(),
                                                              quota in prop_oneof![Just(u64::MAX), 1..60u64]) {
            let world = |batch| {
                let mut w = World::new(1, 2);
                w.batch = batch;
                w.a.switch.quota = Quota { messages: quota, ..Quota::default() };
                assert!(w.b.switch.own(12, b"name") && w.a.switch.route(BUS, b"name", Some(B)));
                w
            };
            let (mut one, mut row) = (world(1), world(64 << 10));
            for some in messages.chunks(25) {
                let some: Vec<Tx> = some.iter().enumerate().map(|(n, (dst, size, kind))| {
                    let tx = to(["2.12", "2.13", "name", "nobody"][*dst], &vec![n as u8; *size]);
                    match kind {
                        1 => Tx { flags: CHAIN, ..tx },
                        2 => Tx { src: b"1.2".to_vec(), ..tx },
                        3 => Tx { serial: n as u64 + 1, flags: EXPECT_REPLY, deadline_ms: 1000, ..tx },
                        4 => cast("a", b"nobody wants this"),
                        5 => Tx { reply_to: 7, ..tx },
                        _ => tx,
                    }
                }).collect();
                let verdicts: Vec<i32> = some.iter().map(|tx| one.a.send(2, tx)).collect();
                let places: Vec<u64> = some.iter().map(|tx| row.a.publish(2, tx)).collect();
                row.a.round();
                let in_a_row: Vec<i32> = places.iter().map(|pos| row.a.verdict(2, *pos)).collect();
                prop_assert_eq!(verdicts, in_a_row);
                for w in [&mut one, &mut row] {
                    w.carry();
                }
                for who in [12, 13] {
                    if reads {
                        let (one, row) = (one.b.read(who), row.b.read(who));
                        prop_assert_eq!(one, row);
                    }
                }
                prop_assert_eq!(one.a.account(2), row.a.account(2));
                let bytes = |w: &World| w.b.switch.trunk(A).unwrap().counters();
                prop_assert_eq!(bytes(&one), bytes(&row));
            }
            let stats = |w: &World| format!("{:?} {:?}", w.a.switch.endpoint(2).unwrap().stats, w.b.switch.endpoint(12).unwrap().stats);
            prop_assert_eq!(stats(&one), stats(&row));
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        /// Sender, destination, size, and how many of these.
        Some(u64, usize, usize, usize),
        Cast(u64, usize),
        Read(u64, usize),
        /// Carries one batch of at most so many bytes, from A or from B.
        Carry(bool, usize),
        /// Takes one that gets lost with everything after it, and then the link is back.
        Lose(bool),
        Again(bool),
        Pass,
        /// The lane of A begins anew, as after a node that was lost.
        Restart,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (2..4u64, 0..3usize, 0..1500usize, 1..9usize).prop_map(|(from, to, size, count)| Op::Some(from, to, size, count)),
            4 => (2..4u64, 0..1500usize).prop_map(|(from, size)| Op::Cast(from, size)),
            4 => (12..15u64, 1..6usize).prop_map(|(who, most)| Op::Read(who, most)),
            6 => (any::<bool>(), 1..4000usize).prop_map(|(from_a, most)| Op::Carry(from_a, most)),
            2 => any::<bool>().prop_map(Op::Lose),
            2 => any::<bool>().prop_map(Op::Again),
            1 => Just(Op::Pass),
            1 => Just(Op::Restart),
        ]
    }

    /// What one receiver has to account for, of one sender.
    #[derive(Default)]
    struct Account {
        /// Numbers of accepted messages for it.
        sent: Vec<u64>,
        /// Of these, multicasts.
        casts: Vec<u64>,
        read: Vec<u64>,
        gaps: Vec<(u64, u64, u64)>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Two senders on A, three receivers on B: each accepted unicast is read once, in order, or its sender is told; each
        /// multicast is read once, in order, or is in a gap that comes before anything later.
        #[test]
        fn d21_d11_d12_each_message_once_in_order_or_reported(ops in prop::collection::vec(op(), 1..200)) {
            let mut w = World::new(2, 3);
            for id in 12..15 {
                w.subscribe_b(id, id, "a", Overflow::Gap);
            }
            let dsts = ["2.12", "2.13", "2.14"];
            let mut book: BTreeMap<(u64, u64), Account> = BTreeMap::new();
            let mut unknown: BTreeMap<u64, Vec<(u64, u64, u64)>> = BTreeMap::new();
            let mut last = [Vec::new(), Vec::new()];
            let mut restarts = 0;
            let note = |book: &mut BTreeMap<(u64, u64), Account>, who: u64, got: Vec<Got>| {
                for g in got {
                    let from = if g.src == b"1.2" { 2 } else { 3 };
                    let account = book.entry((from, who)).or_default();
                    let newest = account.read.last().copied().max(account.gaps.last().map(|g| g.1)).unwrap_or(0);
                    if g.h.kind == GAP {
                        let (first, last, count, reason) = g.gap();
                        // After a restart, what was on its way may have come and is told all the same.
                        assert!(first > newest || reason == 3, "a gap from {first} after {newest}");
                        account.gaps.push((first, last, count));
                    } else {
                        let before = account.read.last().copied().unwrap_or(0);
                        assert!(g.h.seq > before, "{} after {before}", g.h.seq);
                        account.read.push(g.h.seq);
                    }
                }
            };
            for op in ops {
                match op {
                    Op::Some(from, dst, size, count) => {
                        let before = w.a.switch.endpoint(from).unwrap().seq;
                        let tx = to(dsts[dst], &vec![0; size]);
                        let places: Vec<u64> = (0..count).map(|_| w.a.publish(from, &tx)).collect();
                        w.a.round();
                        let accepted = places.iter().filter(|pos| w.a.verdict(from, **pos) == OK).count();
                        let seq = w.a.switch.endpoint(from).unwrap().seq;
                        prop_assert_eq!(seq - before, accepted as u64);
                        book.entry((from, 12 + dst as u64)).or_default().sent.extend(before + 1..=seq);
                    }
                    Op::Cast(from, size) => {
                        assert_eq!(w.a.send(from, &cast("a", &vec![0; size])), OK);
                        let seq = w.a.switch.endpoint(from).unwrap().seq;
                        for who in 12..15 {
                            let account = book.entry((from, who)).or_default();
                            account.sent.push(seq);
                            account.casts.push(seq);
                        }
                    }
                    Op::Read(who, most) => {
                        let got = w.b.read_up_to(who, most);
                        note(&mut book, who, got);
                    }
                    Op::Carry(from_a, most) => {
                        w.batch = most;
                        let batch = if from_a { w.take_a() } else { w.take_b() };
                        if !batch.is_empty() {
                            if from_a { w.give_b(&batch) } else { w.give_a(&batch) }.unwrap();
                            last[usize::from(from_a)] = batch;
                        }
                    }
                    Op::Lose(from_a) => {
                        if from_a { w.take_a() } else { w.take_b() };
                        w.cut();
                    }
                    Op::Again(from_a) => {
                        let batch = last[usize::from(from_a)].clone();
                        if !batch.is_empty() {
                            if from_a { w.give_b(&batch) } else { w.give_a(&batch) }.unwrap();
                        }
                    }
                    Op::Pass => w.b.pass(25),
                    Op::Restart => {
                        restarts += 1;
                        w.a.switch.restart_trunk(B);
                        w.b.switch.hear_trunk(A, false);
                        last = [Vec::new(), Vec::new()];
                    }
                }
                for event in w.a.switch.take_lane_events() {
                    match event {
                        LaneEvent::Unknown { endpoint, first, last, count, .. }
                        | LaneEvent::Unread { endpoint, first, last, count, .. } => {
                            unknown.entry(endpoint).or_default().push((first, last, count));
                        }
                        _ => {}
                    }
                }
            }
            // Everything gets through in the end.
            w.batch = 64 << 10;
            w.cut();
            for _ in 0..50 {
                w.carry();
                for who in 12..15 {
                    let got = w.b.read(who);
                    note(&mut book, who, got);
                }
                w.b.pass(25);
                w.a.pass(25);
            }
            prop_assert!(w.is_quiet());
            prop_assert_eq!(w.b.switch.trunk(A).unwrap().inn.held, 0);
            for from in 2..4 {
                prop_assert_eq!(w.a.account(from), super::Account::default());
                let told: u64 = unknown.get(&from).map_or(0, |all| all.iter().map(|u| u.2).sum());
                let mut lost = 0;
                for who in 12..15u64 {
                    let Some(account) = book.get(&(from, who)) else { continue };
                    for seq in &account.read {
                        prop_assert!(account.sent.contains(seq));
                    }
                    for seq in &account.sent {
                        if account.read.contains(seq) {
                            continue;
                        }
                        if account.casts.contains(seq) {
                            prop_assert!(account.gaps.iter().any(|g| g.0 <= *seq && *seq <= g.1), "{seq} is in no gap");
                        } else {
                            lost += 1;
                            let ranges = unknown.get(&from).map_or(&[][..], |all| &all[..]);
                            prop_assert!(ranges.iter().any(|u| u.0 <= *seq && *seq <= u.1), "{seq} is not told");
                        }
                    }
                    if restarts == 0 {
                        // Then gaps are exact.
                        let missed: Vec<u64> = account.casts.iter().copied().filter(|s| !account.read.contains(s)).collect();
                        prop_assert_eq!(account.gaps.iter().map(|g| g.2).sum::<u64>(), missed.len() as u64);
                    }
                }
                prop_assert!(lost <= told);
                prop_assert!(restarts > 0 || told == 0);
            }
        }
    }
}
