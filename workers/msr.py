"""Model-specific registers that a vCPU's state has (Intel SDM vol. 4), whoever plays the processor."""

from __future__ import annotations

__all__ = ["CSTAR", "EFER", "FS_BASE", "GS_BASE", "KERNEL_GS_BASE", "LSTAR", "PAT", "STAR", "STATE", "SYSCALL_MASK",
           "SYSENTER_CS", "SYSENTER_EIP", "SYSENTER_ESP", "TSC"]

TSC = 0x10
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
PAT = 0x277
EFER = 0xC000_0080
STAR, LSTAR, CSTAR, SYSCALL_MASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102

#: Those that every accelerator saves and takes over (others, where it has them).
STATE = (TSC, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP, PAT, STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE)
