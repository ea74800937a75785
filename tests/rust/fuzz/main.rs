//! The parsers of headers, indexes and GGUF files, and the planning of cuts on top of them,
//! for as long as asked: `FUZZ_SECONDS=3600 make fuzz`, and a moment in every test run.
//!
//! Files are made valid, as lists of tokens, and then a few tokens are struck: replaced by
//! numbers and words that the formats know, copied, deleted, swapped, changed in a byte. A parser
//! must not panic, must not allocate more than in proportion to its input, and must refuse the
//! file or make a cut that it reads again, with the bytes of the source.

mod checkpoints;
mod gguf;
mod memory;
mod strikes;

use std::cell::Cell;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index as Place;
use proptest::test_runner::{Config, TestRunner};

use crate::checkpoints::{
    header_survives, index_of, index_survives, json_words, shards, whole_checkpoint,
};
use crate::gguf::{gguf, gguf_survives, gguf_words};
use crate::strikes::{strikes, struck};

/// The message of the last panic, and its place; many panics come while a failure is made small.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// A thing to fuzz: runs some cases, and tells how many of them it accepted.
struct Target {
    name: &'static str,
    batch: Box<dyn Fn(&mut TestRunner) -> u64>,
}

fn target<S: Strategy + 'static>(
    name: &'static str,
    input: S,
    check: fn(S::Value) -> bool,
) -> Target {
    let batch = move |runner: &mut TestRunner| {
        let accepted = Cell::new(0);
        let checked = runner.run(&input, |value| {
            accepted.set(accepted.get() + u64::from(check(value)));
            Ok(())
        });
        if let Err(error) = checked {
            println!("{name}: {error}\n{}", LAST_PANIC.lock().unwrap());
            panic!();
        }
        accepted.get()
    };
    Target {
        name,
        batch: Box::new(batch),
    }
}

fn targets() -> Vec<Target> {
    let noise = || prop::collection::vec(prop_oneof![3 => 0_u8..14, 1 => any::<u8>()], 0..300);
    let file = (
        shards(),
        prop::collection::vec(strikes(json_words()), 3),
        strikes(json_words()),
        prop::option::weighted(0.1, any::<(Place, Place)>()),
    );
    vec![
        target(
            "headers",
            (shards(), strikes(json_words()), 0_u64..40),
            |(mut shards, strikes, more)| {
                let (tokens, data) = shards.remove(0);
                let json = struck(tokens, &strikes);
                header_survives(&json, more) | header_survives(&json, data.len() as u64)
            },
        ),
        target(
            "indexes",
            (shards(), strikes(json_words())),
            |(shards, strikes)| index_survives(&struck(index_of(&shards), &strikes)),
        ),
        target(
            "checkpoints",
            (file, (2_u64..6, any::<u64>(), 1_u64..200)),
            whole_checkpoint,
        ),
        target(
            "gguf files",
            (
                gguf(),
                strikes(gguf_words()),
                any::<usize>(),
                prop::option::weighted(0.1, any::<Place>()),
            ),
            |((tokens, alignment, data), strikes, bits, cut)| {
                let mut file = struck(tokens, &strikes);
                file.resize(file.len().next_multiple_of(alignment), 0);
                file.extend(data);
                if let Some(place) = cut {
                    file.truncate(place.index(file.len()));
                }
                gguf_survives(&file, bits) | gguf_survives(&file, bits | 1)
            },
        ),
        target("noise", (noise(), any::<u64>()), |(bytes, number)| {
            let json = header_survives(&bytes, number) | index_survives(&bytes);
            let start = [
                &b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..],
                &bytes,
            ]
            .concat();
            json | gguf_survives(&bytes, number as usize) | gguf_survives(&start, number as usize)
        }),
    ]
}

#[test]
fn parsers_survive() {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    let seconds = seconds.map_or(3, |seconds| seconds.parse().unwrap());
    std::panic::set_hook(Box::new(|info| {
        *LAST_PANIC.lock().unwrap() = info.to_string();
    }));
    let (began, mut told) = (Instant::now(), Instant::now());
    let targets = targets();
    let config = Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    };
    let (mut cases, mut accepted) = (0, vec![0; targets.len()]);
    while began.elapsed() < Duration::from_secs(seconds) {
        for (target, accepted) in targets.iter().zip(&mut accepted) {
            *accepted += (target.batch)(&mut TestRunner::new(config.clone()));
        }
        cases += config.cases;
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            tell(began.elapsed(), cases, &targets, &accepted);
        }
    }
    tell(began.elapsed(), cases, &targets, &accepted);
}

fn tell(time: Duration, cases: u32, targets: &[Target], accepted: &[u64]) {
    let each = targets.iter().zip(accepted);
    let counts: Vec<_> = each.map(|(t, n)| format!("{n} {}", t.name)).collect();
    let counts = counts.join(", ");
    println!(
        "{} s: {cases} cases of each, accepted: {counts}",
        time.as_secs()
    );
}
