//! The class of a client's end, as Python calls it.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PySequence, PyTuple};

use crate::client::{Rx, Tx};
use crate::frame::{EXPECT_REPLY, TxHeader};
use crate::memory::Segment;

use super::ends::Ends;
use super::send_loan::SendLoan;
use super::stop::{Patience, Stop, errno_of};
use super::view::View;

/// The client's end of an endpoint.
#[pyclass(name = "Rings", module = "afbus._datapath", frozen)]
pub struct Rings {
    pub(super) ends: Arc<Ends>,
    pub(super) address: Py<PyAny>,
    pub(super) destination: Py<PyAny>,
}

#[pymethods]
impl Rings {
    #[new]
    fn new(
        tx_fd: RawFd,
        rx_fd: RawFd,
        line: RawFd,
        address: Py<PyAny>,
        destination: Py<PyAny>,
    ) -> PyResult<Self> {
        if tx_fd < 0 || rx_fd < 0 || line < 0 {
            return Err(PyValueError::new_err("a descriptor is negative"));
        }
        // SAFETY: the caller keeps its descriptors open during the call.
        let (tx, rx, line) = unsafe {
            (
                Segment::attach(BorrowedFd::borrow_raw(tx_fd))?,
                Segment::attach(BorrowedFd::borrow_raw(rx_fd))?,
                BorrowedFd::borrow_raw(line).try_clone_to_owned()?,
            )
        };
        let line = Arc::new(line);
        let (tx, rx) = (Tx::new(tx, line.clone()), Rx::new(rx, line.clone()));
        Ok(Self {
            ends: Arc::new(Ends::new(tx, rx, line)),
            address,
            destination,
        })
    }

    #[pyo3(signature = (kind, dst, src, buffers, fds, flags, serial, reply_to, deadline_ms, timeout))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn send(
        &self,
        py: Python<'_>,
        kind: u8,
        dst: &[u8],
        src: &[u8],
        buffers: Vec<Bound<'_, PyAny>>,
        fds: Vec<RawFd>,
        flags: u8,
        serial: u64,
        reply_to: u64,
        deadline_ms: u32,
        timeout: Option<f64>,
    ) -> PyResult<i32> {
        let views = buffers.iter().map(View::of).collect::<PyResult<Vec<_>>>()?;
        let header = TxHeader {
            kind,
            flags: flags & EXPECT_REPLY,
            deadline_ms,
            serial,
            reply_to,
            ..TxHeader::default()
        };
        let patience = Patience::new(timeout);
        let parts: Vec<&[u8]> = views.iter().map(View::bytes).collect();
        errno_of(self.send_one(py, header, dst, src, &parts, &fds, patience))
    }

    #[pyo3(signature = (loan, kind, dst, src, fds, flags, reply_to, timeout, /))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn lend_buffer(
        slf: &Bound<'_, Self>,
        py: Python<'_>,
        loan: &Bound<'_, SendLoan>,
        kind: u8,
        dst: &[u8],
        src: &[u8],
        fds: usize,
        flags: u8,
        reply_to: u64,
        timeout: Option<f64>,
    ) -> PyResult<i32> {
        let header = TxHeader {
            kind,
            flags: flags & EXPECT_REPLY,
            reply_to,
            ..TxHeader::default()
        };
        let patience = Patience::new(timeout);
        errno_of(Self::give_place(
            slf,
            py,
            loan.get(),
            header,
            (src, dst),
            fds,
            patience,
        ))
    }

    #[pyo3(signature = (loan, length, fds, flags, reply_to, deadline_ms, timeout))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn send_loan(
        &self,
        py: Python<'_>,
        loan: &Bound<'_, SendLoan>,
        length: usize,
        fds: Vec<RawFd>,
        flags: u8,
        reply_to: u64,
        deadline_ms: u32,
        timeout: Option<f64>,
    ) -> PyResult<i32> {
        let header = TxHeader {
            flags: flags & EXPECT_REPLY,
            deadline_ms,
            reply_to,
            ..TxHeader::default()
        };
        let (loan, patience) = ((loan.get(), length), Patience::new(timeout));
        errno_of(self.send_written(py, header, loan, &fds, patience))
    }

    #[pyo3(signature = (kind, dst, body, timeout, /))]
    fn send_body(
        &self,
        py: Python<'_>,
        kind: u8,
        dst: &[u8],
        body: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<i32> {
        let header = TxHeader {
            kind,
            ..TxHeader::default()
        };
        let patience = Patience::new(timeout);
        let view;
        let part = if let Ok(bytes) = body.cast_exact::<PyBytes>() {
            bytes.as_bytes()
        } else {
            view = View::of(body)?;
            view.bytes()
        };
        errno_of(self.send_one(py, header, dst, &[], &[part], &[], patience))
    }

    #[pyo3(signature = (kind, dst, src, bodies, flags, timeout))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn send_many(
        &self,
        py: Python<'_>,
        kind: u8,
        dst: &Bound<'_, PyAny>,
        src: &[u8],
        bodies: &Bound<'_, PyAny>,
        flags: u8,
        timeout: Option<f64>,
    ) -> PyResult<(usize, i32)> {
        // What the caller changes meanwhile changes nothing here.
        let bodies = match bodies.cast::<PyTuple>() {
            Ok(bodies) => bodies.clone(),
            Err(_) => bodies.cast::<PySequence>()?.to_tuple()?,
        };
        let one: Vec<&[u8]>;
        let several: Vec<Bound<'_, PyBytes>>;
        if let Ok(bytes) = dst.cast::<PyBytes>() {
            one = vec![bytes.as_bytes()];
        } else {
            several = dst.extract()?;
            if several.len() != bodies.len() {
                return Err(PyValueError::new_err(format!(
                    "{} destinations for {} messages",
                    several.len(),
                    bodies.len()
                )));
            }
            one = several.iter().map(|d| d.as_bytes()).collect();
        }
        if bodies.is_empty() {
            return Ok((0, 0));
        }
        let header = TxHeader {
            kind,
            flags: flags & EXPECT_REPLY,
            ..TxHeader::default()
        };
        // All are looked at before any is sent: what is no buffer is an error of the call, and not of a part of it.
        let views: Vec<View>;
        let bodies = if let Some(plain) = contents(&bodies) {
            plain
        } else {
            views = (bodies.iter_borrowed())
                .map(|body| View::of(&body))
                .collect::<PyResult<_>>()?;
            views.iter().map(View::bytes).collect()
        };
        let (accepted, result) =
            self.send_all(py, header, &one, src, &bodies, Patience::new(timeout));
        Ok((accepted, errno_of(result)?))
    }

    #[pyo3(signature = (count, bufsize, ancbufsize, peek, timeout))]
    fn recv<'py>(
        &self,
        py: Python<'py>,
        count: usize,
        bufsize: usize,
        ancbufsize: usize,
        peek: bool,
        timeout: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let patience = Patience::new(timeout);
        let result = self.receiving(py, patience, |inbox| {
            let count = count.max(1);
            self.receive_all(py, inbox, count, bufsize, ancbufsize, peek, patience)
        });
        match result {
            Ok(list) => Ok(list.into_any()),
            Err(Stop::Errno(errno)) => Ok(errno.into_pyobject(py)?.into_any()),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    #[pyo3(signature = (count, bufsize, timeout, /))]
    fn recv_run<'py>(
        &self,
        py: Python<'py>,
        count: usize,
        bufsize: usize,
        timeout: Option<f64>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let patience = Patience::new(timeout);
        let result = self.receiving(py, patience, |inbox| {
            self.receive_run(py, inbox, count, bufsize, patience)
        });
        match result {
            Ok(Some(run)) => Ok(Some(run.into_bound_py_any(py)?)),
            Ok(None) => Ok(None),
            Err(Stop::Errno(errno)) => Ok(Some(errno.into_bound_py_any(py)?)),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    #[pyo3(signature = (timeout))]
    fn recv_loan<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let patience = Patience::new(timeout);
        let result = self.receiving(py, patience, |inbox| self.lend(py, inbox, patience));
        match result {
            Ok(loan) => Ok(Bound::new(py, loan)?.into_any()),
            Err(Stop::Errno(errno)) => Ok(errno.into_pyobject(py)?.into_any()),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    fn set_details(&self, on: bool) {
        self.ends.details.store(on, Ordering::Relaxed);
    }

    fn set_pollable(&self) {
        self.ends.set_pollable();
    }

    fn close(&self) {
        self.ends.close();
    }
}

/// The contents of a row of bytes; `None` when something else is among them.
fn contents<'a>(row: &'a Bound<'_, PyTuple>) -> Option<Vec<&'a [u8]>> {
    let content = |object: Borrowed<'a, '_, PyAny>| {
        let bytes = object.cast_exact::<PyBytes>().ok()?;
        let bytes = bytes.as_bytes();
        // SAFETY: the row keeps the object for as long as it lives, and bytes never change.
        Some(unsafe { std::slice::from_raw_parts(bytes.as_ptr(), bytes.len()) })
    };
    row.iter_borrowed().map(content).collect()
}
