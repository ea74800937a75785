//! A chunk of a sample's columns, copied to where the tiles read it.

use crate::states::Element;

/// Packed rows start at multiples of this many bytes: a cache line, and the widest vector.
const LINE: usize = 64;

/// Rows are padded with zeros to a multiple of so many columns.
pub(crate) const PADDING: usize = 32;

/// A chunk has rows of zeros up to a multiple of this, for tiles of so many rows.
const ROWS: usize = 16;

/// A number as the tiles take it.
pub(crate) trait Packed: Copy + Default {
    /// The bits of a magnitude, ordered; nothing where they are not looked at.
    type Bits: Copy + Default + Ord;

    /// True if products are summed in less than float64.
    const NARROW: bool;

    /// An element in this form, without loss for the dtypes that are packed so.
    fn pack<T: Element>(value: T) -> Self;

    /// The value in float64.
    fn widen(self) -> f64;

    /// The buffer of this form, replaced if it is of another size.
    fn chunk(chunks: &mut Chunks, num_states: usize, columns: usize) -> &mut Chunk<Self>;

    /// The bits of a magnitude: greater for greater ones, greatest for NaN and infinity.
    fn bits(self) -> Self::Bits;

    /// The magnitude of these bits.
    fn magnitude(bits: Self::Bits) -> f32;
}

impl Packed for f64 {
    type Bits = ();

    const NARROW: bool = false;

    #[inline(always)]
    fn pack<T: Element>(value: T) -> Self {
        value.widen()
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }

    fn chunk(chunks: &mut Chunks, num_states: usize, columns: usize) -> &mut Chunk<Self> {
        Chunk::of_size(&mut chunks.double, num_states, columns)
    }

    #[inline(always)]
    fn bits(self) -> Self::Bits {}

    #[inline(always)]
    fn magnitude((): Self::Bits) -> f32 {
        0.0
    }
}

impl Packed for f32 {
    type Bits = u32;

    const NARROW: bool = true;

    #[inline(always)]
    fn pack<T: Element>(value: T) -> Self {
        value.single()
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self)
    }

    fn chunk(chunks: &mut Chunks, num_states: usize, columns: usize) -> &mut Chunk<Self> {
        Chunk::of_size(&mut chunks.single, num_states, columns)
    }

    #[inline(always)]
    fn bits(self) -> Self::Bits {
        self.to_bits() & 0x7fff_ffff
    }

    #[inline(always)]
    fn magnitude(bits: Self::Bits) -> f32 {
        f32::from_bits(bits)
    }
}

/// The bits of a bfloat16.
impl Packed for u16 {
    type Bits = u16;

    const NARROW: bool = true;

    #[inline(always)]
    fn pack<T: Element>(value: T) -> Self {
        value.to_bf16_bits()
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(f32::from_bits(u32::from(self) << 16))
    }

    fn chunk(chunks: &mut Chunks, num_states: usize, columns: usize) -> &mut Chunk<Self> {
        Chunk::of_size(&mut chunks.bf16, num_states, columns)
    }

    #[inline(always)]
    fn bits(self) -> Self::Bits {
        self & 0x7fff
    }

    #[inline(always)]
    fn magnitude(bits: Self::Bits) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// The greatest magnitude of some values.
#[inline(always)]
pub(crate) fn greatest<P: Packed>(values: &[P]) -> f32 {
    let mut largest = P::Bits::default();
    for value in values {
        largest = largest.max(value.bits());
    }
    P::magnitude(largest)
}

/// A buffer for each form.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    double: Option<Chunk<f64>>,
    single: Option<Chunk<f32>>,
    bf16: Option<Chunk<u16>>,
}

/// Some columns of all rows of one sample, padded with zeros.
#[derive(Debug)]
pub(crate) struct Chunk<P> {
    data: Vec<P>,
    offset: usize,
    num_states: usize,
    stride: usize,
    length: usize,
}

impl<P: Packed> Chunk<P> {
    /// Room for `columns` columns.
    pub fn new(num_states: usize, columns: usize) -> Self {
        let line = LINE / size_of::<P>();
        let stride = Self::stride_of(columns);
        let rows = num_states.next_multiple_of(ROWS);
        let data = vec![P::default(); rows * stride + line];
        let offset = data.as_ptr().align_offset(LINE).min(line);
        Self {
            data,
            offset,
            num_states,
            stride,
            length: 0,
        }
    }

    /// One line more than a power of two: rows of one column lie in different sets of the cache.
    fn stride_of(columns: usize) -> usize {
        columns.next_multiple_of(PADDING) + LINE / size_of::<P>()
    }

    fn of_size(place: &mut Option<Self>, num_states: usize, columns: usize) -> &mut Self {
        let needed = Self::stride_of(columns);
        let fits = |chunk: &Self| (chunk.num_states, chunk.stride) == (num_states, needed);
        place.take_if(|chunk| !fits(chunk));
        place.get_or_insert_with(|| Self::new(num_states, columns))
    }

    pub fn num_states(&self) -> usize {
        self.num_states
    }

    /// Columns in use, a multiple of 32.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Values from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first value; every row is within the same allocation.
    pub fn start(&self) -> *const P {
        self.data[self.offset..].as_ptr()
    }

    /// One row, its padding included.
    #[inline(always)]
    pub fn row(&self, state: usize) -> &[P] {
        &self.data[self.offset + state * self.stride..][..self.length]
    }

    /// One row to be written, its padding included.
    #[inline(always)]
    pub fn row_mut(&mut self, state: usize) -> &mut [P] {
        &mut self.data[self.offset + state * self.stride..][..self.length]
    }

    /// Sets how many columns are in use.
    pub fn resize(&mut self, columns: usize) {
        self.length = columns.next_multiple_of(PADDING);
    }

    /// Copies one row in; its greatest magnitude.
    #[inline(always)]
    pub fn pack<T: Element>(&mut self, state: usize, values: &[T]) -> f32 {
        let row = self.row_mut(state);
        let (used, padding) = row.split_at_mut(values.len());
        let mut largest = P::Bits::default();
        for (to, &value) in used.iter_mut().zip(values) {
            let packed = P::pack(value);
            largest = largest.max(packed.bits());
            *to = packed;
        }
        padding.fill(P::default());
        P::magnitude(largest)
    }

    /// Takes one column out, leaving zeros: its values in float64.
    #[inline(always)]
    pub fn take_column(&mut self, column: usize, values: &mut [f64]) {
        for (state, value) in values.iter_mut().enumerate() {
            let place = &mut self.data[self.offset + state * self.stride + column];
            *value = std::mem::take(place).widen();
        }
    }
}
