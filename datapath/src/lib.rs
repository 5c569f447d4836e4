//! The data path of afbus, imported by Python as `afbus._datapath`.
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

#[cfg(not(loom))]
pub mod bloom;
#[cfg(not(loom))]
pub mod bus;
#[cfg(not(loom))]
pub mod endpoint;
#[cfg(not(loom))]
pub mod filter;
#[cfg(not(loom))]
pub mod frame;
#[cfg(not(loom))]
pub mod line;
#[cfg(not(loom))]
pub mod matching;
#[cfg(not(loom))]
pub mod memory;
pub mod ring;
#[cfg(not(loom))]
pub mod switch;
pub mod sync;
#[cfg(not(loom))]
pub mod wait;
use pyo3::prelude::*;

/// What Python sees of this crate.
#[pymodule]
mod _datapath {
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("VERSION", env!("CARGO_PKG_VERSION"))
    }
}
