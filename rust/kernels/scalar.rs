//! Plain Rust in float64: the reference, and what processors without the others use.

#![allow(unsafe_code)]

use super::registers::Registers;
use super::sweep;
use super::unit::Unit;

pub(crate) struct Kernels;

impl sweep::Kernels for Kernels {
    type Double = Registers<Double>;
    type Bf16 = Registers<Double>;
    const FUSED: bool = false;
}

/// Two float64 numbers, the vector of every x86-64 and every aarch64.
pub(crate) struct Double;

impl Unit for Double {
    type Packed = f64;
    type Vector = [f64; 2];
    type Sum = [f64; 2];

    const SPAN: usize = 512;
    const ROWS: usize = 3;
    const WIDTH: usize = 2;
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> [f64; 2] {
        [0.0; 2]
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> [f64; 2] {
        // SAFETY: the caller's: two values can be read.
        unsafe { [from.read(), from.add(1).read()] }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: [f64; 2], left: [f64; 2], right: [f64; 2]) -> [f64; 2] {
        [sum[0] + left[0] * right[0], sum[1] + left[1] * right[1]]
    }

    #[inline(always)]
    unsafe fn flush(sum: [f64; 2], to: *mut f64) {
        // SAFETY: the caller's: two values can be written.
        unsafe {
            *to += sum[0];
            *to.add(1) += sum[1];
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
