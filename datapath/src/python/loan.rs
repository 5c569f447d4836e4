//! Loans: messages that are read where they lie.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::client::Incoming;
use crate::frame::{BODY_IN_MEMFD, GAP};
use crate::memory::{Segment, file_size};

use super::described::Described;
use super::ends::Ends;
use super::receiving::{Inbox, Parcel};
use super::rings::Rings;
use super::stop::{Patience, Stop};
use super::view::show;

/// Where the body of a loan lies.
enum Place {
    /// In a ring, or in the arena of a lane.
    Ring(Arc<Segment>, u64, bool),
    Mapped(*mut c_void, usize),
    Nowhere,
}

/// A message that lies in the ring, or in a mapped memfd, until it is released.
#[pyclass(name = "Loan", module = "afbus._datapath", frozen)]
pub struct Loan {
    ends: Arc<Ends>,
    /// The lane, 0 for the RX ring, and where the record ends there.
    end: (u64, u64),
    len: usize,
    state: Mutex<(Place, usize, bool)>,
    #[pyo3(get)]
    address: Py<PyAny>,
    #[pyo3(get)]
    ancdata: Py<PyList>,
    #[pyo3(get)]
    flags: i32,
}

// SAFETY: the mapping is private to the loan and unmapped once, under its lock.
unsafe impl Send for Loan {}
// SAFETY: as above.
unsafe impl Sync for Loan {}

impl Rings {
    pub(super) fn lend(
        &self,
        py: Python<'_>,
        inbox: &mut Inbox,
        patience: Patience,
    ) -> Result<Loan, Stop> {
        let record = self.await_record(py, &mut inbox.rx, patience)?;
        let parcel = Parcel::of(&mut inbox.rx, &record)?;
        let made = self.make_loan(py, inbox, &record, &parcel);
        // One that cannot be made is taken too: its failure is told, and its room is given back.
        let lies_in_ring = matches!(&made, Ok((Place::Ring(..), ..)));
        let end = inbox.rx.take(&record, lies_in_ring);
        let (place, len, described) = made?;
        if described.hands_over {
            parcel.hand_over();
        }
        Ok(Loan {
            ends: self.ends.clone(),
            end: (record.lane, end),
            len,
            state: Mutex::new((place, 0, false)),
            address: described.address,
            ancdata: described.items.unbind(),
            flags: described.flags,
        })
    }

    /// Where the body of a record lies, its length, and what goes beside it.
    fn make_loan<'py>(
        &self,
        py: Python<'py>,
        inbox: &mut Inbox,
        record: &Incoming,
        parcel: &Parcel,
    ) -> PyResult<(Place, usize, Described<'py>)> {
        let h = record.header;
        let plain = self.describe_plain(py, inbox, record);
        let mut described = match plain {
            Some(described) => described,
            None => self.describe(py, inbox, record, parcel, usize::MAX)?,
        };
        let len = if h.kind == GAP {
            0
        } else {
            h.body_len as usize
        };
        let place = match &parcel.body {
            _ if len == 0 => Place::Nowhere,
            None if h.flags & BODY_IN_MEMFD != 0 => {
                described.flags |= libc::MSG_TRUNC | libc::MSG_CTRUNC;
                return Ok((Place::Nowhere, 0, described));
            }
            None => Place::Ring(
                inbox.rx.memory(record).clone(),
                record.body,
                record.in_arena,
            ),
            Some(fd) => Place::Mapped(map(fd, len)?, len),
        };
        Ok((place, len, described))
    }
}

fn map(fd: &OwnedFd, len: usize) -> std::io::Result<*mut c_void> {
    if file_size(fd.as_fd())? < len as u64 {
        return Err(std::io::Error::from_raw_os_error(libc::EBADMSG));
    }
    // SAFETY: a new mapping of a file whose size is sealed.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    Ok(address)
}

impl Loan {
    fn state(&self) -> MutexGuard<'_, (Place, usize, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the place back; only when no view is out.
    fn free(&self, place: Place) {
        match place {
            Place::Mapped(address, len) => {
                // SAFETY: mapped by `map` with this length, and unmapped once because the place was taken out.
                unsafe { libc::munmap(address, len) };
            }
            Place::Ring(..) => self.ends.give_back(self.end),
            Place::Nowhere => {}
        }
    }
}

#[pymethods]
impl Loan {
    fn __len__(&self) -> usize {
        self.len
    }

    /// Give the room back. BufferError while a view is exported. Harmless when repeated.
    fn release(&self) -> PyResult<()> {
        let place = {
            let mut state = self.state();
            if state.1 > 0 {
                return Err(PyBufferError::new_err(format!(
                    "views of the loan are still in use ({}): release them first",
                    state.1
                )));
            }
            state.2 = true;
            std::mem::replace(&mut state.0, Place::Nowhere)
        };
        self.free(place);
        Ok(())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, _exc: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.release()
    }

    /// # Safety
    /// Called by Python with a valid `view`.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let this = slf.get();
        let mut state = this.state();
        if state.2 {
            return Err(PyValueError::new_err("the loan was released"));
        }
        let start: *mut c_void = match &state.0 {
            Place::Ring(memory, at, in_arena) => memory
                .body_at(*at, *in_arena, this.len)
                .unwrap_or(ptr::NonNull::dangling().as_ptr())
                .cast(),
            Place::Mapped(address, _) => *address,
            Place::Nowhere => ptr::NonNull::<u8>::dangling().as_ptr().cast(),
        };
        // SAFETY: `view` is Python's; the bytes stay until the last view is given back (`release` refuses before).
        unsafe { show(slf.as_any(), view, (start, this.len), true, flags)? };
        state.1 += 1;
        Ok(())
    }

    /// # Safety
    /// Called by Python, once for each view.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.state().1 -= 1;
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let place = std::mem::replace(&mut self.state().0, Place::Nowhere);
        self.free(place);
    }
}
