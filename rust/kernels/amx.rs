//! AMX: bfloat16 products in tiles of 16 x 16 sums.
//!
//! There are no stable intrinsics, so the inner loop is assembly. All else is shared with
//! its twin in plain Rust, [`tests`], which goes through the same sweep.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::sync::OnceLock;

use super::{Chunk, Kernels, Soon, Sweep, Work, avx512, avx512bf16, tiles};

/// Rows of a tile, and 32-bit columns.
const SIDE: usize = 16;

/// bfloat16 columns of a tile.
const COLUMNS: usize = 2 * SIDE;

/// One tile of sums.
type Tile = [f32; SIDE * SIDE];

/// Whether the processor has tiles of bfloat16, the kernel saves them, and lets us use them.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| avx512bf16::is_available() && has_tiles() && is_permitted())
}

fn has_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    /// The state of tile configuration and tile data in XCR0.
    const TILE_STATES: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    if __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE != AMX_BF16_AND_TILE {
        return false;
    }
    // SAFETY: OSXSAVE says that there is XGETBV.
    let enabled = unsafe { enabled_states() };
    enabled & TILE_STATES == TILE_STATES
}

/// # Safety
///
/// The operating system has enabled XSAVE.
#[target_feature(enable = "xsave")]
unsafe fn enabled_states() -> u64 {
    // SAFETY: the caller's.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the use of tile data, for the whole process.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut answer = ARCH_PRCTL;
    // SAFETY: a system call that takes two numbers, and reads and writes no memory.
    unsafe {
        asm!(
            "syscall",
            inout("rax") answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// # Safety
///
/// The processor has AVX-512 F, BW, DQ, VL and BF16, and AMX may be used.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Hardware>()
}

/// What multiplies tiles: the processor, or its twin.
trait Engine {
    /// The sums of four tiles, two blocks of rows against two, over `steps` of 32 columns.
    ///
    /// # Safety
    ///
    /// The engine can be used. Each `left` has 16 rows of `steps` times 64 bytes, `stride`
    /// bytes apart; each `right` has `steps` tiles, transposed.
    unsafe fn multiply(
        left: [*const u16; 2],
        stride: usize,
        right: [*const u32; 2],
        steps: usize,
        sums: &mut [Tile; 4],
    );
}

pub(crate) struct Hardware;

impl Kernels for Hardware {
    type Double = avx512::Double;
    type Brain = Tiles<Hardware>;
}

/// As LDTILECFG reads it: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Engine for Hardware {
    unsafe fn multiply(
        left: [*const u16; 2],
        stride: usize,
        right: [*const u32; 2],
        steps: usize,
        sums: &mut [Tile; 4],
    ) {
        // SAFETY: tile loads read what the caller vouches for, the stores write `sums`.
        // `steps` is not zero. The tiles are released, so that nothing saves them any longer.
        unsafe {
            asm!(
                "ldtilecfg [{configuration}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{left0} + {stride}*1]",
                "tileloadd tmm6, [{right0} + {side}*1]",
                "tileloadd tmm7, [{right1} + {side}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left0}, 64",
                "add {left1}, 64",
                "add {right0}, 1024",
                "add {right1}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {side}*1], tmm0",
                "tilestored [{sums} + {side}*1 + 1024], tmm1",
                "tilestored [{sums} + {side}*1 + 2048], tmm2",
                "tilestored [{sums} + {side}*1 + 3072], tmm3",
                "tilerelease",
                configuration = in(reg) &raw const CONFIGURATION,
                left0 = inout(reg) left[0] => _,
                left1 = inout(reg) left[1] => _,
                right0 = inout(reg) right[0] => _,
                right1 = inout(reg) right[1] => _,
                stride = in(reg) stride,
                side = in(reg) 4 * SIDE,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    }
}

/// Sums in tiles of blocks of 16 rows, those of padding included.
pub(crate) struct Tiles<E>(std::marker::PhantomData<E>);

thread_local! {
    /// All tiles of a chunk transposed, block by block.
    static TRANSPOSED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// `(first, second)` of the pairs of blocks `first <= second` in the order of the sums.
#[inline(always)]
fn pairs_of_blocks(blocks: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..blocks).flat_map(move |first| (first..blocks).map(move |second| (first, second)))
}

impl<E: Engine> Sweep for Tiles<E> {
    type Packed = u16;

    const CHUNK: usize = 512;

    const SPAN: usize = 512;

    fn num_sums(num_states: usize) -> usize {
        let blocks = num_states.div_ceil(SIDE);
        blocks * (blocks + 1) / 2 * SIDE * SIDE
    }

    #[inline(always)]
    fn add(chunk: &Chunk<u16>, fresh: bool, sums: &mut [f64], soon: Soon<'_>) {
        if fresh {
            sums.fill(0.0);
        }
        let blocks = chunk.num_states().div_ceil(SIDE);
        let steps = chunk.length() / COLUMNS;
        assert!(chunk.length().is_multiple_of(COLUMNS) && steps > 0);
        assert!(sums.len() == Self::num_sums(chunk.num_states()));
        TRANSPOSED.with_borrow_mut(|transposed| {
            let of_block = steps * SIDE * SIDE;
            transposed.resize(blocks * of_block, 0);
            // SAFETY: a sweep is reached through its tier's `run` alone. A chunk has rows of
            // zeros up to a multiple of 16; `transposed` has room for all blocks.
            unsafe {
                tiles::prefetch_all::<avx512bf16::Brain>(&soon);
                for block in 0..blocks {
                    let from = chunk.start().add(block * SIDE * chunk.stride());
                    let to = transposed.as_mut_ptr().add(block * of_block);
                    for step in 0..steps {
                        transpose(
                            from.add(step * COLUMNS),
                            chunk.stride(),
                            to.add(step * SIDE * SIDE),
                        );
                    }
                }
            }
            let mut products = [[0.0; SIDE * SIDE]; 4];
            for first in (0..blocks).step_by(2) {
                for second in (first..blocks).step_by(2) {
                    let last = blocks - 1;
                    let rows = [first, (first + 1).min(last)];
                    let columns = [second, (second + 1).min(last)];
                    let start = chunk.start();
                    // SAFETY: as above.
                    unsafe {
                        E::multiply(
                            rows.map(|block| start.add(block * SIDE * chunk.stride())),
                            chunk.stride() * size_of::<u16>(),
                            columns.map(|block| transposed.as_ptr().add(block * of_block)),
                            steps,
                            &mut products,
                        );
                    }
                    let tiles =
                        (first..=rows[1]).flat_map(|i| (second..=columns[1]).map(move |j| (i, j)));
                    for (i, j) in tiles.filter(|(i, j)| i <= j) {
                        let tile = &products[2 * (i - first) + j - second];
                        let place = i * (2 * blocks - i + 1) / 2 + j - i;
                        let to = &mut sums[place * SIDE * SIDE..][..SIDE * SIDE];
                        for (sum, &product) in to.iter_mut().zip(tile) {
                            *sum += f64::from(product);
                        }
                    }
                }
            }
        });
    }

    #[inline(always)]
    fn square(row: &[u16]) -> f64 {
        avx512bf16::Brain::square(row)
    }

    #[inline(always)]
    fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
        let pairs = pairs_of_blocks(num_states.div_ceil(SIDE));
        for ((i, j), tile) in pairs.zip(sums.chunks_exact(SIDE * SIDE)) {
            for row in i * SIDE..((i + 1) * SIDE).min(num_states) {
                let start = row * (2 * num_states - row - 1) / 2;
                let sums = &tile[(row - i * SIDE) * SIDE..][..SIDE];
                for column in (j * SIDE).max(row + 1)..((j + 1) * SIDE).min(num_states) {
                    products[start + column - row - 1] += sums[column - j * SIDE];
                }
            }
        }
    }
}

/// Transposes 16 rows of 16 pairs of bfloat16, a pair moving as one.
///
/// # Safety
///
/// AVX-512 F; `from` has 16 rows of 64 bytes, `stride` values apart, `to` 1,024 bytes.
#[inline(always)]
unsafe fn transpose(from: *const u16, stride: usize, to: *mut u32) {
    // SAFETY: the caller's.
    unsafe {
        let mut rows = [_mm512_setzero_si512(); SIDE];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_si512(from.add(i * stride).cast());
        }
        // Within lanes of 128 bits: pairs of rows, then fours.
        let mut fours = rows;
        for i in (0..SIDE).step_by(4) {
            let low = [0, 2].map(|j| _mm512_unpacklo_epi32(rows[i + j], rows[i + j + 1]));
            let high = [0, 2].map(|j| _mm512_unpackhi_epi32(rows[i + j], rows[i + j + 1]));
            fours[i] = _mm512_unpacklo_epi64(low[0], low[1]);
            fours[i + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
            fours[i + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
            fours[i + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
        }
        // Column `4 lane + i` of rows `4 g ..` is in that lane of `fours[4 g + i]`.
        for i in 0..4 {
            let [a, b, c, d] = [0, 4, 8, 12].map(|g| fours[g + i]);
            let even = [
                _mm512_shuffle_i32x4::<0x88>(a, b),
                _mm512_shuffle_i32x4::<0x88>(c, d),
            ];
            let odd = [
                _mm512_shuffle_i32x4::<0xdd>(a, b),
                _mm512_shuffle_i32x4::<0xdd>(c, d),
            ];
            let columns = [
                _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
                _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
            ];
            for (lane, column) in columns.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * lane + i) * SIDE).cast(), column);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Tier;
    use crate::{Gram, Metric, Order, States};

    /// The tile instructions in plain Rust, for processors without them.
    struct Twin;

    impl Kernels for Twin {
        type Double = avx512::Double;
        type Brain = Tiles<Twin>;
    }

    fn flushed(value: f32) -> f32 {
        if value.is_subnormal() {
            0.0 * value
        } else {
            value
        }
    }

    fn brain(bits: u16) -> f32 {
        flushed(f32::from_bits(u32::from(bits) << 16))
    }

    /// TDPBF16PS of full tiles: even and odd products are summed apart, by FMA, and added to
    /// the sums at the end; denormal numbers count as zero.
    fn tdpbf16ps(sums: &mut Tile, left: &[[u16; COLUMNS]; SIDE], right: &[[u16; COLUMNS]; SIDE]) {
        for m in 0..SIDE {
            for n in 0..SIDE {
                let mut apart = [0.0_f32; 2];
                for k in 0..SIDE {
                    for (odd, sum) in apart.iter_mut().enumerate() {
                        let x = brain(left[m][2 * k + odd]);
                        *sum = flushed(x.mul_add(brain(right[k][2 * n + odd]), *sum));
                    }
                }
                let sum = &mut sums[m * SIDE + n];
                *sum = flushed(*sum + flushed(apart[0] + apart[1]));
            }
        }
    }

    impl Engine for Twin {
        unsafe fn multiply(
            left: [*const u16; 2],
            stride: usize,
            right: [*const u32; 2],
            steps: usize,
            sums: &mut [Tile; 4],
        ) {
            // SAFETY: as for the instructions; `stride` is in bytes.
            let load = |from: *const u8, stride: usize| unsafe {
                let mut tile = [[0; COLUMNS]; SIDE];
                for (i, row) in tile.iter_mut().enumerate() {
                    *row = from
                        .add(i * stride)
                        .cast::<[u16; COLUMNS]>()
                        .read_unaligned();
                }
                tile
            };
            *sums = [[0.0; SIDE * SIDE]; 4];
            for step in 0..steps {
                for i in 0..2 {
                    for j in 0..2 {
                        let left = load(left[i].cast::<u8>().wrapping_add(64 * step), stride);
                        let right = load(right[j].cast::<u8>().wrapping_add(1024 * step), 64);
                        tdpbf16ps(&mut sums[2 * i + j], &left, &right);
                    }
                }
            }
        }
    }

    struct Compare<'a>(&'a mut Gram, &'a States<'a, u16>);

    impl Work for Compare<'_> {
        type Output = Vec<f64>;

        fn run<K: Kernels>(self) -> Vec<f64> {
            let mut values = vec![0.0; self.1.num_states() * (self.1.num_states() - 1) / 2];
            self.0.compute_with::<K, u16>(self.1, 0).unwrap();
            self.0.fractions(Metric::Angular, &mut values);
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

    #[test]
    fn the_tiles_twin_equals_the_scalar_tier() {
        if !avx512bf16::is_available() {
            eprintln!("skipped: this machine has no AVX512-BF16, which the tiles' twin needs");
            return;
        }
        for (states, width) in [
            (2, 1),
            (3, 40),
            (16, 64),
            (17, 513),
            (33, 1500),
            (40, 96),
            (81, 700),
        ] {
            let mut state = 1_u64;
            let mut data: Vec<u16> = (0..states * width)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(99);
                    half::bf16::from_f32((state >> 40) as f32 / 8e6 - 1.0).to_bits()
                })
                .collect();
            data[0] = half::bf16::from_f32(1000.0).to_bits();
            let view = States::new(&data, 1, states, width, Order::SampleFirst).unwrap();
            let mut gram = Gram::new(states, Tier::Scalar);
            let expected = Tier::Scalar.run(Compare(&mut gram, &view));
            let mut gram = Gram::new(states, Tier::Scalar);
            // SAFETY: asked above.
            let found = unsafe { run_twin(Compare(&mut gram, &view)) };
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 1e-7,
                    "{states} {width}: {found} {expected}"
                );
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
        let mut to = [0_u32; SIDE * SIDE];
        // SAFETY: 16 rows of 40 values, of which 32 are read; AVX-512 was asked for.
        unsafe { transpose(from.as_ptr(), 40, to.as_mut_ptr()) };
        for i in 0..SIDE {
            for j in 0..SIDE {
                let pair = [from[i * 40 + 2 * j], from[i * 40 + 2 * j + 1]];
                let expected = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                assert_eq!(to[j * SIDE + i], expected, "{i} {j}");
            }
        }
    }
}
