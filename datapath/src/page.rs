//! Single pages of shared memory beside the data of a lane: what its agent says of it, and what each reader says (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. A *board* can be written by who made it and by nobody else. A *cursor* can be written by the sender and by one reader, and by no
//!    other reader.
//! 2. The size of a page is sealed, and words are looked at by atomics only.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use crate::gate::Gate;
use crate::memory::{
    HEADER_BYTES, SHOWN_SEALS, SIZE_SEALS, Segment, check, file_size, futex_wake, memfd, seal,
    seals,
};
use crate::ring::Memory;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Readers that one lane may have.
pub const MAX_READERS: usize = 64;

// Words of a board.
const STATE: usize = 0;
const END: usize = 8;
const PATIENCE: usize = 16;
const CAPACITY: usize = 24;
const NEWEST: usize = 64;
// Words of a cursor: what the reader writes with each release, what it writes as it goes to sleep or leaves, what the sender writes.
const TAIL: usize = 0;
const READER_SLEEPS: usize = 128;
const GATE_STATE: usize = 132;
const GATE_END: usize = 136;
const RUNG: usize = 192;
const WRITER_WAITS: usize = 256;
const WRITER_SIGNAL: usize = 260;
const WANTED: usize = 264;

/// One mapped page.
struct Page {
    base: *mut u8,
}

// SAFETY: one page of raw memory, looked at by atomics only.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// Creates a page and maps it to be written; then adds these seals.
    fn create(seals: i32) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd(c"afbus-page")?;
        // SAFETY: plain call on our own descriptor.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), HEADER_BYTES as libc::off_t) })?;
        let page = Self::map(fd.as_fd(), libc::PROT_READ | libc::PROT_WRITE)?;
        seal(fd.as_fd(), seals)?;
        Ok((page, fd))
    }

    /// Maps the page of somebody else, which must have these seals.
    fn attach(fd: BorrowedFd<'_>, needed: i32, protection: i32) -> io::Result<Self> {
        if seals(fd).is_none_or(|have| have & needed != needed)
            || file_size(fd)? != HEADER_BYTES as u64
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a page that others could change",
            ));
        }
        Self::map(fd, protection)
    }

    fn map(fd: BorrowedFd<'_>, protection: i32) -> io::Result<Self> {
        // SAFETY: a new mapping of a page, at an address that the system chooses.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                HEADER_BYTES,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast() })
    }

    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= HEADER_BYTES && offset.is_multiple_of(4));
        // SAFETY: inside the page, aligned, and any bit pattern is an integer; those who may only read it only load.
        unsafe { &*self.base.add(offset).cast::<AtomicU32>() }
    }

    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= HEADER_BYTES && offset.is_multiple_of(8));
        // SAFETY: as above.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody has a pointer into it without the page.
        unsafe {
            libc::munmap(self.base.cast(), HEADER_BYTES);
        }
    }
}

/// What the agent says of a lane to all who have it.
pub struct Board(Page);

impl Board {
    /// Creates a board.
    ///
    /// # Errors
    /// As memfd_create(2), ftruncate(2), mmap(2), fcntl(2).
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let (page, fd) = Page::create(SHOWN_SEALS)?;
        Ok((Self(page), fd))
    }

    /// Maps the board of somebody else, to be read.
    ///
    /// # Errors
    /// `InvalidData` when it is no board, else as mmap(2).
    pub fn attach(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Page::attach(fd, SHOWN_SEALS, libc::PROT_READ).map(Self)
    }

    /// The gate on it. Only who created the board may close it: for others the page cannot be written.
    #[must_use]
    pub fn gate(&self) -> Gate<'_> {
        Gate {
            state: self.0.u32_at(STATE),
            end: self.0.u64_at(END),
        }
    }

    /// For how many milliseconds the sender waits for room before it lets the switch decide.
    #[must_use]
    pub fn patience(&self) -> &AtomicU64 {
        self.0.u64_at(PATIENCE)
    }

    /// How many bytes of the ring may be used, as its readers want no more to lie unread.
    #[must_use]
    pub fn capacity(&self) -> &AtomicU64 {
        self.0.u64_at(CAPACITY)
    }

    /// The number of the newest lane from this sender to one of its readers.
    #[must_use]
    pub fn newest(&self, reader: usize) -> &AtomicU64 {
        self.0.u64_at(NEWEST + 8 * reader.min(MAX_READERS - 1))
    }
}

/// How far one reader is, and how it and the sender wake each other.
pub struct Cursor(Page);

impl Cursor {
    /// Creates a cursor.
    ///
    /// # Errors
    /// As memfd_create(2), ftruncate(2), mmap(2), fcntl(2).
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let (page, fd) = Page::create(SIZE_SEALS)?;
        Ok((Self(page), fd))
    }

    /// Maps the cursor that the agent made.
    ///
    /// # Errors
    /// `InvalidData` when it is none, else as mmap(2).
    pub fn attach(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Page::attach(fd, SIZE_SEALS, libc::PROT_READ | libc::PROT_WRITE).map(Self)
    }

    /// Everything before this position was released by the reader.
    #[must_use]
    pub fn tail(&self) -> &AtomicU64 {
        self.0.u64_at(TAIL)
    }

    /// How the reader sleeps: see `lane_in`.
    #[must_use]
    pub fn reader_sleeps(&self) -> &AtomicU32 {
        self.0.u32_at(READER_SLEEPS)
    }

    /// When the sender rang for the reader last, as [`crate::wait::clock`] counts, without what is above 32 bits.
    #[must_use]
    pub fn rung(&self) -> &AtomicU32 {
        self.0.u32_at(RUNG)
    }

    /// Set by a sender that waits for room.
    #[must_use]
    pub fn writer_waits(&self) -> &AtomicU32 {
        self.0.u32_at(WRITER_WAITS)
    }

    /// The word on which the sender sleeps.
    #[must_use]
    pub fn writer_signal(&self) -> &AtomicU32 {
        self.0.u32_at(WRITER_SIGNAL)
    }

    /// Up to where the reader must have released before the sender wants to be woken.
    #[must_use]
    pub fn wanted(&self) -> &AtomicU64 {
        self.0.u64_at(WANTED)
    }

    /// The gate of the reader, for when the agent is gone.
    #[must_use]
    pub fn gate(&self) -> Gate<'_> {
        Gate {
            state: self.0.u32_at(GATE_STATE),
            end: self.0.u64_at(GATE_END),
        }
    }

    /// Wakes the sender, if it sleeps.
    pub fn wake_writer(&self) {
        self.writer_signal().fetch_add(1, Ordering::Release);
        futex_wake(self.writer_signal());
    }
}

/// The ring of a lane as one reader has it: data that it can only read, and its cursor.
pub struct Shown {
    /// The sender's.
    pub data: Arc<Segment>,
    /// The reader's.
    pub cursor: Cursor,
}

// SAFETY: positions are masked and lengths cut by the segment; its bytes are only copied out.
unsafe impl Memory for Shown {
    fn size(&self) -> u64 {
        self.data.size()
    }
    fn head(&self) -> &AtomicU64 {
        self.data.head()
    }
    fn tail(&self) -> &AtomicU64 {
        self.cursor.tail()
    }
    fn reader_sleeps(&self) -> &AtomicU32 {
        self.cursor.reader_sleeps()
    }
    fn writer_waits(&self) -> &AtomicU32 {
        self.cursor.writer_waits()
    }
    fn copy_in(&self, _pos: u64, _bytes: &[u8]) {
        unreachable!("readers of a lane write nothing into it");
    }
    fn copy_out(&self, pos: u64, bytes: &mut [u8]) {
        self.data.copy_out(pos, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Passage;

    #[test]
    fn d6_a_board_is_written_by_whoever_made_it_alone() {
        let (board, fd) = Board::create().unwrap();
        let other = Board::attach(fd.as_fd()).unwrap();
        assert_eq!(other.gate().look(), Passage::Open);
        assert_eq!(board.gate().close(&AtomicU64::new(24)), 24);
        assert_eq!(other.gate().look(), Passage::Closed(24));
        let written = Cursor::attach(fd.as_fd());
        assert_eq!(
            written.err().and_then(|e| e.raw_os_error()),
            Some(libc::EPERM)
        );
        // SAFETY: plain call on a mapping of ours.
        let changed = unsafe {
            libc::mprotect(
                other.0.base.cast(),
                HEADER_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert_eq!(changed, -1, "nor made writable afterwards");
    }

    #[test]
    fn case5_a_page_of_another_size_is_refused() {
        let (cursor, fd) = Cursor::create().unwrap();
        let other = Cursor::attach(fd.as_fd()).unwrap();
        cursor.tail().store(8, Ordering::Relaxed);
        assert_eq!(other.tail().load(Ordering::Relaxed), 8);
        assert!(
            Board::attach(fd.as_fd()).is_err(),
            "others could write there"
        );
        let (_, fd) = Segment::create(4096).unwrap();
        assert!(Cursor::attach(fd.as_fd()).is_err());
    }
}
