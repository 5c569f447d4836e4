//! The data path of afbus, imported by Python as `afbus._datapath`.
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

#[cfg(not(loom))]
pub mod arena;
#[cfg(not(loom))]
mod atlas;
#[cfg(not(loom))]
pub mod bloom;
#[cfg(not(loom))]
pub mod bus;
#[cfg(not(loom))]
pub mod carrier;
#[cfg(not(loom))]
pub mod client;
#[cfg(not(loom))]
pub mod destinations;
#[cfg(not(loom))]
pub mod endpoint;
#[cfg(not(loom))]
pub mod filter;
#[cfg(not(loom))]
pub mod frame;
pub mod gate;
#[cfg(not(loom))]
pub mod inlet;
#[cfg(not(loom))]
pub mod lane_in;
#[cfg(not(loom))]
pub mod lane_out;
#[cfg(not(loom))]
pub mod lane_rest;
#[cfg(not(loom))]
pub mod lanes_in;
#[cfg(not(loom))]
pub mod line;
#[cfg(not(loom))]
pub mod matching;
#[cfg(not(loom))]
pub mod memory;
pub mod merge;
#[cfg(not(loom))]
pub mod pace;
#[cfg(not(loom))]
pub mod page;
#[cfg(not(loom))]
mod python;
pub mod ring;
#[cfg(not(loom))]
pub mod runner;
#[cfg(not(loom))]
mod shelf;
#[cfg(not(loom))]
pub mod switch;
pub mod sync;
pub mod tails;
#[cfg(not(loom))]
pub mod trunk;
#[cfg(not(loom))]
pub mod trunk_hold;
#[cfg(not(loom))]
pub mod trunk_in;
#[cfg(not(loom))]
pub mod trunk_out;
#[cfg(not(loom))]
pub mod trunk_wire;
#[cfg(not(loom))]
pub mod wait;
#[cfg(not(loom))]
pub mod waker;
use pyo3::prelude::*;

/// What Python sees of this crate.
#[pymodule(gil_used = true)]
mod _datapath {
    use super::*;

    #[cfg(not(loom))]
    #[pymodule_export]
    use super::python::{
        Forged, Loan, Port, PyCarrier, PySwitch, Rings, SendLoan, sealed_memfd, term_bits,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        #[cfg(not(loom))]
        {
            module.add("UNICAST", frame::UNICAST)?;
            module.add("RAW", frame::RAW)?;
            module.add("TERMS", frame::TERMS)?;
            module.add("EXPECT_REPLY", frame::EXPECT_REPLY)?;
            module.add("MSG_MONITOR", python::MSG_MONITOR)?;
        }
        module.add("VERSION", env!("CARGO_PKG_VERSION"))
    }
}
