//! The vectors of one instruction set and one precision.

#![allow(unsafe_code)]

use super::packed::{Packed, greatest};

/// The vectors of one instruction set and one precision.
///
/// # Safety
///
/// Every method may use the unit's instructions: call them only from a function that has
/// these features, on a processor that has them. `load` reads `WIDTH` values, `flush` reads
/// and writes `LANES` values.
pub(crate) trait Unit: Sized {
    /// An element as it is loaded.
    type Packed: Packed;
    /// A vector of it.
    type Vector: Copy;
    /// A vector of sums.
    type Sum: Copy;

    /// Columns whose products are summed in `Sum`'s precision.
    const SPAN: usize;
    /// The error of cosines; see `SPREAD` of a sweep.
    const SPREAD: f64 = 1.1e-7;
    /// Rows of a tile: `ROWS²` sums and `ROWS + 1` vectors fit in the registers.
    const ROWS: usize;
    /// Values of a vector.
    const WIDTH: usize;
    /// The float64 numbers that a vector of sums is folded to.
    const LANES: usize;

    unsafe fn zero() -> Self::Sum;
    unsafe fn load(from: *const Self::Packed) -> Self::Vector;
    /// `sum + left · right`, products of bfloat16 added in pairs.
    unsafe fn multiply_add(sum: Self::Sum, left: Self::Vector, right: Self::Vector) -> Self::Sum;
    /// Adds the lanes to `LANES` float64 numbers.
    unsafe fn flush(sum: Self::Sum, to: *mut f64);
    /// The same with four sums, and four times `LANES` numbers.
    #[inline(always)]
    unsafe fn flush_four(sums: [Self::Sum; 4], to: *mut f64) {
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { Self::flush(sum, to.add(i * Self::LANES)) };
        }
    }

    /// The sum of `LANES` numbers.
    #[inline(always)]
    unsafe fn total(from: *const f64) -> f64 {
        // SAFETY: the caller's: so many can be read.
        match *unsafe { std::slice::from_raw_parts(from, Self::LANES) } {
            [a, b] => a + b,
            [a, b, c, d] => (a + b) + (c + d),
            [a, b, c, d, e, f, g, h] => ((a + b) + (c + d)) + ((e + f) + (g + h)),
            _ => unreachable!("a unit has 2, 4 or 8 lanes"),
        }
    }

    /// The same of eight times `LANES` numbers, to the bit.
    #[inline(always)]
    unsafe fn total_eight(from: *const f64) -> [f64; 8] {
        let mut totals = [0.0; 8];
        for (i, total) in totals.iter_mut().enumerate() {
            // SAFETY: the caller's.
            *total = unsafe { Self::total(from.add(i * Self::LANES)) };
        }
        totals
    }

    /// Copies a row of bfloat16, padded with zeros to a multiple of 32; its greatest magnitude
    /// and the sum of its squares. Columns may change places, in all rows alike. `None` if
    /// the unit has no way of its own.
    #[inline(always)]
    unsafe fn pack_bf16(_row: &[u16], _to: &mut [Self::Packed]) -> Option<(f32, f64)> {
        None
    }

    /// The greatest magnitude of a packed row and the sum of its squares.
    #[inline(always)]
    unsafe fn measure(row: &[Self::Packed]) -> (f32, f64) {
        // SAFETY: the caller's.
        (greatest(row), unsafe { square::<Self>(row) })
    }

    /// `|x + f·y|²` of rows of bfloat16 of one length; `None` if the unit has no way of its own.
    #[inline(always)]
    unsafe fn square_of_sum(_x: &[u16], _y: &[u16], _factor: f32) -> Option<f64> {
        None
    }

    /// Asks for the line of an address, which need not be readable.
    unsafe fn prefetch(address: *const u8);
}

/// The sum of squares of a packed row.
///
/// # Safety
///
/// As for the methods of [`Unit`].
#[inline(always)]
pub(crate) unsafe fn square<U: Unit>(row: &[U::Packed]) -> f64 {
    const CHAINS: usize = 4;
    let mut lanes = [0.0; 8];
    assert!(row.len().is_multiple_of(U::WIDTH) && U::LANES <= lanes.len());
    // SAFETY: whole vectors within the row; `lanes` has room for `LANES` values.
    unsafe {
        let mut sums = [U::zero(); CHAINS];
        let mut at = 0;
        while at + CHAINS * U::WIDTH <= row.len() {
            for (chain, sum) in sums.iter_mut().enumerate() {
                let vector = U::load(row.as_ptr().add(at + chain * U::WIDTH));
                *sum = U::multiply_add(*sum, vector, vector);
            }
            at += CHAINS * U::WIDTH;
        }
        while at < row.len() {
            let vector = U::load(row.as_ptr().add(at));
            sums[0] = U::multiply_add(sums[0], vector, vector);
            at += U::WIDTH;
        }
        for sum in sums {
            U::flush(sum, lanes.as_mut_ptr());
        }
        U::total(lanes.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::Unit;
    #[cfg(target_arch = "aarch64")]
    use crate::kernels::neon;
    use crate::kernels::{Tier, scalar};
    #[cfg(target_arch = "x86_64")]
    use crate::kernels::{avx2, avx512, avx512bf16};

    fn eight_are_totalled_as_one<U: Unit>(tier: Tier) {
        if !tier.is_available() {
            return;
        }
        let lanes: Vec<f64> = (0..8 * U::LANES)
            .map(|lane| [1e16, 1.0, -1e16, 3.0][lane % 4] * (1 + lane / 4) as f64)
            .collect();
        // SAFETY: the tier is available, and has the unit's instructions; eight times `LANES`
        // values can be read.
        unsafe {
            for (i, eighth) in U::total_eight(lanes.as_ptr()).into_iter().enumerate() {
                let alone = U::total(lanes.as_ptr().add(i * U::LANES));
                assert_eq!(eighth.to_bits(), alone.to_bits(), "{tier}, {i}");
            }
        }
    }

    #[test]
    fn eight_sums_are_totalled_as_one_is() {
        eight_are_totalled_as_one::<scalar::Double>(Tier::Scalar);
        #[cfg(target_arch = "x86_64")]
        {
            eight_are_totalled_as_one::<avx2::Single>(Tier::Avx2);
            eight_are_totalled_as_one::<avx2::Double>(Tier::Avx2);
            eight_are_totalled_as_one::<avx512::Single>(Tier::Avx512);
            eight_are_totalled_as_one::<avx512::Double>(Tier::Avx512);
            eight_are_totalled_as_one::<avx512bf16::Bf16>(Tier::Avx512Bf16);
        }
        #[cfg(target_arch = "aarch64")]
        {
            eight_are_totalled_as_one::<neon::Single>(Tier::Neon);
            eight_are_totalled_as_one::<neon::Double>(Tier::Neon);
        }
    }
}
