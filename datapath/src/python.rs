//! What Python sees: the switch of an agent, the rings of a client, loans. `src/afbus/_datapath.pyi` says what each call promises.
//!
//! Invariants:
//! 1. Nothing here decides: arguments are checked and translated, the GIL is given up for every wait.
//! 2. No lock is held while Python code may run that could want the same lock.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyBufferError, PyKeyError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::bloom::{Bits, Key, expand_required};
use crate::bus::{Bus, Overflow};
use crate::client::{self, Incoming, Outgoing, Rx, Tx, Waited};
use crate::endpoint::{Credentials, Io, SendGrant};
use crate::filter::Filter;
use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, BY_TERMS, CHAIN, EXPECT_REPLY, FDS_LOST, GAP, MONITOR, MULTICAST,
    NO_REPLY, NOTICE, RAW, TERMS, TxHeader, UNICAST,
};
use crate::line;
use crate::memory::{BODY_SEALS, Segment, file_size, memfd, seal};
use crate::ring::{Consumer, Memory, Producer, Violation, padded};
use crate::runner::Runner;
use crate::switch::{self, Event, Quota};

/// `msg_flags` of a monitor's copy; above the flags of recvmsg(2).
pub const MSG_MONITOR: i32 = 1 << 28;

/// The level of the bus's control items, and their types; `proto/control.py` says what they hold.
const BUS_SOCKET: i32 = 0xAFB;
const SCM_DST_ADDR: i32 = 17;
const SCM_IDENTITY: i32 = 18;
const SCM_TERMS: i32 = 19;
const SCM_SERIAL: i32 = 20;
const SCM_REPLY_TO: i32 = 21;
const SCM_GAP: i32 = 22;
const SCM_SEQ: i32 = 24;

/// The room that the item of any gap needs: 28 bytes and an address.
const GAP_SPACE: usize = 16 + padded(28 + ADDRESS_BYTES as u64) as usize;
/// The largest message (D14), checked before memory is taken for it.
const MESSAGE_BYTES: usize = 16 << 20;
/// How long a send that does not want to wait for room waits for its verdict, which is the agent's work of microseconds.
const VERDICT_LIMIT: Duration = Duration::from_secs(5);
/// Records put before the switch is shown them: enough to pay for the wake-up, few enough to let it begin.
const PUBLISH_EVERY: usize = 32;
/// Sources and destinations kept per endpoint.
const MAX_CACHED: usize = 4096;

// ---- the agent's side ----------------------------------------------------------------------------------------------

/// The switch of one agent.
#[pyclass(name = "Switch", module = "afbus._datapath", frozen)]
pub struct PySwitch {
    runner: Mutex<Option<Arc<Runner>>>,
}

fn unknown(what: &str, number: u64) -> PyErr {
    PyKeyError::new_err(format!("no {what} {number}"))
}

/// Bits, and hashes of terms where there are some.
type Required = (Bits, Option<Box<[u64]>>);

/// Bits and exact terms of a match or grant.
fn required(bus: &Bus, terms: Option<&[u8]>, bits: Option<&[u8]>) -> Result<Required, String> {
    match (terms, bits) {
        (Some(packed), None) => bus
            .required(packed)
            .map(|(bits, hashes)| (bits, Some(hashes))),
        (None, Some(raw)) if raw.len() * 8 == bus.width => Bits::from_bytes(raw)
            .map(|bits| (bits, None))
            .map_err(|e| e.to_string()),
        (None, Some(raw)) => Err(format!("{} bits on a bus of {}", raw.len() * 8, bus.width)),
        _ => Err("either terms or bits".to_owned()),
    }
}

impl PySwitch {
    fn runner(&self) -> PyResult<Arc<Runner>> {
        self.runner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| PyRuntimeError::new_err("the switch is closed"))
    }

    fn with<R: Send>(
        &self,
        py: Python<'_>,
        action: impl FnOnce(&mut switch::Switch) -> R + Send,
    ) -> PyResult<R> {
        let runner = self.runner()?;
        Ok(py.detach(|| runner.with(action)))
    }

    /// Does something with the bus of an endpoint.
    fn with_bus_of<R: Send>(
        &self,
        py: Python<'_>,
        endpoint: u64,
        action: impl FnOnce(&mut switch::Switch, u32) -> R + Send,
    ) -> PyResult<R> {
        self.with(py, |core| {
            let bus = core.endpoint(endpoint).and_then(|e| e.bus)?;
            Some(action(core, bus))
        })?
        .ok_or_else(|| unknown("endpoint on a bus", endpoint))
    }
}

#[pymethods]
impl PySwitch {
    #[new]
    #[pyo3(signature = (*, quota_bytes=1 << 30, quota_messages=1 << 22, quota_fds=256))]
    fn new(quota_bytes: u64, quota_messages: u64, quota_fds: u64) -> PyResult<Self> {
        let core = switch::Switch::new(Quota {
            bytes: quota_bytes,
            messages: quota_messages,
            fds: quota_fds,
        });
        Ok(Self {
            runner: Mutex::new(Some(Arc::new(Runner::start(core)?))),
        })
    }

    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.runner()?.events_fd())
    }

    fn take_events(&self, py: Python<'_>) -> PyResult<Vec<(u64, &'static str, &'static str)>> {
        let runner = self.runner()?;
        runner.silence();
        let events = py.detach(|| runner.with(|core| core.take_events()));
        Ok(events
            .into_iter()
            .map(|event| match event {
                Event::Violated(id, rule) => (id, "violated", rule),
                Event::TooSlow(id) => (id, "too-slow", "its ring was full"),
            })
            .collect())
    }

    fn close(&self, py: Python<'_>) {
        let runner = self
            .runner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        py.detach(|| drop(runner));
    }

    fn add_bus(&self, py: Python<'_>, bus: u32, width: usize, key: [u8; 16]) -> PyResult<()> {
        if Bits::zero(width).is_err() {
            return Err(PyValueError::new_err(format!("no bus has {width} bits")));
        }
        self.with(py, |core| core.add_bus(bus, width, key))
    }

    fn remove_bus(&self, py: Python<'_>, bus: u32) -> PyResult<()> {
        self.with(py, |core| core.remove_bus(bus))
    }

    #[pyo3(signature = (bus, endpoint))]
    fn set_master(&self, py: Python<'_>, bus: u32, endpoint: Option<u64>) -> PyResult<()> {
        self.with(py, |core| {
            let master = match endpoint {
                None => None,
                Some(id) => Some(core.find(id).ok_or(("endpoint", id))?),
            };
            core.bus_mut(bus).ok_or(("bus", bus.into()))?.master = master;
            Ok(())
        })?
        .map_err(|(what, number)| unknown(what, number))
    }

    #[allow(clippy::too_many_arguments, reason = "what is known of one endpoint")]
    fn add_endpoint(
        &self,
        py: Python<'_>,
        endpoint: u64,
        principal: u32,
        pid: u32,
        uid: u32,
        gid: u32,
        ident: &[u8],
    ) -> PyResult<()> {
        let added = self.with(py, |core| {
            core.find(endpoint).is_none() && {
                core.add_endpoint(
                    endpoint,
                    principal,
                    Credentials { pid, uid, gid },
                    ident.into(),
                );
                true
            }
        })?;
        if added {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "endpoint {endpoint} is there already"
            )))
        }
    }

    fn connect(
        &self,
        py: Python<'_>,
        endpoint: u64,
        tx_bytes: usize,
        rx_bytes: usize,
    ) -> PyResult<(RawFd, RawFd, RawFd)> {
        let runner = self.runner()?;
        let made = py.detach(|| -> std::io::Result<_> {
            let (tx, tx_fd) = Segment::create(tx_bytes)?;
            let (rx, rx_fd) = Segment::create(rx_bytes)?;
            let (ours, theirs) = line::pair()?;
            let io = Io {
                tx: Consumer::new(tx),
                rx: Producer::new(rx),
                line: ours,
                fds: std::collections::VecDeque::new(),
                dirty: false,
            };
            runner.with(|core| {
                let Some(who) = core.find(endpoint) else {
                    return Ok(None);
                };
                core.connect(who, io);
                runner.watch_line(who, core)?;
                Ok(Some((tx_fd, rx_fd, theirs)))
            })
        });
        match made {
            Ok(Some((tx, rx, line))) => {
                Ok((tx.into_raw_fd(), rx.into_raw_fd(), line.into_raw_fd()))
            }
            Ok(None) => Err(unknown("endpoint", endpoint)),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                Err(PyValueError::new_err(error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn remove_endpoint(
        &self,
        py: Python<'_>,
        endpoint: u64,
        flush: bool,
    ) -> PyResult<Vec<(u64, u64, u64, u64)>> {
        self.with(py, |core| {
            match core.endpoint_mut(endpoint) {
                None => return None,
                Some(e) if !flush => e.cut = true,
                Some(_) => {}
            }
            Some(core.remove_endpoint(endpoint, Instant::now()))
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn flush(&self, py: Python<'_>, endpoint: u64) -> PyResult<()> {
        if self.with(py, |core| core.flush(endpoint, Instant::now()))? {
            Ok(())
        } else {
            Err(unknown("endpoint", endpoint))
        }
    }

    fn attach(&self, py: Python<'_>, endpoint: u64, bus: u32) -> PyResult<()> {
        if self.with(py, |core| core.attach(endpoint, bus))? {
            Ok(())
        } else {
            Err(PyKeyError::new_err(format!(
                "no endpoint {endpoint} or no bus {bus}"
            )))
        }
    }

    fn own(&self, py: Python<'_>, endpoint: u64, address: &[u8]) -> PyResult<bool> {
        self.with_bus_of(py, endpoint, |core, _| core.own(endpoint, address))
    }

    fn disown(&self, py: Python<'_>, endpoint: u64, address: &[u8]) -> PyResult<bool> {
        self.with_bus_of(py, endpoint, |core, _| core.disown(endpoint, address))
    }

    #[pyo3(signature = (endpoint, r#match, terms, bits, overflow, deadline_ms))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one match")]
    fn subscribe(
        &self,
        py: Python<'_>,
        endpoint: u64,
        r#match: u64,
        terms: Option<&[u8]>,
        bits: Option<&[u8]>,
        overflow: u32,
        deadline_ms: u32,
    ) -> PyResult<()> {
        let overflow = match overflow {
            1 => Overflow::Gap,
            2 => Overflow::Conflate,
            3 => Overflow::Disconnect,
            4 => Overflow::Block(deadline_ms),
            other => return Err(PyValueError::new_err(format!("no overflow {other}"))),
        };
        self.with_bus_of(py, endpoint, |core, bus| {
            let bus = core.bus_mut(bus).ok_or("the bus is gone")?;
            let (bits, terms) = required(bus, terms, bits)?;
            if core.subscribe(endpoint, r#match, bits, terms, overflow) {
                Ok(())
            } else {
                Err(format!("match {} is there already", r#match))
            }
        })?
        .map_err(PyValueError::new_err)
    }

    #[pyo3(signature = (endpoint, r#match))]
    fn unsubscribe(&self, py: Python<'_>, endpoint: u64, r#match: u64) -> PyResult<bool> {
        self.with_bus_of(py, endpoint, |core, bus| {
            core.bus_mut(bus).is_some_and(|b| b.unsubscribe(r#match))
        })
    }

    #[pyo3(signature = (endpoint, grant, terms, bits))]
    fn allow_send(
        &self,
        py: Python<'_>,
        endpoint: u64,
        grant: u64,
        terms: Option<&[u8]>,
        bits: Option<&[u8]>,
    ) -> PyResult<()> {
        self.with_bus_of(py, endpoint, |core, bus| {
            let bus = core.bus_mut(bus).ok_or("the bus is gone")?;
            let (bits, terms) = required(bus, terms, bits)?;
            if let Some(e) = core.endpoint_mut(endpoint) {
                e.send_grants.push(SendGrant {
                    id: grant,
                    bits,
                    terms,
                });
            }
            Ok::<(), String>(())
        })?
        .map_err(PyValueError::new_err)
    }

    fn forbid_send(&self, py: Python<'_>, endpoint: u64, grant: u64) -> PyResult<bool> {
        self.with_bus_of(py, endpoint, |core, _| {
            core.endpoint_mut(endpoint).is_some_and(|e| {
                let before = e.send_grants.len();
                e.send_grants.retain(|g| g.id != grant);
                e.send_grants.len() < before
            })
        })
    }

    fn set_monitor(&self, py: Python<'_>, endpoint: u64, on: bool) -> PyResult<()> {
        self.with_bus_of(py, endpoint, |core, bus| {
            let (who, bus) = (core.find(endpoint), core.bus_mut(bus));
            if let (Some(who), Some(bus)) = (who, bus) {
                bus.monitors.retain(|m| *m != who);
                if on {
                    bus.monitors.push(who);
                }
            }
        })
    }

    #[pyo3(signature = (endpoint, program))]
    fn set_filter(&self, py: Python<'_>, endpoint: u64, program: Option<&[u8]>) -> PyResult<()> {
        let filter = program
            .map(Filter::new)
            .transpose()
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
        if self.with(py, |core| core.set_filter(endpoint, filter))? {
            Ok(())
        } else {
            Err(unknown("endpoint", endpoint))
        }
    }

    fn set_ident(&self, py: Python<'_>, endpoint: u64, on: bool) -> PyResult<()> {
        self.with(py, |core| {
            core.endpoint_mut(endpoint).map(|e| e.wants_ident = on)
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn set_silent(&self, py: Python<'_>, endpoint: u64) -> PyResult<()> {
        self.with(py, |core| {
            core.endpoint_mut(endpoint).map(|e| e.silent = true)
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn notify(&self, py: Python<'_>, endpoints: Vec<u64>, body: &[u8]) -> PyResult<()> {
        self.with(py, |core| core.notify(&endpoints, body))
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one message, each once"
    )]
    fn deliver(
        &self,
        py: Python<'_>,
        source: u64,
        target: u64,
        src: &[u8],
        dst: &[u8],
        ctl: &[u8],
        body: &[u8],
        serial: u64,
        reply_to: u64,
        deadline_ms: u32,
    ) -> PyResult<()> {
        let now = Instant::now();
        let expires = (deadline_ms > 0).then(|| now + Duration::from_millis(deadline_ms.into()));
        let known = self.with(py, |core| {
            core.deliver(
                source, target, src, dst, ctl, body, serial, reply_to, expires, now,
            )
        })?;
        if known {
            Ok(())
        } else {
            Err(PyKeyError::new_err(format!(
                "no endpoint {source} or {target}"
            )))
        }
    }

    fn stats<'py>(&self, py: Python<'py>, endpoint: u64) -> PyResult<Bound<'py, PyDict>> {
        let rows = self
            .with(py, |core| core.counters(endpoint))?
            .ok_or_else(|| unknown("endpoint", endpoint))?;
        let stats = PyDict::new(py);
        for (name, value) in rows {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }
}

// ---- buffers ---------------------------------------------------------------------------------------------------------

/// A contiguous read-only view of any object with the buffer protocol. Released when dropped, with the GIL held.
struct View(ffi::Py_buffer);

impl View {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // SAFETY: zeroed is a valid empty Py_buffer; on success it is ours to release.
        unsafe {
            let mut view: ffi::Py_buffer = std::mem::zeroed();
            if ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut view, ffi::PyBUF_SIMPLE) < 0 {
                return Err(PyErr::fetch(object.py()));
            }
            Ok(Self(view))
        }
    }

    fn bytes(&self) -> &[u8] {
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

fn sealed_body(parts: &[&[u8]]) -> std::io::Result<OwnedFd> {
    let fd = memfd(c"afbus-body")?;
    let mut file = std::fs::File::from(fd);
    for part in parts {
        std::io::Write::write_all(&mut file, part)?;
    }
    let fd = OwnedFd::from(file);
    seal(fd.as_fd(), BODY_SEALS)?;
    Ok(fd)
}

/// A memfd with this content and all seals (D14).
#[pyfunction]
pub fn sealed_memfd(buffers: Vec<Bound<'_, PyAny>>) -> PyResult<RawFd> {
    let views = buffers.iter().map(View::of).collect::<PyResult<Vec<_>>>()?;
    let parts: Vec<&[u8]> = views.iter().map(View::bytes).collect();
    Ok(sealed_body(&parts)?.into_raw_fd())
}

/// The bits that a subscription with these packed terms requires.
#[pyfunction]
pub fn term_bits<'py>(
    py: Python<'py>,
    key: [u8; 16],
    width: usize,
    terms: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let bits = expand_required(terms)
        .map_err(|e| PyValueError::new_err(e.to_string()))?
        .bits(&Key::new(key), width)
        .map_err(|e| PyValueError::new_err(e.to_string()))?;
    Ok(PyBytes::new(py, &bits.to_bytes()))
}

// ---- the client's side -----------------------------------------------------------------------------------------------

/// What is kept of received addresses, so that each object is made once.
#[derive(Default)]
struct Known {
    sources: HashMap<Box<[u8]>, Py<PyAny>>,
    destinations: HashMap<(u8, Box<[u8]>), Py<PyBytes>>,
}

struct Ends {
    tx: Mutex<Option<Tx>>,
    rx: Mutex<Option<Rx>>,
    /// Loans that came back and whose room was not given back yet.
    returned: Mutex<Vec<u64>>,
    line: RawFd,
    details: AtomicBool,
    pollable: AtomicBool,
    closed: AtomicBool,
}

/// The client's end of an endpoint.
#[pyclass(name = "Rings", module = "afbus._datapath", frozen)]
pub struct Rings {
    ends: Arc<Ends>,
    known: Mutex<Known>,
    address: Py<PyAny>,
    destination: Py<PyAny>,
}

const AGAIN: i32 = -libc::EAGAIN;
const GONE: i32 = -libc::ENOTCONN;
const CLOSED: i32 = -libc::EBADF;
const BROKEN: i32 = -libc::EBADMSG;
const UNKNOWN: i32 = -libc::ECONNABORTED;
const LATE: i32 = -libc::ETIMEDOUT;

impl From<Violation> for Stop {
    fn from(_: Violation) -> Self {
        Self::Errno(BROKEN)
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        Self::Raise(error)
    }
}

/// Why a call ends before its work is done.
enum Stop {
    Errno(i32),
    Raise(PyErr),
}

/// When to give up; whether to wait at all.
#[derive(Clone, Copy)]
struct Patience {
    waits: bool,
    until: Option<Instant>,
}

impl Patience {
    fn new(timeout: Option<f64>) -> Self {
        match timeout {
            None => Self {
                waits: true,
                until: None,
            },
            Some(t) if t <= 0.0 => Self {
                waits: false,
                until: None,
            },
            Some(t) => Self {
                waits: true,
                // A time so long that it cannot be told is for ever.
                until: Duration::try_from_secs_f64(t)
                    .ok()
                    .and_then(|d| Instant::now().checked_add(d)),
            },
        }
    }

    fn left(&self) -> Duration {
        self.until.map_or(Duration::from_secs(3600), |at| {
            at.saturating_duration_since(Instant::now())
        })
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|at| at <= Instant::now())
    }
}

/// Takes a lock that another thread may hold while it waits for the agent, without holding up signals.
fn acquire<'a, T: Send>(
    py: Python<'_>,
    lock: &'a Mutex<T>,
    patience: Patience,
) -> Result<MutexGuard<'a, T>, Stop> {
    loop {
        match lock.try_lock() {
            Ok(guard) => return Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
        if !patience.waits {
            return Err(Stop::Errno(AGAIN));
        }
        if patience.is_over() {
            return Err(Stop::Errno(LATE));
        }
        py.detach(|| std::thread::sleep(Duration::from_micros(200)));
        py.check_signals()?;
    }
}

impl Ends {
    fn line(&self) -> BorrowedFd<'_> {
        // SAFETY: the caller of `Rings` keeps the line open for as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.line) }
    }

    /// Gives back the room of loans that came back.
    fn collect(&self, rx: &mut Rx) {
        let ends =
            std::mem::take(&mut *self.returned.lock().unwrap_or_else(PoisonError::into_inner));
        for end in ends {
            rx.give_back(end, self.line());
        }
        rx.settle(self.line());
    }

    /// A loan came back. Whoever has the reading half may be waiting with it, and for this very room.
    fn give_back(&self, end: u64) {
        self.returned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(end);
        match self.rx.try_lock() {
            Ok(mut rx) => {
                if let Some(rx) = rx.as_mut() {
                    self.collect(rx);
                }
            }
            // The answer wakes it, and it collects. A closed line has woken it already.
            Err(_) => drop(line::send(self.line(), &[line::PING], &[])),
        }
    }

    fn check_open(&self) -> Result<(), Stop> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Stop::Errno(CLOSED));
        }
        Ok(())
    }

    fn is_hung_up(&self) -> bool {
        let gone = libc::POLLHUP | libc::POLLERR;
        client::poll(self.line(), 0, Some(Duration::ZERO)) & gone != 0
    }

    /// Waits until everything before `end` has its verdict.
    fn await_verdict(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        end: u64,
        patience: Patience,
    ) -> Result<(), Stop> {
        let limit = if patience.waits {
            patience.until
        } else {
            Some(Instant::now() + VERDICT_LIMIT)
        };
        loop {
            match py.detach(|| tx.wait_settled(end, self.line(), Duration::from_millis(100)))? {
                Waited::Ready => return Ok(()),
                Waited::Gone => return Err(Stop::Errno(UNKNOWN)),
                Waited::NotYet => {}
            }
            py.check_signals()?;
            if limit.is_some_and(|at| at <= Instant::now()) {
                return Err(Stop::Errno(UNKNOWN));
            }
        }
    }

    /// Waits until the switch says that there is room where there was none.
    fn await_room(
        &self,
        py: Python<'_>,
        tx: &Tx,
        seen: u32,
        patience: Patience,
    ) -> Result<(), Stop> {
        loop {
            match py.detach(|| tx.wait_room(seen, self.line(), patience.left())) {
                Waited::Ready => return Ok(()),
                Waited::Gone => return Err(Stop::Errno(GONE)),
                Waited::NotYet => {}
            }
            py.check_signals()?;
            if self.closed.load(Ordering::Acquire) {
                return Err(Stop::Errno(CLOSED));
            }
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }

    /// Puts a message into the ring, waiting for older ones to leave it.
    fn put(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        message: &Outgoing<'_>,
        patience: Patience,
    ) -> Result<(u64, u64), Stop> {
        loop {
            if let Some(place) = tx.put(message)? {
                return Ok(place);
            }
            // Only messages whose verdict nobody waited for can be in the way.
            let next = tx.released() + 1;
            match self.await_verdict(py, tx, next, patience) {
                // What is unknown is the fate of those; this message was not even shown to the switch.
                Err(Stop::Errno(UNKNOWN)) => {
                    return Err(Stop::Errno(if self.is_hung_up() {
                        GONE
                    } else if patience.waits {
                        LATE
                    } else {
                        AGAIN
                    }));
                }
                result => result?,
            }
        }
    }
}

impl Rings {
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn send_one(
        &self,
        py: Python<'_>,
        mut header: TxHeader,
        dst: &[u8],
        src: &[u8],
        views: &[View],
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut guard = acquire(py, &self.ends.tx, patience)?;
        self.ends.check_open()?;
        let tx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
        let parts: Vec<&[u8]> = views.iter().map(View::bytes).collect();
        let body_len: usize = parts.iter().map(|part| part.len()).sum();
        check_addresses(src, dst)?;
        if body_len > MESSAGE_BYTES || fds.len() > line::MAX_FDS - 1 {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        header.body_len = body_len as u32;
        let sealed;
        let mut all_fds = fds.to_vec();
        let mut body: &[&[u8]] = &parts;
        if body_len as u64 > tx.inline_limit() {
            sealed = py
                .detach(|| sealed_body(&parts))
                .map_err(|e| Stop::Raise(e.into()))?;
            all_fds.push(sealed.as_raw_fd());
            header.flags |= BODY_IN_MEMFD;
            body = &[];
        }
        header.fds = all_fds.len() as u8;
        let message = Outgoing {
            header,
            src,
            dst,
            body,
        };
        if client::record_bytes(&message) > tx.record_limit() {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        loop {
            let room = tx.room();
            let (pos, end) = self.ends.put(py, tx, &message, patience)?;
            // Descriptors go ahead of their record, but never without it.
            if !all_fds.is_empty()
                && let Err(stop) = self.send_fds(py, &all_fds, patience)
            {
                tx.abandon();
                return Err(stop);
            }
            if !tx.publish(self.ends.line()) {
                return Err(Stop::Errno(GONE));
            }
            self.ends.await_verdict(py, tx, end, patience)?;
            match checked(tx.verdict(pos)) {
                switch::OK => return Ok(()),
                AGAIN if patience.waits => self.ends.await_room(py, tx, room, patience)?,
                refusal => {
                    if refusal == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                        tx.block_line(room, self.ends.line());
                    }
                    return Err(Stop::Errno(refusal));
                }
            }
        }
    }

    fn send_fds(&self, py: Python<'_>, fds: &[RawFd], patience: Patience) -> Result<(), Stop> {
        loop {
            let limit = if patience.waits {
                patience.left()
            } else {
                Duration::ZERO
            };
            let sent = py.detach(|| client::send_fds(self.ends.line(), fds, limit));
            let error = match sent {
                Ok(()) => return Ok(()),
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            match error {
                libc::EPIPE | libc::ECONNRESET => return Err(Stop::Errno(GONE)),
                libc::EAGAIN | libc::EINTR if patience.waits => {}
                libc::ETOOMANYREFS => return Err(Stop::Errno(-libc::EDQUOT)),
                errno => return Err(Stop::Errno(-errno)),
            }
            py.check_signals()?;
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }

    /// Sends many messages; returns how many were accepted, and what stopped the rest.
    fn send_all(
        &self,
        py: Python<'_>,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[View],
        patience: Patience,
    ) -> (usize, Result<(), Stop>) {
        let mut accepted = 0;
        while accepted < bodies.len() {
            let result = self.send_run(
                py,
                header,
                destinations,
                src,
                bodies,
                &mut accepted,
                patience,
            );
            if let Err(stop) = result {
                return (accepted, Err(stop));
            }
        }
        (accepted, Ok(()))
    }

    /// Sends messages until one is refused for lack of room, waits for that room, and returns; or until all are sent.
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn send_run(
        &self,
        py: Python<'_>,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[View],
        accepted: &mut usize,
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut guard = acquire(py, &self.ends.tx, patience)?;
        self.ends.check_open()?;
        let tx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
        let room = tx.room();
        let line = self.ends.line();
        // Positions and ends of messages without a verdict.
        let mut open: std::collections::VecDeque<(u64, u64)> = std::collections::VecDeque::new();
        let (mut next, mut unpublished, mut refusal) = (*accepted, 0usize, switch::OK);
        let mut settle = |tx: &mut Tx,
                          open: &mut std::collections::VecDeque<(u64, u64)>,
                          refusal: &mut i32|
         -> Result<(), Violation> {
            while let Some((pos, end)) = open.front() {
                if !tx.settled(*end)? {
                    break;
                }
                let verdict = checked(tx.verdict(*pos));
                open.pop_front();
                if *refusal == switch::OK {
                    if verdict == switch::OK {
                        *accepted += 1;
                    } else {
                        *refusal = verdict;
                    }
                }
            }
            Ok(())
        };
        let mut large = false;
        while next < bodies.len() && refusal == switch::OK {
            let view = &bodies[next];
            let dst = destinations[if destinations.len() == 1 { 0 } else { next }];
            let chain = if open.is_empty() { 0 } else { CHAIN };
            let part = [view.bytes()];
            let message = Outgoing {
                header: TxHeader {
                    flags: header.flags | chain,
                    body_len: part[0].len() as u32,
                    ..header
                },
                src,
                dst,
                body: &part,
            };
            if part[0].len() as u64 > tx.inline_limit()
                || client::record_bytes(&message) > tx.record_limit()
            {
                large = true;
                break;
            }
            // Verdicts are read before the place of their records can be taken by new ones.
            if !tx.fits(client::record_bytes(&message)) {
                if unpublished > 0 {
                    let shown = open.len() > unpublished;
                    unpublished = 0;
                    if !tx.publish(line) {
                        settle(tx, &mut open, &mut refusal)?;
                        return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
                    }
                }
                settle(tx, &mut open, &mut refusal)?;
                if tx.fits(client::record_bytes(&message)) {
                    continue;
                }
                // A quarter of what is on its way, so that neither side waits for each single record.
                let end = open
                    .get(open.len() / 4)
                    .map_or(tx.released() + 1, |(_, end)| *end);
                let done = self.ends.await_verdict(py, tx, end, patience);
                settle(tx, &mut open, &mut refusal)?;
                done?;
                continue;
            }
            let Some(place) = tx.put(&message)? else {
                continue;
            };
            open.push_back(place);
            next += 1;
            unpublished += 1;
            if unpublished == PUBLISH_EVERY {
                let shown = open.len() > unpublished;
                unpublished = 0;
                if !tx.publish(line) {
                    settle(tx, &mut open, &mut refusal)?;
                    return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
                }
            }
        }
        if unpublished > 0 {
            let shown = open.len() > unpublished;
            if !tx.publish(line) {
                settle(tx, &mut open, &mut refusal)?;
                return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
            }
        }
        if let Some((_, end)) = open.back() {
            let end = *end;
            let done = self.ends.await_verdict(py, tx, end, patience);
            settle(tx, &mut open, &mut refusal)?;
            done?;
        }
        match refusal {
            switch::OK => {}
            AGAIN if patience.waits => return self.ends.await_room(py, tx, room, patience),
            errno => {
                if errno == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                    tx.block_line(room, line);
                }
                return Err(Stop::Errno(errno));
            }
        }
        drop(guard);
        if large {
            let view = std::slice::from_ref(&bodies[*accepted]);
            let dst = destinations[if destinations.len() == 1 {
                0
            } else {
                *accepted
            }];
            self.send_one(py, header, dst, src, view, &[], patience)?;
            *accepted += 1;
        }
        Ok(())
    }

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
    fn describe<'py>(
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
        let wants_dst = h.kind == crate::frame::MESSAGE && (details || raw);
        if h.kind == GAP {
            let mut data = section(h.body_at(), h.body_len as usize);
            data.extend(section(crate::frame::RX_HEADER, h.src_len.into()));
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
            memory.copy_out(record.pos + crate::frame::RX_HEADER, src);
            self.source(py, src, false)?
        };
        Ok((PyList::new(py, items.list)?, flags, address))
    }

    /// The descriptors of a record: those of the message, and that of its body.
    #[allow(clippy::type_complexity, reason = "two parts of one packet")]
    fn fds_of(
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
    fn await_record(
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
    fn receive_all<'py>(
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

    fn arm(&self, rx: &mut Rx) -> Result<(), Violation> {
        if self.ends.pollable.load(Ordering::Relaxed) {
            rx.arm(self.ends.line())
        } else {
            Ok(())
        }
    }
}

/// Control items of one message, as far as there is room for them.
struct Items<'py> {
    py: Python<'py>,
    list: Vec<Bound<'py, PyTuple>>,
    room: usize,
    /// Nothing was left out.
    all: bool,
}

impl<'py> Items<'py> {
    /// What cmsg(3) calls CMSG_SPACE: a header of 16 bytes, and data padded to 8.
    fn space(len: usize) -> usize {
        16 + padded(len as u64) as usize
    }

    /// Whether there is room for so many bytes of data; if not, that is noted.
    fn fits(&mut self, len: usize) -> bool {
        let fits = Self::space(len) <= self.room;
        self.all &= fits;
        fits
    }

    fn push(&mut self, level: i32, kind: i32, data: Bound<'py, PyBytes>) -> PyResult<()> {
        let len = data.as_bytes().len();
        if self.fits(len) {
            self.room -= Self::space(len);
            self.list.push((level, kind, data).into_pyobject(self.py)?);
        }
        Ok(())
    }

    fn add(&mut self, level: i32, kind: i32, data: &[u8]) -> PyResult<()> {
        if self.fits(data.len()) {
            self.push(level, kind, PyBytes::new(self.py, data))?;
        }
        Ok(())
    }

    fn bus(&mut self, kind: i32, data: &[u8]) -> PyResult<()> {
        self.add(BUS_SOCKET, kind, data)
    }
}

/// Lengths that a record can tell.
fn check_addresses(src: &[u8], dst: &[u8]) -> Result<(), Stop> {
    if src.len() > ADDRESS_BYTES || dst.len() > usize::from(u16::MAX) {
        return Err(Stop::Errno(-libc::ENAMETOOLONG));
    }
    Ok(())
}

/// A verdict as the switch gives them: accepted or a negative errno. Nothing else is a success.
fn checked(verdict: i32) -> i32 {
    if verdict == switch::OK || (-4095..0).contains(&verdict) {
        verdict
    } else {
        BROKEN
    }
}

fn read_exactly(fd: &OwnedFd, mut out: &mut [u8]) -> std::io::Result<()> {
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

fn errno_of(result: Result<(), Stop>) -> PyResult<i32> {
    match result {
        Ok(()) => Ok(0),
        Err(Stop::Errno(errno)) => Ok(errno),
        Err(Stop::Raise(error)) => Err(error),
    }
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
        let (tx, rx) = unsafe {
            (
                Segment::attach(BorrowedFd::borrow_raw(tx_fd))?,
                Segment::attach(BorrowedFd::borrow_raw(rx_fd))?,
            )
        };
        Ok(Self {
            ends: Arc::new(Ends {
                tx: Mutex::new(Some(Tx::new(tx))),
                rx: Mutex::new(Some(Rx::new(rx))),
                line,
                returned: Mutex::new(Vec::new()),
                details: AtomicBool::new(false),
                pollable: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            }),
            known: Mutex::new(Known::default()),
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
        errno_of(self.send_one(py, header, dst, src, &views, &fds, patience))
    }

    #[pyo3(signature = (kind, dst, src, bodies, flags, timeout))]
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn send_many(
        &self,
        py: Python<'_>,
        kind: u8,
        dst: &Bound<'_, PyAny>,
        src: &[u8],
        bodies: Vec<Bound<'_, PyAny>>,
        flags: u8,
        timeout: Option<f64>,
    ) -> PyResult<(usize, i32)> {
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
        let views = bodies.iter().map(View::of).collect::<PyResult<Vec<_>>>()?;
        for dst in &one {
            if let Err(Stop::Errno(errno)) = check_addresses(src, dst) {
                return Ok((0, errno));
            }
        }
        let (accepted, result) =
            self.send_all(py, header, &one, src, &views, Patience::new(timeout));
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
        let result = (|| {
            let mut guard = acquire(py, &self.ends.rx, patience)?;
            self.ends.check_open()?;
            let rx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
            let result =
                self.receive_all(py, rx, count.max(1), bufsize, ancbufsize, peek, patience);
            self.ends.collect(rx);
            self.arm(rx)?;
            result
        })();
        match result {
            Ok(list) => Ok(list.into_any()),
            Err(Stop::Errno(errno)) => Ok(errno.into_pyobject(py)?.into_any()),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    #[pyo3(signature = (timeout))]
    fn recv_loan<'py>(&self, py: Python<'py>, timeout: Option<f64>) -> PyResult<Bound<'py, PyAny>> {
        let patience = Patience::new(timeout);
        let result = (|| {
            let mut guard = acquire(py, &self.ends.rx, patience)?;
            self.ends.check_open()?;
            let rx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
            let result = self.lend(py, rx, patience);
            self.ends.collect(rx);
            self.arm(rx)?;
            result
        })();
        match result {
            Ok(loan) => Ok(Bound::new(py, loan)?.into_any()),
            Err(Stop::Errno(errno)) => Ok(errno.into_pyobject(py)?.into_any()),
            Err(Stop::Raise(error)) => Err(error),
        }
    }

    fn set_details(&self, on: bool) {
        self.ends.details.store(on, Ordering::Relaxed);
    }

    fn set_pollable(&self, py: Python<'_>) -> PyResult<()> {
        self.ends.pollable.store(true, Ordering::SeqCst);
        // A thread that is receiving right now does it itself at its end.
        let patience = Patience::new(Some(0.0));
        if let Ok(mut guard) = acquire(py, &self.ends.rx, patience)
            && let Some(rx) = guard.as_mut()
        {
            rx.arm_first(self.ends.line())
                .map_err(|v| PyOSError::new_err((libc::EBADMSG, v.0)))?;
        }
        Ok(())
    }

    fn close(&self) -> PyResult<()> {
        if self.ends.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // SAFETY: plain call on the line, which the caller keeps open; it ends every wait on it.
        unsafe { libc::shutdown(self.ends.line, libc::SHUT_RDWR) };
        // Who waits with a half notices and gives it up; it may be the very thread that a signal has brought here.
        if let Ok(mut tx) = self.ends.tx.try_lock() {
            *tx = None;
        }
        if let Ok(mut rx) = self.ends.rx.try_lock() {
            *rx = None;
        }
        Ok(())
    }
}

// ---- loans -------------------------------------------------------------------------------------------------------------

/// Where the body of a loan lies.
enum Place {
    Ring(Arc<Segment>, u64),
    Mapped(*mut c_void, usize),
    Nowhere,
}

/// A message that lies in the ring, or in a mapped memfd, until it is released.
#[pyclass(name = "Loan", module = "afbus._datapath", frozen)]
pub struct Loan {
    ends: Arc<Ends>,
    end: u64,
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
    fn lend(&self, py: Python<'_>, rx: &mut Rx, patience: Patience) -> Result<Loan, Stop> {
        let record = self.await_record(py, rx, patience)?;
        let h = record.header;
        let memory = rx.memory().clone();
        let (fds, body_fd) = self.fds_of(rx, &record)?;
        let described = self.describe(py, &memory, &record, fds, usize::MAX);
        let mut len = if h.kind == GAP {
            0
        } else {
            h.body_len as usize
        };
        let mut lost = 0;
        let place = match body_fd {
            _ if len == 0 => Place::Nowhere,
            None if h.flags & BODY_IN_MEMFD != 0 => {
                (len, lost) = (0, libc::MSG_TRUNC | libc::MSG_CTRUNC);
                Place::Nowhere
            }
            None => Place::Ring(memory, record.pos + h.body_at()),
            Some(fd) => match map(&fd, len) {
                Ok(address) => Place::Mapped(address, len),
                Err(error) => {
                    rx.take(&record, false);
                    return Err(Stop::Raise(error.into()));
                }
            },
        };
        rx.take(&record, matches!(place, Place::Ring(..)));
        let (items, flags, address) = described?;
        Ok(Loan {
            ends: self.ends.clone(),
            end: rx.position(),
            len,
            state: Mutex::new((place, 0, false)),
            address,
            ancdata: items.unbind(),
            flags: flags | lost,
        })
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

    fn release(&self) -> PyResult<()> {
        let place = {
            let mut state = self.state();
            if state.1 > 0 {
                return Err(PyBufferError::new_err(format!(
                    "{} views of the loan are still in use",
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
            Place::Ring(memory, pos) => memory.at(*pos).cast(),
            Place::Mapped(address, _) => *address,
            Place::Nowhere => ptr::NonNull::<u8>::dangling().as_ptr().cast(),
        };
        // SAFETY: `view` is Python's; the bytes stay until the last view is given back (`release` refuses before).
        let done = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                start,
                this.len as ffi::Py_ssize_t,
                1,
                flags,
            )
        };
        if done < 0 {
            return Err(PyErr::fetch(slf.py()));
        }
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
