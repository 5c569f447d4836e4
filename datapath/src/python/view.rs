//! Bodies as Python has them: buffers, and files that are sealed.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::memory::{BODY_SEALS, memfd, seal};
/// A contiguous read-only view of any object with the buffer protocol. Released when dropped, with the GIL held.
pub(super) struct View(ffi::Py_buffer);

impl View {
    pub(super) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // SAFETY: zeroed is a valid empty Py_buffer; on success it is ours to release.
        unsafe {
            let mut view: ffi::Py_buffer = std::mem::zeroed();
            if ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut view, ffi::PyBUF_SIMPLE) < 0 {
                return Err(PyErr::fetch(object.py()));
            }
            Ok(Self(view))
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        if self.0.len == 0 {
            return &[];
        }
        // SAFETY: the exporter keeps `len` bytes at `buf` until release. Python code could change them meanwhile from another
        // thread; what is sent then is a mixture, as with any socket.
        unsafe { std::slice::from_raw_parts(self.0.buf.cast(), self.0.len as usize) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: got by PyObject_GetBuffer, released once; views live only within calls that hold the GIL at this point.
        unsafe { ffi::PyBuffer_Release(&raw mut self.0) }
    }
}

// SAFETY: only the address and the length are used by other threads than the one that made it (the same thread, detached).
unsafe impl Sync for View {}
// SAFETY: as above.
unsafe impl Send for View {}

/// Answers who asks for the buffer of an object; the caller counts the view.
///
/// # Safety
/// `view` is Python's, and the `len` bytes at `start` stay as long as the view is out.
pub(super) unsafe fn show(
    exporter: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    (start, len): (*mut c_void, usize),
    is_readonly: bool,
    flags: c_int,
) -> PyResult<()> {
    let (object, len) = (exporter.as_ptr(), len as ffi::Py_ssize_t);
    // SAFETY: what the caller has promised.
    let done =
        unsafe { ffi::PyBuffer_FillInfo(view, object, start, len, is_readonly.into(), flags) };
    if done < 0 {
        return Err(PyErr::fetch(exporter.py()));
    }
    Ok(())
}

pub(super) fn sealed_body(parts: &[&[u8]]) -> std::io::Result<OwnedFd> {
    let fd = memfd(c"afbus-body")?;
    let mut file = std::fs::File::from(fd);
    for part in parts {
        std::io::Write::write_all(&mut file, part)?;
    }
    let fd = OwnedFd::from(file);
    seal(fd.as_fd(), BODY_SEALS)?;
    Ok(fd)
}

/// Bytes of a size, written by `fill` before anybody has them.
pub(super) fn new_bytes(
    py: Python<'_>,
    size: usize,
    fill: impl FnOnce(&mut [u8]),
) -> PyResult<Bound<'_, PyBytes>> {
    let length = ffi::Py_ssize_t::try_from(size).unwrap_or(ffi::Py_ssize_t::MAX);
    // SAFETY: without content CPython only makes room, which is ours alone until the object is shown to anybody. It is not zeroed first,
    // which would take as long as the copy of a large body; `fill` only writes.
    unsafe {
        let made = ffi::PyBytes_FromStringAndSize(std::ptr::null(), length);
        let bytes = Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked::<PyBytes>();
        if size > 0 {
            let room = ffi::PyBytes_AsString(bytes.as_ptr()).cast::<u8>();
            fill(std::slice::from_raw_parts_mut(room, size));
        }
        Ok(bytes)
    }
}

/// A memfd with this content and all seals (D14).
#[pyfunction]
pub fn sealed_memfd(buffers: Vec<Bound<'_, PyAny>>) -> PyResult<RawFd> {
    let views = buffers.iter().map(View::of).collect::<PyResult<Vec<_>>>()?;
    let parts: Vec<&[u8]> = views.iter().map(View::bytes).collect();
    Ok(sealed_body(&parts)?.into_raw_fd())
}

/// Fills the buffer from the start of a file.
pub(super) fn read_exactly(fd: &OwnedFd, mut out: &mut [u8]) -> std::io::Result<()> {
    let mut at = 0;
    while !out.is_empty() {
        // SAFETY: the buffer is as long as stated and lives for the call.
        let got = unsafe { libc::pread(fd.as_raw_fd(), out.as_mut_ptr().cast(), out.len(), at) };
        if got <= 0 {
            return Err(std::io::Error::last_os_error());
        }
        at += got as libc::off_t;
        out = &mut out[got as usize..];
    }
    Ok(())
}
