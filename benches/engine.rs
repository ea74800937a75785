//! The engine on one thread: register-only peaks, reading alone, and the whole pipeline of
//! each tier on bfloat16 states. Answers are asserted before anything is timed.

#![allow(unsafe_code)]

mod workload;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shallower_core::Tier;
use workload::{Shape, check, flops, mean, peaks, states};

const SHAPES: [Shape; 3] = [(512, 31, 576), (48, 33, 4096), (8, 81, 8192)];

/// The shapes; an eighth of the samples where answers are asserted and nothing is timed.
fn shapes() -> [Shape; 3] {
    let fewer = if std::env::args().any(|argument| argument == "--test") {
        8
    } else {
        1
    };
    SHAPES.map(|(samples, states, width)| (samples / fewer, states, width))
}

fn pipeline(criterion: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    for shape in shapes() {
        let (_, num_states, width) = shape;
        for (kind, stream) in [("rows", false), ("stream", true)] {
            let data = states(shape, stream);
            let mut group = criterion.benchmark_group(format!("{num_states}x{width} {kind}"));
            group
                .throughput(Throughput::Elements(flops(shape) as u64))
                .sample_size(20);
            for tier in Tier::available() {
                pool.install(|| check(tier, &data, shape));
                group.bench_function(tier.name(), |bencher| {
                    bencher.iter(|| pool.install(|| mean(tier, black_box(&data), shape)));
                });
            }
        }
    }
}

fn read(criterion: &mut Criterion) {
    for shape in shapes() {
        let data = states(shape, false);
        let mut group = criterion.benchmark_group(format!("{}x{} read", shape.1, shape.2));
        group
            .throughput(Throughput::Bytes(2 * data.len() as u64))
            .sample_size(20);
        group.bench_function("read", |bencher| {
            bencher.iter(|| workload::read(black_box(&data)));
        });
    }
}

fn peak(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("peak");
    for (tier, run) in peaks() {
        // SAFETY: the tiers of `peaks` are available.
        let flops = unsafe { run() };
        group
            .throughput(Throughput::Elements(flops))
            .sample_size(20);
        group.bench_function(tier.name(), |bencher| {
            // SAFETY: the tiers of `peaks` are available.
            bencher.iter(|| unsafe { run() });
        });
    }
}

criterion_group!(benches, peak, read, pipeline);
criterion_main!(benches);
