//! Tests of large bodies on lanes: they lie in the arena, in place.

use super::*;
use crate::lane_out::{ARENA_FROM, IN_ARENA, LANE_HEADER, Lending, Lent, PLACED_BYTES};

const SIZE: usize = 6000;

/// A body that tells which it is.
fn body(n: u64, size: usize) -> Vec<u8> {
    let mut made = vec![(n * 7 + 1) as u8; size];
    made[..8].copy_from_slice(&n.to_le_bytes());
    made
}

impl World {
    /// Two endpoints with a lane that has an arena, on which nothing lies.
    fn with_arena(quota: Quota) -> Self {
        let mut world = Self::with(4, quota);
        for n in 0..2 {
            assert_eq!(world.tell(2, "", "1.3", &body(n, SIZE)), OK);
        }
        assert_eq!((world.lanes(), world.bodies(3).len()), (1, 2));
        world
    }

    fn lend(&mut self, bytes: usize) -> Option<Lent> {
        let tx = &mut self.client(2).tx;
        match tx.lend(route(UNICAST, "", "1.3"), bytes as u64) {
            Lending::Given(lent) => Some(lent),
            Lending::Full | Lending::No => None,
        }
    }

    fn send_lent(&mut self, lent: &mut Lent, len: usize) -> Taken {
        let tx = &mut self.client(2).tx;
        tx.send_lent(route(UNICAST, "", "1.3"), 0, (lent, len as u64))
    }

    /// Puts a record into the lane as its sender could.
    fn forge(&mut self, words: [u64; 5]) {
        let memory = self.lane_memory();
        let head = memory.head().load(Ordering::Relaxed);
        memory.copy_in(head, &words.map(u64::to_le_bytes).concat());
        memory.head().store(head + 40, Ordering::Release);
    }
}

/// A message that is out on loan, and what it was when it was sent.
struct Held {
    end: u64,
    memory: Arc<Segment>,
    record: crate::client::Incoming,
    made: Vec<u8>,
}

fn write(lent: &Lent, bytes: &[u8]) {
    // SAFETY: no test lends less than it writes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), lent.start(), bytes.len()) };
}

#[test]
fn d13_large_bodies_lie_in_the_arena() {
    let mut w = World::with_arena(Quota::default());
    let memory = w.lane_memory();
    assert!(memory.arena_bytes() >= 16 * SIZE as u64);
    let before = memory.head().load(Ordering::Relaxed);
    for n in 0..5 {
        assert_eq!(w.tell(2, "", "1.3", &body(n, SIZE)), OK);
    }
    assert_eq!(w.tell(2, "", "1.3", b"small"), OK);
    let head = memory.head().load(Ordering::Relaxed);
    assert_eq!(head - before, 5 * PLACED_BYTES + LANE_HEADER + 8);
    for n in 0..5 {
        let (_, src, got, seq) = w.read(3).unwrap();
        assert_eq!((got, &src[..], seq), (body(n, SIZE), &b"1.2"[..], n + 3));
    }
    assert_eq!(w.read(3).unwrap().2, b"small");
    assert_eq!(w.count(2, "sent"), 8);
}

#[test]
fn d13_a_block_is_used_again_when_it_was_released() {
    let mut w = World::with_arena(Quota::default());
    for n in 0..3 {
        assert_eq!(w.tell(2, "", "1.3", &body(n, SIZE)), OK);
    }
    // The first is held as a loan, so nothing of what came behind it is given back.
    let rx = &mut w.client(3).rx;
    let first = rx.peek().unwrap().unwrap();
    let held = rx.memory(&first).clone();
    let end = rx.take(&first, true);
    let show = |held: &Segment| {
        let mut seen = vec![0; SIZE];
        held.copy_body_out(first.body, first.in_arena, &mut seen);
        seen
    };
    let mut sent = 3;
    while let Some(mut lent) = w.lend(SIZE) {
        write(&lent, &body(sent, SIZE));
        assert!(matches!(w.send_lent(&mut lent, SIZE), Taken::Yes));
        sent += 1;
        assert!(sent < 100, "room without end");
    }
    for n in 1..sent {
        assert_eq!(w.read(3).unwrap().2, body(n, SIZE));
    }
    assert!(w.lend(SIZE).is_none(), "one of them is still being read");
    assert_eq!(show(&held), body(0, SIZE));
    let rx = &mut w.client(3).rx;
    rx.give_back(first.lane, end);
    rx.settle();
    let all: Vec<Lent> = std::iter::from_fn(|| w.lend(SIZE)).collect();
    assert_eq!(all.len() as u64, sent);
}

#[test]
fn d13_loans_are_sent_in_any_order_and_come_back_unsent() {
    let mut w = World::with_arena(Quota::default());
    let mut loans: Vec<Lent> = std::iter::from_fn(|| w.lend(SIZE)).collect();
    let count = loans.len();
    assert!(count >= 16);
    // What does not fit beside them goes by the ring: small enough for that.
    assert_eq!(w.tell(2, "", "1.3", &body(99, SIZE)), OK);
    for n in [5, 0, 3] {
        write(&loans[n], &body(n as u64, SIZE));
        let lent = &mut loans[n];
        let tx = &mut w.clients.get_mut(&2).unwrap().tx;
        let taken = tx.send_lent(route(UNICAST, "", "1.3"), 0, (lent, 100));
        assert!(matches!(taken, Taken::Yes));
    }
    assert_eq!(w.read(3).unwrap().2, body(99, SIZE));
    for n in [5, 0, 3] {
        assert_eq!(w.read(3).unwrap().2, body(n, SIZE)[..100]);
    }
    drop(loans);
    let all: Vec<Lent> = std::iter::from_fn(|| w.lend(SIZE)).collect();
    assert_eq!(all.len(), count);
    assert_eq!(w.lanes(), 1);
}

#[test]
fn d11_a_loan_of_a_lane_that_is_closed_is_still_good() {
    let mut w = World::with_arena(Quota::default());
    let mut lent = w.lend(SIZE).unwrap();
    write(&lent, &body(1, SIZE));
    w.switch.close_lanes(2, Side::Out);
    assert!(matches!(w.send_lent(&mut lent, SIZE), Taken::No));
    // SAFETY: as many bytes as were lent.
    let kept = unsafe { std::slice::from_raw_parts(lent.start(), SIZE) };
    assert_eq!(kept, body(1, SIZE));
    assert_eq!(w.send(2, UNICAST, ("", "1.3"), kept, 0), OK);
    assert_eq!(w.tell(2, "", "1.3", &body(2, SIZE)), OK);
    assert_eq!(w.bodies(3), [body(1, SIZE), body(2, SIZE)]);
    // Nor does another lane take it.
    if w.lanes() == 1 {
        assert!(matches!(w.send_lent(&mut lent, SIZE), Taken::No));
    }
    assert!(w.bodies(3).is_empty());
}

#[test]
fn case5_a_body_outside_the_arena_spoils_its_own_lane() {
    let len = u64::from(IN_ARENA) << 32 | PLACED_BYTES;
    let most = crate::client::MESSAGE_BYTES as u64;
    let forged: [fn(u64) -> [u64; 2]; 6] = [
        |arena| [arena, 1],
        |arena| [0, arena + 1],
        |arena| [arena - 8, 16],
        |_| [u64::MAX, 2],
        |_| [u64::MAX - 1, u64::MAX],
        |_| [0, u64::MAX],
    ];
    for place in forged {
        let mut w = World::with_arena(Quota::default());
        let arena = w.lane_memory().arena_bytes();
        assert!(arena < most);
        let [at, bytes] = place(arena);
        w.forge([len, 3, 0, at, bytes]);
        assert!(w.bodies(3).is_empty());
        w.serve();
        assert_eq!((w.lanes(), w.switch.take_events()), (0, vec![]));
        assert_eq!(w.tell(4, "", "1.3", b"of another"), OK);
        assert_eq!(w.tell(2, "", "1.3", b"by the switch"), OK);
        assert_eq!(
            w.bodies(3),
            [b"of another".to_vec(), b"by the switch".to_vec()]
        );
    }
    // Marked otherwise, or too short for a place.
    for word in [2u64 << 32 | PLACED_BYTES, 1 << 32 | 32, 1 << 32 | 48] {
        let mut w = World::with_arena(Quota::default());
        w.forge([word, 3, 0, 0, 8]);
        let memory = w.lane_memory();
        memory
            .head()
            .store(memory.head().load(Ordering::Relaxed) + 8, Ordering::Release);
        assert!(w.bodies(3).is_empty());
        w.serve();
        assert_eq!(w.lanes(), 0);
    }
}

#[test]
fn case5_what_is_inside_the_arena_is_the_senders_own_to_spoil() {
    let mut w = World::with_arena(Quota::default());
    let len = u64::from(IN_ARENA) << 32 | PLACED_BYTES;
    let arena = w.lane_memory().arena_bytes();
    w.forge([len, 3, 0, arena - 5, 5]);
    w.forge([len, 4, 0, 0, 0]);
    assert_eq!(w.bodies(3).iter().map(Vec::len).collect::<Vec<_>>(), [5, 0]);
    assert_eq!(w.lanes(), 1);
}

#[test]
fn case5_a_reader_that_lies_about_its_tail_loses_the_lane() {
    for tail in [3, 1 << 40] {
        let mut w = World::with_arena(Quota::default());
        w.switch.lanes.only().1.readers[0]
            .cursor
            .tail()
            .store(tail, Ordering::Release);
        assert!(w.lend(SIZE).is_none());
        assert_eq!(w.tell(2, "", "1.3", &body(7, SIZE)), OK);
    }
}

#[test]
fn d18_an_arena_is_charged_and_leaves_half_to_others() {
    let mut w = World::with_arena(Quota::default());
    let used = w.switch.account(2).bytes;
    let arena = w.lane_memory().arena_bytes();
    assert!(used >= arena + RX as u64);
    w.switch.close_lanes(2, Side::Out);
    w.serve();
    assert!(w.bodies(3).is_empty());
    assert!(!w.switch.over_quota(2, 1 << 29, 0, 0), "it is looked again");
    assert!(w.switch.over_quota(2, u64::MAX / 2, 0, 0));
    assert_eq!(w.switch.account(2), Account::default());
    // What is not to be had is asked for smaller, and then not at all.
    let bytes = 2 * (1 << 17) + 50_000;
    let mut w = World::with(
        3,
        Quota {
            bytes,
            ..Quota::default()
        },
    );
    let mut had = Vec::new();
    for n in 0..40 {
        assert_eq!(w.send(2, UNICAST, ("", "1.3"), &body(n, SIZE), 0), OK);
        assert_eq!(w.bodies(3).len(), 1);
        let route = route(UNICAST, "", "1.3");
        let tx = &mut w.client(2).tx;
        if tx.must_ask_for_lane(route) {
            if w.ask_for(2, route) {
                had.push(w.lane_memory().arena_bytes());
                break;
            }
            w.client(2).tx.ask_for_smaller_lane(route);
        }
    }
    assert!(had.len() == 1 && had[0] < 16 * SIZE as u64, "{had:?}");
}

#[test]
fn d20_large_bodies_that_nobody_reads_are_counted() {
    let mut w = World::with_arena(Quota::default());
    for n in 0..7 {
        assert_eq!(w.tell(2, "", "1.3", &body(n, SIZE)), OK);
    }
    for _ in 0..2 {
        w.read(3).unwrap();
    }
    assert_eq!(w.switch.remove_endpoint(3, w.now), [(2, 5, 9, 5)]);
}

#[test]
fn d14_a_lane_without_room_for_a_body_makes_way_for_one_that_has() {
    let mut w = World::with_lane(Quota::default());
    assert_eq!(w.lane_memory().arena_bytes(), 0);
    assert!(w.lend(SIZE).is_none());
    let (mut sent, mut got) = (0, 0);
    while w.lend(SIZE).is_none() {
        assert_eq!(w.tell(2, "", "1.3", &body(sent, SIZE)), OK);
        got += w.bodies(3).len() as u64;
        sent += 1;
        assert!(sent < 10, "never");
    }
    assert_eq!(got, 2 + sent);
}

proptest! {
    #[test]
    fn d11_d13_all_that_is_sent_is_read_as_it_was_written(
        steps in prop::collection::vec((0..9u8, 0..40_000usize), 1..120)
    ) {
        let mut w = World::with(3, Quota::default());
        let mut expected = VecDeque::new();
        let mut loans: Vec<(Lent, Vec<u8>)> = Vec::new();
        let mut held: VecDeque<Held> = VecDeque::new();
        let mut n = 0;
        for (what, size) in steps {
            n += 1;
            let made = body(n, size.max(8));
            match what {
                0..=2 => {
                    if w.tell(2, "", "1.3", &made) == OK {
                        expected.push_back(made);
                    }
                }
                3 | 4 => if let Some(lent) = w.lend(made.len()) {
                    write(&lent, &made);
                    loans.push((lent, made));
                },
                5 if !loans.is_empty() => {
                    let (mut lent, made) = loans.swap_remove(size % loans.len());
                    let taken = w.send_lent(&mut lent, made.len());
                    if matches!(taken, Taken::Yes)
                        || w.send(2, UNICAST, ("", "1.3"), &made, 0) == OK
                    {
                        expected.push_back(made);
                    }
                }
                6 => {
                    if let Some((_, _, got, _)) = w.read(3) {
                        prop_assert_eq!(Some(got), expected.pop_front());
                    }
                }
                7 => {
                    let rx = &mut w.client(3).rx;
                    if let Some(record) = rx.peek().unwrap() {
                        let memory = rx.memory(&record).clone();
                        let end = rx.take(&record, true);
                        let made = expected.pop_front().unwrap();
                        held.push_back(Held { end, memory, record, made });
                    }
                }
                _ => {
                    let n = size % held.len().max(1);
                    if let Some(Held { end, record, .. }) = held.remove(n) {
                        let rx = &mut w.client(3).rx;
                        rx.give_back(record.lane, end);
                        rx.settle();
                    }
                }
            }
            for Held { memory, record, made, .. } in &held {
                let mut seen = vec![0; record.header.body_len as usize];
                memory.copy_body_out(record.body, record.in_arena, &mut seen);
                prop_assert!(seen == *made, "a loan was written over");
            }
        }
        for one in held {
            w.client(3).rx.give_back(one.record.lane, one.end);
        }
        while let Some((_, _, got, _)) = w.read(3) {
            prop_assert_eq!(Some(got), expected.pop_front());
        }
        prop_assert!(expected.is_empty());
    }
}

#[test]
fn d13_small_bodies_stay_in_the_ring() {
    let mut w = World::with_arena(Quota::default());
    let memory = w.lane_memory();
    let before = memory.head().load(Ordering::Relaxed);
    let small = ARENA_FROM as usize - 8;
    assert_eq!(w.tell(2, "", "1.3", &body(1, small)), OK);
    let head = memory.head().load(Ordering::Relaxed);
    assert_eq!(head - before, LANE_HEADER + small as u64);
}
