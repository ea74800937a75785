//! A borrowed, validated view of a batch of hidden states.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::Error;
use crate::limits::MAX_STATES;

/// A number that a state can be stored in; every one widens to float64 without loss.
pub trait Element: Copy + Send + Sync {
    /// True if the dtype is bfloat16, whose products float32 holds exactly.
    const IS_BF16: bool;

    /// The same batch with its dtype as a value.
    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a>;

    /// The bits of a row if the dtype is bfloat16.
    fn bf16_bits(_row: &[Self]) -> Option<&[u16]> {
        None
    }

    /// The value in float64.
    fn widen(self) -> f64;

    /// The value in float32; without loss unless the dtype is float64.
    fn single(self) -> f32;

    /// The bits of the value as a bfloat16; without loss if the dtype is bfloat16.
    fn to_bf16_bits(self) -> u16 {
        bf16::from_f64(self.widen()).to_bits()
    }
}

impl Element for f64 {
    const IS_BF16: bool = false;

    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a> {
        Typed::F64(*states)
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }

    #[inline(always)]
    fn single(self) -> f32 {
        self as f32
    }
}

impl Element for f32 {
    const IS_BF16: bool = false;

    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a> {
        Typed::F32(*states)
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const IS_BF16: bool = false;

    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a> {
        Typed::F16(*states)
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self.single())
    }

    /// In arithmetic that a compiler can make vectors of. A denormal number is the difference
    /// of two normal ones, so that no thread's flushing of denormals to zero touches it.
    #[inline(always)]
    fn single(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let (exponent, moved) = (bits & 0x7c00, (bits & 0x7fff) << 13);
        let normal = moved + (112 << 23);
        let denormal = f32::from_bits(moved + (113 << 23)) - f32::from_bits(113 << 23);
        let magnitude = match exponent {
            0 => denormal.to_bits(),
            0x7c00 => moved | 0x7f80_0000,
            _ => normal,
        };
        f32::from_bits(magnitude | (bits & 0x8000) << 16)
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;

    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a> {
        Typed::Bf16(States {
            data: states.data.reinterpret_cast(),
            num_samples: states.num_samples,
            num_states: states.num_states,
            width: states.width,
            order: states.order,
        })
    }

    #[inline(always)]
    fn bf16_bits(row: &[Self]) -> Option<&[u16]> {
        Some(row.reinterpret_cast())
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self.single())
    }

    #[inline(always)]
    fn single(self) -> f32 {
        self.to_bits().single()
    }

    #[inline(always)]
    fn to_bf16_bits(self) -> u16 {
        self.to_bits()
    }
}

/// bfloat16 as bits, for callers whose arrays have no bfloat16.
impl Element for u16 {
    const IS_BF16: bool = true;

    fn typed<'a>(states: &States<'a, Self>) -> Typed<'a> {
        Typed::Bf16(*states)
    }

    #[inline(always)]
    fn bf16_bits(row: &[Self]) -> Option<&[u16]> {
        Some(row)
    }

    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self.single())
    }

    #[inline(always)]
    fn single(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn to_bf16_bits(self) -> u16 {
        self
    }
}

/// Order of the two outer axes in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `(samples, L + 1, D)`.
    SampleFirst,
    /// `(L + 1, samples, D)`, as hooks collect it.
    StateFirst,
}

/// Refuses a number of states that cannot be compared.
pub(crate) fn check_num_states(num_states: usize) -> Result<(), Error> {
    if (2..=MAX_STATES).contains(&num_states) {
        Ok(())
    } else {
        Err(Error::NumStates(num_states))
    }
}

/// A batch of samples: `num_states` vectors of `width` values each.
#[derive(Debug, Clone, Copy)]
pub struct States<'a, T> {
    data: &'a [T],
    num_samples: usize,
    num_states: usize,
    width: usize,
    order: Order,
}

/// A batch of any dtype; bfloat16 as bits. What takes it is compiled once, in this crate: what is
/// generic would be compiled again, for each instruction set, in every program that calls it.
#[derive(Debug)]
pub enum Typed<'a> {
    /// Of float64.
    F64(States<'a, f64>),
    /// Of float32.
    F32(States<'a, f32>),
    /// Of float16.
    F16(States<'a, f16>),
    /// Of bfloat16.
    Bf16(States<'a, u16>),
}

impl<'a, T: Element> States<'a, T> {
    /// Views `data` as a batch; refuses lengths that do not fit it.
    pub fn new(
        data: &'a [T],
        num_samples: usize,
        num_states: usize,
        width: usize,
        order: Order,
    ) -> Result<Self, Error> {
        check_num_states(num_states)?;
        if width == 0 {
            return Err(Error::EmptyStates);
        }
        let expected = num_samples
            .checked_mul(num_states)
            .and_then(|rows| rows.checked_mul(width))
            .unwrap_or(usize::MAX);
        if expected != data.len() {
            return Err(Error::BufferLength {
                samples: num_samples,
                states: num_states,
                width,
                expected,
                actual: data.len(),
            });
        }
        Ok(Self {
            data,
            num_samples,
            num_states,
            width,
            order,
        })
    }

    /// Samples in the batch.
    pub fn num_samples(&self) -> usize {
        self.num_samples
    }

    /// States a sample, `L + 1`.
    pub fn num_states(&self) -> usize {
        self.num_states
    }

    /// Values a state, `D`.
    pub fn width(&self) -> usize {
        self.width
    }

    /// One state of one sample.
    #[inline]
    pub fn row(&self, sample: usize, state: usize) -> &'a [T] {
        let index = match self.order {
            Order::SampleFirst => sample * self.num_states + state,
            Order::StateFirst => state * self.num_samples + sample,
        };
        &self.data[index * self.width..][..self.width]
    }
}
