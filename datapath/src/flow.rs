//! Which addresses an endpoint may send to: patterns that the policy of the cluster has for it, and what follows for an address.
//!
//! Whoever is on a bus of this host alone has no [`Reach`] and sends to everybody. On a bus of the cluster the agent gives each
//! endpoint one, empty before it has joined. The master of a bus sends to everybody, and an answer to a request that is still open
//! goes to whoever asked; nobody else gets anything that no pattern covers.
//!
//! Invariants:
//! 1. What a pattern covers depends on the pattern and on the text of the address alone, and is what `master/policy.py` says of
//!    them: `*` is any text within one component, `**` as a whole component any number of components, also none.
//! 2. What is remembered of addresses is bounded, and forgotten with the patterns.
//! 3. A refusal is told once for each address, of so many addresses ([`TOLD`]) for as long as the patterns stay the same.

use std::borrow::Cow;
use std::collections::HashMap;

use super::{Side, Switch};
use crate::endpoint::Ref;
use crate::trunk::LaneEvent;

/// Addresses of which it is remembered whether a pattern covers them.
const KNOWN: usize = 1024;
/// Addresses of which it is told that they were refused: who tries more than these has been noticed.
const TOLD: usize = 64;

/// A pattern, by its components; `None` stands for `**`.
struct Pattern(Vec<Option<Box<[u8]>>>);

/// What is remembered of an address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Covered,
    Refused,
    /// Refused, and that was told.
    Told,
}

/// The addresses that one endpoint may send to.
#[derive(Default)]
pub struct Reach {
    patterns: Vec<Pattern>,
    known: HashMap<Box<[u8]>, Known>,
    /// The last one that was covered: most of what an endpoint sends goes where its last message went.
    last: Vec<u8>,
    told: usize,
}

impl Reach {
    /// What these patterns cover; none cover nothing.
    #[must_use]
    pub fn new<T: AsRef<str>>(patterns: &[T]) -> Self {
        Self {
            patterns: patterns.iter().map(|p| Pattern::new(p.as_ref())).collect(),
            ..Self::default()
        }
    }

    /// Whether a pattern covers an address.
    pub fn covers(&mut self, address: &[u8]) -> bool {
        if !address.is_empty() && *self.last == *address {
            return true;
        }
        let is_covered = match self.known.get(address) {
            Some(known) => *known == Known::Covered,
            None => self.look(address),
        };
        if is_covered {
            self.last.clear();
            self.last.extend_from_slice(address);
        }
        is_covered
    }

    /// The same of an address of which nothing is remembered.
    fn look(&mut self, address: &[u8]) -> bool {
        let text = text_of(address);
        let is_covered = self.patterns.iter().any(|p| p.fits(&text));
        let known = if is_covered {
            Known::Covered
        } else {
            Known::Refused
        };
        self.remember(address, known);
        is_covered
    }

    fn remember(&mut self, address: &[u8], known: Known) {
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        self.known.insert(address.into(), known);
    }

    /// Whether it is to be told that an address was refused.
    fn is_news(&mut self, address: &[u8]) -> bool {
        if self.told >= TOLD || self.known.get(address) == Some(&Known::Told) {
            return false;
        }
        self.told += 1;
        self.remember(address, Known::Told);
        true
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let component = |part: &str| (part != "**").then(|| part.as_bytes().into());
        Self(text.split('.').map(component).collect())
    }

    /// Whether the whole text is as the pattern says.
    fn fits(&self, text: &[u8]) -> bool {
        let parts: Vec<&[u8]> = text.split(|byte| *byte == b'.').collect();
        wild(
            &self.0,
            &parts,
            |one| one.is_none(),
            |one, part| {
                let glob = one.as_deref().unwrap_or_default();
                wild(glob, part, |c| *c == b'*', |c, byte| c == byte)
            },
        )
    }
}

/// Whether a sequence is as a pattern says, in which some places stand for any number of elements. Going back to the last such place
/// is enough, so this costs no more than the product of both lengths.
fn wild<P, T>(
    pattern: &[P],
    text: &[T],
    is_any: impl Fn(&P) -> bool,
    is_as: impl Fn(&P, &T) -> bool,
) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Where to go on when what follows the last such place does not fit: behind it, one element later.
    let mut back = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(one) if is_any(one) => {
                at += 1;
                back = Some((at, seen));
            }
            Some(one) if is_as(one, &text[seen]) => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((behind, from)) = back else {
                    return false;
                };
                (at, seen) = (behind, from + 1);
                back = Some((behind, seen));
            }
        }
    }
    pattern[at..].iter().all(is_any)
}

/// An address as people write it, which is how patterns see it (`proto/address.py`, `format_within`): percent escapes, or `0x` and
/// hexadecimal digits where it cannot be shown.
pub(super) fn text_of(address: &[u8]) -> Cow<'_, [u8]> {
    let is_plain = |byte: &u8| byte.is_ascii_graphic() && !b"%:*".contains(byte);
    if address.iter().all(is_plain) && !address.starts_with(b"0x") {
        return Cow::Borrowed(address);
    }
    let mut text = Vec::new();
    match std::str::from_utf8(address) {
        Ok(shown) if shown.chars().all(is_printable) => {
            for byte in address {
                if b" %:*".contains(byte) {
                    text.extend_from_slice(format!("%{byte:02X}").as_bytes());
                } else {
                    text.push(*byte);
                }
            }
            if text.starts_with(b"0x") {
                // A name that looks like hexadecimal is none.
                text.splice(..1, *b"%30");
            }
        }
        _ => {
            text.extend_from_slice(b"0x");
            for byte in address {
                text.extend_from_slice(format!("{byte:02x}").as_bytes());
            }
        }
    }
    Cow::Owned(text)
}

/// Whether a character can be shown: Rust escapes the others, wherever they do not come first.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return c == ' ' || c.is_ascii_graphic();
    }
    let mut text = String::from("a");
    text.push(c);
    text.escape_debug().count() == 2
}

impl Switch {
    /// Lets an endpoint send to what these patterns cover, and to nobody else. `false` when it is unknown.
    pub fn set_reach<T: AsRef<str>>(&mut self, id: u64, patterns: &[T]) -> bool {
        self.close_lanes(id, Side::Out);
        let Some(e) = self.endpoint_mut(id) else {
            return false;
        };
        e.reach = Some(Box::new(Reach::new(patterns)));
        if e.waiting {
            // It may wait for room where it may send no more.
            let me = e.me;
            self.room_for(me);
        }
        true
    }

    /// Whether a member may send to an address, whoever owns that now. Answers to open requests may go where this says no.
    #[inline]
    pub fn may_send_to(&mut self, who: Ref, address: &[u8]) -> bool {
        let Some(e) = self.get_mut(who) else {
            return false;
        };
        let Some(reach) = &mut e.reach else {
            return true;
        };
        reach.covers(address) || {
            let bus = e.bus.and_then(|bus| self.buses.get(&bus));
            bus.is_some_and(|bus| bus.master == Some(who))
        }
    }

    /// Whether `from` owes `to` the answer to a request of this number.
    #[cold]
    pub(super) fn owes(&mut self, from: Ref, to: Ref, serial: u64) -> bool {
        let asker = self.asker(to, from, serial);
        self.get(from)
            .is_some_and(|e| e.unanswered.contains_key(&(asker, serial)))
    }

    /// The verdict on what may not be sent there; told where that is news.
    #[cold]
    pub(super) fn deny(&mut self, who: Ref, address: &[u8]) -> i32 {
        if let Some(e) = self.get_mut(who)
            && let Some(reach) = &mut e.reach
            && reach.is_news(address)
        {
            let id = e.id;
            self.lane_events.push(LaneEvent::Denied(id, address.into()));
        }
        -libc::EPERM
    }
}
