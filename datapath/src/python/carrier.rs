//! Links between nodes: the thread that moves them, for the core of links in Python.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::switch::PySwitch;
use crate::carrier::{
    Caller, Carrier, Command, Ending, Event, Judge, Moved, Proof, Settings, Trust,
};

/// The carrier of one agent.
#[pyclass(name = "Carrier", module = "afbus._datapath", frozen)]
pub struct PyCarrier {
    inner: Mutex<Option<Carrier>>,
    judge: Arc<Judge>,
}

/// Bad certificate: what is said when Python could not say what it is.
const ALERT_BAD: u8 = 42;

fn parse(host: &str, port: u16, scope: u32) -> PyResult<SocketAddr> {
    let ip: IpAddr = host
        .parse()
        .map_err(|_| PyValueError::new_err(format!("{host:?} is not a numeric address")))?;
    Ok(match ip {
        IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, scope).into(),
        IpAddr::V4(_) => SocketAddr::new(ip, port),
    })
}

/// As the socket module has it.
fn show<'py>(py: Python<'py>, address: SocketAddr) -> PyResult<Bound<'py, PyAny>> {
    let host = address.ip().to_string();
    match address {
        SocketAddr::V4(v4) => (host, v4.port()).into_bound_py_any(py),
        SocketAddr::V6(v6) => (host, v6.port(), v6.flowinfo(), v6.scope_id()).into_bound_py_any(py),
    }
}

/// Cost and bytes of what was sent, and of what has come.
type Totals = (u64, u64, u64, u64);

fn totals(moved: Moved) -> Totals {
    (
        moved.sent_cost,
        moved.sent_bytes,
        moved.received_cost,
        moved.received_bytes,
    )
}

/// Asks Python within the handshake. Whatever goes wrong there refuses the peer.
fn judge_by(judge: Py<PyAny>) -> Arc<Judge> {
    Arc::new(move |caller: Caller, proof, chain| {
        Python::attach(|py| {
            let asked = || -> PyResult<Option<u8>> {
                let chain: Vec<_> = chain.iter().map(|der| PyBytes::new(py, der)).collect();
                let address = show(py, caller.address)?;
                let (number, is_dialed) = (caller.connection, caller.is_dialed);
                let holds_key = proof == Proof::Key;
                judge
                    .call1(py, (number, address, is_dialed, holds_key, chain))?
                    .extract(py)
            };
            asked().unwrap_or_else(|error| {
                error.write_unraisable(py, None);
                Some(ALERT_BAD)
            })
        })
    })
}

impl PyCarrier {
    fn lock(&self) -> MutexGuard<'_, Option<Carrier>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with it, without the GIL: its thread may be asking Python.
    fn with<R: Send>(
        &self,
        py: Python<'_>,
        action: impl FnOnce(&Carrier) -> R + Send,
    ) -> PyResult<R> {
        py.detach(|| self.lock().as_ref().map(action))
            .ok_or_else(|| PyRuntimeError::new_err("the carrier is closed"))
    }
}

fn event<'py>(py: Python<'py>, event: Event) -> PyResult<Bound<'py, PyAny>> {
    match event {
        Event::Called(connection, address) => {
            ("called", connection, show(py, address)?).into_bound_py_any(py)
        }
        Event::Heard(connection) => ("heard", connection).into_bound_py_any(py),
        Event::Opened(connection) => ("opened", connection).into_bound_py_any(py),
        Event::Data {
            connection,
            stream,
            bytes,
            end,
            moved,
            ..
        } => {
            let bytes = PyBytes::new(py, &bytes);
            ("data", connection, stream, bytes, end, totals(moved)).into_bound_py_any(py)
        }
        Event::Echo(connection, number) => ("echo", connection, number).into_bound_py_any(py),
        Event::Moved(connection, moved) => {
            ("moved", connection, totals(moved)).into_bound_py_any(py)
        }
        Event::Broken(connection, rule) => ("broken", connection, rule).into_bound_py_any(py),
        Event::GivenUp(connection, stream) => {
            ("given-up", connection, stream).into_bound_py_any(py)
        }
        Event::Ended {
            connection,
            ending,
            code,
            text,
            moved,
        } => {
            let ending = match ending {
                Ending::ByLink => "link",
                Ending::ByPeer => "peer",
                Ending::Here => "here",
            };
            ("ended", connection, ending, code, text, totals(moved)).into_bound_py_any(py)
        }
    }
}

#[pymethods]
impl PyCarrier {
    #[new]
    #[pyo3(signature = (host, port, *, chain, key, idle_s, report_cost, judge))]
    #[allow(clippy::too_many_arguments, reason = "what a carrier begins with")]
    fn new(
        host: &str,
        port: u16,
        chain: Vec<Vec<u8>>,
        key: Vec<u8>,
        idle_s: f64,
        report_cost: u64,
        judge: Py<PyAny>,
    ) -> PyResult<Self> {
        let judge = judge_by(judge);
        let trust = Trust::new(chain, key, judge.clone()).map_err(PyValueError::new_err)?;
        let settings = Settings {
            idle: Duration::from_secs_f64(idle_s),
            report: report_cost,
        };
        let carrier = Carrier::start(parse(host, port, 0)?, trust, settings).map_err(|error| {
            // So that Python sees the number too.
            let words = std::io::Error::to_string(&error);
            let words = words
                .split(" (os error")
                .next()
                .unwrap_or(&words)
                .to_owned();
            PyOSError::new_err((error.raw_os_error(), words))
        })?;
        Ok(Self {
            inner: Mutex::new(Some(carrier)),
            judge,
        })
    }

    #[getter]
    fn address<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let address = self.with(py, Carrier::address)?;
        show(py, address)
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.with(py, Carrier::events_fd)
    }

    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let taken = self.with(py, |carrier| match carrier.failure() {
            // Not silenced: whoever looks again is told again, until the agent ends.
            Some(words) => Err(words.to_owned()),
            None => Ok(carrier.take_events()),
        })?;
        let events = taken.map_err(|words| {
            PyRuntimeError::new_err(format!("the thread of the carrier panicked: {words}"))
        })?;
        events.into_iter().map(|one| event(py, one)).collect()
    }

    fn next_number(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, Carrier::next_number)
    }

    #[pyo3(signature = (connection, host, port, scope=0))]
    fn dial(
        &self,
        py: Python<'_>,
        connection: u64,
        host: &str,
        port: u16,
        scope: u32,
    ) -> PyResult<()> {
        let peer = parse(host, port, scope)?;
        self.with(py, |carrier| carrier.say(Command::Dial(connection, peer)))
    }

    fn write(
        &self,
        py: Python<'_>,
        connection: u64,
        stream: u64,
        data: &[u8],
        end: bool,
    ) -> PyResult<()> {
        let command = Command::Write {
            connection,
            stream,
            data: data.to_vec().into(),
            end,
        };
        self.with(py, |carrier| carrier.say(command))
    }

    fn ping(&self, py: Python<'_>, connection: u64, number: u64, is_urgent: bool) -> PyResult<()> {
        self.with(py, |carrier| {
            carrier.say(Command::Ping(connection, number, is_urgent));
        })
    }

    fn proceed(&self, py: Python<'_>, connection: u64) -> PyResult<()> {
        self.with(py, |carrier| carrier.say(Command::Proceed(connection)))
    }

    fn report_all(&self, py: Python<'_>, connection: u64) -> PyResult<()> {
        self.with(py, |carrier| carrier.say(Command::ReportAll(connection)))
    }

    fn cut(&self, py: Python<'_>, connection: u64, code: u32, text: &[u8]) -> PyResult<()> {
        let command = Command::Cut {
            connection,
            code,
            text: text.to_vec().into(),
        };
        self.with(py, |carrier| carrier.say(command))
    }

    fn set_credentials(&self, py: Python<'_>, chain: Vec<Vec<u8>>, key: Vec<u8>) -> PyResult<()> {
        Trust::new(chain.clone(), key.clone(), self.judge.clone())
            .map_err(PyValueError::new_err)?;
        self.with(py, |carrier| carrier.say(Command::Renew(chain, key)))
    }

    fn attach(
        &self,
        py: Python<'_>,
        connection: u64,
        switch: &PySwitch,
        trunk: u64,
        limit: u64,
    ) -> PyResult<bool> {
        let runner = switch.runner()?;
        self.with(py, |carrier| {
            carrier.attach(connection, runner, trunk, limit)
        })
    }

    fn detach(&self, py: Python<'_>, connection: u64) -> PyResult<Totals> {
        self.with(py, |carrier| totals(carrier.detach(connection)))
    }

    fn allow(&self, py: Python<'_>, connection: u64, limit: u64) -> PyResult<()> {
        self.with(py, |carrier| carrier.allow(connection, limit))
    }

    #[pyo3(signature = (*, kill=false))]
    fn close(&self, py: Python<'_>, kill: bool) {
        py.detach(|| {
            let taken = self.lock().take();
            if let Some(mut carrier) = taken {
                carrier.stop(kill);
            }
        });
    }
}
