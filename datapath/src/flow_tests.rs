//! Tests of what endpoints may send to: patterns against a slow, obvious model, and the switch that asks them.

use super::flow::{Reach, text_of};
use super::tests::{BUS, Bench, bodies, to};
use super::*;
use proptest::prelude::*;

fn answer(dst: &str, reply_to: u64) -> super::tests::Tx {
    super::tests::Tx {
        reply_to,
        ..to(dst, b"answer")
    }
}

fn request(dst: &str, serial: u64) -> super::tests::Tx {
    super::tests::Tx {
        flags: EXPECT_REPLY,
        serial,
        deadline_ms: 1000,
        ..to(dst, b"question")
    }
}

/// A bench whose bus has the name `shop` (endpoint 2); endpoint 3 may send to these.
fn bench(patterns: &[&str]) -> Bench {
    let mut bench = Bench::with(4);
    assert!(bench.switch.own(2, b"shop"));
    assert!(bench.switch.set_reach(3, patterns));
    bench
}

fn denied(bench: &mut Bench) -> Vec<(u64, Box<[u8]>)> {
    let events = bench.switch.take_lane_events();
    let of = |event| match event {
        LaneEvent::Denied(id, address) => (id, address),
        other => panic!("{other:?}"),
    };
    events.into_iter().map(of).collect()
}

#[test]
fn d7_a_unicast_goes_where_a_pattern_covers_the_address() {
    let mut bench = bench(&["shop", "1.4"]);
    assert_eq!(bench.send(3, &to("shop", b"a")), OK);
    assert_eq!(bench.send(3, &to("1.4", b"b")), OK);
    // The same endpoint by an address that is not covered; and a name that nobody owns, which would go to the master.
    assert_eq!(bench.send(3, &to("1.2", b"c")), -libc::EPERM);
    assert_eq!(bench.send(3, &to("nobody", b"d")), -libc::EPERM);
    assert_eq!(bench.send(3, &to("1.99", b"e")), -libc::EPERM);
    assert_eq!(bench.send(3, &to("", b"f")), -libc::EDESTADDRREQ);
    assert_eq!(bodies(&bench.read(2)), [b"a"]);
    assert!(bench.read(1).is_empty());
    // Others are not bound by it.
    assert_eq!(bench.send(4, &to("1.2", b"g")), OK);
}

#[test]
fn d7_who_has_not_joined_asks_the_master_without_a_pattern() {
    let mut bench = bench(&[]);
    bench.open(9, 4096);
    assert!(bench.switch.set_reach::<&str>(9, &[]));
    assert_eq!(bench.send(9, &to("master", b"let me in")), OK);
    assert_eq!(bench.send(9, &to("shop", b"")), -libc::EHOSTUNREACH);
    bench.join(9);
    assert_eq!(bench.send(9, &to("master", b"")), -libc::EPERM);
    assert_eq!(bodies(&bench.read(1)), [b"let me in"]);
}

#[test]
fn d5_the_master_sends_to_everybody() {
    let mut bench = bench(&[]);
    assert!(bench.switch.set_reach::<&str>(1, &[]));
    assert_eq!(bench.send(1, &to("shop", b"")), OK);
    assert_eq!(bench.send(1, &to("1.3", b"")), OK);
    assert!(bench.switch.set_master(BUS, None));
    assert_eq!(bench.send(1, &to("shop", b"")), -libc::EPERM);
}

#[test]
fn d7_an_open_request_is_answered_once_whatever_the_patterns() {
    let mut bench = bench(&[]);
    assert_eq!(bench.send(2, &request("1.3", 7)), OK);
    assert_eq!(bench.send(4, &request("1.3", 7)), OK);
    assert_eq!(bench.send(3, &answer("1.2", 8)), -libc::EPERM, "no request");
    assert_eq!(bench.send(3, &answer("1.2", 7)), OK);
    assert_eq!(
        bench.send(3, &answer("1.2", 7)),
        -libc::EPERM,
        "a second answer"
    );
    assert_eq!(bench.read(2).len(), 1);
    // Who asked is gone: that is no refusal.
    assert!(bench.switch.disown(4, b"1.4"));
    assert_eq!(bench.send(3, &answer("1.4", 7)), -libc::EHOSTUNREACH);
    assert_eq!(denied(&mut bench), [(3, Box::from(*b"1.2"))]);
}

#[test]
fn d7_a_refusal_is_told_once_for_each_address_and_for_some_addresses_only() {
    let mut bench = bench(&["shop"]);
    for _ in 0..3 {
        assert_eq!(bench.send(3, &to("1.2", b"")), -libc::EPERM);
    }
    assert_eq!(denied(&mut bench), [(3, Box::from(*b"1.2"))]);
    for n in 0..5000 {
        assert_eq!(bench.send(3, &to(&format!("x{n}"), b"")), -libc::EPERM);
    }
    assert_eq!(denied(&mut bench).len(), 63);
    assert_eq!(bench.send(3, &to("shop", b"")), OK);
    // New patterns, new flows.
    assert!(bench.switch.set_reach(3, &["shop"]));
    assert_eq!(bench.send(3, &to("1.2", b"")), -libc::EPERM);
    assert_eq!(denied(&mut bench).len(), 1);
}

#[test]
fn d12_who_waits_for_room_where_it_may_send_no_more_is_told_to_try_again() {
    let mut bench = bench(&["shop"]);
    let (full, _) = bench.fill(3, &to("shop", &[0; 500]));
    assert_eq!(full, -libc::EAGAIN);
    let before = bench.room(3);
    assert!(bench.switch.set_reach::<&str>(3, &[]));
    assert_eq!(bench.room(3), before + 1);
    assert_eq!(bench.send(3, &to("shop", b"")), -libc::EPERM);
    assert!(bench.switch.set_reach(3, &["**"]));
    bench.read(2);
    assert_eq!(bench.send(3, &to("shop", b"")), OK);
}

#[test]
fn d13_the_one_question_has_one_answer() {
    let mut bench = bench(&["shop", "org.*"]);
    let [master, limited, free] = [1, 3, 4].map(|id| bench.switch.find(id).unwrap());
    for (who, address, may) in [
        (limited, "shop", true),
        (limited, "org.clock", true),
        (limited, "org.clock.utc", false),
        (limited, "master", false),
        (master, "anything", true),
        (free, "anything", true),
    ] {
        assert_eq!(bench.switch.may_send_to(who, address.as_bytes()), may);
    }
    let now = bench.now;
    bench.switch.remove_endpoint(3, now);
    assert!(!bench.switch.may_send_to(limited, b"shop"));
    assert!(!bench.switch.set_reach(3, &["**"]));
}

#[test]
fn d1_addresses_are_compared_as_people_write_them() {
    for (address, text) in [
        (&b"org.example"[..], "org.example"),
        (b"a b:c*d%e", "a%20b%3Ac%2Ad%25e"),
        (b"0x61", "%30x61"),
        (b"0x 1", "%30x%201"),
        (b"a.\xff", "0x612eff"),
        (b"a\x07", "0x6107"),
        (
            "\u{e9}t\u{e9}.caf\u{e9}".as_bytes(),
            "\u{e9}t\u{e9}.caf\u{e9}",
        ),
        ("e\u{301}".as_bytes(), "e\u{301}"),
        ("a\u{a0}b".as_bytes(), "0x61c2a062"),
        ("a\u{200b}".as_bytes(), "0x61e2808b"),
    ] {
        assert_eq!(text_of(address), text.as_bytes());
    }
}

/// What a pattern covers, tried in all ways.
fn covers_slowly(pattern: &[&str], parts: &[&str]) -> bool {
    match (pattern.split_first(), parts.split_first()) {
        (None, _) => parts.is_empty(),
        (Some((&"**", rest)), _) => (0..=parts.len()).any(|n| covers_slowly(rest, &parts[n..])),
        (Some(_), None) => false,
        (Some((one, rest)), Some((part, others))) => {
            is_as(one.as_bytes(), part.as_bytes()) && covers_slowly(rest, others)
        }
    }
}

fn is_as(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|n| is_as(rest, &text[n..])),
        Some((byte, rest)) => text.first() == Some(byte) && is_as(rest, &text[1..]),
    }
}

proptest! {
    #[test]
    fn patterns_cover_what_a_slow_model_says(
        pattern in proptest::collection::vec("\\*\\*|[ab*]{0,4}", 1..5),
        addresses in proptest::collection::vec("[ab.]{1,10}", 1..8),
    ) {
        // Two stars within a component are no pattern of a policy.
        let pattern: Vec<String> = pattern
            .into_iter()
            .map(|one| if one == "**" { one } else { one.replace("**", "*") })
            .collect();
        let mut reach = Reach::new(&[pattern.join(".")]);
        let slow: Vec<&str> = pattern.iter().map(String::as_str).collect();
        for address in addresses.iter().chain(&addresses) {
            let parts: Vec<&str> = address.split('.').collect();
            prop_assert_eq!(reach.covers(address.as_bytes()), covers_slowly(&slow, &parts));
        }
    }
}
