"""Accelerators: what runs a guest, or stands in for one. Each is a folder here; nothing else names them.

    base.py         what each offers: capabilities as data, what it finds on this host, the accelerator itself
    registry.py     which there are, by name
    kvm/            the processor, by KVM; its ring is the kernel's
    unicorn/        a software CPU (QEMU's TCG as a library), with dirty logging in native hooks
    replay/         no CPU: dirties pages by a pattern, or as a trace has it

Imports ipc and, of workers, what is common to all (memory, ports, state).
"""
