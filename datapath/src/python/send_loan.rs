//! Loans for senders: bodies that are written where they are sent from.
//!
//! Invariants:
//! 1. What was lent is good until it was sent or given back: whatever becomes of rings and agent, and after every refusal.
//! 2. Nothing is sent, and nothing is given back, while a view of it is out.
//! 3. What was lent on a lane lies in its arena, and is sent as a record alone. When there is no such lane any more it is copied.
//! 4. A body above the inline limit is not copied: it is written in a memfd, which is sealed when it is sent (D14).

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::client::INLINE_BYTES;
use crate::destinations::Taken;
use crate::frame::TxHeader;
use crate::lane_out::{ARENA_FROM, Lent};
use crate::memory::{BODY_SEALS, memfd, seal, seals};

use super::rings::Rings;
use super::sending::may_go_on_a_lane;
use super::stop::{Patience, Stop};
use super::view::{read_exactly, sealed_body, show};

/// Where a body is written.
enum Place {
    /// In the arena of a lane.
    Lane(Lent, Py<Rings>),
    /// In memory of its own, for what the ring takes.
    Heap(Box<[u8]>),
    /// In a memfd that is mapped to be written.
    Open(Sheet),
    /// In one that nobody here can write any more, as it was about to be sent already.
    Closed(OwnedFd),
    /// It was sent or given back, or is not there yet; or a call has it right now.
    Gone,
}

/// A memfd of a fixed size, mapped to be written.
struct Sheet {
    fd: OwnedFd,
    mapping: Mapping,
}

struct Mapping {
    start: *mut c_void,
    len: usize,
}

// SAFETY: a mapping of its own, which only its owner uses.
unsafe impl Send for Mapping {}

impl Sheet {
    /// A new one, all zeros; `len` is not 0.
    fn new(len: usize) -> std::io::Result<Self> {
        let fd = memfd(c"afbus-body")?;
        // SAFETY: plain call on our own descriptor, then a new mapping of it; its size is sealed before anybody else has it.
        let start = unsafe {
            if libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            seal(fd.as_fd(), libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
            // All of it is about to be written: its pages are had at once.
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let mapping = Mapping { start, len };
        Ok(Self { fd, mapping })
    }

    /// What is in it. No view of it is out.
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this length for as long as it lives.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.start.cast(), self.mapping.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `Sheet::new` with this length, and no view is out.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Sees to it that nobody can write a memfd any more, of which we have no mapping.
fn close(fd: &mut OwnedFd, len: usize) -> std::io::Result<()> {
    if seals(fd.as_fd()).is_some_and(|have| have & BODY_SEALS == BODY_SEALS) {
        return Ok(());
    }
    match seal(fd.as_fd(), BODY_SEALS) {
        // A child that `fork` made still has the mapping.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let mut bytes = vec![0; len];
            read_exactly(fd, &mut bytes)?;
            *fd = sealed_body(&[&bytes])?;
            Ok(())
        }
        done => done,
    }
}

/// A body that is written in place, until it is sent or given back.
#[pyclass(name = "SendLoan", module = "afbus._datapath", frozen)]
pub struct SendLoan {
    len: usize,
    /// Where it goes: kind, source, destination; and its serial.
    kind: u8,
    src: Box<[u8]>,
    dst: Box<[u8]>,
    serial: u64,
    socket: Py<PyAny>,
    /// What the Python half of the socket knows of the message.
    #[pyo3(get)]
    plan: Py<PyAny>,
    /// Where it is, and how many views are out.
    state: Mutex<(Place, usize)>,
}

impl SendLoan {
    fn state(&self) -> MutexGuard<'_, (Place, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that lies on a lane, for a socket that is connected to its reader.
    pub(super) fn on_lane(
        (socket, plan): (Py<PyAny>, Py<PyAny>),
        (kind, dst): (u8, Box<[u8]>),
        (lent, len): (Lent, usize),
        rings: Py<Rings>,
    ) -> Self {
        Self {
            len,
            kind,
            src: Box::default(),
            dst,
            serial: 0,
            socket,
            plan,
            state: Mutex::new((Place::Lane(lent, rings), 0)),
        }
    }

    /// Sends the first bytes if they lie on a lane, nobody looks at them, and nothing has to be waited for. Returns whether they are sent.
    fn send_at_once(&self, py: Python<'_>, length: usize) -> bool {
        let mut state = self.state();
        let (Place::Lane(lent, rings), 0) = &mut *state else {
            return false;
        };
        if length > self.len {
            return false;
        }
        let ends = &rings.get().ends;
        let mut taken = Taken::No;
        if let Some(mut half) = ends.tx.try_have()
            && let Some(tx) = half.as_mut()
            && !ends.is_closed()
        {
            let route = (self.kind, &*self.src, &*self.dst);
            taken = tx.send_lent(route, self.serial, (lent, length as u64));
        }
        let is_sent = matches!(taken, Taken::Yes);
        if is_sent {
            let gone = std::mem::replace(&mut state.0, Place::Gone);
            drop(state);
            if let Place::Lane(_, rings) = gone {
                rings.get().ends.tidy_with_gil(py);
            }
        } else {
            ends.tidy_with_gil(py);
        }
        is_sent
    }

    /// Takes the place out, unless somebody looks at it.
    fn take(&self) -> PyResult<Place> {
        let mut state = self.state();
        if state.1 > 0 {
            let text = format!(
                "views of the loan are still in use ({}): release them first",
                state.1
            );
            return Err(PyBufferError::new_err(text));
        }
        Ok(std::mem::replace(&mut state.0, Place::Gone))
    }
}

fn is_over() -> PyErr {
    PyValueError::new_err("the loan was sent or released")
}

/// A place of its own for a body of so many bytes.
fn place(bytes: usize) -> std::io::Result<Place> {
    Ok(if bytes as u64 > INLINE_BYTES {
        Place::Open(Sheet::new(bytes)?)
    } else {
        Place::Heap(vec![0; bytes].into())
    })
}

#[pymethods]
impl SendLoan {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    #[pyo3(signature = (nbytes, socket, kind, dst, src, serial, plan, /))]
    fn new(
        nbytes: usize,
        socket: Py<PyAny>,
        kind: u8,
        dst: &[u8],
        src: &[u8],
        serial: u64,
        plan: Py<PyAny>,
    ) -> Self {
        Self {
            len: nbytes,
            kind,
            src: src.into(),
            dst: dst.into(),
            serial,
            socket,
            plan,
            state: Mutex::new((Place::Gone, 0)),
        }
    }

    /// Send what was written, without copying it, and give the buffer away; return its size.
    ///
    /// After an error the loan is as it was: it can be sent again. Nothing was sent then, but for
    /// OutcomeUnknown: nobody knows.
    ///
    /// Args:
    ///     length: How many bytes from the start; by default all.
    ///
    /// Raises:
    ///     BufferError: A view of the loan is still in use.
    ///     ValueError: The loan was sent or released before.
    ///     InvalidArgument: More bytes than there are. EINVAL.
    ///     BusError: As `Socket.sendmsg`.
    #[pyo3(signature = (length=None))]
    fn send<'py>(
        slf: &Bound<'py, Self>,
        length: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let length = match length {
            Some(length) => length,
            None => this.len.into_pyobject(py)?.into_any(),
        };
        if length
            .extract()
            .is_ok_and(|size| this.send_at_once(py, size))
        {
            return Ok(length);
        }
        this.socket
            .bind(py)
            .call_method1(intern!(py, "_send_loan"), (slf, length))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, _exc: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.release()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.socket)?;
        visit.call(&self.plan)
    }

    fn __len__(&self) -> usize {
        self.len
    }

    /// Give the memory back. BufferError while a view is out; harmless when repeated.
    fn release(&self) -> PyResult<()> {
        self.take().map(drop)
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
        if let Place::Closed(fd) = &state.0 {
            // It was refused, and is to be written again: in another memfd.
            let mut sheet = Sheet::new(this.len)?;
            read_exactly(fd, sheet.bytes())?;
            state.0 = Place::Open(sheet);
        }
        let start: *mut c_void = match &mut state.0 {
            Place::Lane(lent, _) => lent.start().cast(),
            Place::Heap(bytes) => bytes.as_mut_ptr().cast(),
            Place::Open(sheet) => sheet.mapping.start,
            Place::Closed(_) | Place::Gone => return Err(is_over()),
        };
        // SAFETY: `view` is Python's; the bytes stay until the last view is given back (`take` refuses before).
        unsafe { show(slf.as_any(), view, (start, this.len), false, flags)? };
        state.1 += 1;
        Ok(())
    }

    /// # Safety
    /// Called by Python, once for each view.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.state().1 -= 1;
    }
}

impl Rings {
    /// Gives a loan its place: in the arena of the lane to its destination, if it may go there and there is one, else of its own.
    pub(super) fn give_place(
        slf: &Bound<'_, Self>,
        py: Python<'_>,
        loan: &SendLoan,
        header: TxHeader,
        (src, dst): (&[u8], &[u8]),
        fds: usize,
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut made = None;
        if loan.len as u64 >= ARENA_FROM && fds == 0 && may_go_on_a_lane(&header) {
            let route = (header.kind, src, dst);
            made = slf
                .get()
                .lend_on_lane(py, route, loan.len as u64, patience)?;
        }
        let place = match made {
            Some(lent) => Place::Lane(lent, slf.clone().unbind()),
            None => place(loan.len).map_err(|e| Stop::Raise(e.into()))?,
        };
        loan.state().0 = place;
        Ok(())
    }

    /// Sends the first bytes of a loan, which is over then. After a failure it is what it was.
    pub(super) fn send_written(
        &self,
        py: Python<'_>,
        header: TxHeader,
        (loan, length): (&SendLoan, usize),
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        if length > loan.len {
            let text = format!("{length} bytes of a loan of {}", loan.len);
            return Err(Stop::Raise(PyValueError::new_err(text)));
        }
        let header = TxHeader {
            kind: loan.kind,
            serial: loan.serial,
            ..header
        };
        let (src, dst) = (&*loan.src, &*loan.dst);
        let mut place = loan.take()?;
        let sent = self.send_placed(
            py,
            header,
            (src, dst),
            &mut place,
            (length, loan.len),
            fds,
            patience,
        );
        if sent.is_err() {
            loan.state().0 = place;
        }
        sent
    }

    /// Sends the first bytes of what is written somewhere. On failure it can be sent again.
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn send_placed(
        &self,
        py: Python<'_>,
        header: TxHeader,
        (src, dst): (&[u8], &[u8]),
        place: &mut Place,
        (length, len): (usize, usize),
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        match place {
            Place::Lane(lent, _) => {
                let route = (header.kind, src, dst);
                if self.send_lent(py, route, header.serial, (lent, length), patience)? {
                    *place = Place::Gone;
                    return Ok(());
                }
                // SAFETY: `len` bytes of an arena that is mapped for as long as `lent` lives, and no view is out.
                let part = unsafe { std::slice::from_raw_parts(lent.start(), length) };
                return self.send_one(py, header, dst, src, &[part], fds, patience);
            }
            Place::Heap(bytes) => {
                return self.send_one(py, header, dst, src, &[&bytes[..length]], fds, patience);
            }
            Place::Open(sheet) => {
                let part = &sheet.bytes()[..length];
                if length as u64 <= INLINE_BYTES {
                    return self.send_one(py, header, dst, src, &[part], fds, patience);
                }
                if self.send_one_on_lane(py, header, dst, src, &[part], fds, patience)? {
                    return Ok(());
                }
            }
            Place::Closed(_) => {}
            Place::Gone => return Err(Stop::Raise(is_over())),
        }
        if let Place::Open(_) = place
            && let Place::Open(Sheet { fd, mapping }) = std::mem::replace(place, Place::Gone)
        {
            drop(mapping);
            *place = Place::Closed(fd);
        }
        let Place::Closed(body) = place else {
            return Err(Stop::Raise(is_over()));
        };
        close(body, len).map_err(|e| Stop::Raise(e.into()))?;
        self.send_sealed(py, header, dst, src, (body, length), fds, patience)
    }
}
