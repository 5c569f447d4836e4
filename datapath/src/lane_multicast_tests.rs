//! Tests of lanes for multicasts, without threads: the switch, and clients with both ends of theirs.

use super::lane_tests::{BUS, World, route};
use super::*;
use crate::destinations::Taken;
use crate::frame::{GAP, MESSAGE};
use crate::page::Cursor;

const GAPS: Overflow = Overflow::Gap;
const WAITS: Overflow = Overflow::Block(1000);

/// Endpoints 2 to 5, of whom 3 and 4 hear `news` and what is below; 2 has a lane to both, on which one message lies.
fn heard_by_two(overflow: Overflow) -> World {
    let mut w = World::with(5, Quota::default());
    for id in [3, 4] {
        assert!(w.subscribe(id, id, "news", overflow));
    }
    assert_eq!(cast(&mut w, b"first"), OK);
    assert_eq!(cast(&mut w, b"second"), OK);
    assert_eq!(w.lanes(), 1);
    w
}

fn cast(w: &mut World, body: &[u8]) -> i32 {
    w.say(2, route(TERMS, "", "news.local"), body)
}

fn texts(w: &mut World, id: u64) -> Vec<String> {
    let all = w.bodies(id).into_iter();
    all.map(|body| String::from_utf8(body).unwrap()).collect()
}

#[test]
fn d11_a_multicast_goes_on_one_lane_to_all_who_hear_it() {
    let mut w = heard_by_two(WAITS);
    for n in 0..50u8 {
        assert_eq!(cast(&mut w, &[n]), OK);
    }
    assert_eq!(w.switch.endpoint(2).unwrap().stats.sent, 1, "by the switch");
    assert_eq!((w.count(2, "sent"), w.count(3, "received")), (52, 52));
    assert_eq!(w.count(2, "lanes_out"), 1);
    assert_eq!((w.count(3, "lanes_in"), w.count(5, "lanes_in")), (1, 0));
    for id in [3, 4] {
        let rx = &mut w.client(id).rx;
        let record = rx.peek().unwrap().unwrap();
        assert_eq!(record.header.flags, MULTICAST | BY_TERMS);
        for seq in 1..=52 {
            let (kind, src, _, found) = w.read(id).unwrap();
            assert_eq!((kind, &src[..], found), (MESSAGE, &b"1.2"[..], seq));
        }
        assert!(w.read(id).is_none());
    }
    assert!(w.read(5).is_none());
}

#[test]
fn d17_a_reader_learns_what_the_agent_says_of_the_sender_and_the_terms() {
    let mut w = World::with(4, Quota::default());
    w.switch.endpoint_mut(3).unwrap().wants_ident = true;
    for id in [3, 4] {
        assert!(w.subscribe(id, id, "news", GAPS));
    }
    for body in [b"a", b"b"] {
        assert_eq!(w.say(2, route(TERMS, "aka.2", "news"), body), OK);
    }
    for (id, ident) in [(3, &b"ident 2"[..]), (4, b"")] {
        assert!(w.read(id).is_some());
        let rx = &mut w.client(id).rx;
        let record = rx.peek().unwrap().unwrap();
        assert!(record.lane > 0);
        let writer = rx.writer(&record).unwrap();
        assert_eq!((&*writer.src, &*writer.dst), (&b"aka.2"[..], &b"news"[..]));
        assert_eq!(&*writer.ident, ident);
    }
}

#[test]
fn d11_two_topics_and_a_unicast_between_two_stay_in_order_on_lanes() {
    let mut w = World::with(5, Quota::default());
    for (number, id, topic) in [(1, 3, "a"), (2, 4, "a"), (3, 3, "b"), (4, 5, "b")] {
        assert!(w.subscribe(id, number, topic, WAITS));
    }
    let mut expected = Vec::new();
    for n in 0..120u8 {
        let to = match n % 3 {
            0 => route(TERMS, "", "a"),
            1 => route(TERMS, "", "b"),
            _ => route(UNICAST, "", "1.3"),
        };
        assert_eq!(w.say(2, to, &[n]), OK);
        expected.push(vec![n]);
        assert!(n < 9 || w.lanes() == 3, "{n}");
        if n == 60 {
            for body in expected.drain(..40) {
                assert_eq!(w.read(3).unwrap().2, body);
            }
        }
    }
    assert_eq!(w.bodies(3), expected);
    assert_eq!((w.bodies(4).len(), w.bodies(5).len()), (40, 40));
    assert_eq!(w.lanes(), 3);
}

#[test]
fn d8_what_changes_who_hears_closes_the_lane_first_and_nothing_else_does() {
    let open = |change: &dyn Fn(&mut World)| {
        let mut w = heard_by_two(GAPS);
        assert!(w.subscribe(5, 99, "sports", GAPS) && w.subscribe(3, 98, "sports", GAPS));
        change(&mut w);
        let left = w.lanes();
        // Whatever came of it: nothing is lost and nothing comes twice.
        assert_eq!(texts(&mut w, 3), ["first", "second"]);
        left
    };
    assert_eq!(open(&|_| {}), 1);
    assert_eq!(open(&|w| assert!(w.subscribe(5, 7, "weather", GAPS))), 1);
    assert_eq!(open(&|w| assert!(w.subscribe(3, 7, "weather", GAPS))), 1);
    assert_eq!(
        open(&|w| assert!(w.subscribe(5, 7, "news.local.today", GAPS))),
        1
    );
    assert_eq!(open(&|w| assert!(w.switch.unsubscribe(3, 98))), 1);
    assert_eq!(open(&|w| assert!(w.switch.disown(5, b"1.5"))), 1);
    assert_eq!(open(&|w| drop(w.switch.remove_endpoint(5, w.now))), 1);
    assert_eq!(open(&|w| assert!(w.switch.set_filter(5, None))), 1);

    assert_eq!(
        open(&|w| assert!(w.subscribe(5, 7, "news.local", GAPS))),
        0,
        "one who hears it"
    );
    assert_eq!(open(&|w| assert!(w.subscribe(3, 7, "news", WAITS))), 0);
    assert_eq!(open(&|w| assert!(w.switch.unsubscribe(4, 4))), 0);
    assert_eq!(open(&|w| assert!(w.switch.forbid_send(2, 0))), 0, "a grant");
    assert_eq!(
        open(&|w| assert!(w.switch.set_filter(4, None))),
        0,
        "a filter"
    );
    assert_eq!(open(&|w| w.switch.close_lanes_on(BUS)), 0, "a monitor");
    assert_eq!(open(&|w| drop(w.switch.remove_endpoint(4, w.now))), 0);
    assert_eq!(open(&|w| drop(w.switch.remove_endpoint(2, w.now))), 0);
    assert_eq!(open(&|w| assert!(w.switch.disown(4, b"1.4"))), 0);
    assert_eq!(open(&|w| w.switch.close_lanes(2, Side::Out)), 0, "silence");
}

#[test]
fn d8_who_comes_later_hears_what_was_sent_later() {
    let mut w = heard_by_two(GAPS);
    assert!(w.subscribe(5, 5, "news", GAPS));
    for body in [b"third", b"later", b"again"] {
        assert_eq!(cast(&mut w, body), OK);
    }
    assert_eq!(texts(&mut w, 5), ["third", "later", "again"]);
    assert_eq!(
        texts(&mut w, 3),
        ["first", "second", "third", "later", "again"]
    );
    // And who goes hears no more, not even what is on its way.
    assert!(w.switch.unsubscribe(5, 5));
    for _ in 0..10 {
        assert_eq!(cast(&mut w, b"x"), OK);
    }
    assert!(w.read(5).is_none());
    assert_eq!(texts(&mut w, 4).len(), 15);
}

#[test]
fn d11_what_needs_the_switch_has_no_multicast_lane() {
    let ask = |change: &dyn Fn(&mut World)| {
        let mut w = World::with(5, Quota::default());
        assert!(w.subscribe(3, 3, "news", GAPS));
        change(&mut w);
        w.ask_for(2, route(TERMS, "", "news"))
    };
    assert!(ask(&|_| {}));
    assert!(
        !ask(&|w| assert!(w.switch.unsubscribe(3, 3))),
        "nobody hears it"
    );
    assert!(!ask(&|w| assert!(w.switch.forbid_send(2, 0))), "no grant");
    assert!(
        !ask(&|w| assert!(w.subscribe(4, 4, "news", Overflow::Conflate))),
        "only the newest"
    );
    assert!(
        !ask(&|w| assert!(w.subscribe(2, 4, "news", GAPS))),
        "itself"
    );
    assert!(
        !ask(&|w| {
            w.switch.add_trunk(7, b"other");
            let bus = w.switch.bus_mut(BUS).unwrap();
            let (bits, terms) = bus.required(b"news").unwrap();
            assert!(w.switch.subscribe_trunk(7, BUS, 70, bits, Some(terms)));
        }),
        "another node"
    );
    assert!(!ask(&|w| w.switch.bus_mut(BUS).unwrap().has_lanes = false));
    let mut w = World::with(5, Quota::default());
    assert!(!w.ask_for(2, route(TERMS, "", "a\0")), "no terms");
    assert!(!w.ask_for(2, route(RAW, "", "short")));
    assert!(!w.ask_for(2, (LANE, b"", b"1.3")), "no kind");
}

#[test]
fn d9_a_raw_address_may_have_a_lane() {
    let mut w = World::with(4, Quota::default());
    let mut bits = Bits::zero(512).unwrap();
    bits.set(9);
    let mut both = bits.clone();
    both.set(300);
    assert!(w.switch.subscribe(3, 3, bits, None, GAPS));
    let dst = both.to_bytes();
    assert!(w.ask_for(2, (RAW, b"", &dst)));
    assert_eq!(w.lanes(), 1);
    let mut other = Bits::zero(512).unwrap();
    other.set(300);
    other.set(301);
    assert!(w.switch.subscribe(4, 4, other, None, GAPS));
    assert_eq!(w.lanes(), 1);
    assert!(
        w.switch
            .subscribe(4, 5, Bits::zero(512).unwrap(), None, GAPS)
    );
    assert_eq!(w.lanes(), 0);
}

#[test]
fn d12_a_slow_reader_among_many_misses_and_the_others_do_not() {
    let mut w = heard_by_two(GAPS);
    assert!(w.subscribe(5, 5, "news", GAPS));
    let mut sent = 2;
    for _ in 0..2000 {
        assert_eq!(cast(&mut w, &[0; 1000]), OK, "nobody waits for who is slow");
        sent += 1;
        for id in [3, 5] {
            while w.read(id).is_some() {}
        }
    }
    assert_eq!(w.count(3, "received"), sent);
    w.serve();
    // What the slow one missed it is told of, in its place.
    let (mut read, mut missed, mut last) = (0, 0, 0);
    while let Some((kind, _, body, seq)) = w.read(4) {
        if kind == GAP {
            missed += u64::from_le_bytes(body[16..24].try_into().unwrap());
        } else {
            read += 1;
            assert!(seq > last);
        }
        last = seq;
        w.serve();
    }
    assert!(read > 30 && missed > 1000, "{read} {missed}");
    assert_eq!(read + missed, sent);
    assert_eq!(w.count(4, "missed"), missed);
}

#[test]
fn d12_where_all_keep_senders_waiting_the_sender_waits_on_the_lane() {
    let mut w = heard_by_two(WAITS);
    let to = route(TERMS, "", "news.local");
    let body: &[&[u8]] = &[&[0; 1000]];
    while matches!(w.client(2).tx.send_on_lane(to, 0, &[body]).1, Taken::Yes) {}
    assert!(matches!(
        w.client(2).tx.send_on_lane(to, 0, &[body]).1,
        Taken::Full
    ));
    let room = w.client(2).tx.spin_on_lane(to, 1000).expect("no room");
    // One of two is not enough.
    let count = w.bodies(3).len();
    let wait = |room: &crate::lane_out::LaneRoom| room.wait(Duration::from_millis(1));
    assert_eq!(wait(&room), crate::lane_out::RoomWait::NotYet);
    assert_eq!(w.bodies(4).len(), count);
    assert_eq!(wait(&room), crate::lane_out::RoomWait::Ready);
    assert_eq!(w.lanes(), 1);
    // Where one does not, nobody waits.
    let mut w = heard_by_two(GAPS);
    while matches!(w.client(2).tx.send_on_lane(to, 0, &[body]).1, Taken::Yes) {}
    let taken = w.client(2).tx.send_on_lane(to, 0, &[body]).1;
    assert!(matches!(taken, Taken::No));
}

#[test]
fn d18_a_multicast_lane_is_charged_once_and_what_lies_unread_after_its_end_too() {
    let mut w = heard_by_two(GAPS);
    let used = w.switch.account(2);
    assert!(used.bytes < 2 * (1 << 17), "one payload for both");
    for _ in 0..10 {
        assert_eq!(cast(&mut w, &[0; 1000]), OK);
    }
    w.switch.close_lanes(2, Side::Out);
    let left = w.switch.account(2);
    assert!(left.bytes >= 2 * 10_000 && left.bytes < used.bytes);
    for id in [3, 4] {
        assert_eq!(w.bodies(id).len(), 12);
    }
    // The readers have said so themselves.
    w.serve();
    assert_eq!(w.switch.account(2), Account::default());
    assert!(w.switch.endpoint(3).unwrap().ended.is_empty());
}

#[test]
fn d18_lanes_take_nothing_from_what_goes_by_the_switch() {
    let quota = Quota {
        messages: 30_000,
        ..Quota::default()
    };
    let mut w = World::with(5, quota);
    for n in 0..4 {
        assert_eq!(w.tell(2, "", "1.3", &[n]), OK);
    }
    assert_eq!(w.lanes(), 1);
    assert!(w.switch.account(2).messages > 500);
    let rest = 30_000 - w.switch.account(2).messages;
    w.switch.accounts.get_mut(&2).unwrap().messages += rest;
    assert_eq!(w.send(2, UNICAST, ("", "1.4"), b"x", 0), OK);
    assert_eq!(w.lanes(), 0, "lanes go first");
    w.switch.accounts.get_mut(&2).unwrap().messages += 30_000;
    assert_eq!(
        w.send(2, UNICAST, ("", "1.4"), b"x", 0),
        -libc::EDQUOT,
        "and then it is too much"
    );
}

#[test]
fn d20_what_lies_unread_in_a_lane_that_has_ended_is_told() {
    let mut w = World::with(4, Quota::default());
    for n in 0..10u8 {
        assert_eq!(w.tell(2, "", "1.3", &[n]), OK);
    }
    w.switch.close_lanes(2, Side::Out);
    for n in 10..13u8 {
        assert_eq!(w.tell(2, "", "1.3", &[n]), OK);
    }
    for _ in 0..4 {
        assert!(w.read(3).is_some());
    }
    assert_eq!(w.switch.remove_endpoint(3, w.now), [(2, 5, 13, 9)]);
}

#[test]
fn case5_a_reader_that_lies_harms_itself_alone() {
    let to = route(TERMS, "", "news.local");
    let cursor_of = |w: &World, reader: usize, change: &dyn Fn(&Cursor)| {
        change(&w.switch.lanes.only().1.readers[reader].cursor);
    };
    // It says that it has released more than there is: the sender finds out when it looks, and goes by the switch.
    let mut w = heard_by_two(GAPS);
    cursor_of(&w, 0, &|cursor| {
        cursor.tail().store(1 << 40, Ordering::Relaxed);
    });
    for n in 0..200u8 {
        assert_eq!(cast(&mut w, &[n; 1000]), OK);
        while w.read(4).is_some() {}
    }
    assert_eq!(w.count(4, "received"), 202);
    // It says that it has left, though the agent lives: the others are not concerned, and nothing comes twice.
    let mut w = heard_by_two(GAPS);
    cursor_of(&w, 1, &|cursor| {
        let _ = cursor.gate().close(&crate::sync::AtomicU64::new(0));
    });
    let (count, taken) = w.client(2).tx.send_on_lane(to, 0, &[&[b"third"]]);
    assert!(count == 1 && matches!(taken, Taken::No));
    assert_eq!(cast(&mut w, b"fourth"), OK);
    assert_eq!(w.lanes(), 0);
    assert_eq!(texts(&mut w, 3), ["first", "second", "third", "fourth"]);
    // Or that it is about to leave, and never does.
    let mut w = heard_by_two(GAPS);
    cursor_of(&w, 1, &|cursor| {
        cursor.gate().state.store(1, Ordering::Relaxed);
    });
    let (count, taken) = w.client(2).tx.send_on_lane(to, 0, &[&[b"third"]]);
    assert!(count == 1 && matches!(taken, Taken::No));
    assert_eq!(cast(&mut w, b"fourth"), OK);
    assert_eq!(texts(&mut w, 3), ["first", "second", "third", "fourth"]);
}

#[test]
fn d16_what_one_reader_does_not_read_any_more_is_unknown_when_the_agent_is_gone() {
    let mut w = heard_by_two(GAPS);
    w.switch = Switch::default();
    w.client(3).rx.look().unwrap();
    assert_eq!(texts(&mut w, 3), ["first", "second"]);
    w.client(3).rx.look().unwrap();
    assert!(w.client(3).rx.is_hung_up());
    let tx = &mut w.client(2).tx;
    let (count, taken) = tx.send_on_lane(route(TERMS, "", "news.local"), 0, &[&[b"third"]]);
    assert!(count == 0 && matches!(taken, Taken::Unknown));
}

#[test]
fn d12_a_lane_that_a_reader_cannot_read_is_a_gap_for_it_alone() {
    let mut w = heard_by_two(GAPS);
    assert_eq!(w.read(3).unwrap().2, b"first");
    let number = w.switch.lanes.only().0;
    let three = w.switch.find(3).unwrap();
    let io = w.switch.get_mut(three).unwrap().io.as_mut().unwrap();
    io.lane_calls.push((line::LANE_SPOILT, number));
    w.serve();
    assert_eq!((w.lanes(), w.switch.take_unread_on_lanes()), (0, vec![]));
    assert_eq!(w.count(3, "missed"), 1);
    assert_eq!(texts(&mut w, 4), ["first", "second"]);
}

#[test]
fn d8_nobody_but_who_hears_it_gets_a_descriptor() {
    let mut w = heard_by_two(GAPS);
    let count = |w: &mut World, id: u64| {
        let rx = &mut w.client(id).rx;
        rx.fds().map_or(0, |(fds, _)| fds.len())
    };
    assert_eq!((count(&mut w, 3), count(&mut w, 5)), (4, 0));
    assert_eq!((count(&mut w, 3), count(&mut w, 4)), (0, 4));
}

#[test]
fn d18_sixty_four_may_hear_a_lane_and_no_more() {
    for (readers, granted) in [(64, true), (65, false)] {
        let mut w = World::with(readers + 2, Quota::default());
        for id in 3..=readers + 2 {
            assert!(w.subscribe(id, id, "news", GAPS));
        }
        assert_eq!(w.ask_for(2, route(TERMS, "", "news")), granted);
        if granted {
            // The last of them too is woken, and reads.
            assert_eq!(w.say(2, route(TERMS, "", "news"), b"by the switch"), OK);
            for id in 3..=66 {
                assert_eq!(texts(&mut w, id), ["by the switch"]);
            }
            assert_eq!(w.say(2, route(TERMS, "", "news"), b"x"), OK);
            assert_eq!(w.lanes(), 1);
            w.client(66).rx.arm().unwrap();
            for id in [3, 66] {
                assert_eq!(texts(&mut w, id), ["x"]);
            }
            w.client(66).rx.arm().unwrap();
            assert_eq!(w.say(2, route(TERMS, "", "news"), b"y"), OK);
            w.serve();
            assert!(w.client(66).rx.is_readable());
        }
    }
}
