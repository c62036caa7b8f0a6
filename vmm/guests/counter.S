# counter: all vCPUs raise one counter, each `increments` times, and the last to finish checks the sum.
# Everything lies in the first usable page of the first slot:
#
#   0x00  u64  the counter
#   0x40  u32  the lock: 1 while held
#   0x80  u32  vCPUs that have finished
#
# A failed attempt at the lock writes back what was there, so this page may be dirty yet unchanged.

    .include "guest.inc"

    .equ    PARAM_INCREMENTS, 0
    .equ    PARAM_MODE, 1               # one of:
    .equ    MODE_INC, 0                 #   lock incq, no lock word
    .equ    MODE_CMPXCHG, 1             #   lock cmpxchg; released by lock decl
    .equ    MODE_XCHG, 2                #   xchg; released by a plain store
    .equ    MODE_CMPXCHG_STORE, 3       #   lock cmpxchg; released by a plain store

    .equ    COUNTER, 0x00
    .equ    LOCK, 0x40
    .equ    DONE, 0x80

    .equ    SPINS, 128                  # before the core is offered to whoever holds the lock

    # Until the lock looks free. Clobbers eax, ecx.
    .macro AWAIT_FREE
.Lawait\@:
    mov     $SPINS, %ecx
.Lspin\@:
    pause
    cmpl    $0, LOCK(%rbx)
    je      .Lfree\@
    dec     %ecx
    jnz     .Lspin\@
    HYPERCALL HYPERCALL_YIELD           # vCPUs may outnumber the cores
    jmp     .Lawait\@
.Lfree\@:
    .endm

    START
    FIRST_SLOT %edx, %rdx
    mov     SLOT_USABLE_START(%rdx), %rbx
    cmp     SLOT_USABLE_END(%rdx), %rbx
    jb      .Lpage
    EXIT    EXIT_NO_PAGES
.Lpage:
    PARAM   PARAM_INCREMENTS, %rbp
    PARAM   PARAM_MODE, %rax
    mov     $1, %r8d
    test    %rbp, %rbp
    jz      .Lfinish
    cmp     $MODE_CMPXCHG, %eax
    je      .Lcmpxchg
    cmp     $MODE_XCHG, %eax
    je      .Lxchg
    cmp     $MODE_CMPXCHG_STORE, %eax
    je      .Lcmpxchg_store

    .p2align 4
.Linc:
    lock incq COUNTER(%rbx)
    dec     %rbp
    jnz     .Linc
    jmp     .Lfinish

.Lcmpxchg:
    xor     %eax, %eax
    lock cmpxchg %r8d, LOCK(%rbx)
    je      .Lcmpxchg_held
    AWAIT_FREE
    jmp     .Lcmpxchg
.Lcmpxchg_held:
    incq    COUNTER(%rbx)
    lock decl LOCK(%rbx)
    dec     %rbp
    jnz     .Lcmpxchg
    jmp     .Lfinish

.Lxchg:
    mov     %r8d, %eax
    xchg    %eax, LOCK(%rbx)            # locked by itself
    test    %eax, %eax
    jz      .Lxchg_held
    AWAIT_FREE
    jmp     .Lxchg
.Lxchg_held:
    incq    COUNTER(%rbx)
    movl    $0, LOCK(%rbx)
    dec     %rbp
    jnz     .Lxchg
    jmp     .Lfinish

.Lcmpxchg_store:
    xor     %eax, %eax
    lock cmpxchg %r8d, LOCK(%rbx)
    je      .Lcmpxchg_store_held
    AWAIT_FREE
    jmp     .Lcmpxchg_store
.Lcmpxchg_store_held:
    incq    COUNTER(%rbx)
    movl    $0, LOCK(%rbx)
    dec     %rbp
    jnz     .Lcmpxchg_store

.Lfinish:
    mov     $1, %eax
    lock xadd %eax, DONE(%rbx)
    inc     %eax
    cmp     %r13d, %eax
    jne     .Lright                     # others are still at it
    PARAM   PARAM_INCREMENTS, %rax
    imul    %r13, %rax
    cmp     COUNTER(%rbx), %rax
    je      .Lright
    EXIT    EXIT_WRONG
.Lright:
    EXIT    EXIT_OK
