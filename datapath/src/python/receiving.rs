//! Receiving: what recvmsg(2) returns, made of the records in the ring.
//!
//! Invariants:
//! 1. A message that was taken is returned. One that cannot be made is taken by the very call that tells so.
//! 2. Descriptors belong to us until the caller has the item that names them.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::client::{Incoming, Rx, Waited};
use crate::frame::{BODY_IN_MEMFD, GAP};
use crate::ring::Violation;

use super::described::Known;
use super::heap::expect_body;
use super::items::GAP_SPACE;
use super::rings::Rings;
use super::stop::{AGAIN, CLOSED, LATE, Patience, Stop};
use super::view::{new_bytes, read_exactly};

/// A signal between the last look for one and the sleep does not end that sleep, so the first is short.
const NAP: Duration = Duration::from_millis(10);

/// The reading half, and what belongs to whoever has it.
pub(super) struct Inbox {
    pub(super) rx: Rx,
    pub(super) known: Known,
    /// The position of a record that could not be made when others had been, and why; its call comes.
    failed: Option<((u64, u64), PyErr)>,
}

impl Inbox {
    pub(super) fn new(rx: Rx) -> Self {
        Self {
            rx,
            known: Known::default(),
            failed: None,
        }
    }
}

/// Bodies of messages of one source, and its address.
pub(super) type Run<'py> = (Bound<'py, PyList>, Py<PyAny>);

/// What came with a record by the line.
#[derive(Default)]
pub(super) struct Parcel {
    /// Descriptors of the message.
    pub(super) fds: Vec<OwnedFd>,
    /// Some were lost on the way.
    pub(super) lost: bool,
    /// The memfd in which its body lies.
    pub(super) body: Option<OwnedFd>,
}

impl Parcel {
    pub(super) fn of(rx: &mut Rx, record: &Incoming) -> Result<Self, Violation> {
        if record.header.fds == 0 {
            return Ok(Self::default());
        }
        let (mut fds, lost) = rx.fds()?;
        let body = if record.header.flags & BODY_IN_MEMFD != 0 && !lost {
            fds.pop()
        } else {
            None
        };
        Ok(Self { fds, lost, body })
    }

    /// For a record that is not taken after all.
    fn put_back(mut self, rx: &mut Rx, record: &Incoming) {
        self.fds.extend(self.body);
        if record.header.fds > 0 {
            rx.fds_back((self.fds, self.lost));
        }
    }

    /// The descriptors of the message are Python's.
    pub(super) fn hand_over(self) {
        for fd in self.fds {
            let _ = fd.into_raw_fd();
        }
    }
}

impl Rings {
    /// Makes of a record what `recvmsg` returns, and takes its descriptors. On failure, and for a peek, nothing is taken.
    fn receive<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        record: &Incoming,
        bufsize: usize,
        ancbufsize: usize,
        peek: bool,
    ) -> Result<Bound<'py, PyTuple>, Stop> {
        if record.lane > 0
            && let Some(made) = self.make_plain(py, inbox, record, bufsize)?
        {
            return Ok(made);
        }
        let mut parcel = Parcel::of(&mut inbox.rx, record)?;
        if peek {
            // Descriptors go to whoever takes the message.
            let shown = Parcel {
                fds: Vec::new(),
                lost: parcel.lost || !parcel.fds.is_empty(),
                body: parcel.body.take(),
            };
            let made = self.make(py, inbox, record, &shown, bufsize, ancbufsize);
            parcel.body = shown.body;
            parcel.put_back(&mut inbox.rx, record);
            return Ok(made?.0);
        }
        match self.make(py, inbox, record, &parcel, bufsize, ancbufsize) {
            Ok((message, hands_over)) => {
                if hands_over {
                    parcel.hand_over();
                }
                Ok(message)
            }
            Err(error) => {
                parcel.put_back(&mut inbox.rx, record);
                Err(error.into())
            }
        }
    }

    /// The body of the next message; `None` for one that has to be looked at as a whole: then it is not taken.
    pub(super) fn receive_body<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        bufsize: usize,
        patience: Patience,
    ) -> Result<Option<Bound<'py, PyBytes>>, Stop> {
        let record = self.await_record(py, &mut inbox.rx, patience)?;
        if !is_plain(&record) || inbox.failed.is_some() {
            return Ok(None);
        }
        let body = body_of(py, inbox, &record, bufsize)?;
        inbox.rx.take(&record, false);
        Ok(Some(body))
    }

    /// The body of the next message if that is there and plain. Runs no Python code.
    pub(super) fn take_body<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        bufsize: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        // What breaks a rule is found again by the call that tells it.
        let Ok(Some(record)) = inbox.rx.peek() else {
            return Ok(None);
        };
        if !is_plain(&record) || inbox.failed.is_some() {
            return Ok(None);
        }
        let body = body_of(py, inbox, &record, bufsize)?;
        inbox.rx.take(&record, false);
        inbox.rx.settle();
        self.ends.arm(&mut inbox.rx);
        Ok(Some(body))
    }

    /// The bodies of messages of one source, and its address: as many as are there, at most `count`. `None` when the first has to be
    /// looked at as a whole: then it is not taken.
    pub(super) fn receive_run<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        count: usize,
        bufsize: usize,
        patience: Patience,
    ) -> Result<Option<Run<'py>>, Stop> {
        let first = self.await_record(py, &mut inbox.rx, patience)?;
        if !is_plain(&first) || inbox.failed.is_some() {
            return Ok(None);
        }
        let address = self.address_of(py, inbox, &first)?;
        let mut bodies = vec![body_of(py, inbox, &first, bufsize)?];
        inbox.rx.take_of_run(&first);
        while bodies.len() < count
            && let Ok(Some(next)) = inbox.rx.peek()
            && is_plain(&next)
            && inbox.rx.is_same_source(&first, &next)
        {
            // What cannot be made now is not lost: it is the first of the next call.
            let Ok(body) = body_of(py, inbox, &next, bufsize) else {
                break;
            };
            bodies.push(body);
            inbox.rx.take_of_run(&next);
        }
        inbox.rx.end_run();
        Ok(Some((PyList::new(py, bodies)?, address)))
    }

    /// What `recvmsg` returns of a message on a lane beside which there is nothing: as [`Self::make`], in a fifth of the time.
    fn make_plain<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        record: &Incoming,
        bufsize: usize,
    ) -> Result<Option<Bound<'py, PyTuple>>, Stop> {
        let h = &record.header;
        let Some(described) = self.describe_plain(py, inbox, record) else {
            return Ok(None);
        };
        let body = body_of(py, inbox, record, bufsize)?;
        let flags = if bufsize < h.body_len as usize {
            libc::MSG_TRUNC
        } else {
            0
        };
        let message = (body, described.items, flags, described.address);
        Ok(Some(message.into_pyobject(py)?))
    }

    /// What `recvmsg` returns of a record, and whether the descriptors in it are the caller's now.
    fn make<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        record: &Incoming,
        parcel: &Parcel,
        bufsize: usize,
        ancbufsize: usize,
    ) -> PyResult<(Bound<'py, PyTuple>, bool)> {
        let h = &record.header;
        let described = self.describe(py, inbox, record, parcel, ancbufsize)?;
        let len = if h.kind == GAP {
            0
        } else {
            h.body_len as usize
        };
        let take = len.min(bufsize);
        let mut flags = described.flags;
        if take < len {
            flags |= libc::MSG_TRUNC;
        }
        let data = if h.flags & BODY_IN_MEMFD == 0 {
            body_of(py, inbox, record, bufsize)?
        } else {
            let mut whole = false;
            expect_body(take);
            let data = PyBytes::new_with(py, take, |out| {
                whole = parcel
                    .body
                    .as_ref()
                    .is_some_and(|fd| read_exactly(fd, out).is_ok());
                Ok(())
            })?;
            if whole {
                data
            } else {
                // The body could not be had, for want of a descriptor: it is cut to nothing, and that is said.
                flags |= libc::MSG_TRUNC | libc::MSG_CTRUNC;
                PyBytes::new(py, &[])
            }
        };
        let message = (data, described.items, flags, described.address);
        Ok((message.into_pyobject(py)?, described.hands_over))
    }

    /// Waits for the first record.
    pub(super) fn await_record(
        &self,
        py: Python<'_>,
        rx: &mut Rx,
        patience: Patience,
    ) -> Result<Incoming, Stop> {
        let (mut has_slept, mut has_napped) = (false, false);
        loop {
            if let Some(record) = rx.peek()? {
                return Ok(record);
            }
            if !patience.waits {
                rx.look()?;
                if let Some(record) = rx.peek()? {
                    return Ok(record);
                }
                return Err(if rx.is_hung_up() {
                    self.ends.gone()
                } else {
                    Stop::Errno(AGAIN)
                });
            }
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
            if !has_slept && rx.glance() {
                continue;
            }
            self.ends.collect(rx);
            if !has_slept && py.detach(|| rx.spin()) {
                continue;
            }
            // A signal ends a sleep, but not the looks before it.
            py.check_signals()?;
            if self.ends.is_closed() {
                return Err(Stop::Errno(CLOSED));
            }
            let until = if has_napped {
                patience.until
            } else {
                let nap = Instant::now() + NAP;
                Some(patience.until.map_or(nap, |at| at.min(nap)))
            };
            if py.detach(|| rx.sleep(until))? == Waited::Gone {
                return Err(self.ends.gone());
            }
            has_slept = true;
            has_napped = until.is_some_and(|at| at <= Instant::now());
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "what recvmsg(2) takes, and the count"
    )]
    pub(super) fn receive_all<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        count: usize,
        bufsize: usize,
        ancbufsize: usize,
        peek: bool,
        patience: Patience,
    ) -> Result<Bound<'py, PyList>, Stop> {
        // Whoever has no room for items is told of a gap by an error: so it comes alone, and nothing is behind it in the list.
        let gap_alone = ancbufsize < GAP_SPACE;
        let mut record = self.await_record(py, &mut inbox.rx, patience)?;
        let list = PyList::empty(py);
        loop {
            let stands_alone = gap_alone && record.header.kind == GAP;
            if stands_alone && !list.is_empty() {
                break;
            }
            let failed = inbox
                .failed
                .take_if(|(at, _)| *at == (record.lane, record.pos) && !peek);
            let received = match failed {
                Some((_, error)) => Err(error.into()),
                None => self.receive(py, inbox, &record, bufsize, ancbufsize, peek),
            };
            match received {
                Ok(message) => list.append(message)?,
                Err(stop) if !list.is_empty() => {
                    // What is in the list is not lost for it: the next call tells.
                    if let Stop::Raise(error) = stop {
                        inbox.failed = Some(((record.lane, record.pos), error));
                    }
                    break;
                }
                Err(stop) => {
                    if !peek {
                        discard(&mut inbox.rx, &record);
                    }
                    return Err(stop);
                }
            }
            if peek {
                break;
            }
            inbox.rx.take(&record, false);
            if stands_alone || list.len() >= count {
                break;
            }
            match inbox.rx.peek() {
                Ok(Some(next)) => record = next,
                Ok(None) | Err(_) => break,
            }
        }
        Ok(list)
    }

    /// Receives in some way; afterwards room is given back, and a polled line armed.
    pub(super) fn receiving<T>(
        &self,
        py: Python<'_>,
        patience: Patience,
        receive: impl FnOnce(&mut Inbox) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let mut held = self.ends.rx.hold(py, &self.ends, patience)?;
        let inbox = held.inside()?;
        let received = receive(inbox);
        inbox.rx.settle();
        self.ends.arm(&mut inbox.rx);
        received
    }
}

/// Whether the body of a record is all that there is to be said and done about it.
fn is_plain(record: &Incoming) -> bool {
    record.header.kind != GAP && record.header.fds == 0
}

/// The body of a record that has it in its ring, cut to a size.
fn body_of<'py>(
    py: Python<'py>,
    inbox: &Inbox,
    record: &Incoming,
    bufsize: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    // The body of a gap is told by its item.
    let len = if record.header.kind == GAP {
        0
    } else {
        record.header.body_len as usize
    };
    let take = bufsize.min(len);
    let memory = inbox.rx.memory(record);
    expect_body(take);
    new_bytes(py, take, |out| {
        memory.copy_body_out(record.body, record.in_arena, out);
    })
}

/// Takes a message that cannot be made, and whose failure the caller is told.
fn discard(rx: &mut Rx, record: &Incoming) {
    if Parcel::of(rx, record).is_ok() {
        rx.take(record, false);
    }
}
