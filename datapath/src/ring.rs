//! A ring of records with one writer and one reader, over memory that the other side may spoil (D13).
//!
//! Invariants:
//! 1. Positions only grow; the place of a position is `position & (size - 1)`; records begin at multiples of 8.
//! 2. A record is copied completely before `head` is published with release order, so a writer that is killed
//!    between two instructions never shows a torn record; what it had reserved is simply not there.
//! 3. Each side keeps its own index in private memory and never reads it back. The other side's index is checked
//!    at each look: `tail <= head <= tail + size`, else [`Violation`], and the caller cuts that peer off.
//! 4. A sleeper sets its flag, then looks once more behind a full fence; a publisher publishes, then looks at the
//!    flag behind a full fence. One of the two sees the other, whatever the processor (arm64 included), so no wake-up is lost.
//!
//! The memory itself is behind [`Memory`]: shared segments in the product, model-checked cells under loom.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// The alignment of records and the granularity of positions, in bytes.
pub const ALIGN: u64 = 8;

/// Rounds a length up to the next record boundary.
#[must_use]
pub const fn padded(len: u64) -> u64 {
    (len + (ALIGN - 1)) & !(ALIGN - 1)
}

/// The peer broke a rule of the ring; the text names the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation(pub &'static str);

/// What a ring stands on: its indices, its flags, and its bytes.
///
/// # Safety
/// `copy_in` and `copy_out` must stay inside the segment for any `pos` and for lengths up to `size()`, and the
/// implementation must tolerate that another process changes the bytes at any time.
pub unsafe trait Memory {
    /// Bytes of data, a power of two.
    fn size(&self) -> u64;
    /// Published by the writer.
    fn head(&self) -> &AtomicU64;
    /// Released by the reader.
    fn tail(&self) -> &AtomicU64;
    /// Set by a reader that sleeps or is about to: the writer must wake it.
    fn reader_sleeps(&self) -> &AtomicU32;
    /// Set by a writer that waits for progress of the reader.
    fn writer_waits(&self) -> &AtomicU32;
    /// Copies bytes into the ring at a position.
    fn copy_in(&self, pos: u64, bytes: &[u8]);
    /// Copies bytes out of the ring from a position.
    fn copy_out(&self, pos: u64, bytes: &mut [u8]);
}

/// The writing half. Not shared: whoever has it is the only writer.
pub struct Producer<M> {
    memory: M,
    size: u64,
    head: u64,
    published: u64,
    tail: u64,
}

impl<M: Memory> Producer<M> {
    /// Takes the writing half of an empty ring.
    pub fn new(memory: M) -> Self {
        let size = memory.size();
        Self {
            memory,
            size,
            head: 0,
            published: 0,
            tail: 0,
        }
    }

    /// The memory under the ring.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Where the next record will begin.
    pub fn position(&self) -> u64 {
        self.head
    }

    /// What the reader has released, as of the last look.
    pub fn released(&self) -> u64 {
        self.tail
    }

    /// Bytes not released by the reader, as of the last look.
    pub fn used(&self) -> u64 {
        self.head - self.tail
    }

    /// Bytes free as of the last look.
    pub fn free(&self) -> u64 {
        self.size - self.used()
    }

    /// Looks at the reader's index and returns it.
    ///
    /// # Errors
    /// [`Violation`] when it runs backwards or past what was published.
    pub fn refresh(&mut self) -> Result<u64, Violation> {
        let tail = self.memory.tail().load(Ordering::Acquire);
        if tail < self.tail {
            return Err(Violation("tail ran backwards"));
        }
        if tail > self.published {
            return Err(Violation("tail past head"));
        }
        if !tail.is_multiple_of(ALIGN) {
            return Err(Violation("tail not aligned"));
        }
        self.tail = tail;
        Ok(tail)
    }

    /// Reserves room for a record of `len` bytes and returns its position, or `None` when the ring is too full.
    ///
    /// Nothing is visible to the reader before [`Self::publish`].
    ///
    /// # Errors
    /// [`Violation`] as in [`Self::refresh`].
    pub fn reserve(&mut self, len: u64) -> Result<Option<u64>, Violation> {
        let need = padded(len);
        if need > self.free() {
            self.refresh()?;
            if need > self.free() {
                return Ok(None);
            }
        }
        let pos = self.head;
        self.head += need;
        Ok(Some(pos))
    }

    /// Gives back what was reserved since the last publish.
    pub fn abandon(&mut self) {
        self.head = self.published;
    }

    /// Makes all reserved records visible.
    pub fn publish(&mut self) {
        self.published = self.head;
        self.memory.head().store(self.head, Ordering::Release);
    }

    /// After a publish: whether the reader sleeps and must be woken. Clears its flag, so that one waker is enough.
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        let flag = self.memory.reader_sleeps();
        flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::AcqRel) != 0
    }

    /// Announces that the writer waits for the reader's progress, then looks once more.
    ///
    /// # Errors
    /// [`Violation`] as in [`Self::refresh`].
    pub fn wait_begin(&mut self) -> Result<u64, Violation> {
        self.memory.writer_waits().store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.refresh()
    }
}

/// The reading half. Not shared: whoever has it is the only reader.
pub struct Consumer<M> {
    memory: M,
    size: u64,
    head: u64,
    next: u64,
    released: u64,
}

impl<M: Memory> Consumer<M> {
    /// Takes the reading half of an empty ring.
    pub fn new(memory: M) -> Self {
        let size = memory.size();
        Self {
            memory,
            size,
            head: 0,
            next: 0,
            released: 0,
        }
    }

    /// The memory under the ring.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Where the next record to be read begins.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Everything before this position was published, as of the last look.
    pub fn known(&self) -> u64 {
        self.head
    }

    /// Everything before this position was released.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// Looks at the writer's index; returns the bytes that are waiting.
    ///
    /// # Errors
    /// [`Violation`] when it runs backwards or further than the ring is large.
    pub fn refresh(&mut self) -> Result<u64, Violation> {
        let head = self.memory.head().load(Ordering::Acquire);
        if head < self.head {
            return Err(Violation("head ran backwards"));
        }
        if head - self.released > self.size {
            return Err(Violation("head further than the ring is large"));
        }
        if !head.is_multiple_of(ALIGN) {
            return Err(Violation("head not aligned"));
        }
        self.head = head;
        Ok(head - self.next)
    }

    /// The position and the length of the next record, or `None` when the ring is empty. Does not advance.
    ///
    /// # Errors
    /// [`Violation`] when indices or the length field cannot be true; `min` is the smallest legal record.
    pub fn peek(&mut self, min: u32) -> Result<Option<(u64, u32)>, Violation> {
        if self.head == self.next && self.refresh()? == 0 {
            return Ok(None);
        }
        let mut word = [0u8; 4];
        self.memory.copy_out(self.next, &mut word);
        let len = u32::from_le_bytes(word);
        if len < min {
            return Err(Violation("record shorter than its header"));
        }
        if padded(u64::from(len)) > self.head - self.next {
            return Err(Violation("record longer than what was published"));
        }
        Ok(Some((self.next, len)))
    }

    /// Steps over a record that [`Self::peek`] returned, without giving its room back.
    pub fn advance(&mut self, len: u32) {
        self.next += padded(u64::from(len));
        debug_assert!(self.next <= self.head);
    }

    /// Gives the room before `pos` back to the writer. `pos` is at most [`Self::position`].
    pub fn release(&mut self, pos: u64) {
        debug_assert!(pos >= self.released && pos <= self.next);
        self.released = pos;
        self.memory.tail().store(pos, Ordering::Release);
    }

    /// After a release: whether the writer waits for it. Clears the flag.
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        let flag = self.memory.writer_waits();
        flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::AcqRel) != 0
    }

    /// Announces that the reader is going to sleep, then looks once more: `true` when there is nothing to read.
    ///
    /// # Errors
    /// [`Violation`] as in [`Self::refresh`].
    pub fn sleep_begin(&mut self) -> Result<bool, Violation> {
        self.memory.reader_sleeps().store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Ok(self.refresh()? == 0)
    }

    /// The reader is awake again. Returns whether its flag was still set, that is: nobody has sent a wake-up.
    pub fn sleep_end(&self) -> bool {
        self.memory.reader_sleeps().swap(0, Ordering::AcqRel) != 0
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod heap {
    //! A ring's memory on the heap, for tests within one process.
    use super::{AtomicU32, AtomicU64, Memory};
    use std::cell::UnsafeCell;
    use std::sync::Arc;

    pub struct Heap {
        pub head: AtomicU64,
        pub tail: AtomicU64,
        pub sleeps: AtomicU32,
        pub waits: AtomicU32,
        data: UnsafeCell<Box<[u8]>>,
    }
    // SAFETY: the ring's own protocol keeps writer and reader off each other's bytes.
    unsafe impl Sync for Heap {}
    // SAFETY: it owns its data.
    unsafe impl Send for Heap {}

    impl Heap {
        pub fn shared(size: usize) -> Arc<Self> {
            Arc::new(Self {
                head: AtomicU64::new(0),
                tail: AtomicU64::new(0),
                sleeps: AtomicU32::new(0),
                waits: AtomicU32::new(0),
                data: UnsafeCell::new(vec![0u8; size].into_boxed_slice()),
            })
        }
    }

    // SAFETY: positions are masked, copies are split at the end of the data.
    unsafe impl Memory for Arc<Heap> {
        fn size(&self) -> u64 {
            // SAFETY: the length never changes.
            unsafe { (&*self.data.get()).len() as u64 }
        }
        fn head(&self) -> &AtomicU64 {
            &self.head
        }
        fn tail(&self) -> &AtomicU64 {
            &self.tail
        }
        fn reader_sleeps(&self) -> &AtomicU32 {
            &self.sleeps
        }
        fn writer_waits(&self) -> &AtomicU32 {
            &self.waits
        }
        fn copy_in(&self, pos: u64, bytes: &[u8]) {
            let size = self.size();
            // SAFETY: reserved by the writer, not yet published.
            let data = unsafe { &mut *self.data.get() };
            for (i, b) in bytes.iter().enumerate() {
                data[((pos + i as u64) & (size - 1)) as usize] = *b;
            }
        }
        fn copy_out(&self, pos: u64, bytes: &mut [u8]) {
            let size = self.size();
            // SAFETY: published by the writer, not yet released.
            let data = unsafe { &*self.data.get() };
            for (i, b) in bytes.iter_mut().enumerate() {
                *b = data[((pos + i as u64) & (size - 1)) as usize];
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::heap::Heap;
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::sync::atomic::Ordering;

    fn put(p: &mut Producer<std::sync::Arc<Heap>>, body: &[u8]) -> bool {
        let len = 4 + body.len() as u64;
        match p.reserve(len).unwrap() {
            None => false,
            Some(pos) => {
                p.memory().copy_in(pos, &(len as u32).to_le_bytes());
                p.memory().copy_in(pos + 4, body);
                p.publish();
                true
            }
        }
    }

    fn get(c: &mut Consumer<std::sync::Arc<Heap>>) -> Option<Vec<u8>> {
        let (pos, len) = c.peek(4).unwrap()?;
        let mut body = vec![0; len as usize - 4];
        c.memory().copy_out(pos + 4, &mut body);
        c.advance(len);
        c.release(c.position());
        Some(body)
    }

    proptest! {
        #[test]
        fn d13_ring_is_a_bounded_queue(ops in prop::collection::vec(prop::option::of(0usize..60), 1..400)) {
            let memory = Heap::shared(256);
            let (mut p, mut c) = (Producer::new(memory.clone()), Consumer::new(memory));
            let mut model: VecDeque<Vec<u8>> = VecDeque::new();
            let mut used = 0u64;
            for (n, op) in ops.into_iter().enumerate() {
                match op {
                    Some(len) => {
                        let body = vec![n as u8; len];
                        let need = padded(4 + len as u64);
                        let fits = used + need <= 256;
                        prop_assert_eq!(put(&mut p, &body), fits);
                        if fits { used += need; model.push_back(body); }
                    }
                    None => {
                        let want = model.pop_front();
                        if let Some(body) = &want { used -= padded(4 + body.len() as u64); }
                        prop_assert_eq!(get(&mut c), want);
                    }
                }
            }
        }

        #[test]
        fn case5_hostile_indices_are_refused_or_harmless(head in any::<u64>(), tail in any::<u64>(), len in any::<u32>()) {
            let memory = Heap::shared(256);
            let (mut p, mut c) = (Producer::new(memory.clone()), Consumer::new(memory.clone()));
            memory.head.store(head, Ordering::Relaxed);
            memory.tail.store(tail, Ordering::Relaxed);
            memory.copy_in(0, &len.to_le_bytes());
            match c.peek(4) {
                Ok(Some((pos, len))) => prop_assert!(pos == 0 && padded(u64::from(len)) <= head && head <= 256),
                Ok(None) => prop_assert_eq!(head, 0),
                Err(_) => {}
            }
            match p.refresh() {
                Ok(seen) => prop_assert_eq!(seen, 0),
                Err(_) => prop_assert_ne!(tail, 0),
            }
        }
    }

    #[test]
    fn d13_two_threads_see_every_record_once_in_order() {
        let memory = Heap::shared(1024);
        let (mut p, mut c) = (Producer::new(memory.clone()), Consumer::new(memory));
        let writer = std::thread::spawn(move || {
            for n in 0u32..200_000 {
                while !put(&mut p, &n.to_le_bytes()) {
                    std::hint::spin_loop();
                }
            }
        });
        for n in 0u32..200_000 {
            let body = loop {
                if let Some(body) = get(&mut c) {
                    break body;
                }
                std::hint::spin_loop();
            };
            assert_eq!(body, n.to_le_bytes());
        }
        writer.join().unwrap();
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Every interleaving of a writer and a reader, under the memory model and not under x86's.
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Cells {
        head: AtomicU64,
        tail: AtomicU64,
        sleeps: AtomicU32,
        waits: AtomicU32,
        words: [UnsafeCell<[u8; 8]>; 2],
    }
    // SAFETY: loom reports any access that is not ordered.
    unsafe impl Sync for Cells {}
    // SAFETY: it owns its data.
    unsafe impl Send for Cells {}

    // SAFETY: two words of eight bytes, positions masked.
    unsafe impl Memory for Arc<Cells> {
        fn size(&self) -> u64 {
            16
        }
        fn head(&self) -> &AtomicU64 {
            &self.head
        }
        fn tail(&self) -> &AtomicU64 {
            &self.tail
        }
        fn reader_sleeps(&self) -> &AtomicU32 {
            &self.sleeps
        }
        fn writer_waits(&self) -> &AtomicU32 {
            &self.waits
        }
        fn copy_in(&self, pos: u64, bytes: &[u8]) {
            self.words[(pos as usize / 8) & 1].with_mut(|w| {
                // SAFETY: loom checks that nobody else has it.
                unsafe { (&mut *w)[..bytes.len()].copy_from_slice(bytes) }
            });
        }
        fn copy_out(&self, pos: u64, bytes: &mut [u8]) {
            self.words[(pos as usize / 8) & 1].with(|w| {
                // SAFETY: loom checks that nobody writes it.
                unsafe { bytes.copy_from_slice(&(&*w)[..bytes.len()]) }
            });
        }
    }

    fn cells() -> Arc<Cells> {
        Arc::new(Cells {
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            sleeps: AtomicU32::new(0),
            waits: AtomicU32::new(0),
            words: [UnsafeCell::new([0; 8]), UnsafeCell::new([0; 8])],
        })
    }

    #[test]
    fn d13_records_are_whole_and_room_is_not_reused_early() {
        loom::model(|| {
            let memory = cells();
            let other = memory.clone();
            let writer = loom::thread::spawn(move || {
                let mut p = Producer::new(other);
                let mut sent = 0u8;
                for n in 1u8..=3 {
                    if let Some(pos) = p.reserve(8).unwrap() {
                        p.memory().copy_in(pos, &[8, 0, 0, 0, n, n, n, n]);
                        p.publish();
                        sent = n;
                    } else {
                        break;
                    }
                }
                sent
            });
            let mut c = Consumer::new(memory);
            let mut seen = 0u8;
            for _ in 0..2 {
                if let Some((pos, len)) = c.peek(8).unwrap() {
                    let mut record = [0u8; 8];
                    c.memory().copy_out(pos, &mut record);
                    seen += 1;
                    assert_eq!(record, [8, 0, 0, 0, seen, seen, seen, seen]);
                    c.advance(len);
                    c.release(c.position());
                }
            }
            assert!(writer.join().unwrap() >= seen);
        });
    }

    #[test]
    fn d13_no_wake_up_is_lost() {
        loom::model(|| {
            let memory = cells();
            let other = memory.clone();
            let writer = loom::thread::spawn(move || {
                let mut p = Producer::new(other);
                let pos = p.reserve(8).unwrap().unwrap();
                p.memory().copy_in(pos, &[8, 0, 0, 0, 1, 1, 1, 1]);
                p.publish();
                p.must_wake()
            });
            let mut c = Consumer::new(memory);
            let sleeps = c.sleep_begin().unwrap();
            let woken = writer.join().unwrap();
            assert!(!sleeps || woken, "the reader sleeps and nobody wakes it");
        });
    }
}
