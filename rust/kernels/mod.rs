//! The instruction sets: which there are, which one is used, and the sums of products that
//! each of them makes. Everything above works on plain slices; unsafe code is here alone.
//!
//! A [`Work`] is written once, in plain Rust, and compiled once for each tier: [`Tier::run`]
//! calls it inside a function that has the tier's instructions, so that its loops become the
//! tier's vectors. What a compiler does not find by itself, the register tiles of a Gram
//! matrix, are the [`Sweep`]s of the tier.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
pub(crate) mod dots;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod scalar;
mod tiles;

use std::env::{VarError, var};
use std::fmt;
use std::str::FromStr;

use crate::error::Error;
use crate::states::Element;

pub(crate) use packed::{Chunk, Chunks, PADDING, Packed, greatest};

/// The environment variable that forces a tier.
pub const TIER_VARIABLE: &str = "SHALLOWER_TIER";

/// An instruction set that the core is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Plain Rust in float64, for every processor: the reference of the others.
    Scalar,
    /// AVX2 and FMA; float32 products.
    Avx2,
    /// AVX-512; float32 products.
    Avx512,
    /// AVX-512; bfloat16 states by `vdpbf16ps`.
    Avx512Bf16,
    /// AVX-512; bfloat16 states by AMX tiles.
    Amx,
    /// NEON; float32 products.
    Neon,
}

impl Tier {
    /// All tiers, whatever the processor.
    pub const ALL: [Tier; 6] = [
        Tier::Scalar,
        Tier::Avx2,
        Tier::Avx512,
        Tier::Avx512Bf16,
        Tier::Amx,
        Tier::Neon,
    ];

    /// The tier's name.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Scalar => "scalar",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
            Tier::Avx512Bf16 => "avx512bf16",
            Tier::Amx => "amx",
            Tier::Neon => "neon",
        }
    }

    /// Whether this processor and this operating system have the tier's instructions.
    pub fn is_available(self) -> bool {
        match self {
            Tier::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => avx512::is_available(),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16 => avx512bf16::is_available(),
            #[cfg(target_arch = "x86_64")]
            Tier::Amx => amx::is_available(),
            #[cfg(target_arch = "aarch64")]
            Tier::Neon => neon::is_available(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The tiers that this processor has.
    pub fn available() -> Vec<Tier> {
        let all = Self::ALL.into_iter();
        all.filter(|tier| tier.is_available()).collect()
    }

    /// The tier that is used: the one that `SHALLOWER_TIER` names, else [`Tier::best`].
    pub fn chosen() -> Result<Tier, Error> {
        match var(TIER_VARIABLE) {
            Err(VarError::NotPresent) => Ok(Self::best()),
            Err(VarError::NotUnicode(name)) => Err(Self::unknown(name.to_string_lossy().into())),
            Ok(name) => name.parse::<Tier>()?.checked(),
        }
    }

    /// The fastest tier by what the processor is, always the same one on the same machine.
    ///
    /// `vdpbf16ps` does twice the work of a float32 FMA on AMD's cores and half of it on
    /// Intel's, where it is therefore passed over.
    pub fn best() -> Tier {
        let order: &[Tier] = if is_amd() {
            &[Tier::Amx, Tier::Avx512Bf16, Tier::Avx512, Tier::Avx2]
        } else {
            &[Tier::Amx, Tier::Avx512, Tier::Avx2, Tier::Neon]
        };
        let mut order = order.iter().copied();
        order
            .find(|tier| tier.is_available())
            .unwrap_or(Tier::Scalar)
    }

    /// The tier itself if the processor has it.
    pub fn checked(self) -> Result<Tier, Error> {
        if self.is_available() {
            Ok(self)
        } else {
            Err(Error::TierUnavailable {
                tier: self.name(),
                available: Self::available_names(),
            })
        }
    }

    fn unknown(name: String) -> Error {
        Error::UnknownTier {
            name,
            variable: TIER_VARIABLE,
            available: Self::available_names(),
        }
    }

    fn available_names() -> String {
        let names: Vec<_> = Self::available().into_iter().map(Self::name).collect();
        names.join(", ")
    }

    /// Does the work with this tier's instructions.
    ///
    /// # Panics
    ///
    /// If the processor does not have them; every tier that is kept was [`Tier::checked`].
    #[allow(unsafe_code)]
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        debug_assert!(self.is_available());
        match self {
            Tier::Scalar => work.run::<scalar::Kernels>(),
            // SAFETY (this and the following): a tier that is kept was `checked`.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => unsafe { avx2::run(work) },
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => unsafe { avx512::run(work) },
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16 => unsafe { avx512bf16::run(work) },
            #[cfg(target_arch = "x86_64")]
            Tier::Amx => unsafe { amx::run(work) },
            #[cfg(target_arch = "aarch64")]
            Tier::Neon => unsafe { neon::run(work) },
            #[allow(unreachable_patterns)]
            _ => panic!("tier {self} is not of this architecture"),
        }
    }
}

// Miri has no CPUID.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat()
        == b"AuthenticAMD"
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
fn is_amd() -> bool {
    false
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.name() == name)
            .ok_or_else(|| Self::unknown(name.to_owned()))
    }
}

/// Something to do with a tier's instructions. `run` must be `#[inline(always)]`, and so
/// must what it calls in its loops, to be compiled for the tier.
pub(crate) trait Work {
    type Output;

    fn run<K: Kernels>(self) -> Self::Output;
}

/// The sums of products that a tier makes.
pub(crate) trait Kernels {
    /// In float64, for any state.
    type Double: Sweep<Packed = f64>;
    /// For bfloat16, in float32 or float64.
    type Bf16: Sweep;
    /// Whether there are instructions that multiply and add.
    const FUSED: bool = true;
}

/// Sums of products of all pairs of different rows, a chunk of columns at a time.
pub(crate) trait Sweep {
    /// What the states are packed as.
    type Packed: Packed;

    /// What must be ready while sums are added.
    type Engine;

    /// Columns of a chunk.
    const CHUNK: usize;

    /// Rows of up to so many columns are one chunk.
    const WHOLE: usize = Self::CHUNK;

    /// Bytes that are fetched before they are read: as few as do, since more are forgotten.
    const AHEAD: usize;

    /// Chunks that are fetched before they are read, whatever their bytes.
    const LEAST_AHEAD: usize;

    /// Columns whose products are summed in `Packed`'s precision; beyond, it is float64.
    const SPAN: usize;

    /// The same for rows of this width, at most `SPAN`.
    fn span(_width: usize) -> usize {
        Self::SPAN
    }

    /// How far the cosines of rows of 512 columns err, but for a bias; see docs/maths.md.
    const SPREAD: f64;

    /// Makes the engine ready for one thread and rows of this width, until it is dropped.
    fn engine(width: usize) -> Self::Engine;

    /// The float64 numbers that the sums of so many states need.
    fn num_sums(num_states: usize) -> usize;

    /// Copies all rows into a chunk, which has their length; finds their greatest magnitudes
    /// and the sums of their squares.
    #[inline(always)]
    fn pack<'a, T: Element + 'a>(
        chunk: &mut Chunk<Self::Packed>,
        row: impl Fn(usize) -> &'a [T],
        magnitudes: &mut [f32],
        squares: &mut [f64],
        _prefetch: &Prefetch,
        _engine: &mut Self::Engine,
    ) {
        for state in 0..chunk.num_states() {
            (magnitudes[state], squares[state]) = Self::pack_row(chunk, state, row(state));
        }
    }

    #[inline(always)]
    fn pack_row<T: Element>(
        chunk: &mut Chunk<Self::Packed>,
        state: usize,
        row: &[T],
    ) -> (f32, f64) {
        let packed = T::bf16_bits(row).and_then(|row| Self::pack_bf16(row, chunk.row_mut(state)));
        packed.unwrap_or_else(|| {
            let magnitude = chunk.pack(state, row);
            (magnitude, Self::square(chunk.row(state)))
        })
    }

    /// `|x + f·y|²` of rows of bfloat16, every element rounded once; `None` if there is no way
    /// but the plain one.
    fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64>;

    /// To be called before a packed chunk is changed, with the same rows.
    #[inline(always)]
    fn copy<'a, T: Element + 'a>(
        _chunk: &mut Chunk<Self::Packed>,
        _row: impl Fn(usize) -> &'a [T],
        _engine: &mut Self::Engine,
    ) {
    }

    /// Adds a chunk's products to the sums, or begins them if they are to be `fresh`;
    /// meanwhile the lines of `prefetch` are fetched.
    fn add(
        chunk: &Chunk<Self::Packed>,
        fresh: bool,
        sums: &mut [f64],
        prefetch: &mut Prefetch,
        engine: &mut Self::Engine,
    );

    /// The sum of squares of one row of a chunk, in `Packed`'s precision.
    fn square(row: &[Self::Packed]) -> f64;

    /// The greatest magnitude of one row of a chunk, and its sum of squares.
    fn measure(row: &[Self::Packed]) -> (f32, f64);

    /// Copies a row of bfloat16 into one of a chunk, padded with zeros; its greatest magnitude
    /// and the sum of its squares. Columns may change places, in all rows alike. `None` if
    /// there is no way but [`Chunk::pack`].
    fn pack_bf16(row: &[u16], to: &mut [Self::Packed]) -> Option<(f32, f64)>;

    /// Adds the sums to the products of the pairs `(l, m)`, `l < m`, row by row.
    fn collect(num_states: usize, sums: &[f64], products: &mut [f64]);
}

/// Memory that are to be prefetched: some bytes from each of the addresses on.
#[derive(Debug, Default)]
pub(crate) struct Prefetch {
    rows: Vec<usize>,
    /// How many of them, with the bytes from each on; rows that join are one run.
    runs: usize,
    bytes: usize,
    in_turn: bool,
    /// The next line.
    row: usize,
    at: usize,
    left: usize,
}

impl Prefetch {
    const LINE: usize = 64;

    const PAGE: usize = 4096;

    /// Pages of a group.
    const PAGES: usize = 32;

    /// Begins anew with rows of so many bytes; a line of each `in_turn`, or one whole row after
    /// the other.
    pub fn begin(&mut self, rows: impl Iterator<Item = usize>, bytes: usize, in_turn: bool) {
        self.rows.clear();
        self.rows.extend(rows);
        self.in_turn = in_turn;
        (self.row, self.at) = (0, 0);
        let joined = !in_turn && self.rows.windows(2).all(|two| two[0] + bytes == two[1]);
        (self.runs, self.bytes) = if joined {
            (1, bytes * self.rows.len())
        } else {
            (self.rows.len(), bytes)
        };
        self.left = self.bytes.div_ceil(Self::LINE) * self.runs;
    }

    /// The addresses.
    #[cfg(target_arch = "x86_64")]
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// How many lines are left to be fetched.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Fetches one line of every page of the groups that begin in what is to be fetched: where a
    /// page lies the processor waits to be told, for many pages hardly longer than for one.
    ///
    /// # Safety
    ///
    /// As for the methods of [`tiles::Unit`].
    #[allow(unsafe_code)]
    #[inline(always)]
    pub unsafe fn fetch_pages<U: tiles::Unit>(&self) {
        for &start in &self.rows[..self.runs] {
            let groups = start.next_multiple_of(Self::PAGES * Self::PAGE)..start + self.bytes;
            for group in groups.step_by(Self::PAGES * Self::PAGE) {
                for page in 0..Self::PAGES {
                    let address = group + page * Self::PAGE;
                    // SAFETY: the caller's; a prefetch reads nothing, whatever is there.
                    unsafe { U::prefetch(std::ptr::without_provenance(address)) };
                }
            }
        }
    }

    /// Fetches the next line, if one is left.
    ///
    /// # Safety
    ///
    /// As for the methods of [`tiles::Unit`].
    #[allow(unsafe_code)]
    #[inline(always)]
    pub unsafe fn fetch<U: tiles::Unit>(&mut self) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        let address = self.rows[self.row] + self.at;
        // SAFETY: the caller's; a prefetch reads nothing.
        unsafe { U::prefetch(std::ptr::without_provenance(address)) };
        if self.in_turn {
            self.row += 1;
            if self.row == self.rows.len() {
                (self.row, self.at) = (0, self.at + Self::LINE);
            }
        } else {
            self.at += Self::LINE;
            if self.at >= self.bytes {
                (self.row, self.at) = (self.row + 1, 0);
            }
        }
    }
}
