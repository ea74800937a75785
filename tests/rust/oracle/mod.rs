//! The core against a slow twin, and against itself in other orders.

mod numbers;
mod refusals;
mod tiers;
mod twin;
