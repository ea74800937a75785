//! The core against slow twins and reference implementations, and against itself in other orders.
//!
//! One program, so that what is generic is built once.

use proptest::prelude::ProptestConfig;

mod checkpoint;
mod cka;
mod experts;
mod gguf;
mod oracle;
mod search;
mod sequences;
mod stored;
mod threads;

/// So many cases of a property, or as many as `PROPTEST_CASES` asks for.
fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok();
    ProptestConfig::with_cases(asked.and_then(|n| n.parse().ok()).unwrap_or(cases))
}
