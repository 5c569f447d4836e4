//! The switch of an agent.

use std::os::fd::{IntoRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::bloom::{Bits, Key, expand_required};
use crate::bus::{Bus, Overflow};
use crate::endpoint::{Credentials, Io, SendGrant};
use crate::filter::Filter;
use crate::line;
use crate::memory::Segment;
use crate::ring::{Consumer, Producer};
use crate::runner::Runner;
use crate::switch::{self, Event, Quota};
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
        // Not silenced: whoever looks again is told again, until the agent ends.
        if let Some(words) = runner.failure() {
            return Err(PyRuntimeError::new_err(format!(
                "the thread of the switch panicked: {words}"
            )));
        }
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
