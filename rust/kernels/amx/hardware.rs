//! The tiles of the processor. There are no stable intrinsics for them, so this is assembly.
//!
//! Sums stay in tiles from one piece of assembly to the next, which the compiler is not told.
//! Nothing can touch them in between: the compiler itself uses no tiles, and what it may call
//! or save knows none either; no other engine is in the thread; the kernel gives each thread its
//! own tiles when threads take turns; and the pieces stay in their order, being volatile, as all
//! assembly is that is not `pure`.

#![allow(unsafe_code)]

use std::arch::asm;
use std::mem::MaybeUninit;

use super::engine::{Line, Multiply, OF_BLOCK, Sums, Tile};
use super::tiles::Tiles;
use crate::kernels::avx512;
use crate::kernels::registers::Registers;
use crate::kernels::sweep::Kernels;

/// The tiles of the processor, in a thread that they were set up for.
pub(crate) struct Hardware(std::marker::PhantomData<*const ()>);

impl Drop for Hardware {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the tiles were set up; nothing needs saving any longer.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

impl Kernels for Hardware {
    type Double = Registers<avx512::Double>;
    type Bf16 = Tiles<Hardware>;
}

/// As LDTILECFG reads it, palette 1.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles 0 to 2 are the sums of blocks, 3 and 4 those of one row; 5 is a block of rows, 6 the
/// row, 7 a block transposed.
static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 1, 1, 16, 1, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Assembly of `Hardware::multiply`.
macro_rules! multiply {
    ($($line:literal)*; $left:ident $own:ident $row:ident $right:ident) => {
        asm!(
            $($line,)*
            "/* {left} {own} {row} {right} {of_block} */",
            left = in(reg) $left,
            own = in(reg) $own,
            row = in(reg) $row,
            right = in(reg) $right,
            side = in(reg) size_of::<Line>(),
            of_block = const OF_BLOCK * size_of::<Line>(),
            options(nostack, readonly)
        )
    };
}

impl Multiply for Hardware {
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's; reads the configuration.
        unsafe {
            asm!(
                "ldtilecfg [{configuration}]",
                configuration = in(reg) &raw const CONFIGURATION,
                options(nostack)
            );
        }
        Self(std::marker::PhantomData)
    }

    #[inline(always)]
    fn clear(&mut self) {
        // SAFETY: the tiles were set up.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                options(nomem, nostack)
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply<const N: usize, const ROW: bool, const OWN: bool>(
        &mut self,
        left: *const Line,
        own: *const Line,
        row: *const Line,
        right: *const Line,
    ) {
        // SAFETY: tile loads read what the caller vouches for.
        unsafe {
            match (N, ROW, OWN) {
                (1, false, false) => multiply!(
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7";
                    left own row right
                ),
                (2, false, false) => multiply!(
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7";
                    left own row right
                ),
                (3, false, false) => multiply!(
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + 2*{of_block}]"
                    "tdpbf16ps tmm2, tmm5, tmm7";
                    left own row right
                ),
                (0, true, true) => multiply!(
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{own} + {side}*1]"
                    "tdpbf16ps tmm3, tmm6, tmm7";
                    left own row right
                ),
                (1, true, true) => multiply!(
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{own} + {side}*1]"
                    "tdpbf16ps tmm3, tmm6, tmm7"
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm4, tmm6, tmm7";
                    left own row right
                ),
                (1, true, false) => multiply!(
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm3, tmm6, tmm7";
                    left own row right
                ),
                (2, true, false) => multiply!(
                    "tileloadd tmm5, [{left} + {side}*1]"
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm3, tmm6, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tdpbf16ps tmm4, tmm6, tmm7";
                    left own row right
                ),
                shape => unreachable!("blocks, row and own block: {shape:?}"),
            }
        }
    }

    #[inline(always)]
    fn store_block(&mut self, sums: &mut Tile) {
        // SAFETY: the tiles were set up; the store writes `sums`.
        unsafe {
            asm!(
                "tilestored [{sums} + {side}*1], tmm0",
                side = in(reg) size_of::<Line>(), sums = in(reg) sums, options(nostack)
            );
        }
    }

    #[inline(always)]
    fn store<const N: usize, const ROW: bool>(&mut self, sums: &mut MaybeUninit<Sums>) {
        let sums = sums.as_mut_ptr();
        // SAFETY: the tiles were set up; the stores write `sums`, one after the other.
        unsafe {
            if N > 0 {
                asm!(
                    "tilestored [{sums} + {side}*1], tmm0",
                    side = in(reg) size_of::<Line>(), sums = in(reg) sums, options(nostack)
                );
            }
            if N > 1 {
                asm!(
                    "tilestored [{sums} + {side}*1 + 1024], tmm1",
                    side = in(reg) size_of::<Line>(), sums = in(reg) sums, options(nostack)
                );
            }
            if N > 2 {
                asm!(
                    "tilestored [{sums} + {side}*1 + 2048], tmm2",
                    side = in(reg) size_of::<Line>(), sums = in(reg) sums, options(nostack)
                );
            }
            if ROW {
                asm!(
                    "tilestored [{sums} + {side}*1 + 3072], tmm3",
                    "tilestored [{sums} + {side}*1 + 3136], tmm4",
                    side = in(reg) size_of::<Line>(), sums = in(reg) sums, options(nostack)
                );
            }
        }
    }
}
