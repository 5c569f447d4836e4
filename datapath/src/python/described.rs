//! What goes beside the body of a message: control items, flags, the address of its source.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::client::Incoming;
use crate::frame::{
    ADDRESS_BYTES, BY_TERMS, FDS_LOST, GAP, MESSAGE, MONITOR, MULTICAST, NO_REPLY, NOTICE, RAW,
    RX_HEADER, TERMS, UNICAST,
};
use crate::ring::{Memory, padded};

use super::items::{
    BUS_SOCKET, Items, MSG_MONITOR, SCM_DST_ADDR, SCM_GAP, SCM_IDENTITY, SCM_REPLY_TO, SCM_SEQ,
    SCM_SERIAL, SCM_TERMS,
};
use super::receiving::{Inbox, Parcel};
use super::rings::Rings;

/// Sources and destinations kept per endpoint.
const MAX_CACHED: usize = 4096;

/// What is kept of received addresses, so that each object is made once.
#[derive(Default)]
pub(super) struct Known {
    kernel: Option<Py<PyAny>>,
    sources: HashMap<Box<[u8]>, Py<PyAny>>,
    /// The lane from which something came last, and its source.
    lane: Option<(u64, Py<PyAny>)>,
    destinations: HashMap<(u8, Box<[u8]>), Py<PyBytes>>,
}

/// What goes beside the body of a message.
pub(super) struct Described<'py> {
    pub(super) items: Bound<'py, PyList>,
    pub(super) flags: i32,
    pub(super) address: Py<PyAny>,
    pub(super) hands_over: bool,
}

impl Known {
    /// The source of a lane, if it was the last one.
    pub(super) fn of_lane(&self, lane: u64) -> Option<&Py<PyAny>> {
        self.lane
            .as_ref()
            .filter(|(last, _)| *last == lane)
            .map(|(_, source)| source)
    }
}

impl Rings {
    fn source(
        &self,
        py: Python<'_>,
        known: &mut Known,
        src: &[u8],
        is_kernel: bool,
    ) -> PyResult<Py<PyAny>> {
        let found = if is_kernel {
            known.kernel.as_ref()
        } else {
            known.sources.get(src)
        };
        if let Some(found) = found {
            return Ok(found.clone_ref(py));
        }
        let made = self.address.call1(py, (PyBytes::new(py, src), is_kernel))?;
        if is_kernel {
            known.kernel = Some(made.clone_ref(py));
        } else {
            if known.sources.len() >= MAX_CACHED {
                known.sources.clear();
            }
            known.sources.insert(src.into(), made.clone_ref(py));
        }
        Ok(made)
    }

    fn destination_item(
        &self,
        py: Python<'_>,
        known: &mut Known,
        kind: u8,
        dst: &[u8],
    ) -> PyResult<Py<PyBytes>> {
        let dst = if kind == TERMS { &[] } else { dst };
        let key = (kind, Box::from(dst));
        if let Some(found) = known.destinations.get(&key) {
            return Ok(found.clone_ref(py));
        }
        let made: Py<PyBytes> = self
            .destination
            .call1(py, (PyBytes::new(py, dst), kind))?
            .extract(py)?;
        if known.destinations.len() >= MAX_CACHED {
            known.destinations.clear();
        }
        known.destinations.insert(key, made.clone_ref(py));
        Ok(made)
    }

    /// The address of who sent a record.
    pub(super) fn address_of(
        &self,
        py: Python<'_>,
        inbox: &mut Inbox,
        record: &Incoming,
    ) -> PyResult<Py<PyAny>> {
        let Inbox { rx, known, .. } = inbox;
        if record.lane > 0
            && let Some(address) = known.of_lane(record.lane)
        {
            return Ok(address.clone_ref(py));
        }
        let h = &record.header;
        // Only the agent says something without an address.
        let is_kernel = h.kind == NOTICE || h.kind == NO_REPLY || h.src_len == 0;
        let mut src = [0u8; ADDRESS_BYTES];
        let src = &mut src[..if is_kernel { 0 } else { h.src_len.into() }];
        match rx.writer(record) {
            Some(writer) => src.copy_from_slice(&writer.src),
            None => rx.memory(record).copy_out(record.pos + RX_HEADER, src),
        }
        let address = self.source(py, known, src, is_kernel)?;
        if record.lane > 0 {
            known.lane = Some((record.lane, address.clone_ref(py)));
        }
        Ok(address)
    }

    /// What goes beside a message on a lane beside which there is nothing: as [`Self::describe`], in a fifth of the time.
    pub(super) fn describe_plain<'py>(
        &self,
        py: Python<'py>,
        inbox: &Inbox,
        record: &Incoming,
    ) -> Option<Described<'py>> {
        let h = &record.header;
        let beside = h.serial != 0
            || h.ident_len > 0
            || h.flags & MULTICAST != 0
            || self.ends.details.load(Ordering::Relaxed);
        if beside || record.lane == 0 {
            return None;
        }
        Some(Described {
            address: inbox.known.of_lane(record.lane)?.clone_ref(py),
            items: PyList::empty(py),
            flags: 0,
            hands_over: false,
        })
    }

    /// Control items, flags and address of a record, and whether its descriptors are among the items: they are the caller's
    /// then, once it has got them.
    pub(super) fn describe<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        record: &Incoming,
        parcel: &Parcel,
        ancbufsize: usize,
    ) -> PyResult<Described<'py>> {
        let Inbox { rx, known, .. } = inbox;
        let memory = rx.memory(record);
        let writer = rx.writer(record);
        let h = &record.header;
        let Parcel { fds, lost, .. } = parcel;
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
            let mut data = section(record.body - record.pos, h.body_len as usize);
            data.extend(section(RX_HEADER, h.src_len.into()));
            items.bus(SCM_GAP, &data)?;
        }
        if h.ident_len > 0 {
            let mut cred = [0u8; 12];
            cred[0..4].copy_from_slice(&h.pid.to_ne_bytes());
            cred[4..8].copy_from_slice(&h.uid.to_ne_bytes());
            cred[8..12].copy_from_slice(&h.gid.to_ne_bytes());
            items.add(libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &cred)?;
            match writer {
                Some(writer) => items.bus(SCM_IDENTITY, &writer.ident)?,
                None => items.bus(SCM_IDENTITY, &section(h.ident_at(), h.ident_len.into()))?,
            }
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
            match writer {
                Some(writer) => items.bus(SCM_TERMS, &writer.dst)?,
                None => items.bus(SCM_TERMS, &section(h.dst_at(), h.dst_len.into()))?,
            }
        }
        if h.serial != 0 {
            items.bus(SCM_SERIAL, &h.serial.to_le_bytes())?;
        }
        if h.reply_to != 0 {
            items.bus(SCM_REPLY_TO, &h.reply_to.to_le_bytes())?;
        }
        if wants_dst && items.fits(1) {
            let dst = match writer {
                Some(writer) => writer.dst.to_vec(),
                None => section(h.dst_at(), h.dst_len.into()),
            };
            let kind = match (h.flags & BY_TERMS != 0, raw) {
                (true, _) => TERMS,
                (_, true) => RAW,
                _ => UNICAST,
            };
            let data = self.destination_item(py, known, kind, &dst)?.into_bound(py);
            items.push(BUS_SOCKET, SCM_DST_ADDR, data)?;
            if details {
                items.bus(SCM_SEQ, &h.seq.to_le_bytes())?;
            }
        }
        let hands_over = !fds.is_empty() && items.fits(fds.len() * size_of::<RawFd>());
        if hands_over {
            let raw: Vec<u8> = fds
                .iter()
                .flat_map(|fd| fd.as_raw_fd().to_ne_bytes())
                .collect();
            items.add(libc::SOL_SOCKET, libc::SCM_RIGHTS, &raw)?;
        }
        let mut flags = if items.all { 0 } else { libc::MSG_CTRUNC };
        if h.flags & MONITOR != 0 {
            flags |= MSG_MONITOR;
        }
        let items_list = items.list;
        Ok(Described {
            address: self.address_of(py, inbox, record)?,
            items: PyList::new(py, items_list)?,
            flags,
            hands_over,
        })
    }
}
