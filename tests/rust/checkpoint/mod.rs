//! Checkpoints on disk: the parsers against the reference implementation and against junk,
//! the cut against a slow twin that reads every tensor.

mod cuts;
mod experts;
mod files;
mod folders;
mod headers;
