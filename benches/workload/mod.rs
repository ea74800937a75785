//! The common parts of the engine's benchmarks: states, the whole pipeline, reading alone, and
//! loops that touch registers alone.

use std::hint::black_box;

use half::bf16;
use shallower_core::{Accumulator, Metric, Order, States, Tier};

/// Samples, states, width.
pub type Shape = (usize, usize, usize);

/// Samples of one shape: random rows, or random steps added up layer by layer.
pub fn states(shape: Shape, stream: bool) -> Vec<bf16> {
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

/// The whole pipeline on the current pool.
pub fn mean(tier: Tier, data: &[bf16], shape: Shape) -> Vec<f64> {
    let (samples, states, width) = shape;
    let view = States::new(data, samples, states, width, Order::SampleFirst).unwrap();
    let accumulator = Accumulator::new(states, &[Metric::Angular]).unwrap();
    let mut accumulator = accumulator.with_tier(tier).unwrap();
    accumulator.update(&view).unwrap();
    accumulator.sums().mean(Metric::Angular).unwrap()
}

/// Asserts that a tier's answer for some samples is the scalar one's.
pub fn check(tier: Tier, data: &[bf16], shape: Shape) {
    let expected = mean(Tier::Scalar, data, shape);
    let found = mean(tier, data, shape);
    let error = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    assert!(error.fold(0.0, f64::max) < 1e-7, "{tier}");
}

/// Useful operations of the Gram matrix: a sum and a product for each of the
/// `(L + 1) (L + 2) / 2` pairs, and every column.
pub fn flops((samples, states, width): Shape) -> usize {
    samples * states * (states + 1) * width
}

/// Reads every byte, and does next to nothing with it.
pub fn read(data: &[bf16]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just asked.
        return unsafe { wide::read(black_box(data)) };
    }
    sum(black_box(data))
}

#[inline(always)]
fn sum(data: &[bf16]) -> u64 {
    const LANES: usize = 256;
    let mut lanes = [0_u16; LANES];
    let (whole, rest) = data.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane ^= value.to_bits();
        }
    }
    let rest = rest.iter().map(|value| u64::from(value.to_bits()));
    rest.sum::<u64>() + lanes.iter().map(|&lane| u64::from(lane)).sum::<u64>()
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use half::bf16;

    /// # Safety
    ///
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn read(data: &[bf16]) -> u64 {
        super::sum(data)
    }
}

/// A loop that touches registers alone, and gives the operations it did.
pub type Loop = unsafe fn() -> u64;

/// The tiers of this machine with a loop of their instruction.
pub fn peaks() -> Vec<(Tier, Loop)> {
    #[cfg(target_arch = "x86_64")]
    let all: Vec<(Tier, Loop)> = vec![
        (Tier::Avx2, registers::avx2),
        (Tier::Avx512, registers::avx512),
        (Tier::Avx512Bf16, registers::avx512bf16),
        (Tier::Amx, registers::amx),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let all: Vec<(Tier, Loop)> = Vec::new();
    all.into_iter()
        .filter(|(tier, _)| tier.is_available())
        .collect()
}

#[cfg(target_arch = "x86_64")]
mod registers {
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

    /// Palette 1, eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Tiles([u8; 64]);

    static TILES: Tiles = {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
            tile += 1;
        }
        Tiles(bytes)
    };

    /// # Safety
    ///
    /// The process may use AMX.
    pub unsafe fn amx() -> u64 {
        // SAFETY: the caller's; reads the configuration, and names the tiles it uses.
        unsafe {
            asm!(
                "ldtilecfg [{tiles}]",
                "tilezero tmm6",
                "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm6, tmm7",
                "tdpbf16ps tmm1, tmm6, tmm7",
                "tdpbf16ps tmm2, tmm6, tmm7",
                "tdpbf16ps tmm3, tmm6, tmm7",
                "tdpbf16ps tmm4, tmm6, tmm7",
                "tdpbf16ps tmm5, tmm6, tmm7",
                "dec {steps}",
                "jnz 2b",
                "tilerelease",
                tiles = in(reg) &raw const TILES,
                steps = inout(reg) STEPS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
        STEPS * 6 * 2 * 16 * 16 * 32
    }
}
