//! Massive activations: columns that outweigh the others of their chunk. They are taken out of
//! it, and multiplied in float64.

use crate::kernels::{Chunk, PADDING, Packed, Sweep, greatest};

/// A column is massive if its square is more than this share of its row's last columns, a
/// chunk or as many as this.
const MASSIVE_SHARE: f64 = 1.0 / 8.0;
pub(super) const MASSIVE_AMONG: usize = 512;

/// A sample with more massive columns in one chunk is left to float64.
const MOST_MASSIVE: usize = 64;

/// A sample that float32 cannot be trusted with.
pub(super) struct Unfit;

/// The rows of a chunk: their magnitudes and weights, and room for a column.
pub(super) struct Rows<'a> {
    pub magnitudes: &'a mut [f32],
    pub squares: &'a mut [f64],
    pub earlier: &'a [f64],
    pub column: &'a mut [f64],
}

/// True if a value outweighs a row whose columns around it have this sum of squares.
#[inline(always)]
pub(super) fn is_massive(value: f64, square: f64) -> bool {
    value * value > MASSIVE_SHARE * square
}

/// Takes massive columns out of a chunk until none is left, and adds their products.
#[inline(always)]
pub(super) fn take_massive<S: Sweep>(
    chunk: &mut Chunk<S::Packed>,
    rows: Rows<'_>,
    products: &mut [f64],
    massive: &mut [f64],
) -> Result<(), Unfit> {
    let Rows {
        magnitudes,
        squares,
        earlier,
        column: values,
    } = rows;
    let mut taken = 0;
    // Rows have most of them in common: one row's are taken out of all, and all looked at again.
    while let Some(state) = (0..magnitudes.len()).find(|&state| {
        is_massive(
            f64::from(magnitudes[state]),
            squares[state] + earlier[state],
        )
    }) {
        let weight = squares[state] + earlier[state];
        for first in (0..chunk.length()).step_by(PADDING) {
            let some = &chunk.row(state)[first..][..PADDING];
            if !is_massive(greatest(some).into(), weight) {
                continue;
            }
            for column in first..first + PADDING {
                if !is_massive(chunk.row(state)[column].widen(), weight) {
                    continue;
                }
                taken += 1;
                if taken > MOST_MASSIVE {
                    return Err(Unfit);
                }
                chunk.take_column(column, values);
                add_products(values, products, massive);
            }
        }
        for state in 0..magnitudes.len() {
            (magnitudes[state], squares[state]) = S::measure(chunk.row(state));
        }
    }
    Ok(())
}

/// Adds a column's products of all pairs, and its squares.
#[inline(always)]
fn add_products(values: &[f64], products: &mut [f64], squares: &mut [f64]) {
    let mut start = 0;
    for (first, &value) in values.iter().enumerate() {
        let others = &values[first + 1..];
        for (product, other) in products[start..].iter_mut().zip(others) {
            *product += value * other;
        }
        squares[first] += value * value;
        start += others.len();
    }
}
