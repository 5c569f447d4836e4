//! Receiving: what recvmsg(2) returns, made of the records in the ring.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};

use crate::client::{Incoming, Rx, Waited};
use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, BY_TERMS, FDS_LOST, GAP, MESSAGE, MONITOR, MULTICAST, NO_REPLY,
    NOTICE, RAW, RX_HEADER, TERMS, UNICAST,
};
use crate::memory::Segment;
use crate::ring::{Memory, Violation, padded};

use super::items::{
    BUS_SOCKET, GAP_SPACE, Items, MSG_MONITOR, SCM_DST_ADDR, SCM_GAP, SCM_IDENTITY, SCM_REPLY_TO,
    SCM_SEQ, SCM_SERIAL, SCM_TERMS,
};
use super::rings::Rings;
use super::stop::{AGAIN, CLOSED, GONE, LATE, Patience, Stop};
use super::view::read_exactly;

/// Sources and destinations kept per endpoint.
const MAX_CACHED: usize = 4096;

impl Rings {
    fn source(&self, py: Python<'_>, src: &[u8], is_kernel: bool) -> PyResult<Py<PyAny>> {
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = known.sources.get(src) {
                return Ok(found.clone_ref(py));
            }
        }
        let made = self.address.call1(py, (PyBytes::new(py, src), is_kernel))?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.sources.len() >= MAX_CACHED {
            known.sources.clear();
        }
        known.sources.insert(src.into(), made.clone_ref(py));
        Ok(made)
    }

    fn destination_item(&self, py: Python<'_>, kind: u8, dst: &[u8]) -> PyResult<Py<PyBytes>> {
        let dst = if kind == TERMS { &[] } else { dst };
        let key = (kind, Box::from(dst));
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = known.destinations.get(&key) {
                return Ok(found.clone_ref(py));
            }
        }
        let made: Py<PyBytes> = self
            .destination
            .call1(py, (PyBytes::new(py, dst), kind))?
            .extract(py)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.destinations.len() >= MAX_CACHED {
            known.destinations.clear();
        }
        known.destinations.insert(key, made.clone_ref(py));
        Ok(made)
    }

    /// Control items, flags and address of a record. Takes over its descriptors.
    pub(super) fn describe<'py>(
        &self,
        py: Python<'py>,
        memory: &Arc<Segment>,
        record: &Incoming,
        fds: (Vec<OwnedFd>, bool),
        ancbufsize: usize,
    ) -> PyResult<(Bound<'py, PyList>, i32, Py<PyAny>)> {
        let h = &record.header;
        let (fds, lost) = fds;
        let mut items = Items {
            py,
            list: Vec::new(),
            // The item of a gap is the message, so there is always room for it; `receive_all` sees to who gets it.
            room: if h.kind == GAP {
                usize::MAX
            } else {
                ancbufsize
            },
            all: !lost && h.flags & FDS_LOST == 0,
        };
        let section = |at: u64, len: usize| {
            let mut bytes = vec![0u8; len];
            memory.copy_out(record.pos + at, &mut bytes);
            bytes
        };
        let details = self.ends.details.load(Ordering::Relaxed) || h.flags & MONITOR != 0;
        let raw = h.flags & (MULTICAST | BY_TERMS) == MULTICAST;
        let wants_dst = h.kind == MESSAGE && (details || raw);
        if h.kind == GAP {
            let mut data = section(h.body_at(), h.body_len as usize);
            data.extend(section(RX_HEADER, h.src_len.into()));
            items.bus(SCM_GAP, &data)?;
        }
        if h.ident_len > 0 {
            let mut cred = [0u8; 12];
            cred[0..4].copy_from_slice(&h.pid.to_ne_bytes());
            cred[4..8].copy_from_slice(&h.uid.to_ne_bytes());
            cred[8..12].copy_from_slice(&h.gid.to_ne_bytes());
            items.add(libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &cred)?;
            items.bus(SCM_IDENTITY, &section(h.ident_at(), h.ident_len.into()))?;
        }
        if h.ctl_len > 0 {
            let ctl = section(h.ctl_at(), h.ctl_len as usize);
            let mut rest = &ctl[..];
            while rest.len() >= 8 {
                let kind = i32::from(u16::from_le_bytes([rest[0], rest[1]]));
                let len = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
                let Some(data) = rest.get(8..8 + len) else {
                    break;
                };
                items.bus(kind, data)?;
                rest = rest.get(8 + padded(len as u64) as usize..).unwrap_or(&[]);
            }
        }
        if h.flags & BY_TERMS != 0 && items.fits(h.dst_len.into()) {
            items.bus(SCM_TERMS, &section(h.dst_at(), h.dst_len.into()))?;
        }
        if h.serial != 0 {
            items.bus(SCM_SERIAL, &h.serial.to_le_bytes())?;
        }
        if h.reply_to != 0 {
            items.bus(SCM_REPLY_TO, &h.reply_to.to_le_bytes())?;
        }
        if wants_dst && items.fits(1) {
            let dst = section(h.dst_at(), h.dst_len.into());
            let kind = match (h.flags & BY_TERMS != 0, raw) {
                (true, _) => TERMS,
                (_, true) => RAW,
                _ => UNICAST,
            };
            let data = self.destination_item(py, kind, &dst)?.into_bound(py);
            items.push(BUS_SOCKET, SCM_DST_ADDR, data)?;
            if details {
                items.bus(SCM_SEQ, &h.seq.to_le_bytes())?;
            }
        }
        if !fds.is_empty() && items.fits(fds.len() * size_of::<RawFd>()) {
            let raw: Vec<u8> = fds
                .iter()
                .flat_map(|fd| fd.as_raw_fd().to_ne_bytes())
                .collect();
            items.add(libc::SOL_SOCKET, libc::SCM_RIGHTS, &raw)?;
            for fd in fds {
                let _ = fd.into_raw_fd();
            }
        }
        let mut flags = if items.all { 0 } else { libc::MSG_CTRUNC };
        if h.flags & MONITOR != 0 {
            flags |= MSG_MONITOR;
        }
        let address = if h.kind == NOTICE || h.kind == NO_REPLY {
            self.source(py, &[], true)?
        } else {
            let mut src = [0u8; ADDRESS_BYTES];
            let src = &mut src[..usize::from(h.src_len).min(ADDRESS_BYTES)];
            memory.copy_out(record.pos + RX_HEADER, src);
            self.source(py, src, false)?
        };
        Ok((PyList::new(py, items.list)?, flags, address))
    }

    /// The descriptors of a record: those of the message, and that of its body.
    #[allow(clippy::type_complexity, reason = "two parts of one packet")]
    pub(super) fn fds_of(
        &self,
        rx: &mut Rx,
        record: &Incoming,
    ) -> Result<((Vec<OwnedFd>, bool), Option<OwnedFd>), Violation> {
        if record.header.fds == 0 {
            return Ok(((Vec::new(), false), None));
        }
        let (mut fds, lost) = rx.fds(self.ends.line())?;
        let body = if record.header.flags & BODY_IN_MEMFD != 0 && !lost {
            fds.pop()
        } else {
            None
        };
        Ok(((fds, lost), body))
    }

    /// Takes one record and makes of it what `recvmsg` returns.
    fn receive<'py>(
        &self,
        py: Python<'py>,
        rx: &mut Rx,
        record: &Incoming,
        bufsize: usize,
        ancbufsize: usize,
        peek: bool,
    ) -> Result<Bound<'py, PyTuple>, Stop> {
        let h = record.header;
        let memory = rx.memory().clone();
        let (fds, body_fd) = self.fds_of(rx, record)?;
        let len = if h.kind == GAP {
            0
        } else {
            h.body_len as usize
        };
        let take = len.min(bufsize);
        let mut broken = false;
        let data = PyBytes::new_with(py, take, |out| {
            match (&body_fd, h.flags & BODY_IN_MEMFD != 0) {
                (Some(fd), _) => broken = read_exactly(fd, out).is_err(),
                (None, true) => broken = true,
                (None, false) => memory.copy_out(record.pos + h.body_at(), out),
            }
            Ok(())
        })?;
        let handed = if peek {
            // Descriptors go to whoever takes the message.
            let mut back = fds.0;
            back.extend(body_fd);
            if h.fds > 0 {
                rx.fds_back((back, fds.1));
            }
            (Vec::new(), h.fds > u8::from(h.flags & BODY_IN_MEMFD != 0))
        } else {
            fds
        };
        let (items, mut flags, address) = self.describe(py, &memory, record, handed, ancbufsize)?;
        if take < len {
            flags |= libc::MSG_TRUNC;
        }
        if broken {
            // The body could not be had, for want of a descriptor: it is cut to nothing, and that is said.
            flags |= libc::MSG_TRUNC | libc::MSG_CTRUNC;
            let tuple = (PyBytes::new(py, &[]), items, flags, address);
            return Ok(tuple.into_pyobject(py)?);
        }
        Ok((data, items, flags, address).into_pyobject(py)?)
    }

    /// Waits for the first record. `None`: it is there; an errno otherwise.
    pub(super) fn await_record(
        &self,
        py: Python<'_>,
        rx: &mut Rx,
        patience: Patience,
    ) -> Result<Incoming, Stop> {
        loop {
            if let Some(record) = rx.peek()? {
                return Ok(record);
            }
            if self.ends.closed.load(Ordering::Acquire) {
                return Err(Stop::Errno(CLOSED));
            }
            if !patience.waits {
                rx.look(self.ends.line())?;
                if let Some(record) = rx.peek()? {
                    return Ok(record);
                }
                return Err(Stop::Errno(if rx.is_hung_up() { GONE } else { AGAIN }));
            }
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
            self.ends.collect(rx);
            let waited = py.detach(|| rx.wait(self.ends.line(), patience.until))?;
            py.check_signals()?;
            if waited == Waited::Gone {
                return Err(Stop::Errno(if self.ends.closed.load(Ordering::Acquire) {
                    CLOSED
                } else {
                    GONE
                }));
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "what recvmsg(2) takes, and the count"
    )]
    pub(super) fn receive_all<'py>(
        &self,
        py: Python<'py>,
        rx: &mut Rx,
        count: usize,
        bufsize: usize,
        ancbufsize: usize,
        peek: bool,
        patience: Patience,
    ) -> Result<Bound<'py, PyList>, Stop> {
        let list = PyList::empty(py);
        // Whoever has no room for items is told of a gap by an error: so it comes alone, and nothing is behind it in the list.
        let gap_alone = ancbufsize < GAP_SPACE;
        let mut next = Some(self.await_record(py, rx, patience)?);
        while let Some(record) = next {
            let is_gap = record.header.kind == GAP;
            if is_gap && gap_alone && !list.is_empty() {
                break;
            }
            let received = self.receive(py, rx, &record, bufsize, ancbufsize, peek);
            if !peek {
                rx.take(&record, false);
            }
            list.append(received?)?;
            if peek || list.len() >= count || (is_gap && gap_alone) {
                break;
            }
            next = rx.peek()?;
        }
        Ok(list)
    }

    pub(super) fn arm(&self, rx: &mut Rx) -> Result<(), Violation> {
        if self.ends.pollable.load(Ordering::Relaxed) {
            rx.arm(self.ends.line())
        } else {
            Ok(())
        }
    }
}
