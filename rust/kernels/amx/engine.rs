//! Engines that multiply tiles of 16 x 16 sums, and the tiles.

use std::mem::MaybeUninit;

/// Rows of a tile, and 32-bit columns.
pub(super) const SIDE: usize = 16;

/// bfloat16 columns of a tile.
pub(super) const COLUMNS: usize = 2 * SIDE;

/// One tile of sums.
pub(super) type Tile = [f32; SIDE * SIDE];

/// A row of a tile.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Line(pub(super) [u32; SIDE]);

/// Lines from a block's tiles to the next one's.
pub(super) const OF_BLOCK: usize = 2 * SIDE;

/// The most blocks that a block of rows is multiplied with at a time.
pub(super) const BLOCKS: usize = 3;

/// Sums of up to three blocks of rows against one, and of one row more against two of them.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub(super) blocks: [Tile; BLOCKS],
    pub(super) rows: [[f32; SIDE]; 2],
}

/// An engine that multiplies tiles: the processor, or its twin. It holds [`Sums`].
pub(crate) trait Multiply {
    /// Sets the engine up for this thread.
    ///
    /// # Safety
    ///
    /// The engine can be used, and there is no other one in the thread.
    unsafe fn new() -> Self;

    /// Sets the sums to zero.
    fn clear(&mut self);

    /// Adds the products of a block of rows with `N` blocks over 32 columns. With `ROW` also
    /// those of one row more with the same blocks, and with `OWN` before them with one more
    /// block.
    ///
    /// # Safety
    ///
    /// `left` is a tile of 16 lines, unless `N` is 0, and `row` one line, if there is one.
    /// `right` and its followers, [`OF_BLOCK`] lines apart, are transposed tiles, and
    /// so is `own`, if there is one. `N` is at most 3, with `ROW` 2, with `OWN` 1.
    unsafe fn multiply<const N: usize, const ROW: bool, const OWN: bool>(
        &mut self,
        left: *const Line,
        own: *const Line,
        row: *const Line,
        right: *const Line,
    );

    /// Writes the sums of one block.
    fn store_block(&mut self, sums: &mut Tile);

    /// Writes the sums of `N` blocks, and of the row if there is one.
    fn store<const N: usize, const ROW: bool>(&mut self, sums: &mut MaybeUninit<Sums>);
}
