//! AMX: bfloat16 products in tiles of 16 x 16 sums.
//!
//! There are no stable intrinsics, so the inner loop is assembly. All else is shared with
//! its twin in plain Rust, [`tests`], which goes through the same sweep.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use crate::states::Element;

use super::{Chunk, Engine, Kernels, Soon, Sweep, Work, avx512, avx512bf16};

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

/// Sums of up to three blocks of rows against one, and of one row more against two of them.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    blocks: [Tile; BLOCKS],
    rows: [[f32; SIDE]; 2],
}

/// The most blocks that a block of rows is multiplied with at a time.
const BLOCKS: usize = 3;

/// Columns of a chunk, which are looked through for massive ones together.
const CHUNK: usize = 512;

/// Steps of 32 columns whose products are summed in float32.
const SPAN: usize = 4;

/// What multiplies tiles: the processor, or its twin. It holds [`Sums`].
pub(crate) trait Multiply: Engine {
    /// Sets the engine up for this thread.
    ///
    /// # Safety
    ///
    /// The engine can be used, and there is no other one in the thread.
    unsafe fn new() -> Self;

    /// Sets the sums to zero.
    fn clear(&mut self);

    /// Adds the products of a block of rows with `N` blocks, and with `ROW` of one row more
    /// with them, over 32 columns; with `CORNER` those of the block of rows `below` with the
    /// last of the blocks, in the place of a third.
    ///
    /// # Safety
    ///
    /// `left`, with `CORNER` also `below`, is a tile of 16 lines, and `row` one line. `right`
    /// and its followers, a span's steps apart, are transposed tiles. `N` is at most 3, with
    /// `ROW` at most 2, with `CORNER` 2.
    unsafe fn multiply<const N: usize, const ROW: bool, const CORNER: bool>(
        &mut self,
        left: *const Line,
        below: *const Line,
        row: *const Line,
        right: *const Line,
    );

    /// Writes the sums.
    fn store(&mut self, sums: &mut MaybeUninit<Sums>);
}

/// The tiles of the processor. The compiler itself uses none, so that they keep their values
/// from one piece of assembly to the next; the kernel keeps them when threads take turns.
pub(crate) struct Hardware(std::marker::PhantomData<*const ()>);

impl Drop for Hardware {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the tiles were set up; nothing needs saving any longer.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

impl Engine for Hardware {
    /// The tiles' unit needs a third of a microsecond to wake, after half of one at rest.
    #[inline(always)]
    fn keep(&mut self) {
        // SAFETY: the tiles were set up; the sums are cleared before they are used.
        unsafe { asm!("tdpbf16ps tmm3, tmm6, tmm7", options(nomem, nostack)) };
    }
}

impl Kernels for Hardware {
    type Double = avx512::Double;
    type Brain = Tiles<Hardware>;
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
    ($($line:literal)*; $left:ident $below:ident $row:ident $right:ident) => {
        asm!(
            "tileloadd tmm5, [{left} + {side}*1]",
            $($line,)*
            "/* {below} {row} {right} {of_block} */",
            left = in(reg) $left,
            below = in(reg) $below,
            row = in(reg) $row,
            right = in(reg) $right,
            side = in(reg) 4 * SIDE,
            of_block = const SPAN * SIDE * size_of::<Line>(),
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
    unsafe fn multiply<const N: usize, const ROW: bool, const CORNER: bool>(
        &mut self,
        left: *const Line,
        below: *const Line,
        row: *const Line,
        right: *const Line,
    ) {
        // SAFETY: tile loads read what the caller vouches for.
        unsafe {
            match (N, ROW, CORNER) {
                (1, false, false) => multiply!(
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7";
                    left below row right
                ),
                (2, false, false) => multiply!(
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7";
                    left below row right
                ),
                (3, false, false) => multiply!(
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + 2*{of_block}]"
                    "tdpbf16ps tmm2, tmm5, tmm7";
                    left below row right
                ),
                (1, true, false) => multiply!(
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm3, tmm6, tmm7";
                    left below row right
                ),
                (2, true, false) => multiply!(
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm3, tmm6, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tdpbf16ps tmm4, tmm6, tmm7";
                    left below row right
                ),
                (2, false, true) => multiply!(
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tileloadd tmm5, [{below} + {side}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm7";
                    left below row right
                ),
                (2, true, true) => multiply!(
                    "tileloadd tmm6, [{row} + {side}*1]"
                    "tileloadd tmm7, [{right} + {side}*1]"
                    "tdpbf16ps tmm0, tmm5, tmm7"
                    "tdpbf16ps tmm3, tmm6, tmm7"
                    "tileloadd tmm7, [{right} + {side}*1 + {of_block}]"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tdpbf16ps tmm4, tmm6, tmm7"
                    "tileloadd tmm5, [{below} + {side}*1]"
                    "tdpbf16ps tmm2, tmm5, tmm7";
                    left below row right
                ),
                shape => unreachable!("blocks, row and corner: {shape:?}"),
            }
        }
    }

    #[inline(always)]
    fn store(&mut self, sums: &mut MaybeUninit<Sums>) {
        // SAFETY: the tiles were set up; the stores write `sums`, one after the other.
        unsafe {
            asm!(
                "tilestored [{sums} + {side}*1], tmm0",
                "tilestored [{sums} + {side}*1 + 1024], tmm1",
                "tilestored [{sums} + {side}*1 + 2048], tmm2",
                "tilestored [{sums} + {side}*1 + 3072], tmm3",
                "tilestored [{sums} + {side}*1 + 3136], tmm4",
                side = in(reg) 4 * SIDE,
                sums = in(reg) sums.as_mut_ptr(),
                options(nostack)
            );
        }
    }
}

/// Sums in tiles of blocks of 16 rows, those of padding included; a row that is left over
/// from blocks is multiplied alone.
pub(crate) struct Tiles<E>(std::marker::PhantomData<E>);

/// A row of a transposed tile.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Line([u32; SIDE]);

/// An engine, the rows that it reads, and what it makes of a span of them.
pub(crate) struct Session<E> {
    engine: E,
    /// The rows of a chunk, where they are read; rows of zeros make the last block full.
    rows: Vec<*const u16>,
    /// How long they are.
    length: usize,
    tiles: Vec<Line>,
}

impl<E: Engine> Engine for Session<E> {
    #[inline(always)]
    fn keep(&mut self) {
        self.engine.keep();
    }
}

thread_local! {
    /// The last session's tiles.
    static TILES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

impl<E> Drop for Session<E> {
    fn drop(&mut self) {
        TILES.set(std::mem::take(&mut self.tiles));
    }
}

/// Blocks of rows, and whether a row is left over from them.
#[inline(always)]
fn blocks_of(num_states: usize) -> (usize, bool) {
    match (num_states / SIDE, num_states % SIDE) {
        (blocks, 0) => (blocks, false),
        (blocks @ 1.., 1) => (blocks, true),
        (blocks, _) => (blocks + 1, false),
    }
}

/// Where the sums of a block of rows with the blocks from it on begin.
#[inline(always)]
fn place_of(first: usize, blocks: usize) -> usize {
    first * (2 * blocks - first + 1) / 2 * SIDE * SIDE
}

#[inline(always)]
fn add_to(sums: &mut [f64], products: &[f32]) {
    let products = &products[..sums.len()];
    for place in 0..sums.len() {
        sums[place] += f64::from(products[place]);
    }
}

/// The tiles of a span of columns: of each block its rows and their transposition, step by
/// step, and at the end the odd row's.
struct Span {
    tiles: *mut Line,
    steps: usize,
    blocks: usize,
}

impl Span {
    /// Lines of a span's blocks, and of the odd row.
    const fn room(blocks: usize) -> usize {
        (2 * blocks + 1) * SPAN * SIDE
    }

    /// # Safety
    ///
    /// The tiles have room; the block is there.
    #[inline(always)]
    unsafe fn rows_of(&self, block: usize) -> *mut Line {
        // SAFETY: the caller's.
        unsafe { self.tiles.add(block * SPAN * SIDE) }
    }

    /// # Safety
    ///
    /// The tiles have room; the block is there.
    #[inline(always)]
    unsafe fn transposed(&self, block: usize) -> *mut Line {
        // SAFETY: the caller's.
        unsafe { self.tiles.add((self.blocks + block) * SPAN * SIDE) }
    }

    /// Copies and transposes 32 columns of 16 rows.
    ///
    /// # Safety
    ///
    /// AVX-512; the tiles have room, and `used` columns can be read `at` values on.
    #[inline(always)]
    unsafe fn fill(
        &self,
        block: usize,
        step: usize,
        from: &[*const u16; SIDE],
        at: usize,
        used: usize,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let copy = self.rows_of(block).add(step * SIDE);
            let mut rows = [_mm512_setzero_si512(); SIDE];
            if used >= COLUMNS {
                for i in 0..SIDE {
                    rows[i] = _mm512_loadu_si512(from[i].add(at).cast());
                }
            } else {
                for i in 0..SIDE {
                    rows[i] = _mm512_maskz_loadu_epi16((1 << used) - 1, from[i].add(at).cast());
                }
            }
            let columns = transposed(rows);
            let transposed = self.transposed(block).add(step * SIDE);
            for i in 0..SIDE {
                _mm512_store_si512(copy.add(i).cast(), rows[i]);
                _mm512_store_si512(transposed.add(i).cast(), columns[i]);
            }
        }
    }

    /// Multiplies block `first` with `N` blocks from `second` on, with `ROW` also the odd row
    /// with them; meanwhile the products before are added to the sums.
    ///
    /// # Safety
    ///
    /// AVX-512; the engine can be used. The blocks are there, and so is the odd row. With
    /// `CORNER` there are two blocks, and all of both is done.
    #[inline(always)]
    unsafe fn multiply<E: Multiply, const N: usize, const ROW: bool, const CORNER: bool>(
        &self,
        [first, second]: [usize; 2],
        engine: &mut E,
        pending: &mut Pending<'_>,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let left = self.rows_of(first);
            let below = self.rows_of(first + usize::from(CORNER));
            let row = self.tiles.add(2 * self.blocks * SPAN * SIDE);
            let right = self.transposed(second);
            engine.clear();
            for step in 0..self.steps {
                engine.multiply::<N, ROW, CORNER>(
                    left.add(step * SIDE),
                    below.add(step * SIDE),
                    row.add(step),
                    right.add(step * SIDE),
                );
                avx512bf16::Brain::fetch(pending.soon, 2 * pending.lines);
            }
        }
        let place = place_of(first, self.blocks) + (second - first) * SIDE * SIDE;
        let tiles = if CORNER { BLOCKS } else { N };
        let (of_row, rows) = if ROW {
            (place_of(self.blocks, self.blocks) + second * SIDE, N)
        } else {
            (0, 0)
        };
        pending.next(engine, [place, tiles * SIDE * SIDE, of_row, rows * SIDE]);
    }
}

/// Products that were just stored would be waited for: they are added when the next are.
struct Pending<'a> {
    products: [MaybeUninit<Sums>; 2],
    /// Place and number of the blocks' products, and of the row's.
    places: Option<[usize; 4]>,
    latest: usize,
    sums: &'a mut [f64],
    soon: &'a mut Soon,
    lines: usize,
}

impl Pending<'_> {
    #[inline(always)]
    fn next(&mut self, engine: &mut impl Multiply, places: [usize; 4]) {
        engine.store(&mut self.products[1 - self.latest]);
        self.add();
        self.latest = 1 - self.latest;
        self.places = Some(places);
    }

    #[inline(always)]
    fn add(&mut self) {
        let Some([place, length, of_row, row]) = self.places.take() else {
            return;
        };
        // SAFETY: these products have been stored, since there is a place for them.
        let products = unsafe { self.products[self.latest].assume_init_ref() };
        add_to(
            &mut self.sums[place..][..length],
            products.blocks.as_flattened(),
        );
        add_to(
            &mut self.sums[of_row..][..row],
            products.rows.as_flattened(),
        );
    }
}

impl<E: Multiply> Tiles<E> {
    /// Reads the chunk from now on.
    #[inline(always)]
    fn read(chunk: &Chunk<u16>, session: &mut Session<E>) {
        session.length = chunk.length();
        for state in 0..chunk.num_states() {
            session.rows[state] = chunk.row(state).as_ptr();
        }
    }
}

impl<E: Multiply> Sweep for Tiles<E> {
    type Packed = u16;

    type Engine = Session<E>;

    const CHUNK: usize = CHUNK;

    const SPAN: usize = SPAN * COLUMNS;

    const SPREAD: f64 = 0.85e-7;

    #[inline(always)]
    fn engine() -> Session<E> {
        Session {
            // SAFETY: a sweep is reached through its tier's `run` alone, one at a time.
            engine: unsafe { E::new() },
            rows: Vec::new(),
            length: 0,
            tiles: TILES.take(),
        }
    }

    fn num_sums(num_states: usize) -> usize {
        let (blocks, odd) = blocks_of(num_states);
        place_of(blocks, blocks) + if odd { blocks * SIDE } else { 0 }
    }

    /// Rows of bfloat16 are read where they are.
    #[inline(always)]
    fn pack<'a, T: Element + 'a>(
        chunk: &mut Chunk<u16>,
        row: impl Fn(usize) -> &'a [T],
        magnitudes: &mut [f32],
        squares: &mut [f64],
        soon: &mut Soon,
        session: &mut Session<E>,
    ) {
        static ZEROS: [u16; CHUNK] = [0; CHUNK];
        let num_states = chunk.num_states();
        session.rows.clear();
        session
            .rows
            .resize(num_states.next_multiple_of(SIDE), ZEROS.as_ptr());
        session.length = row(0).len();
        assert!(
            session.length <= CHUNK && session.length.next_multiple_of(COLUMNS) == chunk.length()
        );
        let lines = (soon.quota() * 2 / 5).div_ceil(num_states);
        for state in 0..num_states {
            let row = T::brains(row(state)).expect("tiles are for bfloat16");
            assert!(row.len() == session.length);
            session.rows[state] = row.as_ptr();
            // SAFETY: a sweep is reached through its tier's `run` alone.
            unsafe {
                (magnitudes[state], squares[state]) = avx512bf16::measure(row);
            }
            Self::fetch(soon, lines);
            session.engine.keep();
        }
    }

    #[inline(always)]
    fn copy<'a, T: Element + 'a>(
        chunk: &mut Chunk<u16>,
        row: impl Fn(usize) -> &'a [T],
        session: &mut Session<E>,
    ) {
        for state in 0..chunk.num_states() {
            chunk.pack(state, row(state));
        }
        Self::read(chunk, session);
    }

    #[inline(always)]
    fn add(
        chunk: &Chunk<u16>,
        fresh: bool,
        sums: &mut [f64],
        soon: &mut Soon,
        session: &mut Session<E>,
    ) {
        if fresh {
            sums.fill(0.0);
        }
        let (blocks, odd) = blocks_of(chunk.num_states());
        let Session {
            engine,
            rows,
            length,
            tiles,
        } = session;
        tiles.resize(Span::room(blocks), Line([0; SIDE]));
        assert!(sums.len() == Self::num_sums(chunk.num_states()));
        assert!(rows.len() >= blocks * SIDE + usize::from(odd));
        let steps = length.div_ceil(COLUMNS);
        let lines = soon.quota().div_ceil(2 * blocks * steps);
        let mut pending = Pending {
            products: [MaybeUninit::uninit(); 2],
            places: None,
            latest: 0,
            sums,
            soon,
            lines,
        };
        // Rows of one chunk are cut into four spans as well.
        let of_span = steps.div_ceil(4).min(SPAN);
        for start in (0..steps).step_by(of_span) {
            let s = Span {
                tiles: tiles.as_mut_ptr(),
                steps: of_span.min(steps - start),
                blocks,
            };
            // SAFETY (of all that follow): a sweep is reached through its tier's `run` alone.
            // The tiles have room for the blocks, and the rows are `length` long.
            unsafe {
                for (block, rows) in rows.as_chunks::<SIDE>().0[..blocks].iter().enumerate() {
                    for step in 0..s.steps {
                        let at = (start + step) * COLUMNS;
                        s.fill(block, step, rows, at, *length - at);
                        Self::fetch(pending.soon, lines);
                        engine.keep();
                    }
                }
                if odd {
                    for step in 0..s.steps {
                        let at = (start + step) * COLUMNS;
                        let used = COLUMNS.min(*length - at);
                        let from = rows[blocks * SIDE].add(at);
                        let row =
                            _mm512_maskz_loadu_epi16(u32::MAX >> (COLUMNS - used), from.cast());
                        let to = s.tiles.add(2 * blocks * SPAN * SIDE + step);
                        _mm512_store_si512(to.cast(), row);
                    }
                }
            }
            let (e, p) = (&mut *engine, &mut pending);
            if blocks == 2 {
                if odd {
                    unsafe { s.multiply::<E, 2, true, true>([0, 0], e, p) }
                } else {
                    unsafe { s.multiply::<E, 2, false, true>([0, 0], e, p) }
                }
                continue;
            }
            for first in 0..blocks {
                let row = first == 0 && odd;
                // With the odd row there is room for the sums of two blocks at a time.
                let most = if row { 2 } else { BLOCKS };
                for second in (first..blocks).step_by(most) {
                    let at = [first, second];
                    match (most.min(blocks - second), row) {
                        (1, true) => unsafe { s.multiply::<E, 1, true, false>(at, e, p) },
                        (_, true) => unsafe { s.multiply::<E, 2, true, false>(at, e, p) },
                        (1, _) => unsafe { s.multiply::<E, 1, false, false>(at, e, p) },
                        (2, _) => unsafe { s.multiply::<E, 2, false, false>(at, e, p) },
                        _ => unsafe { s.multiply::<E, 3, false, false>(at, e, p) },
                    }
                }
            }
        }
        pending.add();
    }

    #[inline(always)]
    fn square(row: &[u16]) -> f64 {
        avx512bf16::Brain::square(row)
    }

    #[inline(always)]
    fn fetch(soon: &mut Soon, lines: usize) {
        avx512bf16::Brain::fetch(soon, lines);
    }

    #[inline(always)]
    fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        <avx512bf16::Brain as Sweep>::square_of_sum(x, y, factor)
    }

    #[inline(always)]
    fn pack_brains(row: &[u16], to: &mut [u16]) -> Option<(f32, f64)> {
        <avx512bf16::Brain as Sweep>::pack_brains(row, to)
    }

    #[inline(always)]
    fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
        let (blocks, odd) = blocks_of(num_states);
        for i in 0..blocks {
            let tiles = sums[place_of(i, blocks)..place_of(i + 1, blocks)]
                .as_chunks()
                .0;
            for row in i * SIDE..((i + 1) * SIDE).min(num_states) {
                let start = row * (2 * num_states - row - 1) / 2;
                for (j, tile) in (i..).zip(tiles) {
                    let tile: &[f64; SIDE * SIDE] = tile;
                    let columns = (j * SIDE).max(row + 1)..((j + 1) * SIDE).min(num_states);
                    let sums = &tile[(row - i * SIDE) * SIDE..][..SIDE];
                    for column in columns {
                        products[start + column - row - 1] += sums[column - j * SIDE];
                    }
                }
            }
        }
        if odd {
            let sums = &sums[place_of(blocks, blocks)..];
            for (row, sum) in sums.iter().enumerate() {
                products[row * (2 * num_states - row - 1) / 2 + num_states - row - 2] += sum;
            }
        }
    }
}

/// Transposes 16 rows of 16 pairs of bfloat16, a pair moving as one.
///
/// # Safety
///
/// AVX-512 F.
#[inline(always)]
unsafe fn transposed(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    // SAFETY: the caller's.
    unsafe {
        // Within lanes of 128 bits: pairs of rows, then fours. (No closures: they would lack
        // the instructions of the function that this becomes part of.)
        let mut fours = rows;
        for i in (0..SIDE).step_by(4) {
            let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
            let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
            let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
            fours[i] = _mm512_unpacklo_epi64(low[0], low[1]);
            fours[i + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
            fours[i + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
            fours[i + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
        }
        // Column `4 lane + i` of rows `4 g ..` is in that lane of `fours[4 g + i]`.
        let mut columns = rows;
        for i in 0..4 {
            let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
            let even = [
                _mm512_shuffle_i32x4::<0x88>(a, b),
                _mm512_shuffle_i32x4::<0x88>(c, d),
            ];
            let odd = [
                _mm512_shuffle_i32x4::<0xdd>(a, b),
                _mm512_shuffle_i32x4::<0xdd>(c, d),
            ];
            columns[i] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
            columns[4 + i] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
            columns[8 + i] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
            columns[12 + i] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Tier;
    use crate::{Gram, Metric, Order, States};

    /// The tile instructions in plain Rust, for processors without them.
    struct Twin(Box<Sums>);

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

    /// A row of TDPBF16PS: even and odd products are summed apart, by FMA, and added to the
    /// sums at the end; denormal numbers count as zero.
    fn tdpbf16ps(sums: &mut [f32; SIDE], left: &Line, right: &[Line; SIDE]) {
        let pair = |bits: u32| [brain(bits as u16), brain((bits >> 16) as u16)];
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

    impl Engine for Twin {
        fn keep(&mut self) {}
    }

    impl Multiply for Twin {
        unsafe fn new() -> Self {
            Self(Box::new(Sums {
                blocks: [[0.0; SIDE * SIDE]; BLOCKS],
                rows: [[0.0; SIDE]; 2],
            }))
        }

        unsafe fn multiply<const N: usize, const ROW: bool, const CORNER: bool>(
            &mut self,
            left: *const Line,
            below: *const Line,
            row: *const Line,
            right: *const Line,
        ) {
            let Sums { blocks, rows } = &mut *self.0;
            // SAFETY: the caller's, as for the instructions.
            unsafe {
                let right_of = |block| &*right.add(block * SPAN * SIDE).cast::<[Line; SIDE]>();
                let tile = |sums: &mut Tile, left: *const Line, block| {
                    let left = &*left.cast::<[Line; SIDE]>();
                    for (sums, line) in sums.as_chunks_mut::<SIDE>().0.iter_mut().zip(left) {
                        tdpbf16ps(sums, line, right_of(block));
                    }
                };
                for block in 0..N {
                    tile(&mut blocks[block], left, block);
                    if ROW {
                        tdpbf16ps(&mut rows[block], &*row, right_of(block));
                    }
                }
                if CORNER {
                    tile(&mut blocks[N], below, N - 1);
                }
            }
        }

        fn clear(&mut self) {
            self.0.blocks = [[0.0; SIDE * SIDE]; BLOCKS];
            self.0.rows = [[0.0; SIDE]; 2];
        }

        fn store(&mut self, sums: &mut MaybeUninit<Sums>) {
            sums.write(*self.0);
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
}
