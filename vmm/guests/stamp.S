# stamp: the oracle's guest. Each write puts a value never written before into the first eight bytes of
# a random page of the vCPU's share:
#
#   63      40 39   32 31       0
#   [ round   ][ vCPU ][ sequence ]
#
# The round (its low 24 bits) is read from the boot-information page before each write; the sequence
# counts this vCPU's writes from 1.

    .include "guest.inc"

    .equ    PARAM_WRITES, 0             # 0: for ever
    .equ    PARAM_SEED, 1
    .equ    PARAM_PAGES, 2              # 0: all of the share
    .equ    PARAM_SPIN, 3               # pauses after each write

    START
    PARAM   PARAM_PAGES, %rbx
    PARTITION %rbx
    PARAM   PARAM_SEED, %rbx
    SEED_RANDOM %rbx
    PARAM   PARAM_WRITES, %rbx          # 0 writes: 2^64 of them
    PARAM   PARAM_SPIN, %r10
    mov     $1, %r8d                    # the sequence
    shl     $32, %r14                   # the vCPU's bits

.Lwrite:
    RANDOM  %rbp
    lea     (%r12,%rdx), %rax
    PAGE_ADDRESS
    mov     BOOT_ROUND(%r15), %rax
    shl     $40, %rax
    or      %r14, %rax
    or      %r8, %rax
    mov     %rax, (%rdi)
    inc     %r8d
    SPIN    %r10
    dec     %rbx
    jnz     .Lwrite
    EXIT    EXIT_OK
