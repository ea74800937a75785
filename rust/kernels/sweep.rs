//! The traits of a tier: the sums of products that it makes, and the work done with its
//! instructions.

use super::packed::{Chunk, Packed};
use super::prefetch::Prefetch;
use crate::states::Element;

/// Something to do with a tier's instructions. `run` must be `#[inline(always)]`, and so
/// must what it calls in its loops, to be compiled for the tier. A closure cannot be so: none may
/// do what takes time.
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
    /// True if there are instructions that multiply and add.
    const FUSED: bool = true;
}

/// Sums of products of all pairs of different rows, a chunk of columns at a time.
pub(crate) trait Sweep {
    /// The form that the states are packed in.
    type Packed: Packed;

    /// State that must be ready while sums are added.
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

    /// The error of the cosines of rows of 512 columns, but for a bias; see docs/derivations.md.
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
        if let Some(bits) = T::bf16_bits(row)
            && let Some(packed) = Self::pack_bf16(bits, chunk.row_mut(state))
        {
            return packed;
        }
        let magnitude = chunk.pack(state, row);
        (magnitude, Self::square(chunk.row(state)))
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
