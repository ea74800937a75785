//! The engine on one thread: register-only peaks, reading alone, and the whole pipeline of
//! each tier on bfloat16 states. Answers are asserted before anything is timed.

#![allow(unsafe_code)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use shallower_core::{Accumulator, Metric, Order, States, Tier};

const SHAPES: [(usize, usize, usize); 3] = [(512, 31, 576), (48, 33, 4096), (8, 81, 8192)];

/// Random steps added up layer by layer, or random rows.
fn states(shape: (usize, usize, usize), stream: bool) -> Vec<bf16> {
    let (samples, states, width) = shape;
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let uniform = |bits: u64| (bits & 0xffff) as f32 / 65_536.0 - 0.5;
        uniform(state >> 16) + uniform(state >> 32) + uniform(state >> 48)
    };
    let mut data = Vec::with_capacity(samples * states * width);
    for _ in 0..samples {
        let mut row: Vec<f32> = (0..width).map(|_| 3.0 * random()).collect();
        for _ in 0..states {
            for value in &mut row {
                *value = if stream { *value + random() } else { random() };
                data.push(bf16::from_f32(*value));
            }
        }
    }
    data
}

fn mean(tier: Tier, data: &[bf16], shape: (usize, usize, usize)) -> Vec<f64> {
    let (samples, states, width) = shape;
    let view = States::new(data, samples, states, width, Order::SampleFirst).unwrap();
    let accumulator = Accumulator::new(states, &[Metric::Angular]).unwrap();
    let mut accumulator = accumulator.with_tier(tier).unwrap();
    accumulator.update(&view).unwrap();
    accumulator.mean(Metric::Angular).unwrap()
}

fn pipeline(criterion: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    for shape in SHAPES {
        let (samples, states_, width) = shape;
        for (kind, stream) in [("rows", false), ("stream", true)] {
            let data = states(shape, stream);
            let mut group = criterion.benchmark_group(format!("{states_}x{width} {kind}"));
            let flops = samples * states_ * (states_ + 1) * width;
            group
                .throughput(Throughput::Elements(flops as u64))
                .sample_size(20);
            let expected = mean(Tier::Scalar, &data, shape);
            for tier in Tier::available() {
                let found = pool.install(|| mean(tier, &data, shape));
                let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
                assert!(error.fold(0.0, f64::max) < 1e-7, "{tier}");
                group.bench_function(tier.name(), |bencher| {
                    bencher.iter(|| pool.install(|| mean(tier, black_box(&data), shape)));
                });
            }
        }
    }
}

fn read(criterion: &mut Criterion) {
    let data = vec![1_u64; 64 << 20 >> 3];
    let mut group = criterion.benchmark_group("read");
    group
        .throughput(Throughput::Bytes(64 << 20))
        .sample_size(20);
    let sum = |data: &[u64]| {
        let mut lanes = [0_u64; 16];
        for chunk in data.as_chunks::<16>().0 {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = lane.wrapping_add(*value);
            }
        }
        lanes.iter().sum::<u64>()
    };
    assert_eq!(sum(&data), data.len() as u64);
    group.bench_function("64 MiB", |bencher| bencher.iter(|| sum(black_box(&data))));
}

#[cfg(target_arch = "x86_64")]
mod peaks {
    //! Loops that touch registers alone; each gives the operations it did.

    use std::arch::asm;

    const STEPS: u64 = 100_000;

    /// Twelve independent sums, enough for any latency so far.
    macro_rules! peak {
        ($name:ident, $instruction:literal, $register:literal, $flops:expr) => {
            /// # Safety
            ///
            /// The processor has the instruction.
            pub unsafe fn $name() -> u64 {
                // SAFETY: the caller's; registers alone are touched, and all are named.
                unsafe {
                    asm!(
                        "2:",
                        concat!($instruction, " ", $register, "0, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "1, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "2, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "3, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "4, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "5, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "6, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "7, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "8, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "9, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "10, ", $register, "12, ", $register, "13"),
                        concat!($instruction, " ", $register, "11, ", $register, "12, ", $register, "13"),
                        "dec {steps}",
                        "jnz 2b",
                        steps = inout(reg) STEPS => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        in("xmm12") 0.0_f64, in("xmm13") 0.0_f64,
                        options(nomem, nostack)
                    );
                }
                STEPS * 12 * $flops
            }
        };
    }

    peak!(avx2, "vfmadd231ps", "ymm", 16);
    peak!(avx512, "vfmadd231ps", "zmm", 32);
    peak!(avx512bf16, "vdpbf16ps", "zmm", 64);
}

#[cfg(target_arch = "x86_64")]
fn peak(criterion: &mut Criterion) {
    type Loop = unsafe fn() -> u64;
    let loops: [(Tier, Loop); 3] = [
        (Tier::Avx2, peaks::avx2),
        (Tier::Avx512, peaks::avx512),
        (Tier::Avx512Bf16, peaks::avx512bf16),
    ];
    let mut group = criterion.benchmark_group("peak");
    for (tier, run) in loops {
        if !tier.is_available() {
            eprintln!("skipped: this machine has no {tier}");
            continue;
        }
        // SAFETY (this and the next): asked above.
        let flops = unsafe { run() };
        group
            .throughput(Throughput::Elements(flops))
            .sample_size(20);
        group.bench_function(tier.name(), |bencher| bencher.iter(|| unsafe { run() }));
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn peak(_: &mut Criterion) {
    eprintln!("skipped: peaks are written for x86-64");
}

criterion_group!(benches, peak, read, pipeline);
criterion_main!(benches);
