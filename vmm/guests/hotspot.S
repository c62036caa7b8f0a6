# hotspot: like random, but a few pages (the first of the share) take most of the writes.

    .include "guest.inc"

    .equ    PARAM_WRITES, 0             # 0: for ever
    .equ    PARAM_HOT_PERCENT, 1        # of the pages
    .equ    PARAM_HOT_PROBABILITY, 2    # percent of the writes
    .equ    PARAM_SEED, 3
    .equ    PARAM_PAGES, 4              # 0: all of the share
    .equ    PARAM_SPIN, 5               # pauses after each write

    START
    PARAM   PARAM_PAGES, %rbx
    PARTITION %rbx
    PARAM   PARAM_HOT_PERCENT, %rax
    mul     %rbp
    mov     $100, %ecx
    div     %rcx
    cmp     $1, %rax
    adc     $0, %rax                    # at least one hot page
    mov     %rax, %r9                   # hot pages
    sub     %rax, %rbp                  # cold pages
    PARAM   PARAM_SEED, %rbx
    SEED_RANDOM %rbx
    PARAM   PARAM_WRITES, %rbx          # 0 writes: 2^64 of them
    PARAM   PARAM_HOT_PROBABILITY, %r8
    PARAM   PARAM_SPIN, %r10
    mov     $100, %esi

.Lwrite:
    RANDOM  %rsi
    cmp     %r8, %rdx
    jb      .Lhot
    test    %rbp, %rbp
    jz      .Lhot                       # no page is cold
    RANDOM  %rbp
    lea     (%r12,%rdx), %rax
    add     %r9, %rax
    jmp     .Lstore
.Lhot:
    RANDOM  %r9
    lea     (%r12,%rdx), %rax
.Lstore:
    PAGE_ADDRESS
    incq    (%rdi)
    SPIN    %r10
    dec     %rbx
    jnz     .Lwrite
    EXIT    EXIT_OK
