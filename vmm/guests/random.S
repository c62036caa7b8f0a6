# random: each vCPU increments a word in pages of its own share, drawn evenly.

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

.Lwrite:
    RANDOM  %rbp
    lea     (%r12,%rdx), %rax
    PAGE_ADDRESS
    incq    (%rdi)
    SPIN    %r10
    dec     %rbx
    jnz     .Lwrite
    EXIT    EXIT_OK
