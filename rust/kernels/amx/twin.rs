//! The tile instructions in plain Rust: the twin of [`super::hardware`], which goes through the
//! same sweep, and what is asked of both.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::engine::{BLOCKS, Line, Multiply, OF_BLOCK, SIDE, Sums, Tile};
use super::filling::transposed;
use super::tiles::Tiles;
use crate::kernels::registers::Registers;
use crate::kernels::{Kernels, Tier, Work, avx512, avx512bf16};
use crate::{Gram, Metric, Order, States};

/// The tile instructions in plain Rust, for processors without them.
struct Twin(Box<Sums>);

impl Kernels for Twin {
    type Double = Registers<avx512::Double>;
    type Bf16 = Tiles<Twin>;
}

fn flushed(value: f32) -> f32 {
    if value.is_subnormal() {
        0.0 * value
    } else {
        value
    }
}

fn bf16(bits: u16) -> f32 {
    flushed(f32::from_bits(u32::from(bits) << 16))
}

/// A row of TDPBF16PS: even and odd products are summed apart, by FMA, and added to the
/// sums at the end; denormal numbers count as zero.
fn tdpbf16ps(sums: &mut [f32; SIDE], left: &Line, right: &[Line; SIDE]) {
    let pair = |bits: u32| [bf16(bits as u16), bf16((bits >> 16) as u16)];
    for (n, sum) in sums.iter_mut().enumerate() {
        let mut apart = [0.0_f32; 2];
        for (x, line) in left.0.iter().zip(right) {
            let (x, y) = (pair(*x), pair(line.0[n]));
            for odd in 0..2 {
                apart[odd] = flushed(x[odd].mul_add(y[odd], apart[odd]));
            }
        }
        *sum = flushed(*sum + flushed(apart[0] + apart[1]));
    }
}

impl Multiply for Twin {
    unsafe fn new() -> Self {
        Self(Box::new(Sums {
            blocks: [[0.0; SIDE * SIDE]; BLOCKS],
            rows: [[0.0; SIDE]; 2],
        }))
    }

    unsafe fn multiply<const N: usize, const ROW: bool, const OWN: bool>(
        &mut self,
        left: *const Line,
        own: *const Line,
        row: *const Line,
        right: *const Line,
    ) {
        let Sums { blocks, rows } = &mut *self.0;
        // SAFETY: the caller's, as for the instructions.
        unsafe {
            if OWN {
                tdpbf16ps(&mut rows[0], &*row, &*own.cast());
            }
            for block in 0..N {
                let right = &*right.add(block * OF_BLOCK).cast::<[Line; SIDE]>();
                let left = &*left.cast::<[Line; SIDE]>();
                let sums = blocks[block].as_chunks_mut::<SIDE>().0;
                for (sums, line) in sums.iter_mut().zip(left) {
                    tdpbf16ps(sums, line, right);
                }
                if ROW {
                    tdpbf16ps(&mut rows[usize::from(OWN) + block], &*row, right);
                }
            }
        }
    }

    fn clear(&mut self) {
        self.0.blocks = [[0.0; SIDE * SIDE]; BLOCKS];
        self.0.rows = [[0.0; SIDE]; 2];
    }

    fn store_block(&mut self, sums: &mut Tile) {
        *sums = self.0.blocks[0];
    }

    fn store<const N: usize, const ROW: bool>(&mut self, sums: &mut MaybeUninit<Sums>) {
        sums.write(*self.0);
    }
}

struct Compare<'a>(&'a mut Gram, &'a States<'a, u16>);

impl Work for Compare<'_> {
    type Output = Vec<f64>;

    fn run<K: Kernels>(self) -> Vec<f64> {
        let mut values = vec![0.0; self.1.num_states() * (self.1.num_states() - 1) / 2];
        self.0.compute_with::<K, u16>(self.1, 0).unwrap();
        self.0.fractions::<K>(Metric::Angular, &mut values);
        values
    }
}

/// # Safety
///
/// The processor has what the tier needs but for the tiles.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn run_twin<W: Work>(work: W) -> W::Output {
    work.run::<Twin>()
}

/// Random states, a massive value among them, and some that products make denormal.
fn states(states: usize, width: usize) -> Vec<u16> {
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        (state >> 40) as f32 / 8e6 - 1.0
    };
    let mut data: Vec<u16> = (0..states * width)
        .map(|place| {
            let scale = if place % 7 == 3 { 1e-21 } else { 1.0 };
            half::bf16::from_f32(scale * random()).to_bits()
        })
        .collect();
    data[0] = half::bf16::from_f32(1000.0).to_bits();
    data
}

const SHAPES: [(usize, usize); 8] = [
    (2, 1),
    (3, 40),
    (16, 64),
    (17, 513),
    (33, 1500),
    (40, 96),
    (65, 130),
    (81, 700),
];

fn of_twin(data: &[u16], (states, width): (usize, usize)) -> Vec<f64> {
    let view = States::new(data, 1, states, width, Order::SampleFirst).unwrap();
    let mut gram = Gram::new(states, Tier::Scalar);
    // SAFETY: the tests ask for AVX512-BF16 first.
    unsafe { run_twin(Compare(&mut gram, &view)) }
}

fn of_tier(tier: Tier, data: &[u16], (states, width): (usize, usize)) -> Vec<f64> {
    let view = States::new(data, 1, states, width, Order::SampleFirst).unwrap();
    let mut gram = Gram::new(states, tier);
    tier.run(Compare(&mut gram, &view))
}

#[test]
fn the_tiles_twin_equals_the_scalar_tier() {
    if !avx512bf16::is_available() {
        eprintln!("skipped: this machine has no AVX512-BF16, which the tiles' twin needs");
        return;
    }
    for shape in SHAPES {
        let data = states(shape.0, shape.1);
        let expected = of_tier(Tier::Scalar, &data, shape);
        for (found, expected) in of_twin(&data, shape).iter().zip(&expected) {
            let error = (found - expected).abs();
            assert!(error < 1e-7, "{shape:?}: {found} {expected}");
        }
    }
}

#[test]
fn the_tiles_equal_their_twin_to_the_bit() {
    if !Tier::Amx.is_available() {
        eprintln!("skipped: this machine has no AMX");
        return;
    }
    for shape in SHAPES {
        let data = states(shape.0, shape.1);
        let (found, expected) = (of_tier(Tier::Amx, &data, shape), of_twin(&data, shape));
        assert_eq!(found, expected, "{shape:?}");
    }
}

#[test]
fn equal_states_are_at_zero_wherever_they_stand() {
    if !Tier::Amx.is_available() {
        eprintln!("skipped: this machine has no AMX");
        return;
    }
    for shape in [(17, 513), (33, 1500)] {
        let mut data = states(shape.0, shape.1);
        data[0] = 0;
        data.copy_within(..shape.1, (shape.0 - 1) * shape.1);
        let found = of_tier(Tier::Amx, &data, shape);
        assert_eq!(found[shape.0 - 2], 0.0, "{shape:?}");
    }
}

/// # Safety
///
/// The processor has AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_from(from: &[u16], to: &mut [Line; SIDE]) {
    // SAFETY: 16 rows of 40 values, of which 32 are read; the caller's.
    unsafe {
        let mut rows = [_mm512_setzero_si512(); SIDE];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_si512(from[i * 40..][..32].as_ptr().cast());
        }
        for (line, column) in to.iter_mut().zip(transposed(rows)) {
            _mm512_storeu_si512((&raw mut *line).cast(), column);
        }
    }
}

#[test]
fn blocks_are_transposed() {
    if !avx512::is_available() {
        eprintln!("skipped: this machine has no AVX-512");
        return;
    }
    let from: Vec<u16> = (0..16 * 40).collect();
    let mut to = [Line([0; SIDE]); SIDE];
    // SAFETY: 16 rows of 40 values, of which 32 are read; AVX-512 was asked for.
    unsafe { transpose_from(&from, &mut to) };
    for i in 0..SIDE {
        for j in 0..SIDE {
            let pair = [from[i * 40 + 2 * j], from[i * 40 + 2 * j + 1]];
            let expected = u32::from(pair[0]) | u32::from(pair[1]) << 16;
            assert_eq!(to[j].0[i], expected, "{i} {j}");
        }
    }
}
