//! Cuts of GGUF files against a slow twin that reads the format naively, and hostile files.

mod cuts;
mod experts;
mod model;
mod refusals;
mod survival;
