//! Threads that know nothing of one another: each has sums of its own, or all read the same ones.

use std::sync::Barrier;
use std::thread;

use shallower_core::{Accumulator, Cka, Metric, Order, States, Sums};

const STATES: usize = 5;
const SAMPLES: usize = 24;
const WIDTH: usize = 70;
const THREADS: usize = 8;
const METRICS: [Metric; 4] = Metric::ALL;

/// What is shared among Python's threads is shared among Rust's: these would not compile else.
const fn is_shared<T: Send + Sync>() {}
const _: () = {
    is_shared::<Accumulator>();
    is_shared::<Sums>();
    is_shared::<Cka>();
};

fn data(seed: usize) -> Vec<f32> {
    (0..SAMPLES * STATES * WIDTH)
        .map(|at| ((at * 37 + seed * 101) % 997) as f32 / 499.0 - 1.0)
        .collect()
}

fn sums_of(seed: usize) -> Sums {
    let data = data(seed);
    let mut accumulator = Accumulator::new(STATES, &METRICS).unwrap();
    for part in data.chunks(SAMPLES / 4 * STATES * WIDTH) {
        let view = States::new(part, SAMPLES / 4, STATES, WIDTH, Order::SampleFirst).unwrap();
        assert!(accumulator.update(&view).unwrap().is_empty());
    }
    accumulator.into_sums()
}

/// What each of several threads makes of its number, all of them at once.
fn at_once<T: Send>(work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (barrier, work) = (&Barrier::new(THREADS), &work);
    thread::scope(|scope| {
        let spawned: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn(move || {
                    barrier.wait();
                    work(number)
                })
            })
            .collect();
        let joined = spawned.into_iter().map(|thread| thread.join().unwrap());
        joined.collect()
    })
}

#[test]
fn threads_that_add_to_sums_of_their_own_get_the_bits_of_one_alone() {
    let together = at_once(|number| sums_of(number).to_bytes());
    for (number, bytes) in together.iter().enumerate() {
        assert_eq!(*bytes, sums_of(number).to_bytes());
    }
}

#[test]
fn threads_that_read_the_same_sums_get_the_same() {
    let sums = sums_of(1);
    let read = |_| {
        let costs = sums.costs(Metric::Angular).unwrap();
        let means = sums.mean(Metric::Angular).unwrap();
        let bits: Vec<_> = means.into_iter().map(f64::to_bits).collect();
        (sums.to_bytes(), bits, costs.best_starts(2, 3).unwrap())
    };
    let alone = read(0);
    assert!(at_once(read).into_iter().all(|found| found == alone));
}
