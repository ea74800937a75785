//! Detection of tiles, and the permission to use them.

#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

use crate::kernels::avx512bf16;

/// True if the processor has tiles of bfloat16, the kernel saves them, and lets us use them.
pub(crate) fn is_available() -> bool {
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
        std::arch::asm!(
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
