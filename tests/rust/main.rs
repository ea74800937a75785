//! The core against slow twins and reference implementations, and against itself in other orders.
//!
//! One program, so that what is generic is built once.

mod checkpoint;
mod cka;
mod experts;
mod gguf;
mod oracle;
mod search;
mod sequences;
mod stored;
mod threads;
