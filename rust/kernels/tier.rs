//! The instruction sets: which there are, which one this machine has, and which one is used.

#![allow(unsafe_code)]

use std::env::{VarError, var};
use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
use super::sweep::Work;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512, avx512bf16};
use crate::error::Error;

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

    /// True if this processor and this operating system have the tier's instructions.
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
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        debug_assert!(self.is_available());
        match self {
            Tier::Scalar => work.run::<scalar::Kernels>(),
            // SAFETY: a tier that is kept was `checked`: the processor has it.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => unsafe { avx2::run(work) },
            // SAFETY: a tier that is kept was `checked`: the processor has it.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => unsafe { avx512::run(work) },
            // SAFETY: a tier that is kept was `checked`: the processor has it.
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16 => unsafe { avx512bf16::run(work) },
            // SAFETY: a tier that is kept was `checked`: the processor has it.
            #[cfg(target_arch = "x86_64")]
            Tier::Amx => unsafe { amx::run(work) },
            // SAFETY: a tier that is kept was `checked`: the processor has it.
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
