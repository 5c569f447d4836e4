//! Room for large bodies in the process's own heap.

use std::sync::Once;

use crate::client::MESSAGE_BYTES;

/// Bodies from here on make it worth to keep room for more of them.
const LARGE: usize = 32 << 10;

/// To be called before a body of so many bytes is received.
///
/// glibc gives memory back to the system as soon as 128 KiB lie free at the top of the heap, and gets it again for the next body: page by
/// page, zeroed, which takes far longer than the copy. It stops doing so up to twice the size of the largest block that was ever mapped and
/// freed (mallopt(3), M_MMAP_THRESHOLD), as in any process that has once had one large message. So this has such a block, of which no page
/// is touched but the first. Who has set limits of its own for malloc keeps them.
pub(super) fn expect_body(bytes: usize) {
    static ONCE: Once = Once::new();
    if bytes >= LARGE {
        // SAFETY: a block that is used by nobody, freed once; null may be freed as well.
        ONCE.call_once(|| unsafe { libc::free(std::hint::black_box(libc::malloc(MESSAGE_BYTES))) });
    }
}
