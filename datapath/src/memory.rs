//! Shared segments: a sealed memfd, mapped with its data twice in a row. The `unsafe` of the crate lives here, in `page`, `line` and `waker`.
//!
//! Invariants:
//! 1. The size of a segment is sealed before anybody else gets its descriptor, so no peer can cut it short under a reader (no SIGBUS).
//! 2. All access is masked to the segment: whatever a position says, no byte outside is touched.
//! 3. The bytes may change under us at any time: they are copied with raw copies, never borrowed as Rust references by the switch.
//! 4. A segment that is *shown* can be written by who made it and by nobody else, whoever has its descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use crate::ring::Memory;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Bytes before the data: one page with the indices and flags.
pub const HEADER_BYTES: usize = 4096;
const HEAD: usize = 0;
const TAIL: usize = 128;
const READER_SLEEPS: usize = 256;
const WRITER_WAITS: usize = 384;
const SIGNAL: usize = 392;
const ROOM: usize = 396;
const SEQ: usize = 512;
/// Beside the head: both are written with each publish.
const COUNT: usize = 8;

/// All the seals that keep a segment's size as it is.
pub const SIZE_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
/// All the seals of an immutable body (D14).
pub const BODY_SEALS: i32 = SIZE_SEALS | libc::F_SEAL_WRITE;

/// The same where only who made it may write.
pub const SHOWN_SEALS: i32 = SIZE_SEALS | libc::F_SEAL_FUTURE_WRITE;
/// The largest arena behind the ring of a lane, in bytes.
pub const MAX_ARENA: usize = 16 << 20;

pub(crate) fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Creates an anonymous file that can be sealed; it has no name and goes with its last descriptor.
///
/// # Errors
/// As memfd_create(2).
pub fn memfd(name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: a valid C string; the descriptor is new and ours.
    unsafe {
        let fd = check(libc::memfd_create(
            name.as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Adds seals to a memfd.
///
/// # Errors
/// As fcntl(2).
pub fn seal(fd: BorrowedFd<'_>, seals: i32) -> io::Result<()> {
    // SAFETY: plain call on a descriptor that is open.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// The seals of a memfd, or `None` for a descriptor that cannot have any.
#[must_use]
pub fn seals(fd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: plain call on a descriptor that is open.
    let got = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    (got >= 0).then_some(got)
}

/// The size of an open file in bytes.
///
/// # Errors
/// As fstat(2).
pub fn file_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: stat is plain data and fully written on success.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        check(libc::fstat(fd.as_raw_fd(), &raw mut stat))?;
        Ok(stat.st_size as u64)
    }
}

/// Whether a file is one of the kind that cannot fault: pages of any other file may be missing under a reader.
pub(crate) fn is_plain_memory(fd: BorrowedFd<'_>) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    // SAFETY: statfs is plain data and fully written on success.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        libc::fstatfs(fd.as_raw_fd(), &raw mut stat) == 0 && stat.f_type as i64 == TMPFS
    }
}

/// A ring's size that can be.
fn is_ring(size: usize) -> bool {
    size.is_power_of_two() && (HEADER_BYTES..=1 << 30).contains(&size)
}

/// An arena's size that can be.
fn is_arena(size: usize) -> bool {
    size <= MAX_ARENA && size.is_multiple_of(HEADER_BYTES)
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// One mapped ring segment. Unmapped when the last clone of its `Arc` goes.
///
/// Its file is a page of header, the ring, and in a lane maybe an arena.
pub struct Segment {
    base: *mut u8,
    size: usize,
    /// Bytes of the arena, which lies behind the second copy of the ring.
    arena: usize,
}

// SAFETY: the segment is only raw memory; what may be done from which thread is the ring's rule.
unsafe impl Send for Segment {}
// SAFETY: as above; the indices and flags are atomics.
unsafe impl Sync for Segment {}

impl Segment {
    /// Creates a segment with `size` bytes of data (a power of two, at least a page), sealed, and maps it.
    ///
    /// # Errors
    /// `InvalidInput` for an impossible size, else as memfd_create(2), ftruncate(2), mmap(2).
    pub fn create(size: usize) -> io::Result<(Arc<Self>, OwnedFd)> {
        let fd = Self::file(c"afbus-ring", size, 0)?;
        seal(fd.as_fd(), SIZE_SEALS)?;
        Ok((Self::map(fd.as_fd(), size, 0, Self::WRITTEN)?, fd))
    }

    /// Creates the data of a lane: a ring and an arena that whoever has the descriptor can read, and only this mapping can write.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_shown(size: usize, arena: usize) -> io::Result<(Arc<Self>, OwnedFd)> {
        let fd = Self::file(c"afbus-lane", size, arena)?;
        let segment = Self::map(fd.as_fd(), size, arena, Self::WRITTEN)?;
        seal(fd.as_fd(), SHOWN_SEALS)?;
        Ok((segment, fd))
    }

    fn file(name: &std::ffi::CStr, size: usize, arena: usize) -> io::Result<OwnedFd> {
        if !is_ring(size) || !is_arena(arena) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a ring's size must be a power of two from 4096 to 2^30 bytes, not {size}"),
            ));
        }
        let fd = memfd(name)?;
        let total = HEADER_BYTES + size + arena;
        // SAFETY: plain call on our own descriptor.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), total as libc::off_t) })?;
        Ok(fd)
    }

    /// Maps a segment that somebody else created.
    ///
    /// # Errors
    /// `InvalidData` when its size is impossible or not sealed, else as mmap(2).
    pub fn attach(fd: BorrowedFd<'_>) -> io::Result<Arc<Self>> {
        if seals(fd).is_none_or(|have| have & SIZE_SEALS != SIZE_SEALS) {
            return Err(bad("ring segment: its size is not sealed"));
        }
        let total = file_size(fd)?;
        let size = usize::try_from(total)
            .unwrap_or(0)
            .saturating_sub(HEADER_BYTES);
        if !is_ring(size) {
            return Err(bad(
                "ring segment: its size is not a header and a power of two",
            ));
        }
        Self::map(fd, size, 0, Self::WRITTEN)
    }

    /// Maps the data of a lane, with a ring of so many bytes, to read it; its arena only on demand.
    ///
    /// # Errors
    /// `InvalidData` when others could write it or change its size, or it has another one, else as mmap(2).
    pub fn attach_shown(
        fd: BorrowedFd<'_>,
        size: usize,
        with_arena: bool,
    ) -> io::Result<Arc<Self>> {
        if seals(fd).is_none_or(|have| have & SHOWN_SEALS != SHOWN_SEALS) || !is_plain_memory(fd) {
            return Err(bad("data of a lane: others could change it"));
        }
        let total = usize::try_from(file_size(fd)?).unwrap_or(0);
        let arena = total.checked_sub(HEADER_BYTES + size);
        match arena.filter(|arena| is_ring(size) && is_arena(*arena)) {
            Some(arena) => {
                let arena = if with_arena { arena } else { 0 };
                Self::map(fd, size, arena, libc::PROT_READ)
            }
            None => Err(bad("data of a lane: its size is another one")),
        }
    }

    const WRITTEN: i32 = libc::PROT_READ | libc::PROT_WRITE;

    fn map(
        fd: BorrowedFd<'_>,
        size: usize,
        arena: usize,
        protection: i32,
    ) -> io::Result<Arc<Self>> {
        let segment = Self {
            base: ptr::null_mut(),
            size,
            arena,
        };
        // SAFETY: reserves an address range of our own; the file mappings are then placed inside it with MAP_FIXED,
        // and the range is given back whole on any failure or on drop.
        unsafe {
            let base = libc::mmap(
                ptr::null_mut(),
                segment.span(),
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            let base = base.cast::<u8>();
            let segment = Arc::new(Self { base, ..segment });
            let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
            for (at, len, offset) in [
                (0, HEADER_BYTES + size, 0),
                // The ring once more, and what lies behind it.
                (HEADER_BYTES + size, size + arena, HEADER_BYTES),
            ] {
                let place = base.add(at).cast();
                let offset = offset as libc::off_t;
                if libc::mmap(place, len, protection, fixed, fd.as_raw_fd(), offset)
                    == libc::MAP_FAILED
                {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(segment)
        }
    }

    fn span(&self) -> usize {
        HEADER_BYTES + 2 * self.size + self.arena
    }

    /// Bytes of the arena.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.arena as u64
    }

    /// Where so many bytes of the arena lie; `None` when they are not all inside it.
    #[must_use]
    pub fn arena_at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        if offset.checked_add(len)? > self.arena as u64 {
            return None;
        }
        // SAFETY: inside the mapping of the arena, as was just checked.
        Some(unsafe {
            self.base
                .add(HEADER_BYTES + 2 * self.size + offset as usize)
        })
    }

    /// Where a body lies, in the ring or in the arena; `None` when it is not all inside.
    #[must_use]
    pub fn body_at(&self, at: u64, in_arena: bool, len: usize) -> Option<*mut u8> {
        if in_arena {
            return self.arena_at(at, len as u64);
        }
        (len <= self.size).then(|| self.at(at))
    }

    /// Copies a body out of the ring or the arena; what is not inside is not copied.
    pub fn copy_body_out(&self, at: u64, in_arena: bool, bytes: &mut [u8]) {
        if let Some(place) = self.body_at(at, in_arena, bytes.len()) {
            // SAFETY: all of it is inside the mapping.
            unsafe { ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), bytes.len()) }
        }
    }

    /// Copies bytes into the arena; what does not fit in is left out.
    pub fn copy_into_arena(&self, offset: u64, bytes: &[u8]) {
        if let Some(place) = self.arena_at(offset, bytes.len() as u64) {
            // SAFETY: inside the mapping, as was just checked.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) }
        }
    }

    /// Writes words at a position that is a multiple of 8. As words and not as bytes that were put together elsewhere: those would have to
    /// be read again, and the processor does so only when all that it has written before is in its cache.
    pub fn put_words<const N: usize>(&self, pos: u64, words: [u64; N]) {
        for (n, word) in words.into_iter().enumerate() {
            self.word64_at(pos + 8 * n as u64)
                .store(word.to_le(), Ordering::Relaxed);
        }
    }

    /// The words at a position that is a multiple of 8.
    #[must_use]
    pub fn words<const N: usize>(&self, pos: u64) -> [u64; N] {
        std::array::from_fn(|n| {
            u64::from_le(self.word64_at(pos + 8 * n as u64).load(Ordering::Relaxed))
        })
    }

    fn word64_at(&self, pos: u64) -> &AtomicU64 {
        assert!(pos.is_multiple_of(8));
        // SAFETY: inside the segment and aligned; any bit pattern is an integer.
        unsafe { &*self.at(pos).cast::<AtomicU64>() }
    }

    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: inside the header page, aligned to 8, and any bit pattern is a u64.
        unsafe { &*self.base.add(offset).cast::<AtomicU64>() }
    }

    fn u32_at(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: inside the header page, aligned to 4, and any bit pattern is a u32.
        unsafe { &*self.base.add(offset).cast::<AtomicU32>() }
    }

    /// The futex word on which a writer sleeps; the reader of the ring bumps it with every wake.
    pub fn signal(&self) -> &AtomicU32 {
        self.u32_at(SIGNAL)
    }

    /// Counts how often room appeared where this writer had been refused for lack of it.
    pub fn room(&self) -> &AtomicU32 {
        self.u32_at(ROOM)
    }

    /// In the TX ring of an endpoint: the number of the last message that was accepted from it, by the switch or on a lane.
    pub fn seq(&self) -> &AtomicU64 {
        self.u64_at(SEQ)
    }

    /// In a lane: how many messages its writer has put there, for people.
    pub fn count(&self) -> &AtomicU64 {
        self.u64_at(COUNT)
    }

    /// Where the byte of a position lies. Contiguous for `size()` bytes from there, thanks to the double mapping.
    #[must_use]
    pub fn at(&self, pos: u64) -> *mut u8 {
        let offset = (pos as usize) & (self.size - 1);
        // SAFETY: masked into the first copy of the data.
        unsafe { self.base.add(HEADER_BYTES + offset) }
    }

    /// Copies from one segment to another, or within one, without a stop in private memory. `len` is cut to both sizes.
    pub fn copy_between(from: &Self, from_pos: u64, to: &Self, to_pos: u64, len: usize) {
        let len = len.min(from.size).min(to.size);
        // SAFETY: both ranges lie in the double mappings; they are different mappings or disjoint records.
        unsafe { ptr::copy(from.at(from_pos), to.at(to_pos), len) }
    }

    /// Appends bytes to private memory. `len` is cut to the size.
    pub fn append_to(&self, pos: u64, len: usize, out: &mut Vec<u8>) {
        let len = len.min(self.size);
        out.reserve(len);
        let at = out.len();
        // SAFETY: the range lies in the double mapping, and so many bytes were reserved just now; the memory is nobody else's.
        unsafe {
            ptr::copy_nonoverlapping(self.at(pos), out.as_mut_ptr().add(at), len);
            out.set_len(at + len);
        }
    }

    /// The i32 at a position that is a multiple of 4, as an atomic: the status word of a TX record.
    #[must_use]
    pub fn word_at(&self, pos: u64) -> &AtomicU32 {
        // SAFETY: inside the data, aligned because positions of records are multiples of 8 and the field's offset of 4.
        unsafe { &*self.at(pos & !3).cast::<AtomicU32>() }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the whole range was reserved by `map` and nobody has a pointer into it without an Arc of us.
        unsafe {
            libc::munmap(self.base.cast(), self.span());
        }
    }
}

// SAFETY: positions are masked, lengths cut to the size, and the double mapping makes any such range contiguous.
unsafe impl Memory for Arc<Segment> {
    fn size(&self) -> u64 {
        self.size as u64
    }
    fn head(&self) -> &AtomicU64 {
        self.u64_at(HEAD)
    }
    fn tail(&self) -> &AtomicU64 {
        self.u64_at(TAIL)
    }
    fn reader_sleeps(&self) -> &AtomicU32 {
        self.u32_at(READER_SLEEPS)
    }
    fn writer_waits(&self) -> &AtomicU32 {
        self.u32_at(WRITER_WAITS)
    }
    fn copy_in(&self, pos: u64, bytes: &[u8]) {
        let len = bytes.len().min(self.size);
        // SAFETY: see the trait.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(pos), len) }
    }
    fn copy_out(&self, pos: u64, bytes: &mut [u8]) {
        let len = bytes.len().min(self.size);
        // SAFETY: see the trait.
        unsafe { ptr::copy_nonoverlapping(self.at(pos), bytes.as_mut_ptr(), len) }
    }
}

/// Sleeps until somebody wakes `word`, it is no longer `seen`, or the time is over. May return early.
pub fn futex_wait(word: &AtomicU32, seen: u32, timeout: Duration) {
    let time = libc::timespec {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: the word and the timespec live for the call; the result does not matter, callers look again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            ptr::from_ref(word),
            libc::FUTEX_WAIT,
            seen,
            &raw const time,
        );
    }
}

/// Wakes all that sleep on `word`.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is mapped; waking has no other effect.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            ptr::from_ref(word),
            libc::FUTEX_WAKE,
            i32::MAX,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case5_the_size_cannot_be_changed_by_a_peer() {
        let (_segment, fd) = Segment::create(8192).unwrap();
        for size in [0, 4096, 1 << 20] {
            // SAFETY: plain call on our descriptor.
            let result = unsafe { libc::ftruncate(fd.as_raw_fd(), size) };
            assert_eq!(
                (result, io::Error::last_os_error().raw_os_error()),
                (-1, Some(libc::EPERM))
            );
        }
    }

    #[test]
    fn d13_data_is_contiguous_over_the_end() {
        let (segment, fd) = Segment::create(4096).unwrap();
        let other = Segment::attach(fd.as_fd()).unwrap();
        segment.copy_in(4090, b"0123456789");
        let mut out = [0u8; 10];
        other.copy_out(4090, &mut out);
        assert_eq!(&out, b"0123456789");
        other.copy_out(4096, &mut out[..4]);
        assert_eq!(&out[..4], b"6789");
    }

    #[test]
    fn case5_unsealed_or_odd_segments_are_refused() {
        let fd = memfd(c"x").unwrap();
        assert!(Segment::attach(fd.as_fd()).is_err());
        // SAFETY: plain call on our descriptor.
        unsafe { libc::ftruncate(fd.as_raw_fd(), 4096 + 5000) };
        seal(fd.as_fd(), SIZE_SEALS).unwrap();
        assert!(Segment::attach(fd.as_fd()).is_err());
        assert!(Segment::create(5000).is_err());
    }

    #[test]
    fn d6_the_data_of_a_lane_is_written_by_who_made_it_alone() {
        let (lane, fd) = Segment::create_shown(8192, 4096).unwrap();
        let other = Segment::attach_shown(fd.as_fd(), 8192, true).unwrap();
        lane.copy_in(8190, b"0123");
        let mut seen = [0u8; 4];
        other.copy_out(8190, &mut seen);
        assert_eq!(&seen, b"0123");
        // SAFETY: both places are inside the arena.
        unsafe {
            *lane.arena_at(4095, 1).unwrap() = 7;
            assert_eq!(*other.arena_at(4095, 1).unwrap(), 7);
        }
        assert!(other.arena_at(4095, 2).is_none() && other.arena_at(u64::MAX, 2).is_none());
        let denied = Some(libc::EPERM);
        let written = Segment::map(fd.as_fd(), 8192, 0, Segment::WRITTEN);
        assert_eq!(written.err().and_then(|e| e.raw_os_error()), denied);
        // SAFETY: plain calls on our descriptor.
        unsafe {
            assert_eq!(libc::pwrite(fd.as_raw_fd(), c"x".as_ptr().cast(), 1, 0), -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), denied);
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            assert_eq!(libc::fallocate(fd.as_raw_fd(), hole, 0, 4096), -1);
        }
        assert_eq!(other.arena_bytes(), 4096);
        for size in [16384, 5000] {
            assert!(Segment::attach_shown(fd.as_fd(), size, true).is_err());
        }
        let (_, fd) = Segment::create(8192).unwrap();
        assert!(Segment::attach_shown(fd.as_fd(), 8192, false).is_err());
    }
}
