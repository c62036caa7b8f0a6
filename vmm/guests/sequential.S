# sequential: each vCPU walks over its own pages, one incq per page. The benchmark's guest: with no
# spin the inner loop is four instructions.

    .include "guest.inc"

    .equ    PARAM_PASSES, 0             # 0: for ever
    .equ    PARAM_STRIDE, 1             # pages from one write to the next
    .equ    PARAM_PAGES, 2              # 0: all of the share
    .equ    PARAM_SPIN, 3               # pauses after each write

    START
    PARAM   PARAM_PAGES, %rbx
    PARTITION %rbx
    add     %r12, %rbp                  # end of the share
    PARAM   PARAM_PASSES, %rbx          # 0 passes: 2^64 of them
    PARAM   PARAM_STRIDE, %r14
    PARAM   PARAM_SPIN, %r13
    mov     %r14, %rsi
    shl     $PAGE_SHIFT, %rsi           # the stride in bytes

.Lpass:
    mov     %r12, %r9                   # the next page to write
    FIRST_SLOT %r11d, %r11
    xor     %r10d, %r10d                # number of the slot's first usable page

.Lslot:
    cmp     %rbp, %r9
    jae     .Lpass_done
    mov     SLOT_USABLE_START(%r11), %rdi
    mov     SLOT_USABLE_END(%r11), %r8
    sub     %rdi, %r8
    shr     $PAGE_SHIFT, %r8
    add     %r10, %r8                   # number of the page after the slot's last
    cmp     %r8, %r9
    jae     .Lnext_slot

    mov     %r9, %rax
    sub     %r10, %rax
    shl     $PAGE_SHIFT, %rax
    add     %rax, %rdi                  # first GPA to write
    mov     %r8, %rax
    cmp     %rbp, %rax
    cmova   %rbp, %rax
    sub     %r9, %rax
    lea     -1(%rax,%r14), %rax
    xor     %edx, %edx
    div     %r14
    mov     %rax, %rcx                  # writes in this slot: pages / stride, rounded up
    imul    %r14, %rax
    add     %rax, %r9

    WRITE_PAGES

.Lnext_slot:
    mov     %r8, %r10
    add     $SLOT_ENTRY, %r11
    jmp     .Lslot

.Lpass_done:
    dec     %rbx
    jnz     .Lpass
    EXIT    EXIT_OK
