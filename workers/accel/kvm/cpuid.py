"""CPU features that KVM promises its guests here, by name: what KVM_GET_SUPPORTED_CPUID gives each vCPU. Bits and names
are those of the processors' manuals (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E)."""

from __future__ import annotations

import os

from . import api
from .host import DEVICE

__all__ = ["shown"]

#: {(leaf, subleaf, register): names of its bits, from the lowest; "-": not a feature, or one that depends on what the
#: guest has set up}
_NAMES = {
    (1, 0, "edx"):
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 psn clflush - ds acpi mmx "
        "fxsr sse sse2 ss htt tm ia64 pbe",
    (1, 0, "ecx"):
        "sse3 pclmulqdq dtes64 - ds-cpl vmx smx eist tm2 ssse3 cnxt-id sdbg fma cx16 xtpr pdcm - pcid dca "
        "sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    (7, 0, "ebx"):
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn smep bmi2 erms invpcid rtm rdt-m fcs-fds mpx rdt-a "
        "avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel-pt avx512pf avx512er "
        "avx512cd sha avx512bw avx512vl",
    (7, 0, "ecx"):
        "prefetchwt1 avx512vbmi umip pku - waitpkg avx512vbmi2 cet-ss gfni vaes vpclmulqdq avx512vnni "
        "avx512bitalg tme avx512vpopcntdq - la57 - - - - - rdpid",
    (7, 0, "edx"):
        "- - avx512-4vnniw avx512-4fmaps fsrm uintr - - avx512-vp2intersect srbds-ctrl md-clear "
        "rtm-always-abort - rtm-force-abort serialize hybrid tsxldtrk - pconfig arch-lbr cet-ibt - amx-bf16 "
        "avx512-fp16 amx-tile amx-int8 spec-ctrl stibp l1d-flush arch-capabilities core-capabilities ssbd",
    (7, 1, "eax"):
        "sha512 sm3 sm4 rao-int avx-vnni avx512-bf16 lass cmpccxadd",
    (0xD, 0, "eax"):
        "xstate-x87 xstate-sse xstate-avx xstate-bndregs xstate-bndcsr xstate-opmask xstate-zmm-hi256 "
        "xstate-hi16-zmm - xstate-pkru",
    (0xD, 1, "eax"):
        "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x8000_0001, 0, "edx"):
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - lm 3dnowext "
        "3dnow",
    (0x8000_0001, 0, "ecx"):
        "lahf-lm cmp-legacy svm extapic cr8-legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
        "wdt - lwp fma4 tce - - - tbm topoext perfctr-core perfctr-nb",
    (0x8000_0007, 0, "edx"):
        "- - - - - - - - invtsc",
    (0x8000_0008, 0, "ebx"):
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb",
}


def shown() -> list[str]:
    """Sorted; empty where KVM cannot be asked."""
    cpuid = api.Cpuid(nent=256)
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            api.ioctl(fd, api.GET_SUPPORTED_CPUID, cpuid)
        finally:
            os.close(fd)
    except OSError:
        return []
    return sorted({name for entry in cpuid.entries[:cpuid.nent]
                   for (leaf, subleaf, register), names in _NAMES.items()
                   if (leaf, subleaf) == (entry.function, entry.index)
                   for bit, name in enumerate(names.split()) if name != "-" and getattr(entry, register) >> bit & 1})
