//! The calls of a socket that carry a body and nothing beside it, without a frame of Python.
//!
//! Invariants:
//! 1. What is not plain is left to the Python half of the socket, as it was: nothing of it was taken or sent before.
//! 2. What is looked at without a lock is looked at with the GIL, and nothing of Python runs until it is let go of.

use std::cell::UnsafeCell;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};

use crate::destinations::Taken;
use crate::frame::{TxHeader, UNICAST};
use crate::lane_out::{ARENA_FROM, Lending, Lent};

use super::loan::Loan;
use super::rings::Rings;
use super::send_loan::SendLoan;
use super::stop::{AGAIN, BROKEN, CLOSED, GONE, LATE, Patience, Stop, UNKNOWN};
use super::view::View;

/// Flags that change nothing but how long a call waits.
const PLAIN: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
/// What Python is told of a call about which nothing is known yet.
const UNTRIED: i32 = 0;

/// Kind and bytes of a destination.
type Peer = (u8, Box<[u8]>);

/// What a port is set to.
#[derive(Default)]
struct Setting {
    /// The rings while they are to be used directly.
    rings: Option<Py<Rings>>,
    /// Kind and destination of what is sent without an address.
    peer: Option<Peer>,
    /// How long calls wait, in seconds.
    timeout: Option<f64>,
}

/// What of a socket is native. It stands before the Python half, which it asks whenever something is not plain.
#[pyclass(name = "Port", module = "afbus._datapath", frozen, subclass)]
pub struct Port {
    setting: UnsafeCell<Setting>,
}

// SAFETY: the setting is only reached through `look` and `change`, with the GIL, which the module asks for in every Python.
unsafe impl Sync for Port {}

impl Port {
    /// Looks at the setting. `look` runs no Python code and keeps the GIL.
    fn look<R>(&self, _: Python<'_>, look: impl FnOnce(&Setting) -> R) -> R {
        // SAFETY: whoever changes it has the GIL, and nobody does while `look` runs.
        look(unsafe { &*self.setting.get() })
    }

    /// Changes the setting; what stood there is returned, so that it is dropped when nobody looks any more.
    fn change<T>(&self, _: Python<'_>, place: impl FnOnce(&mut Setting) -> &mut T, new: T) -> T {
        // SAFETY: as in `look`.
        std::mem::replace(place(unsafe { &mut *self.setting.get() }), new)
    }

    /// Sends a body on its lane, if that can be done at once.
    fn send_at_once(&self, py: Python<'_>, body: &[u8]) -> Result<bool, i32> {
        self.look(py, |setting| {
            let (Some(rings), Some((UNICAST, dst))) = (&setting.rings, &setting.peer) else {
                return Ok(false);
            };
            let ends = &rings.get().ends;
            let mut taken = (0, Taken::No);
            if let Some(mut half) = ends.tx.try_have()
                && let Some(tx) = half.as_mut()
                && !ends.is_closed()
            {
                taken = tx.send_on_lane((UNICAST, &[], dst), 0, &[&[body]]);
            }
            ends.tidy_with_gil(py);
            match taken {
                // One that was closed just behind it has it all the same.
                (1, _) => Ok(true),
                (_, Taken::Unknown) => Err(UNKNOWN),
                _ => Ok(false),
            }
        })
    }

    /// Sends a body in any way, and waits as long as may be.
    fn send_in_time(&self, py: Python<'_>, body: &[u8], flags: i32) -> PyResult<i32> {
        let plan = self.look(py, |setting| {
            let (rings, peer) = (setting.rings.as_ref()?, setting.peer.clone()?);
            Some((rings.clone_ref(py), peer, setting.timeout))
        });
        let Some((rings, (kind, dst), timeout)) = plan else {
            return Ok(UNTRIED);
        };
        let header = TxHeader {
            kind,
            ..TxHeader::default()
        };
        let patience = patience(timeout, flags);
        let sent = (rings.get()).send_one(py, header, &dst, &[], &[body], &[], patience);
        match sent {
            Ok(()) => Ok(1),
            // These rings are of no use any more: whoever tries again finds others, or is told.
            Err(Stop::Errno(GONE | CLOSED | BROKEN)) => Ok(UNTRIED),
            Err(Stop::Errno(errno)) => Ok(errno),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    /// Receives a body that is there already.
    fn receive_at_once<'py>(
        &self,
        py: Python<'py>,
        bufsize: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.look(py, |setting| {
            let Some(rings) = &setting.rings else {
                return Ok(None);
            };
            let rings = rings.get();
            let ends = &rings.ends;
            let mut received = Ok(None);
            if let Some(mut half) = ends.rx.try_have()
                && let Some(inbox) = half.as_mut()
                && !ends.is_closed()
            {
                received = rings.take_body(py, inbox, bufsize);
            }
            ends.tidy_with_gil(py);
            received
        })
    }

    /// Receives a body, and waits for it as long as may be.
    fn receive_in_time<'py>(
        &self,
        py: Python<'py>,
        bufsize: usize,
        flags: i32,
    ) -> PyResult<Result<Bound<'py, PyBytes>, i32>> {
        self.receive_with(py, flags, |rings, patience| {
            rings.receiving(py, patience, |inbox| {
                rings.receive_body(py, inbox, bufsize, patience)
            })
        })
    }

    /// Receives a message in place, and waits for it as long as may be.
    fn receive_loan(&self, py: Python<'_>, flags: i32) -> PyResult<Result<Loan, i32>> {
        self.receive_with(py, flags, |rings, patience| {
            rings.receiving(py, patience, |inbox| {
                rings.lend(py, inbox, patience).map(Some)
            })
        })
    }

    /// Receives in some way from the rings that there are now.
    fn receive_with<T>(
        &self,
        py: Python<'_>,
        flags: i32,
        receive: impl FnOnce(&Rings, Patience) -> Result<Option<T>, Stop>,
    ) -> PyResult<Result<T, i32>> {
        let plan = self.look(py, |setting| {
            Some((setting.rings.as_ref()?.clone_ref(py), setting.timeout))
        });
        let Some((rings, timeout)) = plan else {
            return Ok(Err(UNTRIED));
        };
        match receive(rings.get(), patience(timeout, flags)) {
            Ok(received) => Ok(received.ok_or(UNTRIED)),
            // The waiting is over. Everything else is found again by whoever looks again.
            Err(Stop::Errno(errno @ (AGAIN | LATE))) => Ok(Err(errno)),
            Err(Stop::Errno(_)) => Ok(Err(UNTRIED)),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    /// A block of the lane to where this socket is connected, if there is one now.
    fn lend_at_once(&self, py: Python<'_>, bytes: u64) -> Option<(Py<Rings>, Peer, Lent)> {
        self.look(py, |setting| {
            let (rings, (kind, dst)) = (setting.rings.as_ref()?, setting.peer.as_ref()?);
            let ends = &rings.get().ends;
            let mut lending = Lending::No;
            if let Some(mut half) = ends.tx.try_have()
                && let Some(tx) = half.as_mut()
                && !ends.is_closed()
            {
                lending = tx.lend_now((*kind, &[], dst), bytes);
            }
            ends.tidy_with_gil(py);
            match lending {
                Lending::Given(lent) => Some((rings.clone_ref(py), (*kind, dst.clone()), lent)),
                Lending::Full | Lending::No => None,
            }
        })
    }
}

fn patience(timeout: Option<f64>, flags: i32) -> Patience {
    Patience::new(if flags & libc::MSG_DONTWAIT == 0 {
        timeout
    } else {
        Some(0.0)
    })
}

#[pymethods]
impl Port {
    #[new]
    #[pyo3(signature = (*_args, **_kwargs))]
    fn new(_args: &Bound<'_, PyTuple>, _kwargs: Option<&Bound<'_, PyDict>>) -> Self {
        Self {
            setting: UnsafeCell::default(),
        }
    }

    #[pyo3(signature = (rings, /))]
    fn _use(&self, py: Python<'_>, rings: Option<Py<Rings>>) {
        drop(self.change(py, |setting| &mut setting.rings, rings));
    }

    #[pyo3(signature = (kind, dst, /))]
    fn _aim(&self, py: Python<'_>, kind: u8, dst: Option<&[u8]>) {
        let peer = dst.map(|dst| (kind, dst.into()));
        drop(self.change(py, |setting| &mut setting.peer, peer));
    }

    #[pyo3(signature = (timeout, /))]
    fn _wait_for(&self, py: Python<'_>, timeout: Option<f64>) {
        self.change(py, |setting| &mut setting.timeout, timeout);
    }

    /// Send one message to the address that `connect` named; return its size in bytes.
    ///
    /// As `sendmsg` with one buffer. The quickest way to send one message.
    ///
    /// Args:
    ///     data: The body, at most 16 MiB.
    ///     flags: MSG_DONTWAIT; MSG_NOSIGNAL changes nothing.
    ///
    /// Raises:
    ///     BadDestination: `connect` named no address. EDESTADDRREQ.
    ///     BusError: As `sendmsg`.
    #[pyo3(signature = (data, flags=0, /))]
    fn send<'py>(
        slf: &Bound<'py, Self>,
        data: &Bound<'py, PyAny>,
        flags: i32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, port) = (slf.py(), slf.get());
        let mut verdict = UNTRIED;
        if flags & !PLAIN == 0 {
            let view;
            let body = if let Ok(bytes) = data.cast_exact::<PyBytes>() {
                bytes.as_bytes()
            } else {
                view = View::of(data)?;
                view.bytes()
            };
            verdict = match port.send_at_once(py, body) {
                Ok(true) => 1,
                Ok(false) => port.send_in_time(py, body, flags)?,
                Err(errno) => errno,
            };
            if verdict > 0 {
                return Ok(body.len().into_pyobject(py)?.into_any());
            }
        }
        slf.call_method1(
            intern!(py, "_send_otherwise"),
            (data, flags, verdict.wrapping_neg()),
        )
    }

    /// Receive one message without copying it (R18).
    ///
    /// The loan is the room of the message in the ring: `memoryview(loan)` is the body, read-only;
    /// `loan.address`, `loan.ancdata` and `loan.flags` are as in `recvmsg`. A gap is a loan of no
    /// bytes, with SCM_GAP in its `ancdata`. Give it back soon, by `with` or `loan.release()`: what
    /// comes behind it waits for its room. Descriptors in `ancdata` are the caller's, to close.
    ///
    /// Args:
    ///     flags: MSG_DONTWAIT.
    ///
    /// Raises:
    ///     BusError: As `recvmsg`.
    #[pyo3(signature = (flags=0))]
    fn recv_loan<'py>(slf: &Bound<'py, Self>, flags: i32) -> PyResult<Bound<'py, PyAny>> {
        let (py, port) = (slf.py(), slf.get());
        let mut errno = UNTRIED;
        if flags & !libc::MSG_DONTWAIT == 0 {
            match port.receive_loan(py, flags)? {
                Ok(loan) => return Ok(Bound::new(py, loan)?.into_any()),
                Err(found) => errno = found,
            }
        }
        slf.call_method1(
            intern!(py, "_recv_loan_otherwise"),
            (flags, errno.wrapping_neg()),
        )
    }

    /// Return a buffer for the body of one message, to be written in place and sent.
    ///
    /// `with sock.loan(65536, address) as loan:` write into `memoryview(loan)`, release that view,
    /// and call `loan.send()`.
    ///
    /// Any number of loans may be out, and be sent in any order. One that is neither sent nor
    /// released keeps its memory. Where messages to this address go without the agent it is shared
    /// with the receivers: they could see what is written before it is sent, and a loan waits, as a
    /// message does, while all of this memory holds what they have not read.
    ///
    /// Args:
    ///     nbytes: Size of the buffer in bytes, at most 16 MiB.
    ///     address: As of `sendmsg`; by default that of `connect`.
    ///     ancdata: As of `sendmsg`, but no commands of a master. Descriptors must be open until it
    ///         is sent.
    ///     flags: MSG_DONTWAIT, also for when it is sent; MSG_NOSIGNAL changes nothing.
    ///
    /// Raises:
    ///     TooBig: More than a message can have. EMSGSIZE.
    ///     BusError: As `sendmsg`, for what is wrong with address, items or flags. Whether somebody
    ///         has the address, and the sender may send there, is told when it is sent.
    #[pyo3(signature = (nbytes, address=None, ancdata=None, flags=0))]
    fn loan<'py>(
        slf: &Bound<'py, Self>,
        nbytes: isize,
        address: Option<Bound<'py, PyAny>>,
        ancdata: Option<Bound<'py, PyAny>>,
        flags: i32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if address.is_none()
            && ancdata.is_none()
            && flags == 0
            && let Ok(len) = usize::try_from(nbytes)
            && len as u64 >= ARENA_FROM
            && let Some((rings, peer, lent)) = slf.get().lend_at_once(py, len as u64)
        {
            let plan = slf.getattr(intern!(py, "_peer"))?.unbind();
            let of = (slf.clone().into_any().unbind(), plan);
            let loan = SendLoan::on_lane(of, peer, (lent, len), rings);
            return Ok(Bound::new(py, loan)?.into_any());
        }
        slf.call_method1(
            intern!(py, "_loan_otherwise"),
            (nbytes, address, ancdata, flags),
        )
    }

    /// Receive the body of one message. The quickest way to receive one.
    ///
    /// Args:
    ///     bufsize: In bytes. What is longer is cut to this, without a word.
    ///     flags: As of `recvmsg`.
    ///
    /// Raises:
    ///     MessagesLost: A gap is next. ENOBUFS.
    ///     BusError: As `recvmsg`.
    #[pyo3(signature = (bufsize, flags=0, /))]
    fn recv<'py>(
        slf: &Bound<'py, Self>,
        bufsize: isize,
        flags: i32,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, port) = (slf.py(), slf.get());
        let mut errno = UNTRIED;
        if let Ok(size) = usize::try_from(bufsize)
            && flags & !PLAIN == 0
        {
            if let Some(body) = port.receive_at_once(py, size)? {
                return Ok(body.into_any());
            }
            match port.receive_in_time(py, size, flags)? {
                Ok(body) => return Ok(body.into_any()),
                Err(found) => errno = found,
            }
        }
        slf.call_method1(
            intern!(py, "_recv_otherwise"),
            (bufsize, flags, errno.wrapping_neg()),
        )
    }
}
