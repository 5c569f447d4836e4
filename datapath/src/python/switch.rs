//! The switch of an agent.

use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::IntoPyObjectExt;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};

use crate::bloom::{Bits, Key, expand_required};
use crate::bus::{Bus, Overflow};
use crate::endpoint::{Credentials, Io, SendGrant};
use crate::filter::Filter;
use crate::line;
use crate::memory::Segment;
use crate::ring::{Consumer, Producer};
use crate::runner::Runner;
use crate::switch::{self, Event, LaneRow, Quota, Side};
use crate::trunk::LaneEvent;
use crate::trunk_wire::Broken;

create_exception!(
    _datapath,
    Forged,
    PyValueError,
    "A node claims what belongs to somebody else (D6)."
);

/// The switch of one agent.
#[pyclass(name = "Switch", module = "afbus._datapath", frozen)]
pub struct PySwitch {
    runner: Mutex<Option<Arc<Runner>>>,
    /// Events that came with those of the other kind, and wait for their own call.
    waiting: Mutex<(Vec<Event>, Vec<LaneEvent>)>,
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

/// The first byte of a form that is of raw bits; see `proto/match.py`.
const RAW_FORM: u8 = 0xff;

/// Matches that are added while the switch waits: a fraction of a millisecond.
const AT_ONCE: usize = 32;

/// Number, packed terms or raw bits, overflow and deadline in ms.
type Wish<'a> = (u64, Option<&'a [u8]>, Option<&'a [u8]>, u32, u32);

/// Adds a match of an endpoint on its bus.
fn subscribe(
    core: &mut switch::Switch,
    endpoint: u64,
    bus: u32,
    (number, terms, bits, overflow, deadline_ms): Wish<'_>,
) -> Result<(), String> {
    let overflow = match overflow {
        1 => Overflow::Gap,
        2 => Overflow::Conflate,
        3 => Overflow::Disconnect,
        4 => Overflow::Block(deadline_ms),
        other => return Err(format!("no overflow {other}")),
    };
    let bus = core.bus_mut(bus).ok_or("the bus is gone")?;
    let (bits, terms) = required(bus, terms, bits)?;
    if core.subscribe(endpoint, number, bits, terms, overflow) {
        Ok(())
    } else {
        Err(format!("match {number} is there already"))
    }
}

impl PySwitch {
    /// The running switch.
    pub(super) fn runner(&self) -> PyResult<Arc<Runner>> {
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

    /// Does something with a trunk.
    fn with_trunk<R: Send>(
        &self,
        py: Python<'_>,
        trunk: u64,
        action: impl FnOnce(&mut switch::Switch) -> R + Send,
    ) -> PyResult<R> {
        self.with(py, |core| core.trunk(trunk).is_some().then(|| action(core)))?
            .ok_or_else(|| unknown("trunk", trunk))
    }

    /// Takes what has happened, of one kind or the other.
    fn take<R>(
        &self,
        py: Python<'_>,
        choose: impl FnOnce(&mut (Vec<Event>, Vec<LaneEvent>)) -> R,
    ) -> PyResult<R> {
        let runner = self.runner()?;
        // Not silenced: whoever looks again is told again, until the agent ends.
        if let Some(words) = runner.failure() {
            return Err(PyRuntimeError::new_err(format!(
                "the thread of the switch panicked: {words}"
            )));
        }
        runner.silence();
        let (events, lanes) =
            py.detach(|| runner.with(|core| (core.take_events(), core.take_lane_events())));
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.0.extend(events);
        waiting.1.extend(lanes);
        Ok(choose(&mut waiting))
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
            waiting: Mutex::default(),
        })
    }

    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.runner()?.events_fd())
    }

    fn take_events(&self, py: Python<'_>) -> PyResult<Vec<(u64, &'static str, &'static str)>> {
        let events = self.take(py, |waiting| std::mem::take(&mut waiting.0))?;
        Ok(events
            .into_iter()
            .map(|event| match event {
                Event::Violated(id, rule) => (id, "violated", rule),
                Event::TooSlow(id) => (id, "too-slow", "its ring was full"),
            })
            .collect())
    }

    fn take_unread_on_lanes(&self, py: Python<'_>) -> PyResult<Vec<switch::UnreadOnLane>> {
        self.with(py, switch::Switch::take_unread_on_lanes)
    }

    fn take_lane_events<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let events = self.take(py, |waiting| std::mem::take(&mut waiting.1))?;
        events
            .into_iter()
            .map(|event| match event {
                LaneEvent::Ready(trunk) => ("ready", trunk).into_bound_py_any(py),
                LaneEvent::Choked(trunk) => ("choked", trunk).into_bound_py_any(py),
                LaneEvent::Body {
                    trunk,
                    ticket,
                    size,
                } => ("body", trunk, ticket, size).into_bound_py_any(py),
                LaneEvent::Signal(trunk, data) => {
                    ("signal", trunk, PyBytes::new(py, &data)).into_bound_py_any(py)
                }
                LaneEvent::Source(trunk, address) => {
                    ("source", trunk, PyBytes::new(py, &address)).into_bound_py_any(py)
                }
                LaneEvent::Denied(endpoint, address) => {
                    ("denied", endpoint, PyBytes::new(py, &address)).into_bound_py_any(py)
                }
                LaneEvent::Unread {
                    endpoint,
                    first,
                    last,
                    count,
                    errno,
                    address,
                } => {
                    let address = PyBytes::new(py, &address);
                    ("unread", endpoint, first, last, count, errno, address).into_bound_py_any(py)
                }
                LaneEvent::Unknown {
                    endpoint,
                    first,
                    last,
                    count,
                    trunk,
                } => ("unknown", endpoint, first, last, count, trunk).into_bound_py_any(py),
            })
            .collect()
    }

    fn close(&self, py: Python<'_>) {
        let runner = self
            .runner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        py.detach(|| drop(runner));
    }

    #[pyo3(signature = (bus, width, key, number=None))]
    fn add_bus(
        &self,
        py: Python<'_>,
        bus: u32,
        width: usize,
        key: [u8; 16],
        number: Option<u32>,
    ) -> PyResult<()> {
        if Bits::zero(width).is_err() {
            return Err(PyValueError::new_err(format!("no bus has {width} bits")));
        }
        let added = self.with(py, |core| {
            core.add_bus(bus, width, key);
            number.is_none_or(|number| core.set_bus_number(bus, number))
        })?;
        if added {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "bus {number:?} of the cluster is there already"
            )))
        }
    }

    fn allow_lanes(&self, py: Python<'_>, bus: u32) -> PyResult<()> {
        self.with(py, |core| core.bus_mut(bus).map(|b| b.has_lanes = true))?
            .ok_or_else(|| unknown("bus", bus.into()))
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
            core.set_master(bus, master)
                .then_some(())
                .ok_or(("bus", bus.into()))
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
                lane_calls: Vec::new(),
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

    #[pyo3(signature = (endpoint, bus, provisional=None))]
    fn attach(
        &self,
        py: Python<'_>,
        endpoint: u64,
        bus: u32,
        provisional: Option<&[u8]>,
    ) -> PyResult<()> {
        let attached = self.with(py, |core| {
            core.attach(endpoint, bus)
                && provisional.is_none_or(|address| core.set_provisional(endpoint, address))
        })?;
        if attached {
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
        let wish = (r#match, terms, bits, overflow, deadline_ms);
        self.with_bus_of(py, endpoint, |core, bus| {
            subscribe(core, endpoint, bus, wish)
        })?
        .map_err(PyValueError::new_err)
    }

    #[pyo3(signature = (endpoint, matches))]
    fn subscribe_all(
        &self,
        py: Python<'_>,
        endpoint: u64,
        matches: Vec<(u64, PyBackedBytes, u32, u32)>,
    ) -> PyResult<()> {
        for some in matches.chunks(AT_ONCE) {
            self.with_bus_of(py, endpoint, |core, bus| {
                some.iter()
                    .try_for_each(|&(number, ref form, overflow, deadline_ms)| {
                        let (terms, bits) = match form.split_first() {
                            Some((&RAW_FORM, bits)) => (None, Some(bits)),
                            _ => (Some(&form[..]), None),
                        };
                        let wish = (number, terms, bits, overflow, deadline_ms);
                        subscribe(core, endpoint, bus, wish)
                    })
            })?
            .map_err(PyValueError::new_err)?;
        }
        Ok(())
    }

    #[pyo3(signature = (endpoint, r#match))]
    fn unsubscribe(&self, py: Python<'_>, endpoint: u64, r#match: u64) -> PyResult<bool> {
        self.with_bus_of(py, endpoint, |core, _| core.unsubscribe(endpoint, r#match))
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
        self.with_bus_of(py, endpoint, |core, _| core.forbid_send(endpoint, grant))
    }

    fn set_reach(&self, py: Python<'_>, endpoint: u64, patterns: Vec<String>) -> PyResult<()> {
        if self.with(py, |core| core.set_reach(endpoint, &patterns))? {
            Ok(())
        } else {
            Err(unknown("endpoint", endpoint))
        }
    }

    fn may_send_to(&self, py: Python<'_>, endpoint: u64, address: &[u8]) -> PyResult<bool> {
        self.with(py, |core| {
            let who = core.find(endpoint)?;
            Some(core.may_send_to(who, address))
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn set_monitor(&self, py: Python<'_>, endpoint: u64, on: bool) -> PyResult<()> {
        self.with_bus_of(py, endpoint, |core, bus| {
            core.close_lanes_on(bus);
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

    fn identify(&self, py: Python<'_>, endpoint: u64, ident: &[u8]) -> PyResult<()> {
        self.with(py, |core| {
            core.close_lanes(endpoint, Side::Out);
            core.endpoint_mut(endpoint).map(|e| e.ident = ident.into())
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn set_ident(&self, py: Python<'_>, endpoint: u64, on: bool) -> PyResult<()> {
        self.with(py, |core| {
            core.close_lanes(endpoint, Side::In);
            core.endpoint_mut(endpoint).map(|e| e.wants_ident = on)
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn set_namespaces(
        &self,
        py: Python<'_>,
        endpoint: u64,
        has_other_pids: bool,
        has_other_users: bool,
    ) -> PyResult<()> {
        self.with(py, |core| {
            core.close_lanes(endpoint, Side::In);
            core.endpoint_mut(endpoint).map(|e| {
                e.has_other_pids = has_other_pids;
                e.has_other_users = has_other_users;
            })
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    fn set_silent(&self, py: Python<'_>, endpoint: u64) -> PyResult<()> {
        self.with(py, |core| {
            core.close_lanes(endpoint, Side::Out);
            core.endpoint_mut(endpoint).map(|e| e.silent = true)
        })?
        .ok_or_else(|| unknown("endpoint", endpoint))
    }

    #[pyo3(signature = (endpoints, body, trunk=None))]
    fn notify(
        &self,
        py: Python<'_>,
        endpoints: Vec<u64>,
        body: &[u8],
        trunk: Option<u64>,
    ) -> PyResult<()> {
        self.with(py, |core| match trunk {
            None => core.notify(&endpoints, body),
            Some(trunk) => core.notify_behind(&endpoints, body, trunk),
        })
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

    // ---- other nodes --------------------------------------------------------------------------------------------

    fn trunk_add(&self, py: Python<'_>, trunk: u64, node: &str) -> PyResult<()> {
        if self.with(py, |core| core.add_trunk(trunk, node.as_bytes()))? {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "trunk {trunk} is there already"
            )))
        }
    }

    fn trunk_remove(&self, py: Python<'_>, trunk: u64) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.remove_trunk(trunk))?;
        Ok(())
    }

    fn trunk_restart(&self, py: Python<'_>, trunk: u64) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.restart_trunk(trunk))?;
        Ok(())
    }

    fn trunk_hear(&self, py: Python<'_>, trunk: u64, is_anew: bool) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.hear_trunk(trunk, is_anew))?;
        Ok(())
    }

    fn trunk_rewind(&self, py: Python<'_>, trunk: u64, received: u64) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.rewind_trunk(trunk, received))?
            .map_err(broken)
    }

    fn trunk_received(&self, py: Python<'_>, trunk: u64) -> PyResult<u64> {
        self.with_trunk(py, trunk, |core| {
            core.trunk(trunk).map_or(0, |t| t.inn.received())
        })
    }

    fn trunk_set_down(&self, py: Python<'_>, trunk: u64, is_down: bool) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.set_down(trunk, is_down))?;
        Ok(())
    }

    fn trunk_is_idle(&self, py: Python<'_>, trunk: u64) -> PyResult<bool> {
        self.with_trunk(py, trunk, |core| {
            core.trunk(trunk).is_some_and(|t| t.is_idle())
        })
    }

    fn trunk_stats<'py>(&self, py: Python<'py>, trunk: u64) -> PyResult<Bound<'py, PyDict>> {
        let rows = self.with_trunk(py, trunk, |core| core.trunk(trunk).map(|t| t.counters()))?;
        let stats = PyDict::new(py);
        for (name, value) in rows.into_iter().flatten() {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }

    fn take_batch<'py>(
        &self,
        py: Python<'py>,
        trunk: u64,
        max_bytes: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let batch = self.with_trunk(py, trunk, |core| {
            core.trunk_mut(trunk)
                .map_or_else(Vec::new, |t| t.take_batch(max_bytes))
        })?;
        Ok(PyBytes::new(py, &batch))
    }

    fn inject(&self, py: Python<'_>, trunk: u64, batch: &[u8]) -> PyResult<()> {
        let now = Instant::now();
        self.with_trunk(py, trunk, |core| core.inject(trunk, batch, now))?
            .map_err(broken)
    }

    #[pyo3(signature = (trunk, bus, r#match, terms, bits))]
    fn trunk_subscribe(
        &self,
        py: Python<'_>,
        trunk: u64,
        bus: u32,
        r#match: u64,
        terms: Option<&[u8]>,
        bits: Option<&[u8]>,
    ) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| {
            let known = core.bus_mut(bus).ok_or("the bus is gone")?;
            let (bits, terms) = required(known, terms, bits)?;
            if core.subscribe_trunk(trunk, bus, r#match, bits, terms) {
                Ok(())
            } else {
                Err(format!("match {} is there already", r#match))
            }
        })?
        .map_err(PyValueError::new_err)
    }

    #[pyo3(signature = (trunk, bus, r#match))]
    fn trunk_unsubscribe(
        &self,
        py: Python<'_>,
        trunk: u64,
        bus: u32,
        r#match: u64,
    ) -> PyResult<bool> {
        self.with_trunk(py, trunk, |core| {
            core.unsubscribe_trunk(trunk, bus, r#match)
        })
    }

    #[pyo3(signature = (bus, address, trunk))]
    fn route(&self, py: Python<'_>, bus: u32, address: &[u8], trunk: Option<u64>) -> PyResult<()> {
        found(
            self.with(py, |core| core.route(bus, address, trunk))?,
            bus,
            trunk,
        )
    }

    #[pyo3(signature = (block, trunk))]
    fn route_block(&self, py: Python<'_>, block: u64, trunk: Option<u64>) -> PyResult<()> {
        if self.with(py, |core| core.route_block(block, trunk))? {
            Ok(())
        } else {
            Err(unknown("trunk", trunk.unwrap_or_default()))
        }
    }

    fn unroute_block(&self, py: Python<'_>, block: u64) -> PyResult<bool> {
        self.with(py, |core| core.unroute_block(block))
    }

    #[pyo3(signature = (bus, trunk, address))]
    fn set_master_away(
        &self,
        py: Python<'_>,
        bus: u32,
        trunk: Option<u64>,
        address: &[u8],
    ) -> PyResult<()> {
        let master = trunk.map(|trunk| (trunk, address));
        found(
            self.with(py, |core| core.set_master_away(bus, master))?,
            bus,
            trunk,
        )
    }

    fn signal(&self, py: Python<'_>, trunk: u64, data: &[u8]) -> PyResult<()> {
        if self.with_trunk(py, trunk, |core| core.signal(trunk, data))? {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "a signal of {} bytes",
                data.len()
            )))
        }
    }

    fn give_back(
        &self,
        py: Python<'_>,
        trunk: u64,
        endpoint: u64,
        source: &[u8],
        range: (u64, u64),
        count: u64,
    ) -> PyResult<bool> {
        self.with_trunk(py, trunk, |core| {
            core.give_back(trunk, endpoint, source, range, count)
        })
    }

    fn trunk_carries_bodies(&self, py: Python<'_>, trunk: u64) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| {
            if let Some(t) = core.trunk_mut(trunk) {
                t.carries_bodies = true;
            }
        })
    }

    fn body_fd(&self, py: Python<'_>, trunk: u64, ticket: u32) -> PyResult<RawFd> {
        let body = self.with_trunk(py, trunk, |core| core.parked_body(trunk, ticket))??;
        Ok(body.into_raw_fd())
    }

    fn body_taken(&self, py: Python<'_>, trunk: u64, ticket: u32) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.unpark(trunk, ticket, None))
    }

    fn body_refused(&self, py: Python<'_>, trunk: u64, ticket: u32, errno: i32) -> PyResult<()> {
        self.with_trunk(py, trunk, |core| core.unpark(trunk, ticket, Some(errno)))
    }

    fn body_put(&self, py: Python<'_>, trunk: u64, ticket: u32, fd: RawFd) -> PyResult<()> {
        // SAFETY: whoever calls keeps it open for the call.
        let body = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
        if self.with_trunk(py, trunk, |core| core.put_body(trunk, ticket, body))? {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!(
                "body {ticket} is not sealed, is there already, or is one too many"
            )))
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one message, each once"
    )]
    fn deliver_away(
        &self,
        py: Python<'_>,
        source: u64,
        trunk: u64,
        src: &[u8],
        dst: &[u8],
        ctl: &[u8],
        body: &[u8],
        serial: u64,
        reply_to: u64,
        deadline_ms: u32,
    ) -> PyResult<i32> {
        let now = Instant::now();
        let deadline = (deadline_ms > 0).then_some(deadline_ms);
        let sent = self.with_trunk(py, trunk, |core| {
            core.deliver_away(
                source, trunk, src, dst, ctl, body, serial, reply_to, deadline, now,
            )
        })?;
        Ok(sent.err().unwrap_or(0))
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

    fn lanes(&self, py: Python<'_>, endpoint: u64) -> PyResult<Vec<LaneRow>> {
        self.with(py, |core| core.lanes_of(endpoint))
    }
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

fn found(is_found: bool, bus: u32, trunk: Option<u64>) -> PyResult<()> {
    if is_found {
        return Ok(());
    }
    let trunk = trunk.map_or_else(String::new, |trunk| format!(" or no trunk {trunk}"));
    Err(PyKeyError::new_err(format!("no bus {bus}{trunk}")))
}

fn broken(rule: Broken) -> PyErr {
    let text = rule.to_string();
    match rule {
        Broken::Malformed(_) => PyValueError::new_err(text),
        Broken::Forged(_) => Forged::new_err(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d16_a_panic_of_the_switch_reaches_python() {
        let switch = PySwitch::new(1, 1, 1).unwrap();
        Python::initialize();
        Python::attach(|py| {
            assert!(switch.take_events(py).unwrap().is_empty());
            let failing = switch.runner().unwrap();
            failing.with(|core| core.fail = Some("a seat that is not there"));
            failing.wait_for_failure();
            for _ in 0..2 {
                let error = switch.take_events(py).unwrap_err();
                assert!(error.is_instance_of::<PyRuntimeError>(py));
                let text = "the thread of the switch panicked: a seat that is not there";
                assert_eq!(error.value(py).to_string(), text);
            }
            switch.close(py);
        });
    }
}
