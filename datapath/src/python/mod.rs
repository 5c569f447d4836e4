//! What Python sees: the switch of an agent, its carrier, the rings of a client, loans. `src/afbus/_datapath.pyi` says what each call promises.
//!
//! Invariants:
//! 1. Nothing here decides: arguments are checked and translated, the GIL is given up for every wait.
//! 2. Nobody waits for itself: a call that wants the half which its own thread is using already, from a signal or while an
//!    address is named, is told so. No other lock is held while Python code may run.

mod carrier;
mod described;
mod ends;
mod half;
mod heap;
mod items;
mod loan;
mod port;
mod receiving;
mod rings;
mod send_loan;
mod sending;
mod stop;
mod switch;
mod view;

pub use carrier::PyCarrier;
pub use items::MSG_MONITOR;
pub use loan::Loan;
pub use port::Port;
pub use rings::Rings;
pub use send_loan::SendLoan;
pub use switch::{Forged, PySwitch, term_bits};
pub use view::sealed_memfd;
