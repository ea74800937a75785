//! Many dot products of 16-bit integers at once: the inner loop of the bootstrap.
//!
//! Integers, so that every instruction set gives the same sums.

#![allow(unsafe_code)]

use super::tier::Tier;

/// The length of a vector.
pub(crate) const CHUNK: usize = 2048;

/// A vector, aligned as the widest registers like it.
#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Chunk(pub [i16; CHUNK]);

/// Rows and columns whose products are found together.
pub(crate) const TILE: usize = 4;

type Products = [[i32; TILE]; TILE];
type Kernel = unsafe fn(&[Chunk; TILE], [&Chunk; TILE]) -> Products;

/// The instructions that a tier has for dot products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dots {
    /// Those that every processor of the architecture has.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Dots {
    /// The fastest way within a tier, which this processor has.
    pub fn of(tier: Tier) -> Self {
        match tier {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 | Tier::Avx512Bf16 | Tier::Amx if x86::has_avx512vnni() => {
                Self::Avx512Vnni
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 | Tier::Avx512 | Tier::Avx512Bf16 | Tier::Amx => Self::Avx2,
            _ => Self::Baseline,
        }
    }

    fn kernel(self) -> Kernel {
        match self {
            #[cfg(not(target_arch = "x86_64"))]
            Self::Baseline => plain,
            #[cfg(target_arch = "x86_64")]
            Self::Baseline => x86::sse2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => x86::avx512vnni,
        }
    }

    /// Adds the products of all rows with each of the columns to `sums`, a run of `rows` for
    /// each column. A product must fit 32 bits, and the rows fill tiles.
    pub fn add(self, rows: &[Chunk], columns: &[Chunk], sums: &mut [i64]) {
        let kernel = self.kernel();
        let width = rows.len();
        for (some, sums) in columns.chunks(TILE).zip(sums.chunks_mut(TILE * width)) {
            let some: [&Chunk; TILE] = std::array::from_fn(|i| &some[i.min(some.len() - 1)]);
            for (tile, rows) in rows.as_chunks::<TILE>().0.iter().enumerate() {
                // SAFETY: `of` has chosen what a tier has that this processor has.
                let products = unsafe { kernel(rows, some) };
                for (sums, products) in sums.chunks_mut(width).zip(products) {
                    for (sum, product) in sums[tile * TILE..].iter_mut().zip(products) {
                        *sum += i64::from(product);
                    }
                }
            }
        }
    }
}

/// For every processor, and what the others must equal.
#[cfg(any(test, not(target_arch = "x86_64")))]
fn plain(rows: &[Chunk; TILE], columns: [&Chunk; TILE]) -> Products {
    let product = |row: &Chunk, column: &Chunk| {
        let both = row.0.iter().zip(&column.0);
        both.map(|(&x, &y)| i32::from(x) * i32::from(y)).sum()
    };
    columns.map(|column| std::array::from_fn(|row| product(&rows[row], column)))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, __m512i, _mm_add_epi32, _mm_load_si128, _mm_madd_epi16,
        _mm_setzero_si128, _mm256_add_epi32, _mm256_load_si256, _mm256_madd_epi16,
        _mm256_setzero_si256, _mm512_dpwssd_epi32, _mm512_load_si512, _mm512_setzero_si512,
    };

    use super::{CHUNK, Chunk, Products, TILE};

    pub(super) fn has_avx512vnni() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
    }

    macro_rules! kernel {
        ($name:ident, $features:literal, $columns:literal, $vector:ty, $lanes:literal, $zero:ident, $load:ident, $add:expr) => {
            #[target_feature(enable = $features)]
            pub(super) fn $name(rows: &[Chunk; TILE], columns: [&Chunk; TILE]) -> Products {
                let mut products = [[0; TILE]; TILE];
                for first in (0..TILE).step_by($columns) {
                    let mut sums = [[$zero(); TILE]; $columns];
                    for at in (0..CHUNK).step_by(2 * $lanes) {
                        let load = |chunk: &Chunk| {
                            // SAFETY: a chunk is aligned to 64 bytes, the vector lies within it.
                            unsafe { $load(chunk.0.as_ptr().add(at).cast()) }
                        };
                        let columns: [$vector; $columns] =
                            std::array::from_fn(|column| load(columns[first + column]));
                        for row in 0..TILE {
                            let values = load(&rows[row]);
                            for column in 0..$columns {
                                sums[column][row] =
                                    $add(sums[column][row], values, columns[column]);
                            }
                        }
                    }
                    for column in 0..$columns {
                        for row in 0..TILE {
                            // SAFETY: both are plain integers of the same size.
                            let lanes = unsafe {
                                std::mem::transmute::<$vector, [i32; $lanes]>(sums[column][row])
                            };
                            products[first + column][row] = lanes.iter().sum();
                        }
                    }
                }
                products
            }
        };
    }

    kernel!(
        sse2,
        "sse2",
        2,
        __m128i,
        4,
        _mm_setzero_si128,
        _mm_load_si128,
        |sum, x, y| _mm_add_epi32(sum, _mm_madd_epi16(x, y))
    );
    kernel!(
        avx2,
        "avx2",
        2,
        __m256i,
        8,
        _mm256_setzero_si256,
        _mm256_load_si256,
        |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y))
    );
    kernel!(
        avx512vnni,
        "avx512f,avx512bw,avx512vl,avx512vnni",
        4,
        __m512i,
        16,
        _mm512_setzero_si512,
        _mm512_load_si512,
        |sum, x, y| _mm512_dpwssd_epi32(sum, x, y)
    );
}

#[cfg(test)]
mod tests {
    use super::{CHUNK, Chunk, Dots, TILE, plain};
    use crate::kernels::Tier;

    #[test]
    fn every_tier_equals_the_plain_kernel() {
        let chunk = |seed: usize, reach: usize| {
            Chunk(std::array::from_fn(|i| {
                let value = (seed + 1).wrapping_mul(i + 7).wrapping_mul(0x9e37_79b9) >> 7;
                (value % reach).cast_signed() as i16
            }))
        };
        let extremes = |value| Chunk([value; CHUNK]);
        let weights: [Chunk; TILE] = std::array::from_fn(|i| chunk(i, 9));
        let columns: [Chunk; TILE] = [
            chunk(11, 1 << 16),
            chunk(12, 1 << 16),
            extremes(i16::MIN),
            extremes(i16::MAX),
        ];
        let columns = columns.each_ref();
        let expected = plain(&weights, columns);
        assert!(expected[2].iter().all(|&sum| sum < 0));
        for tier in Tier::available() {
            let kernel = Dots::of(tier).kernel();
            // SAFETY: this processor has the tier.
            assert_eq!(unsafe { kernel(&weights, columns) }, expected, "{tier}");
        }
    }

    #[test]
    fn a_tier_uses_no_instructions_beyond_its_own() {
        assert_eq!(Dots::of(Tier::Scalar), Dots::Baseline);
        assert_eq!(Dots::of(Tier::Neon), Dots::Baseline);
        #[cfg(target_arch = "x86_64")]
        {
            assert_eq!(Dots::of(Tier::Avx2), Dots::Avx2);
            for tier in [Tier::Avx512, Tier::Avx512Bf16, Tier::Amx] {
                assert_eq!(Dots::of(tier), Dots::of(Tier::Avx512), "{tier}");
                assert_ne!(Dots::of(tier), Dots::Baseline, "{tier}");
            }
        }
    }
}
