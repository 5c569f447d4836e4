//! Control items as recvmsg(2) has them. `proto/control.py` says what those of the bus hold.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::frame::ADDRESS_BYTES;
use crate::ring::padded;

/// `msg_flags` of a monitor's copy; above the flags of recvmsg(2).
pub const MSG_MONITOR: i32 = 1 << 28;

/// The level of the bus's control items, and their types.
pub(super) const BUS_SOCKET: i32 = 0xAFB;
pub(super) const SCM_DST_ADDR: i32 = 17;
pub(super) const SCM_IDENTITY: i32 = 18;
pub(super) const SCM_TERMS: i32 = 19;
pub(super) const SCM_SERIAL: i32 = 20;
pub(super) const SCM_REPLY_TO: i32 = 21;
pub(super) const SCM_GAP: i32 = 22;
pub(super) const SCM_SEQ: i32 = 24;

/// The room that the item of any gap needs: 28 bytes and an address.
pub(super) const GAP_SPACE: usize = 16 + padded(28 + ADDRESS_BYTES as u64) as usize;

/// Control items of one message, as far as there is room for them.
pub(super) struct Items<'py> {
    pub(super) py: Python<'py>,
    pub(super) list: Vec<Bound<'py, PyTuple>>,
    pub(super) room: usize,
    /// Nothing was left out.
    pub(super) all: bool,
}

impl<'py> Items<'py> {
    /// What cmsg(3) calls CMSG_SPACE: a header of 16 bytes, and data padded to 8.
    fn space(len: usize) -> usize {
        16 + padded(len as u64) as usize
    }

    /// Whether there is room for so many bytes of data; if not, that is noted.
    pub(super) fn fits(&mut self, len: usize) -> bool {
        let fits = Self::space(len) <= self.room;
        self.all &= fits;
        fits
    }

    pub(super) fn push(
        &mut self,
        level: i32,
        kind: i32,
        data: Bound<'py, PyBytes>,
    ) -> PyResult<()> {
        let len = data.as_bytes().len();
        if self.fits(len) {
            self.room -= Self::space(len);
            self.list.push((level, kind, data).into_pyobject(self.py)?);
        }
        Ok(())
    }

    pub(super) fn add(&mut self, level: i32, kind: i32, data: &[u8]) -> PyResult<()> {
        if self.fits(data.len()) {
            self.push(level, kind, PyBytes::new(self.py, data))?;
        }
        Ok(())
    }

    pub(super) fn bus(&mut self, kind: i32, data: &[u8]) -> PyResult<()> {
        self.add(BUS_SOCKET, kind, data)
    }
}
